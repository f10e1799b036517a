//! The public API's certificate: one that the operator gives, or one of its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::ServerConfig;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

use super::config::{Config, TlsSource};
use crate::secret::write_private;

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("reading the certificate or key {path}: {reason}")]
    Read { path: PathBuf, reason: String },
    #[error("certificate and key cannot be used")]
    Use(#[source] rustls::Error),
    #[error("making a certificate of its own")]
    Make(#[source] rcgen::Error),
    #[error("writing {path}")]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
}

pub fn acceptor(source: &TlsSource, config: &Config) -> Result<TlsAcceptor, TlsError> {
    let (certificate, key) = match source {
        TlsSource::Given { certificate, key } => (certificate.clone(), key.clone()),
        TlsSource::Own => {
            let certificate = config.state_dir.join("tls.pem");
            let key = config.state_dir.join("tls.key");
            if !certificate.exists() || !key.exists() {
                make_own(&certificate, &key, config)?;
            }
            (certificate, key)
        }
    };
    let unreadable = |path: &Path, error: rustls_pki_types::pem::Error| TlsError::Read {
        path: path.to_owned(),
        reason: error.to_string(),
    };
    let chain = CertificateDer::pem_file_iter(&certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| unreadable(&certificate, error))?;
    let private = PrivateKeyDer::from_pem_file(&key).map_err(|error| unreadable(&key, error))?;
    let mut server = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(TlsError::Use)?;
    server.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(server)))
}

/// A self-signed certificate for the names that the API is reached by. Clients trust the file
/// `tls.pem` (OS_CACERT).
fn make_own(certificate: &Path, key: &Path, config: &Config) -> Result<(), TlsError> {
    let uri: Option<http::Uri> = config.public_url.as_str().parse().ok();
    let mut names = vec![
        "localhost".to_owned(),
        "127.0.0.1".to_owned(),
        "::1".to_owned(),
    ];
    if let Some(host) = uri.as_ref().and_then(http::Uri::host) {
        let host = host.trim_matches(['[', ']']).to_owned();
        if !names.contains(&host) {
            names.insert(0, host);
        }
    }
    let made = rcgen::generate_simple_self_signed(names).map_err(TlsError::Make)?;
    for old in [certificate, key] {
        // A certificate without its key, or the other way round, is of no use.
        let _ = std::fs::remove_file(old);
    }
    let write = |path: &Path, text: String| {
        write_private(path, text.as_bytes()).map_err(|source| TlsError::Write {
            path: path.to_owned(),
            source,
        })
    };
    write(key, made.signing_key.serialize_pem())?;
    write(certificate, made.cert.pem())
}
