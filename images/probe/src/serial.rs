//! The serial console, COM1: lines out, lines in. Lines are whole: a lock keeps processors from
//! writing into each other's.

use core::fmt::{self, Write};
use core::sync::atomic::{AtomicBool, Ordering};

use crate::cpu;

const PORT: u16 = 0x3f8;
const LINE_STATUS: u16 = PORT + 5;
const DATA_READY: u8 = 1;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
/// What a 16550's queue takes at once.
const QUEUE: usize = 16;
/// A UART that never says empty (there is none, or it is stuck) must not hang the guest.
const PATIENCE: u32 = 100_000;

static BUSY: AtomicBool = AtomicBool::new(false);

/// Writes the bytes as they are.
pub fn write(bytes: &[u8]) {
    while BUSY.swap(true, Ordering::Acquire) {
        core::hint::spin_loop();
    }
    for part in bytes.chunks(QUEUE) {
        let mut patience = PATIENCE;
        while cpu::inb(LINE_STATUS) & TRANSMITTER_EMPTY == 0 && patience > 0 {
            patience -= 1;
        }
        cpu::outs(PORT, part);
    }
    BUSY.store(false, Ordering::Release);
}

/// The first bytes of all, before anything is known or set up.
pub fn write_early(bytes: &[u8]) {
    cpu::outs(PORT, bytes);
}

/// After a fault or a panic the lock may be held by whoever will never let go.
pub fn break_lock() {
    BUSY.store(false, Ordering::Release);
}

/// Queues on, interrupt on received data.
pub fn listen() {
    cpu::outb(PORT + 2, 0x07);
    cpu::outb(PORT + 1, 0x01);
    cpu::outb(PORT + 4, 0x0b);
}

/// Something was typed and not read.
pub fn has_input() -> bool {
    let status = cpu::inb(LINE_STATUS);
    // All ones: nobody answers at that port.
    status != 0xff && status & DATA_READY != 0
}

pub fn read() -> Option<u8> {
    has_input().then(|| cpu::inb(PORT))
}

/// One line of output, built without a heap; what does not fit is cut.
pub struct Line {
    bytes: [u8; Line::SIZE],
    length: usize,
}

impl Line {
    const SIZE: usize = 2048;

    pub const fn new() -> Self {
        Self {
            bytes: [0; Self::SIZE],
            length: 0,
        }
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    pub fn as_str(&self) -> &str {
        core::str::from_utf8(self.as_bytes()).unwrap_or("?")
    }

    pub fn clear(&mut self) {
        self.length = 0;
    }

    /// False if it is full.
    pub fn push(&mut self, byte: u8) -> bool {
        if self.length == Self::SIZE {
            return false;
        }
        self.bytes[self.length] = byte;
        self.length += 1;
        true
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            self.push(byte);
        }
        Ok(())
    }
}

/// A line to the console, whole.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => {{
        use core::fmt::Write as _;
        let mut line = $crate::serial::Line::new();
        let _ = write!(line, $($arg)*);
        line.push(b'\n');
        $crate::serial::write(line.as_bytes());
    }};
}
