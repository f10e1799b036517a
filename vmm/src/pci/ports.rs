//! The root complex as the buses see it: ECAM, the configuration ports, the windows of the BARs.

use std::sync::Arc;

use super::RootComplex;
use crate::bus::BusError;
use crate::device::{Board, BusDevice};
use crate::layout::{self, Window};
use crate::request::{Request, RequestSender};

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

/// Ports 0xcf8 to 0xcff. A byte written to 0xcf9, in the middle of the address register, is the reset
/// control register of every PC chipset instead, so that lives here, too.
pub struct ConfigPorts {
    pub root: Arc<RootComplex>,
    pub requests: RequestSender,
}

/// Reset control register, as an offset from 0xcf8.
const RESET_CONTROL: u64 = 1;
/// Its bit that resets the processor.
const RESET_CPU: u8 = 1 << 2;

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if offset == RESET_CONTROL && data.len() == 1 {
            data.fill(0);
        } else {
            self.root.port_read(offset as u16, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match data {
            [value] if offset == RESET_CONTROL => {
                if value & RESET_CPU != 0 {
                    self.requests.send(Request::Reset);
                }
            }
            _ => self.root.port_write(offset as u16, data),
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

/// Makes the root complex of a board and gives it its ports, its ECAM and its windows.
pub fn plug_root(board: &Board) -> Result<Arc<RootComplex>, BusError> {
    let windows = [layout::PCI_MMIO32, board.layout.pci_mmio64];
    let root = Arc::new(RootComplex::new(&windows));
    let requests = board.requests.clone();
    let ports = Arc::new(ConfigPorts {
        root: Arc::clone(&root),
        requests,
    });
    board.pio.insert(layout::PCI_CONFIG_PORT.into(), 8, ports)?;
    let ecam = layout::PCI_ECAM;
    board
        .mmio
        .insert(ecam.base, ecam.size, Arc::new(Ecam(Arc::clone(&root))))?;
    for Window { base, size } in windows {
        let window = BarWindow {
            root: Arc::clone(&root),
            base,
        };
        board.mmio.insert(base, size, Arc::new(window))?;
    }
    Ok(root)
}
