//! SSH keypairs: reading public keys, their fingerprints, and making new ones.
//!
//! Owns formats only; private keys are handed to the caller and kept nowhere.

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::KeyPair as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use md5::{Digest as _, Md5};

/// Why a keypair was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeypairError {
    #[error("Keypair data is invalid: failed to generate fingerprint")]
    Unreadable,
    #[error("making a keypair failed")]
    Generation,
}

/// A keypair that was made here.
pub struct Generated {
    /// PEM (PKCS#8), which OpenSSH reads.
    pub private_key: String,
    /// One line of an `authorized_keys` file.
    pub public_key: String,
    pub fingerprint: String,
}

/// MD5 of the key's blob, in pairs of hex digits, as nova shows it.
///
/// The line is checked as far as OpenSSH's format goes (RFC 4253 §6.6, RFC 5656, RFC 8709): a known
/// algorithm, the same one inside the blob, and the parts that it has.
pub fn fingerprint(line: &str) -> Result<String, KeypairError> {
    let mut words = line.split_whitespace();
    let (Some(algorithm), Some(data)) = (words.next(), words.next()) else {
        return Err(KeypairError::Unreadable);
    };
    let blob = STANDARD
        .decode(data)
        .map_err(|_| KeypairError::Unreadable)?;
    check(algorithm, &blob).ok_or(KeypairError::Unreadable)?;
    Ok(of_blob(&blob))
}

fn of_blob(blob: &[u8]) -> String {
    let pairs: Vec<String> = Md5::digest(blob)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    pairs.join(":")
}

/// The parts after the algorithm's name.
fn check(algorithm: &str, blob: &[u8]) -> Option<()> {
    let mut rest = blob;
    if field(&mut rest)? != algorithm.as_bytes() {
        return None;
    }
    match algorithm {
        "ssh-rsa" => {
            let exponent = field(&mut rest)?;
            let modulus = field(&mut rest)?;
            (!exponent.is_empty() && modulus.len() >= 128).then_some(())?;
        }
        "ssh-dss" => {
            for _ in 0..4 {
                field(&mut rest)?;
            }
        }
        "ssh-ed25519" => (field(&mut rest)?.len() == 32).then_some(())?,
        "ecdsa-sha2-nistp256" | "ecdsa-sha2-nistp384" | "ecdsa-sha2-nistp521" => {
            let curve = field(&mut rest)?;
            let point = field(&mut rest)?;
            let bytes = match curve {
                b"nistp256" => 65,
                b"nistp384" => 97,
                b"nistp521" => 133,
                _ => return None,
            };
            (algorithm.as_bytes().ends_with(curve) && point.len() == bytes).then_some(())?;
        }
        "sk-ssh-ed25519@openssh.com" => {
            (field(&mut rest)?.len() == 32).then_some(())?;
            field(&mut rest)?;
        }
        "sk-ecdsa-sha2-nistp256@openssh.com" => {
            for _ in 0..3 {
                field(&mut rest)?;
            }
        }
        _ => return None,
    }
    rest.is_empty().then_some(())
}

/// An SSH string: four bytes of length, and that many bytes.
fn field<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (length, after) = rest.split_first_chunk::<4>()?;
    let (field, after) =
        after.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
    *rest = after;
    Some(field)
}

/// Makes an RSA keypair of 2048 bits. Takes a fraction of a second of one core: not for the thread
/// of an async runtime.
pub fn generate() -> Result<Generated, KeypairError> {
    let pair = KeyPair::generate(KeySize::Rsa2048).map_err(|_| KeypairError::Generation)?;
    let private: Pkcs8V1Der<'_> = pair.as_der().map_err(|_| KeypairError::Generation)?;
    let public = pair.public_key();
    let mut blob = Vec::new();
    put(&mut blob, b"ssh-rsa");
    put_integer(
        &mut blob,
        public.exponent().big_endian_without_leading_zero(),
    );
    put_integer(
        &mut blob,
        public.modulus().big_endian_without_leading_zero(),
    );
    Ok(Generated {
        private_key: pem(private.as_ref()),
        public_key: format!("ssh-rsa {} Generated-by-Nova", STANDARD.encode(&blob)),
        fingerprint: of_blob(&blob),
    })
}

fn put(blob: &mut Vec<u8>, field: &[u8]) {
    let length = u32::try_from(field.len()).unwrap_or(u32::MAX);
    blob.extend_from_slice(&length.to_be_bytes());
    blob.extend_from_slice(field);
}

/// A positive `mpint` (RFC 4251 §5): a zero byte before a set top bit.
fn put_integer(blob: &mut Vec<u8>, magnitude: &[u8]) {
    let mut field = Vec::with_capacity(magnitude.len() + 1);
    if magnitude.first().is_some_and(|byte| byte & 0x80 != 0) {
        field.push(0);
    }
    field.extend_from_slice(magnitude);
    put(blob, &field);
}

fn pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut out = String::from("-----BEGIN PRIVATE KEY-----\n");
    for line in text.as_bytes().chunks(64) {
        out.push_str(&String::from_utf8_lossy(line));
        out.push('\n');
    }
    out.push_str("-----END PRIVATE KEY-----\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Recorded from nova.
    const ED25519: &str =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKHEChAZpjJUlvgeYCEZ1xpIHIyKB6aYVL3cE4wZ5WYB f@x";

    #[test]
    fn fingerprints_are_novas() {
        assert_eq!(
            fingerprint(ED25519).unwrap(),
            "7b:26:d4:f3:19:29:3e:92:77:c3:c4:5d:85:de:83:51"
        );
    }

    #[test]
    fn what_is_no_key_is_refused() {
        for line in [
            "",
            "ssh-rsa",
            "ssh-rsa JUNK",
            "ssh-rsa AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
            "ssh-ed25519 AAAAB3NzaC1yc2EAAAADAQABAAAAAQA=",
            &ED25519.replace("ssh-ed25519", "ssh-rsa"),
        ] {
            assert_eq!(fingerprint(line), Err(KeypairError::Unreadable), "{line}");
        }
    }

    #[test]
    fn a_made_key_is_one_that_can_be_imported() {
        let made = generate().unwrap();
        assert_eq!(fingerprint(&made.public_key).unwrap(), made.fingerprint);
        assert!(
            made.private_key
                .starts_with("-----BEGIN PRIVATE KEY-----\n")
        );
    }
}
