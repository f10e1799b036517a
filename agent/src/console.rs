//! Serial consoles: the log that the machine's process keeps, and the live line.

pub mod live;
pub mod ring;
