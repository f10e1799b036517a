//! Live migrations as clients ask for them and see them.

use fractus_agent_api::VERSION;
use fractus_agent_api::machine::{Power, PutMachine, Revision};

use super::*;
use crate::agents::simulated::stream::Event;

fn live(host: Option<&str>) -> Value {
    json!({"os-migrateLive": {"host": host, "block_migration": "auto"}})
}

/// A server that is being sent from the first host to a second one; the migration.
async fn sent(cloud: &Cloud) -> (String, Value) {
    let id = cloud.running("one", "web").await;
    cloud.join(2).await;
    let answer = cloud.act("admin", &id, "2.96", live(None)).await;
    assert_eq!(status(&answer), 202, "{}", answer.json);
    let migration = cloud.until_migration(&id, "running").await;
    until_streams(cloud, &id).await;
    (id, migration)
}

async fn until_streams(cloud: &Cloud, id: &str) {
    while !cloud.agents.streams().contains(&machine(id)) {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_goes_to_another_host_and_is_active_there() {
    let cloud = Cloud::new().await;
    let (id, migration) = sent(&cloud).await;
    assert_eq!(migration["source_compute"], "host-1");
    assert_eq!(migration["dest_compute"], "host-2");
    assert_eq!(migration["migration_type"], "live-migration");
    let path = format!("/v2.1/servers/{id}");
    let server = cloud.get("admin", &path, "2.96").await.json["server"].clone();
    assert_eq!(server["status"], "MIGRATING");
    assert_eq!(server["OS-EXT-STS:task_state"], "migrating");
    assert_eq!(server["OS-EXT-SRV-ATTR:host"], "host-1");
    // What it is asked meanwhile is refused, in nova's words; a change of its machine as well.
    let refused = cloud.act("one", &id, "", json!({"os-stop": null})).await;
    assert_eq!(
        refused.message(),
        format!("Cannot 'stop' instance {id} while it is in task_state migrating")
    );
    let path = format!("/fractus/v1/machines/{id}");
    let change = json!({"machine": {"vcpus": 2}});
    let refused = cloud.call("admin", Method::PATCH, &path, "", change).await;
    assert_eq!(status(&refused), 409);

    assert!(cloud.agents.stream(machine(&id), Event::Round));
    let path = format!("/v2.1/servers/{id}/migrations");
    loop {
        let list = cloud.get("admin", &path, "2.96").await.json;
        let shown = &list["migrations"][0];
        assert_eq!(shown["uuid"], migration["uuid"]);
        if shown["memory_processed_bytes"] == 1 << 20 {
            assert_eq!(shown["memory_total_bytes"], 512 << 20);
            let path = format!("{path}/{}", shown["id"]);
            let one = cloud.get("admin", &path, "2.23").await.json;
            assert_eq!(one["migration"]["status"], "running");
            break;
        }
        tokio::task::yield_now().await;
    }
    assert!(cloud.agents.stream(machine(&id), Event::End));
    let server = cloud
        .until("admin", &id, |server| server["status"] == "ACTIVE")
        .await;
    assert_eq!(server["OS-EXT-SRV-ATTR:host"], "host-2");
    let ended = cloud.until_migration(&id, "completed").await;
    let list = cloud.get("admin", &path, "2.96").await.json;
    assert_eq!(list["migrations"], json!([]), "none is under way");
    let path = format!("/fractus/v1/migrations/{}", ended["uuid"].as_str().unwrap());
    let whole = cloud.get("admin", &path, "").await.json["migration"].clone();
    assert_eq!(whole["target"], "host-2");
    assert_eq!(whole["progress"]["rounds"][0]["memory_bytes"], 1 << 20);
    for part in ["decide_us", "tell_us", "run_us"] {
        assert!(whole["handover"][part].is_u64(), "{whole}");
    }
    let path = format!("/v2.1/servers/{id}/os-instance-actions");
    let actions = cloud.get("one", &path, "2.96").await.json;
    assert_eq!(actions["instanceActions"][0]["action"], "live-migration");
    while !cloud.host.remains().is_empty() {
        tokio::task::yield_now().await;
    }
}

/// What an earlier migration has left is told to go by the reconciler, perhaps in the very moment in which a guest is
/// to come there again.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_told_meanwhile_to_have_nothing_takes_the_guest_all_the_same() {
    for above in 0..2 {
        let cloud = Cloud::new().await;
        let id = cloud.running("one", "web").await;
        let target = cloud.join(2).await;
        let mut wanted = cloud.host.wanted(machine(&id)).unwrap();
        wanted.end();
        let held = cloud.host.report(machine(&id)).unwrap();
        // The migration's own intent is in the revision after the one that runs.
        let put = PutMachine {
            version: VERSION,
            generation: held.generation,
            revision: Revision(held.revision.0 + 1 + above),
            wanted,
            request_id: None,
            boot_id: None,
        };
        target.overtake(machine(&id), put.clone());
        let answer = cloud.act("admin", &id, "2.96", live(Some("host-2"))).await;
        assert_eq!(status(&answer), 202, "{}", answer.json);
        cloud.until_migration(&id, "running").await;
        until_streams(&cloud, &id).await;
        let told = target.report(machine(&id)).unwrap();
        assert!(told.revision > put.revision, "{told:?} after {put:?}");
        assert!(cloud.agents.stream(machine(&id), Event::End));
        let server = cloud
            .until("admin", &id, |server| server["status"] == "ACTIVE")
            .await;
        assert_eq!(server["OS-EXT-SRV-ATTR:host"], "host-2");
        cloud.until_migration(&id, "completed").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_is_aborted_or_done_with_only_while_it_runs() {
    let cloud = Cloud::new().await;
    let (id, migration) = sent(&cloud).await;
    let one = format!("/v2.1/servers/{id}/migrations/{}", migration["id"]);
    let action = format!("{one}/action");
    let force = json!({"force_complete": null});
    for (version, code) in [("2.21", 404), ("2.22", 202)] {
        let forced = cloud
            .call("admin", Method::POST, &action, version, force.clone())
            .await;
        assert_eq!(status(&forced), code, "{}", forced.json);
    }
    let departs = || cloud.host.wanted(machine(&id)).unwrap().departs;
    while departs().unwrap().policy.limit_ms != 0 {
        tokio::task::yield_now().await;
    }
    let early = cloud
        .call("admin", Method::DELETE, &one, "2.23", Value::Null)
        .await;
    assert_eq!(status(&early), 404);
    let aborted = cloud
        .call("admin", Method::DELETE, &one, "2.24", Value::Null)
        .await;
    assert_eq!(status(&aborted), 202, "{}", aborted.json);
    cloud
        .until("admin", &id, |server| server["status"] == "ACTIVE")
        .await;
    cloud.until_migration(&id, "cancelled").await;
    assert_eq!(cloud.host.processes(), [machine(&id)]);
    assert_eq!(departs(), None);
    let late = cloud
        .call("admin", Method::DELETE, &one, "2.96", Value::Null)
        .await;
    assert_eq!(
        late.message(),
        format!("Instance {id} is in an invalid state for 'abort live migration'")
    );
    let late = cloud
        .call("admin", Method::POST, &action, "2.96", force)
        .await;
    assert_eq!(status(&late), 409, "{}", late.json);
    let nothing = format!("/v2.1/servers/{id}/migrations/999");
    let missing = cloud
        .call("admin", Method::DELETE, &nothing, "2.96", Value::Null)
        .await;
    assert_eq!(status(&missing), 404);
    let path = format!("/v2.1/servers/{id}/os-instance-actions");
    let actions = cloud.get("one", &path, "2.96").await.json;
    let names: Vec<_> = actions["instanceActions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|action| action["action"].as_str().unwrap().to_owned())
        .collect();
    for asked in ["live_migration_cancel", "live_migration_force_complete"] {
        assert_eq!(
            names.iter().filter(|name| *name == asked).count(),
            1,
            "{names:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_migrated_is_refused_as_nova_refuses_it() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let try_it = async |version: &str, given: Value| {
        let body = json!({"os-migrateLive": given});
        let answer = cloud.act("admin", &id, version, body).await;
        (status(&answer), answer.message().to_owned())
    };
    let old =
        |host: Value| json!({"host": host, "block_migration": true, "disk_over_commit": false});
    assert_eq!(
        try_it("", old(json!("nosuch"))).await,
        (400, "Compute host nosuch could not be found.".to_owned())
    );
    let (code, message) = try_it("", old(Value::Null)).await;
    assert_eq!(code, 400);
    assert!(
        message.contains("host-1: the server is there already"),
        "{message}"
    );
    assert_eq!(
        try_it("2.96", json!({"host": "host-1", "block_migration": "auto"})).await,
        (
            400,
            format!("Unable to migrate instance ({id}) to current host (host-1).")
        )
    );
    let forced = json!({"host": null, "block_migration": "auto", "force": true});
    assert_eq!(
        try_it("2.30", forced).await,
        (400, "Can't force to a non-provided destination".to_owned())
    );
    let (code, message) = try_it("2.25", json!({"host": null, "block_migration": false})).await;
    assert_eq!(code, 400);
    assert!(message.contains("shared storage"), "{message}");
    // Each version's own body.
    for (version, given) in [
        (
            "2.24",
            json!({"host": null, "block_migration": "auto", "disk_over_commit": false}),
        ),
        ("2.25", old(Value::Null)),
        (
            "2.29",
            json!({"host": null, "block_migration": "auto", "force": true}),
        ),
        (
            "2.68",
            json!({"host": null, "block_migration": "auto", "force": true}),
        ),
        ("2.96", json!({"host": "", "block_migration": "auto"})),
        ("2.96", json!({"block_migration": "auto"})),
    ] {
        let (code, message) = try_it(version, given.clone()).await;
        assert_eq!(code, 400, "{version} {given}: {message}");
    }
    let member = cloud.act("one", &id, "2.96", live(None)).await;
    assert_eq!(status(&member), 403);
    // From 2.34 on what no host can take is told by the migration.
    let later = cloud.act("admin", &id, "2.96", live(None)).await;
    assert_eq!(status(&later), 202);
    cloud.until_migration(&id, "error").await;
    let server = cloud
        .until("admin", &id, |server| server["status"] == "ACTIVE")
        .await;
    assert!(server.get("fault").is_none());
    let stopped = cloud.act("one", &id, "", json!({"os-stop": null})).await;
    assert_eq!(status(&stopped), 202);
    cloud
        .until("one", &id, |server| server["status"] == "SHUTOFF")
        .await;
    assert_eq!(
        try_it("2.96", json!({"host": null, "block_migration": "auto"})).await,
        (
            409,
            format!("Cannot 'os-migrateLive' instance {id} while it is in vm_state stopped")
        )
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_a_guest_is_coming_to_is_not_removed() {
    let cloud = Cloud::new().await;
    sent(&cloud).await;
    let reader = cloud.app.database().reader();
    let target = crate::agents::host::all(reader).await.unwrap();
    let target = target.iter().find(|row| row.hostname == "host-2").unwrap();
    for path in [
        format!("/v2.1/os-services/{}", target.id),
        format!("/fractus/v1/hosts/{}", target.id),
    ] {
        let refused = cloud
            .call("admin", Method::DELETE, &path, "2.96", Value::Null)
            .await;
        assert_eq!(status(&refused), 409, "{path}: {}", refused.json);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disabled_host_is_no_target_even_if_it_is_chosen() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let other = cloud.join(2).await;
    let path = format!("/v2.1/os-services/{}", other.id());
    let body = json!({"status": "disabled"});
    let disabled = cloud.call("admin", Method::PUT, &path, "2.96", body).await;
    assert_eq!(status(&disabled), 200, "{}", disabled.json);
    let given = json!({"host": "host-2", "block_migration": true, "disk_over_commit": true});
    let refused = cloud
        .act("admin", &id, "", json!({"os-migrateLive": given}))
        .await;
    assert_eq!(status(&refused), 400);
    assert!(
        refused.message().contains("host-2: it is disabled"),
        "{}",
        refused.message()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn migrations_are_listed_by_page_and_filter_as_their_version_has_it() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    for _ in 0..3 {
        let answer = cloud.act("admin", &id, "2.96", live(None)).await;
        assert_eq!(status(&answer), 202);
        cloud
            .until("admin", &id, |server| server["status"] == "ACTIVE")
            .await;
    }
    let ids = async |query: &str, version: &str| {
        let path = format!("/v2.1/os-migrations{query}");
        let list = cloud.get("admin", &path, version).await;
        assert_eq!(status(&list), 200, "{query}: {}", list.json);
        let rows = list.json["migrations"].as_array().unwrap().clone();
        let ids: Vec<_> = rows.iter().map(|row| row["id"].as_i64().unwrap()).collect();
        (ids, list.json)
    };
    assert_eq!(ids("", "").await.0, [1, 2, 3]);
    assert_eq!(ids("?limit=1", "2.58").await.0, [1, 2, 3]);
    let (first, page) = ids("?limit=2", "2.59").await;
    assert_eq!(first, [3, 2]);
    let next = page["migrations_links"][0]["href"].as_str().unwrap();
    let (_, query) = next.split_once('?').unwrap();
    assert_eq!(ids(&format!("?{query}"), "2.59").await.0, [1]);
    let row = &page["migrations"][0];
    assert!(row["uuid"].is_string() && row.get("project_id").is_none());
    let owned = ids(
        &format!("?project_id={}", row["uuid"].as_str().unwrap()),
        "2.80",
    )
    .await;
    assert_eq!(owned.0, [0_i64; 0]);
    assert_eq!(ids("?status=error&host=host-1", "2.80").await.0, [3, 2, 1]);
    assert_eq!(ids("?status=completed", "2.80").await.0, [0_i64; 0]);
    assert_eq!(ids("?migration_type=resize", "2.80").await.0, [0_i64; 0]);
    assert_eq!(
        ids(&format!("?instance_uuid={id}"), "2.80").await.0,
        [3, 2, 1]
    );
    for (query, version) in [
        ("?nonsense=1", "2.59"),
        ("?marker=x", "2.59"),
        ("?changes-before=x", "2.66"),
    ] {
        let path = format!("/v2.1/os-migrations{query}");
        let refused = cloud.get("admin", &path, version).await;
        assert_eq!(status(&refused), 400, "{query}");
    }
    let path = format!("/v2.1/servers/{id}/migrations");
    assert_eq!(status(&cloud.get("admin", &path, "2.22").await), 404);
    let gone = cloud.get("admin", &format!("{path}/3"), "2.23").await;
    assert_eq!(
        gone.message(),
        format!("Live migration 3 for server {id} is not in progress.")
    );
}

/// A guest is slowed down unless its flavor forbids it, and its process speaks for itself unless its memory may follow it.
#[tokio::test(flavor = "multi_thread")]
async fn how_a_guest_is_sent_is_its_flavors_to_say() {
    for (spec, value, slows, direct) in [
        ("hw:live_migration_auto_converge", "true", true, true),
        ("hw:live_migration_auto_converge", "false", false, true),
        ("hw:live_migration_post_copy", "true", true, false),
    ] {
        let cloud = Cloud::new().await;
        let path = "/v2.1/flavors/1/os-extra_specs";
        let specs = json!({"extra_specs": {spec: value}});
        let made = cloud.call("admin", Method::POST, path, "", specs).await;
        assert_eq!(status(&made), 200, "{}", made.json);
        let (id, _) = sent(&cloud).await;
        let departs = cloud.host.wanted(machine(&id)).unwrap().departs.unwrap();
        assert_eq!(departs.policy.throttle.is_some(), slows, "{spec} {value}");
        assert_eq!(departs.direct, direct, "{spec} {value}");
    }
}

async fn count(cloud: &Cloud, id: &str, action: &str) -> usize {
    let reader = cloud.app.database().reader();
    let events = crate::event::of_subject(reader, id).await.unwrap();
    events.iter().filter(|event| event.action == action).count()
}

/// What a guest says of itself while its operation alone looks after it is told when that is over.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_panics_while_it_is_sent_is_an_error_at_its_new_host_until_it_is_reset() {
    let cloud = Cloud::new().await;
    let (id, _) = sent(&cloud).await;
    assert!(cloud.host.panic(machine(&id), true));
    assert!(cloud.agents.stream(machine(&id), Event::End));
    cloud.until_migration(&id, "completed").await;
    cloud.reconciler.heard([machine(&id)]);
    let shown = cloud
        .until("admin", &id, |server| server["status"] == "ERROR")
        .await;
    assert_eq!(shown["OS-EXT-STS:power_state"], 6);
    assert_eq!(shown["OS-EXT-SRV-ATTR:host"], "host-2");
    let message = shown["fault"]["message"].as_str().unwrap();
    assert!(message.contains("kernel panicked"), "{message}");
    assert_eq!(count(&cloud, &id, "guest_panicked").await, 1);
    let target = cloud.agents.host(cloud.other(2)).unwrap();
    assert_eq!(target.processes(), [machine(&id)]);
    assert!(target.panic(machine(&id), false));
    cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_panics_and_stays_where_it_was_is_an_error_there() {
    let cloud = Cloud::new().await;
    let (id, _) = sent(&cloud).await;
    assert!(cloud.host.panic(machine(&id), true));
    assert!(cloud.agents.stream(machine(&id), Event::Cut));
    cloud.until_migration(&id, "failed").await;
    cloud.reconciler.heard([machine(&id)]);
    let shown = cloud
        .until("admin", &id, |server| server["status"] == "ERROR")
        .await;
    assert_eq!(shown["OS-EXT-STS:power_state"], 6);
    assert_eq!(shown["OS-EXT-SRV-ATTR:host"], "host-1");
}

/// It is not let go on by its move, and is told to have been paused once.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_its_watchdog_pauses_while_it_is_sent_is_paused_at_its_new_host() {
    let cloud = Cloud::new().await;
    let (id, _) = sent(&cloud).await;
    assert!(cloud.host.pause_by_watchdog(machine(&id)));
    assert!(cloud.agents.stream(machine(&id), Event::End));
    let shown = cloud
        .until("admin", &id, |server| server["status"] == "PAUSED")
        .await;
    assert_eq!(shown["OS-EXT-SRV-ATTR:host"], "host-2");
    let target = cloud.agents.host(cloud.other(2)).unwrap();
    assert_eq!(target.wanted(machine(&id)).unwrap().power, Power::Paused);
    assert_eq!(count(&cloud, &id, "watchdog_fired").await, 1);
    let acted = cloud.act("one", &id, "", json!({"unpause": null})).await;
    assert_eq!(status(&acted), 202);
    cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
    // The next time is another one.
    assert!(target.pause_by_watchdog(machine(&id)));
    cloud
        .until("one", &id, |server| server["status"] == "PAUSED")
        .await;
    assert_eq!(count(&cloud, &id, "watchdog_fired").await, 2);
}

/// As soon as it runs there, and before its migration has ended.
#[tokio::test(flavor = "multi_thread")]
async fn what_happens_to_a_guest_at_its_new_host_before_its_migration_has_ended_is_told() {
    for (panics, then) in [(true, "ERROR"), (false, "PAUSED")] {
        let cloud = Cloud::new().await;
        let (id, _) = sent(&cloud).await;
        cloud.frozen.send_replace(true);
        let target = cloud.agents.host(cloud.other(2)).unwrap();
        assert!(cloud.agents.stream(machine(&id), Event::End));
        cloud.pump(&target);
        cloud.pump(&cloud.host);
        let goes_on = || target.wanted(machine(&id)).unwrap().continues.is_some();
        while !goes_on() {
            tokio::task::yield_now().await;
        }
        while target.step(machine(&id)) {}
        let said = match panics {
            true => target.panic(machine(&id), true),
            false => target.pause_by_watchdog(machine(&id)),
        };
        assert!(said);
        cloud.frozen.send_replace(false);
        cloud.until_migration(&id, "completed").await;
        cloud.reconciler.heard([machine(&id)]);
        let shown = cloud
            .until("admin", &id, |server| server["status"] == then)
            .await;
        assert_eq!(shown["OS-EXT-SRV-ATTR:host"], "host-2");
        while !panics && target.wanted(machine(&id)).unwrap().power != Power::Paused {
            tokio::task::yield_now().await;
        }
        let word = ["watchdog_fired", "guest_panicked"][usize::from(panics)];
        assert_eq!(count(&cloud, &id, word).await, 1, "{word}");
    }
}
