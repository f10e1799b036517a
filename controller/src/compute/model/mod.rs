//! What compute is about: servers and their state, flavors, keypairs. Plain data and pure functions;
//! no database, no HTTP.

mod admission;
pub mod cpu;
pub mod flavor;
pub mod hostname;
pub mod keypair;
pub mod server;
pub mod state;
pub mod time;
