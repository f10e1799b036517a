//! The line to the controllers: heartbeats, changes, full reports, images; any controller will do.
//!
//! [`Cloud`] holds who we are and whom we know, and changes when a heartbeat or a renewal says so.
//! [`Push`] is the one task that tells; it keeps the sequence, and after any doubt sends everything.
//! Without a controller in reach nothing else stops: machines do not depend on it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use fractus_agent_api::VERSION;
use fractus_agent_api::client::controller::{ControllerClient, Pushed};
use fractus_agent_api::client::{CallError, ClientError};
use fractus_agent_api::host::{Changes, FullReport, Heartbeat, HeartbeatAnswer};
use fractus_agent_api::machine::ServerId;
use futures::{StreamExt, TryStreamExt};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use uuid::Uuid;

use super::credentials::{CredentialsError, Identity};
use super::inventory::Inventory;
use crate::image::source::{Body, Source, SourceError};
use crate::machine::Machines;
use crate::machine::process::Launcher;
use crate::paths::Paths;

/// Identity, and a client for each controller.
pub struct Link {
    pub identity: Identity,
    pub clients: Vec<ControllerClient>,
}

impl Link {
    fn new(identity: Identity) -> Result<Self, ClientError> {
        let clients = identity
            .membership
            .controllers
            .iter()
            .map(|endpoint| ControllerClient::new(endpoint, &identity.credentials))
            .collect::<Result<_, _>>()?;
        Ok(Self { identity, clients })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum CloudError {
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error(transparent)]
    Client(#[from] ClientError),
}

#[derive(Clone)]
pub struct Cloud {
    paths: Paths,
    link: Arc<watch::Sender<Arc<Link>>>,
    /// Held from the look at an identity to the new one in its place: a heartbeat's answer and a
    /// renewal must not undo each other.
    change: Arc<Mutex<()>>,
}

impl Cloud {
    pub fn new(paths: Paths, identity: Identity) -> Result<Self, CloudError> {
        let (link, _) = watch::channel(Arc::new(Link::new(identity)?));
        Ok(Self {
            paths,
            link: Arc::new(link),
            change: Arc::default(),
        })
    }

    pub fn link(&self) -> Arc<Link> {
        self.link.borrow().clone()
    }

    pub fn watch(&self) -> watch::Receiver<Arc<Link>> {
        self.link.subscribe()
    }

    /// Changes the identity: on the disk first. One that stays the same is not written.
    pub fn modify(&self, change: impl FnOnce(&mut Identity)) -> Result<(), CloudError> {
        let _one = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.link();
        let mut identity = now.identity.clone();
        change(&mut identity);
        let (new, old) = (&identity.credentials, &now.identity.credentials);
        if identity.membership == now.identity.membership
            && (&new.certificate, &new.key, &new.roots) == (&old.certificate, &old.key, &old.roots)
        {
            return Ok(());
        }
        let link = Link::new(identity)?;
        link.identity.store(&self.paths.identity())?;
        self.link.send_replace(Arc::new(link));
        Ok(())
    }

    /// Controllers and roots, as a heartbeat's answer says them.
    fn learn(&self, answer: &HeartbeatAnswer) -> Result<(), CloudError> {
        self.modify(|identity| {
            if !answer.controllers.is_empty() {
                identity
                    .membership
                    .controllers
                    .clone_from(&answer.controllers);
            }
            if !answer.roots.is_empty() {
                identity.credentials.roots.clone_from(&answer.roots);
            }
        })
    }
}

#[async_trait]
impl Source for Cloud {
    async fn open(&self, id: Uuid, offset: u64) -> Result<Body, SourceError> {
        let mut last = SourceError("no controller is known".to_owned());
        for client in &self.link().clients {
            match client.image(id, offset).await {
                Ok(body) => {
                    let parts = body.parts.map_err(|e| SourceError(e.to_string())).boxed();
                    return Ok(Body {
                        offset: body.offset,
                        parts,
                    });
                }
                Err(error) => last = SourceError(error.to_string()),
            }
        }
        Err(last)
    }
}

/// Between two tries when no controller answers.
const RETRY: Duration = Duration::from_secs(1);

pub struct Push<L: Launcher> {
    pub cloud: Cloud,
    pub machines: Machines<L>,
    pub inventory: Inventory,
    pub changed: mpsc::UnboundedReceiver<ServerId>,
    /// One life of the agent.
    pub instance: Uuid,
    /// Of the last push.
    pub sequence: u64,
}

impl<L: Launcher> Push<L> {
    /// For the life of the agent.
    pub async fn run(mut self) {
        let mut next_heartbeat = Instant::now();
        // The first contact says everything.
        let mut report = true;
        loop {
            let due = next_heartbeat;
            tokio::select! {
                changed = self.changed.recv() => {
                    let Some(changed) = changed else { return };
                    // What a report will say needs no push of its own.
                    if !report {
                        report = !self.changes(changed).await;
                    }
                }
                () = tokio::time::sleep_until(due) => {
                    let answered = self.heartbeat(report).await;
                    next_heartbeat = Instant::now() + RETRY;
                    if let Some(answer) = answered {
                        let interval = Duration::from_secs(u64::from(answer.interval_s.clamp(1, 300)));
                        report = answer.report;
                        next_heartbeat = Instant::now() + interval;
                        if let Err(error) = self.cloud.learn(&answer) {
                            tracing::error!(%error, "what a controller said cannot be kept");
                        }
                    }
                }
            }
            if report {
                next_heartbeat = next_heartbeat.min(Instant::now() + RETRY);
            }
        }
    }

    /// The first controller that answers.
    async fn any<T, F>(&self, call: impl Fn(ControllerClient) -> F) -> Option<T>
    where
        F: Future<Output = Result<T, CallError>>,
    {
        for client in &self.cloud.link().clients {
            match call(client.clone()).await {
                Ok(answer) => return Some(answer),
                Err(error) => tracing::warn!(%error, "controller"),
            }
        }
        None
    }

    /// True when the controllers know all there is to know.
    async fn changes(&mut self, first: ServerId) -> bool {
        let mut ids = BTreeSet::from([first]);
        while let Ok(id) = self.changed.try_recv() {
            ids.insert(id);
        }
        self.sequence += 1;
        let body = Changes {
            version: VERSION,
            agent_instance: self.instance,
            sequence: self.sequence,
            machines: ids.iter().filter_map(|id| self.machines.get(*id)).collect(),
        };
        let body = &body;
        match self
            .any(|client| async move { client.changes(body).await })
            .await
        {
            Some(Pushed::Taken) => true,
            Some(Pushed::ReportNeeded) => self.report().await,
            None => false,
        }
    }

    async fn report(&mut self) -> bool {
        // What changes from here on is pushed again; what has changed is in the report.
        while self.changed.try_recv().is_ok() {}
        let body = FullReport {
            version: VERSION,
            agent_instance: self.instance,
            sequence: self.sequence,
            machines: self.machines.list(),
        };
        let body = &body;
        self.any(|client| async move { client.report(body).await })
            .await
            .is_some()
    }

    /// With a full report behind it when one is due. The answer's `report` says whether one still is.
    async fn heartbeat(&mut self, report: bool) -> Option<HeartbeatAnswer> {
        let body = Heartbeat {
            version: VERSION,
            agent_instance: self.instance,
            sequence: self.sequence,
            endpoint: self.cloud.link().identity.membership.endpoint.clone(),
            host: self.inventory.report(),
        };
        let body = &body;
        let mut answer = self
            .any(|client| async move { client.heartbeat(body).await })
            .await?;
        if report || answer.report {
            answer.report = !self.report().await;
        }
        Some(answer)
    }
}
