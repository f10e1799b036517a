//! What a machine's own devices say of its guest: that it panicked, was reset, let its watchdog run
//! out. Taken down for those who look at the server.
//!
//! A guest may say so as often as it likes, and that must cost the host nothing: record, log and
//! controllers are told once in [`QUIET`] at most, and of how things stand then.

use fractus_agent_api::guest::Watchdog;
use tokio::time::Instant;

use super::Actor;
use crate::machine::process::Launcher;
use crate::vm::protocol::{GuestSaid, MachineEvent, QUIET};

/// What was heard of one process's guest.
#[derive(Debug, Default)]
pub(super) struct Guest {
    /// Whether it is in panic, while the record says otherwise.
    panicked: Option<bool>,
    /// When the record was last changed in that.
    told_at: Option<Instant>,
    /// When its watchdog was last counted.
    fired_at: Option<Instant>,
    /// What was logged, and when last.
    logged: Vec<(MachineEvent, Instant)>,
}

impl Guest {
    /// When the record is to be told what it does not say yet.
    pub(super) fn tell_by(&self) -> Option<Instant> {
        let at = self.told_at?;
        self.panicked.is_some().then_some(at + QUIET)
    }

    /// To be logged, and not only by who looks closely.
    fn is_news(&mut self, event: &MachineEvent) -> bool {
        let now = Instant::now();
        match self.logged.iter_mut().find(|(said, _)| said == event) {
            Some((_, at)) if now - *at < QUIET => return false,
            Some((_, at)) => *at = now,
            None => self.logged.push((event.clone(), now)),
        }
        true
    }
}

impl<L: Launcher> Actor<L> {
    pub(super) fn guest_says(&mut self, event: &MachineEvent) {
        if self.guest.is_news(event) {
            tracing::info!(machine = %self.record.id, ?event, "the guest");
        } else {
            tracing::debug!(machine = %self.record.id, ?event, "the guest, again");
        }
        match event {
            MachineEvent::Panicked => self.panics(true),
            MachineEvent::GuestReset => self.panics(false),
            MachineEvent::WatchdogFired => self.watchdog_fired(),
            _ => {}
        }
    }

    fn watchdog_fired(&mut self) {
        let pauses = self.record.intent.wanted.spec.guest.watchdog == Some(Watchdog::Pause);
        let Some(process) = &mut self.record.process else {
            return;
        };
        let before = *process;
        process.held = pauses;
        process.holds += u64::from(pauses);
        if self.guest.fired_at.is_none_or(|at| at.elapsed() > QUIET) {
            process.guest.watchdog_fired += 1;
            self.guest.fired_at = Some(Instant::now());
        }
        if *process != before {
            self.note();
        }
    }

    /// Some of it when no agent was there.
    pub(super) fn guest_has_said(&mut self, said: &GuestSaid) {
        let Some(process) = &mut self.record.process else {
            return;
        };
        let before = *process;
        // One that was heard of may have been resumed by an intent since.
        process.held |= said.holds > process.holds;
        process.holds = process.holds.max(said.holds);
        let fired = &mut process.guest.watchdog_fired;
        *fired = (*fired).max(said.watchdog_fired);
        if *process != before {
            self.note();
        }
        self.panics(said.panicked);
    }

    /// Whether it is in panic now.
    fn panics(&mut self, panicked: bool) {
        let Some(process) = &self.record.process else {
            return;
        };
        self.guest.panicked = (process.guest.panicked != panicked).then_some(panicked);
        if self.guest.told_at.is_none_or(|at| at.elapsed() > QUIET) {
            self.tell_panic();
        }
    }

    /// The record is told what was kept from it.
    pub(super) fn tell_panic(&mut self) {
        if let Some(panicked) = self.guest.panicked.take()
            && let Some(process) = &mut self.record.process
        {
            process.guest.panicked = panicked;
            self.guest.told_at = Some(Instant::now());
            self.note();
        }
    }

    /// As if its quiet time were over.
    #[cfg(test)]
    pub(super) fn end_quiet(&mut self) {
        self.guest.told_at = Instant::now().checked_sub(QUIET);
    }
}
