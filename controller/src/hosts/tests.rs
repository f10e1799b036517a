//! The API of hosts as an administrator sees it, in process.

use fractus_agent_api::host::{CpuReport, HostReport, JoinRequest};
use http::Method;

use super::*;
use crate::testing::{TestApp, app};

fn report(hostname: &str) -> HostReport {
    HostReport {
        version: fractus_agent_api::VERSION,
        agent_version: "0.1.0".to_owned(),
        hostname: hostname.to_owned(),
        boot_id: Uuid::from_u128(1),
        cpus: 4,
        memory_mib: 8192,
        memory_free_mib: 8000,
        disk_gib: 100,
        disk_free_gib: 90,
        cpu: CpuReport {
            architecture: "x86_64".to_owned(),
            vendor: "v".to_owned(),
            model: "m".to_owned(),
            sockets: 1,
            cores: 4,
            threads: 4,
            features: Vec::new(),
            guest: None,
        },
        kernel: "6.1".to_owned(),
        load: [0.0; 3],
        uptime_s: 1,
        lacks: Vec::new(),
        unable: Vec::new(),
        post_copy: false,
    }
}

async fn token(cloud: &TestApp) -> String {
    let body = json!({"join_token": {"ttl_s": 60}});
    let answer = cloud
        .post(&cloud.admin, "/fractus/v1/join-tokens", body)
        .await
        .expect_status(201);
    answer.json()["join_token"]["token"]
        .as_str()
        .unwrap()
        .to_owned()
}

/// Joins as the listener would have it join.
async fn join(cloud: &TestApp, token: &str, key: &'static str) -> Result<HostId, join::JoinError> {
    let request = JoinRequest {
        version: fractus_agent_api::VERSION,
        token: token.to_owned(),
        csr: String::new(),
        endpoint: "https://127.0.0.1:1".to_owned(),
        host: report("h1"),
    };
    let (now_us, id) = (cloud.app.now_us(), HostId(cloud.app.random().uuid()));
    cloud
        .app
        .database()
        .write(move |tx| {
            let request = request.clone();
            Box::pin(async move { join::join(tx, id, &request, key, now_us).await })
        })
        .await
}

#[tokio::test]
async fn a_token_lets_one_host_in_which_is_listed_until_it_is_removed() {
    let cloud = app().await;
    let token = token(&cloud).await;
    let id = join(&cloud, &token, "key").await.unwrap();
    // The answer to a join that was lost is given again to the same key, and to no other.
    assert_eq!(join(&cloud, &token, "key").await.unwrap(), id);
    assert!(matches!(
        join(&cloud, &token, "other").await,
        Err(join::JoinError::Used)
    ));

    let hosts = cloud
        .get(&cloud.admin, "/fractus/v1/hosts")
        .await
        .expect_status(200)
        .json();
    assert_eq!(hosts["hosts"][0]["id"], id.to_string());
    assert_eq!(hosts["hosts"][0]["hostname"], "h1");
    let path = format!("/fractus/v1/hosts/{id}");
    let shown = cloud
        .get(&cloud.admin, &path)
        .await
        .expect_status(200)
        .json();
    assert_eq!(shown["host"], hosts["hosts"][0]);

    let remove = |status| {
        let (cloud, path) = (&cloud, path.clone());
        async move {
            cloud
                .ask(&cloud.admin, Method::DELETE, &path, Value::Null)
                .await
                .expect_status(status)
        }
    };
    remove(204).await;
    remove(404).await;
    cloud.get(&cloud.admin, &path).await.expect_status(404);
}

#[tokio::test]
async fn bad_requests_are_answered_in_one_form() {
    let cloud = app().await;
    for body in [
        json!({}),
        json!({"join_token": {"ttl_s": 0}}),
        json!({"join_token": {"x": 1}}),
    ] {
        let answer = cloud
            .post(&cloud.admin, "/fractus/v1/join-tokens", body)
            .await;
        assert_eq!(answer.expect_status(400).json()["error"]["code"], 400);
    }
    cloud
        .get(&cloud.admin, "/fractus/v1/hosts/none")
        .await
        .expect_status(404);
    cloud
        .get(&cloud.member, "/fractus/v1/hosts")
        .await
        .expect_status(403);
    cloud.get("", "/fractus/v1/hosts").await.expect_status(401);
}
