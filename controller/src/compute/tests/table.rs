//! The table server state × action, over HTTP: every state there is, every endpoint that does
//! something to a server, the status, the error's words, and that a refusal writes nothing.
//!
//! What is expected does not come from [`state::admit`](crate::compute::model::state::admit), which is
//! what is tested, but from nova's own decorators, written down here one by one ([`NOVA`]: nova 34,
//! `nova/compute/api.py` and the controllers that put words to them), applied to the vm_state and
//! task_state that our API shows. Where this cloud differs on purpose, [`differs`] says so and why.

use sea_orm::{ActiveValue::Set, EntityTrait, IntoActiveModel};

use super::*;
use crate::compute::model::state::{Build, ServerState, Standing};
use crate::compute::store::{console, server};
use crate::http::Endpoint;
use crate::reconcile::machine::row as machines;
use crate::reconcile::migration;
use crate::{event, operation};

/// The task_states that a decorator lets through.
#[derive(Debug, Clone, Copy)]
enum Tasks {
    /// `task_state=None`
    Any,
    /// The default, `task_state=(None,)`: nothing is under way.
    Idle,
    /// `task_states.ALLOW_REBOOT`, and nothing under way.
    Reboot,
    /// `reject_instance_state(task_state=[DELETING, MIGRATING])`
    NotDeleting,
}

/// What nova asks before it does an action.
#[derive(Debug, Clone, Copy)]
struct Decorated {
    /// Method, path below `/v2.1/servers/{id}`, and the action's key.
    endpoint: &'static str,
    /// As the controller names it in a refusal.
    word: &'static str,
    /// `check_instance_lock`
    lock: bool,
    /// `check_instance_host`
    host: bool,
    /// `vm_state=`; none: any.
    vm_states: Option<&'static [&'static str]>,
    tasks: Tasks,
    /// `must_have_launched`
    launched: bool,
    /// The status when it is admitted.
    done: u16,
    /// An operation carries it out.
    operation: bool,
}

const FREE: Decorated = Decorated {
    endpoint: "",
    word: "",
    lock: false,
    host: false,
    vm_states: None,
    tasks: Tasks::Any,
    launched: false,
    done: 202,
    operation: false,
};

/// `check_instance_lock` and `check_instance_state` with their defaults.
const POWER: Decorated = Decorated {
    lock: true,
    tasks: Tasks::Idle,
    launched: true,
    operation: true,
    ..FREE
};

const METADATA: Decorated = Decorated {
    lock: true,
    vm_states: Some(&["active", "paused", "suspended", "stopped"]),
    launched: true,
    done: 200,
    ..FREE
};

/// `ServerTagsController._check_instance_in_valid_state`: no decorator, no lock.
const TAGS: Decorated = Decorated {
    vm_states: Some(&["active", "paused", "suspended", "stopped"]),
    done: 204,
    ..FREE
};

const CONSOLE: Decorated = Decorated {
    host: true,
    tasks: Tasks::NotDeleting,
    done: 200,
    ..FREE
};

const NOVA: &[Decorated] = &[
    Decorated {
        endpoint: "POST /action os-start",
        word: "start",
        host: true,
        vm_states: Some(&["stopped"]),
        ..POWER
    },
    Decorated {
        endpoint: "POST /action os-stop",
        word: "stop",
        host: true,
        vm_states: Some(&["active", "error"]),
        ..POWER
    },
    Decorated {
        endpoint: "POST /action reboot SOFT",
        word: "reboot",
        vm_states: Some(&["active"]),
        ..POWER
    },
    Decorated {
        endpoint: "POST /action reboot HARD",
        word: "reboot",
        vm_states: Some(&["active", "stopped", "paused", "suspended", "error"]),
        tasks: Tasks::Reboot,
        ..POWER
    },
    Decorated {
        endpoint: "POST /action pause",
        word: "pause",
        vm_states: Some(&["active"]),
        ..POWER
    },
    Decorated {
        endpoint: "POST /action unpause",
        word: "unpause",
        vm_states: Some(&["paused"]),
        ..POWER
    },
    Decorated {
        endpoint: "POST /action suspend",
        word: "suspend",
        vm_states: Some(&["active"]),
        ..POWER
    },
    Decorated {
        endpoint: "POST /action resume",
        word: "resume",
        vm_states: Some(&["suspended"]),
        ..POWER
    },
    Decorated {
        endpoint: "POST /action rebuild",
        word: "rebuild",
        vm_states: Some(&["active", "stopped", "error"]),
        ..POWER
    },
    Decorated {
        endpoint: "POST /action createImage",
        word: "createImage",
        lock: false,
        vm_states: Some(&["active", "paused", "suspended", "stopped"]),
        ..POWER
    },
    Decorated {
        endpoint: "POST /action os-migrateLive",
        word: "os-migrateLive",
        // An administrator's, whom no lock stops.
        lock: false,
        vm_states: Some(&["active", "paused"]),
        ..POWER
    },
    Decorated {
        endpoint: "POST /action evacuate",
        word: "evacuate",
        // An administrator's, whom no lock stops.
        lock: false,
        vm_states: Some(&["active", "stopped", "error"]),
        tasks: Tasks::Any,
        done: 200,
        ..POWER
    },
    Decorated {
        endpoint: "POST /action shelve",
        word: "shelve",
        vm_states: Some(&["active", "stopped", "paused", "suspended"]),
        ..POWER
    },
    Decorated {
        endpoint: "POST /action shelveOffload",
        word: "shelveOffload",
        // An administrator's, whom no lock stops.
        lock: false,
        vm_states: Some(&["shelved"]),
        ..POWER
    },
    Decorated {
        endpoint: "POST /action unshelve",
        word: "unshelve",
        vm_states: Some(&["shelved", "shelved_offloaded"]),
        ..POWER
    },
    Decorated {
        endpoint: "POST /action resize",
        word: "resize",
        vm_states: Some(&["active", "stopped"]),
        ..POWER
    },
    Decorated {
        endpoint: "POST /action migrate",
        word: "migrate",
        // An administrator's, whom no lock stops.
        lock: false,
        vm_states: Some(&["active", "stopped"]),
        ..POWER
    },
    Decorated {
        endpoint: "POST /action confirmResize",
        word: "confirmResize",
        vm_states: Some(&["resized"]),
        done: 204,
        ..POWER
    },
    Decorated {
        endpoint: "POST /action revertResize",
        word: "revertResize",
        vm_states: Some(&["resized"]),
        ..POWER
    },
    Decorated {
        endpoint: "POST /action forceDelete",
        lock: true,
        operation: true,
        ..FREE
    },
    Decorated {
        endpoint: "DELETE ",
        lock: true,
        done: 204,
        operation: true,
        ..FREE
    },
    Decorated {
        endpoint: "POST /action lock",
        ..FREE
    },
    Decorated {
        endpoint: "POST /action unlock",
        ..FREE
    },
    Decorated {
        endpoint: "POST /action os-resetState",
        ..FREE
    },
    Decorated {
        endpoint: "PUT ",
        done: 200,
        ..FREE
    },
    Decorated {
        endpoint: "POST /action os-getConsoleOutput",
        host: true,
        done: 200,
        ..FREE
    },
    Decorated {
        endpoint: "POST /action os-getSerialConsole",
        word: "get_serial_console",
        ..CONSOLE
    },
    Decorated {
        endpoint: "POST /action os-getVNCConsole",
        word: "get_vnc_console",
        ..CONSOLE
    },
    Decorated {
        endpoint: "POST /action os-getSPICEConsole",
        word: "get_spice_console",
        ..CONSOLE
    },
    Decorated {
        endpoint: "POST /remote-consoles",
        word: "get_serial_console",
        ..CONSOLE
    },
    Decorated {
        endpoint: "POST /metadata",
        word: "update metadata",
        ..METADATA
    },
    Decorated {
        endpoint: "PUT /metadata",
        word: "update metadata",
        ..METADATA
    },
    Decorated {
        endpoint: "PUT /metadata/{key}",
        word: "update metadata",
        ..METADATA
    },
    Decorated {
        endpoint: "DELETE /metadata/{key}",
        word: "delete metadata",
        done: 204,
        ..METADATA
    },
    Decorated {
        endpoint: "PUT /tags",
        word: "update tags",
        done: 200,
        ..TAGS
    },
    Decorated {
        endpoint: "PUT /tags/{tag}",
        word: "update tag",
        done: 201,
        ..TAGS
    },
    Decorated {
        endpoint: "DELETE /tags",
        word: "delete tags",
        ..TAGS
    },
    Decorated {
        endpoint: "DELETE /tags/{tag}",
        word: "delete tag",
        ..TAGS
    },
];

/// A server as it is asked.
#[derive(Debug, Clone, Copy)]
struct Situation {
    state: ServerState,
    placed: bool,
    launched: bool,
    locked: bool,
}

impl Situation {
    /// As a server of this state is, not locked.
    fn usual(state: ServerState) -> Self {
        Self {
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
}

/// What an answer is to be.
#[derive(Debug, PartialEq, Eq)]
enum Expected {
    Done,
    /// A status, the key of its error's body, and the message.
    Refused(u16, &'static str, String),
}

fn conflict(message: String) -> Expected {
    Expected::Refused(409, "conflictingRequest", message)
}

impl Decorated {
    /// What nova answers, decorator by decorator, of a server that shows these states.
    fn verdict(
        &self,
        id: &str,
        situation: Situation,
        vm_state: &str,
        task: Option<&str>,
    ) -> Expected {
        let word = self.word;
        let state = |attribute: &str, value: &str| {
            conflict(format!(
                "Cannot '{word}' instance {id} while it is in {attribute} {value}"
            ))
        };
        if self.lock && situation.locked {
            return conflict(format!("Instance {id} is locked"));
        }
        if self.host && !situation.placed {
            return conflict(format!("Instance {id} is not ready"));
        }
        if self
            .vm_states
            .is_some_and(|allowed| !allowed.contains(&vm_state))
        {
            return state("vm_state", vm_state);
        }
        let passes = |task: &str| match self.tasks {
            Tasks::Any => true,
            Tasks::Idle => false,
            Tasks::Reboot => [
                "rebooting",
                "rebooting_hard",
                "pausing",
                "unpausing",
                "suspending",
                "resuming",
            ]
            .contains(&task),
            Tasks::NotDeleting => !["deleting", "migrating"].contains(&task),
        };
        if let Some(task) = task.filter(|task| !passes(task)) {
            return state("task_state", task);
        }
        if self.launched && !situation.launched {
            return conflict(format!("Instance {id} is in an invalid state for '{word}'"));
        }
        Expected::Done
    }

    /// What this cloud says instead of nova, on purpose.
    fn differs(
        &self,
        id: &str,
        (state, task): (ServerState, Option<&str>),
        nova: &Expected,
    ) -> Option<Expected> {
        // A server that is resized has a process, or none, as its state says.
        let standing = match state {
            ServerState::Resized(runs) | ServerState::Confirming(runs) => Some(runs),
            other => other.standing(),
        };
        let has_line = matches!(standing, Some(Standing::Active | Standing::Paused));
        match self.word {
            // It is what is under way.
            "shelveOffload" if task == Some("shelving_offloading") => Some(Expected::Done),
            // A resize goes back by itself.
            "evacuate" if *nova == Expected::Done => {
                let task = task.filter(|task| *task == "deleting" || task.starts_with("resize_"));
                task.map(|task| {
                    let why = format!("task_state {task}");
                    conflict(format!(
                        "Cannot 'evacuate' instance {id} while it is in {why}"
                    ))
                })
            }
            // No host of this cloud has them, whatever the server's state.
            "get_vnc_console" => Some(unavailable("novnc")),
            "get_spice_console" => Some(unavailable("spice-html5")),
            // nova asks its driver; ours has a line while there is a process.
            "get_serial_console" if *nova == Expected::Done && !has_line => {
                Some(conflict(format!("Instance {id} is not ready")))
            }
            _ => None,
        }
    }

    /// The caller, the microversion, and the body.
    fn request(&self) -> (&'static str, &'static str, Value) {
        let (_, rest) = self.endpoint.split_once(' ').unwrap();
        if let Some(action) = rest.strip_prefix("/action ") {
            let (name, kind) = action.split_once(' ').unwrap_or((action, ""));
            let (who, given) = match name {
                "reboot" => ("one", json!({"type": kind})),
                "rebuild" => ("one", json!({"imageRef": DISK})),
                "os-resetState" => ("admin", json!({"state": "error"})),
                "shelveOffload" | "migrate" => ("admin", Value::Null),
                "resize" => ("one", json!({"flavorRef": "2"})),
                "evacuate" => return ("admin", "2.96", json!({"evacuate": {}})),
                "os-migrateLive" => {
                    let given = json!({"host": null, "block_migration": "auto"});
                    return ("admin", "2.96", json!({ name: given }));
                }
                "createImage" => ("one", json!({"name": "of-it"})),
                "os-getConsoleOutput" => ("one", json!({})),
                "os-getSerialConsole" => ("one", json!({"type": "serial"})),
                "os-getVNCConsole" => ("one", json!({"type": "novnc"})),
                "os-getSPICEConsole" => ("one", json!({"type": "spice-html5"})),
                _ => ("one", Value::Null),
            };
            return (who, "", json!({ name: given }));
        }
        let body = match self.endpoint {
            "PUT " => json!({"server": {"name": "new"}}),
            "POST /metadata" | "PUT /metadata" => json!({"metadata": {"key": "new"}}),
            "PUT /metadata/{key}" => json!({"meta": {"key": "new"}}),
            "PUT /tags" => json!({"tags": ["green"]}),
            "POST /remote-consoles" => {
                json!({"remote_console": {"protocol": "serial", "type": "serial"}})
            }
            _ => Value::Null,
        };
        ("one", "2.96", body)
    }
}

fn unavailable(kind: &str) -> Expected {
    let message = format!("Unavailable console type {kind}.");
    Expected::Refused(400, "badRequest", message)
}

/// Endpoints of the table of routes that do something to a server, as [`Decorated`] names them; a reboot
/// is two actions.
fn served(cloud: &Cloud) -> Vec<String> {
    let name = |endpoint: &Endpoint| {
        let below = endpoint.path.strip_prefix("/v2.1/servers/{id}")?;
        let name = match endpoint.action {
            Some(action) => format!("{} {below} {action}", endpoint.method),
            None => format!("{} {below}", endpoint.method),
        };
        // What is done to a migration is tried with one, in `migrations`.
        let changes = endpoint.method != Method::GET
            && name != "POST /action"
            && !below.starts_with("/migrations");
        changes.then_some(name)
    };
    let kinds = |name: String| match name.as_str() {
        "POST /action reboot" => vec![format!("{name} SOFT"), format!("{name} HARD")],
        _ => vec![name],
    };
    cloud
        .public
        .endpoints()
        .filter_map(name)
        .flat_map(kinds)
        .collect()
}

/// All that is known of a server, and all console tokens.
async fn written(cloud: &Cloud, id: &str) -> Vec<String> {
    let reader = cloud.app.database().reader();
    let row = server::find_any(reader, id).await.unwrap();
    let known = machines::Entity::find_by_id(id).one(reader).await.unwrap();
    let open = operation::unfinished(reader, Some(id)).await.unwrap();
    let events = event::of_subject(reader, id).await.unwrap();
    let tokens = console::Entity::find().all(reader).await.unwrap();
    vec![
        format!("{row:?}"),
        format!("{known:?}"),
        format!("{open:?}"),
        format!("{events:?}"),
        format!("{tokens:?}"),
    ]
}

/// A server like `model`, in this situation.
async fn server_in(
    cloud: &Cloud,
    model: &server::Model,
    known: &machines::Model,
    situation: Situation,
) -> String {
    let id = cloud.app.random().uuid().to_string();
    let mut row = model.clone();
    row.id.clone_from(&id);
    row.state = situation.state.key();
    row.tags = json!(["blue"]).to_string();
    row.metadata = json!({"key": "value"}).to_string();
    if !situation.launched {
        row.launched_at_us = None;
    }
    if situation.state == ServerState::Deleted {
        row.deleted_at_us = Some(1);
    }
    let standing = situation.state.standing();
    if matches!(
        standing,
        Some(Standing::Shelved | Standing::ShelvedOffloaded)
    ) {
        row.shelved_image_id = Some(DISK.to_owned());
    }
    let moved = (standing == Some(Standing::Resized)).then(|| moved(&row, known));
    row.locked_by = situation.locked.then(|| "owner".to_owned());
    let mut owned = known.clone().into_active_model();
    owned.server_id = Set(id.clone());
    let insert = cloud.app.database().write(move |tx| {
        let (row, owned, moved) = (row.clone(), owned.clone(), moved.clone());
        Box::pin(async move {
            server::insert(tx, row).await?;
            if let Some(moved) = moved {
                migration::insert(tx, moved).await?;
            }
            if situation.placed {
                machines::Entity::insert(owned)
                    .exec_without_returning(tx)
                    .await?;
            }
            Ok::<(), sea_orm::DbErr>(())
        })
    });
    insert.await.unwrap();
    id
}

/// That it was resized where it is.
fn moved(row: &server::Model, known: &machines::Model) -> migration::Model {
    let wanted: Value = serde_json::from_str(&known.wanted).unwrap();
    let size = json!({
        "flavor": row.flavor, "flavor_id": row.flavor_id, "boot": row.boot, "vcpus": row.vcpus,
        "ram": row.ram, "spec": wanted["spec"],
    });
    let before = json!({"size": size, "ran": true, "rebuilds": 0, "copy": null});
    let host = known.host_id.clone().unwrap();
    migration::Model {
        id: 0,
        uuid: row.id.clone(),
        server_id: row.id.clone(),
        source_id: host.clone(),
        source: "host-1".to_owned(),
        target_id: Some(host),
        target: Some("host-1".to_owned()),
        status: migration::Status::Finished.word().to_owned(),
        flavor_id: row.flavor_id.clone(),
        user_id: None,
        project_id: None,
        progress: None,
        reason: None,
        created_at_us: 1,
        updated_at_us: 1,
        ended_at_us: None,
        kind: migration::Purpose::Resize.word().to_owned(),
        new_flavor_id: None,
        before: Some(before.to_string()),
    }
}

/// Tries one action on one server; what is wrong with the answer.
async fn try_it(
    cloud: &Cloud,
    (model, known): (&server::Model, &machines::Model),
    action: &Decorated,
    situation: Situation,
) -> Option<String> {
    // One whose host was declared to be down is taken only there.
    let mut known = known.clone();
    if action.word == "evacuate" {
        known.host_id = Some(cloud.other(2).to_string());
    }
    let id = server_in(cloud, model, &known, situation).await;
    let shown = cloud
        .get("admin", &format!("/v2.1/servers/{id}"), "")
        .await
        .json;
    let shown = &shown["server"];
    let expected = match shown["OS-EXT-STS:vm_state"].as_str() {
        None => {
            let message = format!("Instance {id} could not be found.");
            Expected::Refused(404, "itemNotFound", message)
        }
        Some(vm_state) => {
            let task = shown["OS-EXT-STS:task_state"].as_str();
            let nova = action.verdict(&id, situation, vm_state, task);
            action
                .differs(&id, (situation.state, task), &nova)
                .unwrap_or(nova)
        }
    };
    let before = written(cloud, &id).await;
    let (who, version, body) = action.request();
    let (method, rest) = action.endpoint.split_once(' ').unwrap();
    let below = rest.split(' ').next().unwrap();
    let below = below.replace("{key}", "key");
    let tag = if method == "PUT" { "green" } else { "blue" };
    let path = format!("/v2.1/servers/{id}{}", below.replace("{tag}", tag));
    let method = Method::from_bytes(method.as_bytes()).unwrap();
    let answer = cloud.call(who, method, &path, version, body).await;
    let after = written(cloud, &id).await;
    let open = operation::unfinished(cloud.app.database().reader(), Some(&id))
        .await
        .unwrap();
    let right = match &expected {
        Expected::Done => status(&answer) == action.done && open.is_empty() != action.operation,
        Expected::Refused(code, key, message) => {
            let error = json!({ *key: {"code": code, "message": message} });
            status(&answer) == *code && answer.json == error && before == after
        }
    };
    // A delete of what is being deleted already has nothing to begin, nor has what lets go of what goes.
    let endpoint = action.endpoint.to_lowercase();
    let begun = match situation.state {
        ServerState::Deleting(_) => endpoint.contains("delete"),
        ServerState::Offloading => endpoint.contains("shelveoffload"),
        _ => false,
    };
    let again = begun && status(&answer) == action.done && before == after;
    (!right && !again).then(|| {
        let (code, json) = (status(&answer), &answer.json);
        let unchanged = before == after;
        format!(
            "{} in {situation:?}: {code} {json}, not {expected:?}; unchanged: {unchanged}, open: {}",
            action.endpoint,
            open.len()
        )
    })
}

async fn a_still_cloud() -> (Cloud, server::Model, machines::Model) {
    let cloud = Cloud::new().await;
    // As large: no quota is in its way.
    let other = json!({"flavor": {"name": "other", "id": "2", "ram": 256, "vcpus": 1, "disk": 1}});
    let made = cloud.call("admin", Method::POST, "/v2.1/flavors", "", other);
    assert_eq!(status(&made.await), 200);
    let id = cloud.running("one", "model").await;
    let host = cloud.join(2).await.id();
    cloud.still().await;
    // Nobody hears the first one any more, and the table takes longer than a host may be silent.
    cloud.fleet.last_heard(cloud.other(1), i64::MAX);
    let declare = cloud.app.database().write(move |tx| {
        Box::pin(async move { crate::agents::host::set_forced_down(tx, host, true).await })
    });
    assert!(declare.await.unwrap());
    let reader = cloud.app.database().reader();
    let model = server::find(reader, &id).await.unwrap().unwrap();
    let known = machines::Entity::find_by_id(&id)
        .one(reader)
        .await
        .unwrap()
        .unwrap();
    (cloud, model, known)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_table_has_every_endpoint_that_does_something_to_a_server() {
    let cloud = Cloud::new().await;
    let mut served = served(&cloud);
    served.sort();
    let mut known: Vec<_> = NOVA
        .iter()
        .map(|action| action.endpoint.to_owned())
        .collect();
    known.sort();
    assert_eq!(served, known);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_action_in_every_state_is_answered_as_nova_answers_it() {
    let (cloud, model, known) = a_still_cloud().await;
    let mut wrong = Vec::new();
    let mut refused = 0;
    for state in ServerState::all() {
        for action in NOVA {
            let situation = Situation::usual(state);
            wrong.extend(try_it(&cloud, (&model, &known), action, situation).await);
            refused += 1;
        }
    }
    assert_eq!(refused, 97 * 38, "states and actions");
    assert!(wrong.is_empty(), "{} wrong: {wrong:#?}", wrong.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lock_no_host_and_never_launched_are_named_as_nova_names_them() {
    let (cloud, model, known) = a_still_cloud().await;
    let mut wrong = Vec::new();
    for state in [
        ServerState::Active,
        ServerState::Stopped,
        ServerState::Error,
    ] {
        let usual = Situation::usual(state);
        let situations = [
            Situation {
                locked: true,
                ..usual
            },
            Situation {
                launched: false,
                ..usual
            },
            Situation {
                locked: true,
                launched: false,
                ..usual
            },
        ];
        for situation in situations {
            for action in NOVA {
                wrong.extend(try_it(&cloud, (&model, &known), action, situation).await);
            }
        }
    }
    // Without a host, only what minds that: the others would be carried out on a host that is not there.
    let lost = Situation {
        placed: false,
        ..Situation::usual(ServerState::Active)
    };
    for action in NOVA.iter().filter(|action| action.host) {
        wrong.extend(try_it(&cloud, (&model, &known), action, lost).await);
    }
    assert!(wrong.is_empty(), "{} wrong: {wrong:#?}", wrong.len());
}
