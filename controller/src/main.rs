//! The program `fractus`: the client, and (`fractus serve`) the controller.

#![forbid(unsafe_code)]

use std::io::IsTerminal as _;
use std::process::ExitCode;

use clap::Parser;
use fractus_controller::{cli, serve};

fn main() -> ExitCode {
    // The one provider of cryptography; it fails only if there is one already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let mut arguments = cli::Arguments::parse();
    match arguments.command {
        cli::Command::Serve(options) => controller(*options),
        other => {
            arguments.command = other;
            cli::run(arguments)
        }
    }
}

fn controller(options: serve::Options) -> ExitCode {
    let filter = tracing_subscriber::EnvFilter::try_from_env("FRACTUS_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("fractus: starting threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(serve::run(options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fractus: {:#}", anyhow::Error::from(error));
            ExitCode::FAILURE
        }
    }
}
