//! Disks by ring and by threads, driven as a guest would, honestly and not.

use std::io::{Read, Write};
use std::os::unix::fs::FileExt;

use proptest::prelude::*;
use rstest::rstest;
use rustix::io::Errno;

use super::*;
use crate::config::DiskLimit;
use crate::device::Device;
use crate::virtio::feature;
use crate::virtio::testing::{DEADLINE, Driver, Part, Rig, read_part, think, write_part};
use crate::virtio::transport::{VirtioPciDevice, status};

const HEADER: u64 = 0x1000;
const STATUS: u64 = 0x1800;
const DATA: u64 = 0x10_0000;
const DISK: u64 = 8 << 20;

/// Which storage a test runs on.
#[derive(Debug, Clone, Copy)]
enum By {
    Uring,
    Threads,
}

fn config() -> DiskConfig {
    DiskConfig {
        read_only: false,
        serial_number: "fractus-1".to_owned(),
        direct: false,
        limit: None,
        queues: 1,
    }
}

/// A file whose bytes tell where they are.
fn pattern_file() -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&pattern(0, DISK as usize)).unwrap();
    file
}

fn pattern(offset: u64, length: usize) -> Vec<u8> {
    (offset..offset + length as u64)
        .map(|at| (at ^ (at >> 8) ^ (at >> 16)) as u8)
        .collect()
}

fn block(rig: &Rig, by: By, config: &DiskConfig, file: &File) -> Block {
    let disk = DiskFile::new(file.try_clone().unwrap(), config.read_only).unwrap();
    let backend: Box<dyn DiskBackend> = match by {
        By::Uring => Box::new(Uring::new(disk).expect("this kernel has io_uring")),
        By::Threads => Box::new(Pool::new(disk, "disk0", &rig.board.threads).unwrap()),
    };
    Block::new("disk0", config, backend, &rig.board.threads).unwrap()
}

fn start_with(rig: &Rig, by: By, config: &DiskConfig, file: &File, features: u64) -> Driver {
    let (board, recorder) = rig.with_recorder();
    let block = block(rig, by, config, file);
    let device = VirtioPciDevice::new("disk0", Box::new(block), &board).unwrap();
    Driver::start_with(rig, device, recorder, features)
}

fn start(rig: &Rig, by: By, config: &DiskConfig, file: &File) -> Driver {
    start_with(rig, by, config, file, u64::MAX)
}

fn header(driver: &Driver, kind: u32, sector: u64) {
    driver.put(
        HEADER,
        &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat(),
    );
    driver.put(STATUS, &[0xee]);
}

/// Runs one request; its status and used length.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: &[Part]) -> (u8, u32) {
    header(driver, kind, sector);
    let parts = [&[read_part(HEADER, 16)], data, &[write_part(STATUS, 1)]].concat();
    let used = driver.request(0, &parts);
    (driver.take(STATUS, 1)[0], used)
}

/// A driver that kicks only when it is asked to, with pauses in which the thread looks, gives up looking, and asks
/// to be kicked: no request is overlooked.
#[rstest]
fn no_request_is_overlooked(
    #[values(By::Uring, By::Threads)] by: By,
    #[values(true, false)] event_index: bool,
) {
    let rig = Rig::new();
    let file = pattern_file();
    let features = match event_index {
        true => u64::MAX,
        false => !feature::EVENT_IDX,
    };
    let mut driver = start_with(&rig, by, &config(), &file, features);
    header(&driver, 0, 5);
    let parts = [
        read_part(HEADER, 16),
        write_part(DATA, 512),
        write_part(STATUS, 1),
    ];
    for number in 0..3000u32 {
        think(number);
        let head = driver.submit(0, &parts);
        driver.kick_if_asked(0, 1, event_index);
        assert_eq!(driver.used(0), (head, 513), "request {number}");
    }
}

#[rstest]
fn what_is_written_is_read_back_and_is_in_the_file(#[values(By::Uring, By::Threads)] by: By) {
    let rig = Rig::new();
    let file = pattern_file();
    let mut driver = start(&rig, by, &config(), &file);
    let data = [
        write_part(DATA, 4096),
        write_part(DATA + 0x2_0001, 8192 - 512),
        write_part(DATA + 0x4_0000, 512),
    ];
    assert_eq!(request(&mut driver, 0, 5, &data), (0, 8192 + 4096 + 1));
    assert_eq!(driver.take(DATA, 4096), pattern(5 * 512, 4096));
    assert_eq!(
        driver.take(DATA + 0x2_0001, 7680),
        pattern(5 * 512 + 4096, 7680)
    );
    driver.put(DATA, b"hello");
    assert_eq!(
        request(&mut driver, 1, 100, &[read_part(DATA, 512)]),
        (0, 1)
    );
    assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1));
    let mut bytes = [0; 5];
    file.read_exact_at(&mut bytes, 100 * 512).unwrap();
    assert_eq!(&bytes, b"hello");
}

#[rstest]
fn header_data_and_status_may_share_buffers(#[values(By::Uring, By::Threads)] by: By) {
    let rig = Rig::new();
    let file = pattern_file();
    let mut driver = start(&rig, by, &config(), &file);
    header(&driver, 0, 3);
    driver.request(
        0,
        &[
            read_part(HEADER, 7),
            read_part(HEADER + 7, 9),
            write_part(DATA, 1025),
        ],
    );
    assert_eq!(driver.take(DATA, 1024), pattern(3 * 512, 1024));
    assert_eq!(driver.take(DATA + 1024, 1), [0]);
}

#[test]
fn indirect_tables_carry_more_pieces_than_a_ring_entry() {
    let rig = Rig::new();
    let mut driver = start(&rig, By::Uring, &config(), &pattern_file());
    header(&driver, 0, 0);
    let data = (0..200).map(|piece| write_part(DATA + piece * 1024, 512));
    let parts: Vec<_> = [read_part(HEADER, 16)]
        .into_iter()
        .chain(data)
        .chain([write_part(STATUS, 1)])
        .collect();
    driver.submit_indirect(0, 0x8000, &parts);
    driver.kick(0);
    assert_eq!(driver.used(0).1, 200 * 512 + 1);
    assert_eq!(driver.take(DATA + 199 * 1024, 512), pattern(199 * 512, 512));
}

#[rstest]
fn zeroes_and_discards_reach_the_file(#[values(By::Uring, By::Threads)] by: By) {
    let rig = Rig::new();
    let file = pattern_file();
    let mut driver = start(&rig, by, &config(), &file);
    for (kind, sector, flags) in [(13u32, 8u64, 0u32), (13, 16, 1), (11, 24, 0)] {
        driver.put(
            DATA,
            &[
                &sector.to_le_bytes()[..],
                &8u32.to_le_bytes(),
                &flags.to_le_bytes(),
            ]
            .concat(),
        );
        assert_eq!(request(&mut driver, kind, 0, &[read_part(DATA, 16)]).0, 0);
    }
    let mut bytes = vec![1; 5 * 4096];
    file.read_exact_at(&mut bytes, 2 * 4096 - 4096).unwrap();
    assert!(bytes[..3 * 4096].iter().all(|byte| *byte == 0));
    assert_eq!(bytes[3 * 4096..], pattern(4 * 4096, 2 * 4096));
    driver.put(
        DATA,
        &[
            &0u64.to_le_bytes()[..],
            &8u32.to_le_bytes(),
            &2u32.to_le_bytes(),
        ]
        .concat(),
    );
    assert_eq!(
        request(&mut driver, 13, 0, &[read_part(DATA, 16)]).0,
        2,
        "an unknown flag"
    );
    assert_eq!(
        request(&mut driver, 11, 0, &[read_part(DATA, 15)]).0,
        1,
        "half a range"
    );
}

#[test]
fn the_serial_number_is_padded_and_may_be_cut() {
    let rig = Rig::new();
    let mut driver = start(&rig, By::Uring, &config(), &pattern_file());
    driver.put(DATA, &[7; 32]);
    assert_eq!(request(&mut driver, 8, 0, &[write_part(DATA, 20)]), (0, 21));
    assert_eq!(
        driver.take(DATA, 21),
        b"fractus-1\0\0\0\0\0\0\0\0\0\0\0\x07"
    );
    assert_eq!(request(&mut driver, 8, 0, &[write_part(DATA, 4)]), (0, 5));
}

#[test]
fn requests_beyond_the_disk_or_of_unknown_kind_fail_alone() {
    let rig = Rig::new();
    let mut driver = start(&rig, By::Uring, &config(), &pattern_file());
    let sectors = DISK / 512;
    for (kind, sector, length, expected) in [
        (0, sectors, 512, 1),
        (0, sectors - 1, 1024, 1),
        (0, u64::MAX, 512, 1),
        (0, u64::MAX / 512, 512, 1),
        (0, 0, 511, 1),
        (99, 0, 512, 2),
        (0, sectors - 1, 512, 0),
    ] {
        let status = request(&mut driver, kind, sector, &[write_part(DATA, length)]).0;
        assert_eq!(
            status, expected,
            "kind {kind} sector {sector} length {length}"
        );
    }
    assert_eq!(request(&mut driver, 0, 0, &[]).0, 1, "no data at all");
    assert_eq!(driver.status() & status::NEEDS_RESET, 0);
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let rig = Rig::new();
    let config = DiskConfig {
        read_only: true,
        ..config()
    };
    let mut driver = start(&rig, By::Uring, &config, &pattern_file());
    assert_ne!(driver.offered() & F_RO, 0);
    assert_eq!(driver.offered() & F_DISCARD, 0);
    assert_eq!(request(&mut driver, 1, 0, &[read_part(DATA, 512)]).0, 1);
    assert_eq!(request(&mut driver, 13, 0, &[read_part(DATA, 16)]).0, 1);
    assert_eq!(request(&mut driver, 0, 0, &[write_part(DATA, 512)]).0, 0);
}

#[test]
fn the_configuration_tells_capacity_queues_and_limits() {
    let rig = Rig::new();
    let driver = start(
        &rig,
        By::Uring,
        &DiskConfig {
            queues: 4,
            ..config()
        },
        &pattern_file(),
    );
    assert_eq!(driver.config(0, 8), (DISK / 512).to_le_bytes());
    assert_eq!(driver.config(20, 4), 512u32.to_le_bytes());
    assert_eq!(driver.config(34, 2), 4u16.to_le_bytes());
    assert_eq!(driver.get(0x12, 2), 4);
    assert_eq!(driver.config(60, 4), [0; 4]);
    driver.write(0x2000 + WRITEBACK, &[0]);
    assert_eq!(driver.config(WRITEBACK, 1), [0]);
}

#[test]
fn every_queue_of_several_is_served() {
    let rig = Rig::new();
    let mut driver = start(
        &rig,
        By::Uring,
        &DiskConfig {
            queues: 3,
            ..config()
        },
        &pattern_file(),
    );
    for queue in 0..3 {
        header(&driver, 0, queue as u64);
        let parts = [
            read_part(HEADER, 16),
            write_part(DATA, 512),
            write_part(STATUS, 1),
        ];
        assert_eq!(driver.request(queue, &parts), 513);
        assert_eq!(driver.take(DATA, 512), pattern(queue as u64 * 512, 512));
    }
}

#[rstest]
#[case::all(u64::MAX)]
#[case::no_event_index(!feature::EVENT_IDX)]
#[case::no_flush(!(F_FLUSH | F_CONFIG_WCE))]
fn a_full_ring_is_answered_whatever_was_negotiated(#[case] features: u64) {
    let rig = Rig::new();
    let mut driver = start_with(&rig, By::Uring, &config(), &pattern_file(), features);
    for round in 0..3u64 {
        for sector in 0..85 {
            let at = DATA + sector * 0x1000;
            driver.put(
                at,
                &[&1u32.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat(),
            );
            driver.put(at + 512, &[(sector + round) as u8; 512]);
            driver.submit(
                0,
                &[
                    read_part(at, 16),
                    read_part(at + 512, 512),
                    write_part(at + 0x800, 1),
                ],
            );
        }
        driver.kick(0);
        for _ in 0..85 {
            driver.used(0);
        }
        assert_eq!(request(&mut driver, 0, 84, &[write_part(DATA, 512)]).0, 0);
        assert_eq!(driver.take(DATA, 512), [(84 + round) as u8; 512]);
    }
}

#[test]
fn direct_io_takes_misaligned_buffers() {
    let rig = Rig::new();
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, pattern(0, DISK as usize)).unwrap();
    let mut options = File::options();
    options.read(true).write(true);
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_DIRECT);
    let file = options.open(&path).unwrap();
    let mut driver = start(
        &rig,
        By::Uring,
        &DiskConfig {
            direct: true,
            ..config()
        },
        &file,
    );
    for address in [DATA, DATA + 1, DATA + 0x201] {
        let data = [
            write_part(address, 100),
            write_part(address + 0x5000, 4096 - 100),
        ];
        assert_eq!(request(&mut driver, 0, 9, &data), (0, 4097));
        assert_eq!(
            driver.take(address + 0x5000, 3996),
            pattern(9 * 512 + 100, 3996)
        );
        driver.put(address, &[address as u8; 4096]);
        assert_eq!(
            request(&mut driver, 1, 64, &[read_part(address, 4096)]).0,
            0
        );
        assert_eq!(
            request(&mut driver, 0, 64, &[write_part(DATA + 0x2_0003, 4096)]).0,
            0
        );
        assert_eq!(driver.take(DATA + 0x2_0003, 4096), [address as u8; 4096]);
    }
}

#[test]
fn reads_mark_the_pages_that_they_fill_dirty() {
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
    let rig = Rig::new();
    let mut driver = start(&rig, By::Uring, &config(), &pattern_file());
    let memory = rig.board.memory.clone();
    let region = memory.iter().next().unwrap();
    let dirty = |address: u64| GuestMemoryRegion::bitmap(region).dirty_at(address as usize);
    let target = 0x30_0000;
    assert!(!dirty(target));
    request(&mut driver, 0, 0, &[write_part(target, 8192)]);
    assert!(dirty(target) && dirty(target + 4096) && !dirty(target + 8192));
}

#[test]
fn a_limited_disk_is_slow_and_drains_at_once() {
    let rig = Rig::new();
    let limit = DiskLimit {
        operations_per_second: Some(20),
        burst_ms: 50,
        ..Default::default()
    };
    let file = pattern_file();
    let mut driver = start(
        &rig,
        By::Uring,
        &DiskConfig {
            limit: Some(limit),
            ..config()
        },
        &file,
    );
    let begin = Instant::now();
    for _ in 0..4 {
        request(&mut driver, 0, 0, &[write_part(DATA, 512)]);
    }
    assert!(
        begin.elapsed() >= Duration::from_millis(95),
        "{:?}",
        begin.elapsed()
    );
    header(&driver, 0, 0);
    for _ in 0..40 {
        driver.submit(
            0,
            &[
                read_part(HEADER, 16),
                write_part(DATA, 512),
                write_part(STATUS, 1),
            ],
        );
    }
    driver.kick(0);
    let begin = Instant::now();
    driver.device.pause().unwrap();
    assert!(
        begin.elapsed() < Duration::from_secs(1),
        "what is held back is let go"
    );
    driver.device.resume().unwrap();
    for _ in 0..40 {
        driver.used(0);
    }
}

#[test]
fn a_filter_comes_and_goes_while_the_disk_works() {
    let rig = Rig::new();
    let block = block(&rig, By::Uring, &config(), &pattern_file());
    let limit = DiskLimit {
        operations_per_second: Some(1000),
        ..Default::default()
    };
    let filter = || Box::new(Limit::new(&limit, Instant::now()));
    block.insert_filter(filter(), DEADLINE).unwrap();
    assert!(block.remove_filter(Limit::NAME, DEADLINE).unwrap());
    assert!(!block.remove_filter(Limit::NAME, DEADLINE).unwrap());
}

#[test]
fn a_disk_that_was_saved_in_use_goes_on_where_it_was() {
    let rig = Rig::new();
    let file = pattern_file();
    let mut driver = start(&rig, By::Uring, &config(), &file);
    driver.write(0x2000 + WRITEBACK, &[0]);
    for sector in 0..20 {
        assert_eq!(
            request(&mut driver, 0, sector, &[write_part(DATA, 512)]).0,
            0
        );
    }
    driver.device.pause().unwrap();
    header(&driver, 0, 77);
    driver.submit(
        0,
        &[
            read_part(HEADER, 16),
            write_part(DATA, 512),
            write_part(STATUS, 1),
        ],
    );
    let saved = driver.device.save().unwrap();
    let rings = driver.rings.clone();
    drop(driver);

    let (board, recorder) = rig.with_recorder();
    let device = VirtioPciDevice::restore(&saved, &board, |state| {
        Ok(Box::new(Block::restore(
            state,
            block(&rig, By::Threads, &config(), &file),
        )?))
    })
    .unwrap();
    let mut driver = Driver::attach(&rig, device, recorder);
    driver.rings = rings;
    assert_eq!(driver.device.save().unwrap(), saved);
    driver.device.resume().unwrap();
    assert_eq!(driver.used(0).1, 513);
    assert_eq!(driver.take(DATA, 512), pattern(77 * 512, 512));
    assert_eq!(driver.config(WRITEBACK, 1), [0]);
    assert_eq!(request(&mut driver, 0, 1, &[write_part(DATA, 512)]).0, 0);
}

const GEOMETRY: Geometry = Geometry {
    capacity: DISK,
    physical_block: 4096,
    alignment: self::backend::Alignment {
        memory: 1,
        offset: 1,
    },
    read_only: false,
};

/// Storage that never finishes.
struct Hung {
    never: EventFd,
    held: Vec<self::backend::Io>,
}

impl DiskBackend for Hung {
    fn geometry(&self) -> Geometry {
        GEOMETRY
    }
    fn submit(&mut self, io: self::backend::Io) -> Result<(), self::backend::Io> {
        self.held.push(io);
        Ok(())
    }
    fn commit(&mut self) {}
    fn reap(&mut self, _done: &mut Vec<self::backend::Completion>) {}
    fn completion_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.never)
    }
}

#[test]
fn hung_storage_fails_the_drain_and_a_reset_stays_under_way() {
    let rig = Rig::new();
    let (board, recorder) = rig.with_recorder();
    let hung = Hung {
        never: EventFd::new().unwrap(),
        held: Vec::new(),
    };
    let block = Block::new("disk0", &config(), Box::new(hung), &rig.board.threads).unwrap();
    let device = VirtioPciDevice::new("disk0", Box::new(block), &board).unwrap();
    let mut driver = Driver::start(&rig, device, recorder);
    header(&driver, 0, 0);
    driver.submit(
        0,
        &[
            read_part(HEADER, 16),
            write_part(DATA, 512),
            write_part(STATUS, 1),
        ],
    );
    driver.kick(0);
    // The serial number comes from the device itself, so its answer says that the read was taken, too.
    let parts = [
        read_part(HEADER + 32, 16),
        write_part(DATA, 20),
        write_part(STATUS, 1),
    ];
    driver.put(HEADER + 32, &8u64.to_le_bytes());
    let head = driver.submit(0, &parts);
    driver.kick(0);
    assert_eq!(driver.used(0).0, head);
    driver.set(0x14, 0, 1);
    assert_ne!(
        driver.status(),
        0,
        "the reset is not done while the storage has the guest's memory"
    );
    driver.set(0x14, 1, 1);
    assert_ne!(driver.status(), 1, "and nothing begins before it is");
}

/// Storage that finishes its flushes, oldest first, when and as the test says.
struct Told {
    say: EventFd,
    results: std::sync::mpsc::Receiver<Result<(), Errno>>,
    /// What becomes of flushes: "taken", "done".
    flushes: Sender<&'static str>,
    held: std::collections::VecDeque<self::backend::Io>,
}

impl DiskBackend for Told {
    fn geometry(&self) -> Geometry {
        GEOMETRY
    }
    fn submit(&mut self, io: self::backend::Io) -> Result<(), self::backend::Io> {
        assert_eq!(io.operation, self::backend::Operation::Flush);
        self.held.push_back(io);
        self.flushes.send("taken").unwrap();
        Ok(())
    }
    fn commit(&mut self) {}
    fn reap(&mut self, done: &mut Vec<self::backend::Completion>) {
        self.say.take();
        while !self.held.is_empty()
            && let Ok(result) = self.results.try_recv()
            && let Some(io) = self.held.pop_front()
        {
            done.push(self::backend::Completion { io, result });
            let _ = self.flushes.send("done");
        }
    }
    fn completion_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        std::os::fd::AsFd::as_fd(&self.say)
    }
}

/// Tells when the disk's thread waits, once it has been told `orders` times to come to rest.
struct Waits {
    orders: usize,
    waits: Sender<()>,
}

impl BlockFilter for Waits {
    fn name(&self) -> &'static str {
        "waits"
    }
    fn release(&mut self, _below: &mut self::filter::Below<'_>) {
        self.orders = self.orders.saturating_sub(1);
    }
    fn wake_at(&self) -> Option<Instant> {
        if self.orders == 0 {
            let _ = self.waits.send(());
        }
        None
    }
}

#[test]
fn a_flush_that_came_too_late_does_not_answer_for_the_next() {
    let rig = Rig::new();
    let say = EventFd::new().unwrap();
    let (results, said) = channel();
    let (flushes, flushed) = channel();
    let storage = Told {
        say: say.try_clone().unwrap(),
        results: said,
        flushes,
        held: Default::default(),
    };
    let block = Block::new("disk0", &config(), Box::new(storage), &rig.board.threads).unwrap();
    let (waits, waiting) = channel();
    let filter = Waits { orders: 2, waits };
    block.insert_filter(Box::new(filter), DEADLINE).unwrap();
    let settle = |within| block.at_rest("settle", within, AtRest::Settle);
    let answer = |result| {
        results.send(result).unwrap();
        say.signal();
    };
    settle(Duration::from_millis(20)).expect_err("the storage has not answered");
    assert_eq!(flushed.recv_timeout(DEADLINE), Ok("taken"));

    std::thread::scope(|scope| {
        let second = scope.spawn(|| settle(DEADLINE));
        // It has seen the second order, and has done with it what it could.
        waiting.recv_timeout(DEADLINE).unwrap();
        answer(Ok(()));
        assert_eq!(flushed.recv_timeout(DEADLINE), Ok("done"));
        assert_eq!(flushed.recv_timeout(DEADLINE), Ok("taken"));
        answer(Err(Errno::IO));
        assert_eq!(second.join().unwrap().unwrap(), Err(Errno::IO));
    });
}

#[test]
fn a_reset_with_io_in_flight_waits_for_it() {
    let rig = Rig::new();
    let file = pattern_file();
    let mut driver = start(&rig, By::Uring, &config(), &file);
    for round in 0..20 {
        for _ in 0..60 {
            header(&driver, 0, round);
            driver.submit(
                0,
                &[
                    read_part(HEADER, 16),
                    write_part(DATA, 65536),
                    write_part(STATUS, 1),
                ],
            );
        }
        driver.kick(0);
        driver.initialise(u64::MAX);
        driver.put(DATA, &[0xaa; 65536]);
        let serial = [write_part(0x20_0000, 20)];
        assert_eq!(request(&mut driver, 8, 0, &serial).0, 0);
        assert_eq!(
            driver.take(DATA, 65536),
            [0xaa; 65536],
            "nothing of before writes any more"
        );
    }
}

#[test]
fn write_through_is_asked_of_the_storage() {
    // What a crash would lose cannot be tested here; that writes still end can.
    let rig = Rig::new();
    let file = pattern_file();
    let mut driver = start_with(&rig, By::Threads, &config(), &file, !F_FLUSH);
    driver.put(DATA, &[9; 512]);
    assert_eq!(request(&mut driver, 1, 0, &[read_part(DATA, 512)]), (0, 1));
    let mut bytes = Vec::new();
    let mut reader = file.try_clone().unwrap();
    std::io::Seek::rewind(&mut reader).unwrap();
    reader.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes[..512], [9; 512]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_order_of_requests_leaves_the_disk_as_a_model_would(
        steps in prop::collection::vec((0u8..4, 0u64..64, 1u64..16, any::<u8>()), 1..40),
        threads in any::<bool>(),
    ) {
        let rig = Rig::new();
        let file = pattern_file();
        let by = if threads { By::Threads } else { By::Uring };
        let mut driver = start(&rig, by, &config(), &file);
        let mut model = pattern(0, 80 * 512);
        for (kind, sector, sectors, fill) in steps {
            let (from, length) = (sector as usize * 512, sectors as usize * 512);
            match kind {
                0 => {
                    prop_assert_eq!(request(&mut driver, 0, sector, &[write_part(DATA, length as u32)]).0, 0);
                    prop_assert_eq!(&driver.take(DATA, length)[..], &model[from..from + length]);
                }
                1 => {
                    driver.put(DATA, &vec![fill; length]);
                    prop_assert_eq!(request(&mut driver, 1, sector, &[read_part(DATA, length as u32)]).0, 0);
                    model[from..from + length].fill(fill);
                }
                2 => {
                    let range = [&sector.to_le_bytes()[..], &(sectors as u32).to_le_bytes(), &[fill & 1, 0, 0, 0]].concat();
                    driver.put(DATA, &range);
                    prop_assert_eq!(request(&mut driver, 13, 0, &[read_part(DATA, 16)]).0, 0);
                    model[from..from + length].fill(0);
                }
                _ => prop_assert_eq!(request(&mut driver, 4, 0, &[]).0, 0),
            }
        }
    }
}
