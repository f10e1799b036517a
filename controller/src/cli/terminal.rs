//! This terminal on a server's serial line: raw mode, keys out and bytes in, over a WebSocket.
//!
//! Owns the terminal's mode while attached, and gives it back however it ends. Ctrl-] detaches. When
//! standard input is no terminal, what comes from it is sent as it is, and its end does not end the
//! console: output goes on until the other side closes.

use std::io::IsTerminal;
use std::os::fd::AsFd;
use std::sync::Arc;

use futures::{SinkExt, StreamExt};
use rustix::termios::{self, OptionalActions, Termios};
use tokio::io::AsyncWriteExt;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{Connector, connect_async_tls_with_config};

use super::CliError;
use super::config::Config;
use super::tls;

/// Ctrl-].
const DETACH: u8 = 0x1d;

/// Runs until the user detaches or the other side closes; says which.
pub async fn attach(url: &str, config: &Config) -> Result<&'static str, CliError> {
    let refused = |error: tungstenite::Error| CliError::Console {
        detail: error.to_string(),
    };
    let mut request = url.into_client_request().map_err(refused)?;
    let binary = http::HeaderValue::from_static("binary");
    request
        .headers_mut()
        .insert("sec-websocket-protocol", binary);
    let connector = connector(url, config)?;
    let (socket, _) = connect_async_tls_with_config(request, None, true, connector)
        .await
        .map_err(refused)?;
    let (mut to_guest, mut from_guest) = socket.split();
    let _raw = Raw::enter();
    let mut keys = Keys::of_stdin();
    let mut out = stdout()?;
    let broken = |error| CliError::Local {
        what: "writing to the terminal",
        error,
    };
    loop {
        tokio::select! {
            typed = keys.next() => match typed {
                Some(bytes) => match bytes.iter().position(|byte| *byte == DETACH) {
                    Some(at) => {
                        // What was typed before it still counts.
                        let before = Message::binary(bytes[..at].to_vec());
                        to_guest.send(before).await.map_err(refused)?;
                        let _ = to_guest.close().await;
                        return Ok("Detached.");
                    }
                    None => to_guest.send(Message::binary(bytes)).await.map_err(refused)?,
                },
                None => keys.ended = true,
            },
            said = from_guest.next() => match said {
                Some(Ok(message @ (Message::Binary(_) | Message::Text(_)))) => {
                    out.write_all(&message.into_data()).await.map_err(broken)?;
                    out.flush().await.map_err(broken)?;
                }
                Some(Ok(Message::Close(_))) | None => return Ok("The console closed."),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(refused(error)),
            },
        }
    }
}

/// Standard output, for asynchronous writing.
pub fn stdout() -> Result<tokio::fs::File, CliError> {
    let descriptor = std::io::stdout().as_fd().try_clone_to_owned();
    let opened = |error| CliError::Local {
        what: "opening standard output",
        error,
    };
    Ok(tokio::fs::File::from_std(
        descriptor.map_err(opened)?.into(),
    ))
}

/// What is typed. A thread reads it: a blocking read of a terminal cannot be cancelled, and must not
/// keep the program from ending.
struct Keys {
    received: tokio::sync::mpsc::Receiver<Vec<u8>>,
    ended: bool,
}

impl Keys {
    fn of_stdin() -> Self {
        let (send, received) = tokio::sync::mpsc::channel(16);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length) = std::io::Read::read(&mut std::io::stdin(), &mut buffer) {
                if length == 0 || send.blocking_send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self {
            received,
            ended: false,
        }
    }

    async fn next(&mut self) -> Option<Vec<u8>> {
        if self.ended {
            std::future::pending::<()>().await;
        }
        self.received.recv().await
    }
}

/// Raw mode; the mode of before comes back on drop. Nothing when standard input is no terminal.
struct Raw(Option<Termios>);

impl Raw {
    fn enter() -> Self {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return Self(None);
        }
        let Ok(before) = termios::tcgetattr(&stdin) else {
            return Self(None);
        };
        let mut raw = before.clone();
        raw.make_raw();
        match termios::tcsetattr(&stdin, OptionalActions::Now, &raw) {
            Ok(()) => Self(Some(before)),
            Err(_) => Self(None),
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = termios::tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}

/// TLS as the session has it; `None` for plain connections and the system's own roots.
fn connector(url: &str, config: &Config) -> Result<Option<Connector>, CliError> {
    if !url.starts_with("wss://") || (config.verify && config.cacert.is_none()) {
        return Ok(None);
    }
    Ok(Some(Connector::Rustls(Arc::new(tls::config(config)?))))
}
