//! A machine made from another's saved state: the same guest, that knows of nothing.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod probe_guest;

use std::fs::File;

use probe_guest::{Setup, fields};
use rstest::rstest;

#[rstest]
#[case(1)]
#[case(4)]
fn a_restored_guest_is_the_one_that_was_saved(#[case] cpus: u8) {
    let mut guest = Setup::new().cpus(cpus).command_line("tick_ms=5").start();
    let nonce = guest.booted()["nonce"].clone();
    guest.line("tick 5 ");
    let mut guest = guest.through_a_restore(&[]);
    let tick = guest.line("tick ");
    assert_eq!(fields(&tick)["nonce"], nonce);
    let number: u64 = tick.split(' ').nth(1).unwrap().parse().unwrap();
    assert!(number > 5, "ticks began anew: {tick}");
    assert_eq!(guest.ok("echo alive"), "alive");
    for cpu in 1..cpus {
        assert_eq!(guest.ask(&format!("spin 1 {cpu}")), "ok spin");
    }
}

#[test]
fn devices_of_a_restored_guest_go_on_where_they_were() {
    let file: File = tempfile::tempfile().unwrap();
    file.set_len(8 << 20).unwrap();
    let mut guest = Setup::new().disk(&file, |_| {}).boot();
    guest.ok("disk-write 0 0 1048576 11");
    let mut guest = guest.through_a_restore(&[&file]);
    guest.ok("disk-check 0 0 1048576 11");
    guest.ok("disk-write 0 4194304 1048576 12");
    guest.ok("disk-check 0 4194304 1048576 12");
    assert_eq!(guest.ok("random 8").len(), 16);
    // Again, and the first thing said is the guest's own answer.
    let mut guest = guest.through_a_restore(&[&file]);
    guest.ok("disk-check 0 4194304 1048576 12");
    guest.send("reboot");
    guest.booted();
}
