//! What is heard of a process that ends, over a real socket: whether it has read that its guest goes on.

use std::process::Child;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::*;
use crate::paths::Paths;
use crate::vm::packet;

/// A child in a machine's process's place, and its end of the connection.
struct Stage {
    process: HostProcess,
    theirs: Option<OwnedFd>,
    child: Child,
    _folder: tempfile::TempDir,
}

impl Stage {
    fn begin() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let child = std::process::Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "sleep", "600"])
            .spawn();
        let child = child.unwrap();
        let flags = SocketFlags::CLOEXEC;
        let pair = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
        let (ours, theirs) = pair.unwrap();
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::NONBLOCK).unwrap();
        let process = HostProcess {
            identity: ProcessRecord {
                pid: i32::try_from(child.id()).unwrap(),
                start_ticks: 0,
                boot_id: Uuid::nil(),
                ran: false,
                came: None,
                guest: Default::default(),
                held: false,
                holds: 0,
            },
            pidfd: control::watched(pidfd).unwrap(),
            control: Some(Control::new(ours).unwrap()),
            paths: Paths::new(folder.path(), folder.path()).machine(ServerId(Uuid::nil())),
            failure: None,
            goes: false,
            unread: false,
            greeting: None,
            suspends: None,
            sends: None,
            copies: None,
            hands: None,
            follows: false,
            seals: false,
            lanes: false,
        };
        Self {
            process,
            theirs: Some(theirs),
            child,
            _folder: folder,
        }
    }

    async fn tell(&mut self, command: Command) {
        self.process.tell(command, None).await.unwrap();
    }

    fn reads(&self) {
        let theirs = self.theirs.as_ref().unwrap();
        packet::receive::<ToMachine>(theirs).unwrap();
    }

    fn says(&self, detail: &str) {
        let detail = detail.to_owned();
        let theirs = self.theirs.as_ref().unwrap();
        packet::send(theirs, &FromMachine::Refused { detail }, &[]).unwrap();
    }

    fn dies(&mut self) {
        self.theirs = None;
        self.child.kill().unwrap();
    }

    /// All of it, without the end's own detail.
    async fn heard(&mut self) -> Vec<Heard> {
        let mut all = Vec::new();
        loop {
            match self.process.hear().await {
                Heard::Ended(_) => return all,
                heard => all.push(heard),
            }
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn refused(detail: &str) -> Heard {
    Heard::Refused(detail.to_owned())
}

#[tokio::test]
async fn a_go_that_was_not_read_is_told_after_all_that_was_said() {
    let mut stage = Stage::begin();
    stage.tell(Command::Status).await;
    stage.reads();
    stage.tell(Command::Go).await;
    stage.says("one");
    stage.says("two");
    stage.dies();
    let heard = stage.heard().await;
    assert_eq!(heard, [refused("one"), refused("two"), Heard::GoUnread]);
}

#[tokio::test]
async fn a_go_that_was_read_or_may_have_been_is_not_told_of() {
    let mut stage = Stage::begin();
    stage.tell(Command::Go).await;
    stage.reads();
    stage.dies();
    assert_eq!(stage.heard().await, []);
    // What was not read is what came after it.
    let mut stage = Stage::begin();
    stage.tell(Command::Go).await;
    stage.reads();
    stage.tell(Command::Status).await;
    stage.says("one");
    stage.dies();
    assert_eq!(stage.heard().await, [refused("one")]);
    // Neither was, and only the last is known of.
    let mut stage = Stage::begin();
    stage.tell(Command::Go).await;
    stage.tell(Command::Status).await;
    stage.dies();
    assert_eq!(stage.heard().await, []);
    // There was none.
    let mut stage = Stage::begin();
    stage.tell(Command::Status).await;
    stage.dies();
    assert_eq!(stage.heard().await, []);
}

#[tokio::test]
async fn who_tells_a_process_more_once_it_is_gone_does_not_lose_that() {
    let mut stage = Stage::begin();
    stage.tell(Command::Go).await;
    stage.dies();
    let told = stage.process.tell(Command::Status, None).await;
    assert!(matches!(told, Err(ProcessError::Control(_))), "{told:?}");
    assert_eq!(stage.heard().await, [Heard::GoUnread]);
}

#[tokio::test]
async fn one_that_is_ended_by_its_agent_says_so_too() {
    for reads in [false, true] {
        let mut stage = Stage::begin();
        stage.tell(Command::Go).await;
        if reads {
            stage.reads();
        }
        stage.says("one");
        // As the kernel does with the process.
        stage.theirs = None;
        stage.process.kill().await.unwrap();
        assert_eq!(stage.process.go_unread(), !reads);
    }
}
