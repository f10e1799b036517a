//! The common configuration structure (virtio 1.2 §4.1.4.3): its registers, and what a driver may
//! change in them when.

use serde::{Deserialize, Serialize};

use super::interrupt::{Interrupt, NO_VECTOR, status};
use crate::virtio::feature;
use crate::virtio::queue::QueueState;

/// Bytes of the structure.
pub(super) const LENGTH: u64 = 0x3c;

/// What the transport has to do after a write; all else the registers did themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// The driver wrote 0 to the status.
    Reset,
    /// The driver set DRIVER_OK.
    Start,
    /// A queue has another interrupt vector.
    Vector,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    device_feature_select: u32,
    driver_feature_select: u32,
    pub(super) driver_features: u64,
    queue_select: u16,
    pub(super) queues: Vec<QueueState>,
    #[serde(skip)]
    device_features: u64,
    #[serde(skip)]
    max_sizes: Vec<u16>,
}

impl Registers {
    pub(super) fn new(device_features: u64, max_sizes: Vec<u16>) -> Self {
        let mut registers = Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: Vec::new(),
            device_features,
            max_sizes,
        };
        registers.reset();
        registers
    }

    /// Takes over what was saved, with the features and sizes that this build's device has. `None` if
    /// the driver chose what this device does not have.
    pub(super) fn restore(self, device_features: u64, max_sizes: Vec<u16>) -> Option<Self> {
        let known = self.driver_features & !device_features == 0;
        (known && self.queues.len() == max_sizes.len()).then_some(Self {
            device_features,
            max_sizes,
            ..self
        })
    }

    pub(super) fn reset(&mut self) {
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        let fresh = |size: &u16| QueueState {
            size: *size,
            vector: NO_VECTOR,
            ..Default::default()
        };
        self.queues = self.max_sizes.iter().map(fresh).collect();
    }

    pub(super) fn max_size(&self, queue: usize) -> u16 {
        self.max_sizes.get(queue).copied().unwrap_or(0)
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8], interrupt: &Interrupt, status: u8) {
        let mut image = [0; LENGTH as usize];
        let selected = usize::from(self.queue_select);
        let queue = self.queues.get(selected).copied().unwrap_or_default();
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(
            0x04,
            &half(self.device_features, self.device_feature_select).to_le_bytes(),
        );
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(
            0x0c,
            &half(self.driver_features, self.driver_feature_select).to_le_bytes(),
        );
        put(0x10, &interrupt.vector_of_config().to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        let generation = interrupt
            .generation
            .load(std::sync::atomic::Ordering::Acquire);
        put(0x14, &[status, generation]);
        put(0x16, &self.queue_select.to_le_bytes());
        put(0x18, &queue.size.to_le_bytes());
        put(0x1a, &interrupt.vector_of_queue(selected).to_le_bytes());
        put(0x1c, &u16::from(queue.enabled).to_le_bytes());
        put(0x1e, &self.queue_select.to_le_bytes());
        put(0x20, &queue.descriptors.to_le_bytes());
        put(0x28, &queue.driver.to_le_bytes());
        put(0x30, &queue.device.to_le_bytes());
        for (step, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(step as u64) as usize;
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    /// A write of a whole register, or of either half of a 64-bit one; others are ignored.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], interrupt: &Interrupt) -> Effect {
        if let (0x20 | 0x28 | 0x30, [low @ .., _, _, _, _]) = (offset, data)
            && data.len() == 8
        {
            self.write(offset, low, interrupt);
            return self.write(offset + 4, &data[4..], interrupt);
        }
        let value = match *data {
            [byte] => u32::from(byte),
            [low, high] => u32::from(u16::from_le_bytes([low, high])),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
            _ => return Effect::None,
        };
        let selected = usize::from(self.queue_select);
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = value,
            (0x08, 4) => self.driver_feature_select = value,
            (0x0c, 4) => self.set_driver_features(value, interrupt),
            (0x10, 2) => interrupt.set_config_vector(value as u16),
            (0x14, 1) => return self.write_status(value as u8, interrupt),
            (0x16, 2) => self.queue_select = value as u16,
            (0x1a, 2) => {
                let before = interrupt.vector_of_queue(selected);
                interrupt.set_queue_vector(selected, value as u16);
                if interrupt.vector_of_queue(selected) != before {
                    return Effect::Vector;
                }
            }
            _ => self.write_queue(offset, data.len(), value, interrupt),
        }
        Effect::None
    }

    /// Queues are set up before DRIVER_OK, and each before it is enabled.
    fn write_queue(&mut self, offset: u64, length: usize, value: u32, interrupt: &Interrupt) {
        let running = current(interrupt) & status::DRIVER_OK != 0;
        let selected = usize::from(self.queue_select);
        let Some(queue) = self
            .queues
            .get_mut(selected)
            .filter(|queue| !queue.enabled && !running)
        else {
            return;
        };
        match (offset, length) {
            (0x18, 2) => queue.size = value as u16,
            (0x1c, 2) => queue.enabled = value == 1,
            (0x20, 4) => set_low(&mut queue.descriptors, value),
            (0x24, 4) => set_high(&mut queue.descriptors, value),
            (0x28, 4) => set_low(&mut queue.driver, value),
            (0x2c, 4) => set_high(&mut queue.driver, value),
            (0x30, 4) => set_low(&mut queue.device, value),
            (0x34, 4) => set_high(&mut queue.device, value),
            _ => {}
        }
    }

    fn set_driver_features(&mut self, value: u32, interrupt: &Interrupt) {
        if current(interrupt) & status::FEATURES_OK != 0 {
            return;
        }
        match self.driver_feature_select {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ => {}
        }
    }

    /// Bits are only added, in any order that makes sense; only 0 takes them back (§2.1.1).
    fn write_status(&mut self, value: u8, interrupt: &Interrupt) -> Effect {
        if value == 0 {
            return Effect::Reset;
        }
        let old = current(interrupt);
        let mut wanted = (value | old) & !status::NEEDS_RESET | (old & status::NEEDS_RESET);
        let negotiated = self.driver_features & !self.device_features == 0
            && self.driver_features & feature::VERSION_1 != 0;
        if old & status::FEATURES_OK == 0 && !negotiated {
            // The driver reads back that the device does not agree (§3.1.1, step 6).
            wanted &= !status::FEATURES_OK;
        }
        if wanted & status::FEATURES_OK == 0 {
            wanted &= !status::DRIVER_OK;
        }
        let added = wanted & !old;
        // Only bits are added: the device's threads may set NEEDS_RESET meanwhile.
        interrupt
            .status
            .fetch_or(added, std::sync::atomic::Ordering::AcqRel);
        let broken = (old | wanted) & (status::FAILED | status::NEEDS_RESET) != 0;
        if added & status::DRIVER_OK != 0 && !broken {
            Effect::Start
        } else {
            Effect::None
        }
    }
}

fn current(interrupt: &Interrupt) -> u8 {
    interrupt.status.load(std::sync::atomic::Ordering::Acquire)
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(value: &mut u64, low: u32) {
    *value = (*value & !0xffff_ffff) | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = (*value & 0xffff_ffff) | (u64::from(high) << 32);
}
