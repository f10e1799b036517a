//! Memory through snapshots and back, without KVM.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use proptest::prelude::*;
use rstest::rstest;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::{Bytes, GuestAddress};

use super::super::fuzz::read_only;
use super::*;
use crate::config::{HOT_BLOCK, HotMemoryConfig};
use crate::memory::{Blocks, PageSet};
use crate::request::channel;
use crate::thread::{ThreadKind, Threads};
use crate::work::Work;

/// Pages of what is always there, more than a block and not whole ones, and of a block of hot memory.
const PAGES: u64 = 2 * 16 + 5;
const HOT_PAGES: u64 = HOT_BLOCK / PAGE as u64;
const HOT_BLOCKS: u64 = 2;

#[derive(Debug, Clone)]
enum Step {
    /// A byte all over a page.
    Write { page: u64, byte: u8 },
    /// A balloon's or a report's pages.
    GiveBack { page: u64, pages: u64 },
    /// The guest has, or has not, this block of hot memory; what was in it is gone.
    Plug { block: u64, plug: bool },
    /// In its first page, if it has that.
    WriteHot { block: u64, byte: u8 },
    /// A reset.
    Clear,
    /// Handed over by descriptor.
    Settle,
    /// Written to a file, and made anew from that.
    Restore(Loading, Compression),
    /// Written to a file over which others are laid from then on.
    Track(Compression),
    /// Written to a file that has only what was written to since the one before; another is made of all of them.
    Since(Loading, Compression),
}

fn step() -> impl Strategy<Value = Step> {
    let page = 0..PAGES;
    let block = 0..HOT_BLOCKS;
    let compression = prop::sample::select(vec![Compression::None, Compression::Zstd]);
    let loading = prop::sample::select(vec![Loading::Eager, Loading::Lazy]);
    let both = (loading, compression.clone());
    prop_oneof![
        8 => (page.clone(), any::<u8>()).prop_map(|(page, byte)| Step::Write { page, byte }),
        6 => (page, 1..6u64).prop_map(|(page, pages)| Step::GiveBack { page, pages }),
        2 => (block.clone(), any::<bool>()).prop_map(|(block, plug)| Step::Plug { block, plug }),
        2 => (block, any::<u8>()).prop_map(|(block, byte)| Step::WriteHot { block, byte }),
        1 => Just(Step::Clear),
        1 => Just(Step::Settle),
        8 => both.clone().prop_map(|(loading, it)| Step::Restore(loading, it)),
        2 => compression.prop_map(Step::Track),
        6 => both.prop_map(|(loading, it)| Step::Since(loading, it)),
    ]
}

fn config() -> (MemoryConfig, HotMemoryConfig) {
    let memory = MachineConfig::minimal(PAGES * PAGE as u64).memory;
    let max = HOT_BLOCKS * HOT_BLOCK;
    (memory, HotMemoryConfig { max, bytes: 0 })
}

/// Memory, and what is to be in it.
struct Modelled {
    memory: GuestMemory,
    pages: Vec<u8>,
    /// The first page of each block, if it is plugged.
    hot: Vec<Option<u8>>,
    /// A whole snapshot and those over it, if there are any since which nobody else has asked for its writes.
    chain: Vec<Snapshot>,
}

impl Modelled {
    fn new() -> Self {
        let (config, hot) = config();
        Modelled {
            memory: GuestMemory::create_with(&config, Some(&hot)).unwrap(),
            pages: vec![0; PAGES as usize],
            hot: vec![None; HOT_BLOCKS as usize],
            chain: Vec::new(),
        }
    }

    /// Where the guest finds that block.
    fn hot_at(&self, block: u64) -> GuestAddress {
        let window = self.memory.hot().unwrap().window();
        GuestAddress(window.base + block * HOT_BLOCK)
    }

    fn take(&mut self, step: &Step) {
        let memory = &self.memory;
        match *step {
            Step::Write { page, byte } => {
                let at = GuestAddress(page * PAGE as u64);
                memory.write_slice(&[byte; PAGE], at).unwrap();
                self.pages[page as usize] = byte;
            }
            Step::GiveBack { page, pages } => {
                let end = (page + pages).min(PAGES);
                let (at, length) = (page * PAGE as u64, pages * PAGE as u64);
                let given = memory.give_back(at, length).unwrap();
                assert_eq!(given, (end - page) * PAGE as u64);
                self.pages[page as usize..end as usize].fill(0);
            }
            Step::Plug { block, plug } => {
                let (hot, one) = (memory.hot().unwrap(), 1);
                let blocks = Blocks {
                    first: block,
                    count: one,
                };
                let has = &mut self.hot[block as usize];
                match (plug, *has) {
                    (true, None) => (hot.plug(blocks).unwrap(), *has = Some(0)).1,
                    (false, Some(_)) => (hot.unplug(blocks).unwrap(), *has = None).1,
                    _ => {}
                }
            }
            Step::WriteHot { block, byte } => {
                if let Some(has) = &mut self.hot[block as usize] {
                    *has = byte;
                    memory
                        .write_slice(&[byte; PAGE], self.hot_at(block))
                        .unwrap();
                }
            }
            Step::Clear => {
                memory.clear().unwrap();
                self.pages.fill(0);
                for has in self.hot.iter_mut().flatten() {
                    *has = 0;
                }
            }
            Step::Settle => memory.settle().unwrap(),
            Step::Track(compression) => {
                self.own_writes();
                self.chain = vec![self.written_as(compression, None)];
            }
            Step::Restore(..) | Step::Since(..) => {}
        }
    }

    fn own_writes(&self) -> PageSet {
        let mut pages = PageSet::new(self.memory.file_bytes().unwrap());
        self.memory.take_own_writes(&mut pages);
        pages
    }

    /// All of it in a file, or these pages over another.
    fn written(&self, over: Option<(Uuid, &PageSet)>) -> Snapshot {
        self.written_as(Compression::None, over)
    }

    fn written_as(&self, compression: Compression, over: Option<(Uuid, &PageSet)>) -> Snapshot {
        let file = tempfile::tempfile().unwrap();
        let opening = Opening {
            id: Uuid::new_v4(),
            base: over.map(|(base, _)| base),
            memory: self.memory.file_bytes().unwrap(),
            made_by: "a test".to_owned(),
        };
        let to = SnapshotWriter::new(file.try_clone().unwrap(), opening, compression).unwrap();
        let mut copy = Copy::begin(self.memory.clone(), threads(), to);
        match over {
            None => copy.first(None).unwrap(),
            Some((_, pages)) => copy.again(pages).unwrap(),
        };
        copy.finish(b"", b"").unwrap();
        let snapshot = Snapshot::open(read_only(&file).unwrap()).unwrap();
        snapshot.check().unwrap();
        snapshot
    }

    /// Another, made of snapshots of this one. What is compressed is read first, however it is asked for.
    fn made_of(&self, chain: &[&Snapshot], loading: Loading) -> Self {
        let other = Modelled::new();
        let (first, over) = chain.split_first().unwrap();
        let filled = fill(&other.memory, first, &config().0, Loading::Lazy);
        let other = match (filled, first.compression()) {
            (Err(SnapshotError::Compressed), Compression::Zstd) => other,
            (Ok(()), Compression::None) => Modelled::new(),
            (filled, _) => panic!("{filled:?}"),
        };
        let loading = match first.compression() {
            Compression::None => loading,
            Compression::Zstd => Loading::Eager,
        };
        fill(&other.memory, first, &config().0, loading).unwrap();
        for snapshot in over {
            snapshot.load(&other.memory).unwrap();
        }
        let plugged = self.memory.hot().unwrap().plugged();
        other.memory.hot().unwrap().plug_again(&plugged).unwrap();
        let (pages, hot) = (self.pages.clone(), self.hot.clone());
        Modelled {
            pages,
            hot,
            ..other
        }
    }

    /// Another, made of the snapshots that were laid over each other, and of one more.
    fn since(&mut self, loading: Loading, compression: Compression) -> Option<Self> {
        let base = self.chain.last()?.opening().id;
        let pages = self.own_writes();
        let next = self.written_as(compression, Some((base, &pages)));
        let totals = next.totals();
        assert_eq!(totals.pages + totals.zeros, pages.count());
        self.chain.push(next);
        let chain: Vec<&Snapshot> = self.chain.iter().collect();
        Some(self.made_of(&chain, loading))
    }

    /// Another that is made of what this one writes, and what it wrote.
    fn restored(&self, loading: Loading) -> (Self, Snapshot) {
        self.restored_as(loading, Compression::None)
    }

    fn restored_as(&self, loading: Loading, compression: Compression) -> (Self, Snapshot) {
        let snapshot = self.written_as(compression, None);
        (self.made_of(&[&snapshot], loading), snapshot)
    }

    /// As a stream reads it, and what it is told to look at.
    fn check_stream(&self) {
        let present = self.memory.present().unwrap();
        let there: Vec<(u64, Mask)> = present.blocks().collect();
        let is_there = |page: u64| {
            let block = there.iter().find(|(number, _)| *number == page / 16);
            block.is_some_and(|(_, mask)| mask.0 >> (page % 16) & 1 == 1)
        };
        let hot = GuestMemory::hot_offset_of(&config().0) / PAGE as u64;
        let plugged = (0..).zip(&self.hot);
        let of_hot = plugged.map(|(block, has)| (hot + block * HOT_PAGES, has.unwrap_or(0)));
        let of_rest = (0..).zip(self.pages.iter().copied());
        for (page, byte) in of_rest.chain(of_hot) {
            let mut content = [1; PAGE];
            let read = self.memory.read_at(&mut content, page * PAGE as u64);
            assert_eq!(read.unwrap(), PAGE);
            assert_eq!(content, [byte; PAGE], "page {page}");
            assert!(byte == 0 || is_there(page), "page {page} is not to be read");
        }
    }

    /// As guest and devices have it.
    fn check(&self) {
        self.check_stream();
        let first = |at: GuestAddress| {
            let mut content = [1; PAGE];
            self.memory.read_slice(&mut content, at).unwrap();
            content
        };
        for (page, byte) in (0..).zip(&self.pages) {
            let found = first(GuestAddress(page * PAGE as u64));
            assert_eq!(found, [*byte; PAGE], "page {page}");
        }
        for (block, has) in (0..).zip(&self.hot) {
            let seen = self.memory.hot().unwrap().seen(block);
            assert_eq!(seen, has.unwrap_or(0), "block {block}");
        }
    }
}

proptest! {
    // Files are written in each.
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Also that what is given back is zero ever after, whatever memory is made of, and that none of several that are
    /// made of one file knows of another.
    #[test]
    fn memory_is_what_was_written_to_it_through_any_snapshots(
        steps in prop::collection::vec(step(), 1..40),
    ) {
        let (mut now, mut before) = (Modelled::new(), Vec::new());
        for step in &steps {
            now.take(step);
            if let Step::Restore(loading, compression) = step {
                // Both of one file, so that neither may be seen by the other.
                let (next, snapshot) = now.restored_as(*loading, *compression);
                let twin = now.made_of(&[&snapshot], Loading::Lazy);
                before.extend([std::mem::replace(&mut now, next), twin]);
            }
            if let Step::Since(loading, compression) = step {
                before.extend(now.since(*loading, *compression));
            }
            now.check_stream();
        }
        before.iter().for_each(Modelled::check);
        now.check();
        // Of some that stood still meanwhile, another is made.
        for old in before.iter().rev().take(2) {
            old.restored(Loading::Lazy).0.check();
        }
    }
}

fn writable(file: &File) -> File {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().read(true).write(true).open(path).unwrap()
}

#[test]
fn memory_is_mapped_by_no_descriptor_that_could_be_written_to() {
    let mut one = Modelled::new();
    one.take(&Step::Write { page: 3, byte: 7 });
    let (_, snapshot) = one.restored(Loading::Lazy);
    let file = writable(snapshot.placed_in().unwrap().0);
    let snapshot = Snapshot::open(file).unwrap();
    let other = Modelled::new();
    let filled = |loading| fill(&other.memory, &snapshot, &config().0, loading);
    let refused = filled(Loading::Lazy);
    assert!(matches!(refused, Err(SnapshotError::Writable)));
    assert!(other.memory.is_settled());
    filled(Loading::Eager).unwrap();
}

#[test]
fn a_page_that_is_not_what_it_was_is_found_by_a_check_and_by_an_eager_restore_only() {
    let mut one = Modelled::new();
    for page in [3, 20] {
        one.take(&Step::Write { page, byte: 7 });
    }
    let (_, snapshot) = one.restored(Loading::Lazy);
    let (file, at) = snapshot.placed_in().unwrap();
    writable(file)
        .write_all_at(&[8], at + 20 * PAGE as u64)
        .unwrap();
    assert!(matches!(
        snapshot.check(),
        Err(StreamError::Checksum { .. })
    ));
    let filled = |loading| {
        let other = Modelled::new();
        fill(&other.memory, &snapshot, &config().0, loading).map(|()| other)
    };
    assert!(filled(Loading::Eager).is_err());
    let other = filled(Loading::Lazy).unwrap();
    let found: u8 = (other.memory)
        .read_obj(GuestAddress(20 * PAGE as u64))
        .unwrap();
    assert_eq!(found, 8);
}

/// Its checksums are new, and the bytes are as old as before.
#[test]
fn a_snapshot_says_that_its_bytes_came_from_a_file_that_nobody_checked() {
    let mut one = Modelled::new();
    one.take(&Step::Write { page: 3, byte: 7 });
    one.take(&Step::Track(Compression::None));
    let (mut mapped, snapshot) = one.restored(Loading::Lazy);
    assert!(!snapshot.is_unchecked());
    let (read, second) = mapped.restored(Loading::Eager);
    assert!(second.is_unchecked() && read.written(None).is_unchecked());
    mapped.take(&Step::Settle);
    assert!(
        mapped.written(None).is_unchecked(),
        "it was read, and not checked"
    );
    mapped.take(&Step::Track(Compression::None));
    let over = mapped.own_writes();
    let over = mapped.written(Some((mapped.chain[0].opening().id, &over)));
    assert!(over.is_unchecked());
    mapped.take(&Step::Clear);
    assert!(
        !mapped.written(None).is_unchecked(),
        "nothing of it is left"
    );
    assert!(!one.restored(Loading::Eager).0.written(None).is_unchecked());
}

/// Of a machine whose threads are not locked down.
fn threads() -> Threads {
    let (requests, _receiver) = channel().unwrap();
    Threads::new(None, requests)
}

#[rstest]
fn what_two_threads_copy_is_all_of_it_or_an_error(
    #[values(Compression::None, Compression::Zstd)] compression: Compression,
) {
    const BLOCKS: u64 = 1024;
    let config = MachineConfig::minimal(BLOCKS * BLOCK as u64).memory;
    let memory = GuestMemory::create(&config).unwrap();
    let word = |block: u64| block | 1 << 40;
    for block in 0..BLOCKS {
        let at = GuestAddress(block * BLOCK as u64);
        memory.write_obj(word(block), at).unwrap();
    }
    let copy = |threads: &Threads, file: &File| {
        let opening = Opening {
            id: Uuid::new_v4(),
            base: None,
            memory: memory.file_bytes().unwrap(),
            made_by: "a test".to_owned(),
        };
        let to = SnapshotWriter::new(file.try_clone().unwrap(), opening, compression).unwrap();
        Copy::begin(memory.clone(), threads.clone(), to)
    };
    let (requests, _receiver) = channel().unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let hook: ThreadHook = Arc::new(move |kind| tell.send(kind).unwrap());
    let threads = Threads::new(Some(hook), requests);
    let room = [
        (Work::Block, 0),
        (Work::Net, 0),
        (Work::Copy, 1),
        (Work::Lane, 0),
    ];
    let spawner = threads.prepare(room).unwrap();
    threads.seal();
    let whole = |file: File, mut copy: Copy| {
        assert_eq!(copy.first(None).unwrap(), BLOCKS);
        let totals = copy.finish(b"", b"").unwrap();
        assert_eq!(totals.pages, BLOCKS);
        let snapshot = Snapshot::open(read_only(&file).unwrap()).unwrap();
        let other = GuestMemory::create(&config).unwrap();
        snapshot.load(&other).unwrap();
        for block in 0..BLOCKS {
            let at = GuestAddress(block * BLOCK as u64);
            assert_eq!(other.read_obj::<u64>(at).unwrap(), word(block));
        }
    };
    let file = tempfile::tempfile().unwrap();
    whole(file.try_clone().unwrap(), copy(&threads, &file));
    let kinds: Vec<_> = told.try_iter().collect();
    assert_eq!(kinds, [ThreadKind::Spawner, ThreadKind::Block]);

    // What cannot be written by either.
    let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC;
    let full = File::from(memfd_create("full", flags).unwrap());
    let mut fails = copy(&threads, &full);
    fcntl_add_seals(&full, SealFlags::WRITE).unwrap();
    let error = fails.first(None).unwrap_err();
    let found = matches!(error, SnapshotError::Stream(StreamError::Io { .. }));
    assert!(found, "{error:?}");

    // Where there can be no second one, there is one.
    drop(spawner);
    whole(file.try_clone().unwrap(), copy(&threads, &file));
}

/// More than are mapped: pages far from each other. What is read for that is checked.
#[test]
fn a_snapshot_in_too_many_pieces_is_mapped_and_read() {
    const PIECES: u64 = 1100;
    let at = |piece: u64| piece * 32 * PAGE as u64;
    let config = MachineConfig::minimal(at(PIECES)).memory;
    let one = GuestMemory::create(&config).unwrap();
    let word = |piece: u64| piece | 1 << 40;
    for piece in 0..PIECES {
        one.write_obj(word(piece), GuestAddress(at(piece))).unwrap();
    }
    let opening = Opening {
        id: Uuid::new_v4(),
        base: None,
        memory: one.file_bytes().unwrap(),
        made_by: "a test".to_owned(),
    };
    let file = tempfile::tempfile().unwrap();
    let to = file.try_clone().unwrap();
    let to = SnapshotWriter::new(to, opening, Compression::None).unwrap();
    let mut copy = Copy::begin(one, threads(), to);
    assert_eq!(copy.first(None).unwrap(), PIECES);
    copy.finish(b"", b"").unwrap();
    let snapshot = Snapshot::open(read_only(&file).unwrap()).unwrap();
    let filled = || {
        let other = GuestMemory::create(&config).unwrap();
        fill(&other, &snapshot, &config, Loading::Lazy).map(|()| other)
    };
    let other = filled().unwrap();
    assert!(!other.is_settled());
    for piece in 0..PIECES {
        let found: u64 = other.read_obj(GuestAddress(at(piece))).unwrap();
        assert_eq!(found, word(piece), "piece {piece}");
    }
    // Of pieces that are as large as each other the last are read.
    let (_, begins) = snapshot.placed_in().unwrap();
    file.write_all_at(&[9], begins + at(0)).unwrap();
    filled().unwrap();
    file.write_all_at(&[9], begins + at(PIECES - 1)).unwrap();
    let error = filled().err();
    let found = matches!(
        error,
        Some(SnapshotError::Stream(StreamError::Checksum { .. }))
    );
    assert!(found, "{error:?}");
}
