//! An image's bytes: upload, stage and import, download.

use std::ops::Range;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use md5::Md5;
use sha2::{Digest, Sha512};

use super::blob::BlobError;
use super::format::{self, Format};
use super::intake::Intake;
use super::model::{Image, Status};
use super::store::{self, StoreError, Upload, Uploaded};
use crate::http::{ApiError, App, Caller, JsonBody};

/// Ways to bring bytes in besides `PUT file`. Nothing is fetched from addresses that users name.
pub const IMPORT_METHODS: [&str; 1] = ["glance-direct"];

pub(super) async fn upload(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    receive(&app, &caller, &id, request, Upload::Direct).await
}

pub(super) async fn stage(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
    request: Request,
) -> Result<StatusCode, ApiError> {
    receive(&app, &caller, &id, request, Upload::Staged).await
}

async fn receive(
    app: &App,
    caller: &Caller,
    id: &str,
    request: Request,
    kind: Upload,
) -> Result<StatusCode, ApiError> {
    only_octets(request.headers())?;
    let images = app.images();
    let key = format!("{}.{}", images.blobs.holder(), app.random().uuid().simple());
    let began = (key.clone(), app.now_us());
    let image = store::begin_upload(&images.database, caller, id, began.0, kind, began.1).await?;
    // Dropped when the client goes away in the middle: the row is then put right by the guard.
    let mut guard = Unfinished {
        app: app.clone(),
        id: id.to_owned(),
        key: key.clone(),
        armed: true,
    };
    let outcome = take(app, &image, &key, request.into_body(), kind).await;
    guard.armed = false;
    let taken = match outcome {
        Ok(taken) => taken,
        // An answer can be lost on its way from the database: then the bytes are the image's.
        Err(error) => match guard.undo().await {
            Undone::WasWhole => return Ok(StatusCode::NO_CONTENT),
            Undone::Nothing | Undone::Queued => return Err(error),
        },
    };
    if !taken {
        images.blobs.remove(&key).await.map_err(StoreError::Blob)?;
        return Err(ApiError::new(
            StatusCode::GONE,
            format!("Image {id} was deleted while its bytes came in."),
        ));
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Stores the bytes and makes them the image's; false when the image is not there any more.
async fn take(
    app: &App,
    image: &Image,
    key: &str,
    body: Body,
    kind: Upload,
) -> Result<bool, ApiError> {
    let images = app.images();
    let quota = images.limits.project;
    let found = store_bytes(app, image, key, body).await?;
    let ended = store::Ended {
        id: image.row.id.clone(),
        blob: key.to_owned(),
        kind,
        now_us: app.now_us(),
    };
    Ok(store::end_upload(&images.database, ended, found, quota).await?)
}

fn only_octets(headers: &HeaderMap) -> Result<(), ApiError> {
    let kind = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    match kind {
        Some("application/octet-stream") => Ok(()),
        other => {
            let kind = other.unwrap_or("None");
            let words = format!("The request media type {kind} is not supported by this server.\n");
            Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, words)
                .with_detail(format!("Invalid content type {kind}")))
        }
    }
}

/// Puts an image back to queued whose upload did not come to its end.
struct Unfinished {
    app: App,
    id: String,
    key: String,
    armed: bool,
}

/// What was found when an upload was to be undone.
enum Undone {
    /// The database cannot be asked: row and bytes stay as they are until the next start.
    Nothing,
    /// No image names the bytes now, and they are gone.
    Queued,
    /// The upload had come to its end: the bytes are the image's.
    WasWhole,
}

impl Unfinished {
    /// Bytes go only when the database has said that no image names them.
    async fn undo(&self) -> Undone {
        let images = self.app.images();
        let now_us = self.app.now_us();
        let (id, key) = (&self.id, &self.key);
        match store::abandon_upload(&images.database, id, key, now_us).await {
            Err(error) => {
                tracing::warn!(%error, image = %id, "a cut-off upload is put right at the next start");
                return Undone::Nothing;
            }
            Ok(store::Abandoned::WasWhole) => return Undone::WasWhole,
            Ok(store::Abandoned::Queued) => {}
        }
        if let Err(error) = images.blobs.remove(key).await {
            tracing::warn!(%error, image = %id, "bytes of a cut-off upload stay until the next start");
        }
        Undone::Queued
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        let again = Self {
            app: self.app.clone(),
            id: self.id.clone(),
            key: self.key.clone(),
            armed: false,
        };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                again.undo().await;
            });
        }
    }
}

/// Streams the body into the store, hashes it on the way, and tells its format as soon as enough of
/// it is there, so that a bad one is refused before it fills the disk.
async fn store_bytes(
    app: &App,
    image: &Image,
    key: &str,
    body: Body,
) -> Result<Uploaded, ApiError> {
    let images = app.images();
    let mut intake = Intake::begin(images, image, key).await?;
    let mut stream = body.into_data_stream();
    let stall = images.limits.stall;
    while let Some(chunk) = tokio::time::timeout(stall, stream.next())
        .await
        .map_err(|_| stalled(stall))?
    {
        let chunk = chunk.map_err(|error| {
            tracing::debug!(%error, "an upload was cut off");
            ApiError::bad_request("The upload was cut off; nothing of it was kept.")
        })?;
        intake.take(chunk).await?;
    }
    intake.finish().await
}

fn stalled(after: Duration) -> ApiError {
    ApiError::new(
        StatusCode::REQUEST_TIMEOUT,
        format!(
            "The upload brought nothing for {} s; nothing of it was kept.",
            after.as_secs_f32()
        ),
    )
}

pub(super) fn too_large(most: u64) -> ApiError {
    ApiError::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        format!("An image has at most {most} bytes; nothing of this one was kept."),
    )
}

/// What has come in so far.
#[derive(Default)]
pub(super) struct Seen {
    prefix: Vec<u8>,
    inspected: Option<format::Inspected>,
    size: u64,
    md5: Md5,
    sha512: Sha512,
    blake3: blake3::Hasher,
}

impl Seen {
    /// Bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn take(&mut self, chunk: &[u8], claimed: &str) -> Result<(), ApiError> {
        self.size += chunk.len() as u64;
        self.md5.update(chunk);
        self.sha512.update(chunk);
        self.blake3.update(chunk);
        if self.inspected.is_none() {
            let missing = format::PREFIX - self.prefix.len();
            self.prefix
                .extend_from_slice(&chunk[..missing.min(chunk.len())]);
            if self.prefix.len() == format::PREFIX {
                self.inspect(claimed)?;
            }
        }
        Ok(())
    }

    fn inspect(&mut self, claimed: &str) -> Result<format::Inspected, ApiError> {
        let refuse = |words: String| Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, words));
        let inspected = match format::inspect(&self.prefix) {
            Ok(inspected) => inspected,
            Err(danger) => return refuse(format!("Image content is refused: {danger}.")),
        };
        if !format::agrees(claimed, inspected.format) {
            return refuse(format!(
                "Image content does not match its disk_format: it claims {claimed} and is {}.",
                inspected.format
            ));
        }
        self.prefix = Vec::new();
        self.inspected = Some(inspected);
        Ok(inspected)
    }

    pub(super) fn finish(mut self, claimed: &str) -> Result<Uploaded, ApiError> {
        let inspected = match self.inspected {
            Some(inspected) => inspected,
            None => self.inspect(claimed)?,
        };
        let plain = matches!(claimed, "raw" | "iso");
        let virtual_size = match inspected.format {
            Format::Raw | Format::Iso if plain => Some(self.size),
            _ => inspected.virtual_size,
        };
        Ok(Uploaded {
            size: i64::try_from(self.size).unwrap_or(i64::MAX),
            virtual_size: virtual_size.and_then(|size| i64::try_from(size).ok()),
            checksum: hex(&self.md5.finalize()),
            os_hash_value: hex(&self.sha512.finalize()),
            blake3: self.blake3.finalize().to_hex().to_string(),
            content_format: inspected.format.to_string(),
        })
    }
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: [char; 16] = [
        '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f',
    ];
    bytes
        .iter()
        .flat_map(|byte| {
            [
                DIGITS[usize::from(byte >> 4)],
                DIGITS[usize::from(byte & 15)],
            ]
        })
        .collect()
}

pub(super) async fn import(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
    JsonBody(body): JsonBody,
) -> Result<StatusCode, ApiError> {
    let Some(method) = body.get("method") else {
        return Err(ApiError::bad_request(
            "Import request requires a 'method' field.",
        ));
    };
    let Some(name) = method.get("name").and_then(serde_json::Value::as_str) else {
        return Err(ApiError::bad_request(
            "Import request requires a 'name' field.",
        ));
    };
    if !IMPORT_METHODS.contains(&name) {
        return Err(ApiError::bad_request(format!(
            "Unknown import method name '{name}'."
        )));
    }
    let (database, now_us) = (&app.images().database, app.now_us());
    store::change(database, &caller, &id, "import_image", now_us, |image| {
        if image.status() != Some(Status::Uploading) || image.row.size.is_none() {
            return Err(ApiError::conflict(
                "Image needs to be staged before 'glance-direct' method can be used",
            ));
        }
        image.row.status = Status::Active.name().to_owned();
        Ok(())
    })
    .await?;
    Ok(StatusCode::ACCEPTED)
}

pub(super) async fn download(
    State(app): State<App>,
    caller: Caller,
    Path(id): Path<String>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let images = app.images();
    let image = store::find_visible(images.database.reader(), &caller, &id).await?;
    match image.status() {
        Some(Status::Active) => {}
        Some(Status::Deactivated) if caller.is_admin() => {}
        Some(Status::Deactivated) => {
            return Err(ApiError::forbidden(
                "The requested image has been deactivated. Image data download is forbidden.",
            ));
        }
        _ => return Ok(StatusCode::NO_CONTENT.into_response()),
    }
    let (Some(blob), Some(size)) = (&image.row.blob, image.row.size) else {
        return Ok(StatusCode::NO_CONTENT.into_response());
    };
    let size = size.unsigned_abs();
    let asked = requested(&headers, size)?;
    let range = asked.clone().unwrap_or(0..size);
    let stream = images
        .blobs
        .open(blob, range.clone())
        .await
        .map_err(|error| match error {
            BlobError::Missing(_) => {
                ApiError::internal(format!("the bytes of image {id} are gone"))
            }
            other => StoreError::Blob(other).into(),
        })?;
    let mut answer = Response::new(Body::from_stream(stream));
    let set = answer.headers_mut();
    set.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    set.insert(
        header::CONTENT_LENGTH,
        HeaderValue::from(range.end - range.start),
    );
    if let Some(checksum) = image.row.checksum.as_deref().map(HeaderValue::from_str)
        && let Ok(checksum) = checksum
    {
        set.insert(HeaderName::from_static("content-md5"), checksum);
    }
    if asked.is_some() {
        let words = format!(
            "bytes {}-{}/{size}",
            range.start,
            range.end.saturating_sub(1)
        );
        if let Ok(value) = HeaderValue::from_str(&words) {
            set.insert(header::CONTENT_RANGE, value);
        }
        *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    Ok(answer)
}

/// The one range of a Range header (RFC 9110 14.2); a header that is not understood is ignored.
fn requested(headers: &HeaderMap, size: u64) -> Result<Option<Range<u64>>, ApiError> {
    let header = headers
        .get(header::RANGE)
        .and_then(|value| value.to_str().ok());
    let Some((first, last)) = header
        .and_then(|text| text.strip_prefix("bytes="))
        .filter(|text| !text.contains(','))
        .and_then(|text| text.split_once('-'))
    else {
        return Ok(None);
    };
    let refused = |why: String| {
        ApiError::new(
            StatusCode::RANGE_NOT_SATISFIABLE,
            "The Range requested is not available.",
        )
        .with_detail(why)
    };
    let most = size.saturating_sub(1);
    match (first.parse::<u64>(), last.parse::<u64>()) {
        (Ok(first), _) if first >= size => Err(refused(format!(
            "Invalid start position in Range header. Start position MUST be in the inclusive range \
             [0, {most}]."
        ))),
        (Ok(first), Ok(last)) if last >= first => Ok(Some(first..last.saturating_add(1).min(size))),
        (Ok(first), Err(_)) if last.is_empty() => Ok(Some(first..size)),
        (Err(_), Ok(0)) if first.is_empty() => Err(refused("The range is empty.".to_owned())),
        (Err(_), Ok(length)) if first.is_empty() && size > 0 => {
            Ok(Some(size.saturating_sub(length)..size))
        }
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str, size: u64) -> Result<Option<Range<u64>>, StatusCode> {
        let mut headers = HeaderMap::new();
        headers.insert(header::RANGE, HeaderValue::from_str(text).unwrap());
        requested(&headers, size).map_err(|error| error.status())
    }

    #[test]
    fn ranges_are_cut_to_the_image() {
        assert_eq!(range("bytes=0-9", 1000), Ok(Some(0..10)));
        assert_eq!(range("bytes=990-2000", 1000), Ok(Some(990..1000)));
        assert_eq!(range("bytes=990-", 1000), Ok(Some(990..1000)));
        assert_eq!(range("bytes=-10", 1000), Ok(Some(990..1000)));
        assert_eq!(range("bytes=-5000", 1000), Ok(Some(0..1000)));
        assert_eq!(
            range("bytes=1000-", 1000),
            Err(StatusCode::RANGE_NOT_SATISFIABLE)
        );
        assert_eq!(range("bytes=0-1,3-4", 1000), Ok(None));
        assert_eq!(range("lines=0-1", 1000), Ok(None));
        assert_eq!(range("bytes=5-1", 1000), Ok(None));
        assert_eq!(range("bytes=-", 0), Ok(None));
    }

    #[test]
    fn hashes_and_format_are_those_of_the_whole_whatever_the_chunks() {
        let bytes = vec![7_u8; 3 * format::PREFIX + 5];
        let ends = |size: usize| {
            let mut seen = Seen::default();
            for chunk in bytes.chunks(size) {
                seen.take(chunk, "raw").unwrap();
            }
            seen.finish("raw").unwrap()
        };
        let (one, many) = (ends(bytes.len()), ends(1000));
        assert_eq!(one.os_hash_value, many.os_hash_value);
        assert_eq!(one.blake3, blake3::hash(&bytes).to_hex().to_string());
        assert_eq!((many.size, many.virtual_size), (196_613, Some(196_613)));
        assert_eq!(many.content_format, "raw");
    }
}
