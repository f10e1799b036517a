//! Tiny guests of a few hand-assembled bytes, and a machine around them.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "not every test program uses all of it, and a fault here fails the test"
)]

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use fractus_vmm::config::{ConsoleFiles, MachineConfig, MachineFiles};
use fractus_vmm::machine::{Event, Machine, StopReason};

/// Generous: ring-0 code may be emulated, and the machine busy.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// Where the code of a guest is loaded, and begins.
pub const CODE: u32 = 0x10_0000;

/// 32-bit code, put together in the order of the calls.
#[derive(Default, Clone)]
pub struct Guest(Vec<u8>);

impl Guest {
    pub fn new() -> Guest {
        Guest::default()
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Guest {
        self.0.extend_from_slice(bytes);
        self
    }

    /// mov dx, port; mov al, value; out dx, al
    pub fn out(self, port: u16, value: u8) -> Guest {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }

    /// mov dx, port; in al, dx; mov dx, 0x3f8; out dx, al
    pub fn echo(self, port: u16) -> Guest {
        let [low, high] = port.to_le_bytes();
        self.bytes(&[0x66, 0xba, low, high, 0xec, 0x66, 0xba, 0xf8, 0x03, 0xee])
    }

    pub fn say(self, text: &str) -> Guest {
        text.bytes()
            .fold(self, |guest, byte| guest.out(0x3f8, byte))
    }

    /// mov dword [address], value
    pub fn store(self, address: u32, value: u32) -> Guest {
        self.bytes(&[0xc7, 0x05])
            .bytes(&address.to_le_bytes())
            .bytes(&value.to_le_bytes())
    }

    /// Says "." for ever.
    pub fn chatter(self) -> Guest {
        // mov dx, 0x3f8; mov al, '.'; 1: out dx, al; jmp 1b
        self.bytes(&[0x66, 0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xeb, 0xfd])
    }

    /// 1: hlt; jmp 1b
    pub fn halt(self) -> Guest {
        self.bytes(&[0xf4, 0xeb, 0xfd])
    }

    /// ud2, with no table to handle it.
    pub fn triple_fault(self) -> Guest {
        self.bytes(&[0x0f, 0x0b])
    }

    /// As a bzImage whose 64-bit entry is the code.
    pub fn bz_image(&self) -> Vec<u8> {
        let mut file = vec![0; 2 * 512 + 0x200];
        let mut put = |offset: usize, bytes: &[u8]| {
            file[offset..offset + bytes.len()].copy_from_slice(bytes);
        };
        let paragraphs = (0x200 + self.0.len()).div_ceil(16) as u32;
        // One setup sector; size; magic; a header of 0x6a bytes; protocol 2.15; 64-bit entry;
        // initrd anywhere below 2 GiB; a command line of 2047 bytes; 1 MiB of memory.
        put(0x1f1, &[1]);
        put(0x1f4, &paragraphs.to_le_bytes());
        put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
        put(0x202, b"HdrS\x0f\x02");
        put(0x22c, &0x7fff_ffffu32.to_le_bytes());
        put(0x236, &[1]);
        put(0x238, &2047u32.to_le_bytes());
        put(0x260, &(1u32 << 20).to_le_bytes());
        file.extend_from_slice(&self.0);
        file
    }

    /// As an ELF file with a PVH note.
    pub fn elf(&self) -> Vec<u8> {
        let code_at = 64 + 2 * 56 + 24;
        let mut file = Vec::new();
        file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        file.extend(2u16.to_le_bytes());
        file.extend(62u16.to_le_bytes());
        file.extend(1u32.to_le_bytes());
        for value in [u64::from(CODE), 64, 0] {
            file.extend(value.to_le_bytes());
        }
        file.extend(0u32.to_le_bytes());
        for value in [64u16, 56, 2, 0, 0, 0] {
            file.extend(value.to_le_bytes());
        }
        let size = self.0.len() as u64;
        // Type, flags; offset, virtual and physical address, size in file and memory, alignment.
        for (kind, values) in [
            (1u32, [code_at, CODE.into(), CODE.into(), size, size, 1]),
            (4u32, [64 + 2 * 56, 0, 0, 24, 24, 4]),
        ] {
            file.extend(kind.to_le_bytes());
            file.extend(7u32.to_le_bytes());
            for value in values {
                file.extend(value.to_le_bytes());
            }
        }
        for value in [4u32, 8, 18] {
            file.extend(value.to_le_bytes());
        }
        file.extend_from_slice(b"Xen\0");
        file.extend(u64::from(CODE).to_le_bytes());
        assert_eq!(file.len() as u64, code_at);
        file.extend_from_slice(&self.0);
        file
    }
}

/// A built machine with the host's end of its serial line.
pub struct Rig {
    pub machine: Machine,
    pub serial: UnixStream,
}

pub fn kernel_file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

pub fn config() -> MachineConfig {
    MachineConfig::minimal(16 << 20)
}

pub fn files(kernel: File) -> (MachineFiles, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let theirs = OwnedFd::from(theirs);
    let files = MachineFiles {
        kvm: OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .unwrap()
            .into(),
        kernel: Some(kernel),
        initrd: None,
        fallback: None,
        disks: Vec::new(),
        serial: ConsoleFiles {
            output: Some(theirs.try_clone().unwrap()),
            input: Some(theirs),
        },
        console_ports: Vec::new(),
        nets: Vec::new(),
        vsock: None,
    };
    (files, ours)
}

impl Rig {
    pub fn build(config: MachineConfig, guest: &Guest) -> Rig {
        let (files, serial) = files(kernel_file(&guest.elf()));
        Rig {
            machine: Machine::build(config, files, None).unwrap(),
            serial,
        }
    }

    /// Built and started.
    pub fn start(guest: &Guest) -> Rig {
        let mut rig = Rig::build(config(), guest);
        rig.machine.start().unwrap();
        rig
    }

    /// Waits for this event; others are passed over.
    pub fn wait(&mut self, wanted: &Event) {
        let deadline = Instant::now() + PATIENCE;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            match self.machine.wait_event(left) {
                Some(event) if event == *wanted => return,
                Some(Event::Stopped(reason)) => panic!("stopped instead of {wanted:?}: {reason}"),
                _ => {}
            }
        }
        panic!("{wanted:?} did not come");
    }

    /// Waits for the end.
    pub fn wait_stop(&mut self) -> StopReason {
        let deadline = Instant::now() + PATIENCE;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            if let Some(Event::Stopped(reason)) = self.machine.wait_event(left) {
                return reason;
            }
        }
        panic!("the machine did not stop");
    }

    /// Reads exactly `count` bytes of the guest's output.
    pub fn hear(&mut self, count: usize) -> String {
        let mut bytes = vec![0; count];
        self.serial.read_exact(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }
}
