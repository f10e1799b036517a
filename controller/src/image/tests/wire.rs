//! Uploads over real connections, with and without TLS, that do not come to their end: cut off, left,
//! or without a word for too long. The image is queued again, nothing of it is kept, and it takes its
//! bytes afterwards.

use std::time::Duration;

use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::*;
use crate::serve::{Config, Options, listener, tls};

/// Longer than anything takes, on a machine that does other things too.
const PATIENCE: Duration = Duration::from_secs(60);

trait Wire: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Wire for T {}

/// The service behind a listener, as `fractus serve` has it.
struct Served {
    cloud: Cloud,
    address: std::net::SocketAddr,
    client: Option<tokio_rustls::TlsConnector>,
    stop: CancellationToken,
    _database: testing::TestDatabase,
    _state: tempfile::TempDir,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

async fn served(with_tls: bool, limits: Limits) -> Served {
    let database = testing::database().await;
    let cloud = cloud_within(database.database.clone(), limits).await;
    let state = tempfile::tempdir().unwrap();
    let (acceptor, client) = if with_tls {
        let (acceptor, client) = own_tls(state.path());
        (Some(acceptor), Some(client))
    } else {
        (None, None)
    };
    let listening = listener::bind("127.0.0.1:0").await.unwrap();
    let address = listening.local_addr().unwrap();
    let stop = CancellationToken::new();
    let router = cloud.public.clone().into_router();
    let tasks = TaskTracker::new();
    tokio::spawn(listener::serve(
        listening,
        acceptor,
        router,
        stop.clone(),
        tasks,
    ));
    Served {
        cloud,
        address,
        client,
        stop,
        _database: database,
        _state: state,
    }
}

fn own_tls(state: &std::path::Path) -> (tokio_rustls::TlsAcceptor, tokio_rustls::TlsConnector) {
    let options = Options {
        state_dir: Some(state.to_owned()),
        ..Options::default()
    };
    let config = Config::resolve(options).unwrap();
    let acceptor = tls::acceptor(config.tls.as_ref().unwrap(), &config).unwrap();
    let mut roots = rustls::RootCertStore::empty();
    let own = CertificateDer::from_pem_file(state.join("tls.pem")).unwrap();
    roots.add(own).unwrap();
    let client = rustls::ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    (acceptor, Arc::new(client).into())
}

impl Served {
    async fn connect(&self, farewell: Farewell) -> Box<dyn Wire> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        if farewell == Farewell::Reset {
            stream.set_zero_linger().unwrap();
        }
        match &self.client {
            None => Box::new(stream),
            Some(client) => {
                let name = ServerName::try_from("localhost").unwrap();
                Box::new(client.connect(name, stream).await.unwrap())
            }
        }
    }

    /// A connection on which an upload has begun: the image is being saved.
    async fn begin(&self, id: &str, framing: &str, farewell: Farewell) -> Box<dyn Wire> {
        let mut wire = self.connect(farewell).await;
        let head = format!(
            "PUT /image/v2/images/{id}/file HTTP/1.1\r\nhost: cloud\r\nx-auth-token: one\r\n\
             content-type: application/octet-stream\r\naccept: application/json\r\n{framing}\r\n\r\n"
        );
        wire.write_all(head.as_bytes()).await.unwrap();
        wire.flush().await.unwrap();
        self.until(id, "saving").await;
        wire
    }

    /// Asks until the image has this status; the answers come from another task.
    async fn until(&self, id: &str, status: &str) {
        let waited = tokio::time::timeout(PATIENCE, async {
            loop {
                let image = self.cloud.get("one", &format!("/v2/images/{id}")).await;
                if image.json()["status"] == status {
                    return;
                }
                tokio::task::yield_now().await;
            }
        });
        assert!(waited.await.is_ok(), "image {id} does not become {status}");
    }

    /// The image is as it was before the upload, and takes one.
    async fn check_untouched(&self, id: &str, what: &str) {
        self.until(id, "queued").await;
        // The row is put right first, then the bytes go.
        let waited = tokio::time::timeout(PATIENCE, async {
            while self.cloud.files() > 0 {
                tokio::task::yield_now().await;
            }
        });
        assert!(waited.await.is_ok(), "{what}: bytes are left");
        let image = self.cloud.get("one", &format!("/v2/images/{id}")).await;
        let image = image.json();
        for field in ["size", "checksum", "os_hash_value", "virtual_size"] {
            assert_eq!(image[field], Value::Null, "{what}: {field}");
        }
        // All of the quota is there: nothing of the lost upload counts.
        let framing = format!("content-length: {WHOLE}");
        let mut wire = self.begin(id, &framing, Farewell::Closes).await;
        wire.write_all(&vec![3; WHOLE]).await.unwrap();
        wire.flush().await.unwrap();
        assert_eq!(status_of(&mut wire).await, Some(204), "{what}");
        let path = format!("/v2/images/{id}");
        let gone = self
            .cloud
            .call("one", Method::DELETE, &path, Value::Null)
            .await;
        assert_eq!(
            (gone.status, self.cloud.files()),
            (StatusCode::NO_CONTENT, 0)
        );
    }
}

/// Bytes of an image, as many as the project's quota has room for.
const WHOLE: usize = 400_000;

fn just_one_image() -> Limits {
    Limits {
        project: Some(WHOLE as u64),
        reserve: 0,
        ..Limits::default()
    }
}

/// The status of the answer; none if the connection ends without one.
async fn status_of(wire: &mut Box<dyn Wire>) -> Option<u16> {
    let mut seen = Vec::new();
    let mut buffer = [0; 4096];
    let read = tokio::time::timeout(PATIENCE, async {
        while !seen.ends_with(b"\r\n") {
            match wire.read(&mut buffer).await {
                Ok(count) if count > 0 => seen.extend_from_slice(&buffer[..count]),
                _ => return,
            }
            if seen.windows(4).any(|end| end == b"\r\n\r\n") {
                return;
            }
        }
    });
    read.await.unwrap();
    let text = String::from_utf8_lossy(&seen).into_owned();
    text.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()
}

/// How a client goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Farewell {
    /// It says that nothing more comes, and waits for an answer.
    Half,
    /// It closes the connection, in TLS without a word.
    Closes,
    /// The connection is reset.
    Reset,
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_is_cut_off_on_its_connection_leaves_a_queued_image_and_nothing_else() {
    // A length that does not come, a chunk that is not whole, chunks without the last one.
    let framings: [(&str, &[&[u8]]); 3] = [
        ("content-length: 300000", &[&[1; 100_000]]),
        ("transfer-encoding: chunked", &[b"186A0\r\n", &[1; 50_000]]),
        (
            "transfer-encoding: chunked",
            &[b"C350\r\n", &[1; 50_000], b"\r\n"],
        ),
    ];
    for with_tls in [false, true] {
        let served = served(with_tls, just_one_image()).await;
        for (framing, pieces) in framings {
            for farewell in [Farewell::Half, Farewell::Closes, Farewell::Reset] {
                let what = format!("tls {with_tls}, {framing}, {farewell:?}");
                let id = served.cloud.raw("one", json!({})).await;
                let mut wire = served.begin(&id, framing, farewell).await;
                for piece in pieces {
                    wire.write_all(piece).await.unwrap();
                }
                wire.flush().await.unwrap();
                match farewell {
                    Farewell::Half => {
                        wire.shutdown().await.unwrap();
                        let answer = status_of(&mut wire).await;
                        assert!(matches!(answer, None | Some(400)), "{what}: {answer:?}");
                    }
                    Farewell::Closes | Farewell::Reset => drop(wire),
                }
                served.check_untouched(&id, &what).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_falls_silent_is_given_up_and_one_that_is_slow_is_not() {
    let limits = Limits {
        stall: Duration::from_secs(2),
        ..just_one_image()
    };
    let served = served(true, limits).await;
    let id = served.cloud.raw("one", json!({})).await;
    let framing = "content-length: 300000";
    let mut wire = served.begin(&id, framing, Farewell::Closes).await;
    wire.write_all(&[1; 1000]).await.unwrap();
    wire.flush().await.unwrap();
    assert_eq!(status_of(&mut wire).await, Some(408));
    served.check_untouched(&id, "silent").await;

    // Slower than that altogether, but never silent for so long.
    let id = served.cloud.raw("one", json!({})).await;
    let pieces = 30;
    let framing = format!("content-length: {pieces}");
    let mut wire = served.begin(&id, &framing, Farewell::Closes).await;
    let mut turn = tokio::time::interval(limits.stall / 20);
    for _ in 0..pieces {
        turn.tick().await;
        wire.write_all(&[1]).await.unwrap();
        wire.flush().await.unwrap();
    }
    assert_eq!(status_of(&mut wire).await, Some(204));
}
