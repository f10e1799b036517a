//! TLS of the internal network: who is believed, on both sides.
//!
//! Owns the translation of PEM (a certificate with its chain, a key, one or two roots) into rustls
//! configurations. It never falls back to the roots of the operating system, and never skips a check:
//! before the first join a controller is known by the fingerprint of its root.

pub mod stream;

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{WebPkiServerVerifier, verify_server_name};
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, ServerConfig,
    SignatureScheme,
};

use crate::host::HostId;
use crate::identity::{Fingerprint, Peer};

/// A certificate with its key, and whom it trusts; all PEM.
#[derive(Clone)]
pub struct Credentials {
    pub certificate: String,
    pub key: String,
    /// One root, or two while they are being replaced.
    pub roots: String,
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Credentials").finish_non_exhaustive()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the {what} is not PEM as expected: {detail}")]
    Pem { what: &'static str, detail: String },
    #[error("certificate and key do not work together: {0}")]
    Pair(Error),
    #[error("the roots cannot be used: {detail}")]
    Roots { detail: String },
}

/// Whom a client accepts at the other end, beside a valid chain and the right address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expected {
    AnyController,
    Host(HostId),
}

/// For calls with our own certificate. `alpn` is `h2` or `http/1.1` (WebSockets).
pub fn client(
    credentials: &Credentials,
    expected: Expected,
    alpn: &[u8],
) -> Result<ClientConfig, TlsError> {
    let chain = WebPkiServerVerifier::builder_with_provider(
        Arc::new(roots(&credentials.roots)?),
        provider(),
    )
    .build()
    .map_err(|e| TlsError::Roots {
        detail: e.to_string(),
    })?;
    let (certificate, key) = pair(credentials)?;
    let mut config = client_builder()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(NamedPeer { chain, expected }))
        .with_client_auth_cert(certificate, key)
        .map_err(TlsError::Pair)?;
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(config)
}

/// For the join: no certificate of our own yet, and the controller known by its root alone.
pub fn client_by_fingerprint(root: Fingerprint, alpn: &[u8]) -> Result<ClientConfig, TlsError> {
    let mut config = client_builder()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(PinnedRoot {
            root,
            provider: provider(),
        }))
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(config)
}

/// Whether a server takes connections without a client certificate (only the controller's agents
/// listener does, for the join).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientCertificate {
    Required,
    Optional,
}

/// For a listener. What the peer may do is the listener's to decide, from [`Peer::of_certificate`].
pub fn server(
    credentials: &Credentials,
    clients: ClientCertificate,
) -> Result<ServerConfig, TlsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots(&credentials.roots)?),
        provider(),
    );
    let verifier = match clients {
        ClientCertificate::Required => verifier,
        ClientCertificate::Optional => verifier.allow_unauthenticated(),
    }
    .build()
    .map_err(|e| TlsError::Roots {
        detail: e.to_string(),
    })?;
    let (certificate, key) = pair(credentials)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Pair)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(certificate, key)
        .map_err(TlsError::Pair)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn client_builder() -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, TlsError>
{
    ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .map_err(TlsError::Pair)
}

fn roots(pem: &str) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for root in certificates(pem, "list of roots")? {
        store.add(root).map_err(|e| TlsError::Roots {
            detail: e.to_string(),
        })?;
    }
    Ok(store)
}

fn certificates(pem: &str, what: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| TlsError::Pem {
            what,
            detail: e.to_string(),
        })?;
    if found.is_empty() {
        return Err(TlsError::Pem {
            what,
            detail: "no certificate in it".to_owned(),
        });
    }
    Ok(found)
}

fn pair(
    credentials: &Credentials,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
    let key =
        PrivateKeyDer::from_pem_slice(credentials.key.as_bytes()).map_err(|e| TlsError::Pem {
            what: "key",
            detail: e.to_string(),
        })?;
    Ok((certificates(&credentials.certificate, "certificate")?, key))
}

/// Checks the chain and the address as usual, and then that the holder is who we mean: an agent that
/// took over another's address is not that other one.
#[derive(Debug)]
struct NamedPeer {
    chain: Arc<WebPkiServerVerifier>,
    expected: Expected,
}

impl ServerCertVerifier for NamedPeer {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self
            .chain
            .verify_server_cert(leaf, intermediates, name, ocsp, now)?;
        match (Peer::of_certificate(leaf), &self.expected) {
            (Ok(Peer::Controller(_)), Expected::AnyController) => Ok(verified),
            (Ok(Peer::Host(is)), Expected::Host(wanted)) if is == *wanted => Ok(verified),
            (Ok(other), expected) => Err(Error::General(format!(
                "the certificate is of {other}, not of {expected:?}"
            ))),
            (Err(error), _) => Err(Error::General(error.to_string())),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, leaf, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

/// Believes a chain that ends in the one root with this fingerprint, which the server sends along.
#[derive(Debug)]
struct PinnedRoot {
    root: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for PinnedRoot {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let root = intermediates
            .iter()
            .find(|certificate| Fingerprint::of(certificate) == self.root)
            .ok_or(Error::InvalidCertificate(CertificateError::UnknownIssuer))?;
        let mut store = RootCertStore::empty();
        store.add(root.clone().into_owned())?;
        let chain =
            WebPkiServerVerifier::builder_with_provider(Arc::new(store), self.provider.clone())
                .build()
                .map_err(|e| Error::General(e.to_string()))?;
        chain.verify_server_cert(leaf, intermediates, name, ocsp, now)?;
        verify_server_name(&rustls::server::ParsedCertificate::try_from(leaf)?, name)?;
        match Peer::of_certificate(leaf) {
            Ok(Peer::Controller(_)) => Ok(ServerCertVerified::assertion()),
            Ok(other) => Err(Error::General(format!(
                "the certificate is of {other}, not of a controller"
            ))),
            Err(error) => Err(Error::General(error.to_string())),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, leaf, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, leaf, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
