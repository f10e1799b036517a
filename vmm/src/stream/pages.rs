//! Pages and blocks of memory, and which pages of a block have content.

/// Bytes of a page, whatever the host's pages are.
pub const PAGE: usize = 4096;
/// Bytes of a block.
pub const BLOCK: usize = PAGE * PAGES;
/// Pages of a block: as many as a mask has bits.
pub const PAGES: usize = 16;

/// Some pages of a block: bit n for page n.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mask(pub u16);

impl Mask {
    /// The pages of `block` that are not zero. A last page that is not whole counts.
    pub fn with_content(block: &[u8]) -> Mask {
        let mut mask = 0;
        for (number, page) in block.chunks(PAGE).enumerate() {
            mask |= u16::from(!is_zero(page)) << number;
        }
        Mask(mask)
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub fn count(self) -> u64 {
        self.0.count_ones().into()
    }

    /// The pages that both have.
    pub fn and(self, other: Mask) -> Mask {
        Mask(self.0 & other.0)
    }

    pub fn without(self, other: Mask) -> Mask {
        Mask(self.0 & !other.0)
    }

    /// Neighbours together: first page and number of pages, in bytes of the block.
    pub fn runs(self) -> impl Iterator<Item = std::ops::Range<usize>> {
        let mut left = self.0;
        std::iter::from_fn(move || {
            if left == 0 {
                return None;
            }
            let first = left.trailing_zeros() as usize;
            let pages = (left >> first).trailing_ones() as usize;
            // A run of 16 is the whole mask.
            left &= u16::MAX.checked_shl((first + pages) as u32).unwrap_or(0);
            Some(first * PAGE..(first + pages) * PAGE)
        })
    }
}

fn is_zero(page: &[u8]) -> bool {
    let (words, rest) = page.as_chunks::<32>();
    // A page with content shows it in its first bytes as a rule; one without is read whole.
    words.iter().all(|word| *word == [0; 32]) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_mask_has_the_pages_with_content_and_runs_cover_just_those(
            bytes in prop::collection::vec((0..BLOCK, 1u8..), 0..12),
        ) {
            let mut block = vec![0; BLOCK];
            for (at, byte) in bytes {
                block[at] = byte;
            }
            let mask = Mask::with_content(&block);
            for (number, page) in block.chunks(PAGE).enumerate() {
                let has = page.iter().any(|byte| *byte != 0);
                prop_assert_eq!(mask.0 >> number & 1 == 1, has);
            }
            let mut covered = Mask::default();
            let mut end = None;
            for run in mask.runs() {
                prop_assert!(end.is_none_or(|end| end < run.start), "neighbours are one run");
                end = Some(run.end);
                for page in run.step_by(PAGE) {
                    covered.0 |= 1 << (page / PAGE);
                }
            }
            prop_assert_eq!(covered, mask);
        }
    }

    #[test]
    fn a_full_block_is_one_run() {
        assert!(Mask(u16::MAX).runs().eq(std::iter::once(0..BLOCK)));
        assert!(Mask(0x8000).runs().eq(std::iter::once(BLOCK - PAGE..BLOCK)));
        assert!(Mask(0).runs().next().is_none());
    }
}
