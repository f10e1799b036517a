//! Copies in the actor alone: what counts as one, and when, whatever comes between two steps.

use std::fs;

use fractus_agent_api::copy::{CopyId, CopyState, PUT_VERSION};
use fractus_agent_api::machine::Power;

use super::tests::*;
use super::*;
use crate::machine::process::Status;

const ONE: CopyId = CopyId(Uuid::from_u128(0xc1));
const TWO: CopyId = CopyId(Uuid::from_u128(0xc2));

fn wants(revision: u64, power: Power, copy: Option<CopyId>) -> Message {
    let (Message::Put(mut put, answer), _) = put(revision, power) else {
        unreachable!("as it was made")
    };
    put.version = PUT_VERSION;
    put.wanted.copy = copy;
    put.wanted.copies = u64::from(copy.is_some());
    Message::Put(put, answer)
}

/// The attempts that the process was told of.
fn attempts(stage: &Stage) -> Vec<Uuid> {
    let told = stage.told.lock().unwrap();
    let attempts = told.iter().filter_map(|told| match told {
        Told::Copy(attempt) => Some(*attempt),
        _ => None,
    });
    attempts.collect()
}

fn says(stage: &mut Stage, attempt: Uuid, what: Result<(), &str>) {
    let what = what.map_err(str::to_owned);
    stage.words.say(Heard::Copied(attempt, what));
    stage.hear_all();
}

/// Turns until the process has been told, or nothing more is to be done.
async fn turn(stage: &mut Stage) {
    let a_while = Duration::from_millis(50);
    for _ in 0..3 {
        let _ = tokio::time::timeout(a_while, stage.actor.turn()).await;
    }
}

fn state(stage: &Stage) -> Option<CopyState> {
    let report = stage.reports.borrow();
    let copy = report.copy.clone();
    copy.map(|copy| copy.state)
}

/// What stands in the folder of copies.
fn there(stage: &Stage) -> Vec<String> {
    let entries = fs::read_dir(stage.actor.paths.folder()).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with("copy-")).collect()
}

/// With a guest that runs, of whose disk a copy has been begun.
async fn begun(folder: &std::path::Path) -> Stage {
    let mut stage = Stage::running(folder).await;
    fs::write(stage.actor.paths.disk(), b"disk").unwrap();
    stage.actor.take(wants(2, Power::Running, Some(ONE)));
    turn(&mut stage).await;
    assert_eq!(state(&stage), Some(CopyState::Copying));
    assert!(!stage.reports.borrow().settled);
    stage
}

#[tokio::test]
async fn a_copy_counts_when_its_own_attempt_has_succeeded_and_goes_with_the_wish() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = begun(folder.path()).await;
    let [attempt] = attempts(&stage)[..] else {
        panic!();
    };
    says(&mut stage, Uuid::from_u128(7), Ok(()));
    assert_eq!(state(&stage), Some(CopyState::Copying));
    fs::write(stage.actor.paths.new_copy(ONE), b"copy").unwrap();
    says(&mut stage, attempt, Ok(()));
    turn(&mut stage).await;
    assert_eq!(state(&stage), Some(CopyState::Made { bytes: 4 }));
    assert!(stage.reports.borrow().settled);
    assert_eq!(there(&stage), [format!("copy-{ONE}.raw")]);
    assert_eq!(attempts(&stage).len(), 1);
    // An agent that comes later finds it, and nothing else of copies.
    fs::write(stage.actor.paths.new_copy(TWO), b"half").unwrap();
    stage.actor.forget_copies();
    stage.actor.find_copy();
    stage.actor.publish();
    assert_eq!(state(&stage), Some(CopyState::Made { bytes: 4 }));
    assert_eq!(there(&stage).len(), 1);

    stage.actor.take(wants(3, Power::Running, None));
    turn(&mut stage).await;
    assert_eq!((state(&stage), there(&stage)), (None, vec![]));
    assert!(stage.reports.borrow().settled);
    assert_eq!(stage.reports.borrow().starts, 1);
}

#[tokio::test]
async fn a_copy_that_fails_leaves_nothing_and_is_tried_again_by_a_newer_intent() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = begun(folder.path()).await;
    let first = attempts(&stage)[0];
    says(&mut stage, first, Err("no space left"));
    turn(&mut stage).await;
    let reason = "no space left".to_owned();
    assert_eq!(state(&stage), Some(CopyState::Failed { reason }));
    let report = stage.reports.borrow().clone();
    assert!(report.settled && report.observed == Observed::Running);
    assert_eq!(there(&stage), Vec::<String>::new());
    assert_eq!(attempts(&stage).len(), 1);
    stage.actor.take(wants(3, Power::Running, Some(TWO)));
    turn(&mut stage).await;
    assert_eq!(attempts(&stage).len(), 2);
    // Late, and of another.
    says(&mut stage, first, Ok(()));
    assert_eq!(state(&stage), Some(CopyState::Copying));
    stage.actor.take(wants(4, Power::Running, None));
    turn(&mut stage).await;
    assert_eq!(stage.told.lock().unwrap().last(), Some(&Told::NoCopy));
    assert_eq!(there(&stage), Vec::<String>::new());
}

#[tokio::test]
async fn an_answer_that_is_lost_with_its_connection_is_asked_for_again() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = begun(folder.path()).await;
    let Heard::Status(again) = status(State::Running, None) else {
        panic!();
    };
    stage.words.say(Heard::Status(Status {
        moving: None,
        fresh: true,
        ..again
    }));
    stage.hear_all();
    turn(&mut stage).await;
    let all = attempts(&stage);
    assert_eq!(all.len(), 2);
    says(&mut stage, all[0], Ok(()));
    assert_eq!(state(&stage), Some(CopyState::Copying));
    says(&mut stage, all[1], Ok(()));
    assert!(matches!(state(&stage), Some(CopyState::Made { .. })));
}

/// Its guest is gone, and is not wanted back for that: the agent copies the disk that nobody has.
#[tokio::test]
async fn of_a_guest_that_ends_meanwhile_the_disk_that_it_left_is_copied() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = begun(folder.path()).await;
    let reason = StopReason::GuestPowerOff;
    stage.words.say(Heard::Ended(End::Said(reason.clone())));
    stage.hear_all();
    turn(&mut stage).await;
    assert!(matches!(state(&stage), Some(CopyState::Made { .. })));
    let copy = fs::read(stage.actor.paths.copy(ONE)).unwrap();
    assert_eq!(copy, fs::read(stage.actor.paths.disk()).unwrap());
    let report = stage.reports.borrow().clone();
    assert_eq!(
        (report.observed, report.starts),
        (Observed::Stopped { reason }, 1)
    );
    // That the copy is not wanted any more is no wish for a guest either.
    stage.actor.take(wants(3, Power::Running, None));
    turn(&mut stage).await;
    assert_eq!(stage.reports.borrow().starts, 1);
    assert_eq!(there(&stage), Vec::<String>::new());
    stage.actor.take(wants(4, Power::Absent, None));
    stage.settle(Observed::Absent).await;
}

#[tokio::test]
async fn a_host_without_room_says_so_before_the_process_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    fs::write(stage.actor.paths.folder().join("full"), b"").unwrap();
    stage.actor.take(wants(2, Power::Running, Some(ONE)));
    turn(&mut stage).await;
    let Some(CopyState::Failed { reason }) = state(&stage) else {
        panic!("{:?}", state(&stage));
    };
    assert!(reason.contains("no room"), "{reason}");
    assert_eq!(attempts(&stage), Vec::<Uuid>::new());
    assert!(stage.reports.borrow().settled);
}

/// The copy was wanted at revision 2 and withdrawn at 3, and of 2 nobody heard.
#[tokio::test]
async fn a_copy_that_came_and_went_unheard_is_no_wish_for_a_guest_that_has_ended() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    let reason = StopReason::GuestPowerOff;
    stage.words.say(Heard::Ended(End::Said(reason.clone())));
    stage.hear_all();
    let (Message::Put(mut put, answer), _) = put(3, Power::Running) else {
        unreachable!("as it was made")
    };
    put.wanted.copies = 1;
    stage.actor.take(Message::Put(put, answer));
    turn(&mut stage).await;
    let report = stage.reports.borrow().clone();
    assert_eq!(
        (report.observed, report.starts),
        (Observed::Stopped { reason }, 1)
    );
    // The same once more, at another revision, is a wish.
    let (Message::Put(mut again, answer), _) = super::tests::put(4, Power::Running) else {
        unreachable!("as it was made")
    };
    again.wanted.copies = 1;
    stage.actor.take(Message::Put(again, answer));
    stage.settle(Observed::Running).await;
    assert_eq!(stage.reports.borrow().starts, 2);
}

/// Whoever comes after an agent that has told it to copy does not know of that.
#[tokio::test]
async fn an_adopted_process_is_told_once_to_copy_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.actor.copying.may_stray();
    turn(&mut stage).await;
    let told = stage.told.lock().unwrap().clone();
    let count = told.iter().filter(|told| **told == Told::NoCopy).count();
    assert_eq!(count, 1);
    assert!(stage.reports.borrow().settled);
    // One that is to copy something else is told of that, which ends the other.
    stage.actor.copying.may_stray();
    stage.actor.take(wants(2, Power::Running, Some(ONE)));
    turn(&mut stage).await;
    assert!(matches!(
        stage.told.lock().unwrap().last(),
        Some(Told::Copy(_))
    ));
}
