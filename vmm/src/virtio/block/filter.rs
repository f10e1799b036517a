//! Filters between the virtqueues and the storage of a disk.
//!
//! A filter sees every piece of I/O on its way down and every completion on its way up, and may hold
//! back, change, multiply or answer it: that is enough for a rate limit ([`Limit`]), and what mirror,
//! copy-before-write and overlay are to be made of. The stack changes only while nothing is in flight.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::backend::{Completion, DiskBackend, Geometry, Io, Operation};
use crate::config::DiskLimit;
use crate::virtio::bucket::TokenBucket;

/// What stands below a filter.
pub struct Below<'a> {
    filters: &'a mut [Box<dyn BlockFilter>],
    backend: &'a mut dyn DiskBackend,
}

impl Below<'_> {
    /// Passes a piece of I/O on; it comes back if there is no room.
    pub fn submit(&mut self, io: Io) -> Result<(), Io> {
        match self.filters.split_first_mut() {
            Some((filter, filters)) => filter.submit(
                io,
                &mut Below {
                    filters,
                    backend: self.backend,
                },
            ),
            None => self.backend.submit(io),
        }
    }

    pub fn geometry(&self) -> Geometry {
        self.backend.geometry()
    }
}

/// One filter. As it stands it passes everything through.
pub trait BlockFilter: Send {
    /// For people and for removal: one of a kind in a stack.
    fn name(&self) -> &'static str;

    fn submit(&mut self, io: Io, below: &mut Below<'_>) -> Result<(), Io> {
        below.submit(io)
    }

    /// A completion from below; `None` keeps it (the filter's own I/O, or only half of a whole).
    fn complete(&mut self, done: Completion, _below: &mut Below<'_>) -> Option<Completion> {
        Some(done)
    }

    /// When [`BlockFilter::tick`] is due, if ever.
    fn wake_at(&self) -> Option<Instant> {
        None
    }

    fn tick(&mut self, _now: Instant, _below: &mut Below<'_>) {}

    /// Lets go of all that it holds back, at once: the disk is being drained.
    fn release(&mut self, _below: &mut Below<'_>) {}
}

/// The storage of a disk with its filters, top first.
pub struct Stack {
    filters: Vec<Box<dyn BlockFilter>>,
    backend: Box<dyn DiskBackend>,
}

impl Stack {
    pub fn new(backend: Box<dyn DiskBackend>) -> Self {
        Self {
            filters: Vec::new(),
            backend,
        }
    }

    /// Puts a filter on top. Nothing may be in flight.
    pub fn insert(&mut self, filter: Box<dyn BlockFilter>) {
        self.filters.insert(0, filter);
    }

    /// Takes a filter out. Nothing may be in flight.
    pub fn remove(&mut self, name: &str) -> Option<Box<dyn BlockFilter>> {
        let at = self
            .filters
            .iter()
            .position(|filter| filter.name() == name)?;
        Some(self.filters.remove(at))
    }

    pub fn backend(&mut self) -> &mut dyn DiskBackend {
        self.backend.as_mut()
    }

    pub fn submit(&mut self, io: Io) -> Result<(), Io> {
        Below {
            filters: &mut self.filters,
            backend: self.backend.as_mut(),
        }
        .submit(io)
    }

    /// Hands out what is done and has passed all filters on its way up.
    pub fn reap(&mut self, done: &mut Vec<Completion>) {
        if self.filters.is_empty() {
            return self.backend.reap(done);
        }
        let mut below = Vec::new();
        loop {
            // Again: what a filter sends down may be done at once, and nobody would hear of it.
            self.backend.reap(&mut below);
            if below.is_empty() {
                return;
            }
            for completion in below.drain(..) {
                done.extend(rise(completion, &mut self.filters, self.backend.as_mut()));
            }
        }
    }

    pub fn wake_at(&self) -> Option<Instant> {
        self.filters
            .iter()
            .filter_map(|filter| filter.wake_at())
            .min()
    }

    pub fn tick(&mut self, now: Instant) {
        self.each(|filter, below| {
            if filter.wake_at().is_some_and(|at| at <= now) {
                filter.tick(now, below);
            }
        });
    }

    pub fn release(&mut self) {
        self.each(|filter, below| filter.release(below));
    }

    fn each(&mut self, mut visit: impl FnMut(&mut dyn BlockFilter, &mut Below<'_>)) {
        for index in 0..self.filters.len() {
            let (upper, filters) = self.filters.split_at_mut(index + 1);
            let mut below = Below {
                filters,
                backend: self.backend.as_mut(),
            };
            visit(upper[index].as_mut(), &mut below);
        }
    }
}

/// Takes a completion up through all filters, as far as they let it.
fn rise(
    completion: Completion,
    filters: &mut [Box<dyn BlockFilter>],
    backend: &mut dyn DiskBackend,
) -> Option<Completion> {
    let mut rising = completion;
    for index in (0..filters.len()).rev() {
        let (upper, filters) = filters.split_at_mut(index + 1);
        rising = upper[index].complete(rising, &mut Below { filters, backend })?;
    }
    Some(rising)
}

/// Holds I/O back so that bytes and operations a second stay within bounds, in order.
pub struct Limit {
    bytes: Option<TokenBucket>,
    operations: Option<TokenBucket>,
    held: VecDeque<Io>,
    wake_at: Option<Instant>,
}

/// What may pass at once when the config does not say, as milliseconds of the rate.
const BURST_MS: u64 = 100;

impl Limit {
    pub const NAME: &'static str = "limit";

    pub fn new(limit: &DiskLimit, now: Instant) -> Self {
        let burst_ms = if limit.burst_ms == 0 {
            BURST_MS
        } else {
            limit.burst_ms.into()
        };
        let bucket = |rate: u64| TokenBucket::new(rate, rate.saturating_mul(burst_ms) / 1000, now);
        Self {
            bytes: limit.bytes_per_second.map(bucket),
            operations: limit.operations_per_second.map(bucket),
            held: VecDeque::new(),
            wake_at: None,
        }
    }

    fn wait(&mut self, now: Instant) -> Duration {
        let buckets = [&mut self.bytes, &mut self.operations];
        buckets
            .into_iter()
            .flatten()
            .map(|bucket| bucket.wait(now))
            .max()
            .unwrap_or_default()
    }

    fn pass(&mut self, io: Io, now: Instant, below: &mut Below<'_>) -> Result<(), Io> {
        // Only what moves data costs bytes: making or discarding a terabyte of zeroes is one operation.
        let bytes = match io.operation {
            Operation::Read | Operation::Write => io.length,
            Operation::Flush | Operation::Discard | Operation::WriteZeroes { .. } => 0,
        };
        below.submit(io)?;
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes, now);
        }
        if let Some(bucket) = &mut self.operations {
            bucket.take(1, now);
        }
        Ok(())
    }

    /// Passes what is held, as far as `all` or the rates allow.
    fn drain(&mut self, now: Instant, all: bool, below: &mut Below<'_>) {
        while let Some(io) = self.held.pop_front() {
            let wait = self.wait(now);
            if !all && wait > Duration::ZERO {
                self.held.push_front(io);
                self.wake_at = Some(now + wait);
                return;
            }
            if let Err(io) = self.pass(io, now, below) {
                self.held.push_front(io);
                self.wake_at = Some(now + Duration::from_millis(1));
                return;
            }
        }
        self.wake_at = None;
    }
}

impl BlockFilter for Limit {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn submit(&mut self, io: Io, below: &mut Below<'_>) -> Result<(), Io> {
        let now = Instant::now();
        self.held.push_back(io);
        self.drain(now, false, below);
        Ok(())
    }

    fn wake_at(&self) -> Option<Instant> {
        self.wake_at
    }

    fn tick(&mut self, now: Instant, below: &mut Below<'_>) {
        self.drain(now, false, below);
    }

    fn release(&mut self, below: &mut Below<'_>) {
        self.drain(Instant::now(), true, below);
    }
}
