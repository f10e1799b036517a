//! SIGINT and SIGTERM end a benchmark as an error does: by the way out, on which everything that it
//! started is ended.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, ExitStatus};
use std::sync::OnceLock;

use anyhow::{Context, anyhow};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Rings once a signal came, and is never silenced: by descriptor for what polls, by channel for what
/// is asynchronous.
struct Bell {
    fd: OwnedFd,
    came: watch::Receiver<bool>,
}

static BELL: OnceLock<Bell> = OnceLock::new();

/// From here on the signals ring instead of ending the process at once.
pub fn listen() -> anyhow::Result<()> {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let ring = fd.try_clone()?;
    let (tell, came) = watch::channel(false);
    BELL.set(Bell { fd, came })
        .map_err(|_| anyhow!("signals are listened to once"))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let entered = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    drop(entered);
    std::thread::Builder::new().spawn(move || {
        runtime.block_on(async {
            loop {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                tell.send_replace(true);
                // The counter of an eventfd holds more rings than anyone will send.
                let _ = rustix::io::write(&ring, &1u64.to_ne_bytes());
            }
        });
    })?;
    Ok(())
}

/// Waits for a process that ends by the same signals, and passes them on: it has its own way out.
pub fn end_of(child: &mut Child) -> anyhow::Result<ExitStatus> {
    let pid = Pid::from_child(child);
    let ends = pidfd_open(pid, PidfdFlags::empty())?;
    let bell = bell().context("signals are not listened to")?;
    let mut fds = [
        PollFd::new(&ends, PollFlags::IN),
        PollFd::from_borrowed_fd(bell, PollFlags::IN),
    ];
    while let Err(errno) = poll(&mut fds, None) {
        if errno != Errno::INTR {
            return Err(errno.into());
        }
    }
    if fds[0].revents().is_empty() {
        kill_process(pid, Signal::TERM)?;
    }
    Ok(child.wait()?)
}

/// What to poll beside what is waited for.
pub fn bell() -> Option<BorrowedFd<'static>> {
    BELL.get().map(|bell| bell.fd.as_fd())
}

pub fn error() -> anyhow::Error {
    anyhow!("interrupted")
}

/// `work`, unless a signal comes first.
pub async fn unless<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    let bell = BELL.get().context("signals are not listened to")?;
    let mut came = bell.came.clone();
    tokio::select! {
        outcome = work => outcome,
        _ = came.wait_for(|came| *came) => Err(error()),
    }
}
