//! Lets go of the program's own pages that only the start of a machine, or a command, has read.
//!
//! The kernel maps file pages 64 KiB at a time around each one that is touched, so a start leaves 4.5 MB
//! of this binary mapped in a process that needs 1 MB of it from then on. They are clean pages of a
//! file: the page cache keeps them, and what is needed again is mapped again by a minor fault. (A debugger's
//! breakpoints are copies of such pages, and go with them.)

use std::ffi::{c_int, c_void};
use std::time::{Duration, Instant};

/// How long after the last command its pages are let go: a guest's first moments are not to wait.
const REST: Duration = Duration::from_millis(500);

/// When to let go.
#[derive(Debug, Default)]
pub struct Lean {
    at: Option<Instant>,
}

impl Lean {
    /// Code ran that seldom does, as at a start.
    pub fn happened(&mut self) {
        self.at = Some(Instant::now() + REST);
    }

    /// How long until it is time; none: there is nothing to let go.
    pub fn left(&self) -> Option<Duration> {
        let now = Instant::now();
        self.at.map(|at| at.saturating_duration_since(now))
    }

    /// Lets go if it is time.
    pub fn keep(&mut self) {
        if self.left() == Some(Duration::ZERO) {
            self.at = None;
            for segment in &constant_segments() {
                // SAFETY: the range lies within a segment of this program that was mapped privately
                // from its file without PROT_WRITE, so this program has changed no page of it, and what
                // comes back on the next access is what was there. A refusal costs memory only.
                unsafe { libc::madvise(segment.start, segment.length, libc::MADV_DONTNEED) };
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Segment {
    start: *mut c_void,
    length: usize,
}

/// Whole pages of this program's segments that are never written: its code and constants. Constants
/// with addresses in them are not among these: the loader has written those.
fn constant_segments() -> Vec<Segment> {
    let mut found = Vec::new();
    let data = std::ptr::from_mut(&mut found).cast();
    // SAFETY: `first` has the signature that is wanted, and `data` is the vector it expects, which
    // lives until the call returns.
    unsafe { libc::dl_iterate_phdr(Some(first), data) };
    found
}

/// Takes down the segments of the first object, which is the program itself, and ends the walk.
///
/// # Safety
/// `info` is one of `dl_iterate_phdr`, `found` a `Vec<Segment>` that nothing else uses.
unsafe extern "C" fn first(
    info: *mut libc::dl_phdr_info,
    _size: usize,
    found: *mut c_void,
) -> c_int {
    // SAFETY: by this function's contract.
    let (info, found) = unsafe { (&*info, &mut *found.cast::<Vec<Segment>>()) };
    let count = usize::from(info.dlpi_phnum);
    // SAFETY: the loader's table of so many entries, which stays as long as the program does.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, count) };
    let constant = |header: &&libc::Elf64_Phdr| {
        header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0
    };
    for header in headers.iter().filter(constant) {
        let start = (info.dlpi_addr + header.p_vaddr).next_multiple_of(PAGE);
        let end = (info.dlpi_addr + header.p_vaddr + header.p_memsz) / PAGE * PAGE;
        if start < end {
            found.push(Segment {
                start: std::ptr::with_exposed_provenance_mut(start as usize),
                length: (end - start) as usize,
            });
        }
    }
    1
}

const PAGE: u64 = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    /// Resident KiB of this program's code.
    fn resident() -> u64 {
        let program = std::env::current_exe().unwrap();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut of_code = false;
        let mut total = 0;
        for line in smaps.lines() {
            let mut words = line.split_ascii_whitespace();
            match (words.next(), words.next()) {
                (Some("Rss:"), Some(kib)) if of_code => total += kib.parse::<u64>().unwrap(),
                (Some(range), Some(rights)) if range.contains('-') => {
                    of_code = rights == "r-xp" && line.ends_with(program.to_str().unwrap());
                }
                _ => {}
            }
        }
        total
    }

    #[test]
    fn code_is_let_go_once_after_a_rest_and_still_runs() {
        let code = constant_segments();
        for segment in &code {
            // SAFETY: as in `keep`; this only reads ahead.
            let done =
                unsafe { libc::madvise(segment.start, segment.length, libc::MADV_POPULATE_READ) };
            assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        }
        let before = resident();
        let mut lean = Lean::default();
        lean.happened();
        assert!(lean.left().is_some_and(|left| left <= REST));
        lean.at = Some(Instant::now() + Duration::from_secs(3600));
        lean.keep();
        assert!(lean.left().is_some(), "too early");
        lean.at = Some(Instant::now());
        lean.keep();
        let after = resident();
        assert!(after < before / 2, "{before} KiB, then {after}");
        assert_eq!(lean.left(), None);
    }
}
