//! vCPUs that come and go while the guest runs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod probe_guest;

use fractus_vmm::config::MachineConfig;
use fractus_vmm::machine::{Event, MachineError};
use probe_guest::{Guest, Setup, fields};

/// A guest with `count` of at most `max` vCPUs, all of which it uses.
fn guest(count: u8, max: u8) -> Guest {
    let mut setup = Setup::new().cpus(count);
    setup.config.cpus.max = Some(max);
    let mut guest = setup.start();
    assert_eq!(guest.booted()["vcpus"], count.to_string());
    if count > 1 {
        used(&mut guest, count);
    }
    guest
}

/// Waits until the guest is seen to use so many.
fn used(guest: &mut Guest, count: u8) {
    guest.event(|event| *event == Event::VcpusUsed { count });
    assert_eq!(guest.machine.vcpus_used(), count);
}

/// What the probe reads from a register, after it started what came.
fn register(answer: &str, name: &str) -> u64 {
    u64::from_str_radix(&fields(answer)[name], 16).unwrap()
}

fn spins_on(guest: &mut Guest, cpus: std::ops::Range<u8>) {
    for cpu in cpus {
        assert_eq!(guest.ask(&format!("spin 1 {cpu}")), "ok spin");
    }
}

#[test]
fn vcpus_come_work_and_go_again_and_again() {
    let mut guest = guest(1, 4);
    for _ in 0..3 {
        guest.machine.set_vcpus(4).unwrap();
        let answer = guest.ok("cpus");
        assert_eq!(
            (register(&answer, "present"), register(&answer, "up")),
            (0xf, 0xe)
        );
        assert_eq!(fields(&answer)["vcpus"], "4");
        used(&mut guest, 4);
        spins_on(&mut guest, 1..4);
        assert_eq!(guest.ok("cpus"), "present=f up=0 down=0 vcpus=4");

        guest.machine.set_vcpus(2).unwrap();
        assert_eq!(guest.machine.vcpus_used(), 4, "it has been asked, no more");
        assert_eq!(register(&guest.ok("cpus"), "down"), 0b1100);
        guest.ok("cpu-eject 3");
        used(&mut guest, 3);
        guest.ok("cpu-eject 2");
        used(&mut guest, 2);
        assert_eq!(guest.ok("cpus"), "present=3 up=0 down=0 vcpus=2");
        guest.machine.set_vcpus(1).unwrap();
        // It is at work, and is taken from it.
        assert_eq!(guest.ask("spin 60000 1"), "ok spin");
        guest.ok("cpu-eject 1");
        used(&mut guest, 1);
    }
}

#[test]
fn a_pause_and_a_restore_keep_who_is_there_and_who_is_asked_for() {
    let mut guest = guest(2, 4);
    guest.machine.set_vcpus(3).unwrap();
    guest.ok("cpus");
    used(&mut guest, 3);
    guest.machine.pause().unwrap();
    guest.machine.resume().unwrap();
    guest.event(|event| *event == Event::Running);
    spins_on(&mut guest, 1..3);
    guest.machine.set_vcpus(2).unwrap();

    let mut guest = guest.through_a_restore(&[]);
    guest.event(|event| *event == Event::Running);
    assert_eq!(guest.machine.vcpus_used(), 3);
    spins_on(&mut guest, 1..3);
    assert_eq!(register(&guest.ok("cpus"), "down"), 0b100);
    guest.ok("cpu-eject 2");
    used(&mut guest, 2);
    // One that was never there comes in the new process.
    guest.machine.set_vcpus(4).unwrap();
    assert_eq!(register(&guest.ok("cpus"), "up"), 0b1100);
    used(&mut guest, 4);
    spins_on(&mut guest, 1..4);
}

#[test]
fn after_a_reset_there_are_as_many_as_are_wanted() {
    let mut guest = guest(2, 4);
    // Neither was heard: the guest resets itself first.
    guest.machine.set_vcpus(4).unwrap();
    guest.send("reboot");
    assert_eq!(guest.booted()["vcpus"], "4");
    used(&mut guest, 4);
    guest.machine.set_vcpus(1).unwrap();
    guest.send("reboot");
    assert_eq!(guest.booted()["vcpus"], "1");
    assert_eq!(guest.ok("cpus"), "present=1 up=0 down=0 vcpus=1");
    used(&mut guest, 1);
}

#[test]
fn a_vcpu_that_is_not_there_cannot_be_started_and_one_that_is_let_go_unasked_stays_away() {
    let mut guest = guest(2, 4);
    assert_eq!(
        guest.ask("cpu-start 2 300"),
        "err cpu-start it did not start"
    );
    assert_eq!(guest.machine.vcpus_used(), 2);
    // What was tried while it was not there does not start it when it comes.
    guest.machine.set_vcpus(3).unwrap();
    let alive = &fields(&guest.ok("info"))["vcpus"];
    assert_eq!(alive, "2");
    guest.ok("cpus");
    used(&mut guest, 3);

    for number in [0, 3, 64, 255, 256, 0xffff_ffffu32] {
        guest.ok(&format!("cpu-eject {number} force"));
    }
    assert_eq!(register(&guest.ok("cpus"), "present"), 0b111);
    guest.ok("cpu-eject 2");
    used(&mut guest, 2);
    assert_eq!(guest.machine.config().cpus.count, 3, "still wanted");
    guest.machine.set_vcpus(3).unwrap();
    assert_eq!(register(&guest.ok("cpus"), "up"), 0b100);
    used(&mut guest, 3);
    spins_on(&mut guest, 1..3);
}

#[test]
fn a_machine_without_a_maximum_keeps_its_vcpus_and_none_takes_more_than_its_own() {
    let mut fixed = Setup::new().cpus(2).boot();
    let refused = fixed.machine.set_vcpus(3).unwrap_err();
    assert!(matches!(refused, MachineError::FixedVcpus), "{refused}");
    assert_eq!(fixed.machine.vcpus_used(), 2);
    drop(fixed);
    let mut guest = guest(1, 2);
    for count in [0, 3] {
        let refused = guest.machine.set_vcpus(count).unwrap_err();
        assert!(refused.to_string().contains("1 to 2"), "{refused}");
    }
    let mut config = MachineConfig::minimal(64 << 20);
    config.cpus.max = Some(65);
    assert!(config.validate().is_err());
    (config.cpus.count, config.cpus.max) = (4, Some(3));
    assert!(config.validate().is_err());
}

#[test]
fn sixty_four_come_to_one() {
    let mut guest = guest(1, 64);
    guest.machine.set_vcpus(64).unwrap();
    let answer = guest.ok("cpus");
    assert_eq!(register(&answer, "present"), u64::MAX);
    assert_eq!(fields(&answer)["vcpus"], "64");
    used(&mut guest, 64);
    spins_on(&mut guest, 60..64);
}
