//! Identity's endpoints.

mod assignment;
mod auth;
mod catalog;
mod domain;
mod list;
mod members;
mod project;
mod role;
mod service;
mod tag;
mod user;
mod version;

use crate::http::{Routes, Rule, Service};

pub fn routes() -> Routes {
    let routes = Routes::new(Service::Identity)
        .get("/", Rule::open(), version::versions)
        .get("/v3", Rule::open(), version::version)
        .get("/v3/", Rule::open(), version::version);
    [
        auth::routes,
        project::routes,
        tag::routes,
        domain::routes,
        user::routes,
        role::routes,
        service::routes,
        assignment::routes,
    ]
    .into_iter()
    .fold(routes, |routes, add| add(routes))
}
