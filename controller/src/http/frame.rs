//! The way of a request: prefix → service → request id → token → microversion → handler → the
//! answer in the service's form → the access log.

use std::collections::HashMap;
use std::convert::Infallible;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::response::{IntoResponse, Response};
use futures::FutureExt;
use http::uri::PathAndQuery;
use http::{HeaderValue, Method, StatusCode, Uri, header};
use tower::ServiceExt;
use tracing::Instrument;

use crate::http::caller::identify;
use crate::http::microversion::{Unserved, negotiate};
use crate::http::{ApiError, App, Caller, Endpoint, Microversion, RequestContext, Routes, Service};
use crate::policy::Needs;

/// The public API: all services behind one listener. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Public(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    app: App,
    services: HashMap<&'static str, Mounted>,
    /// What is served outside of the services' prefixes.
    rest: Router,
}

#[derive(Debug)]
struct Mounted {
    service: Service,
    router: Router,
    endpoints: Vec<Endpoint>,
}

impl Public {
    pub fn new(app: App, services: Vec<Routes>) -> Self {
        let services = services
            .into_iter()
            .map(|routes| {
                let (service, router, endpoints) = routes.into_parts();
                let router = router.with_state(app.clone());
                (
                    service.prefix(),
                    Mounted {
                        service,
                        router,
                        endpoints,
                    },
                )
            })
            .collect();
        let rest = Router::new().fallback(|| async { StatusCode::NOT_FOUND });
        Self(Arc::new(Inner {
            app,
            services,
            rest,
        }))
    }

    /// With a router for paths outside of the services (the dashboard, `/healthz`).
    pub fn with_rest(self, rest: Router) -> Self {
        match Arc::try_unwrap(self.0) {
            Ok(inner) => Self(Arc::new(Inner { rest, ..inner })),
            Err(shared) => Self(shared),
        }
    }

    /// Every endpoint of every service.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.0
            .services
            .values()
            .flat_map(|mounted| &mounted.endpoints)
    }

    pub fn services(&self) -> impl Iterator<Item = Service> {
        self.0.services.values().map(|mounted| mounted.service)
    }

    /// Answers one request. In this crate's tests, no answer leaves that OpenStack would not have given.
    pub async fn serve(&self, request: Request) -> Response {
        #[cfg(test)]
        return super::oracle::held(request, |request| self.answer(request)).await;
        #[cfg(not(test))]
        self.answer(request).await
    }

    async fn answer(&self, request: Request) -> Response {
        let path = request.uri().path();
        let (prefix, rest) = split_prefix(path);
        let Some(mounted) = self.0.services.get(prefix) else {
            let Ok(answer) = self.0.rest.clone().oneshot(request).await;
            return answer;
        };
        let uri = below(request.uri(), rest);
        mounted.serve(&self.0.app, request, uri).await
    }

    /// As the fallback of a router, for axum's server.
    ///
    /// A request runs to its end in a task of its own, also when the client does not wait for it: a
    /// handler that is dropped between its commit and what follows (waking the engine) would leave
    /// that undone. An upload of a client that is gone ends with its body's error.
    pub fn into_router(self) -> Router {
        let service = tower::service_fn(move |request: Request| {
            let public = self.clone();
            let answer = tokio::spawn(async move { public.serve(request).await });
            async move {
                // Ends early only with the runtime, or by a panic outside of the services.
                let answer = answer.await.unwrap_or_else(|error| {
                    #[cfg(test)]
                    super::oracle::unanswered(&error);
                    tracing::error!(%error, "a request was not answered");
                    StatusCode::INTERNAL_SERVER_ERROR.into_response()
                });
                Ok::<_, Infallible>(answer)
            }
        });
        Router::new().fallback_service(service)
    }
}

impl Mounted {
    async fn serve(&self, app: &App, mut request: Request, uri: Option<Uri>) -> Response {
        let begun = Instant::now();
        let request_id = format!("req-{}", app.random().uuid());
        let method = request.method().clone();
        let whole_path = request.uri().path().to_owned();
        let asked = request.headers().clone();
        let span = tracing::info_span!("request", id = %request_id);
        let mut log = LogLine::default();
        let mut versions = Versions::None;
        let work = async {
            if let Some(uri) = uri {
                *request.uri_mut() = uri;
            }
            self.dispatch(app, request, &request_id, &mut versions, &mut log)
                .await
        };
        let guarded = AssertUnwindSafe(work.instrument(span.clone()))
            .catch_unwind()
            .await;
        let answer = guarded.unwrap_or_else(|_| {
            ApiError::internal("a handler panicked; the panic is in the log above").into_response()
        });
        let _entered = span.enter();
        let mut answer = self.formed(app, answer, &asked);
        self.put_headers(&mut answer, &request_id, versions);
        let (status, elapsed) = (answer.status().as_u16(), begun.elapsed());
        tracing::info!(
            %method, path = whole_path, status, elapsed_us = elapsed.as_micros() as u64,
            user = log.user, project = log.project, "answered"
        );
        metrics::histogram!("fractus_request_seconds", "service" => self.service.prefix())
            .record(elapsed.as_secs_f64());
        metrics::counter!(
            "fractus_requests_total",
            "service" => self.service.prefix(), "status" => status.to_string()
        )
        .increment(1);
        answer
    }

    async fn dispatch(
        &self,
        app: &App,
        mut request: Request,
        request_id: &str,
        versions: &mut Versions,
        log: &mut LogLine,
    ) -> Response {
        if self.service.authenticates_first() && !self.is_open(&request) {
            match identify(app, request.headers()).await {
                Ok(caller) => {
                    log.note(&caller);
                    request.extensions_mut().insert(caller);
                }
                Err(error) => return error.into_response(),
            }
        }
        if has_nul(request.uri()) {
            return super::body::nul().into_response();
        }
        let microversion = match negotiate(self.service, request.headers()) {
            Ok(version) => version,
            Err(Unserved { error, echo }) => {
                *versions = echo.map_or(Versions::None, Versions::Echo);
                return error.into_response();
            }
        };
        *versions = microversion.map_or(Versions::None, Versions::Echo);
        let base = app.public_url().service(self.service);
        let context = RequestContext::new(request_id.to_owned(), self.service, microversion, base);
        request.extensions_mut().insert(context);
        request.extensions_mut().insert(app.clone());
        let Ok(answer) = self.router.clone().oneshot(request).await;
        answer
    }

    /// Whether the request needs no token, of services that ask for it before they route.
    fn is_open(&self, request: &Request) -> bool {
        let (path, method) = (request.uri().path(), request.method());
        self.endpoints.iter().any(|endpoint| {
            endpoint.rule.needs == Needs::Nothing
                && endpoint.path == path
                && (endpoint.method == *method
                    || (*method == Method::HEAD && endpoint.method == Method::GET))
        })
    }

    /// Errors get the service's form; whatever is no error stays as it is.
    fn formed(&self, app: &App, mut answer: Response, asked: &http::HeaderMap) -> Response {
        let error = answer.extensions_mut().remove::<ApiError>().or_else(|| {
            // What axum itself refuses (a path that is no UTF-8) carries no ApiError.
            let status = answer.status();
            let plain = status.is_client_error() || status.is_server_error();
            (plain && is_axums_own(&answer))
                .then(|| ApiError::new(status, status.canonical_reason().unwrap_or("Error")))
        });
        let Some(error) = error else { return answer };
        let allow = answer.headers().get(header::ALLOW).cloned();
        let identity = app.public_url().service(Service::Identity);
        let mut formed = error.render(self.service, asked, &identity);
        if let Some(allow) = allow {
            formed.headers_mut().insert(header::ALLOW, allow);
        }
        formed
    }

    fn put_headers(&self, answer: &mut Response, request_id: &str, versions: Versions) {
        let headers = answer.headers_mut();
        if let Ok(id) = HeaderValue::from_str(request_id) {
            headers.insert("x-openstack-request-id", id.clone());
            if matches!(self.service, Service::Compute | Service::Volume) {
                headers.insert("x-compute-request-id", id);
            }
        }
        if self.service == Service::Identity {
            headers.insert(header::VARY, HeaderValue::from_static("X-Auth-Token"));
        }
        let Versions::Echo(version) = versions else {
            return;
        };
        let kind = if self.service == Service::Compute {
            "compute"
        } else {
            "volume"
        };
        if let Ok(value) = HeaderValue::from_str(&format!("{kind} {version}")) {
            headers.insert("openstack-api-version", value);
        }
        headers.append(
            header::VARY,
            HeaderValue::from_static("OpenStack-API-Version"),
        );
        if self.service == Service::Compute {
            if let Ok(value) = HeaderValue::from_str(&version.to_string()) {
                headers.insert("x-openstack-nova-api-version", value);
            }
            headers.append(
                header::VARY,
                HeaderValue::from_static("X-OpenStack-Nova-API-Version"),
            );
        }
    }
}

/// Whether its path or query has a NUL once decoded (a bare one is no URI at all).
fn has_nul(uri: &Uri) -> bool {
    let query = uri.query().unwrap_or_default();
    uri.path().contains("%00") || query.contains("%00")
}

/// The microversion in an answer's headers.
#[derive(Clone, Copy)]
enum Versions {
    None,
    Echo(Microversion),
}

#[derive(Default)]
struct LogLine {
    user: Option<String>,
    project: Option<String>,
}

impl LogLine {
    fn note(&mut self, caller: &Caller) {
        self.user = Some(caller.user_id.clone());
        self.project = caller.project_id().map(str::to_owned);
    }
}

/// An error of axum's extractors: plain text, or nothing.
fn is_axums_own(answer: &Response<Body>) -> bool {
    let kind = answer
        .headers()
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    kind.is_none_or(|kind| kind.starts_with("text/plain"))
}

/// `/compute/v2.1/x` → (`compute`, `/v2.1/x`).
fn split_prefix(path: &str) -> (&str, &str) {
    let trimmed = path.strip_prefix('/').unwrap_or(path);
    match trimmed.find('/') {
        Some(slash) => trimmed.split_at(slash),
        None => (trimmed, "/"),
    }
}

fn below(uri: &Uri, path: &str) -> Option<Uri> {
    let path_and_query = match uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    Some(Uri::from(PathAndQuery::try_from(path_and_query).ok()?))
}
