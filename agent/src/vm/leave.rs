//! The host is going down, or an administrator wants the process gone: SIGTERM. The guest is asked to power
//! off and has some time for it; the process says that its host ended it, so that it is started again.
//!
//! The process is the first of its pid namespace, where the kernel drops a signal that nobody waits for: it
//! would outlive every SIGTERM, and a host that shuts down waits for such processes (systemd: 90 s).

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use fractus_agent_api::machine::StopReason;

/// For a guest to power off. systemd-shutdown kills what is there after 90 s.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

pub struct Leave {
    /// A signalfd.
    pub signals: OwnedFd,
    /// When the guest's time is over, once it has been asked.
    by: Option<Instant>,
    /// Until when it may be busy with something that another host needs.
    busy_until: Option<Instant>,
}

impl Leave {
    /// Keeps SIGTERM from this thread and those that it makes: it must be the only one yet.
    pub fn prepare() -> io::Result<Self> {
        // SAFETY: sigset_t is made of numbers, for which zero is a value; sigemptyset makes it one.
        let mut terminate: libc::sigset_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set lives through these calls, which write no further than it.
        let signals = unsafe {
            libc::sigemptyset(&raw mut terminate);
            libc::sigaddset(&raw mut terminate, libc::SIGTERM);
            if libc::sigprocmask(libc::SIG_BLOCK, &raw const terminate, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
            libc::signalfd(-1, &raw const terminate, flags)
        };
        if signals < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self {
            // SAFETY: just opened, and nobody else knows it.
            signals: unsafe { OwnedFd::from_raw_fd(signals) },
            by: None,
            busy_until: None,
        })
    }

    /// A signal came. Whether the guest is to be asked: who asks twice does not want to wait, nor can one
    /// that hears nothing be waited for.
    pub fn is_first(&mut self, hears: bool) -> bool {
        // One read takes one signal, and several that are the same are one.
        let mut information = [0; size_of::<libc::signalfd_siginfo>()];
        let _ = rustix::io::read(&self.signals, &mut information);
        let (now, again) = (Instant::now(), self.by.is_some());
        let first = !again && hears;
        self.by = Some(now + if first { PATIENCE } else { Duration::ZERO });
        self.busy_until = Some(now + if again { Duration::ZERO } else { PATIENCE });
        first
    }

    /// How long the guest still has; none: it was not asked.
    pub fn left(&self) -> Option<Duration> {
        self.by
            .map(|by| by.saturating_duration_since(Instant::now()))
    }

    /// How long it may still be busy with what another host needs; none: it was not asked.
    pub fn busy(&self) -> Option<Duration> {
        self.busy_until
            .map(|until| until.saturating_duration_since(Instant::now()))
    }

    /// Why the machine ended: what was asked of it, it did for its host.
    pub fn reason(&self, said: StopReason) -> StopReason {
        match said {
            StopReason::GuestPowerOff | StopReason::Requested if self.by.is_some() => {
                StopReason::HostReboot
            }
            said => said,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_signal_gives_time_and_another_one_takes_it() {
        let mut leave = Leave::prepare().unwrap();
        assert_eq!(leave.left(), None);
        let off = || StopReason::GuestPowerOff;
        assert_eq!(leave.reason(off()), off());
        assert!(leave.is_first(true));
        assert!(leave.left().unwrap() > PATIENCE / 2);
        assert!(leave.busy().unwrap() > PATIENCE / 2);
        assert_eq!(leave.reason(off()), StopReason::HostReboot);
        assert_eq!(leave.reason(StopReason::Watchdog), StopReason::Watchdog);
        assert!(!leave.is_first(true));
        assert_eq!(leave.left(), Some(Duration::ZERO));
        assert_eq!(leave.busy(), Some(Duration::ZERO));
    }

    #[test]
    fn one_that_hears_nothing_is_not_waited_for() {
        let mut leave = Leave::prepare().unwrap();
        assert!(!leave.is_first(false));
        assert_eq!(leave.left(), Some(Duration::ZERO));
        // But what others need of it may go first.
        assert!(leave.busy().unwrap() > PATIENCE / 2);
    }
}
