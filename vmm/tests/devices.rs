//! The virtio devices as a guest sees them: the probe drives them by PCI, MSI-X and all, on the real
//! KVM.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::thread::JoinHandle;

use common::{PATIENCE, files};
use fractus_vmm::config::{DiskConfig, MachineConfig, RngConfig};
use fractus_vmm::machine::{Event, Machine, StopReason};

const DISK: u64 = 4 << 20;

/// The probe's image, built if need be.
fn probe() -> &'static Path {
    static PROBE: OnceLock<PathBuf> = OnceLock::new();
    PROBE.get_or_init(|| {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../images/probe/build.sh");
        let output = Command::new(script)
            .output()
            .expect("the probe's build script runs");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
    })
}

/// A machine that runs the probe; its events are waited for on a thread of its own.
struct Running {
    serial: UnixStream,
    lines: BufReader<UnixStream>,
    owner: Option<JoinHandle<StopReason>>,
}

fn disk(read_only: bool) -> DiskConfig {
    DiskConfig {
        read_only,
        serial_number: format!("probe-{read_only}"),
        direct: false,
        limit: None,
        queues: 1,
    }
}

impl Running {
    fn start(config: MachineConfig, disks: &[&File]) -> Self {
        let (mut files, serial) = files(File::open(probe()).unwrap());
        files.disks = disks.iter().map(|disk| disk.try_clone().unwrap()).collect();
        let mut machine = Machine::build(config, files, None).unwrap();
        machine.start().unwrap();
        let owner = std::thread::spawn(move || {
            loop {
                match machine.wait_event(PATIENCE) {
                    Some(Event::Stopped(reason)) => return reason,
                    Some(_) => {}
                    None => panic!("nothing happens any more"),
                }
            }
        });
        let lines = BufReader::new(serial.try_clone().unwrap());
        let mut running = Self {
            serial,
            lines,
            owner: Some(owner),
        };
        // The probe listens when it has answered its first command.
        assert_eq!(running.ask("echo hello"), "hello");
        running
    }

    /// Gives a command; its answer, without what comes before.
    fn ask(&mut self, command: &str) -> String {
        let name = command.split(' ').next().unwrap();
        writeln!(self.serial, "{command}").unwrap();
        let mut heard = String::new();
        loop {
            let mut line = String::new();
            let count = self.lines.read_line(&mut line).unwrap_or_else(|error| {
                panic!("{command}: {error}; the guest said:\n{heard}");
            });
            assert!(
                count > 0,
                "{command}: the line is closed; the guest said:\n{heard}"
            );
            if let Some(answer) = line.strip_prefix(&format!("ok {name}")) {
                return answer.trim().to_owned();
            }
            if line.starts_with("err ") {
                return line.trim().to_owned();
            }
            heard.push_str(&line);
        }
    }

    /// Ends the machine from inside by a reset that the owner sees as a stop of the guest.
    fn stop(mut self, command: &str) -> StopReason {
        writeln!(self.serial, "{command}").unwrap();
        self.owner.take().unwrap().join().unwrap()
    }
}

fn config() -> MachineConfig {
    let mut config = MachineConfig::minimal(64 << 20);
    config.rng = Some(RngConfig::default());
    config
}

#[test]
fn a_guest_writes_hashes_and_clears_its_disks() {
    let (file, other) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    file.set_len(DISK).unwrap();
    other.set_len(DISK).unwrap();
    let mut config = config();
    config.disks = vec![disk(false), disk(true)];
    let mut guest = Running::start(config, &[&file, &other]);
    assert_eq!(
        guest.ask("disk-info 0"),
        format!("bytes={DISK} ro=0 serial=probe-false")
    );
    assert_eq!(
        guest.ask("disk-info 1"),
        format!("bytes={DISK} ro=1 serial=probe-true")
    );

    assert!(guest.ask("disk-write 0 4096 1048576 7").starts_with("us="));
    assert_eq!(guest.ask("disk-check 0 4096 1048576 7"), "");
    let mut bytes = vec![0; DISK as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[..4096].iter().all(|byte| *byte == 0));
    assert!(
        bytes[4096..4096 + 1048576]
            .chunks(512)
            .all(|sector| sector.iter().any(|byte| *byte != 0))
    );
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    assert_eq!(
        guest.ask(&format!("disk-hash 0 0 {DISK}")),
        format!("{hash:016x}")
    );

    assert_eq!(guest.ask("disk-zero 0 4096 8192"), "");
    assert_eq!(guest.ask("disk-discard 0 12288 8192"), "");
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes[..20480].iter().all(|byte| *byte == 0));
    assert!(guest.ask("disk-write 1 0 512 7").starts_with("err"));
    let stopped = guest.stop("triple-fault");
    assert!(matches!(stopped, StopReason::TripleFault { vcpu: 0, .. }));
}

#[test]
fn a_guest_gets_random_numbers() {
    let mut guest = Running::start(config(), &[]);
    let (one, other) = (guest.ask("random 32"), guest.ask("random 32"));
    assert!(one.len() >= 64, "{one}");
    assert_ne!(one, other);
    guest.stop("triple-fault");
}
