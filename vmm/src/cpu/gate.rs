//! Counts vCPUs in and out: who waits for all of them waits here.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Shared by all vCPUs of a machine.
#[derive(Default)]
pub struct Gate {
    /// vCPUs that were told to run and have not come to rest.
    running: Mutex<usize>,
    at_rest: Condvar,
    /// vCPUs that were told to run and have not entered KVM_RUN yet.
    to_enter: AtomicUsize,
}

impl Gate {
    /// `count` vCPUs are about to be told to run.
    pub fn open(&self, count: usize) {
        self.to_enter.store(count, Ordering::Release);
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) += count;
    }

    /// One more is about to run, while others do; nobody counts it in.
    pub fn join(&self) {
        *self.running.lock().unwrap_or_else(PoisonError::into_inner) += 1;
    }

    /// One is about to enter; true for the last of them.
    pub fn enter(&self) -> bool {
        self.to_enter.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// One has come to rest.
    pub fn leave(&self) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        *running = running.saturating_sub(1);
        self.at_rest.notify_all();
    }

    /// Waits until none runs; false when `patience` is over before.
    pub fn wait(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        while *running > 0 {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            running = match self.at_rest.wait_timeout(running, left) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        true
    }
}
