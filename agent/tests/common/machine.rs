//! One machine that is changed while it runs: an intent after the other.

use fractus_agent_api::client::agent::Console;
use fractus_agent_api::device::{DeviceId, DeviceState, Disk, DiskSource, Presence};
use fractus_agent_api::machine::MachineSpec;
use futures::{SinkExt, StreamExt};
use tokio_tungstenite::tungstenite::Message;

use super::*;

pub fn disk(id: DeviceId) -> Disk {
    Disk {
        id,
        size: 1 << 20,
        read_only: false,
        serial_number: None,
        limit: None,
        source: DiskSource::Local,
        presence: Presence::Attached,
    }
}

pub fn disks(count: u128) -> Vec<Disk> {
    (1..=count)
        .map(|n| disk(DeviceId(Uuid::from_u128(n))))
        .collect()
}

pub fn states(report: &MachineReport) -> Vec<DeviceState> {
    let states = report.disks.iter();
    states.map(|disk| disk.state.clone()).collect()
}

/// Puts revision after revision.
pub struct Machine<'a> {
    pub agent: &'a Agent,
    pub id: ServerId,
    pub wanted: Wanted,
    pub revision: u64,
}

impl<'a> Machine<'a> {
    pub async fn start(agent: &'a Agent, kernel: &ImageRef) -> Result<Self> {
        Self::start_with(agent, kernel, |_| ()).await
    }

    /// One that is not quite the usual one.
    pub async fn start_with(
        agent: &'a Agent,
        kernel: &ImageRef,
        change: impl FnOnce(&mut MachineSpec),
    ) -> Result<Self> {
        let (id, mut wanted) = (new_id(), wanted(kernel, Power::Running));
        change(&mut wanted.spec);
        agent.put(id, &put(1, wanted.clone())).await?;
        agent.settled(id, 1, is_running).await?;
        Ok(Self {
            agent,
            id,
            wanted,
            revision: 1,
        })
    }

    /// The machine with a change of what is wanted, once it is settled.
    pub async fn changed(&mut self, change: impl FnOnce(&mut Wanted)) -> Result<MachineReport> {
        change(&mut self.wanted);
        self.revision += 1;
        self.agent
            .put(self.id, &put(self.revision, self.wanted.clone()))
            .await?;
        self.agent.settled(self.id, self.revision, |_| true).await
    }

    pub async fn until(&self, disks: &[DeviceState]) -> Result<MachineReport> {
        self.agent
            .until(self.id, |report| states(report) == disks)
            .await
    }

    pub fn file(&self, id: DeviceId) -> PathBuf {
        self.agent
            .machine_folder(self.id)
            .join(format!("disk-{id}.raw"))
    }

    /// Types a line for its guest, which hears it for as long as the console is kept.
    pub async fn types(&self, line: &str) -> Result<Console> {
        let mut console = self.agent.client.console(self.id).await?;
        console.send(Message::binary(format!("{line}\n"))).await?;
        Ok(console)
    }

    /// The same, until its guest, a stand-in, has read it.
    pub async fn hears(&self, line: &str) -> Result {
        let _console = self.types(line).await?;
        self.agent
            .console_says(self.id, &format!("heard {line}"))
            .await?;
        Ok(())
    }

    /// What its guest, a probe, answers to a command.
    pub async fn asks(&self, command: &str) -> Result<String> {
        let mut console = self.agent.client.console(self.id).await?;
        console
            .send(Message::binary(format!("{command}\n")))
            .await?;
        let word = command.split(' ').next().unwrap_or_default();
        let (ok, err) = (format!("ok {word}"), format!("err {word}"));
        let (mut said, by) = (String::new(), Instant::now() + PATIENCE);
        loop {
            let left = by.saturating_duration_since(Instant::now());
            let next = tokio::time::timeout(left, console.next()).await;
            let Ok(Some(Ok(message))) = next else {
                anyhow::bail!("{command}: {said:?}\n{}", self.agent.vm_log(self.id));
            };
            said.push_str(&String::from_utf8_lossy(&message.into_data()));
            let (whole, _) = said.rsplit_once('\n').unwrap_or_default();
            let mut lines = whole.lines().map(str::trim);
            if let Some(answer) = lines.find(|line| line.starts_with(&ok) || line.starts_with(&err))
            {
                anyhow::ensure!(answer.starts_with(&ok), "{answer}");
                return Ok(answer[ok.len()..].trim().to_owned());
            }
        }
    }

    /// The one slot that its guest was told of in this register.
    pub async fn slot(&self, register: &str) -> Result<u32> {
        let answer = self.asks("slots").await?;
        let words = answer.split(' ');
        let mut bits = words.filter_map(|word| word.strip_prefix(&format!("{register}=")));
        let bits = u32::from_str_radix(bits.next().unwrap_or_default(), 16)?;
        anyhow::ensure!(bits.count_ones() == 1, "{answer}");
        Ok(bits.trailing_zeros())
    }
}
