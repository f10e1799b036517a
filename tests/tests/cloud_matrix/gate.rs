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
/// Between two pieces of memory that come slowly.
const PIECE: Duration = Duration::from_millis(300);

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
    follows: watch::Sender<Follows>,
    /// It has been heard that the guest runs at its target.
    runs: watch::Sender<bool>,
}

/// Whether a guest's memory is to follow it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Follows {
    /// It is sent as fast as it goes.
    #[default]
    Not,
    /// It will be, and memory comes slowly until its source has been told.
    Will,
    /// Its source has been told.
    Told,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gate {
    /// The next message of this kind is caught.
    pub fn arm(&self, spot: Spot, sides: Sides) {
        self.runs.send_replace(false);
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

    /// The guest that came there last runs at this agent.
    pub fn runs_at(&self, agent: usize) {
        let is_its = |trap: &Trap| trap.sides.target == agent;
        if lock(&self.trap).as_ref().is_some_and(is_its) {
            self.runs.send_replace(true);
        }
    }

    /// What is to become of the next guest's memory.
    pub fn follows(&self, how: Follows) {
        self.follows.send_replace(how);
    }

    /// Its source has been told, if it was to be.
    pub fn was_told_to_follow(&self) {
        let told = |follows: &mut Follows| {
            let will = *follows == Follows::Will;
            if will {
                *follows = Follows::Told;
            }
            will
        };
        self.follows.send_if_modified(told);
    }

    pub async fn is_told_to_follow(&self) -> Result<()> {
        let mut follows = self.follows.subscribe();
        let told = follows.wait_for(|follows| *follows == Follows::Told);
        let told = tokio::time::timeout(COMES, told).await;
        told.context("its source was not told that its memory follows")??;
        Ok(())
    }

    /// A piece of memory comes, which goes before the guest or behind it: it waits while it would come too early.
    pub async fn paces(&self, is_behind: bool) {
        if is_behind {
            let armed = {
                let trap = lock(&self.trap);
                let is_before = |trap: &Trap| trap.spot.is_before_memory();
                (trap.as_ref()).map(|trap| (trap.state.subscribe(), is_before(trap)))
            };
            let Some((mut state, is_before)) = armed else {
                return;
            };
            let mut runs = self.runs.subscribe();
            let is_open = state.wait_for(|state| matches!(state, State::Open(_)));
            tokio::select! {
                _ = is_open => {}
                _ = runs.wait_for(|runs| *runs), if !is_before => {}
            }
            return;
        }
        let mut follows = self.follows.subscribe();
        let not_yet = follows.wait_for(|follows| *follows != Follows::Will);
        // A piece now and then: its source is not to wait for this line for long.
        let _ = tokio::time::timeout(PIECE, not_yet).await;
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
