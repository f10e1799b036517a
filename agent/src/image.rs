//! The image cache: what controllers gave this host, by its hash.
//!
//! Owns `images/`: `HASH` is whole and checked, `HASH.part` is a download that was cut off and is
//! resumed. Machines link what they boot from into their own folder, so the cache may forget anything
//! at any time; it forgets what was not used for longest when it is larger than its bound.

pub mod cache;
pub mod source;

pub use cache::{Cache, ImageError};
pub use source::{Source, SourceError};
