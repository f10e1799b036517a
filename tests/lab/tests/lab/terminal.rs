//! Somebody at a server's serial console, through the public API.

use std::time::Duration;

use fractus_tests::harness::{Client, until};
use futures::{SinkExt, StreamExt};
use serde_json::json;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async};

/// Longest wait for a command, in software.
const ANSWERS: Duration = Duration::from_secs(300);
/// Before a line is taken for lost.
const PATIENCE: Duration = Duration::from_secs(10);

/// A shell on the server's serial line.
pub struct Terminal {
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    /// What was heard and not given to anybody yet.
    heard: String,
}

impl Terminal {
    /// An agent that has just started finds its machines one after the other.
    pub async fn open(client: &Client, server: &str) -> Self {
        let what = format!("the console of {server}");
        let opened = until(&what, ANSWERS, || async {
            let body = json!({"remote_console": {"protocol": "serial", "type": "serial"}});
            let path = format!("/compute/v2.1/servers/{server}/remote-consoles");
            let made = client.at(96).post(&path, body).await.unwrap();
            let url = made.expect_status(200).unwrap().text("/remote_console/url");
            let mut request = url.as_str().into_client_request().unwrap();
            let headers = request.headers_mut();
            headers.insert("sec-websocket-protocol", "binary".parse().unwrap());
            connect_async(request).await.map_err(|e| e.to_string())
        });
        let (socket, _) = opened.await.unwrap();
        Self {
            socket,
            heard: String::new(),
        }
    }

    /// At a shell that answers. What is typed while a terminal changes hands, as at a login, is dropped.
    pub async fn shell(client: &Client, server: &str) -> Self {
        let mut terminal = Self::open(client, server).await;
        for _ in 0..ANSWERS.as_secs() / PATIENCE.as_secs() {
            terminal.send("echo a shell an''swers").await;
            if terminal.hear("a shell answers", PATIENCE).await.is_some() {
                return terminal;
            }
        }
        panic!("no shell answers, only {:?}", terminal.heard);
    }

    pub async fn send(&mut self, line: &str) {
        let typed = Message::binary(format!("{line}\n").into_bytes());
        self.socket.send(typed).await.unwrap();
    }

    /// Runs a command; gives what it said, with the lines that the terminal echoed.
    pub async fn run(&mut self, command: &str) -> String {
        // The echo of what is typed is not the answer.
        self.send(&format!("{command}; echo comm''and ended with $?"))
            .await;
        let said = self.until("command ended with ").await;
        let status = self.until("\n").await;
        assert_eq!(status.trim(), "0", "{command}: {said}");
        said
    }

    /// What is heard up to `mark`.
    pub async fn until(&mut self, mark: &str) -> String {
        match self.hear(mark, ANSWERS).await {
            Some(before) => before,
            None => panic!("{mark:?} was not heard, only {:?}", self.heard),
        }
    }

    /// The same; nothing if it is not heard in that time.
    async fn hear(&mut self, mark: &str, within: Duration) -> Option<String> {
        let listening = async {
            loop {
                if let Some((before, after)) = self.heard.split_once(mark) {
                    let found = before.to_owned();
                    self.heard = after.to_owned();
                    return found;
                }
                match self.socket.next().await {
                    Some(Ok(message)) => {
                        let bytes = message.into_data();
                        self.heard.push_str(&String::from_utf8_lossy(&bytes));
                    }
                    end => panic!("the console closed ({end:?}) after {:?}", self.heard),
                }
            }
        };
        tokio::time::timeout(within, listening).await.ok()
    }
}
