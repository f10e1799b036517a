//! Error pages as WebOb makes them: JSON, HTML or text, by the Accept header. Glance's errors all
//! look so, and those of nova's and cinder's routers.

use axum::response::{IntoResponse, Response};
use http::{HeaderMap, StatusCode, header};
use serde_json::json;

pub(super) fn render(
    status: StatusCode,
    explanation: &str,
    detail: &str,
    asked: &HeaderMap,
) -> Response {
    let reason = match status {
        StatusCode::PAYLOAD_TOO_LARGE => "Request Entity Too Large",
        StatusCode::RANGE_NOT_SATISFIABLE => "Request Range Not Satisfiable",
        other => other.canonical_reason().unwrap_or("Error"),
    };
    let title = format!("{} {reason}", status.as_u16());
    let accept = asked
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or("");
    if accept.contains("application/json") {
        let body = body(status, explanation, detail, str::to_owned);
        let answer = json!({"message": body, "code": title, "title": reason});
        return axum::Json(answer).into_response();
    }
    if accept.contains("html") || accept.contains("*/*") {
        let body = body(status, explanation, detail, escape);
        return axum::response::Html(format!(
            "<html>\n <head>\n  <title>{title}</title>\n </head>\n <body>\n  <h1>{title}</h1>\n  \
             {body}\n </body>\n</html>"
        ))
        .into_response()
        .with_charset("text/html; charset=UTF-8");
    }
    let body = body(status, explanation, detail, str::to_owned);
    let plain = body.replace('\n', " ").replace("<br />", "\n");
    format!("{title}\n\n{plain}")
        .into_response()
        .with_charset("text/plain; charset=UTF-8")
}

fn body(status: StatusCode, explanation: &str, detail: &str, form: fn(&str) -> String) -> String {
    match status {
        StatusCode::UNAUTHORIZED => format!(
            "This server could not verify that you are authorized to access the document you \
             requested. Either you supplied the wrong credentials (e.g., bad password), or your \
             browser does not understand how to supply the credentials required.<br /><br />\n{}\n\n",
            form(detail)
        ),
        StatusCode::METHOD_NOT_ALLOWED | StatusCode::UNSUPPORTED_MEDIA_TYPE => {
            format!("{}\n<br /><br />\n{}", form(explanation), form(detail))
        }
        _ => format!("{}<br /><br />\n{}\n\n", form(explanation), form(detail)),
    }
}

fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#x27;"),
            other => out.push(other),
        }
    }
    out
}

trait WithCharset {
    fn with_charset(self, content_type: &'static str) -> Self;
}

impl WithCharset for Response {
    fn with_charset(mut self, content_type: &'static str) -> Self {
        self.headers_mut().insert(
            header::CONTENT_TYPE,
            http::HeaderValue::from_static(content_type),
        );
        self
    }
}
