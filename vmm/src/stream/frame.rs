//! Frames: each is checked as a whole before anything in it is believed.
//!
//! A head of 16 bytes, little-endian: kind (2), nothing yet (2), length of the payload (4), number of the frame
//! (4), CRC-32 (IEEE) of the 12 bytes before it and of the payload (4).

use std::io::{ErrorKind, Read, Write};

use super::{StreamError, io, malformed};

/// Bytes of the head.
pub const HEAD: usize = 16;
/// Bytes of a payload at most: what a hostile length can make us allocate.
pub const MOST: usize = 4 << 20;
/// Kinds from here on may be passed over by a reader that does not know them.
const OPTIONAL: u16 = 0x8000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// [`super::Opening`] in postcard.
    Opening,
    /// Which pages lie at their place in the file.
    Placed,
    /// A piece of the machine's state in postcard; pieces follow each other.
    State,
    /// [`super::Totals`] in postcard; in a live stream [`super::live::Ending`].
    End,
    /// What the machine's owner keeps with it, which this library does not read. One in a snapshot; in a live stream
    /// behind the configuration, and the last one counts.
    Owner,
    /// The form of the state that will come (4), and the machine's configuration in postcard, before its memory.
    Config,
    /// Pages with their places ([`super::live`]).
    Pages,
    /// The bytes of each disk of the configuration, in postcard: their content comes.
    Disks,
    /// Number of a disk (4), then pages of it with their places, as of memory.
    Blocks,
    /// What has come of the disks is to be durable before anything else is read.
    Sync,
    /// The other way: the machine is there, and stands still.
    Ready,
    /// The other way: it is not, and why, for people.
    Refused,
    /// Pages of memory that come behind the end, or, the other way, that have not come ([`super::live::owed`]).
    Owed,
    /// The other way: the number of a block (8), of which a page that is owed is waited for.
    Wanted,
    /// The other way: a frame of pages that were owed is there; or, where there are lanes, what a *sync* asked for is done.
    Got,
    /// Nothing is owed any more: says who has it all, and then the other side, which has heard it.
    Whole,
    /// Which pages a packed block has, and where it lies in the file.
    Packed,
    /// The first frame of a further connection ([`super::lane::Hello`], in postcard), by which memory comes.
    Lane,
    /// What the sender's clock is (`machine::clocks`), in postcard.
    Mark,
}

impl Kind {
    fn number(self) -> u16 {
        match self {
            Kind::Opening => 1,
            Kind::Placed => 2,
            Kind::State => 3,
            Kind::End => 4,
            Kind::Owner => 5,
            Kind::Config => 6,
            Kind::Pages => 7,
            Kind::Ready => 8,
            Kind::Refused => 9,
            Kind::Disks => 10,
            Kind::Blocks => 11,
            Kind::Sync => 12,
            Kind::Owed => 13,
            Kind::Wanted => 14,
            Kind::Got => 15,
            Kind::Whole => 16,
            Kind::Packed => 17,
            Kind::Lane => 18,
            Kind::Mark => OPTIONAL,
        }
    }

    /// In the order of their numbers.
    pub(crate) const ALL: [Kind; 19] = [
        Kind::Opening,
        Kind::Placed,
        Kind::State,
        Kind::End,
        Kind::Owner,
        Kind::Config,
        Kind::Pages,
        Kind::Ready,
        Kind::Refused,
        Kind::Disks,
        Kind::Blocks,
        Kind::Sync,
        Kind::Owed,
        Kind::Wanted,
        Kind::Got,
        Kind::Whole,
        Kind::Packed,
        Kind::Lane,
        Kind::Mark,
    ];

    fn of(number: u16) -> Option<Kind> {
        let mut all = Kind::ALL.into_iter();
        all.find(|kind| kind.number() == number)
    }
}

pub struct FrameWriter<W> {
    inner: W,
    next: u32,
}

impl<W: Write> FrameWriter<W> {
    pub fn new(inner: W) -> Self {
        FrameWriter { inner, next: 0 }
    }

    /// That goes on behind so many frames.
    pub fn behind(inner: W, frames: u32) -> Self {
        FrameWriter {
            inner,
            next: frames,
        }
    }

    /// `payload` has at most [`MOST`] bytes.
    pub fn write(&mut self, kind: Kind, payload: &[u8]) -> Result<(), StreamError> {
        self.write_numbered(kind.number(), payload)
    }

    fn write_numbered(&mut self, kind: u16, payload: &[u8]) -> Result<(), StreamError> {
        if payload.len() > MOST {
            return Err(malformed("a frame that is too long"));
        }
        let head = head(kind, payload.len() as u32, self.next, payload);
        let mut write = || {
            self.inner.write_all(&head)?;
            self.inner.write_all(payload)
        };
        write().map_err(io("write"))?;
        self.next = self.next.wrapping_add(1);
        Ok(())
    }

    pub fn finish(self) -> W {
        self.inner
    }

    pub fn get_ref(&self) -> &W {
        &self.inner
    }

    pub fn get_mut(&mut self) -> &mut W {
        &mut self.inner
    }
}

fn head(kind: u16, length: u32, number: u32, payload: &[u8]) -> [u8; HEAD] {
    let mut head = [0; HEAD];
    head[..2].copy_from_slice(&kind.to_le_bytes());
    head[4..8].copy_from_slice(&length.to_le_bytes());
    head[8..12].copy_from_slice(&number.to_le_bytes());
    let checksum = checksum(&head[..12], payload);
    head[12..].copy_from_slice(&checksum.to_le_bytes());
    head
}

fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(payload);
    hasher.finalize()
}

pub struct FrameReader<R> {
    inner: R,
    next: u32,
    payload: Vec<u8>,
}

impl<R: Read> FrameReader<R> {
    pub fn new(inner: R) -> Self {
        FrameReader {
            inner,
            next: 0,
            payload: Vec::new(),
        }
    }

    /// That goes on behind so many frames.
    pub fn behind(inner: R, frames: u32) -> Self {
        FrameReader {
            next: frames,
            ..FrameReader::new(inner)
        }
    }

    /// Frames that were read, or stand before those.
    pub fn frames(&self) -> u32 {
        self.next
    }

    /// The next frame that this build knows.
    ///
    /// # Errors
    /// It is damaged, missing, cut short or too long, or of a kind that may not be passed over.
    pub fn next_frame(&mut self) -> Result<(Kind, &[u8]), StreamError> {
        loop {
            let number = self.read()?;
            match Kind::of(number) {
                Some(kind) => return Ok((kind, &self.payload)),
                None if number >= OPTIONAL => {}
                None => return Err(StreamError::Kind { kind: number }),
            }
        }
    }

    pub fn get_mut(&mut self) -> &mut R {
        &mut self.inner
    }

    /// Nothing follows the frames that were read.
    pub fn is_at_end(&mut self) -> Result<bool, StreamError> {
        let mut byte = [0];
        let read = self.inner.read(&mut byte).map_err(io("read"))?;
        Ok(read == 0)
    }

    /// Reads one whole, whatever its kind.
    fn read(&mut self) -> Result<u16, StreamError> {
        let mut head = [0; HEAD];
        self.fill(&mut head)?;
        let word = |at: usize| {
            let bytes = head.get(at..).and_then(|bytes| bytes.first_chunk());
            u32::from_le_bytes(bytes.copied().unwrap_or_default())
        };
        let (length, number) = (word(4) as usize, word(8));
        if length > MOST {
            return Err(malformed("a frame that is too long"));
        }
        let mut payload = std::mem::take(&mut self.payload);
        payload.resize(length, 0);
        self.fill(&mut payload)?;
        if checksum(&head[..12], &payload) != word(12) {
            return Err(StreamError::Checksum {
                what: format!("frame {}", self.next),
            });
        }
        if head[2..4] != [0; 2] {
            return Err(malformed(
                "a frame with flags that this build does not know",
            ));
        }
        if number != self.next {
            return Err(StreamError::Order {
                expected: self.next,
                found: number,
            });
        }
        self.next = self.next.wrapping_add(1);
        self.payload = payload;
        Ok(u16::from_le_bytes([head[0], head[1]]))
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), StreamError> {
        self.inner
            .read_exact(bytes)
            .map_err(|source| match source.kind() {
                ErrorKind::UnexpectedEof => StreamError::Truncated { what: "a frame" },
                _ => io("read")(source),
            })
    }
}

/// Gives each frame the checksum of what it holds by now and, if `numbered`, its number: for who damages a stream and
/// wants to be read on.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn seal(stream: &mut [u8], numbered: bool) {
    let (mut rest, mut number) = (stream, 0u32);
    while let Some((head, behind)) = rest.split_first_chunk_mut::<HEAD>() {
        let [_, _, _, _, l0, l1, l2, l3, ..] = *head;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let (payload, behind) = behind.split_at_mut(length.min(behind.len()));
        if numbered {
            head[8..12].copy_from_slice(&number.to_le_bytes());
        }
        let checksum = checksum(&head[..12], payload);
        head[12..].copy_from_slice(&checksum.to_le_bytes());
        (rest, number) = (behind, number.wrapping_add(1));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KINDS: [Kind; 4] = [Kind::Opening, Kind::Placed, Kind::State, Kind::End];

    fn written(frames: &[(Kind, Vec<u8>)]) -> Vec<u8> {
        let mut writer = FrameWriter::new(Vec::new());
        for (kind, payload) in frames {
            writer.write(*kind, payload).unwrap();
        }
        writer.finish()
    }

    fn frames() -> impl Strategy<Value = Vec<(Kind, Vec<u8>)>> {
        let kind = prop::sample::select(KINDS.to_vec());
        prop::collection::vec((kind, prop::collection::vec(any::<u8>(), 0..40)), 1..6)
    }

    /// All frames, or the error that came first.
    fn read(bytes: &[u8], count: usize) -> Result<Vec<(Kind, Vec<u8>)>, StreamError> {
        let mut reader = FrameReader::new(bytes);
        (0..count)
            .map(|_| {
                reader
                    .next_frame()
                    .map(|(kind, payload)| (kind, payload.to_vec()))
            })
            .collect()
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(frames in frames()) {
            prop_assert_eq!(read(&written(&frames), frames.len()).unwrap(), frames);
        }

        #[test]
        fn no_flipped_bit_and_no_missing_end_is_overlooked(
            frames in frames(), at in any::<prop::sample::Index>(), bit in 0..8u8,
        ) {
            let bytes = written(&frames);
            let mut damaged = bytes.clone();
            let at = at.index(bytes.len());
            damaged[at] ^= 1 << bit;
            prop_assert!(read(&damaged, frames.len()).is_err());
            prop_assert!(read(&bytes[..at], frames.len()).is_err());
        }

        #[test]
        fn a_frame_that_is_missing_or_stands_twice_is_found(frames in frames(), at in any::<prop::sample::Index>()) {
            let at = at.index(frames.len());
            let one = |frame: &(Kind, Vec<u8>)| HEAD + frame.1.len();
            let start: usize = frames[..at].iter().map(one).sum();
            let end = start + one(&frames[at]);
            let bytes = written(&frames);
            let missing = [&bytes[..start], &bytes[end..]].concat();
            prop_assert!(read(&missing, frames.len()).is_err());
            let twice = [&bytes[..end], &bytes[start..]].concat();
            prop_assert!(read(&twice, frames.len() + 1).is_err());
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = read(&bytes, 9);
        }
    }

    #[test]
    fn only_what_may_be_passed_over_is() {
        let mut writer = FrameWriter::new(Vec::new());
        writer
            .write_numbered(OPTIONAL + 1, b"of a later build")
            .unwrap();
        writer.write(Kind::End, b"").unwrap();
        assert_eq!(
            read(&writer.finish(), 1).unwrap(),
            [(Kind::End, Vec::new())]
        );
        let mut writer = FrameWriter::new(Vec::new());
        writer.write_numbered(OPTIONAL - 1, b"").unwrap();
        let error = read(&writer.finish(), 1).unwrap_err();
        assert!(matches!(error, StreamError::Kind { kind: 0x7fff }));
    }

    #[test]
    fn a_hostile_length_takes_no_memory() {
        let mut bytes = written(&[(Kind::End, Vec::new())]);
        bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut reader = FrameReader::new(bytes.as_slice());
        assert!(matches!(
            reader.next_frame().unwrap_err(),
            StreamError::Malformed { .. }
        ));
        assert_eq!(reader.payload.capacity(), 0);
        let mut writer = FrameWriter::new(Vec::new());
        assert!(writer.write(Kind::State, &vec![0; MOST + 1]).is_err());
    }
}
