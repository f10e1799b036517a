//! `/v3/auth`: tokens, and what a token's user can reach.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use sea_orm::ActiveValue::Set;
use sea_orm::{ColumnTrait, EntityTrait, QueryFilter};
use serde_json::{Value, json};

use super::catalog;
use super::list::Asked;
use crate::http::{
    ApiError, App, Authenticate, Caller, Identity, JsonBody, Query, Refused, RequestContext,
    Routes, Rule,
};
use crate::identity::api::project::project_view;
use crate::identity::login::{log_in, token_body};
use crate::identity::model::{Target, project, revocation};
use crate::identity::store;

pub fn routes(routes: Routes) -> Routes {
    routes
        .post("/v3/auth/tokens", Rule::open(), create)
        .get(
            "/v3/auth/tokens",
            Rule::token("identity:validate_token"),
            validate,
        )
        .delete(
            "/v3/auth/tokens",
            Rule::token("identity:revoke_token"),
            revoke,
        )
        .get(
            "/v3/auth/catalog",
            Rule::token("identity:get_auth_catalog"),
            get_catalog,
        )
        .get(
            "/v3/auth/projects",
            Rule::token("identity:get_auth_projects"),
            projects,
        )
        .get(
            "/v3/auth/domains",
            Rule::token("identity:get_auth_domains"),
            domains,
        )
        .get(
            "/v3/auth/system",
            Rule::token("identity:get_auth_system"),
            system,
        )
}

const SUBJECT: HeaderName = HeaderName::from_static("x-subject-token");

async fn create(
    State(app): State<App>,
    query: Query,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let (token, identity) = log_in(&app, &body.0).await?;
    shown(&app, &query, StatusCode::CREATED, &token, &identity).await
}

async fn validate(
    State(app): State<App>,
    caller: Caller,
    query: Query,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let (token, identity) = subject(&app, &caller, &headers, "identity:validate_token").await?;
    shown(&app, &query, StatusCode::OK, &token, &identity).await
}

async fn shown(
    app: &App,
    query: &Query,
    status: StatusCode,
    token: &str,
    identity: &Identity,
) -> Result<Response, ApiError> {
    let mut body = token_body(identity);
    if !identity.roles.is_empty() && !query.contains("nocatalog") {
        body.insert("catalog".to_owned(), catalog::of(app, identity).await?);
    }
    let token = HeaderValue::from_str(token).map_err(ApiError::internal)?;
    Ok((status, [(SUBJECT, token)], Json(json!({ "token": body }))).into_response())
}

/// The token that the request is about: the caller's own, or anyone's for an admin or a service.
async fn subject(
    app: &App,
    caller: &Caller,
    headers: &HeaderMap,
    action: &'static str,
) -> Result<(String, Arc<Identity>), ApiError> {
    let token = headers.get(SUBJECT).and_then(|value| value.to_str().ok());
    let token = token.ok_or_else(|| ApiError::not_found("No token in the request"))?;
    let identity = app
        .realm()
        .authenticate(token)
        .await
        .map_err(|refused| match refused {
            Refused::Invalid => ApiError::not_found("Failed to validate token"),
            Refused::Unavailable(why) => ApiError::internal(why),
        })?;
    let own = caller.user_id == identity.user_id;
    if !own && !caller.is_admin() && !caller.has_role("service") {
        return Err(ApiError::forbidden(format!(
            "You are not authorized to perform the requested action: {action}."
        )));
    }
    Ok((token.to_owned(), identity))
}

async fn revoke(
    State(app): State<App>,
    caller: Caller,
    headers: HeaderMap,
) -> Result<StatusCode, ApiError> {
    let (_, identity) = subject(&app, &caller, &headers, "identity:revoke_token").await?;
    let audit_id = identity.audit_ids.first().cloned().unwrap_or_default();
    let (now_us, expires_at_us) = (app.now_us(), identity.expires_at_us);
    store::change(app.database(), move |tx| {
        let audit_id = audit_id.clone();
        Box::pin(async move {
            revocation::Entity::delete_many()
                .filter(revocation::Column::ExpiresAtUs.lt(now_us))
                .exec(tx)
                .await?;
            if !store::is_revoked(tx, &audit_id).await? {
                let row = revocation::ActiveModel {
                    audit_id: Set(audit_id),
                    expires_at_us: Set(expires_at_us),
                };
                revocation::Entity::insert(row).exec(tx).await?;
            }
            Ok(())
        })
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn get_catalog(
    State(app): State<App>,
    ctx: RequestContext,
    caller: Caller,
) -> Result<Json<Value>, ApiError> {
    if caller.roles.is_empty() {
        return Err(ApiError::forbidden(
            "The token has no scope, so there is no catalog for it.",
        ));
    }
    let catalog = catalog::of(&app, &caller).await?;
    Ok(Json(
        json!({"catalog": catalog, "links": {"self": ctx.link("/v3/auth/catalog")}}),
    ))
}

async fn projects(
    State(app): State<App>,
    caller: Caller,
    asked: Asked,
) -> Result<Json<Value>, ApiError> {
    let rows = reachable(&app, &caller.user_id, false).await?;
    let items = rows
        .iter()
        .map(|row| project_view(&asked.ctx, row))
        .collect();
    Ok(asked.list("projects", &[], items))
}

async fn domains(
    State(app): State<App>,
    caller: Caller,
    asked: Asked,
) -> Result<Json<Value>, ApiError> {
    let rows = reachable(&app, &caller.user_id, true).await?;
    let items = rows
        .iter()
        .map(|row| super::domain::view(&asked.ctx, row))
        .collect();
    Ok(asked.list("domains", &[], items))
}

/// Enabled projects (or domains) that the user has a role on.
async fn reachable(
    app: &App,
    user_id: &str,
    is_domain: bool,
) -> Result<Vec<project::Model>, ApiError> {
    let db = app.database().reader();
    let ids = store::targets_of(db, user_id)
        .await?
        .into_iter()
        .filter_map(|target| match target {
            Target::Project(id) if !is_domain => Some(id),
            Target::Domain(id) if is_domain => Some(id),
            _ => None,
        });
    let rows = project::Entity::find()
        .filter(project::Column::Id.is_in(ids))
        .filter(project::Column::Enabled.eq(true))
        .all(db)
        .await?;
    Ok(rows)
}

async fn system(
    State(app): State<App>,
    ctx: RequestContext,
    caller: Caller,
) -> Result<Json<Value>, ApiError> {
    let targets = store::targets_of(app.database().reader(), &caller.user_id).await?;
    let all = if targets.contains(&Target::System) {
        json!([{"all": true}])
    } else {
        json!([])
    };
    Ok(Json(
        json!({"system": all, "links": {"self": ctx.link("/v3/auth/system")}}),
    ))
}
