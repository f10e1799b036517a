//! The devices of a machine that runs, made what is wanted of them: the moves of
//! [`decision::devices`], carried out one at a time.
//!
//! What the process says that it has is all that counts, so that an agent that was not there goes on
//! where the last one was. A guest that does not let a device go is asked again now and then, and
//! nothing waits for it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use fractus_agent_api::decision::devices::{self, Move, Place, SeenDevice, Trouble};
use fractus_agent_api::device::{DeviceId, DeviceKind, DeviceReport, Disk, Nic, Presence};
use fractus_agent_api::machine::Power;
use tokio::time::Instant;

use super::{AGAIN, Actor, Over, Phase};
use crate::clock::now_us;
use crate::machine::make::{MakeError, Makings, OpenDevice};
use crate::machine::process::{Launcher, Process, ProcessError};
use crate::machine::record::Kept;
use crate::paths::MachinePaths;
use crate::vm::protocol::Has;

/// How long a process may take to answer.
pub(super) const ANSWER: Duration = Duration::from_secs(60);
/// A guest that has not let go of a device is asked again after this time.
pub(super) const NUDGE: Duration = Duration::from_secs(10);

/// What is known of the devices of one process.
#[derive(Debug, Default)]
pub(super) struct Devices {
    /// What it has; none: it has not said.
    has: Option<BTreeMap<DeviceId, DeviceKind>>,
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
    pub(super) fn begun(with: &[OpenDevice]) -> Self {
        let has = with.iter().map(|device| (device.id(), device.kind()));
        Self {
            has: Some(has.collect()),
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
        // One that was asked for by an earlier agent is asked for again by this one.
        let (now, all) = (Instant::now(), has.unwrap_or_default());
        for device in all.iter().filter(|device| device.asked) {
            self.asked.entry(device.id).or_insert(now);
        }
        let has: BTreeMap<_, _> = all.iter().map(|device| (device.id, device.kind)).collect();
        self.handed.retain(|id, _| !has.contains_key(id));
        self.asked.retain(|id, _| has.contains_key(id));
        self.trouble.retain(|id, _| !has.contains_key(id));
        self.has = Some(has);
    }

    pub(super) fn refused(&mut self, id: DeviceId, detail: String) {
        if self.handed.remove(&id).is_some() {
            self.trouble.insert(id, Trouble::Refused(detail));
        }
    }

    pub(super) fn has(&self, id: DeviceId) -> bool {
        let has = self.has.as_ref();
        has.is_some_and(|has| has.contains_key(&id))
    }

    /// Whether the process has told what it has, and has answered all that it was handed.
    pub(super) fn are_known(&self) -> bool {
        self.has.is_some() && self.handed.is_empty()
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

/// A device, and what is to become of it.
#[derive(Debug, Clone, Copy)]
struct ToBe {
    id: DeviceId,
    kind: DeviceKind,
    wanted: Presence,
}

/// A device that is to be attached.
enum Wanted {
    Disk(Disk),
    Nic(Nic),
}

type Opened = Result<OpenDevice, MakeError>;

impl Wanted {
    async fn open(self, makings: &dyn Makings, paths: &MachinePaths) -> Opened {
        Ok(match self {
            Self::Disk(disk) => {
                let open = makings.open_disk(paths, &disk).await?;
                OpenDevice::Disk(disk, open)
            }
            Self::Nic(nic) => {
                let taps = makings.plug(&nic)?;
                OpenDevice::Nic(nic, taps)
            }
        })
    }
}

impl<L: Launcher> Actor<L> {
    /// The next move, and whose.
    pub(super) fn next_move(&self) -> Option<(DeviceId, Move)> {
        // A suspended guest has what it had, and so has one on its way.
        if self.record.kept.is_some() || !self.is_here() {
            return None;
        }
        let mut moves = self.devices_to_be().into_iter().filter_map(|device| {
            let next = devices::next(device.wanted, &self.seen(&device))?;
            Some((device.id, next))
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
        if self.record.kept.is_some() || !self.is_here() {
            return false;
        }
        let mut all = self.devices_to_be().into_iter();
        all.any(|device| devices::is_pending(device.wanted, &self.seen(&device)))
    }

    pub(super) fn device_reports(&self, kind: DeviceKind) -> Vec<DeviceReport> {
        let all = self.devices_to_be().into_iter();
        all.filter(|device| device.kind == kind)
            .map(|device| DeviceReport {
                id: device.id,
                state: devices::state(device.wanted, &self.seen(&device)),
            })
            .collect()
    }

    /// Those that are wanted, in their order, and then those that are there besides.
    fn devices_to_be(&self) -> Vec<ToBe> {
        let wanted = &self.record.intent.wanted;
        let (disks, nics) = match wanted.power {
            Power::Absent => (&[][..], &[][..]),
            Power::Running | Power::Paused | Power::Suspended | Power::Stopped => {
                (&wanted.spec.disks[..], &wanted.spec.nics[..])
            }
        };
        let disks = disks.iter().map(|disk| ToBe {
            id: disk.id,
            kind: DeviceKind::Disk,
            wanted: disk.presence,
        });
        let nics = nics.iter().map(|nic| ToBe {
            id: nic.id,
            kind: DeviceKind::Nic,
            wanted: Presence::Attached,
        });
        let mut all: Vec<ToBe> = disks.chain(nics).collect();
        let named: BTreeSet<DeviceId> = all.iter().map(|device| device.id).collect();
        let has = self.devices.has.iter().flatten();
        let others = has.filter(|(id, _)| !named.contains(id));
        all.extend(others.map(|(id, kind)| ToBe {
            id: *id,
            kind: *kind,
            wanted: Presence::Detached,
        }));
        all
    }

    fn disk(&self, id: DeviceId) -> Option<&Disk> {
        let disks = &self.record.intent.wanted.spec.disks;
        disks.iter().find(|disk| disk.id == id)
    }

    fn seen(&self, &ToBe { id, wanted, .. }: &ToBe) -> SeenDevice<'_> {
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
        self.publish();
        let goes_on = |actor: &Self| actor.next_move() == Some((id, Move::Attach));
        let Some(opening) = self.open(id) else {
            return Ok(());
        };
        match self.meanwhile(opening, goes_on).await? {
            None => Ok(()),
            Some(Ok(device)) => self.hand(device).await,
            Some(Err(error)) => {
                self.in_trouble(id, error.to_string());
                Ok(())
            }
        }
    }

    /// None: nobody wants it any more.
    fn open(&self, id: DeviceId) -> Option<impl Future<Output = Opened> + use<L>> {
        let spec = &self.record.intent.wanted.spec;
        let disk = self.disk(id).cloned().map(Wanted::Disk);
        let nic = || spec.nics.iter().find(|nic| nic.id == id).cloned();
        let wanted = disk.or_else(|| nic().map(Wanted::Nic))?;
        let (makings, paths) = (self.surroundings.makings.clone(), self.paths.clone());
        Some(async move { wanted.open(&*makings, &paths).await })
    }

    /// Those that a machine begins with.
    pub(super) fn open_all(
        &self,
    ) -> impl Future<Output = Result<Vec<OpenDevice>, MakeError>> + use<L> {
        let spec = &self.record.intent.wanted.spec;
        let disks = spec
            .disks
            .iter()
            .filter(|disk| disk.presence == Presence::Attached);
        let disks = disks.cloned().map(Wanted::Disk);
        let nics = spec.nics.iter().cloned().map(Wanted::Nic);
        self.open_those(disks.chain(nics).collect())
    }

    /// Those that a guest may have that comes here, with its disks' content: they are written to for that, also such
    /// as it may only read.
    pub(super) fn open_arriving(
        &self,
    ) -> impl Future<Output = Result<Vec<OpenDevice>, MakeError>> + use<L> {
        let spec = &self.record.intent.wanted.spec;
        let disks = spec
            .disks
            .iter()
            .filter(|disk| disk.presence == Presence::Attached);
        let disks: Vec<Disk> = disks.cloned().collect();
        let nics = self.open_those(spec.nics.iter().cloned().map(Wanted::Nic).collect());
        let (makings, paths) = (self.surroundings.makings.clone(), self.paths.clone());
        async move {
            let mut open = Vec::new();
            for disk in disks {
                let written = Disk {
                    read_only: false,
                    ..disk.clone()
                };
                let file = makings.open_disk(&paths, &written).await?;
                open.push(OpenDevice::Disk(disk, file));
            }
            open.extend(nics.await?);
            Ok(open)
        }
    }

    fn open_those(
        &self,
        all: Vec<Wanted>,
    ) -> impl Future<Output = Result<Vec<OpenDevice>, MakeError>> + use<L> {
        let (makings, paths) = (self.surroundings.makings.clone(), self.paths.clone());
        async move {
            let mut open = Vec::new();
            for wanted in all {
                open.push(wanted.open(&*makings, &paths).await?);
            }
            Ok(open)
        }
    }

    /// Those that a suspended guest had.
    ///
    /// # Errors
    /// The content of one is gone: another, empty one in its place would be no help to it.
    pub(super) fn open_kept(
        &self,
        kept: &Kept,
    ) -> Result<impl Future<Output = Result<Vec<OpenDevice>, MakeError>> + use<L>, String> {
        let makings = &self.surroundings.makings;
        let gone = (kept.disks.iter()).find(|disk| !makings.disk_stands(&self.paths, disk));
        if let Some(disk) = gone {
            return Err(format!("disk {} of the suspended guest is gone", disk.id));
        }
        let disks = kept.disks.iter().cloned().map(Wanted::Disk);
        let nics = kept.nics.iter().cloned().map(Wanted::Nic);
        Ok(self.open_those(disks.chain(nics).collect()))
    }

    /// What the guest is to find again that is to be suspended now. Its devices are known.
    ///
    /// # Errors
    /// It has something that nobody wants it to have: what that was could not be found again.
    pub(super) fn to_be_kept(&self) -> Result<Kept, String> {
        let has = self.devices.has.iter().flatten();
        let spec = &self.record.intent.wanted.spec;
        let (mut disks, mut nics) = (Vec::new(), Vec::new());
        for (id, _) in has {
            let disk = spec.disks.iter().find(|disk| disk.id == *id);
            let nic = spec.nics.iter().find(|nic| nic.id == *id);
            match (disk, nic) {
                (Some(disk), _) => disks.push(disk.clone()),
                (_, Some(nic)) => nics.push(nic.clone()),
                (None, None) => {
                    return Err(format!("the guest has not let go of device {id}"));
                }
            }
        }
        Ok(Kept {
            at_us: now_us(),
            generation: self.record.intent.generation,
            most_mib: self.most_mib(),
            disks,
            nics,
        })
    }

    async fn hand(&mut self, device: OpenDevice) -> Result<(), Over> {
        let (id, request_id) = (device.id(), self.record.request_id.clone());
        let Some(process) = &mut self.process else {
            return Ok(());
        };
        match process.attach(device, request_id.as_deref()).await {
            Ok(()) => {
                tracing::info!(machine = %self.record.id, device = %id, "handed to its process");
                self.devices.handed.insert(id, Instant::now() + ANSWER);
            }
            Err(error @ (ProcessError::Mute | ProcessError::Control(_))) => {
                return self.say_again(&error).await;
            }
            Err(ProcessError::NotNow(why)) => {
                self.devices.trouble.insert(id, Trouble::Refused(why));
            }
            Err(error) => self.in_trouble(id, error.to_string()),
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
    pub(super) async fn say_again(&mut self, error: &ProcessError) -> Result<(), Over> {
        tracing::warn!(machine = %self.record.id, %error, "not told of a change");
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
    pub(super) async fn meanwhile<T>(
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
