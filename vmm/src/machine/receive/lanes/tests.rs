//! What comes by lanes, from whoever it is.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::*;
use crate::config::{MemoryConfig, PageSize};
use crate::request::channel;
use crate::stream::frame::FrameWriter;
use crate::stream::lane::GROUP;
use crate::stream::live::Batch;
use crate::stream::{BLOCK, Mask, PAGE, packed};

const MEMORY: u64 = 4 * GROUP * BLOCK as u64;
/// Generous: a loaded machine is no failure.
const PATIENCE: Duration = Duration::from_secs(30);
const STREAM: Uuid = Uuid::from_u128(7);

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

fn hello(lane: u16, lanes: u16) -> Hello {
    Hello {
        stream: STREAM,
        lane,
        lanes,
    }
}

/// One page of a block, and an end that counts so many.
fn written(hello: Hello, block: u64, counts: u64) -> Vec<u8> {
    let mut out = FrameWriter::new(Vec::new());
    out.write(Kind::Lane, &hello.packed().unwrap()).unwrap();
    let mut batch = Batch::default();
    batch.add(block as u32, Mask(2), &[9; PAGE], false);
    out.write(Kind::Pages, batch.payload().unwrap()).unwrap();
    let totals = Totals {
        pages: counts,
        zeros: 0,
    };
    out.write(Kind::End, &packed(&totals).unwrap()).unwrap();
    out.finish()
}

/// A stream's own connection, and its lanes'.
struct Wires {
    main: UnixStream,
    other: UnixStream,
    near: Vec<UnixStream>,
    lanes: Lanes,
}

fn begin(count: usize, memory: &GuestMemory) -> Wires {
    let (main, other) = UnixStream::pair().unwrap();
    let (near, far) = (0..count).map(|_| UnixStream::pair().unwrap()).unzip();
    let own = other.try_clone().unwrap().into();
    let far: Vec<UnixStream> = far;
    let lanes = Lanes::begin(far, own, STREAM, memory, &threads()).unwrap();
    Wires {
        main,
        other,
        near,
        lanes,
    }
}

/// What comes of two lanes that say this.
fn arrive(says: [&[u8]; 2]) -> Result<Totals, MigrationError> {
    let mut wires = begin(2, &memory());
    for (mut near, bytes) in wires.near.into_iter().zip(says) {
        // It may have been closed by then.
        let _ = near.write_all(bytes);
    }
    let mut totals = Totals::default();
    wires.lanes.join(LATE, &mut totals)?;
    Ok(totals)
}

#[test]
fn what_comes_by_all_lanes_is_there_and_counted() {
    let memory = memory();
    let mut wires = begin(3, &memory);
    // The last one comes first, and the first one is there before its time.
    for lane in [2, 0, 1] {
        let bytes = written(hello(lane, 3), u64::from(lane) * GROUP + 5, 1);
        wires.near[usize::from(lane)].write_all(&bytes).unwrap();
    }
    let mut totals = Totals::default();
    wires.lanes.join(LATE, &mut totals).unwrap();
    assert_eq!((totals.pages, totals.zeros), (3, 0));
    for lane in 0..3 {
        let mut byte = [0];
        let at = (lane * GROUP + 5) * BLOCK as u64 + PAGE as u64;
        memory.read_at(&mut byte, at).unwrap();
        assert_eq!(byte, [9]);
    }
}

#[test]
fn a_lane_is_of_one_stream_and_at_its_place_there() {
    let right = [0, 1].map(|lane| written(hello(lane, 2), u64::from(lane) * GROUP, 1));
    assert!(arrive([&right[0], &right[1]]).is_ok());
    assert!(arrive([&right[1], &right[0]]).is_err(), "mixed up");
    assert!(arrive([&right[0], &right[0]]).is_err(), "twice");
    let other = Hello {
        stream: Uuid::nil(),
        ..hello(1, 2)
    };
    for wrong in [other, hello(1, 3), hello(2, 2)] {
        let bytes = written(wrong, GROUP, 1);
        let error = arrive([&right[0], &bytes]).unwrap_err();
        assert!(
            matches!(error, MigrationError::Lane { lane: 1, .. }),
            "{error:?}"
        );
    }
    // It says so first.
    let mut out = FrameWriter::new(Vec::new());
    out.write(Kind::End, &packed(&Totals::default()).unwrap())
        .unwrap();
    assert!(arrive([&right[0], &out.finish()]).is_err());
}

#[test]
fn a_lane_that_is_damaged_cut_short_or_hostile_ends_the_arrival() {
    let right = [0, 1].map(|lane| written(hello(lane, 2), u64::from(lane) * GROUP, 1));
    for part in (0..right[1].len()).step_by(97) {
        assert!(arrive([&right[0], &right[1][..part]]).is_err(), "{part}");
        let mut damaged = right[1].clone();
        damaged[part] ^= 1;
        assert!(arrive([&right[0], &damaged]).is_err(), "a bit at {part}");
    }
    for (block, counts) in [
        (0, 1),
        (2 * GROUP, 1),
        (5 * GROUP, 1),
        (GROUP, 0),
        (GROUP, 2),
    ] {
        let bytes = written(hello(1, 2), block, counts);
        assert!(arrive([&right[0], &bytes]).is_err(), "{block} {counts}");
    }
    for kind in [Kind::State, Kind::Lane, Kind::Owed] {
        let mut out = FrameWriter::new(Vec::new());
        out.write(Kind::Lane, &hello(1, 2).packed().unwrap())
            .unwrap();
        out.write(kind, &hello(1, 2).packed().unwrap()).unwrap();
        assert!(arrive([&right[0], &out.finish()]).is_err(), "{kind:?}");
    }
}

/// Whoever reads the stream does not wait for what will not come, and can say why.
#[test]
fn one_lane_that_fails_ends_the_others_and_the_stream() {
    let mut wires = begin(3, &memory());
    wires.near[1].write_all(&[0; 64]).unwrap();
    let (mut word, mut byte) = ([0; 2], [0]);
    assert_eq!(wires.other.read(&mut byte).unwrap(), 0);
    wires.other.write_all(b"no").unwrap();
    wires.main.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"no");
    assert!(matches!(wires.near[0].read(&mut byte), Ok(0) | Err(_)));
    let error = wires.lanes.check().unwrap_err();
    assert!(
        matches!(error, MigrationError::Lane { lane: 1, .. }),
        "{error:?}"
    );
    drop(wires.lanes);
}

#[test]
fn a_lane_that_does_not_come_to_its_end_is_not_waited_for() {
    let mut wires = begin(2, &memory());
    let right = [0, 1].map(|lane| written(hello(lane, 2), u64::from(lane) * GROUP, 1));
    wires.near[0].write_all(&right[0]).unwrap();
    wires.near[1]
        .write_all(&right[1][..right[1].len() - 1])
        .unwrap();
    let (most, mut totals) = (Duration::from_millis(200), Totals::default());
    let error = wires.lanes.join(most, &mut totals).unwrap_err();
    assert!(error.to_string().contains("wait for the lanes"), "{error}");
}

#[test]
fn silent_lanes_end_when_they_are_dropped() {
    let mut wires = begin(2, &memory());
    let half = written(hello(0, 2), 0, 1);
    wires.near[0].write_all(&half[..20]).unwrap();
    let shared = Arc::clone(&wires.lanes.shared);
    let began = Instant::now();
    drop(wires.lanes);
    assert!(began.elapsed() < PATIENCE / 2);
    assert_eq!(Arc::strong_count(&shared), 1, "no thread has it");
}

#[test]
fn there_are_not_more_lanes_than_a_stream_may_have() {
    let (main, _other) = UnixStream::pair().unwrap();
    let pair = |_| UnixStream::pair().unwrap();
    let (_near, far): (Vec<_>, Vec<_>) = (0..=MOST_LANES).map(pair).unzip();
    let begun = Lanes::begin(far, main.into(), STREAM, &memory(), &threads());
    assert!(begun.is_err());
}
