//! All vCPUs of a machine, as its owner sees them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use rustix::thread::{CpuSet, sched_setaffinity};
use vmm_sys_util::signal::Killable;

use super::gate::Gate;
use super::host::{Lacks, Offered};
use super::run::{Surroundings, Vcpu, VcpuParts};
use super::state::{TSC, VcpuError, VcpuState, refused};
use super::throttle::Share;
use super::{BootRegisters, cpuid, signal};
use crate::config::CpuConfig;
use crate::kvm::{Hypervisor, KvmError, Vm};
use crate::thread::{ThreadKind, Threads};

/// Asked of one vCPU; all but `Run` of a parked one.
pub enum Command {
    Run,
    /// Like `Run`, by itself while others run.
    Join,
    Save(Sender<Result<Box<VcpuState>, VcpuError>>),
    Load(Box<VcpuState>, Sender<Result<(), VcpuError>>),
    /// Back to power-on.
    PowerOn(Option<BootRegisters>, Sender<Result<(), VcpuError>>),
    /// Back to power-on while others run.
    Renew(Sender<Result<(), VcpuError>>),
    End,
}

struct Handle {
    commands: Sender<Command>,
    kicked: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    ready: Option<Receiver<Result<(), VcpuError>>>,
}

/// Dropping it ends the threads.
pub struct VcpuSet {
    vcpus: Vec<Handle>,
    gate: Arc<Gate>,
    share: Share,
    /// Of the guest's time stamp counters; none: KVM does not say.
    tsc_khz: Option<u32>,
}

#[derive(Debug, thiserror::Error)]
pub enum VcpuSetError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error(transparent)]
    Lacks(#[from] Lacks),
    #[error("start the thread of vCPU {index}")]
    Thread { index: u8, source: std::io::Error },
    #[error("vCPUs did not come to rest within {seconds} s")]
    Restless { seconds: u64 },
}

/// A vCPU leaves the guest in microseconds; more than this is a fault of the host.
const PATIENCE: Duration = Duration::from_secs(10);
const RESTLESS: VcpuSetError = VcpuSetError::Restless {
    seconds: PATIENCE.as_secs(),
};

impl VcpuSet {
    /// Makes as many vCPUs as there can be, and their threads: a locked-down process can make neither.
    /// They prepare themselves meanwhile: see [`VcpuSet::ready`]. A custom profile becomes what the machine keeps.
    pub fn create(
        hypervisor: &Hypervisor,
        vm: &Vm,
        config: &mut CpuConfig,
        surroundings: &Surroundings,
        threads: &Threads,
    ) -> Result<VcpuSet, VcpuSetError> {
        let error = |source| VcpuError::Signal { index: 0, source };
        signal::install().map_err(error)?;
        let made: Result<Vec<_>, _> = (0..config.most())
            .map(|index| vm.create_vcpu(index))
            .collect();
        let made = made?;
        let offered = Offered::read(hypervisor, made.first())?;
        offered.keep(&mut config.profile)?;
        let tsc_khz = offered.scaled(&config.profile);
        let saved_msrs: Arc<[u32]> = hypervisor.saved_msrs()?.into();
        let gate = Arc::new(Gate::default());
        let mut set = VcpuSet {
            vcpus: Vec::new(),
            gate: Arc::clone(&gate),
            share: Share::default(),
            tsc_khz: tsc_khz.or(offered.tsc_khz()),
        };
        for (index, fd) in (0..).zip(made) {
            let kicked = Arc::new(AtomicBool::new(false));
            let parts = VcpuParts {
                fd,
                index,
                surroundings: surroundings.clone(),
                gate: Arc::clone(&gate),
                kicked: Arc::clone(&kicked),
                saved_msrs: Arc::clone(&saved_msrs),
                share: set.share.clone(),
                can_leave: config.max.is_some(),
            };
            let cpuid = cpuid::shape(
                &offered.supported,
                &config.profile,
                index,
                config.most(),
                offered.tsc_deadline,
            );
            let cpuid = CpuId::from_entries(&cpuid).map_err(|_| VcpuError::TooMany { index })?;
            let host_cpu = config
                .host_cpus
                .get(usize::from(index) % config.host_cpus.len().max(1));
            let host_cpu = host_cpu.copied();
            let (commands, receiver) = channel();
            let (report, ready) = channel();
            let set_up = move || {
                let made = pin(index, host_cpu)
                    .and_then(|()| prepare(&parts.fd, index, &cpuid, tsc_khz))
                    .and_then(|()| Vcpu::new(parts));
                (made, report)
            };
            let live = move |(made, report): (Result<Vcpu, _>, Sender<_>)| match made {
                Ok(vcpu) => {
                    let _ = report.send(Ok(()));
                    drop(report);
                    vcpu.live(&receiver);
                }
                Err(error) => drop(report.send(Err(error))),
            };
            let name = format!("vcpu{index}");
            let thread = threads
                .spawn(ThreadKind::Vcpu, &name, set_up, live)
                .map_err(|source| VcpuSetError::Thread { index, source })?;
            set.vcpus.push(Handle {
                commands,
                kicked,
                thread: Some(thread),
                ready: Some(ready),
            });
        }
        Ok(set)
    }

    /// Waits until every thread has prepared its vCPU and run the embedder's hook.
    pub fn ready(&mut self) -> Result<(), VcpuError> {
        for (index, vcpu) in (0..).zip(&mut self.vcpus) {
            if let Some(ready) = vcpu.ready.take() {
                ready.recv().map_err(|_| VcpuError::Gone { index })??;
            }
        }
        Ok(())
    }

    /// Puts all back to power-on; the first begins at `boot`, others wait for INIT and SIPI.
    pub fn power_on(&self, boot: BootRegisters) -> Result<(), VcpuError> {
        self.ask_all(|index, reply| Command::PowerOn((index == 0).then_some(boot), reply))?;
        Ok(())
    }

    pub fn save(&self) -> Result<Vec<VcpuState>, VcpuError> {
        Ok(self
            .ask_all(|_, reply| Command::Save(reply))?
            .into_iter()
            .map(|state| *state)
            .collect())
    }

    /// Loads saved states, one for each vCPU in order, as they are where `missed` has passed since.
    pub fn load(&self, states: Vec<VcpuState>, missed: Duration) -> Result<(), VcpuError> {
        let ticks = ticks(missed, self.tsc_khz);
        let mut states = states.into_iter().map(|mut state| {
            state.go_on(ticks);
            Box::new(state)
        });
        self.ask_all(|_, reply| match states.next() {
            Some(state) => Command::Load(state, reply),
            None => Command::End,
        })?;
        Ok(())
    }

    /// Sets those going that are there; `Request::AllEntered` tells when the last of them has entered the
    /// guest. The others stay at rest.
    pub fn run(&self, there: &[u8]) -> Result<(), VcpuError> {
        self.gate.open(there.len());
        for index in there {
            let begun = self.begin(*index, Command::Run);
            if begun.is_err() {
                self.gate.leave();
            }
            begun?;
        }
        Ok(())
    }

    /// Sets one going while others run.
    pub fn join(&self, index: u8) -> Result<(), VcpuError> {
        self.gate.join();
        self.begin(index, Command::Join)
            .inspect_err(|_| self.gate.leave())
    }

    fn begin(&self, index: u8, command: Command) -> Result<(), VcpuError> {
        let vcpu = self.handle(index)?;
        vcpu.kicked.store(false, Ordering::Release);
        let begun = vcpu.commands.send(command);
        begun.map_err(|_| VcpuError::Gone { index })
    }

    /// Takes one out of the guest, if it runs, and puts it back to power-on; others run on.
    pub fn renew(&self, index: u8) -> Result<(), VcpuSetError> {
        let vcpu = self.handle(index)?;
        let gone = || VcpuError::Gone { index };
        let (reply, answer) = channel();
        vcpu.kick();
        let asked = vcpu.commands.send(Command::Renew(reply));
        asked.map_err(|_| gone())?;
        match answer.recv_timeout(PATIENCE) {
            Ok(outcome) => Ok(outcome?),
            Err(RecvTimeoutError::Timeout) => Err(RESTLESS),
            Err(RecvTimeoutError::Disconnected) => Err(gone().into()),
        }
    }

    fn handle(&self, index: u8) -> Result<&Handle, VcpuError> {
        let handle = self.vcpus.get(usize::from(index));
        handle.ok_or(VcpuError::Gone { index })
    }

    /// Calls all out of the guest and waits until nothing of theirs is pending.
    pub fn park(&self) -> Result<(), VcpuSetError> {
        for vcpu in &self.vcpus {
            vcpu.kick();
        }
        match self.gate.wait(PATIENCE) {
            true => Ok(()),
            false => Err(RESTLESS),
        }
    }

    /// From now on each is kept out of the guest for so many percent of the time, 99 at most; 0: none is.
    pub fn throttle(&self, percent: u8) {
        if self.share.set(percent) {
            for vcpu in &self.vcpus {
                vcpu.call();
            }
        }
    }

    /// Percent of the time that each is kept out.
    pub fn throttled(&self) -> u8 {
        self.share.get()
    }

    #[cfg(test)]
    pub fn share(&self) -> Share {
        self.share.clone()
    }

    /// Asks every vCPU, then collects the answers in order.
    fn ask_all<T>(
        &self,
        mut command: impl FnMut(u8, Sender<Result<T, VcpuError>>) -> Command,
    ) -> Result<Vec<T>, VcpuError> {
        let mut answers = Vec::with_capacity(self.vcpus.len());
        for (index, vcpu) in (0..).zip(&self.vcpus) {
            let (reply, answer) = channel();
            let asked = vcpu.commands.send(command(index, reply));
            asked.map_err(|_| VcpuError::Gone { index })?;
            answers.push(answer);
        }
        let collect = |(index, answer): (u8, Receiver<Result<T, VcpuError>>)| {
            answer.recv().map_err(|_| VcpuError::Gone { index })?
        };
        (0..).zip(answers).map(collect).collect()
    }
}

impl Handle {
    fn kick(&self) {
        self.kicked.store(true, Ordering::Release);
        self.call();
    }

    /// Has it look what is wanted of it.
    fn call(&self) {
        if let Some(thread) = &self.thread {
            // A thread that has ended has nothing to be called from.
            let _ = thread.kill(signal::number());
            // It may be waiting outside.
            thread.thread().unpark();
        }
    }
}

impl Drop for VcpuSet {
    fn drop(&mut self) {
        for vcpu in &self.vcpus {
            let _ = vcpu.commands.send(Command::End);
            vcpu.kick();
        }
        for vcpu in &mut self.vcpus {
            if let Some(thread) = vcpu.thread.take() {
                let _ = thread.join();
            }
        }
    }
}

fn pin(index: u8, host_cpu: Option<u32>) -> Result<(), VcpuError> {
    let Some(host_cpu) = host_cpu else {
        return Ok(());
    };
    let refused = |source| VcpuError::Pin {
        index,
        host_cpu,
        source,
    };
    let mut cpus = CpuSet::new();
    if host_cpu as usize >= CpuSet::MAX_CPU {
        return Err(refused(std::io::ErrorKind::InvalidInput.into()));
    }
    cpus.set(host_cpu as usize);
    sched_setaffinity(None, &cpus).map_err(|error| refused(error.into()))
}

/// Ticks of a time stamp counter; none where its frequency is not known.
fn ticks(passed: Duration, khz: Option<u32>) -> u64 {
    let ticks = passed.as_nanos() * u128::from(khz.unwrap_or(0)) / 1_000_000;
    u64::try_from(ticks).unwrap_or(u64::MAX)
}

/// LVT entries of the local APIC page (Intel SDM vol. 3, table 11-1), and delivery by ExtINT and NMI.
const APIC_LVT0: usize = 0x350;
const APIC_LVT1: usize = 0x360;
const DELIVER_EXTINT: u32 = 0x700;
const DELIVER_NMI: u32 = 0x400;

/// CPUID, the TSC's frequency if it is another than the host's, and the local APIC's pins, as firmware would leave them.
fn prepare(fd: &VcpuFd, index: u8, cpuid: &CpuId, tsc_khz: Option<u32>) -> Result<(), VcpuError> {
    if let Some(khz) = tsc_khz {
        fd.set_tsc_khz(khz)
            .map_err(refused(index, "scale its TSC (KVM_SET_TSC_KHZ)"))?;
        // What it was made with was counted at the host's frequency. Written 0, all count from the first one's (Linux:
        // kvm_synchronize_tsc).
        write_msrs(fd, index, &[(TSC, 0)])?;
    }
    fd.set_cpuid2(cpuid)
        .map_err(refused(index, "take its CPUID (KVM_SET_CPUID2)"))?;
    let mut lapic = fd
        .get_lapic()
        .map_err(refused(index, "get its local APIC"))?;
    for (offset, value) in [(APIC_LVT0, DELIVER_EXTINT), (APIC_LVT1, DELIVER_NMI)] {
        for (register, byte) in lapic.regs.iter_mut().skip(offset).zip(value.to_le_bytes()) {
            *register = byte as i8;
        }
    }
    fd.set_lapic(&lapic)
        .map_err(refused(index, "set its local APIC"))?;
    write_msrs(fd, index, &MSRS)
}

fn write_msrs(fd: &VcpuFd, index: u8, values: &[(u32, u64)]) -> Result<(), VcpuError> {
    let entries: Vec<_> = values.iter().map(|(at, data)| msr(*at, *data)).collect();
    let msrs = Msrs::from_entries(&entries).map_err(|_| VcpuError::TooMany { index })?;
    let written = fd.set_msrs(&msrs).map_err(refused(index, "set its MSRs"))?;
    if written < values.len() {
        // A guest does without: it finds memory uncached by default and says so.
        tracing::debug!(vcpu = index, written, "an MSR was not taken");
    }
    Ok(())
}

/// What firmware would have set (Intel SDM vol. 4): fast string operations on; memory write-back by
/// default (MTRRs on, none of them used), without which Linux leaves the page attribute table alone.
const MSRS: [(u32, u64); 2] = [(0x1a0, 1), (0x2ff, 1 << 11 | 6)];

fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_counted_at_the_guests_frequency() {
        let passed = Duration::from_micros(1500);
        assert_eq!(ticks(passed, Some(2_000_001)), 3_000_001);
        assert_eq!(ticks(passed, None), 0);
        assert_eq!(ticks(Duration::MAX, Some(u32::MAX)), u64::MAX);
    }
}
