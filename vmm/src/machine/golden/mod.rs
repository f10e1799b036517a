//! Golden streams: what earlier builds wrote, checked in, and this one has to read.
//!
//! Each release has a folder for each form, with a snapshot's file and a live stream (which has no form), written small
//! ([`sparse`]); [`make`] says how they are made. All are of one guest ([`guest`]), so that what they hold is known.

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
use crate::stream::frame::{self, FrameReader, Kind};
use crate::stream::snapshot::Snapshot;
use crate::stream::{FORMAT, Opening, StreamError, live, unpacked};
use make::BEFORE;
use state::STATE_VERSION;

/// Seeds of the receiver's fuzz target.
fn seeds() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds/receiver")
}

/// The streams of a release.
struct Golden {
    folder: PathBuf,
    /// Of the stream, of the machine's state.
    form: u32,
    state: u32,
}

impl Golden {
    /// Where they all are.
    fn all() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
    }

    fn of_this_build(form: u32) -> Golden {
        let release = env!("CARGO_PKG_VERSION");
        let name = format!("{release}-form{form}-state{STATE_VERSION}");
        Golden::named(&name).unwrap()
    }

    /// `RELEASE-formN-stateN`.
    fn named(name: &str) -> Option<Golden> {
        let (release, state) = name.rsplit_once("-state")?;
        let (_, form) = release.rsplit_once("-form")?;
        Some(Golden {
            folder: Golden::all().join(name),
            form: form.parse().ok()?,
            state: state.parse().ok()?,
        })
    }

    fn name(&self) -> String {
        let name = self.folder.file_name().unwrap();
        name.to_str().unwrap().to_owned()
    }

    /// A build that reads an older state says so here: then all that follows is tried with it.
    fn is_read(&self) -> bool {
        (1..=FORMAT).contains(&self.form) && self.state == STATE_VERSION
    }

    fn read(&self, name: &str) -> Vec<u8> {
        let squeezed = fs::read(self.folder.join(name)).unwrap();
        sparse::spread(&squeezed, 64 << 20)
    }

    fn stream(&self) -> Vec<u8> {
        self.read("stream")
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
}

fn goldens() -> Vec<Golden> {
    let entries = fs::read_dir(Golden::all()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut goldens: Vec<_> = names
        .map(|name| Golden::named(&name).expect("RELEASE-formN-stateN"))
        .collect();
    goldens.sort_by_key(Golden::name);
    assert!(!goldens.is_empty());
    goldens
}

/// Those that this build reads.
fn read() -> Vec<Golden> {
    goldens().into_iter().filter(Golden::is_read).collect()
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

fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

/// What a stream brings, without a machine.
fn arrive(stream: &[u8]) -> Result<Gathered, MigrationError> {
    let files = guest::files_without_kvm();
    arrive_with(stream, files)
}

fn arrive_with(stream: &[u8], files: MachineFiles) -> Result<Gathered, MigrationError> {
    let most = vec![DISK; files.disks.len()];
    let land = |_: &[u8]| Ok(fuzz::landing(files, most));
    gather(
        &mut FrameReader::new(stream),
        &every_device(),
        land,
        |_, _, _, _| Ok(Default::default()),
        |_| Ok(()),
    )
}

/// The same of a snapshot's file.
fn open(
    bytes: &[u8],
    loading: Loading,
) -> Result<(Snapshot, MachineState, GuestMemory), SnapshotError> {
    let snapshot = Snapshot::open(fuzz::read_only(&file(bytes)).unwrap())?;
    let (state, memory) = loaded(&[&snapshot], &every_device(), loading)?;
    Ok((snapshot, state, memory))
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
fn check(state: &MachineState, memory: &GuestMemory) {
    assert_eq!(*state.config(), every_device());
    guest::check(memory, BEFORE, BEFORE.into());
    let [first, second] = state.vcpus.as_slice() else {
        panic!("{} vCPUs", state.vcpus.len());
    };
    assert!(first.is_started() && !second.is_started());
    assert_eq!(first.registers().rbx, u64::from(BEFORE));
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
            read().iter().any(|golden| golden.form == form),
            "no golden streams of form {form}, state {STATE_VERSION}: make them, see golden/make.rs"
        );
    }
}

#[test]
fn every_frame_of_a_golden_stream_is_what_was_sent() {
    for golden in read() {
        let stream = golden.stream();
        let mut reader = FrameReader::new(stream.as_slice());
        let mut kinds: Vec<Kind> = Vec::new();
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
                Kind::End => {
                    let ending: live::Ending = unpacked(payload).unwrap();
                    assert!(ending.ran && ending.disks.pages == 1 && ending.memory.pages > 0);
                }
                _ => {}
            }
            kinds.push(kind);
        }
        assert!(reader.is_at_end().unwrap());
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
    for golden in read() {
        let files = guest::files_without_kvm();
        let disk = files.disks[0].try_clone().unwrap();
        let gathered = arrive_with(&golden.stream(), files).unwrap();
        assert!(gathered.ran && gathered.disks.pages == 1);
        check(&gathered.state, &gathered.memory);
        let (at, text) = guest::ON_DISK;
        let mut found = vec![0; text.len()];
        disk.read_exact_at(&mut found, at).unwrap();
        assert_eq!(found, text);
        check_devices(gathered.state, gathered.memory);
    }
}

#[test]
fn a_golden_snapshot_is_the_machine_that_was_written() {
    let all = read();
    let pairs = (all.iter()).flat_map(|it| it.loadings().iter().map(move |loading| (it, loading)));
    for (golden, loading) in pairs {
        let (snapshot, state, memory) = open(&golden.snapshot(), *loading).unwrap();
        assert_eq!(memory.is_settled(), *loading == Loading::Eager);
        let mapped = golden.loadings().contains(&Loading::Lazy);
        assert_eq!(snapshot.compression() == Compression::None, mapped);
        assert_eq!(snapshot.opening().base, None);
        assert!(snapshot.totals().pages > 0 && snapshot.totals().zeros == 0);
        assert!(!snapshot.owner().is_empty());
        check(&state, &memory);
        check_devices(state, memory);
    }
}

/// What zstd makes of a block is its own affair; all else is as it was.
#[test]
fn a_golden_snapshot_is_written_the_same_again() {
    for golden in read() {
        let placed = make::again(&golden, Compression::None);
        if golden.form == 1 {
            assert!(placed == golden.snapshot());
        }
        let packed = make::again(&golden, Compression::Zstd);
        let (_, state, memory) = open(&packed, Loading::Eager).unwrap();
        check(&state, &memory);
    }
}

#[test]
fn a_golden_snapshot_that_is_compressed_is_not_mapped() {
    for golden in read().iter().filter(|golden| golden.form == 2) {
        let refused = open(&golden.snapshot(), Loading::Lazy).err();
        let found = matches!(refused, Some(SnapshotError::Compressed));
        assert!(found, "{refused:?}");
    }
}

#[test]
fn a_golden_stream_that_this_build_does_not_read_is_refused_by_its_version() {
    for golden in goldens().into_iter().filter(|golden| !golden.is_read()) {
        let says = |error: String, number: u32| {
            assert!(
                error.contains(&format!(" {number};")),
                "{}: {error}",
                golden.name()
            );
        };
        let error = arrive(&golden.stream()).err().unwrap();
        says(error.to_string(), golden.state);
        let error = open(&golden.snapshot(), Loading::Eager).err().unwrap();
        let number = if golden.form > FORMAT {
            golden.form
        } else {
            golden.state
        };
        says(error.to_string(), number);
    }
}

/// The golden machine on KVM; `vcpus` makes its vCPUs from the saved ones.
fn go_on(
    golden: &Golden,
    vcpus: impl Fn(Vec<VcpuState>) -> Vec<VcpuState>,
) -> Result<(), BuildError> {
    let gathered = arrive(&golden.stream()).unwrap();
    let mut all = vec![(gathered.state, gathered.memory)];
    for loading in golden.loadings() {
        let (_, state, memory) = open(&golden.snapshot(), *loading).unwrap();
        all.push((state, memory));
    }
    for (mut state, memory) in all {
        let (files, mut serial) = guest::files();
        state.vcpus = vcpus(state.vcpus);
        let mut machine = build::restore(state, memory, files, None)?;
        machine.resume().unwrap();
        guest::ask(&mut serial, BEFORE + 1);
        guest::take_numbers(&machine, u16::from(BEFORE) + 1);
        guest::check(machine.memory(), BEFORE + 1, u16::from(BEFORE) + 1);
        guest::ask(&mut serial, BEFORE + 2);
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
    for golden in read() {
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
    for golden in read() {
        let owner = arrive(&golden.stream()).unwrap().owner;
        let there = String::from_utf8(owner).unwrap();
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
        let mut forms = (1..=FORMAT).map(|form| Golden::of_this_build(form).name());
        if !forms.any(|of_this_build| name.ends_with(&of_this_build)) {
            continue;
        }
        let input = fs::read(&path).unwrap();
        let (mode, squeezed) = input.split_first().unwrap();
        let came = fuzz::receive(*mode, squeezed);
        let came = came.map(drop).map_err(|error| error.to_string());
        println!("{name}: {came:?}");
        assert_eq!(
            came.is_err(),
            name.starts_with("refused"),
            "{name}: {came:?}"
        );
    }
}
