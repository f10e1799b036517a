//! What others are told of a machine: its report, from the record, the phase and the failure.

use std::sync::atomic::Ordering;

use fractus_agent_api::decision::Step;
use fractus_agent_api::device::DeviceKind;
use fractus_agent_api::machine::{MachineReport, Observed, Power, StopReason};
use fractus_agent_api::migration::Transit;

use super::{Actor, Phase, blocking};
use crate::clock::now_us;
use crate::machine::process::{Launcher, Process};
use crate::machine::record::Record;

impl<L: Launcher> Actor<L> {
    pub(super) fn fail(&mut self, reason: String) {
        tracing::warn!(machine = %self.record.id, reason, "failed");
        self.failed = Some(reason);
        self.publish();
    }

    pub(super) fn persist(&mut self) {
        if let Err(error) = blocking(|| self.record.write(&self.paths.record())) {
            // What the record says is older than what is: repeated after a crash, which is harmless.
            tracing::error!(machine = %self.record.id, %error, "record");
        }
        // Before anybody hears that it is one.
        self.give_user_back();
        self.publish();
    }

    /// The same for what can be found out again after a crash; nobody is told.
    pub(super) fn note(&self) {
        if let Err(error) = blocking(|| self.record.note(&self.paths.record())) {
            tracing::error!(machine = %self.record.id, %error, "record");
        }
    }

    pub(super) fn observe_starting(&mut self, step: &str) {
        self.send(
            Observed::Starting {
                step: step.to_owned(),
            },
            false,
        );
    }

    pub(super) fn publish(&mut self) {
        let process = self.process.as_ref();
        self.pid
            .store(process.map_or(0, |p| p.identity().pid), Ordering::Relaxed);
        let transit = self.travel.transit;
        let moves = matches!(transit, Transit::Arriving(_) | Transit::Copying(_));
        let moves = moves || self.travel.unheard;
        let done = self.next() == Step::Settled && self.phase != Phase::Starting && !moves;
        let changing =
            self.devices_are_pending() || self.sizes.is_pending() || self.next_size().is_some();
        let changing = changing || !self.copy_is_settled();
        let settled = self.failed.is_some() || done && !changing;
        let waits = self.next() == Step::Await;
        let observed = match (&self.failed, self.phase) {
            (Some(reason), _) => Observed::Failed {
                reason: reason.clone(),
            },
            _ if matches!(transit, Transit::Arriving(_) | Transit::Arrived(_)) => {
                Observed::Arriving
            }
            _ if matches!(transit, Transit::Offered(_)) => Observed::Offered,
            (_, Phase::Running) => Observed::Running,
            (_, Phase::Paused) => Observed::Paused,
            (_, Phase::Starting) => Observed::Starting {
                step: "starting the guest".to_owned(),
            },
            (None, Phase::None) if self.record.kept.is_some() => Observed::Suspended,
            (None, Phase::None) => match (&self.record.stop, self.record.is_tombstone()) {
                (_, true) => Observed::Absent,
                (Some(reason), _) => Observed::Stopped {
                    reason: reason.clone(),
                },
                (None, _)
                    if matches!(
                        self.record.intent.wanted.power,
                        Power::Stopped | Power::Suspended
                    ) =>
                {
                    Observed::Stopped {
                        reason: StopReason::Requested,
                    }
                }
                (None, _) if waits => waiting(),
                (None, _) => Observed::Starting {
                    step: "to be started".to_owned(),
                },
            },
        };
        self.send(observed, settled);
    }

    fn send(&mut self, observed: Observed, settled: bool) {
        let before = self.reports.borrow().clone();
        if observed != before.observed {
            self.record.changed_at_us = now_us();
        }
        let mut now = report(&self.record, observed, settled);
        now.disks = self.device_reports(DeviceKind::Disk);
        now.nics = self.device_reports(DeviceKind::Nic);
        now.size = self.size_report();
        (now.shape, now.migration) = (self.shape(), self.migration_report());
        now.copy = self.copy_report();
        now.waits = self.next() == Step::Await;
        if now != before {
            self.reports.send_replace(now);
            let _ = self.surroundings.changed.send(self.record.id);
        }
    }
}

/// What can be said without its devices.
pub(super) fn report(record: &Record, observed: Observed, settled: bool) -> MachineReport {
    MachineReport {
        id: record.id,
        generation: record.intent.generation,
        revision: record.intent.revision,
        settled,
        observed,
        soft_reboots: record.done.soft_reboots,
        hard_reboots: record.done.hard_reboots,
        rebuilds: record.done.rebuilds,
        starts: record.done.starts,
        changed_at_us: record.changed_at_us,
        guest: record
            .process
            .map(|process| process.guest)
            .unwrap_or_default(),
        disks: Vec::new(),
        nics: Vec::new(),
        size: None,
        shape: None,
        migration: None,
        parks: record.intent.wanted.parks,
        copy: None,
        waits: false,
    }
}

/// Its host has rebooted, and nobody has said since that it is wanted here.
pub(super) fn waiting() -> Observed {
    Observed::Starting {
        step: "waiting for a controller to say that it is still this host's".to_owned(),
    }
}
