//! The live serial line: one connection to a machine's process, any number of watchers.
//!
//! The connection is made with the first watcher and closed with the last. A watcher that does not
//! keep up loses output (the log has it).

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::Bytes;
use fractus_agent_api::machine::ServerId;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use tokio::sync::{broadcast, mpsc};

use crate::machine::process::ProcessError;
use crate::machine::process::control::Control;
use crate::paths::Paths;
use crate::vm::protocol::Role;

/// One watcher's end. Dropping it leaves.
pub struct Watcher {
    pub output: broadcast::Receiver<Bytes>,
    pub input: mpsc::Sender<Bytes>,
    _line: Arc<Line>,
}

struct Line {
    output: broadcast::WeakSender<Bytes>,
    input: mpsc::Sender<Bytes>,
    task: tokio::task::AbortHandle,
}

impl Drop for Line {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Clone)]
pub struct Consoles {
    paths: Paths,
    lines: Arc<Mutex<HashMap<ServerId, Weak<Line>>>>,
}

impl Consoles {
    pub fn new(paths: Paths) -> Self {
        Self {
            paths,
            lines: Arc::default(),
        }
    }

    /// `pid` is that of the machine's process.
    pub async fn attach(&self, id: ServerId, pid: i32) -> Result<Watcher, ProcessError> {
        if let Some(watcher) = self.lock().get(&id).and_then(join) {
            return Ok(watcher);
        }
        let control = Control::connect(&self.paths.machine(id).socket, pid, Role::Console).await?;
        let (output, receiver) = broadcast::channel(256);
        let (input, typed) = mpsc::channel(64);
        let weak = output.downgrade();
        let task = tokio::spawn(carry(control, output, typed)).abort_handle();
        let line = Arc::new(Line {
            output: weak,
            input: input.clone(),
            task,
        });
        let mut lines = self.lock();
        lines.retain(|_, line| line.strong_count() > 0);
        lines.insert(id, Arc::downgrade(&line));
        Ok(Watcher {
            output: receiver,
            input,
            _line: line,
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<ServerId, Weak<Line>>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Another watcher of a line that still stands.
fn join(line: &Weak<Line>) -> Option<Watcher> {
    let line = line.upgrade()?;
    let output = line.output.upgrade()?.subscribe();
    Some(Watcher {
        output,
        input: line.input.clone(),
        _line: line,
    })
}

/// Ends with the process; the watchers' receivers close then.
async fn carry(
    control: Control,
    output: broadcast::Sender<Bytes>,
    mut typed: mpsc::Receiver<Bytes>,
) {
    let socket = control.socket();
    let mut buffer = vec![0; 4096];
    loop {
        tokio::select! {
            ready = socket.readable() => {
                let Ok(mut ready) = ready else { return };
                let received = ready.try_io(|socket| {
                    let (length, _) = recv(socket, &mut buffer, RecvFlags::DONTWAIT)?;
                    Ok(length)
                });
                match received {
                    Err(_) => {}
                    Ok(Ok(0)) | Ok(Err(_)) => return,
                    Ok(Ok(length)) => {
                        let bytes = buffer.get(..length).unwrap_or_default();
                        let _ = output.send(Bytes::copy_from_slice(bytes));
                    }
                }
            }
            bytes = typed.recv() => {
                let Some(bytes) = bytes else { return };
                for packet in bytes.chunks(1024) {
                    if type_in(&control, packet).await.is_err() {
                        return;
                    }
                }
            }
        }
    }
}

async fn type_in(control: &Control, packet: &[u8]) -> io::Result<()> {
    loop {
        let mut ready = control.socket().writable().await?;
        let sent = ready.try_io(|socket| {
            Ok(send(
                socket,
                packet,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            )?)
        });
        match sent {
            Ok(sent) => return sent.map(drop),
            Err(_would_block) => {}
        }
    }
}
