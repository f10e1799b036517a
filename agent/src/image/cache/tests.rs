//! What the cache forgets, and what it never does.

use std::fs::FileTimes;

use async_trait::async_trait;
use fractus_agent_api::copy::Piece;
use fractus_agent_api::machine::ImageFormat;
use futures::stream;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::*;
use crate::image::source::{Body, SourceError};

/// Gives these bytes, whatever is asked for.
struct Always(Vec<u8>);

#[async_trait]
impl Source for Always {
    async fn open(&self, _: uuid::Uuid, offset: u64) -> Result<Body, SourceError> {
        let rest = self.0.get(offset as usize..).unwrap_or_default().to_vec();
        let bytes = rest.into();
        let parts = [
            Part::Piece(Piece { offset, bytes }),
            Part::End(self.0.len() as u64),
        ];
        Ok(Body {
            offset,
            parts: stream::iter(parts.map(Ok)).boxed(),
        })
    }
}

fn image_of(bytes: &[u8]) -> ImageRef {
    ImageRef {
        id: uuid::Uuid::new_v4(),
        size: bytes.len() as u64,
        blake3: blake3::hash(bytes).to_hex().to_string(),
        format: ImageFormat::Raw,
    }
}

/// A file of this size that was written so long ago.
fn put(folder: &Path, name: &str, size: usize, age: Duration) -> PathBuf {
    let path = folder.join(name);
    let file = File::create(&path).unwrap();
    file.write_all_at(&vec![1; size], 0).unwrap();
    let then = SystemTime::now() - age;
    file.set_times(FileTimes::new().set_modified(then)).unwrap();
    path
}

const DAY: Duration = Duration::from_secs(24 * 3600);

#[tokio::test]
async fn a_download_under_way_is_not_forgotten_for_another_image_and_an_abandoned_one_is() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = vec![7; 1000];
    let image = image_of(&bytes);
    // No room beside the newest: all that may go does.
    let cache = Cache::new(folder.path().to_owned(), 0, Arc::new(Always(bytes))).unwrap();
    let under_way = put(folder.path(), "a.part", 100, DAY / 2);
    let abandoned = put(folder.path(), "b.part", 100, DAY * 2);
    let whole = put(folder.path(), "c", 100, Duration::ZERO);
    cache.open(&image, &Progress::new("").0).await.unwrap();
    assert!(under_way.exists());
    assert!(!abandoned.exists());
    assert!(!whole.exists());
    assert!(cache.path(&image).exists());
}

#[test]
fn what_was_not_used_for_longest_is_forgotten_first_and_no_more_than_must_be() {
    let folder = tempfile::tempdir().unwrap();
    let cache = Cache::new(folder.path().to_owned(), 0, Arc::new(Always(Vec::new()))).unwrap();
    let oldest = put(folder.path(), "a", 100, DAY * 3);
    let older = put(folder.path(), "b", 100, DAY * 2);
    let old = put(folder.path(), "c", 100, DAY);
    cache.forget(Path::new("none"), 200);
    assert_eq!(
        [oldest, older, old].map(|path| path.exists()),
        [false, true, true]
    );
}

/// A file system of one MiB, gone when dropped.
struct Small(tempfile::TempDir);

impl Small {
    fn mount() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let none = MountFlags::empty();
        mount(c"test", folder.path(), c"tmpfs", none, c"size=1m").unwrap();
        Self(folder)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        unmount(self.0.path(), UnmountFlags::DETACH).unwrap();
    }
}

#[tokio::test]
async fn a_full_disk_costs_the_other_images_and_then_the_fetch_goes_on() {
    let disk = Small::mount();
    let bytes = vec![7; 700 << 10];
    let image = image_of(&bytes);
    let source = Arc::new(Always(bytes.clone()));
    let cache = Cache::new(disk.0.path().to_owned(), u64::MAX, source).unwrap();
    let other = put(disk.0.path(), "other", 600 << 10, DAY);
    let mut fetched = cache.open(&image, &Progress::new("").0).await.unwrap();
    assert!(!other.exists());
    let mut found = Vec::new();
    fetched.read_to_end(&mut found).unwrap();
    assert!(found == bytes);
}

#[tokio::test]
async fn an_image_that_no_forgetting_makes_room_for_leaves_nothing() {
    let disk = Small::mount();
    let bytes = vec![7; 2 << 20];
    let image = image_of(&bytes);
    let source = Arc::new(Always(bytes));
    let cache = Cache::new(disk.0.path().to_owned(), u64::MAX, source).unwrap();
    let failed = cache.open(&image, &Progress::new("").0).await;
    let full = |error: &ImageError| matches!(error, ImageError::Full { id } if *id == image.id);
    assert!(failed.as_ref().is_err_and(full), "{failed:?}");
    assert_eq!(fs::read_dir(disk.0.path()).unwrap().count(), 0);
}

/// Gives these parts, whatever is asked for, and says that they begin at that.
struct Parts(Vec<Vec<Part>>, StdMutex<Vec<u64>>);

#[async_trait]
impl Source for Parts {
    async fn open(&self, _: uuid::Uuid, offset: u64) -> Result<Body, SourceError> {
        let mut asked = self.1.lock().unwrap();
        let parts = self.0.get(asked.len()).cloned().unwrap_or_default();
        asked.push(offset);
        Ok(Body {
            offset,
            parts: stream::iter(parts.into_iter().map(Ok)).boxed(),
        })
    }
}

fn piece(image: &[u8], offset: usize, length: usize) -> Part {
    Part::Piece(Piece {
        offset: offset as u64,
        bytes: Bytes::copy_from_slice(&image[offset..offset + length]),
    })
}

#[tokio::test]
async fn what_is_zero_does_not_come_and_takes_no_room_and_is_part_of_the_image_all_the_same() {
    const MIB: usize = 1 << 20;
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = vec![0; 9 * MIB];
    bytes[2 * MIB..2 * MIB + 4096].fill(1);
    bytes[6 * MIB..6 * MIB + 4096].fill(2);
    let image = image_of(&bytes);
    // It is cut off once, after a hole, and goes on behind what has come.
    let parts = vec![
        vec![piece(&bytes, 2 * MIB, 4096)],
        vec![piece(&bytes, 6 * MIB, 4096), Part::End(9 << 20)],
    ];
    let source = Arc::new(Parts(parts, StdMutex::default()));
    let cache = Cache::new(folder.path().to_owned(), 0, source.clone()).unwrap();
    let mut fetched = cache.open(&image, &Progress::new("").0).await.unwrap();
    assert_eq!(*source.1.lock().unwrap(), [0, 2 * MIB as u64 + 4096]);
    let mut found = Vec::new();
    fetched.read_to_end(&mut found).unwrap();
    assert!(found == bytes);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&fetched.metadata().unwrap());
    assert!(blocks * 512 < 1 << 20, "{blocks} blocks");
}

#[tokio::test]
async fn an_end_that_is_not_the_images_is_none() {
    let bytes = vec![0; 1 << 20];
    let image = image_of(&bytes);
    for (end, is_size) in [(2 << 20, true), (1 << 19, false)] {
        let folder = tempfile::tempdir().unwrap();
        let once = vec![vec![Part::End(end)]];
        let source = Arc::new(Parts(once, StdMutex::default()));
        let cache = Cache::new(folder.path().to_owned(), 0, source).unwrap();
        let part = folder.path().join("a.part");
        let failed = cache.attempt(&image, &part, &Progress::new("").0).await;
        match is_size {
            true => assert!(matches!(failed, Err(ImageError::Size { .. })), "{failed:?}"),
            false => assert!(
                matches!(failed, Err(ImageError::Fetch { .. })),
                "{failed:?}"
            ),
        }
    }
}
