//! What is owed, with real userfaultfd: who touches it, what comes, and what is given back meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::GuestMemory;
use super::*;
use crate::config::{MemoryConfig, PageSize};

const MEMORY: u64 = 4 << 20;
const PAGES: u64 = MEMORY / PAGE as u64;

fn memory() -> GuestMemory {
    GuestMemory::create(&MemoryConfig {
        bytes: MEMORY,
        pages: PageSize::Small,
        host_nodes: Vec::new(),
    })
    .unwrap()
}

fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
    let mut set = PageSet::new(MEMORY);
    for page in pages {
        set.add_range(page * PAGE as u64, (page + 1) * PAGE as u64);
    }
    set
}

fn byte_at(memory: &GuestMemory, page: u64) -> u8 {
    memory
        .read_obj(GuestAddress(page * PAGE as u64 + 5))
        .unwrap()
}

fn filled(value: u8) -> Vec<u8> {
    vec![value; PAGE]
}

/// Answers touches until it is told to stop; the blocks that were wanted.
fn answering(owed: &Arc<Owed>, stop: &Arc<AtomicBool>) -> std::thread::JoinHandle<Vec<u64>> {
    let (owed, stop) = (Arc::clone(owed), Arc::clone(stop));
    std::thread::spawn(move || {
        let mut wanted = Vec::new();
        while !stop.load(Ordering::Acquire) {
            match owed.next_wanted().unwrap() {
                Some(number) => wanted.push(number),
                None => std::thread::yield_now(),
            }
        }
        wanted
    })
}

#[test]
fn so_many_ranges_are_registered_at_most_and_hold_all() {
    let pages = set((0..PAGES).filter(|page| page % 40 == 3));
    for most in [1, 2, 5, 64] {
        let ranges = ranges_of(&pages, most);
        assert!(ranges.len() <= most, "{most}: {}", ranges.len());
        for (number, _) in pages.blocks() {
            let start = number * BLOCK as u64;
            assert!(ranges.iter().any(|range| range.contains(&start)));
        }
    }
    let one = ranges_of(&set([16, 17, 70]), 9);
    assert_eq!(one.len(), 2, "what lies between is left out");
    assert!(ranges_of(&PageSet::new(MEMORY), 9).is_empty());
}

#[test]
fn who_touches_a_page_that_is_owed_gets_what_comes() {
    let memory = memory();
    Target::put(&memory, &filled(1), 33 * PAGE as u64).unwrap();
    let owed = memory.owe(Faults::open().unwrap(), set([33, 34])).unwrap();
    assert!(!memory.is_whole());
    let stop = Arc::default();
    let answers = answering(&owed, &stop);
    let touching = {
        let memory = memory.clone();
        std::thread::spawn(move || (byte_at(&memory, 33), byte_at(&memory, 34)))
    };
    let by = Instant::now() + Duration::from_secs(30);
    // sleeps because it is to be waited for
    std::thread::sleep(Duration::from_millis(50));
    assert!(!touching.is_finished() && Instant::now() < by);
    // A neighbour in the block is nobody's to wait for.
    assert_eq!(byte_at(&memory, 35), 0);
    Target::put(&*owed, &filled(7), 33 * PAGE as u64).unwrap();
    Target::clear(&*owed, 34 * PAGE as u64, PAGE as u64).unwrap();
    assert_eq!(touching.join().unwrap(), (7, 0));
    assert_eq!(owed.count(), 0);
    assert_eq!(owed.empty().take(), 1);
    stop.store(true, Ordering::Release);
    assert!(answers.join().unwrap().contains(&2));
    memory.owe_nothing().unwrap();
    assert!(memory.is_whole());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Pages that are given back read as zero, whether they had come, come later, or were never owed; what was owed reads
    /// as what came, and everything else as it was.
    #[test]
    fn pages_that_are_given_back_are_zero(
        before in prop::collection::btree_set(0..PAGES, 0..60),
        owes in prop::collection::btree_set(0..PAGES, 1..60),
        early in prop::collection::btree_set(0..PAGES, 0..30),
        given in prop::collection::vec((0..PAGES, 1..40u64), 0..4),
        touched in prop::collection::btree_set(0..PAGES, 0..30),
    ) {
        let memory = memory();
        for page in &before {
            Target::put(&memory, &filled(1), page * PAGE as u64).unwrap();
        }
        let owed = memory.owe(Faults::open().unwrap(), set(owes.iter().copied())).unwrap();
        let stop = Arc::default();
        let answers = answering(&owed, &stop);
        let touching: Vec<_> = touched
            .iter()
            .map(|page| {
                let (memory, page) = (memory.clone(), *page);
                std::thread::spawn(move || byte_at(&memory, page))
            })
            .collect();
        let come = |page: &u64| Target::put(&*owed, &filled(2), page * PAGE as u64).unwrap();
        early.iter().for_each(come);
        let mut zero = std::collections::BTreeSet::new();
        for (first, count) in &given {
            let count = (*count).min(PAGES - first);
            memory.give_back(first * PAGE as u64, count * PAGE as u64).unwrap();
            zero.extend(*first..first + count);
        }
        owes.iter().for_each(come);
        prop_assert_eq!(owed.count(), 0);
        for touching in touching {
            touching.join().unwrap();
        }
        for page in 0..PAGES {
            let wanted = match (zero.contains(&page), owes.contains(&page), before.contains(&page)) {
                (true, ..) => 0,
                (false, true, _) => 2,
                (false, false, true) => 1,
                (false, false, false) => 0,
            };
            prop_assert_eq!(byte_at(&memory, page), wanted, "page {}", page);
        }
        stop.store(true, Ordering::Release);
        answers.join().unwrap();
        memory.owe_nothing().unwrap();
    }
}
