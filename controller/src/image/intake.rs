//! Bytes on their way into the store: hashed, measured and looked at as they come.

use bytes::Bytes;
use tokio::runtime::{Handle, RuntimeFlavor};

use super::blob::{BlobError, Incoming};
use super::coming::Share;
use super::data::{Seen, too_large};
use super::model::Image;
use super::store::{self, StoreError, Uploaded};
use super::{Images, snapshot};
use crate::http::ApiError;

/// Bytes between two looks at what is free.
const LOOK_EVERY: u64 = 64 << 20;
/// Zeroes are hashed so many at a time.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Bytes that take long enough to hash to be in others' way.
const MUCH: usize = 128 << 10;

/// Other tasks of this thread go on in another one meanwhile.
fn hashing<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

/// One image's bytes. Dropped before [`finish`](Self::finish), nothing of them is left.
pub struct Intake {
    images: Images,
    owner: String,
    claimed: String,
    incoming: Box<dyn Incoming>,
    coming: Share,
    seen: Seen,
    /// Bytes that the project may still add; none: it has no limit.
    left: Option<u64>,
    looked_at: u64,
}

impl Intake {
    /// Under a new key.
    pub async fn begin(images: &Images, image: &Image, key: &str) -> Result<Self, ApiError> {
        room(images).await?;
        let owner = image.row.owner.clone();
        let incoming = images.blobs.begin(key).await.map_err(StoreError::Blob)?;
        Ok(Self {
            left: left(images, &owner).await?,
            coming: images.coming.begin(&owner),
            claimed: image.row.disk_format.clone().unwrap_or("raw".to_owned()),
            images: images.clone(),
            owner,
            incoming,
            seen: Seen::default(),
            looked_at: 0,
        })
    }

    /// Bytes so far.
    pub fn size(&self) -> u64 {
        self.seen.size()
    }

    /// What comes next.
    pub async fn take(&mut self, bytes: Bytes) -> Result<(), ApiError> {
        let (seen, claimed) = (&mut self.seen, &self.claimed);
        match bytes.len() < MUCH {
            true => seen.take(&bytes, claimed)?,
            false => hashing(|| seen.take(&bytes, claimed))?,
        }
        self.look().await?;
        Ok(self.incoming.write(bytes).await.map_err(StoreError::Blob)?)
    }

    /// So many zeroes come next; they take no room where the store can leave them out.
    pub async fn take_zeroes(&mut self, count: u64) -> Result<(), ApiError> {
        let (seen, claimed) = (&mut self.seen, &self.claimed);
        hashing(|| {
            let mut left = count;
            while left > 0 {
                let now = usize::try_from(left).unwrap_or(usize::MAX);
                let zeroes = ZEROES.get(..now).unwrap_or(&ZEROES);
                seen.take(zeroes, claimed)?;
                left -= zeroes.len() as u64;
            }
            Ok::<_, ApiError>(())
        })?;
        self.look().await?;
        let skipped = self.incoming.skip(count).await;
        Ok(skipped.map_err(StoreError::Blob)?)
    }

    /// Refuses what is too much, before it is written.
    async fn look(&mut self) -> Result<(), ApiError> {
        let (size, most) = (self.seen.size(), self.images.limits.image);
        if size > most {
            return Err(too_large(most));
        }
        let together = self.coming.is_now(size);
        if let Some(left) = self.left.filter(|left| together > *left) {
            return Err(StoreError::over_quota(together, left).into());
        }
        if size - self.looked_at >= LOOK_EVERY {
            room(&self.images).await?;
            self.left = left(&self.images, &self.owner).await?;
            self.looked_at = size;
        }
        Ok(())
    }

    /// All is there: it is in the store under its key.
    pub async fn finish(self) -> Result<Uploaded, ApiError> {
        let uploaded = self.seen.finish(&self.claimed)?;
        self.incoming.finish().await.map_err(StoreError::Blob)?;
        Ok(uploaded)
    }
}

/// Refuses to go on when no more than the reserve is free.
async fn room(images: &Images) -> Result<(), StoreError> {
    let free = images.blobs.free().await.map_err(StoreError::Blob)?;
    if free.is_some_and(|free| free < images.limits.reserve) {
        return Err(StoreError::Blob(BlobError::Full));
    }
    Ok(())
}

/// Bytes that the project may still add, those that are coming in included. Other controllers' uploads
/// are not seen: the last word is spoken when the bytes become the image's.
pub(super) async fn left(images: &Images, owner: &str) -> Result<Option<u64>, StoreError> {
    let quota = images.limits.project;
    let Some(quota) = quota.filter(|_| owner != snapshot::NOBODY) else {
        return Ok(None);
    };
    let (used, _) = store::usage(images.database.reader(), owner).await?;
    Ok(Some(quota.saturating_sub(used.unsigned_abs())))
}
