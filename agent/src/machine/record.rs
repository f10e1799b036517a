//! The record of one machine: what the agent knows of it after a crash, a restart, a reboot.
//!
//! One JSON file a machine, replaced whole: written beside, synced, renamed, and the folder synced.
//! It is versioned; golden ones of every version are kept in `tests/golden`. Whatever runs on this host
//! is in a record first: an agent that finds a process without one ends it.

mod slots;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use fractus_agent_api::decision::{Done, Intent};
use fractus_agent_api::device::{Disk, Nic};
use fractus_agent_api::guest::GuestReport;
use fractus_agent_api::machine::{Generation, Power, ServerId, StopReason};
use fractus_agent_api::migration::{MigrationId, StreamKey};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Of the file. Raised when the meaning of a field changes; older ones are read for ever.
pub const VERSION: u32 = 5;
/// Of one that an agent can take over that does not know that a guest's memory may be still to come: it would not listen for
/// it, and say that the guest has all.
const WITHOUT_LINE: u32 = 4;
/// Of one that an agent can take over that does not know that a disk may be made of its copy, or kept for its server's way
/// back: it would make it of its image, and forget what it is kept for.
const WITHOUT_RESTORE: u32 = 3;
/// Of one that an agent can take over that knows nothing of guests which come or go: it would start another in their
/// place.
const WITHOUT_MIGRATION: u32 = 2;
/// Of one that an older agent can take over: it knows of no suspended guests, and would start such anew.
const WITHOUT_KEPT: u32 = 1;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub version: u32,
    pub id: ServerId,
    pub intent: Intent,
    /// Of the request that wanted it.
    #[serde(default)]
    pub request_id: Option<String>,
    #[serde(default)]
    pub done: Done,
    /// User and group that the machine's process runs as; no other machine of the host has it.
    pub user: u32,
    #[serde(default)]
    pub process: Option<ProcessRecord>,
    /// Why the last process ended by itself, under the intent above.
    #[serde(default)]
    pub stop: Option<StopReason>,
    /// The guest was suspended: its memory is in a file, and it has not run since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept: Option<Kept>,
    /// The boot of the host in which somebody has last said that the machine is wanted here. In any other one it waits
    /// for that again; an agent's restart is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heard: Option<Uuid>,
    /// Nothing is left of the machine since then (microseconds since the epoch): a tombstone.
    #[serde(default)]
    pub gone_at_us: Option<i64>,
    /// When what was observed last changed.
    #[serde(default)]
    pub changed_at_us: i64,
    /// Raised with each time that it is written to its [`slots`]: what stands there counts if it was written later. None:
    /// it never was, or by an agent that knows of none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<u64>,
    /// Where the guest's source is awaited, for as long as some of its memory may be still to come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub line: Option<LineRecord>,
}

/// What the next agent needs in order to be found by a guest's source.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LineRecord {
    pub migration: MigrationId,
    pub port: u16,
    pub key: StreamKey,
}

/// What a suspended guest is to find again. What is wanted may be something else by then.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Kept {
    pub at_us: i64,
    /// Of the owner then. Whoever runs it again must know that nobody else has meanwhile.
    pub generation: Generation,
    /// Memory that it can have at most, and needs room for.
    pub most_mib: u64,
    /// Disks besides those that every machine has, and networks: all that it had.
    pub disks: Vec<Disk>,
    pub nics: Vec<Nic>,
}

/// A process, so that no other is taken for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    pub pid: i32,
    /// Field 22 of /proc/PID/stat: clock ticks since boot.
    pub start_ticks: u64,
    pub boot_id: Uuid,
    /// Its guest has run. One that ended before that was never started.
    #[serde(default)]
    pub ran: bool,
    /// Its guest came from another host; none: it was begun by an agent that did not write that down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub came: Option<bool>,
    #[serde(default)]
    pub guest: GuestReport,
    /// Its watchdog has paused it.
    #[serde(default)]
    pub held: bool,
    /// How often it has done so, as far as an agent has heard.
    #[serde(default)]
    pub holds: u64,
}

impl ProcessRecord {
    pub fn of_a_guest_that_came(self, came: bool) -> Self {
        let came = Some(came);
        Self { came, ..self }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error(
        "{path} is not there, but other files of the machine are: bring it back, or remove them"
    )]
    Missing { path: PathBuf },
    #[error("{path} is no record of a machine: {detail}")]
    Damaged { path: PathBuf, detail: String },
    #[error(
        "{path} is of version {version}; this agent reads up to {VERSION}: run the newer agent"
    )]
    Newer { path: PathBuf, version: u32 },
}

impl Record {
    /// Its guest has been told to go on, or is about to be, and some of its memory may be still to come.
    pub fn awaits_memory(&self) -> bool {
        let line = self.line.as_ref();
        line.is_some_and(|line| self.done.continued == Some(line.migration))
    }

    pub fn is_tombstone(&self) -> bool {
        self.intent.wanted.power == Power::Absent && self.gone_at_us.is_some()
    }

    /// Who is to go boots no more: what its guest would have been told, passwords and all, is nothing
    /// to be kept for as long as its tombstone is.
    pub fn forget_guest(&mut self) {
        if self.intent.wanted.power == Power::Absent {
            self.intent.wanted.spec.guest.instance = None;
        }
    }

    pub fn read(path: &Path) -> Result<Self, RecordError> {
        let bytes = fs::read(path).map_err(|source| RecordError::Io {
            path: path.to_owned(),
            source,
        })?;
        let record = Self::parse(&bytes, path)?;
        let later = slots::latest(path);
        let later = later.filter(|it| {
            it.id == record.id && record.serial.is_some() && it.serial > record.serial
        });
        Ok(later.unwrap_or(record))
    }

    /// Writes it, and lets [`Record::write_fast`] be fast from here on.
    pub fn prepare_to_write_fast(&mut self, path: &Path) -> Result<(), RecordError> {
        // Above all that may stand there.
        let there = slots::latest(path).and_then(|record| record.serial);
        self.serial = Some(there.max(self.serial).unwrap_or(0) + 1);
        self.write(path)?;
        if let Err(error) = slots::prepare(path) {
            // It will be written as always, then, and the guest stands still for longer.
            tracing::warn!(machine = %self.id, %error, "the record's slots");
        }
        Ok(())
    }

    /// The record was written since: what of it stands in the slots is nobody's to read.
    pub fn forget_fast(path: &Path) -> Result<(), RecordError> {
        match slots::clear(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(RecordError::Io {
                path: path.to_owned(),
                source,
            }),
            _ => Ok(()),
        }
    }

    /// Returns once the record is on the disk, as fast as may be: [`Record::write`] is to follow when there is time.
    pub fn write_fast(&mut self, path: &Path) -> Result<(), RecordError> {
        let Some(serial) = &mut self.serial else {
            return self.write(path);
        };
        *serial += 1;
        let serial = *serial;
        let written = self.versioned().map_err(io::Error::from);
        match written.and_then(|bytes| slots::write(path, serial, &bytes)) {
            Ok(()) => Ok(()),
            // Whatever has come of it there, the file has a later one.
            Err(_) => {
                self.serial = Some(serial + 1);
                self.write(path)
            }
        }
    }

    fn parse(bytes: &[u8], path: &Path) -> Result<Self, RecordError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let damaged = |e: serde_json::Error| RecordError::Damaged {
            path: path.to_owned(),
            detail: e.to_string(),
        };
        let Version { version } = serde_json::from_slice(bytes).map_err(damaged)?;
        if version == 0 || version > VERSION {
            return Err(RecordError::Newer {
                path: path.to_owned(),
                version,
            });
        }
        serde_json::from_slice(bytes).map_err(damaged)
    }

    /// Returns once the record is on the disk. The folder is made if it is not there.
    pub fn write(&self, path: &Path) -> Result<(), RecordError> {
        self.replace(path, true)
    }

    /// The same, but a crash of the host may bring the older record back: for what can be found out
    /// again (such a crash ends every process anyway). Either record is whole.
    pub fn note(&self, path: &Path) -> Result<(), RecordError> {
        self.replace(path, false)
    }

    /// Has the record on the disk beside the one that counts, which a rename then replaces: for who has no time to wait
    /// for the disk at that moment.
    pub fn prepare(&self, path: &Path) -> Result<Prepared, RecordError> {
        let failed = |source| RecordError::Io {
            path: path.to_owned(),
            source,
        };
        let prepared = Prepared {
            record: self.clone(),
            beside: path.with_extension("next"),
        };
        let bytes = self.versioned().map_err(|e| failed(e.into()))?;
        put(&prepared.beside, &bytes).map_err(failed)?;
        Ok(prepared)
    }

    /// Under the least version that says all of it.
    fn versioned(&self) -> serde_json::Result<Vec<u8>> {
        let mut value = serde_json::to_value(self)?;
        let suspends = self.kept.is_some() || self.intent.wanted.power == Power::Suspended;
        let version = match (self.intent.wanted.migrates(), suspends) {
            _ if self.awaits_memory() => VERSION,
            _ if self.intent.wanted.restores.is_some() => WITHOUT_LINE,
            _ if self.intent.wanted.parks.is_some() => WITHOUT_LINE,
            (true, _) => WITHOUT_RESTORE,
            (false, true) => WITHOUT_MIGRATION,
            (false, false) => WITHOUT_KEPT,
        };
        value["version"] = version.into();
        serde_json::to_vec(&value)
    }

    fn replace(&self, path: &Path, sync_folder: bool) -> Result<(), RecordError> {
        let failed = |source| RecordError::Io {
            path: path.to_owned(),
            source,
        };
        let bytes = self.versioned().map_err(|e| failed(e.into()))?;
        let folder = path
            .parent()
            .ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        let first = !folder.exists();
        if first {
            fs::create_dir_all(folder).map_err(failed)?;
            if let Some(above) = folder.parent() {
                File::open(above)
                    .and_then(|above| above.sync_all())
                    .map_err(failed)?;
            }
        }
        let beside = path.with_extension("new");
        let written = (|| {
            put(&beside, &bytes)?;
            fs::rename(&beside, path)?;
            if sync_folder {
                File::open(folder)?.sync_all()?;
            }
            Ok(())
        })();
        if written.is_err() {
            let _ = fs::remove_file(&beside);
            if first {
                // Of a machine that was not taken nothing stays, unless its record is there after all.
                let _ = fs::remove_dir(folder);
            }
        }
        written.map_err(failed)
    }
}

/// Anew, and on the disk: a rename that reaches it before the bytes would leave no record at all.
fn put(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // It may hold a user's data and a password: nobody else's to read.
    let _ = fs::remove_file(path);
    let mut options = File::options();
    options.write(true).create_new(true).mode(0o600);
    let mut file = options.open(path)?;
    file.write_all(bytes)?;
    file.sync_data()
}

/// A record that is whole beside the one that counts, and is gone when it is dropped.
#[derive(Debug)]
pub struct Prepared {
    record: Record,
    beside: PathBuf,
}

impl Prepared {
    /// `record` counts when this returns, for every agent of this boot. A crash of the host may bring the older one back,
    /// as with [`Record::note`].
    pub fn commit(self, record: &Record, path: &Path) -> Result<(), RecordError> {
        if self.record != *record {
            // Something has happened since.
            return record.note(path);
        }
        fs::rename(&self.beside, path).map_err(|source| RecordError::Io {
            path: path.to_owned(),
            source,
        })
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        // Gone already if it was taken.
        let _ = fs::remove_file(&self.beside);
    }
}

/// What a folder of machines holds at start.
#[derive(Debug, Default)]
pub struct Found {
    pub records: Vec<Record>,
    /// Machines whose record cannot be read: nothing of theirs is touched.
    pub unreadable: Vec<(ServerId, RecordError)>,
}

/// Reads every record. An empty folder is what a crash left of a machine that was never taken (the
/// record is the first file of its folder): it is removed. One that holds files but no record is a
/// machine whose record was lost, and is kept.
pub fn scan(machines: &Path) -> Result<Found, RecordError> {
    let failed = |source| RecordError::Io {
        path: machines.to_owned(),
        source,
    };
    fs::create_dir_all(machines).map_err(failed)?;
    let mut found = Found::default();
    for entry in fs::read_dir(machines).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let Some(id) = entry
            .file_name()
            .to_str()
            .and_then(|name| Uuid::try_parse(name).ok())
        else {
            continue;
        };
        let path = entry.path().join(crate::paths::MachinePaths::RECORD);
        // Of a guest that was to be handed over to another process: nobody hands any over now.
        let _ = fs::remove_file(path.with_extension("next"));
        let read = match path.try_exists() {
            Ok(true) => Record::read(&path),
            Ok(false) => {
                // At most a record that was never renamed stands there besides.
                let _ = fs::remove_file(path.with_extension("new"));
                if fs::remove_dir(entry.path()).is_ok() {
                    continue;
                }
                Err(RecordError::Missing { path: path.clone() })
            }
            Err(source) => Err(RecordError::Io {
                path: path.clone(),
                source,
            }),
        };
        match read {
            Ok(record) if record.id.0 == id => found.records.push(record),
            Ok(_) => found.unreadable.push((
                ServerId(id),
                RecordError::Damaged {
                    path,
                    detail: "it names another machine".to_owned(),
                },
            )),
            Err(error) => found.unreadable.push((ServerId(id), error)),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use fractus_agent_api::copy::CopyId;

    use super::*;

    pub(super) fn golden(version: u32) -> PathBuf {
        let name = format!("tests/golden/record-v{version}.json");
        Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
    }

    #[test]
    fn a_record_of_version_1_is_still_read_and_written_back_whole() {
        let record = Record::read(&golden(1)).unwrap();
        assert_eq!(record.done.starts, 5);
        assert_eq!(record.process.map(|process| process.pid), Some(4711));
        // Of a version that did not say more.
        let detail = String::new();
        assert_eq!(record.stop, Some(StopReason::TripleFault { detail }));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machine/record.json");
        record.write(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap(), record);
    }

    #[test]
    fn a_suspended_machines_record_says_so_to_who_can_read_it() {
        let mut record = Record::read(&golden(2)).unwrap();
        assert_eq!(record.kept.as_ref().map(|kept| kept.disks.len()), Some(1));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machine/record.json");
        record.write(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap(), record);
        // An older agent may have it again once there is nothing that it would not know of.
        record.kept = None;
        record.write(&path).unwrap();
        assert_eq!(
            Record::read(&path).unwrap().version,
            2,
            "nor what is wanted"
        );
        record.intent.wanted.power = Power::Running;
        record.write(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap().version, 1);
    }

    #[test]
    fn a_record_that_was_prepared_counts_once_it_is_taken_and_leaves_nothing() {
        let mut record = Record::read(&golden(1)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("record.json");
        record.write(&path).unwrap();
        let files = || std::fs::read_dir(folder.path()).unwrap().count();
        let starts = |starts| Record::read(&path).unwrap().done.starts == starts;
        record.done.starts = 6;
        drop(record.prepare(&path).unwrap());
        assert!(starts(5) && files() == 1);
        record
            .prepare(&path)
            .unwrap()
            .commit(&record, &path)
            .unwrap();
        assert!(starts(6) && files() == 1);
        // What is taken is what is so by then.
        let prepared = record.prepare(&path).unwrap();
        record.done.starts = 7;
        prepared.commit(&record, &path).unwrap();
        assert!(starts(7) && files() == 1);
    }

    #[test]
    fn a_record_of_a_newer_agent_is_not_guessed_at() {
        let text = std::fs::read_to_string(golden(1)).unwrap();
        let newer = text.replacen(
            "\"version\": 1",
            &format!("\"version\": {}", VERSION + 1),
            1,
        );
        let error = Record::parse(newer.as_bytes(), Path::new("x")).unwrap_err();
        assert!(matches!(error, RecordError::Newer { version: 6, .. }));
    }

    #[test]
    fn a_record_of_a_guest_on_its_way_is_not_for_an_agent_that_knows_of_none() {
        let mut record = Record::read(&golden(3)).unwrap();
        let departs = record.intent.wanted.departs.take().unwrap();
        assert_eq!(record.done.departed, Some(departs.id));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machine/record.json");
        let version = |record: &Record| {
            record.write(&path).unwrap();
            Record::read(&path).unwrap().version
        };
        assert_eq!(version(&record), 1);
        record.intent.wanted.continues = Some(departs.id);
        assert_eq!(version(&record), 3);
        record.intent.wanted.end();
        record.intent.wanted.departs = Some(departs);
        assert_eq!(version(&record), 3);
    }

    #[test]
    fn a_record_of_a_guest_that_waits_for_memory_is_not_for_an_agent_that_would_not_listen() {
        let record = Record::read(&golden(5)).unwrap();
        assert_eq!(record.line.as_ref().map(|line| line.port), Some(40123));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machine/record.json");
        let version = |record: &Record| {
            record.write(&path).unwrap();
            Record::read(&path).unwrap().version
        };
        assert_eq!(version(&record), 5);
        let mut whole = record.clone();
        whole.line = None;
        assert_eq!(version(&whole), 1);
        // A process that waits for its guest ends with its agent.
        let mut arriving = record;
        arriving.done.continued = None;
        assert_eq!(version(&arriving), 1);
    }

    #[test]
    fn a_record_of_a_disk_that_is_made_of_its_copy_is_not_for_an_agent_that_would_make_it_of_its_image()
     {
        let mut record = Record::read(&golden(1)).unwrap();
        record.intent.wanted.restores = Some(CopyId(Uuid::from_u128(7)));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machine/record.json");
        record.write(&path).unwrap();
        let read = Record::read(&path).unwrap();
        assert_eq!(
            (read.version, read.intent.wanted.restores),
            (4, record.intent.wanted.restores)
        );
    }

    #[test]
    fn a_scan_keeps_what_it_cannot_read_and_removes_what_was_never_taken() {
        let folder = tempfile::tempdir().unwrap();
        let machines = folder.path();
        let damaged = Uuid::from_u128(1).to_string();
        std::fs::create_dir(machines.join(&damaged)).unwrap();
        std::fs::write(machines.join(&damaged).join("record.json"), b"{").unwrap();
        let empty = Uuid::from_u128(2).to_string();
        std::fs::create_dir(machines.join(&empty)).unwrap();
        std::fs::write(machines.join(&empty).join("record.new"), b"{").unwrap();
        let lost = Uuid::from_u128(3).to_string();
        let disk = machines.join(&lost).join("root.raw");
        std::fs::create_dir(machines.join(&lost)).unwrap();
        std::fs::write(&disk, b"of a user").unwrap();
        // A name that leads nowhere cannot be looked at, whoever looks.
        let loops = Uuid::from_u128(4).to_string();
        std::fs::create_dir(machines.join(&loops)).unwrap();
        let link = machines.join(&loops).join("record.json");
        std::os::unix::fs::symlink("record.json", &link).unwrap();
        let found = scan(machines).unwrap();
        assert_eq!(found.records, []);
        let mut unreadable: Vec<_> = found.unreadable.iter().map(|(id, _)| id.0).collect();
        unreadable.sort();
        assert_eq!(unreadable, [1, 3, 4].map(Uuid::from_u128));
        assert!(machines.join(damaged).exists() && !machines.join(empty).exists());
        assert_eq!(std::fs::read(disk).unwrap(), b"of a user");
    }
}
