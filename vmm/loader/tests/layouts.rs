//! The layouts of distributions: what the loader finds on them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod image;

use fractus_loader::{FindError, Found, FoundFile, Limits, Piece, find};
use image::distributions::*;
use image::*;

fn search(disk: &[u8]) -> Result<Found, FindError> {
    find(&mut &disk[..], &Limits::for_memory(256 << 20))
}

fn content(disk: &[u8], file: &FoundFile) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in &file.pieces {
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

fn kernel() -> Vec<u8> {
    (0..3_000_001u32).map(|i| ((i * 7) >> 3) as u8).collect()
}

fn initrd() -> Vec<u8> {
    (0..1_234_567u32).map(|i| ((i * 13) >> 5) as u8).collect()
}

#[test]
fn debian_boots_its_simple_entry() {
    let disk = debian(&kernel(), &initrd());
    let found = search(&disk).unwrap();
    assert!(content(&disk, &found.kernel) == kernel());
    assert_eq!(found.initrds.len(), 1);
    assert!(content(&disk, &found.initrds[0]) == initrd());
    assert_eq!(
        found.command_line,
        format!(
            "BOOT_IMAGE=/boot/vmlinuz-6.1.0-13-cloud-amd64 root=UUID={ROOT_UUID} ro console=tty0 \
             console=ttyS0,115200 earlyprintk=ttyS0,115200 consoleblank=0"
        )
    );
    assert_eq!(
        found.how,
        "entry 'Debian GNU/Linux' of partition 1 (ext4) /boot/grub/grub.cfg"
    );
}

#[test]
fn a_saved_entry_in_a_submenu_is_followed_and_a_one_time_entry_is_not() {
    let versions = ["6.1.0-13-amd64", "6.1.0-9-amd64"];
    let saved = format!(
        "saved_entry=gnulinux-advanced-{ROOT_UUID}>gnulinux-6.1.0-9-amd64-advanced-{ROOT_UUID}\n\
         next_entry=0\n"
    );
    let disk = Files::new()
        .put("boot/vmlinuz-6.1.0-9-amd64", "old")
        .put("boot/initrd.img-6.1.0-9-amd64", "old initrd")
        .put(
            "boot/grub/grub.cfg",
            debian_grub("${saved_entry}", &versions, "quiet"),
        )
        .put("boot/grub/grubenv", grubenv(&saved))
        .ext4(8, ROOT_UUID, &[]);
    let found = search(&disk).unwrap();
    assert_eq!(content(&disk, &found.kernel), b"old");
    assert!(
        found.how.contains("with Linux 6.1.0-9-amd64'"),
        "{}",
        found.how
    );
}

#[test]
fn ubuntu_boots_from_its_own_boot_partition_with_its_initrd() {
    let disk = ubuntu(&kernel(), &initrd());
    let found = search(&disk).unwrap();
    assert!(content(&disk, &found.kernel) == kernel());
    assert!(content(&disk, &found.initrds[0]) == initrd());
    assert_eq!(
        found.command_line,
        "BOOT_IMAGE=/vmlinuz-6.8.0-31-generic root=LABEL=cloudimg-rootfs ro console=tty1 \
         console=ttyS0"
    );
    assert!(
        found.kernel.name.starts_with("partition 16 (ext4)"),
        "{}",
        found.kernel.name
    );
}

#[test]
fn fedora_boots_its_newest_kernel_or_the_saved_one() {
    let versions = ["6.5.6-300.fc39.x86_64", "6.10.3-200.fc39.x86_64"];
    let disk = fedora(&versions, "boot_success=0\n", b"k", b"i");
    let found = search(&disk).unwrap();
    assert_eq!(content(&disk, &found.kernel), b"k6.10.3-200.fc39.x86_64");
    assert_eq!(found.initrds.len(), 1);
    assert_eq!(
        found.command_line,
        format!(
            "BOOT_IMAGE=/vmlinuz-6.10.3-200.fc39.x86_64 root=UUID={ROOT_UUID} ro \
             rootflags=subvol=root no_timer_check console=ttyS0,115200n8"
        )
    );
    let saved = format!(
        "saved_entry={FEDORA_MACHINE}-6.5.6-300.fc39.x86_64\nkernelopts=root=/dev/vda4 ro \n"
    );
    let disk = fedora(&versions, &saved, b"k", b"i");
    let found = search(&disk).unwrap();
    assert_eq!(content(&disk, &found.kernel), b"k6.5.6-300.fc39.x86_64");
    assert!(
        found.command_line.contains(" root=/dev/vda4 ro no_timer"),
        "{}",
        found.command_line
    );
}

#[test]
fn alpine_boots_its_marked_label_from_ext4_and_fat() {
    let line = "BOOT_IMAGE=vmlinuz-virt root=LABEL=/ modules=sd-mod,usb-storage,ext4 \
                console=ttyS0,115200n8";
    let whole = alpine("boot", &kernel(), b"i").ext4(16, ROOT_UUID, &["-O", "^64bit"]);
    let ext4 = alpine("", &kernel(), b"i").ext4(16, BOOT_UUID, &["-O", "^64bit"]);
    let parted = mbr(&[(0x83, ext4), (0x83, vec![0; MIB])], &[]);
    let fat = |bits, mib| mbr(&[(0x0c, alpine("", &kernel(), b"i").fat(mib, bits))], &[]);
    for disk in [whole, parted, fat(16, 16), fat(32, 40)] {
        let found = search(&disk).unwrap();
        assert!(content(&disk, &found.kernel) == kernel(), "{}", found.how);
        assert_eq!(content(&disk, &found.initrds[0]), b"i");
        assert_eq!(found.command_line, line);
    }
}

#[test]
fn syslinux_as_on_a_stick_boots_too() {
    let config = "TIMEOUT 10\nPROMPT 1\nDEFAULT lts\n\nLABEL lts\nMENU LABEL Linux lts\n\
                  KERNEL /boot/vmlinuz-lts\nINITRD /boot/intel-ucode.img,/boot/initramfs-lts\n\
                  FDTDIR /boot/dtbs-lts\nAPPEND modules=loop,squashfs quiet\n";
    let disk = Files::new()
        .put("boot/syslinux/syslinux.cfg", config)
        .put("boot/vmlinuz-lts", "kernel")
        .put("boot/intel-ucode.img", "one")
        .put("boot/initramfs-lts", "two")
        .fat(2, 12);
    let found = search(&disk).unwrap();
    assert_eq!(content(&disk, &found.kernel), b"kernel");
    let initrds: Vec<_> = found
        .initrds
        .iter()
        .map(|file| content(&disk, file))
        .collect();
    assert_eq!(initrds, [b"one", b"two"]);
}

#[test]
fn systemd_boot_takes_the_entry_that_the_specification_puts_first() {
    let entry = |version: &str| {
        format!(
            "title Debian\nversion {version}\nmachine-id 1\nsort-key debian\n\
             options root=/dev/vda2 ro\noptions quiet\nlinux /1/{version}/linux\n\
             initrd /1/{version}/initrd.img-{version}\n"
        )
    };
    let esp = Files::new()
        .put("loader/loader.conf", "timeout 3\n#default x\n")
        .put("loader/entries/1-6.1.0-9.conf", entry("6.1.0-9"))
        .put("loader/entries/1-6.1.0-13.conf", entry("6.1.0-13"))
        .put("1/6.1.0-9/linux", "old")
        .put("1/6.1.0-13/linux", "new")
        .put("1/6.1.0-13/initrd.img-6.1.0-13", "initrd")
        .fat(4, 16);
    let disk = gpt(&[partition(1, ESP, esp)]);
    let found = search(&disk).unwrap();
    assert_eq!(content(&disk, &found.kernel), b"new");
    assert_eq!(content(&disk, &found.initrds[0]), b"initrd");
    assert_eq!(found.command_line, "root=/dev/vda2 ro quiet");
}

#[test]
fn unified_kernel_images_are_entries_among_the_others() {
    let image = |version: &str, kernel: &[u8]| {
        let release =
            format!("ID=fedora\nPRETTY_NAME=\"Fedora {version}\"\nVERSION_ID={version}\n");
        unified(&[
            (".text", &[0x90; 700]),
            (".osrel", release.as_bytes()),
            (".cmdline", b"root=UUID=1 ro\nquiet\0"),
            (".ucode", b"microcode"),
            (".initrd", &initrd()),
            (".linux", kernel),
            (".profile", b"ID=factory-reset"),
            (".cmdline", b"factory-reset"),
        ])
    };
    let esp = |default: &str| {
        let esp = Files::new()
            .put("loader/loader.conf", default)
            .put("EFI/Linux/fedora-39.efi", image("39", b"old"))
            .put("EFI/Linux/fedora-40+3-1.efi", image("40", &kernel()))
            .put(
                "EFI/Linux/fedora-41+0-3.efi",
                image("41", b"does not come up"),
            )
            .put("EFI/Linux/shell.efi", unified(&[(".text", b"no Linux")]))
            .put("EFI/Linux/noise.efi", "MZ")
            .fat(40, 32);
        gpt(&[partition(1, ESP, esp)])
    };
    let disk = esp("timeout 3\n");
    let found = search(&disk).unwrap();
    assert!(content(&disk, &found.kernel) == kernel(), "{}", found.how);
    assert_eq!(found.initrds.len(), 2);
    assert_eq!(content(&disk, &found.initrds[0]), b"microcode");
    assert!(content(&disk, &found.initrds[1]) == initrd());
    assert_eq!(found.command_line, "root=UUID=1 ro quiet");
    assert!(found.how.contains("entry 'Fedora 40'"), "{}", found.how);
    assert!(found.how.contains("/EFI/Linux/fedora-40"), "{}", found.how);
    let disk = esp("default fedora-39*\n");
    assert_eq!(content(&disk, &search(&disk).unwrap().kernel), b"old");
}

#[test]
fn a_logical_partition_boots() {
    let root = Files::new()
        .put("boot/vmlinuz", "kernel")
        .put(
            "boot/grub/grub.cfg",
            "menuentry x { linux (hd0,msdos6)/boot/vmlinuz a\\\"b 'c d' }",
        )
        .ext4(4, ROOT_UUID, &[]);
    // A one-line entry without a semicolon before the brace is what people write.
    let disk = mbr(
        &[(0x82, vec![0; MIB])],
        &[(0x83, vec![0; MIB]), (0x83, root)],
    );
    let found = search(&disk).unwrap();
    assert_eq!(content(&disk, &found.kernel), b"kernel");
    assert!(found.how.contains("partition 6"), "{}", found.how);
    assert!(
        found.command_line.ends_with(r#" a\"b "c d""#),
        "{}",
        found.command_line
    );
}

#[test]
fn the_second_header_of_a_gpt_stands_in_for_the_first() {
    let mut disk = debian(b"kernel", b"initrd");
    disk[512 + 60] ^= 1;
    assert_eq!(content(&disk, &search(&disk).unwrap().kernel), b"kernel");
    // Grown since: the second header is where the first one says.
    disk.resize(disk.len() + 16 * MIB, 0);
    assert_eq!(content(&disk, &search(&disk).unwrap().kernel), b"kernel");
    let mut disk = debian(b"kernel", b"initrd");
    disk[..34 * 512].fill(0);
    assert_eq!(content(&disk, &search(&disk).unwrap().kernel), b"kernel");
}
