//! What a machine boots: an image's properties turned into kernel, initrd, command line and disk.
//!
//! - A disk image (raw or qcow2) boots through its property `kernel_id`, with `ramdisk_id` if there is
//!   one, and `os_command_line`; without `kernel_id` it boots by what is on the disk itself, and
//!   `os_command_line` is put behind the command line found there.
//! - An image that is itself a kernel (disk or container format `aki`: an ELF with a PVH note, or a
//!   bzImage) boots as it is; its `ramdisk_id` and `os_command_line` count too, and the disk is an
//!   empty one of the flavor's size.

use fractus_agent_api::guest::GuestOptions;
use fractus_agent_api::machine::{ImageRef, RootDisk};
use sea_orm::ConnectionTrait;

use crate::compute::model::flavor::FlavorSnapshot;
use crate::compute::model::server::BootPlan;
use crate::http::{ApiError, Caller};
use crate::image::model::{Image, Status};
use crate::image::store::{self as images, StoreError};

pub const GIB: u64 = 1 << 30;
const COMMAND_LINE: &str = "console=ttyS0 root=/dev/vda";

/// The plan for a server of this image and flavor, or what speaks against it.
pub async fn plan(
    connection: &impl ConnectionTrait,
    caller: &Caller,
    image_id: &str,
    flavor: &FlavorSnapshot,
) -> Result<BootPlan, ApiError> {
    let image = find(connection, caller, image_id, "Can not find requested image").await?;
    if image.status() != Some(Status::Active) {
        return Err(ApiError::bad_request(format!(
            "Image {image_id} is not active."
        )));
    }
    let guest = suited(&image, flavor)?;
    let command_line = image.property("os_command_line").map(str::to_owned);
    let initrd = match image.property("ramdisk_id").filter(|id| !id.is_empty()) {
        Some(id) => Some(reference(&part(connection, caller, id).await?)?),
        None => None,
    };
    if is_kernel(&image) {
        let root_disk = (flavor.disk > 0).then_some(RootDisk {
            image: None,
            size: flavor.disk * GIB,
        });
        let command_line = command_line.unwrap_or_default();
        return Ok(BootPlan {
            kernel: Some(reference(&image)?),
            initrd,
            command_line,
            root_disk,
            guest,
        });
    }
    let kernel = match image.property("kernel_id").filter(|id| !id.is_empty()) {
        Some(id) => Some(reference(&part(connection, caller, id).await?)?),
        None => None,
    };
    let otherwise = if kernel.is_some() { COMMAND_LINE } else { "" };
    let disk = reference(&image)?;
    let virtual_size = positive(image.row.virtual_size).max(disk.size);
    let size = if flavor.disk > 0 {
        flavor.disk * GIB
    } else {
        virtual_size
    };
    Ok(BootPlan {
        // Of no use without a kernel that goes with it.
        initrd: initrd.filter(|_| kernel.is_some()),
        kernel,
        command_line: command_line.unwrap_or_else(|| otherwise.to_owned()),

        root_disk: Some(RootDisk {
            image: Some(disk),
            size,
        }),
        guest,
    })
}

fn is_kernel(image: &Image) -> bool {
    let formats = [&image.row.disk_format, &image.row.container_format];
    formats
        .iter()
        .any(|format| format.as_deref() == Some("aki"))
}

/// Whether the image exists for the caller.
pub async fn is_there(
    connection: &impl ConnectionTrait,
    caller: &Caller,
    image_id: &str,
) -> Result<bool, ApiError> {
    match images::find_visible(connection, caller, image_id).await {
        Ok(_) => Ok(true),
        Err(StoreError::Refused(_)) => Ok(false),
        Err(other) => Err(ApiError::internal(other)),
    }
}

/// A kernel or initrd that an image names.
async fn part(
    connection: &impl ConnectionTrait,
    caller: &Caller,
    id: &str,
) -> Result<Image, ApiError> {
    let words = format!("The image's kernel_id or ramdisk_id names image {id}, which is not there");
    let image = find(connection, caller, id, &words).await?;
    if image.status() != Some(Status::Active) {
        return Err(ApiError::bad_request(format!("Image {id} is not active.")));
    }
    Ok(image)
}

async fn find(
    connection: &impl ConnectionTrait,
    caller: &Caller,
    id: &str,
    words: &str,
) -> Result<Image, ApiError> {
    match images::find_visible(connection, caller, id).await {
        Ok(image) => Ok(image),
        Err(StoreError::Refused(_)) => Err(ApiError::bad_request(words)),
        Err(other) => Err(ApiError::internal(other)),
    }
}

/// How a guest of this image is treated with this flavor, or what speaks against it.
pub fn suited(image: &Image, flavor: &FlavorSnapshot) -> Result<GuestOptions, ApiError> {
    fits(image, flavor)?;
    super::instance::options(image, flavor)
}

/// Nova's three checks of an image against a flavor.
fn fits(image: &Image, flavor: &FlavorSnapshot) -> Result<(), ApiError> {
    if positive(Some(image.row.min_ram)) > flavor.ram {
        return Err(ApiError::bad_request(
            "Flavor's memory is too small for requested image.",
        ));
    }
    if flavor.disk == 0 {
        return Ok(());
    }
    let disk = flavor.disk * GIB;
    let size = positive(image.row.virtual_size).max(positive(image.row.size));
    if size > disk {
        return Err(ApiError::bad_request(format!(
            "Flavor's disk is too small for requested image. Flavor disk is {disk} bytes, image is \
             {size} bytes."
        )));
    }
    let least = positive(Some(image.row.min_disk)) * GIB;
    if least > disk {
        return Err(ApiError::bad_request(format!(
            "Flavor's disk is smaller than the minimum size specified in image metadata. Flavor \
             disk is {disk} bytes, minimum size is {least} bytes."
        )));
    }
    Ok(())
}

fn positive(number: Option<i64>) -> u64 {
    number
        .and_then(|number| u64::try_from(number).ok())
        .unwrap_or_default()
}

/// What the host fetches; 400 for an image that no machine can use.
fn reference(image: &Image) -> Result<ImageRef, ApiError> {
    image
        .to_ref()
        .map_err(|unusable| ApiError::bad_request(unusable.to_string()))
}

/// What a plan takes of a host's disk, in GiB, rounded up.
pub fn disk_gib(plan: &BootPlan) -> i64 {
    gib(plan.root_disk.as_ref())
}

/// The GiB that a disk takes, rounded up.
pub(super) fn gib(disk: Option<&RootDisk>) -> i64 {
    let bytes = disk.map_or(0, |disk| disk.size);
    i64::try_from(bytes.div_ceil(GIB)).unwrap_or(i64::MAX)
}
