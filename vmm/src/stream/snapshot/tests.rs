//! Snapshots written, damaged and read.

use proptest::prelude::*;
use rstest::rstest;

use super::head::HEAD;
use super::sink::make_zero;
use super::table::{PACKED_ENTRY, Slot};
use super::*;
use crate::stream::FORMAT;
use crate::stream::pages::PAGES;

const BOTH: [Compression; 2] = [Compression::None, Compression::Zstd];

fn either() -> impl Strategy<Value = Compression> {
    prop::sample::select(BOTH.to_vec())
}

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

/// To this file, whole or over the base.
fn writer(file: &File, base: Option<uuid::Uuid>, compression: Compression) -> SnapshotWriter {
    let file = file.try_clone().unwrap();
    SnapshotWriter::new(file, opening(base), compression).unwrap()
}

fn written(compression: Compression, contents: &[&[u8]], state: &[u8]) -> (File, Totals) {
    let file = file();
    let mut writer = writer(&file, None, compression);
    for content in contents {
        for (number, block) in blocks(content) {
            writer.put(number, block).unwrap();
        }
    }
    let totals = writer.finish(state, b"owner's").unwrap();
    (file, totals)
}

/// What nobody makes smaller.
fn noise(seed: u64, bytes: &mut [u8]) {
    let mut word = seed | 1;
    for byte in bytes {
        word ^= word << 13;
        word ^= word >> 7;
        word ^= word << 17;
        *byte = word as u8;
    }
}

/// Memory of which a few bytes are not zero, and some pages are noise.
fn some() -> impl Strategy<Value = Vec<u8>> {
    let bytes = prop::collection::vec((0..BYTES, 1u8..), 0..40);
    let noisy = prop::collection::vec((0..BYTES / PAGE, 1..20usize, any::<u64>()), 0..4);
    (bytes, noisy).prop_map(|(bytes, noisy)| {
        let mut content = vec![0; BYTES];
        for (page, pages, seed) in noisy {
            let end = ((page + pages) * PAGE).min(BYTES);
            noise(seed, &mut content[page * PAGE..end]);
        }
        for (at, byte) in bytes {
            content[at] = byte;
        }
        content
    })
}

/// One more change of what is being written.
#[derive(Debug, Clone)]
enum Change {
    /// Every block, whole.
    Put(Vec<u8>),
    /// Some pages are all of one byte, or noise.
    Amend(Vec<(usize, u8, bool)>),
}

fn change() -> impl Strategy<Value = Change> {
    let page = (0..BYTES / PAGE, 0..3u8, any::<bool>());
    prop_oneof![
        some().prop_map(Change::Put),
        prop::collection::vec(page, 1..20).prop_map(Change::Amend),
    ]
}

/// Takes part in `wanted` and by the writer; which pages that was.
fn amend(
    writer: &mut SnapshotWriter,
    wanted: &mut [u8],
    pages: &[(usize, u8, bool)],
) -> Vec<usize> {
    let mut masks = [Mask::default(); BYTES.div_ceil(BLOCK)];
    for (page, byte, noisy) in pages {
        let content = &mut wanted[page * PAGE..(page + 1) * PAGE];
        match noisy {
            true => noise(u64::from(*byte) + *page as u64, content),
            false => content.fill(*byte),
        }
        masks[page / PAGES].0 |= 1 << (page % PAGES);
    }
    for ((number, mask), block) in (0..).zip(masks).zip(wanted.chunks(BLOCK)) {
        let pages: Vec<u8> = mask.runs().flat_map(|run| block[run].to_vec()).collect();
        writer.amend(number, mask, &pages).unwrap();
    }
    pages.iter().map(|(page, ..)| *page).collect()
}

proptest! {
    #[test]
    fn what_was_put_last_is_what_is_loaded(
        compression in either(),
        earlier in some(), later in some(), state in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let (file, totals) = written(compression, &[&earlier, &later], &state);
        let with_content = later.chunks(PAGE).filter(|page| page.iter().any(|byte| *byte != 0));
        prop_assert_eq!(totals, Totals { pages: with_content.count() as u64, zeros: 0 });
        let snapshot = Snapshot::open(file.try_clone().unwrap()).unwrap();
        prop_assert_eq!(snapshot.state(), &state);
        prop_assert_eq!(snapshot.owner(), b"owner's");
        prop_assert_eq!(snapshot.totals(), totals);
        let memory = memory(&vec![0; BYTES]);
        snapshot.load(&memory).unwrap();
        prop_assert_eq!(content(&memory), &*later);
        snapshot.check().unwrap();
        prop_assert_eq!(snapshot.compression(), compression);
        let (once, _) = written(compression, &[&later], &state);
        let length = once.metadata().unwrap().len();
        prop_assert!(length <= most_bytes(BYTES as u64) - MOST_STATE as u64);
        if compression == Compression::Zstd {
            // What was put once takes no more than its pages, but for the frames.
            let entries = BYTES.div_ceil(BLOCK) * PACKED_ENTRY;
            prop_assert!(length <= (4096 + BYTES.next_multiple_of(8) + entries + 1024) as u64);
        }
        // Its memory is the machine's as it stands, for who maps it.
        if let Some((_, begin)) = snapshot.placed_in() {
            prop_assert_eq!(begin, MEMORY);
            let mut placed = vec![0; BYTES];
            file.read_exact_at(&mut placed, MEMORY).unwrap();
            prop_assert_eq!(placed, later);
        }
    }

    /// However often its blocks come again and grow, and by how many sinks, it is no larger than was said.
    #[test]
    fn what_changes_while_it_is_written_is_there_and_the_file_stays_within_bounds(
        compression in either(), changes in prop::collection::vec(change(), 1..8),
    ) {
        let file = file();
        let mut writer = writer(&file, None, compression);
        let mut other = writer.another_sink();
        let mut wanted = vec![0; BYTES];
        for change in &changes {
            match change {
                Change::Put(content) => {
                    wanted.copy_from_slice(content);
                    for (number, block) in blocks(content) {
                        let before = writer.entry(number).unwrap();
                        let sink = if number.is_multiple_of(2) { writer.sink() } else { &mut other };
                        let entry = sink.put(number, before, block).unwrap();
                        writer.note(number, entry).unwrap();
                    }
                }
                Change::Amend(pages) => drop(amend(&mut writer, &mut wanted, pages)),
            }
        }
        writer.finish(b"state", b"").unwrap();
        let length = file.metadata().unwrap().len();
        prop_assert!(length <= most_bytes_of(BYTES as u64, compression) - MOST_STATE as u64);
        if compression == Compression::Zstd {
            prop_assert!(length <= BLOCKS + 2 * BYTES as u64 + 4096, "{}", length);
        }
        let memory = memory(&vec![0; BYTES]);
        let snapshot = Snapshot::open(file).unwrap();
        snapshot.load(&memory).unwrap();
        prop_assert_eq!(content(&memory), wanted);
    }

    #[test]
    fn one_that_is_laid_over_another_brings_all_that_changed(
        compression in either(), before in some(), after in some(),
    ) {
        let base = uuid::Uuid::from_u128(6);
        let file = file();
        let mut writer = writer(&file, Some(base), compression);
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
        compression in either(), before in some(),
        rounds in prop::collection::vec(
            prop::collection::vec((0..BYTES / PAGE, 0..3u8, any::<bool>()), 1..20), 1..4,
        ),
    ) {
        let mut wanted = before.clone();
        let file = file();
        let mut writer = writer(&file, Some(uuid::Uuid::from_u128(6)), compression);
        let mut told = std::collections::BTreeSet::new();
        for round in &rounds {
            told.extend(amend(&mut writer, &mut wanted, round));
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
        compression in either(), before in some(), wanted in some(),
        ends in prop::collection::btree_set(0..BYTES / PAGE + 3, 0..7),
    ) {
        let (file, _) = written(compression, &[&wanted], b"");
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
        compression in either(),
        wanted in some(), at in any::<prop::sample::Index>(), bit in 0..8u8,
    ) {
        let (file, _) = written(compression, &[&wanted], b"state");
        // Anywhere in head and frames, or in memory.
        let size = file.metadata().unwrap().len();
        let begin = compression.begin();
        let at = match at.index((size - begin) as usize + HEAD) {
            at if at < HEAD => at as u64,
            at => begin + (at - HEAD) as u64,
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
        for compression in BOTH {
            let begin = compression.begin() + PAGE as u64;
            let head = Head {
                compression,
                flags: 0,
                memory: PAGE as u64,
                frames: begin,
                length: frames.len() as u64,
            };
            file.set_len(begin + frames.len() as u64).unwrap();
            file.write_all_at(&head.bytes(), 0).unwrap();
            file.write_all_at(&frames, begin).unwrap();
            prop_assert_eq!(Head::read(&file).unwrap(), head);
            prop_assert!(Snapshot::open(file.try_clone().unwrap()).is_err());
        }
    }
}

#[rstest]
fn pages_that_changed_since_are_laid_over_their_block_also_the_short_last_one(
    #[values(Compression::None, Compression::Zstd)] compression: Compression,
) {
    let mut wanted = vec![1; BYTES];
    let file = file();
    let mut writer = writer(&file, None, compression);
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
    let (file, _) = written(Compression::None, &[&full], b"");
    let before = file.metadata().unwrap().blocks() * 512;
    assert!(before >= BYTES as u64);
    let (file, totals) = written(Compression::None, &[&full, &vec![0; BYTES]], b"");
    let after = file.metadata().unwrap().blocks() * 512;
    assert!(
        after <= before - (BLOCK * 5) as u64,
        "{before}, then {after}"
    );
    assert_eq!(totals, Totals::default());
}

#[test]
fn what_becomes_smaller_takes_less_room_and_what_does_not_no_more_than_it_has() {
    let length = |content: &[u8]| {
        let (file, _) = written(Compression::Zstd, &[content], b"");
        file.metadata().unwrap().len()
    };
    let empty = length(&vec![0; BYTES]);
    let text = b"it is said of each page what it is, and of none what it was; ".repeat(BYTES / 60);
    assert!(length(&text[..BYTES]) - empty < BYTES as u64 / 20);
    let mut noisy = vec![0; BYTES];
    noise(9, &mut noisy);
    let with_noise = length(&noisy) - empty;
    let entries = (PACKED_ENTRY * BYTES.div_ceil(BLOCK)) as u64;
    assert!((BYTES as u64..BYTES as u64 + entries + 64).contains(&with_noise));
    assert_eq!(PACKED_ENTRY, 2 * ENTRY, "so that `most_bytes` is of both");
}

#[test]
fn one_that_was_not_finished_or_is_something_else_is_refused() {
    let file = file();
    let open = |file: &File| Snapshot::open(file.try_clone().unwrap()).err().unwrap();
    for compression in BOTH {
        let mut writer = writer(&file, None, compression);
        writer.put(0, &vec![1; BLOCK]).unwrap();
        drop(writer);
        assert!(matches!(open(&file), StreamError::Unfinished));
    }
    file.write_all_at(b"QEVM", 0).unwrap();
    assert!(matches!(open(&file), StreamError::Magic));
    file.set_len(10).unwrap();
    assert!(matches!(open(&file), StreamError::Magic));

    for compression in BOTH {
        let (file, _) = written(compression, &[&vec![1; BYTES]], b"state");
        let size = file.metadata().unwrap().len();
        file.set_len(size - 1).unwrap();
        assert!(matches!(open(&file), StreamError::Truncated { .. }));
    }
}

/// The form of `file` becomes another, and all sums are right.
fn with_form(file: &File, form: u8) {
    file.write_all_at(&[form], 8).unwrap();
    seal(file, true).unwrap();
}

/// So does a build of before, which reads the first form only, with one that is compressed.
#[test]
fn one_of_a_later_form_is_refused_with_its_number() {
    for (form, compression) in [(1, Compression::None), (2, Compression::Zstd)] {
        let (file, _) = written(compression, &[&vec![1; BYTES]], b"");
        let mut found = [0; 4];
        file.read_exact_at(&mut found, 8).unwrap();
        assert_eq!(u32::from_le_bytes(found), form);
        with_form(&file, 3);
        let error = Snapshot::open(file).err().unwrap();
        assert!(matches!(error, StreamError::Format { found: 3 }), "{error}");
    }
    assert_eq!(FORMAT, 2);
}

#[test]
fn one_form_with_the_number_of_the_other_is_refused() {
    for (compression, other) in [(Compression::None, 2), (Compression::Zstd, 1)] {
        let (file, _) = written(compression, &[&vec![1; BYTES]], b"");
        with_form(&file, other);
        let error = Snapshot::open(file.try_clone().unwrap()).err().unwrap();
        let found = matches!(error, StreamError::Malformed { .. });
        assert!(found, "{error}");
        // Also where it says that memory begins elsewhere.
        let begin = BOTH[usize::from(other) - 1].begin();
        file.write_all_at(&begin.to_le_bytes(), 16).unwrap();
        seal(&file, true).unwrap();
        assert!(Snapshot::open(file).is_err());
    }
}

#[test]
fn another_machines_memory_and_blocks_that_are_none_are_refused() {
    let (file, _) = written(Compression::Zstd, &[&vec![1; BYTES]], b"");
    let snapshot = Snapshot::open(file).unwrap();
    let smaller = memory(&vec![0; BYTES - 1]);
    let error = snapshot.load(&smaller).unwrap_err();
    assert!(matches!(error, StreamError::Shape { .. }), "{error}");

    for compression in BOTH {
        let mut writer = writer(&self::file(), None, compression);
        assert!(writer.put(6, &vec![1; BLOCK]).is_err());
        assert!(writer.put(u64::MAX, &vec![1; BLOCK]).is_err());
        assert!(writer.put(5, &vec![1; BLOCK]).is_err(), "the last is short");
        assert!(writer.put(0, &vec![1; BLOCK - 1]).is_err());
        let absurd = Opening {
            memory: u64::MAX,
            ..opening(None)
        };
        assert!(SnapshotWriter::new(self::file(), absurd, compression).is_err());
    }
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
    let read = |entries: &[[u8; ENTRY]]| {
        Table::new(Compression::None, BYTES as u64, 0..0).read(&entries.concat())
    };
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
    let mut table = Table::new(Compression::None, BYTES as u64, 0..0);
    assert!(table.read(&[0; ENTRY - 1]).is_err());
    assert_eq!(PAGES, 16);
}

/// Before anything is allocated or read.
#[test]
fn packed_entries_of_hostile_lengths_and_places_are_refused() {
    const PLACE: Range<u64> = 4096..4096 + 2 * BLOCK as u64;
    let entry = |number: u32, placed: u16, length: u32, at: u64| {
        let entry = Entry {
            placed: Mask(placed),
            zero: Mask(!placed & 1),
            checksum: 0,
            slot: Slot::default(),
        };
        let mut bytes = Vec::new();
        entry.write(number, Compression::Zstd, &mut bytes);
        assert_eq!(bytes.len(), PACKED_ENTRY);
        bytes[ENTRY..ENTRY + 4].copy_from_slice(&length.to_le_bytes());
        bytes[ENTRY + 4..].copy_from_slice(&at.to_le_bytes());
        bytes
    };
    let read = |entries: &[Vec<u8>]| {
        let mut table = Table::new(Compression::Zstd, BYTES as u64, PLACE);
        table.read(&entries.concat()).map(|()| table.blocks.len())
    };
    let page = PAGE as u32;
    let (begin, end) = (PLACE.start, PLACE.end);
    assert_eq!(
        read(&[entry(0, 1, page, begin), entry(1, 0, 0, 0)]).unwrap(),
        2
    );
    // Three pages and a half.
    let last = 3 * page + 100;
    read(&[entry(5, 0xf, last, end - u64::from(last))]).unwrap();
    let refused = [
        (entry(5, 0xf, last + 1, begin), "longer than its pages"),
        (entry(0, 1, page + 1, begin), "longer than its page"),
        (entry(0, 1, u32::MAX, begin), "longer than anything"),
        (entry(0, 1, 0, 0), "a page, and no bytes"),
        (entry(0, 0, 1, begin), "bytes, and no page"),
        (entry(0, 0, 0, begin), "nothing, somewhere"),
        (entry(0, 1, 8, begin - 8), "in the head's page"),
        (entry(0, 1, 8, end - 7), "in the frames"),
        (entry(0, 1, 8, u64::MAX - 3), "past all numbers"),
    ];
    for (entry, why) in refused {
        assert!(read(&[entry]).is_err(), "{why}");
    }
    let whole = |number: u32| entry(number, u16::MAX, BLOCK as u32, begin);
    read(&[whole(0), whole(1)]).unwrap();
    let refused = read(&[whole(0), whole(1), entry(2, 1, 1, begin)]);
    assert!(refused.is_err(), "more than there is room for");
    let mut table = Table::new(Compression::Zstd, BYTES as u64, PLACE);
    assert!(table.read(&[0; PACKED_ENTRY - 1]).is_err());
}

/// Of a whole block, whose bytes in the file are these; loaded and checked.
fn loaded_from(stored: &[u8], checksum: u32) -> Result<Vec<u8>, StreamError> {
    let file = file();
    let mut writer = writer(&file, None, Compression::Zstd);
    let mut room = vec![0; BLOCK];
    noise(5, &mut room);
    writer.put(0, &room).unwrap();
    let before = writer.entry(0).unwrap();
    file.write_all_at(stored, before.slot.at).unwrap();
    let slot = Slot {
        length: stored.len() as u32,
        ..before.slot
    };
    let entry = Entry {
        checksum,
        slot,
        ..before
    };
    writer.note(0, entry).unwrap();
    writer.finish(b"", b"").unwrap();
    let snapshot = Snapshot::open(file)?;
    let memory = memory(&vec![0; BYTES]);
    let loaded = snapshot.load(&memory);
    assert_eq!(loaded.is_err(), snapshot.check().is_err());
    loaded.map(|()| content(&memory))
}

/// Sums are right, as in a file that somebody made up.
#[test]
fn blocks_that_are_hostile_to_who_decompresses_them_are_refused() {
    let block = vec![7; BLOCK];
    let sum = crc32fast::hash(&block);
    let packed = |content: &[u8]| zstd::bulk::compress(content, 1).unwrap();
    let good = packed(&block);
    assert_eq!(loaded_from(&good, sum).unwrap()[..BLOCK], block);
    let halves = [packed(&block[..BLOCK / 2]), packed(&block[..BLOCK / 2])].concat();
    assert_eq!(loaded_from(&halves, sum).unwrap()[..BLOCK], block);
    let mut refused = vec![
        packed(&block[1..]),
        packed(&vec![7; BLOCK + 1]),
        // A few bytes that would be 64 MiB.
        packed(&vec![7; 64 << 20]),
        [good.as_slice(), &packed(&block)].concat(),
        good[..good.len() - 1].to_vec(),
        [good.as_slice(), &[0]].concat(),
        // What is to be passed over, and nothing behind it.
        [&[0x50, 0x2a, 0x4d, 0x18], [9, 0, 0, 0].as_slice(), &[0; 9]].concat(),
        // The same, longer than all that there is.
        [0x50, 0x2a, 0x4d, 0x18, 0xff, 0xff, 0xff, 0xff].to_vec(),
        vec![0; 100],
    ];
    // A window of two gigabytes, and no length; and a dictionary that nobody has.
    let magic = [0x28, 0xb5, 0x2f, 0xfd];
    refused.push([&magic, [0, 0xa8, 1, 0, 0].as_slice()].concat());
    refused.push([&magic, [1, 0x30, 9, 1, 0, 0].as_slice()].concat());
    for stored in refused {
        let error = loaded_from(&stored, sum).unwrap_err();
        let found = matches!(error, StreamError::Packed { .. });
        assert!(found, "{stored:02x?}: {error}");
    }
    let error = loaded_from(&good, sum ^ 1).unwrap_err();
    assert!(matches!(error, StreamError::Checksum { .. }), "{error}");
    let text = StreamError::Packed {
        what: "memory at offset 0x0".to_owned(),
    };
    assert!(text.to_string().contains("damaged"), "{text}");
}

proptest! {
    #[test]
    fn no_bytes_make_who_decompresses_them_panic(
        noise in prop::collection::vec(any::<u8>(), 1..200), keep in 0..60usize,
    ) {
        let mut block = vec![0; BLOCK];
        super::tests::noise(3, &mut block[..BLOCK / 2]);
        let mut stored = zstd::bulk::compress(&block, 1).unwrap();
        let sum = crc32fast::hash(&block);
        prop_assert_eq!(&loaded_from(&stored, sum).unwrap()[..BLOCK], &block);
        let end = (keep + noise.len()).min(stored.len());
        stored[keep..end].copy_from_slice(&noise[..end - keep]);
        let loaded = loaded_from(&stored, sum);
        prop_assert!(loaded.is_err() || loaded.unwrap()[..BLOCK] == block);
        let _ = loaded_from(&noise, sum);
    }
}

#[test]
fn a_flag_is_read_and_one_that_this_build_does_not_know_is_refused() {
    let flagged = |compression, flags: u32| {
        let file = file();
        let mut writer = writer(&file, None, compression);
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
    for compression in BOTH {
        assert!(!flagged(compression, 0).unwrap());
        assert!(flagged(compression, UNCHECKED).unwrap());
        for flags in [2, 3, 1 << 31] {
            let refused = flagged(compression, flags);
            assert!(matches!(refused, Err(StreamError::Malformed { .. })));
        }
    }
}
