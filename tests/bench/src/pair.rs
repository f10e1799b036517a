//! A guest that goes from one process to another without a controller: two processes of this program with a machine each,
//! and the agents' own line between them, TCP on loopback with TLS: lent to them where no memory follows, else carried by this
//! process. What is offered goes on at once. So this is what the machines cost by themselves, and what is left of a gap of `migrate` is the
//! owner's part.
//!
//! Once the guest stands still for all that was left (`idle`); once it goes on before its memory, which follows it
//! (`postcopy-512`), beside QEMU's post-copy without TLS. Each round begins with processes of its own. A gap is what it is
//! in `migrate`.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use fractus_agent::machine::line::{self, Way};
use fractus_agent::vm::seal::{self, Connection, Sealed};
use fractus_agent_api::migration::StreamKey;
use fractus_vmm::config::{ConsoleFiles, MachineConfig, MachineFiles};
use fractus_vmm::machine::{self, Landing, Luggage, Machine, Paying, Progress, Sender};
use fractus_vmm::memory::Faults;
use fractus_vmm::stream::converge::{AtLimit, Policy};
use rustix::event::{PollFd, PollFlags};
use serde_json::json;

use crate::figure::{Figure, median};
use crate::migrate::{Line, Peer, qemu};
use crate::process::{Running, probe, ready};

const GUEST_MIB: u64 = 1024;
const PEER: &str = "QEMU tcp";
const PATIENCE: Duration = Duration::from_secs(60);
/// Seconds of the guest's before it goes.
const BEFORE: u64 = 2;
/// Between two looks at how far QEMU is.
const LOOK: Duration = Duration::from_millis(5);

struct Case {
    name: &'static str,
    command_line: &'static str,
    /// Its memory follows it.
    post_copy: bool,
    gap_ms: f64,
}

const CASES: [Case; 2] = [
    Case {
        name: "idle",
        command_line: "tick_ms=0 run=\"touch 900; churn 0\"",
        post_copy: false,
        gap_ms: 5.0,
    },
    Case {
        name: "postcopy-512",
        command_line: "tick_ms=0 run=\"churn 512\"",
        post_copy: true,
        gap_ms: 10.0,
    },
];

pub fn parted(rounds: usize) -> anyhow::Result<Vec<Figure>> {
    // The workspace builds rustls without a default provider. That there is one already is as good.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let folder = tempfile::tempdir()?;
    let mut figures = Vec::new();
    for case in &CASES {
        let (mut our, mut their) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            our.push(ours(case, folder.path(), &runtime)?);
            if case.post_copy {
                their.push(theirs(case, folder.path())?);
            }
        }
        figures.push(Figure {
            name: format!("pair-{}-gap", case.name),
            unit: "ms",
            rounds: our.len(),
            ours: median(our).unwrap_or(f64::NAN),
            peer: median(their).map(|value| (PEER, value)),
            limit: Some(case.gap_ms),
            ratio_limit: None,
        });
    }
    Ok(figures)
}

fn key() -> anyhow::Result<StreamKey> {
    let pair = rcgen::KeyPair::generate()?;
    let made = rcgen::CertificateParams::new(vec!["migration.fractus".to_owned()])?;
    Ok(StreamKey {
        certificate: made.self_signed(&pair)?.pem(),
        key: pair.serialize_pem(),
    })
}

/// A process with a machine, and what is said to it and heard of it; its standard output is its guest's.
struct Leg {
    guest: Running,
    said: String,
    words: BufReader<UnixStream>,
}

impl Leg {
    /// `end` is its end of the line to the other one.
    fn start(role: &str, case: &Case, folder: &Path, end: OwnedFd) -> anyhow::Result<Self> {
        let path = folder.join(role);
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path)?;
        let mut command = Command::new(std::env::current_exe()?);
        let post_copy = case.post_copy.to_string();
        command.args(["--leg", role, &post_copy, case.command_line]);
        let guest = Running::start_on(command.arg(&path), end)?;
        let mut fds = [PollFd::new(&listener, PollFlags::IN)];
        ensure!(ready(&mut fds, PATIENCE)? > 0, "{role} does not begin");
        let (words, _) = listener.accept()?;
        words.set_read_timeout(Some(PATIENCE))?;
        Ok(Self {
            guest,
            said: String::new(),
            words: BufReader::new(words),
        })
    }

    fn tell(&mut self, word: &str) -> anyhow::Result<()> {
        Ok(writeln!(self.words.get_mut(), "{word}")?)
    }

    fn hear(&mut self, word: &str) -> anyhow::Result<()> {
        let mut line = String::new();
        self.words.read_line(&mut line)?;
        ensure!(line.trim_end() == word, "{line:?} for {word:?}");
        Ok(())
    }

    fn line_after(&mut self, second: u64) -> anyhow::Result<Line> {
        let later = |said: &str| Line::last(said).filter(|line| line.second > second);
        self.guest.read_until(&mut self.said, later)
    }
}

/// The longest gap of one that goes.
fn ours(case: &Case, folder: &Path, runtime: &tokio::runtime::Runtime) -> anyhow::Result<f64> {
    let key = key()?;
    let way = match case.post_copy {
        true => Way::Carried,
        false => Way::Lent,
    };
    let listening = line::listen(Ipv4Addr::LOCALHOST.into(), &key, way);
    let line::Awaited {
        port,
        end,
        line: _line,
        others: _others,
    } = runtime.block_on(listening)?;
    let mut there = Leg::start("target", case, folder, end)?;
    let to = format!("{}:{port}", Ipv4Addr::LOCALHOST);
    let (end, _other) = runtime.block_on(async {
        match way {
            Way::Lent => line::connect_lent(&to, &key, false, 0).await,
            Way::Carried => line::connect(&to, &key, false).await,
        }
    })?;
    let mut here = Leg::start("source", case, folder, end)?;
    let now = here.line_after(0)?.second;
    let before = here.line_after(now + BEFORE)?;
    here.tell("send")?;
    here.hear("offered")?;
    there.tell("go")?;
    here.hear("paid")?;
    felt(&before, |second| there.line_after(second))
}

/// The longest gap since `before`, of one that runs there since.
fn felt(
    before: &Line,
    mut line_after: impl FnMut(u64) -> anyhow::Result<Line>,
) -> anyhow::Result<f64> {
    let during = line_after(before.second)?.second;
    let after = line_after(during)?;
    Ok(after.seconds(before.second + 1, after.second)?.0)
}

/// The same of QEMU's.
fn theirs(case: &Case, folder: &Path) -> anyhow::Result<f64> {
    let mut here = Peer::monitored(qemu(GUEST_MIB, case.command_line)?, &folder.join("here"))?;
    let mut command = qemu(GUEST_MIB, case.command_line)?;
    command.args(["-incoming", "defer"]);
    let mut there = Peer::monitored(command, &folder.join("there"))?;
    let able = json!({"capabilities": [{"capability": "postcopy-ram", "state": true}]});
    for peer in [&mut here, &mut there] {
        peer.tell("migrate-set-capabilities", able.clone())?;
    }
    let most = json!({"max-bandwidth": 1_u64 << 40});
    here.tell("migrate-set-parameters", most)?;
    let port = there.awaits()?;
    let now = here.line_after(0)?.second;
    let before = here.line_after(now + BEFORE)?;
    here.tell("migrate", json!({"uri": format!("tcp:127.0.0.1:{port}")}))?;
    let began = Instant::now();
    let mut parts = false;
    loop {
        let info = here.tell("query-migrate", json!({}))?;
        match info["status"].as_str() {
            Some("completed") => break,
            Some("failed" | "cancelled") => bail!("QEMU's migration failed: {info}"),
            _ if began.elapsed() > PATIENCE => bail!("QEMU's migration has no end: {info}"),
            _ => {}
        }
        // All of it once, as ours.
        if !parts && info["ram"]["dirty-sync-count"].as_u64() >= Some(2) {
            here.tell("migrate-start-postcopy", json!({}))?;
            parts = true;
        }
        // sleeps because QEMU is asked about it
        std::thread::sleep(LOOK);
    }
    ensure!(parts, "QEMU's guest went before its memory was to follow");
    felt(&before, |second| there.line_after(second))
}

/// The process of one machine, as [`Leg::start`] begins it.
pub fn leg(mut words: impl Iterator<Item = String>) -> anyhow::Result<()> {
    let mut word = || words.next().context("a word is missing");
    let (role, post_copy, command_line, path) = (word()?, word()?, word()?, word()?);
    let end = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut owner = UnixStream::connect(path)?;
    let post_copy = post_copy == "true";
    match role.as_str() {
        "source" if post_copy => send(by(Connection::plain(end))?, &mut owner, command_line, true),
        "source" => send(by(seal::borrow(end)?)?, &mut owner, command_line, false),
        "target" => receive(end, &mut owner),
        other => bail!("no role {other}"),
    }
}

fn by(connection: Connection) -> anyhow::Result<Sealed<UnixStream>> {
    connection.socket.set_nonblocking(false)?;
    Ok(Sealed::new(connection.socket, connection.keys.as_ref())?)
}

fn files() -> anyhow::Result<MachineFiles> {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    Ok(MachineFiles {
        kvm: OwnedFd::from(kvm),
        kernel: Some(File::open(probe()?)?),
        initrd: None,
        fallback: None,
        disks: Vec::new(),
        serial: ConsoleFiles {
            output: Some(std::io::stdout().as_fd().try_clone_to_owned()?),
            input: None,
        },
        console_ports: Vec::new(),
        nets: Vec::new(),
        vsock: None,
    })
}

/// Serves the machine until the owner says something; false: he is gone.
fn serve(machine: &mut Machine, owner: &mut UnixStream) -> anyhow::Result<bool> {
    loop {
        while machine.next_event().is_some() {}
        let mut fds = [
            PollFd::new(&*owner, PollFlags::IN),
            PollFd::from_borrowed_fd(machine.event_fd(), PollFlags::IN),
        ];
        ready(&mut fds, PATIENCE)?;
        if !fds[0].revents().is_empty() {
            let mut word = String::new();
            return Ok(BufReader::new(owner).read_line(&mut word)? > 0);
        }
    }
}

fn send(
    line: Sealed<UnixStream>,
    owner: &mut UnixStream,
    command_line: String,
    post_copy: bool,
) -> anyhow::Result<()> {
    let mut config = MachineConfig::minimal(GUEST_MIB << 20);
    config.command_line = command_line;
    let mut machine = Machine::build(config, files()?, None)?;
    machine.start()?;
    if !serve(&mut machine, owner)? {
        return Ok(());
    }
    let policy = Policy {
        downtime: Duration::from_millis(if post_copy { 0 } else { 10 }),
        longest: PATIENCE,
        limit: if post_copy { Duration::ZERO } else { PATIENCE },
        at_limit: match post_copy {
            true => AtLimit::PostCopy,
            false => AtLimit::Stop,
        },
        throttle: None,
    };
    let luggage = Luggage {
        owner: Vec::new(),
        disks: false,
    };
    let unsent = |unsent: machine::Unsent| anyhow::Error::from(unsent.error);
    let mut sender = Sender::begin(machine, line, policy, luggage).map_err(unsent)?;
    let mut offer = loop {
        while sender.machine_mut().next_event().is_some() {}
        match sender.advance().map_err(unsent)? {
            Progress::Copying(more) => sender = more,
            Progress::Offered(offer) => break offer,
        }
    };
    writeln!(owner, "offered")?;
    loop {
        match offer.pay()? {
            Paying::More => {}
            Paying::Paid => break,
            Paying::Waits => {
                let mut fds = [PollFd::new(&*offer.connection(), PollFlags::IN)];
                ensure!(ready(&mut fds, PATIENCE)? > 0, "the debt is not paid");
            }
        }
    }
    writeln!(owner, "paid")?;
    // Until it is ended, or whoever began it is.
    std::io::copy(owner, &mut std::io::sink())?;
    Ok(())
}

fn receive(end: UnixStream, owner: &mut UnixStream) -> anyhow::Result<()> {
    end.set_nonblocking(false)?;
    let line = seal::arrival(seal::borrow(end)?)?.main;
    let files = files()?;
    let land = |_: &[u8]| {
        Ok(Landing {
            files,
            most: Vec::new(),
            faults: Some(Faults::open().map_err(|error| error.to_string())?),
        })
    };
    let here = MachineConfig::minimal(GUEST_MIB << 20);
    let mut machine = machine::receive(line, &here, land, None)?.machine;
    if serve(&mut machine, owner)? {
        machine.resume()?;
        serve(&mut machine, owner)?;
    }
    Ok(())
}
