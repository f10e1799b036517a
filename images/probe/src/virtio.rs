//! virtio over PCI (virtio 1.2 §4.1), with an MSI-X vector for every queue: a transport for the
//! queues of crate `virtio-drivers`, and requests that sleep until their interrupt.

use core::sync::atomic::{AtomicU8, Ordering};

use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{Error, PhysAddr, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::cpu;
use crate::memory::{ProbeHal, Registers};
use crate::pci::{CAPABILITY_VENDOR, Function, Msix};

pub const VENDOR: u16 = 0x1af4;
const NO_VECTOR: u16 = 0xffff;
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;

// virtio_pci_common_cfg (§4.1.4.3)
const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_MSIX_VECTOR: u64 = 0x10;
const DEVICE_STATUS: u64 = 0x14;
const CONFIG_GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_MSIX_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;

const FEATURE_VERSION_1: u64 = 1 << 32;
const MAX_QUEUES: usize = 4;
/// A request that takes longer is given up, and the device with it.
const PATIENCE_US: u64 = 60_000_000;

static NEXT_VECTOR: AtomicU8 = AtomicU8::new(cpu::VECTOR_MSIX);

/// The kinds of device that the probe knows, by PCI device id (modern and transitional).
pub fn kind(function: &Function) -> Option<DeviceType> {
    if function.vendor != VENDOR {
        return None;
    }
    match function.device {
        0x1001 | 0x1042 => Some(DeviceType::Block),
        0x1003 | 0x1043 => Some(DeviceType::Console),
        0x1005 | 0x1044 => Some(DeviceType::EntropySource),
        0x1000 | 0x1041 => Some(DeviceType::Network),
        0x1002 | 0x1045 => Some(DeviceType::MemoryBalloon),
        0x1058 => Some(DeviceType::Memory),
        0x1053 => Some(DeviceType::Socket),
        _ => None,
    }
}

/// A virtio function's register blocks.
pub struct PciTransport {
    kind: DeviceType,
    common: Registers,
    notify: Registers,
    notify_multiplier: u32,
    isr: Registers,
    device: Option<(Registers, u32)>,
    msix: Option<Msix>,
    first_vector: u8,
    /// Notification address of each queue, learned once: a read of a register is an exit.
    notify_offsets: [u64; MAX_QUEUES],
}

impl PciTransport {
    pub fn new(function: &Function) -> Option<Self> {
        let kind = kind(function)?;
        function.enable();
        let mut blocks = [None; 5];
        let mut notify_multiplier = 0;
        for at in function.capabilities(CAPABILITY_VENDOR) {
            let header = function.read32(at);
            let what = (header >> 24) as u8;
            let bar = function.read8(at + 4);
            let (offset, length) = (function.read32(at + 8), function.read32(at + 12));
            let place = blocks.get_mut(usize::from(what));
            if let (Some(place @ None), Some(base)) = (place, function.bar(bar)) {
                let address = base + u64::from(offset);
                *place = Registers::at(address, u64::from(length)).map(|r| (r, length));
                if what == CAP_NOTIFY {
                    notify_multiplier = function.read32(at + 16);
                }
            }
        }
        let block = |what: u8| blocks[usize::from(what)].map(|(registers, _)| registers);
        let mut transport = Self {
            kind,
            common: block(CAP_COMMON)?,
            notify: block(CAP_NOTIFY)?,
            notify_multiplier,
            isr: block(CAP_ISR)?,
            device: blocks[usize::from(CAP_DEVICE)],
            msix: function.msix().filter(|_| cpu::has_interrupts()),
            first_vector: NEXT_VECTOR.fetch_add(MAX_QUEUES as u8, Ordering::Relaxed),
            notify_offsets: [0; MAX_QUEUES],
        };
        transport.reset();
        Some(transport)
    }

    /// Steps 2 to 6 of §3.1.1: what of `wanted` the device offers, agreed upon.
    pub fn negotiate(&mut self, wanted: u64) -> Result<u64> {
        let mut status = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
        self.set_status(status);
        let agreed = self.read_device_features() & (wanted | FEATURE_VERSION_1);
        self.write_driver_features(agreed);
        status |= DeviceStatus::FEATURES_OK;
        self.set_status(status);
        self.common.write16(CONFIG_MSIX_VECTOR, NO_VECTOR);
        if self.get_status().contains(DeviceStatus::FEATURES_OK) {
            Ok(agreed)
        } else {
            Err(Error::Unsupported)
        }
    }

    /// A word of the device's own configuration.
    pub fn config32(&self, offset: u64) -> Option<u32> {
        let (registers, length) = self.device?;
        (offset + 4 <= u64::from(length)).then(|| registers.read32(offset))
    }

    pub fn needs_reset(&self) -> bool {
        self.get_status().contains(DeviceStatus::DEVICE_NEEDS_RESET)
    }

    /// The same transport with its device reset and its interrupts on.
    pub fn renewed(mut self) -> Self {
        self.reset();
        self
    }

    /// The vector by which a queue interrupts.
    pub fn vector_of(&self, queue: u16) -> u8 {
        self.first_vector + queue as u8
    }

    /// Has the device interrupt when its configuration changes; the vector, if there can be one. No queue has it.
    pub fn listen_to_config(&mut self) -> Option<u8> {
        let entry = MAX_QUEUES as u16 - 1;
        let msix = self.msix.as_ref().filter(|msix| entry < msix.entries)?;
        let vector = self.first_vector + entry as u8;
        msix.route(entry, 0, vector);
        self.common.write16(CONFIG_MSIX_VECTOR, entry);
        Some(vector)
    }

    pub fn reset(&mut self) {
        self.set_status(DeviceStatus::empty());
        let mut patience = 10_000;
        while self.get_status() != DeviceStatus::empty() && patience > 0 {
            patience -= 1;
            core::hint::spin_loop();
        }
        if let Some(msix) = &self.msix {
            msix.enable();
        }
    }

    /// Like `queue_set`, without an interrupt and whatever the values are.
    pub fn queue_set_quietly(&mut self, queue: u16, size: u16, rings: [u64; 3]) {
        self.common.write16(QUEUE_SELECT, queue);
        self.common.write16(QUEUE_SIZE, size);
        self.common.write16(QUEUE_MSIX_VECTOR, NO_VECTOR);
        for (field, address) in [QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE]
            .into_iter()
            .zip(rings)
        {
            self.common.write64(field, address);
        }
        self.common.write16(QUEUE_ENABLE, 1);
    }
}

impl Transport for PciTransport {
    fn device_type(&self) -> DeviceType {
        self.kind
    }

    fn read_device_features(&mut self) -> u64 {
        self.common.write32(DEVICE_FEATURE_SELECT, 0);
        let low = self.common.read32(DEVICE_FEATURE);
        self.common.write32(DEVICE_FEATURE_SELECT, 1);
        u64::from(self.common.read32(DEVICE_FEATURE)) << 32 | u64::from(low)
    }

    fn write_driver_features(&mut self, features: u64) {
        self.common.write32(DRIVER_FEATURE_SELECT, 0);
        self.common.write32(DRIVER_FEATURE, features as u32);
        self.common.write32(DRIVER_FEATURE_SELECT, 1);
        self.common.write32(DRIVER_FEATURE, (features >> 32) as u32);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.common.write16(QUEUE_SELECT, queue);
        u32::from(self.common.read16(QUEUE_SIZE))
    }

    fn notify(&mut self, queue: u16) {
        self.notify
            .write16(self.notify_offsets[usize::from(queue)], queue);
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(u32::from(self.common.read8(DEVICE_STATUS)))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.common.write8(DEVICE_STATUS, status.bits() as u8);
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.common.write16(QUEUE_SELECT, queue);
        self.common.write16(QUEUE_SIZE, size as u16);
        if let Some(msix) = self.msix.as_ref().filter(|msix| queue < msix.entries) {
            msix.route(queue, 0, self.first_vector + queue as u8);
            self.common.write16(QUEUE_MSIX_VECTOR, queue);
        }
        self.common.write64(QUEUE_DESC, descriptors);
        self.common.write64(QUEUE_DRIVER, driver_area);
        self.common.write64(QUEUE_DEVICE, device_area);
        self.common.write16(QUEUE_ENABLE, 1);
        if let Some(offset) = self.notify_offsets.get_mut(usize::from(queue)) {
            let unit = u64::from(self.common.read16(QUEUE_NOTIFY_OFF));
            *offset = unit * u64::from(self.notify_multiplier);
        }
    }

    fn queue_unset(&mut self, _: u16) {}

    fn queue_used(&mut self, queue: u16) -> bool {
        self.common.write16(QUEUE_SELECT, queue);
        self.common.read16(QUEUE_ENABLE) == 1
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::from_bits_retain(u32::from(self.isr.read8(0)))
    }

    fn read_config_generation(&self) -> u32 {
        u32::from(self.common.read8(CONFIG_GENERATION))
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        let mut bytes = [0u8; 8];
        let size = size_of::<T>();
        let (registers, length) = self.device.ok_or(Error::ConfigSpaceMissing)?;
        if offset + size > length as usize || size > bytes.len() {
            return Err(Error::ConfigSpaceTooSmall);
        }
        for (i, byte) in bytes[..size].iter_mut().enumerate() {
            *byte = registers.read8((offset + i) as u64);
        }
        T::read_from_bytes(&bytes[..size]).map_err(|_| Error::ConfigSpaceTooSmall)
    }

    fn write_config_space<T: IntoBytes + Immutable>(&mut self, offset: usize, value: T) -> Result {
        let (registers, length) = self.device.ok_or(Error::ConfigSpaceMissing)?;
        if offset + size_of::<T>() > length as usize {
            return Err(Error::ConfigSpaceTooSmall);
        }
        for (i, &byte) in value.as_bytes().iter().enumerate() {
            registers.write8((offset + i) as u64, byte);
        }
        Ok(())
    }
}

/// A queue whose requests are waited for in `hlt`.
pub struct Queue<const SIZE: usize> {
    pub ring: VirtQueue<ProbeHal, SIZE>,
    index: u16,
}

impl<const SIZE: usize> Queue<SIZE> {
    pub fn new(transport: &mut PciTransport, index: u16) -> Result<Self> {
        Ok(Self {
            ring: VirtQueue::new(transport, index, false, false)?,
            index,
        })
    }

    /// Whether the device wants to be told of what was added. That is to be asked after the index was
    /// stored (virtio 1.2 §2.7.13.4.1), which virtio-drivers leaves to chance.
    pub fn should_notify(&self) -> bool {
        core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
        self.ring.should_notify()
    }

    /// Gives the buffers to the device and waits until it has used them: bytes written by it.
    pub fn request<'a>(
        &mut self,
        transport: &mut PciTransport,
        inputs: &'a [&'a [u8]],
        outputs: &'a mut [&'a mut [u8]],
    ) -> Result<u32> {
        // SAFETY: the buffers outlive this call; if the device does not answer in time it is reset
        // below, after which it uses nothing.
        let token = unsafe { self.ring.add(inputs, outputs)? };
        if self.should_notify() {
            transport.notify(self.index);
        }
        let ring = &self.ring;
        if !crate::wait_for(PATIENCE_US, || ring.can_pop()) {
            transport.set_status(DeviceStatus::empty());
            return Err(Error::IoError);
        }
        // SAFETY: the same buffers as above.
        unsafe { self.ring.pop_used(token, inputs, outputs) }
    }
}
