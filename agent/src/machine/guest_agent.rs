//! Speaks to the QEMU guest agent in a guest, by its port of the machine's process.
//!
//! One connection, one command at a time: JSON lines, after a `guest-sync-delimited` that leaves
//! behind whatever an earlier speaker has left in the port (QEMU's docs/interop/qemu-ga). The guest
//! may answer anything or nothing: every answer has a deadline and a size. What it says is never
//! trusted for more than its own guest.

use std::io;
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::process::ProcessError;
use super::process::control::Control;
use crate::vm::protocol::Role;

/// Name of the port in the guest.
pub const PORT: &str = "org.qemu.guest_agent.0";
/// Most bytes of an answer.
const LINE: usize = 64 << 10;
/// Most bytes that are passed over until the answer to a sync comes.
const PASSED_OVER: usize = 1 << 20;
const ANSWER: Duration = Duration::from_secs(5);
/// File systems may have much to write before they are frozen.
const FREEZE: Duration = Duration::from_secs(60);
/// Precedes the answer to `guest-sync-delimited`; no JSON holds it.
const SENTINEL: u8 = 0xff;

#[derive(Debug, thiserror::Error)]
pub enum GuestAgentError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("the port of the guest agent: {0}")]
    Port(#[from] io::Error),
    #[error("the guest's agent did not answer {command} in time: is qemu-guest-agent running?")]
    Mute { command: &'static str },
    #[error("the guest's agent answered {command} with something that is no answer")]
    Nonsense { command: &'static str },
    /// In the guest's own words, cut short.
    #[error("the guest's agent refused {command}: {words}")]
    Refused {
        command: &'static str,
        words: String,
    },
}

/// A connection that is in step with the guest.
pub struct GuestAgent {
    port: Control,
    /// Bytes that came after the last answer.
    rest: Vec<u8>,
}

/// What `guest-info` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    pub version: String,
    /// Commands that it may be asked.
    pub commands: Vec<String>,
}

impl GuestAgent {
    /// By the socket of the machine's process with this pid.
    pub async fn connect(socket: &Path, pid: i32) -> Result<Self, GuestAgentError> {
        Self::open(Control::connect(socket, pid, Role::GuestAgent).await?).await
    }

    /// Over a port; returns once both sides are in step.
    async fn open(port: Control) -> Result<Self, GuestAgentError> {
        let mut agent = Self {
            port,
            rest: Vec::new(),
        };
        let command = "guest-sync-delimited";
        // Any number that no earlier speaker has used.
        let id = rand::random::<u32>();
        let request = json!({"execute": command, "arguments": {"id": id}}).to_string();
        let mut bytes = vec![SENTINEL];
        bytes.extend(request.bytes());
        bytes.push(b'\n');
        let synced = timeout(ANSWER, async {
            agent.write(&bytes).await?;
            agent.sync(command, id).await
        });
        synced
            .await
            .map_err(|_| GuestAgentError::Mute { command })??;
        Ok(agent)
    }

    async fn sync(&mut self, command: &'static str, id: u32) -> Result<(), GuestAgentError> {
        let mut passed = 0;
        loop {
            while let Some(at) = self.rest.iter().position(|byte| *byte == SENTINEL) {
                self.rest.drain(..=at);
                let line = self.line(command).await?;
                if serde_json::from_slice::<Value>(&line).is_ok_and(|said| said["return"] == id) {
                    return Ok(());
                }
            }
            passed += self.rest.len();
            self.rest.clear();
            if passed > PASSED_OVER {
                return Err(GuestAgentError::Nonsense { command });
            }
            self.read().await?;
        }
    }

    pub async fn info(&mut self) -> Result<Info, GuestAgentError> {
        let said = self.call("guest-info", json!({}), ANSWER).await?;
        let commands = said["supported_commands"].as_array().into_iter().flatten();
        let commands = commands.filter(|command| command["enabled"] == true);
        Ok(Info {
            version: said["version"].as_str().unwrap_or_default().to_owned(),
            commands: commands
                .filter_map(|command| command["name"].as_str().map(str::to_owned))
                .collect(),
        })
    }

    /// Nanoseconds since the epoch.
    pub async fn set_time(&mut self, time_ns: i64) -> Result<(), GuestAgentError> {
        let time = json!({"time": time_ns});
        self.call("guest-set-time", time, ANSWER).await.map(drop)
    }

    /// Freezes all file systems; says how many. Whoever does so has to [`Self::thaw`].
    pub async fn freeze(&mut self) -> Result<u64, GuestAgentError> {
        let said = self
            .call("guest-fsfreeze-freeze", json!({}), FREEZE)
            .await?;
        Ok(said.as_u64().unwrap_or_default())
    }

    pub async fn thaw(&mut self) -> Result<u64, GuestAgentError> {
        let said = self.call("guest-fsfreeze-thaw", json!({}), FREEZE).await?;
        Ok(said.as_u64().unwrap_or_default())
    }

    pub async fn set_password(
        &mut self,
        user: &str,
        password: &str,
    ) -> Result<(), GuestAgentError> {
        let password = STANDARD.encode(password);
        let arguments = json!({"username": user, "password": password, "crypted": false});
        let said = self.call("guest-set-user-password", arguments, ANSWER);
        said.await.map(drop)
    }

    async fn call(
        &mut self,
        command: &'static str,
        arguments: Value,
        patience: Duration,
    ) -> Result<Value, GuestAgentError> {
        let request = json!({"execute": command, "arguments": arguments});
        let answer = timeout(patience, async {
            self.write(format!("{request}\n").as_bytes()).await?;
            self.line(command).await
        });
        let line = answer
            .await
            .map_err(|_| GuestAgentError::Mute { command })??;
        let mut said: Value =
            serde_json::from_slice(&line).map_err(|_| GuestAgentError::Nonsense { command })?;
        if let Some(error) = said.get("error") {
            let words = error["desc"].as_str().unwrap_or_default();
            let words = words
                .chars()
                .filter(|letter| !letter.is_control())
                .take(200);
            return Err(GuestAgentError::Refused {
                command,
                words: words.collect(),
            });
        }
        match said.get_mut("return") {
            Some(said) => Ok(said.take()),
            None => Err(GuestAgentError::Nonsense { command }),
        }
    }

    /// The next line, without its end.
    async fn line(&mut self, command: &'static str) -> Result<Vec<u8>, GuestAgentError> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.rest.drain(..=end).collect();
                line.pop();
                return Ok(line);
            }
            if self.rest.len() > LINE {
                return Err(GuestAgentError::Nonsense { command });
            }
            self.read().await?;
        }
    }

    async fn read(&mut self) -> Result<(), GuestAgentError> {
        let mut buffer = vec![0; 4096];
        loop {
            let mut ready = self.port.socket().readable().await?;
            let received = ready.try_io(|socket| {
                let (length, _) = recv(socket, &mut buffer, RecvFlags::DONTWAIT)?;
                Ok(length)
            });
            match received {
                Err(_would_block) => {}
                Ok(Ok(0)) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(Ok(length)) => {
                    self.rest.extend(buffer.get(..length).unwrap_or_default());
                    return Ok(());
                }
                Ok(Err(error)) => return Err(error.into()),
            }
        }
    }

    async fn write(&self, bytes: &[u8]) -> Result<(), GuestAgentError> {
        for packet in bytes.chunks(1024) {
            loop {
                let mut ready = self.port.socket().writable().await?;
                let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
                match ready.try_io(|socket| Ok(send(socket, packet, flags)?)) {
                    Err(_would_block) => {}
                    Ok(sent) => {
                        sent?;
                        break;
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "guest_agent_tests.rs"]
mod tests;
