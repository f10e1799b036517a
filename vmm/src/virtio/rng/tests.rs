//! Random numbers, driven as a guest would.

use super::*;
use crate::device::Device;
use crate::virtio::testing::{Driver, Rig, read_part, write_part};
use crate::virtio::transport::VirtioPciDevice;

fn rng(rig: &Rig, config: RngConfig) -> Driver {
    let (board, recorder) = rig.with_recorder();
    let rng = Rng::new("rng0", &config, &board.reactor).unwrap();
    let device = VirtioPciDevice::new("rng0", Box::new(rng), &board).unwrap();
    Driver::start(rig, device, recorder)
}

#[test]
fn a_request_is_filled_with_what_differs_each_time() {
    let rig = Rig::new();
    let mut driver = rng(&rig, RngConfig::default());
    let parts = [write_part(0x1000, 300), write_part(0x3001, 7000)];
    assert_eq!(driver.request(0, &parts), 7300);
    let first = driver.take(0x3001, 7000);
    assert_eq!(driver.request(0, &parts), 7300);
    assert_ne!(first, driver.take(0x3001, 7000));
    assert!(
        first[6900..].iter().any(|byte| *byte != 0),
        "the end is filled, too"
    );
}

#[test]
fn one_request_gets_64_kib_at_most() {
    let rig = Rig::new();
    let mut driver = rng(&rig, RngConfig::default());
    assert_eq!(driver.request(0, &[write_part(0, 1 << 20)]), 64 << 10);
}

#[test]
fn a_slow_rate_delays_but_delivers() {
    let rig = Rig::new();
    let mut driver = rng(
        &rig,
        RngConfig {
            bytes_per_second: Some(1 << 20),
        },
    );
    let started = Instant::now();
    for _ in 0..4 {
        driver.request(0, &[write_part(0, 64 << 10)]);
    }
    // 256 KiB at 1 MiB/s, of which 64 KiB are the burst and the last 64 KiB a debt.
    assert!(started.elapsed() >= Duration::from_millis(120));
}

#[test]
fn a_buffer_to_be_read_is_a_fault_and_a_reset_repairs_it() {
    let rig = Rig::new();
    let mut driver = rng(&rig, RngConfig::default());
    driver.submit(0, &[read_part(0x1000, 16)]);
    driver.kick(0);
    driver.wait_for_needs_reset();
    assert!(
        driver
            .device
            .last_fault()
            .unwrap()
            .contains("no buffer for random numbers")
    );
    driver.initialise(u64::MAX);
    assert_eq!(driver.request(0, &[write_part(0x1000, 16)]), 16);
}

#[test]
fn a_request_made_during_a_pause_is_answered_by_the_restored_device() {
    let rig = Rig::new();
    let mut driver = rng(&rig, RngConfig::default());
    assert_eq!(driver.request(0, &[write_part(0x1000, 16)]), 16);
    driver.device.pause().unwrap();
    driver.submit(0, &[write_part(0x1000, 32)]);
    let saved = driver.device.save().unwrap();
    let (board, recorder) = rig.with_recorder();
    let restored = VirtioPciDevice::restore(&saved, &board, |state| {
        Ok(Box::new(Rng::restore(
            state,
            &RngConfig::default(),
            &board.reactor,
        )?))
    })
    .unwrap();
    // Two devices on one set of doorbells: the old one goes first.
    let rings = driver.rings.clone();
    drop(driver);
    let mut driver = Driver::attach(&rig, restored, recorder);
    driver.rings = rings;
    assert_eq!(driver.device.save().unwrap(), saved);
    driver.device.resume().unwrap();
    assert_eq!(driver.used(0).1, 32);
}
