//! TCP, TLS and who calls.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use axum::Router;
use axum::extract::{FromRequestParts, Request};
use axum::http::StatusCode;
use axum::http::request;
use fractus_agent_api::identity::Peer;
use fractus_agent_api::tls::{self, ClientCertificate, Credentials, TlsError};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

use super::Parts;
use super::handlers::Failure;
use crate::agents::host;

/// Connections at a time, of some thousand hosts; more wait in the kernel.
const CONNECTIONS: usize = 4096;
/// For a request's headers, and for the answer to a ping of HTTP/2.
const PATIENCE: Duration = Duration::from_secs(30);
/// Requests of one connection at a time.
const STREAMS: u32 = 16;
/// For the handshake and, at the end, for the requests under way.
const HANDSHAKE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("listening for agents on {address}")]
    Bind {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error("the controller's own certificate")]
    Tls(#[from] TlsError),
}

/// The bound listener.
pub struct Listener {
    socket: TcpListener,
    routes: Router,
    tls: Arc<RwLock<Arc<rustls::ServerConfig>>>,
}

/// Whose certificate the connection was made with; `None` without one.
#[derive(Debug, Clone)]
pub(super) struct Caller(Option<Peer>);

impl Listener {
    /// Binds; nothing is answered before [`Self::run`].
    pub async fn bind(
        address: SocketAddr,
        credentials: &Credentials,
        parts: Parts,
    ) -> Result<Self, ListenError> {
        let bind = |source| ListenError::Bind { address, source };
        let socket = TcpListener::bind(address).await.map_err(bind)?;
        let tls = tls::server(credentials, ClientCertificate::Optional)?;
        let tls = Arc::new(RwLock::new(Arc::new(tls)));
        Ok(Self {
            socket,
            routes: super::routes(parts),
            tls,
        })
    }

    pub fn address(&self) -> std::io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// What replaces the certificate and the trusted roots while the listener runs.
    pub fn renewer(&self) -> impl Fn(&Credentials) -> Result<(), TlsError> + Send + Sync + use<> {
        let tls = Arc::clone(&self.tls);
        move |credentials| {
            let fresh = tls::server(credentials, ClientCertificate::Optional)?;
            *tls.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(fresh);
            Ok(())
        }
    }

    /// Answers until `stop`, then lets requests under way finish.
    pub async fn run(self, stop: CancellationToken) {
        let connections = TaskTracker::new();
        let slots = Arc::new(Semaphore::new(CONNECTIONS));
        loop {
            let slot = tokio::select! {
                () = stop.cancelled() => break,
                slot = Arc::clone(&slots).acquire_owned() => match slot {
                    Ok(slot) => slot,
                    Err(_) => break,
                },
            };
            let stream = tokio::select! {
                () = stop.cancelled() => break,
                accepted = self.socket.accept() => match accepted {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        // Out of descriptors, or the peer has gone already.
                        tracing::warn!(%error, "accepting an agent");
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                },
            };
            let tls = Arc::clone(&self.tls.read().unwrap_or_else(PoisonError::into_inner));
            let serving = serve(stream, tls, self.routes.clone(), stop.clone());
            connections.spawn(async move {
                serving.await;
                drop(slot);
            });
        }
        connections.close();
        connections.wait().await;
    }
}

async fn serve(
    stream: TcpStream,
    tls: Arc<rustls::ServerConfig>,
    routes: Router,
    stop: CancellationToken,
) {
    // Latency of small answers; a socket that refuses works all the same.
    let _ = stream.set_nodelay(true);
    let handshake = tokio::time::timeout(HANDSHAKE, TlsAcceptor::from(tls).accept(stream)).await;
    let stream = match handshake {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake of an agent"),
        Err(_) => return tracing::debug!("TLS handshake of an agent took too long"),
    };
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(<[_]>::first);
    let caller = match certificate
        .map(|leaf| Peer::of_certificate(leaf))
        .transpose()
    {
        Ok(peer) => Caller(peer),
        Err(error) => return tracing::warn!(%error, "an agent's certificate"),
    };
    let service = hyper::service::service_fn(move |mut request: hyper::Request<_>| {
        request.extensions_mut().insert(caller.clone());
        let routes = routes.clone();
        async move {
            let request: Request = request.map(axum::body::Body::new);
            Ok::<_, Infallible>(match routes.oneshot(request).await {
                Ok(response) => response,
                Err(never) => match never {},
            })
        }
    });
    let mut server = auto::Builder::new(TokioExecutor::new());
    server
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE);
    server
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PATIENCE)
        .keep_alive_timeout(PATIENCE)
        .max_concurrent_streams(STREAMS);
    let connection = server.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => {
            if let Err(error) = ended {
                tracing::debug!(%error, "a connection of an agent");
            }
        }
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            let _ = tokio::time::timeout(HANDSHAKE, connection).await;
        }
    }
}

/// A host that is a member now: by its certificate, and by the table of hosts.
pub(super) struct Member(pub host::row::Model);

impl FromRequestParts<Parts> for Member {
    type Rejection = Failure;

    async fn from_request_parts(
        request: &mut request::Parts,
        parts: &Parts,
    ) -> Result<Self, Failure> {
        let Some(Caller(Some(Peer::Host(id)))) = request.extensions.get::<Caller>().cloned() else {
            let detail = "a certificate of a host is needed: join first";
            return Err(Failure::new(StatusCode::UNAUTHORIZED, detail));
        };
        match host::find(parts.database.reader(), id).await? {
            Some(row) => Ok(Self(row)),
            None => {
                let detail = format!("host {id} was removed from the cloud; it may join anew");
                Err(Failure::new(StatusCode::FORBIDDEN, detail))
            }
        }
    }
}
