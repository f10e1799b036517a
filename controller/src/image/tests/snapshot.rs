//! Images that are filled by an operation.

use super::*;
use crate::image::store::Uploaded;

/// One that nobody has begun to fill.
async fn queued(cloud: &Cloud, shared_with: Option<&str>) -> String {
    let id = Uuid::new_v4().to_string();
    let mut image = crate::image::snapshot::new(id.clone(), ONE.to_owned(), 1);
    image.row.disk_format = Some("raw".to_owned());
    image.row.container_format = Some("bare".to_owned());
    let shared_with = shared_with.map(str::to_owned);
    let added = cloud.images.database.write(move |tx| {
        let (image, shared_with) = (image.clone(), shared_with.clone());
        Box::pin(async move { Images::add(tx, image, shared_with).await })
    });
    added.await.unwrap();
    id
}

/// Its bytes are in the store, and not the image's yet.
async fn filled(cloud: &Cloud, id: &str, key: &str) -> Uploaded {
    let begun = cloud.images.begin_filling(id, key, 2).await;
    let mut intake = begun.unwrap().unwrap();
    intake.take(Bytes::from_static(b"content")).await.unwrap();
    intake.take_zeroes(5 << 20).await.unwrap();
    intake.finish().await.unwrap()
}

on_both!(one_that_is_whole_is_not_discarded, cloud, {
    let id = queued(&cloud, None).await;
    let found = filled(&cloud, &id, "c.1").await;
    let ended = cloud.images.end_filling(&id, "c.1", found, 3).await;
    assert!(ended.unwrap());
    // By whoever did not hear that, and gives up.
    cloud.images.discard(&id, 4).await.unwrap();
    let image = cloud.get("one", &format!("/v2/images/{id}")).await.json();
    assert_eq!(image["status"], "active");
    let file = cloud.get("one", &format!("/v2/images/{id}/file")).await;
    assert_eq!(file.bytes.len(), 7 + (5 << 20));
    assert!(file.bytes.starts_with(b"content\0"));

    let id = queued(&cloud, None).await;
    filled(&cloud, &id, "c.2").await;
    cloud.images.discard(&id, 4).await.unwrap();
    let gone = cloud.get("one", &format!("/v2/images/{id}")).await;
    assert_eq!((gone.status, cloud.files()), (StatusCode::NOT_FOUND, 1));
});

on_both!(
    whoever_begins_anew_takes_away_what_was_left_of_before,
    cloud,
    {
        let id = queued(&cloud, None).await;
        // Its controller ended before it could say that these are the image's.
        filled(&cloud, &id, "c.1").await;
        assert_eq!(cloud.files(), 1);
        let found = filled(&cloud, &id, "c.2").await;
        assert_eq!(cloud.files(), 1);
        let late = cloud.images.end_filling(&id, "c.1", found.clone(), 3).await;
        assert!(!late.unwrap());
        let ended = cloud.images.end_filling(&id, "c.2", found, 3).await;
        assert!(ended.unwrap());
        assert_eq!(cloud.files(), 1);
    }
);

on_both!(the_project_that_it_is_shared_with_is_a_member, cloud, {
    let id = queued(&cloud, Some(TWO)).await;
    let path = format!("/v2/images/{id}");
    assert_eq!(cloud.get("two", &path).await.status, StatusCode::OK);
    let members = cloud.get("one", &format!("{path}/members")).await.json();
    let member = &members["members"][0];
    assert_eq!(
        (&member["member_id"], &member["status"]),
        (&json!(TWO), &json!("pending"))
    );
});
