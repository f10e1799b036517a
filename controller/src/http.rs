//! The frame that every request of the public API goes through.
//!
//! Owns: request ids, microversions, who calls ([`Caller`]), the check of an endpoint's [`Rule`],
//! body limits, error bodies in each service's own form, pages, links, the access log, and the
//! table of endpoints that tests enumerate. It must never know a resource of any service.
//!
//! A service exports `pub fn routes() -> Routes`:
//!
//! ```ignore
//! pub fn routes() -> Routes {
//!     Routes::new(Service::Compute)
//!         .get("/v2.1/flavors", Rule::reader("os_compute_api:flavors"), list)
//!         .post("/v2.1/flavors", Rule::admin("os_compute_api:os-flavor-manage:create"), create)
//!         .post("/v2.1/servers/{id}/action", Rule::reader("os_compute_api:servers:action"), act)
//!         .action("/v2.1/servers/{id}/action", "os-stop", Rule::member("os_compute_api:os-..."))
//! }
//!
//! async fn create(
//!     State(app): State<App>,
//!     caller: Caller,                    // 401 in the service's form without one
//!     ctx: RequestContext,               // request id, microversion, links
//!     body: JsonBody,                    // size, depth, content type
//! ) -> Result<impl IntoResponse, ApiError> {
//!     let new: NewFlavor = body.checked(if ctx.at_least(2, 55) { &CREATE_2_55 } else { &CREATE })?;
//!     ...
//!     Err(ApiError::conflict(format!("Flavor with name {} already exists.", new.name)))
//! }
//! ```
//!
//! The rule's role is enforced before the handler runs. What belongs to another project is the
//! handler's to hide (404): `caller.may_see(project)`.

mod app;
mod body;
mod caller;
mod context;
mod error;
mod frame;
mod microversion;
mod page;
mod query;
mod routes;
pub mod schema;
mod service;
mod webob;

pub use app::{App, AppParts};
pub use body::{BODY_LIMIT, JsonBody};
pub use caller::{Authenticate, Caller, Domain, Identity, Project, Refused, Role};
pub use context::RequestContext;
pub use error::ApiError;
pub use frame::Public;
pub use microversion::Microversion;
pub use page::{Direction, PageRequest, PageRules, after};
pub use query::Query;
pub use routes::{Endpoint, Routes};
pub use service::{PublicUrl, Service};

pub use crate::policy::Rule;

#[cfg(test)]
mod oracle;
#[cfg(test)]
mod tests;
