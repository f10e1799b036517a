//! An upgrade in the actor alone: whom the record names, and who is told what, whatever comes between two steps.

use fractus_agent_api::migration::MigrationId;

use super::tests::*;
use super::*;
use crate::machine::record::ProcessRecord;

/// Turns until it is settled what became of the machine.
async fn fate(stage: &mut Stage, all: bool) -> Fate {
    let (answer, mut answered) = oneshot::channel();
    stage.actor.take(Message::Upgrade(all, answer));
    loop {
        if let Ok(fate) = answered.try_recv() {
            return fate;
        }
        let turn = tokio::time::timeout(SHUTDOWN, stage.actor.turn()).await;
        assert!(matches!(turn, Ok(Ok(()))), "nobody says what became of it");
    }
}

fn recorded(stage: &Stage) -> ProcessRecord {
    let record = Record::read(&stage.actor.paths.record()).unwrap();
    assert_eq!(record.process, stage.actor.record.process);
    record.process.unwrap()
}

/// What the processes were told, but for the number of the attempt.
fn told(stage: &Stage) -> Vec<Told> {
    let told = stage.told.lock().unwrap().clone();
    let told = told.into_iter().map(|told| match told {
        Told::HandOver(_) => Told::HandOver(MigrationId(Uuid::nil())),
        told => told,
    });
    told.collect()
}

const HAND_OVER: Told = Told::HandOver(MigrationId(Uuid::nil()));

fn failed(reason: &str) -> Fate {
    let reason = reason.to_owned();
    Fate::Failed { reason }
}

#[tokio::test]
async fn the_record_names_the_new_process_before_it_may_run_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.words.say(Heard::Event(MachineEvent::Panicked));
    stage.hear_all();
    stage.words.answer(Ok(()));
    stage.upgrade.heir.say(Heard::Ready { lacks: false });
    let blackout_us = Some(1500);
    assert_eq!(
        fate(&mut stage, false).await,
        Fate::HandedOver { blackout_us }
    );
    assert_eq!(
        told(&stage),
        [HAND_OVER, Told::Go(2), Told::Settle, Told::Kill(1)]
    );
    let process = recorded(&stage);
    assert!(process.pid == 2 && process.ran && process.guest.panicked);
    let report = stage.reports.borrow().clone();
    assert_eq!((report.starts, &report.observed), (1, &Observed::Running));
    assert!(report.settled && report.migration.is_none());
    // Again: it is in one already.
    assert_eq!(fate(&mut stage, false).await, Fate::Current);
}

#[tokio::test]
async fn a_new_process_that_cannot_take_it_leaves_it_to_the_old_one() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.words.answer(Ok(()));
    stage.upgrade.heir.say(Heard::Failed("no KVM".to_owned()));
    assert_eq!(fate(&mut stage, false).await, failed("no KVM"));
    // It goes on only once the other one has ended.
    assert_eq!(told(&stage), [HAND_OVER, Told::Kill(2), Told::Stay]);
    assert_eq!(recorded(&stage).pid, 1);
    stage.settle(Observed::Running).await;

    stage.words.answer(Err("refused"));
    assert_eq!(fate(&mut stage, false).await, failed("refused"));
    assert_eq!(recorded(&stage).pid, 1);
    let left = std::fs::read_dir(stage.actor.paths.folder()).unwrap();
    let prepared = |name: &std::ffi::OsStr| name.to_string_lossy().ends_with(".next");
    assert!(!left.flatten().any(|file| prepared(&file.file_name())));
}

#[tokio::test]
async fn a_newer_intent_ends_it_before_the_commit() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.mailbox.try_send(put(2, Power::Paused).0).unwrap();
    let Fate::Skipped { reason } = fate(&mut stage, false).await else {
        panic!("{:?}", told(&stage))
    };
    assert_eq!(reason, "it is being changed");
    assert_eq!(told(&stage), [HAND_OVER, Told::Kill(2), Told::Stay]);
    assert_eq!(recorded(&stage).pid, 1);
}

/// Said while the words of both processes are on their way.
#[tokio::test]
async fn an_intent_that_is_repeated_takes_no_word_away() {
    for _ in 0..20 {
        let folder = tempfile::tempdir().unwrap();
        let mut stage = Stage::running(folder.path()).await;
        stage.words.answer(Ok(()));
        let (mailbox, heir) = (stage.mailbox.clone(), stage.upgrade.heir.clone());
        let says = async move {
            for _ in 0..3 {
                mailbox.try_send(put(1, Power::Running).0).unwrap();
                tokio::task::yield_now().await;
            }
            heir.say(Heard::Ready { lacks: false });
        };
        let (is, ()) = tokio::join!(fate(&mut stage, false), says);
        assert!(matches!(is, Fate::HandedOver { .. }), "{is:?}");
        assert_eq!(recorded(&stage).pid, 2);
        stage.settle(Observed::Running).await;
        assert!(stage.actor.is_here());
    }
}

#[tokio::test]
async fn a_guest_whose_old_process_ends_goes_on_if_the_new_one_has_it() {
    let detail = "signal 9".to_owned();
    let ended = Heard::Ended(End::Silent { detail });
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    // It stood still by then.
    stage.words.answer(Ok(()));
    let (words, heir) = (stage.words.clone(), stage.upgrade.heir.clone());
    let late = ended.clone();
    let says = async move {
        tokio::task::yield_now().await;
        words.say(late);
        tokio::task::yield_now().await;
        heir.say(Heard::Ready { lacks: false });
    };
    let (_, is) = tokio::join!(says, fate(&mut stage, false));
    assert!(matches!(is, Fate::HandedOver { .. }), "{is:?}");
    assert_eq!(recorded(&stage).pid, 2);
    stage.settle(Observed::Running).await;

    // It did not, as far as anybody knows: the other one may have what is not so any more.
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.words.say(ended);
    stage.upgrade.heir.say(Heard::Ready { lacks: false });
    let is = fate(&mut stage, false).await;
    assert!(matches!(is, Fate::Failed { .. }), "{is:?}");
    assert!(!told(&stage).contains(&Told::Go(2)));
    assert_eq!(stage.actor.record.process, None);
    assert!(stage.actor.record.stop.is_some());
}

#[tokio::test]
async fn a_new_process_that_is_gone_before_its_go_never_had_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    stage.upgrade.dies.store(true, Ordering::Relaxed);
    stage.words.answer(Ok(()));
    stage.upgrade.heir.say(Heard::Ready { lacks: false });
    let is = fate(&mut stage, false).await;
    assert!(matches!(is, Fate::Failed { .. }), "{is:?}");
    assert_eq!(told(&stage), [HAND_OVER, Told::Kill(2), Told::Stay]);
    assert_eq!(recorded(&stage).pid, 1);
    stage.settle(Observed::Running).await;
}

#[tokio::test]
async fn what_cannot_be_handed_over_now_is_told_why_and_stays_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    let skipped = |reason: &str| {
        let reason = reason.to_owned();
        Fate::Skipped { reason }
    };
    stage.upgrade.is_old.store(true, Ordering::Relaxed);
    assert_eq!(fate(&mut stage, false).await, skipped("older"));
    stage.actor.take(put(2, Power::Paused).0);
    let changed = skipped("it is being changed");
    assert_eq!(fate(&mut stage, false).await, changed);
    stage.actor.take(put(3, Power::Stopped).0);
    let reason = StopReason::GuestPowerOff;
    stage.words.say(Heard::Ended(End::Said(reason)));
    stage.hear_all();
    let idle = skipped("it does not run");
    assert_eq!(fate(&mut stage, false).await, idle);
    assert_eq!(told(&stage), []);
}

/// As an agent finds it that comes after a crash: the other process is none that the record names.
#[tokio::test]
async fn a_guest_that_stands_still_for_nobody_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = Stage::running(folder.path()).await;
    let id = MigrationId(Uuid::from_u128(7));
    stage.stands_still(id);
    stage.hear_all();
    stage.settle(Observed::Running).await;
    assert_eq!(told(&stage), [Told::Stay]);
    assert_eq!(recorded(&stage).pid, 1);
}
