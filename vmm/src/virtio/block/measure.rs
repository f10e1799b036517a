//! Measurements of the whole path, from a driver's ring to the file and back. Run one by
//! `CARGO_PROFILE_TEST_OPT_LEVEL=3 cargo test -p fractus-vmm --lib measure -- --ignored --nocapture`.

use std::fs::File;
use std::time::{Duration, Instant};

use super::*;
use crate::config::DiskConfig;
use crate::virtio::testing::{Driver, Rig, read_part, write_part};
use crate::virtio::transport::VirtioPciDevice;

const FILE: u64 = 256 << 20;
const TIME: Duration = Duration::from_millis(1500);

struct Case {
    name: &'static str,
    direct: bool,
    threads: bool,
    write: bool,
    depth: u64,
    size: u64,
}

fn run(file: &File, case: &Case) {
    let rig = Rig::new();
    let (board, recorder) = rig.with_recorder();
    let config = DiskConfig {
        read_only: false,
        serial_number: String::new(),
        direct: case.direct,
        limit: None,
        queues: 1,
    };
    let disk = DiskFile::new(file.try_clone().unwrap(), false).unwrap();
    let backend: Box<dyn DiskBackend> = if case.threads {
        Box::new(Pool::new(disk, "disk0", &board.threads).unwrap())
    } else {
        Box::new(Uring::new(disk).unwrap())
    };
    let block = Block::new("disk0", &config, backend, &board.threads).unwrap();
    let device = VirtioPciDevice::new("disk0", Box::new(block), &board).unwrap();
    let mut driver = Driver::start(&rig, device, recorder);
    let mut seed = 1u64;
    let kind = u32::from(case.write);
    let submit = |driver: &mut Driver, slot: u64| {
        seed = seed
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let sector = (seed >> 33) % (FILE / case.size) * (case.size / 512);
        let header = 0x1000 + slot * 32;
        driver.put(
            header,
            &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat(),
        );
        let data = 0x10_0000 + slot * case.size;
        let length = case.size as u32;
        let data = if case.write {
            read_part(data, length)
        } else {
            write_part(data, length)
        };
        driver.submit(
            0,
            &[read_part(header, 16), data, write_part(header + 16, 1)],
        )
    };
    let mut submit = submit;
    // Chains of three in a ring of 256: a head names its slot as long as they are taken in turn.
    let mut slot_of = [0u64; 256];
    for slot in 0..case.depth {
        slot_of[usize::from(submit(&mut driver, slot))] = slot;
    }
    driver.kick(0);
    let (begin, mut done) = (Instant::now(), 0u64);
    while begin.elapsed() < TIME {
        let mut used = Some(driver.used(0));
        while let Some((head, _)) = used {
            done += 1;
            let slot = slot_of[usize::from(head)];
            slot_of[usize::from(submit(&mut driver, slot))] = slot;
            used = driver.try_used(0);
        }
        driver.kick(0);
    }
    let each = begin.elapsed().as_secs_f64() / done as f64;
    let (rate, throughput) = (1.0 / each, case.size as f64 / each / (1 << 20) as f64);
    eprintln!("{:44} {rate:>9.0} /s {throughput:>8.0} MiB/s", case.name);
}

/// What is measured: name, O_DIRECT, threads instead of io_uring, writes, depth, bytes each.
#[rustfmt::skip]
const CASES: [(&str, bool, bool, bool, u64, u64); 14] = [
    ("cached, io_uring, read 4K, depth 1", false, false, false, 1, 4096),
    ("cached, io_uring, read 4K, depth 32", false, false, false, 32, 4096),
    ("cached, threads,  read 4K, depth 32", false, true, false, 32, 4096),
    ("cached, io_uring, write 4K, depth 1", false, false, true, 1, 4096),
    ("cached, io_uring, write 4K, depth 32", false, false, true, 32, 4096),
    ("cached, threads,  write 4K, depth 1", false, true, true, 1, 4096),
    ("cached, threads,  write 4K, depth 32", false, true, true, 32, 4096),
    ("cached, io_uring, read 128K, depth 16", false, false, false, 16, 128 << 10),
    ("direct, io_uring, read 4K, depth 1", true, false, false, 1, 4096),
    ("direct, io_uring, read 4K, depth 32", true, false, false, 32, 4096),
    ("direct, threads,  read 4K, depth 32", true, true, false, 32, 4096),
    ("direct, io_uring, write 4K, depth 32", true, false, true, 32, 4096),
    ("direct, threads,  write 4K, depth 32", true, true, true, 32, 4096),
    ("direct, io_uring, read 128K, depth 16", true, false, false, 16, 128 << 10),
];

#[test]
#[ignore = "a measurement, not a test"]
fn throughput() {
    let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = folder.path().join("disk");
    std::fs::write(&path, vec![7; FILE as usize]).unwrap();
    let open = |flags| {
        let mut options = File::options();
        options.read(true).write(true);
        std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, flags);
        options.open(&path).unwrap()
    };
    let (buffered, direct) = (open(0), open(libc::O_DIRECT));
    for (name, is_direct, threads, write, depth, size) in CASES {
        let file = if is_direct { &direct } else { &buffered };
        run(
            file,
            &Case {
                name,
                direct: is_direct,
                threads,
                write,
                depth,
                size,
            },
        );
    }
}
