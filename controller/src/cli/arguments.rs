//! The command line.

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use super::output::{Format, Output};
use super::{CliError, commands};

const EXAMPLES: &str = "\
Exit codes: 0 done; 1 refused or failed; 2 wrong command line or configuration; 3 no such thing;
4 not logged in or not allowed; 5 in conflict, or over a quota; 6 the cloud cannot be reached.

The cloud is the one of --os-cloud (or OS_CLOUD) in clouds.yaml, or the one that OS_AUTH_URL and the
other OS_* variables name, as for every OpenStack client.";

/// A small cloud with a hypervisor of its own: its controller and its client.
#[derive(Debug, Parser)]
#[command(name = "fractus", version, after_help = EXAMPLES, arg_required_else_help = true)]
pub struct Arguments {
    #[command(flatten)]
    pub cloud: CloudArguments,
    #[command(flatten)]
    pub output: OutputArguments,
    #[command(subcommand)]
    pub command: Command,
}

/// Which cloud, and as whom. Each stands before what the environment and clouds.yaml say.
#[derive(Debug, Clone, Default, Args)]
pub struct CloudArguments {
    /// Name of the cloud in clouds.yaml [env: OS_CLOUD]
    #[arg(long, global = true, value_name = "NAME", help_heading = "Cloud")]
    pub os_cloud: Option<String>,
    /// Where identity is [env: OS_AUTH_URL]
    #[arg(long, global = true, value_name = "URL", help_heading = "Cloud")]
    pub os_auth_url: Option<String>,
    /// [env: OS_USERNAME]
    #[arg(long, global = true, value_name = "NAME", help_heading = "Cloud")]
    pub os_username: Option<String>,
    /// [env: OS_PROJECT_NAME]
    #[arg(long, global = true, value_name = "NAME", help_heading = "Cloud")]
    pub os_project_name: Option<String>,
    /// [env: OS_REGION_NAME]
    #[arg(long, global = true, value_name = "NAME", help_heading = "Cloud")]
    pub os_region_name: Option<String>,
    /// Certificates to trust, PEM [env: OS_CACERT]
    #[arg(long, global = true, value_name = "FILE", help_heading = "Cloud")]
    pub os_cacert: Option<PathBuf>,
    /// Do not verify the cloud's certificate
    #[arg(long, global = true, help_heading = "Cloud")]
    pub insecure: bool,
    /// Compute microversion to ask for, such as 2.79 [env: OS_COMPUTE_API_VERSION; default: the
    /// highest that both sides know]
    #[arg(long, global = true, value_name = "VERSION", help_heading = "Cloud")]
    pub os_compute_api_version: Option<String>,
}

#[derive(Debug, Clone, Default, Args)]
pub struct OutputArguments {
    /// How to print
    #[arg(
        long,
        short = 'f',
        global = true,
        value_enum,
        default_value_t,
        help_heading = "Output"
    )]
    pub format: Format,
    /// Print these columns only; may be given several times
    #[arg(
        long,
        short = 'c',
        global = true,
        value_name = "COLUMN",
        help_heading = "Output"
    )]
    pub column: Vec<String>,
    /// Colour on a terminal
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        help_heading = "Output"
    )]
    pub color: Color,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Color {
    #[default]
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Tokens
    #[command(subcommand)]
    Token(commands::token::Command),
    /// What the cloud offers, and where
    #[command(subcommand)]
    Catalog(commands::token::Catalog),
    /// Images
    #[command(subcommand)]
    Image(commands::image::Command),
    /// Sizes of servers
    #[command(subcommand)]
    Flavor(commands::flavor::Command),
    /// SSH keys
    #[command(subcommand)]
    Keypair(commands::keypair::Command),
    /// Servers
    #[command(subcommand)]
    Server(Box<commands::server::Command>),
    /// Attach this terminal to a server's serial console
    Console(commands::console::Attach),
    /// The hosts that servers run on (administrators)
    #[command(subcommand)]
    Host(commands::host::Command),
    /// Servers as their hosts have them: what is wanted, what is there; disks, networks and sizes that
    /// change while they run (administrators)
    #[command(subcommand)]
    Machine(commands::machine::Command),
    /// Run the controller of a cloud
    Serve(Box<crate::serve::Options>),
    /// Print completions for a shell
    Completions { shell: clap_complete::Shell },
    /// Print the manual page (man fractus.1), or with a folder write one a command
    Man { folder: Option<PathBuf> },
}

impl Command {
    /// Carries out what needs no cloud; gives back what does.
    pub fn offline(self, output: &Output) -> Result<Option<Self>, CliError> {
        let written = |error| CliError::Local {
            what: "writing",
            error,
        };
        match self {
            Self::Completions { shell } => {
                let mut text = Vec::new();
                let mut command = Arguments::command();
                clap_complete::generate(shell, &mut command, "fractus", &mut text);
                output.raw(&text).map_err(written)?;
                Ok(None)
            }
            Self::Man {
                folder: Some(folder),
            } => {
                clap_mangen::generate_to(Arguments::command(), folder).map_err(written)?;
                Ok(None)
            }
            Self::Man { folder: None } => {
                let mut text = Vec::new();
                clap_mangen::Man::new(Arguments::command())
                    .render(&mut text)
                    .map_err(written)?;
                output.raw(&text).map_err(written)?;
                Ok(None)
            }
            command => Ok(Some(command)),
        }
    }
}
