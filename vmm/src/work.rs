//! Threads for work that comes when the machine has been built and its threads are locked down.
//!
//! Of those threads only one may make others: the spawner, which [`Threads::prepare`] starts. What it
//! makes inherits its restrictions and takes on those of its kind before it does anything. Until
//! [`Threads::seal`], while nothing is locked down yet, work gets a thread directly.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::thread::{ThreadKind, Threads};

const WORKS: usize = 4;

type Job = Box<dyn FnOnce() + Send>;

/// What is to be done later, and how much of it at a time.
#[derive(Default)]
pub struct Later {
    state: Mutex<State>,
    /// There is an order, or the end.
    more: Condvar,
    /// Work has ended.
    freed: Condvar,
}

#[derive(Default)]
struct State {
    orders: VecDeque<Order>,
    /// How much more of each kind there may be, and how much at most.
    room: [usize; WORKS],
    most: [usize; WORKS],
    sealed: bool,
    closed: bool,
}

/// A thread that is wanted.
struct Order {
    work: Work,
    name: String,
    job: Job,
    tell: Tell,
    made: SyncSender<io::Result<()>>,
}

/// How long work waits for room: whose job was told to end is gone a moment later.
const PATIENCE: Duration = Duration::from_millis(300);

/// Work under way, on a thread of its own.
pub struct Running(Inner);

enum Inner {
    Own(JoinHandle<()>),
    Later(Arc<Done>),
}

#[derive(Default)]
struct Done {
    done: Mutex<bool>,
    changed: Condvar,
}

/// Says so, and makes room, when it is dropped: after the job, however that ended.
struct Tell {
    done: Arc<Done>,
    later: Arc<Later>,
    work: Work,
}

impl Drop for Tell {
    fn drop(&mut self) {
        *lock(&self.done.done) = true;
        self.done.changed.notify_all();
        self.later.free(self.work);
    }
}

/// Ends the spawner when it is dropped, and waits until its thread is gone: that holds a descriptor of the
/// machine's.
pub struct Spawner {
    closes: Option<Closes>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Spawner {
    fn drop(&mut self) {
        drop(self.closes.take());
        if let Some(thread) = self.thread.take() {
            // That it panicked the machine has been told.
            let _ = thread.join();
        }
    }
}

/// Nothing can be ordered any more once this is dropped, and nobody waits. The owner of the machine has one
/// and so does the spawner's thread: a panic there must not leave the owner waiting for it.
struct Closes(Arc<Later>);

impl Drop for Closes {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.closed = true;
        let left = std::mem::take(&mut state.orders);
        drop(state);
        self.0.more.notify_all();
        // Each makes room, for which it takes the lock.
        drop(left);
    }
}

/// What threads are for that may be wanted later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// Disk I/O.
    Block,
    /// Packets.
    Net,
    /// A half of what the machine's owner copies to a file.
    Copy,
    /// Memory that goes to another process by a connection of its own.
    Lane,
}

impl Work {
    fn kind(self) -> ThreadKind {
        match self {
            Work::Block | Work::Copy => ThreadKind::Block,
            Work::Net => ThreadKind::Net,
            Work::Lane => ThreadKind::Lane,
        }
    }
}

impl Running {
    pub fn is_finished(&self) -> bool {
        match &self.0 {
            Inner::Own(thread) => thread.is_finished(),
            Inner::Later(done) => *lock(&done.done),
        }
    }

    /// Waits for its end; that it panicked the machine has been told.
    pub fn join(self) {
        match self.0 {
            Inner::Own(thread) => drop(thread.join()),
            Inner::Later(done) => {
                let mut is_done = lock(&done.done);
                while !*is_done {
                    is_done = wait(&done.changed, is_done);
                }
            }
        }
    }
}

impl Threads {
    /// Starts the spawner, for at most so much work of each kind at a time. An embedder whose hook
    /// forbids to open files must first tell the C library how many heaps it may have (`M_ARENA_MAX`):
    /// it would else read that from a file when it makes one for a new thread.
    pub fn prepare(&self, room: [(Work, usize); WORKS]) -> io::Result<Option<Spawner>> {
        let later = self.later();
        let mut total = 0;
        for (work, count) in room {
            let mut state = lock(&later.state);
            *state.room_of(work) = count;
            state.most[work as usize] = count;
            drop(state);
            total += count;
        }
        if total == 0 {
            return Ok(None);
        }
        let closes = Closes(later.clone());
        let threads = self.clone();
        let serve = move |()| threads.later().serve(&threads);
        let thread = self.spawn_holding(ThreadKind::Spawner, "spawner", || (), serve, closes)?;
        Ok(Some(Spawner {
            closes: Some(Closes(later.clone())),
            thread: Some(thread),
        }))
    }

    /// From here on threads for work are made by the spawner.
    pub fn seal(&self) {
        lock(&self.later().state).sealed = true;
    }

    /// Like [`Threads::spawn`]; once sealed, `setup` runs behind the hook as well, and it fails when
    /// there is as much work as the spawner was prepared for.
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
        let later = self.later();
        if !lock(&later.state).sealed {
            let thread = self.spawn(work.kind(), name, setup, body)?;
            return Ok(Running(Inner::Own(thread)));
        }
        later.take_room(work)?;
        let done = Arc::new(Done::default());
        let tell = Tell {
            done: done.clone(),
            later: later.clone(),
            work,
        };
        let job = Box::new(move || body(setup()));
        later.order(work, name.to_owned(), job, tell)?;
        Ok(Running(Inner::Later(done)))
    }
}

impl Later {
    fn take_room(&self, work: Work) -> io::Result<()> {
        let full = |state: &mut State| *state.room_of(work) == 0 && state.most[work as usize] > 0;
        let (mut state, _) = (self.freed)
            .wait_timeout_while(lock(&self.state), PATIENCE, full)
            .unwrap_or_else(PoisonError::into_inner);
        let room = state.room_of(work);
        let Some(left) = room.checked_sub(1) else {
            let text = "all threads that the machine may have for later devices are in use";
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, text));
        };
        *room = left;
        Ok(())
    }

    fn free(&self, work: Work) {
        *lock(&self.state).room_of(work) += 1;
        self.freed.notify_all();
    }

    /// Has the spawner make a thread for this, and hears whether it could.
    fn order(&self, work: Work, name: String, job: Job, tell: Tell) -> io::Result<()> {
        let (made, answer) = sync_channel(1);
        let order = Order {
            work,
            name,
            job,
            tell,
            made,
        };
        let mut state = lock(&self.state);
        if state.closed {
            return Err(ended());
        }
        state.orders.push_back(order);
        drop(state);
        self.more.notify_one();
        answer.recv().unwrap_or_else(|_| Err(ended()))
    }

    /// The spawner's life.
    fn serve(&self, threads: &Threads) {
        let mut state = lock(&self.state);
        while !state.closed {
            let Some(order) = state.orders.pop_front() else {
                state = wait(&self.more, state);
                continue;
            };
            drop(state);
            let Order {
                work,
                name,
                job,
                tell,
                made,
            } = order;
            let job = move |()| job();
            let thread = threads.spawn_holding(work.kind(), &name, || (), job, tell);
            // Who ordered it waits for this.
            let _ = made.send(thread.map(drop));
            state = lock(&self.state);
        }
    }
}

impl State {
    fn room_of(&mut self, work: Work) -> &mut usize {
        let [block, net, copy, lane] = &mut self.room;
        match work {
            Work::Block => block,
            Work::Net => net,
            Work::Copy => copy,
            Work::Lane => lane,
        }
    }
}

fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the machine is ending")
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
    use crate::thread::ThreadHook;

    const ROOM: [(Work, usize); WORKS] = [
        (Work::Block, 1),
        (Work::Net, 1),
        (Work::Copy, 1),
        (Work::Lane, 1),
    ];

    #[test]
    fn sealed_work_gets_a_thread_behind_its_hook_as_long_as_there_is_room() {
        let (requests, receiver) = channel().unwrap();
        let (tell, told) = mpsc::channel::<(ThreadKind, ThreadId)>();
        let hook: ThreadHook = Arc::new(move |kind| tell.send((kind, current().id())).unwrap());
        let threads = Threads::new(Some(hook), requests);
        let spawner = threads.prepare(ROOM).unwrap();
        assert_eq!(told.recv().unwrap().0, ThreadKind::Spawner);
        threads.seal();
        for _ in 0..3 {
            let (say, said) = mpsc::channel();
            let setup = || current().id();
            let body = move |id| say.send((id, current().id())).unwrap();
            threads
                .work(Work::Block, "work", setup, body)
                .unwrap()
                .join();
            let (set_up, ran) = said.recv().unwrap();
            let (kind, hooked) = told.recv().unwrap();
            assert_eq!((kind, hooked, set_up), (ThreadKind::Block, ran, ran));
            assert_ne!(ran, current().id());
        }

        let (end, wait) = mpsc::channel::<()>();
        let body = move |()| {
            let _ = wait.recv();
        };
        let busy = threads.work(Work::Block, "busy", || (), body).unwrap();
        let refused = threads.work(Work::Block, "more", || (), |()| ()).err();
        let refused = refused.unwrap().to_string();
        assert!(refused.contains("in use"), "{refused}");
        // The other kind has its own.
        let other = threads.work(Work::Net, "other", || (), |()| ());
        other.unwrap().join();
        assert!(!busy.is_finished());
        drop(end);
        busy.join();

        // A panic ends the machine, and makes room all the same.
        for _ in 0..2 {
            let unlucky = threads.work(Work::Block, "unlucky", || (), |()| panic!("out of luck"));
            unlucky.unwrap().join();
        }
        let (thread, detail) = ("unlucky".to_owned(), "out of luck".to_owned());
        let expected = Request::ThreadPanicked { thread, detail };
        // Both have been told: that work has ended is said last.
        assert_eq!(receiver.try_next(), Some(expected.clone()));
        assert_eq!(receiver.try_next(), Some(expected));
        drop(spawner);
    }

    #[test]
    fn what_was_ordered_of_a_spawner_that_ends_or_panics_is_refused() {
        for panics in [false, true] {
            let (requests, _receiver) = channel().unwrap();
            let (go, gone) = mpsc::channel::<()>();
            let gone = Mutex::new(gone);
            let hook: ThreadHook = Arc::new(move |_| {
                let _ = lock(&gone).recv();
                assert!(!panics, "as it was told");
            });
            let threads = Threads::new(Some(hook), requests);
            let spawner = threads.prepare(ROOM).unwrap();
            threads.seal();
            let other = threads.clone();
            let ordered = std::thread::spawn(move || {
                other.work(Work::Net, "late", || (), |()| ()).err().unwrap()
            });
            while lock(&threads.later().state).orders.is_empty() {
                std::thread::yield_now();
            }
            let ending = if panics {
                drop(go);
                None
            } else {
                // It waits for the thread, which is held; who ordered must not.
                Some((std::thread::spawn(move || drop(spawner)), go))
            };
            assert_eq!(ordered.join().unwrap().kind(), io::ErrorKind::BrokenPipe);
            if let Some((ending, go)) = ending {
                assert!(!ending.is_finished());
                drop(go);
                ending.join().unwrap();
            }
            assert_eq!(lock(&threads.later().state).room, [1; WORKS]);
        }
    }

    #[test]
    fn without_a_spawner_or_after_its_end_there_is_no_thread_and_nobody_waits() {
        let (requests, _receiver) = channel().unwrap();
        let threads = Threads::new(None, requests);
        assert!(
            threads
                .prepare(ROOM.map(|(work, _)| (work, 0)))
                .unwrap()
                .is_none()
        );
        // Not locked down yet: a thread of its own.
        threads
            .work(Work::Block, "early", || (), |()| ())
            .unwrap()
            .join();
        threads.seal();
        let refused = threads
            .work(Work::Block, "late", || (), |()| ())
            .err()
            .unwrap();
        assert_eq!(refused.kind(), io::ErrorKind::QuotaExceeded);

        let (requests, _receiver) = channel().unwrap();
        let threads = Threads::new(None, requests);
        let spawner = threads.prepare(ROOM).unwrap();
        threads.seal();
        drop(spawner);
        for _ in 0..2 {
            // Its room came back with it.
            let refused = threads
                .work(Work::Net, "late", || (), |()| ())
                .err()
                .unwrap();
            assert_eq!(refused.kind(), io::ErrorKind::BrokenPipe);
        }
    }
}
