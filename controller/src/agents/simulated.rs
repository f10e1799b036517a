//! A host without KVM: the agent's own decisions ([`fractus_agent_api::decision`]) over a machine that
//! is a few fields. What it keeps on its "disk" survives a crash of the agent; processes survive that
//! too, and end with the host's reboot. No clock and no randomness of its own.

mod machine;
pub mod stream;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use fractus_agent_api::VERSION;
use fractus_agent_api::copy::{CopyId, Part, Piece};
use fractus_agent_api::cpu::{Area, Cpu, Profile, by_name};
use fractus_agent_api::decision::{self, Intake, Intent, Process};
use fractus_agent_api::host::{Changes, CpuReport, FullReport, HostId, HostReport};
use fractus_agent_api::machine::{
    MachineReport, PutMachine, Refusal, ServerId, StopReason, Wanted,
};
use futures::{SinkExt, StreamExt};
use uuid::Uuid;

use self::machine::{COPIED, Record};
use super::{Agent, AgentError, Agents, Console, CopyStream};

/// A simulated host with its agent.
pub struct SimulatedHost {
    id: HostId,
    inner: Mutex<Host>,
    /// Called after each change of a machine; the simulation delivers, or loses, what is pushed.
    changed: Box<dyn Fn(HostId) + Send + Sync>,
}

#[derive(Debug, Default)]
struct Host {
    /// On disk.
    machines: BTreeMap<ServerId, Record>,
    boot_id: Uuid,
    /// Of this life of the agent.
    instance: Uuid,
    sequence: u64,
    pushed: BTreeMap<ServerId, MachineReport>,
    down: bool,
    /// It has no power.
    off: bool,
    /// No copy of a disk has room here.
    full: bool,
    /// Nothing is removed here.
    stuck: bool,
    inventory: Option<HostReport>,
    now_us: i64,
    /// What somebody else tells it right after it has next been asked of a machine.
    overtaking: Option<(ServerId, PutMachine)>,
}

/// A CPU with these features and what state they need, of a TSC that scales.
pub fn cpu(features: &[&str]) -> Cpu {
    let mut offers = Profile {
        vendor: "GenuineIntel".to_owned(),
        xcr0: 0b1110_0111,
        physical_bits: 46,
        tsc_khz: Some(2_000_000),
        ..Profile::default()
    };
    for (bit, offset) in [(2, 576), (5, 1088), (6, 1152), (7, 1664)] {
        offers.areas.insert(bit, Area { offset, size: 64 });
    }
    for (word, bit) in features.iter().filter_map(|name| by_name(name)) {
        *offers.words.entry(word).or_default() |= 1 << bit;
    }
    Cpu {
        family: 6,
        model: 106,
        stepping: 6,
        offers,
        tsc_scales: true,
    }
}

impl SimulatedHost {
    /// `instance` identifies the first life of its agent.
    pub fn new(
        id: HostId,
        inventory: HostReport,
        instance: Uuid,
        changed: impl Fn(HostId) + Send + Sync + 'static,
    ) -> Self {
        let boot_id = inventory.boot_id;
        let inner = Host {
            boot_id,
            instance,
            inventory: Some(inventory),
            ..Host::default()
        };
        Self {
            id,
            inner: Mutex::new(inner),
            changed: Box::new(changed),
        }
    }

    /// An inventory of `cpus` CPUs and `memory_mib`.
    pub fn inventory(hostname: &str, cpus: u32, memory_mib: u64) -> HostReport {
        HostReport {
            version: VERSION,
            agent_version: "0.1.0".to_owned(),
            hostname: hostname.to_owned(),
            boot_id: Uuid::nil(),
            cpus,
            memory_mib,
            memory_free_mib: memory_mib,
            disk_gib: 1000,
            disk_free_gib: 1000,
            cpu: CpuReport {
                architecture: "x86_64".to_owned(),
                vendor: "Simulated".to_owned(),
                model: "Simulated".to_owned(),
                sockets: 1,
                cores: cpus,
                threads: 1,
                features: Vec::new(),
                guest: None,
            },
            kernel: "simulated".to_owned(),
            load: [0.0; 3],
            uptime_s: 0,
            lacks: Vec::new(),
            unable: Vec::new(),
            post_copy: true,
        }
    }

    pub fn id(&self) -> HostId {
        self.id
    }

    /// Takes an intent as the real agent does: persisted before it is answered.
    pub fn take(&self, id: ServerId, put: &PutMachine) -> Result<MachineReport, Refusal> {
        let mut host = self.host();
        if host.down {
            return Err(Refusal::Unavailable {
                detail: "the agent does not run".to_owned(),
            });
        }
        let now = host.now_us;
        let held = host.machines.get(&id).map(|record| &record.intent);
        if decision::intake(held, put)? == Intake::New {
            let intent = Intent {
                generation: put.generation,
                revision: put.revision,
                wanted: put.wanted.clone(),
            };
            let record = host.machines.entry(id);
            let record = record.or_insert_with(|| Record::new(self.id, intent.clone(), now));
            record.take(intent);
        }
        let boot = Some(host.boot_id);
        if let Some(record) = host.machines.get_mut(&id) {
            record.unheard &= !decision::is_word(put, boot);
        }
        host.report(id).ok_or(Refusal::Unknown)
    }

    /// Once it has been asked of the machine, and before whoever asked says what follows from the answer, somebody
    /// else tells it this.
    pub fn overtake(&self, id: ServerId, put: PutMachine) {
        self.host().overtaking = Some((id, put));
    }

    /// Carries out the next step of one machine. False if there was none to do.
    pub fn step(&self, id: ServerId) -> bool {
        let stepped = {
            let mut host = self.host();
            let now = host.now_us;
            let (down, full, stuck) = (host.down, host.full, host.stuck);
            match host.machines.get_mut(&id) {
                Some(record) if stuck && record.is_to_go() => false,
                Some(record) if !down => record.step(now) || record.step_of_copies(full),
                _ => false,
            }
        };
        if stepped {
            (self.changed)(self.id);
        }
        stepped
    }

    /// Carries out steps until nothing is left to do.
    pub fn settle(&self) {
        for id in self.machines() {
            while self.step(id) {}
        }
    }

    /// What has changed since the last push; `None` if nothing has. It counts as pushed.
    pub fn push(&self) -> Option<Changes> {
        let mut host = self.host();
        if host.down {
            return None;
        }
        let reports = host.reports();
        let machines: Vec<MachineReport> = reports
            .iter()
            .filter(|report| host.pushed.get(&report.id) != Some(report))
            .cloned()
            .collect();
        if machines.is_empty() {
            return None;
        }
        host.sequence += 1;
        host.pushed = reports
            .into_iter()
            .map(|report| (report.id, report))
            .collect();
        Some(Changes {
            version: VERSION,
            agent_instance: host.instance,
            sequence: host.sequence,
            machines,
        })
    }

    /// All machines; what was not pushed counts as pushed.
    pub fn full_report(&self) -> FullReport {
        let mut host = self.host();
        let machines = host.reports();
        host.pushed = machines
            .iter()
            .map(|report| (report.id, report.clone()))
            .collect();
        FullReport {
            version: VERSION,
            agent_instance: host.instance,
            sequence: host.sequence,
            machines,
        }
    }

    /// This life of the agent, and its last push.
    pub fn pushes(&self) -> (Uuid, u64) {
        let host = self.host();
        (host.instance, host.sequence)
    }

    /// From now on its guests may have this.
    pub fn set_cpu(&self, cpu: Option<Cpu>) {
        if let Some(inventory) = &mut self.host().inventory {
            inventory.cpu.guest = cpu.map(Box::new);
        }
        (self.changed)(self.id);
    }

    pub fn host_report(&self) -> HostReport {
        let host = self.host();
        let inventory = host.inventory.clone();
        HostReport {
            boot_id: host.boot_id,
            ..inventory.unwrap_or_else(|| Self::inventory("", 1, 1024))
        }
    }

    /// The agent is killed. Processes run on.
    pub fn kill_agent(&self) {
        self.host().down = true;
    }

    /// The agent starts anew and finds its records and processes. That something failed was in its
    /// memory only: it is tried again.
    pub fn start_agent(&self, instance: Uuid) {
        let mut host = self.host();
        for record in host.machines.values_mut() {
            record.failed = None;
            record.copy_failed = None;
            record.agent_ended();
        }
        host.down = false;
        host.instance = instance;
        host.sequence = 0;
        host.pushed.clear();
    }

    pub fn agent_is_down(&self) -> bool {
        self.host().down
    }

    /// The host itself reboots, or gets its power back: no process is left; what should run is started by the agent
    /// once it has heard that it is to. Memory that is kept is on disk.
    pub fn reboot(&self, instance: Uuid) {
        let mut host = self.host();
        host.boot_id = instance;
        host.off = false;
        for record in host.machines.values_mut() {
            record.lose();
            record.unheard = true;
        }
        drop(host);
        self.start_agent(instance);
    }

    /// The host loses its power, until it is rebooted.
    pub fn power_off(&self) {
        let mut host = self.host();
        (host.down, host.off) = (true, true);
        for record in host.machines.values_mut() {
            record.lose();
        }
    }

    pub fn is_off(&self) -> bool {
        self.host().off
    }

    /// The guest powers itself off, or its VMM is killed. False if no process runs.
    pub fn end_process(&self, id: ServerId, reason: StopReason) -> bool {
        let ended = {
            let mut host = self.host();
            let now = host.now_us;
            match host.machines.get_mut(&id) {
                Some(record) if record.process != Process::None => {
                    record.end(reason);
                    record.changed_at_us = now;
                    true
                }
                _ => false,
            }
        };
        if ended {
            (self.changed)(self.id);
        }
        ended
    }

    /// The guest's kernel panics, or, having panicked, is reset. False if no process runs.
    pub fn panic(&self, id: ServerId, panicked: bool) -> bool {
        self.say(id, |record| record.guest.panicked = panicked)
    }

    /// The guest's watchdog runs out, and pauses it. False if no process runs.
    pub fn pause_by_watchdog(&self, id: ServerId) -> bool {
        self.say(id, |record| {
            record.guest.watchdog_fired += 1;
            record.process = Process::Paused;
            record.held = true;
        })
    }

    fn say(&self, id: ServerId, what: impl FnOnce(&mut Record)) -> bool {
        let said = match self.host().machines.get_mut(&id) {
            // A guest whose memory is kept, or that is between two hosts, stands still.
            Some(record) if record.has_guest() && record.kept.is_none() => {
                what(record);
                true
            }
            _ => false,
        };
        if said {
            (self.changed)(self.id);
        }
        said
    }

    /// What it was asked last fails on this host.
    pub fn fail(&self, id: ServerId, reason: &str) {
        if let Some(record) = self.host().machines.get_mut(&id) {
            record.failed = Some(reason.to_owned());
        }
        (self.changed)(self.id);
    }

    /// No copy of a disk has room here from now on, or any has again.
    pub fn set_full(&self, full: bool) {
        self.host().full = full;
    }

    /// Nothing of a machine is removed here from now on, or is again.
    pub fn set_stuck(&self, stuck: bool) {
        self.host().stuck = stuck;
    }

    /// The copy of the server's disk that is here.
    pub fn copied(&self, id: ServerId) -> Option<CopyId> {
        self.host().machines.get(&id)?.copy
    }

    /// Loses all records, as if the host had been installed anew.
    pub fn wipe(&self) {
        self.host().machines.clear();
    }

    pub fn set_now_us(&self, now_us: i64) {
        self.host().now_us = now_us;
    }

    /// Machines that it has a record of.
    pub fn machines(&self) -> Vec<ServerId> {
        self.host().machines.keys().copied().collect()
    }

    /// Servers whose guest is here, by the kernel and not by anybody's word: not where it stands still until the
    /// owner's row has said where it runs.
    pub fn processes(&self) -> Vec<ServerId> {
        self.those(Record::has_guest)
    }

    /// Servers of which there is any process.
    pub fn all_processes(&self) -> Vec<ServerId> {
        self.those(|record| record.process != Process::None)
    }

    fn those(&self, which: impl Fn(&Record) -> bool) -> Vec<ServerId> {
        let host = self.host();
        let those = host.machines.iter().filter(|(_, record)| which(record));
        those.map(|(id, _)| *id).collect()
    }

    /// Servers of which anything is left here but a tombstone.
    pub fn remains(&self) -> Vec<ServerId> {
        let host = self.host();
        host.machines
            .iter()
            .filter(|(_, record)| record.remains())
            .map(|(id, _)| *id)
            .collect()
    }

    pub fn report(&self, id: ServerId) -> Option<MachineReport> {
        self.host().report(id)
    }

    /// What it was last told of the machine.
    pub fn wanted(&self, id: ServerId) -> Option<Wanted> {
        let host = self.host();
        host.machines
            .get(&id)
            .map(|record| record.intent.wanted.clone())
    }

    /// How many disks were made for the machine.
    pub fn disks(&self, id: ServerId) -> u64 {
        self.host()
            .machines
            .get(&id)
            .map_or(0, |record| record.disks)
    }

    /// Which guest is the machine's, by the start that it began with; one whose memory is kept goes on
    /// as the same.
    pub fn guest(&self, id: ServerId) -> Option<u64> {
        let host = self.host();
        host.machines.get(&id).map(|record| record.began_with)
    }

    /// The guest whose memory is kept here, likewise.
    pub fn kept(&self, id: ServerId) -> Option<u64> {
        self.host().machines.get(&id)?.kept
    }

    fn host(&self) -> MutexGuard<'_, Host> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Host {
    fn reports(&self) -> Vec<MachineReport> {
        self.machines
            .keys()
            .filter_map(|id| self.report(*id))
            .collect()
    }

    fn report(&self, id: ServerId) -> Option<MachineReport> {
        Some(self.machines.get(&id)?.report(id))
    }
}

#[async_trait]
impl Agent for SimulatedHost {
    async fn put(&self, id: ServerId, body: &PutMachine) -> Result<MachineReport, AgentError> {
        let taken = self.take(id, body)?;
        (self.changed)(self.id);
        Ok(taken)
    }

    async fn get(&self, id: ServerId) -> Result<MachineReport, AgentError> {
        if self.is_off() {
            return Err(AgentError::Unreachable {
                host: self.id,
                detail: "no answer".to_owned(),
            });
        }
        let report = self.report(id);
        let overtaking = self.host().overtaking.take_if(|(of, _)| *of == id);
        if let Some((_, put)) = overtaking {
            self.take(id, &put)?;
            (self.changed)(self.id);
        }
        report.ok_or(AgentError::Refused(Refusal::Unknown))
    }

    async fn list(&self) -> Result<FullReport, AgentError> {
        Ok(self.full_report())
    }

    async fn host(&self) -> Result<HostReport, AgentError> {
        Ok(self.host_report())
    }

    async fn console_log(&self, id: ServerId, lines: Option<u64>) -> Result<Bytes, AgentError> {
        let report = self
            .report(id)
            .ok_or(AgentError::Refused(Refusal::Unknown))?;
        let all = (1..=report.starts).map(|start| format!("start {start}\n"));
        let all: Vec<String> = all.collect();
        let lines = lines.map_or(all.len(), |lines| {
            usize::try_from(lines).unwrap_or(usize::MAX)
        });
        Ok(Bytes::from(all[all.len().saturating_sub(lines)..].concat()))
    }

    /// Which disk it is, a little behind the copy's beginning.
    async fn copy(&self, id: ServerId, copy: CopyId) -> Result<CopyStream, AgentError> {
        if self.copied(id) != Some(copy) {
            return Err(AgentError::Refused(Refusal::Unknown));
        }
        let text = format!("disk {} of {id}", self.disks(id));
        let piece = Piece {
            offset: 4096,
            bytes: text.into(),
        };
        let parts = [Part::Piece(piece), Part::End(COPIED)];
        Ok(futures::stream::iter(parts.map(Ok)).boxed())
    }

    async fn console(&self, id: ServerId) -> Result<Console, AgentError> {
        self.report(id)
            .ok_or(AgentError::Refused(Refusal::Unknown))?;
        let input = futures::sink::drain().sink_map_err(|never| match never {});
        Ok(Console {
            output: futures::stream::empty().boxed(),
            input: Box::pin(input),
        })
    }
}

/// A cloud of simulated hosts.
#[derive(Default, Clone)]
pub struct SimulatedAgents {
    hosts: Arc<Mutex<BTreeMap<HostId, Arc<SimulatedHost>>>>,
}

impl SimulatedAgents {
    pub fn add(&self, host: Arc<SimulatedHost>) {
        self.lock().insert(host.id(), host);
    }

    pub fn remove(&self, host: HostId) {
        self.lock().remove(&host);
    }

    pub fn host(&self, host: HostId) -> Option<Arc<SimulatedHost>> {
        self.lock().get(&host).cloned()
    }

    pub fn all(&self) -> Vec<Arc<SimulatedHost>> {
        self.lock().values().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<HostId, Arc<SimulatedHost>>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agents for SimulatedAgents {
    fn agent(&self, host: HostId) -> Result<Arc<dyn Agent>, AgentError> {
        let found = self.lock().get(&host).cloned();
        found
            .map(|host| host as Arc<dyn Agent>)
            .ok_or(AgentError::NoHost { host })
    }
}
