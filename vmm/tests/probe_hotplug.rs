//! Disks that come and go while the guest runs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod probe_guest;

use std::fs::File;

use fractus_vmm::config::DiskConfig;
use fractus_vmm::machine::Event;
use probe_guest::{Guest, Setup};

fn setup() -> Setup {
    let mut setup = Setup::new();
    setup.config.hot_disks = 1;
    setup
}

fn disk_file() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(4 << 20).unwrap();
    file
}

fn named(name: &str) -> DiskConfig {
    DiskConfig {
        read_only: false,
        serial_number: name.to_owned(),
        direct: false,
        limit: None,
        queues: 1,
    }
}

fn attach(guest: &mut Guest, name: &str, file: &File) -> String {
    let file = file.try_clone().unwrap();
    guest.machine.attach_disk(named(name), file).unwrap()
}

fn gone(guest: &mut Guest, id: &str) {
    let event = Event::DeviceGone { id: id.to_owned() };
    guest.event(|seen| *seen == event);
}

/// Slots of a register as the probe tells it.
fn slots(answer: &str, register: &str) -> Vec<u32> {
    let bits = u32::from_str_radix(&probe_guest::fields(answer)[register], 16).unwrap();
    (0..32).filter(|slot| bits & 1 << slot != 0).collect()
}

#[test]
fn a_disk_is_attached_used_detached_and_its_place_taken_by_another() {
    let first = disk_file();
    let mut guest = setup().disk(&first, |_| {}).boot();
    for round in 0..3 {
        let file = disk_file();
        let id = attach(&mut guest, "second", &file);
        assert_eq!(id, "disk1");
        let answer = guest.ok("slots");
        let came = slots(&answer, "up");
        assert_eq!(came.len(), 1, "{answer}");
        assert!(guest.ok("disk-info 1").contains("serial=second"));
        guest.ok(&format!("disk-write 1 0 1048576 {round}"));
        guest.ok(&format!("disk-check 1 0 1048576 {round}"));

        guest.machine.detach(&id).unwrap();
        assert_eq!(slots(&guest.ok("slots"), "down"), came);
        guest.ok(&format!("eject {}", came[0]));
        gone(&mut guest, &id);
        assert_eq!(guest.machine.config().disks.len(), 1);
        assert!(guest.machine.detach(&id).is_err(), "it is gone");
        assert_eq!(guest.ok("slots"), "up=0 down=0");
        assert!(!guest.ok("info").contains(&format!("pci{:02x}", came[0])));
    }
    guest.ok("disk-write 0 0 4096 9");
}

#[test]
fn what_was_not_asked_for_stays_and_what_was_goes_at_the_latest_with_a_reset() {
    let (first, second) = (disk_file(), disk_file());
    let mut guest = setup().disk(&first, |_| {}).boot();
    let id = attach(&mut guest, "second", &second);
    let came = slots(&guest.ok("slots"), "up");
    let third = guest.machine.attach_disk(named("third"), disk_file());
    let refused = format!("{:#}", anyhow::Error::from(third.unwrap_err()));
    assert!(refused.contains("in use"), "{refused}");
    guest.ok(&format!("eject {}", came[0]));
    // Any slot, also those of nobody and of the host bridge.
    (0..32).for_each(|slot| drop(guest.ok(&format!("eject {slot}"))));
    guest.send("reboot");
    assert_eq!(guest.booted()["disks"], "2");

    guest.machine.detach(&id).unwrap();
    guest.send("reboot");
    assert_eq!(guest.booted()["disks"], "1");
    gone(&mut guest, &id);
}

#[test]
fn a_restored_machine_has_its_disks_where_they_came_to_be() {
    let files = [disk_file(), disk_file(), disk_file()];
    let mut guest = setup()
        .disk(&files[0], |_| {})
        .disk(&files[1], |_| {})
        .boot();
    let id = attach(&mut guest, "third", &files[2]);
    let third = slots(&guest.ok("slots"), "up");
    guest.ok("disk-write 2 0 65536 3");
    // The one in the middle goes: numbers and slots have a hole.
    guest.machine.detach("disk1").unwrap();
    let middle = slots(&guest.ok("slots"), "down");
    guest.ok(&format!("eject {}", middle[0]));
    gone(&mut guest, "disk1");

    let mut guest = guest.through_a_restore(&[&files[0], &files[2]]);
    guest.ok("disk-check 2 0 65536 3");
    guest.ok("disk-write 0 0 4096 4");
    guest.machine.detach(&id).unwrap();
    assert_eq!(slots(&guest.ok("slots"), "down"), third);
    // What is asked for is part of the state, too.
    let mut guest = guest.through_a_restore(&[&files[0], &files[2]]);
    guest.ok(&format!("eject {}", third[0]));
    gone(&mut guest, &id);
    assert_eq!(attach(&mut guest, "again", &files[1]), "disk1");
    assert_eq!(slots(&guest.ok("slots"), "up"), middle);
}
