//! Micro-architecture levels of the psABI x86-64, with what every profile keeps besides.

use serde::{Deserialize, Serialize};

use crate::profile::{Cpu, Profile};
use crate::words::{EXTENDED_ECX, LEAF1_ECX, LEAF7_EBX, LEAF7_EDX, Word, XSAVE_FORMS, XSS, name};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// SSE4.2, POPCNT, CMPXCHG16B.
    V2,
    /// AVX2, BMI, FMA, MOVBE.
    V3,
}

/// x2APIC, TSC deadline, PCID, hypervisor: not part of a level, always there with KVM.
const LEAF1_OURS: u32 = 1 << 21 | 1 << 24 | 1 << 17 | 1 << 31;
/// SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT.
const LEAF1_V2: u32 = 1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23;
/// FMA, MOVBE, XSAVE, AVX, F16C; allowed besides are PCLMULQDQ, AES, OSXSAVE, RDRAND.
const LEAF1_V3: u32 = LEAF1_V2 | 1 << 12 | 1 << 22 | 1 << 26 | 1 << 28 | 1 << 29;
const LEAF1_WITH_V3: u32 = 1 << 1 | 1 << 25 | 1 << 27 | 1 << 30;
/// BMI1, AVX2, BMI2.
const LEAF7_V3: u32 = 1 << 3 | 1 << 5 | 1 << 8;
/// FSGSBASE, TSC_ADJUST, SMEP, ERMS, INVPCID, SMAP: the kernel's, with either level.
const LEAF7_OURS: u32 = 1 | 1 << 1 | 1 << 7 | 1 << 9 | 1 << 10 | 1 << 20;
/// What protects against the CPU's own faults: MD_CLEAR, IBRS, STIBP, FLUSH_L1D, ARCH_CAPABILITIES, SSBD.
const LEAF7_SAFETY: u32 = 1 << 10 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 29 | 1 << 31;
/// LAHF (v2), ABM (v3); TOPOEXT says no more than the topology.
const EXTENDED_V2: u32 = 1;
const EXTENDED_V3: u32 = EXTENDED_V2 | 1 << 5;
const EXTENDED_OURS: u32 = 1 << 22;
/// XSAVEOPT, XSAVEC, XGETBV1 (no XSAVES: it brings an MSR of components).
const FORMS: u32 = 0b111;

impl Level {
    pub const ALL: [Level; 2] = [Level::V2, Level::V3];

    pub fn name(self) -> &'static str {
        match self {
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
        }
    }

    pub fn by_name(name: &str) -> Option<Level> {
        Self::ALL.into_iter().find(|level| level.name() == name)
    }

    fn pick(self, two: u32, three: u32) -> u32 {
        match self {
            Self::V2 => two,
            Self::V3 => three,
        }
    }

    /// The bits that a guest of this level may have.
    pub fn allowed(self, word: Word) -> u32 {
        match word {
            LEAF1_ECX => LEAF1_OURS | self.pick(LEAF1_V2, LEAF1_V3 | LEAF1_WITH_V3),
            LEAF7_EBX => LEAF7_OURS | self.pick(0, LEAF7_V3),
            LEAF7_EDX => LEAF7_SAFETY,
            XSAVE_FORMS => FORMS,
            EXTENDED_ECX => EXTENDED_OURS | self.pick(EXTENDED_V2, EXTENDED_V3),
            Word { leaf: 7, .. } | XSS => 0,
            _ => u32::MAX,
        }
    }

    /// The bits without which a host does not have the level.
    fn needed(self) -> [(Word, u32); 3] {
        [
            (LEAF1_ECX, self.pick(LEAF1_V2, LEAF1_V3)),
            (LEAF7_EBX, self.pick(0, LEAF7_V3)),
            (EXTENDED_ECX, self.pick(EXTENDED_V2, EXTENDED_V3)),
        ]
    }

    /// x87, SSE; and AVX for v3.
    pub fn xcr0(self) -> u64 {
        match self {
            Self::V2 => 0b11,
            Self::V3 => 0b111,
        }
    }

    /// What the host lacks of it.
    pub fn missing(self, cpu: &Cpu) -> Vec<String> {
        let mut missing = Vec::new();
        for (word, needed) in self.needed() {
            let lacks = needed & !cpu.offers.word(word);
            missing.extend(
                (0..32)
                    .filter(|bit| lacks & 1 << bit != 0)
                    .map(|bit| name(word, bit)),
            );
        }
        missing
    }

    /// The profile without what is beyond the level.
    pub fn cut(self, profile: &Profile) -> Profile {
        let mut cut = profile.clone();
        for (word, bits) in &mut cut.words {
            *bits &= self.allowed(*word);
        }
        cut.xcr0 &= self.xcr0();
        cut.settled()
    }
}
