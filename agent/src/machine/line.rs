//! The line by which a guest goes from one host to another: TCP, TLS with a key for this migration alone, and an end for
//! each of the two machines' processes.
//!
//! TLS is the agents' part: a locked-down process opens nothing, and whoever takes one over has no key. What it costs is
//! two copies, and that a line ends with its agent. kTLS would spare both, where the kernel has it.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use fractus_agent_api::migration::StreamKey;
use fractus_agent_api::tls::stream;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Until a connection stands and both sides know each other.
const CONNECT: Duration = Duration::from_secs(10);
/// A peer of whose host nothing has been heard for so long is gone. How long its process may be busy is not asked here.
const SILENCE: Duration = Duration::from_secs(30);
/// A peer that takes nothing for so long is gone, too: there are no keepalives then. Longer than a process may be busy with
/// its disks ([`crate::vm`]'s `paced`). A line that stands in for another brings memory only, which waits for no disk: there
/// [`SILENCE`] is enough.
const STUCK: Duration = Duration::from_secs(150);
/// Strangers who are shaking hands at once.
const STRANGERS: usize = 16;
/// After this time what could not be accepted is tried again.
const AGAIN: Duration = Duration::from_millis(50);
/// Bytes that are copied at a time.
const PIECE: usize = 256 << 10;

/// Carries what the process's end says and hears. Ends when it is dropped.
#[derive(Debug)]
pub struct Line(JoinHandle<()>);

impl Drop for Line {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What waits for the source.
#[derive(Debug)]
pub struct Awaited {
    pub port: u16,
    /// The process's end of the line by which it comes first.
    pub end: OwnedFd,
    pub line: Line,
    pub others: Others,
}

/// What becomes of lines to a process here.
#[derive(Debug)]
pub enum Coming {
    /// The source has come again: the process's end of that line. The one before is over.
    Again(OwnedFd),
    /// The last one has ended.
    Ended,
}

pub type Others = mpsc::UnboundedReceiver<Coming>;

/// Waits for the source on this address, on a port that is told.
pub async fn listen(address: IpAddr, key: &StreamKey) -> io::Result<Awaited> {
    let listener = TcpListener::bind(SocketAddr::new(address, 0)).await?;
    let port = listener.local_addr()?.port();
    let (ours, end) = ends()?;
    let (line, others) = await_source(listener, key, Some(ours))?;
    Ok(Awaited {
        port,
        end,
        line,
        others,
    })
}

/// Waits for it where an earlier agent did.
pub async fn listen_again(
    address: IpAddr,
    port: u16,
    key: &StreamKey,
) -> io::Result<(Line, Others)> {
    let listener = TcpListener::bind(SocketAddr::new(address, port)).await?;
    await_source(listener, key, None)
}

fn await_source(
    listener: TcpListener,
    key: &StreamKey,
    mut first: Option<UnixStream>,
) -> io::Result<(Line, Others)> {
    let tls = stream::server(key).map_err(io::Error::other)?;
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let (sender, others) = mpsc::unbounded_channel();
    let stuck = if first.is_some() { STUCK } else { SILENCE };
    let line = tokio::spawn(async move {
        let (mut greeting, mut carrying) = (JoinSet::new(), JoinSet::new());
        loop {
            tokio::select! {
                accepted = listener.accept(), if greeting.len() < STRANGERS => match accepted {
                    Ok((tcp, from)) => {
                        let acceptor = acceptor.clone();
                        greeting.spawn(async move {
                            be_careful(&tcp, stuck)?;
                            let shaken = tokio::time::timeout(CONNECT, acceptor.accept(tcp)).await;
                            let stream = shaken.map_err(io::Error::from).flatten();
                            stream.inspect_err(|error| tracing::debug!(%from, %error, "a migration's port"))
                        });
                    }
                    // Out of descriptors, most likely: let some go first.
                    Err(_) => tokio::time::sleep(AGAIN).await,
                },
                // Whoever has the key is who is waited for.
                Some(greeted) = greeting.join_next() => if let Ok(Ok(stream)) = greeted {
                    let ours = match first.take() {
                        Some(ours) => ours,
                        None => match another(&sender) {
                            Some(ours) => ours,
                            None => continue,
                        },
                    };
                    carrying.shutdown().await;
                    carrying.spawn(carry(stream, ours));
                },
                Some(_) = carrying.join_next() => {
                    let _ = sender.send(Coming::Ended);
                }
            }
        }
    });
    Ok((Line(line), others))
}

/// Our end of another line, if somebody takes the other one.
fn another(sender: &mpsc::UnboundedSender<Coming>) -> Option<UnixStream> {
    let (ours, theirs) = ends().ok()?;
    sender.send(Coming::Again(theirs)).ok()?;
    Some(ours)
}

/// Goes to the target, `ADDRESS:PORT`; with the process's end.
pub async fn connect(to: &str, key: &StreamKey) -> io::Result<(OwnedFd, Line)> {
    connect_within(STUCK, to, key).await
}

/// The same once more, for memory that follows.
pub async fn connect_again(to: &str, key: &StreamKey) -> io::Result<(OwnedFd, Line)> {
    connect_within(SILENCE, to, key).await
}

async fn connect_within(stuck: Duration, to: &str, key: &StreamKey) -> io::Result<(OwnedFd, Line)> {
    let tls = stream::client(key).map_err(io::Error::other)?;
    let name = stream::name().map_err(io::Error::other)?;
    let connecting = async {
        let tcp = TcpStream::connect(to).await?;
        be_careful(&tcp, stuck)?;
        TlsConnector::from(Arc::new(tls)).connect(name, tcp).await
    };
    let connected = tokio::time::timeout(CONNECT, connecting).await;
    let stream = connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let (ours, theirs) = ends()?;
    // It has a guest to serve, and waits with care.
    rustix::io::ioctl_fionbio(&theirs, true)?;
    let line = tokio::spawn(carry(stream, ours));
    Ok((theirs, Line(line)))
}

/// Ours, and the process's.
fn ends() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((UnixStream::from_std(ours)?, theirs.into()))
}

/// Answers are small and awaited, and a host that lost its power says nothing.
fn be_careful(tcp: &TcpStream, stuck: Duration) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    sockopt::set_socket_keepalive(tcp, true)?;
    sockopt::set_tcp_keepidle(tcp, SILENCE / 3)?;
    sockopt::set_tcp_keepintvl(tcp, SILENCE / 3)?;
    sockopt::set_tcp_keepcnt(tcp, 2)?;
    sockopt::set_tcp_user_timeout(tcp, stuck.as_millis() as u32)?;
    Ok(())
}

async fn carry(mut stream: impl AsyncRead + AsyncWrite + Unpin, mut end: UnixStream) {
    let carried = copy_bidirectional_with_sizes(&mut stream, &mut end, PIECE, PIECE).await;
    match carried {
        Ok((came, went)) => tracing::debug!(came, went, "a migration's line ended"),
        Err(error) => tracing::debug!(%error, "a migration's line broke"),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::Ipv4Addr;

    use super::*;

    fn key() -> StreamKey {
        let pair = rcgen::KeyPair::generate().unwrap();
        let made = rcgen::CertificateParams::new(vec!["migration.fractus".to_owned()]).unwrap();
        StreamKey {
            certificate: made.self_signed(&pair).unwrap().pem(),
            key: pair.serialize_pem(),
        }
    }

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

    #[tokio::test(flavor = "multi_thread")]
    async fn what_one_process_says_the_other_hears_and_nobody_else_gets_in() {
        let (right, wrong) = (key(), key());
        let awaited = listen(HERE, &right).await.unwrap();
        let (port, there, mut others) = (awaited.port, awaited.end, awaited.others);
        let to = format!("127.0.0.1:{port}");
        // A stranger, and somebody with the key of another migration.
        let stranger = TcpStream::connect(&to).await.unwrap();
        let silent = TcpStream::connect(&to).await.unwrap();
        drop(stranger);
        match connect(&to, &wrong).await {
            Err(_) => {}
            // In TLS 1.3 the client is through before its certificate is looked at.
            Ok((end, _line)) => {
                let mut end = std::os::unix::net::UnixStream::from(end);
                end.set_nonblocking(false).unwrap();
                let heard = tokio::task::spawn_blocking(move || end.read(&mut [0]));
                assert!(matches!(heard.await.unwrap(), Ok(0) | Err(_)));
            }
        }
        let (here, line) = connect(&to, &right).await.unwrap();
        let talk = tokio::task::spawn_blocking(move || {
            let mut here = std::os::unix::net::UnixStream::from(here);
            here.set_nonblocking(false).unwrap();
            let mut there = std::os::unix::net::UnixStream::from(there);
            let said: Vec<u8> = (0..3 << 20).map(|at: u32| (at / 7) as u8).collect();
            let writes = {
                let (mut here, said) = (here.try_clone().unwrap(), said.clone());
                std::thread::spawn(move || here.write_all(&said).unwrap())
            };
            let mut heard = vec![0; said.len()];
            there.read_exact(&mut heard).unwrap();
            writes.join().unwrap();
            assert!(said == heard);
            there.write_all(b"yes").unwrap();
            let mut answer = [0; 3];
            here.read_exact(&mut answer).unwrap();
            assert_eq!(&answer, b"yes");
            (here, there)
        });
        let (_here, mut there) = talk.await.unwrap();
        drop(silent);
        // Whoever comes again has a line of his own, and the one before is over, although nobody has closed it.
        let (here, again) = connect(&to, &right).await.unwrap();
        let Some(Coming::Again(other)) = others.recv().await else {
            panic!("another line is to come");
        };
        let talk = tokio::task::spawn_blocking(move || {
            assert!(matches!(there.read(&mut [0]), Ok(0) | Err(_)));
            let (mut here, mut other) = [here, other]
                .map(std::os::unix::net::UnixStream::from)
                .into();
            here.set_nonblocking(false).unwrap();
            here.write_all(b"again").unwrap();
            let mut heard = [0; 5];
            other.read_exact(&mut heard).unwrap();
            assert_eq!(&heard, b"again");
            other
        });
        let mut other = talk.await.unwrap();
        drop((line, again));
        let heard = tokio::task::spawn_blocking(move || other.read(&mut [0]));
        assert!(matches!(heard.await.unwrap(), Ok(0) | Err(_)));
        assert!(matches!(others.recv().await, Some(Coming::Ended)));
        // The next agent is found where this one was.
        drop((awaited.line, others));
        let by = std::time::Instant::now() + CONNECT;
        let (_line, mut others) = loop {
            match listen_again(HERE, port, &right).await {
                Ok(listened) => break listened,
                // A task that was ended still has it for a moment.
                Err(error) => assert!(std::time::Instant::now() < by, "{error}"),
            }
            tokio::task::yield_now().await;
        };
        let (_here, _again) = connect(&to, &right).await.unwrap();
        assert!(matches!(others.recv().await, Some(Coming::Again(_))));
    }
}
