//! What a guest's CPU is: which features of CPUID, which extended state (XCR0), how many bits of a physical address,
//! which TSC frequency.
//!
//! Pure: the machine, the agents and the controller decide by the same code whether a host can run a guest. What counts
//! is what KVM offers, not what the processor has: KVM hides some and emulates some (nova compared with the processor
//! for years, and refused hosts for what no guest had).

mod level;
mod profile;
mod words;

pub use level::Level;
pub use profile::{Area, Cpu, NoBaseline, Profile, baseline, beyond, missing, words_of};
pub use words::{LEAF7_ECX, Register, Word, XSS, by_name, ignored, name};

use serde::{Deserialize, Serialize};

/// One answer of the instruction CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaf {
    /// EAX and ECX as they are asked with.
    pub leaf: u32,
    pub index: u32,
    /// The answer depends on `index`.
    pub indexed: bool,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl Leaf {
    pub fn get(&self, register: Register) -> u32 {
        match register {
            Register::Eax => self.eax,
            Register::Ebx => self.ebx,
            Register::Ecx => self.ecx,
            Register::Edx => self.edx,
        }
    }

    pub fn set(&mut self, register: Register, value: u32) {
        match register {
            Register::Eax => self.eax = value,
            Register::Ebx => self.ebx = value,
            Register::Ecx => self.ecx = value,
            Register::Edx => self.edx = value,
        }
    }
}

#[cfg(test)]
mod tests;
