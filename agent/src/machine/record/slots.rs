//! A record once more, in a file of a fixed size: replaced in place, which costs a tenth of a new file with its name.
//!
//! For the moments in which a guest stands still until its record is on the disk. Two slots, written in turn, so that one
//! that was torn leaves the other. The later of this and the record's own file counts ([`Record::serial`]), if that file
//! says when it was written: an agent that knows nothing of slots leaves the serial out, and what it has written counts. The
//! file is written as always when there is time, so that such an agent finds the record up to date.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::Record;

const SLOT: usize = 64 << 10;
/// Length (4) and CRC-32 (4) of what follows, little-endian.
const HEAD: usize = 8;

fn beside(record: &Path) -> PathBuf {
    record.with_extension("slots")
}

/// The file, on its disk; what stands in it already stays.
pub fn prepare(record: &Path) -> io::Result<()> {
    let mut options = File::options();
    // It may hold a user's data and a password, as the record.
    options.write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(beside(record))?;
    if file.metadata()?.len() != 2 * SLOT as u64 {
        file.write_all_at(&[0; 2 * SLOT], 0)?;
    }
    file.sync_all()?;
    match record.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

/// Returns once the record is on the disk.
///
/// # Errors
/// There is no such file, or the record is too large for it: nothing is changed then.
pub fn write(record: &Path, serial: u64, bytes: &[u8]) -> io::Result<()> {
    if bytes.len() > SLOT - HEAD {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let file = File::options().write(true).open(beside(record))?;
    let mut slot = (bytes.len() as u32).to_le_bytes().to_vec();
    slot.extend(crc32fast::hash(bytes).to_le_bytes());
    slot.extend(bytes);
    file.write_all_at(&slot, serial % 2 * SLOT as u64)?;
    file.sync_data()
}

/// Nothing of what stood in it is left, once that reaches the disk.
pub fn clear(record: &Path) -> io::Result<()> {
    let file = File::options().write(true).open(beside(record))?;
    file.write_all_at(&[0; 2 * SLOT], 0)
}

/// The latest record in it, if there is any.
pub fn latest(record: &Path) -> Option<Record> {
    let bytes = fs::read(beside(record)).ok()?;
    let read = |slot: &[u8]| {
        let (head, rest) = slot.split_first_chunk::<HEAD>()?;
        let [l0, l1, l2, l3, c0, c1, c2, c3] = *head;
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let bytes = rest.get(..length).filter(|bytes| !bytes.is_empty())?;
        let whole = crc32fast::hash(bytes) == u32::from_le_bytes([c0, c1, c2, c3]);
        // One that a newer agent wrote is in the record's file, too, or is as if it had not been.
        whole.then(|| Record::parse(bytes, record).ok())?
    };
    let slots = bytes.chunks(SLOT).filter_map(read);
    slots.max_by_key(|record| record.serial)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::tests::golden;
    use super::*;

    fn on_disk() -> (tempfile::TempDir, PathBuf, Record) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("machine/record.json");
        let record = Record::read(&golden(1)).unwrap();
        let mut record = record;
        record.write(&path).unwrap();
        record.prepare_to_write_fast(&path).unwrap();
        (folder, path, record)
    }

    #[test]
    fn the_later_one_counts_wherever_it_is() {
        let (_folder, path, mut record) = on_disk();
        assert_eq!(Record::read(&path).unwrap(), record);
        let before = fs::read(&path).unwrap();
        for starts in 10..13 {
            record.done.starts = starts;
            record.write_fast(&path).unwrap();
            assert_eq!(fs::read(&path).unwrap(), before, "the file stays");
            assert_eq!(Record::read(&path).unwrap(), record);
        }
        // Written as always, it is the file that counts.
        record.done.starts = 20;
        record.write(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap().done.starts, 20);
        // And again, also by an agent that begins with what it reads.
        let mut record = Record::read(&path).unwrap();
        record.done.starts = 21;
        record.write_fast(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap().done.starts, 21);
        let mode = fs::metadata(beside(&path)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_torn_one_leaves_the_one_before() {
        let (_folder, path, mut record) = on_disk();
        for starts in [10, 11] {
            record.done.starts = starts;
            record.write_fast(&path).unwrap();
        }
        let whole = fs::read(beside(&path)).unwrap();
        let slot = (record.serial.unwrap() % 2) as usize * SLOT;
        for at in [0, 3, 4, 7, 8, 100] {
            let mut torn = whole.clone();
            torn[slot + at] ^= 0x40;
            fs::write(beside(&path), &torn).unwrap();
            assert_eq!(Record::read(&path).unwrap().done.starts, 10, "byte {at}");
        }
        for length in [0, 5, SLOT, SLOT + 9] {
            fs::write(beside(&path), &whole[..length]).unwrap();
            assert!(Record::read(&path).is_ok(), "{length} bytes");
        }
    }

    #[test]
    fn without_the_file_or_with_too_large_a_record_it_is_written_as_always() {
        let (_folder, path, mut record) = on_disk();
        record.request_id = Some("x".repeat(SLOT));
        record.write_fast(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap(), record);
        fs::remove_file(beside(&path)).unwrap();
        record.request_id = None;
        record.write_fast(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap(), record);
        assert!(!beside(&path).exists());
    }

    #[test]
    fn another_machines_or_a_newer_agents_is_not_taken() {
        let (_folder, path, mut record) = on_disk();
        record.write_fast(&path).unwrap();
        let text = serde_json::to_string(&record).unwrap();
        let newer = text.replacen("\"version\":1", "\"version\":99", 1);
        assert_ne!(newer, text);
        write(&path, record.serial.unwrap() + 1, newer.as_bytes()).unwrap();
        assert_eq!(Record::read(&path).unwrap(), record);
        let mut other = record.clone();
        other.id.0 = uuid::Uuid::new_v4();
        other.serial = other.serial.map(|serial| serial + 3);
        let bytes = serde_json::to_vec(&other).unwrap();
        write(&path, other.serial.unwrap(), &bytes).unwrap();
        assert_eq!(Record::read(&path).unwrap().id, record.id);
    }

    #[test]
    fn what_an_agent_without_slots_has_written_counts() {
        let (_folder, path, mut record) = on_disk();
        record.done.starts = 10;
        record.write_fast(&path).unwrap();
        let mut older: serde_json::Value = serde_json::to_value(&record).unwrap();
        older.as_object_mut().unwrap().remove("serial");
        older["done"]["starts"] = 30.into();
        fs::write(&path, serde_json::to_vec(&older).unwrap()).unwrap();
        let mut record = Record::read(&path).unwrap();
        assert_eq!(record.done.starts, 30);
        // Also when it is prepared again, and nothing more was written.
        record.prepare_to_write_fast(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap().done.starts, 30);
        record.done.starts = 31;
        record.write_fast(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap().done.starts, 31);
        record.write(&path).unwrap();
        clear(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap(), record);
        assert!(
            fs::read(beside(&path))
                .unwrap()
                .iter()
                .all(|byte| *byte == 0)
        );
    }
}
