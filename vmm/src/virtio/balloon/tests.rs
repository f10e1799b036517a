//! The balloon, driven as a guest would.

use super::*;
use crate::device::Device;
use crate::virtio::testing::{Driver, Rig, read_part, write_part};
use crate::virtio::transport::{VirtioPciDevice, status};

const STATS: u64 = feature::STATS_VQ;
const CONFIG: BalloonConfig = BalloonConfig {
    bytes: 0,
    deflate_on_oom: true,
};

fn balloon(rig: &Rig, bytes: u64) -> (Driver, BalloonControl) {
    let (board, recorder) = rig.with_recorder();
    let config = BalloonConfig { bytes, ..CONFIG };
    let balloon = Balloon::new("balloon0", &config, &board);
    let control = balloon.control();
    let device = VirtioPciDevice::new("balloon0", Box::new(balloon), &board).unwrap();
    (Driver::start(rig, device, recorder), control)
}

/// Saves the device and goes on with one that is made of what was saved.
fn restored(rig: &Rig, driver: Driver) -> (Driver, BalloonControl) {
    let saved = driver.device.save().unwrap();
    let (board, recorder) = rig.with_recorder();
    let mut control = None;
    let device = VirtioPciDevice::restore(&saved, &board, |state| {
        let balloon = Balloon::restore(state, &CONFIG, &board)?;
        control = Some(balloon.control());
        Ok(Box::new(balloon))
    });
    let rings = driver.rings.clone();
    // Two devices on one set of doorbells: the old one goes first.
    drop(driver);
    let mut driver = Driver::attach(rig, device.unwrap(), recorder);
    driver.rings = rings;
    (driver, control.unwrap())
}

fn numbers(driver: &Driver, address: u64, numbers: &[u32]) -> u32 {
    let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    driver.put(address, &bytes);
    bytes.len() as u32
}

fn word(driver: &Driver, offset: u64) -> u32 {
    u32::from_le_bytes(driver.config(offset, 4).try_into().unwrap())
}

fn set_word(driver: &Driver, offset: u64, value: u32) {
    driver.write(0x2000 + offset, &value.to_le_bytes());
}

#[test]
fn inflated_pages_leave_the_host_and_read_as_zero() {
    let rig = Rig::new();
    let (mut driver, control) = balloon(&rig, 3 << 12);
    driver.put(0x10_0000, &[7; 5 << 12]);
    // Out of order, twice, and some beyond all memory.
    let length = numbers(
        &driver,
        0x1000,
        &[0x102, 0x101, 0x102, 0x104, u32::MAX, 1 << 20],
    );
    assert_eq!(driver.request(0, &[read_part(0x1000, length)]), 0);
    let page = |number: u64| driver.take(number << 12, 1)[0];
    assert_eq!(
        [0x100, 0x101, 0x102, 0x103, 0x104].map(page),
        [7, 0, 0, 7, 0]
    );
    assert_eq!(control.report().given_back, 3 << 12);
    set_word(&driver, 4, 3);
    assert_eq!(control.report().actual, 3 << 12);
    let length = numbers(&driver, 0x1000, &[0x102]);
    assert_eq!(driver.request(1, &[read_part(0x1000, length)]), 0);
}

#[test]
fn reported_pages_are_given_back_by_either_count_of_the_queues() {
    for (queue, features) in [(4, u64::MAX), (3, u64::MAX), (2, u64::MAX - STATS)] {
        let rig = Rig::new();
        let (mut driver, control) = balloon(&rig, 0);
        driver.initialise(features);
        driver.put(0x10_0000, &[7; 0x3000]);
        let parts = [write_part(0x10_0000, 0x1000), write_part(0x10_1800, 0x1800)];
        driver.request(queue, &parts);
        assert_eq!(driver.take(0x10_0000, 0x1000), [0; 0x1000]);
        assert_eq!(driver.take(0x10_1000, 0x1000), [7; 0x1000], "half a page");
        assert_eq!(driver.take(0x10_2000, 0x1000), [0; 0x1000]);
        assert_eq!(control.report().given_back, 0x2000);
    }
}

#[test]
fn a_guest_that_fills_its_free_pages_keeps_them() {
    let rig = Rig::new();
    let (mut driver, control) = balloon(&rig, 0);
    set_word(&driver, 12, 0xaaaa_aaaa);
    driver.put(0x10_0000, &[0xaa; 0x1000]);
    driver.request(4, &[write_part(0x10_0000, 0x1000)]);
    assert_eq!(driver.take(0x10_0000, 0x1000), [0xaa; 0x1000]);
    assert_eq!(control.report().given_back, 0);
    // Zeros are what it would find.
    set_word(&driver, 12, 0);
    driver.request(4, &[write_part(0x10_0000, 0x1000)]);
    assert_eq!(driver.take(0x10_0000, 0x1000), [0; 0x1000]);
}

#[test]
fn a_new_target_interrupts_the_driver_also_when_it_came_during_a_pause() {
    let rig = Rig::new();
    let (mut driver, control) = balloon(&rig, 1 << 20);
    assert_eq!(word(&driver, 0), 256);
    let generation = driver.get(0x15, 1);
    control.set_target(2 << 20);
    assert!(driver.recorder.wait(0, crate::virtio::testing::DEADLINE));
    assert_eq!(
        (word(&driver, 0), driver.get(0x15, 1)),
        (512, generation + 1)
    );

    driver.device.pause().unwrap();
    control.set_target(3 << 20);
    driver.device.resume().unwrap();
    assert!(driver.recorder.wait(0, crate::virtio::testing::DEADLINE));
    assert_eq!(word(&driver, 0), 768);

    // The guest's own fields are all that it can set, and a reset of it leaves the host's wish.
    set_word(&driver, 0, 9);
    set_word(&driver, 4, 99);
    driver.write(0x2000 + 14, &[1, 2, 3, 4]);
    driver.write(0x2fff, &[1]);
    assert_eq!([0, 4, 8, 12].map(|at| word(&driver, at)), [768, 99, 0, 0]);
    driver.initialise(u64::MAX);
    assert_eq!([0, 4].map(|at| word(&driver, at)), [768, 0]);
}

#[test]
fn statistics_are_asked_for_and_told_also_after_a_restore() {
    let rig = Rig::new();
    let (mut driver, control) = balloon(&rig, 4 << 20);
    let list = |driver: &Driver, free: u64| {
        let entries = [(4u16, free), (5, 512 << 20), (99, 1)];
        let bytes: Vec<u8> = entries
            .iter()
            .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat())
            .collect();
        driver.put(0x1000, &bytes);
        read_part(0x1000, bytes.len() as u32)
    };
    // The first list comes by itself.
    let part = list(&driver, 10);
    driver.submit(2, &[part]);
    driver.kick(2);
    let told = |control: &BalloonControl, driver: &mut Driver| {
        let mut seen = None;
        while seen.is_none() {
            seen = control.report().statistics;
            std::thread::yield_now();
        }
        driver.used(2);
        seen.unwrap()
    };
    let first = told(&control, &mut driver);
    assert_eq!((first.free, first.total), (Some(10), Some(512 << 20)));
    assert_eq!(first.available, None);

    let part = list(&driver, 20);
    driver.submit(2, &[part]);
    driver.kick(2);
    driver.device.pause().unwrap();
    let (mut driver, control) = restored(&rig, driver);
    assert_eq!(word(&driver, 0), 1024);
    driver.device.resume().unwrap();
    assert_eq!(told(&control, &mut driver).free, Some(20));
}

#[test]
fn a_list_of_pages_that_is_none_is_a_fault_and_a_reset_repairs_it() {
    let rig = Rig::new();
    let (mut driver, _control) = balloon(&rig, 0);
    for parts in [
        [read_part(0x1000, 6)],
        [write_part(0x1000, 8)],
        [read_part(0x1000, 4 * 4096 + 4)],
        [read_part(0x1000, 4 * 1024 + 4)],
    ] {
        driver.submit(0, &parts);
        driver.kick(0);
        driver.wait_for_needs_reset();
        let fault = driver.device.last_fault().unwrap();
        assert!(fault.contains("no list of page numbers"), "{fault}");
        driver.initialise(u64::MAX);
        assert_eq!(driver.status() & status::NEEDS_RESET, 0);
    }
    let length = numbers(&driver, 0x1000, &[0x100]);
    driver.request(0, &[read_part(0x1000, length)]);
}

#[test]
fn more_lists_than_a_turn_takes_are_all_taken() {
    let rig = Rig::new();
    let (mut driver, control) = balloon(&rig, 0);
    driver.put(0x10_0000, &[7; 64 << 12]);
    for list in 0..64 {
        let address = 0x1000 + u64::from(list) * 4;
        let length = numbers(&driver, address, &[0x100 + list]);
        driver.submit(0, &[read_part(address, length)]);
    }
    driver.kick(0);
    for _ in 0..64 {
        driver.used(0);
    }
    assert_eq!(control.report().given_back, 64 << 12);
    // A whole page of numbers is one list.
    let page: Vec<u32> = (0..1024).map(|number| 0x100 + number % 64).collect();
    let length = numbers(&driver, 0x1000, &page);
    driver.request(0, &[read_part(0x1000, length)]);
    assert_eq!(control.report().given_back, 128 << 12);
}
