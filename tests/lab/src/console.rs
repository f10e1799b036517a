//! A person at a host's serial line.

use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

/// Ctrl-].
const LEAVE: u8 = 0x1d;

/// Joins this terminal to the line until Ctrl-], or a key after the host has ended.
pub fn attach(socket: &Path) -> Result<()> {
    let line = UnixStream::connect(socket)
        .with_context(|| format!("{}: does the host run?", socket.display()))?;
    let input = io::stdin();
    let terminal = input.is_terminal();
    let before = if terminal {
        Some(tcgetattr(&input)?)
    } else {
        None
    };
    if let Some(before) = &before {
        eprintln!("Ctrl-] leaves");
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&input, OptionalActions::Now, &raw)?;
    }
    let outcome = join(line, terminal);
    if let Some(before) = before {
        tcsetattr(&input, OptionalActions::Now, &before)?;
    }
    outcome
}

fn join(line: UnixStream, terminal: bool) -> Result<()> {
    let mut from = line.try_clone()?;
    let reader = std::thread::spawn(move || io::copy(&mut from, &mut io::stdout().lock()));
    let (mut line, mut input) = (line, io::stdin().lock());
    let mut bytes = [0; 1024];
    loop {
        let count = input.read(&mut bytes)?;
        let typed = &bytes[..count];
        if count == 0 && !terminal {
            // A script's input has ended; what the host says goes on.
            let _ = reader.join();
            return Ok(());
        }
        if count == 0 || typed.contains(&LEAVE) {
            return Ok(());
        }
        line.write_all(typed)?;
    }
}
