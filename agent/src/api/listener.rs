//! Accepts connections: TLS with a client certificate of the cloud, HTTP/2 or HTTP/1.1.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use fractus_agent_api::identity::Peer;
use fractus_agent_api::tls::{self, ClientCertificate, TlsError};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tower::Service;

use crate::host::push::{Cloud, Link};

/// A connection that has not shaken hands by then is dropped.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Connections at once; controllers keep one each, and one a console.
const CONNECTIONS: usize = 1024;
/// Strangers who are shaking hands at once: they must not take the places of controllers.
const STRANGERS: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("cannot listen on {address}: {source}; is another agent running?")]
    Bind {
        address: SocketAddr,
        source: std::io::Error,
    },
    #[error(transparent)]
    Tls(#[from] TlsError),
}

fn acceptor(link: &Link) -> Result<TlsAcceptor, TlsError> {
    let config = tls::server(&link.identity.credentials, ClientCertificate::Required)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// For the life of the agent. A renewed certificate holds for connections from then on.
pub async fn serve(listener: TcpListener, cloud: Cloud, router: Router) -> Result<(), ListenError> {
    let mut links = cloud.watch();
    let mut tls = acceptor(&links.borrow_and_update())?;
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let door = Arc::new(Semaphore::new(STRANGERS));
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else {
                    // Out of descriptors, most likely: let some go first.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                };
                let Ok(stranger) = door.clone().try_acquire_owned() else { continue };
                let (tls, router, room) = (tls.clone(), router.clone(), room.clone());
                tokio::spawn(async move {
                    let greeted = greet(stream, tls).await;
                    drop(stranger);
                    if let Some((stream, peer)) = greeted
                        && let Ok(_room) = room.try_acquire()
                    {
                        connection(stream, peer, router).await;
                    }
                });
            }
            Ok(()) = links.changed() => match acceptor(&links.borrow_and_update()) {
                Ok(renewed) => tls = renewed,
                Err(error) => tracing::error!(%error, "the renewed identity cannot be used"),
            },
        }
    }
}

/// The handshake; who the other is, if it may come in.
async fn greet(stream: TcpStream, tls: TlsAcceptor) -> Option<(TlsStream<TcpStream>, Peer)> {
    let _ = stream.set_nodelay(true);
    let accepted = tokio::time::timeout(HANDSHAKE, tls.accept(stream)).await;
    let stream = accepted.ok()?.ok()?;
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let peer = Peer::of_certificate(chain.first()?).ok()?;
    Some((stream, peer))
}

async fn connection(stream: TlsStream<TcpStream>, peer: Peer, router: Router) {
    let service = hyper::service::service_fn(move |mut request: Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(peer.clone());
        router.clone().call(request)
    });
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HANDSHAKE);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(Some(Duration::from_secs(20)))
        .max_concurrent_streams(256);
    if let Err(error) = builder
        .serve_connection_with_upgrades(TokioIo::new(stream), service)
        .await
    {
        tracing::debug!(%error, "connection");
    }
}
