//! Guests that go on from one snapshot, each in a jail of its own, with their memory mapped from its file. Passes with a
//! note where there is no KVM.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::Context;
use common::*;
use fractus_vmm::config::{BalloonConfig, ConsoleFiles, MachineConfig, MachineFiles};
use fractus_vmm::machine::{Compression, Machine, Scope, SnapshotOptions};
use fractus_vmm::stream::snapshot::Snapshot;
use fractus_vmm::stream::working_set::WorkingSet;

fn config(memory: u64) -> MachineConfig {
    let mut config = MachineConfig::minimal(memory);
    config.command_line = "tick_ms=20 run=\"touch 20\"".to_owned();
    config.balloon = Some(BalloonConfig::default());
    config
}

/// Writes a guest that runs to `path`; what it calls itself, and how often it has ticked.
fn write(kernel: &Path, config: MachineConfig, path: &Path) -> Result<(String, u64)> {
    write_as(Compression::None, kernel, config, path)
}

fn write_as(
    compression: Compression,
    kernel: &Path,
    config: MachineConfig,
    path: &Path,
) -> Result<(String, u64)> {
    let (serial, end) = UnixStream::pair()?;
    serial.set_read_timeout(Some(PATIENCE))?;
    let files = MachineFiles {
        kvm: OwnedFd::from(OpenOptions::new().read(true).write(true).open("/dev/kvm")?),
        kernel: Some(File::open(kernel)?),
        initrd: None,
        fallback: None,
        disks: Vec::new(),
        serial: ConsoleFiles {
            output: Some(OwnedFd::from(end.try_clone()?)),
            input: Some(OwnedFd::from(end)),
        },
        console_ports: Vec::new(),
        nets: Vec::new(),
        vsock: None,
    };
    let mut machine = Machine::build(config, files, None)?;
    machine.start()?;
    let (mut nonce, mut ticks) = (None, 0);
    for line in BufReader::new(serial).lines() {
        let line = line?;
        nonce = nonce.or(nonce_in(&line, "boot "));
        ticks += u64::from(line.starts_with("tick "));
        if line.starts_with("ok touch") {
            break;
        }
    }
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)?;
    let options = SnapshotOptions {
        compression,
        ..Scope::Whole.into()
    };
    machine.snapshot_of(options, file, b"")?;
    let nonce = nonce.context("it does not say that it booted")?;
    Ok((nonce, ticks))
}

fn nonce_in(line: &str, start: &str) -> Option<String> {
    let words = line.strip_prefix(start)?.split(' ');
    let nonce = words
        .filter_map(|word| word.strip_prefix("nonce="))
        .next()?;
    Some(nonce.trim_end().to_owned())
}

fn by_hand(config: &Path, how: &str, snapshot: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fractus-agent"));
    command.args(["vm", "--config"]).arg(config);
    command.arg(how).arg(snapshot);
    command
}

/// A clone in a process of its own, and what it says.
struct Clone {
    process: Child,
    input: ChildStdin,
    lines: Receiver<String>,
}

impl Clone {
    fn start(config: &Path, how: &str, snapshot: &Path) -> Result<Self> {
        Self::spawn(&mut by_hand(config, how, snapshot))
    }

    fn spawn(command: &mut Command) -> Result<Self> {
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = BufReader::new(process.stdout.take().unwrap());
        let (say, lines) = channel();
        std::thread::spawn(move || {
            for line in output.lines().map_while(std::result::Result::ok) {
                println!("{line}");
                if say.send(line).is_err() {
                    break;
                }
            }
        });
        let input = process.stdin.take().unwrap();
        Ok(Self {
            process,
            input,
            lines,
        })
    }

    fn line(&self, start: &str) -> Result<String> {
        loop {
            let line = self.lines.recv_timeout(PATIENCE)?;
            if line.starts_with(start) {
                return Ok(line);
            }
        }
    }

    fn ask(&mut self, command: &str) -> Result<String> {
        writeln!(self.input, "{command}")?;
        let name = command.split(' ').next().unwrap_or(command);
        self.line(&format!("ok {name}"))
    }
}

impl Drop for Clone {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Where a test has its files: the probe, what the machine is by hand, and a guest's snapshot.
struct Folder(tempfile::TempDir);

impl Folder {
    /// With the probe, and with a machine of 64 MiB; none: there is no KVM.
    fn new() -> Result<Option<Self>> {
        let Some(probe) = probe() else {
            println!("no /dev/kvm: nothing was tested");
            return Ok(None);
        };
        let folder = Self(tempfile::tempdir()?);
        std::fs::write(folder.kernel(), probe)?;
        let machine = serde_json::json!({"machine": config(64 << 20), "kernel": folder.kernel()});
        std::fs::write(folder.config(), machine.to_string())?;
        Ok(Some(folder))
    }

    fn kernel(&self) -> PathBuf {
        self.0.path().join("probe")
    }

    fn config(&self) -> PathBuf {
        self.0.path().join("config")
    }

    fn snapshot(&self) -> PathBuf {
        self.0.path().join("snapshot")
    }
}

/// What is mapped is taken away by threads that are locked down: the balloon's, and at a reset the main one.
#[test]
fn clones_of_a_guest_go_on_give_memory_back_and_reset_in_their_jails() -> Result {
    const PAGES_OF_30_MIB: &str = "pages=7680";
    let Some(folder) = Folder::new()? else {
        return Ok(());
    };
    let snapshot = folder.snapshot();
    let (nonce, ticks) = write(&folder.kernel(), config(64 << 20), &snapshot)?;
    let mut before = Vec::new();
    File::open(&snapshot)?.read_to_end(&mut before)?;
    let mut clones = Vec::new();
    for _ in 0..2 {
        clones.push(Clone::start(&folder.config(), "--clone", &snapshot)?);
    }
    for clone in &mut clones {
        let tick = clone.line("tick ")?;
        let number: u64 = tick.split(' ').nth(1).unwrap_or_default().parse()?;
        assert!(number >= ticks, "{ticks}, then {tick}");
        assert_eq!(nonce_in(&tick, "tick "), Some(nonce.clone()), "{tick}");
        // Of these 20 are the file's until here.
        assert!(clone.ask("touch 30")?.contains("mib=30"));
        assert!(clone.ask("zeros 30")?.ends_with("pages=0"));
        assert!(clone.ask("balloon free 30")?.contains("mib=30"));
        assert!(clone.ask("zeros 30")?.ends_with(PAGES_OF_30_MIB));
        assert!(clone.ask("touch 30")?.contains("mib=30"));
    }
    let first = clones.first_mut().unwrap();
    writeln!(first.input, "reboot")?;
    let booted = first.line("boot ")?;
    assert_ne!(nonce_in(&booted, "boot "), Some(nonce.clone()));
    assert!(first.ask("echo alive")?.contains("alive"));
    let last = clones.last_mut().unwrap();
    assert!(last.ask("echo alive")?.contains("alive"));
    // Whatever they wrote, and though they run as another user, it is as it was.
    let mut after = Vec::new();
    File::open(&snapshot)?.read_to_end(&mut after)?;
    assert!(before == after, "the snapshot was written to");
    Ok(())
}

/// Its memory is larger than any file that the jail would allow by what FILE says, and nobody has said what its devices
/// are called.
#[test]
fn a_larger_guest_than_its_file_says_goes_on_in_a_jail() -> Result {
    let Some(folder) = Folder::new()? else {
        return Ok(());
    };
    let snapshot = folder.snapshot();
    let (nonce, _) = write(&folder.kernel(), config(1100 << 20), &snapshot)?;
    for how in ["--resume", "--clone"] {
        let mut guest = Clone::start(&folder.config(), how, &snapshot)?;
        let tick = guest.line("tick ")?;
        assert_eq!(
            nonce_in(&tick, "tick "),
            Some(nonce.clone()),
            "{how}: {tick}"
        );
        assert!(guest.ask("echo alive")?.contains("alive"), "{how}");
    }
    Ok(())
}

/// As the one before, from a file that is much smaller than its memory; which is said where that was to be mapped.
#[test]
fn a_compressed_guest_goes_on_in_a_jail_and_is_not_cloned() -> Result {
    let Some(folder) = Folder::new()? else {
        return Ok(());
    };
    let (snapshot, large) = (folder.snapshot(), config(1100 << 20));
    let (nonce, _) = write_as(Compression::Zstd, &folder.kernel(), large, &snapshot)?;
    assert!(snapshot.metadata()?.len() < 4 << 20);
    let mut guest = Clone::start(&folder.config(), "--resume", &snapshot)?;
    let tick = guest.line("tick ")?;
    assert_eq!(nonce_in(&tick, "tick "), Some(nonce), "{tick}");
    // Of these 20 were in the file.
    assert!(guest.ask("zeros 20")?.ends_with("pages=0"));
    assert!(guest.ask("echo alive")?.contains("alive"));
    let refused = by_hand(&folder.config(), "--clone", &snapshot)
        .stdin(Stdio::null())
        .output()?;
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success());
    assert!(said.contains("is compressed"), "{said}");
    Ok(())
}

/// By whoever starts it: the clone's own process has neither the file nor /proc.
#[test]
fn what_a_clone_touches_is_recorded_and_read_ahead_for_the_next() -> Result {
    let Some(folder) = Folder::new()? else {
        return Ok(());
    };
    let snapshot = folder.snapshot();
    let (nonce, _) = write(&folder.kernel(), config(64 << 20), &snapshot)?;
    for jail in [None, Some("--no-jail")] {
        let path = folder.0.path().join(format!("set{}", jail.unwrap_or("")));
        let command = || {
            let mut command = by_hand(&folder.config(), "--clone", &snapshot);
            command.arg("--working-set").arg(&path).args(jail);
            command
        };
        let mut first = Clone::spawn(&mut command())?;
        assert!(first.ask("zeros 10")?.ends_with("pages=0"));
        let by = Instant::now() + PATIENCE;
        while !path.exists() {
            assert!(Instant::now() < by, "nothing is recorded");
            first.line("tick ")?;
        }
        drop(first);
        let open = Snapshot::open(File::open(&snapshot)?)?;
        let set = WorkingSet::read(File::open(&path)?, &open)?;
        let bytes = set.bytes();
        assert!((1..20 << 20).contains(&bytes), "{bytes}");
        // Twice: it is read, and nobody records it again.
        let written = path.metadata()?.modified()?;
        for _ in 0..2 {
            let mut next = Clone::spawn(&mut command())?;
            let tick = next.line("tick ")?;
            assert_eq!(nonce_in(&tick, "tick "), Some(nonce.clone()), "{tick}");
            assert!(next.ask("zeros 20")?.ends_with("pages=0"));
            assert!(next.ask("echo alive")?.contains("alive"));
            // Longer than it takes to record one.
            let until = Instant::now() + Duration::from_secs(3);
            while jail.is_none() && Instant::now() < until {
                next.line("tick ")?;
            }
        }
        assert_eq!(path.metadata()?.modified()?, written);
        assert_eq!(
            folder.0.path().read_dir()?.count(),
            4 + usize::from(jail.is_some())
        );
    }
    Ok(())
}

#[test]
fn a_clone_with_a_set_that_is_none_of_its_snapshot_goes_on_and_says_so() -> Result {
    let Some(folder) = Folder::new()? else {
        return Ok(());
    };
    let snapshot = folder.snapshot();
    write(&folder.kernel(), config(64 << 20), &snapshot)?;
    let path = folder.0.path().join("set");
    std::fs::write(&path, b"something else")?;
    let mut command = by_hand(&folder.config(), "--clone", &snapshot);
    command.arg("--working-set").arg(&path);
    let mut clone = Clone::spawn(command.stderr(Stdio::piped()))?;
    assert!(clone.ask("zeros 20")?.ends_with("pages=0"));
    writeln!(clone.input, "poweroff")?;
    let mut said = String::new();
    let errors = clone.process.stderr.take().context("a pipe")?;
    BufReader::new(errors).read_to_string(&mut said)?;
    assert!(clone.process.wait()?.success());
    assert!(said.contains("is not used"), "{said}");
    assert_eq!(std::fs::read(&path)?, b"something else");
    // It is for what is mapped.
    let mut resumed = by_hand(&folder.config(), "--resume", &snapshot);
    resumed.arg("--working-set").arg(&path).stdin(Stdio::null());
    assert!(!resumed.output()?.status.success());
    Ok(())
}
