//! A disk that is full before an upload has come to its end.

use super::*;
use crate::small_disk::{Filler, on_a_small_disk};

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_fills_the_disk_is_refused_in_glances_form_and_leaves_nothing() {
    let name = "an_upload_that_fills_the_disk_is_refused_in_glances_form_and_leaves_nothing";
    if !on_a_small_disk(module_path!(), name) {
        return;
    }
    let limits = Limits {
        reserve: 0,
        project: Some(6 << 20),
        ..Limits::default()
    };
    let unlimited = Limits {
        project: None,
        ..limits
    };
    for (limits, kind) in [(unlimited, "file"), (unlimited, "stage"), (limits, "file")] {
        // The database is elsewhere: here the images' disk is full.
        let database = testing::database_in_memory().await;
        let cloud = cloud_within(database.database.clone(), limits).await;
        let id = cloud.raw("one", json!({})).await;
        let path = format!("/v2/images/{id}/{kind}");
        let upload = async |size: usize| {
            let chunks = futures::stream::iter((0..size >> 16).map(|_| vec![7; 1 << 16]));
            let chunks = chunks.map(|chunk| Ok::<_, std::io::Error>(Bytes::from(chunk)));
            cloud
                .put_bytes("one", &path, Body::from_stream(chunks))
                .await
        };
        // Full in the middle, and full from the beginning.
        let filler = limits.project.map(|_| Filler::new());
        let size = if filler.is_some() { 1 << 20 } else { 16 << 20 };
        let refused = upload(size).await;
        let text = String::from_utf8_lossy(&refused.bytes).into_owned();
        assert_eq!(refused.status, StatusCode::PAYLOAD_TOO_LARGE, "{text}");
        assert!(text.contains("Image storage media is full"), "{text}");
        let image = cloud.get("one", &format!("/v2/images/{id}")).await.json();
        assert_eq!((&image["status"], cloud.files()), (&json!("queued"), 0));
        assert_eq!(image["size"], Value::Null);
        drop(filler);
        // Nothing of it is held against the project, and the image takes its bytes after all.
        let whole = upload(5 << 20).await;
        assert_eq!(whole.status, StatusCode::NO_CONTENT, "{:?}", whole.bytes);
        let path = format!("/v2/images/{id}");
        let gone = cloud.call("one", Method::DELETE, &path, Value::Null).await;
        assert_eq!((gone.status, cloud.files()), (StatusCode::NO_CONTENT, 0));
    }
}
