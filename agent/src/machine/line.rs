//! The line by which a guest goes from one host to another: TCP, TLS with a key for this migration alone, and an end for
//! each of the two machines' processes.
//!
//! TLS is the agents' part: a locked-down process opens nothing, and whoever takes one over has no key that is good for
//! another connection. Where memory follows a guest they carry what is said, which costs two copies, and a line ends with its
//! agent; else they shake hands only, and lend their processes the connection ([`crate::vm::seal`]). Each side does as it
//! likes: the wire is the same.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use fractus_agent_api::migration::{MOST_LANES, StreamKey};
use fractus_agent_api::tls::stream::{self, Place};
use rustix::net::sockopt;
use rustls::{ClientConnection, Connection, ServerConnection};
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy_bidirectional_with_sizes,
};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinHandle, JoinSet};
use tokio_rustls::server::TlsStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::vm::seal::{self, Keys};

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

/// Carries what the process's end says and hears, and ends when it is dropped. One that was lent to a process that sends goes
/// on without it; one that was lent to a process that waits does not.
#[derive(Debug)]
pub struct Line {
    carries: Option<JoinHandle<()>>,
    lent: Option<std::net::TcpStream>,
}

impl Line {
    fn carried(by: JoinHandle<()>) -> Self {
        Line {
            carries: Some(by),
            lent: None,
        }
    }

    /// Nothing more is said by it, whoever has it: a process that waits for the other one is free.
    pub fn cut(self) {
        if let Some(tcp) = &self.lent {
            // One that is over is cut already.
            let _ = tcp.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Some(carries) = &self.carries {
            carries.abort();
        }
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

/// What is done with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// What is said is carried.
    Carried,
    /// It is the process's.
    Lent,
}

impl Way {
    pub fn of(direct: bool) -> Self {
        match direct {
            true => Way::Lent,
            false => Way::Carried,
        }
    }
}

/// Waits for the source on this address, on a port that is told. The process learns by its end which way it is.
pub async fn listen(address: IpAddr, key: &StreamKey, way: Way) -> io::Result<Awaited> {
    let listener = TcpListener::bind(SocketAddr::new(address, 0)).await?;
    let port = listener.local_addr()?.port();
    let (ours, end) = ends()?;
    let (line, others) = await_source(listener, key, Some(ours), way)?;
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
    await_source(listener, key, None, Way::Carried)
}

fn await_source(
    listener: TcpListener,
    key: &StreamKey,
    mut first: Option<UnixStream>,
    way: Way,
) -> io::Result<(Line, Others)> {
    let tls = match way {
        Way::Carried => stream::server(key),
        Way::Lent => stream::server_of(key, MOST_LANES),
    };
    let tls = Arc::new(tls.map_err(io::Error::other)?);
    let (sender, others) = mpsc::unbounded_channel();
    let mut company = Company::default();
    let stuck = if first.is_some() { STUCK } else { SILENCE };
    let line = tokio::spawn(async move {
        let (mut greeting, mut carrying) = (JoinSet::new(), JoinSet::new());
        let mut strangers = VecDeque::new();
        // By this the process knows that somebody here awaits its guest.
        let mut _leash = None;
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((tcp, from)) => {
                        let tls = Arc::clone(&tls);
                        make_room(&mut strangers);
                        let stranger = greeting.spawn(async move {
                            be_careful(&tcp, stuck)?;
                            let shaken = tokio::time::timeout(CONNECT, greet(tcp, tls, way)).await;
                            let stream = shaken.map_err(io::Error::from).flatten();
                            stream.inspect_err(|error| tracing::debug!(%from, %error, "a migration's port"))
                        });
                        strangers.push_back(stranger);
                    }
                    // Out of descriptors, most likely: let some go first.
                    Err(_) => tokio::time::sleep(AGAIN).await,
                },
                // Whoever has the key is who is waited for.
                Some(greeted) = greeting.join_next() => {
                    let Ok(Ok(greeted)) = greeted else { continue };
                    let (stream, lent) = match greeted {
                        Greeted::Carried(stream) => (Some(stream), Vec::new()),
                        // It comes too late.
                        Greeted::Lent(_) if first.is_none() => continue,
                        Greeted::Lent(shaken) => match company.join(shaken) {
                            Some(all) => (None, all),
                            None => continue,
                        },
                    };
                    let ours = first.take().map(|ours| begin(ours, &lent));
                    let (ours, stream) = match (ours, stream) {
                        (Some(Err(error)), _) => {
                            tracing::warn!(%error, "lending a process its line");
                            continue;
                        }
                        (Some(Ok(ours)), Some(stream)) => (ours, stream),
                        (None, Some(stream)) => match another(&sender) {
                            Some(ours) => (ours, stream),
                            None => continue,
                        },
                        (ours, None) => {
                            _leash = ours.and_then(Result::ok);
                            continue;
                        }
                    };
                    carrying.shutdown().await;
                    carrying.spawn(carry(*stream, ours));
                },
                Some(_) = carrying.join_next() => {
                    let _ = sender.send(Coming::Ended);
                }
            }
        }
    });
    Ok((Line::carried(line), others))
}

/// Who has been shaking hands for longest gives way: those who say nothing keep nobody out who does.
fn make_room(strangers: &mut VecDeque<AbortHandle>) {
    strangers.retain(|stranger| !stranger.is_finished());
    while strangers.len() >= STRANGERS {
        if let Some(oldest) = strangers.pop_front() {
            oldest.abort();
        }
    }
}

/// Whoever has the key.
enum Greeted {
    Carried(Box<TlsStream<TcpStream>>),
    Lent(Shaken),
}

/// A connection whose two sides know each other, and of which nothing was read that comes behind.
struct Shaken {
    tcp: std::net::TcpStream,
    keys: Keys,
    place: Place,
}

/// Connections of a stream that has lanes, until all of them are there. They come in any order.
#[derive(Default)]
struct Company(Vec<Option<Shaken>>);

impl Company {
    /// All of them, by their numbers, if this was the last. It takes the place of one that came before it, of an agent that
    /// began anew.
    fn join(&mut self, shaken: Shaken) -> Option<Vec<Shaken>> {
        let Place { number, lanes } = shaken.place;
        if self.0.len() != usize::from(lanes) + 1 {
            self.0.clear();
            self.0.resize_with(usize::from(lanes) + 1, || None);
        }
        *self.0.get_mut(usize::from(number))? = Some(shaken);
        match self.0.iter().all(Option::is_some) {
            true => Some(std::mem::take(&mut self.0).into_iter().flatten().collect()),
            false => None,
        }
    }
}

async fn greet(tcp: TcpStream, tls: Arc<rustls::ServerConfig>, way: Way) -> io::Result<Greeted> {
    if way == Way::Carried {
        let stream = TlsAcceptor::from(tls).accept(tcp).await?;
        return Ok(Greeted::Carried(Box::new(stream)));
    }
    let connection = ServerConnection::new(tls).map_err(io::Error::other)?;
    let shaken = shake(tcp, connection.into()).await?;
    // Processes wait for what comes to them.
    shaken.tcp.set_nonblocking(false)?;
    Ok(Greeted::Lent(shaken))
}

/// The process hears how its guest comes.
fn begin<E: AsFd>(ours: E, lent: &[Shaken]) -> io::Result<E> {
    let lent: Vec<_> = (lent.iter())
        .map(|shaken| (shaken.tcp.as_fd(), &shaken.keys))
        .collect();
    seal::lend(&ours, &lent)?;
    Ok(ours)
}

/// Bytes before what a record of TLS holds, and of that at most.
const HEAD: usize = 5;
const RECORD: usize = (1 << 14) + 256;

/// Shakes hands and reads nothing that comes behind.
async fn shake(mut tcp: TcpStream, mut connection: Connection) -> io::Result<Shaken> {
    loop {
        let mut out = Vec::new();
        while connection.wants_write() {
            connection.write_tls(&mut out)?;
        }
        tcp.write_all(&out).await?;
        if !connection.is_handshaking() {
            break;
        }
        let mut record = vec![0; HEAD];
        tcp.read_exact(&mut record).await?;
        let length = record
            .iter()
            .skip(3)
            .fold(0, |sum, byte| sum << 8 | usize::from(*byte));
        if length > RECORD {
            return Err(io::ErrorKind::InvalidData.into());
        }
        record.resize(HEAD + length, 0);
        if let Some(content) = record.get_mut(HEAD..) {
            tcp.read_exact(content).await?;
        }
        let mut rest = &record[..];
        while !rest.is_empty() {
            connection.read_tls(&mut rest)?;
        }
        if let Err(error) = connection.process_new_packets() {
            // Why, if it is to be told.
            let mut out = Vec::new();
            connection.write_tls(&mut out)?;
            let _ = tcp.write_all(&out).await;
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
    }
    let place = Place::agreed(connection.alpn_protocol(), MOST_LANES);
    let place = place.ok_or(io::ErrorKind::InvalidData)?;
    let secrets = connection
        .dangerous_extract_secrets()
        .map_err(io::Error::other)?;
    let keys = Keys::of(secrets).ok_or(io::ErrorKind::Unsupported)?;
    let tcp = tcp.into_std()?;
    Ok(Shaken { tcp, keys, place })
}

/// Our end of another line, if somebody takes the other one.
fn another(sender: &mpsc::UnboundedSender<Coming>) -> Option<UnixStream> {
    let (ours, theirs) = ends().ok()?;
    sender.send(Coming::Again(theirs)).ok()?;
    Some(ours)
}

/// Goes to the target, `ADDRESS:PORT`; with the process's end. Where `much` goes, more than one key of AES covers, that is
/// agreed upon first.
pub async fn connect(to: &str, key: &StreamKey, much: bool) -> io::Result<(OwnedFd, Line)> {
    connect_within(STUCK, to, key, much).await
}

/// The same, for a process that speaks with the other one itself; by so many lanes besides, if the target takes them.
pub async fn connect_lent(
    to: &str,
    key: &StreamKey,
    much: bool,
    lanes: u8,
) -> io::Result<(OwnedFd, Line)> {
    let lanes = lanes.min(MOST_LANES);
    let main = match dial(to, key, much, Place { number: 0, lanes }).await {
        // It may be that it takes not so many, and says no more.
        Err(_) if lanes > 0 => dial(to, key, much, Place::default()).await?,
        main => main?,
    };
    // One that is older, or has what is said carried, has agreed to none.
    let lanes = main.place.lanes;
    let mut all = vec![main];
    for number in 1..=lanes {
        let place = Place { number, lanes };
        match dial(to, key, much, place).await {
            Ok(lane) if lane.place == place => all.push(lane),
            failed => {
                let error = failed.err();
                tracing::warn!(to, ?error, "no further connection to a migration's target");
                let alone = Place::default();
                all = vec![dial(to, key, much, alone).await?];
                break;
            }
        }
    }
    tracing::debug!(to, lanes = all.len() - 1, "a migration's connections");
    let (ours, theirs) = ends()?;
    begin(&ours, &all)?;
    let line = Line {
        carries: None,
        // Whoever waits for the other side waits by this one.
        lent: all.into_iter().next().map(|main| main.tcp),
    };
    Ok((theirs, line))
}

async fn dial(to: &str, key: &StreamKey, much: bool, place: Place) -> io::Result<Shaken> {
    let tls = match place.lanes {
        0 => stream::client(key, much),
        _ => stream::client_at(key, much, place),
    };
    let tls = Arc::new(tls.map_err(io::Error::other)?);
    let name = stream::name().map_err(io::Error::other)?;
    let connecting = async {
        let tcp = TcpStream::connect(to).await?;
        be_careful(&tcp, STUCK)?;
        let connection = ClientConnection::new(tls, name).map_err(io::Error::other)?;
        shake(tcp, connection.into()).await
    };
    let connected = tokio::time::timeout(CONNECT, connecting).await;
    connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

/// The same once more, for memory that follows.
pub async fn connect_again(to: &str, key: &StreamKey) -> io::Result<(OwnedFd, Line)> {
    connect_within(SILENCE, to, key, false).await
}

async fn connect_within(
    stuck: Duration,
    to: &str,
    key: &StreamKey,
    much: bool,
) -> io::Result<(OwnedFd, Line)> {
    let tls = stream::client(key, much).map_err(io::Error::other)?;
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
    Ok((theirs, Line::carried(line)))
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

    use futures::future::join_all;

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
        let awaited = listen(HERE, &right, Way::Carried).await.unwrap();
        let (port, there, mut others) = (awaited.port, awaited.end, awaited.others);
        let to = format!("127.0.0.1:{port}");
        // A stranger, and somebody with the key of another migration.
        let stranger = TcpStream::connect(&to).await.unwrap();
        let silent: Vec<TcpStream> = join_all((0..STRANGERS + 4).map(|_| TcpStream::connect(&to)))
            .await
            .into_iter()
            .map(Result::unwrap)
            .collect();
        drop(stranger);
        match connect(&to, &wrong, false).await {
            Err(_) => {}
            // In TLS 1.3 the client is through before its certificate is looked at.
            Ok((end, _line)) => {
                let mut end = std::os::unix::net::UnixStream::from(end);
                end.set_nonblocking(false).unwrap();
                let heard = tokio::task::spawn_blocking(move || end.read(&mut [0]));
                assert!(matches!(heard.await.unwrap(), Ok(0) | Err(_)));
            }
        }
        let (here, line) = connect(&to, &right, false).await.unwrap();
        let talk = tokio::task::spawn_blocking(move || {
            let mut here = std::os::unix::net::UnixStream::from(here);
            here.set_nonblocking(false).unwrap();
            let there = std::os::unix::net::UnixStream::from(there);
            let mut there = seal::borrow(there).unwrap().socket;
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
        let (here, again) = connect(&to, &right, false).await.unwrap();
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
        let (_here, _again) = connect(&to, &right, false).await.unwrap();
        assert!(matches!(others.recv().await, Some(Coming::Again(_))));
    }

    /// As a process has it that was told which way it is.
    fn connection(end: OwnedFd, way: Way) -> seal::Sealed<std::os::unix::net::UnixStream> {
        let end = std::os::unix::net::UnixStream::from(end);
        end.set_nonblocking(false).unwrap();
        let connection = match way {
            Way::Lent => seal::borrow(end).unwrap(),
            Way::Carried => seal::Connection::plain(end),
        };
        connection.socket.set_nonblocking(false).unwrap();
        seal::Sealed::new(connection.socket, connection.keys.as_ref()).unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn whichever_way_each_side_has_it_they_understand_each_other() {
        for (there, here) in [Way::Lent, Way::Carried]
            .into_iter()
            .flat_map(|there| [Way::Lent, Way::Carried].map(|here| (there, here)))
        {
            let (key, other) = (key(), key());
            let awaited = listen(HERE, &key, there).await.unwrap();
            let to = format!("127.0.0.1:{}", awaited.port);
            // Who has another key does not take the place of who is waited for.
            drop(connect_lent(&to, &other, false, 0).await);
            let much = there == here;
            let (end, _line) = match here {
                Way::Lent => connect_lent(&to, &key, much, 0).await.unwrap(),
                Way::Carried => connect(&to, &key, much).await.unwrap(),
            };
            let talk = tokio::task::spawn_blocking(move || {
                let said: Vec<u8> = (0..3 << 20).map(|at: u32| (at / 7) as u8).collect();
                let sends = said.clone();
                let source = std::thread::spawn(move || {
                    let mut source = connection(end, here);
                    source.write_all(&sends).unwrap();
                    source.flush().unwrap();
                    let mut answer = String::new();
                    source.read_to_string(&mut answer).unwrap();
                    answer
                });
                // A target is told in any case.
                let mut target = connection(awaited.end, Way::Lent);
                let _awaits = awaited.line;
                assert_eq!(target.is_sealed(), there == Way::Lent);
                let mut heard = vec![0; said.len()];
                target.read_exact(&mut heard).unwrap();
                assert!(said == heard, "{there:?} {here:?}");
                target.write_all(b"it is here").unwrap();
                target.flush().unwrap();
                drop(target);
                source.join().unwrap()
            });
            assert_eq!(talk.await.unwrap(), "it is here", "{there:?} {here:?}");
        }
    }

    /// With the stream's own connection first, and each lane where the other side has it.
    #[tokio::test(flavor = "multi_thread")]
    async fn lanes_are_lent_in_their_order_where_the_target_takes_them() {
        let sockets = |end: OwnedFd| {
            let end = std::os::unix::net::UnixStream::from(end);
            end.set_nonblocking(false).unwrap();
            let made = |socket: std::os::unix::net::UnixStream| {
                socket.set_nonblocking(false).unwrap();
                socket
            };
            let connections = seal::borrow(end).unwrap().sealed(made).unwrap();
            let main = std::iter::once(connections.main);
            main.chain(connections.lanes).collect::<Vec<_>>()
        };
        for (way, wanted, lanes) in [
            (Way::Lent, 3, 3),
            (Way::Lent, u8::MAX, MOST_LANES),
            (Way::Carried, 3, 0),
        ] {
            let (key, other) = (key(), key());
            let awaited = listen(HERE, &key, way).await.unwrap();
            let to = format!("127.0.0.1:{}", awaited.port);
            // Somebody who begins and does not go on, and one with another key.
            let place = Place {
                number: 0,
                lanes: 2,
            };
            if way == Way::Lent {
                drop(dial(&to, &key, false, place).await.unwrap());
            }
            drop(connect_lent(&to, &other, false, wanted).await);
            let (end, _line) = connect_lent(&to, &key, false, wanted).await.unwrap();
            let talk = tokio::task::spawn_blocking(move || {
                let (near, far) = (sockets(end), sockets(awaited.end));
                let _awaits = awaited.line;
                assert_eq!([near.len(), far.len()], [usize::from(lanes) + 1; 2]);
                for (number, (mut near, mut far)) in near.into_iter().zip(far).enumerate() {
                    near.write_all(&[number as u8]).unwrap();
                    near.flush().unwrap();
                    let mut heard = [0];
                    far.read_exact(&mut heard).unwrap();
                    assert_eq!(usize::from(heard[0]), number, "{way:?}");
                }
            });
            talk.await.unwrap();
        }
    }
}
