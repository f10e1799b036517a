//! Sets of hosts that are alike and not, and what comes from elsewhere.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::words::{LEAF1_ECX, LEAF7_EBX, LEAF7_ECX, WORDS};

fn any_profile() -> impl Strategy<Value = Profile> {
    // Few different values: hosts of one cloud are alike.
    let bits = prop::sample::select(vec![0, 0xffff, 0xff0f_ff0f, u32::MAX]);
    let words = prop::collection::vec(bits, WORDS.len());
    let xcr0 = prop::sample::select(vec![0b11, 0b111, 0xe7, 0x2e7, 0x6_02e7]);
    let offset = prop::sample::select(vec![832, 2688]);
    (words, xcr0, offset, 36..53_u8).prop_map(|(words, xcr0, offset, physical_bits)| {
        let components = (2..20_u8).filter(|bit| xcr0 & 1 << bit != 0);
        let area = |bit| {
            let offset = if bit == 9 {
                offset
            } else {
                576 + 64 * u32::from(bit)
            };
            (bit, Area { offset, size: 64 })
        };
        let all = WORDS.iter().zip(words);
        Profile {
            vendor: "GenuineIntel".to_owned(),
            words: all
                .map(|((word, _), bits)| (*word, bits & !ignored(*word)))
                .collect(),
            xcr0,
            areas: components.map(area).collect(),
            physical_bits,
            tsc_khz: None,
        }
        .settled()
    })
}

fn any_cpu() -> impl Strategy<Value = Cpu> {
    let khz = prop::sample::select(vec![
        None,
        Some(2_400_000),
        Some(2_400_300),
        Some(2_400_800),
        Some(3_000_000),
    ]);
    (any_profile(), khz, any::<bool>()).prop_map(|(offers, tsc_khz, tsc_scales)| Cpu {
        family: 6,
        model: 143,
        stepping: 8,
        offers: Profile { tsc_khz, ..offers },
        tsc_scales,
    })
}

proptest! {
    #[test]
    fn a_baseline_is_offered_by_each_host(cpus in prop::collection::vec(any_cpu(), 1..6)) {
        let common = baseline(&cpus).unwrap();
        for cpu in &cpus {
            prop_assert_eq!(missing(&common, cpu), Vec::<String>::new());
        }
    }

    /// It has whatever all have: what a host misses of any profile that all others offer is the host's own fault.
    #[test]
    fn a_baseline_leaves_nothing_out(cpus in prop::collection::vec(any_cpu(), 1..6), wanted in any_profile()) {
        let fits_all = cpus.iter().all(|cpu| missing(&wanted, cpu).is_empty());
        let common = baseline(&cpus).unwrap();
        prop_assert_eq!(fits_all, beyond(&wanted, &common).is_empty());
    }

    #[test]
    fn the_order_of_hosts_does_not_matter(cpus in prop::collection::vec(any_cpu(), 1..6), turn in 0..6_usize) {
        let mut turned = cpus.clone();
        turned.rotate_left(turn % cpus.len());
        prop_assert_eq!(baseline(&cpus), baseline(&turned));
        turned.reverse();
        prop_assert_eq!(baseline(&cpus), baseline(&turned));
    }

    #[test]
    fn nothing_is_missing_exactly_where_it_fits(profile in any_profile(), cpu in any_cpu()) {
        let fits = profile.words.iter().all(|(word, bits)| bits & !cpu.offers.word(*word) == 0)
            && profile.xcr0 & !cpu.offers.xcr0 == 0
            && profile.areas.iter().all(|(bit, area)| cpu.offers.areas.get(bit) == Some(area))
            && profile.physical_bits <= cpu.offers.physical_bits;
        prop_assert_eq!(missing(&profile, &cpu).is_empty(), fits);
    }

    #[test]
    fn a_host_runs_what_it_offers(cpu in any_cpu()) {
        let missing = missing(&cpu.offers, &cpu);
        prop_assert!(missing.is_empty(), "{missing:?}");
    }

    #[test]
    fn both_forms_of_the_wire_give_back_what_was_said(cpu in any_cpu()) {
        let json = serde_json::to_string(&cpu).unwrap();
        prop_assert_eq!(serde_json::from_str::<Cpu>(&json).unwrap(), cpu);
    }

    #[test]
    fn a_level_takes_away_and_never_gives(cpu in any_cpu()) {
        for level in Level::ALL {
            let cut = level.cut(&cpu.offers);
            prop_assert!(missing(&cut, &cpu).is_empty());
            let names = cut.features();
            prop_assert!(!names.iter().any(|name| name.starts_with("avx512")));
            prop_assert_eq!(level == Level::V2 && names.contains(&"avx2".to_owned()), false);
        }
    }
}

fn cpu(words: &[(Word, u32)], xcr0: u64, areas: &[(u8, u32)]) -> Cpu {
    let areas = areas.iter();
    Cpu {
        family: 6,
        model: 106,
        stepping: 6,
        offers: Profile {
            vendor: "GenuineIntel".to_owned(),
            words: words.iter().copied().collect(),
            xcr0,
            areas: areas
                .map(|(bit, offset)| {
                    (
                        *bit,
                        Area {
                            offset: *offset,
                            size: 8,
                        },
                    )
                })
                .collect(),
            physical_bits: 46,
            tsc_khz: Some(2_000_000),
        }
        .settled(),
        tsc_scales: false,
    }
}

#[test]
fn what_a_host_lacks_is_named_as_linux_names_it() {
    let new = cpu(
        &[(LEAF1_ECX, 1 << 28), (LEAF7_EBX, 1 << 5 | 1 << 22)],
        0b111,
        &[(2, 576)],
    );
    let mut old = cpu(&[(LEAF1_ECX, 1 << 28)], 0b111, &[(2, 576)]);
    (old.offers.physical_bits, old.offers.tsc_khz) = (39, Some(2_001_000));
    assert_eq!(
        missing(&new.offers, &old),
        [
            "avx2",
            "cpuid_7.0.ebx_22",
            "46 bits of address",
            "a TSC of 2000000 kHz (it cannot scale one, has 2001000 kHz)"
        ]
    );
    old.tsc_scales = true;
    assert_eq!(missing(&new.offers, &old).len(), 3);
    old.offers.vendor = "AuthenticAMD".to_owned();
    assert_eq!(missing(&new.offers, &old), ["a CPU of GenuineIntel"]);
    let makes = vec!["AuthenticAMD".to_owned(), "GenuineIntel".to_owned()];
    assert_eq!(baseline([&new, &old]), Err(NoBaseline::Vendors(makes)));
    assert_eq!(baseline([]), Err(NoBaseline::Empty));
}

/// As between AMD's third and fourth generation.
#[test]
fn state_that_lies_elsewhere_is_not_common_and_neither_is_its_feature() {
    let pku = (LEAF7_ECX, 1 << 3);
    let third = cpu(&[pku], 0x203, &[(9, 832)]);
    let fourth = cpu(&[pku], 0x203, &[(9, 2432)]);
    let common = baseline([&third, &fourth]).unwrap();
    assert_eq!((common.xcr0, common.word(pku.0)), (0b11, 0));
    assert_eq!(missing(&third.offers, &fourth), ["xcr0_9 (8 bytes at 832)"]);
}

/// What comes from elsewhere may be anything.
#[test]
fn a_component_that_no_register_has_is_none() {
    let mut odd = cpu(&[], 0b11, &[]);
    let area = Area {
        offset: u32::MAX,
        size: u32::MAX,
    };
    odd.offers.areas.insert(200, area);
    let common = baseline([&odd, &odd]).unwrap();
    assert_eq!(common.areas.len(), 0);
    assert_eq!(missing(&odd.offers, &odd), [""; 0]);
}

#[test]
fn features_without_their_state_are_none() {
    let leaf = |leaf, index, [eax, ebx, ecx, edx]: [u32; 4]| Leaf {
        leaf,
        index,
        indexed: matches!(leaf, 7 | 0xd),
        eax,
        ebx,
        ecx,
        edx,
    };
    // AMX is listed, and its state is not: KVM wants to be asked first. AVX10 is of a leaf that is in no profile.
    let leaves = [
        leaf(0, 0, [0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        leaf(1, 0, [0x000c_06f2, 0, 1 << 28 | 1 << 5, 0]),
        leaf(7, 0, [2, 1 << 5, 0, 1 << 24]),
        leaf(7, 1, [0, 0, 0, 1 << 19]),
        leaf(0xd, 0, [0b111, 0, 0, 0]),
        leaf(0xd, 2, [256, 576, 0, 0]),
        leaf(0x8000_0008, 0, [0x3934, 0, 0, 0]),
    ];
    let cpu = Cpu::of(&leaves, Some(2_000_000), true);
    assert_eq!(cpu.offers.features(), ["avx", "avx2"]);
    assert_eq!(cpu.offers.vendor, "GenuineIntel");
    assert_eq!((cpu.family, cpu.model, cpu.stepping), (6, 207, 2));
    assert_eq!(cpu.offers.physical_bits, 52);
    let areas = BTreeMap::from([(
        2,
        Area {
            offset: 576,
            size: 256,
        },
    )]);
    assert_eq!(cpu.offers.areas, areas);
}

#[test]
fn no_register_has_more_than_its_bits_or_is_named_twice() {
    for (index, (word, names)) in WORDS.iter().enumerate() {
        assert!(names.split_ascii_whitespace().count() <= 32, "{word}");
        assert!(WORDS.iter().skip(index + 1).all(|(other, _)| other != word));
        assert_eq!(word.to_string().parse(), Ok(*word));
    }
    assert_eq!(by_name("hypervisor"), Some((LEAF1_ECX, 31)));
    assert_eq!((by_name("-"), by_name("z80")), (None, None));
    assert_eq!(name(LEAF1_ECX, 31), "hypervisor");
    assert_eq!(name(LEAF7_EBX, 31), "avx512vl");
    assert_eq!(name(WORDS[5].0, 31), "spec_ctrl_ssbd");
    assert_eq!(name(WORDS[12].0, 24), "kvm_clock_stable");
    assert_eq!(name(WORDS[16].0, 31), "brs");
    assert_eq!(name(WORDS[17].0, 29), "srso_no");
}
