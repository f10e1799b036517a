//! What may be asked of a server in which state, and what a client is told where it may not.

use super::state::{ServerState, Standing};

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
