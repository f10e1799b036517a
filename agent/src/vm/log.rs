//! The log of a machine's process: a bounded ring in the machine's folder, written also by a panic.
//!
//! There is no `tracing` in this process: a line is formatted where it happens, with the time and the
//! id of the last request that the agent passed on.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use super::protocol::LOG;
use crate::console::ring::RingWriter;

static LOG_RING: OnceLock<Mutex<Sink>> = OnceLock::new();

struct Sink {
    /// `None`: standard error.
    ring: Option<RingWriter>,
    request_id: Option<String>,
}

/// Call once. Afterwards a panic in any thread is written to the log too.
pub fn open(file: Option<File>) -> io::Result<()> {
    let ring = file.map(|file| RingWriter::new(file, LOG)).transpose()?;
    if LOG_RING
        .set(Mutex::new(Sink {
            ring,
            request_id: None,
        }))
        .is_err()
    {
        return Err(io::Error::other("the log was opened before"));
    }
    std::panic::set_hook(Box::new(|info| line(format_args!("panic: {info}"))));
    Ok(())
}

/// Lines from now on carry this `x-openstack-request-id`.
pub fn request(id: Option<String>) {
    if let (Some(sink), Some(id)) = (LOG_RING.get(), id) {
        sink.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .request_id = Some(id);
    }
}

pub fn line(what: fmt::Arguments<'_>) {
    let Some(sink) = LOG_RING.get() else { return };
    let mut sink = sink.lock().unwrap_or_else(PoisonError::into_inner);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let request = sink.request_id.as_deref().unwrap_or("-");
    let text = format!(
        "{}.{:06} {request} {what}\n",
        now.as_secs(),
        now.subsec_micros()
    );
    let _ = match &mut sink.ring {
        // Of a machine that is handed over two processes write now and then.
        Some(ring) => ring.follow().and_then(|()| ring.write(text.as_bytes())),
        None => io::stderr().write_all(text.as_bytes()),
    };
}
