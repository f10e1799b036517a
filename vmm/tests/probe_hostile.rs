//! Guests that misuse their devices harm nobody but themselves: the device wants a reset, the machine
//! lives, and after the reset the device works.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod probe_guest;

use std::fs::File;

use probe_guest::Setup;
use rstest::rstest;

const NEEDS_RESET: u8 = 0x40;

fn disk_file() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    file
}

/// The acts of images/probe/src/misuse.rs, and whether the device must notice (some are merely odd,
/// and harm nobody).
#[rstest]
#[case::descriptor_that_follows_itself(0, true)]
#[case::two_descriptors_in_a_circle(1, true)]
#[case::buffer_outside_of_memory(2, false)]
#[case::buffer_around_the_end_of_the_address_space(3, false)]
#[case::empty_buffer(4, false)]
#[case::indirect_without_agreement(5, false)]
#[case::next_outside_of_the_table(6, true)]
#[case::head_outside_of_the_table(7, true)]
#[case::index_far_ahead(8, true)]
#[case::table_outside_of_memory(9, false)]
#[case::size_that_is_no_power_of_two(10, false)]
#[case::size_beyond_the_most(11, false)]
#[case::bell_before_driver_ok(12, false)]
#[case::rings_upon_each_other(13, false)]
fn a_queue_that_lies_is_the_device_s_own_trouble(#[case] act: u64, #[case] noticed: bool) {
    let mut guest = Setup::new().disk(&disk_file(), |_| {}).boot();
    for device in ["", " disk"] {
        let answer = guest.ok(&format!("misuse queue {act}{device}"));
        let status = answer.strip_prefix(&format!("{act}:")).unwrap();
        let status = u8::from_str_radix(status, 16).unwrap();
        if noticed {
            assert!(
                status & NEEDS_RESET != 0,
                "act {act}{device}: status {status:02x}"
            );
        }
    }
    guest.ok("disk-write 0 0 4096 3");
    assert_eq!(guest.ok("random 4").len(), 8);
}

#[rstest]
#[case::every_register_scribbled_over(0)]
#[case::bars_over_memory_and_interrupt_controllers(1)]
#[case::interrupt_table_scribbled_over(2)]
#[case::bars_reached_through_configuration_space(3)]
#[case::configuration_ports_misused(4)]
fn pci_misused_leaves_the_machine_alive(#[case] act: u64) {
    let mut guest = Setup::new().disk(&disk_file(), |_| {}).boot();
    guest.ok(&format!("misuse pci {act}"));
    guest.ok("disk-write 0 0 4096 3");
    guest.ok("disk-check 0 0 4096 3");
}

#[test]
fn ports_scribbled_over_leave_the_machine_alive() {
    let mut guest = Setup::new().boot();
    guest.ok("misuse acpi");
    assert_eq!(guest.ok("echo alive"), "alive");
}

#[test]
fn a_guest_that_misused_everything_can_still_be_reset() {
    let mut guest = Setup::new().disk(&disk_file(), |_| {}).boot();
    guest.ok("misuse queue");
    guest.ok("misuse pci");
    guest.send("reboot");
    guest.booted();
    guest.ok("disk-write 0 0 4096 3");
    assert_eq!(guest.ok("random 4").len(), 8);
}
