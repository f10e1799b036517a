//! The table of endpoints: what a service serves, under which rule.
//!
//! Every route is made through it, so that the rule is enforced before the handler runs and tests
//! can go through all endpoints and fail for those they do not cover.

use axum::Router;
use axum::extract::Request;
use axum::handler::Handler;
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, on};
use http::{Method, StatusCode};

use crate::http::caller::identify;
use crate::http::{ApiError, App, Caller, RequestContext, Service};
use crate::policy::{self, Needs, Rule};

/// One line of the table.
#[derive(Debug, Clone)]
pub struct Endpoint {
    pub service: Service,
    pub method: Method,
    /// Below the service's prefix, with `{name}` for parameters.
    pub path: &'static str,
    /// The body's one key, of paths whose body names an action (`os-stop`).
    pub action: Option<&'static str>,
    pub rule: Rule,
}

/// A service's routes and their table.
#[derive(Debug)]
pub struct Routes {
    service: Service,
    router: Router<App>,
    endpoints: Vec<Endpoint>,
}

impl Routes {
    pub fn new(service: Service) -> Self {
        Self {
            service,
            router: Router::new(),
            endpoints: Vec::new(),
        }
    }

    pub fn service(&self) -> Service {
        self.service
    }

    pub fn endpoints(&self) -> &[Endpoint] {
        &self.endpoints
    }

    /// HEAD comes with it.
    pub fn get<H, T>(self, path: &'static str, rule: Rule, handler: H) -> Self
    where
        H: Handler<T, App>,
        T: 'static,
    {
        self.on(Method::GET, MethodFilter::GET, path, rule, handler)
    }

    pub fn head<H, T>(self, path: &'static str, rule: Rule, handler: H) -> Self
    where
        H: Handler<T, App>,
        T: 'static,
    {
        self.on(Method::HEAD, MethodFilter::HEAD, path, rule, handler)
    }

    pub fn post<H, T>(self, path: &'static str, rule: Rule, handler: H) -> Self
    where
        H: Handler<T, App>,
        T: 'static,
    {
        self.on(Method::POST, MethodFilter::POST, path, rule, handler)
    }

    pub fn put<H, T>(self, path: &'static str, rule: Rule, handler: H) -> Self
    where
        H: Handler<T, App>,
        T: 'static,
    {
        self.on(Method::PUT, MethodFilter::PUT, path, rule, handler)
    }

    pub fn patch<H, T>(self, path: &'static str, rule: Rule, handler: H) -> Self
    where
        H: Handler<T, App>,
        T: 'static,
    {
        self.on(Method::PATCH, MethodFilter::PATCH, path, rule, handler)
    }

    pub fn delete<H, T>(self, path: &'static str, rule: Rule, handler: H) -> Self
    where
        H: Handler<T, App>,
        T: 'static,
    {
        self.on(Method::DELETE, MethodFilter::DELETE, path, rule, handler)
    }

    /// An action of a path that is routed already; its handler enforces the rule.
    pub fn action(mut self, path: &'static str, action: &'static str, rule: Rule) -> Self {
        let (service, method) = (self.service, Method::POST);
        self.endpoints.push(Endpoint {
            service,
            method,
            path,
            action: Some(action),
            rule,
        });
        self
    }

    fn on<H, T>(
        mut self,
        method: Method,
        filter: MethodFilter,
        path: &'static str,
        rule: Rule,
        handler: H,
    ) -> Self
    where
        H: Handler<T, App>,
        T: 'static,
    {
        let service = self.service;
        let guard =
            from_fn(move |request: Request, next: Next| enforce(rule, service, request, next));
        self.router = self.router.route(path, on(filter, handler).layer(guard));
        self.endpoints.push(Endpoint {
            service,
            method,
            path,
            action: None,
            rule,
        });
        self
    }

    pub(super) fn into_parts(self) -> (Service, Router<App>, Vec<Endpoint>) {
        let nothing_there = || async { ApiError::unrouted(StatusCode::NOT_FOUND) };
        let not_so = if matches!(
            self.service,
            Service::Compute | Service::Volume | Service::Network
        ) {
            StatusCode::NOT_FOUND
        } else {
            StatusCode::METHOD_NOT_ALLOWED
        };
        let router = self
            .router
            .fallback(nothing_there)
            .method_not_allowed_fallback(move || async move { ApiError::unrouted(not_so) });
        (self.service, router, self.endpoints)
    }
}

/// Lets a request through to its handler if `rule` allows its caller.
async fn enforce(rule: Rule, service: Service, mut request: Request, next: Next) -> Response {
    if rule.needs != Needs::Nothing {
        let caller = match caller_of(&mut request).await {
            Ok(caller) => caller,
            Err(error) => return error.into_response(),
        };
        if let Err(error) = policy::require(&caller, rule, service) {
            return error.into_response();
        }
    }
    next.run(request).await
}

/// The caller that the frame has found, or finds one now (identity).
async fn caller_of(request: &mut Request) -> Result<Caller, ApiError> {
    if let Some(caller) = request.extensions().get::<Caller>() {
        return Ok(caller.clone());
    }
    let app = request.extensions().get::<App>().cloned();
    let app = app.ok_or_else(|| ApiError::internal("a route is reached without its frame"))?;
    let caller = identify(&app, request.headers()).await?;
    if let Some(context) = request.extensions().get::<RequestContext>() {
        tracing::debug!(request_id = context.request_id(), user = %caller.user_id, "authenticated");
    }
    request.extensions_mut().insert(caller.clone());
    Ok(caller)
}
