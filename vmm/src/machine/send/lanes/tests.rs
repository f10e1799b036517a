//! Lanes without a machine: memory, connections and threads.

use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::*;
use crate::config::{MemoryConfig, PageSize};
use crate::machine::receive::lanes as arriving;
use crate::request::channel;
use crate::stream::{BLOCK, PAGE, Target};

const BLOCKS: u64 = 5 * GROUP + 3;
const MEMORY: u64 = BLOCKS * BLOCK as u64;
/// Generous: a loaded machine is no failure.
const PATIENCE: Duration = Duration::from_secs(30);

fn memory() -> GuestMemory {
    let config = MemoryConfig {
        bytes: MEMORY,
        pages: PageSize::default(),
        host_nodes: Vec::new(),
    };
    GuestMemory::create_with(&config, None).unwrap()
}

fn threads() -> Threads {
    let (requests, _) = channel().unwrap();
    Threads::new(None, requests)
}

fn pairs(count: usize) -> (Vec<UnixStream>, Vec<UnixStream>) {
    (0..count).map(|_| UnixStream::pair().unwrap()).unzip()
}

fn begin(connections: Vec<UnixStream>, main: &UnixStream, memory: &GuestMemory) -> Lanes {
    Lanes::begin(connections, main, Uuid::nil(), memory, &threads()).unwrap()
}

/// All of it.
fn every(fresh: bool) -> Vec<Parcel> {
    let mask = Mask(u16::MAX);
    let parcel = |number| Parcel {
        number,
        mask,
        fresh,
    };
    (0..BLOCKS).map(parcel).collect()
}

/// Until it is so, or something has failed.
fn until(what: impl Fn() -> Result<bool, MigrationError>) -> Result<(), MigrationError> {
    let by = Instant::now() + PATIENCE;
    while !what()? {
        assert!(Instant::now() < by, "it never is");
    }
    Ok(())
}

fn content(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY as usize];
    assert_eq!(memory.read_at(&mut bytes, 0).unwrap(), bytes.len());
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Nobody waits between rounds, and each round may write to what the one before has not sent yet.
    #[test]
    fn what_was_written_last_is_what_is_there_in_the_end(
        rounds in prop::collection::vec(
            prop::collection::vec((0..MEMORY / PAGE as u64, 0..4u8), 0..60), 1..8),
        count in 1..=4usize,
    ) {
        let (here, there) = (memory(), memory());
        let (near, far) = pairs(count);
        let (main, other) = UnixStream::pair().unwrap();
        let lanes = begin(near, &main, &here);
        let mut arrived = arriving::Lanes::begin(
            far, other.into(), Uuid::nil(), &there, &threads()).unwrap();
        for (round, writes) in rounds.iter().enumerate() {
            let mut masks = vec![Mask::default(); BLOCKS as usize];
            for (page, value) in writes {
                here.put(&[*value; PAGE], page * PAGE as u64).unwrap();
                masks[(page / 16) as usize].0 |= 1 << (page % 16);
            }
            let named = (0..BLOCKS).zip(masks).filter(|(_, mask)| !mask.is_empty());
            let fresh = round == 0;
            let parcels: Vec<_> = named.map(|(number, mask)| Parcel { number, mask, fresh }).collect();
            lanes.give(&parcels);
        }
        lanes.close();
        until(|| lanes.are_over()).unwrap();
        let mut totals = Totals::default();
        arrived.join(arriving::LATE, &mut totals).unwrap();
        prop_assert_eq!(totals, lanes.totals());
        prop_assert!(content(&here) == content(&there));
    }
}

#[test]
fn what_has_gone_is_counted_and_none_has_while_nobody_reads() {
    let memory = memory();
    memory.put(&vec![7; MEMORY as usize], 0).unwrap();
    let (near, far) = pairs(2);
    let (main, _other) = UnixStream::pair().unwrap();
    let lanes = begin(near, &main, &memory);
    assert_eq!((lanes.count(), lanes.are_dry().unwrap()), (2, true));
    for _ in 0..8 {
        lanes.give(&every(false));
    }
    let began = Instant::now();
    assert!(!lanes.have_room().unwrap() && !lanes.are_dry().unwrap());
    assert!(began.elapsed() < PATIENCE / 2, "its owner has its turn");
    assert!(lanes.totals().pages < 8 * BLOCKS * 16);
    let reads: Vec<_> = far
        .into_iter()
        .map(|mut far| std::thread::spawn(move || std::io::copy(&mut far, &mut std::io::sink())))
        .collect();
    until(|| lanes.have_room()).unwrap();
    until(|| lanes.are_dry()).unwrap();
    assert_eq!(lanes.totals().pages, 8 * BLOCKS * 16);
    assert!(!lanes.are_over().unwrap());
    lanes.close();
    until(|| lanes.are_over()).unwrap();
    drop(lanes);
    for read in reads {
        assert!(read.join().unwrap().unwrap() > MEMORY);
    }
}

/// With what it has not written, to somebody who does not read.
#[test]
fn lanes_end_when_they_are_dropped() {
    let memory = memory();
    memory.put(&vec![7; MEMORY as usize], 0).unwrap();
    let (near, far) = pairs(3);
    let (main, _other) = UnixStream::pair().unwrap();
    let lanes = begin(near, &main, &memory);
    for _ in 0..8 {
        lanes.give(&every(false));
    }
    assert!(!lanes.are_dry().unwrap());
    let shared = Arc::clone(&lanes.shared);
    let began = Instant::now();
    drop(lanes);
    assert!(began.elapsed() < PATIENCE / 2);
    assert_eq!(Arc::strong_count(&shared), 1, "no thread has it");
    drop(far);
}

#[test]
fn a_lane_that_breaks_is_told_and_why_it_was_closed_is_looked_for() {
    let memory = memory();
    memory.put(&vec![7; MEMORY as usize], 0).unwrap();
    let (near, mut far) = pairs(2);
    let (main, mut other) = UnixStream::pair().unwrap();
    let lanes = begin(near, &main, &memory);
    drop(far.pop());
    lanes.give(&every(false));
    let error = until(|| lanes.are_dry()).unwrap_err();
    assert!(
        matches!(error, MigrationError::Lane { lane: 1, .. }),
        "{error:?}"
    );
    other.write_all(b"because").unwrap();
    assert!(lanes.were_refused(&error));
    let late = MigrationError::Late { longest: TURN };
    assert!(!lanes.were_refused(&late));
}

#[test]
fn there_are_not_more_lanes_than_both_sides_have_threads_for() {
    let (near, _far) = pairs(MOST_LANES + 1);
    let (main, _other) = UnixStream::pair().unwrap();
    let begun = Lanes::begin(near, &main, Uuid::nil(), &memory(), &threads());
    assert!(begun.is_err());
}

/// By whoever is to end a wait for them, or by the other side.
#[test]
fn a_stream_that_is_cut_or_speaks_is_noticed_while_lanes_are_waited_for() {
    for says in [false, true] {
        let (here, (near, _far)) = (memory(), pairs(2));
        let (main, mut other) = UnixStream::pair().unwrap();
        let lanes = begin(near, &main, &here);
        assert!(!lanes.are_answered(Duration::ZERO).unwrap());
        match says {
            true => other.write_all(b"no").unwrap(),
            false => main.shutdown(std::net::Shutdown::Both).unwrap(),
        }
        assert!(lanes.are_answered(Duration::ZERO).unwrap(), "{says}");
    }
}
