//! The kinds of ext2, ext3 and ext4 that there are, each read to its last byte.

#![allow(clippy::unwrap_used, reason = "a fault fails the test")]

mod image;

use fractus_loader::{Limits, Piece, find};
use image::*;

/// The content of the kernel that the disk's extlinux.conf names.
fn kernel_of(disk: &[u8]) -> Vec<u8> {
    let found =
        find(&mut &disk[..], &Limits::for_memory(64 << 20)).unwrap_or_else(|e| panic!("{e}"));
    let mut bytes = Vec::new();
    for piece in &found.kernel.pieces {
        match piece {
            Piece::Disk { offset, length } => {
                bytes.extend_from_slice(&disk[*offset as usize..][..*length as usize]);
            }
            Piece::Zero { length } => bytes.resize(bytes.len() + *length as usize, 0),
            Piece::Bytes(more) => bytes.extend_from_slice(more),
        }
    }
    bytes
}

fn config(kernel: &str) -> String {
    format!("LABEL a\n LINUX {kernel}\n")
}

fn content(length: u32) -> Vec<u8> {
    (0..length)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8)
        .collect()
}

#[test]
fn every_kind_of_ext_gives_the_same_file() {
    // Larger than what the twelve blocks, and the list of 256, of ext2 hold.
    let kernel = content(700_001);
    for options in [
        &["-t", "ext2", "-b", "1024"][..],
        &["-t", "ext2", "-b", "4096"],
        &["-t", "ext3"],
        &["-O", "^64bit,^metadata_csum"],
        &["-O", "64bit,metadata_csum", "-b", "1024"],
        &["-O", "64bit,metadata_csum,inline_data", "-I", "256"],
        &["-O", "bigalloc,meta_bg,^resize_inode"],
        &["-O", "metadata_csum_seed,encrypt,large_dir,mmp,ea_inode"],
        &["-I", "128", "-O", "^metadata_csum"],
    ] {
        let disk = Files::new()
            .put("boot/extlinux.conf", config("/a/link/vmlinuz"))
            .put("deep/er/vmlinuz", &kernel)
            .link("a/link", "../deep/./er")
            .ext4(16, ROOT_UUID, options);
        println!("{options:?}");
        assert!(kernel_of(&disk) == kernel, "{options:?}");
    }
}

#[test]
fn small_files_and_folders_within_inodes_are_read() {
    for length in [20, 60, 61, 100, 150] {
        let kernel = content(length);
        let disk = Files::new()
            .put("extlinux.conf", config("f/a/vmlinuz"))
            .put("f/a/vmlinuz", &kernel)
            .put("f/a/another-name-that-takes-room", "x")
            .put("f/a/and-another-one-that-does-too", "x")
            .ext4(4, ROOT_UUID, &["-O", "inline_data", "-I", "256"]);
        assert_eq!(kernel_of(&disk), kernel, "{length}");
    }
}

#[test]
fn a_folder_with_a_hash_tree_and_a_long_link_are_followed() {
    let target = format!("{}/vmlinuz", "x".repeat(120));
    let mut files = Files::new()
        .put("extlinux.conf", config("/many/name-2999"))
        .put(&format!("many/{target}"), "the kernel")
        .link("many/name-2999", &target);
    for index in 0..2999 {
        files = files.put(&format!("many/name-{index}"), "");
    }
    let mut disk = files.ext4(16, ROOT_UUID, &["-b", "1024", "-N", "4096"]);
    assert_eq!(kernel_of(&disk), b"the kernel");
    // With the index that e2fsck makes of it.
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &disk).unwrap();
    // 1: it has changed something.
    let status = tool("e2fsck")
        .args(["-fyD"])
        .arg(file.path())
        .output()
        .unwrap()
        .status;
    assert!(matches!(status.code(), Some(0 | 1)), "{status}");
    disk = std::fs::read(file.path()).unwrap();
    assert_eq!(kernel_of(&disk), b"the kernel");
}

#[test]
fn holes_read_as_zeros() {
    let mut kernel = content(40_000);
    kernel[8192..24576].fill(0);
    let files = Files::new().put("extlinux.conf", config("v"));
    let file = std::fs::File::create(files.path().join("v")).unwrap();
    for range in [0..8192, 24576..40_000] {
        std::os::unix::fs::FileExt::write_all_at(&file, &kernel[range.clone()], range.start as u64)
            .unwrap();
    }
    for options in [&["-b", "4096"][..], &["-t", "ext2", "-b", "1024"]] {
        let disk = files.ext4(4, ROOT_UUID, options);
        assert!(kernel_of(&disk) == kernel, "{options:?}");
    }
}

/// Runs debugfs on an image and gives what it says.
fn debugfs(disk: &mut Vec<u8>, commands: &str) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &*disk).unwrap();
    let script = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(script.path(), commands).unwrap();
    let output = tool("debugfs")
        .args(["-w", "-f"])
        .arg(script.path())
        .arg(file.path())
        .output()
        .unwrap();
    *disk = std::fs::read(file.path()).unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn what_a_journal_holds_is_what_counts() {
    for options in [
        &["-O", "64bit,metadata_csum"][..],
        &["-O", "^64bit,metadata_csum"],
        &["-O", "^64bit,^metadata_csum"],
        &["-t", "ext3", "-b", "1024"],
    ] {
        let size = if options.contains(&"1024") {
            1024
        } else {
            4096
        };
        let new = tempfile::NamedTempFile::new().unwrap();
        let mut disk = Files::new()
            .put("extlinux.conf", config("v"))
            .put("v", vec![b'o'; size])
            .ext4(
                16,
                ROOT_UUID,
                &[options, &["-b", &size.to_string()]].concat(),
            );
        let said = debugfs(&mut disk, "blocks /v\n");
        let block: u64 = said.split_whitespace().last().unwrap().parse().unwrap();
        // Twice: the second commit counts. A block that begins like a journal's is escaped.
        let mut one = vec![b'1'; size];
        one[..4].copy_from_slice(&[0xc0, 0x3b, 0x39, 0x98]);
        std::fs::write(new.path(), &one).unwrap();
        let path = new.path().display();
        debugfs(&mut disk, &format!("jo\njw -b {block} {path}\njc\n"));
        assert!(kernel_of(&disk) == one, "{options:?}");
        std::fs::write(new.path(), vec![b'2'; size]).unwrap();
        debugfs(&mut disk, &format!("jo\njw -b {block} {path}\njc\n"));
        assert!(kernel_of(&disk) == vec![b'2'; size], "{options:?}");
        // A block that was freed later keeps what it has been given since.
        debugfs(&mut disk, &format!("jo\njw -r {block}\njc\n"));
        assert!(kernel_of(&disk) == vec![b'o'; size], "{options:?}");
    }
}
