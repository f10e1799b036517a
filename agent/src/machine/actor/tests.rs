//! The actor alone, with a process that says what the test has it say.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;

use async_trait::async_trait;
use fractus_agent_api::copy::CopyId;
use fractus_agent_api::decision::Done;
use fractus_agent_api::decision::size::Resize;
use fractus_agent_api::device::{DeviceId, Disk, Nic};
use fractus_agent_api::guest::InstanceData;
use fractus_agent_api::machine::{
    Boot, Generation, MachineSpec, Pages, Revision, RootDisk, ServerId, Wanted,
};
use fractus_agent_api::migration::{MigrationId, Policy, Progress as Journey, State as Transit};
use fractus_agent_api::size::Size;
use tokio::sync::Notify;
use uuid::Uuid;

use super::*;
use crate::machine::line::Way;
use crate::machine::make::{CopyTurn, MakeError, OpenDevice, Progress};
use crate::machine::process::{MemoryFile, Plan, ProcessError, Status};
use crate::machine::record::{ProcessRecord, VERSION};
use crate::paths::Paths;
use crate::vm::protocol::{GuestSaid, Moving};
use crate::volume::OpenDisk;
use crate::volume::directory::{self, Old};

const BOOT: Uuid = Uuid::from_u128(0xb0);
const ID: ServerId = ServerId(Uuid::from_u128(1));

/// What a process has said and nobody has heard, in order.
#[derive(Debug, Default, Clone)]
pub(super) struct Words(Arc<(Mutex<VecDeque<Heard>>, Notify)>, Answers);

/// What is answered to attempts to suspend the guest, one after the other; none: nothing.
type Answers = Arc<Mutex<VecDeque<Result<(), String>>>>;

impl Words {
    pub(super) fn answer(&self, what: Result<(), &str>) {
        let what = what.map_err(str::to_owned);
        self.1.lock().unwrap().push_back(what);
    }

    pub(super) fn say(&self, heard: Heard) {
        self.0.0.lock().unwrap().push_back(heard);
        self.0.1.notify_one();
    }
}

/// What processes were told of devices.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Told {
    Start(Vec<DeviceId>),
    Attach(DeviceId),
    Detach(DeviceId),
    Resize(Resize),
    Suspend(Uuid),
    Copy(Uuid),
    NoCopy,
    /// With a line, or not.
    Send(MigrationId, Policy, bool),
    Stay,
    Resume,
    /// Another one, for memory that follows its guest.
    Line,
    /// Its guest goes on, in a new process.
    GoOn,
    HandOver(MigrationId),
    /// Of one that takes over, or was taken over; with the process that the record names then.
    Go(i32),
    Kill(i32),
    Settle,
    /// Not the process but its control group, MiB.
    Limit(u64),
}

/// What is so of an upgrade.
#[derive(Default)]
pub(super) struct Upgrade {
    /// What the process says that takes over.
    pub(super) heir: Words,
    /// Of the machine.
    record: Mutex<PathBuf>,
    /// The first process is of an agent that could not hand over.
    pub(super) is_old: AtomicBool,
    /// What it was told, and what it says of it.
    handed: Mutex<Option<MigrationId>>,
    /// The one that takes over is gone when it gets its `Go`.
    pub(super) dies: AtomicBool,
}

/// With its pid: 2 if it takes over.
pub(super) struct Double(Words, Arc<Mutex<Vec<Told>>>, Arc<Upgrade>, i32);

impl Double {
    fn moving(&self, state: Transit) -> Heard {
        let moving = self.2.handed.lock().unwrap().map(|migration| Moving {
            migration,
            state,
            progress: Journey::default(),
        });
        let Heard::Status(status) = status(State::Running, None) else {
            unreachable!("as it was made")
        };
        Heard::Status(Status { moving, ..status })
    }
}

fn identity() -> ProcessRecord {
    ProcessRecord {
        pid: 1,
        start_ticks: 1,
        boot_id: BOOT,
        ran: false,
        came: None,
        guest: Default::default(),
        held: false,
        holds: 0,
    }
}

#[async_trait]
impl Process for Double {
    fn identity(&self) -> ProcessRecord {
        ProcessRecord {
            pid: self.3,
            ..identity()
        }
    }

    async fn tell(&mut self, command: Command, _: Option<&str>) -> Result<(), ProcessError> {
        match command {
            Command::Go if self.3 == 2 => {
                if self.2.dies.load(Ordering::Relaxed) {
                    return Err(ProcessError::Mute);
                }
                let record = Record::read(&self.2.record.lock().unwrap()).unwrap();
                let named = record.process.unwrap().pid;
                self.1.lock().unwrap().push(Told::Go(named));
                self.0.say(Heard::TookOver(1500));
                self.0.say(Heard::Event(MachineEvent::Running));
            }
            Command::Go => self.0.say(Heard::Event(MachineEvent::Running)),
            Command::Resume => self.1.lock().unwrap().push(Told::Resume),
            Command::Status | Command::Pause | Command::PressPowerButton => {}
        }
        Ok(())
    }

    async fn attach(&mut self, device: OpenDevice, _: Option<&str>) -> Result<(), ProcessError> {
        self.1.lock().unwrap().push(Told::Attach(device.id()));
        Ok(())
    }

    async fn resize(&mut self, to: Resize, _: Option<&str>) -> Result<(), ProcessError> {
        self.1.lock().unwrap().push(Told::Resize(to));
        Ok(())
    }

    async fn detach(&mut self, id: DeviceId, _: Option<&str>) -> Result<(), ProcessError> {
        self.1.lock().unwrap().push(Told::Detach(id));
        Ok(())
    }

    async fn suspend(
        &mut self,
        attempt: Uuid,
        _: MemoryFile,
        _: Option<&str>,
    ) -> Result<(), ProcessError> {
        self.1.lock().unwrap().push(Told::Suspend(attempt));
        let answer = self.0.1.lock().unwrap().pop_front();
        if let Some(answer) = answer {
            self.0.say(Heard::Suspended(attempt, answer));
        }
        Ok(())
    }

    async fn copy(
        &mut self,
        attempt: Uuid,
        _: File,
        _: u64,
        _: Option<&str>,
    ) -> Result<(), ProcessError> {
        self.1.lock().unwrap().push(Told::Copy(attempt));
        Ok(())
    }

    async fn no_copy(&mut self, _: Option<&str>) -> Result<(), ProcessError> {
        self.1.lock().unwrap().push(Told::NoCopy);
        Ok(())
    }

    async fn send(
        &mut self,
        migration: MigrationId,
        policy: Policy,
        line: Option<(OwnedFd, Way)>,
        _: Option<&str>,
    ) -> Result<(), ProcessError> {
        let told = Told::Send(migration, policy, line.is_some());
        self.1.lock().unwrap().push(told);
        Ok(())
    }

    async fn bring_line(&self, _: OwnedFd) -> Result<(), ProcessError> {
        self.1.lock().unwrap().push(Told::Line);
        Ok(())
    }

    fn can_hand_over(&self) -> Result<(), ProcessError> {
        match self.2.is_old.load(Ordering::Relaxed) {
            true => Err(ProcessError::NotNow("older".to_owned())),
            false => Ok(()),
        }
    }

    async fn hand_over(
        &mut self,
        migration: MigrationId,
        _: OwnedFd,
        _: Option<&str>,
    ) -> Result<(), ProcessError> {
        self.1.lock().unwrap().push(Told::HandOver(migration));
        *self.2.handed.lock().unwrap() = Some(migration);
        let answer = self.0.1.lock().unwrap().pop_front();
        if let Some(answer) = answer {
            let offered = Transit::Offered {
                ran: true,
                doubt: None,
                owes: false,
            };
            let state = answer.map_or_else(|reason| Transit::Failed { reason }, |()| offered);
            self.0.say(self.moving(state));
        }
        Ok(())
    }

    async fn stay(&mut self, _: Option<&str>) -> Result<(), ProcessError> {
        self.1.lock().unwrap().push(Told::Stay);
        if self.2.handed.lock().unwrap().is_some() {
            let reason = "it stays".to_owned();
            self.0.say(self.moving(Transit::Failed { reason }));
        }
        Ok(())
    }

    async fn hear(&mut self) -> Heard {
        loop {
            let said = self.0.0.0.lock().unwrap().pop_front();
            match said {
                Some(heard) => return heard,
                None => self.0.0.1.notified().await,
            }
        }
    }

    async fn kill(&mut self) -> Result<End, ProcessError> {
        if self.2.handed.lock().unwrap().is_some() {
            self.1.lock().unwrap().push(Told::Kill(self.3));
        }
        Ok(End::Said(StopReason::Requested))
    }
}

/// Every process that it starts says the same words.
pub(super) struct Doubles(Words, Arc<Mutex<Vec<Told>>>, Arc<Upgrade>);

#[async_trait]
impl Launcher for Doubles {
    type Process = Double;

    async fn launch(&self, plan: Plan) -> Result<Double, ProcessError> {
        if plan.goes_on {
            self.1.lock().unwrap().push(Told::GoOn);
        }
        let devices: Vec<DeviceId> = plan.devices.iter().map(OpenDevice::id).collect();
        if !devices.is_empty() {
            self.1.lock().unwrap().push(Told::Start(devices));
        }
        let (words, pid) = match plan.takes_over {
            Some(_) => (self.2.heir.clone(), 2),
            None => (self.0.clone(), 1),
        };
        Ok(Double(words, self.1.clone(), self.2.clone(), pid))
    }

    async fn adopt(&self, _: ServerId, _: &ProcessRecord) -> std::io::Result<Adoption<Double>> {
        let (told, upgrade) = (self.1.clone(), self.2.clone());
        Ok(Adoption::Alive(Double(self.0.clone(), told, upgrade, 1)))
    }

    fn is_current(&self, process: &ProcessRecord) -> std::io::Result<bool> {
        Ok(process.pid == 2)
    }

    fn settle(&self, _: ServerId) -> std::io::Result<()> {
        self.1.lock().unwrap().push(Told::Settle);
        Ok(())
    }

    fn limit(&self, _: ServerId, _: u8, memory_mib: u64) -> std::io::Result<()> {
        self.1.lock().unwrap().push(Told::Limit(memory_mib));
        Ok(())
    }

    async fn clear(&self, _: ServerId) -> Result<(), ProcessError> {
        Ok(())
    }
}

struct NoMakings;

#[async_trait]
impl Makings for NoMakings {
    async fn boot(&self, _: &MachinePaths, _: &Boot, _: &Progress) -> Result<(), MakeError> {
        Ok(())
    }

    async fn disk(
        &self,
        paths: &MachinePaths,
        _: &RootDisk,
        _: Old,
        _: &Progress,
    ) -> Result<(), MakeError> {
        std::fs::write(paths.disk(), b"disk").unwrap();
        Ok(())
    }

    async fn empty_disk(
        &self,
        paths: &MachinePaths,
        _: u64,
        _: &Progress,
    ) -> Result<(), MakeError> {
        std::fs::write(paths.disk(), b"").unwrap();
        Ok(())
    }

    fn copy_turn(&self) -> Option<CopyTurn> {
        Some(CopyTurn(None))
    }

    /// None where a test says so.
    fn copy_has_room(&self, paths: &MachinePaths) -> Result<(), MakeError> {
        match paths.folder().join("full").exists() {
            true => Err(MakeError::Io {
                what: "no room".to_owned(),
                source: std::io::ErrorKind::StorageFull.into(),
            }),
            false => Ok(()),
        }
    }

    async fn copy_disk(&self, paths: &MachinePaths, copy: CopyId) -> Result<u64, MakeError> {
        let made = std::fs::copy(paths.disk(), paths.copy(copy));
        made.map_err(|source| MakeError::Io {
            what: "the copy".to_owned(),
            source,
        })
    }

    async fn restore_disk(&self, paths: &MachinePaths, copy: CopyId) -> Result<(), MakeError> {
        Ok(directory::take(&paths.copy(copy), &paths.disk())?)
    }

    fn grow_disk(&self, paths: &MachinePaths, size: u64) -> Result<(), MakeError> {
        Ok(directory::grow(&paths.disk(), size)?)
    }

    async fn open_disk(&self, paths: &MachinePaths, disk: &Disk) -> Result<OpenDisk, MakeError> {
        Ok(directory::open_or_make(
            &paths.data_disk(disk.id),
            disk.size,
            disk.read_only,
        )?)
    }

    fn disk_stands(&self, paths: &MachinePaths, disk: &Disk) -> bool {
        paths.data_disk(disk.id).exists()
    }

    async fn delete_disk(&self, paths: &MachinePaths, disk: &Disk) -> Result<(), MakeError> {
        Ok(directory::delete(&paths.data_disk(disk.id))?)
    }

    fn plug(&self, _: &Nic) -> Result<Vec<OwnedFd>, MakeError> {
        Ok(Vec::new())
    }

    fn config_drive(&self, _: &MachinePaths, _: Option<&InstanceData>) -> Result<(), MakeError> {
        Ok(())
    }

    fn remove(&self, paths: &MachinePaths) -> Result<(), MakeError> {
        let _ = std::fs::remove_file(paths.disk());
        Ok(())
    }

    fn boot_id(&self) -> Option<Uuid> {
        Some(BOOT)
    }
}

fn wanted(power: Power) -> Wanted {
    Wanted {
        power,
        soft_reboots: 0,
        hard_reboots: 0,
        rebuilds: 0,
        arrives: None,
        departs: None,
        continues: None,
        copy: None,
        copies: 0,
        restores: None,
        parks: None,
        spec: MachineSpec {
            vcpus: 1,
            max_vcpus: None,
            memory_mib: 64,
            max_memory_mib: None,
            pages: Pages::Small,
            numa_nodes: vec![],
            cpus: vec![],
            cpu_profile: "host".into(),
            cpu: None,
            boot: Boot {
                kernel: None,
                initrd: None,
                command_line: String::new(),
            },
            root_disk: Some(RootDisk {
                image: None,
                size: 1 << 20,
            }),
            disks: vec![],
            nics: vec![],
            guest: Default::default(),
        },
    }
}

pub(super) fn put(
    revision: u64,
    power: Power,
) -> (Message, oneshot::Receiver<Result<MachineReport, Refusal>>) {
    let put = PutMachine {
        version: 1,
        generation: Generation(1),
        revision: Revision(revision),
        wanted: wanted(power),
        request_id: None,
        boot_id: None,
    };
    let (answer, answered) = oneshot::channel();
    (Message::Put(Box::new(put), answer), answered)
}

pub(super) struct Stage {
    pub(super) actor: Actor<Doubles>,
    pub(super) words: Words,
    pub(super) told: Arc<Mutex<Vec<Told>>>,
    pub(super) upgrade: Arc<Upgrade>,
    pub(super) reports: watch::Receiver<MachineReport>,
    changed: mpsc::UnboundedReceiver<ServerId>,
    pub(super) mailbox: mpsc::Sender<Message>,
}

impl Stage {
    /// With a machine that runs, wanted so at revision 1.
    pub(super) async fn running(folder: &Path) -> Self {
        Self::running_with(folder, memory_takes).await
    }

    /// The same where memory of so many MiB may take so long.
    pub(super) async fn running_with(folder: &Path, memory_takes: fn(u64) -> Duration) -> Self {
        let words = Words::default();
        let told: Arc<Mutex<Vec<Told>>> = Arc::default();
        let (sender, changed) = mpsc::unbounded_channel();
        let upgrade: Arc<Upgrade> = Arc::default();
        let surroundings = Surroundings {
            launcher: Doubles(words.clone(), told.clone(), upgrade.clone()),
            makings: Arc::new(NoMakings),
            shutdown: SHUTDOWN,
            listen: std::net::Ipv4Addr::LOCALHOST.into(),
            memory_takes,
            suspend_compression: Compression::None,
            changed: sender,
        };
        let record = Record {
            version: VERSION,
            id: ID,
            intent: Intent {
                generation: Generation(1),
                revision: Revision(1),
                wanted: wanted(Power::Running),
            },
            request_id: None,
            done: Done::default(),
            user: 1,
            process: None,
            stop: None,
            kept: None,
            heard: Some(BOOT),
            gone_at_us: None,
            changed_at_us: 0,
            serial: None,
            line: None,
        };
        let paths = Paths::new(folder, folder).machine(ID);
        record.write(&paths.record()).unwrap();
        *upgrade.record.lock().unwrap() = paths.record();
        let (mailbox, messages) = mpsc::channel(16);
        let surroundings = Arc::new(surroundings);
        let (actor, reports, _) = Actor::new(surroundings, paths, record, messages, Arc::default());
        let mut stage = Self {
            actor,
            words,
            told,
            upgrade,
            reports,
            changed,
            mailbox,
        };
        stage.settle(Observed::Running).await;
        while stage.changed.try_recv().is_ok() {}
        stage
    }

    /// Its process says that it has handed its guest over.
    pub(super) fn stands_still(&self, id: MigrationId) {
        *self.upgrade.handed.lock().unwrap() = Some(id);
        let offered = Transit::Offered {
            ran: true,
            doubt: None,
            owes: false,
        };
        let (told, upgrade) = (self.told.clone(), self.upgrade.clone());
        let process = Double(self.words.clone(), told, upgrade, 1);
        let moving = process.moving(offered);
        self.words.say(moving);
    }

    /// All that was said.
    pub(super) fn hear_all(&mut self) {
        while !self.words.0.0.lock().unwrap().is_empty() {
            self.actor.catch_up();
        }
    }

    /// Turns until the machine is settled as this.
    pub(super) async fn settle(&mut self, observed: Observed) {
        while !self.reports.borrow().settled || self.reports.borrow().observed != observed {
            let turn = tokio::time::timeout(SHUTDOWN, self.actor.turn()).await;
            assert!(
                matches!(turn, Ok(Ok(()))),
                "it stays {:?}",
                self.reports.borrow()
            );
        }
    }
}

pub(super) fn status(state: State, guest: Option<GuestSaid>) -> Heard {
    Heard::Status(Status {
        lacks: None,
        moving: None,
        state,
        guest,
        devices: Some(Vec::new()),
        size: Some(Size::at_start(&wanted(Power::Running).spec)),
        fresh: false,
    })
}

#[tokio::test]
async fn a_processes_end_is_of_the_intent_that_was_held_when_it_ended() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    // Both are there; the intent is looked at first.
    let detail = "signal 9".to_owned();
    stage.words.say(Heard::Ended(End::Silent { detail }));
    let (message, mut answered) = put(2, Power::Running);
    stage.actor.take(message);
    let answer = answered.try_recv().unwrap().unwrap();
    assert!(!answer.settled, "{answer:?}");
    stage.settle(Observed::Running).await;
    let report = stage.reports.borrow().clone();
    assert_eq!((report.revision, report.starts), (Revision(2), 2));
}

/// Another agent, in another boot of the host, finds the record of a machine that ran.
async fn after_a_reboot(folder: &Path) -> Stage {
    let mut stage = Stage::running(folder).await;
    stage.actor.record.heard = Some(Uuid::from_u128(0xa0));
    if let Some(process) = &mut stage.actor.record.process {
        process.boot_id = Uuid::from_u128(0xa0);
    }
    let detail = "gone with the host".to_owned();
    stage.words.say(Heard::Ended(End::Silent { detail }));
    stage.hear_all();
    wait_for_word(&mut stage).await;
    stage
}

async fn wait_for_word(stage: &mut Stage) {
    stage.actor.publish();
    assert_eq!(stage.actor.next(), Step::Await);
    let report = stage.reports.borrow().clone();
    assert!(report.waits && !report.settled, "{report:?}");
    assert!(
        matches!(report.observed, Observed::Starting { .. }),
        "{report:?}"
    );
}

fn said_in(
    boot: u128,
    revision: u64,
) -> (Message, oneshot::Receiver<Result<MachineReport, Refusal>>) {
    let (Message::Put(mut put, answer), answered) = put(revision, Power::Running) else {
        unreachable!("as it was made")
    };
    put.boot_id = Some(Uuid::from_u128(boot));
    (Message::Put(put, answer), answered)
}

#[tokio::test]
async fn what_was_wanted_before_a_reboot_is_started_once_it_is_said_in_this_boot() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = after_a_reboot(folder.path()).await;
    // Late ones, of the boot before: the newer is taken, and says nothing of this boot.
    for (revision, boot) in [(1, 0xa0), (2, 0xa0), (2, 0)] {
        stage.actor.take(said_in(boot, revision).0);
        wait_for_word(&mut stage).await;
    }
    let (message, mut answered) = said_in(0xb0, 2);
    stage.actor.take(message);
    let answer = answered.try_recv().unwrap().unwrap();
    assert!(!answer.waits, "{answer:?}");
    stage.settle(Observed::Running).await;
    assert_eq!(stage.reports.borrow().starts, 2);
    // The next agent of this boot knows it.
    let record = Record::read(&stage.actor.paths.record()).unwrap();
    assert_eq!(record.heard, Some(BOOT));
}

#[tokio::test]
async fn an_operators_word_will_do() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = after_a_reboot(folder.path()).await;
    stage.actor.take(Message::Hear);
    stage.settle(Observed::Running).await;
    assert_eq!(stage.reports.borrow().starts, 2);
}

#[tokio::test]
async fn a_machine_that_waits_is_removed_without_a_word() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = after_a_reboot(folder.path()).await;
    let (Message::Put(mut put, answer), _) = put(2, Power::Absent) else {
        unreachable!("as it was made")
    };
    (put.generation, put.boot_id) = (Generation(2), Some(Uuid::nil()));
    stage.actor.take(Message::Put(put, answer));
    stage.settle(Observed::Absent).await;
    let report = stage.reports.borrow().clone();
    assert_eq!((report.starts, report.waits), (1, false));
    // It comes back as another owner's, by what was on its way to an earlier boot.
    let (Message::Put(mut put, answer), _) = said_in(0xa0, 3) else {
        unreachable!("as it was made")
    };
    put.generation = Generation(3);
    stage.actor.user.store(2, Ordering::Relaxed);
    stage.actor.take(Message::Put(put, answer));
    wait_for_word(&mut stage).await;
}

#[tokio::test]
async fn a_guest_that_talks_without_end_does_not_keep_an_intent_away() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    for _ in 0..1000 {
        stage.words.say(Heard::Event(MachineEvent::GuestReset));
    }
    let (message, mut answered) = put(2, Power::Running);
    stage.actor.take(message);
    assert!(answered.try_recv().unwrap().unwrap().settled);
    let unheard = stage.words.0.0.lock().unwrap().len();
    assert!(unheard > 900, "{unheard}");
}

#[tokio::test]
async fn a_command_that_is_carried_out_late_has_not_failed() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    for (revision, power, event, observed) in [
        (2, Power::Paused, MachineEvent::Paused, Observed::Paused),
        (3, Power::Running, MachineEvent::Running, Observed::Running),
    ] {
        stage.actor.take(put(revision, power).0);
        let reason = "not carried out in time".to_owned();
        stage.actor.fail(reason.clone());
        assert!(stage.reports.borrow().settled);
        // What is not the wanted one changes nothing.
        let before = stage.reports.borrow().clone();
        let state = match power {
            Power::Paused => State::Running,
            _ => State::Paused,
        };
        stage.words.say(status(state, None));
        let _ = stage.actor.turn().await;
        assert_eq!(*stage.reports.borrow(), before);
        stage.words.say(Heard::Event(event));
        let _ = stage.actor.turn().await;
        let report = stage.reports.borrow().clone();
        assert_eq!((report.settled, report.observed), (true, observed));
    }
}

/// How often the record was replaced since the folder is watched.
fn writes(watched: &rustix::fd::OwnedFd) -> usize {
    let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
    let mut reader = rustix::fs::inotify::Reader::new(watched, &mut buffer);
    std::iter::from_fn(|| reader.next().ok().map(drop)).count()
}

#[tokio::test]
async fn a_guest_that_panics_and_resets_without_end_costs_little_and_its_last_word_counts() {
    use rustix::fs::inotify::{CreateFlags, WatchFlags, add_watch, init};
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    let watched = init(CreateFlags::NONBLOCK).unwrap();
    let machine = &stage.actor.paths.folder;
    add_watch(&watched, machine, WatchFlags::MOVED_TO).unwrap();
    for _ in 0..100 {
        for event in [MachineEvent::Panicked, MachineEvent::GuestReset] {
            stage.words.say(Heard::Event(event));
        }
    }
    stage.hear_all();
    // The first is told at once; that it was reset, after a while.
    assert_eq!(writes(&watched), 1);
    assert!(stage.reports.borrow().guest.panicked);
    stage.actor.end_quiet();
    let _ = stage.actor.turn().await;
    assert_eq!(writes(&watched), 1);
    assert!(!stage.reports.borrow().guest.panicked);
    assert!(
        !Record::read(&stage.actor.paths.record())
            .unwrap()
            .process
            .unwrap()
            .guest
            .panicked
    );
    let pushes = std::iter::from_fn(|| stage.changed.try_recv().ok()).count();
    assert_eq!(pushes, 2);
    // A panic that was over within the quiet time leaves nothing to be told.
    for event in [MachineEvent::Panicked, MachineEvent::GuestReset] {
        stage.words.say(Heard::Event(event));
    }
    stage.hear_all();
    assert_eq!(stage.actor.guest.tell_by(), None);
    assert_eq!(writes(&watched), 0);
}

#[tokio::test]
async fn a_pause_by_the_watchdog_that_an_intent_has_ended_is_not_heard_of_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    let said = Some(GuestSaid {
        panicked: true,
        watchdog_fired: 1,
        holds: 1,
    });
    stage.words.say(status(State::Paused, said));
    stage.settle(Observed::Paused).await;
    let report = stage.reports.borrow().clone();
    assert_eq!(
        (report.guest.panicked, report.guest.watchdog_fired),
        (true, 1)
    );
    stage.actor.take(put(2, Power::Running).0);
    // As it says to the next agent, which came before it was told to go on.
    stage.words.say(status(State::Paused, said));
    stage.hear_all();
    assert!(!stage.reports.borrow().settled);
    stage.words.say(Heard::Event(MachineEvent::Running));
    stage.settle(Observed::Running).await;
}
