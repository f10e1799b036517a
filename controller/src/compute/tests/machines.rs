//! What an administrator changes of a machine that no OpenStack service asks for.

use super::*;

async fn change(cloud: &Cloud, id: &str, machine: Value) -> Answer {
    let path = format!("/fractus/v1/machines/{id}");
    let body = json!({"machine": machine});
    cloud.call("admin", Method::PATCH, &path, "", body).await
}

#[tokio::test]
async fn a_machine_is_changed_by_intent_and_keeps_its_disks_when_it_is_rebuilt() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "s").await;
    let path = format!("/fractus/v1/machines/{id}");
    let before = cloud.get("admin", &path, "").await.json["machine"].clone();
    assert_eq!(before["report"]["observed"]["state"], "running");
    let disk = "00000000-0000-0000-0000-0000000000d1";
    let wanted = json!({
        "disks": [{"id": disk, "size": 1 << 20}],
        "nics": [{"id": "00000000-0000-0000-0000-0000000000e1", "mac": "02:00:00:00:00:01"}],
        "vcpus": 2, "max_vcpus": 4,
    });
    let changed = change(&cloud, &id, wanted).await;
    assert_eq!(changed.status, 202, "{}", changed.json);
    let changed = &changed.json["machine"];
    let revision = |machine: &Value| machine["revision"].as_u64().unwrap();
    assert_eq!(revision(changed), revision(&before) + 1);
    assert_eq!(changed["wanted"]["disks"][0]["id"], disk);
    let told = cloud.until_told(&id, |spec| spec.disks.len() == 1).await;
    assert_eq!(
        (told.nics.len(), told.vcpus, told.max_vcpus),
        (1, 2, Some(4))
    );

    let rebuild = json!({"rebuild": {"imageRef": DISK}});
    let rebuilt = cloud.act("one", &id, "2.96", rebuild).await;
    assert_eq!(rebuilt.status, 202, "{}", rebuilt.json);
    cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
    let told = cloud.host.wanted(machine(&id)).unwrap();
    assert_eq!(told.rebuilds, 1);
    assert_eq!((told.spec.disks.len(), told.spec.nics.len()), (1, 1));
}

#[tokio::test]
async fn what_no_host_could_do_is_refused_and_changes_nothing() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "s").await;
    let before = cloud.host.wanted(machine(&id));
    let wrong = [
        (json!({}), 400),
        (json!({"power": "stopped"}), 400),
        (json!({"vcpus": 0}), 400),
        (json!({"vcpus": 3, "max_vcpus": 2}), 400),
        (json!({"disks": [{"id": "x", "size": 1}]}), 400),
        (
            json!({"disks": [{"id": id, "size": 1}, {"id": id, "size": 1}]}),
            400,
        ),
        (
            json!({"nics": [{"id": id, "mac": "ff:ff:ff:ff:ff:ff"}]}),
            400,
        ),
        // More than the host has.
        (json!({"memory_mib": 1 << 24}), 409),
    ];
    for (machine, status) in wrong {
        let answer = change(&cloud, &id, machine.clone()).await;
        assert_eq!(answer.status, status, "{machine}: {}", answer.json);
    }
    let nobody = change(&cloud, DISK, json!({"vcpus": 1})).await;
    assert_eq!(nobody.status, 404);
    let path = format!("/fractus/v1/machines/{id}");
    for who in ["one", "reader", "two"] {
        let refused = cloud.get(who, &path, "").await;
        assert_eq!(refused.status, 403, "{who}");
    }
    assert_eq!(cloud.host.wanted(machine(&id)), before);
}
