//! For tests: every answer of [`Public`](super::Public) is held to what OpenStack says.
//!
//! Stands inside of the frame, not in a test's client, so that no test can go around it, nor by a real
//! socket. A wrong answer panics, which fails the test that asked.

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::response::Response;
use fractus_oracle::{Exchange, Oracle};
use http::{Method, header};
use http_body_util::BodyExt;
use serde_json::Value;

/// Paths below this are made up by tests of the frame itself.
pub const MADE_UP: &str = "/v2.1/made-up";

/// Answers by `answer`, and panics when OpenStack would not have answered so.
pub async fn held<F: Future<Output = Response>>(
    request: Request,
    answer: impl FnOnce(Request) -> F,
) -> Response {
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let (request, asked) = if path.ends_with("/action") {
        action(request).await
    } else {
        (request, None)
    };
    let (parts, body) = answer(request).await.into_parts();
    if path.contains(MADE_UP) && parts.status.is_success() {
        return Response::from_parts(parts, body);
    }
    // Of any other kind only the fact matters, and the test may want to read it bit by bit.
    let json = parts
        .headers
        .get(header::CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .is_some_and(|kind| kind.contains("json"));
    let (body, bytes) = if json || HttpBody::is_end_stream(&body) {
        let bytes = match body.collect().await {
            Ok(body) => body.to_bytes(),
            Err(error) => panic!("{method} {path}: a JSON body that breaks off: {error}"),
        };
        (Body::from(bytes.clone()), bytes)
    } else {
        (body, bytes::Bytes::from_static(b"(not read)"))
    };
    // A HEAD loses its body only on the wire.
    let seen: &[u8] = if method == Method::HEAD { &[] } else { &bytes };
    let headers = parts.headers.iter().map(|(name, value)| {
        let value = String::from_utf8_lossy(value.as_bytes());
        (name.to_string(), value.into_owned())
    });
    let status = parts.status.as_u16();
    // A handler that fails, or panics, has a form as good as any other's.
    if status == 500 && !path.contains(MADE_UP) {
        panic!("{method} {path} → 500: see its cause above, or in the log");
    }
    let exchange = Exchange::new(
        method.as_str(),
        &path,
        asked.as_ref(),
        status,
        headers,
        seen,
    );
    if let Some(Err(said)) = exchange.map(|exchange| Oracle::get().hold(&exchange)) {
        panic!("{said}");
    }
    Response::from_parts(parts, body)
}

/// A request behind a real socket has no answer, since its answer was wrong: its panic has no test to
/// fail, so the whole process does.
pub fn unanswered(error: &tokio::task::JoinError) {
    if error.is_panic() {
        eprintln!("the panic above was of an answer behind a socket: no test goes on after it");
        std::process::exit(101);
    }
}

/// The request again, with its body read: which action it is decides what is right.
async fn action(request: Request) -> (Request, Option<Value>) {
    let (parts, body) = request.into_parts();
    match body.collect().await {
        Ok(body) => {
            let bytes = body.to_bytes();
            let asked = serde_json::from_slice(&bytes).ok();
            (Request::from_parts(parts, Body::from(bytes)), asked)
        }
        Err(error) => {
            let broken = Body::from_stream(futures::stream::iter([Err::<bytes::Bytes, _>(error)]));
            (Request::from_parts(parts, broken), None)
        }
    }
}
