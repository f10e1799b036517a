//! fractus-probe: a bare-metal guest that tests and measures virtual machine monitors.
//!
//! An ELF image with the PVH note, linked at 1 MiB; its 32-bit entry switches to long mode and goes
//! to ring 3 at once, because some KVMs (kvm-pvm) run ring 3 natively and emulate ring 0. On VMX and
//! SVM, under QEMU or any VMM with PVH and PCI it is the same image.
//!
//! # Output
//! On COM1, a line at a time:
//! - `fractus-probe VERSION`, the first thing it does (its first byte is the start-up mark);
//! - `device …` for each device it drives, then
//!   `boot nonce=HEX vcpus=N memory_mib=N disks=N rng=0|1 console=0|1 tsc_khz=N/SOURCE`; the nonce
//!   lives in RAM only: a guest that still says it was not rebooted;
//! - `tick N nonce=HEX tsc=N`, every `tick_ms`;
//! - an answer to each command, `ok …` or `err …`; `fault …` and `panic …` when it dies.
//!
//! # Command line
//! `tick_ms=N` (default 1000; 0: none), `vcpus=N` (start no more), `tsc_khz=N`,
//! `stamp=spin|MS` (see `stamp`), `net_ip=A.B.C.D/N` (answer to ARP, ping, and UDP and TCP on port 7,
//! TCP on ports 9 and 19: see `stack`), `net_offloads=0` (none), `run="cmd; cmd"` (commands carried out once booted).
//!
//! # Commands
//! From the command line, a line on COM1, or a line on the first virtio-console port (answered on
//! both). Numbers are decimal, or hexadecimal with 0x; offsets and lengths are in bytes, whole
//! sectors.
//!
//! | command | answer |
//! |---|---|
//! | `loudly COMMAND …` | `begun COMMAND` when it begins, on COM1, then its own |
//! | `info` | `ok info` nonce, vcpus, memory, ticks |
//! | `time` | `ok time uptime_us= tsc= tsc_ring0= tsc_khz= ticks=` |
//! | `disk-info DEV` | `ok disk-info bytes= ro= serial=` |
//! | `disk-hash DEV OFF LEN` | `ok disk-hash HEX` (FNV-1a 64) |
//! | `disk-write DEV OFF LEN SEED [again]` | `ok disk-write us=` (pattern of SEED, then a flush); with ` seed=` of the last one, if it was again and again, each of the next seed, until something is typed |
//! | `disk-check DEV OFF LEN SEED [again]` | `ok disk-check`, or `err disk-check at=`; again and again until something is typed |
//! | `disk-discard DEV OFF LEN`, `disk-zero DEV OFF LEN`, `disk-flush DEV` | `ok …` |
//! | `blk-bench DEV read\|write seq\|random DEPTH COUNT [SIZE [poll]]` | `ok blk-bench ops= us= interrupts= kicks=`: so many requests (of 4096 bytes), DEPTH in flight |
//! | `random N` | `ok random HEX…` from virtio-rng |
//! | `touch MIB` | `ok touch mib= us=`: a write into every page of that much memory |
//! | `fill MIB SEED` | `ok fill mib=`: a pattern in every page of that much memory |
//! | `filled MIB SEED` | `ok filled mib=`, or `err filled at=`: whether it is there |
//! | `zeros MIB` | `ok zeros pages=`: how many pages of that much memory begin with zeros |
//! | `balloon free MIB` | `ok balloon mib= us=`: reports that much of free memory, from its start, as free
//! | | (what was `touch`ed is there again as zeros) |
//! | `balloon target` | `ok balloon pages=`: what the host wishes in it |
//! | `memory` | `ok memory region= usable= plugged= requested=`: of hot memory, bytes |
//! | `memory plug\|unplug FIRST COUNT`, `memory unplug-all` | `ok memory answer=N`, of the device; the numbers are of blocks |
//! | `memory state FIRST COUNT` | `ok memory answer=N state=N` |
//! | `memory fill FIRST COUNT VALUE`, `memory check FIRST COUNT VALUE` | `ok memory`, or `err memory at=`: a word in each page |
//! | `slots` | `ok slots up=HEX down=HEX`: looks which PCI slots were filled (and drives what is there) and which are asked for |
//! | `eject SLOT` | `ok eject`: lets go of the disk or network in the slot |
//! | `cpus` | `ok cpus present=HEX up=HEX down=HEX vcpus=N`: looks which vCPUs are there, came (and starts
//! | | them) and are asked for |
//! | `cpu-start APIC_ID [MS]` | `ok cpu-start`, or `err` if it does not begin within that time |
//! | `cpu-eject APIC_ID [force]` | `ok cpu-eject`: lets go of a vCPU |
//! | `dirty RATE_MIB SECONDS` | `ok dirty mib= us=`: that rate, over and over |
//! | `weave MIB` | `ok weave writes=`: numbered writes all over that much memory until something is typed, then a look
//! | | whether each page holds the last of its own |
//! | `churn MIB` | `ok churn`: writes that much memory over and over, as fast as it can, until something is typed. Every
//! | | second `churn second=N turns=N,… gaps_us=N,…`: of the last seconds (this one first) pages written, and the longest
//! | | time between two of them (0 MiB: looks at the clock instead) |
//! | `spin MS [CPU]` | `ok spin`; on another CPU at once, it goes on there |
//! | `stamp spin\|MS\|off` | how every CPU looks at its TSC, for `gaps` |
//! | `gaps` | `ok gaps US US …`: the largest gap each CPU saw since the last `gaps` |
//! | `net` | `ok net mac= features= in= out= ip= taken= announced=`: packets, bytes taken by port 9, and how often it said
//! | | where it is because the device asked |
//! | `vsock` | `ok vsock cid= open= echoed= moves=`: echoes what comes to its port 7; moves: how often its connections were gone |
//! | `vsock connect PORT` | `ok vsock`: asks for a connection to the host's port, and echoes what comes over it |
//! | `echo TEXT` | `ok echo TEXT` |
//! | `command-line` | `ok command-line TEXT`: the kernel's |
//! | `interrupts` | `ok interrupts VECTOR=COUNT …` of the boot CPU |
//! | `ignore-button`, `heed-button` | whether the power button powers off; `button` is said either way |
//! | `poweroff`, `reboot`, `triple-fault`, `panic`, `halt` | what they say |
//! | `misuse queue\|pci\|acpi [N]` | a hostile act; `ok misuse …` if the guest lives on |
//!
//! It must never need a feature that a small VMM lacks to print its first line.

#![no_std]
#![no_main]

mod acpi;
mod balloon;
mod churn;
mod clock;
mod command;
mod cpu;
mod devices;
mod disk;
mod disk_load;
mod hot_memory;
mod interrupts;
mod memory;
mod misuse;
mod net;
mod pci;
mod ring;
mod serial;
mod smp;
mod stack;
mod start_info;
mod virtio;
mod vsock;

use core::panic::PanicInfo;
use core::sync::atomic::{AtomicU64, Ordering};

use acpi::Acpi;
use command::Probe;
use devices::Devices;
use start_info::StartInfo;

core::arch::global_asm!(include_str!("boot.S"), options(att_syntax));

/// Says which boot this is; for the ticks.
static NONCE: AtomicU64 = AtomicU64::new(0);

/// Ring 3 begins here on the boot processor. `start`: address of the PVH start info.
#[unsafe(no_mangle)]
extern "C" fn probe_main(start: u64) -> ! {
    serial::write_early(concat!("fractus-probe ", env!("CARGO_PKG_VERSION"), "\n").as_bytes());
    let info = StartInfo::read(start);
    cpu::interrupts_on();
    let source = clock::calibrate(info.number("tsc_khz"));
    for region in info.memory() {
        memory::map(region.start, region.length);
    }
    let acpi = Acpi::read(info.rsdp);
    interrupts::route(&acpi);
    serial::listen();
    smp::start(
        &acpi,
        &info,
        info.number("vcpus").unwrap_or(cpu::MAX_CPUS as u64) as usize,
    );
    let offloads = info.number("net_offloads") != Some(0);
    let mut devices = Devices::find(pci::Bus::scan(acpi.ecam), offloads);
    NONCE.store(fresh_nonce(&mut devices), Ordering::Relaxed);
    say!(
        "boot nonce={:016x} vcpus={} memory_mib={} disks={} rng={} console={} tsc_khz={}/{source}",
        nonce(),
        smp::alive(),
        info.memory_mib(),
        devices.disk_count(),
        u8::from(devices.rng.is_some()),
        u8::from(devices.console.is_some()),
        clock::khz(),
    );
    clock::tick_every(info.number("tick_ms").unwrap_or(1000));
    Probe::new(info, acpi, devices).run()
}

/// Ring 3 begins here on every other processor.
#[unsafe(no_mangle)]
extern "C" fn probe_ap(me: usize) -> ! {
    smp::run(me)
}

pub fn nonce() -> u64 {
    NONCE.load(Ordering::Relaxed)
}

/// Random where the machine has randomness, and in any case of this moment.
fn fresh_nonce(devices: &mut Devices) -> u64 {
    let mut nonce = cpu::tsc() ^ cpu::rdrand().unwrap_or(0);
    if let Some(Ok(bytes)) = devices.rng.as_mut().map(|rng| rng.bytes(8)) {
        for &byte in bytes {
            nonce = disk::mix(nonce ^ u64::from(byte));
        }
    }
    disk::mix(nonce)
}

/// Sleeps until `done`, ticking meanwhile; false if that took longer than `patience_us`.
pub fn wait_for(patience_us: u64, done: impl Fn() -> bool) -> bool {
    let end = cpu::tsc().saturating_add(clock::tsc_of_us(patience_us));
    loop {
        let seen = cpu::events();
        clock::pulse(nonce());
        if done() {
            return true;
        }
        if cpu::tsc() > end {
            return false;
        }
        clock::doze(seen, end);
    }
}

/// A fault of ring 3 ends here (boot.S).
#[unsafe(no_mangle)]
extern "C" fn probe_fault(vector: u64, error: u64, rip: u64, cr2: u64, rsp: u64) -> ! {
    serial::break_lock();
    let cpu = cpu::this_cpu();
    say!("fault vector={vector} error={error:x} rip={rip:x} cr2={cr2:x} rsp={rsp:x} cpu={cpu}");
    cpu::halt_forever()
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    serial::break_lock();
    say!("panic {info}");
    cpu::halt_forever()
}

/// Named by the precompiled `core`; nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    cpu::halt_forever()
}
