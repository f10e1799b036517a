//! What long runs counted, in a file that is checked in: `FRACTUS_LAB_REPORT` names it. Each run writes
//! the section of its own, and leaves the others.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use fractus_tests::tidy::checkout;

use crate::qemu;

const HEAD: &str = "# What the lab's long runs counted

Written by `scripts/test --full`, a section by each test that counts. Hosts are QEMU in software with a real
`kvm_amd`: what is counted holds, what is timed says little about hardware.
";

/// A run that counts attempts, each of which succeeds or fails by itself.
#[derive(Debug)]
pub struct Count {
    title: String,
    began: Instant,
    took: Vec<Duration>,
    failures: Vec<String>,
}

impl Count {
    pub fn new(title: &str) -> Self {
        Self {
            title: title.to_owned(),
            began: Instant::now(),
            took: Vec::new(),
            failures: Vec::new(),
        }
    }

    pub fn attempted(&self) -> usize {
        self.took.len() + self.failures.len()
    }

    pub fn has_failed(&self) -> bool {
        !self.failures.is_empty()
    }

    pub fn succeeded(&mut self, took: Duration) {
        self.took.push(took);
        println!("{}: {} done", self.title, self.attempted());
    }

    pub fn failed(&mut self, why: &str) {
        println!(
            "{}: attempt {} failed: {why}",
            self.title,
            self.attempted() + 1
        );
        self.failures.push(why.to_owned());
    }

    /// Writes its section, and says what failed.
    pub fn finish(mut self) -> Result<Vec<String>> {
        self.took.sort();
        let mut text = format!(
            "{} attempts, {} succeeded, {} failed; {:.0} s in all.\n",
            self.attempted(),
            self.took.len(),
            self.failures.len(),
            self.began.elapsed().as_secs_f64()
        );
        if let (Some(first), Some(last)) = (self.took.first(), self.took.last()) {
            let middle = self.took.get(self.took.len() / 2).unwrap_or(last);
            let [first, middle, last] = [first, middle, last].map(Duration::as_secs_f64);
            writeln!(
                text,
                "Each took {middle:.1} s (median), {first:.1} to {last:.1} s."
            )?;
        }
        for failure in &self.failures {
            let line = failure.lines().next().unwrap_or_default();
            writeln!(text, "- failed: {line}")?;
        }
        section(&self.title, &text)?;
        Ok(self.failures)
    }
}

/// Prints a section, and writes it where the environment says, in place of the one of this title.
pub fn section(title: &str, text: &str) -> Result<()> {
    let text = format!("{}\n\n{}\n", text.trim_end(), circumstances()?);
    println!("## {title}\n\n{text}");
    let Some(file) = std::env::var_os("FRACTUS_LAB_REPORT") else {
        return Ok(());
    };
    let file = checkout().join(Path::new(&file));
    let before = std::fs::read_to_string(&file).unwrap_or_default();
    std::fs::write(&file, with_section(&before, title, &text))
        .with_context(|| format!("writing {}", file.display()))
}

fn with_section(before: &str, title: &str, text: &str) -> String {
    let sections = before.split("\n## ").skip(1);
    let mut sections: BTreeMap<&str, &str> = sections
        .filter_map(|section| section.split_once('\n'))
        .collect();
    sections.insert(title, text);
    let mut after = HEAD.to_owned();
    for (title, text) in sections {
        after.push_str(&format!("\n## {title}\n\n{}\n", text.trim()));
    }
    after
}

/// Of what, when and where.
fn circumstances() -> Result<String> {
    let said = |program: &str, arguments: &[&str]| -> Result<String> {
        let output = Command::new(program)
            .args(arguments)
            .current_dir(checkout())
            .output()
            .with_context(|| format!("running {program}"))?;
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let versions = qemu::package()?.versions()?;
    let mut versions = versions.lines().filter_map(|line| line.split_once('\t'));
    let qemu = versions.find(|(name, _)| *name == "qemu-system-x86");
    let load = std::fs::read_to_string("/proc/loadavg")?;
    Ok(format!(
        "{}, revision {}, QEMU {}, {} cores, load {} at the end.",
        said("date", &["-u", "+%Y-%m-%d %H:%M UTC"])?,
        said("git", &["describe", "--always", "--dirty", "--abbrev=10"])?,
        qemu.map_or("unknown", |(_, version)| version),
        std::thread::available_parallelism()?,
        load.split(' ').next().unwrap_or_default()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_takes_the_place_of_the_one_before_and_leaves_the_others() {
        let one = with_section("", "b", "first\n\nlines");
        let two = with_section(&one, "a", "other");
        let three = with_section(&two, "b", "second");
        assert_eq!(three, format!("{HEAD}\n## a\n\nother\n\n## b\n\nsecond\n"));
    }
}
