//! Flavors, keypairs, quotas, hosts.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_flavor_is_shown_as_each_microversion_has_it() {
    let cloud = Cloud::new().await;
    let show = async |version| cloud.get("one", "/v2.1/flavors/1", version).await.json;
    let old = show("").await;
    assert_eq!(old["flavor"]["swap"], "");
    assert_eq!(old["flavor"]["OS-FLV-EXT-DATA:ephemeral"], 0);
    assert_eq!(old["flavor"]["rxtx_factor"], 1.0);
    assert!(old["flavor"].get("description").is_none());
    let middle = show("2.55").await;
    assert!(middle["flavor"]["description"].is_null());
    assert!(middle["flavor"].get("extra_specs").is_none());
    let new = show("2.75").await;
    assert_eq!(new["flavor"]["swap"], 0);
    assert_eq!(new["flavor"]["extra_specs"], json!({}));
    assert_eq!(
        new["flavor"]["links"],
        json!([
            {"rel": "self", "href": "http://cloud:5000/compute/v2.1/flavors/1"},
            {"rel": "bookmark", "href": "http://cloud:5000/compute/flavors/1"},
        ])
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn flavors_are_made_listed_in_pages_and_deleted() {
    let cloud = Cloud::new().await;
    for (id, ram) in [("2", 512), ("3", 1024)] {
        let body = json!({"flavor": {"name": format!("f{id}"), "id": id, "ram": ram, "vcpus": "2",
            "disk": 0, "os-flavor-access:is_public": "True"}});
        let made = cloud
            .call("admin", Method::POST, "/v2.1/flavors", "2.1", body.clone())
            .await;
        assert_eq!(status(&made), 200, "{}", made.json);
        let again = cloud
            .call("admin", Method::POST, "/v2.1/flavors", "2.1", body)
            .await;
        assert_eq!(status(&again), 409);
        assert_eq!(
            again.message(),
            format!("Flavor with name f{id} already exists.")
        );
    }
    let first = cloud.get("one", "/v2.1/flavors?limit=2", "").await.json;
    assert_eq!(first["flavors"].as_array().unwrap().len(), 2);
    let next = first["flavors_links"][0]["href"].as_str().unwrap();
    assert_eq!(
        next,
        "http://cloud:5000/compute/v2.1/flavors?limit=2&marker=2"
    );
    let second = cloud
        .get(
            "one",
            next.strip_prefix("http://cloud:5000/compute").unwrap(),
            "",
        )
        .await;
    assert_eq!(second.json["flavors"][0]["id"], "3");
    assert!(second.json.get("flavors_links").is_none());
    let large = cloud.get("one", "/v2.1/flavors?minRam=513", "").await.json;
    assert_eq!(large["flavors"].as_array().unwrap().len(), 1);
    let sorted = cloud
        .get("one", "/v2.1/flavors?sort_key=memory_mb&sort_dir=desc", "")
        .await
        .json;
    assert_eq!(sorted["flavors"][0]["id"], "3");

    let gone = cloud
        .call("admin", Method::DELETE, "/v2.1/flavors/3", "", Value::Null)
        .await;
    assert_eq!(status(&gone), 202);
    let missing = cloud.get("one", "/v2.1/flavors/3", "").await;
    assert_eq!(missing.message(), "Flavor 3 could not be found.");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_flavors_and_unknown_fields_are_refused_in_novas_words() {
    let cloud = Cloud::new().await;
    let post = async |version, flavor: Value| {
        let body = json!({"flavor": flavor});
        cloud
            .call("admin", Method::POST, "/v2.1/flavors", version, body)
            .await
    };
    let no_ram = post(
        "2.96",
        json!({"name": "x", "ram": 0, "vcpus": 1, "disk": 1}),
    )
    .await;
    assert_eq!(
        no_ram.message(),
        "Invalid input for field/attribute ram. Value: 0. 0 is less than the minimum of 1"
    );
    let described = json!({"name": "x", "ram": 1, "vcpus": 1, "disk": 1, "description": "d"});
    assert_eq!(status(&post("2.54", described.clone()).await), 400);
    assert_eq!(status(&post("2.55", described).await), 200);
    let body = json!({"flavor": {}});
    let member = cloud
        .call("one", Method::POST, "/v2.1/flavors", "", body)
        .await;
    assert_eq!(
        member.message(),
        "Policy doesn't allow os_compute_api:os-flavor-manage:create to be performed."
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_flavor_is_seen_by_those_who_were_given_it() {
    let cloud = Cloud::new().await;
    let body = json!({"flavor": {"name": "p", "id": "p", "ram": 1, "vcpus": 1, "disk": 1,
        "os-flavor-access:is_public": false}});
    cloud
        .call("admin", Method::POST, "/v2.1/flavors", "", body)
        .await;
    assert_eq!(status(&cloud.get("one", "/v2.1/flavors/p", "").await), 404);
    let path = "/v2.1/flavors/p/action";
    let add = json!({"addTenantAccess": {"tenant": ONE}});
    let added = cloud
        .call("admin", Method::POST, path, "", add.clone())
        .await;
    assert_eq!(
        added.json,
        json!({"flavor_access": [{"flavor_id": "p", "tenant_id": ONE}]})
    );
    assert_eq!(status(&cloud.get("one", "/v2.1/flavors/p", "").await), 200);
    assert_eq!(status(&cloud.get("two", "/v2.1/flavors/p", "").await), 404);
    let again = cloud.call("admin", Method::POST, path, "", add).await;
    assert_eq!(
        again.message(),
        format!("Flavor access already exists for flavor p and project {ONE} combination.")
    );
    let public = cloud
        .get("admin", "/v2.1/flavors/1/os-flavor-access", "")
        .await;
    assert_eq!(
        public.message(),
        "Access list not available for public flavors."
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn extra_specs_are_checked_from_2_86() {
    let cloud = Cloud::new().await;
    let path = "/v2.1/flavors/1/os-extra_specs";
    let bogus = json!({"extra_specs": {"hw:cpu_policy": "bogus"}});
    let new = cloud
        .call("admin", Method::POST, path, "2.86", bogus.clone())
        .await;
    assert_eq!(
        new.message(),
        "Validation failed; 'bogus' is not one of: dedicated, shared, mixed."
    );
    assert_eq!(
        status(&cloud.call("admin", Method::POST, path, "2.85", bogus).await),
        200
    );
    let one = format!("{path}/hw:cpu_policy");
    let put = cloud
        .call(
            "admin",
            Method::PUT,
            &one,
            "",
            json!({"hw:cpu_policy": "shared"}),
        )
        .await;
    assert_eq!(put.json, json!({"hw:cpu_policy": "shared"}));
    let other = cloud
        .call("admin", Method::PUT, &one, "", json!({"else": "1"}))
        .await;
    assert_eq!(other.message(), "Request body and URI mismatch");
    assert_eq!(
        status(
            &cloud
                .call("admin", Method::DELETE, &one, "", Value::Null)
                .await
        ),
        200
    );
    let gone = cloud.get("one", &one, "").await;
    assert_eq!(
        gone.message(),
        "Flavor 1 has no extra specs with key hw:cpu_policy."
    );
}

const KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKHEChAZpjJUlvgeYCEZ1xpIHIyKB6aYVL3cE4wZ5WYB f@x";

#[tokio::test(flavor = "multi_thread")]
async fn keypairs_are_imported_and_below_2_92_made() {
    let cloud = Cloud::new().await;
    let path = "/v2.1/os-keypairs";
    let import = json!({"keypair": {"name": "k", "public_key": KEY}});
    let old = cloud
        .call("one", Method::POST, path, "", import.clone())
        .await;
    assert_eq!(status(&old), 200);
    assert!(old.json["keypair"].get("type").is_none());
    assert_eq!(
        old.json["keypair"]["fingerprint"],
        "7b:26:d4:f3:19:29:3e:92:77:c3:c4:5d:85:de:83:51"
    );
    let again = cloud.call("one", Method::POST, path, "2.2", import).await;
    assert_eq!(
        (status(&again), again.message()),
        (409, "Key pair 'k' already exists.")
    );

    let bare = json!({"keypair": {"name": "made"}});
    let refused = cloud
        .call("one", Method::POST, path, "2.92", bare.clone())
        .await;
    assert_eq!(
        refused.message(),
        "Invalid input for field/attribute keypair. Value: {'name': 'made'}. 'public_key' is a \
         required property"
    );
    let made = cloud.call("one", Method::POST, path, "2.91", bare).await;
    assert_eq!(status(&made), 201);
    assert!(
        made.json["keypair"]["private_key"]
            .as_str()
            .unwrap()
            .contains("PRIVATE KEY")
    );

    let page = cloud
        .get("one", &format!("{path}?limit=1"), "2.35")
        .await
        .json;
    assert_eq!(page["keypairs"][0]["keypair"]["name"], "k");
    assert_eq!(
        page["keypairs_links"][0]["href"],
        "http://cloud:5000/compute/v2.1/os-keypairs?limit=1&marker=k"
    );
    let others = cloud.get("two", path, "").await.json;
    assert_eq!(others, json!({"keypairs": []}));
    let peek = cloud
        .get("two", &format!("/v2.1/os-keypairs?user_id={USER}"), "2.10")
        .await;
    assert_eq!(status(&peek), 403);
    let seen = cloud
        .get(
            "admin",
            &format!("/v2.1/os-keypairs/k?user_id={USER}"),
            "2.10",
        )
        .await;
    assert_eq!(seen.json["keypair"]["user_id"], USER);

    let one = "/v2.1/os-keypairs/k";
    assert_eq!(
        status(
            &cloud
                .call("one", Method::DELETE, one, "2.2", Value::Null)
                .await
        ),
        204
    );
    let gone = cloud.get("one", one, "").await;
    assert_eq!(
        gone.message(),
        format!("Keypair k not found for user {USER}")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn quotas_are_shown_set_and_kept() {
    let cloud = Cloud::new().await;
    let path = &format!("/v2.1/os-quota-sets/{ONE}");
    let old = cloud.get("one", path, "").await.json;
    assert_eq!(old["quota_set"]["floating_ips"], -1);
    assert_eq!(old["quota_set"]["injected_files"], 5);
    let new = cloud.get("one", path, "2.57").await.json;
    assert_eq!(
        keys(&new["quota_set"]),
        [
            "cores",
            "id",
            "instances",
            "key_pairs",
            "metadata_items",
            "ram",
            "server_group_members",
            "server_groups",
        ]
    );
    assert_eq!(status(&cloud.get("two", path, "").await), 403);
    let set = json!({"quota_set": {"instances": 1}});
    let put = cloud.call("admin", Method::PUT, path, "2.57", set).await;
    assert_eq!(put.json["quota_set"]["instances"], 1);

    cloud.create("one", "first").await;
    let body = json!({"server": {"name": "x", "imageRef": DISK, "flavorRef": "1"}});
    let over = cloud
        .call("one", Method::POST, "/v2.1/servers", "", body)
        .await;
    assert_eq!(status(&over), 403);
    assert_eq!(
        over.message(),
        "Quota exceeded for instances: Requested 1, but already used 1 of 1 instances"
    );
    let limits = cloud.get("one", "/v2.1/limits", "2.57").await.json;
    assert_eq!(limits["limits"]["absolute"]["totalInstancesUsed"], 1);
    assert_eq!(limits["limits"]["absolute"]["maxTotalInstances"], 1);
    let low = json!({"quota_set": {"instances": 0}});
    assert_eq!(
        status(&cloud.call("admin", Method::PUT, path, "2.57", low).await),
        400
    );
    let wrong = json!({"quota_set": {"bogus": 1}});
    let wrong = cloud.call("admin", Method::PUT, path, "2.96", wrong).await;
    assert_eq!(
        wrong.message(),
        "Invalid input for field/attribute quota_set. Value: {'bogus': 1}. Additional properties \
         are not allowed ('bogus' was unexpected)"
    );
    cloud
        .call("admin", Method::DELETE, path, "", Value::Null)
        .await;
    assert_eq!(
        cloud.get("one", path, "").await.json["quota_set"]["instances"],
        10
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_is_a_service_a_hypervisor_and_part_of_a_zone() {
    let cloud = Cloud::new().await;
    let service = cloud.get("admin", "/v2.1/os-services", "2.53").await.json["services"][0].clone();
    assert_eq!(service["binary"], "nova-compute");
    assert_eq!(
        (&service["status"], &service["state"]),
        (&json!("enabled"), &json!("up"))
    );
    let old = cloud.get("admin", "/v2.1/os-services", "2.1").await.json["services"][0].clone();
    assert!(old["id"].is_number() && old.get("forced_down").is_none());

    let id = service["id"].as_str().unwrap();
    let off = json!({"status": "disabled", "disabled_reason": "test"});
    let path = format!("/v2.1/os-services/{id}");
    let disabled = cloud
        .call("admin", Method::PUT, &path, "2.53", off)
        .await
        .json;
    assert_eq!(disabled["service"]["disabled_reason"], "test");
    let body = json!({"host": "host-1", "binary": "nova-compute"});
    let on = cloud
        .call(
            "admin",
            Method::PUT,
            "/v2.1/os-services/enable",
            "2.1",
            body,
        )
        .await;
    assert_eq!(on.json["service"]["status"], "enabled");

    let old = cloud
        .get("admin", "/v2.1/os-hypervisors/detail", "2.27")
        .await
        .json;
    assert!(old["hypervisors"][0]["cpu_info"].is_string());
    let new = cloud
        .get("admin", "/v2.1/os-hypervisors/detail", "2.88")
        .await
        .json;
    assert!(new["hypervisors"][0].get("vcpus").is_none());
    assert!(
        new["hypervisors"][0]["uptime"]
            .as_str()
            .unwrap()
            .contains("load average")
    );
    assert_eq!(
        status(
            &cloud
                .get("admin", "/v2.1/os-hypervisors/statistics", "2.87")
                .await
        ),
        200
    );
    assert_eq!(
        status(
            &cloud
                .get("admin", "/v2.1/os-hypervisors/statistics", "2.88")
                .await
        ),
        404
    );
    let bad = cloud.get("admin", "/v2.1/os-hypervisors/x", "2.88").await;
    assert_eq!(bad.message(), "Invalid uuid x");
    assert_eq!(
        status(&cloud.get("one", "/v2.1/os-hypervisors", "").await),
        403
    );

    let zones = cloud
        .get("one", "/v2.1/os-availability-zone", "")
        .await
        .json;
    assert_eq!(zones["availabilityZoneInfo"][0]["hosts"], Value::Null);
    let detail = cloud
        .get("admin", "/v2.1/os-availability-zone/detail", "")
        .await
        .json;
    assert_eq!(
        detail["availabilityZoneInfo"][0]["hosts"]["host-1"]["nova-compute"]["active"],
        true
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn version_documents_need_no_token() {
    let cloud = Cloud::new().await;
    let versions = cloud.get("nobody", "/", "").await.json;
    assert_eq!(versions["versions"][0]["version"], "2.96");
    let one = cloud.get("nobody", "/v2.1/", "").await.json;
    assert_eq!(
        one["version"]["links"][0]["href"],
        "http://cloud:5000/compute/v2.1/"
    );
    assert_eq!(status(&cloud.get("nobody", "/v2.1/servers", "").await), 401);
}
