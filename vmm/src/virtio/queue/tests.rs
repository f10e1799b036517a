//! Virtqueues: chains that are honest and chains that lie, and slices of segments against a model.

use proptest::prelude::*;

use super::*;
use crate::pci::Msix;
use crate::virtio::testing::{MEMORY, Rig};

const TABLE: u64 = 0x1000;
const DRIVER: u64 = 0x3000;
const DEVICE: u64 = 0x4000;
const SIZE: u16 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

struct Fixture {
    queue: Virtqueue,
    memory: Arc<GuestMap>,
    available: u16,
}

fn state() -> QueueState {
    QueueState {
        size: SIZE,
        vector: 0,
        enabled: true,
        descriptors: TABLE,
        driver: DRIVER,
        device: DEVICE,
        next_available: 0,
        next_used: 0,
    }
}

fn make(rig: &Rig, state: &QueueState) -> Result<Virtqueue, QueueFault> {
    make_with(rig, state, feature::INDIRECT_DESC | feature::VERSION_1)
}

fn make_with(rig: &Rig, state: &QueueState, features: u64) -> Result<Virtqueue, QueueFault> {
    let (board, recorder) = rig.with_recorder();
    let msix = Arc::new(Msix::new(1, recorder).unwrap());
    let interrupt = Arc::new(Interrupt::new("queue", msix, 1));
    let kick = Arc::new(EventFd::new().unwrap());
    Virtqueue::new(0, state, 256, features, &board.memory, kick, interrupt)
}

impl Fixture {
    fn new(rig: &Rig) -> Self {
        let queue = make(rig, &state()).unwrap();
        Self {
            queue,
            memory: rig.board.memory.space(),
            available: 0,
        }
    }

    fn descriptor(&self, table: u64, at: u16, address: u64, length: u32, flags: u16, next: u16) {
        let raw = Descriptor::new(address, length, flags, next);
        self.memory
            .write_obj(raw, GuestAddress(table + 16 * u64::from(at)))
            .unwrap();
    }

    fn offer(&mut self, head: u16) -> Result<Option<Chain>, QueueFault> {
        let slot = DRIVER + 4 + 2 * u64::from(self.available % SIZE);
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory
            .write_obj(self.available, GuestAddress(DRIVER + 2))
            .unwrap();
        self.queue.pop()
    }
}

#[test]
fn a_chain_comes_with_its_segments_in_order_and_without_the_empty_ones() {
    let rig = Rig::new();
    let mut fixture = Fixture::new(&rig);
    fixture.descriptor(TABLE, 3, 0x5000, 10, NEXT, 7);
    fixture.descriptor(TABLE, 7, u64::MAX, 0, NEXT, 1);
    fixture.descriptor(TABLE, 1, 0x6000, 20, WRITE, 0);
    let chain = fixture.offer(3).unwrap().unwrap();
    assert_eq!(chain.head, 3);
    assert_eq!(
        chain.readable(),
        [Segment {
            address: 0x5000,
            length: 10
        }]
    );
    assert_eq!(
        chain.writable(),
        [Segment {
            address: 0x6000,
            length: 20
        }]
    );
    assert_eq!(fixture.queue.pop(), Ok(None));
}

#[test]
fn chains_that_lie_are_told_apart() {
    let rig = Rig::new();
    type Prepare = fn(&Fixture);
    let cases: [(&str, u16, Prepare); 12] = [
        ("points at descriptor 16", 16, |_| {}),
        ("points at descriptor 99", 0, |f| {
            f.descriptor(TABLE, 0, 0x5000, 1, NEXT, 99)
        }),
        ("has a loop", 0, |f| {
            f.descriptor(TABLE, 0, 0x5000, 1, NEXT, 0)
        }),
        ("outside of memory", 0, |f| {
            f.descriptor(TABLE, 0, MEMORY - 1, 2, 0, 0)
        }),
        ("outside of memory", 0, |f| {
            f.descriptor(TABLE, 0, u64::MAX, 2, 0, 0)
        }),
        ("after a writable one", 0, |f| {
            f.descriptor(TABLE, 0, 0x5000, 1, NEXT | WRITE, 1);
            f.descriptor(TABLE, 1, 0x5000, 1, 0, 0);
        }),
        ("no multiple of 16", 0, |f| {
            f.descriptor(TABLE, 0, 0x8000, 15, INDIRECT, 0)
        }),
        ("no multiple of 16", 0, |f| {
            f.descriptor(TABLE, 0, 0x8000, 0, INDIRECT, 0)
        }),
        ("longer than the queue", 0, |f| {
            f.descriptor(TABLE, 0, 0x8000, 17 * 16, INDIRECT, 0)
        }),
        ("with a next descriptor", 0, |f| {
            f.descriptor(TABLE, 0, 0x8000, 16, INDIRECT | NEXT, 1)
        }),
        ("nested", 0, |f| {
            f.descriptor(TABLE, 0, 0x8000, 16, INDIRECT, 0);
            f.descriptor(0x8000, 0, 0x9000, 16, INDIRECT, 0);
        }),
        ("outside of memory", 0, |f| {
            f.descriptor(TABLE, 0, MEMORY, 16, INDIRECT, 0)
        }),
    ];
    for (expected, head, prepare) in cases {
        let mut fixture = Fixture::new(&rig);
        fixture
            .memory
            .write_slice(&[0; 0x4000], GuestAddress(TABLE))
            .unwrap();
        prepare(&fixture);
        let fault = fixture.offer(head).unwrap_err().to_string();
        assert!(fault.contains(expected), "{fault:?} is not {expected:?}");
    }
}

#[test]
fn an_index_that_runs_away_is_a_fault() {
    let rig = Rig::new();
    let mut fixture = Fixture::new(&rig);
    fixture
        .memory
        .write_obj(SIZE + 1, GuestAddress(DRIVER + 2))
        .unwrap();
    assert_eq!(
        fixture.queue.pop(),
        Err(QueueFault::AvailableIndex {
            ahead: SIZE + 1,
            size: SIZE
        })
    );
}

#[test]
fn more_in_flight_than_the_queue_holds_is_a_fault() {
    let rig = Rig::new();
    let mut fixture = Fixture::new(&rig);
    fixture.descriptor(TABLE, 0, 0x5000, 1, 0, 0);
    for _ in 0..SIZE {
        assert!(fixture.offer(0).unwrap().is_some());
    }
    assert_eq!(fixture.offer(0), Err(QueueFault::InFlight { size: SIZE }));
    fixture.queue.push(0, 0).unwrap();
    assert!(fixture.queue.pop().unwrap().is_some());
}

#[test]
fn a_chain_that_was_put_back_comes_again() {
    let rig = Rig::new();
    let mut fixture = Fixture::new(&rig);
    fixture.descriptor(TABLE, 2, 0x5000, 1, 0, 0);
    let chain = fixture.offer(2).unwrap();
    fixture.queue.unpop();
    assert_eq!(fixture.queue.pop().unwrap(), chain);
}

/// Whether a driver kicks that made `count` chains available after `old` (virtio 1.2 §2.7.10).
fn kicks(queue: &Virtqueue, old: u16, count: u16) -> bool {
    let word = |at: u64| {
        let address = GuestAddress(DEVICE + at);
        u16::from_le(queue.memory().load(address, Ordering::Relaxed).unwrap())
    };
    if !queue.queue.event_idx_enabled() {
        return word(0) & 1 == 0;
    }
    let event = word(4 + 8 * u64::from(SIZE));
    let new = old.wrapping_add(count);
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

#[test]
fn a_driver_kicks_only_while_it_is_asked_to() {
    let rig = Rig::new();
    for features in [feature::VERSION_1, feature::VERSION_1 | feature::EVENT_IDX] {
        for next in [0, 1, 7, 0x7fff, 0x8000, 0xfff0, 0xffff] {
            let state = QueueState {
                next_available: next,
                next_used: next,
                ..state()
            };
            let mut queue = make_with(&rig, &state, features).unwrap();
            let any = |queue: &Virtqueue| (1..=SIZE).any(|count| kicks(queue, next, count));
            let all = |queue: &Virtqueue| (1..=SIZE).all(|count| kicks(queue, next, count));
            for _ in 0..2 {
                queue.disable_kicks().unwrap();
                assert!(!any(&queue), "{features:#x}, {next}: not asked");
                queue.enable_kicks().unwrap();
                assert!(all(&queue), "{features:#x}, {next}: asked");
            }
        }
    }
}

#[test]
fn a_driver_is_asked_to_kick_beyond_what_it_has_offered() {
    let rig = Rig::new();
    for features in [feature::VERSION_1, feature::VERSION_1 | feature::EVENT_IDX] {
        for next in [0, 7, 0x7fff, 0xfffe, 0xffff] {
            let state = QueueState {
                next_available: next,
                next_used: next,
                ..state()
            };
            let mut queue = make_with(&rig, &state, features).unwrap();
            let offer = |queue: &Virtqueue, available: u16| {
                let address = GuestAddress(DRIVER + 2);
                let memory = queue.memory();
                memory.store(available.to_le(), address, Ordering::Relaxed)
            };
            // Three lie there, none of them popped.
            let offered = next.wrapping_add(3);
            offer(&queue, offered).unwrap();
            assert_eq!(queue.offered().unwrap(), offered);
            assert!(!queue.enable_kicks_beyond(offered).unwrap());
            assert!(kicks(&queue, offered, 1), "{features:#x}, {next}");
            offer(&queue, offered.wrapping_add(1)).unwrap();
            assert!(queue.enable_kicks_beyond(offered).unwrap());
        }
    }
}

#[test]
fn queues_that_cannot_be_are_refused() {
    let rig = Rig::new();
    let good = state();
    assert!(make(&rig, &good).is_ok());
    for size in [0, 3, 512, 0x8000] {
        let fault = make(&rig, &QueueState { size, ..good }).err();
        assert_eq!(fault, Some(QueueFault::Size { size, max: 256 }));
    }
    for bad in [
        QueueState {
            descriptors: TABLE + 8,
            ..good
        },
        QueueState {
            descriptors: MEMORY - 16,
            ..good
        },
        QueueState {
            driver: DRIVER + 1,
            ..good
        },
        QueueState { driver: 0, ..good },
        QueueState {
            driver: u64::MAX - 1,
            ..good
        },
        QueueState {
            device: DEVICE + 2,
            ..good
        },
        QueueState {
            device: MEMORY,
            ..good
        },
        // What is written to one would be read in the other.
        QueueState {
            device: DRIVER + 36,
            ..good
        },
        QueueState {
            device: DRIVER - 132,
            ..good
        },
    ] {
        assert_eq!(make(&rig, &bad).err(), Some(QueueFault::Rings), "{bad:?}");
    }
    for device in [DRIVER + 40, DRIVER - 136] {
        assert!(make(&rig, &QueueState { device, ..good }).is_ok());
    }
}

proptest! {
    #[test]
    fn a_slice_of_segments_is_what_lies_there(
        lengths in prop::collection::vec(1u32..50, 0..10),
        skip in 0u64..300,
        take in 0u64..300,
    ) {
        let mut at = 0u64;
        let mut segments = Vec::new();
        for length in lengths {
            segments.push(Segment { address: at, length });
            at += u64::from(length) + 1000;
        }
        let bytes = |segments: &[Segment]| -> Vec<u64> {
            segments.iter().flat_map(|s| s.address..s.address + u64::from(s.length)).collect()
        };
        let expected: Vec<u64> =
            bytes(&segments).into_iter().skip(skip as usize).take(take as usize).collect();
        prop_assert_eq!(bytes(&slice(&segments, skip, take)), expected);
    }
}
