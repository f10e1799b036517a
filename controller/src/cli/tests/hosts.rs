//! Operators' commands for whole hosts: taken out of service, drained, evacuated.

use serde_json::{Value, json};

use super::*;

#[tokio::test]
async fn servers_of_a_host_that_is_off_are_evacuated_and_followed() {
    let cloud = cloud_with_a_migration("done").await;
    let line = ["server", "evacuate", SERVER, "--host", "h2", "--wait"];
    cloud.run(&line).await.unwrap();
    let line = ["host", "evacuate", "h1", "--is-off", "--start"];
    cloud.run(&line).await.unwrap();
    let asked = cloud.asked();
    for body in [
        json!({"evacuate": {"host": "h2"}}),
        json!({"forced_down": true}),
        json!({"evacuate": {}}),
    ] {
        assert!(
            asked.iter().any(|(_, _, _, sent)| *sent == body),
            "{body}: {asked:?}"
        );
    }
    // It runs already.
    let start = json!({"os-start": null});
    assert!(asked.iter().all(|(_, _, _, sent)| *sent != start));

    let cloud = cloud_with_a_migration("failed").await;
    let error = cloud.run(&["host", "evacuate", "h1"]).await.unwrap_err();
    assert!(error.to_string().contains("1 of its 1 servers"), "{error}");
    let down = json!({"forced_down": true});
    let asked = cloud.asked();
    assert!(asked.iter().all(|(_, _, _, sent)| *sent != down));
}

/// What was on its way there when the host was disabled comes, and goes on.
#[tokio::test]
async fn a_drained_host_is_drained_of_what_arrives_meanwhile_too() {
    let server = json!({"id": SERVER, "name": "web", "status": "ACTIVE"});
    let coming = json!({"migrations": [
        {"instance_uuid": SERVER, "dest_compute": "h1", "status": "running"},
        {"instance_uuid": "another", "dest_compute": "h2", "status": "running"},
    ]});
    let none = json!({"migrations": []});
    let newest = |to: &str| json!({"migrations": [{"uuid": MIGRATION, "status": "completed", "dest_compute": to}]});
    let list = "GET /compute/v2.1/servers/detail?all_tenants=1&host=h1";
    let migrations = "GET /compute/v2.1/os-migrations?host=h1";
    let kept = "GET /compute/v2.1/os-migrations?host=h1&status=finished";
    let waits = json!({"migrations": [
        {"instance_uuid": "left", "source_compute": "h1", "dest_compute": "h2", "status": "finished"},
        {"instance_uuid": "came", "source_compute": "h2", "dest_compute": "h1", "status": "finished"},
    ]});
    let of_server = format!("GET /compute/v2.1/os-migrations?instance_uuid={SERVER}&limit=1");
    let action = format!("POST /compute/v2.1/servers/{SERVER}/action");
    let host = json!({"hosts": [{"id": "H", "hostname": "h1"}]});
    let cloud = Cloud::start(&[
        ("GET /fractus/v1/hosts", 200, host),
        (
            "PUT /compute/v2.1/os-services/H",
            200,
            json!({"service": {}}),
        ),
        (list, 200, json!({"servers": []})),
        (list, 200, json!({"servers": [server]})),
        (migrations, 200, coming),
        (migrations, 200, none),
        (kept, 200, json!({"migrations": []})),
        (kept, 200, waits),
        (&of_server, 200, newest("h1")),
        (&of_server, 200, newest("h2")),
        (&action, 202, Value::Null),
    ])
    .await;
    cloud.run(&["host", "drain", "h1"]).await.unwrap();
    let asked = cloud.asked();
    let sent = asked.iter().filter(|(method, ..)| method == "POST");
    let sent: Vec<&Value> = sent
        .map(|(.., body)| body)
        .filter(|body| !body["os-migrateLive"].is_null())
        .collect();
    assert_eq!(sent.len(), 1, "{asked:?}");
    // What it still has of a server that may come back is said, and it is not drained.
    let error = cloud.run(&["host", "drain", "h1"]).await.unwrap_err();
    assert!(error.to_string().contains("disks of 1 others"), "{error}");
}

const OTHER: &str = "33333333-3333-4333-8333-333333333333";
const LIST: &str = "GET /compute/v2.1/servers/detail?all_tenants=1&host=h1";

/// What a cloud with a host h1 answers to all that is no server's, with no migration that has come or stays.
fn of_host(servers: Value) -> Vec<(String, u16, Value)> {
    let none = || json!({"migrations": []});
    let known = [
        (
            "GET /fractus/v1/hosts",
            json!({"hosts": [{"id": "H", "hostname": "h1"}]}),
        ),
        ("PUT /compute/v2.1/os-services/H", json!({"service": {}})),
        (LIST, json!({"servers": servers})),
        ("GET /compute/v2.1/os-migrations?host=h1", none()),
        (
            "GET /compute/v2.1/os-migrations?host=h1&status=finished",
            none(),
        ),
    ];
    let known = known.into_iter();
    known
        .map(|(request, answer)| (request.to_owned(), 200, answer))
        .collect()
}

/// What it answers of a server: these statuses of its newest migration, one after the other.
fn of_server(id: &str, statuses: &[&str]) -> Vec<(String, u16, Value)> {
    let newest = format!("GET /compute/v2.1/os-migrations?instance_uuid={id}&limit=1");
    let migration = |status: &&str| json!({"migrations": [{"uuid": id, "status": status, "dest_compute": "h2"}]});
    let mut all: Vec<_> = statuses
        .iter()
        .map(|status| (newest.clone(), 200, migration(status)))
        .collect();
    let why = json!({"migration": {"reason": "the line broke"}});
    all.push((format!("GET /fractus/v1/migrations/{id}"), 200, why));
    all
}

fn accepts(id: &str) -> (String, u16, Value) {
    let action = format!("POST /compute/v2.1/servers/{id}/action");
    (action, 202, Value::Null)
}

fn is(id: &str, server: Value) -> (String, u16, Value) {
    let one = format!("GET /compute/v2.1/servers/{id}");
    (one, 200, json!({"server": server}))
}

async fn cloud(answers: Vec<Vec<(String, u16, Value)>>) -> Cloud {
    let answers = answers.concat();
    let answers: Vec<(&str, u16, Value)> = answers
        .iter()
        .map(|(request, status, body)| (request.as_str(), *status, body.clone()))
        .collect();
    Cloud::start(&answers).await
}

impl Cloud {
    /// What servers were asked to do: whose action it was, and its body.
    fn acts(&self) -> Vec<(String, Value)> {
        let asked = self.asked().into_iter();
        let acts = asked.filter(|(method, ..)| method == "POST");
        acts.filter_map(|(_, path, _, body)| {
            let id = path.strip_prefix("/compute/v2.1/servers/")?;
            Some((id.strip_suffix("/action")?.to_owned(), body))
        })
        .collect()
    }
}

fn live() -> Value {
    json!({"os-migrateLive": {"host": null, "block_migration": "auto"}})
}

#[tokio::test]
async fn a_host_is_taken_out_of_service_and_back_with_a_reason_or_none() {
    let cloud = cloud(vec![of_host(json!([]))]).await;
    cloud.run(&["host", "disable", "h1"]).await.unwrap();
    let why = ["host", "disable", "H", "--reason", "a new fan"];
    cloud.run(&why).await.unwrap();
    cloud.run(&["host", "enable", "h1"]).await.unwrap();
    let asked = cloud.asked().into_iter();
    let set = asked.filter(|(method, ..)| method == "PUT");
    let set: Vec<Value> = set.map(|(.., body)| body).collect();
    let expected = [
        json!({"status": "disabled"}),
        json!({"status": "disabled", "disabled_reason": "a new fan"}),
        json!({"status": "enabled"}),
    ];
    assert_eq!(set, expected);
}

#[tokio::test]
async fn all_servers_of_a_host_are_asked_to_go_before_one_has_arrived() {
    let stopped = json!({"id": OTHER, "name": "db", "status": "SHUTOFF"});
    let servers = json!([{"id": SERVER, "name": "web", "status": "ACTIVE"}, stopped]);
    let cloud = cloud(vec![
        of_host(servers),
        of_server(SERVER, &["queued", "running", "completed"]),
        of_server(OTHER, &["migrating", "finished"]),
        vec![accepts(SERVER), accepts(OTHER), is(OTHER, stopped)],
    ])
    .await;
    cloud.run(&["host", "drain", "h1"]).await.unwrap();
    let acts = cloud.acts();
    let expected = [
        (SERVER, live()),
        (OTHER, json!({"migrate": null})),
        // Its old host keeps its disk until then.
        (OTHER, json!({"confirmResize": null})),
    ];
    let expected = expected.map(|(id, body)| (id.to_owned(), body));
    assert_eq!(acts, expected);
    let asked = cloud.asked();
    let at = |what: &str| asked.iter().position(|(_, path, ..)| path.contains(what));
    let first_look = at("instance_uuid=");
    assert!(at(&format!("{OTHER}/action")) < first_look, "{asked:?}");
}

#[tokio::test]
async fn a_server_that_is_busy_or_did_not_go_is_asked_again() {
    let busy = json!({"id": SERVER, "name": "web", "status": "REBOOT"});
    let runs =
        json!({"id": SERVER, "name": "web", "status": "ACTIVE", "OS-EXT-SRV-ATTR:host": "h1"});
    let (action, ..) = accepts(SERVER);
    let conflict = json!({"conflictingRequest": {"code": 409, "message": "an image is made"}});
    let cloud = cloud(vec![
        of_host(json!([busy])),
        of_server(SERVER, &["failed", "completed"]),
        vec![
            is(SERVER, busy.clone()),
            is(SERVER, runs),
            (action, 409, conflict),
            accepts(SERVER),
        ],
    ])
    .await;
    cloud.run(&["host", "drain", "h1"]).await.unwrap();
    assert_eq!(cloud.acts(), vec![(SERVER.to_owned(), live()); 3]);
}

#[tokio::test]
async fn one_that_does_not_go_is_asked_a_few_times_and_stays() {
    let runs =
        json!({"id": SERVER, "name": "web", "status": "ACTIVE", "OS-EXT-SRV-ATTR:host": "h1"});
    for (status, times) in [("failed", 3), ("cancelled", 1)] {
        let cloud = cloud(vec![
            of_host(json!([runs])),
            of_server(SERVER, &[status]),
            vec![is(SERVER, runs.clone()), accepts(SERVER)],
        ])
        .await;
        let error = cloud.run(&["host", "drain", "h1"]).await.unwrap_err();
        assert!(error.to_string().contains("1 of its 1 servers"), "{error}");
        assert_eq!(cloud.acts().len(), times, "{status}");
    }
}

/// Neither one that leaves, nor one that comes.
#[tokio::test]
async fn one_that_takes_too_long_does_not_end_a_drain() {
    const COMING: &str = "44444444-4444-4444-8444-444444444444";
    let servers = json!([
        {"id": SERVER, "name": "web", "status": "ACTIVE"},
        {"id": OTHER, "name": "db", "status": "PAUSED"},
    ]);
    let coming = json!({"migrations": [
        {"instance_uuid": COMING, "dest_compute": "h1", "status": "running"},
    ]});
    let mut host = of_host(servers);
    for (request, _, answer) in &mut host {
        if request.ends_with("os-migrations?host=h1") {
            *answer = coming.clone();
        }
    }
    let cloud = cloud(vec![
        host,
        of_server(SERVER, &["running"]),
        of_server(OTHER, &["completed"]),
        of_server(COMING, &["running"]),
        vec![accepts(SERVER), accepts(OTHER)],
    ])
    .await;
    let line = ["host", "drain", "h1", "--timeout", "0"];
    let error = cloud.run(&line).await.unwrap_err();
    assert!(error.to_string().contains("2 of its 3 servers"), "{error}");
    let looked = |id: &str| {
        let asked = cloud.asked();
        asked
            .iter()
            .any(|(_, path, ..)| path.contains(&format!("instance_uuid={id}")))
    };
    assert!(looked(OTHER) && looked(COMING));
}

#[tokio::test]
async fn an_evacuation_leaves_none_behind_for_another_and_starts_what_ran() {
    let servers = json!([
        {"id": SERVER, "name": "web", "status": "ACTIVE"},
        {"id": OTHER, "name": "db", "status": "HARD_REBOOT", "OS-EXT-STS:power_state": 1},
        {"id": "off", "name": "off", "status": "SHUTOFF", "OS-EXT-STS:power_state": 4},
    ]);
    let off = json!({"status": "SHUTOFF"});
    let cloud = cloud(vec![
        of_host(servers),
        of_server(SERVER, &["pre-migrating"]),
        of_server(OTHER, &["error", "done"]),
        of_server("off", &["done"]),
        vec![
            accepts(SERVER),
            accepts(OTHER),
            accepts("off"),
            is(OTHER, off),
        ],
    ])
    .await;
    let line = ["host", "evacuate", "h1", "--start", "--timeout", "0"];
    let error = cloud.run(&line).await.unwrap_err();
    assert!(error.to_string().contains("1 of its 3 servers"), "{error}");
    let acts = cloud.acts();
    let count = |id: &str, body: Value| {
        let same = acts.iter().filter(|(of, sent)| of == id && *sent == body);
        same.count()
    };
    let (evacuate, start) = (|| json!({"evacuate": {}}), || json!({"os-start": null}));
    // What is only slow is waited for: to ask again would begin anew.
    assert_eq!(count(SERVER, evacuate()), 1);
    assert_eq!(count(OTHER, evacuate()), 2);
    assert_eq!(count("off", evacuate()), 1);
    // What ran when its host was off runs again, whatever was done to it.
    assert_eq!(count(OTHER, start()), 1);
    assert_eq!(count("off", start()) + count(SERVER, start()), 0);
}
