//! A type-0 configuration space: 256 bytes, each bit either writable or not.
//!
//! Everything is a byte with a mask of writable bits, so no access of any size or offset needs a
//! special case: BAR sizing (write all ones, read back the size) follows from the mask alone.

use serde::{Deserialize, Serialize};

/// Bytes of a configuration space without the extended part, which reads as zero (no capability).
pub const CONFIG_SIZE: usize = 256;

const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u8 = 1 << 1;
/// Memory decode, bus master and interrupt disable; the rest of the command register is fixed.
const COMMAND_WRITABLE: u16 = 0x0406;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const BAR0: usize = 0x10;
const BARS: usize = 6;
const CAPABILITY_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;
const INTERRUPT_LINE: usize = 0x3c;

/// What a function says it is.
#[derive(Debug, Clone, Copy)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Base class, subclass, programming interface.
    pub class: [u8; 3],
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// How wide the address of a memory BAR is. I/O BARs are deliberately absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarWidth {
    Bits32,
    /// Takes the next BAR register, too.
    Bits64,
}

/// A memory BAR.
#[derive(Debug, Clone, Copy)]
pub struct BarSpec {
    /// Register 0 to 5.
    pub index: u8,
    pub width: BarWidth,
    pub prefetchable: bool,
    /// Bytes; rounded up to a power of two of at least 4096.
    pub size: u64,
}

/// The bytes of a configuration space as they are saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigState {
    pub bytes: Vec<u8>,
}

/// The configuration space of one function.
pub struct ConfigSpace {
    bytes: [u8; CONFIG_SIZE],
    writable: [u8; CONFIG_SIZE],
    bars: [Option<BarSpec>; BARS],
    /// Where [`ConfigSpace::place_bar`] put each.
    homes: [u64; BARS],
    next_capability: usize,
    last_link: usize,
}

impl ConfigSpace {
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            bars: [None; BARS],
            homes: [0; BARS],
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITY_POINTER,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(
            0x08,
            &[identity.revision, identity.class[2], identity.class[1]],
        );
        space.put(0x0b, &[identity.class[0]]);
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Declares a BAR. Without effect if the register is taken or does not exist.
    pub fn add_bar(&mut self, spec: BarSpec) {
        let index = usize::from(spec.index);
        let wide = spec.width == BarWidth::Bits64;
        if index + usize::from(wide) >= BARS || self.bars[index].is_some() {
            return;
        }
        let size = spec.size.max(4096).next_power_of_two();
        let kind = (u8::from(wide) << 2) | (u8::from(spec.prefetchable) << 3);
        let mask = !(size - 1);
        let register = BAR0 + index * 4;
        self.put(register, &[kind]);
        self.allow(register, &(mask as u32).to_le_bytes());
        if wide {
            self.allow(register + 4, &((mask >> 32) as u32).to_le_bytes());
        }
        self.bars[index] = Some(BarSpec { size, ..spec });
    }

    /// Appends a capability: `body` follows the id and link bytes, `writable` is the mask of what a
    /// guest may change in it (shorter means read-only). `None` when the space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<u8> {
        let at = self.next_capability;
        let length = (2 + body.len()).next_multiple_of(4);
        if at + length > CONFIG_SIZE || writable.len() > body.len() {
            return None;
        }
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.put(self.last_link, &[at as u8]);
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.last_link = at + 1;
        self.next_capability = at + length;
        Some(at as u8)
    }

    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (step, byte) in data.iter_mut().enumerate() {
            *byte = self
                .bytes
                .get(usize::from(offset) + step)
                .copied()
                .unwrap_or(0);
        }
    }

    /// Applies a guest's write through the mask.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (step, byte) in data.iter().enumerate() {
            let at = usize::from(offset) + step;
            if let (Some(old), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *old = (*old & !mask) | (byte & mask);
            }
        }
    }

    /// The two bytes at `offset`.
    pub fn word(&self, offset: u8) -> u16 {
        let mut word = [0; 2];
        self.read(u16::from(offset), &mut word);
        u16::from_le_bytes(word)
    }

    /// Puts a BAR at an address, as firmware would.
    pub fn place_bar(&mut self, index: u8, address: u64) {
        let Some(Some(spec)) = self.bars.get(usize::from(index)).copied() else {
            return;
        };
        self.homes[usize::from(index)] = address;
        let register = (BAR0 + usize::from(index) * 4) as u16;
        match spec.width {
            BarWidth::Bits32 => self.write(register, &(address as u32).to_le_bytes()),
            BarWidth::Bits64 => self.write(register, &address.to_le_bytes()),
        }
    }

    /// The declared BARs.
    pub fn bars(&self) -> impl Iterator<Item = BarSpec> + '_ {
        self.bars.iter().flatten().copied()
    }

    /// Where the guest asks a BAR to answer: none while memory decoding is off.
    pub fn wanted_address(&self, bar: &BarSpec) -> Option<u64> {
        (self.bytes[COMMAND] & COMMAND_MEMORY != 0).then(|| self.register_address(bar))
    }

    /// Back to what firmware left: writable bits are zero, BARs are where they were placed.
    pub fn reset(&mut self) {
        self.write(0, &[0; CONFIG_SIZE]);
        for index in 0..BARS {
            self.place_bar(index as u8, self.homes[index]);
        }
    }

    pub fn save(&self) -> ConfigState {
        ConfigState {
            bytes: self.bytes.to_vec(),
        }
    }

    /// Takes the writable bits of a saved space; what is fixed stays as this build says.
    pub fn load(&mut self, state: &ConfigState) {
        self.write(0, &state.bytes);
        for bar in self.bars.iter().flatten() {
            self.homes[usize::from(bar.index)] = self.register_address(bar);
        }
    }

    /// The address in a BAR's register, whether or not memory decoding is on.
    pub fn register_address(&self, bar: &BarSpec) -> u64 {
        let register = BAR0 + usize::from(bar.index) * 4;
        let width = if bar.width == BarWidth::Bits64 { 8 } else { 4 };
        let mut address = [0; 8];
        self.read(register as u16, &mut address[..width]);
        u64::from_le_bytes(address) & !0xf
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (slot, byte) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *slot = *byte;
        }
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        for (slot, byte) in self.writable.iter_mut().skip(at).zip(mask) {
            *slot = *byte;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(super) fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: [1, 0x80, 0],
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        space.add_bar(BarSpec {
            index: 0,
            width: BarWidth::Bits32,
            prefetchable: false,
            size: 0x8000,
        });
        space.add_bar(BarSpec {
            index: 2,
            width: BarWidth::Bits64,
            prefetchable: true,
            size: 1 << 33,
        });
        space
    }

    fn dword(space: &ConfigSpace, at: u16) -> u32 {
        let mut data = [0; 4];
        space.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn sizing_tells_the_size_of_each_bar() {
        let mut space = space();
        space.write(0x10, &[0xff; 4]);
        space.write(0x18, &[0xff; 8]);
        assert_eq!(dword(&space, 0x10), !0x7fff);
        assert_eq!(dword(&space, 0x18), 0xc);
        assert_eq!(dword(&space, 0x1c), !1);
        space.write(0x14, &[0xff; 4]);
        assert_eq!(
            dword(&space, 0x14),
            0,
            "a BAR that does not exist reads as zero"
        );
    }

    #[test]
    fn bars_answer_only_while_memory_decoding_is_on() {
        let mut space = space();
        let bar = space.bars().next().unwrap();
        space.place_bar(0, 0xc000_8000);
        assert_eq!(space.wanted_address(&bar), None);
        space.write(0x04, &[2, 0]);
        assert_eq!(space.wanted_address(&bar), Some(0xc000_8000));
    }

    #[test]
    fn capabilities_are_linked_in_order_and_end_with_zero() {
        let mut space = space();
        let first = space.add_capability(9, &[1, 2, 3], &[]).unwrap();
        let second = space.add_capability(0x11, &[0; 10], &[0, 0xc0]).unwrap();
        assert_eq!(space.word(0x34), u16::from(first));
        assert_eq!(space.word(first), 9 | (u16::from(second) << 8));
        assert_eq!(space.word(second), 0x11);
        space.write(u16::from(second) + 2, &[0xff, 0xff]);
        assert_eq!(space.word(second + 2), 0xc000);
        assert!(space.add_capability(9, &[0; 250], &[]).is_none());
    }

    proptest! {
        #[test]
        fn no_write_changes_what_is_fixed(writes in prop::collection::vec((0u16..4100, prop::collection::vec(any::<u8>(), 0..9)), 0..64)) {
            let mut space = space();
            let (identity, class) = (dword(&space, 0), dword(&space, 8));
            for (offset, data) in &writes {
                space.write(*offset, data);
            }
            prop_assert_eq!(dword(&space, 0), identity);
            prop_assert_eq!(dword(&space, 8), class);
            prop_assert_eq!(dword(&space, 0x10) & 0x7fff, 0);
            let mut restored = self::space();
            restored.load(&space.save());
            prop_assert_eq!(restored.save(), space.save());
        }
    }
}
