//! The catalogue as tokens show it.

use std::collections::HashMap;

use sea_orm::{ColumnTrait, DbErr, EntityTrait, QueryFilter, QueryOrder};
use serde_json::{Value, json};

use crate::http::{App, Identity};
use crate::identity::model::{endpoint, service};

/// Enabled services with their enabled endpoints, for this scope. An endpoint whose URL needs a
/// project is left out where there is none.
pub async fn of(app: &App, identity: &Identity) -> Result<Value, DbErr> {
    let db = app.database().reader();
    let services = service::Entity::find()
        .filter(service::Column::Enabled.eq(true))
        .order_by_asc(service::Column::Id)
        .all(db)
        .await?;
    let endpoints = endpoint::Entity::find()
        .filter(endpoint::Column::Enabled.eq(true))
        .order_by_asc(endpoint::Column::Id)
        .all(db)
        .await?;
    let mut by_service: HashMap<&str, Vec<Value>> = HashMap::new();
    for row in &endpoints {
        let Some(url) = filled(&row.url, identity) else {
            continue;
        };
        by_service.entry(&row.service_id).or_default().push(json!({
            "id": row.id,
            "interface": row.interface,
            "region_id": row.region_id,
            "url": url,
            "region": row.region_id,
        }));
    }
    let catalog = services.iter().map(|row| {
        json!({
            "endpoints": by_service.remove(row.id.as_str()).unwrap_or_default(),
            "id": row.id,
            "type": row.kind,
            "name": row.name.as_deref().unwrap_or(""),
        })
    });
    Ok(catalog.collect())
}

/// The URL with `$(project_id)s` and its older names filled in.
fn filled(url: &str, identity: &Identity) -> Option<String> {
    let mut url = url.to_owned();
    for name in ["project_id", "tenant_id", "user_id"] {
        for mark in ['$', '%'] {
            let pattern = format!("{mark}({name})s");
            if url.contains(&pattern) {
                let value = match name {
                    "user_id" => &identity.user_id,
                    _ => identity.project_id()?,
                };
                url = url.replace(&pattern, value);
            }
        }
    }
    Some(url)
}
