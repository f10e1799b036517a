//! What a machine travels in: to a file (a snapshot), from a file (a restore), between processes (a migration).
//!
//! A stream is a sequence of frames ([`frame`]): one that opens it, any number with memory, the machine's state,
//! and one that ends it, so that a stream which was cut short is never taken for a whole one. Memory is numbered
//! as in the machine's memfd, in pages of 4 KiB and blocks of 16 pages; what no frame speaks of is zero, or as in
//! the stream's base.
//!
//! A snapshot's file ([`snapshot`]) holds the same frames, but a page that it has lies at its own place, a fixed
//! distance from the page's offset in memory, and the frames hold only which pages those are and what they sum up
//! to. So a page that is copied again takes no further room, what is zero is a hole, and the whole of memory can be
//! mapped at once without being read. Another form of it has its blocks compressed, one behind the other, and has to be
//! read.

pub mod converge;
pub mod frame;
pub mod lane;
pub mod live;
mod pages;
pub mod snapshot;
pub mod working_set;

use std::io;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use pages::{BLOCK, Mask, PAGE};

/// The newest form of the stream; this build reads those from 1 on, and writes the oldest that has what is asked for: 1,
/// or 2 for a snapshot whose blocks are compressed.
pub const FORMAT: u32 = 2;

/// Bytes of a machine's state at most: what a hostile stream can make us allocate.
pub(crate) const MOST_STATE: usize = 64 << 20;

/// The first frame: what follows, and what it is to be laid over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Opening {
    /// Of this stream.
    pub id: Uuid,
    /// The stream that has the pages of which this one does not speak; `None`: those are zero.
    pub base: Option<Uuid>,
    /// Bytes of the machine's memfd.
    pub memory: u64,
    /// Version of the program that wrote it, for people.
    pub made_by: String,
}

/// A machine's memory, numbered as in its memfd, that a stream is loaded into.
pub trait Target {
    /// Bytes.
    fn length(&self) -> io::Result<u64>;
    fn put(&self, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// So many bytes read as zero from now on.
    fn clear(&self, offset: u64, length: u64) -> io::Result<()>;
}

/// The last frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Totals {
    /// Pages with content.
    pub pages: u64,
    /// Pages that are zero and were not in the base.
    pub zeros: u64,
}

/// Why a stream is not believed, or could not be written.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("{action} the stream")]
    Io {
        action: &'static str,
        source: io::Error,
    },
    #[error("this is no machine's stream")]
    Magic,
    #[error("a stream of form {found}; this build reads forms up to {FORMAT}")]
    Format { found: u32 },
    #[error("a snapshot that was not finished")]
    Unfinished,
    #[error("the stream ends within {what}")]
    Truncated { what: &'static str },
    #[error("{what} does not match its checksum: it was damaged")]
    Checksum { what: String },
    #[error("{what} cannot be decompressed: it was damaged")]
    Packed { what: String },
    #[error("frame {found} where {expected} should be: a part is missing or stands twice")]
    Order { expected: u32, found: u32 },
    #[error("a frame of a kind that this build does not know ({kind})")]
    Kind { kind: u16 },
    #[error("the stream is damaged or hostile: {problem}")]
    Malformed { problem: &'static str },
    #[error("the stream is of {found} bytes of memory, the machine has {expected}")]
    Shape { expected: u64, found: u64 },
}

/// In postcard.
pub(crate) fn packed<T: Serialize>(value: &T) -> Result<Vec<u8>, StreamError> {
    postcard::to_stdvec(value).map_err(|_| malformed("it cannot be packed"))
}

/// What [`packed`] made, and nothing behind it.
pub(crate) fn unpacked<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, StreamError> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) => Ok(value),
        _ => Err(malformed("a frame that is not what its kind says")),
    }
}

fn io(action: &'static str) -> impl FnOnce(io::Error) -> StreamError {
    move |source| StreamError::Io { action, source }
}

pub(crate) fn malformed(problem: &'static str) -> StreamError {
    StreamError::Malformed { problem }
}
