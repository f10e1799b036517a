//! Passwords: argon2id at OWASP's cost (19 MiB, 2 passes), at most one hash a core at a time.
//!
//! Whoever comes while [`QUEUE`] others wait is told to come back (429), so that logins can exhaust
//! neither memory nor processors.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use argon2::{Algorithm, Argon2, Params, Version};
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use crate::http::ApiError;

/// Logins that may wait for a core.
const QUEUE: usize = 256;

/// Bytes of a password that are looked at; longer ones are refused.
pub const LONGEST: usize = 4096;

#[derive(Debug, Clone)]
pub struct Passwords {
    cores: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
    /// Of a password that nobody has: compared with when the user does not exist, so that this
    /// takes as long as if there were one.
    nobody: Arc<str>,
}

/// Counts a waiter for as long as it lives.
struct Waiter<'a>(&'a AtomicUsize);

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Passwords {
    pub fn new() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            cores: Arc::new(Semaphore::new(cores)),
            waiting: Arc::new(AtomicUsize::new(0)),
            nobody: "$argon2id$v=19$m=19456,t=2,p=1$c29tZXNhbHRzb21lc2FsdA\
                     $wvM0qf8VUR6sWmwTnPsvDBOmKdTYRdfKmy8ym0Pd+2A"
                .into(),
        }
    }

    /// The hash to keep, as a PHC string.
    pub async fn hash(&self, password: &str) -> Result<String, ApiError> {
        let password = Zeroizing::new(password.to_owned());
        self.on_a_core(move || {
            argon2()?
                .hash_password(password.as_bytes())
                .map(|hash| hash.to_string())
                .map_err(|error| ApiError::internal(format!("hashing a password: {error}")))
        })
        .await
    }

    /// Whether `password` is the one that was hashed. With no hash the answer is no, and takes as
    /// long.
    pub async fn verify(&self, password: &str, hash: Option<&str>) -> Result<bool, ApiError> {
        let known = hash.is_some() && password.len() <= LONGEST;
        let hash = hash.unwrap_or(&self.nobody).to_owned();
        let password = Zeroizing::new(if known { password } else { "" }.to_owned());
        self.on_a_core(move || {
            let hash = PasswordHash::new(&hash)
                .map_err(|error| ApiError::internal(format!("a stored password hash: {error}")))?;
            Ok(argon2()?
                .verify_password(password.as_bytes(), &hash)
                .is_ok()
                && known)
        })
        .await
    }

    async fn on_a_core<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let permit = {
            let before = self.waiting.fetch_add(1, Ordering::Relaxed);
            let _waiter = Waiter(&self.waiting);
            if before >= QUEUE {
                return Err(ApiError::busy(
                    "Too many logins at once; try again in a second.",
                ));
            }
            Arc::clone(&self.cores)
                .acquire_owned()
                .await
                .map_err(ApiError::internal)?
        };
        let hashed = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work()
        });
        hashed.await.map_err(ApiError::internal)?
    }
}

impl Default for Passwords {
    fn default() -> Self {
        Self::new()
    }
}

fn argon2() -> Result<Argon2<'static>, ApiError> {
    let params = Params::new(19 * 1024, 2, 1, None).map_err(ApiError::internal)?;
    Ok(Argon2::new(Algorithm::Argon2id, Version::V0x13, params))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_password_is_verified_by_its_own_hash_only() {
        let passwords = Passwords::new();
        let hash = passwords.hash("correct horse").await.unwrap();
        assert!(
            hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"),
            "{hash}"
        );
        assert!(
            passwords
                .verify("correct horse", Some(&hash))
                .await
                .unwrap()
        );
        assert!(!passwords.verify("wrong", Some(&hash)).await.unwrap());
        assert!(!passwords.verify("correct horse", None).await.unwrap());
    }

    #[tokio::test]
    async fn beyond_the_queue_the_answer_is_429_and_the_queue_empties_again() {
        let passwords = Passwords::new();
        let cores = passwords.cores.available_permits();
        let all = Arc::clone(&passwords.cores)
            .acquire_many_owned(cores as u32)
            .await
            .unwrap();
        let waiters: Vec<_> = (0..QUEUE)
            .map(|_| {
                let passwords = passwords.clone();
                tokio::spawn(async move { passwords.on_a_core(|| Ok(())).await })
            })
            .collect();
        while passwords.waiting.load(Ordering::Relaxed) < QUEUE {
            tokio::task::yield_now().await;
        }
        let refused = passwords.on_a_core(|| Ok(())).await.unwrap_err();
        assert_eq!(refused.status(), http::StatusCode::TOO_MANY_REQUESTS);
        drop(all);
        for waiter in waiters {
            waiter.await.unwrap().unwrap();
        }
        assert_eq!(passwords.waiting.load(Ordering::Relaxed), 0);
    }
}
