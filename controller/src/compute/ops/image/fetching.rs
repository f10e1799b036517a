//! A copy's bytes on their way from a host into the store, a turn at a time.
//!
//! Owns what is kept from one turn to the next: a connection to an agent, and bytes that no image names yet. In memory
//! only, so whoever does not find his begins anew; and not for ever, so that a controller that leads no more lets go.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use fractus_agent_api::copy::Part;
use futures::StreamExt;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep, timeout};

use super::refused;
use crate::agents::CopyStream;
use crate::image::Intake;
use crate::operation::{OperationId, StepError};

/// How long bytes are fetched in a turn.
const TURN: Duration = Duration::from_secs(1);
/// A host that sends nothing for so long is asked anew.
const STALL: Duration = Duration::from_secs(60);
/// Nobody comes any more for what has been kept for so long.
const IDLE: Duration = Duration::from_secs(60);
/// Zeroes that are hashed at a time.
const ZEROES: u64 = 4 << 20;

/// Bytes that come in, by operation.
pub(super) type Fetches = Kept<Fetching>;

/// What is kept for an operation until its next turn, and [`IDLE`] at most. Cheap to clone.
#[derive(Debug)]
pub(super) struct Kept<T>(Arc<Mutex<HashMap<OperationId, (Instant, T)>>>);

impl<T> Clone for Kept<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Default for Kept<T> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

impl<T: Send + 'static> Kept<T> {
    fn all(&self) -> MutexGuard<'_, HashMap<OperationId, (Instant, T)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn take(&self, id: OperationId) -> Option<T> {
        self.all().remove(&id).map(|(_, kept)| kept)
    }

    pub(super) fn keep(&self, id: OperationId, what: T) {
        let is_first = {
            let mut all = self.all();
            let is_first = all.is_empty();
            all.insert(id, (Instant::now(), what));
            is_first
        };
        if is_first {
            tokio::spawn(self.clone().forget());
        }
    }

    /// Whoever keeps the first sees to it that all of them go; a second one beside him does no harm.
    async fn forget(self) {
        loop {
            sleep(IDLE / 4).await;
            if self.let_go(Instant::now()) {
                return;
            }
        }
    }

    /// Of what is too old at `now`; whether nothing is left.
    fn let_go(&self, now: Instant) -> bool {
        let mut all = self.all();
        let old = all.extract_if(|_, (since, _)| now.duration_since(*since) >= IDLE);
        let old: Vec<_> = old.collect();
        let is_empty = all.is_empty();
        drop((all, old));
        is_empty
    }
}

/// One image's bytes.
pub(super) struct Fetching {
    pub(super) key: String,
    pub(super) intake: Intake,
    parts: CopyStream,
    /// What has come and is not in the store yet: zeroes up to here, and then this.
    upto: u64,
    piece: Option<Bytes>,
    is_all: bool,
    heard_at: Instant,
    _turn: OwnedSemaphorePermit,
}

/// What a turn of it came to.
pub(super) enum Fetched {
    Some(Fetching),
    All(Fetching),
}

impl Fetching {
    pub(super) fn new(
        key: String,
        parts: CopyStream,
        intake: Intake,
        turn: OwnedSemaphorePermit,
    ) -> Self {
        Self {
            key,
            intake,
            parts,
            upto: 0,
            piece: None,
            is_all: false,
            heard_at: Instant::now(),
            _turn: turn,
        }
    }

    /// For a turn's time, whatever the host does.
    pub(super) async fn some(mut self) -> Result<Fetched, StepError> {
        let began = Instant::now();
        loop {
            let left = TURN.saturating_sub(began.elapsed());
            if left.is_zero() {
                return Ok(Fetched::Some(self));
            }
            let gap = self.upto.saturating_sub(self.intake.size()).min(ZEROES);
            if gap > 0 {
                self.intake.take_zeroes(gap).await.map_err(refused)?;
                // Nobody has listened to it meanwhile.
                self.heard_at = Instant::now();
            } else if let Some(bytes) = self.piece.take() {
                self.intake.take(bytes).await.map_err(refused)?;
            } else if self.is_all {
                return Ok(Fetched::All(self));
            } else {
                self.hear(left).await?;
            }
        }
    }

    async fn hear(&mut self, left: Duration) -> Result<(), StepError> {
        // What is given up is a wait, and nothing that has come.
        let Ok(part) = timeout(left, self.parts.next()).await else {
            if self.heard_at.elapsed() >= STALL {
                let reason = format!("nothing of the copy came for {} s", STALL.as_secs());
                return Err(StepError::retry(reason));
            }
            return Ok(());
        };
        self.heard_at = Instant::now();
        let part = part.ok_or_else(|| StepError::retry("the copy ends in the middle"))?;
        match part.map_err(|error| StepError::retry(error.to_string()))? {
            Part::Piece(piece) => {
                (self.upto, self.piece) = (piece.offset, Some(piece.bytes));
            }
            Part::End(size) => (self.upto, self.is_all) = (size, true),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::testing;
    use crate::image::blob::FileStore;
    use crate::image::{Images, snapshot};

    fn id(n: u128) -> OperationId {
        OperationId(uuid::Uuid::from_u128(n))
    }

    #[tokio::test]
    async fn what_nobody_comes_for_is_let_go() {
        let kept = Kept::default();
        let (one, two) = (Arc::new(()), Arc::new(()));
        let now = Instant::now();
        kept.keep(id(1), Arc::clone(&one));
        assert!(!kept.let_go(now + IDLE / 2));
        assert_eq!(Arc::strong_count(&one), 2);
        // One that is come back for is as new.
        let taken = kept.take(id(1)).unwrap();
        assert!(kept.let_go(now + IDLE / 2));
        kept.keep(id(1), taken);
        kept.keep(id(2), Arc::clone(&two));
        assert!(kept.let_go(Instant::now() + IDLE));
        assert_eq!((Arc::strong_count(&one), Arc::strong_count(&two)), (1, 1));
        assert!(kept.take(id(1)).is_none());
    }

    /// A connection that is open and silent.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_host_that_is_silent_takes_a_turn_and_no_more_and_what_had_come_is_kept() {
        let database = testing::database_in_memory().await;
        let folder = tempfile::tempdir().unwrap();
        let blobs = FileStore::open(folder.path(), "c").await.unwrap();
        let images = Images::new(database.database.clone(), Arc::new(blobs));
        let mut image = snapshot::new("i".to_owned(), "p".to_owned(), 1);
        image.row.disk_format = Some("raw".to_owned());
        let adding = image.clone();
        let added = images.database.write(move |tx| {
            let image = adding.clone();
            Box::pin(async move { Images::add(tx, image, None).await })
        });
        added.await.unwrap();
        let intake = images.begin_filling("i", "c.1", 1).await.unwrap().unwrap();
        let piece = Part::Piece(fractus_agent_api::copy::Piece {
            offset: 4096,
            bytes: Bytes::from_static(b"content"),
        });
        let parts = futures::stream::iter([Ok(piece)]).chain(futures::stream::pending());
        let turns = Arc::new(tokio::sync::Semaphore::new(1));
        let turn = turns.acquire_owned().await.unwrap();
        let fetching = Fetching::new("c.1".to_owned(), parts.boxed(), intake, turn);
        let turn = timeout(STALL / 2, fetching.some()).await;
        let Fetched::Some(mut fetching) = turn.unwrap().unwrap() else {
            panic!("it has no end");
        };
        assert_eq!(fetching.intake.size(), 4096 + 7);
        // Zeroes that took long are no silence of the host's.
        fetching.heard_at -= STALL;
        fetching.upto = fetching.intake.size() + ZEROES + 1;
        let turn = fetching.some().await;
        let Fetched::Some(mut fetching) = turn.unwrap() else {
            panic!("it has no end");
        };
        assert_eq!(fetching.intake.size(), 4096 + 7 + ZEROES + 1);
        fetching.heard_at -= STALL;
        assert!(matches!(
            fetching.some().await,
            Err(StepError::Retry { .. })
        ));
    }
}
