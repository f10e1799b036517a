//! Golden streams that were damaged, cut short or are of a newer build: none is taken for what it was not.

use std::ops::Range;
use std::os::unix::fs::FileExt;

use rstest::rstest;

use super::*;
use crate::config::PageSize;
use crate::stream::snapshot::SnapshotWriter;
use crate::stream::{PAGE, packed, snapshot};

/// Bytes of a snapshot's head that mean something.
const HEAD: usize = 52;

/// The newest with a live stream.
fn golden() -> Golden {
    with_streams().pop().unwrap()
}

/// Where the frames of a snapshot's file are.
pub fn frames_in(file: &[u8]) -> Range<usize> {
    let number = |at: usize| u64::from_le_bytes(*file[at..].first_chunk().unwrap()) as usize;
    number(32)..number(32) + number(40)
}

#[test]
fn no_flipped_bit_in_a_live_stream_is_overlooked() {
    let mut stream = golden().stream();
    for at in 0..stream.len() {
        let bit = 1 << (at % 8);
        stream[at] ^= bit;
        assert!(arrive(&stream).is_err(), "a bit of byte {at}");
        stream[at] ^= bit;
    }
    arrive(&stream).unwrap();
}

#[test]
fn no_live_stream_that_was_cut_short_is_taken_for_a_whole_one() {
    let stream = golden().stream();
    for length in 0..stream.len() {
        let error = arrive(&stream[..length]).err();
        let Some(MigrationError::Machine(SnapshotError::Stream(error))) = error else {
            panic!("{length} bytes: {error:?}");
        };
        let cut = matches!(error, StreamError::Truncated { .. });
        assert!(cut, "{length} bytes: {error}");
    }
}

/// The newest snapshot of this form.
fn of_form(form: u32) -> Vec<u8> {
    let mut all = goldens();
    all.retain(|golden| golden.form == form);
    all.pop().unwrap().snapshot()
}

/// What is made of a snapshot's file.
fn load(file: &File) -> Result<GuestMemory, SnapshotError> {
    let snapshot = Snapshot::open(file.try_clone().unwrap())?;
    Ok(loaded(&[&snapshot], &every_device(), Loading::Eager)?.1)
}

fn content(memory: &GuestMemory) -> Vec<u8> {
    let mut all = vec![0; memory.file_bytes().unwrap() as usize];
    memory.file().read_exact_at(&mut all, 0).unwrap();
    all
}

/// What lies in holes and behind the head is nobody's; all else has a checksum.
#[test]
fn no_flipped_bit_in_a_snapshot_changes_what_is_loaded() {
    let bytes = of_form(1);
    let frames = frames_in(&bytes);
    let file = file(&bytes);
    let load = || load(&file);
    let flip = |at: usize, bit: u8| file.write_all_at(&[bytes[at] ^ bit], at as u64).unwrap();
    let memory = load().unwrap();
    let wanted = content(&memory);
    let (mut refused, mut ignored) = (0, 0);
    for (number, page) in bytes[..frames.start].chunks(PAGE).enumerate() {
        let zero = page.iter().all(|byte| *byte == 0);
        // Of pages without content a few bytes do.
        let step = if zero { 1 << 20 } else { 3 };
        for at in (number * PAGE..).take(PAGE).filter(|at| at % step == 0) {
            flip(at, 1 << (at % 8));
            match load() {
                Err(_) => refused += 1,
                Ok(memory) => {
                    assert!(zero || (HEAD..PAGE).contains(&at), "a bit of byte {at}");
                    if zero {
                        assert_eq!(content(&memory), wanted, "a bit of byte {at}");
                    }
                    ignored += 1;
                }
            }
            flip(at, 0);
        }
    }
    for at in frames {
        flip(at, 1 << (at % 8));
        assert!(load().is_err(), "a bit of byte {at}");
        flip(at, 0);
    }
    assert!(refused > 0 && ignored > 0);
    load().unwrap();
}

/// The rest of the head's page is nobody's, nor are up to seven bytes behind a block, and zstd has bits that say nothing.
#[test]
fn no_flipped_bit_in_a_compressed_snapshot_changes_what_is_loaded() {
    let bytes = of_form(2);
    let frames = frames_in(&bytes);
    let file = file(&bytes);
    let flip = |at: usize, bit: u8| file.write_all_at(&[bytes[at] ^ bit], at as u64).unwrap();
    let wanted = content(&load(&file).unwrap());
    let (mut refused, mut ignored) = (0, 0);
    let nobodys = |at: &usize| (HEAD..PAGE).contains(at) && !at.is_multiple_of(64);
    for at in (0..bytes.len()).filter(|at| !nobodys(at)) {
        flip(at, 1 << (at % 8));
        match load(&file) {
            Err(_) => refused += 1,
            Ok(memory) => {
                assert!((HEAD..frames.start).contains(&at), "a bit of byte {at}");
                assert_eq!(content(&memory), wanted, "a bit of byte {at}");
                ignored += 1;
            }
        }
        flip(at, 0);
    }
    assert!(refused > frames.len() && ignored > 0 && ignored < refused / 10);
    load(&file).unwrap();
}

#[rstest]
fn no_snapshot_that_was_cut_short_is_taken_for_a_whole_one(#[values(1, 2)] form: u32) {
    let bytes = of_form(form);
    let file = file(&bytes);
    let frames = frames_in(&bytes);
    let step = if form == 1 { 0x1_0001 } else { 97 };
    let before = (0..frames.start).step_by(step);
    for length in before.chain(frames).rev() {
        file.set_len(length as u64).unwrap();
        assert!(
            Snapshot::open(file.try_clone().unwrap()).is_err(),
            "{length} bytes"
        );
    }
}

/// A stream without its frame `at`, with it twice, and with the next before it.
fn disordered(whole: &[Vec<u8>], at: usize) -> Vec<(&'static str, Vec<u8>)> {
    let (mut missing, mut twice) = (whole.to_vec(), whole.to_vec());
    missing.remove(at);
    twice.insert(at, whole[at].clone());
    let mut orders = vec![("missing", missing), ("twice", twice)];
    if at + 1 < whole.len() {
        let mut swapped = whole.to_vec();
        swapped.swap(at, at + 1);
        orders.push(("swapped", swapped));
    }
    let sealed = orders.into_iter().map(|(how, frames)| {
        let mut stream = frames.concat();
        frame::seal(&mut stream, true);
        (how, stream)
    });
    sealed.collect()
}

/// But where that makes no difference.
#[test]
fn frames_that_are_missing_stand_twice_or_elsewhere_are_refused() {
    let mut whole = frames(&golden().stream());
    whole.retain(|frame| !is_mark(frame));
    let mut stream = whole.concat();
    frame::seal(&mut stream, true);
    let kinds = kinds(&stream);
    let mut taken = Vec::new();
    for (at, kind) in kinds.into_iter().enumerate() {
        for (how, stream) in disordered(&whole, at) {
            if arrive(&stream).is_ok() {
                taken.push((how, kind));
            }
        }
    }
    let wanted = [
        // The last one counts.
        ("twice", Kind::Owner),
        // Each says of what it is.
        ("swapped", Kind::Blocks),
        // Disks are made durable in the end as well.
        ("swapped", Kind::Pages),
        ("missing", Kind::Sync),
        ("twice", Kind::Sync),
        ("swapped", Kind::Sync),
        // Nobody reads on behind it.
        ("twice", Kind::End),
    ];
    assert_eq!(taken, wanted);
}

fn is_mark(frame: &[u8]) -> bool {
    frame[..2] == [0, 0x80]
}

/// A build from before passes them over, and one that says none is taken as well.
#[test]
fn marks_may_be_missing_stand_twice_or_elsewhere() {
    let whole = frames(&golden().stream());
    let marks = (0..whole.len()).filter(|at| is_mark(&whole[*at]));
    let marks: Vec<usize> = marks.collect();
    assert!(!marks.is_empty());
    for at in marks {
        for (how, stream) in disordered(&whole, at) {
            arrive(&stream).unwrap_or_else(|error| panic!("{how} {at}: {error}"));
        }
    }
}

#[test]
fn a_stream_of_a_newer_state_is_refused_with_its_number() {
    let mut frames = frames(&golden().stream());
    let newer = (STATE_VERSION + 1).to_le_bytes();
    frames[1][frame::HEAD..frame::HEAD + 4].copy_from_slice(&newer);
    let mut stream = frames.concat();
    frame::seal(&mut stream, true);
    let error = arrive(&stream).err().unwrap().to_string();
    assert_eq!(
        error,
        format!(
            "a saved machine of version {}; this build reads version {STATE_VERSION}",
            STATE_VERSION + 1
        )
    );
}

#[rstest]
fn a_snapshot_of_a_newer_state_or_form_is_refused_with_its_number(#[values(1, 2)] form: u32) {
    let bytes = of_form(form);
    let all = frames_in(&bytes);
    let mut at = all.start;
    for frame in frames(&bytes[all]) {
        if frame[..2] == [3, 0] {
            break;
        }
        at += frame.len();
    }
    let said = |at: usize, number: u32| {
        let file = file(&bytes);
        file.write_all_at(&number.to_le_bytes(), at as u64).unwrap();
        snapshot::seal(&file, true).unwrap();
        let opened = Snapshot::open(file).map_err(SnapshotError::from);
        let loaded =
            opened.and_then(|snapshot| loaded(&[&snapshot], &every_device(), Loading::Eager));
        loaded.err().unwrap().to_string()
    };
    let state = said(at + frame::HEAD, STATE_VERSION + 1);
    assert!(
        state.contains(&format!("of version {};", STATE_VERSION + 1)),
        "{state}"
    );
    let form = said(8, FORMAT + 1);
    assert!(form.contains(&format!("of form {};", FORMAT + 1)), "{form}");
}

#[test]
fn a_device_of_a_newer_state_is_refused_with_its_number_and_name() {
    let count = open(&golden().snapshot(), Loading::Eager)
        .unwrap()
        .1
        .devices
        .len();
    for index in 0..count {
        let (_, mut state, memory) = open(&golden().snapshot(), Loading::Eager).unwrap();
        let device = &mut state.devices[index];
        device.version += 1;
        let (id, version) = (device.id.clone(), device.version);
        let error = board(state, memory, &guest::files_without_kvm())
            .err()
            .unwrap();
        let cause = error.source().unwrap().to_string();
        assert!(error.to_string().contains(&id), "{error}");
        assert!(
            cause.contains(&format!("version {version},")),
            "{id}: {cause}"
        );
    }
}

/// The file is of a process that a guest may have taken over: what it claims is not taken from the host.
#[test]
fn a_snapshot_that_claims_other_memory_than_it_has_or_huge_pages_is_refused() {
    let refused = |change: fn(&mut MachineConfig), here: &MachineConfig| {
        let (snapshot, mut state, _) = open(&golden().snapshot(), Loading::Eager).unwrap();
        change(&mut state.config);
        let file = tempfile::tempfile().unwrap();
        let opening = snapshot.opening().clone();
        let to = file.try_clone().unwrap();
        let writer = SnapshotWriter::new(to, opening, Compression::None).unwrap();
        let bytes = [
            STATE_VERSION.to_le_bytes().to_vec(),
            packed(&state).unwrap(),
        ]
        .concat();
        writer.finish(&bytes, b"").unwrap();
        let loaded = loaded(&[&Snapshot::open(file).unwrap()], here, Loading::Eager);
        loaded.err().map(|error| error.to_string())
    };
    let here = every_device();
    assert_eq!(refused(|_| (), &here), None);
    let larger = refused(|config| config.memory.bytes = 1 << 40, &here).unwrap();
    assert!(larger.contains("bytes of memory"), "{larger}");
    let huge = |config: &mut MachineConfig| config.memory.pages = PageSize::Huge2MiB;
    let mut agreed = every_device();
    for _ in 0..2 {
        let said = refused(huge, &agreed).unwrap();
        assert!(said.contains("huge pages than were agreed"), "{said}");
        // As large a page, and less memory.
        huge(&mut agreed);
        agreed.hot_memory = None;
    }
}
