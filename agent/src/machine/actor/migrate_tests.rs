//! A guest that goes on here, in the actor alone: what is on the disk before its process is told so, and what is not.

use std::fs;
use std::path::Path;

use fractus_agent_api::machine::Revision;
use fractus_agent_api::migration::{MigrationId, PUT_VERSION, State as Stream, Transit};

use super::tests::*;
use super::*;

const MIGRATION: MigrationId = MigrationId(Uuid::from_u128(5));

/// A guest has come, and stands still.
async fn arrived(folder: &Path) -> Stage {
    let mut stage = Stage::running(folder).await;
    let actor = &mut stage.actor;
    actor.phase = Phase::Paused;
    actor.travel.transit = Transit::Arrived(MIGRATION);
    if let Some(process) = &mut actor.record.process {
        (process.ran, process.came) = (false, Some(true));
    }
    let path = actor.paths.record();
    actor.record.prepare_to_write_fast(&path).unwrap();
    actor.publish();
    stage
}

type Answered = oneshot::Receiver<Result<MachineReport, Refusal>>;

/// It is this host's, and goes on.
fn continues(stage: &mut Stage, revision: u64) -> Answered {
    let (message, answered) = put(revision, Power::Running);
    let Message::Put(mut put, answer) = message else {
        unreachable!("as it was made")
    };
    put.version = PUT_VERSION;
    put.wanted.continues = Some(MIGRATION);
    stage.actor.take(Message::Put(put, answer));
    answered
}

fn written(stage: &Stage) -> Record {
    Record::read(&stage.actor.paths.record()).unwrap()
}

#[tokio::test]
async fn that_a_guest_goes_on_is_on_the_disk_with_the_intent_that_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = arrived(folder.path()).await;
    let before = written(&stage);
    continues(&mut stage, 2).try_recv().unwrap().unwrap();
    let record = written(&stage);
    assert_eq!(record.intent.revision, Revision(2));
    assert_eq!(record.done.continued, Some(MIGRATION));
    assert_eq!(record.done.starts, before.done.starts + 1);
    assert_eq!(
        stage.reports.borrow().observed,
        Observed::Arriving,
        "it was not told yet"
    );
    stage.settle(Observed::Running).await;
    let report = stage.reports.borrow().migration.clone().unwrap();
    assert_eq!((report.id, report.state), (MIGRATION, Stream::Continued));
    // One write to the slots, and none between it and the word to the process.
    assert_eq!(written(&stage).serial, before.serial.map(|it| it + 1));
    assert_eq!(written(&stage).done, record.done);
}

#[tokio::test]
async fn a_guest_that_is_gone_before_its_process_was_told_has_not_gone_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = arrived(folder.path()).await;
    let before = written(&stage);
    continues(&mut stage, 2).try_recv().unwrap().unwrap();
    let detail = "killed".to_owned();
    stage.words.say(Heard::Ended(End::Silent { detail }));
    stage.hear_all();
    let reason = "the machine's process ended before its guest ran".to_owned();
    stage.settle(Observed::Failed { reason }).await;
    // So the row may go back to where it stands still.
    let report = stage.reports.borrow().migration.clone().unwrap();
    assert!(matches!(report.state, Stream::Failed { .. }), "{report:?}");
    assert_eq!(written(&stage).done, before.done);
    assert_eq!(written(&stage).intent.revision, Revision(2));
}

#[tokio::test]
async fn an_intent_that_cannot_be_written_has_nothing_go_on() {
    let folder = tempfile::tempdir().unwrap();
    let mut stage = arrived(folder.path()).await;
    let before = written(&stage);
    let path = stage.actor.paths.record();
    let slots = path.with_extension("slots");
    fs::remove_file(&slots).unwrap();
    let in_the_way = [slots, path.with_extension("new")];
    for folder in &in_the_way {
        fs::create_dir(folder).unwrap();
    }
    let answer = continues(&mut stage, 2).try_recv().unwrap();
    assert!(matches!(answer, Err(Refusal::Unavailable { .. })));
    assert_eq!(written(&stage).done, before.done);
    assert_eq!(
        stage.actor.next(),
        decision::Step::Kill,
        "nobody wants it yet"
    );
    for folder in &in_the_way {
        fs::remove_dir(folder).unwrap();
    }
    continues(&mut stage, 2).try_recv().unwrap().unwrap();
    stage.settle(Observed::Running).await;
    assert_eq!(written(&stage).done.continued, Some(MIGRATION));
}

/// Its process is told that it goes on, and is gone then.
async fn told_and_gone(folder: &Path, words: Vec<Heard>, reason: &str) -> Stage {
    let mut stage = arrived(folder).await;
    continues(&mut stage, 2).try_recv().unwrap().unwrap();
    // Heard after that.
    words.into_iter().for_each(|heard| stage.words.say(heard));
    let detail = "killed".to_owned();
    stage.words.say(Heard::Ended(End::Silent { detail }));
    let reason = reason.to_owned();
    stage.settle(Observed::Failed { reason }).await;
    stage
}

#[tokio::test]
async fn a_guest_whose_process_never_read_that_it_goes_on_has_not() {
    let folder = tempfile::tempdir().unwrap();
    let reason = "the machine's process ended before its guest ran";
    let stage = told_and_gone(folder.path(), vec![Heard::GoUnread], reason).await;
    let report = stage.reports.borrow().clone();
    let migration = report.migration.unwrap();
    assert!(
        matches!(migration.state, Stream::Failed { .. }),
        "{migration:?}"
    );
    let done = written(&stage).done;
    assert_eq!((done.continued, done.starts), (None, 1));
}

#[tokio::test]
async fn whether_a_guest_went_on_whose_process_may_have_read_that_is_not_said() {
    let folder = tempfile::tempdir().unwrap();
    let reason = migrate::MAY_HAVE_RUN;
    let stage = told_and_gone(folder.path(), Vec::new(), reason).await;
    assert_eq!(stage.reports.borrow().migration, None);
    assert_eq!(written(&stage).done.continued, Some(MIGRATION));
}

/// Who ends it, and what was told by whom.
#[derive(Debug, Clone, Copy)]
enum Ends {
    Late,
    /// It was told by the agent before, of which this one knows by the record.
    LateOfAnother,
    /// Its guest has run since, and this is another boot, by the same intent.
    LateOfABoot,
    Wanted,
}

#[tokio::test]
async fn who_ends_a_process_that_does_not_say_that_its_guest_goes_on_begins_no_other() {
    for ends in [
        Ends::Late,
        Ends::LateOfAnother,
        Ends::LateOfABoot,
        Ends::Wanted,
    ] {
        let folder = tempfile::tempdir().unwrap();
        let mut stage = arrived(folder.path()).await;
        continues(&mut stage, 2).try_recv().unwrap().unwrap();
        let actor = &mut stage.actor;
        assert!(actor.go_on().await.is_ok());
        match ends {
            Ends::Late => actor.kill_late().await,
            Ends::LateOfAnother => {
                actor.travel = Default::default();
                actor.kill_late().await;
            }
            Ends::LateOfABoot => {
                stage.settle(Observed::Running).await;
                let actor = &mut stage.actor;
                actor.kill().await;
                assert!(actor.start().await.is_ok());
                actor.kill_late().await;
            }
            Ends::Wanted => actor.kill().await,
        }
        let late = matches!(ends, Ends::Late | Ends::LateOfAnother);
        let record = written(&stage);
        assert_eq!(record.done.continued, Some(MIGRATION));
        let is_kept = matches!(record.stop, Some(StopReason::VmmFault { .. }));
        assert_eq!(is_kept, late, "{ends:?}");
        // Also for the agent after this one, or by an intent that is no wish for another guest.
        stage.actor.failed = None;
        let rests = stage.actor.next() == decision::Step::Settled;
        assert_eq!(rests, late, "{ends:?}");
    }
}
