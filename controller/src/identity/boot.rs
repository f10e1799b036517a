//! The first boot of a cloud, and what each later start brings up to date.
//!
//! Makes the domain Default, the roles, the project and the user admin, whose password goes to a
//! file of mode 0600, and the catalogue's entries of the services that exist. Later starts set those
//! entries to the current public URL, and touch nothing else.

use std::path::Path;

use sea_orm::ActiveValue::Set;
use sea_orm::{
    ActiveModelTrait, ColumnTrait, DatabaseTransaction, DbErr, EntityTrait, IntoActiveModel,
    QueryFilter,
};

use crate::database::Database;
use crate::http::{ApiError, PublicUrl, Service};
use crate::identity::model::{
    assignment, endpoint, implied_role, project, region, role, service, user,
};
use crate::identity::{Realm, store};
use crate::random::Random;

pub const REGION: &str = "RegionOne";
const DOMAIN: &str = "default";

/// The cloud's roles; each brings the one after it, but for `service`.
const CHAIN: [&str; 4] = ["admin", "manager", "member", "reader"];

#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("asking the database for identity's rows")]
    Read(#[from] DbErr),
    #[error("writing the first users, projects and roles: {0}")]
    Write(String),
    #[error("writing the admin's password to {path}")]
    Password {
        path: String,
        source: std::io::Error,
    },
}

/// What [`first`] has made.
#[derive(Debug, Clone)]
pub struct Booted {
    pub admin_project_id: String,
    pub admin_user_id: String,
}

/// Makes a new cloud's first user, unless there is one. The password is written to `password_file`
/// before it is in the database: a crash between the two leaves a file that the next start replaces.
pub async fn first(
    db: &Database,
    realm: &Realm,
    random: &dyn Random,
    now_us: i64,
    password_file: &Path,
) -> Result<Option<Booted>, BootError> {
    if store::current_revision(db.reader()).await? > 0 {
        return Ok(None);
    }
    let password = new_password(random);
    // The file is kept if it exists, and its content counts: two controllers may start together.
    let failed = |source| BootError::Password {
        path: password_file.display().to_string(),
        source,
    };
    crate::secret::write_private(password_file, format!("{password}\n").as_bytes())
        .map_err(failed)?;
    let password = std::fs::read_to_string(password_file).map_err(failed)?;
    let hash = realm
        .passwords
        .hash(password.trim_end())
        .await
        .map_err(write_error)?;
    let rows = FirstRows::new(random, now_us, hash);
    let booted = Booted {
        admin_project_id: rows.project.id.clone(),
        admin_user_id: rows.user.id.clone(),
    };
    let made = store::change(db, move |tx| {
        let rows = rows.clone();
        Box::pin(async move {
            if store::current_revision(tx).await? > 0 {
                return Ok(false);
            }
            rows.insert(tx).await?;
            Ok(true)
        })
    });
    let made = made.await.map_err(write_error)?;
    Ok(made.then_some(booted))
}

fn write_error(error: ApiError) -> BootError {
    BootError::Write(error.cause().unwrap_or(error.message()).to_owned())
}

/// 24 letters and digits, 142 bits.
fn new_password(random: &dyn Random) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz23456789abcdefg";
    let mut bytes = [0; 24];
    random.fill(&mut bytes);
    bytes
        .iter()
        .map(|byte| char::from(LETTERS[usize::from(byte % 64)]))
        .collect()
}

#[derive(Debug, Clone)]
struct FirstRows {
    domain: project::Model,
    project: project::Model,
    user: user::Model,
    roles: Vec<role::Model>,
    implied: Vec<implied_role::Model>,
    assignments: Vec<assignment::Model>,
}

impl FirstRows {
    fn new(random: &dyn Random, now_us: i64, password_hash: String) -> Self {
        let id = || random.uuid().simple().to_string();
        let empty = || "{}".to_owned();
        let domain = project::Model {
            id: DOMAIN.to_owned(),
            name: "Default".to_owned(),
            domain_id: String::new(),
            parent_id: None,
            is_domain: true,
            description: Some("The default domain".to_owned()),
            enabled: true,
            tags: "[]".to_owned(),
            options: empty(),
            extra: empty(),
        };
        let project = project::Model {
            id: id(),
            name: "admin".to_owned(),
            domain_id: DOMAIN.to_owned(),
            parent_id: Some(DOMAIN.to_owned()),
            is_domain: false,
            description: Some("Bootstrap project for initializing the cloud.".to_owned()),
            ..domain.clone()
        };
        let user = user::Model {
            id: id(),
            name: "admin".to_owned(),
            domain_id: DOMAIN.to_owned(),
            enabled: true,
            default_project_id: None,
            password_hash: Some(password_hash),
            valid_from_us: 0,
            created_at_us: now_us,
            options: empty(),
            extra: empty(),
        };
        let roles: Vec<_> = CHAIN
            .iter()
            .chain(&["service"])
            .map(|name| role::Model {
                id: id(),
                name: (*name).to_owned(),
                domain_id: String::new(),
                description: None,
                options: r#"{"immutable":true}"#.to_owned(),
                extra: empty(),
            })
            .collect();
        let implied = roles[..CHAIN.len()]
            .windows(2)
            .map(|pair| implied_role::Model {
                prior_role_id: pair[0].id.clone(),
                implied_role_id: pair[1].id.clone(),
            })
            .collect();
        let on = |kind: &str, target: &str| assignment::Model {
            actor_id: user.id.clone(),
            target_kind: kind.to_owned(),
            target_id: target.to_owned(),
            role_id: roles[0].id.clone(),
        };
        let assignments = vec![on("project", &project.id), on("system", "system")];
        Self {
            domain,
            project,
            user,
            roles,
            implied,
            assignments,
        }
    }

    async fn insert(self, tx: &DatabaseTransaction) -> Result<(), DbErr> {
        self.domain.into_active_model().insert(tx).await?;
        self.project.into_active_model().insert(tx).await?;
        self.user.into_active_model().insert(tx).await?;
        for row in self.roles {
            row.into_active_model().insert(tx).await?;
        }
        for row in self.implied {
            row.into_active_model().insert(tx).await?;
        }
        for row in self.assignments {
            row.into_active_model().insert(tx).await?;
        }
        Ok(())
    }
}

/// Brings the catalogue's entries of this cloud's own services up to date. Writes only if one is
/// missing or has another URL.
pub async fn catalog(
    db: &Database,
    random: &dyn Random,
    public_url: &PublicUrl,
    services: &[Service],
) -> Result<(), BootError> {
    let wanted: Vec<_> = services
        .iter()
        .map(|service| {
            let (kind, name) = service.catalog();
            let url = format!("{}{}", public_url.service(*service), service.catalog_path());
            let ids = std::array::from_fn(|_| random.uuid().simple().to_string());
            Entry {
                kind,
                name,
                url,
                ids,
            }
        })
        .collect();
    let reader = db.reader();
    let mut complete = region::Entity::find_by_id(REGION)
        .one(reader)
        .await?
        .is_some();
    for entry in &wanted {
        complete &= entry.is_there(reader).await?;
    }
    if complete {
        return Ok(());
    }
    let written = store::change(db, move |tx| {
        let wanted = wanted.clone();
        Box::pin(async move {
            if region::Entity::find_by_id(REGION).one(tx).await?.is_none() {
                let row = region::Model {
                    id: REGION.to_owned(),
                    description: String::new(),
                    parent_region_id: None,
                    extra: "{}".to_owned(),
                };
                row.into_active_model().insert(tx).await?;
            }
            for entry in wanted {
                entry.put(tx).await?;
            }
            Ok(())
        })
    });
    written.await.map_err(write_error)
}

const INTERFACES: [&str; 3] = ["public", "internal", "admin"];

/// A service's entry: its endpoints have the same URL in all three interfaces.
#[derive(Debug, Clone)]
struct Entry {
    kind: &'static str,
    name: &'static str,
    url: String,
    /// For the rows that are not there yet: the service's, and one of each interface.
    ids: [String; 4],
}

impl Entry {
    async fn service(
        &self,
        db: &impl sea_orm::ConnectionTrait,
    ) -> Result<Option<service::Model>, DbErr> {
        service::Entity::find()
            .filter(service::Column::Kind.eq(self.kind))
            .filter(service::Column::Name.eq(self.name))
            .one(db)
            .await
    }

    async fn endpoints(
        &self,
        db: &impl sea_orm::ConnectionTrait,
        service_id: &str,
    ) -> Result<Vec<endpoint::Model>, DbErr> {
        endpoint::Entity::find()
            .filter(endpoint::Column::ServiceId.eq(service_id))
            .filter(endpoint::Column::RegionId.eq(REGION))
            .all(db)
            .await
    }

    async fn is_there(&self, db: &impl sea_orm::ConnectionTrait) -> Result<bool, DbErr> {
        let Some(service) = self.service(db).await? else {
            return Ok(false);
        };
        let endpoints = self.endpoints(db, &service.id).await?;
        Ok(INTERFACES.iter().all(|interface| {
            endpoints
                .iter()
                .any(|row| row.interface == *interface && row.url == self.url)
        }))
    }

    async fn put(&self, tx: &DatabaseTransaction) -> Result<(), DbErr> {
        let [service_id, endpoint_ids @ ..] = &self.ids;
        let service = match self.service(tx).await? {
            Some(service) => service,
            None => {
                let row = service::Model {
                    id: service_id.clone(),
                    kind: self.kind.to_owned(),
                    name: Some(self.name.to_owned()),
                    enabled: true,
                    extra: "{}".to_owned(),
                };
                row.into_active_model().insert(tx).await?
            }
        };
        let there = self.endpoints(tx, &service.id).await?;
        for (interface, id) in INTERFACES.iter().zip(endpoint_ids) {
            if let Some(row) = there.iter().find(|row| row.interface == *interface) {
                let mut row = row.clone().into_active_model();
                row.url = Set(self.url.clone());
                row.update(tx).await?;
                continue;
            }
            let row = endpoint::Model {
                id: id.clone(),
                service_id: service.id.clone(),
                region_id: Some(REGION.to_owned()),
                interface: (*interface).to_owned(),
                url: self.url.clone(),
                enabled: true,
                extra: "{}".to_owned(),
            };
            row.into_active_model().insert(tx).await?;
        }
        Ok(())
    }
}
