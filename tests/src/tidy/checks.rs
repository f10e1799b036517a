//! The checks. Each takes what it looks at and gives back what it found.

use super::rules;
use super::{Finding, Source};

/// Every check of one Rust file.
pub fn source(source: &Source) -> Vec<Finding> {
    [
        module_docs,
        unsafe_outside_its_modules,
        unsafe_without_safety,
        unfinished,
        long_functions,
        long_file,
        allow_without_reason,
        sleeping_tests,
        foreign_notice,
        controller_forbids_unsafe,
    ]
    .iter()
    .flat_map(|check| check(source))
    .collect()
}

fn at(source: &Source, offset: usize, what: impl Into<String>) -> Finding {
    Finding {
        path: source.path.clone(),
        line: source.line_of(offset),
        what: what.into(),
    }
}

fn whole(path: &str, what: impl Into<String>) -> Finding {
    Finding {
        path: path.to_owned(),
        line: 0,
        what: what.into(),
    }
}

/// Nothing stands at the top but what [`rules::TOP_LEVEL`] names.
pub fn top_level(files: &[String]) -> Vec<Finding> {
    let mut names: Vec<&str> = files
        .iter()
        .map(|file| file.split('/').next().unwrap_or(file))
        .collect();
    names.dedup();
    names
        .into_iter()
        .filter(|name| !name.starts_with('.') && !rules::TOP_LEVEL.contains(name))
        .map(|name| whole(name, "stray file or folder at the top of the checkout"))
        .collect()
}

/// Every package takes the workspace's lints; one that is a workspace of its own has `[lints` too.
pub fn manifest(path: &str, text: &str) -> Vec<Finding> {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    if !lines.contains(&"[package]") {
        return Vec::new();
    }
    let own_workspace = lines.iter().any(|line| line.starts_with("[workspace"));
    let fine = if own_workspace {
        lines
            .iter()
            .any(|line| line.starts_with("[lints") || line.starts_with("[workspace.lints"))
    } else {
        lines
            .windows(2)
            .any(|pair| pair == ["[lints]", "workspace = true"])
    };
    if fine {
        Vec::new()
    } else {
        vec![whole(path, "lacks `[lints]` with `workspace = true`")]
    }
}

/// A file begins by saying what it is.
pub fn module_docs(source: &Source) -> Vec<Finding> {
    let first = source
        .text
        .lines()
        .map(str::trim_start)
        .find(|line| !line.is_empty() && !line.starts_with("#!["))
        .unwrap_or_default();
    let words = first.strip_prefix("//!").map(str::trim).unwrap_or_default();
    match words {
        "" | "placeholder" => {
            vec![whole(
                &source.path,
                "does not begin with module docs (`//!`): what it is, owns, must never do",
            )]
        }
        _ => Vec::new(),
    }
}

/// Invariant 8: `unsafe` has an address.
pub fn unsafe_outside_its_modules(source: &Source) -> Vec<Finding> {
    let listed = rules::UNSAFE
        .iter()
        .any(|(address, _)| is_at(&source.path, address));
    if listed {
        return Vec::new();
    }
    source
        .words("unsafe")
        .into_iter()
        .map(|offset| {
            at(
                source,
                offset,
                "`unsafe` outside of its modules (tests/src/tidy/rules.rs lists them)",
            )
        })
        .collect()
}

/// Whether `path` is the file `address`, `address.rs`, or inside of the folder `address`.
fn is_at(path: &str, address: &str) -> bool {
    path.strip_prefix(address)
        .is_some_and(|rest| rest.is_empty() || rest == ".rs" || rest.starts_with('/'))
}

/// Each unsafe block and impl says why it is sound.
pub fn unsafe_without_safety(source: &Source) -> Vec<Finding> {
    let comments: Vec<&str> = source.comments.lines().collect();
    let code: Vec<&str> = source.code.lines().collect();
    source
        .words("unsafe")
        .into_iter()
        .filter(|offset| {
            let next = source.code[offset + "unsafe".len()..].trim_start();
            next.starts_with('{') || next.starts_with("impl")
        })
        .filter(|offset| !explained(&comments, &code, source.line_of(*offset)))
        .map(|offset| {
            at(
                source,
                offset,
                "`unsafe` without a `// SAFETY:` comment just above it",
            )
        })
        .collect()
}

/// A `SAFETY:` comment stands on the line, or above it with nothing but comments, attributes and
/// the head of the same statement in between.
fn explained(comments: &[&str], code: &[&str], line: usize) -> bool {
    let mut index = line - 1;
    loop {
        if comments
            .get(index)
            .is_some_and(|comment| comment.contains("SAFETY:") || comment.contains("SAFETY ("))
        {
            return true;
        }
        let Some(above) = index.checked_sub(1) else {
            return false;
        };
        let ended = code
            .get(above)
            .is_some_and(|line| line.trim_end().ends_with([';', '}', '{']));
        let blank = code.get(above).is_some_and(|line| line.trim().is_empty())
            && comments
                .get(above)
                .is_some_and(|line| line.trim().is_empty());
        let commented = comments
            .get(above)
            .is_some_and(|line| !line.trim().is_empty());
        if (ended && !commented) || blank {
            return false;
        }
        index = above;
    }
}

/// Nothing is left for later, and nothing is left over from debugging.
pub fn unfinished(source: &Source) -> Vec<Finding> {
    rules::UNFINISHED
        .iter()
        .flat_map(|name| {
            source
                .words(name)
                .into_iter()
                .map(move |offset| (name, offset))
        })
        .map(|(name, offset)| {
            at(
                source,
                offset,
                format!("`{name}`: finish it or take it out"),
            )
        })
        .collect()
}

/// A function fits a screen.
pub fn long_functions(source: &Source) -> Vec<Finding> {
    source
        .functions()
        .into_iter()
        .filter(|function| function.lines > rules::FUNCTION_LINES)
        .map(|function| Finding {
            path: source.path.clone(),
            line: function.line,
            what: format!(
                "function `{}` has {} lines; {} are allowed",
                function.name,
                function.lines,
                rules::FUNCTION_LINES
            ),
        })
        .collect()
}

/// A file is one module.
pub fn long_file(source: &Source) -> Vec<Finding> {
    let lines = source.text.lines().count();
    if lines <= rules::FILE_LINES {
        return Vec::new();
    }
    let what = format!(
        "{lines} lines; {} are allowed: which two modules is it?",
        rules::FILE_LINES
    );
    vec![whole(&source.path, what)]
}

/// A lint that is switched off says why.
pub fn allow_without_reason(source: &Source) -> Vec<Finding> {
    ["#[allow", "#![allow", "#[expect", "#![expect"]
        .iter()
        .flat_map(|name| source.code.match_indices(name))
        .filter(|(offset, _)| {
            let attribute = source.code[*offset..].split(']').next().unwrap_or_default();
            !attribute.contains("reason")
        })
        .map(|(offset, name)| {
            at(
                source,
                offset,
                format!("`{name}(…)]` without `reason = \"…\"`"),
            )
        })
        .collect()
}

/// Tests wait for events.
pub fn sleeping_tests(source: &Source) -> Vec<Finding> {
    let regions = source.test_regions();
    let comments: Vec<&str> = source.comments.lines().collect();
    source
        .words("sleep(")
        .into_iter()
        .filter(|offset| regions.iter().any(|region| region.contains(offset)))
        // A clock's own method: in tests that is a simulated clock.
        .filter(|offset| !source.code[..*offset].ends_with('.'))
        .filter(|offset| {
            let line = source.line_of(*offset);
            let from = line.saturating_sub(4);
            !comments[from..line]
                .iter()
                .any(|comment| comment.contains(rules::SLEEP_REASON))
        })
        .map(|offset| {
            let what = format!(
                "a test sleeps: wait for the event, or say `// {} …` above it",
                rules::SLEEP_REASON
            );
            at(source, offset, what)
        })
        .collect()
}

/// Nothing was taken over from elsewhere with its notice.
pub fn foreign_notice(source: &Source) -> Vec<Finding> {
    let named = source
        .comments
        .match_indices("SPDX-License-Identifier:")
        .filter(|(offset, mark)| {
            let line = source.comments[offset + mark.len()..]
                .lines()
                .next()
                .unwrap_or_default();
            line.trim() != rules::LICENCE
        });
    rules::FOREIGN_NOTICES
        .iter()
        .flat_map(|notice| source.comments.match_indices(notice))
        .chain(named)
        .map(|(offset, notice)| {
            at(
                source,
                offset,
                format!("foreign notice or licence: `{notice}`"),
            )
        })
        .collect()
}

/// The controller is safe Rust.
pub fn controller_forbids_unsafe(source: &Source) -> Vec<Finding> {
    let root = matches!(
        source.path.as_str(),
        "controller/src/lib.rs" | "controller/src/main.rs"
    );
    if !root || source.code.contains("#![forbid(unsafe_code)]") {
        return Vec::new();
    }
    vec![whole(&source.path, "lacks `#![forbid(unsafe_code)]`")]
}

#[cfg(test)]
mod tests;
