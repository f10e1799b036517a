//! The watchdog, described to the guest by ACPI's WDAT table (Microsoft's "Hardware Watchdog Timers
//! Design Specification"): four registers in port space.
//!
//! WDAT rather than an emulated chip (i6300ESB, iTCO): Linux's `wdat_wdt` and Windows drive it without
//! a PCI function and without a quirk of hardware that was never built for guests.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use serde::{Deserialize, Serialize};

use crate::device::{Board, BusDevice, Device, DeviceError, Restore, SavedDevice};
use crate::reactor::{Interest, Reactor, Ready, Registration, Subscriber};
use crate::request::{Request, RequestSender};

pub(super) const ID: &str = "watchdog";
const STATE_VERSION: u32 = 1;

/// Offsets of the registers, 4 bytes each.
pub const CONTROL: u16 = 0;
pub const COUNTDOWN: u16 = 4;
pub const FEED: u16 = 8;
pub const STATUS: u16 = 12;
/// Bytes that the device takes.
pub const SIZE: u64 = 16;
/// Control: it counts. Status: it fired; writing 1 clears.
pub const RUNNING: u32 = 1;
pub const FIRED: u32 = 1;

/// Milliseconds of one count, and the counts that a guest can set.
pub const PERIOD_MS: u32 = 100;
pub const MIN_COUNT: u32 = 1;
pub const MAX_COUNT: u32 = 0xffff;
/// 30 s until the guest says otherwise.
const DEFAULT_COUNT: u32 = 300;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogState {
    running: bool,
    fired: bool,
    count: u32,
    /// What is left when the machine is paused, milliseconds.
    left_ms: u64,
}

impl Default for WatchdogState {
    fn default() -> Self {
        WatchdogState {
            running: false,
            fired: false,
            count: DEFAULT_COUNT,
            left_ms: 0,
        }
    }
}

pub struct WatchdogResources {
    timer: OwnedFd,
    reactor: Reactor,
    requests: RequestSender,
}

impl WatchdogResources {
    pub fn open(board: &Board) -> Result<WatchdogResources, DeviceError> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)
            .map_err(|error| DeviceError::new(ID, "make its timer", error))?;
        let (reactor, requests) = (board.reactor.clone(), board.requests.clone());
        Ok(WatchdogResources {
            timer,
            reactor,
            requests,
        })
    }
}

pub struct Watchdog {
    /// For the reactor, which must own whom it calls.
    me: Weak<Watchdog>,
    resources: WatchdogResources,
    state: Mutex<Inner>,
}

struct Inner {
    saved: WatchdogState,
    /// When the timer fires, if it counts.
    due: Option<Instant>,
    paused: bool,
    watch: Option<Registration>,
}

impl Inner {
    fn left(&self) -> Duration {
        let due = self.due.filter(|_| self.saved.running && !self.paused);
        due.map_or(Duration::ZERO, |due| {
            due.saturating_duration_since(Instant::now())
        })
    }
}

impl Watchdog {
    pub fn new(resources: WatchdogResources) -> Arc<Watchdog> {
        Watchdog::with_state(resources, WatchdogState::default())
    }

    fn with_state(resources: WatchdogResources, saved: WatchdogState) -> Arc<Watchdog> {
        let state = Mutex::new(Inner {
            saved,
            paused: true,
            due: None,
            watch: None,
        });
        Arc::new_cyclic(|me| Watchdog {
            me: Weak::clone(me),
            resources,
            state,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fires `after` from now; never when zero.
    fn set_timer(&self, state: &mut Inner, after: Duration) {
        state.due = Instant::now().checked_add(after);
        let value = Timespec {
            tv_sec: after.as_secs() as i64,
            tv_nsec: after.subsec_nanos().into(),
        };
        let timer = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: value,
        };
        if let Err(error) =
            timerfd_settime(&self.resources.timer, TimerfdTimerFlags::empty(), &timer)
        {
            tracing::warn!(%error, "the watchdog's timer could not be set");
        }
    }

    /// From the start again, if it counts.
    fn feed(&self, state: &mut Inner) {
        let full = u64::from(state.saved.count) * u64::from(PERIOD_MS);
        let full = if state.saved.running { full } else { 0 };
        if state.paused {
            state.saved.left_ms = full;
        } else {
            self.set_timer(state, Duration::from_millis(full));
        }
    }
}

impl BusDevice for Watchdog {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let value = match offset as u16 {
            CONTROL => u32::from(state.saved.running),
            COUNTDOWN => (state.left().as_millis() / u128::from(PERIOD_MS)) as u32,
            STATUS => u32::from(state.saved.fired),
            _ => 0,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(bytes) = data.try_into() else { return };
        let value = u32::from_le_bytes(bytes);
        let mut state = self.lock();
        match offset as u16 {
            CONTROL => {
                state.saved.running = value & RUNNING != 0;
                self.feed(&mut state);
            }
            COUNTDOWN => {
                state.saved.count = value.clamp(MIN_COUNT, MAX_COUNT);
                self.feed(&mut state);
            }
            FEED => self.feed(&mut state),
            STATUS if value & FIRED != 0 => state.saved.fired = false,
            _ => {}
        }
    }
}

impl Subscriber for Watchdog {
    fn ready(&self, _tag: u32, _ready: Ready) {
        let mut state = self.lock();
        // Nothing to read: it was set anew since it fired.
        let fired = rustix::io::read(&self.resources.timer, &mut [0; 8]).is_ok();
        if fired && state.saved.running && !state.paused {
            state.saved.running = false;
            state.saved.fired = true;
            self.resources.requests.send(Request::WatchdogFired);
        }
    }
}

impl Device for Watchdog {
    fn id(&self) -> &str {
        ID
    }

    fn pause(&self) -> Result<(), DeviceError> {
        let mut state = self.lock();
        if !state.paused {
            // One that is due counts one millisecond more, not none.
            let left = if state.saved.running {
                state.left().as_millis().max(1)
            } else {
                0
            };
            state.saved.left_ms = left as u64;
            state.paused = true;
            self.set_timer(&mut state, Duration::ZERO);
        }
        Ok(())
    }

    fn resume(&self) -> Result<(), DeviceError> {
        let mut state = self.lock();
        if let (None, Some(me)) = (&state.watch, self.me.upgrade()) {
            let fd = self.resources.timer.as_fd();
            let watch = self.resources.reactor.register(fd, Interest::READ, me, 0);
            let failed = |error: io::Error| DeviceError::new(ID, "watch its timer", error);
            state.watch = Some(watch.map_err(failed)?);
        }
        if state.paused {
            state.paused = false;
            let left = Duration::from_millis(state.saved.left_ms);
            self.set_timer(&mut state, left);
        }
        Ok(())
    }

    /// A guest may ask after a reset whether the watchdog was the cause.
    fn reset(&self) -> Result<(), DeviceError> {
        let mut state = self.lock();
        state.saved = WatchdogState {
            fired: state.saved.fired,
            ..WatchdogState::default()
        };
        self.set_timer(&mut state, Duration::ZERO);
        Ok(())
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        SavedDevice::pack(ID, STATE_VERSION, &self.lock().saved)
    }
}

impl Restore for Arc<Watchdog> {
    type State = WatchdogState;
    type Resources = WatchdogResources;
    const VERSION: u32 = STATE_VERSION;

    fn restore(resources: WatchdogResources, state: WatchdogState) -> Result<Self, DeviceError> {
        Ok(Watchdog::with_state(resources, state))
    }
}
