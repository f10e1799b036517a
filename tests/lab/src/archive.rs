//! Archives in cpio's "newc" form, which Linux takes as its initial file system.
//!
//! The same entries give the same bytes: no times, no owners, numbers in order.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::Path;

const FOLDER: u32 = 0o040_755;
const LINK: u32 = 0o120_777;
const CHARACTER: u32 = 0o020_600;
const REGULAR: u32 = 0o100_000;

/// An archive that is being written.
#[derive(Debug)]
pub struct Archive<W: Write> {
    out: W,
    next: u32,
    folders: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    pub fn new(out: W) -> Self {
        Self {
            out,
            next: 1,
            folders: BTreeSet::new(),
        }
    }

    /// A folder, with those that it lies in. Names have no slash at either end.
    pub fn folder(&mut self, name: &str) -> io::Result<()> {
        for (end, _) in name.match_indices('/').chain([(name.len(), "")]) {
            let folder = &name[..end];
            if !folder.is_empty() && self.folders.insert(folder.to_owned()) {
                self.entry(folder, FOLDER, &[], (0, 0))?;
            }
        }
        Ok(())
    }

    /// `mode`: the permission bits.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.parent(name)?;
        self.entry(name, REGULAR | mode, content, (0, 0))
    }

    /// A file of this machine, followed if it is a link.
    pub fn copy(&mut self, name: &str, mode: u32, from: &Path) -> io::Result<()> {
        let content = std::fs::read(from)
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", from.display())))?;
        self.file(name, mode, &content)
    }

    pub fn link(&mut self, name: &str, target: &str) -> io::Result<()> {
        self.parent(name)?;
        self.entry(name, LINK, target.as_bytes(), (0, 0))
    }

    pub fn character_device(&mut self, name: &str, major: u32, minor: u32) -> io::Result<()> {
        self.parent(name)?;
        self.entry(name, CHARACTER, &[], (major, minor))
    }

    /// Ends the archive; gives what it was written to.
    pub fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[], (0, 0))?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parent(&mut self, name: &str) -> io::Result<()> {
        match name.rsplit_once('/') {
            Some((folder, _)) => self.folder(folder),
            None => Ok(()),
        }
    }

    /// Header (Linux: Documentation/driver-api/early-userspace/buffer-format.rst), name and content,
    /// each filled up to 4 bytes.
    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        content: &[u8],
        device: (u32, u32),
    ) -> io::Result<()> {
        let size = u32::try_from(content.len())
            .map_err(|_| io::Error::other(format!("{name} is too large for cpio")))?;
        let name_size = name.len() as u32 + 1;
        let (number, links, owner, time) = (self.next, 1, 0, 0);
        self.next += 1;
        let fields = [
            number, mode, owner, owner, links, time, size, 0, 0, device.0, device.1, name_size, 0,
        ];
        let mut header = String::from("070701");
        for field in fields {
            header.push_str(&format!("{field:08x}"));
        }
        header.push_str(name);
        header.push('\0');
        self.out.write_all(header.as_bytes())?;
        self.fill(header.len())?;
        self.out.write_all(content)?;
        self.fill(content.len())
    }

    fn fill(&mut self, length: usize) -> io::Result<()> {
        self.out.write_all(&[0; 3][..length.wrapping_neg() % 4])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(archive: &[u8]) -> Vec<String> {
        let (mut at, mut names) = (0, Vec::new());
        let field = |at: usize, index: usize| {
            let from = at + 6 + index * 8;
            let text = std::str::from_utf8(&archive[from..from + 8]).unwrap();
            usize::from_str_radix(text, 16).unwrap()
        };
        while at < archive.len() {
            assert_eq!(&archive[at..at + 6], b"070701");
            let (size, name_size) = (field(at, 6), field(at, 11));
            let name = &archive[at + 110..at + 110 + name_size - 1];
            names.push(String::from_utf8(name.to_vec()).unwrap());
            at = (at + 110 + name_size).next_multiple_of(4);
            at = (at + size).next_multiple_of(4);
        }
        names
    }

    #[test]
    fn folders_come_once_and_before_what_is_in_them() {
        let mut archive = Archive::new(Vec::new());
        archive.file("a/b/one", 0o644, b"12345").unwrap();
        archive.file("a/two", 0o755, b"").unwrap();
        archive.link("a/b/three", "one").unwrap();
        let bytes = archive.finish().unwrap();
        let wanted = ["a", "a/b", "a/b/one", "a/two", "a/b/three", "TRAILER!!!"];
        assert_eq!(names(&bytes), wanted);
    }
}
