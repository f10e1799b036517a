//! Programs of the initial file system.

use std::process::{Command, Stdio};

/// Runs a program; what it said is in the error, or given back.
pub fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let failed = |what: String| format!("{program} {}: {what}", arguments.first().unwrap_or(&""));
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        // There is no udev: libdevmapper makes its nodes itself, and nobody waits for another.
        .env("DM_DISABLE_UDEV", "1")
        .env("PATH", "/sbin:/bin")
        .output()
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(format!("{} ({})", said.trim(), output.status)));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Loads a kernel module, with what it needs; `arguments` are its name and its parameters.
pub fn modprobe(arguments: &[&str]) -> Result<(), String> {
    run("/sbin/modprobe", arguments).map(drop)
}
