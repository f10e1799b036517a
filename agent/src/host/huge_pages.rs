//! Huge pages for shared memory, which guests' memory is.
//!
//! A memfd has huge pages only where `shmem_enabled` lets it, and Linux's own default is `never`: each page
//! of 4 KiB that a guest touches is then a fault of its own. `advise` changes nothing for a program that
//! does not ask for them.

use std::fs;
use std::io;
use std::path::Path;

/// Of the host; nothing reads it but the kernel.
pub const SHMEM_ENABLED: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";

/// Lets shared memory have huge pages where a program asks; says whether that was a change. What an operator
/// chose (`deny`, or more than `advise`) stays.
///
/// # Errors
/// There is no such file (a kernel without transparent huge pages), or it cannot be written to.
pub fn advise(switch: &Path) -> io::Result<bool> {
    let change = chosen(&fs::read_to_string(switch)?) == Some("never");
    if change {
        fs::write(switch, "advise")?;
    }
    Ok(change)
}

/// Whether machines get them; why not, if they do not.
pub fn look(switch: &Path) -> Result<(), String> {
    let text = fs::read_to_string(switch).map_err(|e| e.to_string())?;
    match chosen(&text) {
        Some(no @ ("never" | "deny")) => Err(format!("shmem_enabled is {no}")),
        _ => Ok(()),
    }
}

/// Of the words in such a file the one in brackets.
fn chosen(text: &str) -> Option<&str> {
    text.split_whitespace()
        .find_map(|word| word.strip_prefix('[')?.strip_suffix(']'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn switch(chosen: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let words = ["always", "within_size", "advise", "never", "deny", "force"];
        let text = words.map(|word| match word == chosen {
            true => format!("[{word}]"),
            false => word.to_owned(),
        });
        fs::write(&file, text.join(" ") + "\n").unwrap();
        file
    }

    #[test]
    fn only_the_default_is_changed() {
        let file = switch("never");
        assert_eq!(look(file.path()), Err("shmem_enabled is never".to_owned()));
        assert!(advise(file.path()).unwrap());
        assert_eq!(fs::read_to_string(&file).unwrap(), "advise");
        for kept in ["always", "within_size", "advise", "deny", "force"] {
            let file = switch(kept);
            let before = fs::read_to_string(&file).unwrap();
            assert!(!advise(file.path()).unwrap());
            assert_eq!(fs::read_to_string(&file).unwrap(), before);
            assert_eq!(look(file.path()).is_ok(), kept != "deny", "{kept}");
        }
        assert!(advise(Path::new("/nowhere/shmem_enabled")).is_err());
    }
}
