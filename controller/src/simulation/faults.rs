//! Every step of every registered kind of operation fails in turn, and the controller dies at every
//! one of its effects: nothing is left of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use fractus_agent_api::machine::ServerId;
use sea_orm::{DatabaseTransaction, Set};
use uuid::Uuid;

use super::requests;
use super::world::{Plan, World};
use crate::compute::model::state::ServerState;
use crate::compute::ops::change::Change;
use crate::compute::store::server;
use crate::http::App;
use crate::operation::{Advance, Kind, Kinds, Operation, Outcome, Progress, Step, StepError};

/// Where a step is made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Run,
    /// It has done its work, and says that it has failed.
    AfterRun,
    Commit,
}

/// A kind whose step `index` fails once.
struct Failing {
    kind: Arc<dyn Kind>,
    step: usize,
    at: At,
    armed: Arc<AtomicBool>,
}

struct FailingStep {
    step: Arc<dyn Step>,
    at: At,
    armed: Arc<AtomicBool>,
}

impl FailingStep {
    fn fails(&self, at: At) -> Result<(), StepError> {
        if self.at == at && self.armed.swap(false, Ordering::SeqCst) {
            return Err(StepError::fail("as the test wants"));
        }
        Ok(())
    }
}

#[async_trait]
impl Step for FailingStep {
    fn name(&self) -> &'static str {
        self.step.name()
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        self.fails(At::Run)?;
        let progress = self.step.run(operation).await?;
        self.fails(At::AfterRun)?;
        Ok(progress)
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        self.step.commit(operation, tx).await?;
        self.fails(At::Commit)
    }

    async fn undo(&self, operation: &Operation) -> Result<Progress, StepError> {
        self.step.undo(operation).await
    }

    async fn undo_commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        self.step.undo_commit(operation, tx).await
    }
}

#[async_trait]
impl Kind for Failing {
    fn name(&self) -> &'static str {
        self.kind.name()
    }

    fn version(&self) -> i32 {
        self.kind.version()
    }

    fn steps(&self) -> Vec<Arc<dyn Step>> {
        let mut steps = self.kind.steps();
        if let Some(step) = steps.get_mut(self.step) {
            let (inner, armed) = (Arc::clone(step), Arc::clone(&self.armed));
            *step = Arc::new(FailingStep {
                step: inner,
                at: self.at,
                armed,
            });
        }
        steps
    }

    async fn finish(
        &self,
        operation: &Operation,
        outcome: &Outcome,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        self.kind.finish(operation, outcome, tx).await
    }
}

/// A cloud with one server that is ready for an operation of `kind`, and what asks for it. A new kind
/// needs a line here: without one these tests fail.
pub(super) async fn scenario(kind: &str) -> (World, Uuid) {
    let mut world = World::new(
        1,
        Plan {
            hosts: 2,
            servers: 1,
            events: 0,
        },
    )
    .await;
    let id = Uuid::from_u128(77);
    world.servers.push(id);
    let before: &[Change] = match kind {
        "server_create" => return (world, id),
        "server_start" => &[Change::Stop],
        "server_unpause" => &[Change::Pause],
        "server_resume" => &[Change::Suspend],
        _ => &[],
    };
    ask(&world.app(), "server_create", id).await;
    world.heal().await;
    for change in before {
        let app = &world.controller.as_ref().unwrap().app;
        assert!(requests::change(app, id, *change).await.unwrap());
        world.heal().await;
    }
    if matches!(kind, "server_unshelve" | "server_shelve_offload") {
        ask(&world.app(), "server_shelve", id).await;
        world.heal().await;
    }
    if matches!(kind, "server_confirm_resize" | "server_revert_resize") {
        ask(&world.app(), "server_resize", id).await;
        world.heal().await;
    }
    if kind == "server_shelve_offload" {
        let shelved = server::ActiveModel {
            state: Set(ServerState::Shelved.key()),
            ..Default::default()
        };
        let write = world.database().write(move |tx| {
            let shelved = shelved.clone();
            Box::pin(async move { server::update(tx, &id.to_string(), shelved).await })
        });
        write.await.unwrap();
    }
    if kind == "server_evacuate" {
        let server = ServerId(id);
        let host = world
            .hosts
            .iter()
            .find(|host| host.processes().contains(&server));
        let host = Arc::clone(host.unwrap());
        world.loses(&host).await;
    }
    (world, id)
}

/// The request; what a crash cuts off is the user's to repeat or not.
pub(super) async fn ask(app: &App, kind: &str, id: Uuid) {
    let change = match kind {
        "server_create" => return drop(requests::create(app, id).await),
        "server_delete" => return drop(requests::delete(app, id).await),
        "server_live_migrate" => return drop(requests::migrate(app, id, None, false).await),
        "server_live_post_copy" => return drop(requests::migrate(app, id, None, true).await),
        "server_evacuate" => return drop(requests::evacuate(app, id, None).await),
        "server_shelve" | "server_unshelve" => {
            return drop(requests::shelve_or_unshelve(app, id).await);
        }
        "server_shelve_offload" => return drop(requests::offload(app, id).await),
        "server_resize" | "server_confirm_resize" => {
            return drop(requests::resize(app, id, true).await);
        }
        "server_migrate" | "server_revert_resize" => {
            return drop(requests::resize(app, id, false).await);
        }
        "server_create_image" => return drop(requests::image(app, id).await),
        "server_start" => Change::Start,
        "server_stop" => Change::Stop,
        "server_soft_reboot" => Change::SoftReboot,
        "server_hard_reboot" => Change::HardReboot,
        "server_pause" => Change::Pause,
        "server_unpause" => Change::Unpause,
        "server_suspend" => Change::Suspend,
        "server_resume" => Change::Resume,
        "server_rebuild" => Change::Rebuild,
        other => panic!("no scenario for operations of kind {other}: add one"),
    };
    drop(requests::change(app, id, change).await);
}

fn registered(world: &World) -> Vec<(&'static str, usize)> {
    let engine = &world.controller.as_ref().unwrap().engine;
    engine
        .kinds()
        .iter()
        .map(|kind| (kind.name(), kind.steps().len()))
        .collect()
}

pub(super) async fn all_kinds() -> Vec<(&'static str, usize)> {
    let world = World::new(
        1,
        Plan {
            hosts: 1,
            servers: 0,
            events: 0,
        },
    )
    .await;
    registered(&world)
}

#[tokio::test]
async fn every_step_of_every_kind_may_fail_and_nothing_is_left() {
    for (kind, steps) in all_kinds().await {
        for step in 0..steps {
            for at in [At::Run, At::AfterRun, At::Commit] {
                let (mut world, id) = scenario(kind).await;
                let armed = Arc::new(AtomicBool::new(true));
                let failing = Arc::clone(&armed);
                world.kinds = Box::new(move |kinds: Kinds| {
                    let mut wrapped = Kinds::default();
                    for known in kinds.iter() {
                        let (inner, armed) = (Arc::clone(known), Arc::clone(&failing));
                        if inner.name() == kind {
                            wrapped.register(Arc::new(Failing {
                                kind: inner,
                                step,
                                at,
                                armed,
                            }));
                        } else {
                            wrapped.register(inner);
                        }
                    }
                    wrapped
                });
                world.start_controller().await;
                world.everybody_reports().await;
                ask(&world.app(), kind, id).await;
                world.heal().await;
                eprintln!("{kind} step {step} {at:?}");
                assert!(!armed.load(Ordering::SeqCst), "the step was reached");
                world.check_rest().await;
            }
        }
    }
}

#[tokio::test]
async fn the_controller_may_die_at_every_effect_of_every_kind() {
    for (kind, _) in all_kinds().await {
        let mut effects = 0;
        loop {
            let (mut world, id) = scenario(kind).await;
            let doom = Arc::clone(&world.controller.as_ref().unwrap().doom);
            doom.arm(effects);
            ask(&world.app(), kind, id).await;
            let engine = Arc::clone(&world.controller.as_ref().unwrap().engine);
            // The operation alone, with the hosts at work between its turns.
            for _ in 0..20 {
                let advance = engine.advance(&id.to_string()).await;
                if doom.is_dead() || advance == Advance::Idle {
                    break;
                }
                world.hosts_work();
                world.everybody_reports().await;
            }
            let died = doom.is_dead();
            eprintln!("{kind} effect {effects}: died {died}");
            world.heal().await;
            world.check_rest().await;
            if !died {
                assert!(
                    effects >= 4,
                    "{kind} has at least a request, a call and an end"
                );
                break;
            }
            effects += 1;
            assert!(effects < 100, "{kind} has no end");
        }
    }
}
