//! The clients that a user has: `openstack`, unmodified from PyPI, and `fractus`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

use super::{Cloud, program};
use crate::tidy::checkout;

/// One of them, as the cloud's first administrator runs it.
pub struct Cli {
    path: PathBuf,
    environment: Vec<(&'static str, String)>,
}

impl Cli {
    pub fn openstack(cloud: &Cloud) -> Self {
        let output = Command::new(checkout().join("scripts/python-env"))
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let folder = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
        Self {
            path: folder.join("bin/openstack"),
            environment: cloud.environment(),
        }
    }

    pub fn fractus(cloud: &Cloud) -> Self {
        Self {
            path: program("fractus").unwrap(),
            environment: cloud.environment(),
        }
    }

    pub fn run(&self, line: &str) -> Output {
        Command::new(&self.path)
            .args(line.split_whitespace())
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", "/nonexistent")
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .output()
            .unwrap()
    }

    /// Runs a command that must succeed.
    pub fn done(&self, line: &str) -> String {
        let output = self.run(line);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{} {line}: {}\n{errors}",
            self.path.display(),
            output.status
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Its answer as JSON.
    pub fn json(&self, line: &str) -> Value {
        serde_json::from_str(&self.done(&format!("{line} -f json"))).unwrap()
    }
}
