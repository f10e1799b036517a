//! A copy of a machine's root disk, for an image: what the agent is told, what it says of it, and how its bytes come.
//!
//! The intent names one copy ([`Wanted::copy`]). The agent makes it, of the disk as it is at one moment, while the guest
//! does what it does; says what became of it ([`CopyReport`]); and has it, under that name, until the intent does not
//! name it any more. Its bytes come as pieces ([`Piece`]): of holes nothing comes. Or the disk is made of it again, on
//! the same host ([`Wanted::restores`]).

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::machine::{Power, Wanted};

/// `PutMachine::version` of an intent that speaks of a copy: an agent that knows nothing of them would settle
/// without one.
pub const PUT_VERSION: u32 = 3;

/// Of an intent whose rebuild takes the disk from a copy, or of a machine that is kept for its server's way back: an agent
/// that knows nothing of that would make the disk of its image, or not say what it keeps.
pub const RESTORE_VERSION: u32 = 4;

/// One attempt to have a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CopyId(pub Uuid);

impl fmt::Display for CopyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.hyphenated().fmt(f)
    }
}

/// What became of the copy that the intent names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyReport {
    pub id: CopyId,
    pub state: CopyState,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum CopyState {
    /// It is being made, or will be.
    Copying,
    /// It is there, whole and on its disk; holes count.
    Made { bytes: u64 },
    /// There is none, and nothing is left of it. The guest is as before.
    Failed { reason: String },
}

/// What an agent knows of copies, as decisions see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Copies {
    /// It stands there whole.
    pub made: Option<CopyId>,
    /// The machine's process is at it.
    pub begun: Option<CopyId>,
    /// It could not be made under the intent that is held.
    pub failed: Option<CopyId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopyStep {
    Make(CopyId),
    /// Do away with those that are not wanted.
    Drop,
}

/// What is to be done about copies of a machine that is at rest otherwise. One that is to be absent goes with its
/// copies.
pub fn next(wanted: &Wanted, copies: &Copies) -> Option<CopyStep> {
    if wanted.power == Power::Absent {
        return None;
    }
    let mut there = [copies.made, copies.begun].into_iter().flatten();
    if there.any(|id| Some(id) != wanted.copy) {
        return Some(CopyStep::Drop);
    }
    let id = wanted.copy?;
    // It is what a disk is to be made of: of another moment it would be another's.
    if wanted.restores == Some(id) {
        return None;
    }
    let known = [copies.made, copies.begun, copies.failed].contains(&Some(id));
    (!known).then_some(CopyStep::Make(id))
}

/// Nothing is to be done about copies, and nothing is being done.
pub fn is_settled(wanted: &Wanted, copies: &Copies) -> bool {
    next(wanted, copies).is_none() && (copies.begun.is_none() || wanted.power == Power::Absent)
}

/// Bytes of a copy that follow each other. What lies between two pieces is zero.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    pub offset: u64,
    pub bytes: Bytes,
}

/// What comes of bytes that come as pieces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// What lies before it and has not come is zero.
    Piece(Piece),
    /// All has come: bytes of the whole.
    End(u64),
}

/// `Accept` and `Content-Type` of pieces, where the bytes could come as they are, too.
pub const PIECES: &str = "application/vnd.fractus.pieces";

/// Most bytes of a piece.
pub const MOST: usize = 1 << 20;
/// Offset (8 bytes) and length (4), both little-endian; a piece of no bytes is the end, and its offset the copy's
/// size.
const HEAD: usize = 12;

/// A piece on its way; `bytes` has at most [`MOST`], and at least one.
pub fn pack(offset: u64, bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::with_capacity(HEAD + bytes.len());
    packed.extend(offset.to_le_bytes());
    packed.extend((bytes.len() as u32).to_le_bytes());
    packed.extend(bytes);
    packed
}

/// After the last piece.
pub fn pack_end(size: u64) -> Vec<u8> {
    pack(size, &[])
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CopyError {
    #[error("a piece of {length} bytes at {offset}, after {before} bytes")]
    Malformed {
        offset: u64,
        length: u64,
        before: u64,
    },
    #[error("something follows its end")]
    Behind,
    #[error("it was cut off after {after} bytes")]
    Short { after: u64 },
}

/// Makes pieces of what comes, however it is cut.
#[derive(Debug, Default)]
pub struct Unpacker {
    rest: Vec<u8>,
    at: u64,
    size: Option<u64>,
}

impl Unpacker {
    /// The pieces that are whole now.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Vec<Piece>, CopyError> {
        self.rest.extend_from_slice(bytes);
        let (mut pieces, mut done) = (Vec::new(), 0);
        while let Some((head, rest)) = self
            .rest
            .get(done..)
            .and_then(|rest| rest.split_at_checked(HEAD))
        {
            if self.size.is_some() {
                return Err(CopyError::Behind);
            }
            let (offset, length) = read_head(head);
            let malformed = CopyError::Malformed {
                offset,
                length: length as u64,
                before: self.at,
            };
            let end = offset.checked_add(length as u64);
            let Some(end) = end.filter(|_| offset >= self.at && length <= MOST) else {
                return Err(malformed);
            };
            if length == 0 {
                self.size = Some(offset);
                done += HEAD;
                continue;
            }
            let Some(bytes) = rest.get(..length) else {
                break;
            };
            pieces.push(Piece {
                offset,
                bytes: Bytes::copy_from_slice(bytes),
            });
            self.at = end;
            done += HEAD + length;
        }
        if self.size.is_some() && done < self.rest.len() {
            return Err(CopyError::Behind);
        }
        self.rest.drain(..done);
        Ok(pieces)
    }

    /// Nothing more comes: bytes in all.
    pub fn finish(&self) -> Result<u64, CopyError> {
        self.size.ok_or(CopyError::Short { after: self.at })
    }
}

fn read_head(head: &[u8]) -> (u64, usize) {
    let (mut offset, mut length) = ([0; 8], [0; 4]);
    for (to, from) in offset.iter_mut().chain(&mut length).zip(head) {
        *to = *from;
    }
    (
        u64::from_le_bytes(offset),
        u32::from_le_bytes(length) as usize,
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::decision::tests::wanted;

    const ONE: CopyId = CopyId(Uuid::from_u128(1));
    const TWO: CopyId = CopyId(Uuid::from_u128(2));

    #[test]
    fn a_copy_is_made_once_and_goes_when_nobody_wants_it() {
        let mut wants = wanted(Power::Running, 0, 0, 0);
        let mut copies = Copies::default();
        assert_eq!(next(&wants, &copies), None);
        assert!(is_settled(&wants, &copies));
        wants.copy = Some(ONE);
        assert_eq!(next(&wants, &copies), Some(CopyStep::Make(ONE)));
        copies.begun = Some(ONE);
        assert_eq!(next(&wants, &copies), None);
        assert!(!is_settled(&wants, &copies));
        copies = Copies {
            made: Some(ONE),
            ..Copies::default()
        };
        assert!(is_settled(&wants, &copies));
        wants.copy = Some(TWO);
        assert_eq!(next(&wants, &copies), Some(CopyStep::Drop));
        copies = Copies {
            failed: Some(TWO),
            ..Copies::default()
        };
        assert!(is_settled(&wants, &copies));
        copies.begun = Some(ONE);
        wants.end();
        assert_eq!(next(&wants, &copies), None);
        assert!(is_settled(&wants, &copies));
    }

    proptest! {
        #[test]
        fn pieces_come_as_they_were_packed_however_they_are_cut(
            pieces in prop::collection::vec((0..100u64, prop::collection::vec(any::<u8>(), 1..50)), 0..20),
            cuts in prop::collection::vec(1..60usize, 1..40),
            behind in 0..100u64,
        ) {
            let (mut packed, mut given, mut at) = (Vec::new(), Vec::new(), 0);
            for (gap, bytes) in pieces {
                packed.extend(pack(at + gap, &bytes));
                let offset = at + gap;
                at = offset + bytes.len() as u64;
                given.push(Piece { offset, bytes: bytes.into() });
            }
            packed.extend(pack_end(at + behind));
            let mut unpacker = Unpacker::default();
            let (mut rest, mut came) = (packed.as_slice(), Vec::new());
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break; }
                prop_assert!(unpacker.finish().is_err());
                let (now, later) = rest.split_at(*cut.min(&rest.len()));
                came.extend(unpacker.push(now).unwrap());
                rest = later;
            }
            prop_assert_eq!(came, given);
            prop_assert_eq!(unpacker.finish(), Ok(at + behind));
            prop_assert_eq!(unpacker.push(&[0]), Err(CopyError::Behind));
        }

        #[test]
        fn whatever_comes_is_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Unpacker::default().push(&bytes);
        }
    }

    #[test]
    fn pieces_that_overlap_or_are_too_long_are_refused() {
        let mut unpacker = Unpacker::default();
        unpacker.push(&pack(10, b"abc")).unwrap();
        let overlapping = unpacker.push(&pack(12, b"d")).unwrap_err();
        assert!(matches!(overlapping, CopyError::Malformed { .. }));
        let mut long = pack(0, b"");
        long.splice(8..12, (MOST as u32 + 1).to_le_bytes());
        assert!(Unpacker::default().push(&long).is_err());
        assert!(Unpacker::default().push(&pack(u64::MAX, b"ab")).is_err());
    }
}
