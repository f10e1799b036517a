//! What is free where disks are kept, and what a copy of one must leave of it: guests that write to their disks need
//! room that nobody has given them yet.

use std::fs::File;
use std::io;

use rustix::fs::{StatVfs, fstatvfs};

/// Is left free by a copy; on a small file system a twentieth of it.
const RESERVE: u64 = 1 << 30;

#[derive(Debug, thiserror::Error)]
#[error(
    "a copy of the disk may take {bytes} bytes, and its host has {free} free, of which it keeps {reserve}; make room there and try again"
)]
pub struct NoRoom {
    bytes: u64,
    free: u64,
    reserve: u64,
}

/// Of one file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    pub free: u64,
    pub total: u64,
}

impl Room {
    /// Where this file, or folder, is.
    pub fn beside(file: &File) -> io::Result<Self> {
        Ok(Self::from(&fstatvfs(file)?))
    }

    /// What a copy leaves free.
    pub fn reserve(self) -> u64 {
        RESERVE.min(self.total / 20)
    }

    /// Whether a copy of so many bytes, holes not counted, may be begun or go on.
    pub fn takes(self, bytes: u64) -> Result<(), NoRoom> {
        let (free, reserve) = (self.free, self.reserve());
        match bytes.saturating_add(reserve) <= free {
            true => Ok(()),
            false => Err(NoRoom {
                bytes,
                free,
                reserve,
            }),
        }
    }
}

impl From<&StatVfs> for Room {
    fn from(about: &StatVfs) -> Self {
        Self {
            free: about.f_bavail.saturating_mul(about.f_frsize),
            total: about.f_blocks.saturating_mul(about.f_frsize),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_leaves_a_gibibyte_or_a_twentieth() {
        let room = |free, total| Room { free, total };
        let large = room(10 << 30, 100 << 30);
        assert!(large.takes(9 << 30).is_ok());
        let refused = large.takes((9 << 30) + 1).unwrap_err().to_string();
        assert!(refused.contains("10737418240 free"), "{refused}");
        let small = room(100 << 20, 1000 << 20);
        assert!(small.takes(50 << 20).is_ok());
        assert!(small.takes((50 << 20) + 1).is_err());
        assert!(small.takes(u64::MAX).is_err());
        // That it goes on is another question than whether it is begun.
        assert!(small.takes(0).is_ok());
        assert!(room(49 << 20, 1000 << 20).takes(0).is_err());
    }

    #[test]
    fn it_is_of_the_file_system_that_the_file_is_on() {
        let file = tempfile::tempfile().unwrap();
        let room = Room::beside(&file).unwrap();
        assert!(room.free <= room.total && room.total > 0, "{room:?}");
    }
}
