//! A file system that Linux has mounted, as the loader's code looks at file systems.
//!
//! The loader follows symbolic links itself, from the root of the tree: nothing here leads out of it.

use std::cell::RefCell;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use fractus_loader::disk::{Fault, Piece};
use fractus_loader::fs::{FileSystem, Identity, Kind, MAX_NAMES, Node};

/// Shared with who opens the files that were found.
#[derive(Clone)]
pub struct Mounted(Rc<Inner>);

struct Inner {
    /// What is looked for in the first is looked for in the next if it is not there: btrfs has a root by
    /// default, which its configurations mean or do not mean, and one that holds everything.
    roots: Vec<PathBuf>,
    identity: Identity,
    /// By their nodes' number.
    paths: RefCell<Vec<PathBuf>>,
}

const ROOT: u64 = 0;

impl Mounted {
    pub fn new(roots: Vec<PathBuf>, identity: Identity) -> Mounted {
        let first = roots.first().cloned().unwrap_or_default();
        Mounted(Rc::new(Inner {
            roots,
            identity,
            paths: RefCell::new(vec![first]),
        }))
    }

    /// A node's file, for reading.
    pub fn open(&self, node: Node) -> io::Result<File> {
        File::open(self.path(node.id).ok_or(io::ErrorKind::NotFound)?)
    }

    fn path(&self, id: u64) -> Option<PathBuf> {
        let paths = self.0.paths.borrow();
        paths.get(usize::try_from(id).ok()?).cloned()
    }

    /// The places that a node's names are in.
    fn places(&self, id: u64) -> Vec<PathBuf> {
        match id {
            ROOT => self.0.roots.clone(),
            id => self.path(id).into_iter().collect(),
        }
    }

    fn node(&self, path: PathBuf, metadata: &Metadata) -> Node {
        let kind = match metadata.file_type() {
            kind if kind.is_file() => Kind::File,
            kind if kind.is_dir() => Kind::Folder,
            kind if kind.is_symlink() => Kind::Link,
            _ => Kind::Other,
        };
        let mut paths = self.0.paths.borrow_mut();
        paths.push(path);
        Node {
            id: paths.len() as u64 - 1,
            kind,
            size: metadata.len(),
        }
    }
}

fn fault(source: io::Error) -> Fault {
    match source.kind() {
        io::ErrorKind::NotFound => Fault::NotFound,
        io::ErrorKind::NotADirectory => Fault::NotAFolder,
        _ => Fault::Io { offset: 0, source },
    }
}

impl FileSystem for Mounted {
    fn root(&self) -> Result<Node, Fault> {
        Ok(Node {
            id: ROOT,
            kind: Kind::Folder,
            size: 0,
        })
    }

    fn lookup(&self, folder: Node, name: &str) -> Result<Node, Fault> {
        if matches!(name, "" | "." | "..") || name.contains(['/', '\0']) {
            return Err(Fault::NotFound);
        }
        for place in self.places(folder.id) {
            let path = place.join(name);
            match std::fs::symlink_metadata(&path) {
                Ok(metadata) => return Ok(self.node(path, &metadata)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(fault(error)),
            }
        }
        Err(Fault::NotFound)
    }

    fn names(&self, folder: Node) -> Result<Vec<String>, Fault> {
        let mut names = Vec::new();
        for place in self.places(folder.id) {
            for entry in std::fs::read_dir(place).map_err(fault)?.take(MAX_NAMES) {
                let name = entry.map_err(fault)?.file_name();
                names.push(name.to_string_lossy().into_owned());
            }
        }
        names.sort();
        names.dedup();
        names.truncate(MAX_NAMES);
        Ok(names)
    }

    fn link(&self, node: Node) -> Result<String, Fault> {
        let path = self.path(node.id).ok_or(Fault::NotFound)?;
        let target = std::fs::read_link(path).map_err(fault)?;
        Ok(target.to_string_lossy().into_owned())
    }

    /// The bytes themselves, where the loader's own file systems say where they stand: asked for
    /// configurations only. Kernels are opened.
    fn pieces(&self, node: Node, limit: u64) -> Result<Vec<Piece>, Fault> {
        let mut bytes = Vec::new();
        let file = self.open(node).map_err(fault)?;
        file.take(limit).read_to_end(&mut bytes).map_err(fault)?;
        // As large as it was said to be, whatever happens to it.
        bytes.resize(node.size.min(limit) as usize, 0);
        Ok(vec![Piece::Bytes(bytes)])
    }

    fn uuid(&self) -> &str {
        &self.0.identity.uuid
    }

    fn label(&self) -> &str {
        &self.0.identity.label
    }
}

/// Where the volume of this number is mounted.
pub fn mount_point(number: usize) -> io::Result<PathBuf> {
    let path = Path::new("/mnt").join(number.to_string());
    std::fs::create_dir_all(&path)?;
    Ok(path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a fault fails the test")]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_roots_are_one_tree_in_which_the_first_comes_first() {
        let folder = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        put("default/boot/a", "default");
        put("top/boot/a", "top");
        put("top/@/boot/b", "only there");
        symlink("/etc/../boot/a", folder.path().join("default/link")).unwrap();
        let roots = ["default", "top"].map(|name| folder.path().join(name));
        let identity = Identity {
            uuid: "1-2".to_owned(),
            label: "x".to_owned(),
        };
        let system = Mounted::new(roots.to_vec(), identity);
        let mut nothing: &[u8] = &[];
        let disk =
            fractus_loader::disk::Disk::new(&mut nothing, fractus_loader::Limits::for_memory(0));
        let tree = fractus_loader::fs::Tree {
            system: Box::new(system.clone()),
            disk: &disk,
            name: "it".to_owned(),
            device: "hd0".to_owned(),
            number: None,
            kind: String::new(),
        };
        assert_eq!(tree.text("/boot/a", 100).unwrap(), "default");
        assert_eq!(tree.text("/@/boot/b", 100).unwrap(), "only there");
        // Both folders' names, and links that lead no further than the tree.
        assert_eq!(tree.names("/").unwrap(), ["@", "boot", "link"]);
        assert!(matches!(tree.node("/link"), Err(Fault::NotFound)));
        assert!(matches!(
            tree.text("/boot/a", 3),
            Err(Fault::TooLarge { .. })
        ));
        assert!(matches!(
            tree.text("/boot/../../../etc/passwd", 100),
            Err(Fault::NotFound)
        ));
        let node = tree.node("/boot/a").unwrap();
        assert_eq!(
            io::read_to_string(system.open(node).unwrap()).unwrap(),
            "default"
        );
        assert_eq!(tree.system.uuid(), "1-2");
    }
}
