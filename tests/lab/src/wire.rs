//! Reading what another program says, with an end to patience.

use std::io::{self, BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// A line-wise talk over a unix socket.
#[derive(Debug)]
pub struct Lines {
    stream: BufReader<UnixStream>,
    what: String,
}

impl Lines {
    /// Connects to a socket that its program makes soon.
    pub fn connect(path: &Path, limit: Duration, mut alive: impl FnMut() -> bool) -> Result<Self> {
        let end = Instant::now() + limit;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= end || !alive() => {
                    return Err(error).with_context(|| format!("connecting to {}", path.display()));
                }
                // sleeps because a program says nowhere that it listens now
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let what = path.display().to_string();
        let stream = BufReader::new(stream);
        Ok(Self { stream, what })
    }

    pub fn say(&mut self, line: &str) -> Result<()> {
        use io::Write;
        let stream = self.stream.get_mut();
        stream.write_all(line.as_bytes())?;
        stream.write_all(b"\n")?;
        Ok(())
    }

    /// The next line that `wanted` finds something in.
    pub fn until<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut wanted: impl FnMut(&str) -> Option<T>,
    ) -> Result<T> {
        let end = Instant::now() + limit;
        let mut line = String::new();
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("{}: {what}: not within {limit:?}", self.what);
            }
            self.stream.get_ref().set_read_timeout(Some(left))?;
            match self.stream.read_line(&mut line) {
                Ok(0) => bail!("{}: {what}: the other side ended", self.what),
                Ok(_) => {}
                // A part of a line stays in `line`.
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock) => continue,
                Err(error) => {
                    return Err(error).with_context(|| format!("{}: {what}", self.what));
                }
            }
            if let Some(found) = wanted(line.trim_end()) {
                return Ok(found);
            }
            line.clear();
        }
    }
}
