//! `fractus image`. Uploads and downloads are streams: an image is never whole in memory.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use futures::{StreamExt, TryStreamExt};
use http::Method;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio_util::io::ReaderStream;

use super::{Kind, pair, query_value, row, rows};
use crate::cli::CliError;
use crate::cli::output::{Output, Row};
use crate::cli::session::{Service, Session};

pub(super) const IMAGE: Kind = Kind {
    service: Service::Image,
    name: "image",
    by_name: "/images?name={}",
    key: "images",
    by_id: "/images/{}",
};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// The images that you can see
    List {
        #[arg(long)]
        name: Option<String>,
    },
    /// One image
    Show { image: String },
    /// Make an image, and upload its data
    Create(Box<Create>),
    /// Download an image's data
    Save {
        image: String,
        /// Where to; standard output if not given
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Delete images
    Delete {
        #[arg(required = true)]
        images: Vec<String>,
    },
}

#[derive(Debug, Args)]
pub struct Create {
    name: String,
    /// The data; without it the image stays queued
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[arg(long, default_value = "raw")]
    disk_format: String,
    #[arg(long, default_value = "bare")]
    container_format: String,
    /// For every project (administrators)
    #[arg(long)]
    public: bool,
    /// May be given several times; kernel_id, ramdisk_id and os_command_line boot a kernel directly
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    property: Vec<(String, String)>,
    /// In MiB
    #[arg(long, value_name = "MIB", default_value_t = 0)]
    min_ram: u64,
    /// In GiB
    #[arg(long, value_name = "GIB", default_value_t = 0)]
    min_disk: u64,
}

const COLUMNS: &[(&str, &str)] = &[
    ("ID", "/id"),
    ("Name", "/name"),
    ("Status", "/status"),
    ("Format", "/disk_format"),
    ("Size", "/size"),
    ("Visibility", "/visibility"),
];

const FIELDS: &[(&str, &str)] = &[
    ("id", "/id"),
    ("name", "/name"),
    ("status", "/status"),
    ("visibility", "/visibility"),
    ("disk_format", "/disk_format"),
    ("container_format", "/container_format"),
    ("size", "/size"),
    ("virtual_size", "/virtual_size"),
    ("min_disk", "/min_disk"),
    ("min_ram", "/min_ram"),
    ("checksum", "/checksum"),
    ("os_hash_algo", "/os_hash_algo"),
    ("os_hash_value", "/os_hash_value"),
    ("owner", "/owner"),
    ("protected", "/protected"),
    ("tags", "/tags"),
    ("created_at", "/created_at"),
    ("updated_at", "/updated_at"),
];

/// What an image has beside the fields above and is no property of its owner.
const LINKS: &[&str] = &["self", "file", "schema", "os_hidden"];

pub async fn execute(command: Command, session: &Session, output: &Output) -> Result<(), CliError> {
    match command {
        Command::List { name } => {
            let query = name.map(|name| format!("?name={}", query_value(&name)));
            let path = format!("/images{}", query.unwrap_or_default());
            let images = session.list(Service::Image, &path, "images").await?;
            let (header, rows) = rows(&images, COLUMNS);
            output.rows(&header, rows)
        }
        Command::Show { image } => output.fields(fields(&IMAGE.find(session, &image).await?)),
        Command::Create(create) => create.execute(session, output).await,
        Command::Save { image, file } => save(&image, file.as_deref(), session, output).await,
        Command::Delete { images } => {
            for image in images {
                let path = format!("/images/{}", IMAGE.id(session, &image).await?);
                session
                    .call(Service::Image, Method::DELETE, &path, None)
                    .await?;
            }
            Ok(())
        }
    }
}

fn fields(image: &Value) -> Row {
    let mut shown = row(image, FIELDS);
    let own = image.as_object().into_iter().flatten().filter(|(name, _)| {
        !FIELDS.iter().any(|(known, _)| known == name) && !LINKS.contains(&name.as_str())
    });
    let properties = own
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    shown.push(("properties", Value::Object(properties)));
    shown
}

pub(super) async fn show(id: &str, session: &Session, output: &Output) -> Result<(), CliError> {
    let path = format!("/images/{id}");
    output.fields(fields(&session.get(Service::Image, &path).await?))
}

/// Looks until the image has its bytes; one that is gone will not get any.
pub(super) async fn until_active(
    id: &str,
    seconds: u64,
    session: &Session,
    output: &Output,
) -> Result<(), CliError> {
    let spinner = output.spinner(&format!("waiting for image {id} to be active"));
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut pause = Duration::from_millis(20);
    let outcome = loop {
        let status = match session.get(Service::Image, &format!("/images/{id}")).await {
            Ok(image) => image["status"].as_str().unwrap_or_default().to_owned(),
            Err(CliError::Refused { status: 404, .. }) => {
                break Err(CliError::Errored {
                    what: id.to_owned(),
                    reason: "it could not be made; the server's actions say why".to_owned(),
                });
            }
            Err(error) => break Err(error),
        };
        if status == "active" {
            break Ok(());
        }
        if Instant::now() >= end {
            break Err(CliError::Timeout {
                what: id.to_owned(),
                wanted: "active".to_owned(),
                last: status,
                seconds,
            });
        }
        // Sleeps because nothing tells a client of a change.
        tokio::time::sleep(pause).await;
        pause = (pause * 3 / 2).min(Duration::from_secs(1));
    };
    spinner.finish_and_clear();
    outcome
}

impl Create {
    async fn execute(self, session: &Session, output: &Output) -> Result<(), CliError> {
        // Opened first: an image without its data helps nobody.
        let data = match &self.file {
            Some(path) => Some((path.clone(), open(path).await?)),
            None => None,
        };
        let mut image = json!({
            "name": self.name, "disk_format": self.disk_format,
            "container_format": self.container_format,
            "min_ram": self.min_ram, "min_disk": self.min_disk,
        });
        if self.public {
            image["visibility"] = json!("public");
        }
        for (key, value) in &self.property {
            image[key] = json!(value);
        }
        let mut made = session
            .call(Service::Image, Method::POST, "/images", Some(image))
            .await?;
        let id = made["id"].as_str().unwrap_or_default().to_owned();
        if let Some((path, (file, size))) = data {
            if let Err(error) = upload(&id, file, size, session, output).await {
                output.remark(&format!(
                    "{} was not uploaded; the image {id} is there without data",
                    path.display()
                ));
                return Err(error);
            }
            made = session
                .get(Service::Image, &format!("/images/{id}"))
                .await?;
        }
        output.fields(fields(&made))
    }
}

async fn open(path: &Path) -> Result<(tokio::fs::File, u64), CliError> {
    let failed = |error| CliError::File {
        path: path.to_owned(),
        error,
    };
    let file = tokio::fs::File::open(path).await.map_err(failed)?;
    let size = file.metadata().await.map_err(failed)?.len();
    Ok((file, size))
}

async fn upload(
    id: &str,
    file: tokio::fs::File,
    size: u64,
    session: &Session,
    output: &Output,
) -> Result<(), CliError> {
    let bar = output.bar(Some(size), "uploading");
    let seen = bar.clone();
    let stream = ReaderStream::with_capacity(file, 256 << 10)
        .inspect_ok(move |chunk| seen.inc(chunk.len() as u64));
    let path = format!("/images/{id}/file");
    let body = reqwest::Body::wrap_stream(stream);
    let kind = "application/octet-stream";
    let done = session
        .send_bytes(Service::Image, Method::PUT, &path, kind, body)
        .await;
    bar.finish_and_clear();
    done.map(drop)
}

async fn save(
    image: &str,
    file: Option<&Path>,
    session: &Session,
    output: &Output,
) -> Result<(), CliError> {
    let id = IMAGE.id(session, image).await?;
    let (size, stream) = session
        .fetch(Service::Image, &format!("/images/{id}/file"))
        .await?;
    let bar = output.bar(size, "downloading");
    let mut stream = std::pin::pin!(stream);
    let mut sink = match file {
        Some(path) => tokio::fs::File::create(path)
            .await
            .map_err(|error| CliError::File {
                path: path.to_owned(),
                error,
            })?,
        None => crate::cli::terminal::stdout()?,
    };
    let written = |error| CliError::Local {
        what: "writing the image",
        error,
    };
    while let Some(chunk) = stream.next().await {
        let chunk = chunk.map_err(|error| CliError::Answer {
            request: format!("GET /images/{id}/file"),
            what: format!("cut off ({error})"),
        })?;
        sink.write_all(&chunk).await.map_err(written)?;
        bar.inc(chunk.len() as u64);
    }
    sink.flush().await.map_err(written)?;
    bar.finish_and_clear();
    Ok(())
}
