//! Flavors, their extra specs, and who may use the private ones.

use std::sync::LazyLock;

use axum::Json;
use axum::extract::Path;
use axum::http::StatusCode;
use serde_json::{Map, Value, json};

use super::call::Call;
use super::schemas::{self, More, as_bool, as_integer};
use crate::compute::model::flavor::{ExtraSpecs, validate_extra_spec};
use crate::compute::store::flavor::{self, Filter, Model, SortKey, Visible};
use crate::http::schema::Schema;
use crate::http::{ApiError, JsonBody, Routes};
use crate::policy::Rule;

const LIST: Rule = Rule::reader("os_compute_api:flavors");
const SPECS: &str = "/v2.1/flavors/{id}/os-extra_specs";
const SPEC: &str = "/v2.1/flavors/{id}/os-extra_specs/{key}";

pub fn routes(routes: Routes) -> Routes {
    const ADD: Rule = Rule::admin("os_compute_api:os-flavor-access:add_tenant_access");
    const REMOVE: Rule = Rule::admin("os_compute_api:os-flavor-access:remove_tenant_access");
    let manage = |what| Rule::admin(what);
    routes
        .get("/v2.1/flavors", LIST, list)
        .get("/v2.1/flavors/detail", LIST, detail)
        .get("/v2.1/flavors/{id}", LIST, show)
        .post(
            "/v2.1/flavors",
            manage("os_compute_api:os-flavor-manage:create"),
            create,
        )
        .put(
            "/v2.1/flavors/{id}",
            manage("os_compute_api:os-flavor-manage:update"),
            update,
        )
        .delete(
            "/v2.1/flavors/{id}",
            manage("os_compute_api:os-flavor-manage:delete"),
            delete,
        )
        .get(
            "/v2.1/flavors/{id}/os-flavor-access",
            manage("os_compute_api:os-flavor-access"),
            access,
        )
        .post(
            "/v2.1/flavors/{id}/action",
            Rule::reader("os_compute_api:flavors:action"),
            act,
        )
        .action("/v2.1/flavors/{id}/action", "addTenantAccess", ADD)
        .action("/v2.1/flavors/{id}/action", "removeTenantAccess", REMOVE)
        .get(
            SPECS,
            Rule::reader("os_compute_api:os-flavor-extra-specs:index"),
            specs,
        )
        .post(
            SPECS,
            manage("os_compute_api:os-flavor-extra-specs:create"),
            add_specs,
        )
        .get(
            SPEC,
            Rule::reader("os_compute_api:os-flavor-extra-specs:show"),
            spec,
        )
        .put(
            SPEC,
            manage("os_compute_api:os-flavor-extra-specs:update"),
            put_spec,
        )
        .delete(
            SPEC,
            manage("os_compute_api:os-flavor-extra-specs:delete"),
            delete_spec,
        )
}

fn missing(id: &str) -> ApiError {
    ApiError::not_found(format!("Flavor {id} could not be found."))
}

/// The flavor, if the caller may see it.
pub(super) async fn find(call: &Call, id: &str) -> Result<Model, ApiError> {
    let project = (!call.caller.is_admin()).then(|| call.caller.project_id().unwrap_or_default());
    flavor::find(call.reader(), id, project)
        .await?
        .ok_or_else(|| missing(id))
}

fn summary(call: &Call, flavor: &Model) -> Value {
    let mut view = json!({
        "id": flavor.id,
        "name": flavor.name,
        "links": call.links(&format!("flavors/{}", flavor.id)),
    });
    if call.at_least(55) {
        view["description"] = json!(flavor.description);
    }
    view
}

fn whole(call: &Call, flavor: &Model) -> Value {
    // An absent swap is an empty string up to 2.74.
    let swap = if flavor.swap == 0 && !call.at_least(75) {
        json!("")
    } else {
        json!(flavor.swap)
    };
    let mut view = json!({
        "id": flavor.id,
        "name": flavor.name,
        "ram": flavor.ram,
        "disk": flavor.disk,
        "swap": swap,
        "OS-FLV-EXT-DATA:ephemeral": flavor.ephemeral,
        "OS-FLV-DISABLED:disabled": flavor.disabled,
        "vcpus": flavor.vcpus,
        "os-flavor-access:is_public": flavor.is_public,
        "rxtx_factor": flavor.rxtx_factor,
        "links": call.links(&format!("flavors/{}", flavor.id)),
    });
    if call.at_least(55) {
        view["description"] = json!(flavor.description);
    }
    if call.at_least(61) {
        view["extra_specs"] = json!(flavor.extra_specs());
    }
    view
}

async fn list(call: Call) -> Result<Json<Value>, ApiError> {
    page(&call, "flavors", summary).await
}

async fn detail(call: Call) -> Result<Json<Value>, ApiError> {
    page(&call, "flavors/detail", whole).await
}

static QUERY: LazyLock<[Schema; 2]> = LazyLock::new(|| {
    [More::Anything, More::Underscores].map(|more| {
        let text = json!({"type": "string"});
        let schema = schemas::query(
            &[
                ("limit", schemas::limit()),
                ("marker", text.clone()),
                ("is_public", text.clone()),
                ("minRam", text.clone()),
                ("minDisk", text.clone()),
                ("sort_key", text.clone()),
                (
                    "sort_dir",
                    json!({"type": "string", "enum": ["asc", "desc"]}),
                ),
            ],
            more,
        );
        Schema::of(schema)
    })
});

async fn page(
    call: &Call,
    path: &str,
    view: fn(&Call, &Model) -> Value,
) -> Result<Json<Value>, ApiError> {
    call.check_query(&QUERY[usize::from(call.at_least(75))])?;
    let number = |name: &str| match call.query.last(name) {
        None => Ok(0),
        Some(text) => text.parse::<i64>().map_err(|_| {
            let word = if name == "minRam" {
                "min_ram"
            } else {
                "min_disk"
            };
            ApiError::bad_request(format!("Invalid {word} filter [{text}]"))
        }),
    };
    let filter = Filter {
        visible: visible(call)?,
        least_ram: number("minRam")?,
        least_disk: number("minDisk")?,
    };
    let sort = match call.query.last("sort_key") {
        None => SortKey::Id,
        Some(key) => SortKey::parse(key)
            .ok_or_else(|| ApiError::bad_request("Sort key supplied was not valid.".to_owned()))?,
    };
    let descending = call.query.last("sort_dir") == Some("desc");
    let marker = match call.marker() {
        None => None,
        Some(id) => Some(
            find(call, id)
                .await
                .map_err(|_| ApiError::bad_request(format!("marker [{id}] not found")))?,
        ),
    };
    let limit = call.limit()?;
    if limit == 0 {
        return Ok(Json(json!({"flavors": []})));
    }
    let rows = flavor::list(
        call.reader(),
        &filter,
        sort,
        descending,
        marker.as_ref(),
        limit,
    )
    .await?;
    let mut answer = json!({"flavors": rows.iter().map(|row| view(call, row)).collect::<Vec<_>>()});
    if let Some(last) = rows.last().filter(|_| rows.len() as u64 == limit) {
        answer["flavors_links"] = call.next(path, &last.id);
    }
    Ok(Json(answer))
}

/// `is_public`: administrators choose (`None`: all); for others, what they may use.
fn visible(call: &Call) -> Result<Visible, ApiError> {
    let to_me = || Visible::To(call.caller.project_id().unwrap_or_default().to_owned());
    if !call.caller.is_admin() {
        return Ok(to_me());
    }
    Ok(match call.query.last("is_public") {
        None => to_me(),
        Some(text) if text.eq_ignore_ascii_case("none") => Visible::All,
        Some(text) if schemas::is_true(text) => Visible::Public,
        Some(text) if schemas::is_false(text) => Visible::Private,
        Some(text) => {
            return Err(ApiError::bad_request(format!(
                "Invalid is_public filter [{text}]"
            )));
        }
    })
}

async fn show(call: Call, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let flavor = find(&call, &id).await?;
    Ok(Json(json!({"flavor": whole(&call, &flavor)})))
}

static CREATE: LazyLock<[Schema; 2]> = LazyLock::new(|| {
    const MOST: i64 = 0x7FFF_FFFF;
    [false, true].map(|described| {
        let mut properties = json!({
            "name": schemas::name(),
            "id": {
                "type": ["string", "number", "null"],
                "minLength": 0, "maxLength": 255,
                "pattern": "^(?![ ])[a-zA-Z0-9. _-]*(?<![ ])$",
            },
            "ram": schemas::integer(1, MOST),
            "vcpus": schemas::integer(1, MOST),
            "disk": schemas::integer(0, MOST),
            "OS-FLV-EXT-DATA:ephemeral": schemas::integer(0, MOST),
            "swap": schemas::integer(0, MOST),
            "rxtx_factor": {
                "type": ["number", "string"],
                "pattern": "^[0-9]+(\\.[0-9]+)?$",
                "minimum": 0,
            },
            "os-flavor-access:is_public": schemas::boolean(),
        });
        // The frame's patterns have no look-around; the id's blanks are checked below.
        properties["id"]["pattern"] = json!("^[a-zA-Z0-9. _-]*$");
        if described {
            properties["description"] = schemas::string_or_null(65535);
        }
        let flavor = schemas::closed(properties, &["name", "ram", "vcpus", "disk"]);
        Schema::of(schemas::wrapped("flavor", flavor))
    })
});

async fn create(call: Call, body: JsonBody) -> Result<Json<Value>, ApiError> {
    CREATE[usize::from(call.at_least(55))].check(&body.0)?;
    let given = &body.0["flavor"];
    let row = new_flavor(&call, given)?;
    let answer = whole(&call, &row);
    call.app
        .database()
        .write(move |tx| {
            let row = row.clone();
            Box::pin(async move {
                if flavor::by_name(tx, &row.name).await?.is_some() {
                    let name = &row.name;
                    return Err(ApiError::conflict(format!(
                        "Flavor with name {name} already exists."
                    )));
                }
                if flavor::find(tx, &row.id, None).await?.is_some() {
                    let id = &row.id;
                    return Err(ApiError::conflict(format!(
                        "Flavor with ID {id} already exists."
                    )));
                }
                Ok(flavor::insert(tx, row).await?)
            })
        })
        .await?;
    Ok(Json(json!({"flavor": answer})))
}

fn new_flavor(call: &Call, given: &Value) -> Result<Model, ApiError> {
    let number = |name: &str| given.get(name).and_then(as_integer).unwrap_or_default();
    let id = match &given["id"] {
        Value::Null => call.app.random().uuid().to_string(),
        Value::String(text) if text.is_empty() || text == "auto" => {
            call.app.random().uuid().to_string()
        }
        Value::String(text) if text.trim() != text => {
            return Err(ApiError::bad_request(format!(
                "Invalid input for field/attribute id. Value: {text}. '{text}' does not match \
                 '^(?! )[a-zA-Z0-9. _-]*(?<! )$'"
            )));
        }
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let rxtx = match &given["rxtx_factor"] {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => text.parse().ok(),
        _ => None,
    };
    let vcpus = number("vcpus");
    Ok(Model {
        id,
        name: given["name"].as_str().unwrap_or_default().to_owned(),
        vcpus: i32::try_from(vcpus).unwrap_or(i32::MAX),
        ram: number("ram"),
        disk: number("disk"),
        ephemeral: number("OS-FLV-EXT-DATA:ephemeral"),
        swap: number("swap"),
        rxtx_factor: rxtx.unwrap_or(1.0),
        is_public: given.get("os-flavor-access:is_public").is_none_or(as_bool),
        disabled: false,
        description: given["description"].as_str().map(str::to_owned),
        extra_specs: "{}".to_owned(),
        created_at_us: call.app.now_us(),
        updated_at_us: None,
    })
}

static UPDATE: LazyLock<Schema> = LazyLock::new(|| {
    let properties = json!({"description": schemas::string_or_null(65535)});
    let flavor = schemas::closed(properties, &["description"]);
    Schema::of(schemas::wrapped("flavor", flavor))
});

async fn update(
    call: Call,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    call.since(55)?;
    UPDATE.check(&body.0)?;
    let mut flavor = find(&call, &id).await?;
    flavor.description = body.0["flavor"]["description"].as_str().map(str::to_owned);
    let (description, now) = (flavor.description.clone(), call.app.now_us());
    call.app
        .database()
        .write(move |tx| {
            let (id, description) = (id.clone(), description.clone());
            Box::pin(async move { flavor::set_description(tx, &id, description, now).await })
        })
        .await?;
    Ok(Json(json!({"flavor": whole(&call, &flavor)})))
}

async fn delete(call: Call, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    find(&call, &id).await?;
    call.app
        .database()
        .write(move |tx| {
            let id = id.clone();
            Box::pin(async move { flavor::delete(tx, &id).await })
        })
        .await?;
    Ok(StatusCode::ACCEPTED)
}

async fn access(call: Call, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let flavor = find(&call, &id).await?;
    if flavor.is_public {
        return Err(ApiError::not_found(
            "Access list not available for public flavors.",
        ));
    }
    access_list(&call, &flavor.id).await
}

async fn access_list(call: &Call, id: &str) -> Result<Json<Value>, ApiError> {
    let projects = flavor::projects(call.reader(), id).await?;
    let list: Vec<Value> = projects
        .into_iter()
        .map(|project| json!({"flavor_id": id, "tenant_id": project}))
        .collect();
    Ok(Json(json!({"flavor_access": list})))
}

static ACCESS: LazyLock<[Schema; 2]> = LazyLock::new(|| {
    ["addTenantAccess", "removeTenantAccess"].map(|action| {
        let properties = json!({"tenant": schemas::string(1, 255)});
        let inner = schemas::closed(properties, &["tenant"]);
        Schema::of(schemas::wrapped(action, inner))
    })
});

async fn act(call: Call, Path(id): Path<String>, body: JsonBody) -> Result<Json<Value>, ApiError> {
    let action = super::actions::name_of(&body.0)?;
    let add = match action.as_str() {
        "addTenantAccess" => true,
        "removeTenantAccess" => false,
        other => return Err(super::actions::unknown(other)),
    };
    let word = if add { "add" } else { "remove" };
    call.require(Rule::admin(if add {
        "os_compute_api:os-flavor-access:add_tenant_access"
    } else {
        "os_compute_api:os-flavor-access:remove_tenant_access"
    }))?;
    ACCESS[usize::from(!add)].check(&body.0)?;
    let project = body.0[action.as_str()]["tenant"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let flavor = find(&call, &id).await?;
    if add && flavor.is_public {
        return Err(ApiError::conflict(format!(
            "Can not {word} access to a public flavor."
        )));
    }
    let flavor_id = flavor.id.clone();
    call.app
        .database()
        .write(move |tx| {
            let (id, project) = (flavor_id.clone(), project.clone());
            Box::pin(async move { change_access(tx, add, &id, &project).await })
        })
        .await?;
    access_list(&call, &flavor.id).await
}

async fn change_access(
    tx: &sea_orm::DatabaseTransaction,
    add: bool,
    id: &str,
    project: &str,
) -> Result<(), ApiError> {
    if !add {
        if flavor::revoke(tx, id, project).await? {
            return Ok(());
        }
        return Err(ApiError::not_found(format!(
            "Flavor access not found for {id} / {project} combination."
        )));
    }
    if flavor::projects(tx, id)
        .await?
        .iter()
        .any(|known| known == project)
    {
        return Err(ApiError::conflict(format!(
            "Flavor access already exists for flavor {id} and project {project} combination."
        )));
    }
    Ok(flavor::grant(tx, id, project).await?)
}

async fn specs(call: Call, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let flavor = find(&call, &id).await?;
    Ok(Json(json!({"extra_specs": flavor.extra_specs()})))
}

async fn spec(
    call: Call,
    Path((id, key)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let flavor = find(&call, &id).await?;
    let specs = flavor.extra_specs();
    let value = specs.get(&key).ok_or_else(|| no_spec(&id, &key))?;
    Ok(Json(one(&key, json!(value))))
}

fn no_spec(id: &str, key: &str) -> ApiError {
    ApiError::not_found(format!("Flavor {id} has no extra specs with key {key}."))
}

fn one(key: &str, value: Value) -> Value {
    let mut map = Map::new();
    map.insert(key.to_owned(), value);
    Value::Object(map)
}

static ADD_SPECS: LazyLock<Schema> =
    LazyLock::new(|| Schema::of(schemas::wrapped("extra_specs", spec_values(None))));
static PUT_SPEC: LazyLock<Schema> = LazyLock::new(|| Schema::of(spec_values(Some(1))));

fn spec_values(exactly: Option<u32>) -> Value {
    let mut schema = json!({
        "type": "object",
        "patternProperties": {
            "^[a-zA-Z0-9-_:. ]{1,255}$": {
                "type": ["string", "number"],
                "maxLength": 255,
                "pattern": "^-?[^\\x00]*$",
            },
        },
        "additionalProperties": false,
    });
    if let Some(count) = exactly {
        schema["minProperties"] = json!(count);
        schema["maxProperties"] = json!(count);
    }
    schema
}

fn read_specs(call: &Call, given: &Value) -> Result<ExtraSpecs, ApiError> {
    let mut specs = ExtraSpecs::new();
    for (key, value) in given.as_object().into_iter().flatten() {
        let value = match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        if call.at_least(86) {
            validate_extra_spec(key, &value).map_err(ApiError::bad_request)?;
        }
        specs.insert(key.clone(), value);
    }
    Ok(specs)
}

async fn add_specs(
    call: Call,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    ADD_SPECS.check(&body.0)?;
    let new = read_specs(&call, &body.0["extra_specs"])?;
    change_specs(&call, &id, move |specs| {
        specs.extend(new.clone());
        true
    })
    .await?;
    Ok(Json(body.0))
}

async fn put_spec(
    call: Call,
    Path((id, key)): Path<(String, String)>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    PUT_SPEC.check(&body.0)?;
    let new = read_specs(&call, &body.0)?;
    if !new.contains_key(&key) {
        return Err(ApiError::bad_request("Request body and URI mismatch"));
    }
    change_specs(&call, &id, move |specs| {
        specs.extend(new.clone());
        true
    })
    .await?;
    Ok(Json(body.0))
}

async fn delete_spec(
    call: Call,
    Path((id, key)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let gone = key.clone();
    let had = change_specs(&call, &id, move |specs| specs.remove(&gone).is_some()).await?;
    if had {
        Ok(StatusCode::OK)
    } else {
        Err(no_spec(&id, &key))
    }
}

/// Reads, changes and writes a flavor's specs in one transaction; what `change` says is answered.
async fn change_specs(
    call: &Call,
    id: &str,
    change: impl Fn(&mut ExtraSpecs) -> bool + Send + Sync + Clone + 'static,
) -> Result<bool, ApiError> {
    let id = id.to_owned();
    call.app
        .database()
        .write(move |tx| {
            let (id, change) = (id.clone(), change.clone());
            Box::pin(async move {
                let row = flavor::find(tx, &id, None)
                    .await?
                    .ok_or_else(|| missing(&id))?;
                let mut specs = row.extra_specs();
                let changed = change(&mut specs);
                flavor::set_extra_specs(tx, &id, &specs).await?;
                Ok::<bool, ApiError>(changed)
            })
        })
        .await
}
