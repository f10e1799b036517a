//! Keypairs: SSH keys of users, imported, or made here below microversion 2.92.

use std::sync::LazyLock;

use axum::Json;
use axum::extract::Path;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::call::Call;
use super::schemas::{self, More};
use crate::compute::model::{keypair as keys, time};
use crate::compute::quota;
use crate::compute::store::keypair::{self, Model};
use crate::http::schema::Schema;
use crate::http::{ApiError, JsonBody, Routes};
use crate::policy::Rule;

pub fn routes(routes: Routes) -> Routes {
    const ALL: &str = "/v2.1/os-keypairs";
    const ONE: &str = "/v2.1/os-keypairs/{name}";
    routes
        .get(ALL, Rule::reader("os_compute_api:os-keypairs:index"), list)
        .post(
            ALL,
            Rule::member("os_compute_api:os-keypairs:create"),
            create,
        )
        .get(ONE, Rule::reader("os_compute_api:os-keypairs:show"), show)
        .delete(
            ONE,
            Rule::member("os_compute_api:os-keypairs:delete"),
            delete,
        )
}

/// The user whose keypairs are meant: oneself, or (administrators, from 2.10) `user_id`.
fn owner(call: &Call, asked: Option<&str>, rule: &'static str) -> Result<String, ApiError> {
    match asked.filter(|_| call.at_least(10)) {
        Some(user) if user != call.caller.user_id => {
            call.require(Rule::admin(rule))?;
            Ok(user.to_owned())
        }
        _ => Ok(call.caller.user_id.clone()),
    }
}

fn view(call: &Call, row: &Model) -> Value {
    let mut view = json!({
        "name": row.name,
        "public_key": row.public_key,
        "fingerprint": row.fingerprint,
    });
    if call.at_least(2) {
        view["type"] = json!(row.kind);
    }
    view
}

static LIST: LazyLock<[Schema; 3]> = LazyLock::new(|| {
    let user = || ("user_id", json!({"type": "string"}));
    let page = || {
        [
            user(),
            ("limit", schemas::limit()),
            ("marker", json!({"type": "string"})),
        ]
    };
    [
        Schema::of(schemas::query(&[user()], More::Anything)),
        Schema::of(schemas::query(&page(), More::Anything)),
        Schema::of(schemas::query(&page(), More::Nothing)),
    ]
});

async fn list(call: Call) -> Result<Json<Value>, ApiError> {
    let age = usize::from(call.at_least(35)) + usize::from(call.at_least(75));
    call.check_query(&LIST[age])?;
    let user = owner(
        &call,
        call.query.last("user_id"),
        "os_compute_api:os-keypairs:index",
    )?;
    let paged = call.at_least(35);
    let limit = if paged { call.limit()? } else { 1000 };
    let marker = call.marker().filter(|_| paged);
    if let Some(name) = marker
        && keypair::find(call.reader(), &user, name).await?.is_none()
    {
        return Err(ApiError::bad_request(format!("marker [{name}] not found")));
    }
    let rows = keypair::list(call.reader(), &user, marker, limit).await?;
    let views: Vec<Value> = rows
        .iter()
        .map(|row| json!({"keypair": view(&call, row)}))
        .collect();
    let mut answer = json!({"keypairs": views});
    if let Some(last) = rows.last().filter(|_| paged && rows.len() as u64 == limit) {
        answer["keypairs_links"] = call.next("os-keypairs", &last.name);
    }
    Ok(Json(answer))
}

async fn show(call: Call, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let user = owner(
        &call,
        call.query.last("user_id"),
        "os_compute_api:os-keypairs:show",
    )?;
    let row = keypair::find(call.reader(), &user, &name)
        .await?
        .ok_or_else(|| missing(&name, &user))?;
    let mut view = json!({
        "name": row.name,
        "public_key": row.public_key,
        "fingerprint": row.fingerprint,
        "user_id": row.user_id,
        "created_at": time::micros(row.created_at_us),
        "deleted": false,
        "deleted_at": null,
        "id": row.id,
        "updated_at": null,
    });
    if call.at_least(2) {
        view["type"] = json!(row.kind);
    }
    Ok(Json(json!({"keypair": view})))
}

fn missing(name: &str, user: &str) -> ApiError {
    ApiError::not_found(format!("Keypair {name} not found for user {user}"))
}

/// Schemas below 2.2, from 2.2, from 2.10, from 2.92.
static CREATE: LazyLock<[Schema; 4]> = LazyLock::new(|| {
    let name = |pattern: &str| {
        json!({
            "type": "string", "minLength": 1, "maxLength": 255, "format": "name",
            "pattern": pattern,
        })
    };
    [0, 1, 2, 3].map(|age| {
        let pattern = if age < 3 {
            r"^[_\- a-zA-Z0-9]+$"
        } else {
            r"^[@._\- a-zA-Z0-9]+$"
        };
        let mut properties = json!({"name": name(pattern), "public_key": {"type": "string"}});
        if age >= 1 {
            properties["type"] = json!({"type": "string", "enum": ["ssh", "x509"]});
        }
        if age >= 2 {
            properties["user_id"] = json!({"type": "string"});
        }
        let required: &[&str] = if age < 3 {
            &["name"]
        } else {
            &["name", "public_key"]
        };
        Schema::of(schemas::wrapped(
            "keypair",
            schemas::closed(properties, required),
        ))
    })
});

async fn create(call: Call, body: JsonBody) -> Result<Response, ApiError> {
    let age = usize::from(call.at_least(2))
        + usize::from(call.at_least(10))
        + usize::from(call.at_least(92));
    CREATE[age].check(&body.0)?;
    let given = &body.0["keypair"];
    let text = |name: &str| given[name].as_str();
    let user = owner(&call, text("user_id"), "os_compute_api:os-keypairs:create")?;
    let kind = text("type").unwrap_or("ssh");
    if kind != "ssh" {
        return Err(ApiError::bad_request(
            "Keypair data is invalid: this cloud keeps SSH keys only; leave out the type, or say ssh",
        ));
    }
    let (public_key, fingerprint, private_key) = match text("public_key") {
        Some(line) => {
            let line = line.trim();
            let fingerprint = keys::fingerprint(line)
                .map_err(|error| ApiError::bad_request(error.to_string()))?;
            (line.to_owned(), fingerprint, None)
        }
        None => {
            let made = tokio::task::spawn_blocking(keys::generate)
                .await
                .map_err(ApiError::internal)?
                .map_err(ApiError::internal)?;
            (made.public_key, made.fingerprint, Some(made.private_key))
        }
    };
    let row = Model {
        id: 0,
        user_id: user,
        name: text("name").unwrap_or_default().to_owned(),
        kind: kind.to_owned(),
        fingerprint,
        public_key,
        created_at_us: call.app.now_us(),
    };
    insert(&call, row.clone()).await?;
    Ok(created(&call, &row, private_key))
}

fn created(call: &Call, row: &Model, private_key: Option<String>) -> Response {
    let mut view = view(call, row);
    view["user_id"] = json!(row.user_id);
    if let Some(private_key) = private_key {
        view["private_key"] = json!(private_key);
    }
    let status = if call.at_least(2) {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    (status, Json(json!({"keypair": view}))).into_response()
}

async fn insert(call: &Call, row: Model) -> Result<(), ApiError> {
    let limits = quota::limits_of(call.reader(), call.caller.project_id()).await?;
    let most = limits
        .iter()
        .find(|(resource, _)| resource.name == "key_pairs");
    let most = most
        .and_then(|(_, limit)| u64::try_from(*limit).ok())
        .unwrap_or(u64::MAX);
    call.app
        .database()
        .write(move |tx| {
            let row = row.clone();
            Box::pin(async move {
                if keypair::find(tx, &row.user_id, &row.name).await?.is_some() {
                    let name = &row.name;
                    return Err(ApiError::conflict(format!(
                        "Key pair '{name}' already exists."
                    )));
                }
                if keypair::count(tx, &row.user_id).await? >= most {
                    return Err(ApiError::forbidden("Maximum number of key pairs exceeded"));
                }
                Ok(keypair::insert(tx, row).await?)
            })
        })
        .await
}

async fn delete(call: Call, Path(name): Path<String>) -> Result<StatusCode, ApiError> {
    let user = owner(
        &call,
        call.query.last("user_id"),
        "os_compute_api:os-keypairs:delete",
    )?;
    let status = if call.at_least(2) {
        StatusCode::NO_CONTENT
    } else {
        StatusCode::ACCEPTED
    };
    call.app
        .database()
        .write(move |tx| {
            let (user, name) = (user.clone(), name.clone());
            Box::pin(async move {
                if keypair::delete(tx, &user, &name).await? {
                    Ok(())
                } else {
                    Err(missing(&name, &user))
                }
            })
        })
        .await?;
    Ok(status)
}
