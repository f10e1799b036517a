//! A guest's sockets (virtio-vsock): the probe on KVM, in its jail, and programs of the host that come to
//! the socket in its machine's folder. Passes with a note where there is no KVM.

#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::machine::Machine;
use common::*;
use fractus_agent::machine::process::identity;
use fractus_agent_api::machine::{Power, ServerId};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use rustix::thread::{Gid, Uid, set_thread_res_gid, set_thread_res_uid};

/// The probe's port that echoes.
const ECHO: u32 = 7;

fn path(agent: &Agent, id: ServerId) -> PathBuf {
    agent.machine_folder(id).join("vsock.sock")
}

fn visit(path: &Path, wish: &str) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    writeln!(stream, "{wish}")?;
    Ok(stream)
}

/// The port that the answer names.
fn answer(stream: &mut UnixStream) -> Result<u32> {
    let mut line = String::new();
    while !line.ends_with('\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.push(char::from(byte[0]));
    }
    let port = line.trim_end().strip_prefix("OK ");
    Ok(port.unwrap_or_default().parse()?)
}

fn connect(path: &Path) -> Result<UnixStream> {
    let mut stream = visit(path, &format!("CONNECT {ECHO}"))?;
    answer(&mut stream)?;
    Ok(stream)
}

fn echoes(stream: &mut UnixStream, length: usize) -> Result {
    let data: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
    let (mut sender, sent) = (stream.try_clone()?, data.clone());
    let sender = std::thread::spawn(move || sender.write_all(&sent));
    let mut back = vec![0; length];
    stream.read_exact(&mut back)?;
    anyhow::ensure!(back == data, "the echo is damaged");
    sender.join().unwrap()?;
    Ok(())
}

/// What the guest knows of its sockets: its context id.
async fn cid(machine: &Machine<'_>) -> Result<u32> {
    let answer = machine.asks("vsock").await?;
    let cid = answer.split(' ').find_map(|word| word.strip_prefix("cid="));
    Ok(cid.unwrap_or_default().parse()?)
}

#[test]
fn programs_of_the_host_and_a_jailed_guest_speak_whatever_becomes_of_the_agent() -> Result {
    let Some(probe) = probe() else {
        println!("no /dev/kvm: nothing was tested");
        return Ok(());
    };
    block_on(async {
        let (_cloud, mut agent, kernel) = start(&probe, false).await?;
        let machine = Machine::start(&agent, &kernel).await?;
        let (id, mut wanted) = (machine.id, machine.wanted.clone());
        ticks(&agent, id).await?;
        let path = path(&agent, id);
        let metadata = std::fs::metadata(&path)?;
        assert!(metadata.file_type().is_socket());
        let rights = (metadata.uid(), metadata.permissions().mode() & 0o777);
        assert_eq!(rights, (0, 0o600), "root's alone");

        let mut to_guest = connect(&path)?;
        echoes(&mut to_guest, 300_000)?;
        let mut from_guest = visit(&path, "ACCEPT 5000")?;
        machine.asks("vsock connect 5000").await?;
        answer(&mut from_guest)?;
        echoes(&mut from_guest, 300_000)?;
        let first = cid(&machine).await?;
        let other = Machine::start(&agent, &kernel).await?;
        ticks(&agent, other.id).await?;
        assert_ne!(cid(&other).await?, first);

        // The agent has no part in it.
        agent.kill();
        echoes(&mut to_guest, 1000)?;
        echoes(&mut from_guest, 1000)?;
        agent.run().await?;
        agent.settled(id, 1, is_running).await?;
        echoes(&mut to_guest, 1000)?;
        echoes(&mut connect(&path)?, 1000)?;

        // What a process that was killed has left is in nobody's way.
        let pid = Pid::from_raw(agent.processes(id)[0]).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
        wanted.hard_reboots += 1;
        agent.put(id, &put(2, wanted.clone())).await?;
        let again = |report: &_| is_running(report) && report.starts == 2;
        agent.settled(id, 2, again).await?;
        boots(&agent, id, 2).await?;
        ticks(&agent, id).await?;
        let mut rest = Vec::new();
        let _ = to_guest.read_to_end(&mut rest);
        assert_eq!(rest, b"", "of another guest");
        echoes(&mut connect(&path)?, 1000)?;
        let machine = Machine {
            agent: &agent,
            id,
            wanted: wanted.clone(),
            revision: 2,
        };
        assert_eq!(cid(&machine).await?, first);

        wanted.power = Power::Absent;
        agent.put(id, &put(3, wanted)).await?;
        agent.settled(id, 3, is_absent).await?;
        assert_eq!(agent.leftovers(id), Vec::<String>::new());
        Ok(())
    })
}

/// How often the thread that serves a machine's sockets has gone to sleep.
fn naps(pid: i32) -> Result<u64> {
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?.path();
        if !std::fs::read_to_string(thread.join("comm"))?.starts_with("vsock") {
            continue;
        }
        let status = std::fs::read_to_string(thread.join("status"))?;
        let mut lines = status.lines();
        let count = lines.find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        return Ok(count.unwrap_or_default().trim().parse()?);
    }
    anyhow::bail!("there is no such thread");
}

/// Lets a machine's process have descriptors below this number only: the limit that it had. Its own user may
/// do that, who needs no privilege for it.
fn limit(pid: i32, below: Option<u64>) -> Result<Option<u64>> {
    let user = identity::user(pid).unwrap();
    let limited = std::thread::spawn(move || {
        let (user, group) = (Uid::from_raw(user), Gid::from_raw(user));
        set_thread_res_gid(group, group, group)?;
        set_thread_res_uid(user, user, user)?;
        let (process, what) = (Pid::from_raw(pid), Resource::Nofile);
        let text = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
        let line = text.lines().find(|line| line.starts_with("Max open files"));
        let hard = line.and_then(|line| line.split_whitespace().nth(4)?.parse().ok());
        let limit = Rlimit {
            current: below,
            maximum: hard,
        };
        Ok(prlimit(process, what, limit)?.current)
    });
    limited.join().unwrap()
}

#[test]
fn a_machine_without_a_free_descriptor_lets_programs_in_once_it_has_one() -> Result {
    let Some(probe) = probe() else {
        println!("no /dev/kvm: nothing was tested");
        return Ok(());
    };
    block_on(async {
        let (_cloud, agent, kernel) = start(&probe, false).await?;
        let id = running(&agent, &kernel).await?;
        ticks(&agent, id).await?;
        let path = path(&agent, id);
        let pid = agent.processes(id)[0];
        let open = |number: &u64| Path::new(&format!("/proc/{pid}/fd/{number}")).exists();
        let lowest = (0..).find(|number| !open(number));
        let usual = limit(pid, lowest)?;

        let before = naps(pid)?;
        let mut stream = visit(&path, &format!("CONNECT {ECHO}"))?;
        // It tries, waits, tries again; one that spins does not sleep.
        let by = Instant::now() + PATIENCE;
        while naps(pid)? < before + 3 {
            anyhow::ensure!(Instant::now() < by, "its thread does not rest");
            // sleeps because the kernel's counts are looked at, and do not call.
            std::thread::sleep(Duration::from_millis(10));
        }
        stream.set_nonblocking(true)?;
        let unheard = stream.read(&mut [0]).unwrap_err();
        assert_eq!(unheard.kind(), std::io::ErrorKind::WouldBlock);
        stream.set_nonblocking(false)?;

        limit(pid, usual)?;
        answer(&mut stream)?;
        echoes(&mut stream, 1000)?;
        Ok(())
    })
}
