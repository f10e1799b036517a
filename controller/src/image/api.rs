//! Routes and the handlers of images themselves; bytes are in [`super::data`], members in
//! [`super::member`].

use axum::Json;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serde_json::{Map, Value, json};

use super::model::{Image, Status, refuse_fixed};
use super::patch::{self, MEDIA_TYPES};
use super::store::StoreError;
use super::{data, filter, member, schema, snapshot, store};
use crate::http::{
    ApiError, App, Caller, Direction, JsonBody, PageRequest, PageRules, Query, RequestContext,
    Routes, Rule, Service,
};

pub fn routes() -> Routes {
    let (see, change) = (Rule::reader, Rule::member);
    Routes::new(Service::Image)
        .get("/", Rule::open(), versions)
        .get("/versions", Rule::open(), versions_ok)
        .get("/v2/images", see("get_images"), list)
        .post("/v2/images", change("add_image"), create)
        .get("/v2/images/{id}", see("get_image"), show)
        .patch("/v2/images/{id}", change("modify_image"), modify)
        .delete("/v2/images/{id}", change("delete_image"), delete)
        .put("/v2/images/{id}/file", change("upload_image"), data::upload)
        .get(
            "/v2/images/{id}/file",
            see("download_image"),
            data::download,
        )
        .put("/v2/images/{id}/stage", change("modify_image"), data::stage)
        .post(
            "/v2/images/{id}/import",
            change("communitize_image"),
            data::import,
        )
        .post(
            "/v2/images/{id}/actions/deactivate",
            change("deactivate"),
            deactivate,
        )
        .post(
            "/v2/images/{id}/actions/reactivate",
            change("reactivate"),
            reactivate,
        )
        .put(
            "/v2/images/{id}/tags/{tag}",
            change("modify_image"),
            add_tag,
        )
        .delete(
            "/v2/images/{id}/tags/{tag}",
            change("modify_image"),
            remove_tag,
        )
        .get("/v2/images/{id}/members", see("get_members"), member::list)
        .post(
            "/v2/images/{id}/members",
            change("add_member"),
            member::create,
        )
        .get(
            "/v2/images/{id}/members/{member}",
            see("get_member"),
            member::show,
        )
        .put(
            "/v2/images/{id}/members/{member}",
            change("modify_member"),
            member::update,
        )
        .delete(
            "/v2/images/{id}/members/{member}",
            change("delete_member"),
            member::delete,
        )
        .get("/v2/info/import", see("get_info"), import_info)
        .get("/v2/schemas/{name}", see("get_schema"), show_schema)
}

/// The versions that the original announces without a cache and several stores.
const VERSIONS: [&str; 15] = [
    "v2.15", "v2.13", "v2.12", "v2.11", "v2.10", "v2.9", "v2.8", "v2.7", "v2.6", "v2.5", "v2.4",
    "v2.3", "v2.2", "v2.1", "v2.0",
];

fn version_list(ctx: &RequestContext) -> Json<Value> {
    let href = ctx.link("/v2/");
    let versions: Vec<Value> = VERSIONS
        .iter()
        .enumerate()
        .map(|(at, id)| {
            let status = if at == 0 { "CURRENT" } else { "SUPPORTED" };
            json!({"id": id, "status": status, "links": [{"rel": "self", "href": href}]})
        })
        .collect();
    Json(json!({ "versions": versions }))
}

async fn versions(ctx: RequestContext) -> (StatusCode, Json<Value>) {
    (StatusCode::MULTIPLE_CHOICES, version_list(&ctx))
}

async fn versions_ok(ctx: RequestContext) -> Json<Value> {
    version_list(&ctx)
}

async fn import_info() -> Json<Value> {
    Json(json!({"import-methods": {
        "description": "Import methods available.",
        "type": "array",
        "value": data::IMPORT_METHODS,
    }}))
}

async fn show_schema(Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    match name.as_str() {
        "image" => Ok(Json(schema::image())),
        "images" => Ok(Json(schema::images())),
        "member" => Ok(Json(schema::member())),
        "members" => Ok(Json(schema::members())),
        _ => Err(ApiError::not_found("The resource could not be found.")),
    }
}

const PAGES: PageRules = PageRules {
    most: 1000,
    sort_keys: &[
        "name",
        "status",
        "container_format",
        "disk_format",
        "size",
        "id",
        "created_at",
        "updated_at",
    ],
    default_sort: &[("created_at", Direction::Descending)],
    default_direction: Direction::Descending,
};
/// Rows a page has without a limit in the query (glance's limit_param_default).
const DEFAULT_LIMIT: u64 = 25;

async fn list(
    State(app): State<App>,
    caller: Caller,
    query: Query,
) -> Result<Json<Value>, ApiError> {
    let mut page = PageRequest::parse(&unfold_sort(&query)?, &PAGES)?;
    if !page.limited {
        page.limit = DEFAULT_LIMIT;
    }
    let condition = filter::condition(&caller, &query)?;
    let reader = app.images().database.reader();
    let marker = match &page.marker {
        None => None,
        Some(id) => Some(store::find_visible(reader, &caller, id).await.map_err(
            |error| match error {
                StoreError::Refused(_) => {
                    ApiError::bad_request(format!("No image found with ID {id}"))
                }
                other => other.into(),
            },
        )?),
    };
    let marker = marker.as_ref().map(|image| &image.row);
    let images = store::list(reader, condition, &page, marker)
        .await
        .map_err(StoreError::from)?;
    let link = |text: String| {
        if text.is_empty() {
            "/v2/images".to_owned()
        } else {
            format!("/v2/images?{text}")
        }
    };
    let mut body = Map::new();
    let full = page.limit > 0 && images.len() as u64 == page.limit;
    let next = images
        .last()
        .filter(|_| full)
        .map(|last| last.row.id.clone());
    body.insert(
        "images".to_owned(),
        images.iter().map(Image::view).collect(),
    );
    body.insert("first".to_owned(), json!(link(query.with("marker", None))));
    if let Some(id) = next {
        body.insert(
            "next".to_owned(),
            json!(link(query.with("marker", Some(&id)))),
        );
    }
    body.insert("schema".to_owned(), json!("/v2/schemas/images"));
    Ok(Json(Value::Object(body)))
}

/// `sort=name:asc,size` written as `sort_key` and `sort_dir`; both forms at once are 400.
fn unfold_sort(query: &Query) -> Result<Query, ApiError> {
    let Some(sort) = query.get("sort") else {
        return Ok(query.clone());
    };
    if query.contains("sort_key") || query.contains("sort_dir") {
        return Err(ApiError::bad_request(
            "Old and new sorting syntax cannot be combined",
        ));
    }
    let mut text = query.with("sort", None);
    for item in sort.split(',') {
        let (key, direction) = item.trim().split_once(':').unwrap_or((item.trim(), "desc"));
        text.push_str(&format!("&sort_key={key}&sort_dir={direction}"));
    }
    Ok(Query::parse(&text))
}

async fn create(
    State(app): State<App>,
    caller: Caller,
    ctx: RequestContext,
    JsonBody(body): JsonBody,
) -> Result<Response, ApiError> {
    let Value::Object(attributes) = body else {
        return Err(ApiError::bad_request(
            "Provided object does not match schema 'image'.",
        ));
    };
    for name in attributes.keys().filter(|name| *name != "id") {
        refuse_fixed(name)?;
    }
    schema::check_image(&attributes)?;
    let id = match attributes.get("id").and_then(Value::as_str) {
        Some(id) => id.to_ascii_lowercase(),
        None => app.random().uuid().to_string(),
    };
    let mut image = snapshot::new(id, caller.scope()?.id.clone(), app.now_us());
    for (name, value) in attributes.iter().filter(|(name, _)| *name != "id") {
        patch::set(&mut image, name, value, &caller)?;
    }
    store::insert(&app.images().database, image.clone()).await?;
    let location = ctx.link(&format!("/v2/images/{}", image.row.id));
    let mut answer = (StatusCode::CREATED, Json(image.view())).into_response();
    let headers = answer.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&location) {
        headers.insert(header::LOCATION, value);
    }
    headers.insert(
        HeaderName::from_static("openstack-image-import-methods"),
        HeaderValue::from_static(data::IMPORT_METHODS[0]),
    );
    Ok(answer)
}

async fn show(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let image = store::find_visible(app.images().database.reader(), &caller, &id).await?;
    Ok(Json(image.view()))
}

async fn modify(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let media_type = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    let media_type = media_type
        .and_then(|kind| kind.split(';').next())
        .unwrap_or("")
        .trim();
    if !MEDIA_TYPES.contains(&media_type) {
        return Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!("The request media type {media_type} is not supported by this server.\n"),
        )
        .with_detail(format!(
            "Image PATCH expects Content-Type one of: {}",
            MEDIA_TYPES.join(", ")
        )));
    }
    let changes = patch::parse(&body.0, media_type)?;
    let (database, now_us) = (&app.images().database, app.now_us());
    let who = caller.clone();
    let image = store::change(
        database,
        &caller,
        &id,
        "modify_image",
        now_us,
        move |image| {
            changes
                .iter()
                .try_for_each(|change| patch::apply(image, change, &who))
        },
    )
    .await?;
    Ok(Json(image.view()))
}

async fn delete(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    let images = app.images();
    if let Some(blob) = store::delete(&images.database, &caller, &id, app.now_us()).await? {
        // Bytes that stay here are found at the next start.
        if let Err(error) = images.blobs.remove(&blob).await {
            tracing::warn!(%error, image = %id, "the bytes of a deleted image could not be removed");
        }
    }
    Ok(StatusCode::NO_CONTENT)
}

async fn deactivate(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    turn(&app, &caller, &id, "deactivate", Status::Deactivated).await
}

async fn reactivate(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    turn(&app, &caller, &id, "reactivate", Status::Active).await
}

async fn turn(
    app: &App,
    caller: &Caller,
    id: &str,
    action: &'static str,
    to: Status,
) -> Result<StatusCode, ApiError> {
    let (database, now_us) = (&app.images().database, app.now_us());
    store::change(database, caller, id, action, now_us, move |image| {
        if !matches!(image.status(), Some(Status::Active | Status::Deactivated)) {
            return Err(ApiError::forbidden(format!(
                "Image status transition from {} to {} is not allowed",
                image.row.status,
                to.name()
            )));
        }
        image.row.status = to.name().to_owned();
        Ok(())
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Tags an image has at most (glance's image_tag_quota).
const MOST_TAGS: usize = 128;

async fn add_tag(
    State(app): State<App>,
    caller: Caller,
    Path((id, tag)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    if tag.chars().count() > 255 {
        return Err(ApiError::bad_request("A tag has at most 255 characters."));
    }
    let (database, now_us) = (&app.images().database, app.now_us());
    store::change(
        database,
        &caller,
        &id,
        "modify_image",
        now_us,
        move |image| {
            if image.tags.len() >= MOST_TAGS && !image.tags.contains(&tag) {
                return Err(ApiError::new(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    format!("The limit of {MOST_TAGS} tags has been exceeded."),
                ));
            }
            image.tags.push(tag.clone());
            image.tags.sort();
            image.tags.dedup();
            Ok(())
        },
    )
    .await
    .map_err(tag_error(&id))?;
    Ok(StatusCode::NO_CONTENT)
}

async fn remove_tag(
    State(app): State<App>,
    caller: Caller,
    Path((id, tag)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    let (database, now_us) = (&app.images().database, app.now_us());
    store::change(
        database,
        &caller,
        &id,
        "modify_image",
        now_us,
        move |image| {
            if !image.tags.contains(&tag) {
                return Err(ApiError::not_found("The resource could not be found."));
            }
            image.tags.retain(|known| *known != tag);
            Ok(())
        },
    )
    .await
    .map_err(tag_error(&id))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Of tags, the original says `Image X not found.`
fn tag_error(id: &str) -> impl Fn(StoreError) -> ApiError {
    move |error| match ApiError::from(error) {
        refused if refused.message().starts_with("No image found") => {
            ApiError::not_found(format!("Image {id} not found."))
        }
        other => other,
    }
}
