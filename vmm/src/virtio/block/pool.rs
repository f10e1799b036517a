//! Disk I/O by a few threads with preadv and pwritev, for hosts without io_uring.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::backend::{Completion, DiskBackend, Geometry, Io};
use super::file::{DiskFile, execute};
use crate::eventfd::EventFd;
use crate::thread::Threads;
use crate::work::{Running, Work};

/// Threads of a disk.
pub const THREADS: usize = 4;

/// A disk's file behind threads.
pub struct Pool {
    disk: DiskFile,
    shared: Arc<Shared>,
    threads: Vec<Running>,
}

struct Shared {
    state: Mutex<State>,
    more: Condvar,
    done: EventFd,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Io>,
    done: Vec<Completion>,
    stop: bool,
}

impl Pool {
    pub fn new(disk: DiskFile, name: &str, threads: &Threads) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            more: Condvar::new(),
            done: EventFd::new()?,
        });
        let mut pool = Self {
            disk,
            shared,
            threads: Vec::new(),
        };
        for number in 0..THREADS {
            let (shared, disk) = (Arc::clone(&pool.shared), pool.disk.clone());
            let body = move |()| shared.serve(&disk);
            let thread = threads.work(Work::Block, &format!("{name}-{number}"), || (), body)?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, disk: &DiskFile) {
        loop {
            let mut state = self.lock();
            let mut io = loop {
                if state.stop {
                    return;
                }
                match state.queue.pop_front() {
                    Some(io) => break io,
                    None => {
                        state = self
                            .more
                            .wait(state)
                            .unwrap_or_else(PoisonError::into_inner)
                    }
                }
            };
            drop(state);
            let result = execute(disk, &mut io);
            self.lock().done.push(Completion { io, result });
            self.done.signal();
        }
    }
}

impl DiskBackend for Pool {
    fn geometry(&self) -> Geometry {
        self.disk.geometry()
    }

    fn submit(&mut self, io: Io) -> Result<(), Io> {
        self.shared.lock().queue.push_back(io);
        self.shared.more.notify_one();
        Ok(())
    }

    fn commit(&mut self) {}

    fn reap(&mut self, done: &mut Vec<Completion>) {
        self.shared.done.take();
        done.append(&mut self.shared.lock().done);
    }

    fn completion_fd(&self) -> BorrowedFd<'_> {
        self.shared.done.as_fd()
    }

    fn drop_cache(&mut self) {
        self.disk.drop_cache();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.more.notify_all();
        // A thread in a system call that hangs keeps what it works on alive; it is not waited for.
        for thread in self.threads.drain(..).filter(Running::is_finished) {
            thread.join();
        }
    }
}
