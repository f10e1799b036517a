//! Which process is which: pid, start time and boot id together are never given twice.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use rustix::process::{
    Pid, PidfdFlags, Resource, Rlimit, Signal, WaitId, WaitIdOptions, pidfd_open, prlimit, waitid,
};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::machine::record::ProcessRecord;

/// The host's current boot.
pub fn boot_id() -> io::Result<Uuid> {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Uuid::try_parse(text.trim()).map_err(io::Error::other)
}

/// Clock ticks after boot at which a process started (proc(5): field 22 of /proc/PID/stat).
pub fn start_ticks(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is a name that may hold anything, brackets too.
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks = after_name
        .split_ascii_whitespace()
        .nth(19)
        .and_then(|ticks| ticks.parse().ok());
    ticks.ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is not as expected")))
}

/// The recorded process, if it is alive: a descriptor that can mean no other. `None` only when it is
/// gone for certain.
///
/// # Errors
/// It cannot be told (out of descriptors or of memory, say): it may well be alive.
pub fn find(recorded: &ProcessRecord, boot: Uuid) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = Pid::from_raw(recorded.pid).filter(|_| recorded.boot_id == boot) else {
        return Ok(None);
    };
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    // Read after the descriptor is held: if the pid was given anew in between, this shows it.
    match start_ticks(recorded.pid) {
        Ok(ticks) if ticks == recorded.start_ticks && !ended(&pidfd) => Ok(Some(pidfd)),
        Ok(_) => Ok(None),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What /proc says of a process that ended: no folder, or ESRCH from a file that was open by then.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// The user that a process runs as (proc(5), `Uid:` of its status). The owner of its folder in /proc
/// says nothing: it is root's, because the jail was entered after the exec.
pub fn user(pid: i32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// A program's file, which is its own for as long as something runs it: an upgrade puts another in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    device: u64,
    inode: u64,
}

/// Of a process that lives.
pub fn program(pid: i32) -> io::Result<Program> {
    let file = fs::metadata(format!("/proc/{pid}/exe"))?;
    Ok(Program {
        device: file.dev(),
        inode: file.ino(),
    })
}

pub fn program_of(file: impl AsFd) -> io::Result<Program> {
    let file = rustix::fs::fstat(file)?;
    Ok(Program {
        device: file.st_dev,
        inode: file.st_ino,
    })
}

/// Whether the process has ended (a zombie has).
pub fn ended(pidfd: &OwnedFd) -> bool {
    let mut polled = [rustix::event::PollFd::new(
        pidfd,
        rustix::event::PollFlags::IN,
    )];
    let now = rustix::time::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(rustix::event::poll(&mut polled, Some(&now)), Ok(1..))
}

/// Lets a process that lives write files of up to so many bytes (RLIMIT_FSIZE), if it may not yet.
///
/// # Errors
/// EPERM without CAP_SYS_RESOURCE: the process is another user's.
pub fn let_write(process: &ProcessRecord, bytes: u64) -> io::Result<()> {
    let limits = fs::read_to_string(format!("/proc/{}/limits", process.pid))?;
    if file_size_limit(&limits).is_none_or(|limit| limit >= bytes) {
        return Ok(());
    }
    let most = Rlimit {
        current: Some(bytes),
        maximum: Some(bytes),
    };
    prlimit(Pid::from_raw(process.pid), Resource::Fsize, most)?;
    Ok(())
}

/// The largest file that a process which lives may write; 0: there is no limit, or none is known.
pub fn may_write(process: &ProcessRecord) -> io::Result<u64> {
    let limits = fs::read_to_string(format!("/proc/{}/limits", process.pid))?;
    Ok(file_size_limit(&limits).unwrap_or(0))
}

/// Bytes, of /proc/PID/limits (proc(5)); none: there is no limit.
fn file_size_limit(limits: &str) -> Option<u64> {
    let mut lines = limits.lines();
    let line = lines.find_map(|line| line.strip_prefix("Max file size"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

pub fn kill(pidfd: &OwnedFd) -> io::Result<()> {
    match rustix::process::pidfd_send_signal(pidfd, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Takes the exit status of an ended child, so that it does not stay as a zombie. `None` when it is
/// no child of ours (it was started by an earlier agent).
pub fn reap(pidfd: &OwnedFd) -> Option<String> {
    let status = waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED).ok()??;
    if let Some(code) = status.exit_status() {
        return Some(format!("exit status {code}"));
    }
    let signal = status.terminating_signal()?;
    Some(match signal {
        9 => "killed (signal 9)".to_owned(),
        31 => "forbidden system call (signal 31)".to_owned(),
        other => format!("signal {other}"),
    })
}

/// A process of this host that runs a machine for the agent whose state folder has this mark.
#[derive(Debug)]
pub struct Marked {
    pub pid: i32,
    pub machine: Uuid,
    pub pidfd: OwnedFd,
}

/// Looks through /proc for processes started as `fractus-agent vm ID MARK`.
pub fn marked(mark: Uuid) -> io::Result<Vec<Marked>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Some(pid) = entry?
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        let Some(pidfd) =
            Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
        else {
            continue;
        };
        let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else {
            continue;
        };
        let arguments: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
        let [_, subcommand, machine, theirs, ..] = arguments.as_slice() else {
            continue;
        };
        let theirs = Uuid::try_parse_ascii(theirs);
        if *subcommand != crate::vm::SUBCOMMAND.as_bytes() || theirs != Ok(mark) {
            continue;
        }
        if let Ok(machine) = Uuid::try_parse_ascii(machine) {
            found.push(Marked {
                pid,
                machine,
                pidfd,
            });
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_files_is_read_as_the_kernel_writes_it() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max cpu time              unlimited            unlimited            seconds   \n\
                    Max file size             67108864             67108864             bytes     \n";
        assert_eq!(file_size_limit(text), Some(64 << 20));
        assert_eq!(
            file_size_limit(&text.replace("67108864", "unlimited")),
            None
        );
    }

    #[test]
    fn our_own_process_is_found_by_its_identity_and_by_no_other() {
        let boot = boot_id().unwrap();
        let pid = std::process::id() as i32;
        let own = ProcessRecord {
            pid,
            start_ticks: start_ticks(pid).unwrap(),
            boot_id: boot,
            ran: true,
            came: None,
            guest: Default::default(),
            held: false,
            holds: 0,
        };
        assert!(find(&own, boot).unwrap().is_some());
        let reused = ProcessRecord {
            start_ticks: own.start_ticks + 1,
            ..own
        };
        assert!(find(&reused, boot).unwrap().is_none());
        let rebooted = ProcessRecord {
            boot_id: Uuid::from_u128(1),
            ..own
        };
        assert!(find(&rebooted, boot).unwrap().is_none());
    }

    #[test]
    fn only_what_is_gone_for_certain_counts_as_gone() {
        assert!(is_gone(&start_ticks(i32::MAX).unwrap_err()));
        assert!(is_gone(&io::Error::from_raw_os_error(libc::ESRCH)));
        for unsure in [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EINTR] {
            assert!(!is_gone(&io::Error::from_raw_os_error(unsure)));
        }
    }

    #[test]
    fn the_user_of_a_process_is_the_one_it_runs_as() {
        let own = rustix::process::getuid().as_raw();
        assert_eq!(user(std::process::id() as i32), Some(own));
    }
}
