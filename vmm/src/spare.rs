//! Threads made in advance, for work that comes when a locked-down process can make none any more.
//!
//! Each has run the embedder's hook and waits; a job takes one, and gives it back when it ends. Where
//! the machine is still being built ([`Threads::seal`] not called), work gets a thread of its own.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::thread::{ThreadKind, Threads};

type Job = Box<dyn FnOnce() + Send>;

/// The threads that wait, by what they may do: a locked-down thread cannot become another kind.
#[derive(Default)]
pub struct Spares {
    block: Pool,
    net: Pool,
}

/// Those of one kind, and what waits for them.
#[derive(Default)]
struct Pool {
    state: Mutex<State>,
    more: Condvar,
    freed: Condvar,
}

/// How long work waits for a spare thread: whose job was told to end is free a moment later.
const PATIENCE: Duration = Duration::from_millis(300);

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Threads that wait and have no job coming.
    idle: usize,
    sealed: bool,
    closed: bool,
}

/// Work under way, on a thread of its own or a spare one.
pub struct Running(Inner);

enum Inner {
    Own(JoinHandle<()>),
    Spare(Arc<Done>),
}

#[derive(Default)]
struct Done {
    done: Mutex<bool>,
    changed: Condvar,
}

/// Says so when it is dropped, however the job ended.
struct Tell(Arc<Done>);

impl Drop for Tell {
    fn drop(&mut self) {
        *lock(&self.0.done) = true;
        self.0.changed.notify_all();
    }
}

/// Ends the threads that wait when it is dropped.
pub struct SpareThreads(Arc<Spares>);

impl Drop for SpareThreads {
    fn drop(&mut self) {
        for pool in self.0.pools() {
            lock(&pool.state).closed = true;
            pool.more.notify_all();
        }
    }
}

/// What spare threads are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Disk I/O.
    Block,
    /// Packets.
    Net,
}

impl Work {
    fn kind(self) -> ThreadKind {
        match self {
            Work::Block => ThreadKind::Block,
            Work::Net => ThreadKind::Net,
        }
    }
}

impl Running {
    pub fn is_finished(&self) -> bool {
        match &self.0 {
            Inner::Own(thread) => thread.is_finished(),
            Inner::Spare(done) => *lock(&done.done),
        }
    }

    /// Waits for its end; that it panicked the machine has been told.
    pub fn join(self) {
        match self.0 {
            Inner::Own(thread) => drop(thread.join()),
            Inner::Spare(done) => {
                let mut is_done = lock(&done.done);
                while !*is_done {
                    is_done = wait(&done.changed, is_done);
                }
            }
        }
    }
}

impl Threads {
    /// Makes threads that wait for [`Threads::work`], so many for each kind of it.
    pub fn prepare(&self, counts: [(Work, usize); 2]) -> io::Result<SpareThreads> {
        let made = SpareThreads(self.spares().clone());
        for (work, count) in counts {
            for number in 0..count {
                let spares = self.spares().clone();
                lock(&spares.pool(work).state).idle += 1;
                let body = move |()| spares.pool(work).serve();
                let name = match work {
                    Work::Block => format!("spare{number}"),
                    Work::Net => format!("sparenet{number}"),
                };
                self.spawn(work.kind(), &name, || (), body)?;
            }
        }
        Ok(made)
    }

    /// From here on no thread is made for work: it goes to spare ones.
    pub fn seal(&self) {
        for pool in self.spares().pools() {
            lock(&pool.state).sealed = true;
        }
    }

    /// Like [`Threads::spawn`]: takes a spare thread once none can be made any more, and fails if none
    /// is left.
    pub fn work<S, B>(
        &self,
        work: Work,
        name: &str,
        setup: impl FnOnce() -> S + Send + 'static,
        body: B,
    ) -> io::Result<Running>
    where
        B: FnOnce(S) + Send + 'static,
    {
        let pool = self.spares().pool(work);
        if !lock(&pool.state).sealed {
            let thread = self.spawn(work.kind(), name, setup, body)?;
            return Ok(Running(Inner::Own(thread)));
        }
        let done = Arc::new(Done::default());
        let (tell, watch, name) = (Tell(done.clone()), self.watch(), name.to_owned());
        let job = move || {
            let _tell = tell;
            watch.run(&name, || body(setup()));
        };
        pool.give(Box::new(job))?;
        Ok(Running(Inner::Spare(done)))
    }
}

impl Spares {
    fn pool(&self, work: Work) -> &Pool {
        match work {
            Work::Block => &self.block,
            Work::Net => &self.net,
        }
    }

    fn pools(&self) -> [&Pool; 2] {
        [&self.block, &self.net]
    }
}

impl Pool {
    fn give(&self, job: Job) -> io::Result<()> {
        let (mut state, _) = (self.freed)
            .wait_timeout_while(lock(&self.state), PATIENCE, |state| state.idle == 0)
            .unwrap_or_else(PoisonError::into_inner);
        let Some(left) = state.idle.checked_sub(1) else {
            let text = "all threads that were made for later devices are in use";
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, text));
        };
        state.idle = left;
        state.jobs.push_back(job);
        self.more.notify_one();
        Ok(())
    }

    fn serve(&self) {
        let mut state = lock(&self.state);
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                job();
                state = lock(&self.state);
                state.idle += 1;
                self.freed.notify_one();
            } else if state.closed {
                return;
            } else {
                state = wait(&self.more, state);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a, T>(changed: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    changed.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread::{ThreadId, current};

    use super::*;
    use crate::request::{Request, channel};

    #[test]
    fn sealed_work_runs_on_prepared_threads_again_and_again_and_no_others() {
        let (requests, receiver) = channel().unwrap();
        let threads = Threads::new(None, requests);
        let spares = threads.prepare([(Work::Block, 1), (Work::Net, 1)]);
        let spares = spares.unwrap();
        threads.seal();
        let (tell, told) = mpsc::channel::<ThreadId>();
        let run = || {
            let tell = tell.clone();
            let body = move |()| tell.send(current().id()).unwrap();
            threads.work(Work::Block, "work", || (), body)
        };
        run().unwrap().join();
        run().unwrap().join();
        let first = told.recv().unwrap();
        assert_eq!(told.recv().unwrap(), first);
        assert_ne!(first, current().id());

        let (end, wait) = mpsc::channel::<()>();
        let body = move |()| {
            let _ = wait.recv();
        };
        let busy = threads.work(Work::Block, "busy", || (), body).unwrap();
        let refused = run().err().unwrap();
        assert!(refused.to_string().contains("in use"), "{refused}");
        // The other kind has its own.
        let other = threads.work(Work::Net, "other", || (), |()| ());
        other.unwrap().join();
        assert!(!busy.is_finished());
        drop(end);
        busy.join();

        // A panic ends the machine, not the thread.
        let unlucky = threads.work(Work::Block, "unlucky", || (), |()| panic!("out of luck"));
        unlucky.unwrap().join();
        let (thread, detail) = ("unlucky".to_owned(), "out of luck".to_owned());
        let expected = Request::ThreadPanicked { thread, detail };
        assert_eq!(receiver.try_next(), Some(expected));
        drop(spares);
    }
}
