//! MSI-X: the table and the pending bits of one function, shared with the threads that interrupt.
//!
//! Each vector has an eventfd that KVM turns into the vector's message (irqfd), so that the thread of a
//! device interrupts by one `write`. The route is told only when the guest has unmasked a vector whose
//! message changed; an interrupt that is raised while masked waits in the pending bit and is delivered
//! on unmasking (PCI 3.0 §6.8.2.9).
//!
//! Who interrupts without us (vhost) is lent a vector's eventfd. It is bound to the message only while
//! the guest has the vector unmasked; what is signalled meanwhile waits in the eventfd's count. Only what the
//! guest writes, and the lending itself, route, bind and unbind, never who interrupts or gives back: a device's
//! thread may ask KVM for nothing.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::eventfd::EventFd;
use crate::interrupt::{Gsi, InterruptError, MsiController, MsiMessage};

/// Bytes of one table entry.
pub const MSIX_ENTRY_SIZE: u64 = 16;
/// Capability id.
pub const MSIX_CAPABILITY: u8 = 0x11;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_MASK: u16 = 1 << 14;

/// Why an MSI-X table could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MsixError {
    #[error("allocating a route for interrupt vector {vector} of {vectors}")]
    Allocate {
        vector: u16,
        vectors: u16,
        source: InterruptError,
    },
    #[error("making the eventfd of interrupt vector {vector} of {vectors}")]
    EventFd {
        vector: u16,
        vectors: u16,
        source: std::io::Error,
    },
    #[error(
        "a saved table has {found} entries and {pending} pending bits where the function has {vectors}"
    )]
    WrongLength {
        vectors: u16,
        found: usize,
        pending: usize,
    },
}

/// Where table and pending bits lie.
#[derive(Debug, Clone, Copy)]
pub struct MsixLayout {
    pub bar: u8,
    pub table: u32,
    pub pending: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    message: MsiMessage,
    masked: bool,
}

/// A saved table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    entries: Vec<Entry>,
    pending: Vec<bool>,
    enabled: bool,
    masked: bool,
}

struct Vector {
    entry: Entry,
    pending: bool,
    gsi: Gsi,
    fd: Arc<EventFd>,
    /// What the route was last told, to tell it only what changed.
    routed: Option<MsiMessage>,
    /// A signal becomes the message.
    bound: bool,
    /// How many others signal the eventfd: queues may share a vector.
    lent: usize,
}

/// A vector's eventfd in the hands of somebody who signals it without asking; given back on drop.
pub struct Lent {
    msix: Arc<Msix>,
    vector: u16,
    fd: Arc<EventFd>,
}

impl AsFd for Lent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        self.msix.take_back(self.vector);
    }
}

struct Table {
    controller: Arc<dyn MsiController>,
    vectors: Vec<Vector>,
    enabled: bool,
    masked: bool,
}

/// The table of one function.
pub struct Msix {
    table: Mutex<Table>,
}

impl Msix {
    /// `vectors` is 1 to 2048.
    pub fn new(vectors: u16, controller: Arc<dyn MsiController>) -> Result<Self, MsixError> {
        let mut table = Table {
            controller,
            vectors: Vec::new(),
            enabled: false,
            masked: false,
        };
        for vector in 0..vectors {
            let fd = EventFd::new().map_err(|source| MsixError::EventFd {
                vector,
                vectors,
                source,
            })?;
            let gsi = (table.controller.allocate()).map_err(|source| MsixError::Allocate {
                vector,
                vectors,
                source,
            })?;
            table.vectors.push(Vector {
                entry: Entry::RESET,
                pending: false,
                gsi,
                fd: Arc::new(fd),
                routed: None,
                bound: false,
                lent: 0,
            });
        }
        Ok(Self {
            table: Mutex::new(table),
        })
    }

    /// Makes a table as it was saved.
    pub fn restore(
        state: &MsixState,
        vectors: u16,
        controller: Arc<dyn MsiController>,
    ) -> Result<Self, MsixError> {
        let (found, pending) = (state.entries.len(), state.pending.len());
        if found != usize::from(vectors) || pending != found {
            return Err(MsixError::WrongLength {
                vectors,
                found,
                pending,
            });
        }
        let msix = Self::new(vectors, controller)?;
        {
            let mut table = msix.lock();
            for (vector, (entry, pending)) in table
                .vectors
                .iter_mut()
                .zip(state.entries.iter().zip(&state.pending))
            {
                vector.entry = *entry;
                vector.pending = *pending;
            }
            table.enabled = state.enabled;
            table.masked = state.masked;
            table.settle();
        }
        Ok(msix)
    }

    pub fn save(&self) -> MsixState {
        let mut table = self.lock();
        table.vectors.iter_mut().for_each(Vector::collect);
        MsixState {
            entries: table.vectors.iter().map(|vector| vector.entry).collect(),
            pending: table.vectors.iter().map(|vector| vector.pending).collect(),
            enabled: table.enabled,
            masked: table.masked,
        }
    }

    /// The capability's bytes after id and link, with the mask of its writable bits.
    pub fn capability(vectors: u16, layout: MsixLayout) -> ([u8; 10], [u8; 2]) {
        let mut body = [0; 10];
        body[0..2].copy_from_slice(&(vectors.saturating_sub(1) & 0x7ff).to_le_bytes());
        body[2..6].copy_from_slice(&(layout.table | u32::from(layout.bar)).to_le_bytes());
        body[6..10].copy_from_slice(&(layout.pending | u32::from(layout.bar)).to_le_bytes());
        (body, (CONTROL_ENABLE | CONTROL_MASK).to_le_bytes())
    }

    /// Lends a vector; none of that number: none.
    pub fn lend(self: &Arc<Self>, vector: u16) -> Option<Lent> {
        let mut table = self.lock();
        let open = table.open();
        let Table {
            controller,
            vectors,
            ..
        } = &mut *table;
        let entry = vectors.get_mut(usize::from(vector))?;
        entry.lent += 1;
        entry.settle(controller.as_ref(), open);
        Some(Lent {
            msix: Arc::clone(self),
            vector,
            fd: Arc::clone(&entry.fd),
        })
    }

    fn take_back(&self, vector: u16) {
        let mut table = self.lock();
        if let Some(vector) = table.vectors.get_mut(usize::from(vector)) {
            vector.collect();
            vector.lent = vector.lent.saturating_sub(1);
        }
    }

    pub fn vectors(&self) -> u16 {
        self.lock().vectors.len() as u16
    }

    /// Back to the state after power-on; the routes stay for the next guest.
    pub fn reset(&self) {
        let mut table = self.lock();
        table.enabled = false;
        table.masked = false;
        for vector in &mut table.vectors {
            vector.entry = Entry::RESET;
            vector.pending = false;
        }
    }

    pub fn enabled(&self) -> bool {
        self.lock().enabled
    }

    /// Takes the message control word that the guest wrote.
    pub fn set_control(&self, control: u16) {
        let mut table = self.lock();
        table.enabled = control & CONTROL_ENABLE != 0;
        table.masked = control & CONTROL_MASK != 0;
        table.settle();
    }

    /// Interrupts, or remembers it while masked. `false` if MSI-X is off or there is no such vector.
    pub fn trigger(&self, vector: u16) -> bool {
        let mut table = self.lock();
        let open = table.open();
        let Table {
            vectors, enabled, ..
        } = &mut *table;
        let Some(vector) = vectors.get_mut(usize::from(vector)).filter(|_| *enabled) else {
            return false;
        };
        vector.pending = true;
        if open {
            vector.raise();
        }
        true
    }

    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock();
        for (step, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(step as u64);
            *byte = table
                .vectors
                .get((at / MSIX_ENTRY_SIZE) as usize)
                .map_or(0, |vector| {
                    vector.entry.bytes()[(at % MSIX_ENTRY_SIZE) as usize]
                });
        }
    }

    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let mut table = self.lock();
        for (step, byte) in data.iter().enumerate() {
            let at = offset.saturating_add(step as u64);
            if let Some(vector) = table.vectors.get_mut((at / MSIX_ENTRY_SIZE) as usize) {
                let mut bytes = vector.entry.bytes();
                bytes[(at % MSIX_ENTRY_SIZE) as usize] = *byte;
                vector.entry = Entry::from_bytes(&bytes);
            }
        }
        table.settle();
    }

    /// The pending bits, read-only to the guest.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let mut table = self.lock();
        table.vectors.iter_mut().for_each(Vector::collect);
        for (step, byte) in data.iter_mut().enumerate() {
            let first = offset.saturating_add(step as u64).saturating_mul(8);
            *byte = (0..8).fold(0, |bits, bit| {
                let vector = table.vectors.get(first.saturating_add(bit) as usize);
                bits | (u8::from(vector.is_some_and(|vector| vector.pending)) << bit)
            });
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Whether the function's vectors interrupt at all.
    fn open(&self) -> bool {
        self.enabled && !self.masked
    }

    fn settle(&mut self) {
        let open = self.open();
        for vector in &mut self.vectors {
            vector.settle(self.controller.as_ref(), open);
        }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        for vector in &self.vectors {
            if vector.bound
                && let Err(error) = self.controller.unbind(vector.gsi, &vector.fd)
            {
                tracing::warn!(%error, "an interrupt route could not be given back");
                continue;
            }
            self.controller.free(vector.gsi);
        }
    }
}

impl Vector {
    /// After the guest has masked or unmasked it, or the function; `open`: the function is not masked.
    fn settle(&mut self, controller: &dyn MsiController, open: bool) {
        if open && !self.entry.masked {
            self.deliver(controller);
        } else if self.lent > 0 && self.bound {
            match controller.unbind(self.gsi, &self.fd) {
                Ok(()) => self.bound = false,
                Err(error) => tracing::warn!(%error, "a masked interrupt will come"),
            }
        }
    }

    /// Brings the route up to date and delivers what waited. The vector is not masked.
    fn deliver(&mut self, controller: &dyn MsiController) {
        if self.routed != Some(self.entry.message) {
            if let Err(error) = controller.route(&[(self.gsi, Some(self.entry.message))]) {
                tracing::warn!(%error, message = ?self.entry.message, "an MSI-X message was refused");
                return;
            }
            self.routed = Some(self.entry.message);
        }
        if !self.bound {
            // What is signalled from here on KVM finds when it binds.
            self.collect();
            if let Err(error) = controller.bind(self.gsi, &self.fd) {
                tracing::warn!(%error, "an interrupt vector was refused");
                return;
            }
            self.bound = true;
        }
        self.raise();
    }

    /// Delivers what waits, unless the vector is masked or its message was refused. Asks nothing of KVM.
    fn raise(&mut self) {
        let routed = self.bound && self.routed == Some(self.entry.message);
        if routed && !self.entry.masked && std::mem::take(&mut self.pending) {
            self.fd.signal();
        }
    }

    /// Takes note of what others signalled while masked.
    fn collect(&mut self) {
        if self.lent > 0 && !self.bound {
            self.pending |= self.fd.take() > 0;
        }
    }
}

impl Entry {
    const RESET: Entry = Entry {
        message: MsiMessage {
            address: 0,
            data: 0,
        },
        masked: true,
    };

    fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&self.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.message.data.to_le_bytes());
        bytes[12] = u8::from(self.masked);
        bytes
    }

    fn from_bytes(bytes: &[u8; 16]) -> Self {
        let half = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        Self {
            message: MsiMessage {
                address: (u64::from(half(4)) << 32) | u64::from(half(0) & !3),
                data: half(8),
            },
            masked: bytes[12] & 1 != 0,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::Arc;

    /// Stands in for KVM: keeps what each route was told and a copy of its eventfd.
    #[derive(Default)]
    pub(crate) struct Recorder {
        routes: Mutex<Vec<Route>>,
    }

    #[derive(Default)]
    struct Route {
        messages: Vec<MsiMessage>,
        fd: Option<EventFd>,
        triggers: u64,
        freed: bool,
    }

    impl Recorder {
        /// How often a route was signalled so far.
        pub(crate) fn triggers(&self, route: usize) -> u64 {
            let route = &mut self.routes.lock().unwrap()[route];
            if let Some(fd) = &route.fd {
                route.triggers += fd.take();
            }
            route.triggers
        }
        /// Waits until a route is signalled; false if it is not within `deadline`.
        pub(crate) fn wait(&self, route: usize, deadline: std::time::Duration) -> bool {
            let fd = self.routes.lock().unwrap()[route]
                .fd
                .as_ref()
                .unwrap()
                .try_clone()
                .unwrap();
            let timeout = rustix::event::Timespec::try_from(deadline).unwrap();
            let mut fds = [rustix::event::PollFd::new(
                &fd,
                rustix::event::PollFlags::IN,
            )];
            if rustix::event::poll(&mut fds, Some(&timeout)).unwrap() == 0 {
                return false;
            }
            self.triggers(route);
            true
        }
        pub(crate) fn programmed(&self, route: usize) -> usize {
            self.routes.lock().unwrap()[route].messages.len()
        }
        pub(crate) fn all_free(&self) -> bool {
            self.routes.lock().unwrap().iter().all(|route| route.freed)
        }
    }

    impl MsiController for Recorder {
        fn send(&self, _message: MsiMessage) -> Result<(), InterruptError> {
            Ok(())
        }
        fn allocate(&self) -> Result<Gsi, InterruptError> {
            let mut routes = self.routes.lock().unwrap();
            routes.push(Route::default());
            Ok(Gsi(routes.len() as u32 - 1))
        }
        fn free(&self, gsi: Gsi) {
            self.routes.lock().unwrap()[gsi.0 as usize].freed = true;
        }
        fn route(&self, routes: &[(Gsi, Option<MsiMessage>)]) -> Result<(), InterruptError> {
            for (gsi, message) in routes {
                self.routes.lock().unwrap()[gsi.0 as usize]
                    .messages
                    .extend(message);
            }
            Ok(())
        }
        fn bind(&self, gsi: Gsi, fd: &EventFd) -> Result<(), InterruptError> {
            self.routes.lock().unwrap()[gsi.0 as usize].fd = Some(fd.try_clone().unwrap());
            Ok(())
        }
        fn unbind(&self, gsi: Gsi, _fd: &EventFd) -> Result<(), InterruptError> {
            self.routes.lock().unwrap()[gsi.0 as usize].fd = None;
            Ok(())
        }
    }

    fn unmask(msix: &Msix, vector: u64, data: u32) {
        msix.write_table(vector * 16, &0xfee0_0000u64.to_le_bytes());
        msix.write_table(vector * 16 + 8, &data.to_le_bytes());
        msix.write_table(vector * 16 + 12, &[0; 4]);
    }

    #[test]
    fn a_masked_interrupt_waits_in_the_pending_bit_and_comes_on_unmasking() {
        let recorder = Arc::new(Recorder::default());
        let msix = Msix::new(3, recorder.clone()).unwrap();
        assert!(!msix.trigger(1), "MSI-X is off");
        msix.set_control(1 << 15);
        assert!(msix.trigger(1));
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 2);
        assert_eq!(recorder.triggers(1), 0);
        unmask(&msix, 1, 0x41);
        assert_eq!(recorder.triggers(1), 1);
        msix.read_pending(0, &mut pending);
        assert_eq!(pending, [0; 8]);
        assert!(!msix.trigger(3), "no such vector");
        drop(msix);
        assert!(recorder.all_free());
    }

    #[test]
    fn the_function_mask_holds_every_vector_back() {
        let recorder = Arc::new(Recorder::default());
        let msix = Msix::new(2, recorder.clone()).unwrap();
        msix.set_control(1 << 15 | 1 << 14);
        unmask(&msix, 0, 0x41);
        msix.trigger(0);
        assert_eq!((recorder.triggers(0), recorder.programmed(0)), (0, 0));
        msix.set_control(1 << 15);
        assert_eq!((recorder.triggers(0), recorder.programmed(0)), (1, 1));
        msix.trigger(0);
        assert_eq!((recorder.triggers(0), recorder.programmed(0)), (2, 1));
    }

    fn signal(lent: &Lent) {
        lent.fd.signal();
    }

    #[test]
    fn a_lent_vector_interrupts_by_itself_but_never_while_masked() {
        let recorder = Arc::new(Recorder::default());
        let msix = Arc::new(Msix::new(2, recorder.clone()).unwrap());
        let lent = msix.lend(1).unwrap();
        assert!(msix.lend(2).is_none(), "no such vector");
        signal(&lent);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 2, "it waits");
        msix.set_control(1 << 15);
        unmask(&msix, 1, 0x41);
        assert_eq!(recorder.triggers(1), 1);
        signal(&lent);
        assert_eq!(recorder.triggers(1), 2);
        // Masked, by itself and as one of all: it is not lost, and seen in what is saved.
        for (mask, unmasked) in [
            (
                &(|| msix.write_table(28, &[1])) as &dyn Fn(),
                &(|| msix.write_table(28, &[0])) as &dyn Fn(),
            ),
            (&|| msix.set_control(3 << 14), &|| msix.set_control(1 << 15)),
        ] {
            let before = recorder.triggers(1);
            mask();
            signal(&lent);
            assert_eq!(recorder.triggers(1), before);
            assert_eq!(msix.save().pending, [false, true]);
            unmasked();
            assert_eq!(recorder.triggers(1), before + 1);
        }
        // Ours again: what was signalled while masked is not lost either.
        let before = recorder.triggers(1);
        msix.write_table(28, &[1]);
        signal(&lent);
        drop(lent);
        msix.write_table(28, &[0]);
        assert_eq!(recorder.triggers(1), before + 1);
        drop(msix);
        assert!(recorder.all_free());
    }

    #[test]
    fn a_vector_that_two_share_is_lent_until_both_have_given_it_back() {
        let recorder = Arc::new(Recorder::default());
        let msix = Arc::new(Msix::new(1, recorder.clone()).unwrap());
        msix.set_control(1 << 15);
        unmask(&msix, 0, 0x41);
        let [one, other] = [0, 0].map(|vector| msix.lend(vector).unwrap());
        drop(one);
        msix.write_table(12, &[1]);
        signal(&other);
        assert_eq!(recorder.triggers(0), 0, "masked");
        drop(other);
        assert_eq!(msix.save().pending, [true]);
        msix.write_table(12, &[0]);
        assert_eq!(recorder.triggers(0), 1);
    }

    #[test]
    fn a_vector_that_was_masked_before_it_is_lent_holds_back() {
        let recorder = Arc::new(Recorder::default());
        let msix = Arc::new(Msix::new(1, recorder.clone()).unwrap());
        msix.set_control(1 << 15);
        // Bound, then masked: by the driver before, or a reset.
        unmask(&msix, 0, 0x41);
        msix.write_table(12, &[1]);
        let lent = msix.lend(0).unwrap();
        signal(&lent);
        assert_eq!(recorder.triggers(0), 0);
        msix.write_table(12, &[0]);
        assert_eq!(recorder.triggers(0), 1);
    }

    #[test]
    fn a_restored_table_routes_again_and_delivers_what_was_pending() {
        let msix = Msix::new(2, Arc::new(Recorder::default())).unwrap();
        msix.set_control(1 << 15 | 1 << 14);
        unmask(&msix, 0, 0x41);
        msix.trigger(0);
        let state = msix.save();
        let recorder = Arc::new(Recorder::default());
        let restored = Msix::restore(&state, 2, recorder.clone()).unwrap();
        assert_eq!(restored.save(), state);
        restored.set_control(1 << 15);
        assert_eq!(recorder.triggers(0), 1);
        assert!(Msix::restore(&state, 5, recorder.clone()).is_err());
    }
}
