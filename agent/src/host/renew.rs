//! Renews the host's certificate before it ends, with a new key.

use std::time::Duration;

use fractus_agent_api::VERSION;
use fractus_agent_api::client::CallError;
use fractus_agent_api::host::RenewRequest;

use super::credentials::{CredentialsError, Request, validity};
use super::push::{Cloud, CloudError};
use crate::clock::now_us;

#[derive(Debug, thiserror::Error)]
enum RenewError {
    #[error(transparent)]
    Cloud(#[from] CloudError),
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    #[error("no controller is known")]
    Nobody,
    #[error(transparent)]
    Call(#[from] CallError),
}

/// After a failure.
const AGAIN: Duration = Duration::from_secs(60);
/// The certificate is looked at so often; clocks jump.
const LOOK: Duration = Duration::from_secs(3600);

/// For the life of the agent.
pub async fn run(cloud: Cloud) {
    loop {
        let wait = due(
            &cloud.link().identity.credentials.certificate,
            now_us() / 1_000_000,
        );
        if !wait.is_zero() {
            tokio::time::sleep(wait.min(LOOK)).await;
            continue;
        }
        match renew(&cloud).await {
            Ok(()) => tracing::info!("the host's certificate was renewed"),
            Err(error) => {
                tracing::warn!(%error, "the host's certificate was not renewed");
                tokio::time::sleep(AGAIN).await;
            }
        }
    }
}

/// How long until two thirds of the certificate's time are over. `now` in seconds since the epoch.
fn due(certificate: &str, now: i64) -> Duration {
    let Some((from, until)) = validity(certificate) else {
        return LOOK;
    };
    let at = from + (until - from) * 2 / 3;
    Duration::from_secs(u64::try_from(at - now).unwrap_or(0))
}

async fn renew(cloud: &Cloud) -> Result<(), RenewError> {
    let request = Request::new()?;
    let mut last = RenewError::Nobody;
    for client in &cloud.link().clients {
        let body = RenewRequest {
            version: VERSION,
            csr: request.csr.clone(),
        };
        match client.renew(&body).await {
            Ok(answer) => {
                return Ok(cloud.modify(|identity| {
                    identity.credentials.certificate = answer.certificate;
                    identity.credentials.key = request.key;
                    if !answer.roots.is_empty() {
                        identity.credentials.roots = answer.roots;
                    }
                })?);
            }
            Err(error) => last = error.into(),
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_due_after_two_thirds_of_its_time() {
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::default()
            .self_signed(&key)
            .unwrap()
            .pem();
        let (from, until) = validity(&certificate).unwrap();
        let at = from + (until - from) * 2 / 3;
        assert_eq!(due(&certificate, at - 10), Duration::from_secs(10));
        assert_eq!(due(&certificate, at), Duration::ZERO);
        assert_eq!(due(&certificate, until + 10), Duration::ZERO);
    }
}
