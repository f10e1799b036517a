//! Sets of pages of a machine's memory, as logs of writes are.

use crate::stream::{Mask, PAGE};

/// Pages of 4 KiB, by their number in the memfd.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    /// None of so many bytes of memory.
    pub fn new(bytes: u64) -> Self {
        let words = bytes.div_ceil(PAGE as u64 * 64) as usize;
        PageSet {
            words: vec![0; words],
        }
    }

    /// Adds the pages of a log that begins at `offset` in the memfd, which is one of 64 whole pages; what lies
    /// beyond the memory is left out.
    pub fn add(&mut self, offset: u64, log: &[u64]) {
        let first = (offset / (PAGE as u64 * 64)) as usize;
        let words = self.words.get_mut(first..).unwrap_or_default();
        for (word, more) in words.iter_mut().zip(log) {
            *word |= more;
        }
    }

    /// Adds all pages of a range of the memfd; what lies beyond the memory is left out.
    pub fn add_range(&mut self, start: u64, end: u64) {
        for page in start / PAGE as u64..end.div_ceil(PAGE as u64) {
            if let Some(word) = self.words.get_mut((page / 64) as usize) {
                *word |= 1 << (page % 64);
            }
        }
    }

    /// 64 pages each, the first in the lowest bit.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Takes the pages before an offset in the memfd, of 64 whole ones, away: those.
    pub fn take_before(&mut self, end: u64) -> PageSet {
        let count = (end / (PAGE as u64 * 64)) as usize;
        let mut taken = PageSet {
            words: vec![0; self.words.len()],
        };
        let both = self.words.iter_mut().zip(&mut taken.words);
        for (word, taken) in both.take(count) {
            *taken = std::mem::take(word);
        }
        taken
    }

    /// Keeps those that are in the other set as well.
    pub fn keep(&mut self, other: &PageSet) {
        let others = other.words.iter().copied().chain(std::iter::repeat(0));
        for (word, other) in self.words.iter_mut().zip(others) {
            *word &= other;
        }
    }

    /// Takes those away that are in the other set as well.
    pub fn remove(&mut self, other: &PageSet) {
        for (word, other) in self.words.iter_mut().zip(&other.words) {
            *word &= !other;
        }
    }

    /// Adds the pages of another set.
    pub fn join(&mut self, other: &PageSet) {
        self.add(0, &other.words);
    }

    /// The first block from this number on that has any.
    pub fn block_from(&self, number: u64) -> Option<(u64, Mask)> {
        let first = (number / 4) as usize;
        let words = self.words.get(first..)?;
        let before = (number % 4) * 16;
        let head = words.first()? >> before << before;
        let (index, word) = match head {
            0 => {
                let at = words.iter().skip(1).position(|word| *word != 0)? + 1;
                (at, *words.get(at)?)
            }
            head => (0, head),
        };
        let part = u64::from(word.trailing_zeros()) / 16;
        let number = (first + index) as u64 * 4 + part;
        Some((number, Mask((word >> (part * 16)) as u16)))
    }

    /// Those of a block.
    pub fn of_block(&self, number: u64) -> Mask {
        let word = self.words.get((number / 4) as usize);
        Mask((word.copied().unwrap_or_default() >> (number % 4 * 16)) as u16)
    }

    /// Takes these of a block away; those of them that were there.
    pub fn take(&mut self, number: u64, mask: Mask) -> Mask {
        let taken = self.of_block(number).and(mask);
        if let Some(word) = self.words.get_mut((number / 4) as usize) {
            *word &= !(u64::from(taken.0) << (number % 4 * 16));
        }
        taken
    }

    /// How many pages.
    pub fn count(&self) -> u64 {
        self.words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum()
    }

    /// By number of their block, in ascending order.
    pub fn blocks(&self) -> impl Iterator<Item = (u64, Mask)> {
        let words = (0u64..).zip(&self.words);
        words.flat_map(|(index, word)| {
            let blocks =
                (0..4).map(move |part| (index * 4 + part, Mask((word >> (part * 16)) as u16)));
            blocks.filter(|(_, mask)| !mask.is_empty())
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn blocks_are_found_one_after_the_other(
            pages in prop::collection::btree_set(0..4096u64, 0..40),
        ) {
            let mut set = PageSet::new(4096 * PAGE as u64);
            for page in &pages {
                set.add_range(page * PAGE as u64, (page + 1) * PAGE as u64);
            }
            let (mut at, mut found) = (0, Vec::new());
            while let Some((number, mask)) = set.block_from(at) {
                found.push((number, mask));
                at = number + 1;
            }
            prop_assert_eq!(found, set.blocks().collect::<Vec<_>>());
        }

        #[test]
        fn a_set_has_just_the_pages_of_its_logs(
            logs in prop::collection::vec((0..6u64, prop::collection::vec(any::<u64>(), 0..4)), 0..5),
        ) {
            const PAGES: u64 = 5 * 64;
            let mut set = PageSet::new(PAGES * PAGE as u64);
            let mut wanted = BTreeSet::new();
            for (first, log) in &logs {
                set.add(first * 64 * PAGE as u64, log);
                let bits = (0..log.len() as u64 * 64).filter(|bit| log[(bit / 64) as usize] >> (bit % 64) & 1 == 1);
                wanted.extend(bits.map(|bit| first * 64 + bit).filter(|page| *page < PAGES));
            }
            prop_assert_eq!(set.count(), wanted.len() as u64);
            let found: Vec<u64> = set
                .blocks()
                .flat_map(|(block, mask)| {
                    (0..16).filter(move |bit| mask.0 >> bit & 1 == 1).map(move |bit| block * 16 + bit)
                })
                .collect();
            prop_assert!(found.iter().eq(&wanted));
        }
    }
}
