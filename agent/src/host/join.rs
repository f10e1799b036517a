//! `fractus-agent join`: a host becomes part of a cloud, once.

use fractus_agent_api::VERSION;
use fractus_agent_api::client::controller::ControllerClient;
use fractus_agent_api::client::{CallError, ClientError};
use fractus_agent_api::host::{HostReport, JoinRequest};
use fractus_agent_api::identity::Fingerprint;
use fractus_agent_api::tls::Credentials;

use super::credentials::{CredentialsError, Identity, Membership, Request};
use crate::paths::Paths;

#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error("this host is {host} of a cloud already; remove {path} to make it another")]
    Joined { host: String, path: String },
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{0}; if the token was used or is old, make a new one with `fractus host join-token`")]
    Call(#[from] CallError),
}

/// What the operator says.
#[derive(Debug, Clone)]
pub struct Join {
    /// `https://ADDRESS:PORT` of a controller's agents listener.
    pub controller: String,
    pub token: String,
    /// Of a root of the cloud: how the controller is known.
    pub root: Fingerprint,
    /// `https://ADDRESS:PORT` under which controllers will reach this host.
    pub endpoint: String,
}

pub async fn join(paths: &Paths, join: Join, host: HostReport) -> Result<Identity, JoinError> {
    let folder = paths.identity();
    match Identity::load(&folder) {
        Err(CredentialsError::NotJoined { .. }) => {}
        Err(other) => return Err(other.into()),
        Ok(identity) => {
            return Err(JoinError::Joined {
                host: identity.membership.host_id.to_string(),
                path: folder.display().to_string(),
            });
        }
    }
    let request = Request::new()?;
    let client = ControllerClient::for_join(&join.controller, join.root)?;
    let answer = client
        .join(&JoinRequest {
            version: VERSION,
            token: join.token,
            csr: request.csr,
            endpoint: join.endpoint.clone(),
            host,
        })
        .await?;
    let mut controllers = answer.controllers;
    if controllers.is_empty() {
        controllers.push(join.controller);
    }
    let identity = Identity {
        membership: Membership {
            version: VERSION,
            host_id: answer.host_id,
            endpoint: join.endpoint,
            controllers,
        },
        credentials: Credentials {
            certificate: answer.certificate,
            key: request.key,
            roots: answer.roots,
        },
    };
    identity.store(&folder)?;
    Ok(identity)
}
