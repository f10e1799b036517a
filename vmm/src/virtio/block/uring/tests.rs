//! What is joined, what is kept apart, and in which order it is told.

use std::fs::File;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use super::*;
use crate::virtio::block::buffer::Buffer;

const BLOCK: u64 = 4096;

fn disk(blocks: u64) -> (File, Uring) {
    let file = tempfile::tempfile().unwrap();
    for number in 0..blocks {
        file.write_all_at(&[number as u8 + 1; BLOCK as usize], number * BLOCK)
            .unwrap();
    }
    let disk = DiskFile::new(file.try_clone().unwrap(), false).unwrap();
    (file, Uring::new(disk).unwrap())
}

fn io(tag: u32, operation: Operation, block: u64, fill: u8) -> Io {
    long_io(tag, operation, block, fill, BLOCK)
}

fn long_io(tag: u32, operation: Operation, block: u64, fill: u8, length: u64) -> Io {
    let mut buffer = Buffer::bounce(length as usize, BLOCK as usize).unwrap();
    buffer.bounced().unwrap().fill(fill);
    Io {
        tag,
        operation,
        offset: block * BLOCK,
        length,
        buffer,
    }
}

/// All of them, in the order of their tags.
fn finish(ring: &mut Uring, count: usize) -> Vec<Completion> {
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut done = Vec::new();
    ring.commit();
    while done.len() < count {
        assert!(Instant::now() < deadline, "{} of {count}", done.len());
        ring.reap(&mut done);
        std::thread::yield_now();
    }
    done.sort_by_key(|completion| completion.io.tag);
    done
}

#[test]
fn what_follows_each_other_goes_as_one_and_each_gets_its_own() {
    let (_file, mut ring) = disk(16);
    for (tag, block) in [4, 5, 6, 9, 10, 2].into_iter().enumerate() {
        ring.submit(io(tag as u32, Operation::Read, block, 0))
            .unwrap();
    }
    ring.push_waiting();
    assert_eq!(ring.in_flight(), 3, "4 to 6, 9 and 10, and 2");
    let done = finish(&mut ring, 6);
    for (mut completion, block) in done.into_iter().zip([4u8, 5, 6, 9, 10, 2]) {
        completion.result.unwrap();
        let bytes = completion.io.buffer.bounced().unwrap();
        assert!(bytes.iter().all(|&byte| byte == block + 1), "block {block}");
    }
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn of_those_that_went_as_one_only_the_bad_one_fails() {
    let (file, mut ring) = disk(8);
    // The disk shrinks under us: its last block is gone.
    file.set_len(7 * BLOCK).unwrap();
    for tag in 0..3 {
        ring.submit(io(tag, Operation::Read, 5 + u64::from(tag), 0))
            .unwrap();
    }
    let results: Vec<_> = finish(&mut ring, 3)
        .into_iter()
        .map(|completion| completion.result)
        .collect();
    assert_eq!(results, [Ok(()), Ok(()), Err(Errno::IO)]);
}

#[test]
fn writes_to_the_cache_are_in_the_file_whichever_way_they_go() {
    let (file, mut ring) = disk(8);
    for policy in [
        CachedWrites::Unknown,
        CachedWrites::ByRing,
        CachedWrites::Here,
    ] {
        ring.cached_writes = policy;
        let fill = 0x40 + policy as u8;
        for tag in 0..3 {
            ring.submit(io(tag, Operation::Write, 2 + u64::from(tag), fill))
                .unwrap();
        }
        for completion in finish(&mut ring, 3) {
            completion.result.unwrap();
        }
        let mut bytes = [0; 5 * BLOCK as usize];
        file.read_exact_at(&mut bytes, BLOCK).unwrap();
        let (before, rest) = bytes.split_at(BLOCK as usize);
        let (written, after) = rest.split_at(3 * BLOCK as usize);
        assert!(before.iter().all(|&byte| byte == 2));
        assert!(written.iter().all(|&byte| byte == fill));
        assert!(after.iter().all(|&byte| byte == 6));
    }
}

/// As the worker does it: by one commit and one look, since no descriptor would tell of more.
#[test]
fn of_writes_to_the_cache_that_went_as_one_only_the_bad_one_fails_and_all_are_told_at_once() {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(memfd_create("disk", flags).unwrap());
    file.set_len(8 * BLOCK).unwrap();
    let disk = DiskFile::new(file.try_clone().unwrap(), false).unwrap();
    let mut ring = Uring::new(disk).unwrap();
    ring.cached_writes = CachedWrites::Here;
    // The disk cannot have its last block back.
    file.set_len(7 * BLOCK).unwrap();
    fcntl_add_seals(&file, SealFlags::GROW).unwrap();
    for tag in 0..3 {
        let write = io(tag, Operation::Write, 5 + u64::from(tag), 0x40);
        ring.submit(write).unwrap();
    }
    let mut done = Vec::new();
    ring.commit();
    ring.reap(&mut done);
    done.sort_by_key(|completion| completion.io.tag);
    let results: Vec<_> = done.iter().map(|completion| completion.result).collect();
    assert_eq!(results, [Ok(()), Ok(()), Err(Errno::PERM)]);
    assert_eq!(ring.in_flight(), 0);
    let mut bytes = [0; 2 * BLOCK as usize];
    file.read_exact_at(&mut bytes, 5 * BLOCK).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0x40));
}

#[test]
fn writes_to_the_cache_that_follow_each_other_are_made_as_one() {
    let (file, mut ring) = disk(8);
    ring.cached_writes = CachedWrites::Here;
    for (tag, block) in [2, 3, 4, 7].into_iter().enumerate() {
        let write = io(tag as u32, Operation::Write, block, 0x40 + block as u8);
        ring.submit(write).unwrap();
    }
    let first = *ring.waiting.front().unwrap();
    ring.join(first);
    assert_eq!(ring.in_flight(), 2, "2 to 4, and 7");
    let done = finish(&mut ring, 4);
    assert!(done.iter().all(|completion| completion.result.is_ok()));
    let mut bytes = [0; 8 * BLOCK as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let firsts: Vec<u8> = bytes.chunks(BLOCK as usize).map(|block| block[0]).collect();
    assert_eq!(firsts, [1, 2, 0x42, 0x43, 0x44, 6, 7, 0x47]);
}

#[test]
fn writes_to_the_cache_leave_turns_to_the_rest_of_the_disks_work() {
    let (file, mut ring) = disk(1);
    ring.cached_writes = CachedWrites::Here;
    let write = |tag, mib: u64| long_io(tag, Operation::Write, 0, tag as u8 + 1, mib << 20);
    for tag in 0..4 {
        ring.submit(write(tag, 1)).unwrap();
    }
    let refused = ring.submit(write(4, 1)).unwrap_err();
    assert_eq!(refused.tag, 4);
    ring.submit(io(5, Operation::Read, 0, 0)).unwrap();
    assert_eq!(finish(&mut ring, 5).len(), 5);
    ring.submit(refused).unwrap();
    assert_eq!(finish(&mut ring, 1).len(), 1);
    // What is longer than a turn's share never waits here at all.
    ring.submit(write(6, 8)).unwrap();
    assert_eq!(ring.in_flight(), 1);
    finish(&mut ring, 1).pop().unwrap().result.unwrap();
    let mut end = [0; BLOCK as usize];
    file.read_exact_at(&mut end, (8 << 20) - BLOCK).unwrap();
    assert!(end.iter().all(|&byte| byte == 7));
}
