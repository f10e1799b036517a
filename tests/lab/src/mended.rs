//! QEMU with one fault mended, which breaks guests of its hosts.
//!
//! VMRUN with an interrupt to be injected delivers it, and leaves its vector in `exception_index` all the same
//! (`helper_vmrun` in target/i386/tcg/system/svm_helper.c; 11.1 still has it, as has 7.2). If the processor's thread is
//! then kicked before the guest exits, and nothing is there that the guest would have to exit for, the loop that runs
//! it takes the vector for an exception that is due (`cpu_handle_interrupt` and `cpu_handle_exception` in
//! accel/tcg/cpu-exec.c): the guest has the same interrupt once more, within its handler, where interrupts are off.
//! Within the first instructions of the handler Linux panics; within a lock it waits for itself for ever.
//!
//! A kick without an interrupt is a matter of nanoseconds and came once in some hundred boots. With two thousand kicks a
//! second (the monitor's `stop` and `cont`) a guest that spins in its user space is lost within seconds:
//! `host_gives_a_guest_each_interrupt_once_however_often_it_is_kicked` in the tests.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::debian::{Tree, cache, used};

/// A byte, or any.
type Pattern = [Option<u8>];

/// `mov %esi, exception_index(%rbx)`: the store that is one too many.
const STORE: usize = 6;
const NOTHING: [u8; STORE] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];

/// The program, mended; made if it is not there. Where the fault is not found (another build of it, or its authors have
/// mended it), the program as it is: then the test named above says whether it has it.
pub fn program(package: &Tree) -> Result<PathBuf> {
    let mended = cache()?.join(format!("qemu-{}", &hash(package)?[..16]));
    if !mended.exists() {
        let original = package.path("usr/bin/qemu-system-x86_64");
        let mut program = fs::read(original).context("reading QEMU")?;
        match only(&program, &pattern()) {
            Some(at) => program
                .get_mut(at..at + STORE)
                .context("a store past the program's end")?
                .copy_from_slice(&NOTHING),
            None => eprintln!("QEMU is not mended: not a build that is known"),
        }
        write(&mended, &program)?;
    }
    used("qemu-", &mended)?;
    Ok(mended)
}

/// Of what the program is made from, for the names of what is kept of it.
pub fn hash(package: &Tree) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(package.versions()?.as_bytes());
    hasher.update(include_bytes!("mended.rs"));
    Ok(hasher.finalize().to_hex().to_string())
}

/// Whole or not at all, whoever else makes it.
fn write(path: &Path, program: &[u8]) -> Result<()> {
    let folder = path.parent().context("a cache without a folder")?;
    let mut new = tempfile::NamedTempFile::new_in(folder)?;
    std::io::Write::write_all(&mut new, program)?;
    new.as_file()
        .set_permissions(fs::Permissions::from_mode(0o755))?;
    new.persist(path)?;
    Ok(())
}

/// The case of an interrupt in `helper_vmrun`, from the store to the call that delivers it.
fn pattern() -> Vec<Option<u8>> {
    const TEXT: &str = "89 b3 .. .. .. .. \
        c7 83 .. .. 00 00 00 00 00 00 \
        48 c7 83 .. .. 00 00 ff ff ff ff \
        f6 05 .. .. .. .. 02 0f 85 .. .. .. .. \
        ba 01 00 00 00 48 89 df e8";
    let bytes = TEXT.split_ascii_whitespace();
    bytes
        .map(|byte| u8::from_str_radix(byte, 16).ok())
        .collect()
}

/// Where it is, if it is there once.
fn only(program: &[u8], pattern: &Pattern) -> Option<usize> {
    let fits = |window: &[u8]| {
        let mut both = window.iter().zip(pattern);
        both.all(|(byte, wanted)| wanted.is_none_or(|wanted| wanted == *byte))
    };
    let windows = program.windows(pattern.len()).enumerate();
    let mut found = windows.filter(|(_, window)| fits(window));
    let (at, _) = found.next()?;
    found.next().is_none().then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_is_found_if_it_is_there_once() {
        let pattern = [Some(1), None, Some(3)];
        assert_eq!(only(&[0, 1, 9, 3, 4], &pattern), Some(1));
        assert_eq!(only(&[1, 9, 3, 1, 8, 3], &pattern), None);
        assert_eq!(only(&[1, 2], &pattern), None);
    }

    #[test]
    fn what_is_taken_out_is_one_instruction() {
        let store = [Some(0x89), Some(0xb3), None, None, None, None];
        assert_eq!(pattern()[..STORE], store);
    }
}
