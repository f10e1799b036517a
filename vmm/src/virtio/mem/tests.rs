//! The memory device, driven as a guest would, and as one that lies.

use proptest::prelude::*;

use super::*;
use crate::device::Device;
use crate::virtio::testing::{Driver, MEMORY, Rig, read_part, write_part};
use crate::virtio::transport::VirtioPciDevice;

const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

const BLOCKS: u64 = 2048;

fn config(max: u64, wished: u64) -> HotMemoryConfig {
    HotMemoryConfig {
        max: max * HOT_BLOCK,
        bytes: wished * HOT_BLOCK,
    }
}

/// A driver of a region of so many blocks, of which so many are wished.
struct Guest {
    driver: Driver,
    control: MemControl,
    base: u64,
}

impl Guest {
    fn new(rig: &Rig, config: &HotMemoryConfig) -> Self {
        let (board, recorder) = rig.with_recorder();
        let device = Mem::new("memory0", config, &board).unwrap();
        let control = device.control();
        let device = VirtioPciDevice::new("memory0", Box::new(device), &board).unwrap();
        Self {
            driver: Driver::start(rig, device, recorder),
            control,
            base: board.memory.hot().unwrap().window().base,
        }
    }

    /// Saves the device and goes on with one that is made of what was saved, on the same memory.
    fn restored(self, rig: &Rig) -> Self {
        self.driver.device.pause().unwrap();
        let saved = self.driver.device.save().unwrap();
        let (board, recorder) = rig.with_recorder();
        let mut control = None;
        let rings = self.driver.rings.clone();
        // Two devices on one set of doorbells: the old one goes first.
        drop(self.driver);
        let device = VirtioPciDevice::restore(&saved, &board, |state| {
            let device = Mem::restore(state, &board)?;
            control = Some(device.control());
            Ok(Box::new(device))
        });
        let mut driver = Driver::attach(rig, device.unwrap(), recorder);
        driver.rings = rings;
        driver.device.resume().unwrap();
        Self {
            driver,
            control: control.unwrap(),
            base: self.base,
        }
    }

    /// Answer and state.
    fn ask(&mut self, kind: u16, address: u64, count: u16) -> (u16, u16) {
        let request = [u64::from(kind), address, u64::from(count)];
        (self.driver).put(0x1000, &request.map(u64::to_le_bytes).concat());
        let parts = [read_part(0x1000, 24), write_part(0x2000, 10)];
        assert_eq!(self.driver.request(0, &parts), 10);
        let answer = self.driver.take(0x2000, 10);
        let half = |at: usize| u16::from_le_bytes([answer[at], answer[at + 1]]);
        (half(0), half(8))
    }

    fn block(&self, number: u64) -> u64 {
        self.base + number * HOT_BLOCK
    }

    fn plug(&mut self, first: u64, count: u16) -> u16 {
        self.ask(PLUG, self.block(first), count).0
    }

    fn unplug(&mut self, first: u64, count: u16) -> u16 {
        self.ask(UNPLUG, self.block(first), count).0
    }

    /// Block size, address, region, usable, plugged, requested.
    fn registers(&self) -> [u64; 6] {
        [0, 16, 24, 32, 40, 48].map(|at| {
            let bytes = self.driver.config(at, 8);
            u64::from_le_bytes(bytes.try_into().unwrap())
        })
    }
}

fn changes(rig: &Rig) -> usize {
    let mut count = 0;
    while let Some(request) = rig.requests.try_next() {
        assert_eq!(request, Request::HotMemoryChanged);
        count += 1;
    }
    count
}

#[test]
fn blocks_are_plugged_as_far_as_is_wished_and_told_once_until_somebody_looks() {
    let config = config(BLOCKS, 6);
    let rig = Rig::with_hot_memory(Some(config));
    let mut guest = Guest::new(&rig, &config);
    let region = BLOCKS * HOT_BLOCK;
    let usable = 6 * HOT_BLOCK + USABLE_EXTENT;
    let wished = 6 * HOT_BLOCK;
    assert_eq!(
        guest.registers(),
        [HOT_BLOCK, guest.base, region, usable, 0, wished]
    );
    assert_eq!(guest.plug(0, 4), ACK);
    assert_eq!(guest.plug(4, 3), NACK, "more than is wished");
    assert_eq!(guest.plug(3, 2), ERROR, "one is plugged");
    assert_eq!(guest.plug(8, 2), ACK);
    assert_eq!(guest.registers()[4], wished);
    assert_eq!((changes(&rig), guest.control.take_changed()), (1, wished));
    let states = [(0, 4), (4, 4), (2, 4)].map(|(first, count)| {
        let address = guest.block(first);
        guest.ask(STATE, address, count)
    });
    assert_eq!(states, [(ACK, 0), (ACK, 1), (ACK, 2)]);

    guest.driver.put(guest.block(9), &[7; 4096]);
    assert_eq!(guest.unplug(9, 2), ERROR, "one is not plugged");
    assert_eq!(guest.unplug(9, 1), ACK);
    assert_eq!(guest.plug(9, 1), ACK);
    assert_eq!(guest.driver.take(guest.block(9), 4096), [0; 4096]);
    assert_eq!((changes(&rig), guest.control.take_changed()), (1, wished));
    assert_eq!(guest.ask(UNPLUG_ALL, 0, 0).0, ACK);
    assert_eq!(guest.registers()[4], 0);
    assert_eq!((changes(&rig), guest.control.plugged()), (1, 0));
}

#[test]
fn what_is_no_block_or_no_request_is_an_error() {
    let config = config(BLOCKS, BLOCKS);
    let rig = Rig::with_hot_memory(Some(config));
    let mut guest = Guest::new(&rig, &config);
    let (base, end) = (guest.base, guest.block(BLOCKS));
    for kind in [PLUG, UNPLUG, STATE] {
        for (address, count) in [
            (base, 0),
            (base + 4096, 1),
            (base - HOT_BLOCK, 1),
            (end, 1),
            (end - HOT_BLOCK, 2),
            (0, 1),
            (u64::MAX, 1),
            (u64::MAX - HOT_BLOCK + 1, 0xffff),
            (base, 0xffff),
        ] {
            assert_eq!(
                guest.ask(kind, address, count).0,
                ERROR,
                "{kind} {address:#x}"
            );
        }
    }
    assert_eq!(guest.ask(4, base, 1).0, ERROR);
    assert_eq!(guest.ask(0xffff, base, 1).0, ERROR);
    assert_eq!(guest.registers()[4], 0);
}

#[test]
fn half_a_request_or_no_place_for_the_answer_takes_the_device_out_of_service() {
    for parts in [
        vec![read_part(0x1000, 23), write_part(0x2000, 10)],
        vec![read_part(0x1000, 24), write_part(0x2000, 9)],
        vec![read_part(0x1000, 24)],
        vec![write_part(0x2000, 64)],
    ] {
        let config = config(BLOCKS, 4);
        let rig = Rig::with_hot_memory(Some(config));
        let mut guest = Guest::new(&rig, &config);
        guest.driver.submit(0, &parts);
        guest.driver.kick(0);
        guest.driver.wait_for_needs_reset();
        // The next driver finds it in order, and what is plugged as it was.
        guest.driver.initialise(u64::MAX);
        assert_eq!(guest.plug(0, 4), ACK);
        guest.driver.initialise(u64::MAX);
        assert_eq!(guest.registers()[4], 4 * HOT_BLOCK);
    }
}

#[test]
fn another_wish_interrupts_and_widens_what_is_usable_which_unplugging_all_narrows() {
    let config = config(BLOCKS, 0);
    let rig = Rig::with_hot_memory(Some(config));
    let mut guest = Guest::new(&rig, &config);
    let usable = |guest: &Guest| guest.registers()[3] / HOT_BLOCK;
    assert_eq!((usable(&guest), guest.plug(0, 1)), (0, ERROR));
    guest.control.set_requested(8 * HOT_BLOCK);
    assert!(
        guest
            .driver
            .recorder
            .wait(0, crate::virtio::testing::DEADLINE)
    );
    assert_eq!((usable(&guest), guest.plug(0, 8)), (8 + 1024, ACK));
    guest.control.set_requested(BLOCKS * HOT_BLOCK);
    assert_eq!(usable(&guest), BLOCKS);
    guest.control.set_requested(2 * HOT_BLOCK);
    assert_eq!((usable(&guest), guest.plug(9, 1)), (BLOCKS, NACK));
    assert_eq!(guest.ask(UNPLUG_ALL, 0, 0).0, ACK);
    assert_eq!((usable(&guest), guest.plug(0, 2)), (2 + 1024, ACK));
}

#[test]
fn a_request_of_many_pieces_is_one_to_the_driver_also_when_a_pause_comes_between() {
    let config = config(BLOCKS, BLOCKS);
    let rig = Rig::with_hot_memory(Some(config));
    let mut guest = Guest::new(&rig, &config);
    for _ in 0..8 {
        let request = [u64::from(PLUG), guest.base, BLOCKS];
        (guest.driver).put(0x1000, &request.map(u64::to_le_bytes).concat());
        let parts = [read_part(0x1000, 24), write_part(0x2000, 10)];
        let head = guest.driver.submit(0, &parts);
        guest.driver.kick(0);
        guest = guest.restored(&rig);
        assert_eq!(guest.driver.used(0), (head, 10));
        assert_eq!(guest.driver.take(0x2000, 2), [0, 0]);
        assert_eq!(guest.registers()[4], BLOCKS * HOT_BLOCK);
        assert_eq!(guest.unplug(0, BLOCKS as u16), ACK);
        assert_eq!(guest.registers()[4], 0);
    }
}

#[test]
fn what_the_host_cannot_carry_out_whole_it_takes_back_and_says_busy() {
    let config = config(BLOCKS, BLOCKS);
    let rig = Rig::with_hot_memory(Some(config));
    let mut guest = Guest::new(&rig, &config);
    let hot = rig.board.memory.hot().unwrap().clone();
    let patience = |pieces: u64| {
        hot.patience
            .store(pieces, std::sync::atomic::Ordering::Relaxed)
    };
    let plugged = |guest: &Guest| guest.registers()[4] / HOT_BLOCK;
    let pieces = BLOCKS / BLOCKS_A_TURN;
    for left in 0..pieces {
        patience(left);
        assert_eq!(guest.plug(0, BLOCKS as u16), BUSY);
        assert_eq!(plugged(&guest), 0, "after {left} of {pieces}");
    }
    patience(u64::MAX);
    assert_eq!(guest.plug(0, BLOCKS as u16), ACK);
    for left in 0..pieces {
        patience(left);
        assert_eq!(guest.unplug(0, BLOCKS as u16), BUSY);
        assert_eq!(plugged(&guest), BLOCKS, "after {left} of {pieces}");
    }
    // All of it may stop half way: the driver goes on asking until none is left.
    patience(3);
    assert_eq!(guest.ask(UNPLUG_ALL, 0, 0).0, BUSY);
    assert_eq!(plugged(&guest), BLOCKS - 3 * BLOCKS_A_TURN);
    assert_eq!(guest.ask(UNPLUG_ALL, 0, 0).0, ACK);
    assert_eq!(plugged(&guest), 0);
}

#[test]
fn a_driver_s_reset_leaves_what_is_plugged_and_the_machine_s_takes_it() {
    let config = config(BLOCKS, 4);
    let rig = Rig::with_hot_memory(Some(config));
    let mut guest = Guest::new(&rig, &config);
    assert_eq!(guest.plug(0, 4), ACK);
    guest.driver.put(guest.base, &[7; 64]);
    guest.driver.initialise(u64::MAX);
    assert_eq!(guest.registers()[4], 4 * HOT_BLOCK);
    assert_eq!(guest.driver.take(guest.base, 64), [7; 64]);
    guest.control.take_changed();
    changes(&rig);
    guest.driver.device.reset().unwrap();
    assert_eq!(guest.registers()[4], 0);
    assert_eq!((changes(&rig), guest.control.take_changed()), (1, 0));
    guest.driver.initialise(u64::MAX);
    assert_eq!(guest.plug(0, 4), ACK);
    assert_eq!(guest.driver.take(guest.base, 64), [0; 64]);
}

#[test]
fn no_device_touches_a_block_that_is_not_plugged() {
    let config = config(BLOCKS, 4);
    let rig = Rig::with_hot_memory(Some(config));
    let mut guest = Guest::new(&rig, &config);
    assert_eq!(guest.plug(0, 1), ACK);
    let request = [u64::from(STATE), guest.base, 1]
        .map(u64::to_le_bytes)
        .concat();
    guest.driver.put(guest.base, &request);
    // From and to what is plugged.
    let parts = [
        read_part(guest.base, 24),
        write_part(guest.block(1) - 10, 10),
    ];
    assert_eq!(guest.driver.request(0, &parts), 10);
    // The answer would reach into the next block.
    let parts = [
        read_part(guest.base, 24),
        write_part(guest.block(1) - 9, 10),
    ];
    guest.driver.submit(0, &parts);
    guest.driver.kick(0);
    guest.driver.wait_for_needs_reset();
}

#[derive(Debug, Clone)]
enum Act {
    Request { kind: u16, offset: u64, count: u16 },
    Wish(u64),
    Write { block: u64 },
    Restart,
    Restore,
}

const FEW: u64 = 24;

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let offset = prop_oneof![
        12 => (0..FEW + 2).prop_map(|block| block * HOT_BLOCK),
        1 => 0..FEW * HOT_BLOCK,
        1 => any::<u64>(),
    ];
    let count = prop_oneof![12 => 0..8u16, 1 => any::<u16>()];
    let kind = prop_oneof![4 => Just(PLUG), 3 => Just(UNPLUG), 1 => Just(UNPLUG_ALL), 2 => Just(STATE), 1 => any::<u16>()];
    let act = prop_oneof![
        12 => (kind, offset, count).prop_map(|(kind, offset, count)| Act::Request { kind, offset, count }),
        2 => (0..=FEW).prop_map(Act::Wish),
        4 => (0..FEW).prop_map(|block| Act::Write { block }),
        1 => Just(Act::Restart),
        1 => Just(Act::Restore),
    ];
    prop::collection::vec(act, 1..60)
}

/// What the device should be, in the simplest words.
struct Model {
    /// What each block that is plugged holds.
    blocks: Vec<Option<u8>>,
    wished: u64,
    usable: u64,
}

impl Model {
    fn narrow(&mut self) {
        self.blocks.fill(None);
        // The region is smaller than what is added to a wish.
        self.usable = if self.wished == 0 { 0 } else { FEW };
    }

    fn plugged(&self) -> u64 {
        self.blocks.iter().flatten().count() as u64
    }

    fn answer(&mut self, kind: u16, offset: u64, count: u16) -> (u16, u16) {
        let first = offset / HOT_BLOCK;
        let count = u64::from(count);
        let fits = offset.is_multiple_of(HOT_BLOCK)
            && count > 0
            && first < FEW
            && first + count <= self.usable;
        if kind == UNPLUG_ALL {
            self.narrow();
            return (ACK, 0);
        }
        if !fits || kind > STATE {
            return (ERROR, 0);
        }
        let plugged = self.plugged();
        let blocks = &mut self.blocks[first as usize..(first + count) as usize];
        let there = blocks.iter().flatten().count() as u64;
        match kind {
            PLUG if plugged + count > self.wished => (NACK, 0),
            PLUG if there == 0 => {
                blocks.fill(Some(0));
                (ACK, 0)
            }
            UNPLUG if there == count => {
                blocks.fill(None);
                (ACK, 0)
            }
            STATE if there == count => (ACK, 0),
            STATE if there == 0 => (ACK, 1),
            STATE => (ACK, 2),
            _ => (ERROR, 0),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_a_driver_asks_it_has_what_it_was_granted_and_zeros_where_it_has_nothing(acts in acts()) {
        let config = config(FEW, 8);
        let rig = Rig::with_hot_memory(Some(config));
        let mut guest = Guest::new(&rig, &config);
        let hot = rig.board.memory.hot().unwrap().clone();
        let mut model = Model { blocks: vec![None; FEW as usize], wished: 8, usable: FEW };
        for (step, act) in acts.into_iter().enumerate() {
            match act {
                Act::Request { kind, offset, count } => {
                    let address = guest.base.wrapping_add(offset);
                    let expected = match address.checked_sub(guest.base) {
                        Some(offset) => model.answer(kind, offset, count),
                        None => model.answer(kind, 1, count),
                    };
                    prop_assert_eq!(guest.ask(kind, address, count), expected);
                }
                Act::Wish(blocks) => {
                    guest.control.set_requested(blocks * HOT_BLOCK);
                    model.usable = model.usable.max(if blocks == 0 { 0 } else { FEW });
                    model.wished = blocks;
                }
                Act::Write { block } => {
                    // A guest writes to its own; a device may come late.
                    guest.driver.put(guest.block(block), &[step as u8]);
                    if let Some(value) = &mut model.blocks[block as usize] {
                        *value = step as u8;
                    }
                }
                Act::Restart => {
                    guest.driver.device.reset().unwrap();
                    guest.driver.initialise(u64::MAX);
                    model.narrow();
                }
                Act::Restore => guest = guest.restored(&rig),
            }
            let [_, _, _, sizes @ ..] = guest.registers();
            let expected = [model.usable, model.plugged(), model.wished];
            prop_assert_eq!(sizes, expected.map(|blocks| blocks * HOT_BLOCK));
            for block in 0..FEW {
                prop_assert_eq!(hot.seen(block), model.blocks[block as usize].unwrap_or(0));
            }
        }
        prop_assert!(MEMORY < guest.base);
        changes(&rig);
    }
}
