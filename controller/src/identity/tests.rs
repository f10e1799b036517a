//! Identity as clients see it: logins, validation, revocation, resources.

use std::sync::Arc;

use http::Method;
use serde_json::{Value, json};

use crate::testing::{self, TestApp};

const TOKENS: &str = "/identity/v3/auth/tokens";

fn password(user: &str, password: &str) -> Value {
    json!({"methods": ["password"], "password": {"user": {
        "name": user, "domain": {"name": "Default"}, "password": password}}})
}

/// Creates a user with a password and a role in the project `one`; gives its id.
async fn user(cloud: &TestApp, name: &str, role: &str) -> String {
    let body = json!({"user": {"name": name, "password": "first", "email": "a@b"}});
    let made = cloud
        .post(&cloud.admin, "/identity/v3/users", body)
        .await
        .expect_status(201)
        .json();
    assert_eq!(made["user"]["email"], "a@b");
    assert!(
        !made.to_string().contains("first"),
        "no password in an answer"
    );
    let id = made["user"]["id"].as_str().unwrap().to_owned();
    grant(cloud, &id, role, Method::PUT).await;
    id
}

async fn grant(cloud: &TestApp, user_id: &str, role: &str, method: Method) {
    let roles = cloud
        .get(&cloud.admin, &format!("/identity/v3/roles?name={role}"))
        .await
        .json();
    let role = roles["roles"][0]["id"].as_str().unwrap().to_owned();
    let project = &cloud.project_id;
    let path = format!("/identity/v3/projects/{project}/users/{user_id}/roles/{role}");
    cloud
        .ask(&cloud.admin, method, &path, Value::Null)
        .await
        .expect_status(204);
}

#[tokio::test]
async fn a_login_by_password_gives_a_scoped_token_with_catalogue() {
    let cloud = testing::app().await;
    let body = json!({"auth": {
        "identity": password("admin", &cloud.admin_password),
        "scope": {"project": {"name": "admin", "domain": {"id": "default"}}},
    }});
    let answer = cloud.post("", TOKENS, body).await.expect_status(201);
    let token = answer.json()["token"].clone();
    assert_eq!(token["project"]["name"], "admin");
    assert_eq!(token["user"]["domain"]["name"], "Default");
    let roles: Vec<_> = token["roles"]
        .as_array()
        .unwrap()
        .iter()
        .map(|role| role["name"].clone())
        .collect();
    assert_eq!(roles, ["admin", "manager", "member", "reader"]);
    let catalog = token["catalog"].as_array().unwrap();
    let identity = catalog
        .iter()
        .find(|entry| entry["type"] == "identity")
        .unwrap();
    assert_eq!(identity["endpoints"].as_array().unwrap().len(), 3);
    assert_eq!(
        identity["endpoints"][0]["url"],
        "http://127.0.0.1:5000/identity/v3"
    );

    let own = answer.header("x-subject-token");
    let headers = [
        ("x-auth-token", own.as_str()),
        ("x-subject-token", own.as_str()),
    ];
    let shown = cloud
        .send(Method::GET, TOKENS, &headers, "")
        .await
        .expect_status(200);
    assert_eq!(shown.json()["token"]["audit_ids"], token["audit_ids"]);
    let headed = cloud
        .send(Method::HEAD, TOKENS, &headers, "")
        .await
        .expect_status(200);
    assert!(headed.bytes.is_empty());
    let bare = cloud
        .send(Method::GET, &format!("{TOKENS}?nocatalog"), &headers, "")
        .await;
    assert!(bare.json()["token"].get("catalog").is_none());
}

#[tokio::test]
async fn wrong_proofs_are_refused_in_keystones_words() {
    let cloud = testing::app().await;
    let log_in = |identity: Value| cloud.post("", TOKENS, json!({"auth": {"identity": identity}}));
    for wrong in [password("admin", "wrong"), password("nobody", "wrong")] {
        let answer = log_in(wrong).await.expect_status(401);
        let message = "The request you have made requires authentication.";
        assert_eq!(answer.json()["error"]["message"], message);
    }
    let unknown = log_in(json!({"methods": ["nosuch"], "nosuch": {}}))
        .await
        .expect_status(401);
    assert_eq!(
        unknown.json()["error"]["identity"]["methods"],
        json!(["password", "token"])
    );
    // Named many times, a method counts and costs once.
    let mut often = password("admin", &cloud.admin_password);
    often["methods"] = json!(vec!["password"; 5000]);
    let often = log_in(often).await.expect_status(201);
    assert_eq!(often.json()["token"]["methods"], json!(["password"]));
    log_in(json!({"methods": ["token"], "token": {"id": "junk"}}))
        .await
        .expect_status(404);
    log_in(json!({"methods": ["password"]}))
        .await
        .expect_status(400);
    cloud.post("", TOKENS, json!({})).await.expect_status(400);
    cloud
        .post("", TOKENS, json!({"auth": {}}))
        .await
        .expect_status(400);
    let elsewhere = json!({"auth": {
        "identity": password("admin", &cloud.admin_password),
        "scope": {"project": {"id": cloud.project_id}},
    }});
    cloud.post("", TOKENS, elsewhere).await.expect_status(401);
}

#[tokio::test]
async fn a_token_from_a_token_keeps_its_expiry_and_chain() {
    let cloud = testing::app().await;
    let unscoped = json!({"auth": {
        "identity": password("admin", &cloud.admin_password), "scope": "unscoped"}});
    let first = cloud.post("", TOKENS, unscoped).await.expect_status(201);
    assert!(first.json()["token"].get("roles").is_none());
    let body = json!({"auth": {
        "identity": {"methods": ["token"], "token": {"id": first.header("x-subject-token")}},
        "scope": {"system": {"all": true}},
    }});
    let second = cloud.post("", TOKENS, body).await.expect_status(201).json();
    let first = first.json();
    assert_eq!(second["token"]["expires_at"], first["token"]["expires_at"]);
    assert_eq!(second["token"]["methods"], json!(["token", "password"]));
    assert_eq!(
        second["token"]["audit_ids"][1],
        first["token"]["audit_ids"][0]
    );
    assert_eq!(second["token"]["system"], json!({"all": true}));
}

#[tokio::test]
async fn what_ends_a_token_ends_it_at_once() {
    let cloud = testing::app().await;
    let id = user(&cloud, "u", "reader").await;
    let own = format!("/identity/v3/users/{id}");
    let login = || async { cloud.log_in("u", "first", &cloud.project_id).await };
    let patch = |body: Value| cloud.ask(&cloud.admin, Method::PATCH, &own, body);

    let token = login().await;
    cloud.get(&token, &own).await.expect_status(200);
    let headers = [
        ("x-auth-token", token.as_str()),
        ("x-subject-token", token.as_str()),
    ];
    cloud
        .send(Method::DELETE, TOKENS, &headers, "")
        .await
        .expect_status(204);
    cloud.get(&token, &own).await.expect_status(401);

    let token = login().await;
    cloud.get(&token, &own).await.expect_status(200);
    grant(&cloud, &id, "reader", Method::DELETE).await;
    cloud.get(&token, &own).await.expect_status(401);
    grant(&cloud, &id, "reader", Method::PUT).await;
    cloud.get(&token, &own).await.expect_status(200);

    patch(json!({"user": {"enabled": false}}))
        .await
        .expect_status(200);
    cloud.get(&token, &own).await.expect_status(401);
    patch(json!({"user": {"enabled": true}}))
        .await
        .expect_status(200);
    cloud.get(&token, &own).await.expect_status(401);

    let token = login().await;
    let change = json!({"user": {"original_password": "first", "password": "second"}});
    let wrong = json!({"user": {"original_password": "bad", "password": "second"}});
    let path = format!("{own}/password");
    cloud.post("", &path, wrong).await.expect_status(401);
    cloud.post("", &path, change).await.expect_status(204);
    cloud.get(&token, &own).await.expect_status(401);
    let token = cloud.log_in("u", "second", &cloud.project_id).await;
    cloud
        .ask(&cloud.admin, Method::DELETE, &own, Value::Null)
        .await
        .expect_status(204);
    cloud.get(&token, &own).await.expect_status(401);
}

#[tokio::test]
async fn projects_and_domains_have_keystones_rules() {
    let cloud = testing::app().await;
    let post = |path: &'static str, body: Value| cloud.post(&cloud.admin, path, body);
    let projects = "/identity/v3/projects";
    let made = post(
        projects,
        json!({"project": {"name": "p", "k": "v", "tags": ["t"]}}),
    )
    .await;
    let made = made.expect_status(201).json()["project"].clone();
    assert_eq!(
        (made["domain_id"].clone(), made["k"].clone()),
        ("default".into(), "v".into())
    );
    post(projects, json!({"project": {"name": "p"}}))
        .await
        .expect_status(409);
    let empty = post(projects, json!({"project": {"name": ""}}))
        .await
        .expect_status(400);
    assert_eq!(
        empty.json()["error"]["message"],
        "Invalid input for field/attribute name. Value: . '' should be non-empty"
    );
    let list = cloud
        .get(&cloud.admin, "/identity/v3/projects?name=p&enabled=True")
        .await
        .json();
    assert_eq!(list["projects"].as_array().unwrap().len(), 1);
    assert_eq!(
        list["links"]["self"],
        "http://127.0.0.1:5000/identity/v3/projects?name=p&enabled=True"
    );
    let page = cloud
        .get(&cloud.admin, "/identity/v3/projects?limit=2")
        .await
        .json();
    assert_eq!(
        (
            page["projects"].as_array().unwrap().len(),
            &page["truncated"]
        ),
        (2, &json!(true))
    );
    let next = page["links"]["next"].as_str().unwrap();
    let next = next.strip_prefix("http://127.0.0.1:5000").unwrap();
    let next = cloud.get(&cloud.admin, next).await.json();
    assert!(next["projects"][0]["id"].as_str() > page["projects"][1]["id"].as_str());

    let domain = post("/identity/v3/domains", json!({"domain": {"name": "d"}})).await;
    let domain = domain.expect_status(201).json()["domain"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let path = format!("/identity/v3/domains/{domain}");
    let inside = json!({"user": {"name": "inside", "domain_id": domain}});
    let inside = post("/identity/v3/users", inside)
        .await
        .expect_status(201)
        .json();
    let remove = || cloud.ask(&cloud.admin, Method::DELETE, &path, Value::Null);
    remove().await.expect_status(403);
    let off = json!({"domain": {"enabled": false}});
    cloud
        .ask(&cloud.admin, Method::PATCH, &path, off)
        .await
        .expect_status(200);
    remove().await.expect_status(204);
    let user = format!(
        "/identity/v3/users/{}",
        inside["user"]["id"].as_str().unwrap()
    );
    cloud.get(&cloud.admin, &user).await.expect_status(404);
}

#[tokio::test]
async fn roles_of_the_cloud_are_immutable_and_imply_each_other() {
    let cloud = testing::app().await;
    let roles = cloud
        .get(&cloud.admin, "/identity/v3/roles?name=admin")
        .await
        .json();
    let admin = roles["roles"][0]["id"].as_str().unwrap().to_owned();
    let path = format!("/identity/v3/roles/{admin}");
    cloud
        .ask(&cloud.admin, Method::DELETE, &path, Value::Null)
        .await
        .expect_status(403);
    let made = cloud
        .post(
            &cloud.admin,
            "/identity/v3/roles",
            json!({"role": {"name": "r1"}}),
        )
        .await;
    let other = made.expect_status(201).json()["role"]["id"]
        .as_str()
        .unwrap()
        .to_owned();
    let implied = format!("/identity/v3/roles/{other}/implies/{admin}");
    cloud
        .ask(&cloud.admin, Method::PUT, &implied, Value::Null)
        .await
        .expect_status(403);
    let inferences = cloud
        .get(&cloud.admin, "/identity/v3/role_inferences")
        .await
        .json();
    assert_eq!(inferences["role_inferences"].as_array().unwrap().len(), 3);
    let path = format!(
        "/identity/v3/role_assignments?user.id={}&effective&include_names=True",
        cloud.admin_user_id
    );
    let effective = cloud.get(&cloud.admin, &path).await.json();
    assert_eq!(effective["role_assignments"].as_array().unwrap().len(), 8);
}

#[tokio::test]
async fn a_validated_token_is_remembered_until_identity_changes() {
    let cloud = testing::app().await;
    let whose = async || cloud.app.authenticator().authenticate(&cloud.reader).await;
    let (first, again) = (whose().await.unwrap(), whose().await.unwrap());
    assert!(Arc::ptr_eq(&first, &again), "remembered");
    // Anything of identity: what was remembered is worked out anew, and is the same.
    cloud
        .post(
            &cloud.admin,
            "/identity/v3/roles",
            json!({"role": {"name": "r1"}}),
        )
        .await
        .expect_status(201);
    let later = whose().await.unwrap();
    assert!(!Arc::ptr_eq(&first, &later), "forgotten");
    assert_eq!(first.roles, later.roles);
    // And when the user may no longer, the very next look says so.
    let path = format!("/identity/v3/users/{}", first.user_id);
    cloud
        .ask(
            &cloud.admin,
            Method::PATCH,
            &path,
            json!({"user": {"enabled": false}}),
        )
        .await
        .expect_status(200);
    whose().await.unwrap_err();
}

#[tokio::test]
async fn services_endpoints_and_regions_make_the_catalogue() {
    let cloud = testing::app().await;
    let post = |path: &'static str, body: Value| cloud.post(&cloud.admin, path, body);
    let body = json!({"service": {"type": "dns", "name": "designate", "description": "d"}});
    let made = post("/identity/v3/services", body)
        .await
        .expect_status(201)
        .json();
    let service = made["service"]["id"].as_str().unwrap().to_owned();
    assert_eq!(made["service"]["description"], "d");
    let endpoint = json!({"endpoint": {"service_id": service, "interface": "public",
        "url": "https://dns/$(project_id)s", "region": "Two", "enabled": true}});
    let made = post("/identity/v3/endpoints", endpoint)
        .await
        .expect_status(201)
        .json();
    assert_eq!(
        (&made["endpoint"]["region_id"], &made["endpoint"]["region"]),
        (&json!("Two"), &json!("Two"))
    );
    let wrong = json!({"endpoint": {"enabled": "False"}});
    let path = format!(
        "/identity/v3/endpoints/{}",
        made["endpoint"]["id"].as_str().unwrap()
    );
    let answer = cloud
        .ask(&cloud.admin, Method::PATCH, &path, wrong)
        .await
        .expect_status(400);
    assert_eq!(
        answer.json()["error"]["message"],
        "Invalid input for field/attribute enabled. Value: False. 'False' is not of type 'boolean'"
    );
    let catalog = cloud
        .get(&cloud.reader, "/identity/v3/auth/catalog")
        .await
        .json();
    let entry = catalog["catalog"]
        .as_array()
        .unwrap()
        .iter()
        .find(|entry| entry["type"] == "dns");
    let url = format!("https://dns/{}", cloud.project_id);
    assert_eq!(entry.unwrap()["endpoints"][0]["url"], url.as_str());
    let region = "/identity/v3/regions/Two";
    cloud
        .ask(&cloud.admin, Method::DELETE, region, Value::Null)
        .await
        .expect_status(403);
    let path = format!("/identity/v3/services/{service}");
    cloud
        .ask(&cloud.admin, Method::DELETE, &path, Value::Null)
        .await
        .expect_status(204);
    cloud
        .ask(&cloud.admin, Method::DELETE, region, Value::Null)
        .await
        .expect_status(204);
    cloud.get(&cloud.admin, region).await.expect_status(404);
}
