//! Whom an image is shared with.

use axum::Json;
use axum::extract::{Path, State};
use http::StatusCode;
use sea_orm::{ActiveModelTrait, ConnectionTrait, DbErr, EntityTrait, IntoActiveModel, Set};
use serde::Deserialize;
use serde_json::{Value, json};

use super::model::{Image, iso_time};
use super::store::member::{Entity, Model};
use super::store::{self, StoreError};
use crate::http::{ApiError, App, Caller, JsonBody};

fn view(member: &Model) -> Value {
    json!({
        "member_id": member.member_id,
        "image_id": member.image_id,
        "status": member.status,
        "created_at": iso_time(member.created_at_us),
        "updated_at": iso_time(member.updated_at_us),
        "schema": "/v2/schemas/member",
    })
}

fn no_member(image: &str, project: &str) -> ApiError {
    ApiError::not_found(format!(
        "{project} not found in the member list of the image {image}."
    ))
}

/// The owner sees all members, a member itself alone.
fn may_see(image: &Image, caller: &Caller, member: &Model) -> bool {
    image.belongs_to(caller) || caller.project_id() == Some(member.member_id.as_str())
}

pub(super) async fn list(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let reader = app.images().database.reader();
    let image = store::find_visible(reader, &caller, &id).await?;
    if image.row.visibility != "shared" {
        return Err(ApiError::forbidden("Only shared images have members."));
    }
    let members = store::members(reader, &id)
        .await
        .map_err(StoreError::from)?;
    let seen: Vec<_> = members
        .iter()
        .filter(|member| may_see(&image, &caller, member))
        .map(view)
        .collect();
    Ok(Json(
        json!({"members": seen, "schema": "/v2/schemas/members"}),
    ))
}

pub(super) async fn show(
    State(app): State<App>,
    caller: Caller,
    Path((id, project)): Path<(String, String)>,
) -> Result<Json<Value>, ApiError> {
    let reader = app.images().database.reader();
    let image = store::find_visible(reader, &caller, &id).await?;
    let member = store::find_member(reader, &id, &project)
        .await
        .map_err(StoreError::from)?;
    let member = member.filter(|member| may_see(&image, &caller, member));
    member
        .map(|member| Json(view(&member)))
        .ok_or_else(|| no_member(&id, &project))
}

#[derive(Deserialize)]
struct NewMember {
    member: String,
}

/// Members an image has at most (glance's image_member_quota).
const MOST_MEMBERS: usize = 128;

pub(super) async fn create(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let new: NewMember = body.parse().map_err(|_| {
        ApiError::bad_request("Expected a json object with a member named \"member\".")
    })?;
    let project = new.member;
    if project.is_empty() || project.chars().count() > 255 {
        return Err(ApiError::bad_request("Member can't be empty"));
    }
    let now_us = app.now_us();
    let member = app
        .images()
        .database
        .write(move |tx| {
            let (caller, id, project) = (caller.clone(), id.clone(), project.clone());
            Box::pin(async move {
                let image = store::find_own(tx, &caller, &id, "add_member").await?;
                if image.row.visibility != "shared" {
                    return Err(StoreError::Refused(ApiError::forbidden(format!(
                        "Not allowed to create members for image {id}."
                    ))));
                }
                let known = store::members(tx, &id).await?;
                if known.iter().any(|member| member.member_id == project) {
                    return Err(StoreError::Refused(ApiError::conflict(format!(
                        "Member {project} is duplicated for image {id}"
                    ))));
                }
                if known.len() >= MOST_MEMBERS {
                    return Err(StoreError::Refused(ApiError::new(
                        StatusCode::PAYLOAD_TOO_LARGE,
                        format!("The limit of {MOST_MEMBERS} members has been exceeded."),
                    )));
                }
                Ok(insert(tx, id, project, now_us).await?)
            })
        })
        .await?;
    Ok(Json(view(&member)))
}

/// A new member, who has not answered yet.
pub(super) async fn insert(
    tx: &impl ConnectionTrait,
    image_id: String,
    member_id: String,
    now_us: i64,
) -> Result<Model, DbErr> {
    let member = Model {
        image_id,
        member_id,
        status: "pending".to_owned(),
        created_at_us: now_us,
        updated_at_us: now_us,
    };
    Entity::insert(member.clone().into_active_model())
        .exec_without_returning(tx)
        .await?;
    Ok(member)
}

#[derive(Deserialize)]
struct Answer {
    status: String,
}

pub(super) async fn update(
    State(app): State<App>,
    caller: Caller,
    Path((id, project)): Path<(String, String)>,
    body: JsonBody,
) -> Result<Json<Value>, ApiError> {
    let answer: Answer = body.parse().map_err(|_| {
        ApiError::bad_request("Expected a status in the form: {\"status\": \"status\"}")
    })?;
    if !["pending", "accepted", "rejected"].contains(&answer.status.as_str()) {
        return Err(ApiError::bad_request(
            "Incorrect request: Status must be \"pending\", \"accepted\" or \"rejected\".",
        ));
    }
    let (status, now_us) = (answer.status, app.now_us());
    let member = app
        .images()
        .database
        .write(move |tx| {
            let (caller, id, project, status) =
                (caller.clone(), id.clone(), project.clone(), status.clone());
            Box::pin(async move {
                let image = store::find_visible(tx, &caller, &id).await?;
                let found = store::find_member(tx, &id, &project).await?;
                let found = found.filter(|member| may_see(&image, &caller, member));
                let Some(mut member) = found else {
                    return Err(StoreError::Refused(no_member(&id, &project)));
                };
                // It is the member's answer, not the owner's.
                if !caller.is_admin() && caller.project_id() != Some(project.as_str()) {
                    return Err(store::refused("modify_member"));
                }
                member.status = status;
                member.updated_at_us = now_us;
                let mut row = member.clone().into_active_model();
                row.status = Set(member.status.clone());
                row.updated_at_us = Set(member.updated_at_us);
                row.update(tx).await?;
                Ok(member)
            })
        })
        .await?;
    Ok(Json(view(&member)))
}

pub(super) async fn delete(
    State(app): State<App>,
    caller: Caller,
    Path((id, project)): Path<(String, String)>,
) -> Result<StatusCode, ApiError> {
    app.images()
        .database
        .write(move |tx| {
            let (caller, id, project) = (caller.clone(), id.clone(), project.clone());
            Box::pin(async move {
                store::find_own(tx, &caller, &id, "delete_member").await?;
                let gone = Entity::delete_by_id((id.clone(), project.clone()))
                    .exec(tx)
                    .await?;
                if gone.rows_affected == 0 {
                    return Err(StoreError::Refused(no_member(&id, &project)));
                }
                Ok(())
            })
        })
        .await?;
    Ok(StatusCode::NO_CONTENT)
}
