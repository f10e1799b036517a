//! vhost-net: packets that the host's kernel moves between a machine's rings and its taps.

use std::fs::File;
use std::io;
use std::path::Path;

pub const DEVICE: &str = "/dev/vhost-net";

/// Pairs of queues of the largest machine that gets any: each takes descriptors and a thread of its process.
pub const MOST: usize = 32;

/// One more, for one pair of queues; nobody else's.
pub fn open() -> io::Result<File> {
    open_at(Path::new(DEVICE))
}

/// One for each of so many pairs of queues, or none at all: then the machine's process moves the packets, as
/// where this host has no vhost-net, and of a machine with more than [`MOST`] pairs.
pub fn open_all(pairs: usize) -> Vec<File> {
    open_all_at(Path::new(DEVICE), pairs)
}

fn open_at(device: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(device)
}

fn open_all_at(device: &Path, pairs: usize) -> Vec<File> {
    if pairs > MOST {
        return Vec::new();
    }
    let opened: io::Result<Vec<File>> = (0..pairs).map(|_| open_at(device)).collect();
    opened.unwrap_or_else(|error| {
        if error.kind() != io::ErrorKind::NotFound {
            tracing::warn!(%error, device = %device.display(), "packets are moved without it");
        }
        Vec::new()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_for_each_pair_or_none_at_all() {
        let device = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(open_all_at(device.path(), MOST).len(), MOST);
        assert_eq!(open_all_at(device.path(), MOST + 1).len(), 0);
        assert_eq!(open_all_at(Path::new("/nowhere/vhost-net"), 3).len(), 0);
        // A folder cannot be opened to write.
        assert_eq!(open_all_at(Path::new("/"), 3).len(), 0);
    }
}
