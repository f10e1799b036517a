//! This machine as an agent would set it, for as long as something is measured.

use std::fs;
use std::path::Path;

use anyhow::Context;

/// What an agent changes when it starts; the agents of a bench are told to leave it.
const SWITCH: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Shared memory has huge pages; set back on drop.
pub struct HugePages {
    changed: bool,
}

impl HugePages {
    pub fn advised() -> anyhow::Result<Self> {
        let changed = Path::new(SWITCH).exists()
            && fs::read_to_string(SWITCH)
                .context(SWITCH)?
                .contains("[never]");
        if changed {
            fs::write(SWITCH, "advise").context(SWITCH)?;
        }
        Ok(Self { changed })
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
