//! `os-resetState`: an administrator says what a server is.

use sea_orm::ActiveValue::Set;
use sea_orm::DbErr;

use super::{evacuate, image, machine_id, migrate, resize, shelve};
use crate::compute::model::state::ServerState;
use crate::compute::store::server;
use crate::http::App;
use crate::operation;

const REASON: &str = "the server's state was reset";

/// What is under way is given up where it can be; the server is ACTIVE if `is_well`, else ERROR. What has its disk only in
/// an image is shelved instead, and what could go back from a host that is not there waits for that still.
pub async fn reset(app: &App, id: &str, is_well: bool) -> Result<(), DbErr> {
    let server = machine_id(id).map_err(|error| DbErr::Custom(error.to_string()))?;
    let (subject, now) = (id.to_owned(), app.now_us());
    let machines = app.compute().machines.clone();
    let reset = app.database().write(move |tx| {
        let (id, machines) = (subject.clone(), machines.clone());
        Box::pin(async move {
            // One that was going elsewhere stays, if it can still be had back.
            operation::cancel(tx, &id, &[image::KIND, evacuate::KIND], REASON).await?;
            shelve::give_up(tx, &id, REASON).await?;
            migrate::give_up(tx, server, REASON).await?;
            let waits = resize::give_up(tx, &machines, &id, REASON, now).await?;
            let is_kept = shelve::is_kept_nowhere_else(tx, &id).await?;
            let state = match is_well {
                true if is_kept => ServerState::ShelvedOffloaded,
                true => waits.unwrap_or(ServerState::Active),
                false => ServerState::Error,
            };
            let change = server::ActiveModel {
                state: Set(state.key()),
                updated_at_us: Set(now),
                ..Default::default()
            };
            server::update(tx, &id, change).await
        })
    });
    reset.await?;
    app.compute().engine.wake(id);
    Ok(())
}
