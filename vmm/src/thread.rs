//! Threads of the machine: each is started here, so that the embedder can lock each down and a panic
//! in any of them stops this one machine with a reason.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use crate::request::{Request, RequestSender};
use crate::work::Later;

/// What a thread does, and so what it may be allowed to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ThreadKind {
    /// KVM_RUN and the devices' registers.
    Vcpu,
    /// Disk I/O, and a half of what is copied to a file.
    Block,
    /// Packets, one thread a pair of queues.
    Net,
    /// Sockets between guest and host.
    Vsock,
    /// The reactor: serial line, consoles, timers.
    Console,
    /// What of the guest's memory comes after it.
    Pages,
    /// Guest memory by a connection between two processes, out or in.
    Lane,
    /// Makes threads of kinds `Block`, `Net` and `Lane` for what comes later, and does nothing else.
    Spawner,
    /// The one that owns the machine. The embedder's own: never started here.
    Main,
}

/// Called at the start of each thread, after all of its set-up: the place for seccomp and the like.
pub type ThreadHook = Arc<dyn Fn(ThreadKind) + Send + Sync>;

/// Starts threads. Cheap to clone.
#[derive(Clone)]
pub struct Threads {
    hook: Option<ThreadHook>,
    requests: RequestSender,
    later: Arc<Later>,
}

/// Tells the machine of a panic.
pub struct Watch(RequestSender);

impl Watch {
    /// Runs `work`, under the name that a panic is told with.
    pub fn run(&self, name: &str, work: impl FnOnce()) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
            let detail = panic_text(&*panic).to_owned();
            let thread = name.to_owned();
            self.0.send(Request::ThreadPanicked { thread, detail });
        }
    }
}

/// Enough for any thread of ours; address space only, until touched.
const STACK: usize = 512 << 10;

impl Threads {
    pub fn new(hook: Option<ThreadHook>, requests: RequestSender) -> Threads {
        Threads {
            hook,
            requests,
            later: Arc::default(),
        }
    }

    pub fn later(&self) -> &Arc<Later> {
        &self.later
    }

    pub fn watch(&self) -> Watch {
        Watch(self.requests.clone())
    }

    /// Runs `setup` and then, behind the hook, `body` on what it returned. A panic in either becomes
    /// [`Request::ThreadPanicked`] of that name.
    pub fn spawn<S, B>(
        &self,
        kind: ThreadKind,
        name: &str,
        setup: impl FnOnce() -> S + Send + 'static,
        body: B,
    ) -> io::Result<JoinHandle<()>>
    where
        B: FnOnce(S) + Send + 'static,
    {
        self.spawn_holding(kind, name, setup, body, ())
    }

    /// Like [`Threads::spawn`]; `held` is dropped when all else has been, and a panic has been told.
    pub(crate) fn spawn_holding<S, B>(
        &self,
        kind: ThreadKind,
        name: &str,
        setup: impl FnOnce() -> S + Send + 'static,
        body: B,
        held: impl Send + 'static,
    ) -> io::Result<JoinHandle<()>>
    where
        B: FnOnce(S) + Send + 'static,
    {
        let hook = self.hook.clone();
        let watch = self.watch();
        let thread = name.to_owned();
        Builder::new()
            .name(name.to_owned())
            .stack_size(STACK)
            .spawn(move || {
                let _held = held;
                watch.run(&thread, || {
                    let ready = setup();
                    if let Some(hook) = &hook {
                        hook(kind);
                    }
                    body(ready);
                });
            })
    }
}

/// The message of a panic, as far as it has one.
pub fn panic_text(panic: &(dyn Any + Send)) -> &str {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text,
        _ => "no message",
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::request::channel;

    #[test]
    fn the_hook_runs_between_set_up_and_body() {
        let (sender, _receiver) = channel().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&log);
        let hook: ThreadHook = Arc::new(move |kind| seen.lock().unwrap().push(format!("{kind:?}")));
        let threads = Threads::new(Some(hook), sender);
        let (first, last) = (Arc::clone(&log), Arc::clone(&log));
        let thread = threads.spawn(
            ThreadKind::Block,
            "disk0",
            move || first.lock().unwrap().push("setup".to_owned()),
            move |()| last.lock().unwrap().push("body".to_owned()),
        );
        thread.unwrap().join().unwrap();
        assert_eq!(*log.lock().unwrap(), ["setup", "Block", "body"]);
    }

    #[test]
    fn a_panic_stops_the_machine_with_its_message() {
        let (sender, receiver) = channel().unwrap();
        let threads = Threads::new(None, sender);
        let thread = threads.spawn(
            ThreadKind::Block,
            "disk0",
            || (),
            |()| panic!("out of luck"),
        );
        thread.unwrap().join().unwrap();
        let (thread, detail) = ("disk0".to_owned(), "out of luck".to_owned());
        assert_eq!(
            receiver.try_next(),
            Some(Request::ThreadPanicked { thread, detail })
        );
    }
}
