//! QEMU's monitor (QMP: docs/interop/qmp-spec).

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use crate::wire::Lines;

/// Longest wait for an answer; a monitor answers at once unless the machine does very much else.
const ANSWERS: Duration = Duration::from_secs(60);

/// So many of the last are kept.
const EVENTS: usize = 64;

#[derive(Debug)]
pub struct Monitor {
    lines: Lines,
    /// What was said in between, for who asks for it later.
    events: Vec<Value>,
}

impl Monitor {
    /// `alive` says whether there is still a QEMU that can answer.
    pub fn connect(path: &Path, alive: impl FnMut() -> bool) -> Result<Self> {
        let mut monitor = Self {
            lines: Lines::connect(path, ANSWERS, alive)?,
            events: Vec::new(),
        };
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Carries out a command; gives what it returns.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let said = json!({"execute": command, "arguments": arguments});
        self.lines.say(&said.to_string())?;
        let events = &mut self.events;
        let answer = self.lines.until(command, ANSWERS, |line| {
            let value: Value = serde_json::from_str(line).ok()?;
            if value.get("event").is_some() {
                if events.len() == EVENTS {
                    events.remove(0);
                }
                events.push(value);
                return None;
            }
            (value.get("return").is_some() || value.get("error").is_some()).then_some(value)
        })?;
        if let Some(error) = answer.get("error") {
            bail!("QEMU: {command}: {}", error["desc"]);
        }
        Ok(answer["return"].clone())
    }

    /// Whether the machine has reset or powered itself off, and stands still since.
    pub fn has_shut_down(&mut self) -> Result<bool> {
        let status = self.execute("query-status", json!({}))?;
        Ok(status["status"] == "shutdown")
    }

    /// What it says to a command of the human monitor, as text.
    pub fn ask(&mut self, command: &str) -> Result<String> {
        let arguments = json!({"command-line": command});
        let answer = self.execute("human-monitor-command", arguments)?;
        Ok(answer.as_str().unwrap_or_default().replace("\r\n", "\n"))
    }

    /// What was said since the last migration and nobody asked for.
    pub fn events(&self) -> &[Value] {
        &self.events
    }

    /// Waits for a migration, out or in, to end.
    pub fn migration_ends(&mut self, limit: Duration) -> Result<()> {
        let ends = |event: &Value| {
            if event["event"] != "MIGRATION" {
                return None;
            }
            let status = event["data"]["status"].as_str()?;
            matches!(status, "completed" | "failed").then(|| status.to_owned())
        };
        let seen = self.events.iter().find_map(ends);
        self.events.clear();
        let status = match seen {
            Some(status) => status,
            None => self.lines.until("the migration's end", limit, |line| {
                ends(&serde_json::from_str(line).ok()?)
            })?,
        };
        if status == "failed" {
            let why = self.execute("query-migrate", json!({}))?;
            bail!("QEMU: saving or restoring failed: {why}");
        }
        Ok(())
    }
}
