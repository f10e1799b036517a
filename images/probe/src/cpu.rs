//! The processor as ring 3 sees it: the gate to ring 0, the counters of this CPU, x2APIC and its
//! timer. Nothing else in the probe knows that there is a ring 0.
//!
//! The numbers of the gate's functions and the layout of a CPU's block are those of boot.S.

use core::arch::asm;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// As many as boot.S has room for.
pub const MAX_CPUS: usize = 64;

const CPU_BLOCK: usize = 0x1_0000;
const EVENTS: usize = 0x100;

const OUTB: u64 = 0;
const OUTW: u64 = 1;
const OUTL: u64 = 2;
const INB: u64 = 3;
const INW: u64 = 4;
const INL: u64 = 5;
const OUTS: u64 = 6;
const WRMSR: u64 = 7;
const RDMSR: u64 = 8;
const CPUID: u64 = 9;
const HLT: u64 = 10;
const IRQ_ON: u64 = 11;
const FLUSH: u64 = 12;
const TRIPLE: u64 = 13;
const RDTSC: u64 = 14;

/// Where boot.S has its descriptors, and those of task state segments among them; the type of one that is
/// not in use.
const GDT: usize = 0x10_2000;
const FIRST_TSS: usize = 0x28;
const AVAILABLE_TSS: u8 = 0x89;

const X2APIC_SVR: u32 = 0x80f;
const X2APIC_ICR: u32 = 0x830;
const X2APIC_LVT_TIMER: u32 = 0x832;
const X2APIC_LVT_LINT0: u32 = 0x835;
const X2APIC_TIMER_COUNT: u32 = 0x838;
const X2APIC_TIMER_DIVIDE: u32 = 0x83e;

/// Vectors. MSI-X takes those from [`VECTOR_MSIX`] on.
pub const VECTOR_TIMER: u8 = 0x40;
pub const VECTOR_SERIAL: u8 = 0x41;
pub const VECTOR_WAKE: u8 = 0x42;
pub const VECTOR_SCI: u8 = 0x43;
pub const VECTOR_MSIX: u8 = 0x50;

unsafe extern "C" {
    static cpu_blocks: [[AtomicU64; CPU_BLOCK / 8]; MAX_CPUS];
    static cpu_of_apic: [u8; 256];
    static ap_start: u8;
    static ap_end: u8;
}

/// False where the processor has no x2APIC: then nothing interrupts, and waiting is polling.
static INTERRUPTS: AtomicBool = AtomicBool::new(false);

pub fn outb(port: u16, value: u8) {
    // SAFETY: the gate does one `out` and returns; no memory is touched.
    unsafe { asm!("ud2", in("rdi") OUTB, in("dx") port, in("al") value, options(nostack)) }
}

pub fn outw(port: u16, value: u16) {
    // SAFETY: as in `outb`.
    unsafe { asm!("ud2", in("rdi") OUTW, in("dx") port, in("ax") value, options(nostack)) }
}

pub fn outl(port: u16, value: u32) {
    // SAFETY: as in `outb`.
    unsafe { asm!("ud2", in("rdi") OUTL, in("dx") port, in("eax") value, options(nostack)) }
}

pub fn inb(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as in `outb`.
    unsafe { asm!("ud2", in("rdi") INB, in("dx") port, out("al") value, options(nostack)) }
    value
}

pub fn inw(port: u16) -> u16 {
    let value: u16;
    // SAFETY: as in `outb`.
    unsafe { asm!("ud2", in("rdi") INW, in("dx") port, out("ax") value, options(nostack)) }
    value
}

pub fn inl(port: u16) -> u32 {
    let value: u32;
    // SAFETY: as in `outb`.
    unsafe { asm!("ud2", in("rdi") INL, in("dx") port, out("eax") value, options(nostack)) }
    value
}

/// Every byte to the same port, in one visit to ring 0.
pub fn outs(port: u16, bytes: &[u8]) {
    // SAFETY: `rep outsb` reads exactly the slice; the direction flag is clear (ABI).
    unsafe {
        asm!("ud2", in("rdi") OUTS, in("dx") port, inout("rsi") bytes.as_ptr() => _,
            inout("rcx") bytes.len() => _, options(nostack, readonly))
    }
}

pub fn wrmsr(msr: u32, value: u64) {
    // SAFETY: the callers write MSRs of the local APIC and of the clock, which do not affect
    // memory that Rust owns. The asm is not `nomem`: the host may write guest memory on it.
    unsafe {
        asm!("ud2", in("rdi") WRMSR, in("ecx") msr, in("eax") value as u32,
            in("edx") (value >> 32) as u32, options(nostack))
    }
}

pub fn rdmsr(msr: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading has no effect on memory.
    unsafe {
        asm!("ud2", in("rdi") RDMSR, in("ecx") msr, out("eax") low, out("edx") high,
            options(nostack))
    }
    u64::from(high) << 32 | u64::from(low)
}

/// `[eax, ebx, ecx, edx]`. From ring 0: in ring 3 some hosts show their own CPUID.
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    let (a, b, c, d): (u32, u64, u32, u32);
    // SAFETY: the gate hands rbx over in r8 and leaves rbx as it was.
    unsafe {
        asm!("ud2", in("rdi") CPUID, inout("eax") leaf => a, out("r8") b,
            inout("ecx") subleaf => c, out("edx") d, options(nostack))
    }
    [a, b as u32, c, d]
}

/// The TSC as ring 3 reads it.
pub fn tsc() -> u64 {
    // SAFETY: `rdtsc` exists on every x86-64 processor, and CR4.TSD is clear.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The TSC as ring 0 reads it; the same, unless the host shifts one of them.
pub fn tsc_of_ring0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: as in `rdmsr`.
    unsafe { asm!("ud2", in("rdi") RDTSC, out("eax") low, out("edx") high, options(nostack)) }
    u64::from(high) << 32 | u64::from(low)
}

pub fn rdrand() -> Option<u64> {
    if cpuid(1, 0)[2] & 1 << 30 == 0 {
        return None;
    }
    let (value, ok): (u64, u8);
    // SAFETY: CPUID says that the instruction exists.
    unsafe { asm!("rdrand {}", "setc {}", out(reg) value, out(reg_byte) ok, options(nostack)) }
    (ok == 1).then_some(value)
}

/// Drops every cached translation of this processor, after an edit of the page tables.
pub fn flush_translations() {
    // SAFETY: the tables stay the same, only caches go.
    unsafe { asm!("ud2", in("rdi") FLUSH, out("rax") _, options(nostack)) }
}

/// An exception with no descriptor table: the processor shuts down.
pub fn triple_fault() -> ! {
    // SAFETY: does not return.
    unsafe { asm!("ud2", in("rdi") TRIPLE, options(nostack, noreturn)) }
}

pub fn halt_forever() -> ! {
    loop {
        sleep(events());
        core::hint::spin_loop();
    }
}

fn this_block() -> &'static [AtomicU64; CPU_BLOCK / 8] {
    // SAFETY: boot.S reserves the blocks; they are only ever read and written as whole words.
    unsafe { &cpu_blocks[this_cpu()] }
}

/// Which processor this is: told by its stack, which lies in its block.
pub fn this_cpu() -> usize {
    let stack: usize;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, rsp", out(reg) stack, options(nomem, nostack, preserves_flags)) }
    // SAFETY: only the address is taken.
    let base = (&raw const cpu_blocks) as usize;
    ((stack - base) / CPU_BLOCK).min(MAX_CPUS - 1)
}

/// How often `vector` has interrupted this CPU.
pub fn interrupts_of(vector: u8) -> u64 {
    this_block()[usize::from(vector)].load(Ordering::Relaxed)
}

/// How often anything has interrupted this CPU; to be read before looking for work, and given to
/// [`sleep`].
pub fn events() -> u64 {
    this_block()[EVENTS].load(Ordering::Acquire)
}

/// Halts this CPU until an interrupt, unless one came since `seen` was read.
pub fn sleep(seen: u64) {
    if INTERRUPTS.load(Ordering::Relaxed) {
        // SAFETY: halts and returns; interrupts change the counters, so memory is clobbered.
        unsafe { asm!("ud2", in("rdi") HLT, in("r8") seen, options(nostack)) }
    } else {
        core::hint::spin_loop();
    }
}

pub fn has_interrupts() -> bool {
    INTERRUPTS.load(Ordering::Relaxed)
}

/// Switches this CPU's x2APIC on and lets interrupts in.
pub fn interrupts_on() {
    if cpuid(1, 0)[2] & 1 << 21 == 0 {
        return;
    }
    wrmsr(0x1b, rdmsr(0x1b) | 0xc00);
    wrmsr(X2APIC_SVR, 0x1ff);
    wrmsr(X2APIC_LVT_LINT0, 1 << 16);
    wrmsr(X2APIC_TIMER_DIVIDE, 0b1011);
    wrmsr(X2APIC_LVT_TIMER, u64::from(VECTOR_TIMER));
    INTERRUPTS.store(true, Ordering::Relaxed);
    // SAFETY: sets the interrupt flag of the frame that the gate returns by.
    unsafe { asm!("ud2", in("rdi") IRQ_ON, options(nostack)) }
}

/// One interrupt after about `ns` nanoseconds (the APIC bus of KVM runs at 1 GHz; elsewhere it comes
/// sooner or later, and whoever waits looks at the TSC).
pub fn timer_in(ns: u64) {
    if has_interrupts() {
        wrmsr(X2APIC_TIMER_COUNT, ns.clamp(1, u64::from(u32::MAX)));
    }
}

/// Interrupts another CPU, to wake it.
pub fn wake(apic_id: u32) {
    wrmsr(
        X2APIC_ICR,
        u64::from(apic_id) << 32 | 0x4000 | u64::from(VECTOR_WAKE),
    );
}

/// Copies the start-up code to `page` (below 1 MiB) and sends INIT and SIPI to `apic_id`, which will
/// call `probe_ap(cpu)`.
pub fn start_processor(page: usize, apic_id: u32, cpu: usize) {
    // SAFETY: boot.S reserves the table (one byte for each APIC id below 256), the descriptors (one task
    // state segment a processor, this one's in use by nobody) and the code; the page was chosen from usable low memory that nothing else uses.
    unsafe {
        let table = (&raw const cpu_of_apic) as *mut u8;
        table.add(apic_id as usize & 0xff).write_volatile(cpu as u8);
        // Its task state segment is busy if it ran before.
        let segment = (GDT + FIRST_TSS + 16 * cpu + 5) as *mut u8;
        segment.write_volatile(AVAILABLE_TSS);
        let from = &raw const ap_start;
        let length = (&raw const ap_end) as usize - from as usize;
        core::ptr::copy(from, page as *mut u8, length);
    }
    let destination = u64::from(apic_id) << 32;
    wrmsr(X2APIC_ICR, destination | 0x4500);
    wrmsr(X2APIC_ICR, destination | 0x4600 | (page as u64 >> 12));
}
