//! Memory goes to a snapshot's file: by whoever owns the machine, and where there is much of it by a second thread.
//!
//! Most of it is the kernel's work, that of finding a page for each page of the file, which two processors do in half
//! of the time; where memory is compressed it is zstd's.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;

use super::{Ledger, SnapshotError, read_pages};
use crate::memory::{GuestMemory, PageSet};
use crate::stream::snapshot::{Entry, Sink, SnapshotWriter};
use crate::stream::{BLOCK, Mask, StreamError, Totals};
use crate::thread::Threads;
use crate::work::Work;

/// Blocks that one of the threads takes at a time: 2 MiB.
const SOME: usize = (2 << 20) / BLOCK;
/// Fewer are not worth a thread: 8 MiB.
const FEW: usize = 4 * SOME;

/// Copies memory to a snapshot.
pub struct Copy {
    memory: GuestMemory,
    threads: Threads,
    /// Not laid over another.
    is_whole: bool,
    writer: SnapshotWriter,
}

impl Copy {
    pub fn begin(memory: GuestMemory, threads: Threads, mut writer: SnapshotWriter) -> Self {
        if memory.is_unchecked() {
            writer.mark_unchecked();
        }
        Copy {
            memory,
            threads,
            is_whole: writer.opening().base.is_none(),
            writer,
        }
    }

    /// All that is to be in it; how many pages that may be. From then on the ledger tells what is to be copied again.
    pub fn first(&mut self, ledger: Option<&mut Ledger>) -> Result<u64, SnapshotError> {
        let since = ledger.map(Ledger::take_all).transpose()?;
        let pages = match since.filter(|_| !self.is_whole) {
            Some(since) => since,
            None => self.memory.present()?,
        };
        self.again(&pages)
    }

    /// What has been written to; how many pages.
    pub fn again(&mut self, written: &PageSet) -> Result<u64, SnapshotError> {
        if self.is_whole {
            self.blocks(written)?;
        } else {
            for (number, mask) in written.blocks() {
                let pages = read_pages(&self.memory, number, mask)?;
                self.amend(number, mask, &pages)?;
            }
        }
        Ok(written.count())
    }

    /// Pages of a block, each whole, which are all that has changed since it was copied.
    pub fn amend(&mut self, number: u64, mask: Mask, pages: &[u8]) -> Result<(), SnapshotError> {
        Ok(self.writer.amend(number, mask, pages)?)
    }

    /// See [`SnapshotWriter::finish`].
    pub fn finish(self, state: &[u8], owner: &[u8]) -> Result<Totals, StreamError> {
        self.writer.finish(state, owner)
    }

    /// All blocks that have such a page.
    fn blocks(&mut self, pages: &PageSet) -> Result<(), SnapshotError> {
        let of = |(number, _)| Ok((number, self.writer.entry(number)?));
        let blocks: Result<Vec<_>, StreamError> = pages.blocks().map(of).collect();
        let job = Arc::new(Job {
            memory: self.memory.clone(),
            blocks: blocks?,
            next: AtomicUsize::new(0),
        });
        let mut second = None;
        if job.blocks.len() >= FEW {
            let (say, said) = channel();
            let (job, mut sink) = (Arc::clone(&job), self.writer.another_sink());
            let body = move |()| {
                let _ = say.send(job.run(&mut sink));
            };
            // Where there is none, there is one thread.
            let running = self.threads.work(Work::Copy, "copier", || (), body);
            second = running.ok().map(|running| (running, said));
        }
        let own = job.run(self.writer.sink());
        let other = match second {
            // Without a word from it it has panicked, and ends the machine.
            Some((running, said)) => {
                running.join();
                said.recv().unwrap_or(Err(SnapshotError::Over))
            }
            None => Ok(Vec::new()),
        };
        for (number, entry) in own?.into_iter().chain(other?) {
            self.writer.note(number, entry)?;
        }
        Ok(())
    }
}

/// Blocks for several threads, each of which takes some that nobody has taken.
struct Job {
    memory: GuestMemory,
    blocks: Vec<(u64, Entry)>,
    /// The first that nobody has taken.
    next: AtomicUsize,
}

impl Job {
    /// What is known of those that this thread has put, by its own sink.
    fn run(&self, sink: &mut Sink) -> Result<Vec<(u64, Entry)>, SnapshotError> {
        let mut put = Vec::new();
        let mut content = vec![0; BLOCK];
        loop {
            let from = self.next.fetch_add(SOME, Ordering::Relaxed);
            let some = self.blocks.get(from..).unwrap_or_default();
            if some.is_empty() {
                return Ok(put);
            }
            for (number, before) in some.iter().take(SOME) {
                let entry = self.put(sink, *number, *before, &mut content);
                // Whatever the other one puts is for nothing.
                let entry = entry.inspect_err(|_| {
                    self.next.store(self.blocks.len(), Ordering::Relaxed);
                })?;
                put.push((*number, entry));
            }
        }
    }

    fn put(
        &self,
        sink: &mut Sink,
        number: u64,
        before: Entry,
        content: &mut [u8],
    ) -> Result<Entry, SnapshotError> {
        let at = number * BLOCK as u64;
        let read = self.memory.read_at(content, at);
        let read = read.map_err(SnapshotError::Read)?;
        let content = content.get(..read).unwrap_or_default();
        Ok(sink.put(number, before, content)?)
    }
}
