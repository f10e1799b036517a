//! The program `fractus`: the client, and (`fractus serve`) the controller.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use fractus_controller::cli;

fn main() -> ExitCode {
    cli::run(cli::Arguments::parse())
}
