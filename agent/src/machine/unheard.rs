//! An operator's word in place of a controller's, where there is none any more: `fractus-agent start-unheard`.
//!
//! After a reboot of the host no machine is started before somebody has said in this boot that it is wanted here
//! ([`fractus_agent_api::decision::is_word`]). The command leaves a file for each machine, with this boot's
//! id, in the state folder; the agent finds it within a second, or when it is started, and removes it once the machine
//! does not wait any more. In the next boot it says nothing.

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

/// What one file says, as JSON; its name is the machine's id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Word {
    boot_id: Uuid,
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
}

/// Machines of which something was said in this boot.
fn said(folder: &Path, boot: Uuid) -> io::Result<Vec<ServerId>> {
    let files = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        files => files?,
    };
    let mut said = Vec::new();
    for file in files {
        let file = file?;
        let id = file.file_name().to_str().and_then(|name| name.parse().ok());
        // One that is being written is no word yet.
        if let Some(id) = id
            && Word::read(&file.path()).is_ok_and(|word| word.boot_id == boot)
        {
            said.push(ServerId(id));
        }
    }
    Ok(said)
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

/// Says that these are wanted here in this boot. It is no order for what comes to wait later.
///
/// # Errors
/// The boot's id cannot be read, or a file not be written.
pub fn say(paths: &Paths, machines: &[ServerId]) -> anyhow::Result<()> {
    let boot_id = boot_id().context("reading the boot's id")?;
    let folder = paths.unheard();
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    for machine in machines {
        let path = folder.join(machine.to_string());
        let word = Word { boot_id };
        word.write(&path)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// For the life of the agent: has machines that wait hear what an operator says, in the boot `boot`.
pub async fn listen<L: Launcher>(machines: Machines<L>, paths: Paths, boot: Uuid) {
    let folder = paths.unheard();
    loop {
        let said = said(&folder, boot).unwrap_or_else(|error| {
            tracing::warn!(%error, folder = %folder.display(), "what an operator says cannot be read");
            Vec::new()
        });
        if !said.is_empty() {
            let known = machines.list();
            for report in known.iter().filter(|report| said.contains(&report.id)) {
                match report.waits {
                    true => machines.hear(report.id).await,
                    // It has heard it, or somebody else; once is enough.
                    false => forget(&folder.join(report.id.to_string())),
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn forget(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        tracing::warn!(%error, file = %path.display(), "what was said is kept, and may be heard again");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_of_those_that_it_names_and_of_its_boot() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::new(folder.path(), folder.path());
        let [one, two] = [1, 2].map(|id| ServerId(Uuid::from_u128(id)));
        let now = boot_id().unwrap();
        assert_eq!(said(&paths.unheard(), now).unwrap(), []);
        // What is said next takes nothing back.
        say(&paths, &[one]).unwrap();
        say(&paths, &[two]).unwrap();
        let mut heard = said(&paths.unheard(), now).unwrap();
        heard.sort();
        assert_eq!(heard, [one, two]);
        assert_eq!(said(&paths.unheard(), Uuid::from_u128(7)).unwrap(), []);
        let path = paths.unheard().join(one.to_string());
        forget(&path);
        fs::write(path.with_extension("new"), b"{").unwrap();
        fs::write(path, b"{").unwrap();
        assert_eq!(said(&paths.unheard(), now).unwrap(), [two]);
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
