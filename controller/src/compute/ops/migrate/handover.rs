//! How long a guest stood still for its owner's move, by the clock of the controller that moved it.
//!
//! What a source says of a pause ends with its offer, by its own clock. The hosts' clocks and the controller's are not one,
//! so what lies between two of them is in no part here: the ways of the source's word and of the target's. A guest runs
//! before its target's word that it does is heard, so the last part is an upper bound.
//!
//! Kept in memory while a migration is under way: of one that another controller has carried on, or this one after a
//! restart, nothing is known.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fractus_agent_api::migration::{MigrationId, Progress};
use sea_orm::ActiveValue::Set;
use sea_orm::{DatabaseTransaction, DbErr};
use serde_json::{Value, json};

use crate::reconcile::migration;

/// One that was offered longer ago is over, or nobody counts microseconds of it.
const FORGOTTEN_US: i64 = 3_600_000_000;

/// Of all migrations that are under way. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Handovers(Arc<Mutex<HashMap<MigrationId, Moments>>>);

/// Microseconds since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Moments {
    /// The source's offer was heard.
    offered: i64,
    /// The owner's row was on the disk.
    moved: Option<i64>,
    /// The target has said that what it was told is on its disk.
    told: Option<i64>,
    /// The target has said that the guest goes on.
    runs: Option<i64>,
    /// The target has said that all of the guest's memory is there, and the source not yet.
    whole: Option<i64>,
}

/// How long a source may take to say that it has heard that, microseconds.
const LAST_WORD_US: i64 = 8_000_000;

impl Handovers {
    pub(super) fn offered(&self, id: MigrationId, at_us: i64) {
        let mut all = self.all();
        all.retain(|_, moments| at_us - moments.offered < FORGOTTEN_US);
        all.entry(id).or_insert(Moments {
            offered: at_us,
            moved: None,
            told: None,
            runs: None,
            whole: None,
        });
    }

    /// The target has everything, and the source may be about to say what that took.
    pub(super) fn awaits_last_word(&self, id: MigrationId, now_us: i64) -> bool {
        let mut all = self.all();
        let Some(moments) = all.get_mut(&id) else {
            return false;
        };
        let since = *moments.whole.get_or_insert(now_us);
        (0..LAST_WORD_US).contains(&(now_us - since))
    }

    pub(super) fn moved(&self, id: MigrationId, at_us: i64) {
        if let Some(moments) = self.all().get_mut(&id) {
            moments.moved.get_or_insert(at_us);
        }
    }

    pub(super) fn told(&self, id: MigrationId, at_us: i64) {
        if let Some(moments) = self.all().get_mut(&id) {
            moments.told.get_or_insert(at_us);
        }
    }

    pub(super) fn runs(&self, id: MigrationId, at_us: i64) {
        if let Some(moments) = self.all().get_mut(&id) {
            moments.runs.get_or_insert(at_us);
        }
    }

    /// None: not all of it is known.
    fn parts(&self, id: MigrationId) -> Option<Value> {
        let moments = self.all().get(&id).copied()?;
        let (moved, runs) = (moments.moved?, moments.runs?);
        // That it runs may be heard before the answer.
        let told = moments.told.map_or(runs, |told| told.min(runs));
        Some(json!({
            "decide_us": moved - moments.offered,
            "tell_us": told - moved,
            "run_us": runs - told,
        }))
    }

    /// Adds them to what is kept of the migration; part of the transaction that follows them.
    pub(super) async fn keep(
        &self,
        tx: &DatabaseTransaction,
        id: MigrationId,
    ) -> Result<(), DbErr> {
        let Some(parts) = self.parts(id) else {
            return Ok(());
        };
        let row = migration::find(tx, id).await?;
        let progress = row.and_then(|row| serde_json::from_str::<Value>(&row.progress?).ok());
        let Some(Value::Object(mut progress)) = progress else {
            return Ok(());
        };
        progress.insert(migration::HANDOVER.to_owned(), parts);
        let change = migration::ActiveModel {
            progress: Set(Some(Value::Object(progress).to_string())),
            ..Default::default()
        };
        migration::update(tx, id, change).await
    }

    fn all(&self) -> MutexGuard<'_, HashMap<MigrationId, Moments>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the source has said since, in place of what it had said before. What its owner's move took stays beside it, also
/// where that was longer ago than anybody remembers.
pub(super) async fn keep_progress(
    tx: &DatabaseTransaction,
    id: MigrationId,
    progress: &Progress,
) -> Result<(), DbErr> {
    let Ok(Value::Object(mut next)) = serde_json::to_value(progress) else {
        return Ok(());
    };
    let row = migration::find(tx, id).await?;
    if let Some(parts) = row.and_then(|row| row.handover()) {
        next.insert(migration::HANDOVER.to_owned(), parts);
    }
    let change = migration::ActiveModel {
        progress: Set(Some(Value::Object(next).to_string())),
        ..Default::default()
    };
    migration::update(tx, id, change).await
}

#[cfg(test)]
mod tests {
    use sea_orm::prelude::Uuid;

    use super::*;

    const ID: MigrationId = MigrationId(Uuid::from_u128(1));

    #[test]
    fn the_parts_add_up_to_what_passed_between_the_two_words() {
        let handovers = Handovers::default();
        handovers.offered(ID, 1_000);
        handovers.offered(ID, 5_000);
        handovers.moved(ID, 4_000);
        handovers.moved(ID, 6_000);
        handovers.told(ID, 7_000);
        assert_eq!(handovers.parts(ID), None, "it does not run yet");
        handovers.runs(ID, 9_000);
        let parts = json!({"decide_us": 3_000, "tell_us": 3_000, "run_us": 2_000});
        assert_eq!(handovers.parts(ID), Some(parts));
    }

    #[test]
    fn a_word_that_comes_before_the_answer_is_both() {
        let handovers = Handovers::default();
        handovers.offered(ID, 1_000);
        handovers.moved(ID, 4_000);
        handovers.runs(ID, 4_500);
        let parts = json!({"decide_us": 3_000, "tell_us": 500, "run_us": 0});
        assert_eq!(handovers.parts(ID), Some(parts.clone()));
        handovers.told(ID, 5_000);
        assert_eq!(handovers.parts(ID), Some(parts));
    }

    #[test]
    fn a_sources_last_word_is_waited_for_a_while_by_whoever_has_seen_its_first() {
        let handovers = Handovers::default();
        assert!(!handovers.awaits_last_word(ID, 1_000));
        handovers.offered(ID, 1_000);
        assert!(handovers.awaits_last_word(ID, 5_000));
        assert!(handovers.awaits_last_word(ID, 5_000 + LAST_WORD_US - 1));
        assert!(!handovers.awaits_last_word(ID, 5_000 + LAST_WORD_US));
    }

    #[test]
    fn what_this_controller_has_not_seen_has_no_parts() {
        let handovers = Handovers::default();
        handovers.moved(ID, 4_000);
        handovers.told(ID, 5_000);
        handovers.runs(ID, 6_000);
        assert_eq!(handovers.parts(ID), None);
        handovers.offered(ID, 1_000);
        let later = MigrationId(Uuid::from_u128(2));
        handovers.offered(later, 1_000 + FORGOTTEN_US);
        assert_eq!(handovers.all().len(), 1, "it is forgotten");
    }
}
