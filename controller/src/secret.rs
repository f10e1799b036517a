//! Secrets at rest: the master key of a cloud, and what it wraps.
//!
//! Owns the file `master.key` in the state folder (32 random bytes, mode 0600). Whatever is secret
//! in the database (token keys, the authority's key) is wrapped by it, so that a copy of the
//! database alone opens nothing. Controllers that share a database share this file. The key must
//! never be logged, sent or stored elsewhere.

use std::fmt;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use zeroize::Zeroizing;

/// Bytes of a key.
pub const KEY_LEN: usize = 32;

#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("reading the master key {path}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("writing the master key {path}")]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error(
        "the master key {path} has {length} bytes, not {KEY_LEN}: restore the file that belongs to this database"
    )]
    Length { path: PathBuf, length: usize },
    #[error(
        "a secret of the database ({purpose}) does not open with this master key: restore the \
         master.key that belongs to this database"
    )]
    Open { purpose: String },
    #[error("the crypto provider failed to seal {purpose}")]
    Seal { purpose: String },
}

/// An authenticated cipher with one key. Cheap to clone.
#[derive(Clone)]
pub struct Sealer(Arc<RandomizedNonceKey>);

impl Sealer {
    pub fn new(key: &[u8; KEY_LEN]) -> Result<Self, SecretError> {
        let key = RandomizedNonceKey::new(&AES_256_GCM, key).map_err(|_| SecretError::Seal {
            purpose: "anything".to_owned(),
        })?;
        Ok(Self(Arc::new(key)))
    }

    /// Nonce, ciphertext and tag. `purpose` must be the same to open it, and keeps a secret of one
    /// kind from being taken for another.
    pub fn seal(&self, purpose: &str, plain: &[u8]) -> Result<Vec<u8>, SecretError> {
        let mut sealed = plain.to_vec();
        let nonce = self
            .0
            .seal_in_place_append_tag(Aad::from(purpose.as_bytes()), &mut sealed)
            .map_err(|_| SecretError::Seal {
                purpose: purpose.to_owned(),
            })?;
        let mut out = Vec::with_capacity(NONCE_LEN + sealed.len());
        out.extend_from_slice(nonce.as_ref());
        out.extend_from_slice(&sealed);
        Ok(out)
    }

    pub fn open(&self, purpose: &str, sealed: &[u8]) -> Result<Zeroizing<Vec<u8>>, SecretError> {
        let wrong = || SecretError::Open {
            purpose: purpose.to_owned(),
        };
        let (nonce, rest) = sealed.split_at_checked(NONCE_LEN).ok_or_else(wrong)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| wrong())?;
        let mut plain = Zeroizing::new(rest.to_vec());
        let length = self
            .0
            .open_in_place(nonce, Aad::from(purpose.as_bytes()), &mut plain)
            .map_err(|_| wrong())?
            .len();
        plain.truncate(length);
        Ok(plain)
    }
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sealer")
    }
}

/// The key that wraps all other secrets. Cheap to clone.
#[derive(Debug, Clone)]
pub struct MasterKey(Sealer);

impl MasterKey {
    /// Reads the key's file, or makes one where there is none.
    pub fn load_or_create(path: &Path) -> Result<Self, SecretError> {
        let read = |source| SecretError::Read {
            path: path.to_owned(),
            source,
        };
        match std::fs::read(path) {
            Ok(bytes) => Self::of(path, &Zeroizing::new(bytes)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let key = random_key()?;
                write_private(path, &*key).map_err(|source| SecretError::Write {
                    path: path.to_owned(),
                    source,
                })?;
                // Read back: another controller may have been first.
                Self::of(path, &Zeroizing::new(std::fs::read(path).map_err(read)?))
            }
            Err(error) => Err(read(error)),
        }
    }

    /// A key that is nowhere kept, for tests.
    pub fn ephemeral() -> Result<Self, SecretError> {
        Ok(Self(Sealer::new(&*random_key()?)?))
    }

    fn of(path: &Path, bytes: &[u8]) -> Result<Self, SecretError> {
        let key = <&[u8; KEY_LEN]>::try_from(bytes).map_err(|_| SecretError::Length {
            path: path.to_owned(),
            length: bytes.len(),
        })?;
        Ok(Self(Sealer::new(key)?))
    }

    /// Wraps a secret for the database.
    pub fn wrap(&self, purpose: &str, secret: &[u8]) -> Result<Vec<u8>, SecretError> {
        self.0.seal(purpose, secret)
    }

    pub fn unwrap_secret(
        &self,
        purpose: &str,
        wrapped: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, SecretError> {
        self.0.open(purpose, wrapped)
    }
}

/// 32 bytes from the crypto provider.
pub fn random_key() -> Result<Zeroizing<[u8; KEY_LEN]>, SecretError> {
    let mut key = Zeroizing::new([0; KEY_LEN]);
    aws_lc_rs::rand::fill(&mut *key).map_err(|_| SecretError::Seal {
        purpose: "a new key".to_owned(),
    })?;
    Ok(key)
}

/// Writes a file that only its owner can read, whole or not at all; one that exists is kept.
pub fn write_private(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let unfinished = PathBuf::from(name);
    let written = (|| {
        let mut options = std::fs::OpenOptions::new();
        let mut file = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&unfinished)?;
        file.write_all(content)?;
        file.sync_all()?;
        match std::fs::hard_link(&unfinished, path) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        }
    })();
    std::fs::remove_file(&unfinished).or_else(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Ok(()),
        _ => Err(error),
    })?;
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn what_is_wrapped_opens_only_with_its_key_and_purpose() {
        let key = MasterKey::ephemeral().unwrap();
        let wrapped = key.wrap("token key", b"secret").unwrap();
        assert_eq!(
            &**key.unwrap_secret("token key", &wrapped).unwrap(),
            b"secret"
        );
        assert!(key.unwrap_secret("other", &wrapped).is_err());
        assert!(
            MasterKey::ephemeral()
                .unwrap()
                .unwrap_secret("token key", &wrapped)
                .is_err()
        );
        assert!(key.unwrap_secret("token key", &wrapped[..5]).is_err());
    }

    #[test]
    fn the_key_file_is_private_and_stays_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("master.key");
        let wrapped = MasterKey::load_or_create(&path)
            .unwrap()
            .wrap("x", b"y")
            .unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let again = MasterKey::load_or_create(&path).unwrap();
        assert_eq!(&**again.unwrap_secret("x", &wrapped).unwrap(), b"y");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
