//! The state of a server: one enum, its projection to the API's four words, and what may be asked of
//! a server in each.
//!
//! Owns [`ServerState`], [`ServerState::project`] and [`admit`]. Everything here is pure. Nothing
//! else may compute `status`, `vm_state`, `task_state` or `power_state`, and no handler may decide
//! by itself whether an action is allowed.

use std::fmt;

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

/// What can be asked of a server, as far as its state decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    Start,
    Stop,
    SoftReboot,
    HardReboot,
    Pause,
    Unpause,
    Suspend,
    Resume,
    Rebuild,
    CreateImage,
    LiveMigrate,
    Evacuate,
    Shelve,
    ShelveOffload,
    Unshelve,
    Resize,
    ColdMigrate,
    ConfirmResize,
    RevertResize,
    ForceComplete,
    AbortMigration,
    Delete,
    ForceDelete,
    Lock,
    Unlock,
    ResetState,
    ConsoleOutput,
    RemoteConsole,
    UpdateMetadata,
    DeleteMetadata,
    UpdateTag,
    UpdateTags,
    DeleteTag,
    DeleteTags,
}

impl Action {
    pub const ALL: [Self; 34] = [
        Self::Start,
        Self::Stop,
        Self::SoftReboot,
        Self::HardReboot,
        Self::Pause,
        Self::Unpause,
        Self::Suspend,
        Self::Resume,
        Self::Rebuild,
        Self::CreateImage,
        Self::LiveMigrate,
        Self::Evacuate,
        Self::Shelve,
        Self::ShelveOffload,
        Self::Unshelve,
        Self::Resize,
        Self::ColdMigrate,
        Self::ConfirmResize,
        Self::RevertResize,
        Self::ForceComplete,
        Self::AbortMigration,
        Self::Delete,
        Self::ForceDelete,
        Self::Lock,
        Self::Unlock,
        Self::ResetState,
        Self::ConsoleOutput,
        Self::RemoteConsole,
        Self::UpdateMetadata,
        Self::DeleteMetadata,
        Self::UpdateTag,
        Self::UpdateTags,
        Self::DeleteTag,
        Self::DeleteTags,
    ];

    /// The name in nova's refusals.
    pub fn word(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::SoftReboot | Self::HardReboot => "reboot",
            Self::Pause => "pause",
            Self::Unpause => "unpause",
            Self::Suspend => "suspend",
            Self::Resume => "resume",
            Self::Rebuild => "rebuild",
            Self::CreateImage => "createImage",
            Self::LiveMigrate => "os-migrateLive",
            Self::Evacuate => "evacuate",
            Self::Shelve => "shelve",
            Self::ShelveOffload => "shelveOffload",
            Self::Unshelve => "unshelve",
            Self::Resize => "resize",
            Self::ColdMigrate => "migrate",
            Self::ConfirmResize => "confirmResize",
            Self::RevertResize => "revertResize",
            Self::ForceComplete => "force_complete",
            Self::AbortMigration => "abort live migration",
            Self::Delete => "delete",
            Self::ForceDelete => "forceDelete",
            Self::Lock => "lock",
            Self::Unlock => "unlock",
            Self::ResetState => "resetState",
            Self::ConsoleOutput => "get_console_output",
            Self::RemoteConsole => "get_serial_console",
            Self::UpdateMetadata => "update metadata",
            Self::DeleteMetadata => "delete metadata",
            Self::UpdateTag => "update tag",
            Self::UpdateTags => "update tags",
            Self::DeleteTag => "delete tag",
            Self::DeleteTags => "delete tags",
        }
    }

    /// True if a lock stops it for those who are not administrators. Tags are told apart from metadata
    /// here as nova does: whoever may see a locked server may label it, or make an image of it.
    pub fn minds_lock(self) -> bool {
        !matches!(
            self,
            Self::CreateImage
                | Self::Evacuate
                | Self::Lock
                | Self::Unlock
                | Self::ResetState
                | Self::ConsoleOutput
                | Self::RemoteConsole
                | Self::UpdateTag
                | Self::UpdateTags
                | Self::DeleteTag
                | Self::DeleteTags
        )
    }
}

/// Why an action was not admitted; 409 at the API.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    #[error("Instance {server} is locked")]
    Locked { server: String },
    #[error("Instance {server} is not ready")]
    NotReady { server: String },
    #[error("Cannot '{action}' instance {server} while it is in {field} {value}")]
    State {
        action: &'static str,
        server: String,
        field: &'static str,
        value: &'static str,
    },
    #[error("Instance {server} is in an invalid state for '{action}'")]
    NotUnderWay {
        action: &'static str,
        server: String,
    },
    #[error("Instance {server} is in an invalid state for '{action}'")]
    NeverLaunched {
        action: &'static str,
        server: String,
    },
}

/// What [`admit`] looks at.
#[derive(Debug, Clone, Copy)]
pub struct Situation<'a> {
    pub server: &'a str,
    pub state: ServerState,
    /// A host has been chosen.
    pub placed: bool,
    /// It ran at least once.
    pub launched: bool,
    /// Locked, and the caller may not override it.
    pub locked: bool,
}

/// Decides whether `action` may begin now: the table server state × action.
///
/// The order is nova's, so that of several reasons the same one is named: lock, host, vm_state,
/// task_state, never launched.
pub fn admit(action: Action, situation: Situation<'_>) -> Result<(), Conflict> {
    let server = || situation.server.to_owned();
    if situation.locked && action.minds_lock() {
        return Err(Conflict::Locked { server: server() });
    }
    if needs_host(action) && !situation.placed {
        return Err(Conflict::NotReady { server: server() });
    }
    let projection = situation.state.project();
    if let Some(allowed) = standings(action)
        && !situation
            .state
            .standing()
            .is_some_and(|standing| allowed.contains(&standing))
    {
        return Err(Conflict::State {
            action: action.word(),
            server: server(),
            field: "vm_state",
            value: projection.vm_state,
        });
    }
    if let Some(task) = projection
        .task_state
        .filter(|_| !passes_task(action, situation.state))
    {
        return Err(Conflict::State {
            action: action.word(),
            server: server(),
            field: "task_state",
            value: task,
        });
    }
    if matches!(action, Action::ForceComplete | Action::AbortMigration)
        && projection.task_state.is_none()
    {
        return Err(Conflict::NotUnderWay {
            action: action.word(),
            server: server(),
        });
    }
    if needs_launch(action) && !situation.launched {
        return Err(Conflict::NeverLaunched {
            action: action.word(),
            server: server(),
        });
    }
    if action == Action::RemoteConsole && !has_line(situation.state) {
        return Err(Conflict::NotReady { server: server() });
    }
    Ok(())
}

/// Its guest has a serial line, as far as the server's state says.
fn has_line(state: ServerState) -> bool {
    let standing = match state {
        ServerState::Resized(runs) | ServerState::Confirming(runs) => Some(runs),
        other => other.standing(),
    };
    matches!(standing, Some(Standing::Active | Standing::Paused))
}

/// The vm_states that an action is allowed in; `None`: any.
fn standings(action: Action) -> Option<&'static [Standing]> {
    use Standing::{Active, Error, Paused, Resized, Shelved, ShelvedOffloaded, Stopped, Suspended};
    match action {
        Action::Start => Some(&[Stopped]),
        Action::Stop => Some(&[Active, Error]),
        Action::SoftReboot => Some(&[Active]),
        Action::HardReboot => Some(&[Active, Stopped, Paused, Suspended, Error]),
        Action::Pause | Action::Suspend => Some(&[Active]),
        Action::Unpause => Some(&[Paused]),
        Action::Resume => Some(&[Suspended]),
        Action::Rebuild | Action::Evacuate => Some(&[Active, Stopped, Error]),
        Action::LiveMigrate => Some(&[Active, Paused]),
        Action::CreateImage | Action::Shelve => Some(&[Active, Paused, Suspended, Stopped]),
        Action::ShelveOffload => Some(&[Shelved]),
        Action::Unshelve => Some(&[Shelved, ShelvedOffloaded]),
        Action::Resize | Action::ColdMigrate => Some(&[Active, Stopped]),
        Action::ConfirmResize | Action::RevertResize => Some(&[Resized]),
        Action::UpdateMetadata
        | Action::DeleteMetadata
        | Action::UpdateTag
        | Action::UpdateTags
        | Action::DeleteTag
        | Action::DeleteTags => Some(&[Active, Paused, Suspended, Stopped]),
        Action::ForceComplete
        | Action::AbortMigration
        | Action::Delete
        | Action::ForceDelete
        | Action::Lock
        | Action::Unlock
        | Action::ResetState
        | Action::ConsoleOutput
        | Action::RemoteConsole => None,
    }
}

/// Whether an action may begin while an operation is under way.
fn passes_task(action: Action, state: ServerState) -> bool {
    match action {
        Action::Start
        | Action::Stop
        | Action::SoftReboot
        | Action::Pause
        | Action::Unpause
        | Action::Suspend
        | Action::Resume
        | Action::Rebuild
        | Action::CreateImage
        | Action::LiveMigrate
        | Action::Shelve
        | Action::Unshelve
        | Action::Resize
        | Action::ColdMigrate
        | Action::ConfirmResize
        | Action::RevertResize => false,
        // Its host does nothing any more, whatever was under way there; a resize goes back by itself.
        Action::Evacuate => !matches!(
            state,
            ServerState::Deleting(_) | ServerState::Resizing(..) | ServerState::Reverting
        ),
        // It is under way: clients that see SHELVED ask for it.
        Action::ShelveOffload => state == ServerState::Offloading,
        Action::ForceComplete | Action::AbortMigration => {
            matches!(state, ServerState::Migrating(_))
        }
        // A hard reboot is the way out of a soft one, of a pause, or of a suspend, that hangs.
        Action::HardReboot => matches!(
            state,
            ServerState::SoftRebooting
                | ServerState::HardRebooting(_)
                | ServerState::Pausing
                | ServerState::Unpausing
                | ServerState::Suspending
                | ServerState::Resuming
        ),
        Action::RemoteConsole => {
            !matches!(state, ServerState::Deleting(_) | ServerState::Migrating(_))
        }
        _ => true,
    }
}

fn needs_host(action: Action) -> bool {
    matches!(
        action,
        Action::Start | Action::Stop | Action::ConsoleOutput | Action::RemoteConsole
    )
}

fn needs_launch(action: Action) -> bool {
    matches!(
        action,
        Action::Start
            | Action::Stop
            | Action::SoftReboot
            | Action::HardReboot
            | Action::Pause
            | Action::Unpause
            | Action::Suspend
            | Action::Resume
            | Action::Rebuild
            | Action::CreateImage
            | Action::LiveMigrate
            | Action::Evacuate
            | Action::Shelve
            | Action::ShelveOffload
            | Action::Unshelve
            | Action::Resize
            | Action::ColdMigrate
            | Action::ConfirmResize
            | Action::RevertResize
            | Action::UpdateMetadata
            | Action::DeleteMetadata
    )
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
