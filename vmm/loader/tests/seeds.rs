//! Writes the seeds of the fuzz target `disk_boot` anew: `cargo test -p fractus-loader --test seeds --
//! --ignored`. Small disks without checksums, which would hide what lies behind them from a fuzzer.

#![allow(clippy::unwrap_used, reason = "a fault fails the test")]

mod image;

use std::path::Path;

use image::distributions::{DEBIAN_HEAD, alpine, debian_grub, fedora_entry, grubenv, unified};
use image::*;

/// The parts that are not zero, as the target takes them.
fn sparse(disk: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    let mut chunk: Option<(usize, usize)> = None;
    let sectors = disk.len() / 512;
    for sector in 0..=sectors {
        let used = sector < sectors && disk[sector * 512..][..512].iter().any(|byte| *byte != 0);
        chunk = match (chunk, used) {
            (None, true) => Some((sector, sector + 1)),
            (Some((first, end)), true) if end - first < 100 => Some((first, end + 1)),
            (Some((first, end)), used) => {
                let bytes = &disk[first * 512..end * 512];
                let length = bytes.iter().rposition(|byte| *byte != 0).unwrap() + 1;
                packed.extend_from_slice(&(first as u16).to_le_bytes());
                packed.extend_from_slice(&(length as u16).to_le_bytes());
                packed.extend_from_slice(&bytes[..length]);
                used.then_some((sector, sector + 1))
            }
            (None, false) => None,
        };
    }
    packed
}

#[test]
#[ignore = "writes to the source tree"]
fn write_seeds() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/disk_boot");
    std::fs::create_dir_all(&folder).unwrap();
    let plain = |features: &str| {
        let features = format!("^metadata_csum,^resize_inode,{features}");
        vec![
            "-N".to_owned(),
            "32".to_owned(),
            "-b".to_owned(),
            "1024".to_owned(),
            "-O".to_owned(),
            features,
        ]
    };
    let ext = |files: Files, features: &str| {
        let options = plain(features);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        files.ext4(1, ROOT_UUID, &options)
    };
    let small = "set default=0\nif [ -s $prefix/grubenv ]; then load_env; fi\nmenuentry 'a' --id b {\n\
                 search --no-floppy --fs-uuid --set=root 11111111-2222-3333-4444-555555555555\n\
                 linux /vmlinuz root=$x ro\ninitrd /i /vmlinuz\n}\nsubmenu s { menuentry y { true; } }\n";
    let grub = || {
        Files::new()
            .put("boot/grub/grub.cfg", small)
            .put("vmlinuz", vec![1; 700])
            .put("boot/grub/grubenv", grubenv("saved_entry=1>0\n"))
            .link("i", "boot/../vmlinuz")
    };
    let bls = || {
        Files::new()
            .put("grub2/grub.cfg", "set boot=$root\nblscfg\n")
            .put("loader/entries/m-1.conf", fedora_entry("1"))
            .put("loader/entries/m-2+3.conf", fedora_entry("2"))
            .put("loader/loader.conf", "default m-*\n")
            .put("vmlinuz-1", "k")
            .put("initramfs-1.img", "i")
    };
    let seeds = [
        ("ext4", ext(grub(), "^has_journal")),
        ("ext2", ext(grub(), "^has_journal,^extents,^64bit")),
        ("inline", ext(grub(), "^has_journal,inline_data")),
        ("blscfg", ext(bls(), "^has_journal")),
        ("alpine", ext(alpine("boot", b"k", b"i"), "^has_journal")),
        (
            "unified",
            Files::new()
                .put(
                    "EFI/Linux/a+3.efi",
                    unified(&[(".osrel", b"ID=a"), (".cmdline", b"q"), (".linux", b"k")]),
                )
                .fat(1, 12),
        ),
        ("fat12", alpine("", b"k", b"i").fat(1, 12)),
        ("fat16", mbr(&[(6, bls().fat(3, 16))], &[])),
        (
            "logical",
            mbr(
                &[],
                &[(0x83, ext(grub(), "^has_journal")), (0x83, vec![1; 9])],
            ),
        ),
        (
            "gpt",
            gpt(&[partition(1, LINUX, ext(grub(), "^has_journal"))]),
        ),
        (
            "debian",
            ext(
                Files::new().put("boot/grub/grub.cfg", debian_grub("0", &["1"], "q")),
                "^has_journal",
            ),
        ),
        (
            "head",
            ext(
                Files::new().put("grub/grub.cfg", DEBIAN_HEAD),
                "^has_journal",
            ),
        ),
    ];
    for (name, disk) in seeds {
        std::fs::write(folder.join(name), sparse(&disk)).unwrap();
    }
}
