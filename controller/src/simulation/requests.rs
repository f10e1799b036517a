//! What users ask for: the compute service's own requests, without HTTP.

use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::{
    Boot, ImageFormat, ImageRef, MachineSpec, Pages, RootDisk, ServerId,
};
use sea_orm::DbErr;
use uuid::Uuid;

use crate::compute::model::flavor::FlavorSnapshot;
use crate::compute::model::server::BootPlan;
use crate::compute::model::state::{self, Action, Build, ServerState, Situation};
use crate::compute::ops::change::{self, Change, Wish};
use crate::compute::ops::create::{self, NewServer};
use crate::compute::ops::migrate::{self, CANCELLED};
use crate::compute::ops::resize::verdict::{self, Verdict};
use crate::compute::ops::resize::{self, Size};
use crate::compute::ops::{RequestError, delete, evacuate, image, reset, shelve, unshelve};
use crate::compute::store::server;
use crate::event::{Event, Origin, Phase};
use crate::http::App;
use crate::image::model::{Image, Status};
use crate::image::snapshot;
use crate::reconcile::migration;
use crate::scheduler::Amounts;

pub const MEMORY_MIB: i64 = 512;

/// How the name of a shelved server's image ends, after the server's id.
pub const SHELVED: &str = "-shelved";

fn origin() -> Origin {
    Origin {
        request_id: Some("req-simulated".to_owned()),
        ..Origin::default()
    }
}

fn plan() -> BootPlan {
    let image = |id| ImageRef {
        id: Uuid::from_u128(id),
        size: 1,
        blake3: "0".repeat(64),
        format: ImageFormat::Raw,
    };
    BootPlan {
        kernel: Some(image(1)),
        initrd: None,
        command_line: String::new(),
        root_disk: Some(RootDisk {
            image: Some(image(2)),
            size: 1 << 30,
        }),
        guest: Default::default(),
    }
}

/// The image that every disk is made of. Nobody reads its bytes.
pub fn image_row(now_us: i64) -> Image {
    let disk = plan().root_disk.and_then(|disk| disk.image).unwrap();
    let mut image = snapshot::new(disk.id.to_string(), "cloud".to_owned(), now_us);
    image.row.status = Status::Active.name().to_owned();
    image.row.size = Some(1);
    image.row.blake3 = Some(disk.blake3);
    image
}

/// An administrator says that the server is well.
pub async fn reset(app: &App, id: Uuid) -> Result<(), DbErr> {
    reset::reset(app, &id.to_string(), true).await
}

fn spec() -> MachineSpec {
    let plan = plan();
    MachineSpec {
        vcpus: 1,
        max_vcpus: None,
        memory_mib: MEMORY_MIB.unsigned_abs(),
        max_memory_mib: None,
        pages: Pages::Transparent,
        numa_nodes: vec![],
        cpus: vec![],
        cpu_profile: "host".to_owned(),
        cpu: None,
        boot: Boot {
            kernel: plan.kernel,
            initrd: None,
            command_line: String::new(),
        },
        root_disk: plan.root_disk,
        disks: vec![],
        nics: vec![],
        guest: Default::default(),
    }
}

pub async fn create(app: &App, id: Uuid) -> Result<(), RequestError> {
    let now = app.now_us();
    let flavor = FlavorSnapshot {
        id: "1".to_owned(),
        name: "tiny".to_owned(),
        vcpus: 1,
        ram: MEMORY_MIB.unsigned_abs(),
        disk: 1,
        ephemeral: 0,
        swap: 0,
        extra_specs: Default::default(),
    };
    let row = server::Model {
        id: id.to_string(),
        // A project a server, so that no quota is in the way.
        project_id: format!("project-{id}"),
        user_id: "user".to_owned(),
        name: "simulated".to_owned(),
        description: None,
        hostname: "simulated".to_owned(),
        state: ServerState::Building(Build::Scheduling).key(),
        flavor: serde_json::to_string(&flavor).unwrap(),
        flavor_id: flavor.id,
        vcpus: 1,
        ram: MEMORY_MIB,
        image_id: Uuid::from_u128(2).to_string(),
        kernel_id: String::new(),
        ramdisk_id: String::new(),
        boot: serde_json::to_string(&plan()).unwrap(),
        metadata: "{}".to_owned(),
        tags: "[]".to_owned(),
        key_name: None,
        user_data: None,
        personality: "[]".to_owned(),
        availability_zone: "nova".to_owned(),
        pinned_zone: None,
        config_drive: String::new(),
        disk_config: "MANUAL".to_owned(),
        access_ip_v4: String::new(),
        access_ip_v6: String::new(),
        reservation_id: "r-1".to_owned(),
        launch_index: 0,
        locked_by: None,
        locked_reason: None,
        trusted_certificates: None,
        scheduler_hints: "{}".to_owned(),
        shelved_image_id: None,
        fault_code: None,
        fault_message: None,
        fault_details: None,
        fault_at_us: None,
        created_at_us: now,
        updated_at_us: now,
        launched_at_us: None,
        terminated_at_us: None,
        deleted_at_us: None,
    };
    let amounts = Amounts {
        vcpus: 1,
        memory_mib: MEMORY_MIB,
        disk_gib: 1,
    };
    create::request(
        app,
        origin(),
        vec![NewServer {
            row,
            spec: spec(),
            amounts,
            host: None,
        }],
    )
    .await
}

pub async fn delete(app: &App, id: Uuid) -> Result<(), RequestError> {
    delete::request(app, origin(), &id.to_string()).await
}

/// Asks for the server's guest to go elsewhere if its state admits it; false if it does not.
pub async fn migrate(
    app: &App,
    id: Uuid,
    host: Option<HostId>,
    follows: bool,
) -> Result<bool, RequestError> {
    let id = id.to_string();
    let Some(row) = server::find(app.database().reader(), &id).await? else {
        return Ok(false);
    };
    let situation = Situation {
        server: &id,
        state: row.state(),
        placed: true,
        launched: row.launched_at_us.is_some(),
        locked: false,
    };
    if state::admit(Action::LiveMigrate, situation).is_err() {
        return Ok(false);
    }
    let wish = migrate::Wish {
        from: row.state(),
        host,
        follows,
        slows: false,
    };
    match migrate::request(app, origin(), &id, wish).await {
        Ok(()) => Ok(true),
        Err(RequestError::Overtaken) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Asks for the server to be made anew elsewhere if its state admits it and its host was declared to be down; false
/// otherwise.
pub async fn evacuate(app: &App, id: Uuid, host: Option<HostId>) -> Result<bool, RequestError> {
    let id = id.to_string();
    let Some(row) = server::find(app.database().reader(), &id).await? else {
        return Ok(false);
    };
    let situation = Situation {
        server: &id,
        state: row.state(),
        placed: true,
        launched: row.launched_at_us.is_some(),
        locked: false,
    };
    if state::admit(Action::Evacuate, situation).is_err() {
        return Ok(false);
    }
    let wish = evacuate::Wish {
        from: row.state(),
        host,
        stop: false,
        admin_pass: None,
    };
    match evacuate::request(app, origin(), &id, wish).await {
        Ok(()) => Ok(true),
        Err(RequestError::Overtaken | RequestError::OnItsWay(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Asks for an image of the server's disk if its state admits it; false if it does not.
pub async fn image(app: &App, id: Uuid) -> Result<bool, RequestError> {
    let id = id.to_string();
    let Some(row) = server::find(app.database().reader(), &id).await? else {
        return Ok(false);
    };
    let situation = Situation {
        server: &id,
        state: row.state(),
        placed: true,
        launched: row.launched_at_us.is_some(),
        locked: false,
    };
    if state::admit(Action::CreateImage, situation).is_err() {
        return Ok(false);
    }
    let image_id = app.random().uuid().to_string();
    let mut picture = snapshot::new(image_id, row.project_id.clone(), app.now_us());
    picture.row.disk_format = Some("raw".to_owned());
    picture.properties = vec![("instance_uuid".to_owned(), id.clone())];
    let wish = image::Wish {
        from: row.state(),
        image: picture,
        shared_with: None,
    };
    match image::request(app, origin(), &id, wish).await {
        Ok(()) => Ok(true),
        Err(RequestError::Overtaken) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Asks for the server to be shelved, or unshelved, whichever its state admits; false if it admits neither.
pub async fn shelve_or_unshelve(app: &App, id: Uuid) -> Result<bool, RequestError> {
    let id = id.to_string();
    let Some(row) = server::find(app.database().reader(), &id).await? else {
        return Ok(false);
    };
    let situation = Situation {
        server: &id,
        state: row.state(),
        placed: true,
        launched: row.launched_at_us.is_some(),
        locked: false,
    };
    let admitted = |action| state::admit(action, situation).is_ok();
    let asked = if admitted(Action::Shelve) {
        let image_id = app.random().uuid().to_string();
        let mut picture = snapshot::new(image_id, row.project_id.clone(), app.now_us());
        picture.row.disk_format = Some("raw".to_owned());
        picture.row.container_format = Some("bare".to_owned());
        picture.row.name = Some(format!("{id}{SHELVED}"));
        let wish = shelve::Wish {
            from: row.state(),
            image: picture,
            former: row.shelved_image_id.clone(),
        };
        shelve::request(app, origin(), &id, wish).await
    } else if admitted(Action::Unshelve) {
        unshelve(app, &row, None).await
    } else {
        return Ok(false);
    };
    match asked {
        Ok(()) => Ok(true),
        Err(RequestError::Overtaken | RequestError::ImageUnderWay) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Asks for the server to get another size, or another host, or to stay so, or to go back, whichever its state admits
/// and `turn` says; false if it admits none.
pub async fn resize(app: &App, id: Uuid, turn: bool) -> Result<bool, RequestError> {
    let id = id.to_string();
    let Some(row) = server::find(app.database().reader(), &id).await? else {
        return Ok(false);
    };
    let situation = Situation {
        server: &id,
        state: row.state(),
        placed: true,
        launched: row.launched_at_us.is_some(),
        locked: false,
    };
    let admitted = |action| state::admit(action, situation).is_ok();
    let asked = if admitted(Action::Resize) {
        let wish = resize::Wish {
            from: row.state(),
            size: turn.then(|| other_size(&row)),
            host: None,
        };
        resize::request(app, origin(), &id, wish).await
    } else if admitted(Action::ConfirmResize) {
        let verdict = match turn {
            true => Verdict::Confirm,
            false => Verdict::Revert,
        };
        verdict::request(app, origin(), &id, (verdict, row.state())).await
    } else {
        return Ok(false);
    };
    match asked {
        Ok(()) => Ok(true),
        Err(
            RequestError::Overtaken
            | RequestError::ImageUnderWay
            | RequestError::NothingToConfirm(_),
        ) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Twice as large as at first, or as it was at first.
fn other_size(row: &server::Model) -> Size {
    let is_small = row.ram == MEMORY_MIB;
    let (ram, vcpus): (i64, i32) = match is_small {
        true => (2 * MEMORY_MIB, 2),
        false => (MEMORY_MIB, 1),
    };
    let mut spec = spec();
    spec.memory_mib = ram.unsigned_abs();
    spec.vcpus = u8::try_from(vcpus).unwrap_or(1);
    let flavor = FlavorSnapshot {
        vcpus: vcpus.unsigned_abs(),
        ram: ram.unsigned_abs(),
        ..row.flavor().unwrap()
    };
    Size {
        flavor: serde_json::to_string(&flavor).unwrap(),
        flavor_id: format!("m{ram}"),
        boot: row.boot.clone(),
        vcpus,
        ram,
        spec,
        disk_config: None,
    }
}

/// Asks for a shelved server to run again.
pub async fn unshelve(
    app: &App,
    row: &server::Model,
    host: Option<HostId>,
) -> Result<(), RequestError> {
    let wish = unshelve::Wish {
        from: row.state(),
        host,
        columns: Default::default(),
    };
    unshelve::request(app, origin(), &row.id, wish).await
}

/// Asks once more that the host of a shelved server let go of it.
pub async fn offload(app: &App, id: Uuid) -> Result<(), RequestError> {
    shelve::offload(app, origin(), &id.to_string(), ServerState::Shelved).await
}

/// It is not wanted any more; false if it is too late, or there is none.
pub async fn abort(app: &App, id: Uuid) -> Result<bool, DbErr> {
    let write = app.database().write(move |tx| {
        Box::pin(async move { migrate::give_up(tx, ServerId(id), CANCELLED).await })
    });
    let given_up = write.await?;
    app.compute().engine.wake(&id.to_string());
    Ok(given_up)
}

/// It is to be done with; false if there is none to be.
pub async fn force_complete(app: &App, id: Uuid) -> Result<bool, DbErr> {
    let open = migration::open(app.database().reader(), ServerId(id)).await?;
    match open.first() {
        Some(row) => {
            let asked = Event {
                id: app.random().uuid(),
                at_us: app.now_us(),
                subject: id.to_string(),
                action: "server_live_migration_force_complete".to_owned(),
                phase: Phase::Requested,
                message: None,
                operation_id: None,
                origin: origin(),
                host_id: None,
            };
            migrate::force_complete(app, ServerId(id), row.migration(), asked).await
        }
        None => Ok(false),
    }
}

/// Asks for the change if the server's state admits it; false if it does not.
pub async fn change(app: &App, id: Uuid, change: Change) -> Result<bool, RequestError> {
    let id = id.to_string();
    let Some(row) = server::find(app.database().reader(), &id).await? else {
        return Ok(false);
    };
    let action = match change {
        Change::Start => Action::Start,
        Change::Stop => Action::Stop,
        Change::SoftReboot => Action::SoftReboot,
        Change::HardReboot => Action::HardReboot,
        Change::Pause => Action::Pause,
        Change::Unpause => Action::Unpause,
        Change::Suspend => Action::Suspend,
        Change::Resume => Action::Resume,
        Change::Rebuild => Action::Rebuild,
    };
    let situation = Situation {
        server: &id,
        state: row.state(),
        placed: true,
        launched: row.launched_at_us.is_some(),
        locked: false,
    };
    if state::admit(action, situation).is_err() {
        return Ok(false);
    }
    let spec = (change == Change::Rebuild).then(spec);
    let wish = Wish {
        change,
        from: row.state(),
        columns: Default::default(),
        spec,
    };
    match change::request(app, origin(), &id, wish).await {
        Ok(_) => Ok(true),
        Err(RequestError::Overtaken) => Ok(false),
        Err(error) => Err(error),
    }
}
