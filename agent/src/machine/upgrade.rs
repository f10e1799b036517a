//! Machines that go on in processes of the program that the agent runs: `fractus-agent upgrade-machines`.
//!
//! The command speaks to the agent by a socket in the runtime folder, root's alone: a line with what is wanted, then
//! a line with what the agent is, one for each machine as soon as it is settled what became of it, and one that ends it;
//! each is JSON. The agent takes one machine of a command at a time.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::Context;
use fractus_agent_api::machine::ServerId;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;

use super::Machines;
use super::process::Launcher;
use super::process::identity::{self, Program};
use super::process::sockets;
use crate::paths::Paths;

/// Bytes of what is wanted at most: many machines may be named.
const MOST: u64 = 1 << 20;

/// What became of a machine's process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "snake_case")]
pub enum Fate {
    /// The guest runs in a new one, and stood still for so long; none: it stands still as before.
    HandedOver { blackout_us: Option<u64> },
    /// It runs the agent's program already.
    Current,
    /// It is as it was, and nothing is wrong.
    Skipped { reason: String },
    /// The guest goes on where it was, if the reason says no more.
    Failed { reason: String },
}

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// None: all of the host.
    #[serde(default)]
    pub machines: Vec<ServerId>,
    /// Also those whose process runs the agent's program.
    #[serde(default)]
    pub all: bool,
    /// Of the command: an agent of another program does nothing.
    #[serde(default)]
    pub program: Option<Program>,
}

/// What the agent says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Agent { version: String, program: Program },
    Machine { id: ServerId, fate: Fate },
    Over,
}

/// Answers commands of this host, for the life of the agent.
pub async fn listen<L: Launcher>(machines: Machines<L>, listener: UnixListener, program: Program) {
    loop {
        match listener.accept().await {
            Ok((connection, _)) => {
                let machines = machines.clone();
                // One that says nothing keeps no other waiting.
                tokio::spawn(async move {
                    if let Err(error) = serve(&machines, connection, program).await {
                        tracing::warn!(%error, "a command of this host");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "no command of this host is let in");
                // sleeps because nobody says when there are descriptors again.
                tokio::time::sleep(std::time::Duration::from_secs(1)).await;
            }
        }
    }
}

/// Nobody's but root's.
pub fn bind(path: &Path) -> io::Result<UnixListener> {
    let socket = sockets::vsock(path)?;
    UnixListener::from_std(std::os::unix::net::UnixListener::from(socket))
}

async fn serve<L: Launcher>(
    machines: &Machines<L>,
    mut connection: tokio::net::UnixStream,
    program: Program,
) -> io::Result<()> {
    let (reader, mut writer) = connection.split();
    let mut text = String::new();
    let mut reader = tokio::io::BufReader::new(reader.take(MOST));
    reader.read_line(&mut text).await?;
    let wanted: Wanted = serde_json::from_str(&text)?;
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let mut say = async |line: Line| {
        let mut bytes = serde_json::to_vec(&line)?;
        bytes.push(b'\n');
        writer.write_all(&bytes).await
    };
    say(Line::Agent { version, program }).await?;
    if wanted.program.is_some_and(|other| other != program) {
        return Ok(());
    }
    let ids = match wanted.machines.is_empty() {
        true => machines.list().iter().map(|report| report.id).collect(),
        false => wanted.machines,
    };
    for id in ids {
        let unknown = || Fate::Failed {
            reason: "this host has no such machine".to_owned(),
        };
        let fate = machines.upgrade(id, wanted.all).await;
        let fate = fate.unwrap_or_else(unknown);
        say(Line::Machine { id, fate }).await?;
    }
    say(Line::Over).await
}

/// Has the agent of this host do it; `each` is told what became of each machine.
///
/// # Errors
/// No agent runs here, or one of another program than this process.
pub fn ask(
    paths: &Paths,
    wanted: &Wanted,
    mut each: impl FnMut(ServerId, Fate),
) -> anyhow::Result<()> {
    let path = paths.local();
    let mut agent = UnixStream::connect(&path).with_context(|| {
        format!(
            "{}: the agent has to run, and to be of this release or a newer one",
            path.display()
        )
    })?;
    let own = identity::program(std::process::id().cast_signed()).context("looking at itself")?;
    let wanted = Wanted {
        program: Some(own),
        ..wanted.clone()
    };
    let mut text = serde_json::to_vec(&wanted)?;
    text.push(b'\n');
    agent.write_all(&text)?;
    for line in BufReader::new(agent).lines() {
        match serde_json::from_str(&line?)? {
            Line::Agent { version, program } => anyhow::ensure!(
                program == own,
                "the agent that runs is of another program (version {version}) than this command: restart it first"
            ),
            Line::Machine { id, fate } => each(id, fate),
            Line::Over => return Ok(()),
        }
    }
    anyhow::bail!("the agent has ended meanwhile: ask again once it runs")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_both_sides_say_stays_as_it_is() {
        let wanted: Wanted = serde_json::from_str("{}").unwrap();
        assert_eq!((wanted.machines.len(), wanted.all), (0, false));
        let blackout_us = Some(1500);
        let line = Line::Machine {
            id: ServerId(uuid::Uuid::from_u128(7)),
            fate: Fate::HandedOver { blackout_us },
        };
        let text = r#"{"machine":{"id":"00000000-0000-0000-0000-000000000007","fate":{"is":"handed_over","blackout_us":1500}}}"#;
        assert_eq!(serde_json::to_string(&line).unwrap(), text);
        assert_eq!(serde_json::from_str::<Line>(text).unwrap(), line);
    }
}
