//! GRUB's configuration: a script, run as far as it takes to know what the default entry loads.
//!
//! GRUB's manual, chapters 6 (configuration) and 16 (commands). Written is nothing: `save_env` does
//! nothing, and so what is meant for one boot only (`next_entry`, of `grub-reboot`) is not followed: it
//! could not be taken back and would hold for ever.

mod block;
mod condition;
mod menu;
mod run;
mod script;
mod search;

use super::Entry;
use crate::disk::{Disk, Fault};
use crate::fs::{Tree, parent};
use run::Run;

/// Runs the configuration at `path`; gives its default entry, or what speaks against it.
pub fn read<'a>(
    disk: &'a Disk<'a>,
    trees: &[Tree<'a>],
    tree: usize,
    path: &str,
) -> Result<Result<Entry, String>, Fault> {
    let Some(place) = trees.get(tree) else {
        return Err(Fault::NotFound);
    };
    let mut run = Run::new(disk, trees);
    let folder = format!("({}){}", place.device, parent(path));
    run.set("root", &place.device);
    run.set("prefix", &folder);
    run.set("config_directory", &folder);
    run.set("cmdpath", &folder);
    let outcome = run
        .source(&format!("({}){path}", place.device))
        .and_then(|()| run.chosen());
    match outcome {
        Ok(entry) => Ok(Ok(entry)),
        Err(run::Stop::Fault(fault)) if fault.ends_the_search() => Err(fault),
        Err(stop) => Ok(Err(stop.to_string())),
    }
}

/// Whether a script is one at all.
#[cfg(test)]
pub(crate) fn parses(text: &str) -> bool {
    script::parse(text, 1 << 20).is_ok()
}
