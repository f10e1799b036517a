//! A server's addresses and security groups: none, for as long as there are no networks.

use axum::Json;
use axum::extract::Path;
use serde_json::{Value, json};

use super::call::Call;
use super::servers::find;
use crate::http::{ApiError, Routes};
use crate::policy::Rule;

pub fn routes(routes: Routes) -> Routes {
    routes
        .get(
            "/v2.1/servers/{id}/ips",
            Rule::reader("os_compute_api:ips:index"),
            index,
        )
        .get(
            "/v2.1/servers/{id}/ips/{label}",
            Rule::reader("os_compute_api:ips:show"),
            show,
        )
        .get(
            "/v2.1/servers/{id}/os-security-groups",
            Rule::reader("os_compute_api:os-security-groups:list"),
            security_groups,
        )
}

async fn index(call: Call, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    find(&call, &id).await?;
    Ok(Json(json!({"addresses": {}})))
}

async fn show(call: Call, Path((id, _)): Path<(String, String)>) -> Result<Json<Value>, ApiError> {
    find(&call, &id).await?;
    Err(ApiError::not_found(
        "Instance is not a member of specified network",
    ))
}

async fn security_groups(call: Call, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    find(&call, &id).await?;
    Ok(Json(json!({"security_groups": []})))
}
