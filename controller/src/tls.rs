//! The cloud's own certificate authority, for the network between controllers and agents.
//!
//! Owns the table `authority`: roots with their keys, wrapped by the master key ([`crate::secret`]).
//! Every certificate carries one name, `fractus://host/UUID` or `fractus://controller/NAME`
//! ([`fractus_agent_api::identity`]), from which all rights follow. A host's name is never taken from
//! its request. There are no revocation lists: the listener asks the table of hosts who is a member.
//!
//! A root is replaced in three steps, days apart, none of which cuts anybody off: [`Authority::add_root`]
//! (heartbeats spread it), [`Authority::sign_with`] (certificates renew themselves under it), and
//! [`Authority::retire`] the old one.

use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use fractus_agent_api::host::HostId;
use fractus_agent_api::identity::{Fingerprint, Peer};
use fractus_agent_api::migration::StreamKey;
use fractus_agent_api::tls::Credentials;
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData as _, SanType,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;
use sea_orm::{DbErr, EntityTrait as _, QueryFilter as _, QueryOrder as _, Set};
use uuid::Uuid;

use crate::clock::Clock;
use crate::database::Database;
use crate::random::Random;
use crate::secret::{MasterKey, SecretError};

pub mod row {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, Eq, DeriveEntityModel)]
    #[sea_orm(table_name = "authority")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        /// PEM.
        pub certificate: String,
        /// PKCS#8, wrapped by the master key, base64.
        pub sealed_key: String,
        /// Exactly one root signs.
        pub signs: bool,
        pub created_at_us: i64,
        pub retired_at_us: Option<i64>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

const PURPOSE: &str = "certificate authority";
const DAY: Duration = Duration::from_secs(24 * 3600);
/// A root lives for ten years, a certificate for thirty days and is renewed after twenty.
const ROOT_LIFE: Duration = DAY.saturating_mul(3650);
const CERTIFICATE_LIFE: Duration = DAY.saturating_mul(30);
/// Clocks of hosts may be behind ours.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);

#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    #[error("the database")]
    Database(#[from] DbErr),
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("making a certificate")]
    Certificate(#[from] rcgen::Error),
    #[error("the authority's record {id} cannot be read: {detail}")]
    Record { id: String, detail: String },
    #[error("the certificate signing request is not acceptable: {0}")]
    Request(#[source] rcgen::Error),
    #[error("no root signs; the table authority is damaged, restore it from a backup")]
    NoRoot,
    #[error("root {id} is the one that signs: let another sign first")]
    Signing { id: String },
}

/// A key for one stream between two hosts, and a certificate that signs itself: its ends know it by nothing but
/// itself.
pub fn stream_key() -> Result<StreamKey, rcgen::Error> {
    let key = KeyPair::generate()?;
    let params = CertificateParams::new(vec!["migration.fractus".to_owned()])?;
    Ok(StreamKey {
        certificate: params.self_signed(&key)?.pem(),
        key: key.serialize_pem(),
    })
}

/// The authority, as this controller has read it. Cheap to clone.
#[derive(Clone)]
pub struct Authority {
    database: Database,
    master: MasterKey,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    read: Arc<RwLock<Read>>,
}

struct Read {
    /// PEM of all that are trusted, the signing one first.
    roots: Vec<String>,
    signer: Arc<Issuer<'static, KeyPair>>,
    fingerprint: Fingerprint,
}

impl Authority {
    /// Reads the roots; makes the first one of a new cloud.
    pub async fn open(
        database: Database,
        master: MasterKey,
        clock: Arc<dyn Clock>,
        random: Arc<dyn Random>,
    ) -> Result<Self, AuthorityError> {
        let rows = trusted(&database).await?;
        if rows.is_empty() {
            let first = new_root(&master, &*clock, &*random, true)?;
            database
                .write(move |tx| {
                    let first = first.clone();
                    Box::pin(async move {
                        // Two new controllers at once: one root.
                        if row::Entity::find().one(tx).await?.is_none() {
                            insert(tx, first).await?;
                        }
                        Ok::<_, DbErr>(())
                    })
                })
                .await?;
        }
        let read = Arc::new(RwLock::new(read(&master, trusted(&database).await?)?));
        Ok(Self {
            database,
            master,
            clock,
            random,
            read,
        })
    }

    /// Reads again what another controller may have changed.
    pub async fn refresh(&self) -> Result<(), AuthorityError> {
        let fresh = read(&self.master, trusted(&self.database).await?)?;
        *self.read.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    /// All roots to trust, PEM.
    pub fn roots(&self) -> String {
        self.state(|read| read.roots.concat())
    }

    /// Of the root that signs; join tokens carry it.
    pub fn fingerprint(&self) -> Fingerprint {
        self.state(|read| read.fingerprint)
    }

    /// A certificate for a host, with its chain, PEM: for the key of the request, and with the name
    /// and the address that we say, whatever the request says.
    pub fn certify_host(
        &self,
        host: HostId,
        address: &str,
        request: &CertificateSigningRequestParams,
    ) -> Result<String, AuthorityError> {
        let params = self.params(&Peer::Host(host), &[address.to_owned()])?;
        let certificate = self.state(|read| {
            params
                .signed_by(&request.public_key, &read.signer)
                .map(|it| (it, read.roots.concat()))
        });
        let (certificate, roots) = certificate?;
        Ok(certificate.pem() + &roots)
    }

    /// A new key and certificate for this controller; `addresses` are names and IP addresses at
    /// which agents reach it.
    pub fn certify_controller(
        &self,
        name: &str,
        addresses: &[String],
    ) -> Result<Credentials, AuthorityError> {
        let key = KeyPair::generate()?;
        let params = self.params(&Peer::Controller(name.to_owned()), addresses)?;
        let certificate = self.state(|read| params.signed_by(&key, &read.signer))?;
        let roots = self.roots();
        // The roots are sent along: who joins knows one of them by its fingerprint alone.
        let certificate = certificate.pem() + &roots;
        Ok(Credentials {
            certificate,
            key: key.serialize_pem(),
            roots,
        })
    }

    /// Adds a root that is trusted and does not sign yet; its id.
    pub async fn add_root(&self) -> Result<String, AuthorityError> {
        let root = new_root(&self.master, &*self.clock, &*self.random, false)?;
        let id = root.id.clone();
        self.database
            .write(move |tx| {
                let root = root.clone();
                Box::pin(async move { insert(tx, root).await })
            })
            .await?;
        self.refresh().await?;
        Ok(id)
    }

    /// From now on this root signs.
    pub async fn sign_with(&self, id: &str) -> Result<(), AuthorityError> {
        use sea_orm::sea_query::{Expr, ExprTrait};
        let id = id.to_owned();
        self.database
            .write(move |tx| {
                let id = id.clone();
                Box::pin(async move {
                    let signs = Expr::col(row::Column::Id).eq(id);
                    row::Entity::update_many()
                        .col_expr(row::Column::Signs, signs)
                        .exec(tx)
                        .await
                })
            })
            .await
            .map_err(AuthorityError::Database)?;
        self.refresh().await
    }

    /// Ends the trust in a root that no longer signs.
    pub async fn retire(&self, id: &str) -> Result<(), AuthorityError> {
        use sea_orm::ColumnTrait as _;
        use sea_orm::sea_query::Expr;
        let (wanted, now) = (id.to_owned(), self.clock.now_us());
        let retired = self.database.write(move |tx| {
            let wanted = wanted.clone();
            Box::pin(async move {
                row::Entity::update_many()
                    .col_expr(row::Column::RetiredAtUs, Expr::value(now))
                    .filter(row::Column::Id.eq(wanted))
                    .filter(row::Column::Signs.eq(false))
                    .exec(tx)
                    .await
            })
        });
        if retired
            .await
            .map_err(AuthorityError::Database)?
            .rows_affected
            == 0
        {
            return Err(AuthorityError::Signing { id: id.to_owned() });
        }
        self.refresh().await
    }

    fn params(&self, peer: &Peer, addresses: &[String]) -> Result<CertificateParams, rcgen::Error> {
        let mut params = CertificateParams::default();
        live(&mut params, &*self.clock, CERTIFICATE_LIFE);
        params
            .distinguished_name
            .push(DnType::CommonName, peer.to_string());
        params
            .subject_alt_names
            .push(SanType::URI(peer.to_string().try_into()?));
        for address in addresses {
            params
                .subject_alt_names
                .push(match address.parse::<IpAddr>() {
                    Ok(ip) => SanType::IpAddress(ip),
                    Err(_) => SanType::DnsName(address.clone().try_into()?),
                });
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        Ok(params)
    }

    fn state<T>(&self, look: impl FnOnce(&Read) -> T) -> T {
        look(&self.read.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority")
            .field("root", &self.fingerprint())
            .finish_non_exhaustive()
    }
}

/// Reads a PKCS#10 request and checks that its sender has the key.
pub fn signing_request(pem: &str) -> Result<CertificateSigningRequestParams, AuthorityError> {
    CertificateSigningRequestParams::from_pem(pem).map_err(AuthorityError::Request)
}

/// BLAKE3 of the public key of a request: tells whether two requests are of one key.
pub fn key_hash(request: &CertificateSigningRequestParams) -> String {
    blake3::hash(request.public_key.der_bytes())
        .to_hex()
        .to_string()
}

async fn trusted(database: &Database) -> Result<Vec<row::Model>, DbErr> {
    use sea_orm::ColumnTrait as _;
    row::Entity::find()
        .filter(row::Column::RetiredAtUs.is_null())
        .order_by_desc(row::Column::Signs)
        .order_by_asc(row::Column::CreatedAtUs)
        .all(database.reader())
        .await
}

async fn insert(tx: &sea_orm::DatabaseTransaction, root: row::Model) -> Result<(), DbErr> {
    let row = row::ActiveModel {
        id: Set(root.id),
        certificate: Set(root.certificate),
        sealed_key: Set(root.sealed_key),
        signs: Set(root.signs),
        created_at_us: Set(root.created_at_us),
        retired_at_us: Set(root.retired_at_us),
    };
    row::Entity::insert(row)
        .exec_without_returning(tx)
        .await
        .map(|_| ())
}

fn read(master: &MasterKey, rows: Vec<row::Model>) -> Result<Read, AuthorityError> {
    let first = rows
        .first()
        .filter(|row| row.signs)
        .ok_or(AuthorityError::NoRoot)?;
    let damaged = |detail: String| AuthorityError::Record {
        id: first.id.clone(),
        detail,
    };
    let sealed = STANDARD
        .decode(&first.sealed_key)
        .map_err(|error| damaged(error.to_string()))?;
    let key = master.unwrap_secret(PURPOSE, &sealed)?;
    let key = std::str::from_utf8(&key).map_err(|error| damaged(error.to_string()))?;
    let signer = Issuer::from_ca_cert_pem(&first.certificate, KeyPair::from_pem(key)?)?;
    let der = CertificateDer::from_pem_slice(first.certificate.as_bytes())
        .map_err(|error| damaged(error.to_string()))?;
    Ok(Read {
        fingerprint: Fingerprint::of(&der),
        signer: Arc::new(signer),
        roots: rows.into_iter().map(|row| row.certificate).collect(),
    })
}

fn new_root(
    master: &MasterKey,
    clock: &dyn Clock,
    random: &dyn Random,
    signs: bool,
) -> Result<row::Model, AuthorityError> {
    let id: Uuid = random.uuid();
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    live(&mut params, clock, ROOT_LIFE);
    params
        .distinguished_name
        .push(DnType::CommonName, format!("Fractus root {id}"));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate: Certificate = params.self_signed(&key)?;
    let sealed = master.wrap(PURPOSE, key.serialize_pem().as_bytes())?;
    Ok(row::Model {
        id: id.to_string(),
        certificate: certificate.pem(),
        sealed_key: STANDARD.encode(sealed),
        signs,
        created_at_us: clock.now_us(),
        retired_at_us: None,
    })
}

/// Valid from a little before now.
fn live(params: &mut CertificateParams, clock: &dyn Clock, life: Duration) {
    let now = Duration::from_micros(u64::try_from(clock.now_us()).unwrap_or(0));
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + now.saturating_sub(CLOCK_SKEW);
    params.not_after = epoch + now.saturating_add(life);
    params.distinguished_name = rcgen::DistinguishedName::new();
}
