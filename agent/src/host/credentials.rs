//! Who this host is: key, certificate, roots and controllers, in the folder `identity`.
//!
//! The key is made here and never leaves. What controllers say of themselves (their list, the roots)
//! is kept, so that an agent that comes back finds one of them even if the first has gone.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use fractus_agent_api::host::HostId;
use fractus_agent_api::tls::Credentials;
use serde::{Deserialize, Serialize};

#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is damaged: {detail}; join again with a new token")]
    Damaged { path: PathBuf, detail: String },
    #[error("this host has not joined: run `fractus-agent join` first (no {path})")]
    NotJoined { path: PathBuf },
    #[error("the key or the request for a certificate could not be made: {0}")]
    Request(#[from] rcgen::Error),
}

/// What is not secret, in `agent.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Membership {
    pub version: u32,
    pub host_id: HostId,
    /// `https://ADDRESS:PORT` of this agent, as it stands in its certificate.
    pub endpoint: String,
    /// Agents listeners of the controllers.
    pub controllers: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct Identity {
    pub membership: Membership,
    pub credentials: Credentials,
}

/// A new key, and a request for a certificate over it.
pub struct Request {
    pub key: String,
    pub csr: String,
}

impl Request {
    pub fn new() -> Result<Self, CredentialsError> {
        let key = rcgen::KeyPair::generate()?;
        let csr = rcgen::CertificateParams::default()
            .serialize_request(&key)?
            .pem()?;
        Ok(Self {
            key: key.serialize_pem(),
            csr,
        })
    }
}

impl Identity {
    pub fn load(folder: &Path) -> Result<Self, CredentialsError> {
        let about = folder.join("agent.json");
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read_to_string(&path).map_err(|source| CredentialsError::Io { path, source })
        };
        if !about.exists() {
            return Err(CredentialsError::NotJoined { path: about });
        }
        let membership =
            serde_json::from_str(&read("agent.json")?).map_err(|e| CredentialsError::Damaged {
                path: about,
                detail: e.to_string(),
            })?;
        // Key and certificate belong together, and are replaced together: one file.
        let pair = read("host.pem")?;
        let roots = read("roots.pem")?;
        let credentials = Credentials {
            certificate: pair.clone(),
            key: pair,
            roots,
        };
        Ok(Self {
            membership,
            credentials,
        })
    }

    /// `agent.json` goes last: with it the host has joined.
    pub fn store(&self, folder: &Path) -> Result<(), CredentialsError> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder
            .create(folder)
            .map_err(|source| CredentialsError::Io {
                path: folder.to_owned(),
                source,
            })?;
        let Credentials {
            certificate,
            key,
            roots,
        } = &self.credentials;
        let pair = if key == certificate {
            key.clone()
        } else {
            format!("{certificate}\n{key}")
        };
        let about =
            serde_json::to_string_pretty(&self.membership).map_err(|e| CredentialsError::Io {
                path: folder.to_owned(),
                source: e.into(),
            })?;
        replace(&folder.join("host.pem"), pair.as_bytes())?;
        replace(&folder.join("roots.pem"), roots.as_bytes())?;
        replace(&folder.join("agent.json"), about.as_bytes())
    }
}

fn replace(path: &Path, bytes: &[u8]) -> Result<(), CredentialsError> {
    let beside = path.with_extension("new");
    let written = (|| {
        let mut options = File::options();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        match path.parent() {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    })();
    written.map_err(|source| CredentialsError::Io {
        path: path.to_owned(),
        source,
    })
}

/// When the first certificate of a PEM ends, in seconds since the epoch, and when it began.
pub fn validity(pem: &str) -> Option<(i64, i64)> {
    let (_, certificate) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).ok()?;
    let certificate = certificate.parse_x509().ok()?;
    let validity = certificate.validity();
    Some((
        validity.not_before.timestamp(),
        validity.not_after.timestamp(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_reads_back_and_only_root_can_read_it() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("identity");
        assert!(matches!(
            Identity::load(&folder),
            Err(CredentialsError::NotJoined { .. })
        ));
        let request = Request::new().unwrap();
        let identity = Identity {
            membership: Membership {
                version: 1,
                host_id: HostId(uuid::Uuid::from_u128(1)),
                endpoint: "https://10.0.0.1:9443".into(),
                controllers: vec!["https://10.0.0.2:9444".into()],
            },
            credentials: Credentials {
                certificate: "CERT".into(),
                key: request.key,
                roots: "ROOTS".into(),
            },
        };
        identity.store(&folder).unwrap();
        let read = Identity::load(&folder).unwrap();
        assert_eq!(read.membership, identity.membership);
        assert!(read.credentials.key.contains("PRIVATE KEY"));
        assert!(read.credentials.certificate.contains("CERT"));
        let mode = fs::metadata(folder.join("host.pem"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o077, 0);
        read.store(&folder).unwrap();
        assert_eq!(
            Identity::load(&folder).unwrap().credentials.key,
            read.credentials.key
        );
    }
}
