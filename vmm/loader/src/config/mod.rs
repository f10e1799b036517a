//! Boot configurations: what an entry loads.

pub mod bls;
pub mod extlinux;
pub mod glob;
pub mod grub;
pub mod uki;
pub mod version;

/// A file on one of the trees, or a part of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Index among the trees that were found.
    pub tree: usize,
    pub path: String,
    /// None: all of it.
    pub part: Option<Part>,
}

/// Bytes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    pub offset: u64,
    pub size: u64,
}

impl Place {
    pub fn new(tree: usize, path: impl Into<String>) -> Place {
        Place {
            tree,
            path: path.into(),
            part: None,
        }
    }
}

/// An entry that was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// For people.
    pub title: String,
    pub kernel: Place,
    pub initrds: Vec<Place>,
    pub command_line: String,
}

/// Largest configuration file, bytes.
pub const MAX_CONFIG: u64 = 1 << 20;
/// Largest file of an entry, and longest pattern of names, bytes: they are compared with each other.
pub const MAX_ITEM: u64 = 16 << 10;
pub const MAX_PATTERN: usize = 256;
/// Files of one folder that are looked at.
pub const MAX_ENTRIES: usize = 512;

/// Joins the words of a command line.
pub fn join<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    let words: Vec<&str> = words.into_iter().filter(|word| !word.is_empty()).collect();
    words.join(" ")
}
