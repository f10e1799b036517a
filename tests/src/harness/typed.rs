//! What is typed at a server's serial console, for tests.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::time::Duration;

use anyhow::{Result, bail};
use futures::{SinkExt, StreamExt};
use serde_json::json;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use super::Client;

/// Longest wait for an answer, of a guest on a busy host.
const ANSWERS: Duration = Duration::from_secs(60);

/// The probe does a command that it is typed.
///
/// # Panics
/// When it says that it cannot, or nothing.
pub async fn asks(admin: &Client, server: &str, command: &str) {
    let mut typed = Typed::open(admin, server).await.unwrap();
    typed.answer(command).await.unwrap();
}

/// The disk of a server is not as it was once written to by `disk-write`, with these arguments.
pub async fn has_lost(admin: &Client, server: &str, written: &str) {
    let mut typed = Typed::open(admin, server).await.unwrap();
    let check = format!("disk-check {written}");
    let answers = ["ok disk-check", "err disk-check at="];
    let answer = typed.until(&check, &answers).await.unwrap();
    assert!(answer.contains(answers[1]), "{check}: {answer}");
}

/// A server's serial console, with the probe at its other end.
pub struct Typed {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    said: String,
}

impl Typed {
    pub async fn open(admin: &Client, server: &str) -> Result<Self> {
        let body = json!({"remote_console": {"protocol": "serial", "type": "serial"}});
        let path = format!("/compute/v2.1/servers/{server}/remote-consoles");
        let console = admin.post(&path, body).await?;
        let url = console.expect_status(200)?.text("/remote_console/url");
        let mut request = url.as_str().into_client_request()?;
        let headers = request.headers_mut();
        headers.insert("sec-websocket-protocol", "binary".parse()?);
        let (socket, _) = tokio_tungstenite::connect_async(request).await?;
        let said = String::new();
        Ok(Self { socket, said })
    }

    /// What the probe answers to a command.
    ///
    /// # Errors
    /// It says that it cannot, or nothing.
    pub async fn answer(&mut self, command: &str) -> Result<String> {
        let word = command.split(' ').next().unwrap_or_default();
        let (ok, err) = (format!("ok {word}"), format!("err {word}"));
        let answer = self.until(command, &[&ok, &err]).await?;
        match answer.contains(&ok) {
            true => Ok(answer),
            false => bail!("{command}: {answer}"),
        }
    }

    /// The line in which it says one of these, once it was typed that.
    ///
    /// # Errors
    /// It says nothing of the kind.
    pub async fn until(&mut self, typed: &str, answers: &[&str]) -> Result<String> {
        let line = Message::binary(format!("{typed}\n"));
        self.socket.send(line).await?;
        let answered = tokio::time::timeout(ANSWERS, async {
            loop {
                let (whole, rest) = self.said.rsplit_once('\n').unwrap_or(("", &self.said));
                let is_answer = |line: &&str| answers.iter().any(|answer| line.contains(answer));
                if let Some(answer) = whole.lines().find(is_answer).map(str::to_owned) {
                    self.said = rest.to_owned();
                    return Some(answer);
                }
                let Some(Ok(message)) = self.socket.next().await else {
                    return None;
                };
                self.said
                    .push_str(&String::from_utf8_lossy(&message.into_data()));
            }
        });
        match answered.await.ok().flatten() {
            Some(answer) => Ok(answer),
            None => bail!("{typed:?}: {:?}", self.said),
        }
    }
}
