//! The service as clients see it, on both databases.

use std::collections::HashMap;
use std::sync::Arc;

use axum::body::Body;
use bytes::Bytes;
use futures::StreamExt;
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::{Value, json};

use super::*;
use crate::clock::SystemClock;
use crate::database::testing;
use crate::http::{
    App, AppParts, Authenticate, Domain, Identity, Project, Public, PublicUrl, Refused, Role,
};
use crate::identity::Realm;
use crate::image::blob::FileStore;
use crate::random::SystemRandom;

mod bounds;
mod full;
mod wire;

/// The projects of the tokens `one` and `two`.
const ONE: &str = "0000000000000000000000000000001a";
const TWO: &str = "0000000000000000000000000000002a";

#[derive(Debug)]
struct Tokens(HashMap<&'static str, Arc<Identity>>);

#[async_trait::async_trait]
impl Authenticate for Tokens {
    async fn authenticate(&self, token: &str) -> Result<Arc<Identity>, Refused> {
        self.0.get(token).cloned().ok_or(Refused::Invalid)
    }
}

fn identity(project: &str, role: &str) -> Arc<Identity> {
    let domain = Domain {
        id: "default".into(),
        name: "Default".into(),
    };
    Arc::new(Identity {
        user_id: "u".into(),
        user_name: "u".into(),
        user_domain: domain.clone(),
        project: Some(Project {
            id: project.into(),
            name: project.into(),
            domain,
        }),
        domain: None,
        system: false,
        roles: vec![Role {
            id: "r".into(),
            name: role.into(),
        }],
        methods: vec!["password".into()],
        audit_ids: vec!["a".into()],
        issued_at_us: 0,
        expires_at_us: i64::MAX,
    })
}

struct Cloud {
    public: Public,
    images: Images,
    folder: tempfile::TempDir,
}

async fn cloud(database: Database) -> Cloud {
    cloud_within(database, Limits::default()).await
}

async fn cloud_within(database: Database, limits: Limits) -> Cloud {
    let folder = tempfile::tempdir().unwrap();
    let blobs = FileStore::open(folder.path(), "c").await.unwrap();
    let images = Images::new(database.clone(), Arc::new(blobs)).within(limits);
    let tokens = Tokens(HashMap::from([
        ("admin", identity("admins", "admin")),
        ("one", identity(ONE, "member")),
        ("two", identity(TWO, "member")),
        ("reader", identity(ONE, "reader")),
    ]));
    let app = App::new(AppParts {
        public_url: PublicUrl::parse("http://127.0.0.1:5000").unwrap(),
        database: database.clone(),
        clock: SystemClock::shared(),
        random: SystemRandom::shared(),
        authenticator: Arc::new(tokens),
        realm: Realm::idle(&database).await,
        images: images.clone(),
        compute: crate::compute::testing::idle(&database),
        hosts: crate::hosts::Hosts::idle(&database).await.unwrap(),
    });
    let public = Public::new(app, vec![routes()]);
    Cloud {
        public,
        images,
        folder,
    }
}

/// Runs a test on each engine.
macro_rules! on_both {
    ($name:ident, $cloud:ident, $body:block) => {
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            testing::engines(|database| async move {
                let $cloud = cloud(database).await;
                $body
            })
            .await;
        }
    };
}

mod snapshot;

struct Answer {
    status: StatusCode,
    headers: http::HeaderMap,
    bytes: Bytes,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap()
    }
}

impl Cloud {
    async fn send(&self, request: Request<Body>) -> Answer {
        let (parts, body) = self.public.serve(request).await.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        Answer {
            status: parts.status,
            headers: parts.headers,
            bytes,
        }
    }

    async fn call(&self, who: &str, method: Method, path: &str, body: Value) -> Answer {
        let kind = if method == Method::PATCH {
            patch::MEDIA_TYPES[1]
        } else {
            "application/json"
        };
        let body = if body.is_null() {
            Body::empty()
        } else {
            Body::from(body.to_string())
        };
        let request = Request::builder()
            .method(method)
            .uri(format!("/image{path}"))
            .header("x-auth-token", who)
            .header("content-type", kind)
            .header("accept", "application/json")
            .body(body)
            .unwrap();
        self.send(request).await
    }

    async fn get(&self, who: &str, path: &str) -> Answer {
        self.call(who, Method::GET, path, Value::Null).await
    }

    async fn create(&self, who: &str, body: Value) -> String {
        let answer = self.call(who, Method::POST, "/v2/images", body).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{:?}", answer.bytes);
        answer.json()["id"].as_str().unwrap().to_owned()
    }

    async fn put_bytes(&self, who: &str, path: &str, body: Body) -> Answer {
        let request = Request::builder()
            .method(Method::PUT)
            .uri(format!("/image{path}"))
            .header("x-auth-token", who)
            .header("content-type", "application/octet-stream")
            .header("accept", "application/json")
            .body(body)
            .unwrap();
        self.send(request).await
    }

    async fn raw(&self, who: &str, more: Value) -> String {
        let mut body = json!({"name": "i", "disk_format": "raw", "container_format": "bare"});
        for (name, value) in more.as_object().unwrap() {
            body[name] = value.clone();
        }
        self.create(who, body).await
    }

    fn files(&self) -> usize {
        std::fs::read_dir(self.folder.path()).unwrap().count()
    }
}

on_both!(bytes_come_back_as_they_were_sent, cloud, {
    let id = cloud.raw("one", json!({})).await;
    let bytes: Vec<u8> = (0..300_000_u32).map(|at| at as u8).collect();
    let path = format!("/v2/images/{id}/file");
    assert_eq!(cloud.get("one", &path).await.status, StatusCode::NO_CONTENT);
    let answer = cloud
        .put_bytes("one", &path, Body::from(bytes.clone()))
        .await;
    assert_eq!(answer.status, StatusCode::NO_CONTENT, "{:?}", answer.bytes);

    let image = cloud.get("one", &format!("/v2/images/{id}")).await.json();
    assert_eq!(image["status"], "active");
    assert_eq!(
        (&image["size"], &image["virtual_size"]),
        (&json!(300_000), &json!(300_000))
    );
    assert_eq!(image["os_hash_algo"], "sha512");

    let whole = cloud.get("one", &path).await;
    assert_eq!(whole.bytes, bytes);
    assert_eq!(
        whole.headers["content-md5"].to_str().unwrap(),
        image["checksum"]
    );
    let again = cloud.put_bytes("one", &path, Body::from("zz")).await;
    assert_eq!(again.status, StatusCode::CONFLICT);

    let request = Request::builder()
        .uri(format!("/image{path}"))
        .header("x-auth-token", "one")
        .header("range", "bytes=10-19")
        .body(Body::empty())
        .unwrap();
    let part = cloud.send(request).await;
    assert_eq!(part.status, StatusCode::PARTIAL_CONTENT);
    assert_eq!(part.bytes, bytes[10..20]);
    assert_eq!(part.headers["content-range"], "bytes 10-19/300000");

    let gone = cloud
        .call(
            "one",
            Method::DELETE,
            &format!("/v2/images/{id}"),
            Value::Null,
        )
        .await;
    assert_eq!(gone.status, StatusCode::NO_CONTENT);
    assert_eq!(cloud.get("one", &path).await.status, StatusCode::NOT_FOUND);
    assert_eq!(cloud.files(), 0);
});

on_both!(
    an_upload_that_is_cut_off_leaves_a_queued_image_and_no_bytes,
    cloud,
    {
        let id = cloud.raw("one", json!({})).await;
        let path = format!("/v2/images/{id}/file");
        let cut = futures::stream::iter([
            Ok(Bytes::from(vec![1; 100_000])),
            Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset)),
        ]);
        let answer = cloud.put_bytes("one", &path, Body::from_stream(cut)).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST);
        let image = cloud.get("one", &format!("/v2/images/{id}")).await.json();
        assert_eq!(
            (&image["status"], &image["size"]),
            (&json!("queued"), &Value::Null)
        );
        assert_eq!(cloud.files(), 0);
        let answer = cloud.put_bytes("one", &path, Body::from("whole")).await;
        assert_eq!(answer.status, StatusCode::NO_CONTENT);
    }
);

on_both!(
    a_client_that_goes_away_in_an_upload_leaves_nothing,
    cloud,
    {
        let id = cloud.raw("one", json!({})).await;
        let begun = Arc::new(tokio::sync::Notify::new());
        let told = Arc::clone(&begun);
        let endless = futures::stream::once(async move {
            told.notify_one();
            Ok::<_, std::io::Error>(Bytes::from(vec![1; 100_000]))
        })
        .chain(futures::stream::pending());
        let path = format!("/v2/images/{id}/file");
        tokio::select! {
            _ = cloud.put_bytes("one", &path, Body::from_stream(endless)) => unreachable!(),
            () = begun.notified() => {}
        }
        // The request is dropped now; what it had begun is undone in the background.
        let patience = std::time::Instant::now();
        while cloud.get("one", &format!("/v2/images/{id}")).await.json()["status"] != "queued"
            || cloud.files() != 0
        {
            assert!(
                patience.elapsed().as_secs() < 30,
                "the upload is not undone"
            );
            tokio::task::yield_now().await;
        }
    }
);

on_both!(
    a_controller_that_died_in_an_upload_mends_it_at_its_next_start,
    cloud,
    {
        let id = cloud.raw("one", json!({})).await;
        let caller = crate::http::Caller::new(identity(ONE, "member"), "one".into());
        let database = &cloud.images.database;
        store::begin_upload(
            database,
            &caller,
            &id,
            "c.dead".into(),
            store::Upload::Direct,
            1,
        )
        .await
        .unwrap();
        std::fs::write(cloud.folder.path().join("c.dead.part"), b"half").unwrap();
        std::fs::write(cloud.folder.path().join("c.orphan"), b"nobody's").unwrap();
        std::fs::write(
            cloud.folder.path().join("other.blob"),
            b"another controller's",
        )
        .unwrap();
        cloud.images.recover(2, Sweep::Remove).await.unwrap();
        let image = cloud.get("one", &format!("/v2/images/{id}")).await.json();
        assert_eq!(image["status"], "queued");
        assert_eq!(cloud.files(), 1);
        // After a restore of the database they may be somebody's disk.
        let file = |name: &str| cloud.folder.path().join(name);
        std::fs::write(file("c.whole"), b"of a server").unwrap();
        std::fs::write(file("c.begun.part"), b"half").unwrap();
        for sweep in [Sweep::SetAside, Sweep::Remove] {
            cloud.images.recover(3, sweep).await.unwrap();
            let kept = std::fs::read(file("unnamed-c.whole")).unwrap();
            assert_eq!(kept, b"of a server");
            assert_eq!(cloud.files(), 2);
        }
    }
);

on_both!(content_that_is_not_what_it_claims_is_refused, cloud, {
    let mut qcow2 = vec![0_u8; 70_000];
    qcow2[..4].copy_from_slice(b"QFI\xfb");
    qcow2[7] = 3;
    qcow2[23] = 16;
    qcow2[103] = 104;
    let mut backed = qcow2.clone();
    backed[15] = 112;
    for (claimed, bytes, part) in [
        ("raw", &qcow2, "claims raw and is qcow2"),
        ("qcow2", &backed, "backing file"),
    ] {
        let id = cloud.raw("one", json!({"disk_format": claimed})).await;
        let path = format!("/v2/images/{id}/file");
        let answer = cloud
            .put_bytes("one", &path, Body::from(bytes.clone()))
            .await;
        assert_eq!(answer.status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
        assert!(
            answer.json()["message"].as_str().unwrap().contains(part),
            "{:?}",
            answer.bytes
        );
        let image = cloud.get("one", &format!("/v2/images/{id}")).await.json();
        assert_eq!(image["status"], "queued");
    }
    assert_eq!(cloud.files(), 0);
    let id = cloud.raw("one", json!({"disk_format": "qcow2"})).await;
    let path = format!("/v2/images/{id}/file");
    let answer = cloud.put_bytes("one", &path, Body::from(qcow2)).await;
    assert_eq!(answer.status, StatusCode::NO_CONTENT);
});

on_both!(staged_bytes_become_active_by_an_import, cloud, {
    let id = cloud.raw("one", json!({})).await;
    let import = json!({"method": {"name": "glance-direct"}});
    let path = format!("/v2/images/{id}/import");
    let early = cloud.call("one", Method::POST, &path, import.clone()).await;
    assert_eq!(early.status, StatusCode::CONFLICT);
    let staged = cloud
        .put_bytes("one", &format!("/v2/images/{id}/stage"), Body::from("x"))
        .await;
    assert_eq!(staged.status, StatusCode::NO_CONTENT);
    let image = cloud.get("one", &format!("/v2/images/{id}")).await.json();
    assert_eq!(image["status"], "uploading");
    assert_eq!(
        cloud.call("one", Method::POST, &path, import).await.status,
        StatusCode::ACCEPTED
    );
    let image = cloud.get("one", &format!("/v2/images/{id}")).await.json();
    assert_eq!(image["status"], "active");
});

on_both!(
    others_see_an_image_only_as_far_as_its_visibility_goes,
    cloud,
    {
        let private = cloud.raw("one", json!({"visibility": "private"})).await;
        let shared = cloud.raw("one", json!({})).await;
        let public = cloud.raw("admin", json!({"visibility": "public"})).await;
        let community = cloud.raw("one", json!({"visibility": "community"})).await;
        let listed = async |who: &str, query: &str| {
            let body = cloud.get(who, &format!("/v2/images{query}")).await.json();
            let images = body["images"].as_array().unwrap().clone();
            images
                .iter()
                .map(|image| image["id"].as_str().unwrap().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(listed("two", "").await, std::slice::from_ref(&public));
        assert_eq!(
            listed("two", "?visibility=community").await,
            std::slice::from_ref(&community)
        );
        let mut own = listed("one", "?sort=created_at:asc").await;
        assert_eq!(own, [&*private, &*shared, &*public, &*community]);
        own.reverse();
        assert_eq!(listed("one", "").await, own);

        let path = format!("/v2/images/{shared}");
        assert_eq!(cloud.get("two", &path).await.status, StatusCode::NOT_FOUND);
        let members = format!("{path}/members");
        let member = json!({"member": TWO});
        let added = cloud
            .call("one", Method::POST, &members, member.clone())
            .await;
        assert_eq!(
            (added.status, &added.json()["status"]),
            (StatusCode::OK, &json!("pending"))
        );
        let again = cloud.call("one", Method::POST, &members, member).await;
        assert_eq!(again.status, StatusCode::CONFLICT);
        assert_eq!(cloud.get("two", &path).await.status, StatusCode::OK);
        assert_eq!(listed("two", "").await, std::slice::from_ref(&public));
        assert_eq!(
            listed("two", "?member_status=pending&visibility=shared").await,
            std::slice::from_ref(&shared)
        );

        let answer = json!({"status": "accepted"});
        let mine = format!("{members}/{TWO}");
        let by_owner = cloud.call("one", Method::PUT, &mine, answer.clone()).await;
        assert_eq!(by_owner.status, StatusCode::FORBIDDEN);
        let by_member = cloud.call("two", Method::PUT, &mine, answer).await;
        assert_eq!(by_member.status, StatusCode::OK);
        assert_eq!(listed("two", "").await, [public, shared]);

        let rename = json!([{"op": "replace", "path": "/name", "value": "mine"}]);
        let by_member = cloud.call("two", Method::PATCH, &path, rename).await;
        assert_eq!(by_member.status, StatusCode::FORBIDDEN);
        let delete = cloud.call("two", Method::DELETE, &path, Value::Null).await;
        assert_eq!(delete.status, StatusCode::FORBIDDEN);
    }
);

on_both!(pages_meet_every_image_once_in_any_order, cloud, {
    let mut ids = Vec::new();
    for at in 0..7 {
        let name = if at % 3 == 0 {
            Value::Null
        } else {
            json!(format!("n{}", at / 2))
        };
        ids.push(cloud.raw("one", json!({"name": name})).await);
    }
    ids.sort();
    for sort in [
        "sort=name:asc",
        "sort=name:desc",
        "sort_key=size&sort_dir=asc",
        "sort_key=id",
    ] {
        let mut seen = Vec::new();
        let mut next = Some(format!("/v2/images?limit=2&{sort}"));
        while let Some(path) = next {
            let body = cloud.get("one", &path).await.json();
            let images = body["images"].as_array().unwrap().clone();
            seen.extend(
                images
                    .iter()
                    .map(|image| image["id"].as_str().unwrap().to_owned()),
            );
            next = body["next"].as_str().map(str::to_owned);
            assert!(seen.len() <= ids.len(), "{sort} goes round");
        }
        seen.sort();
        assert_eq!(seen, ids, "{sort}");
    }
});

on_both!(patches_change_what_they_may_and_nothing_else, cloud, {
    let id = cloud
        .raw("one", json!({"tags": ["b", "a", "b"], "color": "red"}))
        .await;
    let path = format!("/v2/images/{id}");
    let patch = |body: Value| cloud.call("one", Method::PATCH, &path, body);
    let changed = patch(json!([
        {"op": "replace", "path": "/name", "value": "new"},
        {"op": "add", "path": "/hw_disk_bus", "value": "virtio"},
        {"op": "remove", "path": "/color"},
        {"op": "replace", "path": "/protected", "value": true},
    ]))
    .await
    .json();
    assert_eq!(changed["name"], "new");
    assert_eq!(changed["hw_disk_bus"], "virtio");
    assert_eq!(changed["tags"], json!(["a", "b"]));
    assert_eq!(changed.get("color"), None);
    for (body, status) in [
        (json!([{"op": "replace", "path": "/id", "value": "x"}]), 403),
        (
            json!([{"op": "add", "path": "/os_glance_x", "value": "x"}]),
            403,
        ),
        (
            json!([{"op": "replace", "path": "/visibility", "value": "public"}]),
            403,
        ),
        (
            json!([{"op": "replace", "path": "/owner", "value": TWO}]),
            403,
        ),
        (
            json!([{"op": "replace", "path": "/nothing", "value": "x"}]),
            409,
        ),
        (json!([{"op": "remove", "path": "/nothing"}]), 409),
        (
            json!([{"op": "replace", "path": "/min_ram", "value": "x"}]),
            400,
        ),
        (
            json!([{"op": "replace", "path": "/min_ram", "value": -1}]),
            400,
        ),
    ] {
        assert_eq!(patch(body.clone()).await.status.as_u16(), status, "{body}");
    }
    // The last is refused whole: its first change is not kept.
    let both = json!([
        {"op": "replace", "path": "/name", "value": "half"},
        {"op": "remove", "path": "/nothing"},
    ]);
    patch(both).await;
    assert_eq!(cloud.get("one", &path).await.json()["name"], "new");
    let delete = cloud.call("one", Method::DELETE, &path, Value::Null).await;
    assert_eq!(delete.status, StatusCode::FORBIDDEN);
});

on_both!(filters_choose_by_attribute_tag_property_and_time, cloud, {
    let a = cloud
        .raw(
            "one",
            json!({"name": "a", "tags": ["x", "y"], "color": "red"}),
        )
        .await;
    let b = cloud
        .raw(
            "one",
            json!({"name": "b", "tags": ["x"], "os_hidden": true}),
        )
        .await;
    let bytes = cloud
        .put_bytes("one", &format!("/v2/images/{a}/file"), Body::from("12345"))
        .await;
    assert_eq!(bytes.status, StatusCode::NO_CONTENT);
    for (query, expected) in [
        ("tag=x&tag=y", vec![&a]),
        ("tag=x&os_hidden=true", vec![&b]),
        ("color=red", vec![&a]),
        ("color=blue", vec![]),
        ("name=in:a,b", vec![&a]),
        ("size_min=5&size_max=5", vec![&a]),
        ("size_min=6", vec![]),
        ("status=active", vec![&a]),
        ("created_at=gt:2000-01-01T00:00:00Z", vec![&a]),
        ("created_at=lt:2000-01-01T00:00:00", vec![]),
    ] {
        let body = cloud
            .get("one", &format!("/v2/images?{query}"))
            .await
            .json();
        let ids: Vec<_> = body["images"]
            .as_array()
            .unwrap()
            .iter()
            .map(|i| i["id"].clone())
            .collect();
        assert_eq!(json!(ids), json!(expected), "{query}");
    }
    for query in [
        "sort_key=bogus",
        "marker=bogus",
        "limit=-1",
        "visibility=x",
        "created_at=x",
    ] {
        let answer = cloud.get("one", &format!("/v2/images?{query}")).await;
        assert_eq!(answer.status, StatusCode::BAD_REQUEST, "{query}");
    }
});

on_both!(a_deactivated_image_is_read_by_administrators_only, cloud, {
    let id = cloud.raw("one", json!({})).await;
    let file = format!("/v2/images/{id}/file");
    cloud.put_bytes("one", &file, Body::from("x")).await;
    let actions = format!("/v2/images/{id}/actions");
    let off = cloud
        .call(
            "one",
            Method::POST,
            &format!("{actions}/deactivate"),
            Value::Null,
        )
        .await;
    assert_eq!(off.status, StatusCode::NO_CONTENT);
    assert_eq!(cloud.get("one", &file).await.status, StatusCode::FORBIDDEN);
    assert_eq!(cloud.get("admin", &file).await.status, StatusCode::OK);
    let on = cloud
        .call(
            "one",
            Method::POST,
            &format!("{actions}/reactivate"),
            Value::Null,
        )
        .await;
    assert_eq!(on.status, StatusCode::NO_CONTENT);
    assert_eq!(cloud.get("one", &file).await.status, StatusCode::OK);
});

on_both!(bad_requests_get_glances_errors, cloud, {
    for (body, status) in [
        (json!({"name": "x", "disk_format": "wrong"}), 400),
        (json!({"name": 5}), 400),
        (json!({"name": "x".repeat(256)}), 400),
        (json!({"foo": 5}), 400),
        (json!({"id": "notuuid"}), 400),
        (json!({"min_disk": -1}), 400),
        (json!({"os_glance_foo": "bar"}), 403),
        (json!({"status": "active"}), 403),
        (json!({"visibility": "public"}), 403),
        (json!({"owner": TWO}), 403),
    ] {
        let answer = cloud
            .call("one", Method::POST, "/v2/images", body.clone())
            .await;
        assert_eq!(answer.status.as_u16(), status, "{body} {:?}", answer.bytes);
        assert!(answer.json()["message"].is_string());
    }
    let id = cloud.create("one", json!({"name": "bare"})).await;
    let path = format!("/v2/images/{id}/file");
    let unset = cloud.put_bytes("one", &path, Body::from("x")).await;
    assert_eq!(unset.status, StatusCode::BAD_REQUEST);
    let twice = cloud
        .call("one", Method::POST, "/v2/images", json!({"id": id}))
        .await;
    assert_eq!(twice.status, StatusCode::CONFLICT);
    let by_reader = cloud
        .call("reader", Method::POST, "/v2/images", json!({}))
        .await;
    assert_eq!(by_reader.status, StatusCode::FORBIDDEN);
});
