//! Time: the TSC's frequency, ticks, and the gaps that each CPU sees between two looks at its TSC.
//!
//! A gap is what the guest lost: paused, migrated or merely not scheduled. While `stamp` is `spin`
//! every CPU looks without rest, so that gaps are exact; with `stamp N` it looks every N ms.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::cpu::{self, MAX_CPUS};
use crate::say;

const KVM_CLOCK: u32 = 0x4b56_4d01;

/// How CPUs stamp: milliseconds between two stamps, or one of these.
pub const STAMP_NEVER: u64 = 0;
pub const STAMP_SPIN: u64 = u64::MAX;

/// A TSC that never comes.
pub const FOREVER: u64 = u64::MAX;

static KHZ: AtomicU64 = AtomicU64::new(1_000_000);
static BOOTED: AtomicU64 = AtomicU64::new(0);
static STAMP: AtomicU64 = AtomicU64::new(STAMP_NEVER);
static TICK_INTERVAL: AtomicU64 = AtomicU64::new(0);
static NEXT_TICK: AtomicU64 = AtomicU64::new(0);
static TICKS: AtomicU64 = AtomicU64::new(0);

struct Stamps {
    last: AtomicU64,
    largest: AtomicU64,
    armed: AtomicU64,
}

static STAMPS: [Stamps; MAX_CPUS] = [const {
    Stamps {
        last: AtomicU64::new(0),
        largest: AtomicU64::new(0),
        armed: AtomicU64::new(0),
    }
}; MAX_CPUS];

/// Finds the frequency; says where it is from.
pub fn calibrate(given_khz: Option<u64>) -> &'static str {
    BOOTED.store(cpu::tsc(), Ordering::Relaxed);
    let (khz, source) = match given_khz {
        Some(khz) => (khz, "given"),
        None => measured(),
    };
    KHZ.store(khz.max(1), Ordering::Relaxed);
    source
}

fn measured() -> (u64, &'static str) {
    if cpu::cpuid(0, 0)[0] >= 0x15 {
        let [denominator, numerator, crystal, _] = cpu::cpuid(0x15, 0);
        if denominator != 0 && numerator != 0 && crystal != 0 {
            let hz = u64::from(crystal) * u64::from(numerator) / u64::from(denominator);
            return (hz / 1000, "cpuid-15");
        }
    }
    let hypervisor = cpu::cpuid(1, 0)[2] & 1 << 31 != 0;
    if hypervisor && cpu::cpuid(0x4000_0000, 0)[0] >= 0x4000_0010 {
        let khz = cpu::cpuid(0x4000_0010, 0)[0];
        if khz != 0 {
            return (u64::from(khz), "cpuid-40000010");
        }
    }
    if hypervisor && let Some(khz) = kvm_clock_khz() {
        return (khz, "kvmclock");
    }
    (1_000_000, "guess")
}

/// `pvclock_vcpu_time_info` (Linux, Documentation/virt/kvm/x86/msr.rst).
fn kvm_clock_khz() -> Option<u64> {
    #[repr(C, align(64))]
    struct Page([AtomicU64; 8]);
    static PAGE: Page = Page([const { AtomicU64::new(0) }; 8]);

    let [_, b, c, d] = cpu::cpuid(0x4000_0000, 0);
    let is_kvm = [b, c, d] == [0x4b4d_564b, 0x564b_4d56, 0x0000_004d];
    if !is_kvm || cpu::cpuid(0x4000_0001, 0)[0] & 1 << 3 == 0 {
        return None;
    }
    cpu::wrmsr(KVM_CLOCK, (&raw const PAGE) as u64 | 1);
    let word = PAGE.0[3].load(Ordering::Acquire);
    cpu::wrmsr(KVM_CLOCK, 0);
    let (multiplier, shift) = (word & 0xffff_ffff, (word >> 32) as i8);
    if multiplier == 0 {
        return None;
    }
    let khz = (1_000_000u64 << 32) / multiplier;
    Some(if shift < 0 {
        khz << (-shift).min(31)
    } else {
        khz >> shift.min(31)
    })
}

pub fn khz() -> u64 {
    KHZ.load(Ordering::Relaxed)
}

pub fn us(tsc: u64) -> u64 {
    (u128::from(tsc) * 1000 / u128::from(khz())) as u64
}

pub fn tsc_of_us(us: u64) -> u64 {
    (u128::from(us) * u128::from(khz()) / 1000) as u64
}

pub fn since_boot_us() -> u64 {
    us(cpu::tsc().wrapping_sub(BOOTED.load(Ordering::Relaxed)))
}

pub fn ticks() -> u64 {
    TICKS.load(Ordering::Relaxed)
}

/// A line every `ms`; none with 0.
pub fn tick_every(ms: u64) {
    let interval = tsc_of_us(ms * 1000);
    TICK_INTERVAL.store(interval, Ordering::Relaxed);
    NEXT_TICK.store(cpu::tsc() + interval, Ordering::Relaxed);
}

pub fn stamp_mode() -> u64 {
    STAMP.load(Ordering::Relaxed)
}

/// Every CPU begins anew: what lies before is no gap.
pub fn set_stamp_mode(mode: u64) {
    for stamps in &STAMPS {
        stamps.last.store(0, Ordering::Relaxed);
        stamps.largest.store(0, Ordering::Relaxed);
    }
    STAMP.store(mode, Ordering::Release);
}

/// The largest gap of a CPU since this was last asked, in microseconds.
pub fn take_gap_us(cpu: usize) -> u64 {
    us(STAMPS[cpu].largest.swap(0, Ordering::Relaxed))
}

/// Looks at the clock: stamps, and on the boot CPU says the tick that is due. To be called often.
pub fn pulse(nonce: u64) {
    let now = cpu::tsc();
    let me = cpu::this_cpu();
    if stamp_mode() != STAMP_NEVER {
        let stamps = &STAMPS[me];
        let last = stamps.last.swap(now, Ordering::Relaxed);
        if last != 0 && now > last {
            stamps.largest.fetch_max(now - last, Ordering::Relaxed);
        }
    }
    let interval = TICK_INTERVAL.load(Ordering::Relaxed);
    if me == 0 && interval != 0 && now >= NEXT_TICK.load(Ordering::Relaxed) {
        let tick = TICKS.fetch_add(1, Ordering::Relaxed) + 1;
        // From now, not from when it was due: a pause costs ticks, it is not caught up.
        NEXT_TICK.store(now + interval, Ordering::Relaxed);
        say!("tick {tick} nonce={nonce:016x} tsc={now}");
    }
}

/// Sleeps until something interrupts (unless it has since `seen`), the next tick or stamp is due, or
/// the TSC says `until` ([`FOREVER`]: no limit).
pub fn doze(seen: u64, until: u64) {
    let mode = stamp_mode();
    if mode == STAMP_SPIN {
        core::hint::spin_loop();
        return;
    }
    let now = cpu::tsc();
    let me = cpu::this_cpu();
    let mut due = until;
    if me == 0 && TICK_INTERVAL.load(Ordering::Relaxed) != 0 {
        due = due.min(NEXT_TICK.load(Ordering::Relaxed));
    }
    if mode != STAMP_NEVER {
        due = due.min(now + tsc_of_us(mode * 1000));
    }
    if due != FOREVER && !still_armed(me, now, due) {
        STAMPS[me].armed.store(due, Ordering::Relaxed);
        cpu::timer_in(us(due.saturating_sub(now)) * 1000 + 1000);
    }
    cpu::sleep(seen);
}

/// A timer that fires soon enough needs no other (each costs a visit to ring 0).
fn still_armed(me: usize, now: u64, due: u64) -> bool {
    let armed = STAMPS[me].armed.load(Ordering::Relaxed);
    // The count has 32 bits of nanoseconds: one set for later than that fires early.
    now < armed && armed <= due && armed - now < tsc_of_us(4_000_000)
}

/// Burns `ms` milliseconds, looking at the clock all the while.
pub fn spin(ms: u64, nonce: u64) {
    let end = cpu::tsc() + tsc_of_us(ms * 1000);
    while cpu::tsc() < end {
        pulse(nonce);
        core::hint::spin_loop();
    }
}
