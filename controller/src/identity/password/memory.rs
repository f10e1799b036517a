//! The memory that passwords are hashed in: 19 MiB a hash, kept while logins come and given back when
//! they stop.
//!
//! Owns every such block of the process. There are never more than cores: whoever hashes holds a permit
//! from before the block is taken until after it is back, and one is made only where none is idle. It
//! must never leave a block to the allocator's own judgement: glibc keeps what is freed in the arena of
//! the thread that freed it, and so a hundred logins on tokio's threads kept 16 of them (measured:
//! 394 MB).

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use argon2::Block;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::clock::Clock;

/// Bytes asked of the allocator for a block, of which only what a hash needs is ever touched. Beyond
/// 32 MiB glibc always maps and unmaps (`DEFAULT_MMAP_THRESHOLD_MAX`), and does not learn from it to
/// keep such sizes: a block given back is gone from the process.
const RESERVED: usize = 33 << 20;

/// A block that nobody needed for this long is given back.
const KEPT: Duration = Duration::from_secs(5);

/// All blocks, and the right to take one.
pub(super) struct Pool {
    cores: Arc<Semaphore>,
    idle: Mutex<Vec<Vec<Block>>>,
    /// Blocks that there are, idle ones and those in use.
    made: AtomicUsize,
    /// The most that there ever were.
    most: AtomicUsize,
    /// A hash was made since [`Pool::give_back`] last looked.
    used: AtomicBool,
    /// Somebody looks after the idle blocks.
    watched: AtomicBool,
    clock: Arc<dyn Clock>,
}

/// The right to hash, on one core, in one block.
pub(super) struct Turn {
    pool: Arc<Pool>,
    runtime: Handle,
    _core: OwnedSemaphorePermit,
}

impl Pool {
    pub(super) fn new(clock: Arc<dyn Clock>) -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Arc::new(Self {
            cores: Arc::new(Semaphore::new(cores)),
            idle: Mutex::new(Vec::with_capacity(cores)),
            made: AtomicUsize::new(0),
            most: AtomicUsize::new(0),
            used: AtomicBool::new(false),
            watched: AtomicBool::new(false),
            clock,
        })
    }

    /// Waits for a core. `None`: the pool was closed, which nobody does.
    pub(super) async fn turn(self: &Arc<Self>) -> Option<Turn> {
        let core = Arc::clone(&self.cores).acquire_owned().await.ok()?;
        Some(Turn {
            pool: Arc::clone(self),
            runtime: Handle::current(),
            _core: core,
        })
    }

    /// Gives idle blocks back once no hash was made for a while; ends when there is none.
    async fn give_back(self: Arc<Self>) {
        loop {
            self.clock.sleep(KEPT).await;
            if self.used.swap(false, Ordering::AcqRel) {
                continue;
            }
            {
                // Under the lock, so that none is made while one is still being given back.
                let mut idle = self.idle();
                self.made.fetch_sub(idle.len(), Ordering::AcqRel);
                idle.clear();
            }
            self.watched.store(false, Ordering::SeqCst);
            // A hash that ended in between found a watcher, and its block needs one still.
            if self.idle().is_empty() || self.watched.swap(true, Ordering::SeqCst) {
                return;
            }
        }
    }

    fn take(&self) -> Vec<Block> {
        // The one used last: when few log in, the others are not touched.
        if let Some(block) = self.idle().pop() {
            return block;
        }
        let made = self.made.fetch_add(1, Ordering::AcqRel) + 1;
        self.most.fetch_max(made, Ordering::AcqRel);
        Vec::with_capacity(RESERVED / Block::SIZE)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Vec<Block>>> {
        // A panic elsewhere left whole blocks here: the list is good.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    pub(super) fn cores(&self) -> &Arc<Semaphore> {
        &self.cores
    }

    /// Blocks now, and the most that there ever were.
    #[cfg(test)]
    pub(super) fn blocks(&self) -> (usize, usize) {
        (
            self.made.load(Ordering::Acquire),
            self.most.load(Ordering::Acquire),
        )
    }
}

impl Turn {
    /// Runs `hash` in a block of at least `blocks` KiB. What the block holds before is of no meaning.
    pub(super) fn run<T>(self, blocks: usize, hash: impl FnOnce(&mut [Block]) -> T) -> T {
        let mut memory = Borrowed {
            turn: &self,
            blocks: self.pool.take(),
        };
        if memory.blocks.len() < blocks {
            memory.blocks.resize(blocks, Block::new());
        }
        hash(&mut memory.blocks)
    }
}

/// A block that goes back to the pool however the hash ends.
struct Borrowed<'a> {
    turn: &'a Turn,
    blocks: Vec<Block>,
}

impl Drop for Borrowed<'_> {
    fn drop(&mut self) {
        let pool = &self.turn.pool;
        pool.used.store(true, Ordering::Release);
        pool.idle().push(std::mem::take(&mut self.blocks));
        if !pool.watched.swap(true, Ordering::SeqCst) {
            self.turn.runtime.spawn(Arc::clone(pool).give_back());
        }
    }
}
