//! Views and lists of servers, and what hangs on a server: metadata and tags.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn the_fields_of_a_server_come_with_their_microversions() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let path = format!("/v2.1/servers/{id}");
    for (field, minor, admin) in [
        ("OS-EXT-SRV-ATTR:hostname", 3, true),
        ("OS-EXT-SRV-ATTR:user_data", 3, true),
        ("locked", 9, false),
        ("host_status", 16, true),
        ("description", 19, false),
        ("tags", 26, false),
        ("trusted_image_certificates", 63, false),
        ("server_groups", 71, false),
        ("locked_reason", 73, false),
        ("OS-EXT-SRV-ATTR:hostname", 90, false),
        ("pinned_availability_zone", 96, false),
    ] {
        let who = if admin { "admin" } else { "one" };
        for (version, there) in [(minor - 1, false), (minor, true)] {
            let shown = cloud.get(who, &path, &format!("2.{version}")).await.json;
            assert_eq!(
                shown["server"].get(field).is_some(),
                there,
                "{field} at 2.{version}"
            );
        }
        if admin && minor < 90 {
            let shown = cloud.get("one", &path, "2.89").await.json;
            assert!(
                shown["server"].get(field).is_none(),
                "{field} is for administrators"
            );
        }
    }
    let old = cloud.get("one", &path, "2.46").await.json;
    assert_eq!(keys(&old["server"]["flavor"]), ["id", "links"]);
    let new = cloud.get("one", &path, "2.47").await.json;
    assert_eq!(
        keys(&new["server"]["flavor"]),
        [
            "disk",
            "ephemeral",
            "extra_specs",
            "original_name",
            "ram",
            "swap",
            "vcpus"
        ]
    );
    let update = async |version| {
        let body = json!({"server": {}});
        cloud
            .call("one", Method::PUT, &path, version, body)
            .await
            .json["server"]
            .clone()
    };
    assert!(update("2.74").await.get("OS-EXT-STS:vm_state").is_none());
    assert!(update("2.75").await.get("OS-EXT-STS:vm_state").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_filtered_and_sorted() {
    let cloud = Cloud::new().await;
    let mut ids = Vec::new();
    for name in ["b", "a", "c"] {
        ids.push(cloud.running("one", name).await);
    }
    cloud.running("two", "other").await;
    let names = async |who, query: &str, version| -> Vec<String> {
        let list = cloud
            .get(who, &format!("/v2.1/servers?{query}"), version)
            .await
            .json;
        let servers = list["servers"]
            .as_array()
            .unwrap_or_else(|| panic!("{query}: {list}"));
        servers
            .iter()
            .map(|server| server["name"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(names("one", "", "").await, ["c", "a", "b"]);
    assert_eq!(
        names("one", "sort_key=display_name&sort_dir=asc", "").await,
        ["a", "b", "c"]
    );
    assert_eq!(names("one", "name=a", "").await, ["a"]);
    assert_eq!(names("one", "name=^[^a]", "").await, Vec::<String>::new());
    assert_eq!(names("one", "status=active", "").await.len(), 3);
    assert_eq!(names("one", "status=SHUTOFF", "").await.len(), 0);
    assert_eq!(names("one", "flavor=2", "").await.len(), 0);
    assert_eq!(names("one", &format!("image={DISK}"), "").await.len(), 3);
    assert_eq!(
        names("one", "changes-since=2051-01-01T12:34:00Z", "")
            .await
            .len(),
        0
    );
    assert_eq!(names("admin", "all_tenants=1", "").await.len(), 4);
    assert_eq!(
        names(
            "admin",
            &format!("all_tenants=1&host=host-1&project_id={TWO}"),
            ""
        )
        .await,
        ["other"]
    );
    assert_eq!(
        names("admin", "all_tenants=1&host=nowhere", "").await.len(),
        0
    );
    let tags = format!("/v2.1/servers/{}/tags", ids[0]);
    let set = json!({"tags": ["t1", "t2"]});
    assert_eq!(
        status(&cloud.call("one", Method::PUT, &tags, "2.26", set).await),
        200
    );
    assert_eq!(names("one", "tags=t1,t2", "2.26").await, ["b"]);
    assert_eq!(names("one", "not-tags=t1", "2.26").await, ["c", "a"]);
    assert_eq!(names("one", "tags-any=t2,t9", "2.26").await, ["b"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_paged_and_refuse_what_they_do_not_know() {
    let cloud = Cloud::new().await;
    for name in ["b", "a", "c"] {
        cloud.running("one", name).await;
    }
    let mut seen = Vec::new();
    let mut path = "/v2.1/servers/detail?limit=2&sort_key=display_name&sort_dir=asc".to_owned();
    loop {
        let page = cloud.get("one", &path, "").await.json;
        for server in page["servers"].as_array().unwrap() {
            seen.push(server["name"].as_str().unwrap().to_owned());
        }
        let Some(next) = page["servers_links"][0]["href"].as_str() else {
            break;
        };
        path = next
            .strip_prefix("http://cloud:5000/compute")
            .unwrap()
            .to_owned();
    }
    assert_eq!(seen, ["a", "b", "c"]);

    for (query, version, words) in [
        ("marker=nosuch", "2.96", "marker [nosuch] not found"),
        (
            "limit=-1",
            "",
            "Invalid input for query parameters limit. Value: -1. '-1' does not match '^[0-9]*$'",
        ),
        (
            "foo=bar",
            "2.96",
            "'foo' does not match any of the regexes: '^_'",
        ),
        (
            "changes-since=2011/01/01",
            "",
            "Invalid input for query parameters changes-since. Value: 2011/01/01. '2011/01/01' is \
             not a 'date-time'",
        ),
    ] {
        let refused = cloud
            .get("one", &format!("/v2.1/servers?{query}"), version)
            .await;
        assert_eq!((status(&refused), refused.message()), (400, words));
    }
    assert_eq!(
        status(&cloud.get("one", "/v2.1/servers?all_tenants=1", "").await),
        403
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn metadata_and_tags_are_resources_of_their_own() {
    let cloud = Cloud::new().await;
    let id = cloud.running("one", "web").await;
    let metadata = format!("/v2.1/servers/{id}/metadata");
    let add = json!({"metadata": {"a": "1", "b": "2"}});
    let added = cloud
        .call("one", Method::POST, &metadata, "", add.clone())
        .await;
    assert_eq!(added.json, add);
    let one = format!("{metadata}/a");
    let put = cloud
        .call("one", Method::PUT, &one, "", json!({"meta": {"a": "3"}}))
        .await;
    assert_eq!(put.json, json!({"meta": {"a": "3"}}));
    let other = cloud
        .call("one", Method::PUT, &one, "", json!({"meta": {"b": "3"}}))
        .await;
    assert_eq!(other.message(), "Request body and URI mismatch");
    assert_eq!(
        status(
            &cloud
                .call("one", Method::DELETE, &one, "", Value::Null)
                .await
        ),
        204
    );
    let gone = cloud.get("one", &one, "").await;
    assert_eq!(gone.message(), "Metadata item was not found");
    let none = cloud
        .call("one", Method::PUT, &metadata, "", json!({"metadata": null}))
        .await;
    assert_eq!(status(&none), 400);
    let many: serde_json::Map<String, Value> =
        (0..129).map(|at| (format!("k{at}"), json!("v"))).collect();
    let many = cloud
        .call("one", Method::PUT, &metadata, "", json!({"metadata": many}))
        .await;
    assert_eq!(
        (status(&many), many.message()),
        (403, "Maximum number of metadata items exceeds 128")
    );

    let tag = format!("/v2.1/servers/{id}/tags/x");
    assert_eq!(
        status(
            &cloud
                .call("one", Method::PUT, &tag, "2.25", Value::Null)
                .await
        ),
        404
    );
    let put = cloud
        .call("one", Method::PUT, &tag, "2.26", Value::Null)
        .await;
    assert_eq!(status(&put), 201);
    assert_eq!(
        put.headers["location"],
        format!("http://cloud:5000/compute/v2.1/servers/{id}/tags/x")
    );
    assert_eq!(
        status(
            &cloud
                .call("one", Method::PUT, &tag, "2.26", Value::Null)
                .await
        ),
        204
    );
    assert_eq!(
        status(
            &cloud
                .call("one", Method::DELETE, &tag, "2.26", Value::Null)
                .await
        ),
        204
    );
    let gone = cloud.get("one", &tag, "2.26").await;
    assert_eq!(gone.message(), format!("Server {id} has no tag 'x'"));
}
