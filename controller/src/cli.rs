//! The client: `fractus` as someone at a terminal uses it.
//!
//! Owns the command line, the reading of `clouds.yaml` and `OS_*`, the session and what is printed.
//! It speaks the public API only (invariant 7) and so works against any OpenStack cloud; it must
//! never open the database or know an agent. It starts lean: one thread, no TLS roots before an
//! https URL asks for them, no request that the command does not need.

mod arguments;
mod commands;
mod config;
mod error;
mod output;
mod session;
mod terminal;
#[cfg(test)]
mod tests;
mod tls;

use std::process::ExitCode;

pub use arguments::{Arguments, Command};
pub use error::CliError;
pub use output::Format;

use output::Output;
use session::Session;

/// Runs a client command to its end and says how it ended:
///
/// | code | meaning |
/// |---|---|
/// | 0 | done |
/// | 1 | the cloud refused or failed |
/// | 2 | the command line or the configuration is wrong |
/// | 3 | there is no such thing |
/// | 4 | not logged in, or not allowed |
/// | 5 | in conflict with the thing's state, or over a quota |
/// | 6 | the cloud cannot be reached |
pub fn run(arguments: Arguments) -> ExitCode {
    let output = Output::new(&arguments.output);
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            return output.failure(&CliError::Local {
                what: "starting",
                error,
            });
        }
    };
    match runtime.block_on(execute(arguments, &output)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => output.failure(&error),
    }
}

/// One command against the cloud that the arguments, the environment and clouds.yaml name.
pub async fn execute(arguments: Arguments, output: &Output) -> Result<(), CliError> {
    let Arguments { cloud, command, .. } = arguments;
    let command = match command.offline(output)? {
        None => return Ok(()),
        Some(command) => command,
    };
    let config = config::load(&cloud, &config::Environment::of_process())?;
    let session = Session::new(config)?;
    commands::execute(command, &session, output).await
}
