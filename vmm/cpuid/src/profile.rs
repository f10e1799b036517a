//! What a guest has, what a host offers, and what several hosts have in common.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use crate::words::{Register, WORDS, Word, ignored, name, word};
use crate::{Leaf, words};

/// A guest's CPU, as far as it has to be the same on each host that it comes to. Its caches, its name and its model are
/// its first host's, and travel with the machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Profile {
    /// `GenuineIntel`, `AuthenticAMD`: no guest goes from one to another.
    pub vendor: String,
    /// Features, by register; what is 0 is left out.
    pub words: BTreeMap<Word, u32>,
    /// Components of extended state that the guest may switch on.
    pub xcr0: u64,
    /// Where these are in the XSAVE area, from component 2 on: two makes of one vendor may differ there.
    pub areas: BTreeMap<u8, Area>,
    /// Of a guest-physical address.
    pub physical_bits: u8,
    /// None: any will do.
    #[serde(default)]
    pub tsc_khz: Option<u32>,
}

/// Bytes of an XSAVE area.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Area {
    pub offset: u32,
    pub size: u32,
}

/// What a host's KVM gives its guests.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// For people.
    pub family: u32,
    pub model: u32,
    pub stepping: u32,
    /// With the host's TSC frequency; none: it has no steady one.
    pub offers: Profile,
    /// A guest's TSC can run at another frequency.
    pub tsc_scales: bool,
}

/// Why hosts have nothing in common.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoBaseline {
    #[error("there is no host whose CPU is known")]
    Empty,
    #[error("the hosts' CPUs are of several makes: {}", .0.join(", "))]
    Vendors(Vec<String>),
}

/// How far a TSC may be off before KVM scales it (Linux: tsc_tolerance_ppm).
const TOLERANCE_PPM: u64 = 250;
/// x87 and SSE are in the legacy area, which each XSAVE area has.
const LEGACY: u64 = 0b11;
/// Components that go together.
const GROUPS: [u64; 3] = [0b11 << 3, 0b111 << 5, 0b11 << 17];
const AVX: u64 = 1 << 2;
const AVX512: u64 = 0b111 << 5;
/// No profile has it: which version of AVX10 there is says a leaf (0x24) that is in none.
const NEVER: u64 = u64::MAX;
/// Of a processor from before there was a leaf that says it.
const LEAST_PHYSICAL_BITS: u8 = 36;

impl Profile {
    pub fn word(&self, word: Word) -> u32 {
        self.words.get(&word).copied().unwrap_or(0)
    }

    /// What these leaves say, whoever they are for.
    pub fn of(leaves: &[Leaf]) -> Profile {
        let find = |leaf, index| {
            let mut all = leaves.iter();
            all.find(|one| one.leaf == leaf && (one.index == index || !one.indexed && index == 0))
        };
        let mut profile = Profile {
            physical_bits: LEAST_PHYSICAL_BITS,
            ..Default::default()
        };
        if let Some(leaf) = find(0, 0) {
            let bytes = [leaf.ebx, leaf.edx, leaf.ecx]
                .map(u32::to_le_bytes)
                .concat();
            profile.vendor = String::from_utf8_lossy(&bytes).into_owned();
        }
        for (word, _) in WORDS {
            let bits = find(word.leaf, word.index).map_or(0, |leaf| leaf.get(word.register));
            profile.words.insert(word, bits & !ignored(word));
        }
        if let Some(leaf) = find(0xd, 0) {
            profile.xcr0 = u64::from(leaf.edx) << 32 | u64::from(leaf.eax);
        }
        for bit in 2..63_u8 {
            if profile.xcr0 & 1 << bit != 0
                && let Some(leaf) = find(0xd, bit.into())
            {
                let (size, offset) = (leaf.eax, leaf.ebx);
                profile.areas.insert(bit, Area { offset, size });
            }
        }
        if let Some(leaf) = find(0x8000_0008, 0) {
            profile.physical_bits = leaf.eax as u8;
        }
        profile.settled()
    }

    /// Without extended state that has no place, and without features whose state is not there.
    pub(crate) fn settled(mut self) -> Profile {
        let placed = self.areas.keys().fold(LEGACY, |all, bit| all | at(*bit));
        self.xcr0 &= placed;
        if self.xcr0 & AVX == 0 {
            self.xcr0 &= !AVX512;
        }
        for group in GROUPS {
            if self.xcr0 & group != group {
                self.xcr0 &= !group;
            }
        }
        let xcr0 = self.xcr0;
        self.areas.retain(|bit, _| xcr0 & at(*bit) != 0);
        for (word, bit, state) in STATES.iter() {
            if state & !xcr0 != 0
                && let Some(bits) = self.words.get_mut(word)
            {
                *bits &= !bit;
            }
        }
        self.words.retain(|_, bits| *bits != 0);
        self
    }

    /// Names of its features.
    pub fn features(&self) -> Vec<String> {
        let nothing = Profile::default();
        let names: BTreeSet<String> = bits_beyond(self, &nothing).into_iter().collect();
        names.into_iter().collect()
    }

    /// What both have.
    fn and(&self, other: &Profile) -> Profile {
        let mut both = self.clone();
        for (word, bits) in &mut both.words {
            *bits &= other.word(*word);
        }
        both.xcr0 &= other.xcr0;
        both.areas
            .retain(|bit, area| other.areas.get(bit) == Some(area));
        both.physical_bits = both.physical_bits.min(other.physical_bits);
        both.settled()
    }
}

/// The component's bit; of what comes from elsewhere, none beyond the register.
fn at(component: u8) -> u64 {
    1_u64.checked_shl(component.into()).unwrap_or(0)
}

/// Bits that are none without these components of extended state.
static STATES: LazyLock<Vec<(Word, u32, u64)>> = LazyLock::new(|| {
    let of = |(word, names): &(Word, &'static str)| {
        let word = *word;
        let bits = names.split_ascii_whitespace().enumerate();
        bits.map(move |(bit, name)| (word, 1 << bit, state_of(name)))
    };
    let all = WORDS.iter().flat_map(of);
    all.filter(|(_, _, state)| *state != 0).collect()
});

/// Components without which a feature is none.
fn state_of(feature: &str) -> u64 {
    match feature {
        "avx10" => NEVER,
        _ if feature.starts_with("avx512") => AVX | AVX512,
        _ if feature.starts_with("avx") => AVX,
        "fma" | "fma4" | "f16c" | "xop" | "vaes" | "vpclmulqdq" => AVX,
        _ if feature.starts_with("amx") => 0b11 << 17,
        "mpx" => 0b11 << 3,
        "pku" => 1 << 9,
        _ => 0,
    }
}

fn bits_beyond(profile: &Profile, other: &Profile) -> Vec<String> {
    let mut names = Vec::new();
    for (word, bits) in &profile.words {
        let more = bits & !other.word(*word);
        let more = (0..32).filter(|bit| more & 1 << bit != 0);
        names.extend(more.map(|bit| name(*word, bit)));
    }
    names
}

/// What one has and the other has not, but for the TSC: features by their names in /proc/cpuinfo.
pub fn beyond(profile: &Profile, other: &Profile) -> Vec<String> {
    if profile.vendor != other.vendor {
        return vec![format!("a CPU of {}", profile.vendor)];
    }
    let mut names = bits_beyond(profile, other);
    for bit in 0..64_u8 {
        if profile.xcr0 & !other.xcr0 & 1 << bit != 0 {
            names.push(format!("xcr0_{bit}"));
        }
    }
    for (bit, area) in &profile.areas {
        let theirs = other.areas.get(bit);
        if theirs.is_some_and(|theirs| theirs != area) {
            let Area { offset, size } = area;
            names.push(format!("xcr0_{bit} ({size} bytes at {offset})"));
        }
    }
    if profile.physical_bits > other.physical_bits {
        names.push(format!("{} bits of address", profile.physical_bits));
    }
    let mut seen = BTreeSet::new();
    names.retain(|name| seen.insert(name.clone()));
    names
}

/// What a guest of this profile would miss on this host; empty: it can run there.
pub fn missing(profile: &Profile, cpu: &Cpu) -> Vec<String> {
    let mut names = beyond(profile, &cpu.offers);
    if let Some(khz) = profile.tsc_khz
        && !cpu.offers_tsc(khz)
    {
        let here = match cpu.offers.tsc_khz {
            Some(here) => format!(", has {here} kHz"),
            None => String::new(),
        };
        names.push(format!("a TSC of {khz} kHz (it cannot scale one{here})"));
    }
    names
}

/// Whether KVM takes one frequency for the other, without scaling.
fn is_near(khz: u32, here: u32) -> bool {
    u64::from(khz.abs_diff(here)) * 1_000_000 <= TOLERANCE_PPM * u64::from(here)
}

/// What all have. Its TSC is what each can have, where that is one frequency, and any otherwise: those that cannot scale
/// and differ take no guests of each other.
///
/// # Errors
/// There is no host, or they are of several vendors.
pub fn baseline<'a>(cpus: impl IntoIterator<Item = &'a Cpu>) -> Result<Profile, NoBaseline> {
    let cpus: Vec<&Cpu> = cpus.into_iter().collect();
    let vendors: BTreeSet<&str> = cpus.iter().map(|cpu| cpu.offers.vendor.as_str()).collect();
    if vendors.len() > 1 {
        let vendors = vendors.into_iter().map(str::to_owned);
        return Err(NoBaseline::Vendors(vendors.collect()));
    }
    let (first, others) = cpus.split_first().ok_or(NoBaseline::Empty)?;
    let all = |common: Profile, cpu: &&Cpu| common.and(&cpu.offers);
    let mut common = others.iter().fold(first.offers.clone().settled(), all);
    let fixed = cpus.iter().filter(|cpu| !cpu.tsc_scales);
    let slowest = fixed.clone().map(|cpu| cpu.offers.tsc_khz).min().flatten();
    common.tsc_khz = slowest.filter(|khz| cpus.iter().all(|cpu| cpu.offers_tsc(*khz)));
    Ok(common)
}

/// Which registers of a leaf hold features.
pub fn words_of(leaf: u32, index: u32) -> impl Iterator<Item = Word> {
    let all = Register::ALL.into_iter();
    all.map(move |register| word(leaf, index, register))
        .filter(|word| words::is_named(*word))
}

impl Cpu {
    /// A guest's TSC can run at this frequency here, or near enough to it.
    pub fn offers_tsc(&self, khz: u32) -> bool {
        let own = self.offers.tsc_khz;
        self.tsc_scales || own.is_some_and(|here| is_near(khz, here))
    }

    /// What KVM's list of leaves says, with the TSC of the host.
    pub fn of(leaves: &[Leaf], tsc_khz: Option<u32>, tsc_scales: bool) -> Cpu {
        let signature = leaves.iter().find(|leaf| leaf.leaf == 1);
        let signature = signature.map_or(0, |leaf| leaf.eax);
        let base = signature >> 8 & 0xf;
        let family = match base {
            0xf => base + (signature >> 20 & 0xff),
            _ => base,
        };
        let low = signature >> 4 & 0xf;
        let model = match base {
            6 | 0xf => low | (signature >> 16 & 0xf) << 4,
            _ => low,
        };
        Cpu {
            family,
            model,
            stepping: signature & 0xf,
            offers: Profile {
                tsc_khz,
                ..Profile::of(leaves)
            },
            tsc_scales,
        }
    }
}
