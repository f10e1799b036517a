//! What this host's KVM gives guests, and whether a machine can be here.

use fractus_cpuid::{Cpu, Leaf, Profile, beyond, missing};
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::VcpuFd;

use super::cpuid;
use crate::config::{CpuProfile, KeptCpu};
use crate::kvm::{Hypervisor, KvmError};

/// Leaf 1 ECX: the local APIC's timer has TSC-deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;

/// This host's CPU is none for the machine.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this host's CPU, as KVM gives it to guests, lacks {}", .0.join(", "))]
pub struct Lacks(pub Vec<String>);

/// All leaves that KVM supports, and what they come to.
pub struct Offered {
    pub supported: Vec<kvm_cpuid_entry2>,
    pub tsc_deadline: bool,
    leaves: Vec<Leaf>,
    tsc_khz: Option<u32>,
    tsc_scales: bool,
}

impl Offered {
    /// `vcpu` is any of this host's: KVM tells its TSC's frequency only of one.
    pub fn read(hypervisor: &Hypervisor, vcpu: Option<&VcpuFd>) -> Result<Offered, KvmError> {
        let supported = hypervisor.supported_cpuid()?.as_slice().to_vec();
        let tsc_deadline = hypervisor.has_tsc_deadline_timer();
        let mut leaves: Vec<Leaf> = supported.iter().map(cpuid::leaf).collect();
        for leaf in leaves.iter_mut().filter(|leaf| leaf.leaf == 1) {
            leaf.ecx &= !TSC_DEADLINE;
            if tsc_deadline {
                leaf.ecx |= TSC_DEADLINE;
            }
        }
        // Where the host's is not steady KVM says so by an error.
        let tsc_khz = vcpu.and_then(|vcpu| vcpu.get_tsc_khz().ok());
        let tsc_khz = tsc_khz.filter(|khz| *khz > 0);
        Ok(Offered {
            supported,
            tsc_deadline,
            leaves,
            tsc_khz,
            tsc_scales: hypervisor.scales_tsc(),
        })
    }

    /// None: KVM does not say.
    pub fn tsc_khz(&self) -> Option<u32> {
        self.tsc_khz
    }

    fn cpu(&self) -> Cpu {
        Cpu::of(&self.leaves, self.tsc_khz, self.tsc_scales)
    }

    /// Whether a machine of this profile can go on here.
    pub fn check(&self, profile: &CpuProfile) -> Result<(), Lacks> {
        let profile = match profile {
            CpuProfile::Host | CpuProfile::X86_64V2 | CpuProfile::X86_64V3 => return Ok(()),
            CpuProfile::Custom(profile) => Profile::clone(profile),
            CpuProfile::Kept(kept) => Profile {
                tsc_khz: kept.tsc_khz,
                ..Profile::of(&kept.leaves)
            },
        };
        none_of(missing(&profile, &self.cpu()))
    }

    /// What a machine is from its start on. One that begins depends on no TSC yet: where its profile's cannot be had, the
    /// host's own is what it keeps.
    pub fn keep(&self, profile: &mut CpuProfile) -> Result<(), Lacks> {
        let CpuProfile::Custom(custom) = profile else {
            return self.check(profile);
        };
        let here = self.cpu();
        none_of(beyond(custom, &here.offers))?;
        let khz = custom.tsc_khz.filter(|khz| here.offers_tsc(*khz));
        let kept = KeptCpu {
            leaves: cpuid::cut(&self.leaves, custom),
            tsc_khz: khz.or(self.tsc_khz),
        };
        *profile = CpuProfile::Kept(Box::new(kept));
        Ok(())
    }

    /// The frequency to ask KVM for; none: it gives the right one by itself, or one near enough.
    pub fn scaled(&self, profile: &CpuProfile) -> Option<u32> {
        match profile {
            CpuProfile::Kept(kept) if self.tsc_scales => {
                kept.tsc_khz.filter(|_| kept.tsc_khz != self.tsc_khz)
            }
            _ => None,
        }
    }
}

fn none_of(lacks: Vec<String>) -> Result<(), Lacks> {
    match lacks.is_empty() {
        true => Ok(()),
        false => Err(Lacks(lacks)),
    }
}

/// What this host's KVM gives guests.
pub fn offered(hypervisor: &Hypervisor) -> Result<Cpu, KvmError> {
    let (_vm, vcpu) = hypervisor.any_vcpu()?;
    Ok(Offered::read(hypervisor, Some(&vcpu))?.cpu())
}

/// Whether a machine of this profile can come to this host: what making it finds out, before anything is made.
///
/// # Errors
/// KVM does not answer, or names of what the host lacks.
pub fn check(hypervisor: &Hypervisor, profile: &CpuProfile) -> Result<Result<(), Lacks>, KvmError> {
    let (_vm, vcpu) = hypervisor.any_vcpu()?;
    Ok(Offered::read(hypervisor, Some(&vcpu))?.check(profile))
}

#[cfg(test)]
mod tests {
    use fractus_cpuid::{Level, Word};
    use kvm_bindings::CpuId;

    use super::*;

    fn hypervisor() -> Hypervisor {
        let kvm = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm");
        Hypervisor::open(kvm.unwrap().into()).unwrap()
    }

    /// Less than the host has, in each register.
    fn less(profile: &Profile) -> Profile {
        let mut less = Level::V2.cut(profile);
        let odd = |(word, bits): (&Word, &u32)| (*word, bits & 0x5555_5555);
        let words = less.words.iter().map(odd).filter(|(_, bits)| *bits != 0);
        less.words = words.collect();
        less.physical_bits -= 2;
        less
    }

    #[test]
    fn kvm_is_given_the_profile_and_nothing_else() {
        let hypervisor = hypervisor();
        let (_vm, vcpu) = hypervisor.any_vcpu().unwrap();
        let offered = Offered::read(&hypervisor, Some(&vcpu)).unwrap();
        let wanted = less(&offered.cpu().offers);
        let mut profile = CpuProfile::Custom(Box::new(wanted.clone()));
        offered.keep(&mut profile).unwrap();
        let CpuProfile::Kept(kept) = &profile else {
            panic!("{profile:?}");
        };
        assert_eq!(kept.tsc_khz, offered.tsc_khz);
        assert_eq!(
            Profile::of(&kept.leaves),
            Profile {
                tsc_khz: None,
                ..wanted.clone()
            }
        );
        // Another host's list, and whether it has the timer, are nothing to it.
        let entries = cpuid::shape(&[], &profile, 0, 2, true);
        let given: Vec<Leaf> = entries.iter().map(cpuid::leaf).collect();
        assert_eq!(
            Profile::of(&given),
            Profile {
                tsc_khz: None,
                ..wanted
            }
        );
        // Not asked back: kvm-pvm adds what the processor has.
        vcpu.set_cpuid2(&CpuId::from_entries(&entries).unwrap())
            .unwrap();
        // What it keeps can be here again.
        offered.check(&profile).unwrap();
    }

    #[test]
    fn only_a_guest_that_goes_on_is_held_to_its_tsc() {
        let hypervisor = hypervisor();
        let (_vm, vcpu) = hypervisor.any_vcpu().unwrap();
        let mut offered = Offered::read(&hypervisor, Some(&vcpu)).unwrap();
        offered.tsc_khz = Some(2_000_000);
        let start = |offered: &Offered, khz| {
            let mut offers = offered.cpu().offers;
            offers.tsc_khz = Some(khz);
            let mut profile = CpuProfile::Custom(Box::new(offers));
            let arrives = offered.check(&profile).is_ok();
            offered.keep(&mut profile).unwrap();
            let CpuProfile::Kept(kept) = &profile else {
                panic!("{profile:?}");
            };
            (arrives, kept.tsc_khz, offered.scaled(&profile), profile)
        };
        for (scales, khz, arrives, kept, asked) in [
            (false, 2_000_400, true, 2_000_400, None),
            (false, 3_000_000, false, 2_000_000, None),
            (true, 3_000_000, true, 3_000_000, Some(3_000_000)),
        ] {
            offered.tsc_scales = scales;
            let (came, keeps, scaled, _) = start(&offered, khz);
            assert_eq!((came, keeps, scaled), (arrives, Some(kept), asked));
        }
        let (.., mut there) = start(&offered, 3_000_000);
        offered.tsc_scales = false;
        assert!(offered.keep(&mut there).is_err(), "it goes on");
    }

    #[test]
    fn profiles_that_are_no_promise_are_not_checked() {
        let hypervisor = hypervisor();
        let offered = Offered::read(&hypervisor, None).unwrap();
        for profile in [CpuProfile::Host, CpuProfile::X86_64V2, CpuProfile::X86_64V3] {
            let mut kept = profile.clone();
            offered.keep(&mut kept).unwrap();
            assert_eq!((kept, offered.scaled(&profile)), (profile, None));
        }
    }
}
