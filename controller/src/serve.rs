//! `fractus serve`: the composition of the controller.
//!
//! Owns the process: configuration, state folder, listeners, background work and the order in which
//! they start and end. It must never hold logic of a service.

mod compose;
mod config;
pub(crate) mod listener;
mod size;
mod sole;
pub(crate) mod tls;

use std::path::Path;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use config::{Config, ConfigError, Options};

use compose::Controller;

use crate::agents::listener::ListenError;
use crate::compute::ops::resize::verdict;
use crate::database::OpenError;
use crate::http::{App, Public, Routes};
use crate::identity::{KeyError, boot};
use crate::image::blob::BlobError;
use crate::image::store::StoreError;
use crate::secret::SecretError;
use crate::tls::AuthorityError;

/// The public services that this build has.
pub fn services() -> Vec<Routes> {
    vec![
        crate::identity::routes(),
        crate::image::routes(),
        crate::compute::routes(),
        crate::machines::routes(crate::hosts::routes()),
    ]
}

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("making the state folder {path}")]
    State {
        path: String,
        source: std::io::Error,
    },
    #[error(transparent)]
    Claim(#[from] sole::ClaimError),
    #[error(transparent)]
    Database(#[from] OpenError),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error(transparent)]
    Keys(#[from] KeyError),
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
    #[error("listening on {address} for {what}")]
    Listen {
        what: &'static str,
        address: String,
        source: std::io::Error,
    },
    #[error("listening for agents")]
    Agents(#[from] ListenError),
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    #[error("opening the images' folder")]
    Images(#[source] BlobError),
    #[error("looking for images that an earlier life left half-done")]
    Recover(#[source] StoreError),
    #[error(
        "the state folder's file `epoch`, which says for which restore of the database bytes were looked at"
    )]
    Epoch(#[source] std::io::Error),
    #[error("beginning anew with a restored database")]
    Restored(#[source] sea_orm::DbErr),
    #[error("reading what there is to be carried on")]
    Start(#[source] sea_orm::DbErr),
    #[error("the metrics recorder: {0}")]
    Metrics(String),
    #[error("waiting for signals")]
    Signals(#[source] std::io::Error),
}

/// Runs until SIGTERM or SIGINT, then finishes what is under way.
pub async fn run(options: Options) -> Result<(), ServeError> {
    let config = Config::resolve(options)?;
    make_private_folder(&config.state_dir).map_err(|source| ServeError::State {
        path: config.state_dir.display().to_string(),
        source,
    })?;
    let _claim = sole::claim(&config.database)?;
    let metrics = metrics_exporter_prometheus::PrometheusBuilder::new()
        .install_recorder()
        .map_err(|error| ServeError::Metrics(error.to_string()))?;
    let controller = Controller::compose(&config).await?;
    let app = controller.app.clone();
    let public = Public::new(app.clone(), services())
        .with_rest(Router::new().route("/healthz", get(|| async { "ok\n" })));

    let stop = CancellationToken::new();
    let tasks = TaskTracker::new();
    let tls = match &config.tls {
        Some(source) => Some(tls::acceptor(source, &config)?),
        None => None,
    };
    let listening = listener::bind(&config.listen)
        .await
        .map_err(|source| not_listening("the public API", &config.listen, source))?;
    controller.begin(&config, &stop, &tasks).await?;
    tasks.spawn(listener::serve(
        listening,
        tls,
        public.into_router(),
        stop.clone(),
        tasks.clone(),
    ));
    if let Some(address) = &config.metrics_listen {
        let listening = listener::bind(address)
            .await
            .map_err(|source| not_listening("metrics", address, source))?;
        let router = private_router(metrics.clone());
        tasks.spawn(listener::serve(
            listening,
            None,
            router,
            stop.clone(),
            tasks.clone(),
        ));
    }
    tasks.spawn(upkeep(app.clone(), metrics, stop.clone()));
    if let Some(window) = config.resize_confirm_window {
        tasks.spawn(confirm(app.clone(), window, stop.clone()));
    }

    tracing::info!(listen = %config.listen, public_url = config.public_url.as_str(), "ready");
    // Fails where nobody is told (no systemd); that is no error.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    until_told().await.map_err(ServeError::Signals)?;
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
    tracing::info!("stopping: finishing the requests under way");
    stop.cancel();
    tasks.close();
    if tokio::time::timeout(Duration::from_secs(20), tasks.wait())
        .await
        .is_err()
    {
        tracing::warn!("some connections did not end within 20 s; they are cut");
    }
    app.database().clone().close().await;
    Ok(())
}

fn not_listening(what: &'static str, address: &str, source: std::io::Error) -> ServeError {
    ServeError::Listen {
        what,
        address: address.to_owned(),
        source,
    }
}

fn make_private_folder(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

/// Metrics and health, on an address that is not public.
fn private_router(metrics: PrometheusHandle) -> Router {
    Router::new()
        .route(
            "/metrics",
            get(move || std::future::ready(metrics.render())),
        )
        .route("/healthz", get(|| async { "ok\n" }))
}

/// What has to be done every now and then.
async fn upkeep(app: App, metrics: PrometheusHandle, stop: CancellationToken) {
    let mut turns = tokio::time::interval(Duration::from_secs(60));
    loop {
        tokio::select! {
            _ = turns.tick() => {}
            () = stop.cancelled() => return,
        }
        metrics.run_upkeep();
        if let Err(error) = app.realm().refresh_keys().await {
            tracing::error!(%error, "the token keys could not be refreshed");
        }
    }
}

/// Servers that could go back, and have waited for `window`, stay as they are. Each controller looks; the first is taken.
async fn confirm(app: App, window: Duration, stop: CancellationToken) {
    let pause = (window / 4).clamp(Duration::from_secs(1), Duration::from_secs(60));
    let mut turns = tokio::time::interval(pause);
    loop {
        tokio::select! {
            _ = turns.tick() => {}
            () = stop.cancelled() => return,
        }
        if let Err(error) = verdict::confirm_overdue(&app, window).await {
            tracing::error!(%error, "servers that wait to be confirmed could not be");
        }
    }
}

async fn until_told() -> std::io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
