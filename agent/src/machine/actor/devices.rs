//! The devices of a machine that runs, made what is wanted of them: the moves of
//! [`decision::devices`], carried out one at a time.
//!
//! What the process says that it has is all that counts, so that an agent that was not there goes on
//! where the last one was. A guest that does not let a device go is asked again now and then, and
//! nothing waits for it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use fractus_agent_api::decision::devices::{self, Move, Place, SeenDevice, Trouble};
use fractus_agent_api::device::{DeviceId, DeviceReport, Disk, Presence};
use fractus_agent_api::machine::Power;
use tokio::time::Instant;

use super::{AGAIN, Actor, Over, Phase};
use crate::machine::process::{Launcher, Process, ProcessError};
use crate::vm::protocol::Has;
use crate::volume::OpenDisk;

/// How long a process may take to answer.
pub(super) const ANSWER: Duration = Duration::from_secs(60);
/// A guest that has not let go of a device is asked again after this time.
pub(super) const NUDGE: Duration = Duration::from_secs(10);

/// What is known of the devices of one process.
#[derive(Debug, Default)]
pub(super) struct Devices {
    /// What it has, and of those what its guest was asked for; none: it has not said.
    has: Option<BTreeMap<DeviceId, bool>>,
    /// Nothing comes or goes while it runs.
    fixed: bool,
    /// Handed to it, and until when it may take to answer.
    handed: BTreeMap<DeviceId, Instant>,
    /// When its guest was last asked for these.
    asked: BTreeMap<DeviceId, Instant>,
    trouble: BTreeMap<DeviceId, Trouble>,
}

impl Devices {
    /// Of a process that was just started with these.
    pub(super) fn begun(with: impl IntoIterator<Item = DeviceId>) -> Self {
        Self {
            has: Some(with.into_iter().map(|id| (id, false)).collect()),
            ..Self::default()
        }
    }

    /// What stood in the way of an older intent need not stand in that of a newer one.
    pub(super) fn try_anew(&mut self) {
        self.trouble.clear();
    }

    /// `fresh`: on a new connection, where no answer comes to what was said on another.
    pub(super) fn told(&mut self, has: Option<Vec<Has>>, fresh: bool) {
        self.fixed = has.is_none();
        if fresh {
            self.handed.clear();
        }
        let has: BTreeMap<_, _> = (has.unwrap_or_default().into_iter())
            .map(|device| (device.id, device.asked))
            .collect();
        self.handed.retain(|id, _| !has.contains_key(id));
        self.asked.retain(|id, _| has.contains_key(id));
        self.trouble.retain(|id, _| !has.contains_key(id));
        // One that was asked for by an earlier agent is asked for again by this one.
        let now = Instant::now();
        for (id, _) in has.iter().filter(|(_, asked)| **asked) {
            self.asked.entry(*id).or_insert(now);
        }
        self.has = Some(has);
    }

    pub(super) fn refused(&mut self, id: DeviceId, detail: String) {
        if self.handed.remove(&id).is_some() {
            self.trouble.insert(id, Trouble::Refused(detail));
        }
    }

    fn place(&self, id: DeviceId) -> Place {
        if self.handed.contains_key(&id) {
            return Place::Handed;
        }
        match &self.has {
            None => Place::Unknown,
            Some(has) => match has.get(&id) {
                None => Place::Outside,
                Some(_) if self.asked.contains_key(&id) => Place::Asked,
                Some(_) => Place::Inside,
            },
        }
    }

    /// When something is to be done though nothing is heard.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let nudges = self.asked.values().map(|at| *at + NUDGE);
        self.handed.values().copied().chain(nudges).min()
    }

    /// Whoever did not answer in time will not be waited for.
    fn give_up(&mut self, now: Instant) {
        let late: Vec<DeviceId> = (self.handed.iter())
            .filter(|(_, by)| **by <= now)
            .map(|(id, _)| *id)
            .collect();
        for id in late {
            self.handed.remove(&id);
            let reason = "the machine's process does not answer".to_owned();
            self.trouble.insert(id, Trouble::Failed(reason));
        }
    }

    /// As if so much time had passed.
    #[cfg(test)]
    pub(super) fn pass(&mut self, time: Duration) {
        for at in self.asked.values_mut().chain(self.handed.values_mut()) {
            *at = at.checked_sub(time).unwrap_or(*at);
        }
    }

    /// Those whose guest is to be asked once more.
    fn clung_to(&self, now: Instant) -> Vec<DeviceId> {
        let due = |at: &Instant| *at + NUDGE <= now;
        let asked = self.asked.iter().filter(|(_, at)| due(at));
        asked.map(|(id, _)| *id).collect()
    }
}

impl<L: Launcher> Actor<L> {
    /// The next move, and whose.
    pub(super) fn next_move(&self) -> Option<(DeviceId, Move)> {
        let mut moves = self.devices_to_be().into_iter().filter_map(|(id, wanted)| {
            let next = devices::next(wanted, &self.seen(id, wanted))?;
            Some((id, next))
        });
        // What goes makes room for what comes.
        let first = moves.next()?;
        match first.1 {
            Move::Attach => Some(
                moves
                    .find(|(_, next)| *next == Move::Detach)
                    .unwrap_or(first),
            ),
            Move::Detach | Move::Delete => Some(first),
        }
    }

    pub(super) fn devices_are_pending(&self) -> bool {
        let mut all = self.devices_to_be().into_iter();
        all.any(|(id, wanted)| devices::is_pending(wanted, &self.seen(id, wanted)))
    }

    pub(super) fn device_reports(&self) -> Vec<DeviceReport> {
        let all = self.devices_to_be().into_iter();
        all.map(|(id, wanted)| DeviceReport {
            id,
            state: devices::state(wanted, &self.seen(id, wanted)),
        })
        .collect()
    }

    /// Those that are wanted, in their order, and then those that are there besides.
    fn devices_to_be(&self) -> Vec<(DeviceId, Presence)> {
        let wanted = &self.record.intent.wanted;
        let disks = match wanted.power {
            Power::Absent => &[][..],
            Power::Running | Power::Paused | Power::Stopped => &wanted.spec.disks,
        };
        let wanted: Vec<_> = disks.iter().map(|disk| (disk.id, disk.presence)).collect();
        let named: BTreeSet<DeviceId> = disks.iter().map(|disk| disk.id).collect();
        let has = self.devices.has.iter().flat_map(BTreeMap::keys);
        let others = has.filter(|id| !named.contains(id));
        let others = others.map(|id| (*id, Presence::Detached));
        wanted.into_iter().chain(others).collect()
    }

    fn disk(&self, id: DeviceId) -> Option<&Disk> {
        let disks = &self.record.intent.wanted.spec.disks;
        disks.iter().find(|disk| disk.id == id)
    }

    fn seen(&self, id: DeviceId, wanted: Presence) -> SeenDevice<'_> {
        let running = matches!(self.phase, Phase::Running | Phase::Paused);
        SeenDevice {
            place: match self.phase {
                Phase::None => Place::Outside,
                Phase::Starting | Phase::Running | Phase::Paused => self.devices.place(id),
            },
            running,
            trouble: match self.devices.fixed && running {
                true => Some(&TOO_OLD),
                false => self.devices.trouble.get(&id),
            },
            // Looked at only where somebody wants it gone.
            stands: wanted != Presence::Deleted
                || self
                    .disk(id)
                    .is_some_and(|disk| (self.surroundings.makings).disk_stands(&self.paths, disk)),
        }
    }

    pub(super) async fn carry(&mut self, id: DeviceId, next: Move) -> Result<(), Over> {
        match next {
            Move::Attach => self.attach(id).await,
            Move::Detach => self.detach(id).await,
            Move::Delete => self.delete(id).await,
        }
    }

    async fn attach(&mut self, id: DeviceId) -> Result<(), Over> {
        let Some(disk) = self.disk(id).cloned() else {
            return Ok(());
        };
        self.publish();
        let (makings, paths) = (self.surroundings.makings.clone(), self.paths.clone());
        let opened = async { makings.open_disk(&paths, &disk).await };
        let goes_on = |actor: &Self| actor.next_move() == Some((id, Move::Attach));
        let open = match self.meanwhile(opened, goes_on).await? {
            None => return Ok(()),
            Some(Ok(open)) => open,
            Some(Err(error)) => {
                self.in_trouble(id, error.to_string());
                return Ok(());
            }
        };
        self.hand(&disk, open).await
    }

    async fn hand(&mut self, disk: &Disk, open: OpenDisk) -> Result<(), Over> {
        let request_id = self.record.request_id.clone();
        let Some(process) = &mut self.process else {
            return Ok(());
        };
        match (process.attach_disk(disk, open, request_id.as_deref())).await {
            Ok(()) => {
                tracing::info!(machine = %self.record.id, disk = %disk.id, "handed to its process");
                self.devices.handed.insert(disk.id, Instant::now() + ANSWER);
            }
            Err(error @ (ProcessError::Mute | ProcessError::Control(_))) => {
                return self.say_again(&error).await;
            }
            Err(ProcessError::NotNow(why)) => {
                self.devices.trouble.insert(disk.id, Trouble::Refused(why));
            }
            Err(error) => self.in_trouble(disk.id, error.to_string()),
        }
        self.publish();
        Ok(())
    }

    async fn detach(&mut self, id: DeviceId) -> Result<(), Over> {
        let request_id = self.record.request_id.clone();
        let Some(process) = &mut self.process else {
            return Ok(());
        };
        if let Err(error) = process.detach(id, request_id.as_deref()).await {
            return self.say_again(&error).await;
        }
        self.devices.asked.insert(id, Instant::now());
        self.publish();
        Ok(())
    }

    /// One that does not listen now is spoken to again.
    async fn say_again(&mut self, error: &ProcessError) -> Result<(), Over> {
        tracing::warn!(machine = %self.record.id, %error, "not told of its devices");
        self.wait(Some(Instant::now() + AGAIN)).await.map(drop)
    }

    async fn delete(&mut self, id: DeviceId) -> Result<(), Over> {
        let Some(disk) = self.disk(id).cloned() else {
            return Ok(());
        };
        tracing::info!(machine = %self.record.id, disk = %id, "deleting it, as wanted");
        let makings = self.surroundings.makings.clone();
        if let Err(error) = makings.delete_disk(&self.paths, &disk).await {
            self.in_trouble(id, error.to_string());
        }
        self.publish();
        Ok(())
    }

    fn in_trouble(&mut self, id: DeviceId, reason: String) {
        tracing::warn!(machine = %self.record.id, device = %id, reason, "failed");
        self.devices.trouble.insert(id, Trouble::Failed(reason));
        self.publish();
    }

    /// What is due though nothing was heard.
    pub(super) async fn tend_devices(&mut self) {
        let now = Instant::now();
        self.devices.give_up(now);
        for id in self.devices.clung_to(now) {
            self.devices.asked.insert(id, now);
            if let Some(process) = &mut self.process
                && let Err(error) = process.detach(id, None).await
            {
                tracing::debug!(machine = %self.record.id, device = %id, %error, "not asked again");
            }
        }
        self.publish();
    }

    /// Does `work`, and hears process and intents meanwhile; none: they made it void.
    async fn meanwhile<T>(
        &mut self,
        work: impl Future<Output = T>,
        goes_on: impl Fn(&Self) -> bool,
    ) -> Result<Option<T>, Over> {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return Ok(Some(done)),
                woken = self.wait(None) => {
                    woken?;
                    if !goes_on(self) {
                        return Ok(None);
                    }
                }
            }
        }
    }
}

static TOO_OLD: std::sync::LazyLock<Trouble> = std::sync::LazyLock::new(|| {
    let reason = "the machine's process is of an older version, which takes none while it runs";
    Trouble::Refused(reason.to_owned())
});
