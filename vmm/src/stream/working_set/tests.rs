//! A set that is read is the one that was written, or none.

use proptest::prelude::*;

use super::*;
use crate::stream::snapshot::{Compression, SnapshotWriter};
use crate::stream::{BLOCK, Opening};

const MEMORY: u64 = 64 << 20;

/// With a page of content in the first block.
fn snapshot(memory: u64) -> Snapshot {
    let file = tempfile::tempfile().unwrap();
    let opening = Opening {
        id: Uuid::new_v4(),
        base: None,
        memory,
        made_by: "a test".to_owned(),
    };
    let to = file.try_clone().unwrap();
    let mut writer = SnapshotWriter::new(to, opening, Compression::None).unwrap();
    writer.put(0, &[1; BLOCK]).unwrap();
    writer.finish(b"", b"").unwrap();
    Snapshot::open(file).unwrap()
}

fn set(snapshot: &Snapshot, runs: &[(u64, u64)]) -> WorkingSet {
    set_of(snapshot, runs.iter().map(|(start, end)| *start..*end))
}

fn set_of(snapshot: &Snapshot, runs: impl IntoIterator<Item = Range<u64>>) -> WorkingSet {
    WorkingSet {
        snapshot: snapshot.opening().id,
        memory: snapshot.opening().memory,
        runs: runs.into_iter().collect(),
    }
}

fn bytes(set: &WorkingSet) -> Vec<u8> {
    let mut bytes = Vec::new();
    set.write(&mut bytes).unwrap();
    bytes
}

const PAGES: u64 = MEMORY / PAGE as u64;

#[test]
fn a_set_is_read_as_it_was_written_and_fetched() {
    let snapshot = snapshot(MEMORY);
    for runs in [&[][..], &[(0, 4096), (8192, MEMORY)]] {
        let set = set(&snapshot, runs);
        assert_eq!(WorkingSet::read(&*bytes(&set), &snapshot).unwrap(), set);
        snapshot.fetch(&set).unwrap();
    }
}

#[test]
fn one_of_another_snapshot_is_refused_by_its_id() {
    let (one, other) = (snapshot(MEMORY), snapshot(MEMORY));
    let refused = WorkingSet::read(&*bytes(&set(&one, &[(0, 4096)])), &other);
    let Err(WorkingSetError::Foreign { expected, found }) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!((expected, found), (other.opening().id, one.opening().id));
}

#[test]
fn one_that_is_damaged_or_cut_short_or_has_more_behind_it_is_refused() {
    let snapshot = snapshot(MEMORY);
    let whole = bytes(&set(&snapshot, &[(0, 4096), (8192, 16384)]));
    for bit in 0..whole.len() * 8 {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(WorkingSet::read(&*damaged, &snapshot).is_err(), "bit {bit}");
    }
    for length in 0..whole.len() {
        let cut = &whole[..length];
        assert!(WorkingSet::read(cut, &snapshot).is_err(), "{length}");
    }
    let more = [&*whole, &[0]].concat();
    assert!(WorkingSet::read(&*more, &snapshot).is_err());
    // It is not read to its end.
    assert!(WorkingSet::read(io::repeat(0x46), &snapshot).is_err());
}

/// Its sum is right.
#[test]
fn one_whose_runs_are_none_of_the_memory_is_refused() {
    let snapshot = snapshot(MEMORY);
    for runs in [
        &[(0, MEMORY + 4096)][..],
        &[(MEMORY, MEMORY + 4096)],
        &[(u64::MAX - 4095, u64::MAX)],
        &[(4096, 4096)],
        &[(8192, 4096)],
        &[(1, 4096)],
        &[(0, 4097)],
        &[(8192, 12288), (0, 4096)],
        &[(0, 8192), (4096, 12288)],
    ] {
        let refused = WorkingSet::read(&*bytes(&set(&snapshot, runs)), &snapshot);
        let malformed = matches!(
            refused,
            Err(WorkingSetError::Stream(StreamError::Malformed { .. }))
        );
        assert!(malformed, "{runs:?}: {refused:?}");
    }
    let mut other = set(&snapshot, &[(0, 4096)]);
    other.memory *= 2;
    assert!(WorkingSet::read(&*bytes(&other), &snapshot).is_err());
}

#[test]
fn a_process_that_has_not_mapped_it_has_no_set() {
    let snapshot = snapshot(MEMORY);
    let pages = File::open("/proc/self/pagemap").unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let none = WorkingSet::of_process(&snapshot, &maps, &pages);
    assert!(matches!(none, Err(WorkingSetError::Unmapped)), "{none:?}");
    // Lines that are none, and a mapping of what lies before and behind memory.
    let (file, begins) = snapshot.placed_in().unwrap();
    let found = file.metadata().unwrap();
    let device = format!("{:02x}:{:02x}", major(found.dev()), minor(found.dev()));
    let line = |offset: u64| format!("0-1000 r--p {offset:x} {device} {} x\n", found.ino());
    let maps = ["\n-\n1-\n", &line(0), &line(1 << 60)].concat();
    let untouched = |maps: &str| {
        let none = WorkingSet::of_process(&snapshot, maps, &pages);
        assert!(matches!(none, Err(WorkingSetError::Untouched)), "{none:?}");
    };
    untouched(&maps);
    // No more of it is looked at than memory has, however much a process maps, and however often.
    let all = format!(
        "0-{:x} r--p {begins:x} {device} {} x\n",
        1u64 << 47,
        found.ino()
    );
    untouched(&all.repeat(1000));
}

proptest! {
    #[test]
    fn runs_become_few_and_none_is_lost(
        pages in prop::collection::btree_set(0..PAGES, 0..300),
        most in 1usize..50,
    ) {
        let run = |page: &u64| page * PAGE as u64..(page + 1) * PAGE as u64;
        let snapshot = snapshot(MEMORY);
        let set = set_of(&snapshot, few(pages.iter().map(run).collect(), most));
        prop_assert!(set.runs.len() <= most);
        for page in &pages {
            let run = run(page);
            let has = |it: &Range<u64>| it.start <= run.start && it.end >= run.end;
            prop_assert!(set.runs.iter().any(has));
        }
        prop_assert_eq!(WorkingSet::read(&*bytes(&set), &snapshot).unwrap(), set);
    }
}
