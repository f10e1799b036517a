//! Snapshots and what goes on from them: written by a machine in this process while its guest runs, to a file on tmpfs;
//! read by machines in processes of their own (`fractus-agent vm --resume`, `--clone`). The peer is Debian's QEMU, which
//! writes its guest by a migration to a file, and reads all of it.
//!
//! A gap is the longest time in which the guest did not see its time stamp counter go on, in the second of the snapshot;
//! `lost` is how much of the guest's work of that second was not done, as time at the pace of the second before.

mod cold;

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use fractus_vmm::config::{ConsoleFiles, MachineConfig, MachineFiles};
use fractus_vmm::machine::{Machine, Scope, SnapshotReport};
use rustix::event::{PollFd, PollFlags};
use tempfile::TempDir;

use crate::figure::{Figure, median};
use crate::interrupt;
use crate::migrate::{Line, Peer, qemu};
use crate::process::{Running, Shares, built, probe, ready};

const MIB: u64 = 1 << 20;
const PEER: &str = "QEMU file";
const PATIENCE: Duration = Duration::from_secs(120);
/// Of it so much is touched, where it is not said.
const TOUCHED_MIB: u64 = 128;
const GUEST_MIB: u64 = 256;
const CLONES: usize = 20;
/// What an agent keeps with a machine without devices.
const NOTE: &[u8] = br#"{"version":1,"disks":[],"nets":[]}"#;

/// A machine in this process.
struct Guest {
    machine: Machine,
    serial: UnixStream,
    said: String,
}

impl Guest {
    fn start(mib: u64, command_line: &str) -> anyhow::Result<Self> {
        let (serial, end) = UnixStream::pair()?;
        serial.set_nonblocking(true)?;
        let mut config = MachineConfig::minimal(mib * MIB);
        config.command_line = command_line.to_owned();
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
        let files = MachineFiles {
            kvm: OwnedFd::from(kvm),
            kernel: Some(File::open(probe()?)?),
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
        let said = String::new();
        Ok(Self {
            machine,
            serial,
            said,
        })
    }

    /// Reads on until `found` finds something in what it has said.
    fn read_until<T>(&mut self, found: impl Fn(&str) -> Option<T>) -> anyhow::Result<T> {
        let by = Instant::now() + PATIENCE;
        loop {
            while self.machine.next_event().is_some() {}
            let mut bytes = [0; 4096];
            match self.serial.read(&mut bytes) {
                Ok(0) => bail!("the guest's serial line was closed"),
                Ok(count) => {
                    let text = bytes.get(..count).unwrap_or_default();
                    self.said.push_str(&String::from_utf8_lossy(text));
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            if let Some(found) = found(&self.said) {
                return Ok(found);
            }
            let bell = interrupt::bell().context("signals are not listened to")?;
            let mut fds = [
                PollFd::new(&self.serial, PollFlags::IN),
                PollFd::from_borrowed_fd(bell, PollFlags::IN),
                PollFd::from_borrowed_fd(self.machine.event_fd(), PollFlags::IN),
            ];
            let left = by.saturating_duration_since(Instant::now());
            if ready(&mut fds, left)? == 0 {
                bail!("the guest said nothing that was awaited: {}", self.said);
            }
            if !fds[1].revents().is_empty() {
                return Err(interrupt::error());
            }
        }
    }

    fn line_after(&mut self, second: u64) -> anyhow::Result<Line> {
        self.read_until(|said| Line::last(said).filter(|line| line.second > second))
    }

    fn write(&mut self, path: &Path) -> anyhow::Result<SnapshotReport> {
        self.write_of(Scope::Whole, path)
    }

    fn write_of(&mut self, scope: Scope, path: &Path) -> anyhow::Result<SnapshotReport> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true);
        Ok(self.machine.snapshot_of(scope, file.open(path)?, NOTE)?)
    }

    /// Has it touch so much of its memory.
    fn touch(&mut self, mib: u64) -> anyhow::Result<()> {
        self.said.clear();
        self.serial.write_all(format!("touch {mib}\n").as_bytes())?;
        self.read_until(has_touched)
    }
}

/// A folder whose files are in memory.
fn tmpfs() -> anyhow::Result<TempDir> {
    let mut builder = tempfile::Builder::new();
    Ok(builder.prefix("fractus-bench").tempdir_in("/dev/shm")?)
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// MiB that a file takes.
fn taken(path: &Path) -> anyhow::Result<f64> {
    Ok(path.metadata()?.blocks() as f64 * 512.0 / MIB as f64)
}

struct Rows(Vec<Figure>);

impl Rows {
    fn add(&mut self, name: String, unit: &'static str, values: Vec<f64>, limit: Option<f64>) {
        let rounds = values.len();
        self.0.push(Figure {
            name,
            unit,
            ours: median(values).unwrap_or(f64::NAN),
            peer: None,
            rounds,
            limit,
            ratio_limit: None,
        });
    }

    /// What the peer did, in the last row.
    fn beside(&mut self, values: Vec<f64>) {
        if let (Some(row), Some(value)) = (self.0.last_mut(), median(values)) {
            row.peer = Some((PEER, value));
        }
    }
}

/// Of a guest that only looks at its clock, idle but for that; then of one whose file is measured, and of one of which only
/// what has changed is written.
pub fn written(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    let folder = tmpfs()?;
    let mut rows = Rows(Vec::new());
    for (mib, touched) in [(GUEST_MIB, TOUCHED_MIB), (4096, 4 * TOUCHED_MIB)] {
        felt(folder.path(), rounds, mib, touched, &mut rows)?;
    }
    full(folder.path(), rounds, &mut rows)?;
    since(folder.path(), rounds, &mut rows)?;
    Ok(rows.0)
}

fn felt(
    folder: &Path,
    rounds: usize,
    mib: u64,
    touched: u64,
    rows: &mut Rows,
) -> anyhow::Result<()> {
    let path = folder.join("felt");
    let command_line = format!("tick_ms=0 run=\"touch {touched}; churn 0\"");
    let mut guest = Guest::start(mib, &command_line)?;
    let mut found = [const { Vec::new() }; 5];
    // What the first does not find in any cache is not counted.
    for round in 0..=rounds {
        let now = guest.line_after(0)?.second;
        guest.said.clear();
        // Nothing was written in the second before.
        let before = guest.line_after(now + 1)?.second;
        let report = guest.write(&path)?;
        let after = guest.line_after(before)?;
        let (gap_before, usual) = after.seconds(before, before)?;
        let (gap, turns) = after.seconds(before + 1, after.second)?;
        let seconds = (after.second - before) as f64;
        let values = [
            ms(report.pause),
            gap,
            gap_before,
            (1.0 - turns / usual) * seconds * 1e3,
            ms(report.whole),
        ];
        if round > 0 {
            for (found, value) in found.iter_mut().zip(values) {
                found.push(value);
            }
        }
    }
    let names = ["pause", "gap", "gap-before", "lost", "whole"];
    let limits = [Some(5.0), None, None, None, None];
    for ((name, values), limit) in names.into_iter().zip(found).zip(limits) {
        rows.add(format!("snapshot-{mib}-{name}"), "ms", values, limit);
    }
    std::fs::remove_file(&path)?;
    Ok(())
}

/// A guest of 256 MiB that touched 128 and waits.
fn touched_line() -> String {
    format!("tick_ms=0 run=\"touch {TOUCHED_MIB}\"")
}

fn has_touched(said: &str) -> Option<()> {
    said.contains("ok touch").then_some(())
}

fn full(folder: &Path, rounds: usize, rows: &mut Rows) -> anyhow::Result<()> {
    let mut guest = Guest::start(GUEST_MIB, &touched_line())?;
    guest.read_until(has_touched)?;
    let mut peer = quiet_peer(folder, &touched_line())?;
    let (path, other) = (folder.join("full"), folder.join("theirs"));
    let (mut times, mut their_times) = (Vec::new(), Vec::new());
    let (mut pauses, mut their_pauses) = (Vec::new(), Vec::new());
    let memory = vec![1; (TOUCHED_MIB << 20) as usize];
    let mut floors = Vec::new();
    for round in 0..=rounds {
        // A new file each time: what it takes to make room in it is part of it.
        let _ = std::fs::remove_file(&path);
        let report = guest.write(&path)?;
        let _ = std::fs::remove_file(&other);
        let info = write_peer(&mut peer, &other)?;
        if round > 0 {
            times.push(ms(report.whole));
            pauses.push(ms(report.pause));
            their_times.push(info.0);
            their_pauses.push(info.1);
            floors.push(bare(&folder.join("bare"), &memory)?);
        }
    }
    rows.add("snapshot-full".to_owned(), "ms", times, Some(60.0));
    rows.beside(their_times);
    rows.add("snapshot-full-pause".to_owned(), "ms", pauses, None);
    rows.beside(their_pauses);
    rows.add("snapshot-full-bare".to_owned(), "ms", floors, None);
    let file = vec![taken(&path)?];
    rows.add("snapshot-file".to_owned(), "MiB", file, Some(130.0));
    rows.beside(vec![taken(&other)?]);
    Ok(())
}

/// As many bytes to a new file there by nothing but `write`, in milliseconds: on some machines a new page is most of it.
fn bare(path: &Path, memory: &[u8]) -> anyhow::Result<f64> {
    let mut file = File::create_new(path)?;
    let began = Instant::now();
    for piece in memory.chunks(1 << 16) {
        file.write_all(piece)?;
    }
    let took = began.elapsed();
    std::fs::remove_file(path)?;
    Ok(ms(took))
}

/// Of what has changed of a guest since its last one.
const CHANGED_MIB: u64 = 4;

fn since(folder: &Path, rounds: usize, rows: &mut Rows) -> anyhow::Result<()> {
    let mut guest = Guest::start(GUEST_MIB, &touched_line())?;
    guest.read_until(has_touched)?;
    let path = folder.join("since");
    guest.write_of(Scope::Tracked, &path)?;
    let (mut times, mut pauses, mut sizes) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds {
        guest.touch(CHANGED_MIB)?;
        std::fs::remove_file(&path)?;
        let report = guest.write_of(Scope::Since, &path)?;
        if round > 0 {
            times.push(ms(report.whole));
            pauses.push(ms(report.pause));
            sizes.push(taken(&path)?);
        }
    }
    rows.add("snapshot-since".to_owned(), "ms", times, Some(5.0));
    rows.add("snapshot-since-pause".to_owned(), "ms", pauses, None);
    rows.add("snapshot-since-file".to_owned(), "MiB", sizes, Some(5.0));
    Ok(())
}

fn quiet_peer(folder: &Path, command_line: &str) -> anyhow::Result<Peer> {
    let command = qemu(GUEST_MIB, command_line)?;
    let mut peer = Peer::monitored(command, &folder.join("monitor"))?;
    peer.guest.read_until(&mut String::new(), has_touched)?;
    // As fast as it can.
    let most = serde_json::json!({"max-bandwidth": 1_u64 << 40});
    peer.tell("migrate-set-parameters", most)?;
    Ok(peer)
}

/// Writes QEMU's guest to a file, and lets it go on: milliseconds of all, and of its pause, as it says.
fn write_peer(peer: &mut Peer, path: &Path) -> anyhow::Result<(f64, f64)> {
    let look = Duration::from_millis(2);
    let to = format!("exec:cat > {}", path.display());
    let info = peer.migrate(&to, look)?;
    // It says that it is over before it is.
    let by = Instant::now() + PATIENCE;
    while peer.tell("query-status", serde_json::json!({}))?["status"] != "postmigrate" {
        if Instant::now() > by {
            bail!("QEMU's migration to a file is never over");
        }
        // sleeps because QEMU is asked about it
        std::thread::sleep(look);
    }
    peer.tell("cont", serde_json::json!({}))?;
    let number = |name: &str| {
        let number = info[name].as_f64();
        number.with_context(|| format!("no {name} in {info}"))
    };
    Ok((number("total-time")?, number("downtime")?))
}

/// What a guest goes on from.
struct Bed {
    _folder: TempDir,
    ours: PathBuf,
    theirs: PathBuf,
    config: PathBuf,
    command_line: String,
}

impl Bed {
    /// Guests that say something every millisecond.
    fn make() -> anyhow::Result<Self> {
        let folder = tmpfs()?;
        let at = |name: &str| folder.path().join(name);
        let (ours, theirs, config) = (at("ours"), at("theirs"), at("config"));
        let command_line = format!("tick_ms=1 run=\"touch {TOUCHED_MIB}\"");
        let machine = serde_json::json!({
            "machine": MachineConfig::minimal(GUEST_MIB * MIB),
            "kernel": probe()?,
        });
        std::fs::write(&config, machine.to_string())?;
        let mut guest = Guest::start(GUEST_MIB, &command_line)?;
        guest.read_until(has_touched)?;
        guest.write(&ours)?;
        drop(guest);
        let mut peer = quiet_peer(folder.path(), &command_line)?;
        write_peer(&mut peer, &theirs)?;
        Ok(Self {
            _folder: folder,
            ours,
            theirs,
            config,
            command_line,
        })
    }

    /// Ours, mapped (`--clone`) or read first (`--resume`).
    fn ours(&self, how: &str, bare: bool) -> anyhow::Result<Command> {
        let mut command = Command::new(built("fractus-agent")?);
        command.args(["vm", "--config"]).arg(&self.config);
        command.arg(how).arg(&self.ours);
        if bare {
            command.arg("--no-jail");
        }
        Ok(command)
    }

    fn theirs(&self) -> anyhow::Result<Command> {
        let mut command = qemu(GUEST_MIB, &self.command_line)?;
        let from = format!("exec:cat {}", self.theirs.display());
        command.args(["-incoming", &from]);
        Ok(command)
    }
}

/// Milliseconds from exec to the guest's next output; a jailed one's from when its process is started, as in
/// `vmm-start-jailed`.
pub fn restored(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    let bed = Bed::make()?;
    let whole = |mut command: Command| Running::start(&mut command)?.first_byte();
    let mut found = [const { Vec::new() }; 4];
    for round in 0..=rounds {
        let mut jailed = bed.ours("--clone", false)?;
        jailed.arg("--stamp");
        let values = [
            whole(bed.ours("--clone", true)?)?,
            Running::start_stamped(&mut jailed)?.first_byte_since_stamp()?,
            whole(bed.ours("--resume", true)?)?,
            whole(bed.theirs()?)?,
        ];
        if round > 0 {
            for (found, value) in found.iter_mut().zip(values) {
                found.push(ms(value));
            }
        }
    }
    let mut rows = Rows(Vec::new());
    let [lazy, jailed, eager, theirs] = found;
    for (name, values, limit) in [
        ("restore-lazy", lazy, Some(6.0)),
        ("restore-lazy-jailed", jailed, None),
        ("restore-eager", eager, None),
    ] {
        rows.add(name.to_owned(), "ms", values, limit);
        rows.beside(theirs.clone());
    }
    clones(&bed, &mut rows)?;
    cold::clones(rounds, &mut rows)?;
    Ok(rows.0)
}

/// How long after their start clones are looked at: each lets go of what only its start needed, and says a few lines.
const REST: Duration = Duration::from_secs(2);

/// MB of memory of each of many processes that go on from one file, guest and all.
fn clones(bed: &Bed, rows: &mut Rows) -> anyhow::Result<()> {
    let shares = |command: &dyn Fn() -> anyhow::Result<Command>| -> anyhow::Result<Vec<Shares>> {
        let mut running = Vec::new();
        for _ in 0..CLONES {
            let mut one = Running::start(&mut command()?)?;
            one.first_byte()?;
            running.push(one);
        }
        // sleeps because their memory after a rest is what is measured
        std::thread::sleep(REST);
        running.iter().map(Running::shares).collect()
    };
    let ours = shares(&|| bed.ours("--clone", false))?;
    let theirs = shares(&|| bed.theirs())?;
    let mb = |shares: &[Shares], of: fn(&Shares) -> u64| -> Vec<f64> {
        shares.iter().map(|one| of(one) as f64 / 1e6).collect()
    };
    let private: fn(&Shares) -> u64 = |shares| shares.private;
    let proportional: fn(&Shares) -> u64 = |shares| shares.proportional;
    for (name, of, limit) in [
        ("clone-private", private, Some(5.0)),
        ("clone-pss", proportional, None),
    ] {
        rows.add(name.to_owned(), "MB", mb(&ours, of), limit);
        rows.beside(mb(&theirs, of));
    }
    Ok(())
}
