//! An agent's view of one controller.

use bytes::Bytes;
use futures::{Stream, TryStreamExt, stream};
use http::header::{ACCEPT, CONTENT_TYPE, RANGE};
use http::{Method, StatusCode};
use uuid::Uuid;

use super::{CallError, ClientError, Transport, chain};
use crate::copy::{CopyError, PIECES, Part, Piece, Unpacker};
use crate::host::{
    Changes, FullReport, Heartbeat, HeartbeatAnswer, JoinAnswer, JoinRequest, RenewAnswer,
    RenewRequest,
};
use crate::identity::Fingerprint;
use crate::tls::{self, Credentials, Expected};

/// Calls one controller's agents listener.
#[derive(Debug, Clone)]
pub struct ControllerClient {
    transport: Transport,
}

/// What became of a push of changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    Taken,
    /// The controller has missed a push: it wants a [`FullReport`].
    ReportNeeded,
}

/// An image's bytes from an offset on.
pub struct ImageBody<S> {
    /// Where the stream begins: as asked, or 0 from a controller that does not know ranges.
    pub offset: u64,
    /// Pieces that follow each other, and the end.
    pub parts: S,
}

/// How its bytes come.
enum Form {
    Pieces(Unpacker),
    /// As they are, from a controller that knows nothing of pieces; so many so far.
    Plain(u64),
}

impl Form {
    fn of(response: &reqwest::Response, offset: u64) -> Self {
        let kind = response.headers().get(CONTENT_TYPE);
        match kind.is_some_and(|kind| kind == PIECES) {
            true => Self::Pieces(Unpacker::default()),
            false => Self::Plain(offset),
        }
    }

    fn take(&mut self, bytes: Bytes) -> Result<Vec<Piece>, CopyError> {
        match self {
            Self::Pieces(unpacker) => unpacker.push(&bytes),
            Self::Plain(at) => {
                let offset = *at;
                *at += bytes.len() as u64;
                Ok(vec![Piece { offset, bytes }])
            }
        }
    }

    /// Bytes in all.
    fn end(&self) -> Result<u64, CopyError> {
        match self {
            Self::Pieces(unpacker) => unpacker.finish(),
            Self::Plain(at) => Ok(*at),
        }
    }
}

impl ControllerClient {
    /// `endpoint` is `https://ADDRESS:PORT`. Nothing is connected yet.
    pub fn new(endpoint: &str, credentials: &Credentials) -> Result<Self, ClientError> {
        let tls = tls::client(credentials, Expected::AnyController, b"h2")?;
        Ok(Self {
            transport: Transport::new(endpoint, tls)?,
        })
    }

    /// Before there is a certificate: knows the controller by its root, and can only join.
    pub fn for_join(endpoint: &str, root: Fingerprint) -> Result<Self, ClientError> {
        let tls = tls::client_by_fingerprint(root, b"h2")?;
        Ok(Self {
            transport: Transport::new(endpoint, tls)?,
        })
    }

    pub fn endpoint(&self) -> &str {
        &self.transport.endpoint
    }

    pub async fn join(&self, body: &JoinRequest) -> Result<JoinAnswer, CallError> {
        let request = self
            .transport
            .request(Method::POST, "/agent/v1/join")
            .json(body);
        self.transport.json("POST join", request).await
    }

    pub async fn renew(&self, body: &RenewRequest) -> Result<RenewAnswer, CallError> {
        let request = self
            .transport
            .request(Method::POST, "/agent/v1/renew")
            .json(body);
        self.transport.json("POST renew", request).await
    }

    pub async fn heartbeat(&self, body: &Heartbeat) -> Result<HeartbeatAnswer, CallError> {
        let request = self
            .transport
            .request(Method::POST, "/agent/v1/heartbeat")
            .json(body);
        self.transport.json("POST heartbeat", request).await
    }

    pub async fn changes(&self, body: &Changes) -> Result<Pushed, CallError> {
        let request = self
            .transport
            .request(Method::POST, "/agent/v1/changes")
            .json(body);
        match self.transport.send("POST changes", request).await {
            Ok(_) => Ok(Pushed::Taken),
            Err(e) if e.status() == Some(StatusCode::CONFLICT) => Ok(Pushed::ReportNeeded),
            Err(error) => Err(error),
        }
    }

    pub async fn report(&self, body: &FullReport) -> Result<(), CallError> {
        let request = self
            .transport
            .request(Method::POST, "/agent/v1/report")
            .json(body);
        self.transport.send("POST report", request).await.map(drop)
    }

    /// Streams an image, from `offset` on where the controller answers 206 to a `Range`, without what is zero where it
    /// can do that. There is no deadline for the whole of it; the caller limits how long a part may take.
    pub async fn image(
        &self,
        id: Uuid,
        offset: u64,
    ) -> Result<ImageBody<impl Stream<Item = Result<Part, CallError>> + Send + use<>>, CallError>
    {
        let call = "GET image";
        let url = format!(
            "{}/agent/v1/images/{}",
            self.transport.endpoint,
            id.hyphenated()
        );
        let accepts = format!("{PIECES}, */*;q=0.5");
        let mut request = self.transport.http.get(url).header(ACCEPT, accepts);
        if offset > 0 {
            request = request.header(RANGE, format!("bytes={offset}-"));
        }
        let response = self.transport.send(call, request).await?;
        let offset = if response.status() == StatusCode::PARTIAL_CONTENT {
            offset
        } else {
            0
        };
        let form = Form::of(&response, offset);
        let endpoint = self.transport.endpoint.clone();
        let parts = stream::try_unfold(Some((response, form)), move |coming| {
            let endpoint = endpoint.clone();
            async move {
                let Some((mut response, mut form)) = coming else {
                    return Ok(None);
                };
                let lost = |error: reqwest::Error| CallError::Unreachable {
                    call,
                    endpoint: endpoint.clone(),
                    detail: chain(&error),
                };
                let damaged = |error: CopyError| CallError::Body {
                    call,
                    endpoint: endpoint.clone(),
                    detail: error.to_string(),
                };
                Ok(Some(match response.chunk().await.map_err(lost)? {
                    Some(bytes) => {
                        let pieces = form.take(bytes).map_err(damaged)?;
                        let parts: Vec<_> = pieces.into_iter().map(Part::Piece).collect();
                        (parts, Some((response, form)))
                    }
                    None => (vec![Part::End(form.end().map_err(damaged)?)], None),
                }))
            }
        });
        let parts = parts.map_ok(|parts| stream::iter(parts.into_iter().map(Ok)));
        let parts = parts.try_flatten();
        Ok(ImageBody { offset, parts })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy::{pack, pack_end};

    type Places = Vec<(u64, Vec<u8>)>;

    fn all(mut form: Form, comes: &[u8]) -> (Places, Result<u64, CopyError>) {
        let chunks = comes.chunks(5).map(Bytes::copy_from_slice);
        let pieces = chunks.flat_map(|chunk| form.take(chunk).unwrap());
        let pieces = pieces.map(|piece| (piece.offset, piece.bytes.to_vec()));
        (pieces.collect(), form.end())
    }

    #[test]
    fn an_image_comes_as_it_is_from_a_controller_that_knows_nothing_of_pieces() {
        let came = vec![(7, b"as it".to_vec()), (12, b" is".to_vec())];
        assert_eq!(all(Form::Plain(7), b"as it is"), (came, Ok(15)));
    }

    #[test]
    fn pieces_have_places_of_their_own_and_an_end_that_must_come() {
        let mut packed = pack(9, b"one");
        let came = vec![(9, b"one".to_vec())];
        let short = Err(CopyError::Short { after: 12 });
        let form = || Form::Pieces(Unpacker::default());
        assert_eq!(all(form(), &packed), (came.clone(), short));
        packed.extend(pack_end(20));
        assert_eq!(all(form(), &packed), (came, Ok(20)));
    }
}
