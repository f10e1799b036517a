//! The catalogue's resources: services, their endpoints, and regions.

use std::sync::LazyLock;

use axum::Json;
use axum::extract::{Path, State};
use http::StatusCode;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, ConnectionTrait, DatabaseTransaction, EntityTrait,
    IntoActiveModel, QueryFilter, QueryOrder,
};
use serde_json::{Value, json};

use super::list::Asked;
use super::members::{self, Members, object};
use crate::http::schema::Schema;
use crate::http::{ApiError, App, JsonBody, RequestContext, Routes, Rule};
use crate::identity::model::{endpoint, region, service};
use crate::identity::store;

pub fn routes(routes: Routes) -> Routes {
    routes
        .get(
            "/v3/services",
            Rule::admin("identity:list_services"),
            list_services,
        )
        .post(
            "/v3/services",
            Rule::admin("identity:create_service"),
            create_service,
        )
        .get(
            "/v3/services/{id}",
            Rule::admin("identity:get_service"),
            show_service,
        )
        .patch(
            "/v3/services/{id}",
            Rule::admin("identity:update_service"),
            update_service,
        )
        .delete(
            "/v3/services/{id}",
            Rule::admin("identity:delete_service"),
            delete_service,
        )
        .get(
            "/v3/endpoints",
            Rule::admin("identity:list_endpoints"),
            list_endpoints,
        )
        .post(
            "/v3/endpoints",
            Rule::admin("identity:create_endpoint"),
            create_endpoint,
        )
        .get(
            "/v3/endpoints/{id}",
            Rule::admin("identity:get_endpoint"),
            show_endpoint,
        )
        .patch(
            "/v3/endpoints/{id}",
            Rule::admin("identity:update_endpoint"),
            update_endpoint,
        )
        .delete(
            "/v3/endpoints/{id}",
            Rule::admin("identity:delete_endpoint"),
            delete_endpoint,
        )
        .get(
            "/v3/regions",
            Rule::token("identity:list_regions"),
            list_regions,
        )
        .post(
            "/v3/regions",
            Rule::admin("identity:create_region"),
            create_region,
        )
        .get(
            "/v3/regions/{id}",
            Rule::token("identity:get_region"),
            show_region,
        )
        .put(
            "/v3/regions/{id}",
            Rule::admin("identity:create_region"),
            put_region,
        )
        .patch(
            "/v3/regions/{id}",
            Rule::admin("identity:update_region"),
            update_region,
        )
        .delete(
            "/v3/regions/{id}",
            Rule::admin("identity:delete_region"),
            delete_region,
        )
}

fn service_schema(required: &[&str]) -> Schema {
    let properties = json!({
        "type": {"type": "string", "minLength": 1, "maxLength": 255},
        "name": {"type": ["string", "null"], "maxLength": 255},
        "enabled": {"type": "boolean"},
        "description": {"type": ["string", "null"]},
    });
    members::made("service", properties, required)
}

fn endpoint_schema(required: &[&str]) -> Schema {
    let properties = json!({
        "service_id": {"type": "string", "minLength": 1, "maxLength": 64},
        "interface": {"type": "string", "enum": ["admin", "internal", "public"]},
        "url": {"type": "string", "minLength": 1, "maxLength": 2048},
        "region_id": {"type": ["string", "null"], "maxLength": 255},
        "region": {"type": ["string", "null"], "maxLength": 255},
        "enabled": {"type": "boolean"},
    });
    members::made("endpoint", properties, required)
}

static NEW_SERVICE: LazyLock<Schema> = LazyLock::new(|| service_schema(&["type"]));
static CHANGED_SERVICE: LazyLock<Schema> = LazyLock::new(|| service_schema(&[]));
static NEW_ENDPOINT: LazyLock<Schema> =
    LazyLock::new(|| endpoint_schema(&["service_id", "interface", "url"]));
static CHANGED_ENDPOINT: LazyLock<Schema> = LazyLock::new(|| endpoint_schema(&[]));
static REGION: LazyLock<Schema> = LazyLock::new(|| {
    let properties = json!({
        "id": {"type": "string", "minLength": 1, "maxLength": 255},
        "description": {"type": ["string", "null"]},
        "parent_region_id": {"type": ["string", "null"], "maxLength": 255},
    });
    members::made("region", properties, &[])
});

fn missing(kind: &str, id: &str) -> ApiError {
    ApiError::not_found(format!("Could not find {kind}: {id}."))
}

fn service_view(ctx: &RequestContext, row: &service::Model) -> Value {
    let mut view = object(&row.extra);
    if let Some(name) = &row.name {
        view.shift_insert(0, "name".into(), name.clone().into());
    }
    view.insert("id".into(), row.id.clone().into());
    view.insert("type".into(), row.kind.clone().into());
    view.insert("enabled".into(), row.enabled.into());
    view.insert(
        "links".into(),
        json!({"self": ctx.link(&format!("/v3/services/{}", row.id))}),
    );
    view.into()
}

fn endpoint_view(ctx: &RequestContext, row: &endpoint::Model) -> Value {
    let mut view = object(&row.extra);
    view.insert("id".into(), row.id.clone().into());
    view.insert("interface".into(), row.interface.clone().into());
    view.insert("region_id".into(), row.region_id.clone().into());
    view.insert("service_id".into(), row.service_id.clone().into());
    view.insert("url".into(), row.url.clone().into());
    view.insert("enabled".into(), row.enabled.into());
    view.insert("region".into(), row.region_id.clone().into());
    view.insert(
        "links".into(),
        json!({"self": ctx.link(&format!("/v3/endpoints/{}", row.id))}),
    );
    view.into()
}

fn region_view(ctx: &RequestContext, row: &region::Model) -> Value {
    let mut view = object(&row.extra);
    view.insert("id".into(), row.id.clone().into());
    view.insert("description".into(), row.description.clone().into());
    view.insert(
        "parent_region_id".into(),
        row.parent_region_id.clone().into(),
    );
    view.insert(
        "links".into(),
        json!({"self": ctx.link(&format!("/v3/regions/{}", row.id))}),
    );
    view.into()
}

async fn find_service(db: &impl ConnectionTrait, id: &str) -> Result<service::Model, ApiError> {
    let row = service::Entity::find_by_id(id).one(db).await?;
    row.ok_or_else(|| missing("service", id))
}

async fn find_endpoint(db: &impl ConnectionTrait, id: &str) -> Result<endpoint::Model, ApiError> {
    let row = endpoint::Entity::find_by_id(id).one(db).await?;
    row.ok_or_else(|| missing("endpoint", id))
}

async fn find_region(db: &impl ConnectionTrait, id: &str) -> Result<region::Model, ApiError> {
    let row = region::Entity::find_by_id(id).one(db).await?;
    row.ok_or_else(|| missing("region", id))
}

async fn list_services(State(app): State<App>, asked: Asked) -> Result<Json<Value>, ApiError> {
    let found = service::Entity::find().order_by_asc(service::Column::Id);
    let rows = found.all(app.database().reader()).await?;
    let items = rows
        .iter()
        .map(|row| service_view(&asked.ctx, row))
        .collect();
    Ok(asked.list("services", &["name", "type"], items))
}

async fn show_service(
    State(app): State<App>,
    ctx: RequestContext,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let row = find_service(app.database().reader(), &id).await?;
    Ok(Json(json!({"service": service_view(&ctx, &row)})))
}

fn apply_service(mut members: Members, row: &mut service::Model) {
    for fixed in ["id", "links"] {
        members.take(fixed);
    }
    members.string("type", &mut row.kind);
    members.optional("name", &mut row.name);
    members.boolean("enabled", &mut row.enabled);
    members.rest(&mut row.extra);
}

async fn create_service(
    State(app): State<App>,
    ctx: RequestContext,
    body: JsonBody,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    NEW_SERVICE.check(&body.0)?;
    let mut row = service::Model {
        id: app.random().uuid().simple().to_string(),
        kind: String::new(),
        name: Some(String::new()),
        enabled: true,
        extra: "{}".to_owned(),
    };
    apply_service(Members::of(body.0, "service")?, &mut row);
    let row = store::change(app.database(), move |tx| {
        let row = row.clone();
        Box::pin(async move { Ok(row.into_active_model().insert(tx).await?) })
    })
    .await?;
    Ok((
        StatusCode::CREATED,
        Json(json!({"service": service_view(&ctx, &row)})),
    ))
}

async fn update_service(
    State(app): State<App>,
    ctx: RequestContext,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    CHANGED_SERVICE.check(&body.0)?;
    let row = store::change(app.database(), move |tx| {
        let (id, body) = (id.clone(), body.0.clone());
        Box::pin(async move {
            let mut row = find_service(tx, &id).await?;
            apply_service(Members::of(body, "service")?, &mut row);
            Ok(row.into_active_model().reset_all().update(tx).await?)
        })
    })
    .await?;
    Ok(Json(json!({"service": service_view(&ctx, &row)})))
}

/// With its endpoints.
async fn delete_service(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    store::change(app.database(), move |tx| {
        let id = id.clone();
        Box::pin(async move {
            find_service(tx, &id).await?;
            endpoint::Entity::delete_many()
                .filter(endpoint::Column::ServiceId.eq(&id))
                .exec(tx)
                .await?;
            service::Entity::delete_by_id(id).exec(tx).await?;
            Ok(StatusCode::NO_CONTENT)
        })
    })
    .await
}

async fn list_endpoints(State(app): State<App>, asked: Asked) -> Result<Json<Value>, ApiError> {
    let found = endpoint::Entity::find().order_by_asc(endpoint::Column::Id);
    let rows = found.all(app.database().reader()).await?;
    let items = rows
        .iter()
        .map(|row| endpoint_view(&asked.ctx, row))
        .collect();
    let fields = ["interface", "service_id", "region_id", "region"];
    Ok(asked.list("endpoints", &fields, items))
}

async fn show_endpoint(
    State(app): State<App>,
    ctx: RequestContext,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let row = find_endpoint(app.database().reader(), &id).await?;
    Ok(Json(json!({"endpoint": endpoint_view(&ctx, &row)})))
}

/// Writes the members into the row. The service must exist; a region named `region` that does not
/// is made, as keystone does for clients of the older form.
async fn apply_endpoint(
    tx: &DatabaseTransaction,
    mut members: Members,
    row: &mut endpoint::Model,
) -> Result<(), ApiError> {
    for fixed in ["id", "links"] {
        members.take(fixed);
    }
    members.string("service_id", &mut row.service_id);
    members.string("interface", &mut row.interface);
    members.string("url", &mut row.url);
    members.boolean("enabled", &mut row.enabled);
    let mut older = None;
    members.optional("region", &mut older);
    if older.is_some() {
        row.region_id = older;
    }
    let mut newer = None;
    members.optional("region_id", &mut newer);
    if let Some(id) = newer {
        let known = region::Entity::find_by_id(&id).one(tx).await?;
        known.ok_or_else(|| ApiError::bad_request(format!("Could not find region: {id}.")))?;
        row.region_id = Some(id);
    }
    members.rest(&mut row.extra);
    let service = service::Entity::find_by_id(&row.service_id).one(tx).await?;
    service.ok_or_else(|| {
        ApiError::bad_request(format!("Could not find service: {}.", row.service_id))
    })?;
    if let Some(id) = &row.region_id
        && region::Entity::find_by_id(id).one(tx).await?.is_none()
    {
        let made = region::Model {
            id: id.clone(),
            description: String::new(),
            parent_region_id: None,
            extra: "{}".to_owned(),
        };
        made.into_active_model().insert(tx).await?;
    }
    Ok(())
}

async fn create_endpoint(
    State(app): State<App>,
    ctx: RequestContext,
    body: JsonBody,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    NEW_ENDPOINT.check(&body.0)?;
    let blank = endpoint::Model {
        id: app.random().uuid().simple().to_string(),
        service_id: String::new(),
        region_id: None,
        interface: String::new(),
        url: String::new(),
        enabled: true,
        extra: "{}".to_owned(),
    };
    let row = store::change(app.database(), move |tx| {
        let (mut row, body) = (blank.clone(), body.0.clone());
        Box::pin(async move {
            apply_endpoint(tx, Members::of(body, "endpoint")?, &mut row).await?;
            Ok(row.into_active_model().insert(tx).await?)
        })
    })
    .await?;
    Ok((
        StatusCode::CREATED,
        Json(json!({"endpoint": endpoint_view(&ctx, &row)})),
    ))
}

async fn update_endpoint(
    State(app): State<App>,
    ctx: RequestContext,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    CHANGED_ENDPOINT.check(&body.0)?;
    let row = store::change(app.database(), move |tx| {
        let (id, body) = (id.clone(), body.0.clone());
        Box::pin(async move {
            let mut row = find_endpoint(tx, &id).await?;
            apply_endpoint(tx, Members::of(body, "endpoint")?, &mut row).await?;
            Ok(row.into_active_model().reset_all().update(tx).await?)
        })
    })
    .await?;
    Ok(Json(json!({"endpoint": endpoint_view(&ctx, &row)})))
}

async fn delete_endpoint(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    store::change(app.database(), move |tx| {
        let id = id.clone();
        Box::pin(async move {
            find_endpoint(tx, &id).await?;
            endpoint::Entity::delete_by_id(id).exec(tx).await?;
            Ok(StatusCode::NO_CONTENT)
        })
    })
    .await
}

async fn list_regions(State(app): State<App>, asked: Asked) -> Result<Json<Value>, ApiError> {
    let found = region::Entity::find().order_by_asc(region::Column::Id);
    let rows = found.all(app.database().reader()).await?;
    let items = rows
        .iter()
        .map(|row| region_view(&asked.ctx, row))
        .collect();
    Ok(asked.list("regions", &["parent_region_id"], items))
}

async fn show_region(
    State(app): State<App>,
    ctx: RequestContext,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let row = find_region(app.database().reader(), &id).await?;
    Ok(Json(json!({"region": region_view(&ctx, &row)})))
}

async fn apply_region(
    tx: &DatabaseTransaction,
    mut members: Members,
    row: &mut region::Model,
) -> Result<(), ApiError> {
    for fixed in ["id", "links"] {
        members.take(fixed);
    }
    members.string("description", &mut row.description);
    members.optional("parent_region_id", &mut row.parent_region_id);
    members.rest(&mut row.extra);
    if let Some(parent) = &row.parent_region_id {
        find_region(tx, parent).await?;
    }
    Ok(())
}

async fn make_region(app: &App, id: String, body: Value) -> Result<region::Model, ApiError> {
    store::change(app.database(), move |tx| {
        let (id, body) = (id.clone(), body.clone());
        Box::pin(async move {
            if region::Entity::find_by_id(&id).one(tx).await?.is_some() {
                return Err(ApiError::conflict(format!(
                    "Conflict occurred attempting to store region - Duplicate ID, {id}."
                )));
            }
            let mut row = region::Model {
                id,
                description: String::new(),
                parent_region_id: None,
                extra: "{}".to_owned(),
            };
            apply_region(tx, Members::of(body, "region")?, &mut row).await?;
            Ok(row.into_active_model().insert(tx).await?)
        })
    })
    .await
}

async fn create_region(
    State(app): State<App>,
    ctx: RequestContext,
    body: JsonBody,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    REGION.check(&body.0)?;
    let id = body.0["region"]["id"].as_str().map(str::to_owned);
    let id = id.unwrap_or_else(|| app.random().uuid().simple().to_string());
    let row = make_region(&app, id, body.0).await?;
    Ok((
        StatusCode::CREATED,
        Json(json!({"region": region_view(&ctx, &row)})),
    ))
}

async fn put_region(
    State(app): State<App>,
    ctx: RequestContext,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<(StatusCode, Json<Value>), ApiError> {
    REGION.check(&body.0)?;
    if body.0["region"]["id"]
        .as_str()
        .is_some_and(|named| named != id)
    {
        return Err(ApiError::bad_request("Conflicting region IDs specified"));
    }
    let row = make_region(&app, id, body.0).await?;
    Ok((
        StatusCode::CREATED,
        Json(json!({"region": region_view(&ctx, &row)})),
    ))
}

async fn update_region(
    State(app): State<App>,
    ctx: RequestContext,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    REGION.check(&body.0)?;
    let row = store::change(app.database(), move |tx| {
        let (id, body) = (id.clone(), body.0.clone());
        Box::pin(async move {
            let mut row = find_region(tx, &id).await?;
            apply_region(tx, Members::of(body, "region")?, &mut row).await?;
            Ok(row.into_active_model().reset_all().update(tx).await?)
        })
    })
    .await?;
    Ok(Json(json!({"region": region_view(&ctx, &row)})))
}

async fn delete_region(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    store::change(app.database(), move |tx| {
        let id = id.clone();
        Box::pin(async move {
            find_region(tx, &id).await?;
            let child = region::Entity::find().filter(region::Column::ParentRegionId.eq(&id));
            let used = endpoint::Entity::find().filter(endpoint::Column::RegionId.eq(&id));
            if child.one(tx).await?.is_some() || used.one(tx).await?.is_some() {
                return Err(ApiError::forbidden(format!(
                    "Unable to delete region {id} because it or its child regions have associated \
                     endpoints."
                )));
            }
            region::Entity::delete_by_id(id).exec(tx).await?;
            Ok(StatusCode::NO_CONTENT)
        })
    })
    .await
}
