//! Makes golden streams of this build, beside those that there are:
//!
//! ```text
//! cargo test -p fractus-vmm --lib golden::make::streams -- --ignored
//! cargo test -p fractus-vmm --lib golden::make::seeds -- --ignored
//! ```
//!
//! The second makes the seeds of the fuzz target `receiver` of what the first made. It needs /dev/kvm. Nothing is replaced: one that
//! is wrong is taken away by hand before it is released, and never after.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Golden, guest, host_cpu};
use crate::fuzzing::rig::every_device;
use crate::fuzzing::sparse::squeezed;
use crate::machine::fuzz::{ANSWERS, LAZY, NUMBERED, PARCEL, SEALED, SNAPSHOT};
use crate::machine::state::STATE_VERSION;
use crate::machine::{
    Loading, Luggage, Machine, Paying, Progress, Scope, Sender, SnapshotOptions, fuzz, handover,
};
use crate::memory::PageSet;
use crate::stream::converge::{AtLimit, Policy};
use crate::stream::frame::{FrameReader, FrameWriter, HEAD, Kind};
use crate::stream::lane::Connections;
use crate::stream::snapshot::{Compression, Snapshot, SnapshotWriter};
use crate::stream::{BLOCK, FORMAT, Opening, StreamError, Target, live, packed, unpacked};

/// Questions and random numbers before it is saved.
pub const BEFORE: u8 = 3;

/// Keeps what is sent to whoever has the other end.
struct Recorder {
    line: UnixStream,
    sent: Arc<Mutex<Vec<u8>>>,
}

impl Read for Recorder {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.line.read(buffer)
    }
}

impl Write for Recorder {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let written = self.line.write(buffer)?;
        self.sent.lock().unwrap().extend(&buffer[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for Recorder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.line.as_fd()
    }
}

/// Memory that takes whatever comes.
struct Nowhere;

impl Target for Nowhere {
    fn length(&self) -> io::Result<u64> {
        Ok(u64::MAX)
    }

    fn put(&self, _: &[u8], _: u64) -> io::Result<()> {
        Ok(())
    }

    fn clear(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Says what a machine that arrived would.
fn answers(line: &UnixStream, has_lanes: bool) -> Result<(), StreamError> {
    let (mut frames, mut out) = (FrameReader::new(line), FrameWriter::new(line));
    let (mut owed, mut left, mut ended) = (PageSet::default(), 0, false);
    loop {
        match frames.next_frame()? {
            (Kind::Opening, opening) => owed = PageSet::new(unpacked::<Opening>(opening)?.memory),
            (Kind::Owed, payload) => live::add_owed(payload, &mut owed)?,
            (Kind::Sync, _) if has_lanes => out.write(Kind::Got, b"")?,
            (Kind::End, _) => {
                (left, ended) = (owed.count(), true);
                out.write(Kind::Ready, b"")?;
                if left == 0 {
                    return Ok(());
                }
            }
            (Kind::Pages, payload) if ended => {
                let came = live::put(payload, &Nowhere, u64::MAX)?;
                left -= came.pages + came.zeros;
                out.write(Kind::Got, b"")?;
                if left == 0 {
                    out.write(Kind::Whole, b"")?;
                }
            }
            (Kind::Whole, _) => return Ok(()),
            _ => {}
        }
    }
}

/// What goes by the stream itself and then by each lane; the machine goes on.
fn sent(
    machine: Machine,
    owner: &[u8],
    lanes: usize,
    at_limit: AtLimit,
) -> (Machine, Vec<Vec<u8>>) {
    let policy = Policy {
        downtime: Duration::from_secs(1),
        longest: Duration::from_secs(60),
        limit: match at_limit {
            AtLimit::PostCopy => Duration::ZERO,
            _ => Duration::from_secs(60),
        },
        at_limit,
        throttle: None,
    };
    let luggage = Luggage {
        owner: owner.to_vec(),
        disks: true,
    };
    let mut all = Vec::new();
    let mut recorder = |listens: Box<dyn FnOnce(UnixStream) + Send>| {
        let (line, far) = UnixStream::pair().unwrap();
        std::thread::spawn(move || listens(far));
        let sent: Arc<Mutex<Vec<u8>>> = Arc::default();
        all.push(Arc::clone(&sent));
        Recorder { line, sent }
    };
    let main = recorder(Box::new(move |line| answers(&line, lanes > 0).unwrap()));
    let lanes = (0..lanes).map(|_| {
        recorder(Box::new(|mut line| {
            io::copy(&mut line, &mut io::sink()).unwrap();
        }))
    });
    let lanes = lanes.collect();
    let mut sender =
        Sender::begin_by(machine, Connections { main, lanes }, policy, luggage).unwrap();
    let mut offered = loop {
        match sender.advance().unwrap() {
            Progress::Copying(more) => sender = more,
            Progress::Offered(offered) => break offered,
        }
    };
    assert!(offered.doubt().is_none());
    assert_eq!(offered.owes(), at_limit == AtLimit::PostCopy);
    while offered.pay().unwrap() != Paying::Paid {}
    let machine = offered.take_back().unwrap();
    let all = all
        .iter()
        .map(|sent| std::mem::take(&mut *sent.lock().unwrap()));
    (machine, all.collect())
}

#[test]
#[ignore = "writes to the source tree: run it for a release, or when this build writes what no golden stream has"]
fn streams() {
    fs::create_dir_all(Golden::all()).unwrap();
    let pair = |number| [1, 2].map(|form| Golden::of_this_build(form, number));
    let is_free = |pair: &[Golden; 2]| pair.iter().all(|golden| !golden.folder.exists());
    // One that is there stays as it is.
    let pair = (1..).map(pair).find(is_free).unwrap();
    for golden in &pair {
        fs::create_dir(&golden.folder).unwrap();
    }
    let [placed, packed] = &pair;
    made(placed, packed);
    // The same snapshot in the other form; a live stream has none.
    packed.put("snapshot", &again(placed, Compression::Zstd));
}

impl Golden {
    fn put(&self, name: &str, bytes: &[u8]) {
        fs::write(self.folder.join(name), squeezed(bytes)).unwrap();
    }
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

/// Asks a machine, for the `count`-th time, for all that it can do.
fn ask(machine: &Machine, serial: &mut UnixStream, count: u8) {
    guest::ask(serial, count);
    guest::take_numbers(machine, count.into());
}

fn snapshot(machine: &mut Machine, options: impl Into<SnapshotOptions>, owner: &[u8]) -> Vec<u8> {
    let file = tempfile::tempfile().unwrap();
    let to = file.try_clone().unwrap();
    machine.snapshot_of(options, to, owner).unwrap();
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// All of one guest, which is asked once more before each snapshot that is laid over another.
fn made(placed: &Golden, packed: &Golden) {
    let (files, mut serial) = guest::files();
    let (at, text) = guest::ON_DISK;
    files.disks[0].write_all_at(text, at).unwrap();
    let mut machine = Machine::build(every_device(), files, None).unwrap();
    machine.start().unwrap();
    guest::start_numbers(&machine);
    for count in 1..=BEFORE {
        ask(&machine, &mut serial, count);
    }
    let owner = host_cpu().into_bytes();
    let streams = [
        ("stream", 0, AtLimit::Stop),
        ("follows", 0, AtLimit::PostCopy),
        ("laned", 2, AtLimit::Stop),
    ];
    for (name, lanes, at_limit) in streams {
        let (back, sent) = sent(machine, &owner, lanes, at_limit);
        machine = back;
        let (main, lanes) = sent.split_first().unwrap();
        placed.put(name, main);
        for (lane, bytes) in lanes.iter().enumerate() {
            placed.put(&format!("lane{lane}"), bytes);
        }
    }
    let whole = snapshot(&mut machine, Scope::Tracked, &owner);
    placed.put("snapshot", &whole);
    placed.put("unchecked", &unchecked(&whole, &owner));
    ask(&machine, &mut serial, BEFORE + 1);
    placed.put("over", &snapshot(&mut machine, Scope::Since, &owner));
    ask(&machine, &mut serial, BEFORE + 2);
    let compressed = SnapshotOptions {
        compression: Compression::Zstd,
        ..Scope::Since.into()
    };
    packed.put("over", &snapshot(&mut machine, compressed, &owner));
}

/// Of a machine whose memory is a file that nobody has checked.
fn unchecked(whole: &[u8], owner: &[u8]) -> Vec<u8> {
    let file = fuzz::read_only(&super::file(whole)).unwrap();
    let of = Snapshot::open(file).unwrap();
    let (files, _serial) = guest::files();
    let machine = Machine::from_snapshot(&of, &every_device(), files, Loading::Lazy, None);
    snapshot(&mut machine.unwrap(), Scope::Whole, owner)
}

fn put(golden: &Golden, name: &str, mode: u8, bytes: &[u8]) {
    let name = format!("{name}_{}", golden.name());
    let input = [&[mode], squeezed(bytes).as_slice()].concat();
    fs::write(super::seeds().join(name), input).unwrap();
}

/// What is said of memory that follows: each word that there is, in the end that all is there.
fn said(whole: &[u8]) -> Vec<u8> {
    let mut out = FrameWriter::new(Vec::new());
    words(&mut out, whole);
    out.finish()
}

fn words(out: &mut FrameWriter<Vec<u8>>, whole: &[u8]) {
    for number in [5, 7, u64::MAX] {
        out.write(Kind::Wanted, &number.to_le_bytes()).unwrap();
        out.write(Kind::Got, b"").unwrap();
    }
    out.write(Kind::Ready, b"").unwrap();
    out.write(Kind::Whole, whole).unwrap();
}

/// The same by another connection.
fn said_anew() -> Vec<u8> {
    let mut out = FrameWriter::new(Vec::new());
    let mut lacks = PageSet::new(64 * BLOCK as u64);
    lacks.add_range(3 * BLOCK as u64, 20 * BLOCK as u64);
    for payload in live::owed(&lacks) {
        out.write(Kind::Owed, &payload).unwrap();
    }
    out.write(Kind::Ready, b"").unwrap();
    words(&mut out, b"");
    out.finish()
}

/// Of the newest golden streams; those whose names say so are refused.
#[test]
#[ignore = "writes to the source tree: run it after `streams`"]
fn seeds() {
    fs::create_dir_all(super::seeds()).unwrap();
    let all = SEALED | NUMBERED;
    let newest = |form| {
        let mut goldens = super::goldens();
        goldens.retain(|golden| golden.form == form);
        goldens.pop().unwrap()
    };
    for form in 1..=FORMAT {
        let golden = newest(form);
        let snapshot = golden.snapshot();
        put(&golden, "snapshot", SNAPSHOT, &snapshot);
        put(&golden, "snapshot_sealed", SNAPSHOT | all, &snapshot);
        let cut = &snapshot[..snapshot.len() - 40];
        put(&golden, "refused_snapshot_cut", SNAPSHOT, cut);
    }
    // A live stream has no form.
    let golden = newest(1);
    let put = |name: &str, mode: u8, bytes: &[u8]| put(&golden, name, mode, bytes);
    put("answers", ANSWERS, &said(b""));
    put("answers_anew", ANSWERS | LAZY, &said_anew());
    put("refused_answers", ANSWERS, &said(b"?"));
    let parcel = [&[PARCEL], handover::parcel_seed().as_slice()].concat();
    let name = format!("parcel_{}", golden.name());
    fs::write(super::seeds().join(name), parcel).unwrap();
    let follows = golden.read("follows");
    put("follows", 0, &follows);
    put("follows_sealed", all, &follows);
    put("refused_follows_cut", 0, &follows[..follows.len() - 40]);
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
