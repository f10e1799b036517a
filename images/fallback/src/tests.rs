//! What the search finds on mounted trees as distributions lay them out. The real file systems, kernels and
//! kexec are tried in the lab.

use std::path::Path;

use fractus_loader::disk::Disk;
use fractus_loader::fs::{Identity, Tree};
use fractus_loader::{FindError, Limits, find_among};

use super::image::distributions::{FEDORA_GRUB, fedora_entry, grubenv, opensuse_grub};
use super::image::{BOOT_UUID, Files, ROOT_UUID};
use crate::files;
use crate::mounted::Mounted;
use crate::volumes::Origin;

struct Volume {
    system: Mounted,
    name: &'static str,
    device: &'static str,
    number: Option<u32>,
}

fn volume(roots: &[&Path], uuid: &str) -> Mounted {
    let identity = Identity {
        uuid: uuid.to_owned(),
        label: String::new(),
    };
    Mounted::new(
        roots.iter().map(|root| root.to_path_buf()).collect(),
        identity,
    )
}

/// What is started, as `(kernel, initrds, command line, how)`; or what is said.
fn started(volumes: Vec<Volume>) -> Result<(String, String, String, String), String> {
    let mut nothing: &[u8] = &[];
    let budget = Disk::new(&mut nothing, Limits::for_memory(1 << 20));
    let origins: Vec<Origin> = volumes
        .iter()
        .map(|volume| Origin::Mounted(volume.system.clone()))
        .collect();
    let trees = volumes.into_iter().map(|volume| Tree {
        system: Box::new(volume.system),
        disk: &budget,
        name: volume.name.to_owned(),
        device: volume.device.to_owned(),
        number: volume.number,
        kind: String::new(),
    });
    let chosen = find_among(&budget, trees.collect(), vec!["a remark".to_owned()])
        .map_err(|error: FindError| error.to_string())?;
    let kernel = files::one(&chosen, &origins, &chosen.entry.kernel)?;
    let initrd = files::joined(&chosen, &origins, &chosen.entry.initrds)?;
    let text = |mut file: std::fs::File| {
        std::io::Seek::rewind(&mut file).unwrap();
        std::io::read_to_string(file).unwrap()
    };
    Ok((
        text(kernel),
        initrd.map_or(String::new(), text),
        chosen.entry.command_line.clone(),
        chosen.how,
    ))
}

/// Rocky's /boot on XFS.
fn rocky() -> Files {
    Files::new()
        .put("grub2/grub.cfg", FEDORA_GRUB)
        .put(
            "grub2/grubenv",
            grubenv("kernelopts=root=/dev/mapper/rocky-root ro \n"),
        )
        .put(
            "loader/entries/0123-5.14.0-9.el9.conf",
            fedora_entry("5.14.0-9.el9"),
        )
        .put(
            "loader/entries/0123-5.14.0-70.el9.conf",
            fedora_entry("5.14.0-70.el9"),
        )
        .put("vmlinuz-5.14.0-9.el9", "old")
        .put("vmlinuz-5.14.0-70.el9", "new")
        .put("initramfs-5.14.0-70.el9.img", "initrd")
}

#[test]
fn entries_of_a_boot_partition_are_found() {
    let (boot, root) = (rocky(), Files::new().put("etc/fstab", ""));
    let volumes = vec![
        Volume {
            system: volume(&[boot.path()], BOOT_UUID),
            name: "partition 2 (XFS)",
            device: "hd0,gpt2",
            number: Some(2),
        },
        Volume {
            system: volume(&[root.path()], ROOT_UUID),
            name: "logical volume rocky-root (XFS)",
            device: "lvm/rocky-root",
            number: None,
        },
    ];
    let (kernel, initrd, line, how) = started(volumes).unwrap();
    assert_eq!((kernel.as_str(), initrd.as_str()), ("new", "initrd"));
    assert_eq!(
        line,
        "BOOT_IMAGE=/vmlinuz-5.14.0-70.el9 root=/dev/mapper/rocky-root ro no_timer_check \
         console=ttyS0,115200n8"
    );
    assert!(
        how.ends_with("of partition 2 (XFS) /grub2/grub.cfg"),
        "{how}"
    );
}

#[test]
fn paths_of_btrfs_are_those_of_its_default_root_or_of_all() {
    let grub = |prefix: &str| {
        opensuse_grub("6.4", "/boot/initrd-6.4 /boot/more", "quiet")
            .replace("/boot/vmlinuz", &format!("{prefix}/boot/vmlinuz"))
            .replace(" /boot/", &format!(" {prefix}/boot/"))
            .replace("\t/boot/", &format!("\t{prefix}/boot/"))
    };
    for prefix in ["", "/@"] {
        let top = Files::new()
            .put("@/boot/grub2/grub.cfg", grub(prefix))
            .put("@/boot/vmlinuz-6.4", "kernel")
            .put("@/boot/initrd-6.4", "1")
            .put("@/boot/more", "2");
        let root = top.path().join("@");
        let volumes = vec![Volume {
            system: volume(&[&root, top.path()], ROOT_UUID),
            name: "partition 3 (btrfs)",
            device: "hd0,gpt3",
            number: Some(3),
        }];
        let (kernel, initrd, line, _) = started(volumes).unwrap();
        assert_eq!(kernel, "kernel");
        // Each at a multiple of 4 bytes.
        assert_eq!(initrd, "1\0\0\x002");
        let wanted = format!("BOOT_IMAGE={prefix}/boot/vmlinuz-6.4 root=UUID={ROOT_UUID} quiet");
        assert_eq!(line, wanted);
    }
}

#[test]
fn what_is_missing_is_named_beside_what_could_not_be_mounted() {
    let boot = rocky();
    std::fs::remove_file(boot.path().join("initramfs-5.14.0-70.el9.img")).unwrap();
    let volumes = vec![Volume {
        system: volume(&[boot.path()], BOOT_UUID),
        name: "partition 2 (XFS)",
        device: "hd0,gpt2",
        number: Some(2),
    }];
    let said = started(volumes).unwrap_err();
    let wanted = "partition 2 (XFS) /initramfs-5.14.0-70.el9.img: not there";
    assert!(said.contains(wanted) && said.contains("a remark"), "{said}");
}

#[test]
fn what_is_behind_the_dashes_is_the_order() {
    let order = |line| crate::order(line).map(|order| (order.disk, order.more));
    let line = "console=ttyS0 quiet -- disk=2 a=\"b c\" -- d\n";
    assert_eq!(order(line), Ok((2, "a=\"b c\" -- d".to_owned())));
    assert_eq!(order("quiet -- disk=0"), Ok((0, String::new())));
    assert!(order("quiet").unwrap_err().contains("quiet"));
    assert!(order("quiet -- disk=x y").is_err());
}
