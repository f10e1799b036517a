//! Commands on a host, over the segment: its web server runs a posted script.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// What a script said (both streams) and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    pub status: i32,
    pub text: String,
}

/// Runs `script` by the host's shell.
pub fn run(host: SocketAddr, script: &str, limit: Duration) -> Result<Output> {
    post(host, "run", script.as_bytes(), limit).with_context(|| script.to_owned())
}

/// Posts to a program of the host's web server (`host/run`, `host/put`).
pub fn post(host: SocketAddr, program: &str, bytes: &[u8], limit: Duration) -> Result<Output> {
    let what = || format!("on {host}: {program}");
    let mut stream = TcpStream::connect_timeout(&host, limit).with_context(what)?;
    stream.set_read_timeout(Some(limit))?;
    let request = format!(
        "POST /cgi-bin/{program} HTTP/1.0\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n",
        bytes.len()
    );
    stream.write_all(request.as_bytes()).with_context(what)?;
    stream.write_all(bytes).with_context(what)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).with_context(what)?;
    let answer = String::from_utf8_lossy(&answer);
    match body(&answer).and_then(parse) {
        Some(output) => Ok(output),
        None => bail!("{}: no end in the answer: {answer}", what()),
    }
}

/// What comes after the first empty line, however that is written: the body may have the other kind.
fn body(answer: &str) -> Option<&str> {
    let bodies = ["\r\n\r\n", "\n\n"].map(|end| Some(answer.split_once(end)?.1));
    bodies.into_iter().flatten().max_by_key(|body| body.len())
}

/// The last line is `exit STATUS`, after a line break that is not the script's.
fn parse(body: &str) -> Option<Output> {
    let (text, status) = body.trim_end().rsplit_once("\nexit ")?;
    Some(Output {
        status: status.parse().ok()?,
        text: text.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_begins_at_the_first_empty_line_and_keeps_its_own() {
        let text = "HTTP/1.0 200 OK\r\nContent-Type: text/plain\n\nfirst\r\n\r\nsecond";
        assert_eq!(body(text), Some("first\r\n\r\nsecond"));
        assert_eq!(body("A: b\r\n\r\nfirst\n\nsecond"), Some("first\n\nsecond"));
        assert_eq!(body("A: b\r\n"), None);
    }

    #[test]
    fn an_answer_without_its_last_line_is_none() {
        let whole = parse("a\nb\n\nexit 3\n").unwrap();
        assert_eq!((whole.status, whole.text.as_str()), (3, "a\nb\n"));
        assert_eq!(parse("\nexit 0\n").unwrap().text, "");
        assert_eq!(parse("a\nb\n"), None);
        assert_eq!(parse("a\nno exit 3\n"), None);
    }
}
