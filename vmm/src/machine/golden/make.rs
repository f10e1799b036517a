//! Makes the golden streams of this build, beside those of the builds before:
//!
//! ```text
//! cargo test -p fractus-vmm --lib golden::make::streams -- --ignored
//! cargo test -p fractus-vmm --lib golden::make::seeds -- --ignored
//! ```
//!
//! The second makes the seeds of the fuzz target `receiver` of what the first made. It needs /dev/kvm. Nothing is replaced: one that
//! is wrong is taken away by hand before it is released, and never after.

use std::fs;
use std::io::{self, Cursor, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Golden, guest, host_cpu};
use crate::fuzzing::rig::every_device;
use crate::fuzzing::sparse::squeezed;
use crate::machine::fuzz::{NUMBERED, SEALED, SNAPSHOT};
use crate::machine::state::STATE_VERSION;
use crate::machine::{Luggage, Machine, Progress, Sender};
use crate::stream::converge::{AtLimit, Policy};
use crate::stream::frame::{FrameWriter, HEAD, Kind};
use crate::stream::snapshot::{Compression, Snapshot, SnapshotWriter};
use crate::stream::{BLOCK, FORMAT, packed};

/// Questions and random numbers before it is saved.
pub const BEFORE: u8 = 3;

/// Keeps what is sent, and says what a machine that arrived would.
struct Recorder {
    sent: Arc<Mutex<Vec<u8>>>,
    answer: Cursor<Vec<u8>>,
}

impl Read for Recorder {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.answer.read(buffer)
    }
}

impl Write for Recorder {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.sent.lock().unwrap().write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn sent(machine: Machine, owner: Vec<u8>) -> Vec<u8> {
    let mut answer = FrameWriter::new(Vec::new());
    answer.write(Kind::Ready, b"").unwrap();
    let sent = Arc::default();
    let recorder = Recorder {
        sent: Arc::clone(&sent),
        answer: Cursor::new(answer.finish()),
    };
    let policy = Policy {
        downtime: Duration::from_secs(1),
        longest: Duration::from_secs(60),
        limit: Duration::from_secs(60),
        at_limit: AtLimit::Stop,
        throttle: None,
    };
    let luggage = Luggage { owner, disks: true };
    let mut sender = Sender::begin(machine, recorder, policy, luggage).unwrap();
    loop {
        match sender.advance().unwrap() {
            Progress::Copying(more) => sender = more,
            Progress::Offered(offered) => {
                assert!(offered.doubt().is_none());
                break;
            }
        }
    }
    std::mem::take(&mut *sent.lock().unwrap())
}

#[test]
#[ignore = "writes to the source tree: run it for a release, or when a version was raised"]
fn streams() {
    let golden = Golden::of_this_build(1);
    if !golden.folder.exists() {
        placed(&golden);
    }
    compressed(&golden, &Golden::of_this_build(2));
}

/// The same snapshot in the other form; a live stream has none.
fn compressed(golden: &Golden, to: &Golden) {
    fs::create_dir(&to.folder).expect("one that is there stays as it is");
    fs::copy(golden.folder.join("stream"), to.folder.join("stream")).unwrap();
    let bytes = again(golden, Compression::Zstd);
    fs::write(to.folder.join("snapshot"), squeezed(&bytes)).unwrap();
}

/// A golden snapshot's file, written again.
pub(super) fn again(golden: &Golden, compression: Compression) -> Vec<u8> {
    let snapshot = Snapshot::open(super::file(&golden.snapshot())).unwrap();
    let opening = snapshot.opening().clone();
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(opening.memory).unwrap();
    snapshot.load(&memory).unwrap();
    let file = tempfile::tempfile().unwrap();
    let sink = file.try_clone().unwrap();
    let mut writer = SnapshotWriter::new(sink, opening, compression).unwrap();
    let mut content = vec![0; snapshot.opening().memory as usize];
    memory.read_exact_at(&mut content, 0).unwrap();
    for (number, block) in (0..).zip(content.chunks(BLOCK)) {
        writer.put(number, block).unwrap();
    }
    writer.finish(snapshot.state(), snapshot.owner()).unwrap();
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn placed(golden: &Golden) {
    fs::create_dir_all(Golden::all()).unwrap();
    fs::create_dir(&golden.folder).expect("one that is there stays as it is");
    let (files, mut serial) = guest::files();
    let (at, text) = guest::ON_DISK;
    files.disks[0].write_all_at(text, at).unwrap();
    let mut machine = Machine::build(every_device(), files, None).unwrap();
    machine.start().unwrap();
    guest::start_numbers(&machine);
    for count in 1..=BEFORE {
        guest::ask(&mut serial, count);
        guest::take_numbers(&machine, count.into());
    }
    let owner = host_cpu().into_bytes();
    let file = tempfile::tempfile().unwrap();
    machine.snapshot(file.try_clone().unwrap(), &owner).unwrap();
    let mut snapshot = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut snapshot, 0).unwrap();
    let stream = sent(machine, owner);
    for (name, bytes) in [("snapshot", &snapshot), ("stream", &stream)] {
        fs::write(golden.folder.join(name), squeezed(bytes)).unwrap();
    }
}

fn put(golden: &Golden, name: &str, mode: u8, bytes: &[u8]) {
    let name = format!("{name}_{}", golden.name());
    let input = [&[mode], squeezed(bytes).as_slice()].concat();
    fs::write(super::seeds().join(name), input).unwrap();
}

/// Of the newest golden streams; those of which it says so are refused.
#[test]
#[ignore = "writes to the source tree: run it after `streams`"]
fn seeds() {
    fs::create_dir_all(super::seeds()).unwrap();
    let all = SEALED | NUMBERED;
    for form in 1..=FORMAT {
        let golden = Golden::of_this_build(form);
        let snapshot = golden.snapshot();
        put(&golden, "snapshot", SNAPSHOT, &snapshot);
        put(&golden, "snapshot_sealed", SNAPSHOT | all, &snapshot);
        let cut = &snapshot[..snapshot.len() - 40];
        put(&golden, "refused_snapshot_cut", SNAPSHOT, cut);
    }
    // A live stream has no form.
    let golden = Golden::of_this_build(1);
    let put = |name: &str, mode: u8, bytes: &[u8]| put(&golden, name, mode, bytes);
    let stream = golden.stream();
    put("stream", 0, &stream);
    put("stream_sealed", all, &stream);
    put("refused_cut", 0, &stream[..stream.len() / 2]);
    let frames = super::frames(&stream);
    let mut swapped = frames.clone();
    swapped.swap(2, 3);
    put("refused_swapped", all, &swapped.concat());
    let mut twice = frames.clone();
    twice.insert(1, frames[0].clone());
    put("refused_twice", all, &twice.concat());
    let mut long = stream;
    long[4..8].copy_from_slice(&(3u32 << 20).to_le_bytes());
    put("refused_length", 0, &long);
    let mut other = every_device();
    other.memory.bytes *= 2;
    let version = STATE_VERSION.to_le_bytes();
    let payload = [version.as_slice(), &packed(&other).unwrap()].concat();
    let mut config = frames[1][..HEAD].to_vec();
    config[4..8].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    config.extend(payload);
    let mut shape = frames;
    shape[1] = config;
    put("refused_shape", all, &shape.concat());
}
