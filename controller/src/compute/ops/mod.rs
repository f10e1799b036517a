//! Operations of compute: what a request wants is written with its operation in one transaction, and
//! the operation's steps carry it out ([`crate::operation`]).
//!
//! Owns the kinds `server_*` and what the reconciler's observations mean for a server's state. Must
//! never speak to an agent but through [`Machines`].

pub mod boot;
pub mod change;
mod cpu;
pub mod create;
pub mod delete;
pub mod evacuate;
pub mod image;
pub mod instance;
pub mod migrate;
mod observe;
pub mod reset;
pub mod resize;
pub mod shelve;
pub mod unshelve;

use std::sync::Arc;

use sea_orm::ActiveValue::Set;
use sea_orm::prelude::Uuid;
use sea_orm::{DatabaseTransaction, DbErr};

use super::model::state::ServerState;
use super::store::server;
use crate::agents::host;
use crate::clock::Clock;
use crate::http::ApiError;
use crate::image::Images;
use crate::operation::{Engine, Kinds, StepError};
use crate::random::Random;
use crate::reconcile::Machines;
use crate::reconcile::machine::{self, Machine};

pub use observe::ServerObserver;

/// What compute needs of the controller beside the database: part of the App.
#[derive(Clone)]
pub struct Compute {
    pub engine: Arc<Engine>,
    pub machines: Machines,
}

/// What the kinds of operations work with.
#[derive(Clone)]
struct Tools {
    machines: Machines,
    images: Images,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    handovers: migrate::Handovers,
}

/// Adds compute's kinds of operations.
pub fn register(
    kinds: &mut Kinds,
    machines: &Machines,
    images: &Images,
    clock: &Arc<dyn Clock>,
    random: &Arc<dyn Random>,
) {
    let tools = Tools {
        machines: machines.clone(),
        images: images.clone(),
        clock: Arc::clone(clock),
        random: Arc::clone(random),
        handovers: migrate::Handovers::default(),
    };
    let fetch = image::Fetch::new(tools.clone());
    let create_image = image::CreateImage::new(tools.clone(), fetch.clone());
    kinds.register(Arc::new(create_image));
    for kind in [resize::RESIZE, resize::MIGRATE] {
        let resize = resize::Resize::new(kind, tools.clone(), fetch.clone());
        kinds.register(Arc::new(resize));
    }
    kinds.register(Arc::new(resize::verdict::Confirm::new(tools.clone())));
    kinds.register(Arc::new(resize::revert::Revert::new(tools.clone())));
    kinds.register(Arc::new(shelve::Shelve::new(tools.clone(), fetch)));
    kinds.register(Arc::new(shelve::ShelveOffload::new(tools.clone())));
    kinds.register(Arc::new(unshelve::Unshelve::new(tools.clone())));
    kinds.register(Arc::new(create::ServerCreate::new(tools.clone())));
    kinds.register(Arc::new(delete::ServerDelete::new(tools.clone())));
    for kind in migrate::LiveMigrate::kinds(&tools) {
        kinds.register(Arc::new(kind));
    }
    kinds.register(Arc::new(evacuate::Evacuate::new(tools.clone())));
    for change in change::Change::ALL {
        kinds.register(Arc::new(change::ServerChange::new(change, tools.clone())));
    }
}

/// Why a request could not be written.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error("the database")]
    Database(#[from] DbErr),
    #[error(transparent)]
    Prepare(#[from] StepError),
    /// Somebody else changed the server since it was read.
    #[error("the server was changed by another request at the same time; look at it and try again")]
    Overtaken,
    /// Its host copies the disk for another, or has not let go of that yet.
    #[error("an image of the server is being made, or taken back; try again when that is over")]
    ImageUnderWay,
    /// What is on them would be lost.
    #[error(
        "server {0} has disks besides its root disk, which no image holds: what is on them would be lost with its \
         place on its host; delete them first (`fractus machine`)"
    )]
    OtherDisks(String),
    #[error("server {0} is in no image")]
    NotShelved(String),
    /// What it would stay.
    #[error("{0}")]
    NotThere(String),
    #[error("Instance {0} has not been resized.")]
    NothingToConfirm(String),
    /// Its migration has been decided, and not ended.
    #[error(
        "server {0} may be had back from where it came; try again when that is over, or reset its state"
    )]
    OnItsWay(String),
    #[error("{0}")]
    OverQuota(String),
    /// Its host has no room for what the server is to become.
    #[error("the host of server {0} has no room for a disk of this size; nothing was changed")]
    NoRoom(String),
}

impl From<RequestError> for ApiError {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Overtaken
            | RequestError::ImageUnderWay
            | RequestError::OtherDisks(_)
            | RequestError::NotShelved(_)
            | RequestError::NotThere(_)
            | RequestError::OnItsWay(_)
            | RequestError::NoRoom(_) => Self::conflict(error.to_string()),
            RequestError::NothingToConfirm(_) => Self::bad_request(error.to_string()),
            RequestError::OverQuota(words) => Self::forbidden(words),
            RequestError::Database(error) => error.into(),
            RequestError::Prepare(error) => Self::internal(error),
        }
    }
}

/// After a restore of the database: every generation from now on is above all that hosts were told, and what the backup
/// says of another time is to be said anew.
pub async fn restored(tx: &DatabaseTransaction, now_us: i64) -> Result<(), DbErr> {
    machine::begin_epoch(tx, now_us).await?;
    host::none_is_off(tx).await?;
    shelve::restored(tx, now_us).await
}

/// Of a restored database: the owner was heard, and knows nothing of the server, so it will not be told either. Whether
/// it ever was, nobody knows.
fn is_unknown(machines: &Machines, known: &Machine) -> bool {
    let fleet = machines.fleet();
    let owner = known.host.filter(|_| !known.confirmed);
    owner.is_some_and(|owner| {
        fleet.machines(owner).is_some() && fleet.machine(owner, known.server).is_none()
    })
}

/// The server's id as agents know it.
pub(in crate::compute) fn machine_id(
    server: &str,
) -> Result<fractus_agent_api::machine::ServerId, StepError> {
    Uuid::parse_str(server)
        .map(fractus_agent_api::machine::ServerId)
        .map_err(|error| StepError::fail(format!("server {server} has no UUID: {error}")))
}

/// A row's change to `state`, with what always goes with it.
fn to_state(state: ServerState, now_us: i64) -> server::ActiveModel {
    server::ActiveModel {
        state: Set(state.key()),
        updated_at_us: Set(now_us),
        ..Default::default()
    }
}

/// The server is ERROR, for `message`; `details` are for administrators.
fn to_error(message: &str, details: Option<&str>, now_us: i64) -> server::ActiveModel {
    server::ActiveModel {
        fault_code: Set(Some(500)),
        fault_message: Set(Some(message.chars().take(255).collect())),
        fault_details: Set(details.map(str::to_owned)),
        fault_at_us: Set(Some(now_us)),
        ..to_state(ServerState::Error, now_us)
    }
}

/// Turns the server from its present state by `decide`, which may leave it as it is.
async fn turn(
    tx: &DatabaseTransaction,
    id: &str,
    decide: impl FnOnce(&server::Model) -> Option<server::ActiveModel>,
) -> Result<(), DbErr> {
    let Some(row) = server::find(tx, id).await? else {
        return Ok(());
    };
    let Some(change) = decide(&row) else {
        return Ok(());
    };
    server::turn(tx, id, row.state(), change).await.map(|_| ())
}
