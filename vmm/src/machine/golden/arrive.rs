//! What a golden stream brings, without a machine: each way of travelling, up to memory and state.

use std::os::unix::net::UnixStream;

use super::*;
use crate::machine::receive::lanes::Lanes;
use crate::request::channel;
use crate::thread::Threads;

/// A live stream by one connection, up to its end.
pub fn arrive(stream: &[u8]) -> Result<Gathered, MigrationError> {
    let files = guest::files_without_kvm();
    arrive_with(stream, files)
}

pub fn arrive_with(stream: &[u8], files: MachineFiles) -> Result<Gathered, MigrationError> {
    gathered(&mut FrameReader::new(stream), files)
}

fn gathered(
    frames: &mut FrameReader<&[u8]>,
    files: MachineFiles,
) -> Result<Gathered, MigrationError> {
    let most = vec![DISK; files.disks.len()];
    let land = |_: &[u8]| Ok(fuzz::landing(files, most));
    gather(
        frames,
        &every_device(),
        land,
        |_, _, _, _| Ok(Default::default()),
        |_| Ok(()),
    )
}

/// One whose memory follows, to the last of it.
pub fn arrive_in_full(stream: &[u8]) -> Gathered {
    let mut frames = FrameReader::new(stream);
    let gathered = gathered(&mut frames, guest::files_without_kvm()).unwrap();
    let mut left = gathered.owed.count();
    assert!(left > 0, "nothing follows");
    let bytes = gathered.memory.file_bytes().unwrap();
    while left > 0 {
        let (kind, payload) = frames.next_frame().unwrap();
        assert_eq!(kind, Kind::Pages);
        let came = live::put(payload, &gathered.memory, bytes).unwrap();
        left -= came.pages + came.zeros;
    }
    let (kind, payload) = frames.next_frame().unwrap();
    assert_eq!((kind, payload), (Kind::Whole, &[][..]));
    assert!(frames.is_at_end().unwrap());
    gathered
}

/// One whose memory comes by lanes beside it.
pub fn arrive_by(stream: &[u8], lanes: Vec<Vec<u8>>) -> Result<Gathered, MigrationError> {
    let files = guest::files_without_kvm();
    let most = vec![DISK; files.disks.len()];
    let land = |_: &[u8]| Ok(fuzz::landing(files, most));
    let (own, _other) = UnixStream::pair().unwrap();
    let (requests, _) = channel().unwrap();
    let threads = Threads::new(None, requests);
    let mut wires = Vec::new();
    for bytes in lanes {
        let (mut near, far) = UnixStream::pair().unwrap();
        // What the other side does not take any more is its own affair.
        std::thread::spawn(move || near.write_all(&bytes));
        wires.push(far);
    }
    let mut settled = 0;
    let gathered = gather(
        &mut FrameReader::new(stream),
        &every_device(),
        land,
        |stream, _, _, memory| Lanes::begin(wires, own.into(), stream, memory, &threads),
        |_| {
            settled += 1;
            Ok(())
        },
    )?;
    let all = frames(stream);
    let syncs = all.iter().filter(|frame| frame[..2] == [12, 0]);
    assert_eq!(settled, syncs.count());
    Ok(gathered)
}

pub fn file(bytes: &[u8]) -> File {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(bytes, 0).unwrap();
    file
}

/// What is made of a whole snapshot's file.
pub fn open(
    bytes: &[u8],
    loading: Loading,
) -> Result<(Snapshot, MachineState, GuestMemory), SnapshotError> {
    let snapshot = Snapshot::open(fuzz::read_only(&file(bytes)).unwrap())?;
    let (state, memory) = loaded(&[&snapshot], &every_device(), loading)?;
    Ok((snapshot, state, memory))
}

/// The same of one that is laid over others, which are found among all that there are.
pub fn open_over(bytes: &[u8], loading: Loading) -> (MachineState, GuestMemory) {
    let snapshot = |bytes: &[u8]| Snapshot::open(fuzz::read_only(&file(bytes)).unwrap()).unwrap();
    let mut chain = vec![snapshot(bytes)];
    while let Some(base) = chain[0].opening().base {
        let all = goldens().into_iter().flat_map(|golden| golden.snapshots());
        let mut all = all.map(|bytes| snapshot(&bytes));
        let below = all.find(|snapshot| snapshot.opening().id == base);
        chain.insert(0, below.expect("its base is there"));
    }
    assert!(chain.len() > 1, "it is laid over nothing");
    let chain: Vec<&Snapshot> = chain.iter().collect();
    loaded(&chain, &every_device(), loading).unwrap()
}
