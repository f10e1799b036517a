//! Blocks made smaller by zstd, each by itself, and made again what they were.
//!
//! Of zstd the calls are used that take a whole block at once, and write to room that is given to them: what a hostile
//! file says of sizes and windows makes nobody allocate. All that it asks the system for is memory for its context, by
//! `malloc`, which a thread that is locked down may do as long as the allocator opens no files: glibc's does, unless it is
//! told never to make a heap smaller (`M_TRIM_THRESHOLD`), once so much was freed at the end of a thread's. A context is
//! made with the first block and serves all of its thread's: some 300 KB to pack, 100 KB to unpack.

use std::fs::File;
use std::os::unix::fs::FileExt;

use zstd::bulk::{Compressor, Decompressor};

use super::table::{Entry, bytes_of};
use crate::stream::pages::{BLOCK, Mask};
use crate::stream::{StreamError, io};

/// The fastest of the ordinary ones. The third takes half as long again, and leaves a twentieth less of text and programs.
const LEVEL: i32 = 1;

/// Makes blocks smaller; one a thread.
#[derive(Default)]
pub struct Packer {
    context: Option<Compressor<'static>>,
    pages: Vec<u8>,
    packed: Vec<u8>,
}

impl Packer {
    /// The pages of `mask` of the block `content`, as they are to be stored; and their checksum.
    ///
    /// # Errors
    /// There is no context to be had.
    pub fn pack(&mut self, mask: Mask, content: &[u8]) -> Result<(&[u8], u32), StreamError> {
        self.pages.clear();
        for run in mask.runs() {
            let run = run.start..run.end.min(content.len());
            let pages = content.get(run).unwrap_or_default();
            self.pages.extend_from_slice(pages);
        }
        let checksum = crc32fast::hash(&self.pages);
        let context = match &mut self.context {
            Some(context) => context,
            none => none.insert(Compressor::new(LEVEL).map_err(io("compress"))?),
        };
        // Where it does not become smaller there is no room for what it becomes.
        self.packed.resize(self.pages.len().saturating_sub(1), 0);
        let length = context.compress_to_buffer(&self.pages, self.packed.as_mut_slice());
        let packed = length.ok().and_then(|length| self.packed.get(..length));
        Ok((packed.unwrap_or(&self.pages), checksum))
    }
}

/// Makes of packed blocks what they were; one a thread.
#[derive(Default)]
pub struct Unpacker {
    context: Option<Decompressor<'static>>,
    stored: Vec<u8>,
    pages: Vec<u8>,
}

impl Unpacker {
    /// Reads the pages of a block to their places in `content`, which is as long as the block; nothing else there is
    /// changed. `start` says which it is, for people: where it begins in memory.
    ///
    /// # Errors
    /// They cannot be read, or are not what they were; then `content` is of no use.
    pub fn read(
        &mut self,
        file: &File,
        start: u64,
        entry: &Entry,
        content: &mut [u8],
    ) -> Result<(), StreamError> {
        let what = || format!("memory at offset {start:#x}");
        let (bytes, length) = (
            bytes_of(entry.placed, content.len()),
            entry.slot.length as usize,
        );
        self.pages.resize(bytes.min(BLOCK), 0);
        if length == bytes {
            let read = file.read_exact_at(&mut self.pages, entry.slot.at);
            read.map_err(io("read"))?;
        } else {
            self.stored.resize(length.min(BLOCK), 0);
            let read = file.read_exact_at(&mut self.stored, entry.slot.at);
            read.map_err(io("read"))?;
            let context = match &mut self.context {
                Some(context) => context,
                none => none.insert(Decompressor::new().map_err(io("decompress"))?),
            };
            let found = context.decompress_to_buffer(&self.stored, self.pages.as_mut_slice());
            if found.ok() != Some(bytes) {
                return Err(StreamError::Packed { what: what() });
            }
        }
        if crc32fast::hash(&self.pages) != entry.checksum {
            return Err(StreamError::Checksum { what: what() });
        }
        let (mut rest, size) = (self.pages.as_slice(), content.len());
        for run in entry.placed.runs() {
            let target = content.get_mut(run.start..run.end.min(size));
            let target = target.unwrap_or_default();
            let Some((pages, more)) = rest.split_at_checked(target.len()) else {
                break;
            };
            target.copy_from_slice(pages);
            rest = more;
        }
        Ok(())
    }
}
