//! The six calls.

use std::collections::BTreeSet;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use fractus_agent_api::copy::PIECES;
use fractus_agent_api::host::{
    Changes, FullReport, Heartbeat, HeartbeatAnswer, HostId, JoinAnswer, JoinRequest, RenewAnswer,
    RenewRequest,
};
use fractus_agent_api::machine::{Refusal, ServerId, Wanted};
use uuid::Uuid;

use super::server::Member;
use super::{Blob, Parts, pieces};
use crate::agents::fleet::{HEARTBEAT_INTERVAL_S, SILENT_US};
use crate::agents::host;
use crate::agents::join::{self, JoinError};
use crate::database::{self, Database};
use crate::reconcile::{machine, migration};
use crate::tls::{self, AuthorityError};

/// What a call is answered with when it is refused.
pub(super) struct Failure {
    status: StatusCode,
    refusal: Refusal,
}

impl Failure {
    pub(super) fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        let detail = detail.into();
        let refusal = if status.is_server_error() {
            Refusal::Unavailable { detail }
        } else {
            Refusal::Invalid { detail }
        };
        Self { status, refusal }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        (self.status, Json(self.refusal)).into_response()
    }
}

impl From<sea_orm::DbErr> for Failure {
    fn from(error: sea_orm::DbErr) -> Self {
        if database::is_fenced_off(&error) {
            return Self::new(StatusCode::SERVICE_UNAVAILABLE, "another controller leads");
        }
        tracing::error!(%error, "answering an agent");
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "the database fails")
    }
}

impl From<AuthorityError> for Failure {
    fn from(error: AuthorityError) -> Self {
        match error {
            AuthorityError::Request(_) => Self::new(StatusCode::BAD_REQUEST, error.to_string()),
            other => {
                tracing::error!(error = %other, "certifying an agent");
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "the authority fails")
            }
        }
    }
}

pub(super) async fn join(
    State(parts): State<Parts>,
    Json(request): Json<JoinRequest>,
) -> Result<Json<JoinAnswer>, Failure> {
    let csr = tls::signing_request(&request.csr)?;
    let address = address(&request.endpoint)?;
    let (key_hash, new_host) = (tls::key_hash(&csr), HostId(parts.random.uuid()));
    let (now, asked) = (parts.clock.now_us(), request.clone());
    let joined = parts.database.write(move |tx| {
        let (asked, key_hash) = (asked.clone(), key_hash.clone());
        Box::pin(async move { join::join(tx, new_host, &asked, &key_hash, now).await })
    });
    let host_id = joined.await.map_err(|error| match error {
        JoinError::Database(error) => error.into(),
        refused => Failure::new(StatusCode::FORBIDDEN, refused.to_string()),
    })?;
    let certificate = parts.authority.certify_host(host_id, &address, &csr)?;
    parts.fleet.admit(host_id, &request.endpoint);
    tracing::info!(host = %host_id, hostname = request.host.hostname, "a host has joined");
    let (roots, controllers) = (parts.authority.roots(), parts.lead.controllers());
    Ok(Json(JoinAnswer {
        host_id,
        certificate,
        roots,
        controllers,
    }))
}

pub(super) async fn renew(
    State(parts): State<Parts>,
    Member(member): Member,
    Json(request): Json<RenewRequest>,
) -> Result<Json<RenewAnswer>, Failure> {
    let csr = tls::signing_request(&request.csr)?;
    let certificate =
        parts
            .authority
            .certify_host(member.host_id(), &address(&member.endpoint)?, &csr)?;
    Ok(Json(RenewAnswer {
        certificate,
        roots: parts.authority.roots(),
    }))
}

pub(super) async fn heartbeat(
    State(parts): State<Parts>,
    Member(member): Member,
    Json(heartbeat): Json<Heartbeat>,
) -> Result<Json<HeartbeatAnswer>, Failure> {
    address(&heartbeat.endpoint)?;
    let report = match parts.lead.database() {
        Some(database) => hear(&parts, &database, &member, &heartbeat).await?,
        // The leader, to whom the next heartbeat goes, says whether it lacks anything.
        None => false,
    };
    Ok(Json(HeartbeatAnswer {
        controllers: parts.lead.controllers(),
        roots: parts.authority.roots(),
        interval_s: HEARTBEAT_INTERVAL_S,
        report,
    }))
}

/// Takes a heartbeat in; true if a full report is wanted.
async fn hear(
    parts: &Parts,
    database: &Database,
    member: &host::row::Model,
    heartbeat: &Heartbeat,
) -> Result<bool, Failure> {
    let (now, host) = (parts.clock.now_us(), member.host_id());
    let report = parts.fleet.heartbeat(host, heartbeat, now);
    if worth_a_write(member, heartbeat, now) {
        let said = heartbeat.clone();
        let heard = database.write(move |tx| {
            let said = said.clone();
            Box::pin(async move { host::heard(tx, host, &said.endpoint, &said.host, now).await })
        });
        heard.await?;
    }
    Ok(report)
}

/// What is said of machines is for the leader; an agent that is refused tries the next controller.
fn only_the_leader(parts: &Parts) -> Result<(), Failure> {
    if parts.lead.leads() {
        return Ok(());
    }
    let detail = "another controller leads";
    Err(Failure::new(StatusCode::SERVICE_UNAVAILABLE, detail))
}

/// Heartbeats are many and say little: only news, or that time has passed, is written.
fn worth_a_write(member: &host::row::Model, heartbeat: &Heartbeat, now: i64) -> bool {
    let said = &heartbeat.host;
    let news = member.inventory().is_none_or(|known| {
        known.boot_id != said.boot_id
            || known.hostname != said.hostname
            || known.agent_version != said.agent_version
            || known.lacks != said.lacks
            || known.unable != said.unable
            || known.cpu != said.cpu
            || host::limits(&known) != host::limits(said)
    });
    news || member.endpoint != heartbeat.endpoint || now - member.heard_at_us > SILENT_US / 3
}

pub(super) async fn changes(
    State(parts): State<Parts>,
    Member(member): Member,
    Json(changes): Json<Changes>,
) -> Result<StatusCode, Failure> {
    only_the_leader(&parts)?;
    let taken = parts
        .fleet
        .changes(member.host_id(), &changes, parts.clock.now_us());
    taken.map_err(|gap| Failure::new(StatusCode::CONFLICT, gap.to_string()))?;
    parts
        .reconciler
        .heard(changes.machines.iter().map(|report| report.id));
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn report(
    State(parts): State<Parts>,
    Member(member): Member,
    Json(full): Json<FullReport>,
) -> Result<StatusCode, Failure> {
    only_the_leader(&parts)?;
    let host = member.host_id();
    let vanished = parts.fleet.full_report(host, &full, parts.clock.now_us());
    let owned = machine::ids_of_host(parts.database.reader(), host).await?;
    let concerned: BTreeSet<ServerId> = full
        .machines
        .iter()
        .map(|report| report.id)
        .chain(vanished)
        .chain(owned)
        .collect();
    parts.reconciler.heard(concerned);
    Ok(StatusCode::NO_CONTENT)
}

pub(super) async fn image(
    State(parts): State<Parts>,
    Member(member): Member,
    Path(id): Path<Uuid>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let (reader, host) = (parts.database.reader(), member.host_id());
    let owned = machine::of_host(reader, host).await?;
    let mut used = owned.iter().any(|machine| uses(&machine.wanted, id));
    if !used {
        // A guest that is to come there is another host's, and its machine is made already.
        for server in migration::to_host(reader, host).await? {
            let coming = machine::find(reader, server).await?;
            used |= coming.is_some_and(|machine| uses(&machine.wanted, id));
        }
    }
    if !used {
        let detail = format!("no machine of this host uses image {id}");
        return Err(Failure::new(StatusCode::FORBIDDEN, detail));
    }
    let offset = headers
        .get(header::RANGE)
        .and_then(|range| range.to_str().ok());
    let offset = offset.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-'));
    let offset: u64 = offset.and_then(|offset| offset.parse().ok()).unwrap_or(0);
    let blob = parts.blobs.open(id, offset).await.map_err(|error| {
        tracing::error!(%error, image = %id, "reading an image");
        Failure::new(StatusCode::SERVICE_UNAVAILABLE, "the image's store fails")
    })?;
    let missing = || Failure::new(StatusCode::NOT_FOUND, format!("image {id} has no data"));
    let blob = blob.ok_or_else(missing)?;
    if offset > blob.size {
        let detail = format!("image {id} has {} bytes", blob.size);
        return Err(Failure::new(StatusCode::RANGE_NOT_SATISFIABLE, detail));
    }
    let mut response = bytes_of(blob, offset, &headers);
    if offset > 0 {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    Ok(response)
}

/// From `offset` on: without what is zero, if whoever asks takes it so.
pub(super) fn bytes_of(blob: Blob, offset: u64, headers: &HeaderMap) -> Response {
    let size = blob.size;
    let accepts = headers.get(header::ACCEPT);
    let accepts = accepts.and_then(|accepts| accepts.to_str().ok());
    if accepts.is_some_and(|accepts| accepts.contains(PIECES)) {
        let body = Body::from_stream(pieces::pack_all(blob.bytes, offset, size));
        return ([(header::CONTENT_TYPE, PIECES)], body).into_response();
    }
    let about = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_LENGTH, (size - offset).to_string()),
    ];
    let mut response = (about, Body::from_stream(blob.bytes)).into_response();
    let last = size.saturating_sub(1);
    if offset > 0
        && let Ok(range) = format!("bytes {offset}-{last}/{size}").parse()
    {
        response.headers_mut().insert(header::CONTENT_RANGE, range);
    }
    response
}

fn uses(wanted: &Wanted, image: Uuid) -> bool {
    let spec = &wanted.spec;
    let initrd = spec.boot.initrd.iter();
    let root = spec.root_disk.iter().filter_map(|disk| disk.image.as_ref());
    let kernel = spec.boot.kernel.iter();
    kernel
        .chain(initrd)
        .chain(root)
        .any(|used| used.id == image)
}

/// Name or IP address of `https://ADDRESS:PORT`.
fn address(endpoint: &str) -> Result<String, Failure> {
    let wrong = || {
        let detail = format!("{endpoint:?} is not of the form https://ADDRESS:PORT");
        Failure::new(StatusCode::BAD_REQUEST, detail)
    };
    let rest = endpoint
        .strip_prefix("https://")
        .ok_or_else(wrong)?
        .trim_end_matches('/');
    let (address, port) = rest.rsplit_once(':').ok_or_else(wrong)?;
    let address = address.trim_matches(['[', ']']);
    if address.is_empty() || port.parse::<u16>().is_err() {
        return Err(wrong());
    }
    Ok(address.to_owned())
}
