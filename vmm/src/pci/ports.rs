//! The root complex as the buses see it: ECAM, the configuration ports, the windows of the BARs.

use std::sync::Arc;

use super::RootComplex;
use crate::board::ResetRegister;
use crate::bus::BusError;
use crate::device::{Board, BusDevice, Device, DeviceError, SavedDevice};
use crate::layout::{self, Window};

/// Configuration space in memory (PCIe §7.2.2).
pub struct Ecam(pub Arc<RootComplex>);

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.ecam_read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.ecam_write(offset, data);
    }
}

/// Ports 0xcf8 to 0xcff. A byte at 0xcf9, in the middle of the address register, is the reset control
/// register of every PC chipset instead, so that lives here, too.
pub struct ConfigPorts {
    root: Arc<RootComplex>,
    reset: ResetRegister,
}

/// Reset control register, as an offset from 0xcf8.
const RESET_CONTROL: u64 = (layout::RESET_PORT - layout::PCI_CONFIG_PORT) as u64;

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == RESET_CONTROL && data.len() == 1 {
            self.reset.read(0, data);
        } else {
            self.root.port_read(offset as u16, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == RESET_CONTROL && data.len() == 1 {
            self.reset.write(0, data);
        } else {
            self.root.port_write(offset as u16, data);
        }
    }
}

/// A window in which BARs answer.
pub struct BarWindow {
    pub root: Arc<RootComplex>,
    /// Guest physical address of the window's first byte.
    pub base: u64,
}

impl BusDevice for BarWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if !self.root.mmio_read(self.base.wrapping_add(offset), data) {
            data.fill(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.root.mmio_write(self.base.wrapping_add(offset), data);
    }
}

/// The bus of a machine as one of its devices: it is reset and saved with the others.
pub struct PciBus {
    root: Arc<RootComplex>,
}

const ID: &str = "pci0";
const STATE_VERSION: u32 = 1;

impl PciBus {
    /// Makes the root complex of a board and gives it its ports, its ECAM and its windows.
    pub fn plug(board: &Board) -> Result<Self, DeviceError> {
        let taken = |error: BusError| DeviceError::new(ID, "take its addresses", error);
        let windows = [layout::PCI_MMIO32, board.layout.pci_mmio64];
        let root = Arc::new(RootComplex::new(&windows));
        let reset = ResetRegister(board.requests.clone());
        let ports = Arc::new(ConfigPorts {
            root: Arc::clone(&root),
            reset,
        });
        board
            .pio
            .insert(layout::PCI_CONFIG_PORT.into(), 8, ports)
            .map_err(taken)?;
        let ecam = Arc::new(Ecam(Arc::clone(&root)));
        board
            .mmio
            .insert(layout::PCI_ECAM.base, layout::PCI_ECAM.size, ecam)
            .map_err(taken)?;
        for Window { base, size } in windows {
            let window = BarWindow {
                root: Arc::clone(&root),
                base,
            };
            board
                .mmio
                .insert(base, size, Arc::new(window))
                .map_err(taken)?;
        }
        Ok(Self { root })
    }

    pub fn root(&self) -> &Arc<RootComplex> {
        &self.root
    }

    /// Takes over what was saved.
    pub fn load(&self, saved: &SavedDevice) -> Result<(), DeviceError> {
        self.root.load(&saved.unpack(STATE_VERSION)?);
        Ok(())
    }
}

impl Device for PciBus {
    fn id(&self) -> &str {
        ID
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.root.reset();
        Ok(())
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        SavedDevice::pack(ID, STATE_VERSION, &self.root.save())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Request;
    use crate::virtio::testing::Rig;

    #[test]
    fn a_byte_in_the_middle_of_the_address_resets_and_a_dword_does_not() {
        let rig = Rig::new();
        let _bus = PciBus::plug(&rig.board).unwrap();
        let port = |value: u32, offset: u64, length| {
            rig.board
                .pio
                .write(0xcf8 + offset, &value.to_le_bytes()[..length]);
        };
        port(0x8000_0000, 0, 4);
        let mut identity = [0; 4];
        rig.board.pio.read(0xcfc, &mut identity);
        assert_eq!(u32::from_le_bytes(identity), 0x0008_1b36);
        let mut ecam = [0; 4];
        rig.board.mmio.read(layout::PCI_ECAM.base, &mut ecam);
        assert_eq!(ecam, identity);
        port(0x8000_0600, 0, 4);
        assert_eq!(rig.requests.try_next(), None);
        port(0x06, 1, 1);
        assert_eq!(rig.requests.try_next(), Some(Request::Reset));
    }
}
