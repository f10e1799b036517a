//! The listener over real TLS, called by the agents' own client.

use std::collections::HashMap;
use std::time::Duration;

use axum::http::{HeaderMap, StatusCode, header};
use fractus_agent_api::client::controller::{ControllerClient, Pushed};
use fractus_agent_api::copy::Part;
use fractus_agent_api::host::{Changes, FullReport, Heartbeat, HostId, JoinRequest, RenewRequest};
use fractus_agent_api::identity::{Fingerprint, JoinToken};
use fractus_agent_api::machine::{
    Boot, ImageFormat, ImageRef, MachineSpec, Pages, Power, ServerId, Wanted,
};
use fractus_agent_api::tls::Credentials;
use futures::{StreamExt, TryStreamExt};
use rustls_pki_types::pem::PemObject as _;
use sea_orm::{DatabaseTransaction, DbErr, EntityTrait as _};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::agents::simulated::{SimulatedAgents, SimulatedHost};
use crate::agents::{host, join};
use crate::clock::{SimulatedClock, SystemClock};
use crate::database::testing::{self, TestDatabase};
use crate::leader::{Me, Seat};
use crate::operation::{Engine, Kinds};
use crate::random::SystemRandom;
use crate::reconcile::{Life, Machines, Observer, machine, migration};
use crate::secret::MasterKey;

struct Nobody;

#[async_trait]
impl Observer for Nobody {
    async fn stopped(
        &self,
        _: &DatabaseTransaction,
        _: ServerId,
        _: &fractus_agent_api::machine::StopReason,
    ) -> Result<(), DbErr> {
        Ok(())
    }

    async fn failed(&self, _: &DatabaseTransaction, _: ServerId, _: &str) -> Result<(), DbErr> {
        Ok(())
    }

    async fn lives(&self, _: &DatabaseTransaction, _: ServerId, _: Life) -> Result<(), DbErr> {
        Ok(())
    }

    async fn suspended(&self, _: &DatabaseTransaction, _: ServerId) -> Result<(), DbErr> {
        Ok(())
    }

    async fn restored(&self, _: &DatabaseTransaction, _: ServerId) -> Result<(), DbErr> {
        Ok(())
    }
}

struct Blobs(HashMap<Uuid, Bytes>);

#[async_trait]
impl BlobSource for Blobs {
    async fn open(&self, image: Uuid, offset: u64) -> io::Result<Option<Blob>> {
        Ok(self.0.get(&image).map(|bytes| {
            let from = usize::try_from(offset).unwrap().min(bytes.len());
            let rest = bytes.slice(from..);
            Blob {
                size: bytes.len() as u64,
                bytes: futures::stream::once(async move { Ok(rest) }).boxed(),
            }
        }))
    }
}

struct Bench {
    test: TestDatabase,
    parts: Parts,
    url: String,
    stop: CancellationToken,
    _server: tokio::task::JoinHandle<()>,
}

const IMAGE: Uuid = Uuid::from_u128(0xabc);
/// Bytes of it that are not zero, and that are looked at together; the rest is zero.
const FULL: usize = 64 << 10;
const IMAGE_SIZE: u64 = 1 << 20;

fn image() -> Bytes {
    let mut image = vec![7; FULL];
    image.resize(IMAGE_SIZE as usize, 0);
    image.into()
}

async fn bench() -> Bench {
    let test = testing::database().await;
    let lead = Lead::alone(test.database.clone(), "https://127.0.0.1:1");
    bench_of(test, lead, Arc::new(Fleet::default())).await
}

async fn bench_of(test: TestDatabase, lead: Lead, fleet: Arc<Fleet>) -> Bench {
    let database = test.database.clone();
    let (clock, random) = (SystemClock::shared(), SystemRandom::shared());
    let master = MasterKey::ephemeral().unwrap();
    let authority = Authority::open(database.clone(), master, clock.clone(), random.clone())
        .await
        .unwrap();
    let agents = Arc::new(SimulatedAgents::default());
    let machines = Machines::new(database.clone(), agents, fleet.clone(), clock.clone());
    let engine = Engine::new(
        database.clone(),
        Kinds::default(),
        clock.clone(),
        random.clone(),
    );
    let (reconciler, _) = Reconciler::new(
        database.clone(),
        machines,
        engine,
        Arc::new(Nobody),
        clock.clone(),
        random.clone(),
    );
    let blobs = Arc::new(Blobs(HashMap::from([(IMAGE, image())])));
    let parts = Parts {
        database,
        authority,
        fleet,
        reconciler,
        blobs,
        clock,
        random,
        lead,
    };
    let credentials = parts
        .authority
        .certify_controller("test", &["127.0.0.1".to_owned()])
        .unwrap();
    let address = "127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind(address, &credentials, parts.clone())
        .await
        .unwrap();
    let url = format!("https://{}", listener.address().unwrap());
    let stop = CancellationToken::new();
    let server = tokio::spawn(listener.run(stop.clone()));
    Bench {
        test,
        parts,
        url,
        stop,
        _server: server,
    }
}

impl Bench {
    async fn token(&self, secret: &'static str, lifetime_us: i64) -> String {
        let now = self.parts.clock.now_us();
        self.parts
            .database
            .write(move |tx| {
                Box::pin(async move { join::issue(tx, secret, now, now + lifetime_us).await })
            })
            .await
            .unwrap();
        let root = self.parts.authority.fingerprint();
        JoinToken {
            secret: secret.to_owned(),
            root,
        }
        .to_string()
    }

    fn for_join(&self) -> ControllerClient {
        ControllerClient::for_join(&self.url, self.parts.authority.fingerprint()).unwrap()
    }

    /// A host that has joined, with what it joined with.
    async fn joined(&self, secret: &'static str) -> (HostId, ControllerClient) {
        let token = self.token(secret, 60_000_000).await;
        let key = rcgen::KeyPair::generate().unwrap();
        let answer = self.for_join().join(&request(&token, &key)).await.unwrap();
        let credentials = Credentials {
            certificate: answer.certificate,
            key: key.serialize_pem(),
            roots: answer.roots,
        };
        (
            answer.host_id,
            ControllerClient::new(&self.url, &credentials).unwrap(),
        )
    }
}

fn csr(key: &rcgen::KeyPair) -> String {
    // A request that asks for another's name: it must get its own all the same.
    let mut params = rcgen::CertificateParams::default();
    let name = "fractus://controller/evil".to_owned();
    params
        .subject_alt_names
        .push(rcgen::SanType::URI(name.try_into().unwrap()));
    params.serialize_request(key).unwrap().pem().unwrap()
}

fn request(token: &str, key: &rcgen::KeyPair) -> JoinRequest {
    JoinRequest {
        version: 1,
        token: token.to_owned(),
        csr: csr(key),
        endpoint: "https://127.0.0.1:9".to_owned(),
        host: SimulatedHost::inventory("h", 4, 4096),
    }
}

fn heartbeat(sequence: u64) -> Heartbeat {
    Heartbeat {
        version: 1,
        agent_instance: Uuid::from_u128(7),
        sequence,
        endpoint: "https://127.0.0.1:9".to_owned(),
        host: SimulatedHost::inventory("h", 4, 4096),
    }
}

fn wanted() -> Wanted {
    Wanted {
        power: Power::Running,
        soft_reboots: 0,
        hard_reboots: 0,
        rebuilds: 0,
        arrives: None,
        departs: None,
        continues: None,
        copy: None,
        copies: 0,
        restores: None,
        parks: None,
        spec: MachineSpec {
            vcpus: 1,
            max_vcpus: None,
            memory_mib: 64,
            max_memory_mib: None,
            pages: Pages::Small,
            numa_nodes: vec![],
            cpus: vec![],
            cpu_profile: "host".into(),
            cpu: None,
            boot: Boot {
                kernel: Some(ImageRef {
                    id: IMAGE,
                    size: 9,
                    blake3: "0".repeat(64),
                    format: ImageFormat::Raw,
                }),
                initrd: None,
                command_line: String::new(),
            },
            root_disk: None,
            disks: vec![],
            nics: vec![],
            guest: Default::default(),
        },
    }
}

#[tokio::test]
async fn a_host_joins_once_with_its_token_and_is_who_we_say() {
    let bench = bench().await;
    let token = bench.token("secret", 60_000_000).await;
    let key = rcgen::KeyPair::generate().unwrap();
    let first = bench.for_join().join(&request(&token, &key)).await.unwrap();
    let leaf = rustls_pki_types::CertificateDer::from_pem_slice(first.certificate.as_bytes());
    let peer = fractus_agent_api::identity::Peer::of_certificate(&leaf.unwrap()).unwrap();
    assert_eq!(peer, fractus_agent_api::identity::Peer::Host(first.host_id));
    // The answer was lost: the same host again. Another key: refused.
    let again = bench.for_join().join(&request(&token, &key)).await.unwrap();
    assert_eq!(again.host_id, first.host_id);
    let other = rcgen::KeyPair::generate().unwrap();
    let refused = bench
        .for_join()
        .join(&request(&token, &other))
        .await
        .unwrap_err();
    assert_eq!(refused.status(), Some(StatusCode::FORBIDDEN));
    assert_eq!(
        host::all(bench.test.database.reader()).await.unwrap().len(),
        1
    );
    bench.stop.cancel();
}

#[tokio::test]
async fn unknown_and_expired_tokens_and_broken_requests_are_refused() {
    let bench = bench().await;
    let key = rcgen::KeyPair::generate().unwrap();
    let expired = bench.token("old", -1).await;
    let root = Fingerprint::of(b"x");
    let unknown = JoinToken {
        secret: "never issued".to_owned(),
        root,
    }
    .to_string();
    for token in [expired, unknown, "nonsense".to_owned()] {
        let refused = bench
            .for_join()
            .join(&request(&token, &key))
            .await
            .unwrap_err();
        assert_eq!(refused.status(), Some(StatusCode::FORBIDDEN), "{token}");
    }
    let mut broken = request("x.y", &key);
    broken.csr = "no request".to_owned();
    let refused = bench.for_join().join(&broken).await.unwrap_err();
    assert_eq!(refused.status(), Some(StatusCode::BAD_REQUEST));
    assert!(
        host::all(bench.test.database.reader())
            .await
            .unwrap()
            .is_empty()
    );
}

#[tokio::test]
async fn who_has_no_certificate_may_not_send_much() {
    let bench = bench().await;
    let key = rcgen::KeyPair::generate().unwrap();
    let mut big = request("x.y", &key);
    big.host.hostname = "h".repeat(100 << 10);
    let refused = bench.for_join().join(&big).await.unwrap_err();
    assert_eq!(refused.status(), Some(StatusCode::PAYLOAD_TOO_LARGE));
    bench.stop.cancel();
}

#[tokio::test]
async fn only_members_are_answered_and_removal_ends_a_certificate() {
    let bench = bench().await;
    let nobody = bench.for_join().heartbeat(&heartbeat(0)).await.unwrap_err();
    assert_eq!(nobody.status(), Some(StatusCode::UNAUTHORIZED));
    let (id, host) = bench.joined("a").await;
    assert!(host.heartbeat(&heartbeat(0)).await.unwrap().report);
    let database = bench.test.database.clone();
    database
        .write(move |tx| Box::pin(async move { host::remove(tx, id, 1).await }))
        .await
        .unwrap();
    let removed = host.heartbeat(&heartbeat(0)).await.unwrap_err();
    assert_eq!(removed.status(), Some(StatusCode::FORBIDDEN));
    let key = rcgen::KeyPair::generate().unwrap();
    let renewal = RenewRequest {
        version: 1,
        csr: csr(&key),
    };
    assert_eq!(
        host.renew(&renewal).await.unwrap_err().status(),
        Some(StatusCode::FORBIDDEN)
    );
}

#[tokio::test]
async fn reports_reach_the_fleet_and_a_gap_is_told() {
    let bench = bench().await;
    let (id, host) = bench.joined("a").await;
    let changes = |sequence| Changes {
        version: 1,
        agent_instance: Uuid::from_u128(7),
        sequence,
        machines: vec![],
    };
    assert_eq!(
        host.changes(&changes(4)).await.unwrap(),
        Pushed::ReportNeeded
    );
    let full = FullReport {
        version: 1,
        agent_instance: Uuid::from_u128(7),
        sequence: 4,
        machines: vec![],
    };
    host.report(&full).await.unwrap();
    assert_eq!(bench.parts.fleet.machines(id), Some(vec![]));
    assert_eq!(host.changes(&changes(5)).await.unwrap(), Pushed::Taken);
    assert!(!host.heartbeat(&heartbeat(5)).await.unwrap().report);
    assert!(host.heartbeat(&heartbeat(6)).await.unwrap().report);
}

#[tokio::test]
async fn a_controller_that_does_not_lead_sends_agents_to_the_one_that_does() {
    let test = testing::database().await;
    let clock = SimulatedClock::starting_at(1);
    let seat = |name: &str, fleet: &Arc<Fleet>| {
        let me = Me {
            name: name.to_owned(),
            incarnation: Uuid::new_v4(),
            agents_url: format!("https://{name}:1"),
        };
        let clock: Arc<dyn Clock> = Arc::new(clock.clone());
        Seat::new(test.database.clone(), clock, Arc::clone(fleet), me)
    };
    let (mut leader, _leads) = seat("leader", &Arc::default());
    leader.beat().await.unwrap();
    let fleet = Arc::new(Fleet::default());
    let (mut follower, follows) = seat("follower", &fleet);
    follower.beat().await.unwrap();
    let bench = bench_of(test, follows, fleet).await;
    // A host may join by any of them.
    let (id, client) = bench.joined("secret").await;
    let answer = client.heartbeat(&heartbeat(0)).await.unwrap();
    assert_eq!(
        answer.controllers,
        ["https://leader:1", "https://follower:1"]
    );
    assert!(!answer.report);
    let changes = Changes {
        version: 1,
        agent_instance: Uuid::from_u128(7),
        sequence: 1,
        machines: vec![],
    };
    let report = FullReport {
        version: 1,
        agent_instance: Uuid::from_u128(7),
        sequence: 1,
        machines: vec![],
    };
    let refused = client.changes(&changes).await.unwrap_err();
    assert_eq!(refused.status(), Some(StatusCode::SERVICE_UNAVAILABLE));
    let refused = client.report(&report).await.unwrap_err();
    assert_eq!(refused.status(), Some(StatusCode::SERVICE_UNAVAILABLE));
    assert_eq!(bench.parts.fleet.machines(id), None, "nothing was taken in");
    // The leader is gone: now it is for this one, which has heard nothing yet.
    clock.advance(crate::leader::LEASE);
    follower.beat().await.unwrap();
    let answer = client.heartbeat(&heartbeat(0)).await.unwrap();
    assert_eq!(answer.controllers, ["https://follower:1"]);
    assert!(answer.report);
    client.report(&report).await.unwrap();
    assert_eq!(bench.parts.fleet.machines(id), Some(vec![]));
    bench.stop.cancel();
}

fn migration_to(
    target: HostId,
    server: ServerId,
    source: HostId,
    ended_at_us: Option<i64>,
) -> migration::Model {
    migration::Model {
        id: 0,
        uuid: Uuid::from_u128(5).to_string(),
        server_id: server.to_string(),
        source_id: source.to_string(),
        source: "a".to_owned(),
        target_id: Some(target.to_string()),
        target: Some("b".to_owned()),
        status: "preparing".to_owned(),
        flavor_id: "1".to_owned(),
        user_id: None,
        project_id: None,
        progress: None,
        reason: None,
        created_at_us: 1,
        updated_at_us: 1,
        ended_at_us,
        kind: migration::Purpose::Live.word().to_owned(),
        new_flavor_id: None,
        before: None,
    }
}

#[tokio::test]
async fn an_image_is_given_only_to_a_host_whose_machine_uses_it() {
    let bench = bench().await;
    let (owner, host) = bench.joined("a").await;
    let (target, other) = bench.joined("b").await;
    let server = ServerId(Uuid::from_u128(1));
    let database = bench.test.database.clone();
    database
        .write(move |tx| {
            Box::pin(async move {
                machine::own(tx, server, owner, &wanted(), None, 1)
                    .await
                    .map(|_| ())
            })
        })
        .await
        .unwrap();
    let refused = other.image(IMAGE, 0).await.err().unwrap();
    assert_eq!(refused.status(), Some(StatusCode::FORBIDDEN));
    // Nor to where its guest is to come, once that has come to nothing.
    for (ended_at_us, given) in [(None, true), (Some(1), false)] {
        let migration = migration_to(target, server, owner, ended_at_us);
        let write = database.write(move |tx| {
            let migration = migration.clone();
            Box::pin(async move {
                migration::row::Entity::delete_many().exec(tx).await?;
                migration::insert(tx, migration).await
            })
        });
        write.await.unwrap();
        assert_eq!(other.image(IMAGE, 0).await.is_ok(), given);
    }
    let fetch = async |offset| {
        let body = host.image(IMAGE, offset).await.unwrap();
        let parts: Vec<Part> = body.parts.try_collect().await.unwrap();
        let [Part::Piece(piece), Part::End(size)] = &parts[..] else {
            panic!("{parts:?}");
        };
        // What is zero behind it has not come.
        assert_eq!((piece.offset, *size), (offset, IMAGE_SIZE));
        (body.offset, piece.bytes.len())
    };
    assert_eq!(fetch(0).await, (0, FULL));
    assert_eq!(fetch(4).await, (4, FULL));
}

#[tokio::test]
async fn hosts_of_the_old_root_are_trusted_until_it_is_retired() {
    let bench = bench().await;
    let (_, host) = bench.joined("a").await;
    let authority = &bench.parts.authority;
    let old = crate::tls::row::Entity::find()
        .one(bench.test.database.reader())
        .await
        .unwrap();
    let new = authority.add_root().await.unwrap();
    authority.sign_with(&new).await.unwrap();
    let answer = host.heartbeat(&heartbeat(0)).await.unwrap();
    assert_eq!(answer.roots.matches("BEGIN CERTIFICATE").count(), 2);
    // The same connection would live on: renew the listener, and come with the renewed certificate.
    let key = rcgen::KeyPair::generate().unwrap();
    let renewal = RenewRequest {
        version: 1,
        csr: csr(&key),
    };
    let renewed = host.renew(&renewal).await.unwrap();
    let credentials = Credentials {
        certificate: renewed.certificate,
        key: key.serialize_pem(),
        roots: renewed.roots,
    };
    let controller = authority
        .certify_controller("b", &["127.0.0.1".to_owned()])
        .unwrap();
    let address = "127.0.0.1:0".parse().unwrap();
    let second = Listener::bind(address, &controller, bench.parts.clone())
        .await
        .unwrap();
    let url = format!("https://{}", second.address().unwrap());
    tokio::spawn(second.run(bench.stop.clone()));
    let renewed = ControllerClient::new(&url, &credentials).unwrap();
    assert!(renewed.heartbeat(&heartbeat(0)).await.is_ok());
    authority.retire(&old.unwrap().id).await.unwrap();
    assert_eq!(authority.roots().matches("BEGIN CERTIFICATE").count(), 1);
    assert!(matches!(
        authority.retire(&new).await,
        Err(crate::tls::AuthorityError::Signing { .. })
    ));
    tokio::time::timeout(Duration::from_secs(5), async { bench.stop.cancel() })
        .await
        .unwrap();
}

/// An agent of before does not say that it takes pieces.
#[tokio::test]
async fn whoever_does_not_ask_for_pieces_has_the_bytes_as_they_are() {
    let source = Blobs(HashMap::from([(IMAGE, image())]));
    for offset in [0, 4_u64] {
        let blob = source.open(IMAGE, offset).await.unwrap().unwrap();
        let response = handlers::bytes_of(blob, offset, &HeaderMap::new());
        let said = |name: header::HeaderName| response.headers().get(name);
        let length = (IMAGE_SIZE - offset).to_string();
        assert_eq!(said(header::CONTENT_LENGTH).unwrap(), &length);
        let range = format!("bytes {offset}-{}/{IMAGE_SIZE}", IMAGE_SIZE - 1);
        let range = (offset > 0).then_some(range);
        let told = said(header::CONTENT_RANGE).map(|range| range.to_str().unwrap().to_owned());
        assert_eq!(told, range);
        let bytes = axum::body::to_bytes(response.into_body(), usize::MAX).await;
        assert_eq!(bytes.unwrap(), image().slice(offset as usize..));
    }
}
