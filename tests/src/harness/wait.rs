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
    let began = Instant::now();
    let mut pause = Duration::from_millis(5);
    loop {
        let last = match look().await {
            Ok(seen) => return Ok(seen),
            Err(last) => last,
        };
        if began.elapsed() >= limit {
            bail!("{what}: not within {limit:?}; last seen: {last}");
        }
        // sleeps because there is nothing to be told by: a public API, /proc and files are polled
        tokio::time::sleep(pause).await;
        // What takes long is looked at less often, or the looking makes it take longer.
        let most = Duration::from_millis(200).max(began.elapsed() / 50);
        pause = (pause * 3 / 2).min(most);
    }
}
