//! What devices and vCPUs ask of the machine's owner.
//!
//! A device cannot stop or reset the machine itself (it runs on a vCPU's thread); it sends a
//! [`Request`], the vCPUs stop by themselves at the next exit where the request says so, and the owner
//! of the machine carries it out in `Machine::next_event`.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use crate::eventfd::EventFd;
use crate::machine::Registers;

/// Asked by a device or a vCPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// The guest went to S5.
    PowerOff,
    /// The guest wrote to a reset register.
    Reset,
    /// The fallback kernel found nothing to boot.
    NotBootable { detail: String },
    /// pvpanic: the guest's kernel panicked (`crash_loaded`: it goes on into its crash kernel).
    Panicked { crash_loaded: bool },
    /// The guest has let go of PCI slots; which, the board's slots know.
    SlotsEjected,
    /// The guest has let go of vCPUs; which, the board's processors know.
    VcpusEjected,
    /// The guest has started a vCPU (by INIT) that had waited for it.
    VcpuStarted { index: u8 },
    /// The guest has plugged or unplugged hot memory; how much there is, the device knows.
    HotMemoryChanged,
    /// What the guest gives back finds no room to be cut out of what is still a snapshot's file.
    MemoryWantsRoom,
    /// All of memory is here that came after the guest.
    Whole,
    /// The connection broke by which it comes.
    Starving { reason: String },
    /// The guest did not feed its watchdog; the machine does what its config says.
    WatchdogFired,
    /// The guest misused a device so that only stopping the machine is left, or a host resource
    /// failed for good.
    DeviceFault { device: String, detail: String },
    /// A thread of the VMM panicked.
    ThreadPanicked { thread: String, detail: String },
    /// Every vCPU is about to enter KVM_RUN, for the first time since they were set going.
    AllEntered,
    /// A vCPU that cannot go on.
    Vcpu { index: u8, report: VcpuReport },
}

/// What became of a vCPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuReport {
    /// KVM_EXIT_SHUTDOWN.
    TripleFault { registers: Registers },
    /// KVM cannot go on; registers in the text.
    InternalError { detail: String },
}

impl Request {
    /// After it no vCPU should run another guest instruction until the owner decided.
    fn stops(&self) -> bool {
        match self {
            Request::PowerOff | Request::Reset | Request::Vcpu { .. } => true,
            Request::NotBootable { .. } => true,
            Request::DeviceFault { .. } | Request::ThreadPanicked { .. } => true,
            Request::Panicked { .. } | Request::WatchdogFired => false,
            Request::SlotsEjected | Request::AllEntered => false,
            Request::VcpusEjected | Request::VcpuStarted { .. } => false,
            Request::HotMemoryChanged | Request::MemoryWantsRoom => false,
            Request::Whole | Request::Starving { .. } => false,
        }
    }
}

#[derive(Clone)]
pub struct RequestSender {
    queue: mpsc::Sender<Request>,
    shared: Arc<Shared>,
}

struct Shared {
    ready: EventFd,
    halt: AtomicBool,
}

/// The owner's end; its descriptor is readable while requests wait.
pub struct RequestReceiver {
    queue: mpsc::Receiver<Request>,
    shared: Arc<Shared>,
}

pub fn channel() -> std::io::Result<(RequestSender, RequestReceiver)> {
    let ready = EventFd::new()?;
    let shared = Arc::new(Shared {
        ready,
        halt: AtomicBool::new(false),
    });
    let (sender, receiver) = mpsc::channel();
    let sender = RequestSender {
        queue: sender,
        shared: Arc::clone(&shared),
    };
    Ok((
        sender,
        RequestReceiver {
            queue: receiver,
            shared,
        },
    ))
}

impl RequestSender {
    pub fn send(&self, request: Request) {
        if request.stops() {
            self.shared.halt.store(true, Ordering::Release);
        }
        // The receiver goes only with the machine itself: then nobody is left to care.
        if self.queue.send(request).is_ok() {
            self.shared.ready.signal();
        }
    }

    /// A request is waiting that no vCPU should outrun.
    pub fn halting(&self) -> bool {
        self.shared.halt.load(Ordering::Acquire)
    }
}

impl RequestReceiver {
    pub fn try_next(&self) -> Option<Request> {
        let request = self.queue.try_recv().ok();
        if request.is_none() {
            self.shared.ready.take();
            // One may have come between the two lines above.
            return self.queue.try_recv().ok().inspect(|_| {
                self.shared.ready.signal();
            });
        }
        request
    }

    /// Makes the descriptor readable: the owner has something to look at.
    pub fn wake(&self) {
        self.shared.ready.signal();
    }

    /// The owner has decided: vCPUs may run again.
    pub fn clear_halt(&self) {
        self.shared.halt.store(false, Ordering::Release);
    }
}

impl AsFd for RequestReceiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.ready.as_fd()
    }
}

impl std::fmt::Debug for RequestReceiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RequestReceiver")
            .field("ready", &self.shared.ready)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_requests_that_end_or_reset_the_machine_halt_its_vcpus() {
        let (sender, receiver) = channel().unwrap();
        sender.send(Request::Panicked {
            crash_loaded: false,
        });
        assert!(!sender.halting());
        sender.send(Request::Reset);
        assert!(sender.halting());
        assert_eq!(
            receiver.try_next(),
            Some(Request::Panicked {
                crash_loaded: false
            })
        );
        assert_eq!(receiver.try_next(), Some(Request::Reset));
        assert_eq!(receiver.try_next(), None);
        receiver.clear_halt();
        assert!(!sender.halting());
    }
}
