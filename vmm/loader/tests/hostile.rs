//! Disks that are damaged, go in circles or claim the absurd: an error with what was looked for, soon.

#![allow(clippy::unwrap_used, reason = "a fault fails the test")]

mod image;

use std::time::{Duration, Instant};

use fractus_loader::{FindError, Limits, ReadAt, find};
use image::distributions::{ALPINE, alpine, debian, debian_grub};
use image::*;

/// What is said of a disk, which must come within a second.
fn refused(disk: &[u8]) -> String {
    refused_by(&mut &disk[..])
}

fn refused_by(disk: &mut dyn ReadAt) -> String {
    let began = Instant::now();
    let error = find(disk, &Limits::for_memory(64 << 20)).unwrap_err();
    let took = began.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}: {error}");
    error.to_string()
}

#[track_caller]
fn says(disk: &[u8], wanted: &str) {
    let said = refused(disk);
    assert!(said.contains(wanted), "{said}");
}

const GRUB: &str = "boot/grub/grub.cfg";

fn with_grub(text: &str) -> Vec<u8> {
    Files::new().put(GRUB, text).ext4(4, ROOT_UUID, &[])
}

#[test]
fn a_disk_without_a_table_is_named_as_one() {
    says(&[], "no partition table");
    says(&[0; 512], "no partition table");
    says(&vec![0; MIB], "no partition table");
    let noise: Vec<u8> = (0..MIB as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    says(&noise, "no partition table");
}

#[test]
fn a_gpt_that_is_broken_twice_is_told_from_none() {
    let mut disk = debian(b"k", b"i");
    let last = disk.len() - 512;
    disk[512 + 60] ^= 1;
    disk[last + 60] ^= 1;
    says(
        &disk,
        "the GPT's header has a wrong checksum, and the second header is no better",
    );
    let mut disk = debian(b"k", b"i");
    let last = disk.len() - 512;
    for header in [512, last] {
        disk[header + 80..header + 84].fill(0xff);
    }
    says(&disk, "wrong checksum");
}

#[test]
fn a_chain_of_logical_partitions_in_a_circle_ends() {
    let mut disk = mbr(&[], &[(0x83, vec![1; 512]), (0x83, vec![1; 512])]);
    // The second link leads back to the first.
    let base = MIB;
    let second = u32::from_le_bytes(disk[base + 446 + 24..][..4].try_into().unwrap()) as usize;
    let at = base + second * 512 + 446 + 16;
    disk[at + 4] = 5;
    disk[at + 12] = 1;
    says(&disk, "chain of logical partitions is broken");
}

#[test]
fn entries_that_name_missing_files_say_which() {
    says(
        &with_grub(&debian_grub("0", &["6.1"], "")),
        "entry 'Debian GNU/Linux': kernel the whole disk (ext4) /boot/vmlinuz-6.1: not there",
    );
    let no_initrd = Files::new()
        .put("boot/extlinux.conf", ALPINE)
        .put("boot/vmlinuz-virt", "k");
    says(
        &no_initrd.ext4(4, ROOT_UUID, &[]),
        "initrd the whole disk (ext4) /boot/initramfs-virt: not there",
    );
}

#[test]
fn a_file_system_without_configuration_is_said_to_have_none() {
    let disk = Files::new().put("etc/fstab", "").ext4(4, ROOT_UUID, &[]);
    says(&disk, "has neither /boot/grub/grub.cfg");
}

#[test]
fn what_only_linux_reads_asks_for_the_fallback() {
    for (offset, magic, name) in [
        (0, &b"XFSB"[..], "XFS"),
        (0x1_0040, b"_BHRfS_M", "btrfs"),
        (0x218, b"LVM2 001", "LVM"),
    ] {
        let mut root = vec![0; MIB];
        root[offset..offset + magic.len()].copy_from_slice(magic);
        let disk = gpt(&[partition(2, LINUX, root)]);
        let error = find(&mut &disk[..], &Limits::for_memory(1 << 20)).unwrap_err();
        let FindError::NeedsFallback {
            file_system,
            partition,
            ..
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!((file_system, partition.as_str()), (name, "partition 2"));
    }
}

#[test]
fn symbolic_links_in_a_circle_end() {
    let disk = Files::new()
        .put(GRUB, "menuentry x {\n linux /a\n}\n")
        .link("a", "b")
        .link("b", "/boot/../a")
        .ext4(4, ROOT_UUID, &[]);
    says(&disk, "more than 40 symbolic links");
}

#[test]
fn files_larger_than_memory_are_refused_before_they_are_read() {
    let files = Files::new()
        .put("boot/vmlinuz", "k")
        .put("boot/initrd", "i")
        .put(
            GRUB,
            "menuentry x {\n linux /boot/vmlinuz\n initrd /boot/initrd /boot/initrd\n}\n",
        );
    let file = std::fs::File::options()
        .write(true)
        .open(files.path().join("boot/initrd"))
        .unwrap();
    file.set_len(40 << 20).unwrap();
    // One would fit, twice it does not.
    says(
        &files.ext4(4, ROOT_UUID, &[]),
        "its 41943040 bytes do not fit into the machine's memory",
    );
    file.set_len(1 << 40).unwrap();
    says(
        &files.ext4(4, ROOT_UUID, &[]),
        "do not fit into the machine's memory",
    );
}

#[test]
fn scripts_without_end_end() {
    let long = format!(
        "set a=x\n{}menuentry x {{ linux $a; }}\n",
        "set a=\"$a$a\"\n".repeat(60)
    );
    for (script, wanted) in [
        ("while true; do set a=1; done\n", "given up"),
        ("function f { f; }\nf\n", "without end"),
        ("source $prefix/grub.cfg\n", "without end"),
        (long.as_str(), "without end"),
        ("if true; then\n", "line 1"),
        (
            "menuentry x {\n chainloader +1\n}\n",
            "loads no Linux kernel",
        ),
        ("linux16", "makes no menu"),
    ] {
        says(&with_grub(script), wanted);
    }
}

/// Runs debugfs on an image.
fn debugfs(image: &mut Vec<u8>, commands: &str) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &*image).unwrap();
    let script = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(script.path(), commands).unwrap();
    let output = tool("debugfs")
        .args(["-w", "-f"])
        .arg(script.path())
        .arg(file.path())
        .output()
        .unwrap();
    *image = std::fs::read(file.path()).unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn damage_within_ext4_is_named() {
    let good = || {
        Files::new()
            .put("boot/vmlinuz", vec![1; 300_000])
            .put(GRUB, "menuentry x {\n linux /boot/vmlinuz\n}\n")
            .ext4(8, ROOT_UUID, &["-O", "^metadata_csum"])
    };
    let mut absurd = good();
    absurd[1024 + 4..1024 + 8].fill(0xff);
    says(&absurd, "the superblock's numbers");
    let mut unknown = good();
    unknown[1024 + 0x62] |= 0x80;
    says(&unknown, "a feature that this loader does not know");
    let mut flipped = Files::new().ext4(8, ROOT_UUID, &[]);
    flipped[1024 + 0x80] ^= 1;
    says(&flipped, "the superblock's checksum");
    // A file that begins behind the file system's end.
    let mut outside = good();
    debugfs(
        &mut outside,
        "set_inode_field /boot/vmlinuz block[2] 0xffff0000\nset_inode_field /boot/vmlinuz block[5] 0x7fffffff\n",
    );
    says(&outside, "damaged");
    // The root folder's data are its own inode table: nonsense entries.
    let mut nonsense = good();
    debugfs(&mut nonsense, "set_inode_field / block[5] 1\n");
    assert!(!refused(&nonsense).is_empty());
}

#[test]
fn a_fat_that_is_larger_than_its_partition_is_damaged() {
    let mut disk = alpine("", b"k", b"i").fat(4, 16);
    disk[19..21].fill(0);
    disk[32..36].fill(0xff);
    says(&disk, "larger than its partition");
}

#[test]
fn clusters_in_a_circle_end() {
    let mut disk = Files::new()
        .put("extlinux.conf", ALPINE.repeat(3))
        .put("vmlinuz-virt", "k")
        .fat(16, 16);
    // Every entry of both tables leads to cluster 3.
    let (reserved, size) = (
        usize::from(disk[14]),
        usize::from(u16::from_le_bytes([disk[22], disk[23]])),
    );
    for entry in disk[reserved * 512 + 4..][..size * 2 * 512 - 4].chunks_mut(2) {
        entry.copy_from_slice(&[3, 0]);
    }
    assert!(!refused(&disk).is_empty());
}

/// Only its first bytes can be read.
struct Failing(Vec<u8>);

impl ReadAt for Failing {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        if offset > 0 {
            return Err(std::io::ErrorKind::Other.into());
        }
        (&self.0[..]).read_at(offset, buffer)
    }

    fn size(&self) -> u64 {
        self.0.len() as u64
    }
}

#[test]
fn a_disk_that_cannot_be_read_is_an_answer() {
    let said = refused_by(&mut Failing(debian(b"k", b"i")));
    assert!(said.contains("partition"), "{said}");
}
