//! Bytes that are coming in, by project: what a quota must know before they are an image's.
//!
//! Of this controller only, in memory: it bounds what uploads that run side by side put into the
//! store. What an image may keep is decided by the transaction that gives it its bytes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Of all projects. Clones count together.
#[derive(Debug, Clone, Default)]
pub struct Coming {
    /// Projects with nothing coming in are not in it.
    bytes: Arc<Mutex<HashMap<String, u64>>>,
}

/// One upload's share; dropped with it.
#[derive(Debug)]
pub struct Share {
    of: Coming,
    project: String,
    bytes: u64,
}

impl Coming {
    pub fn begin(&self, project: &str) -> Share {
        Share {
            of: self.clone(),
            project: project.to_owned(),
            bytes: 0,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Share {
    /// This upload has brought `bytes`; the answer is what all of its project's have brought.
    pub fn is_now(&mut self, bytes: u64) -> u64 {
        let mut all = self.of.lock();
        let project = all.entry(self.project.clone()).or_default();
        *project = project.saturating_sub(self.bytes).saturating_add(bytes);
        self.bytes = bytes;
        *project
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut all = self.of.lock();
        if let Some(project) = all.get_mut(&self.project) {
            *project = project.saturating_sub(self.bytes);
            if *project == 0 {
                all.remove(&self.project);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_a_project_add_up_and_go_with_their_uploads() {
        let coming = Coming::default();
        let (mut first, mut second) = (coming.begin("p"), coming.begin("p"));
        let mut other = coming.begin("q");
        assert_eq!((first.is_now(600), other.is_now(5)), (600, 5));
        assert_eq!((second.is_now(300), second.is_now(500)), (900, 1100));
        drop(first);
        assert_eq!(second.is_now(501), 501);
        drop((second, other));
        assert!(coming.lock().is_empty());
    }
}
