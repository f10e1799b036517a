//! Waiting for what a test expects.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Looks again and again until there is something to see.
///
/// # Errors
/// After `limit`, saying what was waited for and what was seen last.
pub async fn until<T, F>(what: &str, limit: Duration, mut look: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<T, String>>,
{
    let end = Instant::now() + limit;
    let mut pause = Duration::from_millis(5);
    loop {
        let last = match look().await {
            Ok(seen) => return Ok(seen),
            Err(last) => last,
        };
        if Instant::now() >= end {
            bail!("{what}: not within {limit:?}; last seen: {last}");
        }
        // sleeps because there is nothing to be told by: a public API, /proc and files are polled
        tokio::time::sleep(pause).await;
        pause = (pause * 3 / 2).min(Duration::from_millis(200));
    }
}
