//! A driver that means harm, against every device: whatever it does, nothing panics, the device comes
//! to rest in time, and after a reset it serves as if nothing had been.

use std::fs::File;

use proptest::prelude::*;

use super::balloon::Balloon;
use super::block::Block;
use super::console::Console;
use super::mem::Mem;
use super::net::Net;
use super::net::vhost::tests::{self as in_kernel, Fake};
use super::rng::Rng;
use super::testing::{Driver, MEMORY, Rig, read_part, write_part};
use super::vsock::Vsock;
use super::{VirtioDevice, VirtioPciDevice};
use crate::config::{
    BalloonConfig, ConsoleFiles, ConsolePortConfig, DiskConfig, HOT_BLOCK, HotMemoryConfig,
    NetConfig, NetFiles, RngConfig, VsockConfig,
};
use crate::device::Device;
use crate::request::Request;

#[derive(Debug, Clone)]
enum Act {
    /// Writes any register of the BAR.
    Register {
        offset: u64,
        value: u64,
        length: usize,
    },
    /// Writes configuration space.
    Config {
        offset: u16,
        value: u32,
        length: usize,
    },
    /// Puts a descriptor anywhere into a queue's table.
    Descriptor {
        queue: usize,
        at: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    },
    /// Makes heads available, counted or not.
    Available {
        queue: usize,
        head: u16,
        jump: u16,
    },
    /// Scribbles over the rings.
    Scribble {
        queue: usize,
        offset: u64,
        value: u64,
    },
    Kick {
        queue: usize,
    },
    Pause,
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let address = prop_oneof![
        4 => 0u64..0x2_0000,
        1 => (8u64 << 20)..(9 << 20),
        1 => MEMORY - 0x1000..MEMORY + 0x1000,
        1 => any::<u64>(),
    ];
    let length = prop_oneof![4 => 0u32..0x2000, 1 => any::<u32>()];
    let act = prop_oneof![
        2 => (0u64..0x40, any::<u64>(), 1usize..9)
            .prop_map(|(offset, value, length)| Act::Register { offset, value, length }),
        1 => (0u64..0x9000, any::<u64>(), 1usize..9)
            .prop_map(|(offset, value, length)| Act::Register { offset, value, length }),
        1 => (0u16..0x110, any::<u32>(), 1usize..5)
            .prop_map(|(offset, value, length)| Act::Config { offset, value, length }),
        8 => (0usize..6, 0u16..8, address, length, 0u16..8, 0u16..10).prop_map(
            |(queue, at, address, length, flags, next)| Act::Descriptor {
                queue, at, address, length, flags, next
            }
        ),
        6 => (0usize..6, 0u16..9, prop_oneof![8 => Just(1u16), 1 => any::<u16>()])
            .prop_map(|(queue, head, jump)| Act::Available { queue, head, jump }),
        1 => (0usize..6, 0u64..0x4000, any::<u64>())
            .prop_map(|(queue, offset, value)| Act::Scribble { queue, offset, value }),
        4 => (0usize..6).prop_map(|queue| Act::Kick { queue }),
        1 => Just(Act::Pause),
    ];
    prop::collection::vec(act, 1..80)
}

/// Fills low memory with what looks like requests of all kinds, so that many are half right.
fn tempt(driver: &Driver) {
    for at in 0..0x200u64 {
        let kind = [0u32, 1, 4, 8, 11, 13, 99][at as usize % 7];
        driver.put(
            at * 256,
            &[&kind.to_le_bytes()[..], &[0; 4], &(at % 40).to_le_bytes()].concat(),
        );
    }
}

fn perform(driver: &mut Driver, act: &Act) {
    let count = driver.rings.len();
    match *act {
        Act::Register {
            offset,
            value,
            length,
        } => {
            driver.write(offset, &value.to_le_bytes()[..length]);
            let mut data = [0; 8];
            driver.read(offset, &mut data[..length]);
        }
        Act::Config {
            offset,
            value,
            length,
        } => {
            let function = driver.device.function();
            let mut function = function.lock().unwrap();
            function.write_config(offset, &value.to_le_bytes()[..length]);
            function.read_config(offset, &mut [0; 8][..length]);
        }
        Act::Descriptor {
            queue,
            at,
            address,
            length,
            flags,
            next,
        } => {
            let table = driver.rings[queue % count].base;
            let part = super::testing::Part {
                address,
                length,
                writable: false,
            };
            driver.descriptor(table, at, part, flags, next);
        }
        Act::Available { queue, head, jump } => driver.make_available_by(queue % count, head, jump),
        Act::Scribble {
            queue,
            offset,
            value,
        } => {
            let base = driver.rings[queue % count].base;
            driver.put(base + offset, &value.to_le_bytes());
        }
        Act::Kick { queue } => driver.kick(queue % count),
        Act::Pause => {
            driver.device.pause().unwrap();
            driver.device.save().unwrap();
            driver.device.resume().unwrap();
        }
    }
}

fn attack(acts: &[Act], make: impl Fn(&Rig) -> Box<dyn VirtioDevice>, serve: impl Fn(&mut Driver)) {
    attack_on(&Rig::new(), acts, make, serve);
}

fn attack_on(
    rig: &Rig,
    acts: &[Act],
    make: impl Fn(&Rig) -> Box<dyn VirtioDevice>,
    serve: impl Fn(&mut Driver),
) {
    let (board, recorder) = rig.with_recorder();
    let device = VirtioPciDevice::new("victim", make(rig), &board).unwrap();
    let mut driver = Driver::start(rig, device, recorder);
    tempt(&driver);
    for act in acts {
        perform(&mut driver, act);
    }
    driver.initialise(u64::MAX);
    serve(&mut driver);
    drop(driver);
    while let Some(request) = rig.requests.try_next() {
        assert_eq!(request, Request::HotMemoryChanged, "no thread panicked");
    }
}

fn disk_file() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    file
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn against_a_disk(acts in acts(), queues in 1u16..3) {
        let config = DiskConfig {
            read_only: false,
            serial_number: "victim".to_owned(),
            direct: false,
            limit: None,
            queues,
        };
        attack(
            &acts,
            |rig| Box::new(Block::open("victim", &config, disk_file(), &rig.board.threads).unwrap()),
            |driver| {
                driver.put(0x1000, &[&8u64.to_le_bytes()[..], &[0; 8]].concat());
                let parts = [read_part(0x1000, 16), write_part(0x2000, 20), write_part(0x3000, 1)];
                assert_eq!(driver.request(0, &parts), 21);
                assert_eq!(driver.take(0x2000, 6), b"victim");
            },
        );
    }

    #[test]
    fn against_random_numbers(acts in acts()) {
        attack(
            &acts,
            |rig| Box::new(Rng::new("victim", &RngConfig { bytes_per_second: Some(1 << 30) }, &rig.board.reactor).unwrap()),
            |driver| assert_eq!(driver.request(0, &[write_part(0x1000, 16)]), 16),
        );
    }

    #[test]
    fn against_a_balloon(acts in acts()) {
        attack(
            &acts,
            |rig| Box::new(Balloon::new("victim", &BalloonConfig::default(), &rig.board)),
            |driver| {
                driver.put(0x1000, &3u32.to_le_bytes());
                driver.put(0x3000, &[7; 4096]);
                driver.request(0, &[read_part(0x1000, 4)]);
                assert_eq!(driver.take(0x3000, 4096), [0; 4096]);
            },
        );
    }

    #[test]
    fn against_hot_memory(acts in acts()) {
        let config = HotMemoryConfig { max: 16 * HOT_BLOCK, bytes: 4 * HOT_BLOCK };
        let rig = Rig::with_hot_memory(Some(config));
        let base = rig.board.memory.hot().unwrap().window().base;
        attack_on(
            &rig,
            &acts,
            |rig| Box::new(Mem::new("victim", &config, &rig.board).unwrap()),
            |driver| {
                // Unplug all, then plug four blocks.
                for (kind, count) in [(2u64, 0u64), (0, 4)] {
                    let request = [kind, base, count].map(u64::to_le_bytes).concat();
                    driver.put(0x1000, &request);
                    let parts = [read_part(0x1000, 24), write_part(0x2000, 10)];
                    assert_eq!(driver.request(0, &parts), 10);
                    assert_eq!(driver.take(0x2000, 2), [0, 0]);
                }
                assert_eq!(driver.take(base, 4096), [0; 4096]);
            },
        );
    }

    #[test]
    fn against_a_console(acts in acts()) {
        let ports = [("a", true), ("b", false)]
            .map(|(name, console)| ConsolePortConfig { name: name.to_owned(), console });
        // Nobody is at the other end: the queues alone matter here.
        let files = [ConsoleFiles::default(), ConsoleFiles::default()];
        attack(
            &acts,
            |rig| Box::new(Console::new("victim", &ports, &files, &rig.board.reactor).unwrap()),
            |driver| assert_eq!(driver.request(1, &[read_part(0x1000, 16)]), 0),
        );
    }

    #[test]
    fn against_sockets(acts in acts()) {
        let door = super::vsock::testing::Entrance::new();
        // Programs of the host that want a port of the guest and say much, and that wait for it.
        let visitors: Vec<_> = ["CONNECT 1\n", "ACCEPT 0\n", "CONNECT 0\n", "ACCEPT 256\n"]
            .map(|line| door.visit(&format!("{line}{}", "x".repeat(4000))))
            .into();
        attack(
            &acts,
            |rig| {
                let listener = door.listener.try_clone().unwrap().into();
                let vsock = Vsock::new("victim", &VsockConfig { cid: 3 }, listener, &rig.board.threads);
                Box::new(vsock.unwrap())
            },
            |driver| {
                // A packet of no connection is answered by a reset.
                let mut packet = [0; 44];
                (packet[0], packet[8], packet[28], packet[30]) = (3, 2, 1, 5);
                driver.put(0x1000, &packet);
                assert_eq!(driver.request(1, &[read_part(0x1000, 44)]), 0);
                let mut operation = 0;
                while operation != 3 {
                    assert!(driver.request(0, &[write_part(0x2000, 8192)]) >= 44);
                    operation = driver.take(0x2000 + 30, 1)[0];
                }
            },
        );
        drop(visitors);
    }

    #[test]
    fn against_a_network(acts in acts(), queues in 1u16..3) {
        let config = NetConfig { mac: [2, 0, 0, 0, 0, 1], queues, mtu: Some(1500), limit: None, addresses: Vec::new() };
        let wires = super::net::testing::wires(queues);
        let files = NetFiles { taps: wires.files, vhost: Vec::new() };
        // Packets wait for whatever buffers the driver posts.
        for far in &wires.far {
            (0..64).for_each(|_| { let _ = far.send(&[7; 1600]); });
        }
        attack(
            &acts,
            |rig| Box::new(Net::open("victim", &config, &files, &rig.board.threads).unwrap()),
            |driver| {
                driver.put(0x1000, &[9; 80]);
                assert_eq!(driver.request(1, &[read_part(0x1000, 80)]), 0);
                wires.far[0].expect(|packet| packet == [9; 80]);
            },
        );
    }

    /// Which kernel it is matters little: what it is told must make sense whatever the driver does.
    #[test]
    fn against_a_network_in_the_kernel(acts in acts()) {
        let kernel = Fake::default();
        attack(
            &acts,
            |rig| Box::new(in_kernel::net(rig, std::slice::from_ref(&kernel)).0),
            |_| kernel.wait_for_running(true),
        );
        kernel.wait_for_running(false);
    }
}
