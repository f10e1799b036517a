//! How long servers ran, by project.

use super::*;

const USAGE: &str = "/v2.1/os-simple-tenant-usage";

#[tokio::test(flavor = "multi_thread")]
async fn a_projects_servers_count_from_their_launch_to_their_end() {
    let cloud = Cloud::new().await;
    let running = cloud.running("one", "runs").await;
    let deleted = cloud.running("one", "ran").await;
    let path = format!("/v2.1/servers/{deleted}");
    cloud
        .call("one", Method::DELETE, &path, "", Value::Null)
        .await;
    cloud.until_gone("one", &deleted).await;
    cloud.running("two", "other").await;

    let own = cloud
        .get(
            "one",
            &format!("{USAGE}/{ONE}?start=2020-01-01T00:00:00"),
            "",
        )
        .await;
    assert_eq!(status(&own), 200, "{}", own.json);
    let own = &own.json["tenant_usage"];
    assert_eq!(own["tenant_id"], ONE);
    let hours = own["total_hours"].as_f64().unwrap();
    assert!(hours > 0.0 && hours < 1.0, "{own}");
    assert_eq!(
        own["total_memory_mb_usage"].as_f64().unwrap(),
        hours * 256.0
    );
    let servers = own["server_usages"].as_array().unwrap();
    let of = |id: &str| {
        servers
            .iter()
            .find(|server| server["instance_id"] == id)
            .unwrap()
    };
    assert_eq!(of(&deleted)["state"], "terminated");
    assert!(of(&deleted)["ended_at"].is_string());
    assert_eq!(of(&running)["state"], "active");
    assert!(of(&running)["ended_at"].is_null());
    assert_eq!(servers.len(), 2);
    // A period before there were any.
    let before = format!("{USAGE}/{ONE}?start=2020-01-01T00:00:00&end=2020-01-02T00:00:00");
    let before = cloud.get("one", &before, "").await;
    assert_eq!(before.json["tenant_usage"]["total_hours"], 0.0);
    assert_eq!(before.json["tenant_usage"]["server_usages"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn usages_are_listed_for_administrators_in_pages_from_2_40() {
    let cloud = Cloud::new().await;
    cloud.running("one", "a").await;
    cloud.running("two", "b").await;
    let start = "start=2020-01-01T00:00:00";
    let all = cloud
        .get("admin", &format!("{USAGE}?{start}"), "")
        .await
        .json;
    let projects: Vec<&str> = all["tenant_usages"]
        .as_array()
        .unwrap()
        .iter()
        .map(|usage| usage["tenant_id"].as_str().unwrap())
        .collect();
    assert_eq!(projects, [ONE, TWO]);
    assert!(all["tenant_usages"][0].get("server_usages").is_none());
    let page = cloud
        .get(
            "admin",
            &format!("{USAGE}?{start}&limit=1&detailed=1"),
            "2.40",
        )
        .await
        .json;
    assert_eq!(page["tenant_usages"].as_array().unwrap().len(), 1);
    assert_eq!(page["tenant_usages"][0]["server_usages"][0]["name"], "a");
    let next = page["tenant_usages_links"][0]["href"].as_str().unwrap();
    let next = next.split_once("/compute").unwrap().1;
    let page = cloud.get("admin", next, "2.40").await.json;
    assert_eq!(page["tenant_usages"][0]["tenant_id"], TWO);
}

#[tokio::test(flavor = "multi_thread")]
async fn others_usages_and_wrong_periods_are_refused() {
    let cloud = Cloud::new().await;
    assert_eq!(status(&cloud.get("one", USAGE, "").await), 403);
    assert_eq!(
        status(&cloud.get("one", &format!("{USAGE}/{TWO}"), "").await),
        403
    );
    assert_eq!(
        status(&cloud.get("admin", &format!("{USAGE}/{TWO}"), "").await),
        200
    );
    let refused = cloud
        .get("admin", &format!("{USAGE}?start=yesterday"), "")
        .await;
    assert_eq!(
        (status(&refused), refused.message()),
        (400, "Datetime is in invalid format")
    );
    let backwards = format!("{USAGE}?start=2021-01-01T00:00:00&end=2020-01-01T00:00:00");
    let refused = cloud.get("admin", &backwards, "").await;
    assert_eq!(
        refused.message(),
        "Invalid start time. The start time cannot occur after the end time."
    );
}
