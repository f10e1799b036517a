//! What machines are made of, on this host: boot files from the cache, disks in a directory.

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::sync::Arc;

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use fractus_agent_api::copy::CopyId;
use fractus_agent_api::device::{Disk, DiskSource, Nic};
use fractus_agent_api::guest::InstanceData;
use fractus_agent_api::machine::{Boot, ImageRef, RootDisk};
use tokio::sync::Semaphore;
use uuid::Uuid;

use crate::clock::now_us;
use crate::image::cache::{Cache, link_or_copy};
use crate::machine::make::{CopyTurn, MakeError, Makings, Progress};
use crate::network;
use crate::paths::MachinePaths;
use crate::volume::directory::{self, Cancel, Old};
use crate::volume::iso;
use crate::volume::room::Room;
use crate::volume::{OpenDisk, VolumeError};

/// What cloud-init looks for.
const LABEL: &str = "config-2";
/// Bytes of a guest's first random numbers, as many as nova gives.
const SEED: usize = 512;

pub struct HostMakings {
    pub cache: Arc<Cache>,
    pub boot_id: Uuid,
    /// Of this host, which machines' network devices are put on.
    pub bridge: Option<String>,
    /// Of root disks, at once: they take of the storage what its guests want of it.
    pub copies: Arc<Semaphore>,
}

/// Root disks that are copied at once.
pub const COPIES: usize = 2;

fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> MakeError {
    let what = what.into();
    move |source| MakeError::Io { what, source }
}

impl HostMakings {
    async fn link(
        &self,
        paths: &MachinePaths,
        image: &ImageRef,
        progress: &Progress,
    ) -> Result<(), MakeError> {
        let place = paths.image(image);
        if place.exists() {
            return Ok(());
        }
        progress.say(format!("fetching image {}", image.id));
        let mut file = self.cache.open(image, progress).await?;
        let from = self.cache.path(image);
        link_or_copy(&mut file, &from, &place).map_err(failed(place.display().to_string()))
    }
}

#[async_trait]
impl Makings for HostMakings {
    async fn boot(
        &self,
        paths: &MachinePaths,
        boot: &Boot,
        progress: &Progress,
    ) -> Result<(), MakeError> {
        let wanted: Vec<_> = [boot.kernel.as_ref(), boot.initrd.as_ref()]
            .into_iter()
            .flatten()
            .collect();
        for image in &wanted {
            self.link(paths, image, progress).await?;
        }
        let folder = || failed(paths.folder().display().to_string());
        for entry in fs::read_dir(paths.folder()).map_err(folder())? {
            let path = entry.map_err(folder())?.path();
            let old = path
                .extension()
                .is_some_and(|extension| extension == "image");
            if old && !wanted.iter().any(|image| paths.image(image) == path) {
                fs::remove_file(&path).map_err(failed(path.display().to_string()))?;
            }
        }
        Ok(())
    }

    async fn disk(
        &self,
        paths: &MachinePaths,
        disk: &RootDisk,
        old: Old,
        progress: &Progress,
    ) -> Result<(), MakeError> {
        // What an attempt that was given up has left.
        sweep(paths, |name| {
            name.starts_with("root.") && name.ends_with(".new")
        })?;
        let image = match &disk.image {
            None => None,
            Some(image) => {
                progress.say(format!("fetching image {}", image.id));
                Some((self.cache.open(image, progress).await?, image.format))
            }
        };
        progress.say("waiting for other disks");
        let turn = self.cache.turn().await;
        progress.say("making the root disk");
        let (cancel, cancelled) = Cancel::new();
        let (path, size) = (paths.disk(), disk.size);
        let made = tokio::task::spawn_blocking(move || {
            // Until the work ends, even if nobody waits for it any more.
            let _turn = turn;
            directory::make(&path, old, size, image, &cancelled)
        })
        .await;
        drop(cancel);
        Ok(made.map_err(|e| failed("making the root disk")(io::Error::other(e)))??)
    }

    async fn empty_disk(
        &self,
        paths: &MachinePaths,
        bytes: u64,
        progress: &Progress,
    ) -> Result<(), MakeError> {
        let disk = RootDisk {
            image: None,
            size: bytes,
        };
        self.disk(paths, &disk, Old::Replace, progress).await
    }

    fn copy_turn(&self) -> Option<CopyTurn> {
        let turn = Arc::clone(&self.copies).try_acquire_owned();
        turn.ok().map(|turn| CopyTurn(Some(turn)))
    }

    fn copy_has_room(&self, paths: &MachinePaths) -> Result<(), MakeError> {
        let path = paths.disk();
        let io = || failed(path.display().to_string());
        let disk = fs::File::open(&path).map_err(io())?;
        let bytes = disk.metadata().map_err(io())?.blocks() * 512;
        let room = Room::beside(&disk).map_err(io())?;
        Ok(room.takes(bytes).map_err(VolumeError::from)?)
    }

    async fn copy_disk(&self, paths: &MachinePaths, copy: CopyId) -> Result<u64, MakeError> {
        // The semaphore is never closed.
        let copies = Arc::clone(&self.copies).acquire_owned().await.ok();
        let turn = self.cache.turn().await;
        let (cancel, cancelled) = Cancel::new();
        let (from, to) = (paths.disk(), paths.copy(copy));
        let made = apart("copying the root disk", move || {
            let _turns = (copies, turn);
            let disk = fs::File::open(&from).map_err(|source| VolumeError::Open {
                path: from.clone(),
                source,
            })?;
            directory::copy_disk(disk, &to, &cancelled)
        })
        .await;
        drop(cancel);
        made
    }

    async fn restore_disk(&self, paths: &MachinePaths, copy: CopyId) -> Result<(), MakeError> {
        sweep(paths, |name| {
            name.starts_with("root.") && name.ends_with(".new")
        })?;
        let (from, to) = (paths.copy(copy), paths.disk());
        apart("making the root disk of its copy", move || {
            directory::take(&from, &to)
        })
        .await
    }

    fn grow_disk(&self, paths: &MachinePaths, size: u64) -> Result<(), MakeError> {
        Ok(directory::grow(&paths.disk(), size)?)
    }

    async fn open_disk(&self, paths: &MachinePaths, disk: &Disk) -> Result<OpenDisk, MakeError> {
        match disk.source {
            DiskSource::Local => {
                // What an attempt that was cut off has left.
                let beside = format!("disk-{}.", disk.id);
                sweep(paths, |name| {
                    name.starts_with(&beside) && name.ends_with(".new")
                })?;
                let (path, size, read_only) = (paths.data_disk(disk.id), disk.size, disk.read_only);
                apart("opening a disk", move || {
                    directory::open_or_make(&path, size, read_only)
                })
                .await
            }
        }
    }

    fn disk_stands(&self, paths: &MachinePaths, disk: &Disk) -> bool {
        match disk.source {
            DiskSource::Local => paths.data_disk(disk.id).try_exists().unwrap_or(true),
        }
    }

    async fn delete_disk(&self, paths: &MachinePaths, disk: &Disk) -> Result<(), MakeError> {
        match disk.source {
            DiskSource::Local => {
                let path = paths.data_disk(disk.id);
                apart("deleting a disk", move || directory::delete(&path)).await
            }
        }
    }

    fn plug(&self, nic: &Nic) -> Result<Vec<OwnedFd>, MakeError> {
        Ok(network::plug(nic, self.bridge.as_deref())?)
    }

    /// Small, and as easily made again: it is whole or not there, and not synced.
    fn config_drive(
        &self,
        paths: &MachinePaths,
        instance: Option<&InstanceData>,
    ) -> Result<(), MakeError> {
        let place = paths.config_drive();
        let io = || failed(place.display().to_string());
        let Some(instance) = instance else {
            return match fs::remove_file(&place) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io()(error)),
                _ => Ok(()),
            };
        };
        let unusable = |error: &dyn std::fmt::Display| MakeError::ConfigDrive(error.to_string());
        let mut seed = [0; SEED];
        rand::fill(&mut seed);
        let files = instance.layout(&STANDARD.encode(seed));
        let files = files.map_err(|error| unusable(&error))?;
        let image = iso::image(LABEL, &files, now_us() / 1_000_000);
        let image = image.map_err(|error| unusable(&error))?;
        let beside = place.with_extension("iso.new");
        // One that stands there could have been left with another mode.
        let _ = fs::remove_file(&beside);
        let mut options = fs::File::options();
        options.write(true).create_new(true).mode(0o600);
        options
            .open(&beside)
            .and_then(|mut file| file.write_all(&image))
            .and_then(|()| fs::rename(&beside, &place))
            .map_err(io())
    }

    fn remove(&self, paths: &MachinePaths) -> Result<(), MakeError> {
        sweep(paths, |name| name != MachinePaths::RECORD)
    }

    fn boot_id(&self) -> Option<Uuid> {
        Some(self.boot_id)
    }
}

/// On a thread where it may wait for storage.
async fn apart<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> Result<T, VolumeError> + Send + 'static,
) -> Result<T, MakeError> {
    let done = tokio::task::spawn_blocking(work).await;
    Ok(done.map_err(|e| failed(what)(io::Error::other(e)))??)
}

/// Removes the files of a machine's folder whose name is `unwanted`.
fn sweep(paths: &MachinePaths, unwanted: impl Fn(&str) -> bool) -> Result<(), MakeError> {
    let folder = || failed(paths.folder().display().to_string());
    for entry in fs::read_dir(paths.folder()).map_err(folder())? {
        let entry = entry.map_err(folder())?;
        if unwanted(&entry.file_name().to_string_lossy()) {
            fs::remove_file(entry.path()).map_err(failed(entry.path().display().to_string()))?;
        }
    }
    Ok(())
}
