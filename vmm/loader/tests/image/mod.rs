//! Disk images as distributions lay them out, made by the tools that make file systems.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "each test program uses its part, and a fault here fails the test"
)]

pub mod distributions;

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

pub const BIOS_BOOT: &str = "21686148-6449-6e6f-744e-656564454649";
pub const ESP: &str = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b";
pub const LINUX: &str = "0fc63daf-8483-4772-8e79-3d69d8477de4";
pub const XBOOTLDR: &str = "bc13c2ff-59e6-4262-a352-b275fd6f7172";

pub const ROOT_UUID: &str = "11111111-2222-3333-4444-555555555555";
pub const BOOT_UUID: &str = "66666666-7777-8888-9999-aaaaaaaaaaaa";

pub const MIB: usize = 1 << 20;

/// A folder of files that become a file system.
pub struct Files {
    folder: TempDir,
}

impl Files {
    pub fn new() -> Files {
        Files {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn put(self, path: &str, content: impl AsRef<[u8]>) -> Files {
        let path = self.path().join(path.trim_start_matches('/'));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
        self
    }

    pub fn link(self, path: &str, target: &str) -> Files {
        let path = self.path().join(path.trim_start_matches('/'));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(target, path).unwrap();
        self
    }

    /// With `mkfs.ext4` and these options more.
    pub fn ext4(&self, mib: usize, uuid: &str, options: &[&str]) -> Vec<u8> {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len((mib * MIB) as u64).unwrap();
        run(tool("mkfs.ext4")
            .args(["-q", "-F", "-U", uuid, "-d"])
            .arg(self.path())
            .args(options)
            .arg(image.path()));
        std::fs::read(image.path()).unwrap()
    }

    /// FAT of 12, 16 or 32 bits.
    pub fn fat(&self, mib: usize, bits: u32) -> Vec<u8> {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len((mib * MIB) as u64).unwrap();
        let bits = bits.to_string();
        run(tool("mkfs.vfat")
            .args(["-F", &bits, "-s", "1", "-i", "ABCD1234"])
            .arg(image.path()));
        for entry in std::fs::read_dir(self.path()).unwrap() {
            run(tool("mcopy")
                .args(["-s", "-i"])
                .arg(image.path())
                .arg(entry.unwrap().path())
                .arg("::/"));
        }
        std::fs::read(image.path()).unwrap()
    }
}

/// A program of a package that `scripts/setup --test` installs.
pub fn tool(name: &str) -> Command {
    let folders = ["/usr/sbin", "/sbin", "/usr/bin"];
    let paths = folders
        .iter()
        .map(|folder| PathBuf::from(folder).join(name));
    let path = paths.into_iter().find(|path| path.exists());
    Command::new(path.unwrap_or_else(|| panic!("{name} is missing: run scripts/setup --test")))
}

pub fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {said}");
}

fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 }
        })
    };
    !bytes.iter().fold(!0, step)
}

fn guid(text: &str) -> [u8; 16] {
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    let mut bytes = [0; 16];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&digits[index * 2..index * 2 + 2], 16).unwrap();
    }
    for part in [0..4, 4..6, 6..8] {
        bytes[part].reverse();
    }
    bytes
}

pub struct Partition<'a> {
    pub number: usize,
    pub kind: &'a str,
    pub content: Vec<u8>,
}

pub fn partition(number: usize, kind: &str, content: Vec<u8>) -> Partition<'_> {
    Partition {
        number,
        kind,
        content,
    }
}

/// A disk with these partitions, in the order given, from 1 MiB on.
pub fn gpt(partitions: &[Partition<'_>]) -> Vec<u8> {
    let mut disk = vec![0; MIB];
    let mut entries = vec![0; 128 * 128];
    for part in partitions {
        let first = disk.len() / 512;
        disk.extend_from_slice(&part.content);
        disk.resize(disk.len().next_multiple_of(MIB), 0);
        let entry = &mut entries[(part.number - 1) * 128..part.number * 128];
        entry[..16].copy_from_slice(&guid(part.kind));
        entry[16..32].copy_from_slice(&[part.number as u8; 16]);
        entry[32..40].copy_from_slice(&(first as u64).to_le_bytes());
        entry[40..48].copy_from_slice(&(disk.len() as u64 / 512 - 1).to_le_bytes());
    }
    disk.resize(disk.len() + MIB, 0);
    let sectors = disk.len() / 512;
    disk[446 + 4] = 0xee;
    disk[446 + 8..446 + 16].copy_from_slice(&[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    for (here, other, table) in [(1, sectors - 1, 2), (sectors - 1, 1, sectors - 33)] {
        let mut header = vec![0; 92];
        header[..8].copy_from_slice(b"EFI PART");
        header[8..16].copy_from_slice(&[0, 0, 1, 0, 92, 0, 0, 0]);
        let numbers = [
            (24, here),
            (32, other),
            (40, 34),
            (48, sectors - 34),
            (72, table),
        ];
        for (at, number) in numbers {
            header[at..at + 8].copy_from_slice(&(number as u64).to_le_bytes());
        }
        header[80..88].copy_from_slice(&[128, 0, 0, 0, 128, 0, 0, 0]);
        header[88..92].copy_from_slice(&crc32(&entries).to_le_bytes());
        let crc = crc32(&header);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
        disk[here * 512..here * 512 + 92].copy_from_slice(&header);
        disk[table * 512..table * 512 + entries.len()].copy_from_slice(&entries);
    }
    disk
}

/// A disk with an MBR: primary partitions first, then logical ones.
pub fn mbr(primary: &[(u8, Vec<u8>)], logical: &[(u8, Vec<u8>)]) -> Vec<u8> {
    let mut disk = vec![0; MIB];
    let entry = |sector: &mut [u8], index: usize, kind: u8, start: usize, count: usize| {
        let at = 446 + index * 16;
        sector[at + 4] = kind;
        sector[at + 8..at + 12].copy_from_slice(&(start as u32).to_le_bytes());
        sector[at + 12..at + 16].copy_from_slice(&(count as u32).to_le_bytes());
        sector[510..512].copy_from_slice(&[0x55, 0xaa]);
    };
    for (index, (kind, content)) in primary.iter().enumerate() {
        let start = disk.len() / 512;
        disk.extend_from_slice(content);
        disk.resize(disk.len().next_multiple_of(MIB), 0);
        let count = disk.len() / 512 - start;
        entry(&mut disk, index, *kind, start, count);
    }
    let base = disk.len() / 512;
    if !logical.is_empty() {
        let count = logical
            .iter()
            .map(|(_, content)| (content.len() + 2 * MIB) / 512)
            .sum();
        entry(&mut disk, primary.len(), 0x05, base, count);
    }
    for (index, (kind, content)) in logical.iter().enumerate() {
        let link = disk.len();
        disk.resize(link + MIB, 0);
        disk.extend_from_slice(content);
        disk.resize(disk.len().next_multiple_of(MIB), 0);
        let end = disk.len();
        let sector = &mut disk[link..link + 512];
        entry(sector, 0, *kind, MIB / 512, (end - link - MIB) / 512);
        if index + 1 < logical.len() {
            entry(sector, 1, 0x05, end / 512 - base, 1);
        }
    }
    disk
}
