//! Passwords: argon2id at OWASP's cost (19 MiB, 2 passes), at most one hash a core at a time.
//!
//! Whoever comes while [`QUEUE`] others wait is told to come back (429), so that logins can exhaust
//! neither memory nor processors.

mod memory;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use argon2::password_hash::phc::{Output, PasswordHash, Salt};
use argon2::{Algorithm, Argon2, Block, Params, Version};
use zeroize::Zeroizing;

use self::memory::Pool;
use crate::clock::Clock;
use crate::http::ApiError;

/// Logins that may wait for a core.
const QUEUE: usize = 256;

/// Bytes of a password that are looked at; longer ones are refused.
pub const LONGEST: usize = 4096;

/// KiB of memory that a hash takes.
const COST: u32 = 19 * 1024;
const PASSES: u32 = 2;

#[derive(Clone)]
pub struct Passwords {
    pool: Arc<Pool>,
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
    /// `clock` says when the memory has been idle for long enough to be given back.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self {
            pool: Pool::new(clock),
            waiting: Arc::new(AtomicUsize::new(0)),
            nobody: "$argon2id$v=19$m=19456,t=2,p=1$c29tZXNhbHRzb21lc2FsdA\
                     $wvM0qf8VUR6sWmwTnPsvDBOmKdTYRdfKmy8ym0Pd+2A"
                .into(),
        }
    }

    /// The hash to keep, as a PHC string.
    pub async fn hash(&self, password: &str) -> Result<String, ApiError> {
        let password = Zeroizing::new(password.to_owned());
        self.on_a_core(move |memory| {
            let params = Params::new(COST, PASSES, 1, None).map_err(hashing)?;
            let salt = Salt::generate();
            let output = digest(
                &params,
                &password,
                &salt,
                Params::DEFAULT_OUTPUT_LEN,
                memory,
            )?;
            let kept = PasswordHash {
                algorithm: Algorithm::Argon2id.ident(),
                version: Some(Version::V0x13.into()),
                params: (&params).try_into().map_err(hashing)?,
                salt: Some(salt),
                hash: Some(output),
            };
            Ok(kept.to_string())
        })
        .await
    }

    /// Whether `password` is the one that was hashed. With no hash the answer is no, and takes as
    /// long.
    pub async fn verify(&self, password: &str, hash: Option<&str>) -> Result<bool, ApiError> {
        let known = hash.is_some() && password.len() <= LONGEST;
        let kept = PasswordHash::new(hash.unwrap_or(&self.nobody)).map_err(stored)?;
        let params = Params::try_from(&kept).map_err(stored)?;
        let (Some(salt), Some(expected)) = (kept.salt, kept.hash) else {
            return Err(stored("it has no salt or no hash"));
        };
        // Only what this cloud could have made: a dearer one would hold a core for as long as it says.
        let ours = kept.algorithm == Algorithm::Argon2id.ident()
            && kept.version == Some(Version::V0x13.into())
            && params.m_cost() <= COST
            && params.t_cost() <= PASSES
            && params.p_cost() == 1;
        if !ours {
            return Err(stored("it is not argon2id at this cloud's cost"));
        }
        let password = Zeroizing::new(if known { password } else { "" }.to_owned());
        self.on_a_core(move |memory| {
            let output = digest(&params, &password, &salt, expected.len(), memory)?;
            // Compares in constant time.
            Ok(output == expected && known)
        })
        .await
    }

    async fn on_a_core<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut [Block]) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let turn = {
            let before = self.waiting.fetch_add(1, Ordering::Relaxed);
            let _waiter = Waiter(&self.waiting);
            if before >= QUEUE {
                return Err(ApiError::busy(
                    "Too many logins at once; try again in a second.",
                ));
            }
            self.pool.turn().await
        };
        let turn = turn.ok_or_else(|| ApiError::internal("the pool of hashers is closed"))?;
        let hashed = tokio::task::spawn_blocking(move || turn.run(COST as usize, work));
        hashed.await.map_err(ApiError::internal)?
    }
}

/// argon2id of `password`, in `memory`.
fn digest(
    params: &Params,
    password: &str,
    salt: &Salt,
    length: usize,
    memory: &mut [Block],
) -> Result<Output, ApiError> {
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params.clone());
    let mut output = Zeroizing::new([0; Output::MAX_LENGTH]);
    let output = output
        .get_mut(..length)
        .ok_or_else(|| stored("its hash is too long"))?;
    let memory = memory
        .get_mut(..params.block_count())
        .ok_or_else(|| stored("it needs more memory than this cloud gives"))?;
    argon2
        .hash_password_into_with_memory(password.as_bytes(), salt, output, memory)
        .map_err(hashing)?;
    Output::new(output).map_err(hashing)
}

fn hashing(error: impl std::fmt::Display) -> ApiError {
    ApiError::internal(format!("hashing a password: {error}"))
}

fn stored(error: impl std::fmt::Display) -> ApiError {
    ApiError::internal(format!("a stored password hash: {error}"))
}

impl std::fmt::Debug for Passwords {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Passwords").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
