//! A machine that boots what is on its disk: the probe stands there as a distribution's kernel.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

#[path = "../loader/tests/image/mod.rs"]
mod image;
mod probe_guest;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use fractus_vmm::config::BootSource;
use fractus_vmm::machine::{Event, StopReason};
use image::distributions::{debian, debian_grub};
use image::{Files, ROOT_UUID};
use probe_guest::{Guest, Setup};
use rustix::fs::SeekFrom;

fn probe() -> Vec<u8> {
    std::fs::read(probe_guest::image()).unwrap()
}

fn disk(content: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(content, 0).unwrap();
    file
}

fn setup(disk: &File) -> Setup {
    let mut setup = Setup::new().disk(disk, |_| {}).without_kernel();
    setup.config.boot = BootSource::Disk(0);
    setup
}

fn booted(disk: &File) -> Guest {
    setup(disk).boot()
}

#[test]
fn a_debian_disk_boots_with_its_command_line_and_ours_behind() {
    let disk = disk(&debian(&probe(), b"initrd"));
    let mut guest = booted(&disk);
    let line = guest.ok("command-line");
    assert!(
        line.starts_with("BOOT_IMAGE=/boot/vmlinuz-6.1.0-13-cloud-amd64 root="),
        "{line}"
    );
    assert!(line.ends_with(" consoleblank=0 tick_ms=0"), "{line}");
}

/// A root file system of ext4 without a partition table, whose kernel's name is in `version`.
fn root(version: &str) -> Vec<u8> {
    Files::new()
        .put(&format!("boot/vmlinuz-{version}"), probe())
        .put(&format!("boot/initrd.img-{version}"), "initrd")
        .put("boot/grub/grub.cfg", debian_grub("0", &[version], "quiet"))
        .ext4(16, ROOT_UUID, &[])
}

#[test]
fn a_reset_boots_the_kernel_that_is_there_by_then() {
    let disk = disk(&root("1-old"));
    let mut guest = booted(&disk);
    assert!(guest.ok("command-line").contains("vmlinuz-1-old"));
    disk.write_all_at(&root("2-new"), 0).unwrap();
    guest.send("reboot");
    guest.event(|event| *event == Event::GuestReset);
    guest.booted();
    assert!(guest.ok("command-line").contains("vmlinuz-2-new"));
}

#[test]
fn a_reset_with_nothing_to_boot_ends_the_machine_with_the_reason() {
    let disk = disk(&root("1"));
    let mut guest = booted(&disk);
    disk.write_all_at(&vec![0; 16 << 20], 0).unwrap();
    guest.send("reboot");
    let StopReason::NotBootable { detail } = guest.stopped() else {
        panic!("another reason");
    };
    assert!(detail.contains("no partition table"), "{detail}");
}

/// CPU time of this thread, which is what the loader is bounded by.
fn worked() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap()
}

#[test]
fn what_cannot_be_booted_is_said_within_a_second() {
    let missing = Files::new()
        .put("boot/grub/grub.cfg", debian_grub("0", &["1"], ""))
        .ext4(8, ROOT_UUID, &[]);
    let no_kernel = Files::new()
        .put("boot/vmlinuz-1", vec![7; 5000])
        .put("boot/initrd.img-1", "x")
        .put("boot/grub/grub.cfg", debian_grub("0", &["1"], ""))
        .ext4(8, ROOT_UUID, &[]);
    // A hole of a gigabyte is an initrd too.
    let files = Files::new()
        .put("boot/vmlinuz-1", probe())
        .put("boot/initrd.img-1", "")
        .put("boot/grub/grub.cfg", debian_grub("0", &["1"], ""));
    let initrd = File::options()
        .write(true)
        .open(files.path().join("boot/initrd.img-1"));
    initrd.unwrap().set_len(1 << 30).unwrap();
    let large = files.ext4(16, ROOT_UUID, &[]);
    let cases = [
        (vec![0; 1 << 20], "no partition table"),
        (missing, "/boot/vmlinuz-1: not there"),
        (no_kernel, "neither an ELF file nor a Linux bzImage"),
        (large, "do not fit into the machine's memory"),
    ];
    for (content, wanted) in cases {
        let disk = disk(&content);
        let mut machine = setup(&disk).build();
        let began = worked();
        let error = machine.start().unwrap_err();
        let took = worked() - began;
        assert!(took < Duration::from_secs(1), "{took:?}: {error}");
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            text = format!("{text}: {error}");
            cause = error.source();
        }
        assert!(text.contains(wanted), "{text}");
    }
}

#[test]
fn a_disk_opened_for_direct_reads_boots_too() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, root("1")).unwrap();
    let mut options = File::options();
    options.read(true).write(true);
    let direct = std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_DIRECT);
    let disk = direct.open(&path).unwrap();
    let flags = rustix::fs::fcntl_getfl(disk.as_fd()).unwrap();
    assert!(flags.contains(rustix::fs::OFlags::DIRECT));
    let mut setup = setup(&disk);
    setup.config.disks[0].direct = true;
    let mut guest = setup.boot();
    assert!(guest.ok("command-line").contains("vmlinuz-1"));
}

#[test]
fn a_start_that_failed_leaves_nothing_in_memory_and_can_be_tried_again() {
    let no_kernel = Files::new()
        .put("boot/vmlinuz-1", vec![7; 5000])
        .put("boot/initrd.img-1", "x")
        .put("boot/grub/grub.cfg", debian_grub("0", &["1"], ""))
        .ext4(16, ROOT_UUID, &[]);
    let disk = disk(&no_kernel);
    let mut machine = setup(&disk).build();
    machine.start().unwrap_err();
    let data = rustix::fs::seek(machine.memory().as_fd(), SeekFrom::Data(0));
    assert_eq!(data, Err(rustix::io::Errno::NXIO), "all of it is a hole");
    disk.write_all_at(&root("1"), 0).unwrap();
    machine.start().unwrap();
    let event = machine.wait_event(Duration::from_secs(30));
    assert_eq!(event, Some(Event::Running));
}
