//! Version documents.

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};
use serde_json::{Value, json};

use crate::http::RequestContext;

pub async fn versions(ctx: RequestContext) -> Response {
    let location = [(header::LOCATION, ctx.link("/v3/"))];
    let body = json!({"versions": {"values": [document(&ctx)]}});
    (StatusCode::MULTIPLE_CHOICES, location, Json(body)).into_response()
}

pub async fn version(ctx: RequestContext) -> Json<Value> {
    Json(json!({"version": document(&ctx)}))
}

fn document(ctx: &RequestContext) -> Value {
    json!({
        "id": "v3.14",
        "status": "stable",
        "updated": "2020-04-07T00:00:00Z",
        "links": [{"rel": "self", "href": ctx.link("/v3/")}],
        "media-types": [{
            "base": "application/json",
            "type": "application/vnd.openstack.identity-v3+json",
        }],
    })
}
