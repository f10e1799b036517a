//! This machine as an agent would set it, for as long as something is measured.

use std::fs;
use std::io;

/// What an agent changes when it starts; the agents of a bench are told to leave it.
const SWITCH: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Shared memory has huge pages; set back on drop.
pub struct HugePages {
    changed: bool,
}

impl HugePages {
    /// Where that cannot be, it is said, and measured without.
    pub fn advised() -> Self {
        let set = || match fs::read_to_string(SWITCH)?.contains("[never]") {
            true => fs::write(SWITCH, "advise").map(|()| true),
            false => Ok(false),
        };
        let changed = set().unwrap_or_else(|error: io::Error| {
            eprintln!("bench: guests have no huge pages: {SWITCH}: {error}");
            false
        });
        Self { changed }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if self.changed
            && let Err(error) = fs::write(SWITCH, "never")
        {
            eprintln!("bench: {SWITCH} stays advise: {error}");
        }
    }
}
