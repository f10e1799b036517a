//! A guest that comes from another host, or goes to one ([`fractus_agent_api::migration`]).
//!
//! What is persisted is that something was begun (`Done`), before it is: an agent that comes back begins none of it a
//! second time. What came of it is the process's to say, or, where that is gone, that it is gone.

use std::time::Duration;

use fractus_agent_api::decision::{Done, Step};
use fractus_agent_api::device::DeviceId;
use fractus_agent_api::migration::{
    Arrival, Lacks, MigrationId, MigrationReport, Progress, Shape, State, Transit,
};
use tokio::time::Instant;

use super::devices::Devices;
use super::follow::Follow;
use super::guest::Guest;
use super::size::Sizes;
use super::steps::START;
use super::{AGAIN, Actor, Over, Phase, Woken, blocking};
use crate::machine::line::{self, Way};
use crate::machine::make::MakeError;
use crate::machine::process::{Arriving, Command, Launcher, Plan, Process, ProcessError};
use crate::machine::record::{LineRecord, ProcessRecord, Record};
use crate::vm::protocol::Moving;

/// Bytes of a guest that go sixteen times before a key of AES has covered what it may.
const MUCH: u64 = 16 << 30;
/// How long a process may take to have its guest stay.
const ANSWER: Duration = Duration::from_secs(60);

/// Of a process that was told so.
pub(super) const MAY_HAVE_RUN: &str = "the machine's process ended just as its guest was to go on, and nobody knows whether \
    it ran; its disks are whole, reboot the server hard";

/// What is known of a guest on its way.
#[derive(Debug, Default)]
pub(super) struct Travel {
    pub transit: Transit,
    /// On which a guest is awaited.
    port: u16,
    /// Between the hosts; none: it was an earlier agent's, and ended with it.
    pub line: Option<line::Line>,
    /// What the process has said of the last guest that it was to send, or why it was not told to.
    pub moving: Option<MigrationReport>,
    /// The policy that the process goes by.
    policy: Option<fractus_agent_api::migration::Policy>,
    /// An earlier agent may have had it send its guest, and it has not said anything to this one.
    pub unheard: bool,
    /// Memory that comes after the guest.
    pub follow: Follow,
    /// That its guest goes on here is in the record, and the process has not been told: what was done before that.
    counted: Option<Done>,
    /// The process was told that, and may not have read it: likewise.
    told: Option<Done>,
}

impl Travel {
    /// The process is gone, or its guest runs here.
    pub(super) fn end(&mut self) {
        (self.transit, self.line, self.policy) = (Transit::None, None, None);
        (self.unheard, self.follow) = (false, Follow::default());
        self.told = None;
        if let Some(moving) = &mut self.moving
            && !matches!(moving.state, State::Failed { .. })
        {
            let reason = "the machine's process ended meanwhile".to_owned();
            moving.state = State::Failed { reason };
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.transit == Transit::None
    }
}

async fn listens(address: std::net::IpAddr, arrival: &Arrival) -> std::io::Result<line::Awaited> {
    line::listen(address, &arrival.key, Way::of(arrival.direct)).await
}

impl<L: Launcher> Actor<L> {
    /// Makes room for a guest, and a process that waits for it.
    pub(super) async fn arrive(&mut self) -> Result<(), Over> {
        let wanted = &self.record.intent.wanted;
        let Some(arrival) = wanted.arrives.clone() else {
            return Ok(());
        };
        let (makings, paths) = (self.surroundings.makings.clone(), self.paths.clone());
        let (boot, root) = (wanted.spec.boot.clone(), wanted.spec.root_disk.is_some());
        let instance = wanted.spec.guest.instance.clone();
        let bytes = arrival.shape.root_disk;
        let disks = self.open_arriving();
        let made = self
            .interruptible("making room for the guest", |progress| async move {
                makings.boot(&paths, &boot, &progress).await?;
                if root {
                    let bytes = bytes.ok_or_else(no_size)?;
                    makings.empty_disk(&paths, bytes, &progress).await?;
                }
                // Another's will be written over it.
                blocking(|| makings.config_drive(&paths, instance.as_deref()))?;
                disks.await
            })
            .await?;
        let devices = match made {
            None => return Ok(()),
            Some(Ok(devices)) => devices,
            Some(Err(error)) => {
                self.fail(error.to_string());
                return Ok(());
            }
        };
        self.remove_memory();
        let listened = listens(self.surroundings.listen, &arrival).await;
        let line::Awaited {
            port,
            end,
            line,
            others,
        } = match listened {
            Ok(awaited) => awaited,
            Err(error) => {
                self.fail(format!("listening for the guest: {error}"));
                return Ok(());
            }
        };
        let plan = Plan {
            id: self.record.id,
            spec: self.record.intent.wanted.spec.clone(),
            devices,
            user: self.record.user,
            goes_on: false,
            arrives: Some(Arriving {
                line: end,
                shape: arrival.shape,
            }),
            takes_over: None,
            most_mib: most_mib(&arrival.shape),
            request_id: self.record.request_id.clone(),
        };
        let mut process = match self.surroundings.launcher.launch(plan).await {
            Ok(process) => process,
            Err(error) => {
                self.fail(error.to_string());
                return Ok(());
            }
        };
        let before = self.record.clone();
        self.record.process = Some(process.identity().of_a_guest_that_came(true));
        self.record.done.arrived = Some(arrival.id);
        // They were carried out where the guest comes from.
        self.count_reboots();
        self.record.done.rebuilds = self.record.intent.wanted.rebuilds;
        self.record.stop = None;
        self.record.line = Some(LineRecord {
            migration: arrival.id,
            port,
            key: arrival.key.clone(),
        });
        let path = self.paths.record();
        if let Err(error) = blocking(|| self.record.prepare_to_write_fast(&path)) {
            self.record = before;
            let _ = process.kill().await;
            self.fail(error.to_string());
            return Ok(());
        }
        self.process = Some(process);
        (self.phase, self.adopted, self.pressed_at) = (Phase::Paused, false, None);
        (self.guest, self.devices) = (Guest::default(), Devices::default());
        self.sizes = Sizes::going_on(most_mib(&arrival.shape));
        // It may have stood still for long when it goes on.
        (self.ready, self.late, self.start_by) = (false, true, None);
        self.travel = Travel {
            transit: Transit::Arriving(arrival.id),
            port,
            line: Some(line),
            follow: Follow::awaited(others),
            ..Travel::default()
        };
        self.publish();
        Ok(())
    }

    /// Its guest neither comes nor goes.
    pub(super) fn is_here(&self) -> bool {
        self.travel.is_over() && self.travel.follow.lacks.is_none()
    }

    /// It stands still until it is known where it goes on.
    pub(super) fn has_a_guest_that_waits(&self) -> bool {
        matches!(
            self.travel.transit,
            Transit::Arrived(_) | Transit::Offered(_)
        )
    }

    /// The guest is there.
    pub(super) fn has_arrived(&mut self, lacks: bool) {
        if let Transit::Arriving(id) = self.travel.transit {
            tracing::info!(machine = %self.record.id, migration = %id, lacks, "its guest has arrived");
            self.travel.follow.lacks = lacks.then(Lacks::default);
            // The line has its answer to carry, and ends by itself.
            self.travel.transit = Transit::Arrived(id);
        }
    }

    /// What counts as done for decisions: that a guest goes on does once its process was told.
    pub(super) fn done(&self) -> &Done {
        self.travel.counted.as_ref().unwrap_or(&self.record.done)
    }

    /// An intent that has its guest go on at once: the record says both when it is written next, so that the guest stands
    /// still for one write and not for two. What was done before, where that is so.
    pub(super) fn count_ahead(&mut self) -> Option<Done> {
        let counts = self.has_a_guest_that_waits()
            && self.travel.counted.is_none()
            && self.next() == Step::GoOn;
        counts.then(|| self.count_going_on())
    }

    /// It was written.
    pub(super) fn is_counted(&mut self, before: Option<Done>) {
        self.travel.counted = self.travel.counted.or(before);
    }

    /// The process has ended, and was not told that its guest goes on.
    pub(super) fn discount(&mut self) {
        if let Some(before) = self.travel.counted.take() {
            self.record.done = before;
        }
    }

    /// The process has ended, and has not read that its guest goes on: it stands still where it comes from.
    pub(super) fn did_not_go_on(&mut self) {
        let Some(before) = self.travel.told.take() else {
            return;
        };
        let migration = self.record.done.continued.map(tracing::field::display);
        tracing::info!(machine = %self.record.id, migration, "its process ended before it read that its guest goes on");
        (self.record.done.continued, self.record.done.starts) = (before.continued, before.starts);
        if let Some(process) = &mut self.record.process {
            process.ran = false;
        }
    }

    /// The process has read it.
    pub(super) fn has_gone_on(&mut self) {
        self.travel.told = None;
    }

    /// What was done before.
    fn count_going_on(&mut self) -> Done {
        let before = self.record.done;
        self.record.done.continued = self.record.intent.wanted.continues;
        self.record.done.starts += 1;
        before
    }

    /// The guest is this host's: it runs, if it ran.
    pub(super) async fn go_on(&mut self) -> Result<(), Over> {
        let path = self.paths.record();
        let before = match self.travel.counted.take() {
            Some(before) => before,
            None => {
                let before = self.count_going_on();
                if let Err(error) = blocking(|| self.record.write_fast(&path)) {
                    self.record.done = before;
                    tracing::error!(machine = %self.record.id, %error, "its guest cannot go on yet");
                    return self.wait(Some(Instant::now() + AGAIN)).await.map(drop);
                }
                before
            }
        };
        let Some(process) = &mut self.process else {
            return Ok(());
        };
        if let Err(error) = process.tell(Command::Go, None).await {
            // It was not sent, and so the guest cannot have run.
            tracing::warn!(machine = %self.record.id, %error, "Go");
            self.record.done = before;
            self.kill().await;
            return Ok(());
        }
        let lacks = self.travel.follow.lacks.is_some();
        if lacks {
            // Both ends of its line live on.
            self.travel.transit = Transit::None;
            if let Some(process) = &mut self.record.process {
                // Who waits for its memory says nothing of itself, and may run.
                process.ran = true;
            }
        } else {
            self.travel.end();
            self.record.line = None;
        }
        self.travel.told = Some(before);
        self.phase = Phase::Starting;
        // One that waits for its memory may wait for long.
        self.start_by = (!lacks).then(|| Instant::now() + START);
        // In its file, too, and then nowhere else.
        let written = blocking(|| self.record.write(&path));
        if let Err(error) = written.and_then(|()| blocking(|| Record::forget_fast(&path))) {
            tracing::error!(machine = %self.record.id, %error, "record");
        }
        self.publish();
        Ok(())
    }

    /// Sent as often as it may be, the guest may be more than one key covers. What other disks hold is not known here.
    fn is_much(&self) -> bool {
        let spec = &self.record.intent.wanted.spec;
        let memory = spec.max_memory_mib.unwrap_or(spec.memory_mib) << 20;
        let disk = spec.root_disk.as_ref().map_or(0, |root| root.size);
        !spec.disks.is_empty() || memory.saturating_add(disk) > MUCH
    }

    /// Of so many, as the process takes.
    fn lanes(&self, wanted: u8) -> u8 {
        match self.process.as_ref().is_some_and(Process::lanes) {
            true => wanted,
            false => 0,
        }
    }

    /// Begins to send the guest.
    pub(super) async fn depart(&mut self) -> Result<(), Over> {
        let Some(departure) = self.record.intent.wanted.departs.clone() else {
            return Ok(());
        };
        if !self.devices.are_known() {
            return self.wait(Some(Instant::now() + AGAIN)).await.map(drop);
        }
        let id = departure.id;
        if let Err(reason) = self.to_be_kept().and_then(|_| self.nothing_stays_behind()) {
            return self.does_not_depart(id, reason);
        }
        let (to, key) = (departure.to.clone(), departure.key.clone());
        let goes_on = |actor: &Self| actor.next() == Step::Depart;
        // (One that has not said so yet can only have its line carried.)
        let seals = self.process.as_ref().is_some_and(Process::seals);
        let way = Way::of(departure.direct && seals);
        let lanes = self.lanes(departure.lanes);
        let much = self.is_much();
        let connecting = async move {
            match way {
                Way::Lent => line::connect_lent(&to, &key, much, lanes).await,
                Way::Carried => line::connect(&to, &key, much).await,
            }
        };
        let (end, line) = match self.meanwhile(connecting, goes_on).await? {
            None => return Ok(()),
            Some(Ok(connected)) => connected,
            Some(Err(error)) => {
                let reason = format!("connecting to {}: {error}", departure.to);
                return self.does_not_depart(id, reason);
            }
        };
        let before = self.record.done;
        self.record.done.departed = Some(id);
        if let Err(error) = blocking(|| self.record.write(&self.paths.record())) {
            self.record.done = before;
            return self.does_not_depart(id, error.to_string());
        }
        let request_id = self.record.request_id.clone();
        let Some(process) = &mut self.process else {
            return Ok(());
        };
        let told = process.send(
            id,
            departure.policy,
            Some((end, way)),
            request_id.as_deref(),
        );
        if let Err(error) = told.await {
            return self.does_not_depart(id, error.to_string());
        }
        tracing::info!(machine = %self.record.id, migration = %id, to = departure.to, "sending its guest");
        self.travel = Travel {
            transit: Transit::Copying(id),
            line: Some(line),
            moving: Some(MigrationReport {
                id,
                state: State::Copying,
                progress: Progress::default(),
                lacks: None,
            }),
            policy: Some(departure.policy),
            ..Travel::default()
        };
        self.publish();
        Ok(())
    }

    /// The guest has every disk whose content is here: what it has not would go with its machine.
    fn nothing_stays_behind(&self) -> Result<(), String> {
        let folder = self.paths.folder();
        let unread = |error| format!("{}: {error}", folder.display());
        for entry in blocking(|| std::fs::read_dir(folder)).map_err(unread)? {
            let name = entry.map_err(unread)?.file_name();
            let name = name.to_string_lossy();
            let id = name
                .strip_prefix("disk-")
                .and_then(|name| name.strip_suffix(".raw"));
            let Some(Ok(id)) = id.map(uuid::Uuid::try_parse) else {
                continue;
            };
            if !self.devices.has(DeviceId(id)) {
                return Err(format!(
                    "disk {id} is kept on this host, and the guest does not have it: it would stay behind"
                ));
            }
        }
        Ok(())
    }

    fn does_not_depart(&mut self, id: MigrationId, reason: String) -> Result<(), Over> {
        tracing::warn!(machine = %self.record.id, migration = %id, reason, "its guest is not sent");
        self.record.done.departed = Some(id);
        self.travel = Travel {
            moving: Some(MigrationReport {
                id,
                state: State::Failed { reason },
                progress: Progress::default(),
                lacks: None,
            }),
            ..Travel::default()
        };
        self.persist();
        Ok(())
    }

    /// What the process says of the guest that it is to send, or was.
    pub(super) fn moved(&mut self, moving: Option<Moving>) {
        self.travel.unheard = false;
        let transit = match &moving {
            None => Transit::None,
            Some(moving) => match &moving.state {
                State::Copying => Transit::Copying(moving.migration),
                State::Offered { .. } => Transit::Offered(moving.migration),
                _ => Transit::None,
            },
        };
        match (self.travel.transit, transit) {
            // A guest that is to come is no guest that goes.
            (Transit::Arriving(_) | Transit::Arrived(_), _) => return,
            // Of the one before.
            (Transit::Copying(id), Transit::None)
                if moving.as_ref().is_none_or(|moving| moving.migration != id) =>
            {
                return;
            }
            _ => {}
        }
        if let Some(Moving {
            migration,
            state,
            progress,
        }) = moving
        {
            if !matches!(state, State::Copying) {
                tracing::info!(machine = %self.record.id, %migration, ?state, ?progress, "its guest");
            }
            self.travel.moving = Some(MigrationReport {
                id: migration,
                state,
                progress,
                lacks: None,
            });
        }
        if transit == Transit::None {
            self.stays();
        }
        self.travel.transit = transit;
    }

    /// What was sent, or was to be, is here for good.
    fn stays(&mut self) {
        if self.travel.transit != Transit::None {
            self.travel.line = None;
        }
        let wanted = &self.record.intent.wanted;
        let sent = self.travel.moving.as_ref().map(|moving| moving.id);
        // Is it what it was to come back for? Who looks now is to know, and the next agent.
        let back = wanted.departs.is_none()
            && wanted.continues.is_some()
            && wanted.continues == sent
            && self.record.done.continued != sent;
        if back {
            self.record.done.continued = sent;
            self.note();
        }
        if matches!(self.travel.transit, Transit::Offered(_))
            && self.record.intent.wanted.spec.guest.agent
            && let Some(process) = &self.process
        {
            process.set_guest_time();
        }
    }

    /// Whether another policy is wanted than the process goes by.
    pub(super) fn policy_is_new(&self) -> bool {
        let wanted = self.record.intent.wanted.departs.as_ref();
        matches!(self.travel.transit, Transit::Copying(_))
            && wanted.is_some_and(|departure| self.travel.policy != Some(departure.policy))
    }

    pub(super) async fn say_policy(&mut self) -> Result<(), Over> {
        let wanted = self.record.intent.wanted.departs.as_ref();
        let Some((id, policy)) = wanted.map(|departure| (departure.id, departure.policy)) else {
            return Ok(());
        };
        let request_id = self.record.request_id.clone();
        let Some(process) = &mut self.process else {
            return Ok(());
        };
        match process.send(id, policy, None, request_id.as_deref()).await {
            Ok(()) => self.travel.policy = Some(policy),
            Err(error) => return self.say_again(&error).await,
        }
        Ok(())
    }

    /// A guest that was being handed over, and may stand still for that, is to go on.
    pub(super) fn is_to_stay(&mut self, id: MigrationId) {
        self.travel.transit = Transit::Offered(id);
    }

    /// The guest is not to be sent any more, by an intent that says so.
    pub(super) async fn stay(&mut self) -> Result<(), Over> {
        let request_id = self.record.request_id.clone();
        // A process that waits for room on it, or for an answer, is free to listen then.
        if let Some(line) = self.travel.line.take() {
            line.cut();
        }
        let Some(process) = &mut self.process else {
            return Ok(());
        };
        match process.stay(request_id.as_deref()).await {
            Ok(()) => {}
            Err(error @ (ProcessError::Mute | ProcessError::Control(_))) => {
                return self.say_again(&error).await;
            }
            Err(error) => {
                self.fail(error.to_string());
                return self.wait(Some(Instant::now() + AGAIN)).await.map(drop);
            }
        }
        let by = Instant::now() + ANSWER;
        while self.process.is_some() && !self.travel.is_over() {
            if self.wait(Some(by)).await? == Woken::Deadline {
                // It is told again.
                tracing::warn!(machine = %self.record.id, "its process does not say that its guest stays");
                return Ok(());
            }
            if self.next() != Step::Stay {
                return Ok(());
            }
        }
        self.persist();
        Ok(())
    }

    /// Of a guest that did not come all the way no disk is left that something could be started on.
    pub(super) fn forget_arrival(&mut self) {
        self.record.line = None;
        if self.record.intent.wanted.arrives.is_none() {
            return;
        }
        match blocking(|| std::fs::remove_file(self.paths.disk())) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(machine = %self.record.id, %error, "half a disk is left");
            }
            _ => {}
        }
    }

    /// Its process was told to go on with a guest that came, by this agent or the one before, and nobody has heard that it
    /// ran.
    pub(super) fn may_have_gone_on(&self) -> bool {
        let (wanted, done) = (&self.record.intent.wanted, &self.record.done);
        let was_to = wanted.continues.is_some() && wanted.continues == done.continued;
        // One that was begun here since is another guest's, however old the intent is.
        let awaits = |process: &ProcessRecord| !process.ran && process.came != Some(false);
        self.travel.told.is_some() || was_to && self.record.process.as_ref().is_some_and(awaits)
    }

    /// Who is to go on with a guest that is not here says so.
    pub(super) fn lost(&mut self) {
        let wanted = &self.record.intent.wanted;
        let reason = match (&wanted.arrives, &wanted.departs) {
            (Some(arrival), _) => {
                format!(
                    "the process that waited for migration {} is gone",
                    arrival.id
                )
            }
            (_, Some(departure)) => format!(
                "the machine's process ended while its guest was sent (migration {})",
                departure.id
            ),
            _ => "the guest that was to go on is not here any more".to_owned(),
        };
        self.fail(reason);
    }

    /// What became of the migration that the intent speaks of.
    pub(super) fn migration_report(&self) -> Option<MigrationReport> {
        let of = |id, state| MigrationReport {
            id,
            state,
            progress: Progress::default(),
            lacks: self.travel.follow.report(),
        };
        let wanted = &self.record.intent.wanted;
        let failure = || self.failed.clone().map(|reason| State::Failed { reason });
        match self.travel.transit {
            Transit::Arriving(id) => {
                let port = self.travel.port;
                return Some(of(id, State::Arriving { port }));
            }
            Transit::Arrived(id) => return Some(of(id, State::Arrived)),
            Transit::Copying(_) | Transit::Offered(_) => return self.travel.moving.clone(),
            Transit::None => {}
        }
        if let Some(arrival) = &wanted.arrives {
            return Some(of(arrival.id, failure()?));
        }
        if let Some(departure) = &wanted.departs {
            if self.travel.unheard {
                return None;
            }
            let said = self.travel.moving.as_ref();
            if let Some(said) = said.filter(|said| said.id == departure.id) {
                return Some(said.clone());
            }
            let begun = self.record.done.departed == Some(departure.id);
            let reason = match (begun, self.phase) {
                (true, _) => "nobody knows what became of it: its process or its agent ended",
                (false, Phase::None) => "the machine does not run",
                (false, _) => return None,
            };
            let reason = reason.to_owned();
            return Some(of(departure.id, State::Failed { reason }));
        }
        // Whatever is wanted of it since, a guest that lacks something says so.
        let line = self.record.line.as_ref();
        let id = wanted.continues.or(line.map(|line| line.migration))?;
        let here = self.record.done.continued == Some(id);
        let runs = matches!(self.phase, Phase::Running | Phase::Paused);
        // It goes on as far as it can without what has not come.
        let runs = runs || self.travel.follow.lacks.is_some();
        match (here, runs) {
            (true, true) => Some(of(id, State::Continued)),
            (true, false) => None,
            (false, _) => Some(of(id, failure()?)),
        }
    }

    /// What its process was made for.
    pub(super) fn shape(&self) -> Option<Shape> {
        if !matches!(self.phase, Phase::Running | Phase::Paused) {
            return None;
        }
        let size = self.sizes.now()?;
        let root = self.record.intent.wanted.spec.root_disk.as_ref();
        let bytes = || std::fs::metadata(self.paths.disk()).ok().map(|it| it.len());
        Some(Shape {
            vcpus: size.vcpus,
            max_vcpus: size.max_vcpus,
            memory_mib: size.memory_mib,
            max_hot_memory_mib: size.max_hot_memory_mib,
            root_disk: root.and_then(|_| bytes()),
        })
    }
}

fn most_mib(shape: &Shape) -> u64 {
    shape.memory_mib + shape.max_hot_memory_mib.unwrap_or(0)
}

fn no_size() -> MakeError {
    let what = "the root disk of the guest that comes".to_owned();
    let source = std::io::Error::other("nobody has said how large it is");
    MakeError::Io { what, source }
}
