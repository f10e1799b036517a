//! Between controller and agents: every message is read, may be caught ([`super::gate`]), and goes on.
//!
//! It has the certificates of both sides, and so is each of them for the other. Owns every connection that it takes; all
//! end when it is dropped.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use fractus_agent_api::host::HostId;
use fractus_agent_api::identity::Peer;
use fractus_agent_api::machine::MachineReport;
use fractus_agent_api::migration::{AtLimit, State};
use fractus_agent_api::tls::{self, ClientCertificate, Credentials, Expected};
use fractus_controller::clock::SystemClock;
use fractus_controller::database::Database;
use fractus_controller::random::SystemRandom;
use fractus_controller::secret::MasterKey;
use fractus_controller::tls::Authority;
use fractus_tests::harness::{Cloud, Ways};
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::client::TlsStream as ToServer;
use tokio_rustls::server::TlsStream as ToClient;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::sync::CancellationToken;

use super::gate::{Fate, Gate};
use super::letter::{Letter, Way};
use super::line::Line;
use super::spot::Seen;

type Sender = http2::SendRequest<Full<Bytes>>;

pub struct Middle {
    shared: Arc<Shared>,
    _tasks: JoinSet<()>,
}

struct Shared {
    controller: Ways,
    /// The controller's own, at the address by which agents know it.
    credentials: Credentials,
    agents: Vec<(Ways, PathBuf)>,
    /// One for two agents.
    gates: Vec<Arc<Gate>>,
}

impl Middle {
    /// Of a cloud whose agents have not begun yet.
    pub async fn start(cloud: &Cloud, agents: usize) -> Result<Self> {
        let controller = cloud.controller_ways();
        let state = cloud.folder().join("controller");
        let agents =
            (0..agents).map(|index| Ok((cloud.agent_ways(index)?, cloud.agent_state(index))));
        let agents: Vec<_> = agents.collect::<Result<_>>()?;
        let shared = Arc::new(Shared {
            controller,
            credentials: of_controller(&state, controller.known).await?,
            gates: agents.chunks(2).map(|_| Arc::default()).collect(),
            agents,
        });
        let mut tasks = JoinSet::new();
        let doors = (0..shared.agents.len()).map(|index| (Some(index), shared.agents[index].0));
        for (agent, ways) in std::iter::once((None, controller)).chain(doors) {
            let listener = TcpListener::bind(ways.known).await?;
            tasks.spawn(Arc::clone(&shared).take(agent, listener));
        }
        Ok(Self {
            shared,
            _tasks: tasks,
        })
    }

    pub fn gate(&self, pair: usize) -> Arc<Gate> {
        Arc::clone(&self.shared.gates[pair])
    }

    /// A message comes again, by a connection of its own; the status that it is answered.
    pub async fn again(&self, letter: &Letter) -> Result<u16> {
        let known = self.shared.known(letter.way);
        let to = self.shared.connect(letter.way, b"h2").await?;
        let (mut to, connection) = shaken(to).await?;
        let drives = tokio::spawn(connection);
        let (answer, _) = letter.send(&mut to, &known.to_string()).await?;
        drives.abort();
        Ok(answer.status().as_u16())
    }
}

/// A certificate as this cloud's controller has one.
async fn of_controller(state: &Path, known: SocketAddr) -> Result<Credentials> {
    let url = format!("sqlite://{}", state.join("fractus.sqlite").display());
    let database = Database::connect(&url).await?;
    let master = MasterKey::load_or_create(&state.join("master.key"))?;
    let (clock, random) = (SystemClock::shared(), SystemRandom::shared());
    let authority = Authority::open(database.clone(), master, clock, random).await?;
    let credentials = authority.certify_controller("middle", &[known.ip().to_string()])?;
    database.close().await;
    Ok(credentials)
}

/// An agent's own, and the id of its host.
fn of_agent(state: &Path) -> Result<(HostId, Credentials)> {
    let folder = state.join("identity");
    let read = |name| std::fs::read_to_string(folder.join(name)).context("an agent's identity");
    let about: serde_json::Value = serde_json::from_str(&read("agent.json")?)?;
    let id = serde_json::from_value(about["host_id"].clone())?;
    let pair = read("host.pem")?;
    let credentials = Credentials {
        certificate: pair.clone(),
        key: pair,
        roots: read("roots.pem")?,
    };
    Ok((id, credentials))
}

async fn shaken(
    to: ToServer<TcpStream>,
) -> Result<(Sender, impl Future<Output = hyper::Result<()>>)> {
    Ok(http2::handshake(TokioExecutor::new(), TokioIo::new(to)).await?)
}

impl Shared {
    fn known(&self, way: Way) -> SocketAddr {
        match way {
            Way::ToAgent(agent) => self.agents[agent].0.known,
            Way::ToController(_) => self.controller.known,
        }
    }

    fn gate(&self, agent: usize) -> &Arc<Gate> {
        &self.gates[agent / 2]
    }

    /// Takes what comes for an agent, or for the controller.
    async fn take(self: Arc<Self>, agent: Option<usize>, listener: TcpListener) {
        let mut connections = JoinSet::new();
        while let Ok((tcp, _)) = listener.accept().await {
            let shared = Arc::clone(&self);
            connections.spawn(async move {
                if let Err(error) = shared.serve(agent, tcp).await {
                    println!("a connection to {agent:?}: {error:#}");
                }
            });
            while connections.try_join_next().is_some() {}
        }
    }

    async fn serve(self: Arc<Self>, agent: Option<usize>, tcp: TcpStream) -> Result<()> {
        tcp.set_nodelay(true)?;
        let credentials = match agent {
            Some(agent) => of_agent(&self.agents[agent].1)?.1,
            None => self.credentials.clone(),
        };
        let config = tls::server(&credentials, ClientCertificate::Required)?;
        let mut from = TlsAcceptor::from(Arc::new(config)).accept(tcp).await?;
        let way = match agent {
            Some(agent) => Way::ToAgent(agent),
            None => Way::ToController(self.who(&from)?),
        };
        let alpn = from.get_ref().1.alpn_protocol().unwrap_or_default();
        if alpn == b"http/1.1" {
            // Consoles.
            let mut to = self.connect(way, b"http/1.1").await?;
            // However it ends, it is a connection that has ended.
            let _ = tokio::io::copy_bidirectional(&mut from, &mut to).await;
            return Ok(());
        }
        let (to, connection) = shaken(self.connect(way, b"h2").await?).await?;
        let cut = CancellationToken::new();
        let service = service_fn(|request| {
            let (shared, to, cut) = (Arc::clone(&self), to.clone(), cut.clone());
            // A task of its own: it arrives, also when who sent it is gone.
            let carried = tokio::spawn(async move { shared.carry(way, request, to, &cut).await });
            async move { carried.await.unwrap_or_else(|error| Err(error.into())) }
        });
        let served = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(from), service);
        let drives = tokio::spawn(connection);
        tokio::select! {
            _ = served => {}
            () = cut.cancelled() => drives.abort(),
        }
        Ok(())
    }

    /// Which agent this is.
    fn who(&self, from: &ToClient<TcpStream>) -> Result<usize> {
        let chain = from.get_ref().1.peer_certificates().unwrap_or_default();
        let Peer::Host(host) = Peer::of_certificate(chain.first().context("nobody")?)? else {
            bail!("a controller calls a controller");
        };
        let is = |(_, state): &(Ways, PathBuf)| of_agent(state).is_ok_and(|(id, _)| id == host);
        self.agents.iter().position(is).context("a stranger")
    }

    async fn connect(&self, way: Way, alpn: &[u8]) -> Result<ToServer<TcpStream>> {
        let (ways, state) = &self.agents[way.agent()];
        let (id, own) = of_agent(state)?;
        let (to, config) = match way {
            Way::ToAgent(_) => {
                let config = tls::client(&self.credentials, Expected::Host(id), alpn)?;
                (ways.listens, config)
            }
            Way::ToController(_) => {
                let config = tls::client(&own, Expected::AnyController, alpn)?;
                (self.controller.listens, config)
            }
        };
        let tcp = TcpStream::connect(to).await?;
        tcp.set_nodelay(true)?;
        let name = ServerName::try_from(self.known(way).ip().to_string())?;
        Ok(TlsConnector::from(Arc::new(config))
            .connect(name, tcp)
            .await?)
    }

    /// One message, its answer, and what becomes of both.
    async fn carry(
        self: Arc<Self>,
        way: Way,
        request: Request<Incoming>,
        mut to: Sender,
        cut: &CancellationToken,
    ) -> Result<Response<Full<Bytes>>> {
        let letter = Letter::read(way, request).await?;
        let known = self.known(way).to_string();
        let fate = self.meet(&letter).await;
        if fate == Fate::Cut {
            cut.cancel();
            bail!("cut");
        }
        let sent = async {
            if fate == Fate::Doubled {
                self.gate(way.agent()).keep(letter.clone());
                letter.send(&mut to, &known).await?;
            }
            letter.send(&mut to, &known).await
        };
        let sent = sent.await;
        if sent.is_err() || fate == Fate::Unanswered {
            cut.cancel();
        }
        let (answer, body) = sent?;
        if fate == Fate::Unanswered {
            bail!("the answer is lost");
        }
        let departs = letter.put().and_then(|put| put.wanted.departs);
        if departs
            .is_some_and(|it| it.policy.limit_ms == 0 && it.policy.at_limit == AtLimit::PostCopy)
            && answer.status().is_success()
        {
            self.gate(way.agent()).was_told_to_follow();
        }
        if let Some(report) = letter.answered(&answer, &body) {
            self.hear(way.agent(), &report);
            let agent = way.agent();
            let seen = [Seen::Said {
                agent,
                report: &report,
            }];
            self.gate(agent).meet_again(&seen).await;
        }
        Ok(answer)
    }

    async fn meet(&self, letter: &Letter) -> Fate {
        let agent = letter.way.agent();
        let gate = self.gate(agent);
        if let Some(put) = letter.put() {
            if let Some(arrival) = &put.wanted.arrives {
                gate.learn(&arrival.key);
            }
            return gate.meet(&[Seen::Told { agent, put: &put }]).await;
        }
        let said = letter.said();
        said.iter().for_each(|report| self.hear(agent, report));
        let seen: Vec<_> = said
            .iter()
            .map(|report| Seen::Said { agent, report })
            .collect();
        gate.meet(&seen).await
    }

    /// Whoever listens is to be found.
    fn hear(&self, agent: usize, report: &MachineReport) {
        let Some(migration) = &report.migration else {
            return;
        };
        if migration.state == State::Continued {
            self.gate(agent).runs_at(agent);
        }
        let State::Arriving { port } = migration.state else {
            return;
        };
        let gate = Arc::clone(self.gate(agent));
        let ways = self.agents[agent].0;
        let at = |ip| SocketAddr::new(ip, port);
        let line = |key| {
            Line::open(
                Arc::clone(&gate),
                at(ways.known.ip()),
                at(ways.listens.ip()),
                key,
            )
        };
        gate.listens(migration.id, port, line);
    }
}
