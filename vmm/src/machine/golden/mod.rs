//! Golden streams: what earlier builds wrote, checked in, and this one has to read.
//!
//! Each release has a folder for each form, and more where a build came to write what none has. In it is a snapshot's
//! file, and perhaps a live stream (which has no form) and others ([`Golden::machines`]), all written small ([`sparse`]);
//! [`make`] says how they are made. All are of one guest ([`guest`]), so that what they hold is known. None is ever
//! replaced, and each has to load.

mod arrive;
mod damage;
mod guest;
mod make;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::fuzz::{self, board};
use super::receive::{Gathered, gather};
use super::snapshot::loaded;
use super::*;
use crate::cpu::VcpuState;
use crate::fuzzing::rig::{DISK, every_device};
use crate::fuzzing::sparse;
use crate::memory::Faults;
use crate::stream::frame::{self, FrameReader, Kind};
use crate::stream::snapshot::Snapshot;
use crate::stream::{FORMAT, Opening, StreamError, live, unpacked};
use arrive::{arrive, arrive_by, arrive_in_full, arrive_with, file, open, open_over};
use make::BEFORE;
use state::STATE_VERSION;

/// Seeds of the receiver's fuzz target.
fn seeds() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/receiver")
}

/// Streams of a release.
struct Golden {
    folder: PathBuf,
    /// Of the stream, of the machine's state.
    form: u32,
    state: u32,
    /// Which of those of the same release, form and state.
    number: u32,
}

/// What a golden stream is of: what it is called, its parts, and how often its guest had been asked.
struct Saved {
    what: String,
    state: MachineState,
    memory: GuestMemory,
    asked: u8,
}

impl Golden {
    /// Where they all are.
    fn all() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
    }

    fn of_this_build(form: u32, number: u32) -> Golden {
        let release = env!("CARGO_PKG_VERSION");
        let mut name = format!("{release}-form{form}-state{STATE_VERSION}");
        if number > 1 {
            name = format!("{name}-{number}");
        }
        Golden::named(&name).unwrap()
    }

    /// `RELEASE-formN-stateN`, then `RELEASE-formN-stateN-2` and so on.
    fn named(name: &str) -> Option<Golden> {
        let (release, state) = name.rsplit_once("-state")?;
        let (_, form) = release.rsplit_once("-form")?;
        let (state, number) = state.split_once('-').unwrap_or((state, "1"));
        Some(Golden {
            folder: Golden::all().join(name),
            form: form.parse().ok()?,
            state: state.parse().ok()?,
            number: number.parse().ok()?,
        })
    }

    fn name(&self) -> String {
        let name = self.folder.file_name().unwrap();
        name.to_str().unwrap().to_owned()
    }

    fn has(&self, name: &str) -> bool {
        self.folder.join(name).exists()
    }

    fn read(&self, name: &str) -> Vec<u8> {
        let squeezed = fs::read(self.folder.join(name)).unwrap();
        sparse::spread(&squeezed, 64 << 20)
    }

    fn stream(&self) -> Vec<u8> {
        self.read("stream")
    }

    /// The lanes of its stream `laned`.
    fn lanes(&self) -> Vec<Vec<u8>> {
        let names = (0..).map(|lane| format!("lane{lane}"));
        let names = names.take_while(|name| self.has(name));
        names.map(|name| self.read(&name)).collect()
    }

    /// How its snapshot's memory may come: what is compressed is not mapped.
    fn loadings(&self) -> &'static [Loading] {
        match self.form {
            1 => &[Loading::Eager, Loading::Lazy],
            _ => &[Loading::Eager],
        }
    }

    /// With its holes filled.
    fn snapshot(&self) -> Vec<u8> {
        self.read("snapshot")
    }

    /// All files that others may be laid over.
    fn snapshots(&self) -> Vec<Vec<u8>> {
        let names = ["snapshot", "over"].into_iter();
        let names = names.filter(|name| self.has(name));
        names.map(|name| self.read(name)).collect()
    }

    /// All that its files are of, each by each way in which it may come.
    fn machines(&self) -> Vec<Saved> {
        let mut all = Vec::new();
        let mut add = |name: &str, asked, state, memory| {
            let what = format!("{} of {}", name, self.name());
            all.push(Saved {
                what,
                state,
                memory,
                asked,
            });
        };
        for name in ["snapshot", "unchecked"]
            .into_iter()
            .filter(|it| self.has(it))
        {
            for loading in self.loadings() {
                let (_, state, memory) = open(&self.read(name), *loading).unwrap();
                add(name, BEFORE, state, memory);
            }
        }
        if self.has("over") {
            // What is the first of its chain is of form 1.
            for loading in [Loading::Eager, Loading::Lazy] {
                let (state, memory) = open_over(&self.read("over"), loading);
                let asked = BEFORE + self.form as u8;
                add("over", asked, state, memory);
            }
        }
        if self.has("stream") {
            let Gathered { state, memory, .. } = arrive(&self.stream()).unwrap();
            add("stream", BEFORE, state, memory);
        }
        if self.has("follows") {
            let Gathered { state, memory, .. } = arrive_in_full(&self.read("follows"));
            add("follows", BEFORE, state, memory);
        }
        if self.has("laned") {
            let came = arrive_by(&self.read("laned"), self.lanes()).unwrap();
            add("laned", BEFORE, came.state, came.memory);
        }
        all
    }
}

/// All there are, the newest last.
fn goldens() -> Vec<Golden> {
    let entries = fs::read_dir(Golden::all()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut goldens: Vec<_> = names
        .map(|name| Golden::named(&name).expect("RELEASE-formN-stateN, or a number behind it"))
        .collect();
    goldens.sort_by_key(|golden| (golden.state, golden.number, golden.name()));
    assert!(!goldens.is_empty());
    goldens
}

/// Those with a live stream.
fn with_streams() -> Vec<Golden> {
    let all = goldens().into_iter();
    all.filter(|golden| golden.has("stream")).collect()
}

/// Each frame of a stream, with its head.
fn frames(stream: &[u8]) -> Vec<Vec<u8>> {
    let (mut rest, mut frames) = (stream, Vec::new());
    while let Some(head) = rest.first_chunk::<{ frame::HEAD }>() {
        let length = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        let (frame, behind) = rest.split_at(frame::HEAD + length as usize);
        frames.push(frame.to_vec());
        rest = behind;
    }
    frames
}

/// Their kinds, up to the end.
fn kinds(stream: &[u8]) -> Vec<Kind> {
    let (mut reader, mut kinds) = (FrameReader::new(stream), Vec::new());
    while kinds.last() != Some(&Kind::End) {
        kinds.push(reader.next_frame().unwrap().0);
    }
    kinds
}

/// Which CPU and kernel a saved vCPU is of, as far as it matters to KVM.
fn host_cpu() -> String {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap();
    let field = |name: &str| {
        let line = cpus
            .lines()
            .find(|line| line.split('\t').next() == Some(name));
        let value = line.and_then(|line| line.split_once(": "));
        value.map_or("?", |(_, value)| value)
    };
    let names = ["vendor_id", "cpu family", "model", "stepping"].map(field);
    let flags = crc32fast::hash(field("flags").as_bytes());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    format!(
        "{}, flags {flags:08x}, Linux {}",
        names.join(" "),
        kernel.trim()
    )
}

/// Checks a saved machine and its memory against what the guest had done.
fn check(state: &MachineState, memory: &GuestMemory, asked: u8) {
    assert_eq!(*state.config(), every_device());
    guest::check(memory, asked, asked.into());
    let [first, second] = state.vcpus.as_slice() else {
        panic!("{} vCPUs", state.vcpus.len());
    };
    assert!(first.is_started() && !second.is_started());
    assert_eq!(first.registers().rbx, u64::from(asked));
    let code = u64::from(tests::common::CODE);
    assert!((code..code + 0x1000).contains(&first.registers().rip));
    assert!(state.clock.clock > 0);
    assert_eq!(state.placement.disks(), ["disk0"]);
    assert_eq!(state.placement.nets(), ["net0"]);
    let mut ids: Vec<_> = state.devices.iter().map(|device| &*device.id).collect();
    ids.sort_unstable();
    let all = [
        "balloon0",
        "console0",
        "disk0",
        "ioapic",
        "memory0",
        "net0",
        "pci0",
        "power",
        "processors",
        "rng0",
        "rtc",
        "serial0",
        "slots",
        "vsock0",
        "watchdog",
    ];
    assert_eq!(ids, all);
}

/// Each record of each device is read, by the device, and would be written the same.
fn check_devices(state: MachineState, memory: GuestMemory) {
    let saved = state.devices.clone();
    let rig = board(state, memory, &guest::files_without_kvm()).unwrap();
    let again: Vec<_> = rig
        .devices
        .iter()
        .map(|device| device.save().unwrap())
        .collect();
    for (saved, again) in saved.iter().zip(&again) {
        assert_eq!(saved, again);
    }
    assert_eq!(saved.len(), again.len());
}

#[test]
fn this_builds_versions_have_golden_streams() {
    for form in 1..=FORMAT {
        assert!(
            goldens()
                .iter()
                .any(|golden| (golden.form, golden.state) == (form, STATE_VERSION)),
            "no golden streams of form {form}, state {STATE_VERSION}: make them, see golden/make.rs"
        );
    }
}

/// A new kind needs streams in which it is.
#[test]
fn whatever_this_build_sends_is_in_a_golden_stream() {
    // Said by the other side.
    let mut seen = vec![Kind::Ready, Kind::Refused, Kind::Wanted, Kind::Got];
    for golden in goldens() {
        for name in ["stream", "follows", "laned", "lane0"] {
            if golden.has(name) {
                seen.extend(kinds_of_all(&golden.read(name)));
            }
        }
        for bytes in golden.snapshots() {
            let range = damage::frames_in(&bytes);
            seen.extend(kinds_of_all(&bytes[range]));
        }
    }
    let missing = Kind::ALL.into_iter().filter(|kind| !seen.contains(kind));
    assert_eq!(missing.collect::<Vec<_>>(), []);
}

fn kinds_of_all(stream: &[u8]) -> Vec<Kind> {
    let mut reader = FrameReader::new(stream);
    let count = frames(stream).len();
    (0..count).map(|_| reader.next_frame().unwrap().0).collect()
}

#[test]
fn every_frame_of_a_golden_stream_is_what_was_sent() {
    for golden in with_streams() {
        let stream = golden.stream();
        let mut reader = FrameReader::new(stream.as_slice());
        let mut kinds: Vec<Kind> = Vec::new();
        let mut marks = 0;
        while kinds.last() != Some(&Kind::End) {
            let (kind, payload) = reader.next_frame().unwrap();
            match kind {
                Kind::Opening => {
                    let opening: Opening = unpacked(payload).unwrap();
                    assert!(
                        golden
                            .name()
                            .starts_with(opening.made_by.trim_start_matches("fractus-vmm "))
                    );
                    assert_eq!(opening.base, None);
                }
                Kind::Config => {
                    let (version, config) = payload.split_at(4);
                    assert_eq!(version, golden.state.to_le_bytes());
                    assert_eq!(unpacked::<MachineConfig>(config).unwrap(), every_device());
                }
                Kind::Disks => assert_eq!(unpacked::<Vec<u64>>(payload).unwrap(), [DISK]),
                Kind::Blocks => {
                    let (disk, rest) = live::of_disk(payload).unwrap();
                    assert_eq!((disk, rest.len()), (0, 8 + 4096));
                }
                Kind::State => assert_eq!(payload[..4], golden.state.to_le_bytes()),
                Kind::Mark => {
                    unpacked::<clocks::Mark>(payload).unwrap();
                    marks += 1;
                    continue;
                }
                Kind::End => {
                    let ending: live::Ending = unpacked(payload).unwrap();
                    assert!(ending.ran && ending.disks.pages == 1 && ending.memory.pages > 0);
                }
                _ => {}
            }
            kinds.push(kind);
        }
        assert!(reader.is_at_end().unwrap());
        // The first ones were made when there was none: one in the beginning, behind each round, and in the end.
        assert!(marks >= 3 || golden.number == 1, "{marks} marks");
        kinds.dedup();
        let (before, after) = kinds.split_at(4);
        assert_eq!(
            before,
            [Kind::Opening, Kind::Config, Kind::Owner, Kind::Disks]
        );
        assert_eq!(
            after,
            [
                Kind::Blocks,
                Kind::Pages,
                Kind::Sync,
                Kind::State,
                Kind::End
            ]
        );
    }
}

#[test]
fn a_golden_stream_is_the_machine_that_was_sent() {
    for golden in with_streams() {
        let files = guest::files_without_kvm();
        let disk = files.disks[0].try_clone().unwrap();
        let gathered = arrive_with(&golden.stream(), files).unwrap();
        assert!(gathered.ran && gathered.disks.pages == 1);
        assert_eq!(gathered.owed.count(), 0);
        let (at, text) = guest::ON_DISK;
        let mut found = vec![0; text.len()];
        disk.read_exact_at(&mut found, at).unwrap();
        assert_eq!(found, text);
    }
}

/// Whoever raises a version brings a reader of what was written before: a machine is not to be lost by an update.
#[test]
fn every_golden_stream_there_is_loads_and_is_its_machine() {
    let mut count = 0;
    for golden in goldens() {
        for Saved {
            what,
            state,
            memory,
            asked,
        } in golden.machines()
        {
            println!("{what}");
            check(&state, &memory, asked);
            check_devices(state, memory);
            count += 1;
        }
    }
    // Whole snapshots by each way in which they come, and live streams.
    assert!(count >= 5, "{count}");
}

#[test]
fn a_golden_snapshot_says_what_it_is() {
    let all = goldens();
    let pairs = (all.iter()).flat_map(|it| it.loadings().iter().map(move |loading| (it, loading)));
    for (golden, loading) in pairs {
        let (snapshot, _, memory) = open(&golden.snapshot(), *loading).unwrap();
        assert_eq!(memory.is_settled(), *loading == Loading::Eager);
        let mapped = golden.loadings().contains(&Loading::Lazy);
        assert_eq!(snapshot.compression() == Compression::None, mapped);
        assert_eq!(snapshot.opening().base, None);
        assert!(snapshot.totals().pages > 0 && snapshot.totals().zeros == 0);
        assert!(!snapshot.owner().is_empty());
        // What is mapped nobody has checked.
        assert!(!snapshot.is_unchecked());
        assert_eq!(memory.is_unchecked(), *loading == Loading::Lazy);
        if golden.has("unchecked") {
            let (snapshot, _, memory) = open(&golden.read("unchecked"), *loading).unwrap();
            assert!(snapshot.is_unchecked() && memory.is_unchecked());
        }
    }
}

/// What zstd makes of a block is its own affair; all else is as it was.
#[test]
fn a_golden_snapshot_is_written_the_same_again() {
    for golden in goldens() {
        let placed = make::again(&golden, Compression::None);
        if golden.form == 1 {
            assert!(placed == golden.snapshot());
        }
        let packed = make::again(&golden, Compression::Zstd);
        let (_, state, memory) = open(&packed, Loading::Eager).unwrap();
        check(&state, &memory, BEFORE);
    }
}

#[test]
fn a_golden_snapshot_that_is_compressed_is_not_mapped() {
    for golden in goldens().iter().filter(|golden| golden.form == 2) {
        let refused = open(&golden.snapshot(), Loading::Lazy).err();
        let found = matches!(refused, Some(SnapshotError::Compressed));
        assert!(found, "{refused:?}");
    }
}

/// The golden machine on KVM; `vcpus` makes its vCPUs from the saved ones.
fn go_on(
    golden: &Golden,
    vcpus: impl Fn(Vec<VcpuState>) -> Vec<VcpuState>,
) -> Result<(), BuildError> {
    for saved in golden.machines() {
        let Saved {
            mut state,
            memory,
            asked,
            ..
        } = saved;
        let (files, mut serial) = guest::files();
        state.vcpus = vcpus(state.vcpus);
        let mut machine = build::restore(state, memory, files, None)?;
        machine.resume().unwrap();
        guest::ask(&mut serial, asked + 1);
        guest::take_numbers(&machine, u16::from(asked) + 1);
        guest::check(machine.memory(), asked + 1, u16::from(asked) + 1);
        guest::ask(&mut serial, asked + 2);
    }
    Ok(())
}

/// Says past what keeps the output of tests that pass.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "golden streams: {text}");
}

/// What a host's CPU and kernel decide (MSRs, extended state) is as here.
#[test]
fn a_golden_guest_goes_on_on_any_host() {
    if !Path::new("/dev/kvm").exists() {
        return say("no /dev/kvm: nothing was tested");
    }
    let (files, _serial) = guest::files();
    let mut fresh = Machine::build(every_device(), files, None).unwrap();
    fresh.start().unwrap();
    fresh.pause().unwrap();
    let here = fresh.save().unwrap().vcpus;
    for golden in goldens() {
        let as_here = |saved: Vec<VcpuState>| {
            let pairs = saved.into_iter().zip(&here);
            pairs.map(|(saved, here)| saved.on_cpu_of(here)).collect()
        };
        go_on(&golden, as_here).unwrap();
    }
}

/// All of it is as it was saved: on such a host as it was saved on KVM takes it, on another it may refuse.
#[test]
fn a_golden_guest_goes_on_with_all_that_was_saved_on_a_host_like_its_own() {
    if !Path::new("/dev/kvm").exists() {
        return say("no /dev/kvm: nothing was tested");
    }
    let here = host_cpu();
    for golden in goldens() {
        let (snapshot, ..) = open(&golden.snapshot(), Loading::Eager).unwrap();
        let there = String::from_utf8(snapshot.owner().to_vec()).unwrap();
        match go_on(&golden, |saved| saved) {
            Ok(()) => {}
            Err(BuildError::Vcpus(error)) if here != there => say(&format!(
                "{}: nothing was tested of its whole vCPUs: they are of {there}, this is {here}: {error}",
                golden.name()
            )),
            Err(error) => panic!("{}: {error:?}", golden.name()),
        }
    }
}

#[test]
fn a_seed_of_a_whole_stream_comes_as_far_as_a_board_and_others_do_not() {
    for entry in fs::read_dir(seeds()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let of = |golden: &Golden| name.ends_with(&golden.name());
        assert!(goldens().iter().any(of), "{name} is of no golden stream");
        if name.starts_with("follows") && Faults::open().is_err() {
            say("no userfaultfd: nothing was tested of memory that follows");
            continue;
        }
        let input = fs::read(&path).unwrap();
        let (mode, squeezed) = input.split_first().unwrap();
        let came = fuzz::receive(*mode, squeezed);
        let came = came.map_err(|error| error.to_string());
        println!("{name}: {came:?}");
        assert_eq!(
            came.is_err(),
            name.starts_with("refused"),
            "{name}: {came:?}"
        );
    }
}
