//! Snapshots written, damaged and read.

use proptest::prelude::*;

use super::*;
use crate::stream::pages::PAGES;

/// Not whole blocks: the last has three pages and a half.
const BYTES: usize = BLOCK * 5 + PAGE * 3 + 100;

fn opening(base: Option<uuid::Uuid>) -> Opening {
    Opening {
        id: uuid::Uuid::from_u128(7),
        base,
        memory: BYTES as u64,
        made_by: "a test".to_owned(),
    }
}

fn file() -> File {
    tempfile::tempfile().unwrap()
}

impl Target for File {
    fn length(&self) -> std::io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn put(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn clear(&self, offset: u64, length: u64) -> std::io::Result<()> {
        make_zero(self, offset, length)
    }
}

/// A memory with this content.
fn memory(content: &[u8]) -> File {
    let memory = file();
    memory.write_all_at(content, 0).unwrap();
    memory
}

fn content(memory: &File) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    memory.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn blocks(content: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    (0..).zip(content.chunks(BLOCK))
}

fn written(base: Option<uuid::Uuid>, contents: &[&[u8]], state: &[u8]) -> (File, Totals) {
    let file = file();
    let mut writer = SnapshotWriter::new(file.try_clone().unwrap(), opening(base)).unwrap();
    for content in contents {
        for (number, block) in blocks(content) {
            writer.put(number, block).unwrap();
        }
    }
    let totals = writer.finish(state, b"owner's").unwrap();
    (file, totals)
}

/// Memory of which a few bytes are not zero.
fn some() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec((0..BYTES, 1u8..), 0..40).prop_map(|bytes| {
        let mut content = vec![0; BYTES];
        for (at, byte) in bytes {
            content[at] = byte;
        }
        content
    })
}

proptest! {
    #[test]
    fn what_was_put_last_is_what_is_loaded(
        earlier in some(), later in some(), state in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let (file, totals) = written(None, &[&earlier, &later], &state);
        let with_content = later.chunks(PAGE).filter(|page| page.iter().any(|byte| *byte != 0));
        prop_assert_eq!(totals, Totals { pages: with_content.count() as u64, zeros: 0 });
        let snapshot = Snapshot::open(file.try_clone().unwrap()).unwrap();
        prop_assert_eq!(snapshot.state(), &state);
        prop_assert_eq!(snapshot.owner(), b"owner's");
        prop_assert_eq!(snapshot.totals(), totals);
        let memory = memory(&vec![0; BYTES]);
        snapshot.load(&memory).unwrap();
        prop_assert_eq!(content(&memory), &*later);
        // Its memory is the machine's as it stands, for who maps it.
        let mut placed = vec![0; BYTES];
        file.read_exact_at(&mut placed, MEMORY).unwrap();
        prop_assert_eq!(placed, later);
    }

    #[test]
    fn one_that_is_laid_over_another_brings_all_that_changed(before in some(), after in some()) {
        let base = uuid::Uuid::from_u128(6);
        let file = file();
        let mut writer = SnapshotWriter::new(file.try_clone().unwrap(), opening(Some(base))).unwrap();
        for ((number, new), (_, old)) in blocks(&after).zip(blocks(&before)) {
            if new != old {
                writer.put(number, new).unwrap();
            }
        }
        writer.finish(b"", b"").unwrap();
        let memory = memory(&before);
        let snapshot = Snapshot::open(file).unwrap();
        prop_assert_eq!(snapshot.opening().base, Some(base));
        snapshot.load(&memory).unwrap();
        prop_assert_eq!(content(&memory), after);
    }

    #[test]
    fn pages_that_are_laid_over_another_are_those_that_were_told_and_no_others(
        before in some(),
        rounds in prop::collection::vec(prop::collection::vec((0..BYTES / PAGE, 0..3u8), 1..20), 1..4),
    ) {
        let mut wanted = before.clone();
        let mut writer = SnapshotWriter::new(file(), opening(Some(uuid::Uuid::from_u128(6)))).unwrap();
        let file = writer.sink.file.try_clone().unwrap();
        let mut told = std::collections::BTreeSet::new();
        for round in &rounds {
            let mut masks = [Mask::default(); BYTES.div_ceil(BLOCK)];
            for (page, byte) in round {
                wanted[page * PAGE..(page + 1) * PAGE].fill(*byte);
                masks[page / PAGES].0 |= 1 << (page % PAGES);
                told.insert(*page);
            }
            for ((number, mask), block) in (0..).zip(masks).zip(wanted.chunks(BLOCK)) {
                let pages: Vec<u8> = mask.runs().flat_map(|run| block[run].to_vec()).collect();
                writer.amend(number, mask, &pages).unwrap();
            }
        }
        let totals = writer.finish(b"", b"").unwrap();
        prop_assert_eq!(totals.pages + totals.zeros, told.len() as u64);
        let snapshot = Snapshot::open(file).unwrap();
        snapshot.check().unwrap();
        let memory = memory(&before);
        snapshot.load(&memory).unwrap();
        prop_assert_eq!(content(&memory), wanted);
    }

    #[test]
    fn parts_are_loaded_and_nothing_beside_them(
        before in some(), wanted in some(),
        ends in prop::collection::btree_set(0..BYTES / PAGE + 3, 0..7),
    ) {
        let (file, _) = written(None, &[&wanted], b"");
        let ends: Vec<u64> = ends.into_iter().map(|page| (page * PAGE) as u64).collect();
        let parts: Vec<_> = ends.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect();
        let memory = memory(&before);
        Snapshot::open(file).unwrap().load_within(&memory, &parts).unwrap();
        let found = content(&memory);
        for (number, page) in wanted.chunks(PAGE).enumerate() {
            let at = number * PAGE;
            let is_within = parts.iter().any(|part| part.contains(&(at as u64)));
            let comes = is_within && page.iter().any(|byte| *byte != 0);
            let wanted = if comes { page } else { &before[at..at + page.len()] };
            prop_assert_eq!(&found[at..at + page.len()], wanted);
        }
    }

    #[test]
    fn no_flipped_bit_changes_what_is_loaded(
        wanted in some(), at in any::<prop::sample::Index>(), bit in 0..8u8,
    ) {
        let (file, _) = written(None, &[&wanted], b"state");
        // Anywhere in head and frames, or in memory.
        let size = file.metadata().unwrap().len();
        let at = match at.index((size - MEMORY) as usize + HEAD) {
            at if at < HEAD => at as u64,
            at => MEMORY + (at - HEAD) as u64,
        };
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << bit], at).unwrap();
        let memory = memory(&vec![0; BYTES]);
        let loaded = Snapshot::open(file).and_then(|snapshot| snapshot.load(&memory));
        // What was flipped may lie where no page was.
        prop_assert!(loaded.is_err() || content(&memory) == wanted);
    }

    #[test]
    fn no_file_makes_it_panic(head in prop::collection::vec(any::<u8>(), 0..80), frames in prop::collection::vec(any::<u8>(), 0..80)) {
        let file = file();
        file.write_all_at(&head, 0).unwrap();
        prop_assert!(Snapshot::open(file.try_clone().unwrap()).is_err());
        // Behind a head that is right.
        file.write_all_at(&super::head(0, PAGE as u64, MEMORY + PAGE as u64, frames.len() as u64), 0).unwrap();
        file.write_all_at(&frames, MEMORY + PAGE as u64).unwrap();
        prop_assert!(Snapshot::open(file).is_err());
    }
}

#[test]
fn pages_that_changed_since_are_laid_over_their_block_also_the_short_last_one() {
    let mut wanted = vec![1; BYTES];
    let file = file();
    let mut writer = SnapshotWriter::new(file.try_clone().unwrap(), opening(None)).unwrap();
    for (number, block) in blocks(&wanted) {
        writer.put(number, block).unwrap();
    }
    let change = |wanted: &mut Vec<u8>, block: usize, page: usize, byte: u8| {
        let at = block * BLOCK + page * PAGE;
        let end = (at + PAGE).min(BYTES);
        wanted[at..end].fill(byte);
        let mut whole = vec![byte; PAGE];
        whole[end - at..].fill(0);
        whole
    };
    let two = [change(&mut wanted, 1, 2, 7), change(&mut wanted, 1, 9, 0)].concat();
    writer.amend(1, Mask(1 << 2 | 1 << 9), &two).unwrap();
    let last = change(&mut wanted, 5, 3, 8);
    writer.amend(5, Mask(1 << 3), &last).unwrap();
    assert!(writer.amend(1, Mask(3), &last).is_err(), "one page for two");
    writer.finish(b"", b"").unwrap();
    let memory = memory(&vec![0; BYTES]);
    Snapshot::open(file).unwrap().load(&memory).unwrap();
    assert_eq!(content(&memory), wanted);
}

#[test]
fn what_is_zero_takes_no_room_also_where_something_was() {
    use std::os::unix::fs::MetadataExt;
    let full = vec![1; BYTES];
    let (file, _) = written(None, &[&full], b"");
    let before = file.metadata().unwrap().blocks() * 512;
    assert!(before >= BYTES as u64);
    let (file, totals) = written(None, &[&full, &vec![0; BYTES]], b"");
    let after = file.metadata().unwrap().blocks() * 512;
    assert!(
        after <= before - (BLOCK * 5) as u64,
        "{before}, then {after}"
    );
    assert_eq!(totals, Totals::default());
}

#[test]
fn one_that_was_not_finished_or_is_something_else_is_refused() {
    let file = file();
    let mut writer = SnapshotWriter::new(file.try_clone().unwrap(), opening(None)).unwrap();
    writer.put(0, &vec![1; BLOCK]).unwrap();
    drop(writer);
    let open = |file: &File| Snapshot::open(file.try_clone().unwrap()).err().unwrap();
    assert!(matches!(open(&file), StreamError::Unfinished));
    file.write_all_at(b"QEVM", 0).unwrap();
    assert!(matches!(open(&file), StreamError::Magic));
    file.set_len(10).unwrap();
    assert!(matches!(open(&file), StreamError::Magic));

    let (file, _) = written(None, &[&vec![1; BYTES]], b"state");
    let size = file.metadata().unwrap().len();
    file.set_len(size - 1).unwrap();
    assert!(matches!(open(&file), StreamError::Truncated { .. }));
}

#[test]
fn one_of_a_later_form_is_refused_with_its_number() {
    let (file, _) = written(None, &[&vec![1; BYTES]], b"");
    let mut head = [0; HEAD];
    file.read_exact_at(&mut head, 0).unwrap();
    head[8] = 2;
    let checksum = crc32fast::hash(&head[..HEAD - 4]);
    head[HEAD - 4..].copy_from_slice(&checksum.to_le_bytes());
    file.write_all_at(&head, 0).unwrap();
    let error = Snapshot::open(file).err().unwrap();
    assert!(matches!(error, StreamError::Format { found: 2 }), "{error}");
}

#[test]
fn another_machines_memory_and_blocks_that_are_none_are_refused() {
    let (file, _) = written(None, &[&vec![1; BYTES]], b"");
    let snapshot = Snapshot::open(file).unwrap();
    let smaller = memory(&vec![0; BYTES - 1]);
    let error = snapshot.load(&smaller).unwrap_err();
    assert!(matches!(error, StreamError::Shape { .. }), "{error}");

    let mut writer = SnapshotWriter::new(self::file(), opening(None)).unwrap();
    assert!(writer.put(6, &vec![1; BLOCK]).is_err());
    assert!(writer.put(u64::MAX, &vec![1; BLOCK]).is_err());
    assert!(writer.put(5, &vec![1; BLOCK]).is_err(), "the last is short");
    assert!(writer.put(0, &vec![1; BLOCK - 1]).is_err());
    let absurd = Opening {
        memory: u64::MAX,
        ..opening(None)
    };
    assert!(SnapshotWriter::new(self::file(), absurd).is_err());
}

#[test]
fn entries_that_are_out_of_place_are_refused() {
    let entry = |number: u32, placed: u16, zero: u16| {
        let mut bytes = [0; ENTRY];
        bytes[..4].copy_from_slice(&number.to_le_bytes());
        bytes[4..6].copy_from_slice(&placed.to_le_bytes());
        bytes[6..8].copy_from_slice(&zero.to_le_bytes());
        bytes
    };
    let read =
        |entries: &[[u8; ENTRY]]| read_entries(&entries.concat(), &opening(None), &mut Vec::new());
    read(&[entry(0, 1, 2), entry(5, 0xf, 0)]).unwrap();
    assert!(read(&[entry(5, 0x10, 0)]).is_err(), "past the end");
    assert!(read(&[entry(6, 1, 0)]).is_err(), "past the end");
    assert!(read(&[entry(u32::MAX, 1, 0)]).is_err(), "past the end");
    assert!(read(&[entry(0, 1, 1)]).is_err(), "both");
    assert!(read(&[entry(0, 0, 0)]).is_err(), "neither");
    assert!(
        read(&[entry(u32::MAX, 0, 0)]).is_err(),
        "neither, past the end"
    );
    assert!(read(&[entry(1, 1, 0), entry(1, 2, 0)]).is_err(), "twice");
    assert!(read_entries(&[0; ENTRY - 1], &opening(None), &mut Vec::new()).is_err());
    assert_eq!(PAGES, 16);
}

#[test]
fn a_flag_is_read_and_one_that_this_build_does_not_know_is_refused() {
    let flagged = |flags: u32| {
        let file = file();
        let mut writer = SnapshotWriter::new(file.try_clone().unwrap(), opening(None)).unwrap();
        if flags == UNCHECKED {
            writer.mark_unchecked();
        }
        writer.flags |= flags;
        writer.finish(b"", b"").unwrap();
        let mut head = [1; 4];
        file.read_exact_at(&mut head, 12).unwrap();
        assert_eq!(head, flags.to_le_bytes());
        Snapshot::open(file).map(|snapshot| snapshot.is_unchecked())
    };
    assert!(!flagged(0).unwrap());
    assert!(flagged(UNCHECKED).unwrap());
    for flags in [2, 3, 1 << 31] {
        assert!(matches!(flagged(flags), Err(StreamError::Malformed { .. })));
    }
}
