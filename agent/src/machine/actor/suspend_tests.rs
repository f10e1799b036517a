//! Suspend in the actor alone: what is believed of a file, and when, whatever comes between two steps.

use std::fs;
use std::time::Duration;

use fractus_agent_api::machine::Power;

use super::tests::*;
use super::*;
use crate::machine::process::Status;

/// The attempt that the process was told of last.
fn attempt(stage: &Stage) -> Uuid {
    let told = stage.told.lock().unwrap();
    let mut attempts = told.iter().filter_map(|told| match told {
        Told::Suspend(attempt) => Some(*attempt),
        _ => None,
    });
    attempts.next_back().unwrap()
}

fn says(stage: &Stage, attempt: Uuid, what: Result<(), &str>) {
    let what = what.map_err(str::to_owned);
    stage.words.say(Heard::Suspended(attempt, what));
}

/// Turns until the process has been told, or nothing more is said.
async fn turn(stage: &mut Stage) {
    let a_while = Duration::from_millis(50);
    let _ = tokio::time::timeout(a_while, stage.actor.turn()).await;
}

async fn suspended(folder: &std::path::Path) -> Stage {
    let mut stage = Stage::running(folder).await;
    stage.words.answer(Ok(()));
    stage.actor.take(put(2, Power::Suspended).0);
    stage.settle(Observed::Suspended).await;
    stage
}

fn written(stage: &Stage) -> Record {
    Record::read(&stage.actor.paths.record()).unwrap()
}

#[tokio::test]
async fn memory_is_believed_when_its_own_attempt_has_succeeded() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.actor.take(put(2, Power::Suspended).0);
    says(&stage, Uuid::from_u128(7), Ok(()));
    turn(&mut stage).await;
    assert!(written(&stage).kept.is_none());
    assert!(!stage.actor.paths.memory().exists());
    let first = attempt(&stage);
    // The turn was dropped; the next one begins anew, and the first one's answer is not its own.
    says(&stage, first, Ok(()));
    turn(&mut stage).await;
    assert!(written(&stage).kept.is_none());
    assert_ne!(attempt(&stage), first);
    stage.words.answer(Ok(()));
    stage.settle(Observed::Suspended).await;
    let record = written(&stage);
    assert!(record.kept.is_some() && record.process.is_none());
    assert_eq!(
        record.version, 2,
        "not for an agent that knows of no such thing"
    );
    assert!(stage.actor.paths.memory().exists());
}

#[tokio::test]
async fn a_guest_that_was_not_suspended_runs_on_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.actor.take(put(2, Power::Suspended).0);
    stage.words.answer(Err("no space left"));
    stage.actor.turn().await.ok().unwrap();
    let report = stage.reports.borrow().clone();
    let Observed::Failed { reason } = &report.observed else {
        panic!("{report:?}");
    };
    assert!(reason.contains("no space left"), "{reason}");
    assert!(!stage.actor.paths.new_memory().exists());
    assert_eq!(stage.told.lock().unwrap().last(), Some(&Told::Resume));
    stage.actor.take(put(3, Power::Running).0);
    stage.settle(Observed::Running).await;
    assert_eq!(stage.reports.borrow().starts, 1);
}

#[tokio::test]
async fn what_was_kept_is_so_no_more_before_the_guest_may_run() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = suspended(folder.path()).await;
    fs::write(stage.actor.paths.memory(), b"memory").unwrap();
    stage.actor.take(put(3, Power::Running).0);
    // Not ready: it is still kept, by the record on the disk, which names the process.
    turn(&mut stage).await;
    let record = written(&stage);
    assert!(record.kept.is_some() && record.process.is_some());
    // As an agent finds it that comes after a crash: that process is ended, and another is made of what
    // is kept.
    stage.words.say(Heard::Ready { lacks: false });
    stage.words.say(Heard::Ready { lacks: false });
    stage.settle(Observed::Running).await;
    let record = written(&stage);
    assert!(record.kept.is_none() && record.process.is_some_and(|process| process.ran));
    assert_eq!(record.version, 1);
    assert!(!stage.actor.paths.memory().exists());
    let goes_on = |told: &&Told| **told == Told::GoOn;
    assert_eq!(stage.told.lock().unwrap().iter().filter(goes_on).count(), 2);
}

#[tokio::test]
async fn a_process_that_cannot_be_made_of_it_leaves_it_kept() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = suspended(folder.path()).await;
    stage.actor.take(put(3, Power::Running).0);
    stage.words.say(Heard::Failed("damaged".to_owned()));
    let detail = "status 1".to_owned();
    stage.words.say(Heard::Ended(End::Silent { detail }));
    let reason = "damaged".to_owned();
    stage.settle(Observed::Failed { reason }).await;
    assert!(written(&stage).kept.is_some());
    stage.actor.take(put(4, Power::Running).0);
    stage.words.say(Heard::Ready { lacks: false });
    stage.settle(Observed::Running).await;
    assert!(written(&stage).kept.is_none());
}

#[tokio::test]
async fn a_newer_intent_ends_a_suspension_and_one_that_was_kept() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.actor.take(put(2, Power::Suspended).0);
    stage.mailbox.try_send(put(3, Power::Running).0).unwrap();
    stage.actor.turn().await.ok().unwrap();
    assert!(!stage.actor.paths.new_memory().exists());
    let late = attempt(&stage);
    says(&stage, late, Ok(()));
    stage.words.say(Heard::Event(MachineEvent::Paused));
    stage.hear_all();
    // It stands still, and is told to go on.
    turn(&mut stage).await;
    assert_eq!(stage.told.lock().unwrap().last(), Some(&Told::Resume));
    stage.words.say(Heard::Event(MachineEvent::Running));
    stage.settle(Observed::Running).await;
    assert!(written(&stage).kept.is_none());
    assert_eq!(stage.reports.borrow().starts, 1);

    let folder = tempfile::tempdir().unwrap();
    let mut stage = suspended(folder.path()).await;
    stage.actor.take(put(3, Power::Stopped).0);
    let reason = StopReason::Requested;
    stage.settle(Observed::Stopped { reason }).await;
    assert!(written(&stage).kept.is_none() && !stage.actor.paths.memory().exists());
}

#[tokio::test]
async fn an_answer_that_is_lost_with_its_connection_is_asked_for_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.actor.take(put(2, Power::Suspended).0);
    let Heard::Status(again) = status(State::Paused, None) else {
        panic!();
    };
    stage.words.say(Heard::Status(Status {
        moving: None,
        fresh: true,
        ..again
    }));
    stage.actor.turn().await.ok().unwrap();
    let first = attempt(&stage);
    stage.words.answer(Ok(()));
    stage.settle(Observed::Suspended).await;
    assert_ne!(attempt(&stage), first);
}

const SOON: Duration = Duration::from_millis(100);

#[tokio::test]
async fn memory_that_is_not_written_in_time_fails_its_suspension() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running_with(folder.path(), |_| SOON).await;
    stage.actor.take(put(2, Power::Suspended).0);
    stage.actor.turn().await.ok().unwrap();
    let reason = "the guest was not suspended: its memory was not written in time".to_owned();
    let observed = Observed::Failed { reason };
    assert_eq!(stage.reports.borrow().observed, observed);
    assert_eq!(stage.told.lock().unwrap().last(), Some(&Told::Resume));
    // It is written all the same, into a file that nobody will read.
    let late = attempt(&stage);
    says(&stage, late, Ok(()));
    stage.hear_all();
    turn(&mut stage).await;
    assert_eq!(stage.reports.borrow().observed, observed);
    assert!(written(&stage).kept.is_none());
    assert!(!stage.actor.paths.memory().exists() && !stage.actor.paths.new_memory().exists());
    stage.words.say(Heard::Event(MachineEvent::Paused));
    stage.hear_all();
    stage.actor.take(put(3, Power::Running).0);
    turn(&mut stage).await;
    assert_eq!(stage.told.lock().unwrap().last(), Some(&Told::Resume));
    stage.words.say(Heard::Event(MachineEvent::Running));
    stage.settle(Observed::Running).await;
    assert_eq!(stage.reports.borrow().starts, 1);
}

#[tokio::test]
async fn memory_that_is_not_read_in_time_is_still_kept() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running_with(folder.path(), |_| SOON).await;
    stage.words.answer(Ok(()));
    stage.actor.take(put(2, Power::Suspended).0);
    stage.settle(Observed::Suspended).await;
    fs::write(stage.actor.paths.memory(), b"memory").unwrap();
    stage.actor.take(put(3, Power::Running).0);
    let reason = "the guest's memory was not read in time".to_owned();
    let observed = Observed::Failed { reason };
    stage.settle(observed).await;
    let record = written(&stage);
    assert!(record.kept.is_some() && record.process.is_none());
    assert!(stage.actor.paths.memory().exists());
    // It is not tried again by itself, but when somebody wants it to run anew.
    let starts = stage.reports.borrow().starts;
    turn(&mut stage).await;
    assert_eq!(stage.reports.borrow().starts, starts);
    stage.words.say(Heard::Ready { lacks: false });
    stage.actor.take(put(4, Power::Running).0);
    stage.settle(Observed::Running).await;
    assert!(written(&stage).kept.is_none());
    assert!(!stage.actor.paths.memory().exists());
}

#[tokio::test]
async fn a_host_that_rebooted_meanwhile_starts_nobody_to_be_suspended() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.actor.take(put(2, Power::Suspended).0);
    let reason = StopReason::HostReboot;
    stage.words.say(Heard::Ended(End::Said(reason.clone())));
    stage.settle(Observed::Stopped { reason }).await;
    assert_eq!(stage.reports.borrow().starts, 1);
}
