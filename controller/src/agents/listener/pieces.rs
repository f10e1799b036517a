//! An image's bytes on their way to a host, without what is zero ([`fractus_agent_api::copy`]).

use std::io;
use std::time::{Duration, Instant};

use bytes::Bytes;
use fractus_agent_api::copy::{pack, pack_end};
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt};

/// Bytes that are looked at together.
const BLOCK: usize = 64 << 10;
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// After so many bytes of nothing, or after so long, some of them go all the same: whoever takes them waits for a sign of
/// life, and has to hash them.
const QUIET: u64 = 1 << 30;
const QUIET_TIME: Duration = Duration::from_secs(5);

/// What is left to be packed.
struct Left {
    bytes: BoxStream<'static, io::Result<Bytes>>,
    at: u64,
    size: u64,
    /// Zeros that did not go, since the last that went, and when that was.
    quiet: u64,
    went: Instant,
}

/// Pieces of an image of `size` bytes, of which these are those from `offset` on.
pub(super) fn pack_all(
    bytes: BoxStream<'static, io::Result<Bytes>>,
    offset: u64,
    size: u64,
) -> impl Stream<Item = io::Result<Bytes>> {
    let left = Left {
        bytes,
        at: offset,
        size,
        quiet: 0,
        went: Instant::now(),
    };
    stream::try_unfold(Some(left), |left| async move {
        match left {
            Some(left) => left.next().await.map(Some),
            None => Ok(None),
        }
    })
}

impl Left {
    /// The next that goes, and what is left then.
    async fn next(mut self) -> io::Result<(Bytes, Option<Self>)> {
        while let Some(chunk) = self.bytes.next().await {
            let packed = self.pack(&chunk?);
            if !packed.is_empty() {
                return Ok((packed.into(), Some(self)));
            }
        }
        if self.at != self.size {
            // What is missing is not zero.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok((pack_end(self.size).into(), None))
    }

    fn pack(&mut self, chunk: &[u8]) -> Vec<u8> {
        let mut packed = Vec::new();
        for block in chunk.chunks(BLOCK) {
            let is_zero = ZEROS.get(..block.len()) == Some(block);
            if is_zero && self.quiet < QUIET && self.went.elapsed() < QUIET_TIME {
                self.quiet += block.len() as u64;
            } else {
                packed.extend(pack(self.at, block));
                (self.quiet, self.went) = (0, Instant::now());
            }
            self.at += block.len() as u64;
        }
        packed
    }
}

#[cfg(test)]
mod tests {
    use fractus_agent_api::copy::{Piece, Unpacker};
    use futures::TryStreamExt;

    use super::*;

    fn of(chunks: Vec<Bytes>) -> BoxStream<'static, io::Result<Bytes>> {
        stream::iter(chunks.into_iter().map(Ok)).boxed()
    }

    async fn unpacked(packed: impl Stream<Item = io::Result<Bytes>>) -> (Vec<Piece>, u64) {
        let packed: Vec<Bytes> = packed.try_collect().await.unwrap();
        let mut unpacker = Unpacker::default();
        let pieces = packed
            .iter()
            .flat_map(|bytes| unpacker.push(bytes).unwrap());
        let pieces = pieces.collect();
        (pieces, unpacker.finish().unwrap())
    }

    #[tokio::test]
    async fn what_is_zero_does_not_go_and_all_else_does_at_its_place() {
        let zeros = Bytes::from(vec![0; 4 * BLOCK]);
        let word = Bytes::from_static(b"word");
        let chunks = vec![zeros.clone(), word.clone(), zeros];
        let size = 8 * BLOCK as u64 + 4;
        let (pieces, end) = unpacked(pack_all(of(chunks), 100, 100 + size)).await;
        let offset = 100 + 4 * BLOCK as u64;
        assert_eq!(
            pieces,
            [Piece {
                offset,
                bytes: word
            }]
        );
        assert_eq!(end, 100 + size);
    }

    #[tokio::test]
    async fn some_of_much_nothing_goes_as_a_sign_of_life() {
        let zeros = Bytes::from(vec![0; 1 << 20]);
        let many = (QUIET >> 20) as usize + 1;
        let size = (many << 20) as u64;
        let (pieces, end) = unpacked(pack_all(of(vec![zeros; many]), 0, size)).await;
        let [piece] = &pieces[..] else {
            panic!("{} pieces", pieces.len());
        };
        assert_eq!((piece.offset, piece.bytes.len()), (QUIET, BLOCK));
        assert_eq!(end, size);
    }

    #[test]
    fn a_store_that_is_slow_gives_a_sign_of_life_as_well() {
        let mut left = Left {
            bytes: of(Vec::new()),
            at: 0,
            size: 1 << 20,
            quiet: 0,
            went: Instant::now() - QUIET_TIME,
        };
        assert_eq!(left.pack(&ZEROS), pack(0, &ZEROS));
        assert_eq!(left.pack(&ZEROS), [0; 0]);
        assert_eq!(left.at, 2 * BLOCK as u64);
    }

    #[tokio::test]
    async fn what_ends_too_soon_has_no_end() {
        let packed = pack_all(of(vec![Bytes::from_static(b"word")]), 0, 5);
        let packed: Vec<_> = packed.collect().await;
        let last = packed.last().unwrap().as_ref();
        assert_eq!(last.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
