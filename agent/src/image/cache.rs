//! The cache itself: fetch, check, keep, forget.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use fractus_agent_api::copy::Part;
use fractus_agent_api::machine::ImageRef;
use futures::StreamExt;
use tokio::sync::{Mutex, OwnedSemaphorePermit, Semaphore};

use super::source::Source;
use crate::machine::make::Progress;

#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    #[error("{hash:?} is no BLAKE3 hash of 64 hexadecimal digits")]
    Hash { hash: String },
    #[error("image {id} could not be fetched: {detail}")]
    Fetch { id: uuid::Uuid, detail: String },
    #[error(
        "image {id} has BLAKE3 {found}, not {wanted}: what the controller stores is not what it says"
    )]
    Mismatch {
        id: uuid::Uuid,
        wanted: String,
        found: String,
    },
    #[error("image {id} has {found} bytes, not {wanted}")]
    Size {
        id: uuid::Uuid,
        wanted: u64,
        found: u64,
    },
    #[error("the host has no room left for image {id}")]
    Full { id: uuid::Uuid },
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
}

/// Whether it is the disk that has no room left.
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// A chunk that takes longer than this is a cut-off download.
const CHUNK: Duration = Duration::from_secs(30);
/// How often a controller that does not answer is asked, with growing pauses in between.
const ATTEMPTS: u32 = 6;

/// A part of an image that was not written for so long is nobody's any more.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

pub struct Cache {
    folder: PathBuf,
    /// Bytes of whole images that are kept at most, beside the newest.
    bound: u64,
    source: Arc<dyn Source>,
    /// One download an image at a time.
    busy: StdMutex<HashMap<String, Arc<Mutex<()>>>>,
    /// Long work on whole files at once, so that threads are left for all else.
    long: Arc<Semaphore>,
}

/// A place among those who read or write whole images; free again when dropped.
pub struct Turn(#[expect(dead_code, reason = "held, not read")] Option<OwnedSemaphorePermit>);

/// How many do so at once.
const LONG: usize = 4;

impl Cache {
    pub fn new(folder: PathBuf, bound: u64, source: Arc<dyn Source>) -> Result<Self, ImageError> {
        fs::create_dir_all(&folder).map_err(|source| ImageError::Io {
            path: folder.clone(),
            source,
        })?;
        Ok(Self {
            folder,
            bound,
            source,
            busy: StdMutex::default(),
            long: Arc::new(Semaphore::new(LONG)),
        })
    }

    /// Waits for a place among those who do long work.
    pub async fn turn(&self) -> Turn {
        // The semaphore is never closed.
        Turn(self.long.clone().acquire_owned().await.ok())
    }

    /// The image, open; its name in the cache may go at any time. Fetched when it is not there.
    pub async fn open(&self, image: &ImageRef, progress: &Progress) -> Result<File, ImageError> {
        let hash = sound(&image.blake3)?;
        let path = self.folder.join(hash);
        let turn = {
            let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
            // Nobody else holds what only the map holds.
            busy.retain(|_, turn| Arc::strong_count(turn) > 1);
            busy.entry(hash.to_owned()).or_default().clone()
        };
        let _turn = turn.lock().await;
        if let Ok(file) = File::open(&path) {
            // For the next time something must be forgotten.
            let _ = file.set_modified(SystemTime::now());
            return Ok(file);
        }
        self.fetch(image, &path, progress).await?;
        self.forget(&path, self.bound);
        File::open(&path).map_err(|source| ImageError::Io { path, source })
    }

    async fn fetch(
        &self,
        image: &ImageRef,
        path: &Path,
        progress: &Progress,
    ) -> Result<(), ImageError> {
        let part = path.with_extension("part");
        let mut pause = Duration::from_millis(200);
        let mut emptied = false;
        for attempt in 1.. {
            match self.attempt(image, &part, progress).await {
                Ok(()) => break,
                Err(ImageError::Fetch { detail, .. }) if attempt < ATTEMPTS => {
                    tracing::warn!(image = %image.id, attempt, detail, "image fetch");
                    progress.say(format!("fetching image {} again: {detail}", image.id));
                    tokio::time::sleep(pause).await;
                    pause *= 3;
                }
                Err(ImageError::Io { source, .. }) if is_full(&source) && !emptied => {
                    emptied = true;
                    tracing::warn!(image = %image.id, "no room for it: forgetting all others");
                    self.forget(&part, 0);
                }
                Err(ImageError::Io { source, .. }) if is_full(&source) => {
                    let _ = fs::remove_file(&part);
                    return Err(ImageError::Full { id: image.id });
                }
                Err(error) => {
                    if !matches!(error, ImageError::Fetch { .. }) {
                        // Wrong, or no room for it: nothing stays behind.
                        let _ = fs::remove_file(&part);
                    }
                    return Err(error);
                }
            }
        }
        let io = |source| ImageError::Io {
            path: path.to_owned(),
            source,
        };
        fs::rename(&part, path).map_err(io)
    }

    /// One try: what is there of the download is kept and gone on with.
    async fn attempt(
        &self,
        image: &ImageRef,
        part: &Path,
        progress: &Progress,
    ) -> Result<(), ImageError> {
        let io = |source| ImageError::Io {
            path: part.to_owned(),
            source,
        };
        let lost = |detail: String| ImageError::Fetch {
            id: image.id,
            detail,
        };
        let mut options = File::options();
        let file = options
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(part)
            .map_err(io)?;
        let have = file.metadata().map_err(io)?.len();
        let from = if have < image.size { have } else { 0 };
        let body = self
            .source
            .open(image.id, from)
            .await
            .map_err(|e| lost(e.to_string()))?;
        let mut at = body.offset.min(from);
        file.set_len(at).map_err(io)?;
        let mut hasher = self.hash_of(&file, at).await.map_err(io)?;
        let mut parts = body.parts;
        let mut said = 0;
        while let Some(part) = tokio::time::timeout(CHUNK, parts.next())
            .await
            .map_err(|_| lost(format!("nothing came for {} s", CHUNK.as_secs())))?
        {
            let (offset, bytes) = match part.map_err(|e| lost(e.to_string()))? {
                Part::Piece(piece) => (piece.offset, piece.bytes),
                Part::End(size) => (size, Bytes::new()),
            };
            let end = offset.saturating_add(bytes.len() as u64);
            if end > image.size {
                return Err(ImageError::Size {
                    id: image.id,
                    wanted: image.size,
                    found: end,
                });
            }
            let zeros = offset.checked_sub(at);
            let zeros = zeros.ok_or_else(|| lost(format!("{offset} comes after {at}")))?;
            hasher = hash_zeros(hasher, zeros).await.map_err(io)?;
            match bytes.is_empty() {
                // It may end in a hole.
                true => file.set_len(end).map_err(io)?,
                false => file.write_all_at(&bytes, offset).map_err(io)?,
            }
            hasher.update(&bytes);
            at = end;
            if at - said > 16 << 20 {
                said = at;
                progress.say(format!(
                    "fetching image {}: {} of {} MiB",
                    image.id,
                    at >> 20,
                    image.size >> 20
                ));
            }
        }
        if at < image.size {
            return Err(lost(format!("cut off at {at} of {} bytes", image.size)));
        }
        let found = hasher.finalize().to_hex().to_string();
        if !found.eq_ignore_ascii_case(&image.blake3) {
            let wanted = image.blake3.clone();
            return Err(ImageError::Mismatch {
                id: image.id,
                wanted,
                found,
            });
        }
        let synced = tokio::task::spawn_blocking(move || file.sync_data()).await;
        synced.map_err(|e| io(io::Error::other(e)))?.map_err(io)
    }

    /// Of the first `length` bytes.
    async fn hash_of(&self, file: &File, length: u64) -> io::Result<blake3::Hasher> {
        if length == 0 {
            return Ok(blake3::Hasher::new());
        }
        let file = file.try_clone()?;
        let turn = self.turn().await;
        let hashed = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let mut hasher = blake3::Hasher::new();
            let mut buffer = vec![0; 1 << 20];
            let mut at = 0;
            while at < length {
                let most = buffer.len().min((length - at) as usize);
                let Some(space) = buffer.get_mut(..most) else {
                    break;
                };
                let read = file.read_at(space, at)?;
                if read == 0 {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                hasher.update(space.get(..read).unwrap_or_default());
                at += read as u64;
            }
            Ok(hasher)
        });
        hashed.await.map_err(io::Error::other)?
    }

    /// Down to `bound` bytes, what was not used for longest first; never `newest`, nor a download that
    /// may be going on.
    fn forget(&self, newest: &Path, bound: u64) {
        let Ok(entries) = fs::read_dir(&self.folder) else {
            return;
        };
        let mut images: Vec<(SystemTime, u64, PathBuf)> = entries
            .flatten()
            .filter_map(|entry| {
                let about = entry.metadata().ok()?;
                // Of a hole there is nothing.
                let size = about.len().min(about.blocks() * 512);
                Some((about.modified().ok()?, size, entry.path()))
            })
            .filter(|(used, _, path)| {
                let part = path.extension().is_some_and(|is| is == "part");
                let fresh = used.elapsed().map_or(true, |age| age < ABANDONED);
                path != newest && !(part && fresh)
            })
            .collect();
        images.sort();
        let mut total: u64 = images.iter().map(|(_, size, _)| size).sum();
        for (_, size, path) in images {
            if total <= bound {
                break;
            }
            if fs::remove_file(&path).is_ok() {
                total -= size;
            }
        }
    }
}

/// So many zeros are hashed while others wait: some milliseconds.
static ZEROS: [u8; 1 << 20] = [0; 1 << 20];
/// And so many at a time by another thread, which is free again then.
const STEP: u64 = 64 << 20;

/// With so many zeros more. Waits for nobody: a connection on which others wait is open meanwhile.
async fn hash_zeros(mut hasher: blake3::Hasher, length: u64) -> io::Result<blake3::Hasher> {
    fn update(hasher: &mut blake3::Hasher, mut length: u64) {
        while length > 0 {
            let most = ZEROS
                .len()
                .min(usize::try_from(length).unwrap_or(ZEROS.len()));
            hasher.update(ZEROS.get(..most).unwrap_or_default());
            length -= most as u64;
        }
    }
    let mut left = length;
    while left > ZEROS.len() as u64 {
        let step = left.min(STEP);
        let hashed = tokio::task::spawn_blocking(move || {
            update(&mut hasher, step);
            hasher
        });
        hasher = hashed.await.map_err(io::Error::other)?;
        left -= step;
    }
    update(&mut hasher, left);
    Ok(hasher)
}

/// The hash, if it is one: it becomes a file's name.
fn sound(hash: &str) -> Result<&str, ImageError> {
    let digits = hash
        .bytes()
        .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    if hash.len() == 64 && digits {
        Ok(hash)
    } else {
        Err(ImageError::Hash {
            hash: hash.chars().take(80).collect(),
        })
    }
}

/// Copies what a link cannot do (another file system).
pub fn link_or_copy(image: &mut File, from: &Path, to: &Path) -> io::Result<()> {
    if fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    let beside = to.with_extension("new");
    let mut copy = File::create(&beside)?;
    io::copy(&mut Read::by_ref(image), &mut copy)?;
    copy.sync_data()?;
    fs::rename(&beside, to)
}

impl Cache {
    /// Where a whole image is while the cache remembers it.
    pub fn path(&self, image: &ImageRef) -> PathBuf {
        self.folder.join(&image.blake3)
    }
}

#[cfg(test)]
mod tests;
