//! A disk that has no room left, for images and for the database ([`crate::small_disk`]).

use super::*;
use crate::small_disk::{Filler, on_a_small_disk};

/// A database on that disk: PostgreSQL's files are its server's.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_database_refuses_writes_in_the_services_form_and_works_again_with_room() {
    let name = "a_full_database_refuses_writes_in_the_services_form_and_works_again_with_room";
    if crate::database::testing::on_postgres() || !on_a_small_disk(module_path!(), name) {
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
