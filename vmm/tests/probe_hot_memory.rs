//! Memory that comes and goes while the guest runs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod probe_guest;

use fractus_vmm::config::{HOT_BLOCK, HotMemoryConfig, MachineConfig, PageSize};
use fractus_vmm::machine::{Event, MachineError, StopReason};
use probe_guest::{Guest, Setup, fields};

/// A guest that may have up to 64 MiB more, of which so many blocks are wished.
fn guest(wished: u64) -> Guest {
    let mut setup = Setup::new();
    setup.config.hot_memory = Some(HotMemoryConfig {
        max: 64 << 20,
        bytes: wished * HOT_BLOCK,
    });
    setup.boot()
}

fn answer(guest: &mut Guest, request: &str) -> u32 {
    let told = guest.ok(&format!("memory {request}"));
    fields(&told)["answer"].parse().unwrap()
}

fn plugged(guest: &mut Guest, blocks: u64) {
    let plugged = blocks * HOT_BLOCK;
    guest.event(|event| *event == Event::HotMemory { plugged });
    assert_eq!(guest.machine.hot_memory(), Some(plugged));
}

/// Bytes of the host's memory that the machine's memory takes.
fn resident(guest: &Guest) -> i64 {
    rustix::fs::fstat(guest.machine.memory()).unwrap().st_blocks * 512
}

#[test]
fn blocks_come_hold_data_and_go_and_the_host_has_them_back() {
    let mut guest = guest(0);
    let told = fields(&guest.ok("memory"));
    let [region, plugged_now, requested] =
        ["region", "plugged", "requested"].map(|name| told[name].clone());
    assert_eq!([region, plugged_now, requested], ["67108864", "0", "0"]);
    assert_eq!(answer(&mut guest, "plug 0 1"), 3, "nothing is usable yet");
    guest.machine.set_hot_memory(16 << 20).unwrap();
    assert_eq!(answer(&mut guest, "plug 0 9"), 1, "more than is wished");
    let before = resident(&guest);
    for round in 1..4 {
        assert_eq!(answer(&mut guest, "plug 3 8"), 0);
        plugged(&mut guest, 8);
        guest.ok("memory check 3 8 0");
        guest.ok(&format!("memory fill 3 8 {round}"));
        guest.ok(&format!("memory check 3 8 {round}"));
        assert!(resident(&guest) - before >= 16 << 20);
        assert_eq!(answer(&mut guest, "unplug 3 4"), 0);
        plugged(&mut guest, 4);
        guest.ok("memory check 3 4 0");
        guest.ok(&format!("memory check 7 4 {round}"));
        assert_eq!(answer(&mut guest, "unplug-all"), 0);
        plugged(&mut guest, 0);
        // Reading all of what is not there costs nothing either.
        guest.ok("memory check 0 32 0");
        let left = resident(&guest) - before;
        assert!(left < 1 << 20, "{left} bytes stayed");
    }
    assert_eq!(guest.ok("memory state 0 32"), "answer=0 state=1");
}

#[test]
fn a_restored_guest_has_what_it_plugged_and_a_reset_one_has_nothing() {
    let mut guest = guest(8);
    assert_eq!(answer(&mut guest, "plug 0 2"), 0);
    assert_eq!(answer(&mut guest, "plug 5 3"), 0);
    guest.ok("memory fill 0 2 77");
    guest.ok("memory fill 5 3 78");
    let mut guest = guest.through_a_restore(&[]);
    assert_eq!(guest.machine.hot_memory(), Some(5 * HOT_BLOCK));
    guest.ok("memory check 0 2 77");
    guest.ok("memory check 2 3 0");
    guest.ok("memory check 5 3 78");
    assert_eq!(answer(&mut guest, "unplug 5 2"), 0);
    plugged(&mut guest, 3);
    assert_eq!(answer(&mut guest, "plug 20 4"), 0);
    plugged(&mut guest, 7);
    guest.ok("memory fill 20 4 79");

    guest.send("reboot");
    guest.booted();
    plugged(&mut guest, 0);
    guest.ok("memory check 0 32 0");
    assert_eq!(
        fields(&guest.ok("memory"))["requested"],
        (8 * HOT_BLOCK).to_string()
    );
    assert_eq!(answer(&mut guest, "plug 0 8"), 0);
    guest.ok("memory check 0 8 0");
}

#[test]
fn a_guest_that_writes_to_what_it_has_not_plugged_is_stopped_with_the_reason() {
    let mut guest = guest(8);
    assert_eq!(answer(&mut guest, "plug 0 1"), 0);
    guest.send("memory fill 1 1 5");
    match guest.stopped() {
        StopReason::InternalError { detail, .. } => {
            assert!(detail.contains("not plugged"), "{detail}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_wished_fits_what_there_can_be() {
    let mut guest = guest(8);
    for bytes in [66 << 20, 4096, u64::MAX] {
        let refused = guest.machine.set_hot_memory(bytes).unwrap_err();
        assert!(refused.to_string().contains("blocks of"), "{refused}");
    }
    drop(guest);
    let mut without = Setup::new().build();
    let refused = without.set_hot_memory(0).unwrap_err();
    assert!(matches!(refused, MachineError::NoHotMemory), "{refused}");
    assert_eq!(without.hot_memory(), None);

    let valid = |max, bytes, pages| {
        let mut config = MachineConfig::minimal(1 << 30);
        config.memory.pages = pages;
        config.hot_memory = Some(HotMemoryConfig { max, bytes });
        config.validate().is_ok()
    };
    let small = PageSize::Small;
    assert!(valid(1 << 30, 0, small) && valid(1 << 30, 1 << 30, PageSize::Huge2MiB));
    assert!(!valid(0, 0, small) && !valid(1 << 20, 0, small) && !valid(1 << 42, 0, small));
    assert!(!valid(1 << 30, 2 << 30, small) && !valid(1 << 30, 0, PageSize::Huge1GiB));
}
