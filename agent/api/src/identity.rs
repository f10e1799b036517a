//! Who is at the other end of a connection: the names that the cloud's own certificates carry.
//!
//! Every certificate of the internal authority has exactly one URI among its subject alternative
//! names: `fractus://host/UUID` for an agent, `fractus://controller/NAME` for a controller. Names and
//! addresses beside it (DNS, IP) are where it listens; rights follow from the URI alone.
//!
//! A join token reads `SECRET.FINGERPRINT`: a one-time secret, and the SHA-256 (hex) of the DER of a
//! root of the cloud, by which a host that trusts nothing yet knows the controller. The controller's
//! agents listener therefore sends its root along in its chain.

use std::fmt;
use std::str::FromStr;

use uuid::Uuid;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::host::HostId;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    Host(HostId),
    /// A controller, by its name (any text without control characters; not a right by itself).
    Controller(String),
}

#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("the certificate cannot be read: {detail}")]
    Unreadable { detail: String },
    #[error("the certificate carries no fractus:// name")]
    Nameless,
    #[error("the certificate carries more than one fractus:// name")]
    Ambiguous,
    #[error("{uri:?} is neither fractus://host/UUID nor fractus://controller/NAME")]
    Name { uri: String },
}

impl Peer {
    /// What the leaf certificate (DER) says of its holder. The chain must have been verified before.
    pub fn of_certificate(leaf: &[u8]) -> Result<Self, IdentityError> {
        let unreadable = |detail: String| IdentityError::Unreadable { detail };
        let (_, certificate) =
            X509Certificate::from_der(leaf).map_err(|e| unreadable(e.to_string()))?;
        let names = certificate
            .subject_alternative_name()
            .map_err(|e| unreadable(e.to_string()))?
            .ok_or(IdentityError::Nameless)?;
        let mut uris = names
            .value
            .general_names
            .iter()
            .filter_map(|name| match name {
                GeneralName::URI(uri) if uri.starts_with(SCHEME) => Some(*uri),
                _ => None,
            });
        let uri = uris.next().ok_or(IdentityError::Nameless)?;
        if uris.next().is_some() {
            return Err(IdentityError::Ambiguous);
        }
        uri.parse()
    }
}

const SCHEME: &str = "fractus://";

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(id) => write!(f, "{SCHEME}host/{id}"),
            Self::Controller(name) => write!(f, "{SCHEME}controller/{name}"),
        }
    }
}

impl FromStr for Peer {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, IdentityError> {
        let wrong = || IdentityError::Name {
            uri: uri.to_owned(),
        };
        let (role, name) = uri
            .strip_prefix(SCHEME)
            .and_then(|rest| rest.split_once('/'))
            .ok_or_else(wrong)?;
        match role {
            "host" => Uuid::try_parse(name)
                .map(|id| Self::Host(HostId(id)))
                .map_err(|_| wrong()),
            "controller" if !name.is_empty() && !name.contains(char::is_control) => {
                Ok(Self::Controller(name.to_owned()))
            }
            _ => Err(wrong()),
        }
    }
}

/// SHA-256 of a certificate's DER.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint(pub [u8; 32]);

impl Fingerprint {
    pub fn of(der: &[u8]) -> Self {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, der);
        let mut bytes = [0; 32];
        bytes.copy_from_slice(digest.as_ref());
        Self(bytes)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("a fingerprint is 64 hexadecimal digits (SHA-256 of the root certificate)")]
    Fingerprint,
    #[error("a join token reads SECRET.FINGERPRINT; copy it whole from `fractus host join-token`")]
    Shape,
}

impl FromStr for Fingerprint {
    type Err = TokenError;

    /// Hex digits; colons between them and a leading `sha256:` are allowed.
    fn from_str(text: &str) -> Result<Self, TokenError> {
        let digits: Vec<u8> = text
            .trim()
            .trim_start_matches("sha256:")
            .chars()
            .filter(|c| *c != ':')
            .map(|c| {
                c.to_digit(16)
                    .map(|d| d as u8)
                    .ok_or(TokenError::Fingerprint)
            })
            .collect::<Result<_, _>>()?;
        if digits.len() != 64 {
            return Err(TokenError::Fingerprint);
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Ok(Self(bytes))
    }
}

/// What `fractus host join-token` prints. It is sent whole in `JoinRequest::token`.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    pub secret: String,
    pub root: Fingerprint,
}

impl fmt::Display for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.secret, self.root)
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken(…, {})", self.root)
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let (secret, root) = text.trim().rsplit_once('.').ok_or(TokenError::Shape)?;
        if secret.is_empty() {
            return Err(TokenError::Shape);
        }
        Ok(Self {
            secret: secret.to_owned(),
            root: root.parse()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_as_written() {
        let host = Peer::Host(HostId(Uuid::from_u128(7)));
        assert_eq!(
            host.to_string(),
            "fractus://host/00000000-0000-0000-0000-000000000007"
        );
        assert_eq!(host.to_string().parse::<Peer>().unwrap(), host);
        let controller = Peer::Controller("a".into());
        assert_eq!(controller.to_string().parse::<Peer>().unwrap(), controller);
    }

    #[test]
    fn other_names_are_refused() {
        for wrong in [
            "fractus://host/x",
            "fractus://controller/",
            "fractus://root/a",
            "http://host/a",
            "",
        ] {
            assert!(wrong.parse::<Peer>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_join_token_reads_back_and_hides_its_secret() {
        let token = JoinToken {
            secret: "s3cr.et".into(),
            root: Fingerprint::of(b"certificate"),
        };
        assert_eq!(token.to_string().parse::<JoinToken>().unwrap(), token);
        assert!(!format!("{token:?}").contains("s3cr"));
        assert_eq!("abc".parse::<JoinToken>().unwrap_err(), TokenError::Shape);
        assert_eq!(
            "abc.12".parse::<JoinToken>().unwrap_err(),
            TokenError::Fingerprint
        );
    }
}
