//! The state of a server: one enum, its projection to the API's four words, and what may be asked of
//! a server in each.
//!
//! Owns [`ServerState`], [`ServerState::project`] and [`admit`]. Everything here is pure. Nothing
//! else may compute `status`, `vm_state`, `task_state` or `power_state`, and no handler may decide
//! by itself whether an action is allowed.

use std::fmt;

pub use super::admission::{Action, Conflict, Situation, admit};

/// Where a server stands when nothing is being done to it, or what it was before something began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Standing {
    Building,
    Active,
    Paused,
    Suspended,
    Stopped,
    Error,
    /// Its disk is an image, and its host has still to let go of what it has.
    Shelved,
    /// No host has anything of it.
    ShelvedOffloaded,
    /// It has another size, or host, and its user has still to say that it is to stay so.
    Resized,
}

/// How far a server is that gets another size, or host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Move {
    /// A host is chosen, and its guest stopped.
    Prep,
    /// Its disk is brought there.
    Migrating,
    /// All of it is.
    Migrated,
    /// It is the new host's, which starts it.
    Finish,
}

impl Move {
    const ALL: [Self; 4] = [Self::Prep, Self::Migrating, Self::Migrated, Self::Finish];

    /// Nova's.
    fn task(self) -> &'static str {
        match self {
            Self::Prep => "resize_prep",
            Self::Migrating => "resize_migrating",
            Self::Migrated => "resize_migrated",
            Self::Finish => "resize_finish",
        }
    }
}

/// How far a new server has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Build {
    /// No host yet.
    Scheduling,
    /// A host is making its disk and starting it.
    Spawning,
}

/// How far an image of a server's disk is; of one that is shelved the first two are one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Shot {
    Pending,
    /// Its host copies the disk.
    Taking,
    Taken,
    /// The copy comes into the store.
    Uploading,
}

impl Shot {
    const ALL: [Self; 4] = [Self::Pending, Self::Taking, Self::Taken, Self::Uploading];

    /// Nova's.
    fn task(self) -> &'static str {
        match self {
            Self::Pending => "image_snapshot_pending",
            Self::Taking => "image_snapshot",
            Self::Taken => "image_pending_upload",
            Self::Uploading => "image_uploading",
        }
    }

    /// Nova's, while the server is shelved.
    fn task_of_shelving(self) -> &'static str {
        match self {
            Self::Pending | Self::Taking => "shelving",
            Self::Taken => "shelving_image_pending_upload",
            Self::Uploading => "shelving_image_uploading",
        }
    }
}

/// The one state of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ServerState {
    Building(Build),
    Active,
    Paused,
    /// The guest's memory is in a file of its host, and no process is there.
    Suspended,
    Stopped,
    /// What was wanted could not be done; the reason is the server's fault row.
    Error,
    /// The guest's kernel has panicked; its machine runs on, so that it can be looked at.
    Crashed,
    Starting,
    Stopping(Standing),
    Pausing,
    Unpausing,
    Suspending,
    Resuming,
    SoftRebooting,
    HardRebooting(Standing),
    Rebuilding(Standing),
    /// Its guest goes to another host, and runs, or is paused, meanwhile.
    Migrating(Standing),
    /// Its host was declared to be down, and another one makes it anew.
    Evacuating(Standing),
    /// Its disk becomes an image.
    Imaging(Standing, Shot),
    /// Its guest is stopped, and its disk becomes the image that it is kept in.
    Shelving(Standing, Shot),
    /// Its disk is an image. What its host has of it goes, or could not be had to go.
    Shelved,
    Offloading,
    ShelvedOffloaded,
    /// A host makes its disk from that image.
    Unshelving(Standing),
    /// It gets another size, or host, and is to be as it was then: running or not.
    Resizing(Standing, Move),
    /// It has them, and both can still be taken back; whether its guest runs.
    Resized(Standing),
    /// They are its own: what is kept of before goes.
    Confirming(Standing),
    /// It is to be what it was, where it was.
    Reverting,
    Deleting(Standing),
    /// The row stays for a while, for those who look back.
    Deleted,
}

/// What the API says of a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Projection {
    pub status: &'static str,
    pub vm_state: &'static str,
    pub task_state: Option<&'static str>,
    pub power_state: PowerState,
}

/// Numbers of the compute API's `OS-EXT-STS:power_state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PowerState {
    None = 0,
    Running = 1,
    Paused = 3,
    Shutdown = 4,
    Crashed = 6,
}

impl Standing {
    const ALL: [Self; 9] = [
        Self::Building,
        Self::Active,
        Self::Paused,
        Self::Suspended,
        Self::Stopped,
        Self::Error,
        Self::Shelved,
        Self::ShelvedOffloaded,
        Self::Resized,
    ];

    /// Those of servers that are resized, from and to.
    const OF_RESIZES: [Self; 2] = [Self::Active, Self::Stopped];

    /// Those in which a host has it, or is to.
    const OF_HOSTS: [Self; 6] = [
        Self::Building,
        Self::Active,
        Self::Paused,
        Self::Suspended,
        Self::Stopped,
        Self::Error,
    ];

    /// Those that a server is evacuated from.
    const OF_EVACUATIONS: [Self; 3] = [Self::Active, Self::Stopped, Self::Error];

    /// Those that a server is shelved from.
    const OF_GUESTS: [Self; 4] = [Self::Active, Self::Paused, Self::Suspended, Self::Stopped];

    fn word(self) -> &'static str {
        match self {
            Self::Building => "building",
            Self::Active => "active",
            Self::Paused => "paused",
            Self::Suspended => "suspended",
            Self::Stopped => "stopped",
            Self::Error => "error",
            Self::Shelved => "shelved",
            Self::ShelvedOffloaded => "shelved_offloaded",
            Self::Resized => "resized",
        }
    }

    fn status(self) -> &'static str {
        match self {
            Self::Building => "BUILD",
            Self::Active => "ACTIVE",
            Self::Paused => "PAUSED",
            Self::Suspended => "SUSPENDED",
            Self::Stopped => "SHUTOFF",
            Self::Error => "ERROR",
            Self::Shelved => "SHELVED",
            Self::ShelvedOffloaded => "SHELVED_OFFLOADED",
            Self::Resized => "VERIFY_RESIZE",
        }
    }

    fn power(self) -> PowerState {
        match self {
            Self::Building | Self::Error => PowerState::None,
            Self::Active | Self::Resized => PowerState::Running,
            Self::Paused => PowerState::Paused,
            // As libvirt says of a domain whose memory was saved.
            Self::Suspended | Self::Stopped | Self::Shelved | Self::ShelvedOffloaded => {
                PowerState::Shutdown
            }
        }
    }

    /// The state of a server that stands so, with nothing under way.
    pub fn settled(self) -> ServerState {
        match self {
            Self::Building => ServerState::Building(Build::Scheduling),
            Self::Active => ServerState::Active,
            Self::Paused => ServerState::Paused,
            Self::Suspended => ServerState::Suspended,
            Self::Stopped => ServerState::Stopped,
            Self::Error => ServerState::Error,
            Self::Shelved => ServerState::Shelved,
            Self::ShelvedOffloaded => ServerState::ShelvedOffloaded,
            Self::Resized => ServerState::Resized(Self::Active),
        }
    }
}

impl ServerState {
    /// Every state there is, for tables, filters and tests.
    pub fn all() -> impl Iterator<Item = Self> {
        let plain = [
            Self::Building(Build::Scheduling),
            Self::Building(Build::Spawning),
            Self::Active,
            Self::Paused,
            Self::Suspended,
            Self::Stopped,
            Self::Error,
            Self::Crashed,
            Self::Starting,
            Self::Pausing,
            Self::Unpausing,
            Self::Suspending,
            Self::Resuming,
            Self::SoftRebooting,
            Self::Migrating(Standing::Active),
            Self::Migrating(Standing::Paused),
            Self::Shelved,
            Self::Offloading,
            Self::ShelvedOffloaded,
            Self::Unshelving(Standing::Shelved),
            Self::Unshelving(Standing::ShelvedOffloaded),
            Self::Reverting,
            Self::Deleted,
        ];
        let nested: [fn(Standing) -> Self; 3] =
            [Self::Stopping, Self::HardRebooting, Self::Rebuilding];
        let imaging = Shot::ALL.into_iter().flat_map(|shot| {
            let standings = [
                Standing::Active,
                Standing::Paused,
                Standing::Suspended,
                Standing::Stopped,
                // Its guest has ended by a fault meanwhile.
                Standing::Error,
            ];
            standings.map(|standing| Self::Imaging(standing, shot))
        });
        let shelving = [Shot::Pending, Shot::Taken, Shot::Uploading];
        let shelving = shelving
            .into_iter()
            .flat_map(|shot| Standing::OF_GUESTS.map(|standing| Self::Shelving(standing, shot)));
        let nested = nested
            .into_iter()
            .flat_map(|make| Standing::OF_HOSTS.into_iter().map(make));
        let deleting = Standing::ALL.map(Self::Deleting);
        let evacuating = Standing::OF_EVACUATIONS.map(Self::Evacuating);
        let resizing = Move::ALL.into_iter();
        let resizing = resizing
            .flat_map(|at| Standing::OF_RESIZES.map(|standing| Self::Resizing(standing, at)));
        let resized = Standing::OF_RESIZES
            .into_iter()
            .flat_map(|standing| [Self::Resized(standing), Self::Confirming(standing)]);
        let plain = plain.into_iter().chain(imaging).chain(shelving);
        let plain = plain.chain(resizing).chain(resized);
        plain.chain(nested).chain(evacuating).chain(deleting)
    }

    /// What the server is or was before what is being done to it.
    pub fn standing(self) -> Option<Standing> {
        Some(match self {
            Self::Building(_) => Standing::Building,
            Self::Active | Self::Pausing | Self::Suspending | Self::SoftRebooting => {
                Standing::Active
            }
            Self::Paused | Self::Unpausing => Standing::Paused,
            Self::Suspended | Self::Resuming => Standing::Suspended,
            Self::Stopped | Self::Starting => Standing::Stopped,
            Self::Error | Self::Crashed => Standing::Error,
            Self::Shelved | Self::Offloading => Standing::Shelved,
            Self::ShelvedOffloaded => Standing::ShelvedOffloaded,
            Self::Resized(_) | Self::Confirming(_) | Self::Reverting => Standing::Resized,
            Self::Stopping(standing)
            | Self::HardRebooting(standing)
            | Self::Rebuilding(standing)
            | Self::Migrating(standing)
            | Self::Evacuating(standing)
            | Self::Imaging(standing, _)
            | Self::Shelving(standing, _)
            | Self::Unshelving(standing)
            | Self::Resizing(standing, _)
            | Self::Deleting(standing) => standing,
            Self::Deleted => return None,
        })
    }

    fn task(self) -> Option<&'static str> {
        match self {
            Self::Building(Build::Scheduling) => Some("scheduling"),
            Self::Building(Build::Spawning) => Some("spawning"),
            Self::Starting => Some("powering-on"),
            Self::Stopping(_) => Some("powering-off"),
            Self::Pausing => Some("pausing"),
            Self::Unpausing => Some("unpausing"),
            Self::Suspending => Some("suspending"),
            Self::Resuming => Some("resuming"),
            Self::SoftRebooting => Some("rebooting"),
            Self::HardRebooting(_) => Some("rebooting_hard"),
            Self::Rebuilding(_) | Self::Evacuating(_) => Some("rebuilding"),
            Self::Migrating(_) => Some("migrating"),
            Self::Imaging(_, shot) => Some(shot.task()),
            Self::Shelving(_, shot) => Some(shot.task_of_shelving()),
            Self::Offloading => Some("shelving_offloading"),
            Self::Unshelving(_) => Some("unshelving"),
            Self::Resizing(_, at) => Some(at.task()),
            Self::Confirming(_) => Some("resize_confirming"),
            Self::Reverting => Some("resize_reverting"),
            Self::Deleting(_) => Some("deleting"),
            Self::Active
            | Self::Paused
            | Self::Suspended
            | Self::Stopped
            | Self::Error
            | Self::Crashed
            | Self::Shelved
            | Self::ShelvedOffloaded
            | Self::Resized(_)
            | Self::Deleted => None,
        }
    }

    /// The API's words for this state. The status is nova's: an active server that reboots is
    /// `REBOOT`, a stopped one that is rebooted hard stays `SHUTOFF` until it runs.
    pub fn project(self) -> Projection {
        let Some(standing) = self.standing() else {
            return Projection {
                status: "DELETED",
                vm_state: "deleted",
                task_state: None,
                power_state: PowerState::None,
            };
        };
        let status = match self {
            Self::SoftRebooting => "REBOOT",
            Self::HardRebooting(Standing::Active) => "HARD_REBOOT",
            Self::Rebuilding(_) | Self::Evacuating(_) => "REBUILD",
            Self::Migrating(Standing::Active | Standing::Paused) => "MIGRATING",
            Self::Resizing(..) => "RESIZE",
            Self::Reverting => "REVERT_RESIZE",
            _ => standing.status(),
        };
        Projection {
            status,
            vm_state: standing.word(),
            task_state: self.task(),
            power_state: match self {
                Self::Crashed => PowerState::Crashed,
                Self::Resized(runs) | Self::Confirming(runs) => runs.power(),
                _ => standing.power(),
            },
        }
    }

    /// True while an operation is at work on the server.
    pub fn in_transit(self) -> bool {
        self.task().is_some()
    }

    /// States that the API shows under this status, any case (`servers?status=`).
    pub fn of_status(status: &str) -> Vec<Self> {
        Self::all()
            .filter(|state| state.project().status.eq_ignore_ascii_case(status))
            .collect()
    }

    /// As the database keeps it.
    pub fn key(self) -> String {
        match self {
            Self::Building(Build::Scheduling) => "building:scheduling".to_owned(),
            Self::Building(Build::Spawning) => "building:spawning".to_owned(),
            Self::Stopping(standing) => format!("stopping:{}", standing.word()),
            Self::HardRebooting(standing) => format!("hard_rebooting:{}", standing.word()),
            Self::Rebuilding(standing) => format!("rebuilding:{}", standing.word()),
            Self::Migrating(standing) => format!("migrating:{}", standing.word()),
            Self::Evacuating(standing) => format!("evacuating:{}", standing.word()),
            Self::Imaging(standing, shot) => format!("{}:{}", shot.task(), standing.word()),
            Self::Shelving(standing, shot) => {
                format!("{}:{}", shot.task_of_shelving(), standing.word())
            }
            Self::Unshelving(standing) => format!("unshelving:{}", standing.word()),
            Self::Resizing(standing, at) => format!("{}:{}", at.task(), standing.word()),
            Self::Resized(standing) => format!("resized:{}", standing.word()),
            Self::Confirming(standing) => format!("resize_confirming:{}", standing.word()),
            Self::Reverting => "resize_reverting".to_owned(),
            Self::Deleting(standing) => format!("deleting:{}", standing.word()),
            Self::Shelved => "shelved".to_owned(),
            Self::Offloading => "shelving_offloading".to_owned(),
            Self::ShelvedOffloaded => "shelved_offloaded".to_owned(),
            Self::Active => "active".to_owned(),
            Self::Paused => "paused".to_owned(),
            Self::Suspended => "suspended".to_owned(),
            Self::Stopped => "stopped".to_owned(),
            Self::Error => "error".to_owned(),
            Self::Crashed => "crashed".to_owned(),
            Self::Starting => "starting".to_owned(),
            Self::Pausing => "pausing".to_owned(),
            Self::Unpausing => "unpausing".to_owned(),
            Self::Suspending => "suspending".to_owned(),
            Self::Resuming => "resuming".to_owned(),
            Self::SoftRebooting => "soft_rebooting".to_owned(),
            Self::Deleted => "deleted".to_owned(),
        }
    }

    /// Reads what [`key`](Self::key) wrote.
    pub fn from_key(key: &str) -> Option<Self> {
        Self::all().find(|state| state.key() == key)
    }
}

impl fmt::Display for ServerState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.key())
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
