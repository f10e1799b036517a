//! CPUID as the guest sees it: KVM's own list, cut to the profile, with the machine's topology.
//!
//! Topology: one package, every vCPU a core of one thread, so that the guest's scheduler shares
//! nothing it should not. Sources: Intel SDM vol. 2 CPUID, AMD APM vol. 3 appendix E, psABI x86-64
//! (micro-architecture levels), Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::config::CpuProfile;

/// Leaf 1 ECX.
mod leaf1_ecx {
    pub const X2APIC: u32 = 1 << 21;
    pub const TSC_DEADLINE: u32 = 1 << 24;
    pub const HYPERVISOR: u32 = 1 << 31;
    pub const VMX: u32 = 1 << 5;
    /// SSE3, PCLMULQDQ, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT, and what is ours.
    pub const V2: u32 = 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23 | OURS;
    /// FMA, MOVBE, AES, XSAVE, OSXSAVE, AVX, F16C, RDRAND.
    pub const V3: u32 =
        V2 | 1 << 1 | 1 << 12 | 1 << 22 | 1 << 25 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 30;
    /// x2APIC, TSC deadline, PCID, hypervisor: not part of a level, always there with KVM.
    const OURS: u32 = X2APIC | TSC_DEADLINE | 1 << 17 | HYPERVISOR;
}

/// Leaf 7 EBX for v3: FSGSBASE, TSC_ADJUST, BMI1, AVX2, SMEP, BMI2, ERMS, INVPCID, SMAP.
const LEAF7_EBX_V3: u32 =
    1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 20;
/// For v2 the same without AVX2, BMI1 and BMI2.
const LEAF7_EBX_V2: u32 = LEAF7_EBX_V3 & !(1 << 3 | 1 << 5 | 1 << 8);
/// Leaf 7 EDX that protects against the CPU's own faults: MD_CLEAR, IBRS, STIBP, FLUSH_L1D,
/// ARCH_CAPABILITIES, SSBD. Kept in every profile.
const LEAF7_EDX_SAFETY: u32 = 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 31;
/// Leaf 0x80000001 ECX: LAHF (v2), ABM (v3), and TOPOEXT, which says no more than the topology.
const EXTENDED_ECX_V2: u32 = 1 | 1 << 22;
const EXTENDED_ECX_V3: u32 = EXTENDED_ECX_V2 | 1 << 5;
/// Leaf 0x80000001 ECX: AMD's virtualisation.
const EXTENDED_ECX_SVM: u32 = 1 << 2;
/// Leaf 0x80000001 ECX: legacy core numbering, for more than one core.
const EXTENDED_ECX_CMP_LEGACY: u32 = 1 << 1;
/// XCR0 components of leaf 0xd: x87, SSE; and AVX for v3.
const XCR0_V2: u32 = 0b11;
const XCR0_V3: u32 = 0b111;
/// Leaf 0xd subleaf 1: XSAVEOPT, XSAVEC, XGETBV1 (no XSAVES: it brings an MSR of components).
const XSAVE_FORMS: u32 = 0b111;

const VENDOR_AMD: [u32; 3] = [0x6874_7541, 0x6974_6e65, 0x444d_4163];
const VENDOR_HYGON: [u32; 3] = [0x6f67_7948, 0x6e65_476e, 0x656e_6975];

/// The guest's CPUID for vCPU `index` of `count`, from what KVM supports.
pub fn shape(
    supported: &[kvm_cpuid_entry2],
    profile: CpuProfile,
    index: u8,
    count: u8,
    tsc_deadline: bool,
) -> Vec<kvm_cpuid_entry2> {
    // Sub-leaves of topology are made here; those KVM gives are the host's.
    let topology = [0xb, 0x1f];
    let mut entries: Vec<_> = supported
        .iter()
        .filter(|entry| !topology.contains(&entry.function))
        .copied()
        .collect();
    let vendor = entries.iter().find(|entry| entry.function == 0);
    let vendor = vendor.map(|leaf| [leaf.ebx, leaf.edx, leaf.ecx]);
    let amd = vendor == Some(VENDOR_AMD) || vendor == Some(VENDOR_HYGON);
    for entry in &mut entries {
        restrict(entry, profile);
        place(entry, u32::from(index), u32::from(count), amd, tsc_deadline);
    }
    if supported
        .iter()
        .any(|leaf| leaf.function == 0 && leaf.eax >= 0xb)
    {
        entries.extend(extended_topology(u32::from(index), u32::from(count)));
    }
    entries
}

/// Takes away what the profile does not have.
fn restrict(entry: &mut kvm_cpuid_entry2, profile: CpuProfile) {
    let v3 = match profile {
        CpuProfile::Host => return,
        CpuProfile::X86_64V2 => false,
        CpuProfile::X86_64V3 => true,
    };
    let pick = |two: u32, three: u32| if v3 { three } else { two };
    match (entry.function, entry.index) {
        (0, _) => entry.eax = entry.eax.min(0xd),
        (1, _) => entry.ecx &= pick(leaf1_ecx::V2, leaf1_ecx::V3),
        (7, 0) => {
            entry.eax = 0;
            entry.ebx &= pick(LEAF7_EBX_V2, LEAF7_EBX_V3);
            entry.ecx = 0;
            entry.edx &= LEAF7_EDX_SAFETY;
        }
        (0xd, 0) => {
            entry.eax &= pick(XCR0_V2, XCR0_V3);
            entry.edx = 0;
            // Legacy area and header, and AVX's 256 bytes behind them.
            let size = pick(512 + 64, 512 + 64 + 256);
            (entry.ebx, entry.ecx) = (size, size);
        }
        (0xd, 1) => (entry.eax, entry.ecx, entry.edx) = (entry.eax & XSAVE_FORMS, 0, 0),
        (0xd, 2) if v3 => {}
        (7 | 0xd, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        (0x8000_0001, _) => entry.ecx &= pick(EXTENDED_ECX_V2, EXTENDED_ECX_V3),
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
        let entries = shape(&host(VENDOR_AMD), CpuProfile::Host, 3, 6, true);
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
                let entries = shape(&host(vendor), profile, 1, 2, true);
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
        let entries = shape(&host(VENDOR_AMD), CpuProfile::X86_64V2, 0, 1, true);
        let leaf1 = find(&entries, 1, 0);
        assert_eq!(leaf1.ecx & 1 << 28, 0, "no AVX");
        assert_ne!(leaf1.ecx & 1 << 20, 0, "SSE4.2");
        assert_eq!(find(&entries, 7, 0).ebx & 1 << 5, 0, "no AVX2");
        assert_eq!(find(&entries, 0xd, 0).eax, 0b11);
        let v3 = shape(&host(VENDOR_AMD), CpuProfile::X86_64V3, 0, 1, true);
        assert_ne!(find(&v3, 7, 0).ebx & 1 << 5, 0, "AVX2");
        assert_eq!(find(&v3, 7, 0).ebx & 1 << 16, 0, "no AVX-512");
        assert_eq!(find(&v3, 0xd, 2).eax, 256);
        assert_eq!(find(&v3, 0xd, 5).eax, 0);
    }
}
