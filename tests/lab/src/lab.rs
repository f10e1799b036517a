//! A controller and its hosts.

use std::path::PathBuf;

use anyhow::{Context, Result};
use fractus_tests::harness::{Guardian, program};

use crate::controller::Controller;
use crate::host::{Host, Start};
use crate::image::{HostImage, Kind};
use crate::segment::Segment;
use crate::{payload, saved};

/// What lab is wanted.
#[derive(Debug, Clone, Default)]
pub struct Options {
    pub hosts: u8,
    /// Where its files go; `None`: a folder that is removed in the end.
    pub folder: Option<PathBuf>,
    /// Port of the controller's API in the segment; 0: the usual one.
    pub public_port: u16,
    /// Boot hosts instead of restoring them.
    pub boot: bool,
    /// Of all of them.
    pub kind: Kind,
    /// `None`: the agent that was built with this program.
    pub agent: Option<PathBuf>,
}

/// Hosts on a segment of their own. The thread that starts it is in that segment from then on, and
/// everything ends with it.
#[derive(Debug)]
pub struct Lab {
    pub hosts: Vec<Host>,
    pub controller: Controller,
    folder: PathBuf,
    image: HostImage,
    segment: Segment,
    options: Options,
    // Last: hosts and controller are ended before it removes what they used.
    _guardian: Option<Guardian>,
}

impl Lab {
    /// Starts controller and hosts, and waits until every agent has been heard.
    pub async fn start(options: Options) -> Result<Self> {
        let mut lab = Self::empty(options).await?;
        for _ in 0..lab.options.hosts {
            lab.add_host().await?;
        }
        lab.controller
            .until_hosts_up(lab.hosts.len())
            .await
            .with_context(|| lab.logs())?;
        Ok(lab)
    }

    /// Starts the controller alone.
    pub async fn empty(options: Options) -> Result<Self> {
        let segment = Segment::enter()?;
        // The guardian removes the folder also when this process is killed; it has no machines to end,
        // which are inside of the hosts.
        let (folder, guardian) = match &options.folder {
            Some(folder) => (folder.clone(), None),
            None => {
                let folder = tempfile::Builder::new().prefix("fractus-lab-").tempdir()?;
                let folder = folder.keep();
                let guardian = Guardian::start(&(0..0), &folder)?;
                (folder, Some(guardian))
            }
        };
        std::fs::create_dir_all(&folder)?;
        let controller =
            Controller::start(&program("fractus")?, &folder, options.public_port).await?;
        Ok(Self {
            hosts: Vec::new(),
            controller,
            folder,
            image: HostImage::make()?,
            segment,
            options,
            _guardian: guardian,
        })
    }

    /// Powers one more host on and starts its agent.
    pub async fn add_host(&mut self) -> Result<&mut Host> {
        let number = u8::try_from(self.hosts.len() + 1)?;
        let agent = match &self.options.agent {
            Some(agent) => agent.clone(),
            None => program("fractus-agent")?,
        };
        let payload = payload::make(&agent)?;
        let folder = self.folder.join(format!("host{number}"));
        let mut host = Host::new(
            &self.image,
            &self.segment,
            number,
            &folder,
            &payload,
            self.options.kind,
        )?;
        host.start(&self.how()?)?;
        let token = self.controller.join_token().await?;
        host.start_agent(&self.controller.for_agents(), &token)
            .with_context(|| host.serial_log())?;
        self.hosts.push(host);
        self.hosts.last_mut().context("the host")
    }

    /// How hosts start in this lab, unless a test says otherwise.
    pub fn how(&self) -> Result<Start> {
        Ok(match self.options.boot {
            true => Start::Boot,
            false => Start::Restore(saved::ensure(&self.image, &self.segment)?),
        })
    }

    /// The ends of all logs, for a test that failed.
    pub fn logs(&self) -> String {
        let mut text = self.controller.log();
        for host in &self.hosts {
            let agent = host
                .agent_log()
                .unwrap_or_else(|error| format!("{error:#}"));
            let serial = host.serial_log();
            text.push_str(&format!(
                "\n--- {}, agent\n{agent}\n--- {}, serial line\n{serial}",
                host.name, host.name
            ));
        }
        text
    }
}
