//! Live migrations that wait for each other, as clients see them; and what the log says of one.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use tracing_subscriber::fmt::MakeWriter;

use super::*;
use crate::agents::simulated::stream::Event;

async fn migrate(cloud: &Cloud, id: &str) {
    let body = json!({"os-migrateLive": {"host": null, "block_migration": "auto"}});
    let answer = cloud.act("admin", id, "2.96", body).await;
    assert_eq!(status(&answer), 202, "{}", answer.json);
}

/// Servers of the first host that are asked to go to a second one, in this order.
async fn asked(cloud: &Cloud, count: usize) -> Vec<String> {
    let mut ids = Vec::new();
    for n in 0..count {
        ids.push(cloud.running("one", &format!("web-{n}")).await);
    }
    cloud.join(2).await;
    for id in &ids {
        migrate(cloud, id).await;
    }
    ids
}

async fn until_streams(cloud: &Cloud, ids: &[&String]) {
    let mut expected: Vec<_> = ids.iter().map(|id| machine(id)).collect();
    expected.sort_unstable();
    loop {
        let mut streams = cloud.agents.streams();
        streams.sort_unstable();
        if streams == expected {
            return;
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_sends_two_guests_at_once_and_the_others_are_queued() {
    let cloud = Cloud::new().await;
    let ids = asked(&cloud, 4).await;
    until_streams(&cloud, &[&ids[0], &ids[1]]).await;
    let queued = cloud
        .get("admin", "/v2.1/os-migrations?status=queued", "2.96")
        .await;
    let waiting: Vec<_> = queued.json["migrations"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| (row["instance_uuid"].as_str().unwrap(), &row["dest_compute"]))
        .collect();
    let nowhere = &json!("");
    assert_eq!(
        waiting,
        [(ids[3].as_str(), nowhere), (ids[2].as_str(), nowhere)]
    );
    // It is under way, and can be seen.
    let path = format!("/v2.1/servers/{}/migrations", ids[2]);
    let list = cloud.get("admin", &path, "2.96").await.json;
    assert_eq!(list["migrations"][0]["status"], "queued");
    let one = format!("{path}/{}", list["migrations"][0]["id"]);
    assert_eq!(status(&cloud.get("admin", &one, "2.96").await), 200);
    let path = format!("/v2.1/servers/{}", ids[2]);
    let shown = cloud.get("one", &path, "2.96").await;
    assert_eq!(shown.json["server"]["status"], "MIGRATING");
    // It goes when another has come.
    assert!(cloud.agents.stream(machine(&ids[1]), Event::End));
    until_streams(&cloud, &[&ids[0], &ids[2]]).await;
    assert!(cloud.agents.stream(machine(&ids[0]), Event::End));
    until_streams(&cloud, &[&ids[2], &ids[3]]).await;
    for id in &ids[2..] {
        assert!(cloud.agents.stream(machine(id), Event::End));
    }
    for id in &ids {
        cloud.until_migration(id, "completed").await;
    }
}

/// As nova has it: from 2.65 on.
#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_queued_can_be_aborted_and_not_be_done_with() {
    let cloud = Cloud::new().await;
    let ids = asked(&cloud, 3).await;
    let migration = cloud.until_migration(&ids[2], "queued").await;
    let one = format!("/v2.1/servers/{}/migrations/{}", ids[2], migration["id"]);
    let force = json!({"force_complete": null});
    let action = format!("{one}/action");
    let forced = cloud
        .call("admin", Method::POST, &action, "2.96", force)
        .await;
    assert_eq!(
        forced.message(),
        format!(
            "Migration {} state of instance {} is queued. Cannot force complete while the migration is in this state.",
            migration["id"], ids[2]
        )
    );
    for (version, code) in [("2.64", 400), ("2.65", 202)] {
        let aborted = cloud
            .call("admin", Method::DELETE, &one, version, Value::Null)
            .await;
        assert_eq!(status(&aborted), code, "{version}: {}", aborted.json);
    }
    cloud.until_migration(&ids[2], "cancelled").await;
    let server = cloud
        .until("admin", &ids[2], |server| server["status"] == "ACTIVE")
        .await;
    assert_eq!(server["OS-EXT-SRV-ATTR:host"], "host-1");
    until_streams(&cloud, &[&ids[0], &ids[1]]).await;
}

/// What a log is written to.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn lines(&self, of: &str) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let lines = text.lines().filter(|line| line.contains(of));
        lines.map(str::to_owned).collect()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_has_one_line_of_a_migration_with_all_of_its_report() {
    let log = Log::default();
    let subscriber = tracing_subscriber::fmt()
        .with_ansi(false)
        .with_writer(log.clone());
    // The only test that asks for it.
    tracing::subscriber::set_global_default(subscriber.finish()).unwrap();
    let cloud = Cloud::new().await;
    let ids = asked(&cloud, 2).await;
    until_streams(&cloud, &[&ids[0], &ids[1]]).await;
    for (id, event, expected) in [
        (
            &ids[0],
            Event::End,
            [
                "status=\"completed\"",
                "pause_us=10",
                "\"answer_us\":4",
                "\"decide_us\":",
            ],
        ),
        (
            &ids[1],
            Event::Cut,
            [
                "status=\"failed\"",
                "reason=\"the stream has broken\"",
                "target=\"host-2\"",
                "decision=\"again\"",
            ],
        ),
    ] {
        assert!(cloud.agents.stream(machine(id), Event::Round));
        assert!(cloud.agents.stream(machine(id), event));
        let migration = match event {
            Event::End => cloud.until_migration(id, "completed").await,
            _ => cloud.until_migration(id, "failed").await,
        };
        let uuid = migration["uuid"].as_str().unwrap();
        // Told after it is written.
        while log.lines(uuid).is_empty() {
            tokio::task::yield_now().await;
        }
        let told = log.lines(uuid);
        assert_eq!(told.len(), 1, "{told:?}");
        let common = [
            "INFO",
            "a live migration has ended",
            "rounds=1",
            "memory_bytes=1048576",
        ];
        for part in common.into_iter().chain(expected) {
            assert!(told[0].contains(part), "{part} in {told:?}");
        }
    }
}
