//! Bytes of which most are zero, written small: their number (8), then what is not zero, each piece with its place (8)
//! and its length (4), little-endian.
//!
//! For the golden streams and the seeds of the receiver's fuzz target: a machine's memory and state are zero for the
//! most part, and so is a snapshot's file.

/// Bytes of a piece's place and length.
const HEAD: usize = 12;

/// Writes `bytes` small.
#[cfg(test)]
pub(crate) fn squeezed(bytes: &[u8]) -> Vec<u8> {
    let mut out = (bytes.len() as u64).to_le_bytes().to_vec();
    let mut at = 0;
    while let Some(start) = bytes[at..].iter().position(|byte| *byte != 0) {
        let start = at + start;
        // So many zeros cost more than a new piece.
        let zeros = bytes[start..].windows(HEAD + 1);
        let end = zeros.into_iter().position(|some| some == [0; HEAD + 1]);
        let end = end.map_or(bytes.len(), |end| start + end);
        out.extend((start as u64).to_le_bytes());
        out.extend(((end - start) as u32).to_le_bytes());
        out.extend(&bytes[start..end]);
        at = end;
    }
    out
}

/// How many bytes there are, and the pieces with their places. Of what nobody squeezed it gives what it can.
pub(crate) fn pieces(squeezed: &[u8]) -> (u64, impl Iterator<Item = (u64, &[u8])>) {
    let (length, mut rest) = squeezed.split_first_chunk().unwrap_or((&[0; 8], &[]));
    let pieces = std::iter::from_fn(move || {
        let ([place @ .., a, b, c, d], behind) = rest.split_first_chunk::<HEAD>()?;
        let length = u32::from_le_bytes([*a, *b, *c, *d]) as usize;
        let (piece, behind) = behind.split_at(length.min(behind.len()));
        rest = behind;
        Some((u64::from_le_bytes(*place), piece))
    });
    (u64::from_le_bytes(*length), pieces)
}

/// All bytes, at most `most`; pieces that lie beyond are left out.
pub(crate) fn spread(squeezed: &[u8], most: usize) -> Vec<u8> {
    let (length, pieces) = pieces(squeezed);
    let mut bytes = vec![0; length.min(most as u64) as usize];
    for (place, piece) in pieces {
        let place = usize::try_from(place).unwrap_or(usize::MAX);
        let end = place.saturating_add(piece.len());
        if let Some(target) = bytes.get_mut(place..end) {
            target.copy_from_slice(piece);
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_was_squeezed_is_spread(pieces in prop::collection::vec((0..40usize, prop::collection::vec(any::<u8>(), 0..9)), 0..20)) {
            let mut bytes = Vec::new();
            for (zeros, piece) in pieces {
                bytes.resize(bytes.len() + zeros, 0);
                bytes.extend(piece);
            }
            prop_assert_eq!(spread(&squeezed(&bytes), usize::MAX), bytes);
        }

        #[test]
        fn no_bytes_panic_or_take_more_than_they_may(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            prop_assert!(spread(&bytes, 1000).len() <= 1000);
        }
    }
}
