//! `server_delete`: what is wanted is Absent from the request on; the one step waits for the host's
//! word that nothing is left, then owner, reservation and quota go, and the row is marked deleted. The image that a
//! shelved server is kept in goes with it.

use std::sync::Arc;

use async_trait::async_trait;
use fractus_agent_api::machine::Wanted;
use sea_orm::ActiveValue::Set;
use sea_orm::DatabaseTransaction;

use super::create::{gone, want_absent};
use super::{
    RequestError, Tools, change, create, evacuate, image, machine_id, migrate, resize, shelve,
    to_error, to_state, turn, unshelve,
};
use crate::compute::model::state::{ServerState, Standing};
use crate::compute::store::server;
use crate::event::Origin;
use crate::http::App;
use crate::operation::{self, Kind, Operation, Outcome, Progress, Step, StepError};
use crate::reconcile::{machine, migration};

pub const KIND: &str = "server_delete";

/// Writes that the server is to be gone. What else was under way with it is cancelled. Nothing
/// happens if it is being deleted already.
pub async fn request(app: &App, origin: Origin, id: &str) -> Result<(), RequestError> {
    let engine = &app.compute().engine;
    let request_id = origin.request_id.clone();
    let prepared = engine.prepare(KIND, id, &serde_json::json!({}), origin)?;
    let now = app.now_us();
    let subject = id.to_owned();
    app.database()
        .write(move |tx| {
            let (id, prepared) = (subject.clone(), prepared.clone());
            let request_id = request_id.clone();
            Box::pin(async move {
                let Some(row) = server::find(tx, &id).await? else {
                    return Ok(());
                };
                let standing = match row.state() {
                    ServerState::Deleting(_) => return Ok(()),
                    state => state.standing().unwrap_or(Standing::Error),
                };
                let kinds = [
                    create::KIND,
                    image::KIND,
                    shelve::KIND,
                    shelve::OFFLOAD,
                    unshelve::KIND,
                    resize::RESIZE,
                    resize::MIGRATE,
                    resize::verdict::CONFIRM,
                    resize::verdict::REVERT,
                    evacuate::KIND,
                ];
                let kinds: Vec<&str> = kinds.into_iter().chain(change::kinds()).collect();
                operation::cancel(tx, &id, &kinds, "the server is deleted").await?;
                let machine = machine_id(&id)?;
                migrate::give_up(tx, machine, "the server is deleted").await?;
                machine::change(tx, machine, request_id, now, Wanted::end).await?;
                let change = to_state(ServerState::Deleting(standing), now);
                server::update(tx, &id, change).await?;
                prepared.insert(tx).await?;
                Ok::<(), RequestError>(())
            })
        })
        .await?;
    engine.wake(id);
    Ok(())
}

pub struct ServerDelete {
    tools: Tools,
}

impl ServerDelete {
    pub(super) fn new(tools: Tools) -> Self {
        Self { tools }
    }
}

#[async_trait]
impl Kind for ServerDelete {
    fn name(&self) -> &'static str {
        KIND
    }

    fn version(&self) -> i32 {
        1
    }

    fn steps(&self) -> Vec<Arc<dyn Step>> {
        vec![Arc::new(Destroy(self.tools.clone()))]
    }

    async fn finish(
        &self,
        operation: &Operation,
        outcome: &Outcome,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        let now = self.tools.clock.now_us();
        match outcome {
            Outcome::Done => {
                turn(tx, &operation.subject, |_| {
                    Some(server::ActiveModel {
                        terminated_at_us: Set(Some(now)),
                        deleted_at_us: Set(Some(now)),
                        shelved_image_id: Set(None),
                        ..to_state(ServerState::Deleted, now)
                    })
                })
                .await?;
            }
            Outcome::Undone { reason } | Outcome::Parked { reason } => {
                turn(tx, &operation.subject, |_| {
                    let message = format!("The server could not be deleted: {reason}");
                    Some(to_error(&message, Some(reason), now))
                })
                .await?;
            }
        }
        Ok(())
    }
}

/// The owner ends the process and removes the disks.
struct Destroy(Tools);

#[async_trait]
impl Step for Destroy {
    fn name(&self) -> &'static str {
        "destroy"
    }

    async fn run(&self, operation: &Operation) -> Result<Progress, StepError> {
        let gone = gone(&self.0, operation).await?;
        let row = server::find(self.0.machines.reader(), &operation.subject).await?;
        let image = row.and_then(|row| row.shelved_image_id);
        if let Some(image) = image.filter(|_| gone == Progress::Done) {
            let removed = self.0.images.remove(&image, self.0.clock.now_us()).await;
            removed.map_err(super::image::unstored)?;
        }
        // What was to bring its disk to another host, of an operation that is parked.
        let server = machine_id(&operation.subject)?;
        for open in migration::open(self.0.machines.reader(), server).await? {
            let removed = self.0.images.remove(&open.uuid, self.0.clock.now_us());
            removed.await.map_err(super::image::unstored)?;
        }
        Ok(gone)
    }

    async fn commit(
        &self,
        operation: &mut Operation,
        tx: &DatabaseTransaction,
    ) -> Result<(), StepError> {
        want_absent(&self.0, operation, tx).await?;
        let server = machine_id(&operation.subject)?;
        migrate::bury(tx, server, migrate::DELETED, self.0.clock.now_us()).await?;
        Ok(machine::disown(tx, server, self.0.clock.now_us()).await?)
    }
}
