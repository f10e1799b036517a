//! A stock kernel on a real `kvm_amd`, in a host of the lab: ours beside QEMU in the same host. Everything is
//! in software there, so only ratios say something, and the number of exits, which hardware has as well.

use std::time::Duration;

use anyhow::{Context, Result};
use fractus_lab::{Host, Lab, Options, Peer, TinyGuest};

use crate::figure::{Figure, median};

const PEER: &str = "QEMU microvm";
/// Where a host has room.
const FOLDER: &str = "/var/lib/fractus-agent/bench";
/// The emulation's times differ from boot to boot by a fifth.
const ROUNDS: usize = 25;
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1";

/// `timed COMMAND…`: runs a machine until its guest's init has spoken; prints the seconds and the exits.
const TIMED: &str = r#"#!/bin/sh
trace=/sys/kernel/tracing
[ -e $trace/events ] || mount -t tracefs tracefs $trace
mkdir -p $trace/instances/bench
trace=$trace/instances/bench
echo >$trace/trace
echo 1 >$trace/events/kvm/kvm_exit/enable
rm -f line
mkfifo line
read -r began _ </proc/uptime
"$@" >line 2>errors </dev/null &
while read -r said; do
  case $said in *"tiny: boot"*) read -r ended _ </proc/uptime; break ;; esac
done <line
echo 0 >$trace/events/kvm/kvm_exit/enable
kill -9 $! 2>/dev/null
wait 2>/dev/null
[ -n "$ended" ] || { cat errors; exit 1; }
echo "$began $ended $(cat $trace/per_cpu/cpu*/stats | awk '/^(entries|overrun):/ { n += $2 } END { print n }')"
# Not this script, in whose arguments the same stands.
while ps -o args | grep '[f]ractus-agent vm' | grep -qv timed; do usleep 10000; done
"#;

/// Touches what memory the host has free: what the emulation gives it for the first time costs a fault of this
/// machine for each page, which is no figure of whoever happens to touch it first.
const TOUCH: &str = "mkdir -p /tmp/touch && mount -t tmpfs -o size=90% touch /tmp/touch
dd if=/dev/zero of=/tmp/touch/all bs=1M count=$(awk '/^MemFree/ { print int($2 / 1024) - 100 }' /proc/meminfo)
umount /tmp/touch && rmdir /tmp/touch";

/// What one boot took: seconds, and exits to the host's kernel.
struct Boot {
    seconds: f64,
    exits: f64,
}

fn boot(host: &Host, command: &str) -> Result<Boot> {
    let said = host.done(&format!("cd {FOLDER} && ./timed {command}"))?;
    let numbers: Vec<f64> = said
        .split_whitespace()
        .filter_map(|word| word.parse().ok())
        .collect();
    let [began, ended, exits] = numbers[..] else {
        anyhow::bail!("{command}: {said}");
    };
    Ok(Boot {
        seconds: ended - began,
        exits,
    })
}

/// The host's request to the guest's init: stock cloud kernel, 1 vCPU, 256 MiB.
pub fn boots(rounds: usize) -> Result<Vec<Figure>> {
    let rounds = rounds.min(ROUNDS);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let lab = runtime.block_on(Lab::start(Options {
        hosts: 1,
        ..Options::default()
    }))?;
    let host = lab.hosts.first().context("the host")?;
    let peer = Peer::bring(host)?;
    let ours = "fractus-agent vm --config machine";
    // The fastest of those tried. Without a clock the kernel waits for one (9 s in all); without ACPI it took 4 s
    // once and 15 s in another run; without PIT and PIC it is no faster, and without ACPI besides no tick comes.
    let theirs = format!(
        "{} -M microvm,rtc=on -bios qboot.rom -cpu host -smp 1 -m 256 \
         -serial stdio -kernel kernel -initrd initrd -append '{COMMAND_LINE}'",
        peer.command
    );
    prepare(host)?;
    let (mut our, mut their) = (Vec::new(), Vec::new());
    // One round is not counted: it reads the programs from disk.
    for round in 0..=rounds {
        let pair = (boot(host, ours)?, boot(host, &theirs)?);
        if round > 0 {
            our.push(pair.0);
            their.push(pair.1);
        }
    }
    let figure = |name: &str, unit, of: fn(&Boot) -> f64, ratio| -> Result<Figure> {
        let middle = |boots: &[Boot]| median(boots.iter().map(of).collect()).context("no rounds");
        Ok(Figure {
            name: name.to_owned(),
            unit,
            ours: middle(&our)?,
            peer: Some((PEER, middle(&their)?)),
            rounds,
            limit: None,
            ratio_limit: Some(ratio),
        })
    };
    Ok(vec![
        figure("lab-boot", "s", |boot| boot.seconds, 0.9)?,
        figure("lab-exits", "exits", |boot| boot.exits, 1.0)?,
    ])
}

/// Kernel, initial file system, our machine's configuration, and the script.
fn prepare(host: &Host) -> Result<()> {
    let tiny = TinyGuest::make()?;
    let machine = serde_json::json!({
        "machine": {
            "uuid": "00000000-0000-0000-0000-000000000001",
            "cpus": {"count": 1},
            "memory": {"bytes": 256 << 20},
            "command_line": COMMAND_LINE,
        },
        "kernel": "kernel",
        "initrd": "initrd",
    });
    host.done(&format!("mkdir -p {FOLDER}"))?;
    let touched = host.run_within(TOUCH, Duration::from_secs(300))?;
    anyhow::ensure!(touched.status == 0, "touching memory: {}", touched.text);
    let files = [
        ("kernel", std::fs::read(&tiny.kernel)?),
        ("initrd", std::fs::read(&tiny.initrd)?),
        ("machine", machine.to_string().into_bytes()),
        ("timed", TIMED.as_bytes().to_vec()),
    ];
    for (name, bytes) in files {
        host.put(&format!("{FOLDER}/{name}"), 0o755, &bytes)?;
    }
    Ok(())
}
