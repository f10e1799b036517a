//! The run loop: a vCPU is parked, runs, or settles what it began on its way to being parked.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;

use kvm_ioctls::VcpuFd;

use super::BootRegisters;
use super::exit::{Exit, enter};
use super::gate::Gate;
use super::set::Command;
use super::signal::Armed;
use super::state::{VcpuError, VcpuState, is_started, refused};
use super::throttle::{Share, Throttle};
use crate::bus::Bus;
use crate::machine::Registers;
use crate::request::{Request, RequestSender, VcpuReport};

/// What the guest can reach from a vCPU.
#[derive(Clone)]
pub struct Surroundings {
    pub pio: Arc<Bus>,
    pub mmio: Arc<Bus>,
    /// Where ends of level-triggered interrupts go.
    pub end_of_interrupt: Arc<dyn EndOfInterrupt>,
    pub requests: RequestSender,
}

/// The user-space IOAPIC, as a vCPU needs it.
pub trait EndOfInterrupt: Send + Sync {
    fn end_of_interrupt(&self, vector: u8);
}

/// One vCPU on its thread.
pub struct Vcpu {
    /// Before `fd`, which it points into: dropped first.
    _armed: Armed,
    pub fd: VcpuFd,
    pub index: u8,
    pub surroundings: Surroundings,
    pub gate: Arc<Gate>,
    /// Set by who wants it parked, before the signal; cleared by who sets it going.
    pub kicked: Arc<AtomicBool>,
    pub saved_msrs: Arc<[u32]>,
    throttle: Throttle,
    /// As it was before it ever ran.
    power_on: VcpuState,
    has_run: bool,
    counted: bool,
    /// The guest has not started it, and is to be seen to do so.
    awaited: bool,
    can_leave: bool,
}

/// Where the loop stands.
enum State {
    Parked,
    Running,
    Settling,
    Ended,
}

/// Everything that [`Vcpu::new`] puts together.
pub struct VcpuParts {
    pub fd: VcpuFd,
    pub index: u8,
    pub surroundings: Surroundings,
    pub gate: Arc<Gate>,
    pub kicked: Arc<AtomicBool>,
    pub saved_msrs: Arc<[u32]>,
    /// Of the time, in which it is kept out of the guest.
    pub share: Share,
    /// The machine's vCPUs come and go: that the guest starts this one is told.
    pub can_leave: bool,
}

impl Vcpu {
    /// On the vCPU's own thread; its CPUID and APIC are set.
    pub fn new(mut parts: VcpuParts) -> Result<Vcpu, VcpuError> {
        // kvm_run is a mapping that stays where it is when the VcpuFd moves.
        let armed = Armed::new(parts.fd.get_kvm_run());
        let power_on = VcpuState::read(&parts.fd, parts.index, &parts.saved_msrs)?;
        let VcpuParts {
            fd,
            index,
            surroundings,
            gate,
            kicked,
            saved_msrs,
            share,
            can_leave,
        } = parts;
        let throttle = Throttle::new(share);
        let throttle = throttle.map_err(|source| VcpuError::Signal { index, source })?;
        Ok(Vcpu {
            _armed: armed,
            fd,
            index,
            surroundings,
            gate,
            kicked,
            saved_msrs,
            throttle,
            power_on,
            has_run: false,
            counted: false,
            awaited: can_leave && index > 0,
            can_leave,
        })
    }

    /// Lives until told to end.
    pub fn live(mut self, commands: &Receiver<Command>) {
        let mut state = State::Parked;
        loop {
            state = match state {
                State::Parked => match commands.recv() {
                    Ok(command) => self.obey(command),
                    Err(_) => State::Ended,
                },
                State::Running if self.called_off() => State::Settling,
                State::Running => {
                    if self.may_enter() {
                        self.step();
                    }
                    State::Running
                }
                State::Settling => self.settle(),
                State::Ended => return,
            }
        }
    }

    fn obey(&mut self, command: Command) -> State {
        match command {
            Command::Run => {
                let state = self.begin();
                if self.gate.enter() {
                    self.surroundings.requests.send(Request::AllEntered);
                }
                return state;
            }
            Command::Join => return self.begin(),
            Command::Save(reply) => {
                let _ = reply
                    .send(VcpuState::read(&self.fd, self.index, &self.saved_msrs).map(Box::new));
            }
            Command::Load(state, reply) => {
                self.awaited = self.can_leave && !state.is_started();
                let _ = reply.send(state.write(&self.fd, self.index));
            }
            Command::Renew(reply) => {
                let _ = reply.send(self.renew());
            }
            Command::PowerOn(boot, reply) => {
                let _ = reply.send(self.power_on(boot));
            }
            Command::End => return State::Ended,
        }
        State::Parked
    }

    /// Registers as after power-on and, for the first vCPU, as its kernel wants them.
    fn power_on(&mut self, boot: Option<BootRegisters>) -> Result<(), VcpuError> {
        let index = self.index;
        let called = self.was_called()?;
        if self.has_run || called {
            self.power_on.write(&self.fd, index)?;
        }
        self.awaited = self.can_leave && index > 0;
        if let Some(boot) = boot {
            let sregs = self
                .fd
                .get_sregs()
                .map_err(refused(index, "get its system registers"))?;
            self.fd
                .set_sregs(&boot.system(sregs))
                .map_err(refused(index, "set its system registers"))?;
            self.fd
                .set_regs(&boot.general())
                .map_err(refused(index, "set its registers"))?;
        }
        Ok(())
    }

    /// Has KVM settle INIT and SIPI that are on the way: they are of the life that ends, and must not
    /// start the vCPU in the next. True if it is not as after power-on.
    fn was_called(&self) -> Result<bool, VcpuError> {
        let state = (self.fd.get_mp_state()).map_err(refused(self.index, "get its run state"))?;
        Ok(self.index > 0 && is_started(state))
    }

    /// Back to power-on, by itself.
    fn renew(&mut self) -> Result<(), VcpuError> {
        self.was_called()?;
        self.awaited = self.can_leave;
        (self.power_on).write_with_time_of_others(&self.fd, self.index)
    }

    /// Tells when the guest has started it.
    fn note_start(&mut self) {
        if self.awaited && self.fd.get_mp_state().is_ok_and(is_started) {
            self.awaited = false;
            let index = self.index;
            (self.surroundings.requests).send(Request::VcpuStarted { index });
        }
    }

    fn begin(&mut self) -> State {
        self.counted = true;
        self.throttle.begin();
        // A call that came before this is in `kicked`, which is looked at after.
        self.fd.set_kvm_immediate_exit(0);
        if self.has_run {
            // EINVAL where the guest uses no kvm-clock: then there is nothing to tell it.
            let _ = self.fd.kvmclock_ctrl();
        }
        self.has_run = true;
        State::Running
    }

    fn called_off(&self) -> bool {
        is_called_off(&self.kicked, &self.surroundings.requests)
    }

    /// Waits while it is to be kept out; false if it is called off meanwhile.
    fn may_enter(&mut self) -> bool {
        let (kicked, requests) = (&self.kicked, &self.surroundings.requests);
        self.throttle.lets_in(|| is_called_off(kicked, requests))
    }

    /// One stay in the guest and what it led to. True when it was interrupted.
    fn step(&mut self) -> bool {
        let Surroundings {
            pio,
            mmio,
            end_of_interrupt,
            requests,
        } = &self.surroundings;
        let report = match enter(&mut self.fd) {
            Exit::PortRead { port, size, data } => {
                for item in data.chunks_mut(size) {
                    pio.read(port.into(), item);
                }
                return false;
            }
            Exit::PortWrite { port, size, data } => {
                for item in data.chunks(size) {
                    pio.write(port.into(), item);
                }
                return false;
            }
            Exit::MmioRead { address, data } => {
                mmio.read(address, data);
                return false;
            }
            Exit::MmioWrite { address, data } => {
                mmio.write(address, data);
                return false;
            }
            Exit::EndOfInterrupt { vector } => {
                end_of_interrupt.end_of_interrupt(vector);
                return false;
            }
            Exit::Interrupted => {
                // Without a call it was a stray signal, which has set the flag.
                self.fd.set_kvm_immediate_exit(0);
                self.note_start();
                return true;
            }
            Exit::PowerOff => Request::PowerOff,
            Exit::Reset => Request::Reset,
            Exit::TripleFault => self.report(VcpuReport::TripleFault {
                registers: self.registers(),
            }),
            Exit::Failed { detail } => {
                let detail = format!("{detail}; {}", self.registers());
                self.report(VcpuReport::InternalError { detail })
            }
        };
        requests.send(report);
        true
    }

    /// KVM completes a port or MMIO access when the vCPU is entered again; until then its registers
    /// are not those of the guest. So it is entered, with orders to come out at once.
    fn settle(&mut self) -> State {
        loop {
            self.fd.set_kvm_immediate_exit(1);
            if self.step() {
                break;
            }
        }
        self.fd.set_kvm_immediate_exit(0);
        self.counted = false;
        self.gate.leave();
        State::Parked
    }

    fn report(&self, report: VcpuReport) -> Request {
        Request::Vcpu {
            index: self.index,
            report,
        }
    }

    /// For a report: what cannot be read is shown as zero.
    fn registers(&self) -> Registers {
        let regs = self.fd.get_regs().unwrap_or_default();
        let sregs = self.fd.get_sregs().unwrap_or_default();
        Registers {
            rip: regs.rip,
            rsp: regs.rsp,
            rflags: regs.rflags,
            rax: regs.rax,
            rbx: regs.rbx,
            rcx: regs.rcx,
            rdx: regs.rdx,
            rsi: regs.rsi,
            rdi: regs.rdi,
            cs: sregs.cs.selector,
            cr0: sregs.cr0,
            cr2: sregs.cr2,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
        }
    }
}

fn is_called_off(kicked: &AtomicBool, requests: &RequestSender) -> bool {
    kicked.load(Ordering::Acquire) || requests.halting()
}

impl Drop for Vcpu {
    /// A thread that panics must not let others wait for it.
    fn drop(&mut self) {
        if self.counted {
            self.gate.leave();
        }
    }
}
