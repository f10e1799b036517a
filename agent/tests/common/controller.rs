//! A controller that only listens to agents: joins, heartbeats, pushes, images.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Json, Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use fractus_agent_api::host::{
    Changes, FullReport, Heartbeat, HeartbeatAnswer, HostId, JoinAnswer, JoinRequest, RenewAnswer,
    RenewRequest,
};
use fractus_agent_api::identity::{Fingerprint, JoinToken, Peer};
use fractus_agent_api::machine::{ImageRef, MachineReport, ServerId};
use fractus_agent_api::tls::{self, ClientCertificate, Credentials};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, CertifiedIssuer, IsCa,
    KeyPair, SanType,
};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use uuid::Uuid;

pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "test root");
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Self { issuer }
    }

    fn sans(peer: &Peer) -> Vec<SanType> {
        let uri = peer.to_string().try_into().unwrap();
        vec![SanType::URI(uri), SanType::IpAddress(super::own_ip())]
    }

    pub fn controller(&self, name: &str) -> Credentials {
        self.issue(&Peer::Controller(name.to_owned()))
    }

    pub fn issue(&self, peer: &Peer) -> Credentials {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::<String>::new()).unwrap();
        params.subject_alt_names = Self::sans(peer);
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        Credentials {
            certificate: format!("{}{}", leaf.pem(), self.issuer.pem()),
            key: key.serialize_pem(),
            roots: self.issuer.pem(),
        }
    }

    fn sign(&self, csr: &str, host: HostId) -> String {
        let mut request = CertificateSigningRequestParams::from_pem(csr).unwrap();
        request.params.subject_alt_names = Self::sans(&Peer::Host(host));
        let leaf = request.signed_by(&self.issuer).unwrap();
        format!("{}{}", leaf.pem(), self.issuer.pem())
    }
}

#[derive(Default)]
pub struct Heard {
    pub reports: HashMap<ServerId, MachineReport>,
    pub full_reports: usize,
    pub changes: usize,
    pub heartbeats: usize,
    pub sequence: Option<(Uuid, u64)>,
    /// How often an image was asked for.
    pub fetches: HashMap<Uuid, usize>,
}

struct Shared {
    authority: Authority,
    endpoint: String,
    images: Mutex<HashMap<Uuid, Vec<u8>>>,
    heard: Mutex<Heard>,
    /// Bytes after which a download is cut off, once.
    cut: Mutex<Option<usize>>,
}

#[derive(Clone)]
pub struct Cloud {
    pub endpoint: String,
    /// A controller's, for calling agents.
    pub credentials: Credentials,
    shared: Arc<Shared>,
}

impl Cloud {
    pub async fn start() -> Self {
        let authority = Authority::new();
        let credentials = authority.controller("test");
        let listener = TcpListener::bind((super::own_ip(), 0)).await.unwrap();
        let endpoint = format!("https://{}", listener.local_addr().unwrap());
        let config = tls::server(&credentials, ClientCertificate::Optional).unwrap();
        let shared = Arc::new(Shared {
            authority,
            endpoint: endpoint.clone(),
            images: Mutex::default(),
            heard: Mutex::default(),
            cut: Mutex::default(),
        });
        let router = Router::new()
            .route("/agent/v1/join", post(join))
            .route("/agent/v1/renew", post(renew))
            .route("/agent/v1/heartbeat", post(heartbeat))
            .route("/agent/v1/changes", post(changes))
            .route("/agent/v1/report", post(report))
            .route("/agent/v1/images/{id}", get(image))
            .with_state(shared.clone());
        tokio::spawn(serve(listener, TlsAcceptor::from(Arc::new(config)), router));
        Self {
            endpoint,
            credentials,
            shared,
        }
    }

    pub fn authority(&self) -> &Authority {
        &self.shared.authority
    }

    pub fn token(&self) -> String {
        let root = Fingerprint::of(self.shared.authority.issuer.der());
        JoinToken {
            secret: "secret".into(),
            root,
        }
        .to_string()
    }

    pub fn add_image(&self, image: &ImageRef, bytes: &[u8]) {
        self.shared
            .images
            .lock()
            .unwrap()
            .insert(image.id, bytes.to_vec());
    }

    pub fn cut_next_download_at(&self, bytes: usize) {
        *self.shared.cut.lock().unwrap() = Some(bytes);
    }

    pub fn heard<T>(&self, look: impl FnOnce(&mut Heard) -> T) -> T {
        look(&mut self.shared.heard.lock().unwrap())
    }
}

async fn serve(listener: TcpListener, tls: TlsAcceptor, router: Router) {
    while let Ok((stream, _)) = listener.accept().await {
        let (tls, router) = (tls.clone(), router.clone());
        tokio::spawn(async move {
            let Ok(stream) = tls.accept(stream).await else {
                return;
            };
            let service = TowerToHyperService::new(router);
            let _ = auto::Builder::new(TokioExecutor::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn join(State(shared): State<Arc<Shared>>, Json(body): Json<JoinRequest>) -> Response {
    if !body.token.starts_with("secret.") {
        return (StatusCode::FORBIDDEN, "the token is not valid").into_response();
    }
    let host_id = HostId(Uuid::new_v4());
    Json(JoinAnswer {
        host_id,
        certificate: shared.authority.sign(&body.csr, host_id),
        roots: shared.authority.issuer.pem(),
        controllers: vec![shared.endpoint.clone()],
    })
    .into_response()
}

async fn renew(State(shared): State<Arc<Shared>>, Json(body): Json<RenewRequest>) -> Response {
    let certificate = shared.authority.sign(&body.csr, HostId(Uuid::new_v4()));
    Json(RenewAnswer {
        certificate,
        roots: shared.authority.issuer.pem(),
    })
    .into_response()
}

async fn heartbeat(State(shared): State<Arc<Shared>>, Json(body): Json<Heartbeat>) -> Response {
    let mut heard = shared.heard.lock().unwrap();
    heard.heartbeats += 1;
    let report = heard.sequence != Some((body.agent_instance, body.sequence));
    Json(HeartbeatAnswer {
        controllers: vec![shared.endpoint.clone()],
        roots: shared.authority.issuer.pem(),
        interval_s: 1,
        report,
    })
    .into_response()
}

async fn changes(State(shared): State<Arc<Shared>>, Json(body): Json<Changes>) -> Response {
    let mut heard = shared.heard.lock().unwrap();
    if heard.sequence != Some((body.agent_instance, body.sequence - 1)) {
        return StatusCode::CONFLICT.into_response();
    }
    heard.sequence = Some((body.agent_instance, body.sequence));
    heard.changes += 1;
    heard.reports.extend(
        body.machines
            .into_iter()
            .map(|machine| (machine.id, machine)),
    );
    StatusCode::NO_CONTENT.into_response()
}

async fn report(State(shared): State<Arc<Shared>>, Json(body): Json<FullReport>) -> Response {
    let mut heard = shared.heard.lock().unwrap();
    heard.sequence = Some((body.agent_instance, body.sequence));
    heard.full_reports += 1;
    heard.reports = body
        .machines
        .into_iter()
        .map(|machine| (machine.id, machine))
        .collect();
    StatusCode::NO_CONTENT.into_response()
}

async fn image(
    State(shared): State<Arc<Shared>>,
    Path(id): Path<Uuid>,
    headers: HeaderMap,
) -> Response {
    *shared.heard.lock().unwrap().fetches.entry(id).or_default() += 1;
    let Some(bytes) = shared.images.lock().unwrap().get(&id).cloned() else {
        return StatusCode::FORBIDDEN.into_response();
    };
    let range = headers
        .get(header::RANGE)
        .and_then(|range| range.to_str().ok());
    let from = range.and_then(|range| {
        range
            .strip_prefix("bytes=")?
            .strip_suffix('-')?
            .parse::<usize>()
            .ok()
    });
    let status = if from.is_some() {
        StatusCode::PARTIAL_CONTENT
    } else {
        StatusCode::OK
    };
    let bytes = bytes[from.unwrap_or(0)..].to_vec();
    match shared.cut.lock().unwrap().take() {
        None => (status, bytes).into_response(),
        Some(cut) => {
            let part = bytes::Bytes::from(bytes[..cut].to_vec());
            let broken = Err(std::io::Error::other("cut off"));
            let stream = futures::stream::iter([Ok(part), broken]);
            (status, Body::from_stream(stream)).into_response()
        }
    }
}
