//! Blobs as files in one folder: `KEY` when finished, `KEY.part` before.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::fs;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio_util::io::ReaderStream;

use super::{BlobError, BlobStore, Incoming};

const PART: &str = ".part";
/// Before the key of what no row names since the database was restored.
const ASIDE: &str = "unnamed-";
const CHUNK: usize = 256 << 10;

#[derive(Debug, Clone)]
pub struct FileStore {
    folder: PathBuf,
    holder: String,
}

impl FileStore {
    /// Opens `folder`, made when absent. `holder` names this controller among those that share it:
    /// letters, digits and `-`.
    pub async fn open(folder: impl Into<PathBuf>, holder: &str) -> Result<Self, BlobError> {
        let store = Self::at(folder, holder);
        fs::create_dir_all(&store.folder)
            .await
            .map_err(|e| failed("making", &store.folder, e))?;
        Ok(store)
    }

    /// A store in a folder that exists already.
    pub fn at(folder: impl Into<PathBuf>, holder: &str) -> Self {
        Self {
            folder: folder.into(),
            holder: holder.to_owned(),
        }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(key)
    }
}

fn failed(doing: &'static str, path: &Path, source: io::Error) -> BlobError {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => BlobError::Full,
        _ => BlobError::Io {
            doing,
            path: path.to_owned(),
            source,
        },
    }
}

/// Makes the folder's entries durable: a rename is on disk only after it.
async fn sync_folder(folder: &Path) -> Result<(), BlobError> {
    let opened = fs::File::open(folder)
        .await
        .map_err(|e| failed("opening", folder, e))?;
    opened
        .sync_all()
        .await
        .map_err(|e| failed("syncing", folder, e))
}

#[async_trait]
impl BlobStore for FileStore {
    fn holder(&self) -> &str {
        &self.holder
    }

    async fn begin(&self, key: &str) -> Result<Box<dyn Incoming>, BlobError> {
        let target = self.path(key);
        let part = self.path(&format!("{key}{PART}"));
        let file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&part)
            .await
            .map_err(|e| failed("making", &part, e))?;
        Ok(Box::new(IncomingFile {
            file: Some(file),
            length: 0,
            part,
            target,
            folder: self.folder.clone(),
        }))
    }

    async fn open(
        &self,
        key: &str,
        range: Range<u64>,
    ) -> Result<BoxStream<'static, io::Result<Bytes>>, BlobError> {
        let path = self.path(key);
        let mut file = fs::File::open(&path).await.map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => BlobError::Missing(key.to_owned()),
            _ => failed("opening", &path, e),
        })?;
        file.seek(io::SeekFrom::Start(range.start))
            .await
            .map_err(|e| failed("seeking", &path, e))?;
        let length = range.end.saturating_sub(range.start);
        Ok(ReaderStream::with_capacity(file.take(length), CHUNK).boxed())
    }

    async fn remove(&self, key: &str) -> Result<(), BlobError> {
        for path in [self.path(key), self.path(&format!("{key}{PART}"))] {
            match fs::remove_file(&path).await {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("removing", &path, e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    async fn set_aside(&self, key: &str) -> Result<Option<String>, BlobError> {
        let name = format!("{ASIDE}{key}");
        let (from, to) = (self.path(key), self.path(&name));
        let kept = match fs::rename(&from, &to).await {
            Ok(()) => Some(name),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(failed("setting aside", &from, e)),
        };
        // What was never finished.
        self.remove(key).await?;
        sync_folder(&self.folder).await?;
        Ok(kept)
    }

    async fn free(&self) -> Result<Option<u64>, BlobError> {
        let folder = self.folder.clone();
        let asked = tokio::task::spawn_blocking(move || rustix::fs::statvfs(&folder)).await;
        let broken = |source| failed("asking for the room in", &self.folder, source);
        let room = asked
            .map_err(|error| broken(io::Error::other(error)))?
            .map_err(|error| broken(error.into()))?;
        Ok(Some(room.f_bavail.saturating_mul(room.f_frsize)))
    }

    async fn keys(&self) -> Result<Vec<String>, BlobError> {
        let broken = |e| failed("listing", &self.folder, e);
        let mut entries = fs::read_dir(&self.folder).await.map_err(broken)?;
        let mut keys = Vec::new();
        while let Some(entry) = entries.next_entry().await.map_err(broken)? {
            let name = entry.file_name().to_string_lossy().into_owned();
            let key = name.strip_suffix(PART).unwrap_or(&name);
            let ours = key
                .strip_prefix(&self.holder)
                .is_some_and(|rest| rest.starts_with('.'));
            if ours && !keys.iter().any(|known| known == key) {
                keys.push(key.to_owned());
            }
        }
        Ok(keys)
    }
}

struct IncomingFile {
    /// `None` once finished.
    file: Option<fs::File>,
    /// Bytes so far.
    length: u64,
    part: PathBuf,
    target: PathBuf,
    folder: PathBuf,
}

#[async_trait]
impl Incoming for IncomingFile {
    async fn write(&mut self, bytes: Bytes) -> Result<(), BlobError> {
        let Some(file) = self.file.as_mut() else {
            return Ok(());
        };
        self.length += bytes.len() as u64;
        file.write_all(&bytes)
            .await
            .map_err(|e| failed("writing", &self.part, e))
    }

    /// A hole.
    async fn skip(&mut self, length: u64) -> Result<(), BlobError> {
        let Some(file) = self.file.as_mut() else {
            return Ok(());
        };
        self.length += length;
        file.seek(io::SeekFrom::Start(self.length))
            .await
            .map_err(|e| failed("writing", &self.part, e))?;
        Ok(())
    }

    async fn finish(mut self: Box<Self>) -> Result<(), BlobError> {
        let Some(mut file) = self.file.take() else {
            return Ok(());
        };
        let outcome = async {
            file.flush()
                .await
                .map_err(|e| failed("writing", &self.part, e))?;
            // It may end in a hole.
            file.set_len(self.length)
                .await
                .map_err(|e| failed("writing", &self.part, e))?;
            file.sync_all()
                .await
                .map_err(|e| failed("syncing", &self.part, e))?;
            fs::rename(&self.part, &self.target)
                .await
                .map_err(|e| failed("renaming", &self.part, e))?;
            sync_folder(&self.folder).await
        }
        .await;
        if outcome.is_err() {
            // The drop below removes the part again.
            self.file = Some(file);
        }
        outcome
    }
}

impl Drop for IncomingFile {
    fn drop(&mut self) {
        if self.file.take().is_some()
            && let Err(error) = std::fs::remove_file(&self.part)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %self.part.display(), "a cut-off upload stays until the next start");
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt;

    use super::*;

    async fn read(store: &FileStore, key: &str, range: Range<u64>) -> Vec<u8> {
        let chunks: Vec<Bytes> = store
            .open(key, range)
            .await
            .unwrap()
            .try_collect()
            .await
            .unwrap();
        chunks.concat()
    }

    #[tokio::test]
    async fn a_finished_blob_is_read_in_ranges_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let store = FileStore::open(folder.path(), "c1").await.unwrap();
        let mut incoming = store.begin("c1.a").await.unwrap();
        incoming.write(Bytes::from_static(b"0123")).await.unwrap();
        incoming.write(Bytes::from_static(b"456789")).await.unwrap();
        incoming.finish().await.unwrap();
        assert_eq!(read(&store, "c1.a", 0..10).await, b"0123456789");
        assert_eq!(read(&store, "c1.a", 3..5).await, b"34");
        assert_eq!(store.keys().await.unwrap(), ["c1.a"]);
        store.remove("c1.a").await.unwrap();
        store.remove("c1.a").await.unwrap();
        assert!(matches!(
            store.open("c1.a", 0..1).await.err(),
            Some(BlobError::Missing(_))
        ));
    }

    #[tokio::test]
    async fn a_blob_that_is_dropped_half_written_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let store = FileStore::open(folder.path(), "c1").await.unwrap();
        let mut incoming = store.begin("c1.a").await.unwrap();
        incoming.write(Bytes::from_static(b"0123")).await.unwrap();
        assert_eq!(store.keys().await.unwrap(), ["c1.a"]);
        drop(incoming);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn blobs_of_another_holder_are_not_listed() {
        let folder = tempfile::tempdir().unwrap();
        let store = FileStore::open(folder.path(), "c1").await.unwrap();
        std::fs::write(folder.path().join("c10.b"), b"x").unwrap();
        std::fs::write(folder.path().join("c1.b.part"), b"x").unwrap();
        assert_eq!(store.keys().await.unwrap(), ["c1.b"]);
    }
}
