//! One request to the compute API, as its handlers take it.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use sea_orm::DatabaseConnection;
use serde_json::{Value, json};

use crate::http::schema::Schema;
use crate::http::{ApiError, App, Caller, Query, RequestContext};
use crate::policy::{self, Rule};

/// Who asks, at which microversion, with which query.
pub struct Call {
    pub app: App,
    pub caller: Caller,
    pub ctx: RequestContext,
    pub query: Query,
}

impl FromRequestParts<App> for Call {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, ApiError> {
        Ok(Self {
            app: app.clone(),
            caller: Caller::from_request_parts(parts, app).await?,
            ctx: RequestContext::from_request_parts(parts, app).await?,
            query: Query::parse(parts.uri.query().unwrap_or("")),
        })
    }
}

impl Call {
    /// Microversion 2.`minor` or later.
    pub fn at_least(&self, minor: u16) -> bool {
        self.ctx.at_least(2, minor)
    }

    /// 404 below microversion 2.`minor`, as for a path that is not there.
    pub fn since(&self, minor: u16) -> Result<(), ApiError> {
        if self.at_least(minor) {
            Ok(())
        } else {
            Err(gone())
        }
    }

    /// 404 from microversion 2.`minor` on.
    pub fn until(&self, minor: u16) -> Result<(), ApiError> {
        if self.at_least(minor) {
            Err(gone())
        } else {
            Ok(())
        }
    }

    pub fn reader(&self) -> &DatabaseConnection {
        self.app.database().reader()
    }

    /// The project the caller acts in.
    pub fn project(&self) -> Result<&str, ApiError> {
        self.caller.scope().map(|project| project.id.as_str())
    }

    /// A check of a rule that depends on what the request says.
    pub fn require(&self, rule: Rule) -> Result<(), ApiError> {
        policy::require(&self.caller, rule, self.ctx.service())
    }

    pub fn check_query(&self, schema: &Schema) -> Result<(), ApiError> {
        schema.check_query(&self.query)
    }

    /// `self` and `bookmark` of a resource, by its path below the version: `servers/ID`.
    pub fn links(&self, path: &str) -> Value {
        json!([
            {"rel": "self", "href": self.ctx.link(&format!("/v2.1/{path}"))},
            {"rel": "bookmark", "href": self.ctx.link(&format!("/{path}"))},
        ])
    }

    pub fn bookmark(&self, path: &str) -> Value {
        json!([{"rel": "bookmark", "href": self.ctx.link(&format!("/{path}"))}])
    }

    /// The link to the page after `last`; `path` below the version.
    pub fn next(&self, path: &str, last: &str) -> Value {
        let query = self.query.with("marker", Some(last));
        json!([{"rel": "next", "href": self.ctx.link(&format!("/v2.1/{path}?{query}"))}])
    }

    /// Rows of a page: what was asked for, at most a thousand.
    pub fn limit(&self) -> Result<u64, ApiError> {
        const MOST: u64 = 1000;
        let Some(text) = self.query.last("limit") else {
            return Ok(MOST);
        };
        if text.is_empty() {
            return Ok(MOST);
        }
        let limit: u64 = text.parse().map_err(|_| {
            ApiError::bad_request(format!("limit param must be an integer: {text}"))
        })?;
        Ok(limit.min(MOST))
    }

    pub fn marker(&self) -> Option<&str> {
        self.query
            .last("marker")
            .filter(|marker| !marker.is_empty())
    }
}

/// Nova's 404 of an endpoint that this microversion does not have.
pub fn gone() -> ApiError {
    ApiError::not_found("The resource could not be found.")
}
