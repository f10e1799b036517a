//! The CPU that a guest sees, from its start on and wherever it goes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a fault fails the test"
)]

mod probe_guest;

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use fractus_cpuid::{Cpu, Level, Profile, Register, Word, by_name, ignored, missing, words_of};
use fractus_vmm::config::CpuProfile;
use fractus_vmm::cpu::{check, offered};
use fractus_vmm::kvm::Hypervisor;
use fractus_vmm::stream::converge::{AtLimit, Policy};
use probe_guest::{Guest, Setup, fields};

const POLICY: Policy = Policy {
    downtime: Duration::from_millis(20),
    longest: Duration::from_secs(30),
    limit: Duration::from_secs(5),
    at_limit: AtLimit::Stop,
    throttle: None,
};

fn hypervisor() -> Hypervisor {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    Hypervisor::open(kvm.unwrap().into()).unwrap()
}

fn here() -> Cpu {
    offered(&hypervisor()).unwrap()
}

fn with(profile: &Profile) -> Setup {
    let mut setup = Setup::new();
    setup.config.cpus.profile = CpuProfile::Custom(Box::new(profile.clone()));
    setup
}

fn cpuid(guest: &mut Guest, leaf: u32, index: u32) -> [u32; 4] {
    let answer = fields(&guest.ok(&format!("cpuid {leaf:#x} {index}")));
    ["eax", "ebx", "ecx", "edx"].map(|name| u32::from_str_radix(&answer[name], 16).unwrap())
}

/// All registers of features that there are.
fn words() -> Vec<Word> {
    let leaves = [
        (1, 0),
        (6, 0),
        (7, 0),
        (7, 1),
        (7, 2),
        (0xd, 1),
        (0x4000_0001, 0),
    ];
    let more = [1, 7, 8, 0x21].map(|leaf| (0x8000_0000 + leaf, 0));
    let all = leaves.into_iter().chain(more);
    all.flat_map(|(leaf, index)| words_of(leaf, index))
        .collect()
}

fn seen(guest: &mut Guest, word: Word) -> u32 {
    let registers = cpuid(guest, word.leaf, word.index);
    let register = Register::ALL.iter().position(|one| *one == word.register);
    registers[register.unwrap()]
}

/// Less than the host has: of each register every third feature is gone, and two bits of the address.
fn less(cpu: &Cpu) -> Profile {
    let mut profile = Level::V2.cut(&cpu.offers);
    for (word, bits) in &cpu.offers.words {
        // Extended state and what it is for go with the level.
        if !matches!(word.leaf, 1 | 7 | 0xd) {
            profile.words.insert(*word, bits & 0x6db6_db6d);
        }
    }
    profile.physical_bits -= 2;
    profile
}

/// kvm-pvm, which runs guests without hardware for it, adds what the processor has to what it is given, and lists less.
fn shows_what_it_is_given(guest: &mut Guest, cpu: &Cpu) -> bool {
    let adds = words().into_iter().find(|word| {
        let listed = cpu.offers.word(*word) | ignored(*word);
        seen(guest, *word) & !listed != 0
    });
    if let Some(word) = adds {
        eprintln!("what the guest sees was not tested: this KVM shows more of {word} than it says");
    }
    adds.is_none()
}

#[test]
fn a_guest_sees_its_profile_and_the_same_where_it_goes() {
    let cpu = here();
    let profile = less(&cpu);
    assert_eq!(missing(&profile, &cpu), [""; 0]);
    let mut guest = with(&profile).boot();
    if shows_what_it_is_given(&mut guest, &cpu) {
        for word in words() {
            let shown = seen(&mut guest, word) & !ignored(word);
            assert_eq!(shown, profile.word(word), "{word}");
        }
        let [low, _, size, high] = cpuid(&mut guest, 0xd, 0);
        assert_eq!((u64::from(low), high, size), (profile.xcr0, 0, 576));
        let [addresses, ..] = cpuid(&mut guest, 0x8000_0008, 0);
        assert_eq!(addresses as u8, profile.physical_bits);
    }
    // What is known of it now goes along, and counts there.
    let CpuProfile::Kept(kept) = guest.machine.config().cpus.profile.clone() else {
        panic!("{:?}", guest.machine.config().cpus);
    };
    assert_eq!(kept.tsc_khz, cpu.offers.tsc_khz);
    let all = |guest: &mut Guest| -> Vec<[u32; 4]> {
        let leaves = kept.leaves.iter();
        leaves
            .map(|leaf| cpuid(guest, leaf.leaf, leaf.index))
            .collect()
    };
    let before = all(&mut guest);
    let (near, far) = UnixStream::pair().unwrap();
    let sent = guest.sent(POLICY, &[], near, far);
    sent.offer.unwrap().let_go();
    let mut guest = (sent.there)(sent.arrival.unwrap().machine);
    assert_eq!(all(&mut guest), before);
    let there = &guest.machine.config().cpus.profile;
    assert_eq!(*there, CpuProfile::Kept(kept));
}

#[test]
fn a_profile_that_this_host_lacks_something_of_makes_no_machine() {
    let cpu = here();
    let mut profile = cpu.offers.clone();
    // KVM gives it to nobody.
    let (word, bit) = by_name("enqcmd").unwrap();
    *profile.words.entry(word).or_default() |= 1 << bit;
    let refused = check(
        &hypervisor(),
        &CpuProfile::Custom(Box::new(profile.clone())),
    )
    .unwrap();
    assert_eq!(refused.unwrap_err().0, ["enqcmd"]);
    let why = with(&profile).refused();
    assert!(why.contains("lacks enqcmd"), "{why}");
}

fn kept_khz(guest: &Guest) -> Option<u32> {
    match &guest.machine.config().cpus.profile {
        CpuProfile::Kept(kept) => kept.tsc_khz,
        other => panic!("it keeps no CPU: {other:?}"),
    }
}

#[test]
fn a_tsc_runs_at_the_profiles_frequency_or_at_the_hosts_own() {
    let cpu = here();
    let Some(khz) = cpu.offers.tsc_khz else {
        return;
    };
    let other = khz / 5 * 4;
    let profile = Profile {
        tsc_khz: Some(other),
        ..cpu.offers.clone()
    };
    if !cpu.tsc_scales {
        // A guest that begins depends on none; one that goes on is held to what it kept.
        assert_eq!(kept_khz(&with(&profile).boot()), Some(khz));
        // As near as KVM takes one for the other.
        let near = khz + khz / 8000;
        let profile = Profile {
            tsc_khz: Some(near),
            ..profile
        };
        assert_eq!(kept_khz(&with(&profile).boot()), Some(near));
        return;
    }
    let mut guest = with(&profile).start();
    let booted = guest.booted();
    let seen: u32 = booted["tsc_khz"].parse().unwrap();
    assert!(
        seen.abs_diff(other) < other / 50,
        "{seen} instead of {other}"
    );
}
