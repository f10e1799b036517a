//! What is laid over memory, cut into pieces and taken away again.

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::super::GuestMemory;
use super::*;
use crate::config::MachineConfig;

const PAGE: u64 = 4096;
const LONG: Duration = Duration::from_secs(3600);

proptest! {
    #[test]
    fn extents_have_all_runs_and_no_more_than_a_gap_besides(
        steps in prop::collection::vec((1..60u64, 1..20u64), 0..80), gap in 0..40u64, most in 0..40usize,
    ) {
        let (mut runs, mut at) = (Vec::new(), 0);
        for (gap, pages) in steps {
            let start = at + gap * PAGE;
            at = start + pages * PAGE;
            runs.push(start..at);
        }
        let gap = gap * PAGE;
        let extents = joined(&runs, gap);
        prop_assert!(extents.is_sorted_by(|one, next| next.start - one.end > gap));
        for extent in &extents {
            // They begin and end where runs do.
            prop_assert!(runs.iter().any(|run| run.start == extent.start));
            prop_assert!(runs.iter().any(|run| run.end == extent.end));
        }
        let size = |extent: &Range<u64>| extent.end - extent.start;
        let (laid, rest) = largest(extents.clone(), most);
        prop_assert_eq!(laid.len(), extents.len().min(most));
        prop_assert!(laid.iter().map(size).min() >= rest.iter().map(size).max() || rest.is_empty() || most == 0);
        for some in [&laid, &rest] {
            prop_assert!(some.is_sorted_by(|one, next| one.end < next.start));
        }
        for run in &runs {
            let inside = |extent: &&Range<u64>| extent.start <= run.start && run.end <= extent.end;
            prop_assert_eq!(laid.iter().chain(&rest).filter(inside).count(), 1);
        }
        let found: u64 = extents.iter().zip(extents.iter().map(size)).map(|(extent, all)| {
            let inside = runs.iter().filter(|run| extent.start <= run.start && run.end <= extent.end);
            all - inside.map(size).sum::<u64>()
        }).sum();
        prop_assert!(found <= gap * runs.len() as u64);
    }
}

/// What the file has in all bytes of a page.
fn mark(page: u64) -> u8 {
    (page as u8).wrapping_add(1)
}

/// Memory of so many pages, of which these runs (first page, end) are a file's; the file, without which it lives on.
fn over(pages: u64, runs: &[(u64, u64)]) -> (GuestMemory, File) {
    let config = MachineConfig::minimal(pages * PAGE).memory;
    let memory = GuestMemory::create(&config).unwrap();
    let file = tempfile::tempfile().unwrap();
    for page in 0..pages {
        let at = (page + 1) * PAGE;
        file.write_all_at(&[mark(page); PAGE as usize], at).unwrap();
    }
    let runs: Vec<_> = runs
        .iter()
        .map(|(first, end)| first * PAGE..end * PAGE)
        .collect();
    let rest = memory.lay_over(&config, &file, PAGE, &runs).unwrap();
    assert!(rest.is_empty());
    (memory, file)
}

fn byte(memory: &GuestMemory, page: u64) -> u8 {
    memory.read_obj(GuestAddress(page * PAGE + 5)).unwrap()
}

/// The same as a stream reads it.
fn streamed(memory: &GuestMemory, page: u64) -> u8 {
    let mut byte = [0];
    assert_eq!(memory.read_at(&mut byte, page * PAGE + 5).unwrap(), 1);
    byte[0]
}

#[test]
fn what_is_laid_is_the_files_until_it_is_written_to_and_the_rest_is_not() {
    let (memory, file) = over(8, &[(1, 3)]);
    let found: Vec<u8> = (0..8).map(|page| byte(&memory, page)).collect();
    assert_eq!(found, [0, 2, 3, 0, 0, 0, 0, 0]);
    memory.write_obj(77u8, GuestAddress(2 * PAGE + 5)).unwrap();
    assert_eq!([1, 2].map(|page| byte(&memory, page)), [2, 77]);
    assert_eq!([1, 2].map(|page| streamed(&memory, page)), [2, 77]);
    let mut kept = [0; 8];
    file.read_exact_at(&mut kept, 3 * PAGE).unwrap();
    assert_eq!(kept, [3; 8], "the file is as it was");
    // Across the border of what is laid, in one piece.
    let mut bytes = vec![9; 4 * PAGE as usize];
    assert_eq!(memory.read_at(&mut bytes, 0).unwrap(), bytes.len());
    assert_eq!(
        [5, 4096, 8192, 8197, 12288].map(|at| bytes[at]),
        [0, 2, 3, 77, 0]
    );
    assert_eq!(
        memory.read_at(&mut bytes, 7 * PAGE).unwrap(),
        4096,
        "to its end"
    );
}

#[test]
fn reading_what_is_not_there_makes_nothing() {
    let (memory, _file) = over(4096, &[(0, 1)]);
    let mut bytes = vec![9; 4096 * PAGE as usize];
    assert_eq!(memory.read_at(&mut bytes, 0).unwrap(), bytes.len());
    assert_eq!(rustix::fs::fstat(&memory).unwrap().st_blocks, 0);
    let present = memory.present().unwrap();
    assert_eq!(present.count(), 1);
}

/// The file's content would come back, if pages were dropped.
#[test]
fn what_is_given_back_is_zero_however_it_is_cut() {
    let (memory, file) = over(32, &[(0, 32)]);
    memory.write_obj(77u8, GuestAddress(6 * PAGE + 5)).unwrap();
    for (page, pages) in [(5, 2), (8, 1), (7, 1), (0, 1), (31, 1), (4, 6)] {
        let given = memory.give_back(page * PAGE, pages * PAGE).unwrap();
        assert_eq!(given, pages * PAGE);
    }
    let gone = |page: u64| matches!(page, 0 | 4..10 | 31);
    for page in 0..32 {
        let wanted = if gone(page) { 0 } else { mark(page) };
        assert_eq!(streamed(&memory, page), wanted, "page {page}");
    }
    assert_eq!(
        memory.over.extents(),
        [PAGE..4 * PAGE, 10 * PAGE..31 * PAGE]
    );
    let blocks = |pages: &[(u64, crate::stream::Mask)]| {
        pages.iter().map(|(_, mask)| mask.0).collect::<Vec<_>>()
    };
    let present: Vec<_> = memory.present().unwrap().blocks().collect();
    assert_eq!(blocks(&present), [0xfc0e, 0x7fff]);
    // Written to again it is the memfd's, as any memory.
    memory.write_obj(9u8, GuestAddress(5 * PAGE + 5)).unwrap();
    assert_eq!([4, 5, 6].map(|page| byte(&memory, page)), [0, 9, 0]);
    assert!(memory.is_made_of(&file).unwrap());
    memory.give_back(0, 32 * PAGE).unwrap();
    assert!(memory.is_settled() && !memory.is_made_of(&file).unwrap());
    assert_eq!((0..32).map(|page| byte(&memory, page)).max(), Some(0));
}

/// A guest that gives back every other page costs no more mappings than there are.
#[test]
fn a_guest_that_cuts_it_into_too_many_pieces_reads_zeros_all_the_same() {
    let pages = 4 * MOST as u64;
    let (memory, _file) = over(pages, &[(0, pages)]);
    let mut kept = 0;
    for page in (0..pages).step_by(2) {
        kept += PAGE - memory.give_back(page * PAGE, PAGE).unwrap();
    }
    assert!(memory.over.extents().len() <= MOST);
    assert!(kept > 0, "the test is about pages that are kept");
    let check = || {
        for page in 0..pages {
            let wanted = if page % 2 == 0 { 0 } else { mark(page) };
            let found = (byte(&memory, page), streamed(&memory, page));
            assert_eq!(found, (wanted, wanted), "page {page}");
        }
    };
    check();
    // Some of the pieces are read: as many others can be cut.
    assert!(memory.wants_room() && !memory.wants_room());
    memory.make_room(LONG).unwrap();
    assert!(!memory.wants_room());
    let left = memory.over.extents().len();
    assert!((1..=MOST / 2 + 1).contains(&left), "{left}");
    check();
    for page in (pages - MOST as u64 / 2..pages).step_by(2) {
        assert_eq!(memory.give_back(page * PAGE, PAGE).unwrap(), PAGE);
    }
    check();
    // Where each takes long it is one at least.
    let before = memory.over.extents().len();
    memory.make_room(Duration::ZERO).unwrap();
    assert_eq!(memory.over.extents().len(), before - 1);
    check();
    // In larger pieces it goes all the same.
    assert_eq!(memory.give_back(0, pages * PAGE).unwrap(), pages * PAGE);
    assert!(memory.is_settled());
}

#[test]
fn no_more_is_read_to_have_fewer_pieces_than_a_guest_can_stand_still_for() {
    let extents = [0..9, 10..12, 20..21, 30..39, 40..42];
    let found = |most, bytes| smallest(&extents, most, bytes);
    assert_eq!(found(9, 5), [20..21, 10..12, 40..42]);
    assert_eq!(found(9, 4), [20..21, 10..12]);
    assert_eq!(found(2, 99), [20..21, 10..12]);
    assert!(found(9, 0).is_empty());
    // Pieces that are large are not read at all, and nobody asks again.
    let pages = THINNED / PAGE;
    let (memory, _file) = over(pages, &[(0, pages)]);
    memory.over.write().room = Room::Wanting;
    assert!(memory.wants_room());
    memory.make_room(LONG).unwrap();
    assert!(!memory.is_settled() && !memory.wants_room());
}

#[test]
fn settled_memory_is_all_in_its_descriptor_and_needs_no_file() {
    let (memory, file) = over(38, &[(1, 3), (35, 38)]);
    memory.write_obj(77u8, GuestAddress(36 * PAGE + 5)).unwrap();
    memory.give_back(37 * PAGE, PAGE).unwrap();
    memory.settle().unwrap();
    assert!(memory.is_settled());
    file.set_len(0).unwrap();
    let wanted = |page| match page {
        1 | 2 | 35 => mark(page),
        36 => 77,
        _ => 0,
    };
    let mut bytes = vec![0; 38 * PAGE as usize];
    memory.file().read_exact_at(&mut bytes, 0).unwrap();
    for page in 0..38 {
        let of_file = bytes[(page * PAGE + 5) as usize];
        let found = (byte(&memory, page), of_file);
        assert_eq!(found, (wanted(page), wanted(page)), "page {page}");
    }
}

/// What lies between two runs takes memory neither before nor afterwards.
#[test]
fn holes_between_what_is_laid_stay_holes_when_it_is_settled() {
    let pages = 64;
    let config = MachineConfig::minimal(pages * PAGE).memory;
    let memory = GuestMemory::create(&config).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len((pages + 1) * PAGE).unwrap();
    let runs: Vec<_> = (0..pages)
        .step_by(4)
        .map(|page| page * PAGE..(page + 1) * PAGE)
        .collect();
    for run in &runs {
        file.write_all_at(&[7; PAGE as usize], run.start + PAGE)
            .unwrap();
    }
    assert!(
        memory
            .lay_over(&config, &file, PAGE, &runs)
            .unwrap()
            .is_empty()
    );
    // Behind the last of them it is the memfd's, which has what is read.
    let laid = 0..pages - 3;
    assert_eq!(laid.map(|page| byte(&memory, page)).max(), Some(7));
    memory.settle().unwrap();
    let there = memory.present().unwrap();
    assert_eq!(there.count(), runs.len() as u64);
    for page in 0..pages {
        let wanted = if page % 4 == 0 { 7 } else { 0 };
        assert_eq!(
            (byte(&memory, page), streamed(&memory, page)),
            (wanted, wanted),
            "page {page}"
        );
    }
}

/// A page of tmpfs that was read is there ever after, though nobody has written to it.
#[test]
fn touching_all_of_memory_fills_no_holes_of_a_file_on_tmpfs() {
    let pages = 64;
    let config = MachineConfig::minimal(pages * PAGE).memory;
    let memory = GuestMemory::create(&config).unwrap();
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("a file on tmpfs", flags).unwrap());
    file.set_len((pages + 1) * PAGE).unwrap();
    let runs: Vec<_> = (0..pages)
        .step_by(4)
        .map(|page| page * PAGE..(page + 1) * PAGE)
        .collect();
    for run in &runs {
        file.write_all_at(&[7; PAGE as usize], run.start + PAGE)
            .unwrap();
    }
    let blocks = || rustix::fs::fstat(&file).unwrap().st_blocks;
    let before = blocks();
    assert!(
        memory
            .lay_over(&config, &file, PAGE, &runs)
            .unwrap()
            .is_empty()
    );
    for page in 0..pages {
        let wanted = if page % 4 == 0 { 7 } else { 0 };
        assert_eq!(byte(&memory, page), wanted, "page {page}");
    }
    assert_eq!(blocks(), before);
    assert_eq!(memory.over.extents(), runs);
}

/// A file of which only pages here and there are no holes, each far from the next, costs no more mappings than another.
#[test]
fn of_too_many_pieces_the_largest_are_laid_and_the_rest_is_told() {
    let (stride, count) = (32, MOST_LAID as u64 + 10);
    let config = MachineConfig::minimal(stride * count * PAGE).memory;
    let memory = GuestMemory::create(&config).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len((stride * count + 1) * PAGE).unwrap();
    // Every hundredth is the smallest there is.
    let pages = |piece: u64| if piece % 100 == 99 { 1 } else { 2 };
    let runs: Vec<_> = (0..count)
        .map(|piece| piece * stride * PAGE..(piece * stride + pages(piece)) * PAGE)
        .collect();
    let rest = memory.lay_over(&config, &file, PAGE, &runs).unwrap();
    assert_eq!(memory.over.extents().len(), MOST_LAID);
    let small: Vec<_> = (runs.iter())
        .filter(|run| run.end - run.start == PAGE)
        .cloned()
        .collect();
    assert_eq!(rest, small);
}

#[test]
fn cleared_memory_is_zero_takes_no_room_and_needs_no_file() {
    let (memory, file) = over(64, &[(0, 40)]);
    for page in [3, 50] {
        memory.write_obj(77u8, GuestAddress(page * PAGE)).unwrap();
    }
    memory.clear().unwrap();
    file.set_len(0).unwrap();
    assert!(memory.is_settled());
    assert_eq!(rustix::fs::fstat(&memory).unwrap().st_blocks, 0);
    assert_eq!((0..64).map(|page| byte(&memory, page)).max(), Some(0));
}

#[test]
fn what_is_loaded_over_it_is_there() {
    use crate::stream::Target;
    let (memory, _file) = over(8, &[(1, 3)]);
    let page = |byte| vec![byte; PAGE as usize];
    memory.put(&page(70), PAGE).unwrap();
    memory.put(&page(71), 4 * PAGE).unwrap();
    Target::clear(&memory, 2 * PAGE, PAGE).unwrap();
    let found: Vec<u8> = (0..6).map(|page| byte(&memory, page)).collect();
    assert_eq!(found, [0, 70, 0, 0, 71, 0]);
}

#[test]
fn above_the_hole_it_lies_at_its_own_place_and_nowhere_beyond_memory() {
    use crate::layout::{HOLE_END, HOLE_START};
    let config = MachineConfig::minimal(HOLE_START + 4 * PAGE).memory;
    let memory = GuestMemory::create(&config).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(HOLE_START + 5 * PAGE).unwrap();
    for (page, byte) in [(HOLE_START - PAGE, 1), (HOLE_START, 2)] {
        file.write_all_at(&[byte; PAGE as usize], PAGE + page)
            .unwrap();
    }
    let lay = |end| {
        let run = HOLE_START - PAGE..end;
        memory
            .lay_over(&config, &file, PAGE, std::slice::from_ref(&run))
            .map(|rest| assert!(rest.is_empty()))
    };
    lay(HOLE_START + PAGE).unwrap();
    let byte = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
    assert_eq!(
        [HOLE_START - 1, HOLE_END, HOLE_END + PAGE].map(byte),
        [1, 2, 0]
    );
    assert_eq!(memory.over.extents().len(), 2, "one in each part");
    assert!(lay(HOLE_START + 5 * PAGE).is_err());
}
