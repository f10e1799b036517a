//! Which pages of a snapshot its clones touch (`vm --clone FILE --working-set FILE`): recorded of the first, read ahead
//! for the next.
//!
//! Both by the process that starts the machine, and in threads beside it: the machine's own has no /proc, is handed nothing
//! that it could write to, and believes no set. What is read is in the host's page cache when the guest wants it, or on its
//! way; the guest starts meanwhile, and its memory is the snapshot's whatever the set says. A set that cannot be read or
//! recorded is said on standard error, and costs the guest nothing else; of a guest that ends sooner none is.
//! It reads the snapshot for that without a jail, as whoever it is started by.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use fractus_vmm::stream::snapshot::Snapshot;
use fractus_vmm::stream::working_set::{WorkingSet, WorkingSetError};
use uuid::Uuid;

/// A guest has touched by then what it needs to go on and to answer somebody; what it does for hours is not what the next
/// one waits for.
const AFTER: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Set(#[from] WorkingSetError),
}

impl From<fractus_vmm::stream::StreamError> for Error {
    fn from(error: fractus_vmm::stream::StreamError) -> Self {
        Error::Set(error.into())
    }
}

/// Records the set that is not there yet.
pub struct Recorder {
    set: PathBuf,
    snapshot: PathBuf,
}

/// Reads ahead what `set` says of `snapshot`; who records it, if there is no such file.
pub fn begin(set: PathBuf, snapshot: PathBuf) -> Option<Recorder> {
    let file = match File::open(&set) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Some(Recorder { set, snapshot });
        }
        file => file,
    };
    beside(move || {
        if let Err(error) = file
            .map_err(Error::from)
            .and_then(|it| fetch(it, &snapshot))
        {
            let set = set.display();
            eprintln!("fractus-agent vm: the working set {set} is not used: {error}");
        }
    });
    None
}

impl Recorder {
    /// In a while, of the clone's process, which has begun to run its guest, if that still lives. Of several clones that record at once the last one's set
    /// stays.
    pub fn record(self, process: u32) {
        beside(move || {
            // sleeps because the guest is to do something first, and says nothing of when it has
            thread::sleep(AFTER);
            if let Err(error) = self.write(process) {
                let set = self.set.display();
                eprintln!("fractus-agent vm: the working set {set} is not recorded: {error}");
            }
        });
    }

    fn write(&self, process: u32) -> Result<(), Error> {
        let of = Path::new("/proc").join(process.to_string());
        let snapshot = Snapshot::open(File::open(&self.snapshot)?)?;
        let maps = std::fs::read(of.join("maps"))?;
        let maps = String::from_utf8_lossy(&maps);
        let set = WorkingSet::of_process(&snapshot, &maps, &File::open(of.join("pagemap"))?)?;
        // It is there when all of it is, and nobody's link is followed.
        let mut name = self.set.clone().into_os_string();
        name.push(format!(".{}", Uuid::new_v4()));
        let mut options = File::options();
        options.write(true).create_new(true).mode(0o600);
        let written = options.open(&name).and_then(|file| {
            set.write(&file)?;
            file.sync_data()?;
            std::fs::rename(&name, &self.set)
        });
        Ok(written.inspect_err(|_| {
            // That it is not whole is what is told.
            let _ = std::fs::remove_file(&name);
        })?)
    }
}

fn fetch(set: File, snapshot: &Path) -> Result<(), Error> {
    let snapshot = Snapshot::open(File::open(snapshot)?)?;
    let set = WorkingSet::read(set, &snapshot)?;
    Ok(snapshot.fetch(&set)?)
}

/// Nobody waits for it. Without a thread it is not done: the guest is no other for it.
fn beside(body: impl FnOnce() + Send + 'static) {
    let name = "working set".to_owned();
    let _detached = thread::Builder::new().name(name).spawn(body);
}
