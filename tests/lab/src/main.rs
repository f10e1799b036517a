//! `fractus-lab`: a lab for a person. See `scripts/lab`.

mod console;
mod forward;

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use fractus_lab::{Kind, Lab, Options, TinyGuest, run};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
#[command(about = "Hosts with a real kvm_amd, in software")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a lab until this process ends; prints its environment and then `ready`
    Up(Up),
    /// Attach to a host's serial line
    Console { socket: PathBuf },
    /// Run a script on a host; only inside the lab's network
    Run { host: SocketAddr, script: String },
    /// Make the tiny guest and print its kernel and its initial file system
    Tiny,
}

#[derive(Args)]
struct Up {
    #[arg(long, default_value_t = 2)]
    hosts: u8,
    #[arg(long)]
    folder: Option<PathBuf>,
    /// Of the API, on 127.0.0.1
    #[arg(long, default_value_t = 8770)]
    port: u16,
    /// Boot hosts instead of restoring them
    #[arg(long)]
    boot: bool,
    /// Hosts with systemd and the agent's unit
    #[arg(long)]
    systemd: bool,
    /// An agent other than the one that was built with this program
    #[arg(long)]
    agent: Option<PathBuf>,
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Up(arguments) => up(arguments)?,
        Command::Console { socket } => console::attach(&socket)?,
        Command::Run { host, script } => {
            let output = run(host, &script, Duration::from_secs(600))?;
            print!("{}", output.text);
            std::process::exit(output.status);
        }
        Command::Tiny => {
            let tiny = TinyGuest::make()?;
            println!("{} {}", tiny.kernel.display(), tiny.initrd.display());
        }
    }
    Ok(())
}

fn up(arguments: Up) -> anyhow::Result<()> {
    let began = Instant::now();
    // Before this thread leaves the machine's network.
    let outside = TcpListener::bind(("127.0.0.1", arguments.port))
        .with_context(|| format!("port {}", arguments.port))?;
    // One thread: the lab's, whose end is its end.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut ends = signal(SignalKind::terminate())?;
        let mut interrupted = signal(SignalKind::interrupt())?;
        let options = Options {
            hosts: arguments.hosts,
            folder: arguments.folder,
            public_port: arguments.port,
            boot: arguments.boot,
            kind: match arguments.systemd {
                true => Kind::Systemd,
                false => Kind::Busybox,
            },
            agent: arguments.agent,
        };
        let lab = tokio::select! {
            lab = Lab::start(options) => lab?,
            _ = ends.recv() => return Ok(()),
            _ = interrupted.recv() => return Ok(()),
        };
        forward::serve(outside, arguments.port)?;
        let seconds = began.elapsed().as_secs_f64();
        println!("# {} hosts joined after {seconds:.1} s", lab.hosts.len());
        for (name, value) in lab.controller.environment() {
            println!("export {name}={value}");
        }
        println!("ready");
        tokio::select! {
            _ = ends.recv() => {}
            _ = interrupted.recv() => {}
        }
        Ok(())
    })
}
