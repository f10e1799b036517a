//! A guest gives memory back, and the process shrinks.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod probe_guest;

use std::fs;
use std::time::{Duration, Instant};

use fractus_vmm::config::{BalloonConfig, PageSize};
use probe_guest::{Guest, Setup};
use rstest::rstest;

/// KiB of the guest's memory that this process holds.
fn resident(guest: &Guest) -> u64 {
    let start = guest.machine.memory().slots()[0].host;
    let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
    let head = format!("{start:x}-");
    let rest = &smaps[smaps.find(&head).expect("the mapping")..];
    let line = rest.lines().find(|line| line.starts_with("Rss:")).unwrap();
    line.split_ascii_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

fn setup() -> Setup {
    let mut setup = Setup::new().memory_mib(256);
    setup.config.balloon = Some(BalloonConfig::default());
    setup
}

#[rstest]
#[case(PageSize::Small)]
#[case(PageSize::Transparent)]
fn a_guest_that_freed_128_mib_shrinks_the_process_by_as_much(#[case] pages: PageSize) {
    let mut setup = setup();
    setup.config.memory.pages = pages;
    let mut guest = setup.boot();
    guest.ok("touch 160");
    let before = resident(&guest);
    assert!(before >= 160 << 10, "{before} KiB after touching 160 MiB");
    let begin = Instant::now();
    let answer = guest.ok("balloon free 128");
    let (after, took) = (resident(&guest), begin.elapsed());
    println!("{before} KiB, then {after} KiB after {took:?}; {answer}");
    assert!(
        before - after >= 127 << 10,
        "{before} KiB, then {after} KiB"
    );
    assert!(took < Duration::from_secs(5), "{took:?}");
    let report = guest.machine.balloon_stats().unwrap();
    assert_eq!(report.given_back, 128 << 20);
    // It is there again when it is wanted.
    guest.ok("touch 160");
    assert!(resident(&guest) >= 160 << 10);
}

#[test]
fn a_guest_sees_what_its_host_wishes_also_after_a_restore_and_a_reset() {
    let mut guest = setup().boot();
    assert_eq!(guest.ok("balloon target"), "pages=0");
    guest.machine.set_balloon(16 << 20).unwrap();
    assert_eq!(guest.ok("balloon target"), "pages=4096");
    let refused = guest.machine.set_balloon(256 << 20).unwrap_err();
    assert!(refused.to_string().contains("smaller"), "{refused}");
    let mut guest = guest.through_a_restore(&[]);
    assert_eq!(guest.ok("balloon target"), "pages=4096");
    guest.ok("balloon free 8");
    guest.send("reboot");
    guest.booted();
    assert_eq!(guest.ok("balloon target"), "pages=4096");
}
