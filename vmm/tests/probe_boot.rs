//! A machine's life as its guest and its owner see it: boot, processors, pause, reset, every end.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod probe_guest;

use std::time::{Duration, Instant};

use fractus_vmm::machine::{Event, RunState, StopReason};
use probe_guest::{Guest, PATIENCE, Setup, fields};
use rstest::rstest;

#[test]
fn the_guest_boots_and_every_boot_has_its_own_nonce() {
    let nonce = |_| {
        let mut guest = Setup::new().start();
        guest.line("fractus-probe ");
        guest.booted()["nonce"].clone()
    };
    let nonces = [(); 2].map(nonce);
    assert_eq!(nonces[0].len(), 16);
    assert_ne!(nonces[0], nonces[1]);
}

#[rstest]
#[case(1)]
#[case(4)]
#[case(64)]
fn every_processor_comes_up(#[case] count: u8) {
    let mut guest = Setup::new().cpus(count).start();
    assert_eq!(guest.booted()["vcpus"], count.to_string());
}

#[rstest]
#[case(32)]
#[case(64)]
#[case(5 << 10)]
fn the_guest_finds_the_memory_it_was_given(#[case] mib: u64) {
    let mut guest = Setup::new().memory_mib(mib).start();
    let found: u64 = guest.booted()["memory_mib"].parse().unwrap();
    // What lies between 640 KiB and 1 MiB is not memory to a guest.
    assert!((mib - 1..=mib).contains(&found), "{found} of {mib} MiB");
    assert!(guest.ok("touch 16").starts_with("mib=16 "));
}

#[test]
fn a_pause_stops_time_for_the_guest_and_nothing_else() {
    const PAUSE: Duration = Duration::from_millis(200);
    let mut guest = Setup::new().command_line("tick_ms=5").start();
    let nonce = guest.booted()["nonce"].clone();
    guest.line("tick 3 ");
    guest.ok("stamp spin");
    guest.ok("gaps");
    guest.machine.pause().unwrap();
    assert_eq!(guest.machine.state(), RunState::Paused);
    guest.overheard(Duration::from_millis(1));
    let began = Instant::now();
    let heard = guest.overheard(PAUSE);
    assert!(heard.is_empty(), "a paused guest said {heard:?}");
    guest.machine.resume().unwrap();
    let paused = began.elapsed();
    let gap: u64 = guest.ok("gaps").parse().unwrap();
    let gap = Duration::from_micros(gap);
    assert!(gap >= PAUSE, "the guest saw a gap of {gap:?}");
    assert!(
        gap < paused + Duration::from_secs(5),
        "a gap of {gap:?} for {paused:?}"
    );
    let tick = guest.line("tick ");
    assert_eq!(fields(&tick)["nonce"], nonce);
    let number: u64 = tick.split(' ').nth(1).unwrap().parse().unwrap();
    assert!(number > 3, "ticks began anew: {tick}");
}

#[test]
fn all_processors_of_a_paused_machine_stand_still() {
    let mut guest = Setup::new().cpus(3).boot();
    guest.ok("stamp spin");
    // One that has not looked at its clock before the pause sees none; on a busy host that may take a while.
    gaps_of_all(&mut guest, 1);
    guest.machine.pause().unwrap();
    guest.overheard(Duration::from_millis(300));
    guest.machine.resume().unwrap();
    gaps_of_all(&mut guest, 300_000);
}

/// Waits until each of three processors has told of a gap that long, in microseconds.
fn gaps_of_all(guest: &mut Guest, least: u64) {
    let deadline = Instant::now() + PATIENCE;
    let mut largest = [0u64; 3];
    while largest.iter().any(|&us| us < least) {
        assert!(Instant::now() < deadline, "{largest:?}");
        let gaps = guest.ok("gaps");
        for (largest, gap) in largest.iter_mut().zip(gaps.split(' ')) {
            *largest = (*largest).max(gap.parse().unwrap());
        }
    }
}

#[test]
fn pausing_over_and_over_loses_neither_input_nor_interrupts() {
    let mut guest = Setup::new().boot();
    for round in 0..50 {
        guest.send(&format!("echo {round}"));
        guest.machine.pause().unwrap();
        guest.machine.resume().unwrap();
        assert_eq!(guest.line("ok echo"), format!("ok echo {round}"));
    }
}

#[rstest]
#[case(1)]
#[case(4)]
fn a_reset_begins_anew_in_the_same_process(#[case] cpus: u8) {
    let mut guest = Setup::new().cpus(cpus).start();
    let mut nonces = vec![guest.booted()["nonce"].clone()];
    for _ in 0..3 {
        guest.send("reboot");
        guest.event(|event| *event == Event::GuestReset);
        let boot = guest.booted();
        assert_eq!(boot["vcpus"], cpus.to_string());
        assert!(!nonces.contains(&boot["nonce"]), "a reset kept its nonce");
        nonces.push(boot["nonce"].clone());
    }
    assert!(guest.ok("random 8").len() == 16);
}

#[test]
fn a_triple_fault_ends_the_machine_with_its_reason() {
    let mut guest = Setup::new().boot();
    guest.send("triple-fault");
    let stopped = guest.stopped();
    assert!(matches!(stopped, StopReason::TripleFault { vcpu: 0, .. }));
}

#[test]
fn an_owner_can_stop_it_whatever_it_does() {
    let mut guest = Setup::new().cpus(2).boot();
    guest.send("spin 60000");
    guest.machine.stop();
    assert_eq!(guest.stopped(), StopReason::Requested);
}

#[test]
fn long_lines_pass_the_serial_port_whole() {
    let mut guest = Setup::new().boot();
    let text = "0123456789abcdef".repeat(60);
    assert_eq!(guest.ok(&format!("echo {text}")), text);
}

#[test]
fn processors_that_are_idle_are_woken_by_each_other() {
    let mut guest = Setup::new().cpus(4).boot();
    for _ in 0..5 {
        for cpu in 1..4 {
            while guest.ask(&format!("spin 1 {cpu}")) != "ok spin" {}
        }
    }
}
