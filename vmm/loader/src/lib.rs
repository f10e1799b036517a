//! Finds what a disk boots: kernel, initrds and command line, as the boot loader on it would.
//!
//! [`find`] reads partition table, file systems and boot configuration of a disk that comes from a user.
//! It writes nothing, opens nothing, is not `unsafe` anywhere, and spends no more than its [`Limits`]:
//! whatever the disk holds, there is an answer soon. It loads nothing, either: it says on which bytes of
//! the disk the files stand ([`Piece`]). It knows of no machine and needs no KVM, so that it is a crate of
//! its own: tests and fuzzing of it are light, and nothing of the VMM can creep in.
//!
//! Looked for, on all partitions and on the whole disk, in this order: grub.cfg (Debian, Ubuntu, Fedora),
//! extlinux.conf or syslinux.cfg (Alpine), entries of the Boot Loader Specification (systemd-boot; unified
//! kernel images too), and the small grub.cfg of an EFI partition. The first that leads to a kernel that is there is taken.
//!
//! Reading order: [`find`], [`partition`], [`fs`], [`config`], and [`disk`] for what bounds it all.

#![forbid(unsafe_code)]

mod bytes;
pub mod config;
mod crc;
pub mod disk;
mod find;
pub mod fs;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod partition;

pub use disk::{Limits, Piece, ReadAt};
pub use find::{Chosen, FindError, Found, FoundFile, find, find_among};
