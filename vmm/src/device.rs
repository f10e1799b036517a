//! What every device of the board is: [`Device`] (identity and life) and [`BusDevice`] (accesses).
//!
//! Saving is a method, restoring is a constructor ([`Restore`]): a device is made from its saved
//! state, never patched into it, so that no half-restored device can exist.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::bus::Bus;
use crate::interrupt::{IoEvents, MsiController};
use crate::layout::Layout;
use crate::memory::GuestMemory;
use crate::reactor::Reactor;
use crate::request::RequestSender;
use crate::thread::Threads;
use crate::virtio::block::DiskCopy;

/// A device as the machine sees it. Methods take `&self`: a device is shared by the bus, the reactor
/// and its own threads, and locks what it must.
///
/// The machine calls `pause`, `save`, `reset` and `resume` only while no vCPU runs; `save` and `reset`
/// only between `pause` and `resume`.
pub trait Device: Send + Sync {
    /// Unique on the machine and the same on every build: `serial0`, `disk1`.
    fn id(&self) -> &str;

    /// Comes to rest: after it returns the device neither touches guest memory nor raises an
    /// interrupt, and nothing is in flight.
    fn pause(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The same, and gives up where that takes longer: what is in flight then goes on.
    fn pause_within(&self, _longest: Duration) -> Result<(), DeviceError> {
        self.pause()
    }

    /// Goes on where `pause` stopped it. Also called once, before the first vCPU runs.
    fn resume(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The guest runs here, perhaps at another place than before: who has to know where it is, is told. Waits for
    /// nothing.
    fn announce(&self) {}

    /// Whether somebody besides KVM and this process writes to the guest's memory in its place while the
    /// guest runs: no log of writes has that.
    fn writes_unseen(&self) -> bool {
        false
    }

    /// Such a one is to leave that to this process, or may do it again. It is so when this returns.
    fn write_here(&self, _here: bool) {}

    /// What is kept somewhere is durable: what a disk was told to write. It works on meanwhile.
    fn settle(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// For a disk that can be copied while its guest uses it.
    fn disk(&self) -> Option<DiskCopy> {
        None
    }

    /// Back to the state after power-on; host resources (descriptors, threads, rings) stay.
    fn reset(&self) -> Result<(), DeviceError>;

    /// All that the guest could observe, for the constructor.
    fn save(&self) -> Result<SavedDevice, DeviceError>;
}

/// Restore is a constructor.
pub trait Restore: Sized {
    /// What [`Device::save`] packed.
    type State: Serialize + DeserializeOwned;
    /// What belongs to the new process: descriptors, interrupt lines, memory.
    type Resources;
    /// Of the state's form.
    const VERSION: u32;

    fn restore(resources: Self::Resources, state: Self::State) -> Result<Self, DeviceError>;

    /// [`Restore::restore`] from what [`Device::save`] gave.
    fn restore_saved(resources: Self::Resources, saved: &SavedDevice) -> Result<Self, DeviceError> {
        Self::restore(resources, saved.unpack(Self::VERSION)?)
    }
}

/// State of a device in a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedDevice {
    pub id: String,
    /// Version of the state's own form, raised when it changes.
    pub version: u32,
    /// postcard.
    pub state: Vec<u8>,
}

impl SavedDevice {
    pub fn pack<S: Serialize>(id: &str, version: u32, state: &S) -> Result<Self, DeviceError> {
        let state = postcard::to_stdvec(state)
            .map_err(|error| DeviceError::new(id, "save its state", error))?;
        Ok(SavedDevice {
            id: id.to_owned(),
            version,
            state,
        })
    }

    /// Reads the state, which must be of `version`.
    pub fn unpack<S: DeserializeOwned>(&self, version: u32) -> Result<S, DeviceError> {
        if self.version != version {
            let detail = format!("state of version {}, wanted {version}", self.version);
            return Err(DeviceError::new(&self.id, "read its saved state", detail));
        }
        postcard::from_bytes(&self.state)
            .map_err(|error| DeviceError::new(&self.id, "read its saved state", error))
    }
}

/// The states that a machine is restored from, handed out by id while its devices are made; empty for
/// a machine that starts anew.
#[derive(Debug, Default)]
pub struct SavedDevices {
    /// `None`: nothing is restored.
    states: Option<BTreeMap<String, SavedDevice>>,
}

impl SavedDevices {
    pub fn new(states: Vec<SavedDevice>) -> SavedDevices {
        let by_id = |state: SavedDevice| (state.id.clone(), state);
        SavedDevices {
            states: Some(states.into_iter().map(by_id).collect()),
        }
    }

    /// The state of the device `id`; `None` if the machine starts anew. That a restored machine has
    /// no state for it is an error.
    pub fn take(&mut self, id: &str) -> Result<Option<SavedDevice>, DeviceError> {
        match &mut self.states {
            None => Ok(None),
            Some(states) => match states.remove(id) {
                Some(state) => Ok(Some(state)),
                None => Err(DeviceError::new(id, "be restored", "it was not saved")),
            },
        }
    }

    /// Fails if a saved device has not been made: this machine has no such device.
    pub fn finish(self) -> Result<(), DeviceError> {
        match self.states.and_then(|states| states.into_keys().next()) {
            Some(id) => Err(DeviceError::new(
                &id,
                "be restored",
                "this machine has no such device",
            )),
            None => Ok(()),
        }
    }
}

/// A device could not do what the machine asked.
#[derive(Debug, thiserror::Error)]
#[error("device {device} could not {action}")]
pub struct DeviceError {
    pub device: String,
    /// `pause`, `save its state`.
    pub action: &'static str,
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

impl DeviceError {
    pub fn new(
        device: &str,
        action: &'static str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        DeviceError {
            device: device.to_owned(),
            action,
            source: source.into(),
        }
    }
}

/// What answers accesses on a [`Bus`]. Called on vCPU threads, several at a time. Widths are what the
/// guest used (1, 2, 4 or 8 bytes); a width that the device does not know reads as ones and writes
/// nothing.
pub trait BusDevice: Send + Sync {
    /// `offset` is from the start of the range that the device was inserted with.
    fn read(&self, offset: u64, data: &mut [u8]);
    fn write(&self, offset: u64, data: &[u8]);
}

/// What a device can plug into. Cheap to clone; tests make one with doubles of the two traits.
#[derive(Clone)]
pub struct Board {
    pub memory: GuestMemory,
    /// Ports.
    pub pio: Arc<Bus>,
    pub mmio: Arc<Bus>,
    pub msi: Arc<dyn MsiController>,
    pub io_events: Arc<dyn IoEvents>,
    /// The one event loop thread of the machine, for what needs no thread of its own.
    pub reactor: Reactor,
    pub threads: Threads,
    pub requests: RequestSender,
    pub layout: Layout,
}
