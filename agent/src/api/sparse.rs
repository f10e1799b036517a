//! A file's bytes as pieces ([`fractus_agent_api::copy`]): of holes, and of what is zero, nothing goes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use axum::body::Bytes;
use fractus_agent_api::copy::{pack, pack_end};
use futures::Stream;
use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use rustix::io::Errno;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

/// Bytes of a piece at most, and pieces that wait to be taken.
const CHUNK: usize = 256 << 10;
const WAITING: usize = 4;

/// Who takes nothing for so long is gone. Long: between two pieces may lie terabytes of zeroes, which whoever takes them
/// has to hash. One whose connection is dead is known sooner.
const STALL: Duration = Duration::from_secs(6 * 3600);

/// The whole file, which must not change. Read for as long as somebody takes it.
pub async fn pieces(path: PathBuf) -> io::Result<impl Stream<Item = io::Result<Bytes>>> {
    let opened = tokio::task::spawn_blocking(move || {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        Ok::<_, io::Error>((file, size))
    });
    let (file, size) = opened.await.map_err(io::Error::other)??;
    let (sender, mut receiver) = mpsc::channel(WAITING);
    tokio::task::spawn_blocking(move || send(&file, size, &sender, STALL));
    Ok(futures::stream::poll_fn(move |context| {
        receiver.poll_recv(context)
    }))
}

/// Until nobody takes any more: what comes then has no end, and so is none.
fn send(file: &File, size: u64, to: &mpsc::Sender<io::Result<Bytes>>, stall: Duration) {
    let runtime = Handle::current();
    let give = |part| runtime.block_on(to.send_timeout(part, stall)).is_ok();
    if let Err(error) = read(file, size, |bytes| give(Ok(bytes))) {
        give(Err(error));
    }
    // Nobody reads it again.
    let _ = fadvise(file, 0, None, Advice::DontNeed);
}

/// Until `give` says that nobody takes any more.
fn read(file: &File, size: u64, mut give: impl FnMut(Bytes) -> bool) -> io::Result<()> {
    let (mut at, mut buffer) = (0, vec![0; CHUNK]);
    while at < size {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            // What does not know of holes is all data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(errno) => return Err(errno.into()),
        };
        let end = match seek(file, SeekFrom::Hole(data)) {
            Ok(end) => end.min(size),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => size,
            Err(errno) => return Err(errno.into()),
        };
        at = data;
        while at < end {
            let length = CHUNK.min(usize::try_from(end - at).unwrap_or(CHUNK));
            let Some(bytes) = buffer.get_mut(..length) else {
                break;
            };
            file.read_exact_at(bytes, at)?;
            if bytes.iter().any(|byte| *byte != 0) && !give(pack(at, bytes).into()) {
                return Ok(());
            }
            at += length as u64;
        }
    }
    give(pack_end(size).into());
    Ok(())
}

#[cfg(test)]
mod tests {
    use fractus_agent_api::copy::Unpacker;
    use futures::StreamExt;

    use super::*;

    #[tokio::test]
    async fn a_file_comes_without_its_holes() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let disk = file.as_file();
        disk.set_len((64 << 20) + 512).unwrap();
        disk.write_all_at(&[5; 4096], 8 << 20).unwrap();
        disk.write_all_at(&[7; 512], 64 << 20).unwrap();
        // No hole, and zero all the same.
        disk.write_all_at(&vec![0; 1 << 20], 32 << 20).unwrap();
        let pieces = pieces(file.path().to_owned()).await.unwrap();
        let mut pieces = std::pin::pin!(pieces);
        let (mut unpacker, mut sum, mut came) = (Unpacker::default(), 0, Vec::new());
        while let Some(bytes) = pieces.next().await {
            let bytes = bytes.unwrap();
            sum += bytes.len();
            came.extend(unpacker.push(&bytes).unwrap());
        }
        assert_eq!(unpacker.finish(), Ok((64 << 20) + 512));
        assert!(sum < 1 << 20, "{sum}");
        let of = |byte: u8| {
            let pieces = came.iter();
            let bytes = pieces.flat_map(|piece| piece.bytes.iter());
            bytes.filter(|it| **it == byte).count()
        };
        assert_eq!((of(5), of(7)), (4096, 512));
    }

    #[tokio::test]
    async fn one_who_takes_nothing_is_not_waited_for_for_ever() {
        let file = tempfile::tempfile().unwrap();
        let size = ((WAITING + 8) * CHUNK) as u64;
        file.write_all_at(&vec![7; size as usize], 0).unwrap();
        let (sender, mut receiver) = mpsc::channel(WAITING);
        let stall = Duration::from_millis(1);
        let sending = tokio::task::spawn_blocking(move || send(&file, size, &sender, stall));
        sending.await.unwrap();
        let mut unpacker = Unpacker::default();
        let mut pieces = 0;
        while let Some(bytes) = receiver.recv().await {
            pieces += unpacker.push(&bytes.unwrap()).unwrap().len();
        }
        assert_eq!(pieces, WAITING);
        assert!(unpacker.finish().is_err());
    }
}
