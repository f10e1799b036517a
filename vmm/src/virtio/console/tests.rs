//! Console ports, driven as a guest would, with sockets at the host's end.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use super::*;
use crate::device::Device;
use crate::virtio::testing::{DEADLINE, Driver, Rig, read_part, write_part};
use crate::virtio::transport::VirtioPciDevice;

const IN: u64 = 0x10_0000;
const OUT: u64 = 0x20_0000;

fn configs() -> Vec<ConsolePortConfig> {
    [("console", true), ("org.qemu.guest_agent.0", false)]
        .map(|(name, console)| ConsolePortConfig {
            name: name.to_owned(),
            console,
        })
        .to_vec()
}

/// Both of a port's descriptors on one socket, and its other end.
fn pair() -> (ConsoleFiles, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(DEADLINE)).unwrap();
    let fd = OwnedFd::from(theirs);
    (
        ConsoleFiles {
            output: Some(fd.try_clone().unwrap()),
            input: Some(fd),
        },
        ours,
    )
}

fn start(rig: &Rig, features: u64) -> (Driver, Vec<UnixStream>) {
    let (files, hosts): (Vec<_>, Vec<_>) = (0..2).map(|_| pair()).unzip();
    let (board, recorder) = rig.with_recorder();
    let console = Console::new("console0", &configs(), &files, &board.reactor).unwrap();
    let device = VirtioPciDevice::new("console0", Box::new(console), &board).unwrap();
    (Driver::start_with(rig, device, recorder, features), hosts)
}

fn tell(driver: &mut Driver, port: u32, event: u16, value: u16) {
    let message = [
        &port.to_le_bytes()[..],
        &event.to_le_bytes(),
        &value.to_le_bytes(),
    ]
    .concat();
    driver.put(OUT, &message);
    assert_eq!(driver.request(3, &[read_part(OUT, 8)]), 0);
}

/// The next control message of the device: port, event, value, what follows.
fn hear(driver: &mut Driver) -> (u32, u16, u16, String) {
    let length = driver.request(2, &[write_part(IN, 128)]);
    let bytes = driver.take(IN, length as usize);
    let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    (
        half(0).into(),
        half(4),
        half(6),
        String::from_utf8(bytes[8..].to_vec()).unwrap(),
    )
}

#[test]
fn ports_introduce_themselves_and_carry_bytes_both_ways() {
    let rig = Rig::new();
    let (mut driver, mut hosts) = start(&rig, u64::MAX);
    assert_eq!(driver.config(4, 4), 2u32.to_le_bytes());
    tell(&mut driver, 0, 0, 1);
    assert_eq!(hear(&mut driver), (0, 1, 1, String::new()));
    assert_eq!(hear(&mut driver), (1, 1, 1, String::new()));
    tell(&mut driver, 0, 3, 1);
    assert_eq!(hear(&mut driver), (0, 4, 1, String::new()));
    assert_eq!(hear(&mut driver), (0, 7, 1, "console".to_owned()));
    assert_eq!(hear(&mut driver), (0, 6, 1, String::new()));
    tell(&mut driver, 1, 3, 1);
    assert_eq!(
        hear(&mut driver),
        (1, 7, 1, "org.qemu.guest_agent.0".to_owned())
    );
    assert_eq!(hear(&mut driver), (1, 6, 1, String::new()));

    hosts[1].write_all(b"question").unwrap();
    tell(&mut driver, 1, 6, 1);
    assert_eq!(
        driver.request(4, &[write_part(IN, 5), write_part(IN + 0x1000, 5)]),
        8
    );
    assert_eq!(driver.take(IN, 5), b"quest");
    driver.put(OUT, b"answer");
    assert_eq!(
        driver.request(5, &[read_part(OUT, 2), read_part(OUT + 2, 4)]),
        0
    );
    let mut bytes = [0; 6];
    hosts[1].read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"answer");

    drop(hosts.pop());
    assert_eq!(
        hear(&mut driver),
        (1, 6, 0, String::new()),
        "the host's end has gone"
    );
    assert_eq!(
        driver.request(5, &[read_part(OUT, 6)]),
        0,
        "and what is sent there is dropped"
    );
}

#[test]
fn without_multiport_the_first_port_works_at_once() {
    let rig = Rig::new();
    let (mut driver, mut hosts) = start(&rig, !F_MULTIPORT);
    hosts[0].write_all(b"hi").unwrap();
    assert_eq!(driver.request(0, &[write_part(IN, 64)]), 2);
    driver.put(OUT, b"hello");
    driver.request(1, &[read_part(OUT, 5)]);
    let mut bytes = [0; 5];
    hosts[0].read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
}

#[test]
fn a_host_that_does_not_read_holds_a_channel_back_and_loses_nothing() {
    let rig = Rig::new();
    let (mut driver, hosts) = start(&rig, u64::MAX);
    let data: Vec<u8> = (0..1u32 << 20).map(|at| (at ^ (at >> 8)) as u8).collect();
    driver.put(OUT, &data);
    driver.submit(5, &[read_part(OUT, 1 << 20)]);
    driver.kick(5);
    // In the middle of it the device is moved to another process.
    driver.device.pause().unwrap();
    let saved = driver.device.save().unwrap();
    let rings = driver.rings.clone();
    let files: Vec<_> = hosts.iter().map(|_| pair()).collect();
    drop(driver);
    let (files, mut new_hosts): (Vec<_>, Vec<_>) = files.into_iter().unzip();
    let (board, recorder) = rig.with_recorder();
    let device = VirtioPciDevice::restore(&saved, &board, |state| {
        let console = Console::new("console0", &configs(), &files, &board.reactor)?;
        Ok(Box::new(Console::restore(state, console)?))
    })
    .unwrap();
    let mut driver = Driver::attach(&rig, device, recorder);
    driver.rings = rings;
    driver.device.resume().unwrap();
    drop(files);

    let mut seen = Vec::new();
    let mut old = hosts;
    old[1].set_nonblocking(true).unwrap();
    let _ = old[1].read_to_end(&mut seen);
    let mut rest = vec![0; data.len() - seen.len()];
    new_hosts[1].read_exact(&mut rest).unwrap();
    seen.extend(rest);
    assert!(seen == data, "every byte came once and in order");
    driver.used(5);
}

#[test]
fn a_driver_that_talks_without_listening_is_held_back() {
    let rig = Rig::new();
    let (mut driver, _hosts) = start(&rig, u64::MAX);
    let message = [
        &0u32.to_le_bytes()[..],
        &0u16.to_le_bytes(),
        &1u16.to_le_bytes(),
    ]
    .concat();
    driver.put(OUT, &message);
    let mut answered = 0;
    for _ in 0..20 {
        for _ in 0..32 {
            driver.submit(3, &[read_part(OUT, 8)]);
        }
        driver.kick(3);
        for _ in 0..32 {
            match answered < 128 {
                true => drop(driver.used(3)),
                false => break,
            }
            answered += 1;
        }
        if answered >= 128 {
            break;
        }
    }
    driver.device.pause().unwrap();
    let saved = driver.device.save().unwrap();
    assert!(saved.state.len() < 64 << 10, "what waits is bounded");
}
