//! What a guest says to its board: power, the button, a panic.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod probe_guest;

use fractus_vmm::machine::{Event, RunState, StopReason};
use probe_guest::Setup;

#[test]
fn a_guest_that_powers_off_says_so() {
    let mut guest = Setup::new().boot();
    guest.send("poweroff");
    assert_eq!(guest.stopped(), StopReason::GuestPowerOff);
    assert_eq!(guest.machine.state(), RunState::Stopped);
}

#[test]
fn the_power_button_reaches_the_guest() {
    let mut guest = Setup::new().boot();
    guest.machine.press_power_button();
    guest.line("button");
    assert_eq!(guest.stopped(), StopReason::GuestPowerOff);
}

#[test]
fn a_panic_is_reported_and_the_machine_runs_on() {
    let mut guest = Setup::new().boot();
    guest.ok("panic");
    guest.event(|event| {
        matches!(
            event,
            Event::Panicked {
                crash_loaded: false
            }
        )
    });
    assert_eq!(guest.ok("echo alive"), "alive");
}
