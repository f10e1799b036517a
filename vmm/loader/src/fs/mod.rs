//! File systems, read only: ext2/3/4 and FAT.
//!
//! Written for this loader rather than taken from a crate: the ones there are (ext4-view, fatfs) follow
//! on-disk structures in loops that no reader of theirs can end, allocate what a file claims to be, or
//! panic on some damage; and they give bytes where the loader wants to know on which blocks they stand.
//! Nothing here is `unsafe`, and every loop pays for its turns ([`crate::disk::Disk::step`]).

pub mod ext4;
pub mod fat;
mod path;
mod signature;

use crate::disk::{Fault, Piece, Volume};

pub use path::{Tree, normal, parent};
pub use signature::{Identity, identify, recognise};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    File,
    Folder,
    Link,
    Other,
}

/// Something in a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// ext4: the inode; FAT: the first cluster.
    pub id: u64,
    pub kind: Kind,
    /// Bytes.
    pub size: u64,
}

/// Names that a folder is asked for at most.
pub const MAX_NAMES: usize = 4096;

pub trait FileSystem {
    fn root(&self) -> Result<Node, Fault>;
    /// One name in a folder.
    fn lookup(&self, folder: Node, name: &str) -> Result<Node, Fault>;
    /// At most [`MAX_NAMES`] of a folder's names.
    fn names(&self, folder: Node) -> Result<Vec<String>, Fault>;
    /// Where a symbolic link leads.
    fn link(&self, node: Node) -> Result<String, Fault>;
    /// Where a file's bytes stand; of at most `limit` bytes.
    fn pieces(&self, node: Node, limit: u64) -> Result<Vec<Piece>, Fault>;
    /// As `search --fs-uuid` and `blkid` write it, in lower case.
    fn uuid(&self) -> &str;
    fn label(&self) -> &str;
}

/// A file system that was opened, or what is there instead.
pub enum Content<'a> {
    Readable(&'static str, Box<dyn FileSystem + 'a>),
    /// One that the loader reads, and cannot.
    Broken(&'static str, Fault),
    /// Recognised by its signature, and not for this loader.
    Other(signature::Other),
    Unknown,
}

/// Finds out what is on a volume.
pub fn open(volume: Volume<'_>) -> Result<Content<'_>, Fault> {
    let broken = |name, fault: Fault| match fault.ends_the_search() {
        true => Err(fault),
        false => Ok(Content::Broken(name, fault)),
    };
    match recognise(&volume)? {
        signature::Signature::Ext => match ext4::Ext4::open(volume) {
            Ok(found) => Ok(Content::Readable("ext4", Box::new(found))),
            Err(fault) => broken("ext4", fault),
        },
        signature::Signature::Fat => match fat::Fat::open(volume) {
            Ok(found) => Ok(Content::Readable("FAT", Box::new(found))),
            Err(fault) => broken("FAT", fault),
        },
        signature::Signature::Other(other) => Ok(Content::Other(other)),
        signature::Signature::None => Ok(Content::Unknown),
    }
}
