//! Who leads and who follows: the decision alone, seats at one table on both engines, and the fence.

use std::sync::atomic::{AtomicBool, Ordering};

use sea_orm::{DbErr, EntityTrait};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

use super::seat::{Beats, Decision, Turn, decide};
use super::store::{controller, leader};
use super::*;
use crate::agents::fleet::Fleet;
use crate::clock::{Clock, SimulatedClock};
use crate::database::{is_fenced_off, testing};

fn me(name: &str, life: u128) -> Me {
    Me {
        name: name.to_owned(),
        incarnation: Uuid::from_u128(life),
        agents_url: format!("https://{name}:1"),
    }
}

fn row(of: &Me, beats: i64) -> controller::Model {
    controller::Model {
        incarnation: of.incarnation.to_string(),
        name: of.name.clone(),
        agents_url: of.agents_url.clone(),
        beats,
        seen_at_us: 0,
    }
}

fn led_by(of: &Me, term: i64) -> leader::Model {
    leader::Model {
        id: 1,
        term,
        incarnation: of.incarnation.to_string(),
        name: of.name.clone(),
    }
}

const LEASE_US: i64 = LEASE.as_micros() as i64;

#[test]
fn who_leads_is_succeeded_only_when_its_beats_have_stood_still_for_a_lease() {
    let (a, b) = (me("a", 1), me("b", 2));
    let present = led_by(&a, 7);
    let mut beats = Beats::default();
    let at = |beats: &Beats, now| decide(&b, Some(&present), beats, true, now);
    beats.see(&[row(&a, 5)], 1000);
    assert_eq!(at(&beats, 1000), Decision::Follow);
    assert_eq!(at(&beats, 1000 + LEASE_US - 1), Decision::Follow);
    beats.see(&[row(&a, 5)], 1000 + LEASE_US - 1);
    assert_eq!(at(&beats, 1000 + LEASE_US), Decision::TakeOver(Term(7)));
    beats.see(&[row(&a, 6)], 1000 + LEASE_US);
    assert_eq!(
        at(&beats, 1000 + LEASE_US),
        Decision::Follow,
        "it beats again"
    );
    beats.see(&[], 1000 + LEASE_US);
    let gone = at(&beats, 1000 + LEASE_US);
    assert_eq!(gone, Decision::TakeOver(Term(7)), "it has resigned");
}

#[test]
fn a_controller_that_is_started_again_succeeds_itself_at_once() {
    let (old, new) = (me("a", 1), me("a", 2));
    let mut beats = Beats::default();
    beats.see(&[row(&old, 5)], 0);
    let present = led_by(&old, 7);
    let take = Decision::TakeOver(Term(7));
    assert_eq!(decide(&new, Some(&present), &beats, true, 1), take);
    // Two that have one name do not take the lead from each other for ever.
    let later = decide(&new, Some(&present), &beats, false, 1);
    assert_eq!(later, Decision::Follow);
    let own = led_by(&new, 8);
    let lead = Decision::Lead(Term(8));
    assert_eq!(decide(&new, Some(&own), &beats, false, 1), lead);
    let first = decide(&new, None, &beats, false, 1);
    assert_eq!(first, Decision::TakeOver(Term(0)));
}

fn seat(database: &Database, clock: &SimulatedClock, me: Me) -> (Seat, Lead) {
    let clock: Arc<dyn Clock> = Arc::new(clock.clone());
    Seat::new(database.clone(), clock, Arc::new(Fleet::default()), me)
}

/// A write that changes nothing but is one.
async fn write(database: &Database) -> Result<(), DbErr> {
    let write = database
        .write(|tx| Box::pin(async move { leader::Entity::find().one(tx).await.map(drop) }));
    write.await
}

#[tokio::test]
async fn what_a_leader_writes_is_refused_once_another_term_has_begun() {
    testing::engines(|database| async move {
        let clock = SimulatedClock::starting_at(1);
        let (mut first, led) = seat(&database, &clock, me("a", 1));
        let (mut second, follows) = seat(&database, &clock, me("b", 2));
        assert!(!led.leads());
        assert_eq!(first.beat().await.unwrap(), Turn::Begins(Term(1)));
        assert_eq!(second.beat().await.unwrap(), Turn::Follows);
        assert!(follows.database().is_none());
        assert_eq!(led.controllers(), ["https://a:1"]);
        assert_eq!(follows.controllers(), ["https://a:1", "https://b:1"]);
        let old = led.database().unwrap();
        write(&old).await.unwrap();

        // A freezes, and knows nothing of it.
        clock.advance(LEASE);
        assert_eq!(second.beat().await.unwrap(), Turn::Begins(Term(2)));
        assert_eq!(follows.controllers(), ["https://b:1"]);
        assert!(led.leads());
        for stale in [old, led.database().unwrap()] {
            let refused = write(&stale).await.unwrap_err();
            assert!(is_fenced_off(&refused), "{refused}");
        }
        write(&follows.database().unwrap()).await.unwrap();
        write(&database).await.unwrap();

        // It thaws.
        assert_eq!(first.beat().await.unwrap(), Turn::Follows);
        assert!(led.database().is_none());
        assert_eq!(led.controllers(), ["https://b:1", "https://a:1"]);
        second.resign().await.unwrap();
        assert!(!follows.leads());
        assert_eq!(first.beat().await.unwrap(), Turn::Begins(Term(3)));
    })
    .await;
}

#[tokio::test]
async fn of_many_that_start_together_one_leads() {
    testing::engines(|database| async move {
        let clock = SimulatedClock::starting_at(1);
        let mut beats = Vec::new();
        let mut leads = Vec::new();
        for n in 1..=6 {
            let (mut seat, lead) = seat(&database, &clock, me(&format!("c{n}"), n));
            beats.push(async move { seat.beat().await.unwrap() });
            leads.push(lead);
        }
        let turns = futures::future::join_all(beats).await;
        let begun = turns.iter().filter(|turn| **turn == Turn::Begins(Term(1)));
        assert_eq!(begun.count(), 1, "{turns:?}");
        assert_eq!(leads.iter().filter(|lead| lead.leads()).count(), 1);
    })
    .await;
}

#[tokio::test]
async fn the_next_term_begins_only_after_the_writes_of_the_last_that_are_under_way() {
    testing::engines(|database| async move {
        let clock = SimulatedClock::starting_at(1);
        let (mut first, led) = seat(&database, &clock, me("a", 1));
        let (mut second, _) = seat(&database, &clock, me("b", 2));
        first.beat().await.unwrap();
        second.beat().await.unwrap();
        clock.advance(LEASE);
        let (inside, goes_on) = (Arc::new(Notify::new()), Arc::new(Semaphore::new(0)));
        let committed = Arc::new(AtomicBool::new(false));
        let slow = {
            let (inside, goes_on) = (Arc::clone(&inside), Arc::clone(&goes_on));
            let (database, committed) = (led.database().unwrap(), Arc::clone(&committed));
            tokio::spawn(async move {
                let write = database.write(move |tx| {
                    let (inside, goes_on) = (Arc::clone(&inside), Arc::clone(&goes_on));
                    Box::pin(async move {
                        inside.notify_one();
                        drop(goes_on.acquire().await);
                        leader::Entity::find().one(tx).await.map(drop)
                    })
                });
                write.await.unwrap();
                committed.store(true, Ordering::SeqCst);
            })
        };
        inside.notified().await;
        let next = tokio::spawn(async move { second.beat().await.unwrap() });
        // However long the one takes, the other does not overtake it.
        for _ in 0..100 {
            tokio::task::yield_now().await;
            assert!(!next.is_finished());
        }
        goes_on.add_permits(10);
        slow.await.unwrap();
        assert!(committed.load(Ordering::SeqCst));
        assert_eq!(next.await.unwrap(), Turn::Begins(Term(2)));
        let refused = write(&led.database().unwrap()).await.unwrap_err();
        assert!(is_fenced_off(&refused), "{refused}");
    })
    .await;
}

#[tokio::test]
async fn the_leader_hears_what_another_controller_calls_for() {
    let test = testing::postgres().await;
    let clock = SimulatedClock::starting_at(1);
    let (_seat, leads) = seat(&test.database, &clock, me("a", 1));
    let (_other, follows) = seat(&test.database, &clock, me("b", 2));
    let stop = CancellationToken::new();
    let (heard, mut hears) = tokio::sync::mpsc::unbounded_channel();
    let until = stop.clone();
    let listening = tokio::spawn(async move {
        let tell = |subject: &str| drop(heard.send(subject.to_owned()));
        leads.listen(until, tell).await;
    });
    // Until it listens, calls are lost.
    let subject = loop {
        follows.call("a-server").await;
        match hears.try_recv() {
            Ok(subject) => break subject,
            Err(_) => tokio::task::yield_now().await,
        }
    };
    assert_eq!(subject, "a-server");
    stop.cancel();
    listening.await.unwrap();
}

/// Else a controller that freezes within a transaction keeps the next leader waiting.
#[tokio::test]
async fn the_server_ends_transactions_that_stand_still() {
    use sea_orm::{ConnectionTrait, DbBackend, Statement};
    let test = testing::postgres().await;
    let show = "SHOW idle_in_transaction_session_timeout".to_owned();
    let shown = test
        .database
        .reader()
        .query_one_raw(Statement::from_string(DbBackend::Postgres, show))
        .await;
    let shown: String = shown.unwrap().unwrap().try_get_by_index(0).unwrap();
    assert_eq!(shown, "10s");
}
