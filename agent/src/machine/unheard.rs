//! An operator's word in place of a controller's, where there is none any more: `fractus-agent start-unheard`.
//!
//! After a reboot of the host no machine is started before somebody has said in this boot that it is wanted here
//! ([`fractus_agent_api::decision::is_word`]). The command leaves a file with this boot's id in the state folder; the
//! agent finds it within a second, or when it is started. In the next boot it says nothing.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use fractus_agent_api::machine::{Power, ServerId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Machines;
use super::process::Launcher;
use super::process::identity::boot_id;
use super::record::{self, Record};
use crate::paths::Paths;

/// Between two looks for the file, while any machine waits.
const LOOK: Duration = Duration::from_secs(1);

/// What the file says, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Word {
    boot_id: Uuid,
    /// Those that waited when it was said: it is no order for what comes to wait later.
    machines: Vec<ServerId>,
}

impl Word {
    fn read(path: &Path) -> io::Result<Self> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    }

    /// Whole, or not at all.
    fn write(&self, path: &Path) -> io::Result<()> {
        let beside = path.with_extension("new");
        let mut file = File::create(&beside)?;
        file.write_all(&serde_json::to_vec(self)?)?;
        file.sync_data()?;
        fs::rename(&beside, path)
    }

    /// Takes out those that are among `waiting`, which have heard it now; what is left is written, or nothing.
    fn heard(&mut self, waiting: &[ServerId], path: &Path) -> io::Result<Vec<ServerId>> {
        let is_theirs = |id: &ServerId| waiting.contains(id);
        let (heard, left) = self.machines.iter().partition(|id| is_theirs(id));
        self.machines = left;
        match self.machines.is_empty() {
            true => fs::remove_file(path)?,
            false => self.write(path)?,
        }
        Ok(heard)
    }
}

/// By its record: it is to run, and nobody has said so in this boot.
fn waits(record: &Record, boot: Uuid) -> bool {
    let lives = !matches!(
        record.intent.wanted.power,
        Power::Absent | Power::Stopped | Power::Suspended
    );
    let started = record
        .process
        .is_some_and(|process| process.boot_id == boot);
    lives && record.heard != Some(boot) && !started
}

/// Machines that are not started before somebody has said that they are wanted here.
///
/// # Errors
/// The boot's id, or the state folder, cannot be read.
pub fn waiting(paths: &Paths) -> anyhow::Result<Vec<ServerId>> {
    let boot = boot_id().context("reading the boot's id")?;
    let found = record::scan(&paths.machines())?;
    let waiting = found.records.iter().filter(|record| waits(record, boot));
    Ok(waiting.map(|record| record.id).collect())
}

/// Says that these are wanted here in this boot.
///
/// # Errors
/// The boot's id cannot be read, or the file not be written.
pub fn say(paths: &Paths, machines: Vec<ServerId>) -> anyhow::Result<()> {
    let boot_id = boot_id().context("reading the boot's id")?;
    let path = paths.unheard();
    let word = Word { boot_id, machines };
    word.write(&path)
        .with_context(|| format!("writing {}", path.display()))
}

/// For the life of the agent: has machines that wait hear what an operator says, in the boot `boot`.
pub async fn listen<L: Launcher>(machines: Machines<L>, paths: Paths, boot: Uuid) {
    let path = paths.unheard();
    loop {
        let waiting = machines.list().into_iter().filter(|report| report.waits);
        let waiting: Vec<ServerId> = waiting.map(|report| report.id).collect();
        if !waiting.is_empty()
            && let Ok(mut word) = Word::read(&path)
            && word.boot_id == boot
        {
            for id in word.machines.iter().filter(|id| waiting.contains(id)) {
                machines.hear(*id).await;
            }
            if let Err(error) = word.heard(&waiting, &path) {
                tracing::warn!(%error, file = %path.display(), "what was said is kept, and may be heard again");
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_of_those_that_it_names_and_is_heard_once() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::new(folder.path(), folder.path());
        let [one, two] = [1, 2].map(|id| ServerId(Uuid::from_u128(id)));
        let other = ServerId(Uuid::from_u128(3));
        say(&paths, vec![one, two]).unwrap();
        let path = paths.unheard();
        let mut word = Word::read(&path).unwrap();
        assert_eq!(word.boot_id, boot_id().unwrap());
        assert_eq!(word.heard(&[other, one], &path).unwrap(), [one]);
        // The other has not come up yet.
        let mut word = Word::read(&path).unwrap();
        assert_eq!(word.machines, [two]);
        assert_eq!(word.heard(&[one, two], &path).unwrap(), [two]);
        assert!(!path.exists());
        fs::write(paths.unheard(), b"{").unwrap();
        assert!(Word::read(&paths.unheard()).is_err());
    }

    #[test]
    fn only_what_is_to_run_and_was_not_heard_of_in_this_boot_waits() {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/record-v1.json");
        let mut record = Record::read(Path::new(golden)).unwrap();
        record.intent.wanted.power = Power::Running;
        assert_eq!(record.heard, None, "of an agent that knew of no such thing");
        let started = record.process.map(|process| process.boot_id).unwrap();
        let boot = Uuid::from_u128(7);
        assert!(waits(&record, boot) && !waits(&record, started));
        record.heard = Some(boot);
        assert!(!waits(&record, boot));
        assert!(waits(&record, Uuid::from_u128(8)));
        record.intent.wanted.power = Power::Stopped;
        assert!(!waits(&record, Uuid::from_u128(8)));
    }
}
