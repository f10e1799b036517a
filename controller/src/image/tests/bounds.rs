//! What an upload may take, and what is left of one that does not come to its end.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_beyond_the_limits_is_refused_and_leaves_nothing() {
    let small = Limits {
        image: 1000,
        reserve: 0,
        ..Limits::default()
    };
    let crowded = Limits {
        reserve: u64::MAX,
        ..Limits::default()
    };
    for (limits, fits) in [(small, 204), (crowded, 413)] {
        let database = testing::database().await;
        let cloud = cloud_within(database.database.clone(), limits).await;
        let id = cloud.raw("one", json!({})).await;
        let path = format!("/v2/images/{id}/file");
        let over = cloud
            .put_bytes("one", &path, Body::from(vec![1; 1001]))
            .await;
        assert_eq!(over.status, StatusCode::PAYLOAD_TOO_LARGE);
        let image = cloud.get("one", &format!("/v2/images/{id}")).await.json();
        assert_eq!((&image["status"], cloud.files()), (&json!("queued"), 0));
        let within = cloud
            .put_bytes("one", &path, Body::from(vec![1; 1000]))
            .await;
        assert_eq!(within.status.as_u16(), fits);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_project_has_no_more_bytes_of_images_than_its_quota() {
    let database = testing::database().await;
    let limits = Limits {
        project: Some(1000),
        ..Limits::default()
    };
    let cloud = cloud_within(database.database.clone(), limits).await;
    let upload = async |who: &str, size: usize| {
        let id = cloud.raw(who, json!({})).await;
        let path = format!("/v2/images/{id}/file");
        let answer = cloud.put_bytes(who, &path, Body::from(vec![1; size])).await;
        (id, answer)
    };
    let (kept, answer) = upload("one", 600).await;
    assert_eq!(answer.status, StatusCode::NO_CONTENT);
    let (refused, answer) = upload("one", 500).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    let image = format!("/v2/images/{refused}");
    let image = cloud.get("one", &image).await.json();
    assert_eq!((&image["status"], cloud.files()), (&json!("queued"), 1));
    // Others have a quota of their own, and what is deleted is given back.
    assert_eq!(upload("two", 1000).await.1.status, StatusCode::NO_CONTENT);
    let path = format!("/v2/images/{kept}");
    cloud.call("one", Method::DELETE, &path, Value::Null).await;
    let path = format!("/v2/images/{refused}/file");
    let again = cloud
        .put_bytes("one", &path, Body::from(vec![1; 500]))
        .await;
    assert_eq!(again.status, StatusCode::NO_CONTENT);
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_come_in_together_do_not_share_what_is_left_of_a_quota() {
    let database = testing::database().await;
    let limits = Limits {
        project: Some(1000),
        ..Limits::default()
    };
    let cloud = cloud_within(database.database.clone(), limits).await;
    let (first, second) = (
        cloud.raw("one", json!({})).await,
        cloud.raw("one", json!({})).await,
    );
    // Each has been asked for its last byte before the other's have become an image's.
    let barrier = Arc::new(tokio::sync::Barrier::new(2));
    let upload = async |id: &str| {
        let barrier = Arc::clone(&barrier);
        let bytes = futures::stream::once(async move {
            barrier.wait().await;
            Ok::<_, std::io::Error>(Bytes::from(vec![1; 600]))
        });
        let path = format!("/v2/images/{id}/file");
        cloud
            .put_bytes("one", &path, Body::from_stream(bytes))
            .await
            .status
            .as_u16()
    };
    let (a, b) = futures::join!(upload(&first), upload(&second));
    let mut statuses = [a, b];
    statuses.sort_unstable();
    assert_eq!((statuses, cloud.files()), ([204, 413], 1));
}

/// A commit whose answer was lost looks like a failure to whoever undoes.
#[tokio::test]
async fn an_upload_that_had_come_to_its_end_is_not_undone() {
    let database = testing::database().await;
    let cloud = cloud_within(database.database.clone(), Limits::default()).await;
    let id = cloud.raw("one", json!({})).await;
    let path = format!("/v2/images/{id}/file");
    let whole = cloud.put_bytes("one", &path, Body::from("whole")).await;
    assert_eq!(whole.status, StatusCode::NO_CONTENT);
    let row = store::find(database.database.reader(), &id).await.unwrap();
    let blob = row.unwrap().row.blob.unwrap();
    let undone = store::abandon_upload(&database.database, &id, &blob, 0).await;
    assert_eq!(undone.unwrap(), store::Abandoned::WasWhole);
    assert_eq!(cloud.get("one", &path).await.bytes, "whole");
    // Of an upload that nobody knows any more the bytes are nobody's.
    let undone = store::abandon_upload(&database.database, &id, "other", 0).await;
    assert_eq!(undone.unwrap(), store::Abandoned::Queued);
    assert_eq!(cloud.get("one", &path).await.bytes, "whole");
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_come_in_together_are_bounded_by_the_quota_before_any_has_come_to_its_end() {
    let database = testing::database().await;
    let limits = Limits {
        project: Some(1000),
        ..Limits::default()
    };
    let cloud = cloud_within(database.database.clone(), limits).await;
    let (first, second) = (
        cloud.raw("one", json!({})).await,
        cloud.raw("one", json!({})).await,
    );
    let (held, refused) = (
        Arc::new(tokio::sync::Notify::new()),
        Arc::new(tokio::sync::Notify::new()),
    );
    let (tell, wait) = (Arc::clone(&held), Arc::clone(&refused));
    // Its first bytes are there, its last come only when the other has been refused.
    let slow = futures::stream::iter([0, 1]).then(move |turn| {
        let (tell, wait) = (Arc::clone(&tell), Arc::clone(&wait));
        async move {
            if turn == 1 {
                tell.notify_one();
                wait.notified().await;
            }
            Ok::<_, std::io::Error>(Bytes::from(vec![1; 300]))
        }
    });
    let path = |id: &str| format!("/v2/images/{id}/file");
    let (slow_path, fast_path) = (path(&first), path(&second));
    let fast = async {
        held.notified().await;
        let bytes = Body::from(vec![1; 800]);
        let answer = cloud.put_bytes("one", &fast_path, bytes).await;
        refused.notify_one();
        answer.status
    };
    let slow = cloud.put_bytes("one", &slow_path, Body::from_stream(slow));
    let (slow, fast) = futures::join!(slow, fast);
    assert_eq!(
        (slow.status, fast),
        (StatusCode::NO_CONTENT, StatusCode::PAYLOAD_TOO_LARGE)
    );
    assert_eq!(cloud.files(), 1);
}
