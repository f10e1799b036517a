//! `fractus-lab`: a lab for a person. See `scripts/lab`.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use fractus_lab::{Lab, Options};

#[derive(Parser)]
#[command(about = "Hosts with a real kvm_amd, in software")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a lab until this process ends
    Up {
        #[arg(long, default_value_t = 2)]
        hosts: u8,
        #[arg(long)]
        folder: Option<PathBuf>,
        /// On 127.0.0.1, of this machine and of the lab
        #[arg(long, default_value_t = 8770)]
        port: u16,
        /// Boot hosts instead of restoring them
        #[arg(long)]
        boot: bool,
    },
}

fn main() -> anyhow::Result<()> {
    let Command::Up {
        hosts,
        folder,
        port,
        boot,
    } = Cli::parse().command;
    // One thread: the lab's, whose end is its end.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let began = std::time::Instant::now();
        let lab = Lab::start(Options {
            hosts,
            folder,
            public_port: port,
            boot,
            agent: None,
        })
        .await?;
        println!("up after {:.1} s", began.elapsed().as_secs_f64());
        for (name, value) in lab.controller.environment() {
            println!("export {name}={value}");
        }
        tokio::signal::ctrl_c().await?;
        Ok(())
    })
}
