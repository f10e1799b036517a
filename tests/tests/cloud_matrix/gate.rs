//! Where a message of one migration is caught, and held until the test has broken something.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use fractus_agent_api::migration::{MigrationId, StreamKey};
use tokio::sync::watch;

use super::letter::Letter;
use super::line::Line;
use super::spot::{Seen, Sides, Spot};

/// What becomes of the message that was caught.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    Delivered,
    Cut,
    Unanswered,
    Doubled,
}

/// Longest wait for a migration to get to the message.
const COMES: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Armed,
    Caught,
    Open(Fate),
}

struct Trap {
    spot: Spot,
    sides: Sides,
    state: watch::Sender<State>,
}

/// Of one pair of hosts.
#[derive(Default)]
pub struct Gate {
    trap: Mutex<Option<Trap>>,
    /// Of the migration that its target was told of last.
    key: Mutex<Option<StreamKey>>,
    line: Mutex<Option<((MigrationId, u16), Line)>>,
    doubled: Mutex<Option<Letter>>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gate {
    /// The next message of this kind is caught.
    pub fn arm(&self, spot: Spot, sides: Sides) {
        *lock(&self.trap) = Some(Trap {
            spot,
            sides,
            state: watch::Sender::new(State::Armed),
        });
    }

    pub async fn caught(&self) -> Result<()> {
        let state = lock(&self.trap).as_ref().map(|trap| trap.state.subscribe());
        let mut state = state.context("nothing is armed")?;
        let caught = state.wait_for(|state| *state != State::Armed);
        let caught = tokio::time::timeout(COMES, caught).await;
        caught.context("the migration did not get there")??;
        Ok(())
    }

    /// The message that was caught goes its way; so do all from then on.
    pub fn open(&self, fate: Fate) {
        if let Some(trap) = lock(&self.trap).take() {
            trap.state.send_replace(State::Open(fate));
        }
    }

    /// Waits if this is what is caught.
    pub async fn meet(&self, seen: &[Seen<'_>]) -> Fate {
        self.pass(seen, true).await
    }

    /// The same of what only repeats it, and is not caught itself.
    pub async fn meet_again(&self, seen: &[Seen<'_>]) {
        self.pass(seen, false).await;
    }

    async fn pass(&self, seen: &[Seen<'_>], catches: bool) -> Fate {
        let (mut state, first) = {
            let trap = lock(&self.trap);
            let is = |trap: &&Trap| seen.iter().any(|seen| trap.spot.is(seen, trap.sides));
            let Some(trap) = trap.as_ref().filter(is) else {
                return Fate::Delivered;
            };
            let first = trap.state.send_if_modified(|state| {
                let first = catches && *state == State::Armed;
                if first {
                    *state = State::Caught;
                }
                first
            });
            (trap.state.subscribe(), first)
        };
        let open = state.wait_for(|state| matches!(state, State::Open(_)));
        match open.await.map(|state| *state) {
            Ok(State::Open(fate)) if first => fate,
            _ => Fate::Delivered,
        }
    }

    pub fn learn(&self, key: &StreamKey) {
        *lock(&self.key) = Some(key.clone());
    }

    /// The target listens for this migration; `line` makes the way to it, once.
    pub fn listens(&self, migration: MigrationId, port: u16, line: impl FnOnce(StreamKey) -> Line) {
        let mut known = lock(&self.line);
        let is = (migration, port);
        if known.as_ref().is_none_or(|(known, _)| *known != is)
            && let Some(key) = lock(&self.key).clone()
        {
            // That of before ends first.
            drop(known.take());
            *known = Some((is, line(key)));
        }
    }

    pub fn keep(&self, letter: Letter) {
        *lock(&self.doubled) = Some(letter);
    }

    /// What was doubled.
    pub fn kept(&self) -> Option<Letter> {
        lock(&self.doubled).take()
    }
}
