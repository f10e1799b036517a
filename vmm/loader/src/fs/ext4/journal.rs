//! The journal (jbd2) of a file system that was not unmounted: which of its blocks stand in the journal
//! in a newer version. Nothing is written; the guest's kernel replays it again.
//!
//! Fast commits are not looked at: what they hold is younger than the last whole commit, which is
//! consistent by itself. Checksums of blocks are not verified: a commit is taken for whole when its
//! commit block stands there with the right number, as the order of writes has it.

use std::collections::{BTreeMap, HashMap};

use super::Ext4;
use crate::bytes::{be16, be32, be64, slice};
use crate::disk::{Fault, Piece};

const MAGIC: u32 = 0xc03b_3998;
/// How a journal's blocks begin.
pub const MARK: [u8; 4] = MAGIC.to_be_bytes();
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const SUPERBLOCK_1: u32 = 3;
const SUPERBLOCK_2: u32 = 4;
const REVOKE: u32 = 5;

const BITS_64: u32 = 0x2;
const CHECKSUM_2: u32 = 0x8;
const CHECKSUM_3: u32 = 0x10;
const FAST_COMMIT: u32 = 0x20;
/// Revoke, 64 bit, asynchronous commit, both checksums, fast commit.
const KNOWN: u32 = 0x3f;

const ESCAPED: u32 = 1;
const SAME_UUID: u32 = 2;
const LAST_TAG: u32 = 8;

/// Blocks that a journal holds at most: 4 GiB of them.
const MAX_WRITES: usize = 1 << 20;
/// Bytes of memory that one of them takes, here and in the map that is made of it.
const WRITE: u64 = 64;

/// Block, then where it stands instead, and whether its first bytes were replaced because they looked
/// like a journal's.
#[derive(Default)]
pub struct Journal(BTreeMap<u64, (u64, bool)>);

impl Journal {
    pub fn place(&self, block: u64) -> (u64, bool) {
        self.0.get(&block).copied().unwrap_or((block, false))
    }

    /// The blocks of `start..end` that stand elsewhere.
    pub fn within(&self, start: u64, end: u64) -> impl Iterator<Item = u64> {
        self.0.range(start..end).map(|(block, _)| *block)
    }
}

/// Puts the journal's mark back at the begin of a block.
pub fn unescape(within: u64, buffer: &mut [u8]) {
    let mark = MARK.get(within.min(4) as usize..).unwrap_or_default();
    for (to, from) in buffer.iter_mut().zip(mark) {
        *to = *from;
    }
}

pub fn read(ext4: &Ext4<'_>) -> Result<Journal, Fault> {
    let inode = ext4.inode(ext4.superblock.journal_inode)?;
    let log = Log::open(ext4, ext4.map(&inode)?)?;
    match log {
        Some(log) => log.read(),
        None => Ok(Journal::default()),
    }
}

struct Log<'r, 'a> {
    ext4: &'r Ext4<'a>,
    /// First block within the journal, first block of the file system.
    runs: Vec<(u64, u64)>,
    features: u32,
    /// Blocks of the journal that are gone round: `first..end`.
    first: u64,
    end: u64,
    /// Where the oldest commit begins, and its number.
    start: u64,
    sequence: u32,
}

/// What one commit holds.
#[derive(Default)]
struct Commit {
    /// Block of the file system, block of the journal, escaped.
    writes: Vec<(u64, u64, bool)>,
    revoked: Vec<u64>,
}

impl<'r, 'a> Log<'r, 'a> {
    /// `None`: the journal is empty.
    fn open(ext4: &'r Ext4<'a>, pieces: Vec<Piece>) -> Result<Option<Log<'r, 'a>>, Fault> {
        let size = ext4.superblock.block_size;
        let (mut runs, mut blocks) = (Vec::new(), 0);
        for piece in &pieces {
            let Piece::Disk { offset, length } = piece else {
                return Err(Fault::Damaged("a journal with holes"));
            };
            runs.push((blocks, (offset - ext4.volume.start) / size));
            blocks += length / size;
        }
        let Some((_, first)) = runs.first() else {
            return Err(Fault::Damaged("a journal without blocks"));
        };
        let head = ext4.block(*first)?;
        let kind = be32(&head, 4);
        if be32(&head, 0) != MAGIC || !matches!(kind, SUPERBLOCK_1 | SUPERBLOCK_2) {
            return Err(Fault::Damaged("the journal's superblock"));
        }
        let features = if kind == SUPERBLOCK_2 {
            be32(&head, 0x28)
        } else {
            0
        };
        if features & !KNOWN != 0 {
            return Err(Fault::Unsupported("a feature of the journal"));
        }
        let mut end = u64::from(be32(&head, 16));
        if features & FAST_COMMIT != 0 {
            let fast = match be32(&head, 84) {
                0 => 256,
                blocks => u64::from(blocks),
            };
            end = end.saturating_sub(fast);
        }
        let (first, start) = (u64::from(be32(&head, 20)), u64::from(be32(&head, 28)));
        if u64::from(be32(&head, 12)) != size || end > blocks || first == 0 || first >= end {
            return Err(Fault::Damaged("the journal's numbers"));
        }
        if start == 0 {
            return Ok(None);
        }
        if !(first..end).contains(&start) {
            return Err(Fault::Damaged("the journal's begin"));
        }
        let sequence = be32(&head, 24);
        Ok(Some(Log {
            ext4,
            runs,
            features,
            first,
            end,
            start,
            sequence,
        }))
    }

    /// The block of the file system at which block `index` of the journal stands.
    fn place(&self, index: u64) -> u64 {
        let after = self.runs.partition_point(|(first, _)| *first <= index);
        let run = after.checked_sub(1).and_then(|at| self.runs.get(at));
        run.map_or(u64::MAX, |(first, block)| block + (index - first))
    }

    fn after(&self, index: u64) -> u64 {
        if index + 1 >= self.end {
            self.first
        } else {
            index + 1
        }
    }

    fn read(&self) -> Result<Journal, Fault> {
        let mut writes: Vec<(u64, u64, bool, u32)> = Vec::new();
        let mut revoked: HashMap<u64, u32> = HashMap::new();
        let (mut at, mut sequence) = (self.start, self.sequence);
        // Nothing is read twice: the log is as long as it is.
        let mut left = self.end - self.first;
        let mut commit = Commit::default();
        while left > 0 {
            self.ext4.volume.step()?;
            let block = self.ext4.block(self.place(at))?;
            left -= 1;
            at = self.after(at);
            if be32(&block, 0) != MAGIC || be32(&block, 8) != sequence {
                break;
            }
            match be32(&block, 4) {
                DESCRIPTOR => {
                    let before = commit.writes.len();
                    self.descriptor(&block, &mut at, &mut commit)?;
                    let data = (commit.writes.len() - before) as u64;
                    if data > left {
                        break;
                    }
                    left -= data;
                }
                REVOKE => self.revoke(&block, &mut commit)?,
                COMMIT => {
                    let Commit {
                        writes: done,
                        revoked: gone,
                    } = std::mem::take(&mut commit);
                    let done = done.into_iter();
                    writes.extend(done.map(|(to, from, escaped)| (to, from, escaped, sequence)));
                    revoked.extend(gone.into_iter().map(|block| (block, sequence)));
                    sequence = sequence.wrapping_add(1);
                }
                _ => break,
            }
            let kept = commit.writes.len() + commit.revoked.len();
            if writes.len() + kept > MAX_WRITES || revoked.len() > MAX_WRITES {
                return Err(Fault::Damaged("a journal of too many blocks"));
            }
        }
        let mut map = BTreeMap::new();
        for (block, from, escaped, sequence) in writes {
            // A block that was freed by a later commit, or by this one, is not written.
            let gone = revoked.get(&block);
            if gone.is_some_and(|gone| gone.wrapping_sub(sequence) as i32 >= 0) {
                map.remove(&block);
            } else {
                map.insert(block, (self.place(from), escaped));
            }
        }
        Ok(Journal(map))
    }

    /// A descriptor's tags: each is a block that follows.
    fn descriptor(&self, block: &[u8], at: &mut u64, commit: &mut Commit) -> Result<(), Fault> {
        let third = self.features & CHECKSUM_3 != 0;
        let wide = self.features & BITS_64 != 0;
        let size = match (third, self.features & CHECKSUM_2 != 0, wide) {
            (true, ..) => 16,
            (_, second, wide) => 8 + 2 * usize::from(second) + 4 * usize::from(wide),
        };
        let tail = if self.features & (CHECKSUM_2 | CHECKSUM_3) != 0 {
            4
        } else {
            0
        };
        let mut place = 12;
        while place + size + tail <= block.len() {
            self.ext4.volume.step()?;
            self.ext4.volume.disk.keep(WRITE)?;
            let tag = slice(block, place, size);
            let flags = match third {
                true => be32(tag, 4),
                false => be16(tag, 6).into(),
            };
            let high = if wide { u64::from(be32(tag, 8)) } else { 0 };
            let target = high << 32 | u64::from(be32(tag, 0));
            commit.writes.push((target, *at, flags & ESCAPED != 0));
            *at = self.after(*at);
            if flags & LAST_TAG != 0 {
                break;
            }
            place += size + if flags & SAME_UUID == 0 { 16 } else { 0 };
        }
        Ok(())
    }

    fn revoke(&self, block: &[u8], commit: &mut Commit) -> Result<(), Fault> {
        let wide = self.features & BITS_64 != 0;
        let size = if wide { 8 } else { 4 };
        let end = (be32(block, 12) as usize).min(block.len());
        for at in (16..end).step_by(size) {
            self.ext4.volume.step()?;
            self.ext4.volume.disk.keep(WRITE)?;
            commit.revoked.push(match wide {
                true => be64(block, at),
                false => be32(block, at).into(),
            });
        }
        Ok(())
    }
}
