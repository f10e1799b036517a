//! The host's networks, as far as one machine needs them: taps.

pub mod tap;
