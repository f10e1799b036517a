//! The other processors: started one by one, then each waits for a job, stamping meanwhile.

use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::acpi::Acpi;
use crate::clock;
use crate::cpu::{self, MAX_CPUS};
use crate::memory;
use crate::start_info::StartInfo;

const START_PATIENCE_US: u64 = 5_000_000;

/// What another processor can be asked to do; packed into one word: 0 is nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Job {
    /// Burn this many milliseconds.
    Spin { ms: u32 },
}

static ALIVE: AtomicUsize = AtomicUsize::new(1);
static APIC_IDS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];
static JOBS: [AtomicU64; MAX_CPUS] = [const { AtomicU64::new(0) }; MAX_CPUS];

/// How many processors run.
pub fn alive() -> usize {
    ALIVE.load(Ordering::Acquire)
}

/// Starts the processors that ACPI lists, at most `limit` with this one.
pub fn start(acpi: &Acpi, info: &StartInfo, limit: usize) {
    if !cpu::has_interrupts() {
        return;
    }
    let me = cpu::cpuid(1, 0)[1] >> 24;
    APIC_IDS[0].store(u64::from(me), Ordering::Relaxed);
    for &apic_id in acpi.processors().iter().filter(|&&id| id != me) {
        let number = alive();
        if number >= limit.min(MAX_CPUS) {
            break;
        }
        if !start_one(info, apic_id, START_PATIENCE_US) {
            crate::say!("cpu {number} apic={apic_id} did not start");
            break;
        }
    }
}

/// Starts one more. False if there is no room for it, or it has not begun within that time.
pub fn start_one(info: &StartInfo, apic_id: u32, patience_us: u64) -> bool {
    let number = alive();
    if number >= MAX_CPUS || !cpu::has_interrupts() {
        return false;
    }
    APIC_IDS[number].store(u64::from(apic_id), Ordering::Relaxed);
    JOBS[number].store(0, Ordering::Relaxed);
    cpu::start_processor(memory::low_page(info), apic_id, number);
    let deadline = cpu::tsc() + clock::tsc_of_us(patience_us);
    while alive() == number && cpu::tsc() < deadline {
        core::hint::spin_loop();
    }
    alive() > number
}

/// Forgets a processor that will be gone. False if it is not the one that was started last.
pub fn forget(apic_id: u32) -> bool {
    let last = alive() - 1;
    let is_last = last > 0 && APIC_IDS[last].load(Ordering::Relaxed) == u64::from(apic_id);
    if is_last {
        ALIVE.fetch_sub(1, Ordering::AcqRel);
    }
    is_last
}

/// Gives `job` to a processor other than the boot one. False if there is none such or it is busy.
pub fn give(cpu: usize, job: Job) -> bool {
    let Job::Spin { ms } = job;
    if cpu == 0 || cpu >= alive() {
        return false;
    }
    let word = 1 << 32 | u64::from(ms);
    let given = JOBS[cpu]
        .compare_exchange(0, word, Ordering::AcqRel, Ordering::Relaxed)
        .is_ok();
    if given {
        cpu::wake(APIC_IDS[cpu].load(Ordering::Relaxed) as u32);
    }
    given
}

/// Lets every processor look around, after a change of how they stamp.
pub fn wake_all() {
    for apic_id in APIC_IDS.iter().take(alive()).skip(1) {
        cpu::wake(apic_id.load(Ordering::Relaxed) as u32);
    }
}

/// The life of another processor.
pub fn run(me: usize) -> ! {
    cpu::interrupts_on();
    ALIVE.fetch_add(1, Ordering::AcqRel);
    loop {
        let seen = cpu::events();
        clock::pulse(0);
        let job = JOBS[me].load(Ordering::Acquire);
        if job != 0 {
            clock::spin(job as u32 as u64, 0);
            JOBS[me].store(0, Ordering::Release);
            continue;
        }
        clock::doze(seen, clock::FOREVER);
    }
}
