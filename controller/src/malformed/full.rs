//! A disk that has no room left, for images and for the database.
//!
//! The disk is a small tmpfs. Only a process with mounts of its own may have one and leave nothing
//! behind, so a test starts itself again in a namespace, with that tmpfs as its folder for all that is
//! temporary.

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use super::*;

/// Set in the process that has the small disk.
const INSIDE: &str = "FRACTUS_TEST_SMALL_DISK";

/// True in the process with the small disk; elsewhere runs the test of this name there, and fails when
/// it does.
fn on_a_small_disk(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let folder = tempfile::tempdir().unwrap();
    let script = "mount -t tmpfs -o size=8m,mode=700 tmpfs \"$TMPDIR\" && exec \"$0\" \"$@\"";
    let ran = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script])
        .arg(std::env::current_exe().unwrap())
        .args([
            "--exact",
            &format!("malformed::full::{test}"),
            "--nocapture",
        ])
        .env("TMPDIR", folder.path())
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let said = [ran.stdout, ran.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(ran.status.success(), "{said}");
    assert!(
        said.contains("1 passed"),
        "no test of that name ran: {said}"
    );
    false
}

/// Takes all room that the disk has; gives it back when dropped.
struct Filler(PathBuf);

impl Filler {
    fn new() -> Self {
        let path = std::env::temp_dir().join("filler");
        let mut file = std::fs::File::create(&path).unwrap();
        for size in [1 << 16, 1] {
            let error = loop {
                if let Err(error) = file.write_all(&vec![1; size]) {
                    break error;
                }
            };
            assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
        }
        Self(path)
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        // A test that fails already has said why.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A database on that disk: PostgreSQL's files are its server's.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_database_refuses_writes_in_the_services_form_and_works_again_with_room() {
    let name = "a_full_database_refuses_writes_in_the_services_form_and_works_again_with_room";
    if crate::database::testing::on_postgres() || !on_a_small_disk(name) {
        return;
    }
    let cloud = &testing::app().await;
    let things = Things::make(cloud).await;
    let before = Kept::of(cloud).await;
    let large = "x".repeat(20_000);
    let project = json!({"project": {"name": "full", "description": large}});
    let image = json!({"name": "full", "large": large});
    let server = json!({"server": {
        "name": "full", "imageRef": things.named("image", "images"),
        "flavorRef": things.named("compute", "flavors"), "networks": "none", "user_data": large,
    }});
    let writes = [
        (&cloud.admin, "/identity/v3/projects", project, 201),
        (&cloud.member, "/image/v2/images", image, 201),
        (&cloud.member, "/compute/v2.1/servers", server, 202),
    ];
    let headers = |token| {
        let (kind, version) = ("application/json", "compute 2.96");
        [
            ("x-auth-token", token),
            ("content-type", kind),
            ("accept", kind),
            ("openstack-api-version", version),
        ]
    };
    let all = async || {
        let sent = writes.iter().map(|(token, path, body, _)| {
            let headers = headers(token.as_str());
            async move {
                cloud
                    .send(Method::POST, path, &headers, body.to_string())
                    .await
            }
        });
        futures::future::join_all(sent).await
    };
    let filler = Filler::new();
    // Together, so that they share a commit; and again, for the first must not have broken the writer.
    for _ in 0..10 {
        for answer in all().await {
            assert_eq!(answer.status, 503, "{}", answer.text());
        }
        assert_eq!(Kept::of(cloud).await, before);
    }
    let reads = cloud.get(&cloud.member, "/image/v2/images").await;
    reads.expect_status(200);
    drop(filler);
    for (answer, (_, path, _, status)) in all().await.iter().zip(&writes) {
        assert_eq!(answer.status.as_u16(), *status, "{path} {}", answer.text());
    }
    assert_ne!(Kept::of(cloud).await, before);
}
