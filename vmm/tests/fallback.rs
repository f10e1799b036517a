//! A machine whose disk only Linux reads: the host's fallback runs in the guest and says how it went.
//! Guests of a few instructions stand there for it; the real one is tried in the lab.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod common;
#[path = "../loader/tests/image/mod.rs"]
mod image;

use std::fs::File;
use std::os::unix::fs::FileExt;

use common::{Guest, Rig, config, files, kernel_file};
use fractus_vmm::config::{BootSource, DiskConfig, FallbackFiles, MachineConfig};
use fractus_vmm::machine::{Event, Machine, StopReason};
use image::{Files, LINUX, ROOT_UUID, gpt, partition};

/// layout::VERDICT_PORT, which images/fallback knows too.
const VERDICT: u16 = 0x6c0;

fn verdict(guest: Guest, text: &str) -> Guest {
    let said = text.bytes();
    said.fold(guest, |guest, byte| guest.out(VERDICT, byte))
        .out(VERDICT, 0)
}

fn power_off(guest: Guest) -> Guest {
    guest.out(0x600, 0x34).halt()
}

/// A disk whose one partition has the signature of XFS.
fn xfs() -> Vec<u8> {
    let mut root = vec![0; image::MIB];
    root[..4].copy_from_slice(b"XFSB");
    gpt(&[partition(2, LINUX, root)])
}

/// A machine that boots this disk, with that guest for its fallback's kernel.
fn machine(disk: &File, fallback: Option<&Guest>) -> Rig {
    let (mut files, serial) = files(kernel_file(b""));
    files.kernel = None;
    files.disks.push(disk.try_clone().unwrap());
    files.fallback = fallback.map(|guest| FallbackFiles {
        kernel: kernel_file(&guest.elf()),
        initrd: kernel_file(b"initrd"),
    });
    let config = MachineConfig {
        boot: BootSource::Disk(0),
        command_line: "more words".to_owned(),
        disks: vec![DiskConfig {
            read_only: false,
            serial_number: String::new(),
            direct: false,
            limit: None,
            queues: 1,
        }],
        ..config()
    };
    Rig {
        machine: Machine::build(config, files, None).unwrap(),
        serial,
    }
}

fn disk(content: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(content, 0).unwrap();
    file
}

fn started(fallback: &Guest) -> Rig {
    let mut rig = machine(&disk(&xfs()), Some(fallback));
    rig.machine.start().unwrap();
    rig
}

fn not_bootable(rig: &mut Rig) -> String {
    match rig.wait_stop() {
        StopReason::NotBootable { detail } => detail,
        other => panic!("{other}"),
    }
}

#[test]
fn without_a_fallback_it_is_said_that_one_is_needed() {
    let mut rig = machine(&disk(&xfs()), None);
    let error = rig.machine.start().unwrap_err().to_string();
    assert!(error.contains("partition 2 is XFS"), "{error}");
    assert!(error.contains("fallback"), "{error}");
}

#[test]
fn what_the_fallback_has_started_is_a_guest_as_any_other() {
    let rig = &mut started(&power_off(verdict(Guest::new(), "")));
    assert_eq!(rig.wait_stop(), StopReason::GuestPowerOff);
    // It cannot say of itself that it is not bootable.
    let late = verdict(verdict(Guest::new(), ""), "not me");
    let rig = &mut started(&late.triple_fault());
    let stopped = rig.wait_stop();
    assert!(matches!(stopped, StopReason::TripleFault { vcpu: 0, .. }));
}

#[test]
fn what_the_fallback_did_not_find_is_why_the_machine_ends() {
    let rig = &mut started(&verdict(Guest::new(), "no kernel on vda2").halt());
    assert_eq!(not_bootable(rig), "no kernel on vda2");
}

#[test]
fn a_fallback_that_ends_without_a_word_is_no_power_off() {
    let say_half = || Guest::new().out(VERDICT, b'x');
    for (guest, wanted) in [
        (power_off(Guest::new()), "powered itself off"),
        (say_half().out(0xcf9, 0x06).halt(), "reset itself"),
        (Guest::new().triple_fault(), "triple fault"),
    ] {
        let detail = not_bootable(&mut started(&guest));
        assert!(detail.contains(wanted), "{detail}");
    }
}

#[test]
fn a_reset_reads_the_disk_again_by_the_fallback_too() {
    // Says the fallback's part of the command line, which PVH leaves at 0x20000, then begins anew.
    let line = "console=ttyS0 quiet panic=-1 oops=panic -- disk=0 more words";
    let echo = (0..line.len() as u32).fold(Guest::new(), |guest, at| {
        // mov al, [0x20000 + at]; mov dx, 0x3f8; out dx, al
        guest
            .bytes(&[0xa0])
            .bytes(&(0x2_0000 + at).to_le_bytes())
            .bytes(&[0x66, 0xba, 0xf8, 0x03, 0xee])
    });
    let disk = disk(&xfs());
    let mut rig = machine(&disk, Some(&verdict(echo, "").out(0xcf9, 0x06).halt()));
    rig.machine.start().unwrap();
    rig.wait(&Event::GuestReset);
    assert_eq!(rig.hear(2 * line.len()), format!("{line}{line}"));
    // What is there by then is what boots.
    let kernel = power_off(Guest::new().say("!")).elf();
    let root = Files::new()
        .put("boot/vmlinuz", kernel)
        .put(
            "boot/grub/grub.cfg",
            "menuentry x {\n linux /boot/vmlinuz\n}\n",
        )
        .ext4(2, ROOT_UUID, &[]);
    disk.write_all_at(&vec![0; xfs().len()], 0).unwrap();
    disk.write_all_at(&root, 0).unwrap();
    assert_eq!(rig.wait_stop(), StopReason::GuestPowerOff);
}
