//! A flavor: what a server gets.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::cpu::{CpuMode, EXTRA_SPEC};

/// Extra specs in the order of their keys.
pub type ExtraSpecs = BTreeMap<String, String>;

/// The flavor as a server keeps it: what it was when the server was made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FlavorSnapshot {
    pub id: String,
    pub name: String,
    pub vcpus: u32,
    /// MiB.
    pub ram: u64,
    /// GiB; 0: as large as the image.
    pub disk: u64,
    /// GiB.
    pub ephemeral: u64,
    /// MiB.
    pub swap: u64,
    #[serde(default)]
    pub extra_specs: ExtraSpecs,
}

/// Whether its servers may go on at another host before all of their memory is there, in a live migration.
pub const POST_COPY: &str = "hw:live_migration_post_copy";

/// Whether its servers' guests may be slowed down in a live migration, so that it catches up with them.
pub const AUTO_CONVERGE: &str = "hw:live_migration_auto_converge";

impl FlavorSnapshot {
    /// What it says by an extra spec of `true` or `false`; none: nothing. What is no clear yes, as one that was given before
    /// values were checked may be, is a no.
    pub fn allows(&self, spec: &str) -> Option<bool> {
        let word = self.extra_specs.get(spec)?;
        Some(word.eq_ignore_ascii_case("true"))
    }
}

/// Whether an extra spec's value is one that the compute API knows (checked from 2.86); keys outside
/// the known name spaces are the operator's own.
pub fn validate_extra_spec(key: &str, value: &str) -> Result<(), String> {
    let allowed: &[&str] = match key {
        EXTRA_SPEC => &CpuMode::NAMES,
        POST_COPY | AUTO_CONVERGE => &["true", "false"],
        "hw:cpu_policy" => &["dedicated", "shared", "mixed"],
        "hw:cpu_thread_policy" => &["prefer", "isolate", "require"],
        "hw:emulator_threads_policy" => &["isolate", "share"],
        "hw:mem_page_size" => {
            let fits = matches!(value, "large" | "small" | "any")
                || value
                    .trim_end_matches(|l: char| l.is_ascii_alphabetic())
                    .parse::<u64>()
                    .is_ok();
            return if fits {
                Ok(())
            } else {
                Err(format!(
                    "Validation failed; '{value}' does not match \
                     '^(large|small|any|\\d+([kKMGT]i?)?(b|bit|B)?)$'."
                ))
            };
        }
        "hw:numa_nodes" => {
            return match value.parse::<u32>() {
                Ok(nodes) if nodes >= 1 => Ok(()),
                Ok(nodes) => Err(format!(
                    "Validation failed; '{nodes}' is less than the minimum of 1."
                )),
                Err(_) => Err(format!("Validation failed; '{value}' is not an integer.")),
            };
        }
        _ => return Ok(()),
    };
    if allowed.contains(&value) {
        return Ok(());
    }
    Err(format!(
        "Validation failed; '{value}' is not one of: {}.",
        allowed.join(", ")
    ))
}

/// The page size that `hw:mem_page_size` asks for.
pub fn pages(specs: &ExtraSpecs) -> fractus_agent_api::machine::Pages {
    use fractus_agent_api::machine::Pages;
    match specs.get("hw:mem_page_size").map(String::as_str) {
        Some("small" | "4" | "4KB" | "4KiB") => Pages::Small,
        Some("large" | "2048" | "2MB" | "2MiB") => Pages::Huge2MiB,
        Some("1048576" | "1GB" | "1GiB") => Pages::Huge1GiB,
        _ => Pages::Transparent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_extra_specs_are_checked_and_others_are_not() {
        assert_eq!(
            validate_extra_spec("hw:cpu_policy", "bogus").unwrap_err(),
            "Validation failed; 'bogus' is not one of: dedicated, shared, mixed."
        );
        assert_eq!(validate_extra_spec("foo:bar", "anything"), Ok(()));
        assert_eq!(validate_extra_spec("hw:mem_page_size", "2MB"), Ok(()));
        assert!(validate_extra_spec("hw:mem_page_size", "huge").is_err());
    }
}
