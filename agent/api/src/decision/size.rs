//! How large a machine is while its process runs: what is asked of it next, and what has to wait for its
//! next start.

use crate::machine::MachineSpec;
use crate::size::{HOT_BLOCK_MIB, Size};

/// What a process is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resize {
    pub vcpus: u8,
    /// Besides the memory that it began with.
    pub hot_memory_mib: u64,
}

/// As near to what is wanted as a process that was made so can come.
pub fn target(wanted: &MachineSpec, now: &Size) -> Resize {
    let vcpus = now.max_vcpus.map_or(now.vcpus, |max| wanted.vcpus.min(max));
    let more = wanted.memory_mib.saturating_sub(now.memory_mib);
    let more = more.next_multiple_of(HOT_BLOCK_MIB);
    Resize {
        vcpus,
        hot_memory_mib: now.max_hot_memory_mib.map_or(0, |max| more.min(max)),
    }
}

/// What the process is to be asked for; none: it has been.
pub fn next(wanted: &MachineSpec, now: &Size) -> Option<Resize> {
    let target = target(wanted, now);
    let asked = Resize {
        vcpus: now.vcpus,
        hot_memory_mib: now.hot_memory_mib,
    };
    (target != asked).then_some(target)
}

/// What of it comes with the machine's next start only, and why.
pub fn at_next_start(wanted: &MachineSpec, now: &Size) -> Option<String> {
    let target = target(wanted, now);
    let mut why = Vec::new();
    if target.vcpus != wanted.vcpus {
        why.push(match now.max_vcpus {
            Some(max) => format!("{} vCPUs: it was started for up to {max}", wanted.vcpus),
            None => format!("{} vCPUs: it was started without a maximum", wanted.vcpus),
        });
    }
    let base = now.memory_mib;
    let exact = base + target.hot_memory_mib;
    if !(wanted.memory_mib..wanted.memory_mib + HOT_BLOCK_MIB).contains(&exact) {
        why.push(match now.max_hot_memory_mib {
            Some(hot) => format!(
                "{} MiB of memory: it was started for {base} to {}",
                wanted.memory_mib,
                base + hot
            ),
            None => format!(
                "{} MiB of memory: it was started without a maximum",
                wanted.memory_mib
            ),
        });
    }
    (!why.is_empty()).then(|| why.join("; "))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec(vcpus: u8, memory_mib: u64) -> MachineSpec {
        let text = format!(r#"{{"vcpus": {vcpus}, "memory_mib": {memory_mib}, "boot": {{}}}}"#);
        serde_json::from_str(&text).unwrap()
    }

    fn size(max_vcpus: Option<u8>, max_hot_memory_mib: Option<u64>) -> Size {
        Size {
            vcpus: 2,
            vcpus_used: 2,
            max_vcpus,
            memory_mib: 1024,
            hot_memory_mib: 0,
            hot_plugged_mib: 0,
            max_hot_memory_mib,
        }
    }

    #[test]
    fn a_machine_without_a_maximum_stays_as_it_is_until_its_next_start() {
        let now = size(None, None);
        assert_eq!(
            (
                next(&spec(2, 1024), &now),
                at_next_start(&spec(2, 1024), &now)
            ),
            (None, None)
        );
        for wanted in [spec(3, 1024), spec(1, 1024), spec(2, 1026), spec(2, 512)] {
            assert_eq!(next(&wanted, &now), None);
            assert!(at_next_start(&wanted, &now).unwrap().contains("without"));
        }
        let both = at_next_start(&spec(3, 2048), &now).unwrap();
        assert!(
            both.contains("3 vCPUs") && both.contains("2048 MiB"),
            "{both}"
        );
    }

    #[test]
    fn what_is_beyond_its_maximum_is_given_as_far_as_it_goes() {
        let now = size(Some(4), Some(1024));
        let most = Resize {
            vcpus: 4,
            hot_memory_mib: 1024,
        };
        assert_eq!(next(&spec(8, 4096), &now), Some(most));
        let why = at_next_start(&spec(8, 4096), &now).unwrap();
        assert!(
            why.contains("up to 4") && why.contains("1024 to 2048"),
            "{why}"
        );
        let least = Resize {
            vcpus: 1,
            hot_memory_mib: 0,
        };
        assert_eq!(next(&spec(1, 512), &now), Some(least));
        assert!(at_next_start(&spec(1, 512), &now).is_some());
    }

    proptest! {
        /// Whoever asks until nothing is left to be asked for asks once.
        #[test]
        fn what_was_asked_for_is_not_asked_for_again(
            vcpus in 1..=64u8,
            memory_mib in 1..8192u64,
            max_vcpus in prop::option::of(2..=64u8),
            max_hot in prop::option::of((1..4096u64).prop_map(|blocks| blocks * HOT_BLOCK_MIB)),
        ) {
            let (wanted, mut now) = (spec(vcpus, memory_mib), size(max_vcpus, max_hot));
            if let Some(asked) = next(&wanted, &now) {
                prop_assert!(max_vcpus.is_none_or(|max| asked.vcpus <= max));
                prop_assert!(asked.hot_memory_mib <= max_hot.unwrap_or(0));
                prop_assert!(asked.hot_memory_mib.is_multiple_of(HOT_BLOCK_MIB));
                (now.vcpus, now.hot_memory_mib) = (asked.vcpus, asked.hot_memory_mib);
            }
            prop_assert_eq!(next(&wanted, &now), None);
            let whole = now.vcpus == vcpus && now.memory_mib + now.hot_memory_mib >= memory_mib
                && now.memory_mib + now.hot_memory_mib < memory_mib + HOT_BLOCK_MIB;
            prop_assert_eq!(whole, at_next_start(&wanted, &now).is_none());
        }
    }
}
