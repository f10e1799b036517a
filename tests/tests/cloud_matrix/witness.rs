//! What a guest has said on each host: its console's logs, kept open, as a host that loses a guest removes them.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::task::JoinHandle;

/// Of a ring (`agent/src/console/ring`): before its bytes stand what it is, and how many were ever written to it.
const HEAD: u64 = 16;
/// Bytes that a console's ring holds (`SERIAL_LOG`): of what a guest says on one host here, the last few minutes.
const RING: u64 = 1 << 20;

type Logs = Arc<Mutex<Vec<(usize, File)>>>;

pub struct Witness {
    logs: Logs,
    looks: JoinHandle<()>,
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.looks.abort();
    }
}

impl Witness {
    /// Of a server's logs at these agents, wherever one is made.
    pub fn of(paths: Vec<(usize, PathBuf)>) -> Self {
        let logs = Logs::default();
        look(&paths, &logs);
        let seen = Arc::clone(&logs);
        let looks = tokio::spawn(async move {
            loop {
                // sleeps because files are polled; one lives as long as a process's start, at least
                tokio::time::sleep(Duration::from_millis(5)).await;
                look(&paths, &seen);
            }
        });
        Self { logs, looks }
    }

    /// One guest ran, here and then there: no number was counted to by two, and none was left out.
    ///
    /// # Errors
    /// It is not so. Where a process was `killed` what it had not said yet is missing.
    pub fn one_guest(&self, nonce: &str, killed: bool) -> Result<()> {
        let logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
        let ticks = |(agent, log): &(usize, File)| Ok((*agent, ticks(log, nonce)?));
        let counted: Vec<_> = logs.iter().map(ticks).collect::<Result<_>>()?;
        one_count(&counted, killed)
    }
}

/// What one guest may have counted to at these agents, in each of its logs.
fn one_count(counted: &[(usize, Vec<u64>)], killed: bool) -> Result<()> {
    let mut all: BTreeMap<u64, usize> = BTreeMap::new();
    let ends = |(agent, ticks): &(usize, Vec<u64>)| {
        (*agent, ticks.first().copied(), ticks.last().copied())
    };
    let turns: Vec<_> = counted.iter().map(ends).collect();
    for (number, (_, ticks)) in counted.iter().enumerate() {
        for tick in ticks {
            let before = all.insert(*tick, number);
            ensure!(
                before.is_none(),
                "the guest counted to {tick} twice: {turns:?}"
            );
        }
    }
    ensure!(!all.is_empty(), "it has not counted at all");
    let numbers: Vec<(u64, usize)> = all.into_iter().collect();
    for pair in numbers.windows(2) {
        let [(a, here), (b, there)] = pair else {
            continue;
        };
        // A line of which each has a half is none.
        let most = if here == there { 1 } else { 2 };
        ensure!(
            killed || b - a <= most,
            "no tick from {a} to {b}: {turns:?}"
        );
    }
    Ok(())
}

fn look(paths: &[(usize, PathBuf)], logs: &Logs) {
    let mut logs = logs.lock().unwrap_or_else(PoisonError::into_inner);
    for (agent, path) in paths {
        let Ok(file) = File::open(path) else { continue };
        let which = |file: &File| file.metadata().map(|it| it.ino()).ok();
        let is = which(&file);
        if !logs.iter().any(|(_, known)| which(known) == is) {
            logs.push((*agent, file));
        }
    }
}

/// What the guest of this boot has counted to in a log.
fn ticks(log: &File, nonce: &str) -> Result<Vec<u64>> {
    let mut written = [0; 8];
    if log.read_exact_at(&mut written, 8).is_err() {
        return Ok(Vec::new());
    }
    let written = u64::from_le_bytes(written);
    let mut bytes = vec![0; usize::try_from(written.min(RING))?];
    let (older, newer) = match written.checked_sub(RING) {
        None => (&mut bytes[..], &mut [][..]),
        Some(_) => bytes.split_at_mut(usize::try_from(RING - written % RING)?),
    };
    let from = if written > RING { written % RING } else { 0 };
    log.read_exact_at(older, HEAD + from)?;
    log.read_exact_at(newer, HEAD)?;
    let text = String::from_utf8_lossy(&bytes);
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let number = |line: &str| -> Option<u64> {
        let mut words = line.trim().strip_prefix("tick ")?.split(' ');
        let tick = words.next()?.parse().ok()?;
        let of = words.next()?.strip_prefix("nonce=")?;
        (of == nonce && words.next()?.starts_with("tsc=")).then_some(tick)
    };
    Ok(whole.lines().filter_map(number).collect())
}

#[test]
fn a_guest_that_runs_twice_or_loses_time_is_seen() {
    let count = |one: std::ops::Range<u64>, two: std::ops::Range<u64>, killed| {
        one_count(&[(0, one.collect()), (1, two.collect())], killed).is_ok()
    };
    assert!(count(1..9, 9..20, false) && count(1..9, 10..20, false) && count(1..9, 0..0, false));
    assert!(!count(1..9, 8..20, false) && !count(1..9, 8..20, true));
    assert!(!count(1..9, 12..20, false) && count(1..9, 12..20, true));
    assert!(!count(0..0, 0..0, false));
}

#[test]
fn a_ring_that_has_gone_round_is_read_from_its_oldest_byte() {
    let line = |tick: u64| format!("tick {tick} nonce=a tsc=1\n");
    let said: String = (0..60_000).map(line).collect();
    assert!(said.len() as u64 > RING);
    let log = tempfile::tempfile().unwrap();
    log.write_all_at(&(said.len() as u64).to_le_bytes(), 8)
        .unwrap();
    let begins = said.len() - RING as usize;
    let (older, newer) = said.as_bytes()[begins..].split_at(RING as usize - begins % RING as usize);
    log.write_all_at(older, HEAD + begins as u64 % RING)
        .unwrap();
    log.write_all_at(newer, HEAD).unwrap();
    let counted = ticks(&log, "a").unwrap();
    assert_eq!(counted.last(), Some(&59_999));
    assert!(counted.windows(2).all(|pair| pair[1] == pair[0] + 1));
    assert!(ticks(&log, "b").unwrap().is_empty());
}
