//! A controller's seat among the others: it beats, looks at the others' beats, and takes the lead when
//! nobody has it any more.

use std::collections::BTreeMap;
use std::sync::Arc;

use sea_orm::DbErr;
use tokio::sync::watch;
use uuid::Uuid;

use super::store::{self, controller, leader};
use super::{LEASE, Lead, Me, Term, View};
use crate::agents::fleet::Fleet;
use crate::agents::host;
use crate::clock::Clock;
use crate::database::Database;

/// One controller's. [`Seat::beat`] is a turn of it, and all that the simulation uses.
pub struct Seat {
    database: Database,
    clock: Arc<dyn Clock>,
    fleet: Arc<Fleet>,
    me: Me,
    seen: watch::Sender<View>,
    beats: Beats,
    /// When a beat was last written, by the own clock.
    beaten_at_us: i64,
    started: bool,
}

/// What a turn came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// This controller leads, as before.
    Leads,
    /// It leads from now on: all that is unfinished is its to carry on.
    Begins(Term),
    Follows,
}

/// The counts of the controllers, as who looks has seen them by its own clock.
#[derive(Debug, Clone, Default)]
pub(super) struct Beats(BTreeMap<String, Count>);

#[derive(Debug, Clone, Copy)]
struct Count {
    beats: i64,
    /// Since when it stands still.
    since_us: i64,
    /// It has been seen to rise: it is no mere row that a dead one left.
    rose: bool,
}

impl Beats {
    pub(super) fn see(&mut self, rows: &[controller::Model], now_us: i64) {
        self.0
            .retain(|known, _| rows.iter().any(|row| row.incarnation == *known));
        for row in rows {
            let count = |rose| Count {
                beats: row.beats,
                since_us: now_us,
                rose,
            };
            let known = self.0.entry(row.incarnation.clone());
            let seen = known.or_insert_with(|| count(false));
            if seen.beats != row.beats {
                *seen = count(true);
            }
        }
    }

    /// Whether there is such a controller whose count has risen within the lease.
    pub(super) fn lives(&self, incarnation: &str, now_us: i64) -> bool {
        let lease = i64::try_from(LEASE.as_micros()).unwrap_or(i64::MAX);
        self.0
            .get(incarnation)
            .is_some_and(|count| now_us.saturating_sub(count.since_us) < lease)
    }

    /// Whether it beats beside who looks.
    fn beats(&self, incarnation: &str, now_us: i64) -> bool {
        let rose = self.0.get(incarnation).is_some_and(|count| count.rose);
        rose && self.lives(incarnation, now_us)
    }
}

/// What to do about the lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    Lead(Term),
    /// Begin the term after this one.
    TakeOver(Term),
    Follow,
}

/// Pure. `starting`: this controller has not led or followed before in this life.
pub(super) fn decide(
    me: &Me,
    present: Option<&leader::Model>,
    beats: &Beats,
    starting: bool,
    now_us: i64,
) -> Decision {
    let Some(present) = present else {
        return Decision::TakeOver(Term(0));
    };
    let term = Term(present.term);
    if present.incarnation == me.incarnation.to_string() {
        return Decision::Lead(term);
    }
    // An earlier life of this one: nobody has to wait until it is cold.
    let earlier = starting && present.name == me.name;
    if earlier || !beats.lives(&present.incarnation, now_us) {
        Decision::TakeOver(term)
    } else {
        Decision::Follow
    }
}

/// What one turn's transaction has read and done.
struct Read {
    controllers: Vec<controller::Model>,
    present: Option<leader::Model>,
    beats: Beats,
}

impl Seat {
    /// Not at the table before the first [`beat`](Self::beat).
    pub fn new(
        database: Database,
        clock: Arc<dyn Clock>,
        fleet: Arc<Fleet>,
        me: Me,
    ) -> (Self, Lead) {
        let (seen, view) = watch::channel(View {
            term: None,
            controllers: vec![me.agents_url.clone()],
        });
        let lead = Lead {
            database: database.clone(),
            view,
            alone: false,
        };
        let seat = Self {
            database,
            beaten_at_us: clock.now_us(),
            clock,
            fleet,
            me,
            seen,
            beats: Beats::default(),
            started: false,
        };
        (seat, lead)
    }

    /// Says that this controller lives, looks who leads, and takes the lead if nobody has it.
    ///
    /// # Errors
    /// Those of the database. A leader that cannot beat for as long as its lease stands back: by then
    /// another may lead.
    pub async fn beat(&mut self) -> Result<Turn, DbErr> {
        let turn = self.turn().await;
        if turn.is_err() {
            let now = self.clock.now_us();
            let lease = i64::try_from(LEASE.as_micros()).unwrap_or(i64::MAX);
            if now.saturating_sub(self.beaten_at_us) >= lease {
                self.stand_back();
            }
        }
        turn
    }

    async fn turn(&mut self) -> Result<Turn, DbErr> {
        let now = self.clock.now_us();
        let read = self.write_and_read(now).await?;
        let hosts = host::all(self.database.reader()).await?;
        self.fleet.meet(&hosts);
        let term = read
            .present
            .as_ref()
            .filter(|present| present.incarnation == self.me.incarnation.to_string())
            .map(|present| Term(present.term));
        let before = self.seen.borrow().term;
        let begins = term.filter(|_| term != before);
        if begins.is_some() {
            // What was heard in an earlier term is too old to go by.
            self.fleet.begin(now);
        }
        let leader = read.present.as_ref().map(|present| &*present.incarnation);
        let controllers = self.list(&read, leader, now);
        self.beats = read.beats;
        self.beaten_at_us = now;
        self.started = true;
        if before.is_some() && term.is_none() {
            tracing::warn!("another controller leads now");
        }
        self.seen.send_replace(View { term, controllers });
        Ok(match (begins, term) {
            (Some(term), _) => Turn::Begins(term),
            (None, Some(_)) => Turn::Leads,
            (None, None) => Turn::Follows,
        })
    }

    async fn write_and_read(&self, now: i64) -> Result<Read, DbErr> {
        let (me, beats, starting) = (self.me.clone(), self.beats.clone(), !self.started);
        self.database
            .write(move |tx| {
                let (me, mut beats) = (me.clone(), beats.clone());
                Box::pin(async move {
                    store::beat(tx, &me, now).await?;
                    let controllers = store::controllers(tx).await?;
                    beats.see(&controllers, now);
                    let mut present = store::present(tx).await?;
                    let decision = decide(&me, present.as_ref(), &beats, starting, now);
                    if let Decision::TakeOver(last) = decision {
                        store::take_over(tx, last, &me).await?;
                        present = store::present(tx).await?;
                    }
                    Ok::<_, DbErr>(Read {
                        controllers,
                        present,
                        beats,
                    })
                })
            })
            .await
    }

    /// Where agents are to call, the leader first.
    fn list(&self, read: &Read, leader: Option<&str>, now: i64) -> Vec<String> {
        let mut living: Vec<_> = read
            .controllers
            .iter()
            .filter(|row| read.beats.lives(&row.incarnation, now))
            .collect();
        let me = self.me.incarnation.to_string();
        living.sort_by_key(|row| (Some(&*row.incarnation) != leader, row.agents_url.clone()));
        let namesake = |row: &&controller::Model| {
            row.name == self.me.name
                && row.incarnation != me
                && read.beats.beats(&row.incarnation, now)
        };
        if living.iter().any(namesake) {
            tracing::error!(
                name = self.me.name,
                "another controller has this one's name: give each its own (--name)"
            );
        }
        let mut urls: Vec<String> = living.iter().map(|row| row.agents_url.clone()).collect();
        urls.dedup();
        urls
    }

    /// Another controller may lead by now.
    fn stand_back(&self) {
        self.seen.send_if_modified(|view| {
            if view.term.is_some() {
                tracing::error!(
                    "the database does not answer: this controller does not lead any more"
                );
            }
            view.term.take().is_some()
        });
    }

    /// The controller ends: another one may lead at once.
    pub async fn resign(self) -> Result<(), DbErr> {
        self.stand_back_quietly();
        let incarnation: Uuid = self.me.incarnation;
        self.database
            .write(move |tx| Box::pin(async move { store::resign(tx, incarnation).await }))
            .await
    }

    fn stand_back_quietly(&self) {
        self.seen
            .send_if_modified(|view| view.term.take().is_some());
    }
}
