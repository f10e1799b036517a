//! Somebody who asks a guest for its time, again and again, by one connection over its network: whether it answers,
//! and whether its clock is right.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fractus_lab::Host;
use fractus_tests::harness::until;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::cloud::GUEST_ACTS;

/// Between an answer and the next question.
const PAUSE: Duration = Duration::from_millis(100);
/// Answers that one look at the clock is of: the quickest of them says most.
const ANSWERS: usize = 40;

/// How far a clock is before this machine's, seconds, and how far that may be from the truth.
#[derive(Debug, Clone, Copy)]
pub struct Ahead {
    pub by: f64,
    pub within: f64,
    at: Instant,
}

impl Ahead {
    /// By a clock that said `said` between two looks at ours.
    fn of(sent: f64, said: f64, heard: f64) -> Self {
        Self {
            by: said - f64::midpoint(sent, heard),
            within: (heard - sent) / 2.0,
            at: Instant::now(),
        }
    }

    /// How much more it is ahead than it was, and how far that may be from the truth.
    pub fn since(&self, before: &Self) -> (f64, f64) {
        (self.by - before.by, self.within + before.within)
    }

    pub fn seconds_since(&self, before: &Self) -> f64 {
        self.at.duration_since(before.at).as_secs_f64()
    }
}

pub fn now() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs_f64()
}

fn quickest(all: impl IntoIterator<Item = Ahead>) -> Option<Ahead> {
    all.into_iter().min_by(|a, b| a.within.total_cmp(&b.within))
}

/// A host's clock. Who asks is answered by a process that has to begin first.
pub fn host(host: &Host) -> Ahead {
    let looks = (0..8).map(|_| {
        let sent = now();
        let said = host.done("echo $EPOCHREALTIME").unwrap();
        Ahead::of(sent, said.trim().parse().unwrap(), now())
    });
    quickest(looks).unwrap()
}

type Answers = Arc<Mutex<Vec<Ahead>>>;

pub struct Questions {
    answers: Answers,
    asks: JoinHandle<()>,
}

impl Drop for Questions {
    fn drop(&mut self) {
        self.asks.abort();
    }
}

impl Questions {
    /// Of a guest that answers a line with the same line and its time.
    pub async fn to(guest: SocketAddr) -> Self {
        let connected = until("the guest takes a connection", GUEST_ACTS, || async {
            let connected = TcpStream::connect(guest).await;
            connected.map_err(|error| error.to_string())
        });
        let stream = connected.await.unwrap();
        let answers = Answers::default();
        let seen = Arc::clone(&answers);
        let asks = tokio::spawn(ask(stream, seen));
        Self { answers, asks }
    }

    /// All that it has answered.
    pub fn count(&self) -> usize {
        let answers = self.answers.lock();
        answers.unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Waits for some more answers, and so for the connection to live; the guest's clock by the quickest of them.
    pub async fn clock(&self) -> Ahead {
        let from = self.count();
        let answered = until("the guest answers", GUEST_ACTS, || async {
            match (self.count() - from, self.asks.is_finished()) {
                (more, false) if more >= ANSWERS => Ok(()),
                (more, over) => Err(format!("{more} answers; over: {over}")),
            }
        });
        answered.await.unwrap();
        let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        quickest(answers[from..].iter().copied()).unwrap()
    }
}

async fn ask(stream: TcpStream, seen: Answers) {
    stream.set_nodelay(true).unwrap();
    let (from, mut to) = stream.into_split();
    let mut lines = BufReader::new(from).lines();
    for number in 0_u64.. {
        let sent = now();
        to.write_all(format!("{number}\n").as_bytes())
            .await
            .unwrap();
        let Some(line) = lines.next_line().await.unwrap() else {
            panic!("the guest has closed the connection");
        };
        let heard = now();
        let (answers, said) = line.split_once(' ').unwrap();
        assert_eq!(answers, number.to_string(), "an answer to another question");
        let ahead = Ahead::of(sent, said.trim().parse().unwrap(), heard);
        seen.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(ahead);
        // sleeps because it is not to be the guest's only work
        tokio::time::sleep(PAUSE).await;
    }
}
