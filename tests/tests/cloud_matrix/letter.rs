//! A message between controller and agents: where it goes, and what it says.

use anyhow::{Context, Result};
use bytes::Bytes;
use fractus_agent_api::machine::{MachineReport, PutMachine};
use http::{HeaderMap, Method, Request, Response, Uri, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http2::SendRequest;
use serde::Deserialize;

/// Whose the connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    ToAgent(usize),
    /// From this agent.
    ToController(usize),
}

impl Way {
    pub fn agent(self) -> usize {
        match self {
            Self::ToAgent(agent) | Self::ToController(agent) => agent,
        }
    }
}

#[derive(Debug, Clone)]
pub struct Letter {
    pub way: Way,
    method: Method,
    path: String,
    headers: HeaderMap,
    body: Bytes,
}

/// What an agent says of its machines, in either kind of push.
#[derive(Deserialize)]
struct Push {
    machines: Vec<MachineReport>,
}

impl Letter {
    pub async fn read(way: Way, request: Request<Incoming>) -> Result<Self> {
        let (parts, body) = request.into_parts();
        let path = parts.uri.path_and_query();
        let path = path.context("a request without a path")?.to_string();
        let mut headers = parts.headers;
        // It is the address's.
        headers.remove(header::HOST);
        Ok(Self {
            way,
            method: parts.method,
            path,
            headers,
            body: body.collect().await?.to_bytes(),
        })
    }

    /// An intent, if it is one.
    pub fn put(&self) -> Option<PutMachine> {
        let is = matches!(self.way, Way::ToAgent(_)) && self.method == Method::PUT;
        is.then(|| serde_json::from_slice(&self.body).ok())?
    }

    /// What an agent says of its own.
    pub fn said(&self) -> Vec<MachineReport> {
        let is = matches!(self.way, Way::ToController(_)) && self.method == Method::POST;
        let push: Option<Push> = is
            .then(|| serde_json::from_slice(&self.body).ok())
            .flatten();
        push.map_or_else(Vec::new, |push| push.machines)
    }

    /// What an agent answers.
    pub fn answered(&self, answer: &Response<Full<Bytes>>, body: &Bytes) -> Option<MachineReport> {
        let is = matches!(self.way, Way::ToAgent(_)) && answer.status().is_success();
        is.then(|| serde_json::from_slice(body).ok())?
    }

    /// Sends it to whom `authority` names in its TLS; the answer, and its body once more.
    pub async fn send(
        &self,
        to: &mut SendRequest<Full<Bytes>>,
        authority: &str,
    ) -> Result<(Response<Full<Bytes>>, Bytes)> {
        let uri: Uri = format!("https://{authority}{}", self.path).parse()?;
        let mut request = Request::new(Full::new(self.body.clone()));
        (*request.method_mut(), *request.uri_mut()) = (self.method.clone(), uri);
        *request.headers_mut() = self.headers.clone();
        to.ready().await?;
        let (parts, body) = to.send_request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok((Response::from_parts(parts, Full::new(body.clone())), body))
    }
}
