//! Memory that the other side does not have yet, of a machine that stands still here: sent when it is asked for, and
//! else one after the other, what was written last first: the guest is at work on it.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::MigrationError;
use crate::machine::snapshot::read_pages;
use crate::memory::{GuestMemory, PageSet};
use crate::stream::frame::{FrameReader, FrameWriter, Kind};
use crate::stream::live::{self, Batch};
use crate::stream::{PAGE, StreamError, Totals, malformed};

/// Blocks in a frame that nobody has asked for: what is asked for waits behind those that are on their way.
const AHEAD: usize = 4;
/// Frames on their way at most, of which the other side has not said that it has them.
const WINDOW: u64 = 4;
/// So many frames are heard before something is sent.
pub(super) const HEARD: usize = 64;

/// Blocks that are asked for at once: who waits is a vCPU, or a device, or one of the tasks of a guest.
const MOST_ASKED: usize = 1 << 16;

/// What a guest's memory took that followed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Paid {
    pub totals: Totals,
    /// Blocks that the other side waited for.
    pub wanted: u64,
    pub took: Duration,
}

/// How a debt stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paying {
    /// There is more to be sent.
    More,
    /// Until the connection can be read.
    Waits,
    /// The other side has everything.
    Paid,
}

pub(super) struct Debt {
    pages: PageSet,
    /// Of these, what the guest wrote last.
    recent: PageSet,
    /// The block that is sent next if none is asked for.
    next: u64,
    asked: VecDeque<u64>,
    /// Frames of pages that were sent, and that have come.
    sent: u64,
    got: u64,
    /// The other side has been told that it was heard.
    said: bool,
    over: bool,
    began: Instant,
    paid: Paid,
}

impl Debt {
    /// Of `pages`, the guest wrote those of `recent` last.
    pub fn new(pages: PageSet, mut recent: PageSet) -> Self {
        recent.keep(&pages);
        Debt {
            pages,
            recent,
            next: 0,
            asked: VecDeque::new(),
            sent: 0,
            got: 0,
            said: false,
            over: false,
            began: Instant::now(),
            paid: Paid::default(),
        }
    }

    pub fn paid(&self) -> Paid {
        self.paid
    }

    /// Payloads that say of what it is.
    pub fn names(&self) -> Vec<Vec<u8>> {
        live::owed(&self.pages)
    }

    /// Bytes.
    pub fn left(&self) -> u64 {
        match self.over {
            true => 0,
            false => self.pages.count() * PAGE as u64,
        }
    }

    pub fn is_over(&self) -> bool {
        self.over
    }

    /// The connection is another: the other side says by it what it has not got. Waits for that.
    pub fn begin_anew<S: Read>(
        &mut self,
        connection: &mut Answers<S>,
    ) -> Result<(), MigrationError> {
        self.pages.take_before(u64::MAX);
        self.recent.take_before(u64::MAX);
        for _ in 0..=live::most_names(&self.pages) {
            match connection.next()? {
                (Kind::Owed, payload) => live::add_owed(payload, &mut self.pages)?,
                (Kind::Ready, []) => {
                    self.restart();
                    return Ok(());
                }
                _ => break,
            }
        }
        Err(malformed("an answer that is none").into())
    }

    fn restart(&mut self) {
        (self.next, self.sent, self.got) = (0, 0, 0);
        (self.said, self.over) = (false, false);
        self.asked.clear();
    }

    /// What the other side says.
    pub fn hear(&mut self, kind: Kind, payload: &[u8]) -> Result<(), MigrationError> {
        match (kind, payload.as_chunks()) {
            (Kind::Wanted, ([number], [])) if self.asked.len() < MOST_ASKED => {
                self.paid.wanted += 1;
                self.asked.push_back(u64::from_le_bytes(*number));
            }
            // Its word comes late: somebody has asked it by another way.
            (Kind::Ready, ([], [])) => {}
            (Kind::Got, ([], [])) if self.got < self.sent => self.got += 1,
            (Kind::Whole, ([], [])) => {
                self.over = true;
                self.paid.took = self.began.elapsed();
            }
            _ => return Err(malformed("an answer that is none").into()),
        }
        Ok(())
    }

    /// Sends what was asked for, or some more if the other side has room.
    pub fn pay<S: Write>(
        &mut self,
        memory: &GuestMemory,
        out: &mut FrameWriter<S>,
    ) -> Result<Paying, MigrationError> {
        if self.over {
            // Who has gone by now has all he wanted.
            let _ = self.say(out);
            return Ok(Paying::Paid);
        }
        let mut batch = Batch::default();
        while let Some(number) = self.asked.pop_front() {
            self.add(&mut batch, number, memory)?;
            // What lies behind it is wanted next, most likely.
            self.next = number.saturating_add(1);
            if batch.is_full() {
                break;
            }
        }
        if batch.payload().is_some() {
            return self.send(&batch, out);
        }
        if self.sent - self.got >= WINDOW {
            return Ok(Paying::Waits);
        }
        for _ in 0..AHEAD {
            let Some(number) = self.next_block() else {
                break;
            };
            self.add(&mut batch, number, memory)?;
            self.next = number + 1;
        }
        if batch.payload().is_some() {
            return self.send(&batch, out);
        }
        Ok(Paying::Waits)
    }

    /// From where it is, and then from the beginning.
    fn next_block(&self) -> Option<u64> {
        let from = |set: &PageSet| set.block_from(self.next).or_else(|| set.block_from(0));
        let (number, _) = from(&self.recent).or_else(|| from(&self.pages))?;
        Some(number)
    }

    /// That it has heard that the other side has all.
    fn say<S: Write>(&mut self, out: &mut FrameWriter<S>) -> Result<(), MigrationError> {
        if !std::mem::replace(&mut self.said, true) {
            out.write(Kind::Whole, b"")?;
            out.get_mut().flush().map_err(broken)?;
        }
        Ok(())
    }

    fn add(
        &mut self,
        batch: &mut Batch,
        number: u64,
        memory: &GuestMemory,
    ) -> Result<(), MigrationError> {
        let mask = self.pages.of_block(number);
        if !mask.is_empty() {
            let content = read_pages(memory, number, mask)?;
            batch.add(number as u32, mask, &content, false);
            self.pages.take(number, mask);
            self.recent.take(number, mask);
        }
        Ok(())
    }

    fn send<S: Write>(
        &mut self,
        batch: &Batch,
        out: &mut FrameWriter<S>,
    ) -> Result<Paying, MigrationError> {
        out.write(Kind::Pages, batch.payload().unwrap_or_default())?;
        out.get_mut().flush().map_err(broken)?;
        self.sent += 1;
        let totals = batch.totals();
        self.paid.totals.pages += totals.pages;
        self.paid.totals.zeros += totals.zeros;
        Ok(Paying::More)
    }
}

fn broken(source: std::io::Error) -> StreamError {
    StreamError::Io {
        action: "write",
        source,
    }
}

/// What the other side says on a connection, frame by frame.
pub(super) struct Answers<S> {
    frames: FrameReader<S>,
}

impl<S: Read> Answers<S> {
    /// That goes on behind so many frames.
    pub fn behind(connection: S, frames: u32) -> Self {
        Answers {
            frames: FrameReader::behind(connection, frames),
        }
    }

    pub fn frames(&self) -> u32 {
        self.frames.frames()
    }

    pub fn next(&mut self) -> Result<(Kind, &[u8]), StreamError> {
        match self.frames.next_frame()? {
            (Kind::Owed, payload) => Ok((Kind::Owed, payload)),
            (_, payload) if payload.len() > super::ANSWER_MAX as usize => {
                Err(malformed("a longer answer than there is"))
            }
            answer => Ok(answer),
        }
    }
}

/// Something has come.
pub(super) fn is_readable(connection: &impl AsFd) -> Result<bool, MigrationError> {
    is_readable_within(connection, Duration::ZERO)
}

/// Something comes within so long, or the connection is closed.
pub(super) fn is_readable_within(
    connection: &impl AsFd,
    time: Duration,
) -> Result<bool, MigrationError> {
    let by = Instant::now() + time;
    loop {
        let left = by.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or_default();
        let mut fds = [PollFd::from_borrowed_fd(connection.as_fd(), PollFlags::IN)];
        let source = match poll(&mut fds, Some(&left)) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => continue,
            Err(errno) => errno.into(),
        };
        let action = "wait for";
        return Err(StreamError::Io { action, source }.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MemoryConfig;
    use crate::stream::BLOCK;

    const MEMORY: u64 = 4 << 20;
    const BLOCKS: u64 = MEMORY / BLOCK as u64;

    fn blocks(numbers: &[u64]) -> PageSet {
        let mut set = PageSet::new(MEMORY);
        for number in numbers {
            let start = number * BLOCK as u64;
            set.add_range(start, start + BLOCK as u64);
        }
        set
    }

    /// The numbers of the blocks in what was sent.
    fn sent(debt: &mut Debt, memory: &GuestMemory) -> Vec<u64> {
        let mut numbers = Vec::new();
        loop {
            let mut out = FrameWriter::new(Vec::new());
            let paying = debt.pay(memory, &mut out).unwrap();
            let bytes = out.finish();
            if paying == Paying::Waits && bytes.is_empty() {
                return numbers;
            }
            let mut frames = FrameReader::new(&*bytes);
            let (_, mut payload) = frames.next_frame().unwrap();
            // Of pages that are zero nothing follows.
            while let Some((head, rest)) = payload.split_first_chunk::<8>() {
                numbers.push(u64::from(u32::from_le_bytes([
                    head[0], head[1], head[2], head[3],
                ])));
                payload = rest;
            }
            debt.hear(Kind::Got, b"").unwrap();
        }
    }

    #[test]
    fn what_was_written_last_goes_first_and_what_is_asked_for_before_it() {
        let config = MemoryConfig {
            bytes: MEMORY,
            pages: crate::config::PageSize::default(),
            host_nodes: Vec::new(),
        };
        let memory = GuestMemory::create_with(&config, None).unwrap();
        let all: Vec<u64> = (0..BLOCKS).collect();
        // One that is not owed is none of it.
        let mut owed = blocks(&all);
        owed.take(61, owed.of_block(61));
        let mut debt = Debt::new(owed, blocks(&[7, 40, 50, 61]));
        debt.hear(Kind::Wanted, &41u64.to_le_bytes()).unwrap();
        let order = sent(&mut debt, &memory);
        assert_eq!(order[..6], [41, 50, 7, 40, 42, 43]);
        let mut every = order;
        every.sort_unstable();
        assert_eq!(
            every,
            all.into_iter()
                .filter(|number| *number != 61)
                .collect::<Vec<_>>()
        );
    }
}
