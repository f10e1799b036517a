//! The engine on both databases, with kinds that record what they do.

use std::collections::BTreeSet;
use std::sync::{Mutex, atomic::AtomicBool, atomic::AtomicU32, atomic::Ordering};

use super::*;
use crate::clock::{Clock, SimulatedClock, SystemClock};
use crate::database::{Database, testing};
use crate::event;
use crate::random::SystemRandom;

/// What the steps have done to the world, and how they are to misbehave.
#[derive(Default)]
struct World {
    there: Mutex<BTreeSet<&'static str>>,
    log: Mutex<Vec<String>>,
    fail_at: Mutex<Option<&'static str>>,
    retry_left: AtomicU32,
    blocked: AtomicBool,
    undo_fails: AtomicBool,
    finish_fails: AtomicBool,
}

struct Put(&'static str, Arc<World>);

#[async_trait]
impl Step for Put {
    fn name(&self) -> &'static str {
        self.0
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        self.1
            .log
            .lock()
            .unwrap()
            .push(format!("{} run {}", operation.subject, self.0));
        self.1.there.lock().unwrap().insert(self.0);
        if *self.1.fail_at.lock().unwrap() == Some(self.0) {
            return Err(StepError::fail("as the test wants"));
        }
        if self.1.retry_left.load(Ordering::SeqCst) > 0 {
            self.1.retry_left.fetch_sub(1, Ordering::SeqCst);
            return Err(StepError::retry("not now"));
        }
        if self.1.blocked.load(Ordering::SeqCst) {
            return Ok(Progress::Wait(Duration::from_secs(3600)));
        }
        Ok(Progress::Done)
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        _tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let mut done: Vec<String> = operation.state()?;
        done.push(self.0.to_owned());
        operation.set_state(&done)
    }

    async fn undo(&self, _operation: &Operation) -> Result<Progress, StepError> {
        self.1.log.lock().unwrap().push(format!("undo {}", self.0));
        if self.1.undo_fails.load(Ordering::SeqCst) {
            return Err(StepError::fail("cannot be undone"));
        }
        self.1.there.lock().unwrap().remove(self.0);
        Ok(Progress::Done)
    }
}

struct Three {
    version: i32,
    world: Arc<World>,
    outcome: Arc<Mutex<Vec<Outcome>>>,
}

#[async_trait]
impl Kind for Three {
    fn name(&self) -> &'static str {
        "three"
    }

    fn version(&self) -> i32 {
        self.version
    }

    fn steps(&self) -> Vec<Arc<dyn Step>> {
        let step = |name| Arc::new(Put(name, Arc::clone(&self.world))) as Arc<dyn Step>;
        vec![step("a"), step("b"), step("c")]
    }

    async fn finish(
        &self,
        operation: &Operation,
        outcome: &Outcome,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        if self.world.finish_fails.load(Ordering::SeqCst) {
            let half = "UPDATE operation SET request_id = 'half-done'";
            sea_orm::ConnectionTrait::execute_unprepared(tx, half).await?;
            return Err(StepError::fail(format!(
                "{} is not understood",
                operation.id
            )));
        }
        self.outcome.lock().unwrap().push(outcome.clone());
        Ok(())
    }
}

struct Bench {
    engine: Arc<Engine>,
    database: Database,
    world: Arc<World>,
    outcome: Arc<Mutex<Vec<Outcome>>>,
}

fn bench(database: &Database, version: i32, clock: Arc<dyn Clock>) -> Bench {
    let world = Arc::new(World::default());
    let outcome = Arc::new(Mutex::default());
    let mut kinds = Kinds::default();
    kinds.register(Arc::new(Three {
        version,
        world: Arc::clone(&world),
        outcome: Arc::clone(&outcome),
    }));
    let random = Arc::new(SystemRandom);
    let engine = Engine::new(database.clone(), kinds, clock, random);
    Bench {
        engine,
        database: database.clone(),
        world,
        outcome,
    }
}

impl Bench {
    async fn submit(&self, subject: &str) -> String {
        let id = self.insert(subject).await;
        self.engine.wake(subject);
        id
    }

    /// Writes the operation and wakes nobody.
    async fn insert(&self, subject: &str) -> String {
        let none: [String; 0] = [];
        let prepared = self
            .engine
            .prepare("three", subject, &none, Default::default())
            .unwrap();
        let id = prepared.id().to_owned();
        self.database
            .write(move |tx| {
                let prepared = prepared.clone();
                Box::pin(async move { prepared.insert(tx).await })
            })
            .await
            .unwrap();
        id
    }

    /// Turns until nothing can be done at once.
    async fn settle(&self, subject: &str) -> Advance {
        loop {
            match self.engine.advance(subject).await {
                Advance::Advanced => {}
                other => return other,
            }
        }
    }
}

fn standing() -> Arc<SimulatedClock> {
    Arc::new(SimulatedClock::starting_at(1_000_000))
}

#[tokio::test]
async fn steps_run_in_order_and_their_commits_change_the_state() {
    testing::engines(|database| async move {
        let bench = bench(&database, 1, standing());
        bench.submit("s").await;
        assert_eq!(bench.settle("s").await, Advance::Idle);
        assert_eq!(
            *bench.world.log.lock().unwrap(),
            ["s run a", "s run b", "s run c"]
        );
        assert_eq!(*bench.outcome.lock().unwrap(), [Outcome::Done]);
        let events = event::of_subject(database.reader(), "s").await.unwrap();
        let phases: Vec<_> = events.iter().map(|event| event.phase.as_str()).collect();
        assert_eq!(phases, ["requested", "done"]);
        let row = <row::Entity as sea_orm::EntityTrait>::find().one(database.reader());
        assert_eq!(row.await.unwrap().unwrap().state, r#"["a","b","c"]"#);
    })
    .await;
}

#[tokio::test]
async fn each_step_that_fails_is_undone_with_all_before_it_last_first() {
    testing::engines(|database| async move {
        for (failing, undone) in [
            ("a", vec!["undo a"]),
            ("b", vec!["undo b", "undo a"]),
            ("c", vec!["undo c", "undo b", "undo a"]),
        ] {
            let bench = bench(&database, 1, standing());
            *bench.world.fail_at.lock().unwrap() = Some(failing);
            bench.submit(failing).await;
            assert_eq!(bench.settle(failing).await, Advance::Idle);
            let log = bench.world.log.lock().unwrap().clone();
            let undos: Vec<_> = log.iter().filter(|line| line.starts_with("undo")).collect();
            assert_eq!(undos, undone);
            assert!(bench.world.there.lock().unwrap().is_empty());
            let reason = "as the test wants".to_owned();
            assert_eq!(*bench.outcome.lock().unwrap(), [Outcome::Undone { reason }]);
        }
    })
    .await;
}

#[tokio::test]
async fn a_new_engine_goes_on_with_the_step_that_was_not_recorded() {
    let test = testing::database().await;
    let first = bench(&test.database, 1, standing());
    first.submit("s").await;
    assert_eq!(first.engine.advance("s").await, Advance::Advanced);
    drop(first.engine);
    let second = bench(&test.database, 1, standing());
    assert_eq!(second.settle("s").await, Advance::Idle);
    assert_eq!(*second.world.log.lock().unwrap(), ["s run b", "s run c"]);
}

#[tokio::test]
async fn a_step_that_asks_to_be_repeated_is_with_growing_pauses() {
    let test = testing::database().await;
    let bench = bench(&test.database, 1, standing());
    bench.world.retry_left.store(3, Ordering::SeqCst);
    bench.submit("s").await;
    let mut pauses = Vec::new();
    while let Advance::Wait(pause) = bench.settle("s").await {
        pauses.push(pause.as_millis());
    }
    assert_eq!(pauses, [100, 200, 400]);
    assert_eq!(*bench.outcome.lock().unwrap(), [Outcome::Done]);
}

#[tokio::test]
async fn one_subjects_operations_run_one_after_the_other_in_order_of_request() {
    let test = testing::database().await;
    let bench = bench(&test.database, 1, standing());
    let first = bench.submit("s").await;
    let second = bench.submit("s").await;
    bench.world.blocked.store(true, Ordering::SeqCst);
    assert!(matches!(bench.settle("s").await, Advance::Wait(_)));
    let open: Vec<_> = unfinished(test.database.reader(), Some("s")).await.unwrap();
    let open: Vec<_> = open.into_iter().map(|row| (row.id, row.step)).collect();
    assert_eq!(open, [(first, 0), (second, 0)]);
    bench.world.blocked.store(false, Ordering::SeqCst);
    assert_eq!(bench.settle("s").await, Advance::Idle);
    assert_eq!(bench.world.log.lock().unwrap().len(), 7);
}

#[tokio::test]
async fn an_unknown_version_is_undone_by_its_recorded_steps() {
    let test = testing::database().await;
    let old = bench(&test.database, 1, standing());
    old.submit("s").await;
    old.engine.advance("s").await;
    let new = bench(&test.database, 2, standing());
    assert_eq!(new.settle("s").await, Advance::Idle);
    assert_eq!(*new.world.log.lock().unwrap(), ["undo b", "undo a"]);
    let outcomes = new.outcome.lock().unwrap().clone();
    assert!(matches!(&outcomes[..], [Outcome::Undone { reason }] if reason.contains("version 1")));
}

#[tokio::test]
async fn an_unknown_kind_is_parked_and_the_next_operation_of_the_subject_runs() {
    let test = testing::database().await;
    let bench = bench(&test.database, 1, standing());
    bench.submit("s").await;
    test.database
        .write(|tx| {
            Box::pin(async move {
                sea_orm::ConnectionTrait::execute_unprepared(
                    tx,
                    "UPDATE operation SET kind = 'gone'",
                )
                .await
                .map(|_| ())
            })
        })
        .await
        .unwrap();
    bench.submit("s").await;
    assert_eq!(bench.settle("s").await, Advance::Idle);
    assert_eq!(*bench.outcome.lock().unwrap(), [Outcome::Done]);
    let open = unfinished(test.database.reader(), None).await.unwrap();
    assert_eq!(open.len(), 1);
    assert!(
        open[0]
            .parked
            .as_ref()
            .unwrap()
            .contains("not known to this release")
    );
}

#[tokio::test]
async fn a_cancelled_operation_is_undone_even_if_a_step_of_it_is_waiting() {
    testing::engines(|database| async move {
        let bench = bench(&database, 1, Arc::new(SystemClock));
        bench.engine.start().await.unwrap();
        bench.world.blocked.store(true, Ordering::SeqCst);
        bench.submit("s").await;
        let cancelled = database
            .write(|tx| Box::pin(async move { cancel(tx, "s", &["three"], "deleted").await }))
            .await
            .unwrap();
        assert_eq!(cancelled, 1);
        bench.engine.wake("s");
        let undone = async {
            while bench.outcome.lock().unwrap().is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), undone)
            .await
            .unwrap();
        let reason = "deleted".to_owned();
        assert_eq!(*bench.outcome.lock().unwrap(), [Outcome::Undone { reason }]);
        assert!(bench.world.there.lock().unwrap().is_empty());
        bench.engine.stop().await;
    })
    .await;
}

#[tokio::test]
async fn a_started_engine_finishes_many_subjects_by_itself_and_stops_cleanly() {
    let test = testing::database().await;
    let bench = bench(&test.database, 1, Arc::new(SystemClock));
    bench.engine.start().await.unwrap();
    for i in 0..40 {
        bench.submit(&format!("s{i}")).await;
    }
    // Asked of the database: an outcome is told within a transaction, which may be repeated.
    let all = async {
        while !unfinished(test.database.reader(), None)
            .await
            .unwrap()
            .is_empty()
        {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), all)
        .await
        .unwrap();
    bench.engine.stop().await;
    let told = bench.outcome.lock().unwrap().len();
    // PostgreSQL may repeat a transaction, and with it what was told inside.
    assert!(
        told == 40 || (testing::on_postgres() && told > 40),
        "{told}"
    );
}

#[tokio::test]
async fn an_operation_whose_wake_up_was_lost_is_found_by_the_sweep() {
    let test = testing::database().await;
    let clock = standing();
    let bench = bench(&test.database, 1, Arc::clone(&clock) as _);
    bench.engine.start().await.unwrap();
    bench.insert("s").await;
    let found = async {
        while bench.outcome.lock().unwrap().is_empty() {
            clock.advance(Duration::from_secs(1));
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), found)
        .await
        .unwrap();
    assert_eq!(*bench.outcome.lock().unwrap(), [Outcome::Done]);
    bench.engine.stop().await;
}

#[tokio::test]
async fn an_operation_whose_kind_cannot_even_finish_it_is_parked_and_the_next_one_runs() {
    testing::engines(|database| async move {
        let bench = bench(&database, 1, standing());
        *bench.world.fail_at.lock().unwrap() = Some("b");
        bench.world.undo_fails.store(true, Ordering::SeqCst);
        bench.world.finish_fails.store(true, Ordering::SeqCst);
        let first = bench.submit("s").await;
        assert_eq!(bench.settle("s").await, Advance::Idle);
        let open = unfinished(database.reader(), None).await.unwrap();
        let parked: Vec<_> = open
            .iter()
            .map(|row| (row.id.clone(), row.parked.clone(), row.request_id.clone()))
            .collect();
        let reason = Some("cannot be undone".to_owned());
        assert_eq!(parked, [(first, reason, None)], "and nothing half-done");
        let events = event::of_subject(database.reader(), "s").await.unwrap();
        let phases: Vec<_> = events.iter().map(|event| event.phase.as_str()).collect();
        assert_eq!(phases, ["requested", "failed"]);
        *bench.world.fail_at.lock().unwrap() = None;
        bench.world.finish_fails.store(false, Ordering::SeqCst);
        bench.submit("s").await;
        assert_eq!(bench.settle("s").await, Advance::Idle);
        assert_eq!(*bench.outcome.lock().unwrap(), [Outcome::Done]);
    })
    .await;
}
