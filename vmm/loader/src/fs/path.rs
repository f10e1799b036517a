//! Paths: from the root of a file system, through symbolic links.

use std::collections::VecDeque;

use super::{FileSystem, Kind, Node};
use crate::disk::{Disk, Fault, Piece, read_pieces};

const MAX_LINKS: u32 = 40;
const MAX_DEPTH: usize = 64;
/// Linux's PATH_MAX.
const MAX_PATH: usize = 4096;

/// A file system with the place that it has on the disk.
pub struct Tree<'a> {
    pub system: Box<dyn FileSystem + 'a>,
    pub disk: &'a Disk<'a>,
    /// For people: `partition 1 (ext4)`.
    pub name: String,
    /// As GRUB names it: `hd0,gpt1`, or `hd0`.
    pub device: String,
    /// Its partition's number; `None` for the whole disk.
    pub number: Option<u32>,
    /// The partition's type, see [`crate::partition::Partition`].
    pub kind: String,
}

impl Tree<'_> {
    pub fn node(&self, path: &str) -> Result<Node, Fault> {
        let root = self.system.root()?;
        let mut above = vec![root];
        let mut ahead: VecDeque<String> = parts(path);
        let mut links = 0;
        while let Some(name) = ahead.pop_front() {
            self.disk.step()?;
            match name.as_str() {
                "." => continue,
                ".." => {
                    if above.len() > 1 {
                        above.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let folder = above.last().copied().unwrap_or(root);
            if folder.kind != Kind::Folder {
                return Err(Fault::NotAFolder);
            }
            let node = self.system.lookup(folder, &name)?;
            if node.kind != Kind::Link {
                if above.len() >= MAX_DEPTH {
                    return Err(Fault::Damaged("a path too deep"));
                }
                above.push(node);
                continue;
            }
            links += 1;
            if links > MAX_LINKS {
                return Err(Fault::TooManyLinks);
            }
            if node.size > MAX_PATH as u64 {
                return Err(Fault::Damaged("a symbolic link longer than a path"));
            }
            let target = self.system.link(node)?;
            if target.starts_with('/') {
                above.truncate(1);
            }
            for part in parts(&target).into_iter().rev() {
                ahead.push_front(part);
            }
            if ahead.len() > MAX_PATH {
                return Err(Fault::TooManyLinks);
            }
        }
        above.last().copied().ok_or(Fault::NotFound)
    }

    /// Where a regular file's bytes stand.
    pub fn file(&self, path: &str, limit: u64) -> Result<(u64, Vec<Piece>), Fault> {
        let node = self.node(path)?;
        if node.kind != Kind::File {
            return Err(Fault::NotAFile);
        }
        if node.size > limit {
            let size = node.size;
            return Err(Fault::TooLarge { size, limit });
        }
        Ok((node.size, self.system.pieces(node, limit)?))
    }

    /// A text file's content; what is no UTF-8 in it is replaced.
    pub fn text(&self, path: &str, limit: u64) -> Result<String, Fault> {
        let (_, pieces) = self.file(path, limit)?;
        let bytes = read_pieces(self.disk, &pieces)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The names in a folder.
    pub fn names(&self, path: &str) -> Result<Vec<String>, Fault> {
        let node = self.node(path)?;
        if node.kind != Kind::Folder {
            return Err(Fault::NotAFolder);
        }
        self.system.names(node)
    }
}

fn parts(path: &str) -> VecDeque<String> {
    let parts = path.split('/').filter(|part| !part.is_empty());
    parts.map(str::to_owned).collect()
}

/// `path` from the root, without `.`, `..` and doubled slashes.
pub fn normal(path: &str) -> String {
    let mut kept: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(kept.pop()),
            part => kept.push(part),
        }
    }
    format!("/{}", kept.join("/"))
}

/// The folder that `path` is in.
pub fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(folder, _)| folder)
}
