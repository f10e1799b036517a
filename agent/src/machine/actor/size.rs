//! How large the machine is while it runs: what its process is asked for by [`decision::size`], and what is
//! told of it.
//!
//! What its guest takes of it is the guest's affair: it is reported, now and then, and never waited for.

use std::time::Duration;

use fractus_agent_api::decision::size::{self, Resize};
use fractus_agent_api::machine::MachineSpec;
use fractus_agent_api::size::{Size, SizeReport};
use tokio::time::Instant;

use super::{Actor, Over, Phase, blocking};
use crate::machine::process::launch::most_memory;
use crate::machine::process::{Launcher, Process};

/// How long a process may take to answer.
const ANSWER: Duration = Duration::from_secs(60);
/// What a guest takes, as it likes, is told to others this often at most.
pub(super) const QUIET: Duration = Duration::from_secs(3);

/// The size of one process.
#[derive(Debug, Default)]
pub(super) struct Sizes {
    /// None: it has not said, or never will.
    now: Option<Size>,
    /// What it was asked for, and until when it may take to answer.
    asked: Option<(Resize, Instant)>,
    /// Why it is not asked again before a newer intent.
    trouble: Option<String>,
    /// MiB that its control group is for.
    limit_mib: u64,
    told: Option<SizeReport>,
    told_at: Option<Instant>,
}

impl Sizes {
    /// Of a process that was just started.
    pub(super) fn begun(spec: &MachineSpec) -> Self {
        let now = Size::at_start(spec);
        Self {
            now: Some(now),
            limit_mib: now.memory_mib,
            ..Self::default()
        }
    }

    /// Of one whose guest goes on, and has the size that it had: it will say.
    pub(super) fn going_on(most_mib: u64) -> Self {
        Self {
            limit_mib: most_mib,
            ..Self::default()
        }
    }

    /// What the process last said.
    pub(super) fn now(&self) -> Option<Size> {
        self.now
    }

    pub(super) fn try_anew(&mut self) {
        self.trouble = None;
    }

    pub(super) fn is_pending(&self) -> bool {
        self.asked.is_some()
    }

    pub(super) fn refused(&mut self, detail: String) {
        self.asked = None;
        self.trouble = Some(detail);
    }

    /// As if so much time had passed.
    #[cfg(test)]
    pub(super) fn pass(&mut self, time: Duration) {
        self.told_at = self.told_at.and_then(|at| at.checked_sub(time));
    }

    /// When something is to be done though nothing is heard.
    pub(super) fn deadline(&self, untold: bool) -> Option<Instant> {
        let tell_by = self.told_at.filter(|_| untold).map(|at| at + QUIET);
        let answer_by = self.asked.map(|(_, by)| by);
        answer_by.into_iter().chain(tell_by).min()
    }
}

impl<L: Launcher> Actor<L> {
    /// Memory that it can have at most, MiB: by what is wanted, and by what it says.
    pub(super) fn most_mib(&self) -> u64 {
        let wanted = most_memory(&self.record.intent.wanted.spec);
        let most = |now: Size| now.memory_mib + now.max_hot_memory_mib.unwrap_or(0);
        wanted.max(self.sizes.now.map_or(0, most))
    }

    fn runs(&self) -> bool {
        matches!(self.phase, Phase::Running | Phase::Paused)
    }

    pub(super) fn next_size(&self) -> Option<Resize> {
        // One on its way is as large as it is.
        let here = self.runs() && self.is_here();
        let now = self.sizes.now.filter(|_| here)?;
        let held = self.sizes.asked.is_some() || self.sizes.trouble.is_some();
        let wanted = &self.record.intent.wanted.spec;
        size::next(wanted, &now).filter(|_| !held)
    }

    /// The process has said how large it is.
    pub(super) fn sized(&mut self, now: Option<Size>, fresh: bool) {
        self.sizes.now = now;
        let is = now.map(|now| Resize {
            vcpus: now.vcpus,
            hot_memory_mib: now.hot_memory_mib,
        });
        // What was said on an earlier connection is not answered on this one.
        self.sizes.asked = self.sizes.asked.filter(|(to, _)| is != Some(*to) && !fresh);
        // Never below what the guest has still, and not below what it was just offered.
        if let Some(now) = now
            && self.sizes.asked.is_none()
            && now.most_memory_mib() < self.sizes.limit_mib
            && let Err(error) = self.limit(now.vcpus, now.most_memory_mib())
        {
            tracing::warn!(machine = %self.record.id, %error, "its control group's limits");
        }
    }

    fn limit(&mut self, vcpus: u8, memory_mib: u64) -> std::io::Result<()> {
        let launcher = &self.surroundings.launcher;
        blocking(|| launcher.limit(self.record.id, vcpus, memory_mib))?;
        self.sizes.limit_mib = memory_mib;
        Ok(())
    }

    pub(super) async fn resize(&mut self, to: Resize) -> Result<(), Over> {
        let Some(now) = self.sizes.now else {
            return Ok(());
        };
        // Room first: a guest that took more than its group may use would be ended.
        let most = now
            .most_memory_mib()
            .max(now.memory_mib + to.hot_memory_mib);
        if let Err(error) = self.limit(to.vcpus, most) {
            self.sizes.trouble = Some(format!("the control group's limits: {error}"));
            self.publish();
            return Ok(());
        }
        let request_id = self.record.request_id.clone();
        let Some(process) = &mut self.process else {
            return Ok(());
        };
        if let Err(error) = process.resize(to, request_id.as_deref()).await {
            return self.say_again(&error).await;
        }
        tracing::info!(machine = %self.record.id, ?to, "its guest is offered another size");
        self.sizes.asked = Some((to, Instant::now() + ANSWER));
        self.publish();
        Ok(())
    }

    /// What is due though nothing was heard.
    pub(super) fn tend_size(&mut self) {
        if self.sizes.asked.is_some_and(|(_, by)| by <= Instant::now()) {
            self.sizes.asked = None;
            self.sizes.trouble = Some("the machine's process does not answer".to_owned());
        }
    }

    /// What there is to tell of it, if it is told at all.
    pub(super) fn size_to_tell(&self) -> Option<SizeReport> {
        let now = self.sizes.now.filter(|_| self.phase != Phase::None)?;
        let wanted = &self.record.intent.wanted.spec;
        let beyond = size::at_next_start(wanted, &now);
        Some(SizeReport {
            vcpus: now.vcpus,
            vcpus_used: now.vcpus_used,
            memory_mib: now.memory_mib + now.hot_memory_mib,
            memory_mib_used: now.memory_mib + now.hot_plugged_mib,
            at_next_start: self.sizes.trouble.clone().or(beyond),
        })
    }

    /// The same, but what its guest alone has changed a moment ago waits.
    pub(super) fn size_report(&mut self) -> Option<SizeReport> {
        let (now, told) = (self.size_to_tell(), self.sizes.told.clone());
        let quiet = self.sizes.told_at.is_some_and(|at| at.elapsed() < QUIET);
        let same = |now: &SizeReport, told: &SizeReport| {
            let (vcpus_used, memory_mib_used) = (told.vcpus_used, told.memory_mib_used);
            let now = now.clone();
            SizeReport {
                vcpus_used,
                memory_mib_used,
                ..now
            } == *told
        };
        if let (Some(now), Some(told)) = (&now, &told)
            && quiet
            && same(now, told)
        {
            return Some(told.clone());
        }
        if now != told {
            self.sizes.told = now.clone();
            self.sizes.told_at = Some(Instant::now());
        }
        now
    }

    pub(super) fn size_is_untold(&self) -> bool {
        self.size_to_tell() != self.sizes.told
    }
}
