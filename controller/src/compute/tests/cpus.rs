//! What CPU a server's guest has, and where it can go with it.

use std::sync::Arc;

use fractus_agent_api::cpu::Cpu;

use super::resize::{asks, at_rest, furnished, resize};
use super::*;
use crate::agents::host;
use crate::agents::simulated::{SimulatedHost, cpu};

/// The host is heard to have this.
fn has(cloud: &Cloud, host: &SimulatedHost, cpu: Option<Cpu>) {
    host.set_cpu(cpu);
    cloud.pump(host);
}

async fn joined(cloud: &Cloud, n: u128, cpu: Option<Cpu>) -> Arc<SimulatedHost> {
    let host = cloud.join(n).await;
    has(cloud, &host, cpu);
    host
}

fn features(host: &SimulatedHost, id: &str) -> Vec<String> {
    let kept = host.wanted(machine(id)).unwrap().spec.cpu;
    kept.map(|kept| kept.features()).unwrap_or_default()
}

fn live(host: Option<&str>) -> Value {
    json!({"os-migrateLive": {"host": host, "block_migration": "auto"}})
}

async fn flavor(cloud: &Cloud, id: &str, profile: &str) {
    let flavor = json!({"flavor": {"name": id, "id": id, "ram": 256, "vcpus": 1, "disk": 1}});
    let made = cloud.call("admin", Method::POST, "/v2.1/flavors", "", flavor);
    assert_eq!(status(&made.await), 200);
    let path = format!("/v2.1/flavors/{id}/os-extra_specs");
    let specs = json!({"extra_specs": {"hw:cpu_profile": profile}});
    let set = cloud.call("admin", Method::POST, &path, "2.86", specs);
    assert_eq!(status(&set.await), 200);
}

async fn create(cloud: &Cloud, flavor: &str) -> String {
    let body = json!({"server": {
        "name": "x", "imageRef": DISK, "flavorRef": flavor, "networks": "none",
    }});
    let made = cloud.call("one", Method::POST, "/v2.1/servers", "2.96", body);
    let made = made.await;
    assert_eq!(status(&made), 202, "{}", made.json);
    made.json["server"]["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_goes_only_where_all_is_that_it_has_and_keeps_it_there() {
    let cloud = Cloud::new().await;
    has(&cloud, &cloud.host, Some(cpu(&["avx", "avx2", "rtm"])));
    let id = cloud.running("one", "web").await;
    let kept = cloud.host.wanted(machine(&id)).unwrap().spec.cpu;
    assert_eq!(features(&cloud.host, &id), ["avx", "avx2", "rtm"]);
    joined(&cloud, 2, Some(cpu(&["avx", "sse4a"]))).await;
    joined(&cloud, 3, None).await;
    for (name, why) in [
        ("host-2", "its CPU lacks avx2, rtm"),
        ("host-3", "it does not say what CPU its guests have"),
    ] {
        let words = format!(
            "Migration pre-check error: Unacceptable CPU info: CPU doesn't have compatibility. {name}: {why}"
        );
        for version in ["2.30", "2.96"] {
            let refused = cloud.act("admin", &id, version, live(Some(name))).await;
            assert_eq!((status(&refused), refused.message()), (400, words.as_str()));
        }
    }
    // Where none was asked for, that is told before 2.34, and by the migration from then on.
    let refused = cloud.act("admin", &id, "2.30", live(None)).await;
    assert_eq!(status(&refused), 400);
    let words = "host-2: its CPU lacks avx2, rtm; host-3: it does not say what CPU its guests have";
    assert!(refused.message().contains(words), "{}", refused.message());
    let later = cloud.act("admin", &id, "2.96", live(None)).await;
    assert_eq!(status(&later), 202);
    let failed = cloud.until_migration(&id, "error").await;
    let path = format!(
        "/fractus/v1/migrations/{}",
        failed["uuid"].as_str().unwrap()
    );
    let told = cloud.get("admin", &path, "").await.json["migration"]["reason"].clone();
    assert!(told.as_str().unwrap().contains(words), "{told}");
    cloud
        .until("admin", &id, |server| server["status"] == "ACTIVE")
        .await;

    let more = joined(&cloud, 4, Some(cpu(&["avx", "avx2", "rtm", "sse4a"]))).await;
    let gone = cloud.act("admin", &id, "2.96", live(None)).await;
    assert_eq!(status(&gone), 202);
    cloud.until_migration(&id, "running").await;
    while !cloud
        .agents
        .stream(machine(&id), crate::agents::simulated::stream::Event::End)
    {
        tokio::task::yield_now().await;
    }
    let at = |server: &Value| server["OS-EXT-SRV-ATTR:host"] == "host-4";
    cloud.until("admin", &id, at).await;
    assert_eq!(more.wanted(machine(&id)).unwrap().spec.cpu, kept);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_begins_with_what_its_flavor_says_and_each_time_with_what_is_there_then() {
    let cloud = Cloud::new().await;
    has(&cloud, &cloud.host, Some(cpu(&["avx", "avx2"])));
    let other = joined(&cloud, 2, Some(cpu(&["avx"]))).await;
    // Whatever comes to be there must not be chosen here.
    let path = format!("/v2.1/os-services/{}", other.id());
    flavor(&cloud, "own", "host").await;
    flavor(&cloud, "v2", "x86-64-v2").await;
    // A level that no host has is told as room is that none has.
    let id = create(&cloud, "v2").await;
    let failed = cloud
        .until("one", &id, |server| server["status"] == "ERROR")
        .await;
    let message = failed["fault"]["message"].as_str().unwrap();
    let words = "host-1: its CPU lacks pni, ssse3, cx16, sse4_1, sse4_2, popcnt, lahf_lm";
    assert!(message.contains(words), "{message}");

    // The baseline is of both, as long as new servers are placed on both.
    let common = cloud.running("one", "common").await;
    let on = |id: &str| match cloud.host.wanted(machine(id)) {
        Some(_) => Arc::clone(&cloud.host),
        None => Arc::clone(&other),
    };
    assert_eq!(features(&on(&common), &common), ["avx"]);
    let body = json!({"status": "disabled"});
    let set = cloud.call("admin", Method::PUT, &path, "2.96", body).await;
    assert_eq!(status(&set), 200);
    let own = create(&cloud, "own").await;
    cloud
        .until("one", &own, |server| server["status"] == "ACTIVE")
        .await;
    assert_eq!(features(&cloud.host, &own), ["avx", "avx2"]);

    // It keeps that through what its guest lives through, and takes what is there when it begins anew.
    has(&cloud, &cloud.host, Some(cpu(&["avx", "avx2", "rtm"])));
    for (action, wanted) in [("pause", "PAUSED"), ("unpause", "ACTIVE")] {
        let done = cloud.act("one", &own, "", json!({action: null})).await;
        assert_eq!(status(&done), 202);
        cloud
            .until("one", &own, |server| server["status"] == wanted)
            .await;
    }
    assert_eq!(features(&cloud.host, &own), ["avx", "avx2"]);
    let reboot = json!({"reboot": {"type": "HARD"}});
    assert_eq!(status(&cloud.act("one", &own, "", reboot).await), 202);
    cloud
        .until("one", &own, |server| server["status"] == "ACTIVE")
        .await;
    assert_eq!(features(&cloud.host, &own), ["avx", "avx2", "rtm"]);
    assert_eq!(features(&on(&common), &common), ["avx"], "of another");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_goes_back_to_its_size_begins_with_what_is_there_by_then() {
    for hosts in [1, 2] {
        let cloud = furnished().await;
        has(&cloud, &cloud.host, Some(cpu(&["avx", "avx2", "rtm"])));
        let id = cloud.running("one", "web").await;
        let request = match hosts {
            1 => resize(),
            _ => {
                joined(&cloud, 2, Some(cpu(&["avx", "avx2"]))).await;
                json!({"migrate": null})
            }
        };
        assert_eq!(asks(&cloud, "admin", &id, request).await, 202);
        at_rest(&cloud, &id, "VERIFY_RESIZE").await;
        has(&cloud, &cloud.host, Some(cpu(&["avx"])));
        let revert = json!({"revertResize": null});
        assert_eq!(asks(&cloud, "one", &id, revert).await, 202);
        at_rest(&cloud, &id, "ACTIVE").await;
        assert_eq!(features(&cloud.host, &id), ["avx"], "of {hosts} hosts");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_is_shown_with_what_its_guests_may_have() {
    let cloud = Cloud::new().await;
    has(&cloud, &cloud.host, Some(cpu(&["avx", "rtm"])));
    let (id, said) = (cloud.host.id(), cloud.host.host_report());
    let heard = cloud.app.database().write(move |tx| {
        let said = said.clone();
        Box::pin(async move { host::heard(tx, id, "https://10.0.0.1:9001", &said, 1).await })
    });
    heard.await.unwrap();
    let shown = cloud
        .get("admin", "/v2.1/os-hypervisors/detail", "2.28")
        .await;
    let shown = &shown.json["hypervisors"][0]["cpu_info"];
    assert_eq!(shown["features"], json!(["avx", "rtm"]));
    let path = format!("/fractus/v1/hosts/{}", cloud.host.id());
    let host = cloud.get("admin", &path, "").await.json["host"].clone();
    let guest: Cpu = serde_json::from_value(host["cpu"]["guest"].clone()).unwrap();
    assert_eq!(guest, cpu(&["avx", "rtm"]));
    let wrong = json!({"extra_specs": {"hw:cpu_profile": "z80"}});
    let path = "/v2.1/flavors/1/os-extra_specs";
    let refused = cloud.call("admin", Method::POST, path, "2.86", wrong).await;
    assert_eq!(
        (status(&refused), refused.message()),
        (
            400,
            "Validation failed; 'z80' is not one of: baseline, host, x86-64-v2, x86-64-v3."
        )
    );
}
