//! What is typed at a server's serial console, for tests.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::time::Duration;

use futures::{SinkExt, StreamExt};
use serde_json::json;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use super::Client;

/// The probe does a command that it is typed.
///
/// # Panics
/// When it says that it cannot, or nothing.
pub async fn asks(admin: &Client, server: &str, command: &str) {
    let word = command.split(' ').next().unwrap();
    let (ok, err) = (format!("ok {word}"), format!("err {word}"));
    let answer = types(admin, server, command, &[&ok, &err]).await;
    assert!(answer.contains(&ok), "{command}: {answer}");
}

/// The line in which the guest says one of these, once it was typed that.
///
/// # Panics
/// When it says nothing of the kind.
pub async fn types(admin: &Client, server: &str, typed: &str, answers: &[&str]) -> String {
    let body = json!({"remote_console": {"protocol": "serial", "type": "serial"}});
    let path = format!("/compute/v2.1/servers/{server}/remote-consoles");
    let console = admin.post(&path, body).await.unwrap();
    let url = console
        .expect_status(200)
        .unwrap()
        .text("/remote_console/url");
    let mut request = url.as_str().into_client_request().unwrap();
    let binary = "binary".parse().unwrap();
    request
        .headers_mut()
        .insert("sec-websocket-protocol", binary);
    let (mut socket, _) = tokio_tungstenite::connect_async(request).await.unwrap();
    let line = Message::binary(format!("{typed}\n"));
    socket.send(line).await.unwrap();
    let answered = tokio::time::timeout(Duration::from_secs(60), async {
        let mut said = String::new();
        while let Some(Ok(message)) = socket.next().await {
            said.push_str(&String::from_utf8_lossy(&message.into_data()));
            let (whole, _) = said.rsplit_once('\n').unwrap_or_default();
            let is_answer = |line: &&str| answers.iter().any(|answer| line.contains(answer));
            if let Some(answer) = whole.lines().find(is_answer) {
                return answer.to_owned();
            }
        }
        panic!("{typed:?}: {said}");
    });
    answered.await.unwrap()
}
