//! First process of the fallback: boots, from within a guest, what is on a disk that only Linux reads.
//!
//! A machine that boots its disk starts this where its own loader found XFS, btrfs or LVM (and what else
//! it does not know). Linux mounts them here, the loader's code finds among them what is to be booted,
//! and kexec starts that. Nothing is written to the disk: what a mount writes (a journal's replay) goes
//! into memory. How it ended is said to the machine ([`verdict`]) and, for people, on the console.
//!
//! Reading order: this, [`volumes`], [`mounted`], [`kexec`]; [`overlay`] and [`lvm`] are Linux's ways.

mod files;
#[cfg(test)]
#[path = "../../../vmm/loader/tests/image/mod.rs"]
mod image;
mod kexec;
mod lvm;
mod mounted;
mod overlay;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a fault fails the test")]
mod tests;
mod tool;
mod verdict;
mod volumes;

use std::convert::Infallible;
use std::ffi::CStr;
use std::io::Write;
use std::time::Duration;

use fractus_loader::disk::Disk;
use fractus_loader::{Chosen, Limits, find_among};
use rustix::mount::{MountFlags, mount};
use rustix::system::RebootCommand;

use volumes::{Collection, Origin};

/// Longer than any disk takes that answers at all; the machine waits for nothing else.
const DEADLINE: Duration = Duration::from_secs(240);

fn main() {
    std::panic::set_hook(Box::new(|panic| verdict::fail(&panic.to_string())));
    let Err(reason) = run();
    verdict::fail(&reason);
}

/// Does not return if something is found.
fn run() -> Result<Infallible, String> {
    for (kind, folder) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")] {
        mount(kind, folder, kind, MountFlags::empty(), None::<&CStr>)
            .map_err(|error| format!("the fallback cannot mount {folder}: {error}"))?;
    }
    std::thread::spawn(|| {
        std::thread::sleep(DEADLINE);
        verdict::fail("the disk does not answer, or is too much to look through");
    });
    let order = order(&read("/proc/cmdline")?)?;
    for module in ["virtio_pci", "virtio_blk"] {
        tool::modprobe(&[module])?;
    }
    let Collection {
        trees,
        origins,
        remarks,
    } = volumes::collect(order.disk)?;
    for remark in &remarks {
        say(remark);
    }
    // A disk of nothing: what the search itself may cost.
    let nothing: &'static mut &[u8] = Box::leak(Box::default());
    let budget = Box::leak(Box::new(Disk::new(nothing, limits()?)));
    let chosen = find_among(budget, trees, remarks).map_err(|error| error.to_string())?;
    say(&format!("starting {}", chosen.how));
    start(&chosen, &origins, &order.more)
}

/// What the machine has put behind the dashes of our command line.
struct Order {
    /// Which disk is booted, from 0.
    disk: usize,
    /// For the command line of what is found.
    more: String,
}

fn order(command_line: &str) -> Result<Order, String> {
    let line = command_line.trim_end();
    let (_, behind) = line.split_once(" -- ").unwrap_or((line, ""));
    let (first, more) = behind.split_once(' ').unwrap_or((behind, ""));
    let disk = first.strip_prefix("disk=");
    let disk = disk.and_then(|number| number.parse().ok());
    Ok(Order {
        disk: disk.ok_or_else(|| format!("no order is in the fallback's command line: {line}"))?,
        more: more.to_owned(),
    })
}

/// The loader's own, by the memory that there is. More time: it may be emulated.
fn limits() -> Result<Limits, String> {
    let info = read("/proc/meminfo")?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    let kib = kib.ok_or("/proc/meminfo does not say how much memory there is")?;
    Ok(Limits {
        work: Duration::from_secs(20),
        wait: Duration::from_secs(60),
        ..Limits::for_memory(kib << 10)
    })
}

fn start(chosen: &Chosen<'_>, origins: &[Origin], more: &str) -> Result<Infallible, String> {
    let entry = &chosen.entry;
    let kernel = files::one(chosen, origins, &entry.kernel)?;
    let initrd = files::joined(chosen, origins, &entry.initrds)?;
    let mut command_line = entry.command_line.clone();
    if !more.is_empty() {
        command_line.push(' ');
        command_line.push_str(more);
    }
    kexec::load(&kernel, initrd.as_ref(), &command_line).map_err(|error| {
        format!(
            "{} cannot be started ({}): {error}",
            chosen.how, entry.kernel.path
        )
    })?;
    verdict::found();
    let ended = rustix::system::reboot(RebootCommand::Kexec);
    Err(format!("kexec: {ended:?}"))
}

/// On the console, if there is one.
fn say(text: &str) {
    // What a disk says is not to steer the terminal that shows it.
    let text: String = text.chars().filter(|c| !c.is_control()).collect();
    let _ = writeln!(std::io::stdout(), "fallback: {text}");
}

fn read(path: &str) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{path}: {error}"))
}
