//! `createImage`: the server's root disk becomes an image, made with the request and filled later.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use axum::Json;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::call::Call;
use super::origin;
use super::schemas::{self, closed, wrapped};
use super::servers::metadata::{self, MOST, Metadata};
use super::servers::{admit, find};
use crate::compute::model::state::Action;
use crate::compute::ops::image::{Wish, request};
use crate::compute::store::server;
use crate::http::schema::Schema;
use crate::http::{ApiError, Service};
use crate::image::model::refuse_fixed;
use crate::image::{Image, MOST_PROPERTIES, snapshot, store};

/// Properties of the image that the server booted from which its disk's image does not have: nova's, by its
/// configuration's default and by its code; and how it boots, which the server's own plan says: the image may have
/// been changed since.
const NOT_INHERITED: [&str; 12] = [
    "cache_in_nova",
    "bittorrent",
    "cinder_encryption_key_id",
    "cinder_encryption_key_deletion_policy",
    "img_signature",
    "img_signature_certificate_uuid",
    "img_signature_hash_method",
    "img_signature_key_type",
    "block_device_mapping",
    "kernel_id",
    "ramdisk_id",
    "os_command_line",
];

/// Attributes of an image that are no properties.
const ATTRIBUTES: [&str; 10] = [
    "name",
    "visibility",
    "protected",
    "owner",
    "tags",
    "min_ram",
    "min_disk",
    "disk_format",
    "container_format",
    "os_hidden",
];

pub async fn create(call: &Call, id: &str, body: &Value) -> Result<Response, ApiError> {
    static SCHEMA: LazyLock<Schema> = LazyLock::new(|| {
        let properties = json!({"name": schemas::name(), "metadata": schemas::metadata()});
        Schema::of(wrapped("createImage", closed(properties, &["name"])))
    });
    SCHEMA.check(body)?;
    let given = &body["createImage"];
    let properties = metadata::read(&given["metadata"]);
    if properties.len() > MOST {
        return Err(ApiError::forbidden("Image metadata limit exceeded"));
    }
    for name in properties.keys() {
        if ATTRIBUTES.contains(&name.as_str()) || refuse_fixed(name).is_err() {
            return Err(ApiError::bad_request(format!(
                "Invalid image metadata. Error: {name} is an attribute of images, and no property"
            )));
        }
    }
    let row = find(call, id).await?;
    admit(call, &row, Action::CreateImage).await?;
    let plan = row.boot()?;
    let Some(disk) = plan.root_disk else {
        return Err(ApiError::bad_request(format!(
            "Instance {id} has no disk of its own to make an image of."
        )));
    };
    let name = given["name"].as_str().unwrap_or_default();
    let project = call.project()?.to_owned();
    let image = new_image(call, project.clone(), &row, name, properties).await?;
    may_have(call, &image, disk.size).await?;
    let image_id = image.row.id.clone();
    let wish = Wish {
        from: row.state(),
        shared_with: (project != row.project_id).then(|| row.project_id.clone()),
        image,
    };
    request(&call.app, origin(call), &row.id, wish).await?;
    if call.at_least(45) {
        let answer = Json(json!({"image_id": image_id}));
        return Ok((StatusCode::ACCEPTED, answer).into_response());
    }
    let service = call.app.public_url().service(Service::Image);
    let location = format!("{service}/images/{image_id}");
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, location)]).into_response())
}

/// Refuses an image of so many bytes that its project may not have.
pub(super) async fn may_have(call: &Call, image: &Image, bytes: u64) -> Result<(), ApiError> {
    if image.properties.len() > MOST_PROPERTIES {
        return Err(ApiError::forbidden("Image metadata limit exceeded"));
    }
    let room = call.app.images().may_have(&image.row.owner, bytes).await;
    room.map_err(|error| match error.status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::forbidden(error.message()),
        _ => error,
    })
}

/// As nova has it made: what the server booted from says how its disk boots, too.
pub(super) async fn new_image(
    call: &Call,
    owner: String,
    server: &server::Model,
    name: &str,
    given: Metadata,
) -> Result<Image, ApiError> {
    let (id, now) = (call.app.random().uuid().to_string(), call.app.now_us());
    let mut image = snapshot::new(id, owner, now);
    let base = store::find(call.reader(), &server.image_id).await?;
    let flavor = server.flavor()?;
    let plan = server.boot()?;
    let mut properties: BTreeMap<String, String> = base
        .iter()
        .flat_map(|base| base.properties.iter().cloned())
        .filter(|(name, _)| !NOT_INHERITED.contains(&name.as_str()))
        .collect();
    let mut set = |name: &str, value: &str| properties.insert(name.to_owned(), value.to_owned());
    // A disk that was begun by a kernel is begun by it again, also where the image that said so is gone.
    if let Some(kernel) = &plan.kernel {
        set("kernel_id", &kernel.id.to_string());
        if let Some(initrd) = &plan.initrd {
            set("ramdisk_id", &initrd.id.to_string());
        }
    }
    if !plan.command_line.is_empty() {
        set("os_command_line", &plan.command_line);
    }
    set("base_image_ref", &server.image_id);
    set("instance_uuid", &server.id);
    set("image_type", "snapshot");
    set("user_id", &call.caller.identity().user_id);
    properties.extend(given);
    image.properties = properties.into_iter().collect();
    let row = &mut image.row;
    row.name = Some(name.to_owned());
    let another = row.owner != server.project_id;
    row.visibility = if another { "shared" } else { "private" }.to_owned();
    (row.disk_format, row.container_format) = (Some("raw".to_owned()), Some("bare".to_owned()));
    let (min_disk, min_ram) = base.map_or((0, 0), |base| (base.row.min_disk, base.row.min_ram));
    row.min_disk = min_disk.max(i64::try_from(flavor.disk).unwrap_or(i64::MAX));
    row.min_ram = min_ram;
    Ok(image)
}
