//! Devices as the guest uses them: disks, entropy, consoles.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod probe_guest;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use probe_guest::{PATIENCE, Setup, fields, fnv, pattern};
use rstest::rstest;

const MIB: usize = 1 << 20;

fn disk_file(bytes: usize) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes as u64).unwrap();
    file
}

fn contents(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

#[test]
fn what_the_guest_writes_is_in_the_file_and_nowhere_else() {
    let file = disk_file(8 * MIB);
    file.write_all_at(&[0xaa; 8 * MIB], 0).unwrap();
    let mut guest = Setup::new().disk(&file, |_| {}).boot();
    guest.ok("disk-write 0 1048576 786432 42");
    assert!(contents(&file, 1 << 20, 786_432) == pattern(42, 1 << 20, 786_432));
    assert!(contents(&file, 0, MIB).iter().all(|&byte| byte == 0xaa));
    assert!(
        contents(&file, (1 << 20) + 786_432, MIB)
            .iter()
            .all(|&byte| byte == 0xaa)
    );
}

#[rstest]
#[case::one_after_the_other("1")]
#[case::many_at_once("32")]
fn load_on_a_disk_reaches_every_block_and_interrupts_at_most_once_each(#[case] depth: &str) {
    let file = disk_file(2 * MIB);
    let mut guest = Setup::new().disk(&file, |_| {}).boot();
    let score = fields(&guest.ok(&format!("blk-bench 0 write seq {depth} 512")));
    assert!(
        contents(&file, 0, 2 * MIB)
            .chunks(4096)
            .all(|block| block.iter().any(|&byte| byte != 0))
    );
    assert_eq!(score["ops"], "512");
    for count in ["interrupts", "kicks"] {
        assert!((1..=512).contains(&score[count].parse::<u64>().unwrap()));
    }
    let polled = fields(&guest.ok(&format!("blk-bench 0 read random {depth} 512 4096 poll")));
    assert_eq!(polled["interrupts"], "0", "nobody asked for one");
    guest.ok("disk-write 0 0 65536 5");
    guest.ok("disk-check 0 0 65536 5");
}

#[test]
fn what_the_guest_reads_is_what_is_in_the_file() {
    let file = disk_file(4 * MIB);
    file.write_all_at(&pattern(7, 0, 4 * MIB), 0).unwrap();
    let mut guest = Setup::new().disk(&file, |_| {}).boot();
    let hash = fnv(&contents(&file, 512, 2 * MIB));
    assert_eq!(guest.ok(&format!("disk-hash 0 512 {}", 2 * MIB)), hash);
    guest.ok(&format!("disk-check 0 0 {} 7", 4 * MIB));
    file.write_all_at(&[0], 3_000_000).unwrap();
    let answer = guest.ask(&format!("disk-check 0 0 {} 7", 4 * MIB));
    assert_eq!(answer, "err disk-check at=3000000");
}

#[test]
fn several_disks_keep_their_order_and_their_names() {
    let files = [disk_file(MIB), disk_file(2 * MIB), disk_file(3 * MIB)];
    let mut setup = Setup::new();
    for (index, file) in files.iter().enumerate() {
        setup = setup.disk(file, |disk| {
            disk.serial_number = format!("disk-number-{index}")
        });
    }
    let mut guest = setup.boot();
    for index in 0..3 {
        let info = fields(&guest.ok(&format!("disk-info {index}")));
        assert_eq!(info["serial"], format!("disk-number-{index}"));
        assert_eq!(info["bytes"], ((index + 1) * MIB).to_string());
        guest.ok(&format!("disk-write {index} 0 65536 {index}"));
    }
    for (index, file) in files.iter().enumerate() {
        assert!(contents(file, 0, 65536) == pattern(index as u64, 0, 65536));
    }
}

#[test]
fn a_read_only_disk_takes_no_writes() {
    let file = disk_file(MIB);
    let mut guest = Setup::new()
        .disk(&file, |disk| disk.read_only = true)
        .boot();
    assert_eq!(fields(&guest.ok("disk-info 0"))["ro"], "1");
    assert!(guest.ask("disk-write 0 0 4096 1").starts_with("err "));
    assert!(contents(&file, 0, MIB).iter().all(|&byte| byte == 0));
    assert_eq!(guest.ok("disk-hash 0 0 4096"), fnv(&[0; 4096]));
}

#[rstest]
#[case("disk-zero")]
#[case("disk-discard")]
fn cleared_ranges_read_as_zeroes(#[case] command: &str) {
    let file = disk_file(4 * MIB);
    file.write_all_at(&[0xbb; 4 * MIB], 0).unwrap();
    let mut guest = Setup::new().disk(&file, |_| {}).boot();
    guest.ok(&format!("{command} 0 1048576 65536"));
    guest.ok("disk-flush 0");
    assert!(
        contents(&file, 1 << 20, 65536)
            .iter()
            .all(|&byte| byte == 0)
    );
    assert!(contents(&file, 0, MIB).iter().all(|&byte| byte == 0xbb));
    assert!(
        contents(&file, (1 << 20) + 65536, 65536)
            .iter()
            .all(|&byte| byte == 0xbb)
    );
}

#[test]
fn beyond_the_end_of_a_disk_is_an_error_and_the_disk_goes_on() {
    let file = disk_file(MIB);
    let mut guest = Setup::new().disk(&file, |_| {}).boot();
    assert!(
        guest
            .ask("disk-write 0 1048064 4096 1")
            .starts_with("err disk-write")
    );
    assert!(
        guest
            .ask("disk-hash 0 0x7ffffffffffffe00 512")
            .starts_with("err disk-hash")
    );
    guest.ok("disk-write 0 1044480 4096 1");
    assert_eq!(file.metadata().unwrap().len(), 1 << 20);
}

#[test]
fn a_disk_survives_pauses_in_the_middle_of_its_work_and_a_reset() {
    let file = disk_file(64 * MIB);
    let mut guest = Setup::new().disk(&file, |_| {}).boot();
    guest.send(&format!("disk-write 0 0 {} 5", 64 * MIB));
    for _ in 0..10 {
        guest.machine.pause().unwrap();
        guest.machine.resume().unwrap();
    }
    guest.line("ok disk-write");
    guest.send("reboot");
    guest.booted();
    guest.ok(&format!("disk-check 0 0 {} 5", 64 * MIB));
}

#[test]
fn nothing_is_written_while_a_machine_is_paused() {
    let file = disk_file(64 * MIB);
    let mut guest = Setup::new().disk(&file, |_| {}).boot();
    guest.send(&format!("disk-write 0 0 {} 5", 64 * MIB));
    guest.machine.pause().unwrap();
    let before = fnv(&contents(&file, 0, 64 * MIB));
    guest.overheard(Duration::from_millis(100));
    assert_eq!(fnv(&contents(&file, 0, 64 * MIB)), before);
    guest.machine.resume().unwrap();
    guest.line("ok disk-write");
}

#[test]
fn random_bytes_are_not_twice_the_same() {
    let mut guest = Setup::new().boot();
    let (first, second) = (guest.ok("random 64"), guest.ok("random 64"));
    assert_eq!(first.len(), 128);
    assert_ne!(first, second);
    assert!(first.bytes().any(|byte| byte != first.as_bytes()[0]));
}

#[test]
fn the_first_console_port_carries_commands_and_answers() {
    let mut guest = Setup::new().console_port("org.fractus.test").boot();
    let mut port = guest.ports.remove(0);
    port.set_read_timeout(Some(PATIENCE)).unwrap();
    for round in 0..20 {
        port.write_all(format!("echo over the port {round}\n").as_bytes())
            .unwrap();
        guest.line("ok echo over the port");
        let wanted = format!("ok echo over the port {round}\n");
        let mut answer = vec![0; wanted.len()];
        port.read_exact(&mut answer).unwrap();
        assert_eq!(String::from_utf8(answer).unwrap(), wanted);
    }
}

#[test]
fn devices_interrupt_by_msix_and_nobody_polls() {
    let file = disk_file(4 * MIB);
    let mut guest = Setup::new().disk(&file, |_| {}).boot();
    let count = |guest: &mut probe_guest::Guest| -> u64 {
        let told = fields(&guest.ok("interrupts"));
        let msix = told.iter().filter(|(vector, _)| vector.as_str() >= "50");
        msix.map(|(_, count)| count.parse::<u64>().unwrap()).sum()
    };
    let before = count(&mut guest);
    // Sixteen requests of 256 KiB, one after the other, each waited for in `hlt`.
    guest.ok(&format!("disk-hash 0 0 {}", 4 * MIB));
    assert_eq!(count(&mut guest) - before, 16);
}
