//! Against a double of the guest's agent that answers as it is told.

use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;

/// A port and the guest's end of it.
fn port() -> (Control, OwnedFd) {
    let flags = SocketFlags::CLOEXEC;
    let kind = SocketType::SEQPACKET;
    let (ours, theirs) = socketpair(AddressFamily::UNIX, kind, flags, None).unwrap();
    (Control::new(ours).unwrap(), theirs)
}

/// Answers each line by `answer`, on a thread of its own, until the port is closed.
fn guest(
    port: OwnedFd,
    before: &'static [u8],
    answer: impl Fn(&Value) -> Vec<u8> + Send + 'static,
) {
    std::thread::spawn(move || {
        let mut said: Vec<u8> = Vec::new();
        let tell = |bytes: &[u8]| {
            for packet in bytes.chunks(1000) {
                let _ = send(&port, packet, SendFlags::NOSIGNAL);
            }
        };
        tell(before);
        let mut buffer = [0; 4096];
        while let Ok((length, _)) = recv(&port, &mut buffer, RecvFlags::empty()) {
            if length == 0 {
                return;
            }
            said.extend(&buffer[..length]);
            while let Some(end) = said.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = said
                    .drain(..=end)
                    .filter(|byte| *byte != SENTINEL)
                    .collect();
                let request: Value = serde_json::from_slice(&line).unwrap();
                let mut bytes = Vec::new();
                if request["execute"] == "guest-sync-delimited" {
                    bytes.push(SENTINEL);
                    bytes.extend(
                        json!({"return": request["arguments"]["id"]})
                            .to_string()
                            .bytes(),
                    );
                    bytes.push(b'\n');
                } else {
                    bytes = answer(&request);
                }
                tell(&bytes);
            }
        }
    });
}

fn line(answer: &Value) -> Vec<u8> {
    format!("{answer}\n").into_bytes()
}

#[tokio::test]
async fn commands_reach_an_honest_guest_past_what_others_left_in_the_port() {
    let (ours, theirs) = port();
    let left = b"{\"return\": 7}\n\xff{\"return\": 8}\n{\"half";
    guest(theirs, left, |request| {
        line(&match request["execute"].as_str().unwrap() {
            "guest-info" => json!({"return": {"version": "7.2", "supported_commands": [
                {"name": "guest-set-time", "enabled": true},
                {"name": "guest-exec", "enabled": false},
            ]}}),
            "guest-set-time" if request["arguments"]["time"] == 5 => json!({"return": {}}),
            "guest-fsfreeze-freeze" => json!({"return": 3}),
            "guest-fsfreeze-thaw" => json!({"return": 3}),
            "guest-set-user-password" if request["arguments"]["password"] == "c2VjcmV0" => {
                json!({"return": {}})
            }
            _ => json!({"error": {"class": "GenericError", "desc": "no\u{1b}[31m"}}),
        })
    });
    let mut agent = GuestAgent::open(ours).await.unwrap();
    let info = agent.info().await.unwrap();
    assert_eq!(info.version, "7.2");
    assert_eq!(info.commands, ["guest-set-time"]);
    agent.set_time(5).await.unwrap();
    assert_eq!(agent.freeze().await.unwrap(), 3);
    assert_eq!(agent.thaw().await.unwrap(), 3);
    agent.set_password("root", "secret").await.unwrap();
    let refused = agent.set_time(6).await.unwrap_err().to_string();
    assert_eq!(refused, "the guest's agent refused guest-set-time: no[31m");
}

#[tokio::test]
async fn an_answer_without_end_is_cut_off() {
    let (ours, theirs) = port();
    guest(theirs, b"", |_| vec![b'x'; 2 * LINE]);
    let mut agent = GuestAgent::open(ours).await.unwrap();
    let error = agent.info().await.unwrap_err();
    assert!(matches!(error, GuestAgentError::Nonsense { .. }), "{error}");
}

#[tokio::test]
async fn what_is_no_answer_is_none() {
    for nonsense in [&b"[]\n"[..], b"{}\n", b"\n", b"\xc3\x28\n"] {
        let (ours, theirs) = port();
        guest(theirs, b"", move |_| nonsense.to_vec());
        let mut agent = GuestAgent::open(ours).await.unwrap();
        let error = agent.freeze().await.unwrap_err();
        assert!(matches!(error, GuestAgentError::Nonsense { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_guest_that_says_nothing_is_given_up() {
    let (ours, _theirs) = port();
    let error = GuestAgent::open(ours).await.err().unwrap();
    assert!(matches!(error, GuestAgentError::Mute { .. }), "{error}");
}

#[tokio::test]
async fn a_guest_that_never_stops_to_talk_is_given_up() {
    let (ours, theirs) = port();
    std::thread::spawn(
        move || {
            while send(&theirs, &[b'x'; 1000], SendFlags::NOSIGNAL).is_ok() {}
        },
    );
    let error = GuestAgent::open(ours).await.err().unwrap();
    assert!(matches!(error, GuestAgentError::Nonsense { .. }), "{error}");
}
