//! TLS of one migration: TLS 1.3, and each side believes the one certificate that both show.
//!
//! No authority, name or date has a part in it: whoever holds the key was given it for this migration.

use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, CipherSuite, ClientConfig, DigitallySignedStruct, DistinguishedName, Error,
    ServerConfig, SignatureScheme, SupportedCipherSuite, version,
};

use super::{Credentials, TlsError, pair, provider};
use crate::migration::StreamKey;

/// The name that the client asks for, and nobody looks at.
const NAME: &str = "migration.fractus";

/// Which of a migration's connections one is. The source says it in the handshake (ALPN, RFC 7301), and the target, if it
/// takes several, says it again; one of before says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// 0: the stream's own; from 1 on, its lanes'.
    pub number: u8,
    /// How many lanes the stream has.
    pub lanes: u8,
}

impl Place {
    fn protocol(self) -> Vec<u8> {
        format!("fractus-stream/{}/{}", self.number, self.lanes).into_bytes()
    }

    /// As both sides have agreed on it.
    pub fn agreed(protocol: Option<&[u8]>, most_lanes: u8) -> Option<Self> {
        match protocol {
            None => Some(Self::default()),
            Some(said) => Self::all(most_lanes).find(|place| place.protocol() == said),
        }
    }

    fn all(most_lanes: u8) -> impl Iterator<Item = Self> {
        (1..=most_lanes).flat_map(|lanes| (0..=lanes).map(move |number| Self { number, lanes }))
    }
}

/// For one of the source's connections, of a stream that has lanes.
pub fn client_at(key: &StreamKey, much: bool, place: Place) -> Result<ClientConfig, TlsError> {
    let mut config = client(key, much)?;
    config.alpn_protocols = vec![place.protocol()];
    Ok(config)
}

/// For a target that takes so many lanes.
pub fn server_of(key: &StreamKey, most_lanes: u8) -> Result<ServerConfig, TlsError> {
    let mut config = server(key)?;
    config.alpn_protocols = Place::all(most_lanes).map(Place::protocol).collect();
    Ok(config)
}

/// For the source. Where `much` goes, by ChaCha20 alone: AES-GCM's keys cover 2^24 records, and who speaks by itself cannot
/// change them.
pub fn client(key: &StreamKey, much: bool) -> Result<ClientConfig, TlsError> {
    let (chain, private, only) = parts(key)?;
    let mut suites = provider();
    if much {
        let chacha = |suite: &SupportedCipherSuite| {
            suite.suite() == CipherSuite::TLS13_CHACHA20_POLY1305_SHA256
        };
        Arc::make_mut(&mut suites).cipher_suites.retain(chacha);
    }
    let mut config = ClientConfig::builder_with_provider(suites)
        .with_protocol_versions(&[&version::TLS13])
        .map_err(TlsError::Pair)?
        .dangerous()
        .with_custom_certificate_verifier(only)
        .with_client_auth_cert(chain, private)
        .map_err(TlsError::Pair)?;
    config.resumption = Resumption::disabled();
    // For who speaks by itself once hands are shaken.
    config.enable_secret_extraction = true;
    Ok(config)
}

/// For the target.
pub fn server(key: &StreamKey) -> Result<ServerConfig, TlsError> {
    let (chain, private, only) = parts(key)?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])
        .map_err(TlsError::Pair)?
        .with_client_cert_verifier(only)
        .with_single_cert(chain, private)
        .map_err(TlsError::Pair)?;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    // Nothing comes of it behind the handshake.
    config.send_tls13_tickets = 0;
    config.enable_secret_extraction = true;
    Ok(config)
}

/// What the client connects to.
pub fn name() -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(NAME).map_err(|error| TlsError::Roots {
        detail: error.to_string(),
    })
}

type Parts = (
    Vec<CertificateDer<'static>>,
    rustls::pki_types::PrivateKeyDer<'static>,
    Arc<Only>,
);

fn parts(key: &StreamKey) -> Result<Parts, TlsError> {
    let (chain, private) = pair(&Credentials {
        certificate: key.certificate.clone(),
        key: key.key.clone(),
        roots: String::new(),
    })?;
    let [certificate] = &chain[..] else {
        return Err(TlsError::Pem {
            what: "migration's certificate",
            detail: format!("{} of them", chain.len()),
        });
    };
    let only = Arc::new(Only {
        certificate: certificate.clone(),
        provider: provider(),
    });
    Ok((chain, private, only))
}

#[derive(Debug)]
struct Only {
    certificate: CertificateDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl Only {
    fn check(&self, shown: &CertificateDer<'_>) -> Result<(), Error> {
        match shown.as_ref() == self.certificate.as_ref() {
            true => Ok(()),
            false => Err(CertificateError::ApplicationVerificationFailure.into()),
        }
    }

    fn signed(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

/// There is no TLS 1.2 here.
fn too_old() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::General("a migration takes TLS 1.3".to_owned()))
}

impl ServerCertVerifier for Only {
    fn verify_server_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(shown).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        too_old()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for Only {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        shown: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(shown).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        too_old()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signed(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}
