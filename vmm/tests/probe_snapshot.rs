//! A guest written to a file while it runs, and the one that is made from the file.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod probe_guest;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::{Duration, Instant};

use fractus_vmm::machine::{
    Compression, Loading, Machine, RunState, Scope, SnapshotError, SnapshotOptions,
};
use fractus_vmm::stream::snapshot::{self, Snapshot};
use probe_guest::{Setup, fields};
use rstest::rstest;

fn all_of_it(compression: Compression) -> SnapshotOptions {
    SnapshotOptions {
        compression,
        ..Scope::Whole.into()
    }
}

/// It writes all over its memory meanwhile: a page that was lost, or is of another moment than the rest, is found
/// by the guest itself, here and there.
#[rstest]
fn no_page_is_lost_while_the_guest_writes(
    #[values(1, 40)] mib: u64,
    #[values(Compression::None, Compression::Zstd)] compression: Compression,
) {
    let mut guest = Setup::new().start();
    let nonce = guest.booted()["nonce"].clone();
    // More than is left for the pause, so that it is copied in rounds.
    guest.ok("touch 40");
    let (mut written, mut times) = (0, 0);
    let by = Instant::now() + Duration::from_secs(30);
    // On a busy host the guest may get no processor just then, and write nothing.
    while times < 3 || written == 0 {
        assert!(Instant::now() < by, "it wrote nothing meanwhile");
        times += 1;
        guest.send(&format!("loudly weave {mib}"));
        guest.line("begun weave");
        let file = tempfile::tempfile().unwrap();
        let to = file.try_clone().unwrap();
        let report = guest.machine.snapshot_of(all_of_it(compression), to, b"");
        let report = report.unwrap();
        println!("{report:?}");
        let memory = guest.machine.memory().file_bytes().unwrap();
        assert!(file.metadata().unwrap().len() < snapshot::most_bytes_of(memory, compression));
        written += report.last;
        assert!(report.rounds.len() > 1);
        let mut other = guest.cloned_from(file, &[]);
        for each in [&mut other, &mut guest] {
            each.send("");
            each.line("ok weave");
            assert_eq!(fields(&each.ok("info"))["nonce"], nonce);
        }
    }
}

#[rstest]
fn a_paused_guest_stays_paused_and_goes_on_from_its_file_with_disk_and_vcpus(
    #[values(Compression::None, Compression::Zstd)] compression: Compression,
) {
    let disk: File = tempfile::tempfile().unwrap();
    disk.set_len(8 << 20).unwrap();
    let mut guest = Setup::new().cpus(2).disk(&disk, |_| {}).boot();
    guest.ok("touch 20");
    guest.ok("disk-write 0 0 1048576 11");
    guest.machine.pause().unwrap();
    let file = tempfile::tempfile().unwrap();
    let to = file.try_clone().unwrap();
    let report = guest.machine.snapshot_of(all_of_it(compression), to, b"");
    let report = report.unwrap();
    assert_eq!(guest.machine.state(), RunState::Paused);
    assert_eq!(report.pause, Duration::ZERO);
    assert!(report.totals.pages >= 20 * 256, "{report:?}");
    let mut other = guest.cloned_from(file, &[&disk]);
    drop(guest);
    other.ok("disk-check 0 0 1048576 11");
    assert_eq!(other.ask("spin 1 1"), "ok spin");
    other.send("reboot");
    other.booted();
}

/// Each of a page's words says where it is, so a page that came from elsewhere is found.
#[test]
fn a_compressed_guest_takes_less_room_is_read_and_not_mapped() {
    let mut guest = Setup::new().boot();
    guest.ok("fill 30 7");
    let mut sizes = Vec::new();
    for compression in [Compression::None, Compression::Zstd] {
        let file = tempfile::tempfile().unwrap();
        let to = file.try_clone().unwrap();
        let report = guest.machine.snapshot_of(all_of_it(compression), to, b"");
        assert!(report.unwrap().totals.pages >= 30 << 8);
        sizes.push(file.metadata().unwrap().blocks() * 512);
        if compression == Compression::Zstd {
            let file = read_only(&file);
            let snapshot = Snapshot::open(file.try_clone().unwrap()).unwrap();
            assert!(snapshot.placed_in().is_none());
            let (files, _serial) = guest.files_again(&[]);
            let here = guest.machine.config();
            let mapped = Machine::from_snapshot(&snapshot, here, files, Loading::Lazy, None);
            let error = mapped.err().unwrap();
            assert!(matches!(error, SnapshotError::Compressed), "{error}");
            guest.cloned_from(file, &[]).ok("filled 30 7");
        }
    }
    assert!(sizes[1] < sizes[0] / 4, "{sizes:?}");
}

/// Whatever each of them is, and in the order in which they were written.
#[rstest]
fn snapshots_over_each_other_may_be_of_either_form(
    #[values(Compression::None, Compression::Zstd)] first: Compression,
) {
    let (mut guest, mut files) = (Setup::new().boot(), Vec::new());
    let other = match first {
        Compression::None => Compression::Zstd,
        Compression::Zstd => Compression::None,
    };
    for (number, compression) in [first, other, first].into_iter().enumerate() {
        let scope = match number {
            0 => Scope::Tracked,
            _ => Scope::Since,
        };
        guest.ok(&format!("fill {} {number}", 12 - 4 * number));
        let file = tempfile::tempfile().unwrap();
        let options = SnapshotOptions {
            compression,
            ..scope.into()
        };
        let to = file.try_clone().unwrap();
        let report = guest.machine.snapshot_of(options, to, b"").unwrap();
        // What changed since, and little else.
        let most = (14 - 4 * number as u64) << 8;
        assert!(number == 0 || report.totals.pages < most, "{report:?}");
        files.push(read_only(&file));
    }
    // The pages of each of them are there: those that the next one did not fill are found by their place.
    let loadings = match first {
        Compression::None => vec![Loading::Eager, Loading::Lazy],
        Compression::Zstd => vec![Loading::Eager],
    };
    for loading in loadings {
        let copies = files.iter().map(|file| file.try_clone().unwrap()).collect();
        guest.cloned_of(loading, copies, &[]).ok("filled 4 2");
        let copies = files[..2].iter().map(|file| file.try_clone().unwrap());
        let mut second = guest.cloned_of(loading, copies.collect(), &[]);
        second.ok("filled 8 1");
        let first = vec![files[0].try_clone().unwrap()];
        guest.cloned_of(loading, first, &[]).ok("filled 12 0");
    }
}

/// Another descriptor of it, by which nobody can write.
fn read_only(file: &File) -> File {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
}

/// Pages that a device filled while the guest ran are in no log of KVM's.
#[test]
fn what_a_disk_reads_meanwhile_is_there() {
    let disk: File = tempfile::tempfile().unwrap();
    disk.set_len(8 << 20).unwrap();
    let mut guest = Setup::new().disk(&disk, |_| {}).boot();
    guest.ok("disk-write 0 0 4194304 11");
    for _ in 0..3 {
        guest.send("loudly disk-check 0 0 4194304 11 again");
        guest.line("begun disk-check");
        let file = tempfile::tempfile().unwrap();
        guest
            .machine
            .snapshot(file.try_clone().unwrap(), b"")
            .unwrap();
        let mut other = guest.cloned_from(file, &[&disk]);
        for each in [&mut other, &mut guest] {
            each.send("");
            assert_eq!(each.line(""), "ok disk-check");
        }
    }
}

#[test]
fn a_machine_that_has_ended_is_not_written() {
    let mut guest = Setup::new().boot();
    let file: File = tempfile::tempfile().unwrap();
    guest
        .machine
        .snapshot(file.try_clone().unwrap(), b"")
        .unwrap();
    let snapshot = Snapshot::open(file.try_clone().unwrap()).unwrap();
    assert_eq!(snapshot.opening().memory, guest.machine.memory().bytes());
    guest.machine.stop();
    // What was there before stays.
    assert!(
        guest
            .machine
            .snapshot(file.try_clone().unwrap(), b"")
            .is_err()
    );
    Snapshot::open(file).unwrap();
}

/// What it has asked for is not in its state: it would never come.
#[test]
fn a_guest_that_resets_itself_meanwhile_is_not_written_and_comes_back() {
    let mut guest = Setup::new().boot();
    guest.send("reboot");
    // The request waits until somebody asks for events.
    let by = Instant::now() + Duration::from_secs(30);
    let file: File = tempfile::tempfile().unwrap();
    loop {
        match guest.machine.snapshot(file.try_clone().unwrap(), b"") {
            Ok(_) => assert!(Instant::now() < by, "it never resets"),
            Err(error) => {
                assert!(matches!(error, SnapshotError::Over), "{error}");
                break;
            }
        }
    }
    assert!(Snapshot::open(file).is_err());
    guest.booted();
}

/// A new file on a file system of that size, which goes with the file.
fn on_a_small_disk(size: &str) -> File {
    let folder = tempfile::tempdir().unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let status = Command::new(program)
            .args(arguments)
            .arg(folder.path())
            .status();
        assert!(status.unwrap().success(), "{program}");
    };
    run(
        "mount",
        &["-t", "tmpfs", "-o", &format!("size={size}"), "small"],
    );
    let file = tempfile::tempfile_in(folder.path());
    run("umount", &["--lazy"]);
    file.unwrap()
}

/// It is slowed down, or stands still for longer, as fast or slow as this host is: whichever it is, nothing is lost.
#[test]
fn no_page_is_lost_of_a_guest_that_writes_more_than_fits_the_pause() {
    let mut guest = Setup::new().memory_mib(256).start();
    let nonce = guest.booted()["nonce"].clone();
    guest.ok("touch 120");
    guest.send("loudly weave 120");
    guest.line("begun weave");
    let file = tempfile::tempfile().unwrap();
    let options = SnapshotOptions {
        long_pause: true,
        ..all_of_it(Compression::Zstd)
    };
    let to = file.try_clone().unwrap();
    let report = guest.machine.snapshot_of(options, to, b"").unwrap();
    println!("{report:?}");
    assert_eq!(guest.machine.throttled(), 0);
    let mut other = guest.cloned_from(file, &[]);
    for each in [&mut other, &mut guest] {
        each.send("");
        each.line("ok weave");
        assert_eq!(fields(&each.ok("info"))["nonce"], nonce);
    }
}

/// A file that takes nothing more: the guest runs on, and what is there is no snapshot.
#[test]
fn a_full_disk_costs_the_guest_nothing() {
    let mut guest = Setup::new().command_line("tick_ms=5").start();
    guest.booted();
    guest.ok("touch 20");
    let full = on_a_small_disk("8m");
    assert!(
        guest
            .machine
            .snapshot(full.try_clone().unwrap(), b"")
            .is_err()
    );
    assert!(Snapshot::open(full).is_err());
    assert_eq!(guest.machine.state(), RunState::Running);
    guest.line("tick ");
    assert_eq!(guest.ok("echo alive"), "alive");
    // And the next one is whole.
    let file: File = tempfile::tempfile().unwrap();
    guest
        .machine
        .snapshot(file.try_clone().unwrap(), b"")
        .unwrap();
    assert_eq!(guest.cloned_from(file, &[]).ok("echo here"), "here");
}
