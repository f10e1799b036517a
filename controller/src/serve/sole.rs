//! One controller on an SQLite database: a second one is refused, before it has read or written anything.
//!
//! The claim is a lock on a file beside the database, and goes with the process that holds it, however
//! it ends. Of several controllers on PostgreSQL one leads ([`crate::leader`]).

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    #[error(
        "another controller{holder} uses the database {database}: SQLite is for one controller. Stop the \
         other one, or give both a PostgreSQL database (--database postgres://...)",
        database = database.display()
    )]
    Taken { database: PathBuf, holder: String },
    #[error("locking {path}", path = path.display())]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
}

/// Held for the life of the controller.
#[derive(Debug)]
pub struct Claim(#[expect(dead_code, reason = "held, not read")] File);

/// Claims the database of this URL; `None` where it is not SQLite's.
pub fn claim(url: &str) -> Result<Option<Claim>, ClaimError> {
    let Some(path) = url.strip_prefix("sqlite://") else {
        return Ok(None);
    };
    let database = Path::new(path.split('?').next().unwrap_or_default());
    let mut lock = database.as_os_str().to_owned();
    lock.push(".lock");
    let lock = PathBuf::from(lock);
    let io = |source| ClaimError::Io {
        path: lock.clone(),
        source,
    };
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&lock)
        .map_err(io)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            return Err(ClaimError::Taken {
                database: database.to_owned(),
                holder: holder(&mut file),
            });
        }
        Err(error) => return Err(io(error.into())),
    }
    let written = file
        .set_len(0)
        .and_then(|()| file.rewind())
        .and_then(|()| writeln!(file, "{}", std::process::id()));
    written.map_err(io)?;
    Ok(Some(Claim(file)))
}

/// What the holder has said of itself, for the message.
fn holder(file: &mut File) -> String {
    let mut text = String::new();
    match file.take(20).read_to_string(&mut text) {
        Ok(_) if text.trim().parse::<u32>().is_ok() => format!(" (process {})", text.trim()),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_controller_on_an_sqlite_database_is_refused_until_the_first_has_gone() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}/fractus.sqlite", folder.path().display());
        let first = claim(&url).unwrap();
        assert!(first.is_some());
        let refused = claim(&url).unwrap_err().to_string();
        let words = [
            format!("another controller (process {})", std::process::id()),
            format!("the database {}/fractus.sqlite:", folder.path().display()),
            "--database postgres://".to_owned(),
        ];
        for word in words {
            assert!(refused.contains(&word), "{refused}");
        }
        let other = claim(&url.replace("fractus.sqlite", "other.sqlite")).unwrap();
        assert!(other.is_some(), "another database is another cloud's");
        drop(first);
        assert!(claim(&url).unwrap().is_some());
        assert!(claim("postgres://x@/y").unwrap().is_none());
    }
}
