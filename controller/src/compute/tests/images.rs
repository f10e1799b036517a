//! What becomes of servers whose image is deleted.

use http::StatusCode;
use sea_orm::sea_query::Expr;
use sea_orm::{ColumnTrait, EntityTrait, QueryFilter};
use serde_json::json;

use super::cloud::{Cloud, DISK, KERNEL};
use crate::image::store::image;

/// As `DELETE /v2/images/{id}` leaves it.
async fn delete(cloud: &Cloud, ids: &'static [&'static str]) {
    let gone = cloud.app.database().write(move |tx| {
        Box::pin(async move {
            image::Entity::update_many()
                .col_expr(image::Column::DeletedAtUs, Expr::value(2_i64))
                .filter(image::Column::Id.is_in(ids.iter().copied()))
                .exec(tx)
                .await
        })
    });
    assert_eq!(gone.await.unwrap().rows_affected, ids.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_runs_on_without_its_image_and_cannot_be_made_anew_from_it() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    delete(&cloud, &[DISK, KERNEL]).await;
    for (action, status) in [
        (json!({"os-stop": null}), "SHUTOFF"),
        (json!({"os-start": null}), "ACTIVE"),
        (json!({"reboot": {"type": "HARD"}}), "ACTIVE"),
    ] {
        let done = cloud.act("one", &id, "2.96", action).await;
        assert_eq!(done.status, StatusCode::ACCEPTED, "{}", done.json);
        let server = cloud
            .until("one", &id, |server| server["status"] == status)
            .await;
        // Nova shows the image's id also when it is gone.
        assert_eq!(server["image"]["id"], DISK);
    }
    let rebuild = json!({"rebuild": {"imageRef": DISK}});
    let refused = cloud.act("one", &id, "2.96", rebuild).await;
    assert_eq!(refused.status, StatusCode::BAD_REQUEST, "{}", refused.json);
    assert_eq!(refused.message(), "Cannot find image for rebuild");
    let server = cloud
        .until("one", &id, |server| server["status"] == "ACTIVE")
        .await;
    assert_eq!(server["image"]["id"], DISK);
}
