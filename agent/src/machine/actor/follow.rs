//! Memory that follows a guest (post-copy), of the agent's part: lines.
//!
//! A line ends with one of the two agents, with a host's network, or with a process. The target listens on its port for as
//! long as memory is to come, across its own restarts, and the source comes again for as long as it owes some. Neither asks
//! a controller. Whose the guest is was decided before, and is not touched by any of it.
//!
//! The process's loop may itself be waiting for memory that does not come, and says nothing then: so an agent that finds
//! it takes from the record that memory is to come, and that a line has ended it knows by itself.

use std::os::fd::OwnedFd;
use std::time::Duration;

use fractus_agent_api::migration::{Lacks, State, Transit};
use tokio::time::Instant;

use super::{Actor, Over};
use crate::machine::line::{self, Coming, Way};
use crate::machine::process::{Command, Launcher, Process};
use crate::machine::record::LineRecord;

/// After this time the source comes again, or the target listens again; twice as long each time, at most so long.
const FIRST: Duration = Duration::from_millis(100);
const LAST: Duration = Duration::from_secs(5);

/// A line that has ended for so long is told of: its process may have said by then that all has come, or a new line has.
const ENDED: Duration = Duration::from_secs(2);

/// When something is tried again that failed.
#[derive(Debug, Default)]
pub(super) struct Again {
    at: Option<Instant>,
    after: Duration,
}

impl Again {
    fn is_due(&self) -> bool {
        self.at.is_none_or(|at| at <= Instant::now())
    }

    fn has_failed(&mut self) {
        self.after = (self.after * 2).clamp(FIRST, LAST);
        self.at = Some(Instant::now() + self.after);
    }
}

/// Lines beside the first, as far as they are known.
#[derive(Debug, Default)]
pub(super) struct Follow {
    /// Some of the guest's memory is still to come here, as the process says.
    pub lacks: Option<Lacks>,
    /// No line carries it since then, and this is why.
    cut: Option<(Instant, &'static str)>,
    /// What becomes of lines.
    pub others: Option<line::Others>,
    /// One of them, which the process has not got yet.
    other: Option<OwnedFd>,
    again: Again,
}

impl Follow {
    pub fn awaited(others: line::Others) -> Self {
        Self {
            others: Some(others),
            ..Self::default()
        }
    }

    /// An earlier agent's, of whose process nothing has been heard.
    pub fn found() -> Self {
        Self {
            lacks: Some(Lacks::default()),
            cut: Some((Instant::now(), "its source has not come to this agent yet")),
            ..Self::default()
        }
    }

    /// For others.
    pub fn report(&self) -> Option<Lacks> {
        let lacks = self.lacks.clone()?;
        let cut = self.cut.filter(|(since, _)| since.elapsed() >= ENDED);
        let starving = lacks.starving.or(cut.map(|(_, why)| why.to_owned()));
        Some(Lacks { starving })
    }

    /// When that is to be told of.
    fn tell_by(&self) -> Option<Instant> {
        let (since, _) = self.cut.filter(|_| self.lacks.is_some())?;
        Some(since + ENDED).filter(|by| *by > Instant::now())
    }

    pub fn happened(&mut self, coming: Coming) {
        match coming {
            Coming::Again(end) => self.other = Some(end),
            Coming::Ended => self.cut = Some((Instant::now(), "the line to its source has ended")),
        }
    }
}

/// What becomes of lines next.
pub(super) async fn next(others: &mut Option<line::Others>) -> Coming {
    loop {
        match others {
            Some(receiver) => match receiver.recv().await {
                Some(coming) => return coming,
                None => *others = None,
            },
            None => std::future::pending().await,
        }
    }
}

impl<L: Launcher> Actor<L> {
    /// What the process says of memory that is to come.
    pub(super) fn lacks(&mut self, lacks: Option<Lacks>) {
        if let (Some(_), None) = (&self.travel.follow.lacks, &lacks) {
            tracing::info!(machine = %self.record.id, "its guest's memory is whole");
            self.travel.follow.lacks = None;
            self.forget_line();
            // If it has not ended yet, the line has the last words to carry.
            self.hang_up();
        } else {
            self.travel.follow.lacks = lacks;
        }
    }

    /// Of the target: once its line has ended nobody listens any more for a guest that has everything.
    pub(super) fn hang_up(&mut self) {
        let over = self.travel.follow.lacks.is_none() && self.record.line.is_none();
        if over && self.travel.follow.cut.is_some() {
            (self.travel.line, self.travel.follow) = (None, Follow::default());
        }
    }

    /// Of the target: no source is awaited any more.
    pub(super) fn forget_line(&mut self) {
        if self.record.line.take().is_some() {
            self.note();
        }
    }

    /// The guest goes on here, and does not get what it needs.
    pub(super) fn starves(&self) -> bool {
        let lacks = self.travel.follow.report();
        lacks.is_some_and(|lacks| lacks.starving.is_some())
    }

    /// When one of these is to be looked at again.
    pub(super) fn follow_by(&self) -> Option<Instant> {
        let again = self.is_to_come_again() || self.is_to_listen_again();
        let again = self.travel.follow.again.at.filter(|_| again);
        again.into_iter().chain(self.travel.follow.tell_by()).min()
    }

    /// The next of these things that is to be done now.
    pub(super) fn has_to_follow(&self) -> bool {
        let due = self.travel.follow.again.is_due();
        self.travel.follow.other.is_some()
            || due && (self.is_to_come_again() || self.is_to_listen_again())
    }

    pub(super) async fn follow(&mut self) -> Result<(), Over> {
        if let Some(end) = self.travel.follow.other.take() {
            self.bring(end).await;
            return Ok(());
        }
        match self.is_to_come_again() {
            true => self.come_again().await,
            false => {
                self.listen_again().await;
                Ok(())
            }
        }
    }

    /// Of the source: it owes, and nothing of that goes.
    fn is_to_come_again(&self) -> bool {
        let Transit::Offered(id) = self.travel.transit else {
            return false;
        };
        let departs = self.record.intent.wanted.departs.as_ref();
        let moving = self.travel.moving.as_ref().filter(|moving| moving.id == id);
        departs.is_some_and(|departure| departure.id == id)
            && moving.is_some_and(|moving| {
                let owes = matches!(moving.state, State::Offered { owes: true, .. });
                owes && (self.travel.line.is_none() || moving.progress.broken.is_some())
            })
    }

    async fn come_again(&mut self) -> Result<(), Over> {
        let Some(departure) = self.record.intent.wanted.departs.clone() else {
            return Ok(());
        };
        self.travel.line = None;
        let (to, key) = (departure.to.clone(), departure.key.clone());
        let connecting = async move { line::connect_again(&to, &key).await };
        let connected = self.meanwhile(connecting, Self::is_to_come_again).await?;
        // Also where it stands now, but breaks at once.
        self.travel.follow.again.has_failed();
        let broken = match connected {
            None => return Ok(()),
            Some(Err(error)) => Some(format!("connecting to {}: {error}", departure.to)),
            Some(Ok((end, line))) => {
                let request_id = self.record.request_id.clone();
                let Some(process) = &mut self.process else {
                    return Ok(());
                };
                let (id, policy) = (departure.id, departure.policy);
                let sent =
                    process.send(id, policy, Some((end, Way::Carried)), request_id.as_deref());
                let sent = sent.await;
                self.travel.line = sent.is_ok().then_some(line);
                sent.err().map(|error| error.to_string())
            }
        };
        tracing::info!(machine = %self.record.id, migration = %departure.id, ?broken, "its guest's memory goes on by another line");
        if let Some(moving) = &mut self.travel.moving {
            moving.progress.broken = broken;
        }
        self.publish();
        Ok(())
    }

    /// Of the target: its agent was another one, or its port was not to be had.
    fn is_to_listen_again(&self) -> bool {
        let follow = &self.travel.follow;
        let here = self.travel.transit == Transit::None && self.process.is_some();
        here && follow.lacks.is_some() && follow.others.is_none() && self.record.line.is_some()
    }

    async fn listen_again(&mut self) {
        let Some(LineRecord { port, key, .. }) = &self.record.line else {
            return;
        };
        // One whose words nobody hears has the port.
        self.travel.line = None;
        let listened = line::listen_again(self.surroundings.listen, *port, key).await;
        match listened {
            Ok((line, others)) => {
                (self.travel.line, self.travel.follow.others) = (Some(line), Some(others));
            }
            Err(error) => {
                tracing::warn!(machine = %self.record.id, port, %error, "its guest's memory cannot be listened for");
                self.travel.follow.again.has_failed();
            }
        }
    }

    /// The source has come again.
    async fn bring(&mut self, end: OwnedFd) {
        let Some(process) = &mut self.process else {
            return;
        };
        let brought = process.bring_line(end).await;
        match brought {
            Ok(()) => {
                self.travel.follow.cut = None;
                if let Some(lacks) = &mut self.travel.follow.lacks {
                    lacks.starving = None;
                }
                tracing::info!(machine = %self.record.id, "its guest's memory comes by another line");
                // What it has said of the one before may be on its way still.
                let _ = process.tell(Command::Status, None).await;
            }
            Err(error) => {
                tracing::warn!(machine = %self.record.id, %error, "another line for its guest's memory");
            }
        }
        self.publish();
    }
}
