//! Where a server goes: a pure function that explains every refusal. Owns no state, reads no clock and
//! no database; what it is told is what it knows.

use std::collections::BTreeSet;
use std::fmt;

use fractus_agent_api::cpu::{Cpu, Level, Profile, missing};
use fractus_agent_api::host::HostId;
use fractus_agent_api::machine::ServerId;

/// What a server takes of a host, and what a host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Amounts {
    pub vcpus: i64,
    pub memory_mib: i64,
    pub disk_gib: i64,
}

/// What is to be placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub server: ServerId,
    pub amounts: Amounts,
    /// An administrator's choice; nothing else is looked at then.
    pub host: Option<HostId>,
    /// Where it has failed already.
    pub excluded: BTreeSet<HostId>,
    /// Where it is, and is to leave: any host that takes no new servers is none for it either, also if it is
    /// chosen.
    pub source: Option<HostId>,
    pub cpu: CpuNeed,
}

/// What a server's guest needs of a host's CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CpuNeed {
    /// It begins with what is there.
    Nothing,
    /// It begins with no less. A host that does not say what it has is believed.
    Level(Level),
    /// It runs, and has this: a host that does not say what it has is none for it, as its agent could not read the stream.
    Kept(Box<Profile>),
}

/// A host as the scheduler sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostView {
    pub id: HostId,
    pub hostname: String,
    pub presence: HostPresence,
    pub disabled: bool,
    pub limits: Amounts,
    pub used: Amounts,
    /// What its agent says is missing, without which no machine runs there.
    pub lacks: Vec<String>,
    /// What its guests may have; none: its agent does not say.
    pub cpu: Option<Box<Cpu>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostPresence {
    Up,
    Silent,
    NotYetHeard,
    ForcedDown,
}

/// Why one host was not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    Silent,
    NotYetHeard,
    ForcedDown,
    Disabled,
    Excluded,
    Source,
    NotTheChosen,
    Lacks(Vec<String>),
    /// Names of what the guest would miss.
    Cpu(Vec<String>),
    CpuUnknown,
    Vcpus {
        free: i64,
        needed: i64,
    },
    Memory {
        free_mib: i64,
        needed_mib: i64,
    },
    Disk {
        free_gib: i64,
        needed_gib: i64,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent => f.write_str("its agent is silent"),
            Self::NotYetHeard => {
                f.write_str("its agent was not heard since the controller started")
            }
            Self::ForcedDown => f.write_str("it was declared to be down"),
            Self::Disabled => f.write_str("it is disabled"),
            Self::Excluded => f.write_str("the server failed there"),
            Self::Source => f.write_str("the server is there already"),
            Self::NotTheChosen => f.write_str("another host was asked for"),
            Self::Lacks(what) => write!(f, "it lacks {}", what.join(", ")),
            Self::Cpu(what) => write!(f, "its CPU lacks {}", what.join(", ")),
            Self::CpuUnknown => f.write_str("it does not say what CPU its guests have"),
            Self::Vcpus { free, needed } => write!(f, "{needed} vCPUs needed, {free} free"),
            Self::Memory {
                free_mib,
                needed_mib,
            } => {
                write!(f, "{needed_mib} MiB of memory needed, {free_mib} free")
            }
            Self::Disk {
                free_gib,
                needed_gib,
            } => {
                write!(f, "{needed_gib} GiB of disk needed, {free_gib} free")
            }
        }
    }
}

/// Every host, and all that spoke against it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rejections(pub Vec<(HostId, String, Vec<Reason>)>);

impl fmt::Display for Rejections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("the cloud has no hosts");
        }
        for (i, (_, hostname, reasons)) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            let reasons: Vec<String> = reasons.iter().map(Reason::to_string).collect();
            write!(f, "{separator}{hostname}: {}", reasons.join(", "))?;
        }
        Ok(())
    }
}

impl std::error::Error for Rejections {}

impl Rejections {
    /// Against one of them there is nothing but that it has not been heard yet.
    pub fn wait_for_a_word(&self) -> bool {
        let mut all = self.0.iter();
        all.any(|(_, _, reasons)| reasons.as_slice() == [Reason::NotYetHeard])
    }
}

/// Chooses the host with the most memory left afterwards, in proportion; among equals, one that the
/// server's id picks, so that servers spread.
///
/// # Errors
/// Every host with every reason against it, when none will do.
pub fn place(request: &Request, hosts: &[HostView]) -> Result<HostId, Rejections> {
    let mut rejections = Rejections::default();
    let mut best: Option<((u64, u64), HostId)> = None;
    for host in hosts {
        let reasons = against(request, host);
        if !reasons.is_empty() {
            rejections.0.push((host.id, host.hostname.clone(), reasons));
            continue;
        }
        let rank = (
            share_left(request, host),
            preference(request.server, host.id),
        );
        if best.is_none_or(|(least, _)| rank > least) {
            best = Some((rank, host.id));
        }
    }
    best.map(|(_, host)| host).ok_or(rejections)
}

fn against(request: &Request, host: &HostView) -> Vec<Reason> {
    let mut reasons = Vec::new();
    match host.presence {
        HostPresence::Up => {}
        HostPresence::Silent => reasons.push(Reason::Silent),
        HostPresence::NotYetHeard => reasons.push(Reason::NotYetHeard),
        HostPresence::ForcedDown => reasons.push(Reason::ForcedDown),
    }
    if host.disabled && (request.host != Some(host.id) || request.source.is_some()) {
        reasons.push(Reason::Disabled);
    }
    if request.excluded.contains(&host.id) {
        reasons.push(Reason::Excluded);
    }
    if request.source == Some(host.id) {
        reasons.push(Reason::Source);
    }
    if request.host.is_some_and(|chosen| chosen != host.id) {
        reasons.push(Reason::NotTheChosen);
    }
    if !host.lacks.is_empty() {
        reasons.push(Reason::Lacks(host.lacks.clone()));
    }
    reasons.extend(against_cpu(&request.cpu, host.cpu.as_deref()));
    let free = |limit: i64, used: i64| limit.saturating_sub(used).max(0);
    let needed = request.amounts;
    let vcpus = free(host.limits.vcpus, host.used.vcpus);
    if needed.vcpus > vcpus {
        reasons.push(Reason::Vcpus {
            free: vcpus,
            needed: needed.vcpus,
        });
    }
    let free_mib = free(host.limits.memory_mib, host.used.memory_mib);
    if needed.memory_mib > free_mib {
        reasons.push(Reason::Memory {
            free_mib,
            needed_mib: needed.memory_mib,
        });
    }
    let free_gib = free(host.limits.disk_gib, host.used.disk_gib);
    if needed.disk_gib > free_gib {
        reasons.push(Reason::Disk {
            free_gib,
            needed_gib: needed.disk_gib,
        });
    }
    reasons
}

/// Why a guest cannot have this CPU.
pub fn against_cpu(need: &CpuNeed, cpu: Option<&Cpu>) -> Option<Reason> {
    let lacks = match (need, cpu) {
        (CpuNeed::Nothing, _) | (CpuNeed::Level(_), None) => return None,
        (CpuNeed::Kept(_), None) => return Some(Reason::CpuUnknown),
        (CpuNeed::Level(level), Some(cpu)) => level.missing(cpu),
        (CpuNeed::Kept(profile), Some(cpu)) => missing(profile, cpu),
    };
    (!lacks.is_empty()).then_some(Reason::Cpu(lacks))
}

/// Millionths of the host's memory that would be left.
fn share_left(request: &Request, host: &HostView) -> u64 {
    let left = host.limits.memory_mib - host.used.memory_mib - request.amounts.memory_mib;
    let share = i128::from(left) * 1_000_000 / i128::from(host.limits.memory_mib.max(1));
    u64::try_from(share).unwrap_or(0)
}

/// Any fixed order of the hosts that differs from server to server.
fn preference(server: ServerId, host: HostId) -> u64 {
    let mut hash = blake3::Hasher::new();
    hash.update(server.0.as_bytes());
    hash.update(host.0.as_bytes());
    let digest = hash.finalize();
    digest
        .as_bytes()
        .iter()
        .take(8)
        .fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

#[cfg(test)]
pub(crate) mod testing {
    use uuid::Uuid;

    use super::*;

    /// One that is up and empty.
    pub fn host(id: u128) -> HostView {
        HostView {
            id: HostId(Uuid::from_u128(id)),
            hostname: format!("h{id}"),
            presence: HostPresence::Up,
            disabled: false,
            limits: Amounts {
                vcpus: 16,
                memory_mib: 1000,
                disk_gib: 100,
            },
            used: Amounts::default(),
            lacks: vec![],
            cpu: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::testing::host;
    use super::*;
    use crate::agents::simulated::cpu;

    fn request(server: u128, vcpus: i64, memory_mib: i64, disk_gib: i64) -> Request {
        Request {
            server: ServerId(Uuid::from_u128(server)),
            amounts: Amounts {
                vcpus,
                memory_mib,
                disk_gib,
            },
            host: None,
            excluded: BTreeSet::new(),
            source: None,
            cpu: CpuNeed::Nothing,
        }
    }

    #[test]
    fn every_reason_against_every_host_is_told() {
        let mut silent = host(1);
        silent.presence = HostPresence::Silent;
        silent.disabled = true;
        let mut full = host(2);
        full.used.memory_mib = 900;
        let refused = place(&request(1, 17, 101, 1), &[silent, full]).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "h1: its agent is silent, it is disabled, 17 vCPUs needed, 16 free; \
             h2: 17 vCPUs needed, 16 free, 101 MiB of memory needed, 100 free"
        );
        let none = place(&request(1, 1, 1, 1), &[]).unwrap_err();
        assert_eq!(none.to_string(), "the cloud has no hosts");
    }

    #[test]
    fn a_chosen_host_is_taken_although_disabled_and_no_other_is() {
        let mut chosen = host(1);
        chosen.disabled = true;
        let mut request = request(1, 1, 1, 1);
        request.host = Some(chosen.id);
        assert_eq!(place(&request, &[chosen.clone(), host(2)]), Ok(chosen.id));
        chosen.used.vcpus = 16;
        assert!(place(&request, &[chosen, host(2)]).is_err());
    }

    #[test]
    fn a_guest_that_runs_goes_only_where_it_finds_what_it_has() {
        let with = |id, names: &[&str]| HostView {
            cpu: Some(Box::new(cpu(names))),
            ..host(id)
        };
        let kept = cpu(&["avx", "avx2", "rtm"]).offers;
        let mut request = request(1, 1, 1, 1);
        request.cpu = CpuNeed::Kept(Box::new(kept));
        let (less, old) = (with(1, &["avx", "sse4a"]), host(2));
        let refused = place(&request, &[less.clone(), old.clone()]).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "h1: its CPU lacks avx2, rtm; h2: it does not say what CPU its guests have"
        );
        let more = with(3, &["avx", "avx2", "rtm", "sse4a"]);
        assert_eq!(
            place(&request, &[less.clone(), old.clone(), more.clone()]),
            Ok(more.id)
        );
        request.cpu = CpuNeed::Level(Level::V2);
        let refused = place(&request, std::slice::from_ref(&less)).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "h1: its CPU lacks pni, ssse3, cx16, sse4_1, sse4_2, popcnt, lahf_lm"
        );
        assert_eq!(place(&request, &[less, old.clone()]), Ok(old.id));
    }

    #[test]
    fn servers_spread_over_equal_hosts() {
        let hosts: Vec<HostView> = (1..=4).map(host).collect();
        let chosen: BTreeSet<HostId> = (0..64)
            .map(|server| place(&request(server, 1, 1, 1), &hosts).unwrap())
            .collect();
        assert_eq!(chosen.len(), 4);
    }

    fn any_host() -> impl Strategy<Value = HostView> {
        (
            0..50u128,
            0..3usize,
            any::<bool>(),
            0..20i64,
            0..1200i64,
            0..120i64,
        )
            .prop_map(
                |(id, presence, disabled, vcpus, memory_mib, disk_gib)| HostView {
                    presence: [
                        HostPresence::Up,
                        HostPresence::Silent,
                        HostPresence::ForcedDown,
                    ][presence],
                    disabled,
                    used: Amounts {
                        vcpus,
                        memory_mib,
                        disk_gib,
                    },
                    ..host(id)
                },
            )
    }

    #[test]
    fn a_host_without_room_for_what_is_not_asked_for_is_taken() {
        let mut overfull = host(1);
        overfull.used.disk_gib = overfull.limits.disk_gib + 1;
        assert_eq!(
            place(&request(1, 1, 1, 0), &[overfull.clone()]).ok(),
            Some(overfull.id)
        );
        assert!(place(&request(1, 1, 1, 1), &[overfull]).is_err());
    }

    proptest! {
        /// The answer fits and is allowed; a refusal names every host with at least one reason; the
        /// order of the hosts does not matter.
        #[test]
        fn the_answer_fits_and_a_refusal_names_every_host(
            hosts in prop::collection::vec(any_host(), 0..12),
            vcpus in 1..20i64, memory in 1..1200i64, disk in 0..120i64,
        ) {
            let mut hosts = hosts;
            hosts.sort_by_key(|host| host.id);
            hosts.dedup_by_key(|host| host.id);
            let request = request(1, vcpus, memory, disk);
            let answer = place(&request, &hosts);
            match &answer {
                Ok(id) => {
                    let taken = hosts.iter().find(|host| host.id == *id).unwrap();
                    prop_assert!(taken.presence == HostPresence::Up && !taken.disabled);
                    prop_assert!(taken.used.vcpus + vcpus <= taken.limits.vcpus);
                    prop_assert!(taken.used.memory_mib + memory <= taken.limits.memory_mib);
                    // Of a host that has less than it gave, nothing can still be asked.
                    let fits = taken.used.disk_gib + disk <= taken.limits.disk_gib;
                    prop_assert!(disk == 0 || fits);
                }
                Err(rejections) => {
                    prop_assert_eq!(rejections.0.len(), hosts.len());
                    prop_assert!(rejections.0.iter().all(|(_, _, reasons)| !reasons.is_empty()));
                }
            }
            hosts.reverse();
            prop_assert_eq!(answer.ok(), place(&request, &hosts).ok());
        }
    }
}
