//! What stands between controller and hosts: messages that are lost, late or doubled, hosts that do
//! not answer, and the end of a controller.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use bytes::Bytes;
use fractus_agent_api::copy::CopyId;
use fractus_agent_api::host::{Changes, FullReport, Heartbeat, HostId, HostReport};
use fractus_agent_api::machine::{MachineReport, PutMachine, ServerId};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use sea_orm::{DbErr, RuntimeErr};
use tokio::sync::watch;

use crate::agents::simulated::{SimulatedAgents, SimulatedHost};
use crate::agents::{Agent, AgentError, Agents, Console, CopyStream};
use crate::database::WriteHook;

/// The life of one controller: ends at its n-th effect from now, and from then on nothing that it
/// still does has any effect.
#[derive(Debug, Default)]
pub struct Doom {
    life: Mutex<Life>,
    /// It stands still while this is true.
    frozen: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct Life {
    effects_left: Option<u32>,
    freezes: bool,
    dead: bool,
}

impl Doom {
    /// Dies at the `effects`-th effect from now; each write and each call counts as two, before and
    /// after.
    pub fn arm(&self, effects: u32) {
        self.life.lock().unwrap().effects_left = Some(effects);
    }

    /// Stands still at the `effects`-th effect from now, and at every later one, until it is thawed.
    pub fn freeze_at(&self, effects: u32) {
        let mut life = self.life.lock().unwrap();
        (life.effects_left, life.freezes) = (Some(effects), true);
    }

    /// Resolves once it stands still.
    pub async fn frozen(&self) {
        let mut frozen = self.frozen.subscribe();
        frozen.wait_for(|frozen| *frozen).await.unwrap();
    }

    pub fn is_frozen(&self) -> bool {
        *self.frozen.borrow()
    }

    /// It goes on as if no time had passed.
    pub fn thaw(&self) {
        self.life.lock().unwrap().effects_left = None;
        self.frozen.send_replace(false);
    }

    pub fn is_dead(&self) -> bool {
        self.life.lock().unwrap().dead
    }

    async fn effect(&self) -> Result<(), String> {
        {
            let mut life = self.life.lock().unwrap();
            match life.effects_left {
                Some(0) if life.freezes => drop(self.frozen.send_replace(true)),
                Some(0) => life.dead = true,
                Some(left) => life.effects_left = Some(left - 1),
                None => {}
            }
            if life.dead {
                return Err("the controller is dead".to_owned());
            }
        }
        let mut frozen = self.frozen.subscribe();
        frozen.wait_for(|frozen| !*frozen).await.unwrap();
        Ok(())
    }
}

#[async_trait]
impl WriteHook for Doom {
    async fn before(&self) -> Result<(), DbErr> {
        self.effect()
            .await
            .map_err(|dead| DbErr::Conn(RuntimeErr::Internal(dead)))
    }

    async fn after(&self) -> Result<(), DbErr> {
        self.before().await
    }
}

/// A message on its way to the controller.
#[derive(Debug, Clone)]
pub enum Mail {
    Heartbeat(Box<Heartbeat>),
    Changes(Changes),
    Report(FullReport),
}

/// The network.
#[derive(Clone)]
pub struct Network {
    pub hosts: SimulatedAgents,
    inner: Arc<Mutex<Inner>>,
}

struct Inner {
    random: StdRng,
    /// In a thousand.
    loss: u32,
    frozen: BTreeSet<HostId>,
    mail: Vec<(HostId, Mail)>,
    late: Vec<(HostId, ServerId, PutMachine)>,
}

impl Network {
    pub fn new(seed: u64) -> Self {
        let inner = Inner {
            random: StdRng::seed_from_u64(seed),
            loss: 0,
            frozen: BTreeSet::new(),
            mail: Vec::new(),
            late: Vec::new(),
        };
        Self {
            hosts: SimulatedAgents::default(),
            inner: Arc::new(Mutex::new(inner)),
        }
    }

    /// `loss` messages of a thousand are lost, as many are doubled and come late.
    pub fn set_loss(&self, loss: u32) {
        self.inner().loss = loss;
    }

    pub fn freeze(&self, host: HostId) {
        self.inner().frozen.insert(host);
    }

    pub fn thaw(&self, host: HostId) {
        self.inner().frozen.remove(&host);
    }

    pub fn thaw_all(&self) {
        self.inner().frozen.clear();
    }

    pub fn is_frozen(&self, host: HostId) -> bool {
        self.inner().frozen.contains(&host)
    }

    /// Sends to the controller; it may be lost, or there twice.
    pub fn post(&self, host: HostId, mail: Mail) {
        let mut inner = self.inner();
        if inner.bad_luck() {
            return;
        }
        if inner.bad_luck() {
            inner.mail.push((host, mail.clone()));
        }
        inner.mail.push((host, mail));
    }

    /// Any one of the messages on their way, so that they overtake each other.
    pub fn deliver(&self) -> Option<(HostId, Mail)> {
        let mut inner = self.inner();
        if inner.mail.is_empty() {
            return None;
        }
        let count = inner.mail.len();
        let which = inner.random.random_range(0..count);
        Some(inner.mail.remove(which))
    }

    /// A call of long ago arrives at its host.
    pub fn deliver_late(&self) -> bool {
        let (host, server, put) = {
            let mut inner = self.inner();
            if inner.late.is_empty() {
                return false;
            }
            let count = inner.late.len();
            let which = inner.random.random_range(0..count);
            inner.late.remove(which)
        };
        if let Some(host) = self.hosts.host(host) {
            // The answer has nobody to go to.
            let _ = host.take(server, &put);
        }
        true
    }

    /// What is on its way to a dead controller does not arrive.
    pub fn drop_mail(&self) {
        self.inner().mail.clear();
    }

    /// The agents as one controller reaches them.
    pub fn agents(&self, doom: Arc<Doom>) -> Arc<dyn Agents> {
        Arc::new(Reach {
            network: self.clone(),
            doom,
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }
}

impl Inner {
    fn bad_luck(&mut self) -> bool {
        self.loss > 0 && self.random.random_range(0..1000) < self.loss
    }
}

struct Reach {
    network: Network,
    doom: Arc<Doom>,
}

impl Agents for Reach {
    fn agent(&self, host: HostId) -> Result<Arc<dyn Agent>, AgentError> {
        let found = self
            .network
            .hosts
            .host(host)
            .ok_or(AgentError::NoHost { host })?;
        Ok(Arc::new(Wire {
            host: found,
            network: self.network.clone(),
            doom: self.doom.clone(),
        }))
    }
}

/// One host, over the network.
struct Wire {
    host: Arc<SimulatedHost>,
    network: Network,
    doom: Arc<Doom>,
}

impl Wire {
    fn lost(&self, detail: &str) -> AgentError {
        AgentError::Unreachable {
            host: self.host.id(),
            detail: detail.to_owned(),
        }
    }

    async fn effect(&self) -> Result<(), AgentError> {
        let effect = self.doom.effect().await;
        effect.map_err(|dead| self.lost(&dead))
    }

    fn reach(&self) -> Result<(), AgentError> {
        let mut inner = self.network.inner();
        if inner.frozen.contains(&self.host.id()) || self.host.agent_is_down() {
            return Err(self.lost("no answer"));
        }
        if inner.bad_luck() {
            Err(self.lost("lost on its way"))
        } else {
            Ok(())
        }
    }
}

#[async_trait]
impl Agent for Wire {
    async fn put(&self, id: ServerId, body: &PutMachine) -> Result<MachineReport, AgentError> {
        self.effect().await?;
        {
            let mut inner = self.network.inner();
            let held_up = inner.frozen.contains(&self.host.id());
            if held_up || inner.bad_luck() {
                inner.late.push((self.host.id(), id, body.clone()));
            }
        }
        self.reach()?;
        let answer = self.host.take(id, body).map_err(AgentError::from);
        self.effect().await?;
        self.reach()?;
        answer
    }

    async fn get(&self, id: ServerId) -> Result<MachineReport, AgentError> {
        self.effect().await?;
        self.reach()?;
        self.host.get(id).await
    }

    async fn list(&self) -> Result<FullReport, AgentError> {
        self.effect().await?;
        self.reach()?;
        self.host.list().await
    }

    async fn host(&self) -> Result<HostReport, AgentError> {
        Ok(self.host.host_report())
    }

    async fn console_log(&self, id: ServerId, lines: Option<u64>) -> Result<Bytes, AgentError> {
        self.host.console_log(id, lines).await
    }

    async fn copy(&self, id: ServerId, copy: CopyId) -> Result<CopyStream, AgentError> {
        self.effect().await?;
        self.reach()?;
        self.host.copy(id, copy).await
    }

    async fn console(&self, id: ServerId) -> Result<Console, AgentError> {
        self.host.console(id).await
    }
}
