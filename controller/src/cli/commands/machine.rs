//! `fractus machine`: servers as their hosts have them, and what can be changed of one that runs.
//! Administrators only; asked of `…/fractus/v1`.
//!
//! Disks and networks are lists, which are read and written whole: two who change one at the same time
//! should not.

use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::path_segment;
use super::server::SERVER;
use crate::cli::CliError;
use crate::cli::output::Output;
use crate::cli::session::{Service, Session};

#[derive(Debug, Subcommand)]
pub enum Command {
    /// What is wanted of a machine, and what its host says of it
    Show { server: String },
    /// Give a machine another disk, an empty one of its host's, while it runs
    AttachDisk(AttachDisk),
    /// Have a guest let a disk go; its content stays, and comes again with attach-disk --id
    DetachDisk {
        server: String,
        disk: Uuid,
        /// And delete its content, for good
        #[arg(long)]
        delete: bool,
    },
    /// Give a machine another network device while it runs
    AttachNic(AttachNic),
    /// Have a guest let a network device go
    DetachNic { server: String, nic: Uuid },
    /// Give a machine another size while it runs, within its maximum; a maximum counts from its next start
    Set(Size),
}

#[derive(Debug, Args)]
pub struct AttachDisk {
    server: String,
    /// Of a disk that was detached; a new one without
    #[arg(long)]
    id: Option<Uuid>,
    /// A disk that is larger already stays so
    #[arg(long, value_name = "MIB", default_value_t = 1024)]
    size: u64,
    #[arg(long)]
    read_only: bool,
    /// What the guest reads as its serial number, at most 20 characters; the id's first without
    #[arg(long)]
    serial: Option<String>,
}

#[derive(Debug, Args)]
pub struct AttachNic {
    server: String,
    /// Such as 02:00:00:00:00:01
    #[arg(long)]
    mac: String,
    #[arg(long)]
    mtu: Option<u16>,
    /// Pairs of queues
    #[arg(long, default_value_t = 1)]
    queues: u16,
}

#[derive(Debug, Args)]
#[group(id = "size", required = true, multiple = true, args = ["vcpus", "max_vcpus", "memory", "max_memory"])]
pub struct Size {
    server: String,
    #[arg(long)]
    vcpus: Option<u8>,
    #[arg(long)]
    max_vcpus: Option<u8>,
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    #[arg(long, value_name = "MIB")]
    max_memory: Option<u64>,
}

const FIELDS: [&str; 7] = [
    "id",
    "host_id",
    "generation",
    "revision",
    "settled",
    "wanted",
    "report",
];

pub async fn execute(command: Command, session: &Session, output: &Output) -> Result<(), CliError> {
    let mut shown = match command {
        Command::Show { server } => Machine::of(session, &server).await?.show().await?,
        Command::AttachDisk(disk) => attach_disk(session, disk).await?,
        Command::DetachDisk {
            server,
            disk,
            delete,
        } => detach_disk(session, &server, disk, delete).await?,
        Command::AttachNic(nic) => attach_nic(session, nic).await?,
        Command::DetachNic { server, nic } => {
            let machine = Machine::of(session, &server).await?;
            let mut nics = machine.list("nics").await?;
            take_out(&mut nics, nic, "network device")?;
            machine.change(json!({"nics": nics})).await?
        }
        Command::Set(size) => set(session, size).await?,
    };
    let known = FIELDS.into_iter();
    output.fields(
        known
            .filter_map(|name| Some((name, shown.remove(name)?)))
            .collect(),
    )
}

async fn attach_disk(session: &Session, disk: AttachDisk) -> Result<Map<String, Value>, CliError> {
    let machine = Machine::of(session, &disk.server).await?;
    let mut disks = machine.list("disks").await?;
    let id = disk.id.unwrap_or_else(Uuid::new_v4);
    // One that is listed as detached or deleted is wanted again.
    disks.retain(|known| known["id"] != id.to_string());
    disks.push(json!({
        "id": id,
        "size": disk.size.saturating_mul(1 << 20),
        "read_only": disk.read_only,
        "serial_number": disk.serial,
    }));
    machine.change(json!({"disks": disks})).await
}

async fn detach_disk(
    session: &Session,
    server: &str,
    disk: Uuid,
    delete: bool,
) -> Result<Map<String, Value>, CliError> {
    let machine = Machine::of(session, server).await?;
    let mut disks = machine.list("disks").await?;
    let mut known = take_out(&mut disks, disk, "disk")?;
    // What stays is named still, so that it can be seen.
    known["presence"] = json!(if delete { "deleted" } else { "detached" });
    disks.push(known);
    machine.change(json!({"disks": disks})).await
}

async fn attach_nic(session: &Session, nic: AttachNic) -> Result<Map<String, Value>, CliError> {
    let machine = Machine::of(session, &nic.server).await?;
    let mut nics = machine.list("nics").await?;
    nics.push(json!({
        "id": Uuid::new_v4(),
        "mac": nic.mac,
        "mtu": nic.mtu,
        "queues": nic.queues,
    }));
    machine.change(json!({"nics": nics})).await
}

async fn set(session: &Session, size: Size) -> Result<Map<String, Value>, CliError> {
    let machine = Machine::of(session, &size.server).await?;
    let given = [
        ("vcpus", size.vcpus.map(u64::from)),
        ("max_vcpus", size.max_vcpus.map(u64::from)),
        ("memory_mib", size.memory),
        ("max_memory_mib", size.max_memory),
    ];
    let given: Map<String, Value> = given
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), json!(value?))))
        .collect();
    machine.change(Value::Object(given)).await
}

/// Takes the device with this id out of a list.
fn take_out(list: &mut Vec<Value>, id: Uuid, kind: &'static str) -> Result<Value, CliError> {
    let at = list.iter().position(|known| known["id"] == id.to_string());
    let not_found = || CliError::NotFound {
        kind,
        wanted: id.to_string(),
    };
    Ok(list.remove(at.ok_or_else(not_found)?))
}

/// One machine in the API.
struct Machine<'a> {
    session: &'a Session,
    path: String,
}

impl<'a> Machine<'a> {
    async fn of(session: &'a Session, server: &str) -> Result<Self, CliError> {
        let found = SERVER.find(session, server).await?;
        let id = found["id"].as_str().unwrap_or(server);
        let path = format!("/machines/{}", path_segment(id));
        Ok(Self { session, path })
    }

    async fn call(
        &self,
        method: Method,
        body: Option<Value>,
    ) -> Result<Map<String, Value>, CliError> {
        let request = format!("{method} {}", self.path);
        let call = self.session.call(Service::Hosts, method, &self.path, body);
        let answer = call.await?;
        let machine = answer["machine"].as_object().cloned();
        machine.ok_or(CliError::Answer {
            request,
            what: "without a machine".to_owned(),
        })
    }

    async fn show(&self) -> Result<Map<String, Value>, CliError> {
        self.call(Method::GET, None).await
    }

    /// What is wanted of its disks, say.
    async fn list(&self, what: &str) -> Result<Vec<Value>, CliError> {
        let machine = self.show().await?;
        let list = machine
            .get("wanted")
            .and_then(|wanted| wanted[what].as_array());
        Ok(list.cloned().unwrap_or_default())
    }

    async fn change(&self, given: Value) -> Result<Map<String, Value>, CliError> {
        let body = json!({"machine": given});
        self.call(Method::PATCH, Some(body)).await
    }
}
