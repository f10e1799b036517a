//! The guest of the golden streams: a few bytes of code in the smallest machine with every device.
//!
//! For each byte on its serial line it answers with a text that it wrote to its memory when it began, and with how often
//! it was asked, once as a register has it and once as memory has it. The host plays the driver of its random numbers,
//! so that a device is saved at work.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress};

use super::super::tests::common;
use crate::bus::Bus;
use crate::config::{ConsoleFiles, MachineFiles};
use crate::fuzzing::rig::files_of_every_device;
use crate::layout;
use crate::machine::Machine;
use crate::memory::GuestMemory;
use crate::pci::MSIX_CAPABILITY;

/// What it says, written by the guest itself.
const TEXT: &[u8; 8] = b"golden: ";
const TEXT_AT: u32 = 0x18_0000;
const COUNT_AT: u32 = 0x18_0010;
/// Descriptors, then what is available, then what is used, of the random numbers' queue.
const RING: u64 = 0x18_1000;
const AVAILABLE: u64 = RING + 0x400;
const USED: u64 = RING + 0x800;
/// Where the numbers go: 16 bytes each time.
const NUMBERS: u64 = RING + 0xc00;
/// Configuration space of the random numbers, which are in slot 3.
const FUNCTION: u64 = layout::PCI_ECAM.base + (3 << 15);

/// What is on its disk, and where.
pub const ON_DISK: (u64, &[u8]) = (8192, b"on a golden disk");

fn code() -> common::Guest {
    let [a, b, c, d, e, f, g, h] = *TEXT;
    let count = COUNT_AT.to_le_bytes();
    common::Guest::new()
        .store(TEXT_AT, u32::from_le_bytes([a, b, c, d]))
        .store(TEXT_AT + 4, u32::from_le_bytes([e, f, g, h]))
        // xor ebx, ebx
        .bytes(&[0x31, 0xdb])
        // 1: in al, LSR; test al, 1; jz 1b; in al, the byte; inc ebx; inc byte [count]
        .bytes(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb])
        .bytes(&[0x66, 0xba, 0xf8, 0x03, 0xec, 0x43, 0xfe, 0x05])
        .bytes(&count)
        // mov esi, text; mov ecx, 8; 2: lodsb; out dx, al; loop 2b
        .bytes(&[0xbe])
        .bytes(&TEXT_AT.to_le_bytes())
        .bytes(&[0xb9, 8, 0, 0, 0, 0xac, 0xee, 0xe2, 0xfc])
        // mov al, bl; add al, '0'; out dx, al; the same of [count]; jmp 1b
        .bytes(&[0x88, 0xd8, 0x04, b'0', 0xee, 0xa0])
        .bytes(&count)
        .bytes(&[0x04, b'0', 0xee, 0xeb, (-50i8) as u8])
}

/// Its files, with the other end of its serial line.
pub fn files() -> (MachineFiles, UnixStream) {
    let (files, _outside) = files_of_every_device().unwrap();
    let (real, serial) = common::files(common::kernel_file(&code().elf()));
    let files = MachineFiles {
        kvm: real.kvm,
        kernel: real.kernel,
        serial: real.serial,
        ..files
    };
    (files, serial)
}

/// Its files where there is no KVM.
pub fn files_without_kvm() -> MachineFiles {
    let (files, _outside) = files_of_every_device().unwrap();
    let nowhere: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    let output = Some(nowhere);
    let serial = ConsoleFiles {
        output,
        input: None,
    };
    MachineFiles { serial, ..files }
}

/// Asks it for the `count`-th time.
pub fn ask(serial: &mut UnixStream, count: u8) {
    serial.write_all(b"?").unwrap();
    let mut answer = [0; TEXT.len() + 2];
    serial.read_exact(&mut answer).unwrap();
    let count = [b'0' + count; 2];
    assert_eq!(answer, [&TEXT[..], &count].concat().as_slice());
}

/// Checks its memory, after so many questions and random numbers.
pub fn check(memory: &GuestMemory, questions: u8, numbers: u16) {
    let mut text = [0; TEXT.len()];
    let place = |at| GuestAddress(at);
    memory.read_slice(&mut text, place(TEXT_AT.into())).unwrap();
    assert_eq!(&text, TEXT);
    let count: u8 = memory.read_obj(place(COUNT_AT.into())).unwrap();
    assert_eq!(count, questions);
    let used: u16 = memory.read_obj(place(USED + 2)).unwrap();
    assert_eq!(used, numbers);
    for at in 0..u64::from(numbers) {
        let number: u128 = memory.read_obj(place(NUMBERS + 16 * at)).unwrap();
        assert_ne!(number, 0, "random numbers {at}");
    }
}

/// Where the random numbers' registers are.
fn base(mmio: &Bus) -> u64 {
    let mut base = [0; 4];
    mmio.read(FUNCTION + 0x10, &mut base);
    u64::from(u32::from_le_bytes(base) & !0xf)
}

/// Does what a good driver does (virtio 1.2 §3.1.1).
pub fn start_numbers(machine: &Machine) {
    let mmio = &machine.board.mmio;
    mmio.write(FUNCTION + 4, &[6, 0]);
    let base = base(mmio);
    let write = |at: u64, data: &[u8]| mmio.write(base + at, data);
    write(0x14, &[0]);
    write(0x14, &[3]);
    for half in 0..2u8 {
        write(0x00, &[half, 0, 0, 0]);
        let mut offered = [0; 4];
        mmio.read(base + 0x04, &mut offered);
        write(0x08, &[half, 0, 0, 0]);
        write(0x0c, &offered);
    }
    write(0x14, &[0xb]);
    // A vector that the guest, whose interrupts are off, never sees.
    write(0x4000, &0xfee0_0000u64.to_le_bytes());
    write(0x4008, &0x40u64.to_le_bytes());
    let mut at = 0x34;
    loop {
        let mut next = [0; 1];
        mmio.read(FUNCTION + at, &mut next);
        at = next[0].into();
        assert_ne!(at, 0, "no MSI-X");
        let mut kind = [0; 1];
        mmio.read(FUNCTION + at, &mut kind);
        if kind[0] == MSIX_CAPABILITY {
            break;
        }
        at += 1;
    }
    mmio.write(FUNCTION + at + 2, &[0, 0x80]);
    write(0x16, &[0, 0]);
    for (register, address) in [(0x20, RING), (0x28, AVAILABLE), (0x30, USED)] {
        write(register, &address.to_le_bytes());
    }
    write(0x1a, &[0, 0]);
    write(0x1c, &[1, 0]);
    write(0x14, &[0xf]);
}

/// Asks for random numbers for the `count`-th time, and waits for them.
pub fn take_numbers(machine: &Machine, count: u16) {
    let memory = machine.memory();
    let index = count - 1;
    let mut descriptor = [0; 16];
    let target = NUMBERS + 16 * u64::from(index);
    descriptor[..8].copy_from_slice(&target.to_le_bytes());
    // 16 bytes, for the device to write.
    descriptor[8] = 16;
    descriptor[12] = 2;
    let put = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).unwrap();
    put(RING + 16 * u64::from(index), &descriptor);
    put(AVAILABLE + 4 + 2 * u64::from(index), &index.to_le_bytes());
    put(AVAILABLE + 2, &count.to_le_bytes());
    let mmio = &machine.board.mmio;
    mmio.write(base(mmio) + 0x3000, &[0, 0]);
    let by = Instant::now() + common::PATIENCE;
    while memory.read_obj::<u16>(GuestAddress(USED + 2)).unwrap() != count {
        assert!(Instant::now() < by, "no random numbers");
        std::thread::yield_now();
    }
}
