//! Which CPU a guest begins with: pure.
//!
//! A guest keeps what it begins with, and live migration goes where that is offered. So by default it begins with what
//! all hosts of its make have in common, as long as new servers are placed on them.

use std::fmt;
use std::str::FromStr;

use fractus_agent_api::cpu::{Cpu, Level, Profile, baseline};
use fractus_agent_api::host::HostId;
use serde::Deserialize;

use crate::scheduler::{CpuNeed, HostPresence, HostView};

/// By what it is chosen: `fractus serve --cpu-profile`, or a flavor's extra spec [`EXTRA_SPEC`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "String")]
pub enum CpuMode {
    /// What the enabled hosts of one make have in common.
    #[default]
    Baseline,
    /// All that the host has that it starts on.
    Host,
    /// A micro-architecture level: what the enabled hosts that have it have in common, and nothing beyond it.
    Level(Level),
}

pub const EXTRA_SPEC: &str = "hw:cpu_profile";

impl CpuMode {
    pub const NAMES: [&str; 4] = ["baseline", "host", "x86-64-v2", "x86-64-v3"];

    /// What is said to an agent that knows names only, as all did before there were profiles.
    pub fn name_of_old(self) -> &'static str {
        match self {
            Self::Baseline | Self::Host => "host",
            Self::Level(level) => level.name(),
        }
    }

    /// What a host has to have for it.
    pub fn need(self) -> CpuNeed {
        match self {
            Self::Baseline | Self::Host => CpuNeed::Nothing,
            Self::Level(level) => CpuNeed::Level(level),
        }
    }

    /// What `host` lacks for it, if it says so.
    pub fn lacks(self, host: HostId, hosts: &[HostView]) -> Vec<String> {
        let own = hosts.iter().find(|view| view.id == host);
        match (self, own.and_then(|own| own.cpu.as_deref())) {
            (Self::Level(level), Some(cpu)) => level.missing(cpu),
            _ => Vec::new(),
        }
    }

    /// What a guest has that begins on `host`; none: its host does not say what it has.
    pub fn choose(self, host: HostId, hosts: &[HostView]) -> Option<Profile> {
        let own = hosts.iter().find(|view| view.id == host);
        let own = own?.cpu.as_deref()?;
        let takes = |view: &&HostView| {
            view.id == host || !view.disabled && view.presence != HostPresence::ForcedDown
        };
        let known = hosts.iter().filter(takes);
        let known = known.filter_map(|view| view.cpu.as_deref());
        let alike = known.filter(|cpu| cpu.offers.vendor == own.offers.vendor);
        let chosen = match self {
            Self::Host => own.offers.clone(),
            Self::Baseline => baseline(alike).ok()?,
            Self::Level(level) => {
                let has = |cpu: &&Cpu| std::ptr::eq(*cpu, own) || level.missing(cpu).is_empty();
                level.cut(&baseline(alike.filter(has)).ok()?)
            }
        };
        Some(Profile {
            tsc_khz: chosen.tsc_khz.or(own.offers.tsc_khz),
            ..chosen
        })
    }
}

impl fmt::Display for CpuMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Baseline => "baseline",
            Self::Host => "host",
            Self::Level(level) => level.name(),
        })
    }
}

impl TryFrom<String> for CpuMode {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        name.parse()
    }
}

impl FromStr for CpuMode {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "baseline" => Ok(Self::Baseline),
            "host" => Ok(Self::Host),
            name => Level::by_name(name)
                .map(Self::Level)
                .ok_or_else(|| format!("'{name}' is not one of: {}", Self::NAMES.join(", "))),
        }
    }
}

#[cfg(test)]
mod tests {
    use fractus_agent_api::cpu::missing;

    use super::*;
    use crate::agents::simulated::cpu;
    use crate::scheduler::testing::host;

    fn with(id: u128, names: &[&str]) -> HostView {
        HostView {
            cpu: Some(Box::new(cpu(names))),
            ..host(id)
        }
    }

    fn features(mode: CpuMode, on: &HostView, hosts: &[HostView]) -> Option<Vec<String>> {
        Some(mode.choose(on.id, hosts)?.features())
    }

    const V3: [&str; 16] = [
        "pni", "ssse3", "cx16", "sse4_1", "sse4_2", "popcnt", "lahf_lm", "fma", "movbe", "xsave",
        "avx", "f16c", "bmi1", "avx2", "bmi2", "abm",
    ];

    #[test]
    fn a_guest_begins_with_what_the_enabled_hosts_of_its_make_have() {
        let (new, old) = (with(1, &["avx", "avx2", "rtm"]), with(2, &["avx", "avx2"]));
        let (mut gone, mut amd) = (with(3, &["avx"]), with(4, &["sse4a"]));
        gone.disabled = true;
        amd.cpu.as_mut().unwrap().offers.vendor = "AuthenticAMD".to_owned();
        let silent = host(5);
        let hosts = [
            new.clone(),
            old.clone(),
            gone.clone(),
            amd.clone(),
            silent.clone(),
        ];
        let begins = |mode, on: &HostView| features(mode, on, &hosts);
        let names = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
        assert_eq!(begins(CpuMode::Baseline, &new), names(&["avx", "avx2"]));
        assert_eq!(begins(CpuMode::Host, &new), names(&["avx", "avx2", "rtm"]));
        assert_eq!(begins(CpuMode::Baseline, &gone), names(&["avx"]), "chosen");
        assert_eq!(begins(CpuMode::Baseline, &amd), names(&["sse4a"]));
        assert_eq!(begins(CpuMode::Baseline, &silent), None);
    }

    #[test]
    fn a_level_is_what_the_hosts_have_that_have_it() {
        let more = |more: &[&'static str]| [&V3[..], more].concat();
        let hosts = [
            with(1, &more(&["rtm", "aes", "avx512f"])),
            with(2, &more(&["aes"])),
            with(3, &["pni"]),
        ];
        let level = CpuMode::Level(Level::V3);
        let chosen = level.choose(hosts[0].id, &hosts).unwrap();
        assert_eq!(
            chosen.features().len(),
            V3.len() + 1,
            "{:?}",
            chosen.features()
        );
        assert!(missing(&chosen, hosts[1].cpu.as_deref().unwrap()).is_empty());
        // Where it lacks something it is named, and the rest is what a guest begins with all the same.
        let lacks = |host: &HostView| level.lacks(host.id, &hosts);
        assert_eq!(lacks(&hosts[1]), [""; 0]);
        assert!(lacks(&hosts[2]).contains(&"avx2".to_owned()));
        assert_eq!(
            features(level, &hosts[2], &hosts),
            Some(vec!["pni".to_owned()])
        );
    }

    #[test]
    fn a_tsc_is_the_hosts_own_where_all_can_have_it() {
        let mut hosts = [with(1, &[]), with(2, &[])];
        let set = |view: &mut HostView, khz, scales| {
            let cpu = view.cpu.as_mut().unwrap();
            (cpu.offers.tsc_khz, cpu.tsc_scales) = (Some(khz), scales);
        };
        let tsc = |hosts: &[HostView]| {
            let on = |view: &HostView| CpuMode::Baseline.choose(view.id, hosts).unwrap().tsc_khz;
            (on(&hosts[0]), on(&hosts[1]))
        };
        set(&mut hosts[0], 2_000_000, true);
        set(&mut hosts[1], 3_000_000, true);
        assert_eq!(tsc(&hosts), (Some(2_000_000), Some(3_000_000)));
        set(&mut hosts[1], 3_000_000, false);
        assert_eq!(tsc(&hosts), (Some(3_000_000), Some(3_000_000)));
        set(&mut hosts[0], 2_000_000, false);
        assert_eq!(tsc(&hosts), (Some(2_000_000), Some(3_000_000)));
    }

    #[test]
    fn modes_have_names() {
        for name in CpuMode::NAMES {
            assert_eq!(name.parse::<CpuMode>().unwrap().to_string(), name);
        }
        assert!("z80".parse::<CpuMode>().is_err());
    }
}
