//! virtio-console (virtio 1.2 §5.3) with several ports: consoles, and channels for programs in the
//! guest such as the QEMU guest agent.
//!
//! Lives on the machine's reactor. It buffers nothing of its own: input is read when the guest has room
//! for it, and what a guest writes waits in its queue until the host's end takes it, except on ports
//! that are consoles, where it is dropped rather than hold the guest up ([`crate::output`]).

mod control;
mod port;
mod worker;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::port::{Port, PortState};
use self::worker::Ports;
use super::queue::Virtqueue;
use super::{Activation, DeviceType, VirtioDevice};
use crate::config::{ConsoleFiles, ConsolePortConfig};
use crate::device::{DeviceError, SavedDevice};
use crate::reactor::Reactor;

const QUEUE_SIZE: u16 = 64;
const STATE_VERSION: u32 = 1;
const F_MULTIPORT: u64 = 1 << 1;
/// Bytes of struct virtio_console_config.
const CONFIG_LENGTH: usize = 12;

#[derive(Serialize, Deserialize)]
struct State {
    ports: Vec<PortState>,
    messages: VecDeque<Vec<u8>>,
}

/// The device.
pub struct Console {
    id: String,
    ports: Arc<Ports>,
    count: usize,
}

impl Console {
    /// A console with a port for each of `configs`, of which there is at least one; `files` are in the
    /// same order and are duplicated.
    pub fn new(
        id: &str,
        configs: &[ConsolePortConfig],
        files: &[ConsoleFiles],
        reactor: &Reactor,
    ) -> Result<Self, DeviceError> {
        let ports = configs
            .iter()
            .zip(files)
            .map(|(config, files)| Port::open(config, files, reactor))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| DeviceError::new(id, "open its ports", error))?;
        if ports.is_empty() || ports.len() != configs.len() {
            let detail = format!("{} ports, {} of them open", configs.len(), ports.len());
            return Err(DeviceError::new(id, "open its ports", detail));
        }
        let count = ports.len();
        Ok(Self {
            id: id.to_owned(),
            ports: Arc::new(Ports::new(reactor, ports)),
            count,
        })
    }

    /// Makes the device as it was saved, on what `new` made of this process's descriptors.
    pub fn restore(saved: &SavedDevice, console: Self) -> Result<Self, DeviceError> {
        let state: State = saved.unpack(STATE_VERSION)?;
        let mut work = console.ports.lock();
        if state.ports.len() != work.ports.len() {
            let detail = format!(
                "{} ports saved, {} here",
                state.ports.len(),
                work.ports.len()
            );
            return Err(DeviceError::new(&saved.id, "restore its ports", detail));
        }
        for (port, state) in work.ports.iter_mut().zip(state.ports) {
            port.state = state;
        }
        work.messages = state.messages;
        drop(work);
        Ok(console)
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn features(&self) -> u64 {
        F_MULTIPORT
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2 * self.count + 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; CONFIG_LENGTH];
        config[4..8].copy_from_slice(&(self.count as u32).to_le_bytes());
        for (step, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(step as u64) as usize;
            *byte = config.get(at).copied().unwrap_or(0);
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let multiport = activation.features & F_MULTIPORT != 0;
        let started = self.ports.start(activation.queues, multiport);
        started.map_err(|error| DeviceError::new(&self.id, "listen to its ports", error))
    }

    fn deactivate(&mut self, _within: Duration) -> Result<Vec<Virtqueue>, DeviceError> {
        Ok(self.ports.stop())
    }

    fn reset(&mut self) {
        self.ports.lock().reset();
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        let work = self.ports.lock();
        let ports = work.ports.iter().map(|port| port.state).collect();
        let state = State {
            ports,
            messages: work.messages.clone(),
        };
        SavedDevice::pack(&self.id, STATE_VERSION, &state)
    }
}

#[cfg(test)]
mod tests;
