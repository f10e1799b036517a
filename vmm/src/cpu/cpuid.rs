//! CPUID as the guest sees it: KVM's own list, cut to the profile, with the machine's topology.
//!
//! Topology: one package, every vCPU a core of one thread, so that the guest's scheduler shares
//! nothing it should not. Sources: Intel SDM vol. 2 CPUID, AMD APM vol. 3 appendix E, psABI x86-64
//! (micro-architecture levels), Documentation/virt/kvm/x86/cpuid.rst.

use fractus_cpuid::{Leaf, Level, Profile, Register, ignored, words_of};
use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::config::CpuProfile;

/// Leaf 1 ECX.
mod leaf1_ecx {
    pub const VMX: u32 = 1 << 5;
    pub const X2APIC: u32 = 1 << 21;
    pub const TSC_DEADLINE: u32 = 1 << 24;
    pub const HYPERVISOR: u32 = 1 << 31;
}

/// Leaf 7 ECX.
const LA57: u32 = 1 << 16;
/// Leaf 0x80000001 ECX: AMD's virtualisation.
const EXTENDED_ECX_SVM: u32 = 1 << 2;
/// Leaf 0x80000001 ECX: legacy core numbering, for more than one core.
const EXTENDED_ECX_CMP_LEGACY: u32 = 1 << 1;
/// The XSAVE area's legacy part and header; AVX's 256 bytes are behind them.
const XSAVE_LEAST: u32 = 512 + 64;

const VENDOR_AMD: [u32; 3] = [0x6874_7541, 0x6974_6e65, 0x444d_4163];
const VENDOR_HYGON: [u32; 3] = [0x6f67_7948, 0x6e65_476e, 0x656e_6975];

/// The guest's CPUID for vCPU `index` of `count`, from what KVM supports.
pub fn shape(
    supported: &[kvm_cpuid_entry2],
    profile: &CpuProfile,
    index: u8,
    count: u8,
    tsc_deadline: bool,
) -> Vec<kvm_cpuid_entry2> {
    let kept: Vec<_>;
    let (given, tsc_deadline) = match profile {
        // It has the timer, or not, as it had.
        CpuProfile::Kept(cpu) => {
            kept = cpu.leaves.iter().map(entry).collect();
            (kept.as_slice(), false)
        }
        _ => (supported, tsc_deadline),
    };
    // Sub-leaves of topology are made here; those KVM gives are the host's.
    let topology = [0xb, 0x1f];
    let mut entries: Vec<_> = given
        .iter()
        .filter(|entry| !topology.contains(&entry.function))
        .copied()
        .collect();
    let vendor = entries.iter().find(|entry| entry.function == 0);
    let vendor = vendor.map(|leaf| [leaf.ebx, leaf.edx, leaf.ecx]);
    let amd = vendor == Some(VENDOR_AMD) || vendor == Some(VENDOR_HYGON);
    for entry in &mut entries {
        match profile {
            CpuProfile::Host | CpuProfile::Custom(_) | CpuProfile::Kept(_) => {}
            CpuProfile::X86_64V2 => restrict(entry, Level::V2),
            CpuProfile::X86_64V3 => restrict(entry, Level::V3),
        }
        place(entry, u32::from(index), u32::from(count), amd, tsc_deadline);
    }
    if given
        .iter()
        .any(|leaf| leaf.function == 0 && leaf.eax >= 0xb)
    {
        entries.extend(extended_topology(u32::from(index), u32::from(count)));
    }
    entries
}

/// Of KVM's list.
pub fn leaf(entry: &kvm_cpuid_entry2) -> Leaf {
    Leaf {
        leaf: entry.function,
        index: entry.index,
        indexed: entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
        eax: entry.eax,
        ebx: entry.ebx,
        ecx: entry.ecx,
        edx: entry.edx,
    }
}

fn entry(leaf: &Leaf) -> kvm_cpuid_entry2 {
    let flags = match leaf.indexed {
        true => KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        false => 0,
    };
    kvm_cpuid_entry2 {
        function: leaf.leaf,
        index: leaf.index,
        flags,
        eax: leaf.eax,
        ebx: leaf.ebx,
        ecx: leaf.ecx,
        edx: leaf.edx,
        ..Default::default()
    }
}

/// What the host has of the profile. Of leaves that are not known here nothing is left: what they say may be a feature.
pub fn cut(offered: &[Leaf], profile: &Profile) -> Vec<Leaf> {
    let ends = profile.areas.values();
    let ends = ends.map(|area| area.offset.saturating_add(area.size));
    let size = ends.fold(XSAVE_LEAST, u32::max);
    let mut leaves = offered.to_vec();
    for leaf in &mut leaves {
        match (leaf.leaf, leaf.index) {
            // Names, signature, caches, what is there, and topology, which is made anew.
            (0 | 2 | 4 | 0xb | 0x1f | 0x4000_0000 | 0x8000_0000, _)
            | (0x8000_0002..=0x8000_0006 | 0x8000_0019 | 0x8000_001d | 0x8000_001e, _) => continue,
            (0xd, 0) => {
                (leaf.eax, leaf.edx) = (profile.xcr0 as u32, (profile.xcr0 >> 32) as u32);
                (leaf.ebx, leaf.ecx) = (size, size);
                continue;
            }
            (0xd, component @ 2..=63) => {
                let supervisor = profile.word(fractus_cpuid::XSS);
                let there = profile.xcr0 | u64::from(supervisor);
                if there & 1 << component == 0 {
                    (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
                }
                continue;
            }
            _ => {}
        }
        let features: Vec<_> = words_of(leaf.leaf, leaf.index).collect();
        let here = *leaf;
        for register in Register::ALL {
            let value = here.get(register);
            let word = features.iter().find(|word| word.register == register);
            leaf.set(
                register,
                match (word, leaf.leaf, register) {
                    (Some(word), ..) => value & (profile.word(*word) | ignored(*word)),
                    (None, 1, Register::Eax | Register::Ebx) => value,
                    (None, 7, Register::Eax) if leaf.index == 0 => value.min(2),
                    // The size of an area in the compacted form, which KVM keeps up to date.
                    (None, 0xd, Register::Ebx) => value,
                    (None, 0x8000_0001, Register::Eax) => value,
                    (None, 0x8000_0008, Register::Eax) => addresses(profile),
                    (None, 0x8000_0008, Register::Ecx) => value,
                    (None, ..) => 0,
                },
            );
        }
    }
    leaves
}

/// Leaf 0x80000008 EAX: bits of a physical and of a linear address.
fn addresses(profile: &Profile) -> u32 {
    let linear = match profile.word(fractus_cpuid::LEAF7_ECX) & LA57 {
        0 => 48,
        _ => 57,
    };
    u32::from(profile.physical_bits) | linear << 8
}

/// Takes away what the level does not have.
fn restrict(entry: &mut kvm_cpuid_entry2, level: Level) {
    let v3 = level == Level::V3;
    let words = words_of(entry.function, entry.index);
    for word in words.collect::<Vec<_>>() {
        let register = match word.register {
            Register::Eax => &mut entry.eax,
            Register::Ebx => &mut entry.ebx,
            Register::Ecx => &mut entry.ecx,
            Register::Edx => &mut entry.edx,
        };
        *register &= level.allowed(word);
    }
    match (entry.function, entry.index) {
        (0, _) => entry.eax = entry.eax.min(0xd),
        (7, 0) => entry.eax = 0,
        (0xd, 0) => {
            (entry.eax, entry.edx) = (entry.eax & level.xcr0() as u32, 0);
            let size = XSAVE_LEAST + if v3 { 256 } else { 0 };
            (entry.ebx, entry.ecx) = (size, size);
        }
        (0xd, 1) => entry.edx = 0,
        (0xd, 2) if v3 => {}
        (7 | 0xd, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        _ => {}
    }
}

/// Puts the vCPU's place and the machine's shape into the leaf, in every profile. Virtualisation is
/// never among what it shows: the state of a guest's own guests (KVM_GET_NESTED_STATE) is neither
/// reset nor saved.
fn place(entry: &mut kvm_cpuid_entry2, id: u32, count: u32, amd: bool, tsc_deadline: bool) {
    match entry.function {
        1 => {
            // APIC id, logical processors, CLFLUSH line of 8 times 8 bytes.
            entry.ebx = id << 24 | count << 16 | 8 << 8;
            entry.ecx |= leaf1_ecx::X2APIC | leaf1_ecx::HYPERVISOR;
            entry.ecx &= !leaf1_ecx::VMX;
            if tsc_deadline {
                entry.ecx |= leaf1_ecx::TSC_DEADLINE;
            }
            let htt = 1 << 28;
            entry.edx = if count > 1 {
                entry.edx | htt
            } else {
                entry.edx & !htt
            };
        }
        // Intel's caches: private ones belong to one thread, the last level to all.
        4 if !amd && entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | (count - 1).min(63) << 26;
        }
        // No performance counters; no SVM, whose features the second lists.
        0xa | 0x8000_000a => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0001 => {
            entry.ecx &= !EXTENDED_ECX_SVM;
            if count > 1 && amd {
                entry.ecx |= EXTENDED_ECX_CMP_LEGACY;
            }
        }
        // Address sizes; threads, and the bits of the APIC id that count them.
        0x8000_0008 if amd => entry.ecx = (count - 1) | id_bits(count) << 12,
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 { count - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14;
        }
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (id, id, 0, 0),
        _ => {}
    }
}

/// Leaf 0xb: one thread a core, all cores in one package.
fn extended_topology(id: u32, count: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index, kind: u32, shift, processors| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: processors,
        ecx: index | kind << 8,
        edx: id,
        ..Default::default()
    };
    [
        level(0, 1, 0, 1),
        level(1, 2, id_bits(count), count),
        level(2, 0, 0, 0),
    ]
}

/// Bits of an APIC id that tell `count` vCPUs apart.
fn id_bits(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    const VENDOR_INTEL: [u32; 3] = [0x756e_6547, 0x4965_6e69, 0x6c65_746e];

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn host(vendor: [u32; 3]) -> Vec<kvm_cpuid_entry2> {
        let [b, d, c] = vendor;
        vec![
            leaf(0, 0, [0x1f, b, c, d]),
            leaf(1, 0, [0, 0xff00_0000, u32::MAX, u32::MAX]),
            leaf(7, 0, [2, u32::MAX, u32::MAX, u32::MAX]),
            leaf(0xb, 0, [5, 9, 0, 7]),
            leaf(0xd, 0, [0xe7, 4096, 4096, 0]),
            leaf(0xd, 2, [256, 576, 0, 0]),
            leaf(0xd, 5, [64, 832, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, u32::MAX, u32::MAX]),
            leaf(0x8000_0008, 0, [48, 0, 0, 0]),
            leaf(0x8000_000a, 0, [1, 0x8000, 0, u32::MAX]),
        ]
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn each_vcpu_is_a_core_with_its_own_apic_id() {
        let entries = shape(&host(VENDOR_AMD), &CpuProfile::Host, 3, 6, true);
        assert_eq!(find(&entries, 1, 0).ebx >> 24, 3);
        assert_eq!(find(&entries, 0xb, 0).edx, 3);
        let cores = find(&entries, 0xb, 1);
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (3, 6, 0x201));
        assert_eq!(find(&entries, 0x8000_0008, 0).ecx, 5 | 3 << 12);
        assert_eq!(
            entries.iter().filter(|entry| entry.function == 0xb).count(),
            3
        );
    }

    #[test]
    fn no_profile_shows_virtualisation_of_either_make() {
        for profile in [CpuProfile::Host, CpuProfile::X86_64V2, CpuProfile::X86_64V3] {
            for vendor in [VENDOR_AMD, VENDOR_INTEL] {
                let entries = shape(&host(vendor), &profile, 1, 2, true);
                assert_eq!(find(&entries, 1, 0).ecx & 1 << 5, 0, "VMX, {profile:?}");
                let extended = find(&entries, 0x8000_0001, 0);
                assert_eq!(extended.ecx & 1 << 2, 0, "SVM, {profile:?}");
                let svm = find(&entries, 0x8000_000a, 0);
                assert_eq!([svm.eax, svm.ebx, svm.ecx, svm.edx], [0; 4], "{profile:?}");
            }
        }
    }

    #[test]
    fn a_profile_never_adds_and_hides_what_its_level_lacks() {
        let entries = shape(&host(VENDOR_AMD), &CpuProfile::X86_64V2, 0, 1, true);
        let leaf1 = find(&entries, 1, 0);
        assert_eq!(leaf1.ecx & 1 << 28, 0, "no AVX");
        assert_ne!(leaf1.ecx & 1 << 20, 0, "SSE4.2");
        assert_eq!(find(&entries, 7, 0).ebx & 1 << 5, 0, "no AVX2");
        assert_eq!(find(&entries, 0xd, 0).eax, 0b11);
        let v3 = shape(&host(VENDOR_AMD), &CpuProfile::X86_64V3, 0, 1, true);
        assert_ne!(find(&v3, 7, 0).ebx & 1 << 5, 0, "AVX2");
        assert_eq!(find(&v3, 7, 0).ebx & 1 << 16, 0, "no AVX-512");
        assert_eq!(find(&v3, 0xd, 2).eax, 256);
        assert_eq!(find(&v3, 0xd, 5).eax, 0);
    }
}
