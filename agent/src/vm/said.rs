//! What the guest's devices have said, kept for an agent that was not there to hear it.

use std::time::Instant;

use super::protocol::{GuestSaid, MachineEvent, QUIET};

#[derive(Debug, Default)]
pub struct Said {
    words: GuestSaid,
    /// A watchdog that runs out pauses the guest.
    pauses: bool,
    fired_at: Option<Instant>,
}

impl Said {
    pub fn new(pauses: bool) -> Self {
        Self {
            pauses,
            ..Self::default()
        }
    }

    /// Of a guest that has said so much in another process.
    pub fn going_on(pauses: bool, words: GuestSaid) -> Self {
        Self {
            words,
            ..Self::new(pauses)
        }
    }

    pub fn words(&self) -> GuestSaid {
        self.words
    }

    pub fn take_down(&mut self, event: &MachineEvent) {
        match event {
            MachineEvent::Panicked => self.words.panicked = true,
            MachineEvent::GuestReset => self.words.panicked = false,
            MachineEvent::WatchdogFired => {
                self.words.holds += u64::from(self.pauses);
                if self.fired_at.is_none_or(|at| at.elapsed() > QUIET) {
                    self.words.watchdog_fired += 1;
                    self.fired_at = Some(Instant::now());
                }
            }
            MachineEvent::Running | MachineEvent::Paused | MachineEvent::Stopped { .. } => {}
        }
    }
}
