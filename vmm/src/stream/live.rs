//! Memory and disks on their way between two processes: frames of pages, each with its place.
//!
//! A frame of blocks of a disk begins with the disk's number (4, little-endian); then it is as one of memory, which is a sequence of entries: number of the block (4), pages that follow (2), pages that are zero (2),
//! little-endian, then the pages that follow, each whole, in ascending order.

use serde::{Deserialize, Serialize};

use super::pages::PAGES;
use super::{BLOCK, Mask, PAGE, StreamError, Target, Totals, io, malformed};
use crate::memory::PageSet;

/// Bytes before an entry's pages.
const ENTRY: usize = 8;
/// Blocks in a frame: a megabyte.
const BLOCKS: usize = 16;

/// The last frame of a live stream: what there was in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    pub memory: Totals,
    pub disks: Totals,
    /// The guest ran where it was, and is to run where it comes to.
    pub ran: bool,
}

/// Bytes of a disk's number.
const NUMBER: usize = 4;

/// A frame that is being filled: of memory, or of a disk.
#[derive(Default)]
pub struct Batch {
    payload: Vec<u8>,
    /// Of these, what stands before the first entry.
    head: usize,
    blocks: usize,
    totals: Totals,
}

impl Batch {
    /// Of the disk of this number.
    pub fn of_disk(number: u32) -> Self {
        Batch {
            payload: number.to_le_bytes().to_vec(),
            head: NUMBER,
            ..Batch::default()
        }
    }

    /// Adds the pages of `mask`, of block `number`; `content` has them behind each other, each whole. Where nothing
    /// was sent before (`fresh`), pages that are zero are not spoken of.
    pub fn add(&mut self, number: u32, mask: Mask, content: &[u8], fresh: bool) {
        let mut there = Mask::default();
        for (page, content) in pages(mask).zip(content.chunks(PAGE)) {
            if !Mask::with_content(content).is_empty() {
                there.0 |= 1 << page;
            }
        }
        let zero = match fresh {
            true => Mask::default(),
            false => mask.without(there),
        };
        if there.is_empty() && zero.is_empty() {
            return;
        }
        self.payload.extend_from_slice(&number.to_le_bytes());
        self.payload.extend_from_slice(&there.0.to_le_bytes());
        self.payload.extend_from_slice(&zero.0.to_le_bytes());
        for (page, content) in pages(mask).zip(content.chunks(PAGE)) {
            if there.0 >> page & 1 == 1 {
                self.payload.extend_from_slice(content);
            }
        }
        self.blocks += 1;
        self.totals.pages += there.count();
        self.totals.zeros += zero.count();
    }

    pub fn is_full(&self) -> bool {
        self.blocks >= BLOCKS
    }

    /// The frame's payload, if there is anything in it; the batch is empty afterwards, when [`Batch::clear`]ed.
    pub fn payload(&self) -> Option<&[u8]> {
        (self.blocks > 0).then_some(&self.payload)
    }

    pub fn totals(&self) -> Totals {
        self.totals
    }

    pub fn clear(&mut self) {
        self.payload.truncate(self.head);
        self.blocks = 0;
        self.totals = Totals::default();
    }
}

/// The disk's number, and the rest, of a frame of blocks.
pub fn of_disk(payload: &[u8]) -> Result<(u32, &[u8]), StreamError> {
    let (number, rest) = (payload.split_first_chunk::<NUMBER>())
        .ok_or_else(|| malformed("a frame of blocks without a disk"))?;
    Ok((u32::from_le_bytes(*number), rest))
}

/// Words of 64 pages in a frame that names pages.
const WORDS: usize = 1 << 16;

/// Payloads of frames that name pages: the first (8, little-endian, of 64 whole ones), then a bit for each.
pub fn owed(pages: &PageSet) -> Vec<Vec<u8>> {
    let mut payloads = Vec::new();
    for (index, words) in (0u64..).zip(pages.words().chunks(WORDS)) {
        let end = words.iter().rposition(|word| *word != 0);
        let Some(words) = end.and_then(|end| words.get(..=end)) else {
            continue;
        };
        let first = index * WORDS as u64 * 64;
        let mut payload = first.to_le_bytes().to_vec();
        payload.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        payloads.push(payload);
    }
    payloads
}

/// Payloads that name pages of such a set, at most.
pub fn most_names(pages: &PageSet) -> usize {
    pages.words().len().div_ceil(WORDS)
}

/// Adds the pages that such a payload names.
pub fn add_owed(payload: &[u8], pages: &mut PageSet) -> Result<(), StreamError> {
    let damaged = || malformed("pages that come later, and are none");
    let (first, rest) = payload.split_first_chunk::<8>().ok_or_else(damaged)?;
    let first = u64::from_le_bytes(*first);
    let (words, rest) = rest.as_chunks::<8>();
    let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
    let room = pages.words().len() as u64;
    let end = (first / 64).checked_add(words.len() as u64);
    let fits = first.is_multiple_of(64) && end.is_some_and(|end| end <= room);
    if words.is_empty() || !rest.is_empty() || !fits {
        return Err(damaged());
    }
    pages.add(first * PAGE as u64, &words);
    Ok(())
}

/// Numbers of the pages of a mask.
fn pages(mask: Mask) -> impl Iterator<Item = usize> {
    (0..PAGES).filter(move |page| mask.0 >> page & 1 == 1)
}

/// Puts a frame of pages into `memory`, which has `length` bytes; what it held.
/// A disk's last page may reach beyond it.
///
/// # Errors
/// It is not what [`Batch`] writes, or speaks of pages that the machine does not have; then `memory` is in no state to
/// be used.
pub fn put(payload: &[u8], memory: &impl Target, length: u64) -> Result<Totals, StreamError> {
    let mut totals = Totals::default();
    let mut rest = payload;
    while !rest.is_empty() {
        let (head, behind) = (rest.split_first_chunk::<ENTRY>())
            .ok_or_else(|| malformed("a frame of pages that ends within an entry"))?;
        let [n0, n1, n2, n3, t0, t1, z0, z1] = *head;
        let number = u32::from_le_bytes([n0, n1, n2, n3]);
        let (there, zero) = (
            Mask(u16::from_le_bytes([t0, t1])),
            Mask(u16::from_le_bytes([z0, z1])),
        );
        let start = u64::from(number) * BLOCK as u64;
        let has = (length.saturating_sub(start) / PAGE as u64).min(PAGES as u64) as u32;
        let all = Mask(u16::MAX.checked_shr(PAGES as u32 - has).unwrap_or(0));
        let (either, both) = (there.0 | zero.0, there.0 & zero.0);
        if either == 0 || !Mask(either).without(all).is_empty() || both != 0 {
            return Err(malformed(
                "no pages, twice, or pages that the machine does not have",
            ));
        }
        rest = behind;
        for run in there.runs() {
            let (content, behind) = (rest.split_at_checked(run.len()))
                .ok_or_else(|| malformed("a frame of pages that ends within a page"))?;
            let put = memory.put(content, start + run.start as u64);
            put.map_err(io("put the memory of"))?;
            rest = behind;
        }
        for run in zero.runs() {
            let cleared = memory.clear(start + run.start as u64, run.len() as u64);
            cleared.map_err(io("clear the memory of"))?;
        }
        totals.pages += there.count();
        totals.zeros += zero.count();
    }
    Ok(totals)
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use proptest::prelude::*;

    use super::*;

    /// Memory that is a vector.
    struct Plain(RefCell<Vec<u8>>);

    impl Target for Plain {
        fn length(&self) -> std::io::Result<u64> {
            Ok(self.0.borrow().len() as u64)
        }

        fn put(&self, bytes: &[u8], offset: u64) -> std::io::Result<()> {
            let offset = offset as usize;
            self.0.borrow_mut()[offset..offset + bytes.len()].copy_from_slice(bytes);
            Ok(())
        }

        fn clear(&self, offset: u64, length: u64) -> std::io::Result<()> {
            self.put(&vec![0; length as usize], offset)
        }
    }

    const MEMORY: usize = 3 * BLOCK + 5 * PAGE;

    /// Pages that are written, with their new content.
    fn writes() -> impl Strategy<Value = Vec<(usize, u8)>> {
        prop::collection::vec((0..MEMORY / PAGE, 0..3u8), 0..40)
    }

    fn apply(memory: &mut [u8], writes: &[(usize, u8)]) -> Vec<(u32, Mask)> {
        let mut masks = vec![Mask::default(); MEMORY.div_ceil(BLOCK)];
        for (page, value) in writes {
            memory[page * PAGE..(page + 1) * PAGE].fill(*value);
            masks[page / PAGES].0 |= 1 << (page % PAGES);
        }
        let all = (0u32..).zip(masks);
        all.filter(|(_, mask)| !mask.is_empty()).collect()
    }

    proptest! {
        #[test]
        fn pages_that_come_later_are_named(
            pages in prop::collection::btree_set(0..3 * WORDS as u64 * 64, 0..40),
            cut in 0..9usize,
        ) {
            let bytes = 3 * WORDS as u64 * 64 * PAGE as u64;
            let (mut set, mut read) = (PageSet::new(bytes), PageSet::new(bytes));
            for page in pages {
                set.add_range(page * PAGE as u64, (page + 1) * PAGE as u64);
            }
            for payload in owed(&set) {
                add_owed(&payload, &mut read).unwrap();
                let cut = payload.len() - cut;
                let whole = cut == payload.len() || (cut == payload.len() - 8 && cut > 8);
                let mut other = PageSet::new(bytes);
                prop_assert_eq!(add_owed(&payload[..cut], &mut other).is_ok(), whole);
                prop_assert!(add_owed(&payload, &mut PageSet::new(PAGE as u64)).is_err() || payload.len() == 16);
            }
            prop_assert_eq!(read, set);
        }

        #[test]
        fn what_was_sent_is_there(rounds in prop::collection::vec(writes(), 1..4)) {
            let mut source = vec![0; MEMORY];
            let target = Plain(vec![0; MEMORY].into());
            for (round, writes) in rounds.iter().enumerate() {
                let mut batch = Batch::default();
                for (number, mask) in apply(&mut source, writes) {
                    let start = number as usize * BLOCK;
                    let content: Vec<u8> = pages(mask)
                        .flat_map(|page| &source[start + page * PAGE..start + (page + 1) * PAGE])
                        .copied()
                        .collect();
                    batch.add(number, mask, &content, round == 0);
                }
                if let Some(payload) = batch.payload() {
                    let totals = put(payload, &target, MEMORY as u64).unwrap();
                    prop_assert_eq!(totals, batch.totals());
                    prop_assert!(put(&payload[..payload.len() - 1], &target, MEMORY as u64).is_err());
                    prop_assert!(put(payload, &target, 0).is_err());
                }
                prop_assert!(*target.0.borrow() == source);
            }
        }

        #[test]
        fn no_bytes_reach_beyond_memory(bytes in prop::collection::vec(any::<u8>(), 0..30), pages in 0..6usize) {
            let mut payload = bytes;
            payload.resize(payload.len() + pages * PAGE, 7);
            let _ = put(&payload, &Plain(vec![0; MEMORY].into()), MEMORY as u64);
        }
    }
}
