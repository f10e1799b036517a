//! All machines of the host: finds the actor that an intent is for, and makes it when there is none.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use fractus_agent_api::decision::{self, Done, Intent};
use fractus_agent_api::machine::{MachineReport, Observed, Power, PutMachine, Refusal, ServerId};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::task::TaskTracker;

use super::actor::{Actor, Message, Surroundings};
use super::process::{Launcher, end_strays, identity};
use super::record::{self, Record, RecordError, VERSION};
use super::upgrade::Fate;
use crate::clock::now_us;
use crate::paths::Paths;

/// Tombstones are kept at least this long: no message is later than that.
const TOMBSTONE: Duration = Duration::from_secs(7 * 24 * 3600);

#[derive(Debug, thiserror::Error)]
pub enum MachinesError {
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("looking for processes: {0}")]
    Processes(std::io::Error),
}

#[derive(Clone)]
struct Handle {
    mailbox: mpsc::Sender<Message>,
    report: watch::Receiver<MachineReport>,
    /// Of the machine's process; 0: none.
    pid: Arc<AtomicI32>,
    /// Whom its process runs as; 0: nobody, since nothing is left of the machine. Set from 0 under the
    /// lock of [`Inner`] only, so that no two have the same.
    user: Arc<AtomicU32>,
}

struct Inner {
    handles: BTreeMap<ServerId, Handle>,
    /// Machines whose record cannot be read, and why. Theirs is not touched.
    closed: BTreeMap<ServerId, String>,
    /// Users of processes of such machines.
    closed_users: BTreeSet<u32>,
}

impl Inner {
    fn free_user(&self, users: Range<u32>) -> Option<u32> {
        let handles = self.handles.values();
        let taken: BTreeSet<u32> = handles
            .map(|handle| handle.user.load(Ordering::Relaxed))
            .collect();
        let taken = |user: &u32| taken.contains(user) || self.closed_users.contains(user);
        users.into_iter().find(|user| !taken(user))
    }
}

/// Of the processes that run for machines whose record cannot be read.
fn users_of(
    closed: &BTreeMap<ServerId, String>,
    mark: uuid::Uuid,
) -> Result<BTreeSet<u32>, MachinesError> {
    if closed.is_empty() {
        return Ok(BTreeSet::new());
    }
    let marked = identity::marked(mark).map_err(MachinesError::Processes)?;
    Ok(marked
        .iter()
        .filter(|process| closed.contains_key(&ServerId(process.machine)))
        .filter_map(|process| identity::user(process.pid))
        .collect())
}

/// Cheap to clone.
pub struct Machines<L: Launcher> {
    paths: Paths,
    surroundings: Arc<Surroundings<L>>,
    users: Range<u32>,
    inner: Arc<Mutex<Inner>>,
    /// Held while a record is made, so that two first intents for a machine do not make two actors.
    admission: Arc<Mutex<()>>,
    tasks: TaskTracker,
}

impl<L: Launcher> Clone for Machines<L> {
    fn clone(&self) -> Self {
        Self {
            paths: self.paths.clone(),
            surroundings: self.surroundings.clone(),
            users: self.users.clone(),
            inner: self.inner.clone(),
            admission: self.admission.clone(),
            tasks: self.tasks.clone(),
        }
    }
}

impl<L: Launcher> Machines<L> {
    /// Takes up every machine that has a record, ends processes that have none. Call once a life.
    pub fn take_up(
        paths: Paths,
        surroundings: Surroundings<L>,
        users: Range<u32>,
        mark: uuid::Uuid,
    ) -> Result<Self, MachinesError> {
        let found = record::scan(&paths.machines())?;
        let closed: BTreeMap<_, _> = found
            .unreadable
            .into_iter()
            .map(|(id, error)| (id, error.to_string()))
            .collect();
        for (id, why) in &closed {
            tracing::error!(machine = %id, why, "its record cannot be read; it is left alone");
        }
        let named: BTreeSet<(ServerId, i32)> = found
            .records
            .iter()
            .filter_map(|record| record.process.map(|process| (record.id, process.pid)))
            .collect();
        end_strays(mark, |id, pid| {
            closed.contains_key(&id) || named.contains(&(id, pid))
        })
        .map_err(MachinesError::Processes)?;
        let closed_users = users_of(&closed, mark)?;
        let machines = Self {
            paths,
            surroundings: Arc::new(surroundings),
            users,
            inner: Arc::new(Mutex::new(Inner {
                handles: BTreeMap::new(),
                closed,
                closed_users,
            })),
            admission: Arc::default(),
            tasks: TaskTracker::new(),
        };
        for record in found.records {
            if record.is_tombstone() && machines.purge(&record) {
                continue;
            }
            machines.open(&mut machines.lock(), record);
        }
        Ok(machines)
    }

    /// Removes a tombstone that is old enough.
    fn purge(&self, record: &Record) -> bool {
        let age = now_us() - record.gone_at_us.unwrap_or_else(now_us);
        let old = u128::try_from(age).is_ok_and(|age| age > TOMBSTONE.as_micros());
        old && std::fs::remove_dir_all(self.paths.machine(record.id).folder()).is_ok()
    }

    fn open(&self, inner: &mut Inner, record: Record) -> Handle {
        let (mailbox, messages) = mpsc::channel(16);
        let id = record.id;
        let held = if record.is_tombstone() {
            0
        } else {
            record.user
        };
        let user = Arc::new(AtomicU32::new(held));
        let paths = self.paths.machine(id);
        let (actor, report, pid) = Actor::new(
            self.surroundings.clone(),
            paths,
            record,
            messages,
            user.clone(),
        );
        self.tasks.spawn(actor.run());
        let handle = Handle {
            mailbox,
            report,
            pid,
            user,
        };
        inner.handles.insert(id, handle.clone());
        let _ = self.surroundings.changed.send(id);
        handle
    }

    /// Takes an intent. Answered once it is on the disk.
    pub async fn put(&self, id: ServerId, put: PutMachine) -> Result<MachineReport, Refusal> {
        let unavailable = || Refusal::Unavailable {
            detail: "the agent is ending".to_owned(),
        };
        let known = {
            let inner = self.lock();
            let known = inner.handles.get(&id).cloned();
            if let Some(handle) = &known
                && put.wanted.power != Power::Absent
                && handle.user.load(Ordering::Relaxed) == 0
                && let Some(user) = inner.free_user(self.users.clone())
            {
                // It comes back, as another user than it was.
                handle.user.store(user, Ordering::Relaxed);
            }
            known
        };
        let Some(handle) = known else {
            return self.admit(id, put).await;
        };
        let (answer, answered) = oneshot::channel();
        let message = Message::Put(Box::new(put), answer);
        handle
            .mailbox
            .send(message)
            .await
            .map_err(|_| unavailable())?;
        answered.await.map_err(|_| unavailable())?
    }

    /// An operator says that it is wanted here, in this boot of the host.
    pub async fn hear(&self, id: ServerId) {
        let handle = self.lock().handles.get(&id).cloned();
        if let Some(handle) = handle {
            // Fails only when the agent is ending.
            let _ = handle.mailbox.send(Message::Hear).await;
        }
    }

    /// Has the guest go on in a process of this agent's program, also (`all`) if it is in one. None: there is no such
    /// machine.
    pub async fn upgrade(&self, id: ServerId, all: bool) -> Option<Fate> {
        let handle = self.lock().handles.get(&id).cloned()?;
        let (answer, answered) = oneshot::channel();
        // They fail only when the agent is ending.
        let sent = handle.mailbox.send(Message::Upgrade(all, answer)).await;
        let fate = match sent {
            Ok(()) => answered.await.ok(),
            Err(_) => None,
        };
        Some(fate.unwrap_or_else(|| Fate::Failed {
            reason: "the agent is ending".to_owned(),
        }))
    }

    /// The first intent for a machine: its record is made, then its actor.
    async fn admit(&self, id: ServerId, put: PutMachine) -> Result<MachineReport, Refusal> {
        decision::intake(None, &put)?;
        super::process::launch::check(id, &put.wanted.spec)
            .map_err(|detail| Refusal::Invalid { detail })?;
        let machines = self.clone();
        let admitted = tokio::task::spawn_blocking(move || machines.admit_now(id, put)).await;
        match admitted {
            Ok(Ok(handle)) => Ok(handle.report.borrow().clone()),
            Ok(Err(Admission::Refused(refusal))) => Err(refusal),
            // Somebody else was first: to its actor, then.
            Ok(Err(Admission::Known(put))) => Box::pin(self.put(id, *put)).await,
            Err(error) => Err(Refusal::Unavailable {
                detail: error.to_string(),
            }),
        }
    }

    fn admit_now(&self, id: ServerId, put: PutMachine) -> Result<Handle, Admission> {
        let _admission = self
            .admission
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let unavailable = |detail: String| Admission::Refused(Refusal::Unavailable { detail });
        let user = {
            let inner = self.lock();
            if inner.handles.contains_key(&id) {
                return Err(Admission::Known(Box::new(put)));
            }
            if let Some(why) = inner.closed.get(&id) {
                return Err(unavailable(why.clone()));
            }
            inner.free_user(self.users.clone())
        };
        let user =
            user.ok_or_else(|| unavailable("no user id is left for a machine".to_owned()))?;
        let absent = put.wanted.power == Power::Absent;
        let boot = self.surroundings.makings.boot_id();
        let heard = boot.filter(|_| decision::is_word(&put, boot));
        let mut record = Record {
            version: VERSION,
            id,
            intent: Intent {
                generation: put.generation,
                revision: put.revision,
                wanted: put.wanted,
            },
            request_id: put.request_id,
            done: Done::default(),
            user,
            process: None,
            stop: None,
            kept: None,
            heard,
            gone_at_us: absent.then(now_us),
            changed_at_us: now_us(),
            serial: None,
            line: None,
        };
        record.forget_guest();
        record
            .write(&self.paths.machine(id).record())
            .map_err(|e| unavailable(e.to_string()))?;
        Ok(self.open(&mut self.lock(), record))
    }

    pub fn get(&self, id: ServerId) -> Option<MachineReport> {
        self.lock()
            .handles
            .get(&id)
            .map(|handle| handle.report.borrow().clone())
    }

    /// Of the machine's process, while there is one.
    pub fn pid(&self, id: ServerId) -> Option<i32> {
        let pid = self.lock().handles.get(&id)?.pid.load(Ordering::Relaxed);
        (pid != 0).then_some(pid)
    }

    /// Follows the reports of one machine.
    pub fn watch(&self, id: ServerId) -> Option<watch::Receiver<MachineReport>> {
        self.lock()
            .handles
            .get(&id)
            .map(|handle| handle.report.clone())
    }

    pub fn list(&self) -> Vec<MachineReport> {
        self.lock()
            .handles
            .values()
            .map(|handle| handle.report.borrow().clone())
            .collect()
    }

    /// Ends the actors, not the machines.
    pub async fn close(self) {
        self.lock().handles.clear();
        self.tasks.close();
        self.tasks.wait().await;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Admission {
    Refused(Refusal),
    Known(Box<PutMachine>),
}

/// For the life of the agent: forgets machines that have been gone for long.
pub async fn purge_tombstones<L: Launcher>(machines: Machines<L>) {
    loop {
        tokio::time::sleep(Duration::from_secs(3600)).await;
        for report in machines.list() {
            let age = now_us() - report.changed_at_us;
            let old = u128::try_from(age).is_ok_and(|age| age > TOMBSTONE.as_micros());
            if !old || !report.settled || report.observed != Observed::Absent {
                continue;
            }
            // Its actor ends with its mailbox; nobody writes the record any more.
            machines.lock().handles.remove(&report.id);
            let folder = machines.paths.machine(report.id);
            if let Err(error) = std::fs::remove_dir_all(folder.folder()) {
                tracing::error!(machine = %report.id, %error, "a tombstone");
            }
        }
    }
}
