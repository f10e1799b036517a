//! The stream between two hosts, frame by frame: it is read with the migration's own key.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use fractus_agent_api::migration::StreamKey;
use fractus_agent_api::tls::stream;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::gate::{Fate, Gate};
use super::spot::{Seen, Spot};

/// Bytes of a frame's head: its kind (2), two that say nothing, its payload's length (4), and more.
const HEAD: usize = 16;
/// Kinds of frames that are looked for (`vmm/src/stream/frame`).
const END: u16 = 4;
const PAGES: u16 = 7;
const OWED: u16 = 13;
const WANTED: u16 = 14;
const GOT: u16 = 15;
const WHOLE: u16 = 16;

type Reads = ReadHalf<TlsStream<TcpStream>>;
type Writes = WriteHalf<TlsStream<TcpStream>>;

/// Where the source finds the target. Ends, with what goes by it, when it is dropped.
pub struct Line(JoinHandle<()>);

impl Drop for Line {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Line {
    pub fn open(gate: Arc<Gate>, known: SocketAddr, listens: SocketAddr, key: StreamKey) -> Self {
        // Bound before anybody is told of it.
        let listener = std::net::TcpListener::bind(known).and_then(|listener| {
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        });
        Self(tokio::spawn(async move {
            let carried = async {
                let listener = listener.context("the way to the target")?;
                // One migration has one stream; memory that follows may come by another, when the first one has broken.
                let mut carrying = JoinSet::new();
                loop {
                    let (source, _) = listener.accept().await?;
                    if gate.meet(&[Seen::Stream(Spot::Connecting)]).await == Fate::Cut {
                        continue;
                    }
                    carrying.shutdown().await;
                    let (gate, key) = (Arc::clone(&gate), key.clone());
                    carrying.spawn(async move {
                        let carried = async {
                            let target = TcpStream::connect(listens).await?;
                            carry(&gate, source, target, &key).await
                        };
                        if let Err(error) = carried.await {
                            println!("the line to {listens}: {error:#}");
                        }
                    });
                }
            };
            let carried: Result<()> = carried.await;
            if let Err(error) = carried {
                println!("no line to {listens}: {error:#}");
            }
        }))
    }
}

async fn carry(gate: &Gate, source: TcpStream, target: TcpStream, key: &StreamKey) -> Result<()> {
    source.set_nodelay(true)?;
    target.set_nodelay(true)?;
    let server = TlsAcceptor::from(Arc::new(stream::server(key)?));
    let client = TlsConnector::from(Arc::new(stream::client(key, false)?));
    let target = client.connect(stream::name()?, target).await?;
    let source = server.accept(source).await?;
    let (from_source, to_source) = tokio::io::split(TlsStream::from(source));
    let (from_target, to_target) = tokio::io::split(TlsStream::from(target));
    let unanswered = AtomicBool::new(false);
    tokio::try_join!(
        forth(gate, from_source, to_target, &unanswered),
        back(gate, from_target, to_source, &unanswered),
    )?;
    Ok(())
}

/// A frame, head and all; none: the stream has ended.
async fn frame(from: &mut Reads) -> Result<Option<Vec<u8>>> {
    let mut frame = vec![0; HEAD];
    match from.read_exact(&mut frame).await {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    };
    let length = u32::from_le_bytes([frame[4], frame[5], frame[6], frame[7]]);
    frame.resize(HEAD + length as usize, 0);
    from.read_exact(&mut frame[HEAD..]).await?;
    Ok(Some(frame))
}

async fn forth(
    gate: &Gate,
    mut from: Reads,
    mut to: Writes,
    unanswered: &AtomicBool,
) -> Result<()> {
    let (mut pages, mut ended) = (0, false);
    while let Some(frame) = frame(&mut from).await? {
        let kind = u16::from_le_bytes([frame[0], frame[1]]);
        pages += u32::from(kind == PAGES);
        if kind == PAGES {
            gate.paces(ended).await;
        }
        let fate = match kind {
            PAGES if ended => gate.meet(&[Seen::Stream(Spot::Following)]).await,
            // Some of its memory is there.
            PAGES if pages == 2 => gate.meet(&[Seen::Stream(Spot::Copying)]).await,
            OWED if !ended => gate.meet(&[Seen::Stream(Spot::Owing)]).await,
            END => gate.meet(&[Seen::Stream(Spot::Ending)]).await,
            _ => Fate::Delivered,
        };
        ended |= kind == END;
        match fate {
            Fate::Cut => bail!("cut"),
            Fate::Unanswered => unanswered.store(true, Ordering::Relaxed),
            Fate::Delivered | Fate::Doubled => {}
        }
        to.write_all(&frame).await?;
        to.flush().await?;
    }
    Ok(to.shutdown().await?)
}

async fn back(gate: &Gate, mut from: Reads, mut to: Writes, unanswered: &AtomicBool) -> Result<()> {
    while let Some(frame) = frame(&mut from).await? {
        if unanswered.load(Ordering::Relaxed) {
            bail!("the answer is lost");
        }
        let spot = match u16::from_le_bytes([frame[0], frame[1]]) {
            WANTED => Some(Spot::Wanting),
            WHOLE => Some(Spot::AllThere),
            GOT | OWED => None,
            _ => Some(Spot::Answering),
        };
        if let Some(spot) = spot
            && gate.meet(&[Seen::Stream(spot)]).await == Fate::Cut
        {
            bail!("cut");
        }
        to.write_all(&frame).await?;
        to.flush().await?;
    }
    Ok(to.shutdown().await?)
}
