//! The table of state and action, and what users read when the answer is no.

use super::*;

/// Columns of the table: every state, in the order of its rows' marks.
const COLUMNS: [&str; 41] = [
    "building:scheduling",
    "building:spawning",
    "active",
    "paused",
    "stopped",
    "error",
    "starting",
    "stopping:active",
    "pausing",
    "unpausing",
    "soft_rebooting",
    "hard_rebooting:active",
    "hard_rebooting:stopped",
    "rebuilding:active",
    "deleting:active",
    "deleted",
    "crashed",
    "suspended",
    "suspending",
    "resuming",
    "migrating:active",
    "image_snapshot_pending:active",
    "image_snapshot:active",
    "image_pending_upload:active",
    "image_uploading:active",
    "shelving:active",
    "shelving_image_pending_upload:active",
    "shelving_image_uploading:active",
    "shelved",
    "shelving_offloading",
    "shelved_offloaded",
    "unshelving:shelved",
    "unshelving:shelved_offloaded",
    "resize_prep:active",
    "resize_migrating:active",
    "resize_migrated:active",
    "resize_finish:active",
    "resized:active",
    "resize_confirming:active",
    "resize_reverting",
    "evacuating:active",
];

/// server state × action: `y` admitted (202), `v` refused for vm_state, `t` for task_state, `r` for
/// not ready, `n` for nothing that is under way (409 each). The situation: placed once past scheduling, launched, not locked.
const TABLE: [(Action, &str); 34] = [
    (Action::Start, "rvvvyvtvvvvvtvvvvvvvvvvvvvvvvvrvrvvvvvvvv"),
    (Action::Stop, "rvyvvyvttvttvttvyvtvttttttttvvrvrttttvvvt"),
    (
        Action::SoftReboot,
        "vvyvvvvttvttvttvvvtvttttttttvvvvvttttvvvt",
    ),
    (
        Action::HardReboot,
        "vvyyyyttyyyyyttvyyyyttttttttvvvvvttttvvvt",
    ),
    (Action::Pause, "vvyvvvvttvttvttvvvtvttttttttvvvvvttttvvvt"),
    (Action::Unpause, "vvvyvvvvvtvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvv"),
    (Action::Suspend, "vvyvvvvttvttvttvvvtvttttttttvvvvvttttvvvt"),
    (Action::Resume, "vvvvvvvvvvvvvvvvvyvtvvvvvvvvvvvvvvvvvvvvv"),
    (Action::Rebuild, "vvyvyytttvtttttvyvtvttttttttvvvvvttttvvvt"),
    (
        Action::CreateImage,
        "vvyyyvtttttttttvvyttttttttttvvvvvttttvvvt",
    ),
    (
        Action::LiveMigrate,
        "vvyyvvvtttttvttvvvtvttttttttvvvvvttttvvvt",
    ),
    (
        Action::Evacuate,
        "vvyvyyyyyvyyyytvyvyvyyyyyyyyvvvvvttttvvvy",
    ),
    (Action::Shelve, "vvyyyvtttttttttvvyttttttttttvvvvvttttvvvt"),
    (
        Action::ShelveOffload,
        "vvvvvvvvvvvvvvvvvvvvvvvvvvvvyyvtvvvvvvvvv",
    ),
    (
        Action::Unshelve,
        "vvvvvvvvvvvvvvvvvvvvvvvvvvvvytyttvvvvvvvv",
    ),
    (Action::Resize, "vvyvyvtttvtttttvvvtvttttttttvvvvvttttvvvt"),
    (
        Action::ColdMigrate,
        "vvyvyvtttvtttttvvvtvttttttttvvvvvttttvvvt",
    ),
    (
        Action::ConfirmResize,
        "vvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvyttv",
    ),
    (
        Action::RevertResize,
        "vvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvvyttv",
    ),
    (
        Action::ForceComplete,
        "ttnnnntttttttttnnnttytttttttntnttttttnttt",
    ),
    (
        Action::AbortMigration,
        "ttnnnntttttttttnnnttytttttttntnttttttnttt",
    ),
    (Action::Delete, "yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy"),
    (
        Action::ForceDelete,
        "yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy",
    ),
    (Action::Lock, "yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy"),
    (Action::Unlock, "yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy"),
    (
        Action::ResetState,
        "yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy",
    ),
    (
        Action::ConsoleOutput,
        "ryyyyyyyyyyyyyyyyyyyyyyyyyyyyyryryyyyyyyy",
    ),
    (
        Action::RemoteConsole,
        "rryyrrryyyyyrytrrryrtyyyyyyyrrrrryyyyyyry",
    ),
    (
        Action::UpdateMetadata,
        "vvyyyvyyyyyyyyyvvyyyyyyyyyyyvvvvvyyyyvvvy",
    ),
    (
        Action::DeleteMetadata,
        "vvyyyvyyyyyyyyyvvyyyyyyyyyyyvvvvvyyyyvvvy",
    ),
    (
        Action::UpdateTag,
        "vvyyyvyyyyyyyyyvvyyyyyyyyyyyvvvvvyyyyvvvy",
    ),
    (
        Action::UpdateTags,
        "vvyyyvyyyyyyyyyvvyyyyyyyyyyyvvvvvyyyyvvvy",
    ),
    (
        Action::DeleteTag,
        "vvyyyvyyyyyyyyyvvyyyyyyyyyyyvvvvvyyyyvvvy",
    ),
    (
        Action::DeleteTags,
        "vvyyyvyyyyyyyyyvvyyyyyyyyyyyvvvvvyyyyvvvy",
    ),
];

fn situation(state: ServerState) -> Situation<'static> {
    Situation {
        server: "S",
        state,
        placed: !matches!(
            state,
            ServerState::Building(Build::Scheduling)
                | ServerState::ShelvedOffloaded
                | ServerState::Unshelving(Standing::ShelvedOffloaded)
        ),
        launched: !matches!(state, ServerState::Building(_)),
        locked: false,
    }
}

#[test]
fn the_table_of_state_and_action_is_kept() {
    for (action, marks) in TABLE {
        let marks: String = marks.split_whitespace().collect();
        assert_eq!(marks.len(), COLUMNS.len(), "{action:?}");
        for (column, mark) in COLUMNS.iter().zip(marks.chars()) {
            let state = ServerState::from_key(column).unwrap();
            let got = match admit(action, situation(state)) {
                Ok(()) => 'y',
                Err(Conflict::State {
                    field: "vm_state", ..
                }) => 'v',
                Err(Conflict::State { .. }) => 't',
                Err(Conflict::NotReady { .. }) => 'r',
                Err(Conflict::NotUnderWay { .. }) => 'n',
                Err(other) => panic!("{action:?} in {column}: {other}"),
            };
            assert_eq!(got, mark, "{action:?} in {column}");
        }
    }
}

#[test]
fn the_table_covers_every_action_and_every_kind_of_state() {
    for action in Action::ALL {
        assert!(TABLE.iter().any(|(row, _)| *row == action), "{action:?}");
    }
    for state in ServerState::all() {
        let key = state.key();
        let kind = key.split(':').next().unwrap();
        assert!(
            COLUMNS
                .iter()
                .any(|column| column.split(':').next() == Some(kind)),
            "{key}"
        );
    }
}

#[test]
fn refusals_read_like_novas() {
    let refusal = |action, state| admit(action, situation(state)).unwrap_err().to_string();
    assert_eq!(
        refusal(Action::Pause, ServerState::Stopped),
        "Cannot 'pause' instance S while it is in vm_state stopped"
    );
    assert_eq!(
        refusal(Action::Stop, ServerState::SoftRebooting),
        "Cannot 'stop' instance S while it is in task_state rebooting"
    );
    assert_eq!(
        refusal(Action::Start, ServerState::Active),
        "Cannot 'start' instance S while it is in vm_state active"
    );
    let locked = Situation {
        locked: true,
        ..situation(ServerState::Active)
    };
    assert_eq!(
        admit(Action::Stop, locked).unwrap_err().to_string(),
        "Instance S is locked"
    );
    assert_eq!(admit(Action::Unlock, locked), Ok(()));
    let unborn = Situation {
        launched: false,
        ..situation(ServerState::Error)
    };
    assert_eq!(
        admit(Action::Rebuild, unborn).unwrap_err().to_string(),
        "Instance S is in an invalid state for 'rebuild'"
    );
}

#[test]
fn a_state_survives_the_database() {
    for state in ServerState::all() {
        assert_eq!(ServerState::from_key(&state.key()), Some(state));
    }
    assert_eq!(ServerState::from_key("dancing"), None);
}

#[test]
fn the_projection_is_novas() {
    let projected = |key: &str| {
        let p = ServerState::from_key(key).unwrap().project();
        (p.status, p.vm_state, p.task_state, p.power_state as u8)
    };
    assert_eq!(
        projected("building:scheduling"),
        ("BUILD", "building", Some("scheduling"), 0)
    );
    assert_eq!(
        projected("building:spawning"),
        ("BUILD", "building", Some("spawning"), 0)
    );
    assert_eq!(projected("active"), ("ACTIVE", "active", None, 1));
    assert_eq!(projected("paused"), ("PAUSED", "paused", None, 3));
    assert_eq!(projected("suspended"), ("SUSPENDED", "suspended", None, 4));
    assert_eq!(projected("stopped"), ("SHUTOFF", "stopped", None, 4));
    assert_eq!(projected("error"), ("ERROR", "error", None, 0));
    assert_eq!(
        projected("starting"),
        ("SHUTOFF", "stopped", Some("powering-on"), 4)
    );
    assert_eq!(
        projected("stopping:active"),
        ("ACTIVE", "active", Some("powering-off"), 1)
    );
    assert_eq!(
        projected("suspending"),
        ("ACTIVE", "active", Some("suspending"), 1)
    );
    assert_eq!(
        projected("resuming"),
        ("SUSPENDED", "suspended", Some("resuming"), 4)
    );
    assert_eq!(
        projected("soft_rebooting"),
        ("REBOOT", "active", Some("rebooting"), 1)
    );
    assert_eq!(
        projected("hard_rebooting:active"),
        ("HARD_REBOOT", "active", Some("rebooting_hard"), 1)
    );
    assert_eq!(
        projected("hard_rebooting:stopped"),
        ("SHUTOFF", "stopped", Some("rebooting_hard"), 4)
    );
    assert_eq!(
        projected("rebuilding:error"),
        ("REBUILD", "error", Some("rebuilding"), 0)
    );
    assert_eq!(
        projected("migrating:active"),
        ("MIGRATING", "active", Some("migrating"), 1)
    );
    assert_eq!(
        projected("migrating:paused"),
        ("MIGRATING", "paused", Some("migrating"), 3)
    );
    assert_eq!(
        projected("evacuating:stopped"),
        ("REBUILD", "stopped", Some("rebuilding"), 4)
    );
    for (key, task) in [
        ("shelving:active", "shelving"),
        (
            "shelving_image_pending_upload:active",
            "shelving_image_pending_upload",
        ),
        (
            "shelving_image_uploading:active",
            "shelving_image_uploading",
        ),
    ] {
        assert_eq!(projected(key), ("ACTIVE", "active", Some(task), 1));
    }
    assert_eq!(projected("shelved"), ("SHELVED", "shelved", None, 4));
    assert_eq!(
        projected("shelving_offloading"),
        ("SHELVED", "shelved", Some("shelving_offloading"), 4)
    );
    let offloaded = "shelved_offloaded";
    assert_eq!(
        projected(offloaded),
        ("SHELVED_OFFLOADED", offloaded, None, 4)
    );
    assert_eq!(
        projected("unshelving:shelved_offloaded"),
        ("SHELVED_OFFLOADED", offloaded, Some("unshelving"), 4)
    );
    assert_eq!(
        projected("deleting:active"),
        ("ACTIVE", "active", Some("deleting"), 1)
    );
    assert_eq!(projected("deleted"), ("DELETED", "deleted", None, 0));
}

#[test]
fn a_status_finds_the_states_that_show_it() {
    let keys: Vec<String> = ServerState::of_status("shutoff")
        .iter()
        .map(|s| s.key())
        .collect();
    assert_eq!(
        keys,
        [
            "stopped",
            "starting",
            "image_snapshot_pending:stopped",
            "image_snapshot:stopped",
            "image_pending_upload:stopped",
            "image_uploading:stopped",
            "shelving:stopped",
            "shelving_image_pending_upload:stopped",
            "shelving_image_uploading:stopped",
            "stopping:stopped",
            "hard_rebooting:stopped",
            "deleting:stopped"
        ]
    );
    assert!(ServerState::of_status("nonsense").is_empty());
}
