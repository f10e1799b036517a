//! The benchmarks: `scripts/bench NAME…` builds what is measured and runs this.
//!
//! Each figure is a median over rounds; where there is a peer its rounds alternate with ours, so that
//! what else the machine does hits both. A table for people; with `--json` one line a figure.

mod api;
mod cloud;
mod disk;
mod figure;
mod host;
mod interrupt;
mod lab;
mod migrate;
mod net;
mod pair;
mod process;
mod snapshot;
mod upgrade;
mod vmm;

use std::process::{Command, ExitCode};

use anyhow::{Context, bail};

use rustix::process::{Signal, set_parent_process_death_signal};

use figure::Figure;

const ROUNDS: usize = 25;
/// Of a process that runs one benchmark for another.
const ALONE: &str = "--alone";
/// Of one that has a machine for one ([`pair`]).
const LEG: &str = "--leg";

/// A benchmark: its name, what it says, and how it is run for a number of rounds.
struct Bench {
    name: &'static str,
    about: &'static str,
    run: fn(usize) -> anyhow::Result<Vec<Figure>>,
}

const BENCHES: &[Bench] = &[
    Bench {
        name: "vmm-start",
        about: "exec of the VMM process to the probe's first serial byte, 256 MiB",
        run: vmm::start,
    },
    Bench {
        name: "vmm-memory",
        about: "PSS of a machine's process beyond guest memory, 256 MiB, probe booted",
        run: vmm::memory,
    },
    Bench {
        name: "disk",
        about: "4 KiB reads and writes of a raw file, direct and cached, beside QEMU's virtio-blk-pci",
        run: disk::requests,
    },
    Bench {
        name: "net",
        about: "probe's UDP echo of 64 bytes and TCP bulk of 64 MiB, each way, over a tap",
        run: net::run,
    },
    Bench {
        name: "api-memory",
        about: "resident memory of controller and agent at rest",
        run: api::memory_at_rest,
    },
    Bench {
        name: "api-tokens",
        about: "token validation, logins, `fractus token issue`",
        run: api::tokens,
    },
    Bench {
        name: "api-servers",
        about: "POST servers to ACTIVE; 64 servers, 8 at a time, created and deleted",
        run: api::servers,
    },
    Bench {
        name: "api-listing",
        about: "GET servers/detail with 10 servers",
        run: api::listing,
    },
    Bench {
        name: "migrate",
        about: "a guest of 1 GiB to another host, idle and writing 128 and 512 MiB over and over, beside QEMU's migration",
        run: migrate::migrations,
    },
    Bench {
        name: "pair",
        about: "a guest of 1 GiB to another process, without a controller: idle, and with its memory after it, beside QEMU",
        run: pair::parted,
    },
    Bench {
        name: "upgrade",
        about: "a guest of 1 GiB that goes on in another process of its host, which has its memory by descriptor",
        run: upgrade::handed_over,
    },
    Bench {
        name: "snapshot",
        about: "a guest of 256 MiB and 4 GiB written to a file on tmpfs while it runs, and how it feels that",
        run: snapshot::written,
    },
    Bench {
        name: "restore",
        about: "a guest that goes on from a file to its next output; memory of each of 20 that do; beside QEMU; clones of a cold file",
        run: snapshot::restored,
    },
    Bench {
        name: "lab",
        about: "a stock kernel to its init and the exits of that, in a host of the lab, beside QEMU microvm",
        run: lab::boots,
    },
];

struct Arguments {
    json: bool,
    /// One benchmark, by who runs several: its rows alone.
    alone: bool,
    rounds: usize,
    benches: Vec<&'static Bench>,
}

fn arguments() -> anyhow::Result<Option<Arguments>> {
    let mut found = Arguments {
        json: false,
        alone: false,
        rounds: ROUNDS,
        benches: Vec::new(),
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--json" => found.json = true,
            ALONE => found.alone = true,
            "--rounds" => {
                let count = words.next().context("--rounds wants a number")?;
                found.rounds = count.parse().context("--rounds wants a number")?;
            }
            "--list" | "--help" => return Ok(None),
            name => match BENCHES.iter().find(|bench| bench.name == name) {
                Some(bench) => found.benches.push(bench),
                None => bail!("no benchmark {name}; --list shows them"),
            },
        }
    }
    if found.benches.is_empty() {
        found.benches.extend(BENCHES);
    }
    Ok(Some(found))
}

fn run() -> anyhow::Result<bool> {
    let Some(arguments) = arguments()? else {
        for bench in BENCHES {
            println!("{:<14} {}", bench.name, bench.about);
        }
        return Ok(true);
    };
    interrupt::listen()?;
    if arguments.alone {
        // Whoever runs it may be killed, and listens to nobody then.
        set_parent_process_death_signal(Some(Signal::TERM))?;
        return measure(&arguments);
    }
    let _set = host::HugePages::advised();
    let mut within = true;
    if !arguments.json {
        println!("{}", Figure::header());
    }
    for bench in &arguments.benches {
        within &= in_a_child(bench, &arguments)?;
    }
    Ok(within)
}

fn measure(arguments: &Arguments) -> anyhow::Result<bool> {
    let mut within = true;
    for bench in &arguments.benches {
        let figures = (bench.run)(arguments.rounds).with_context(|| bench.name.to_owned())?;
        for figure in figures {
            within &= figure.within_limits();
            println!(
                "{}",
                if arguments.json {
                    figure.json()
                } else {
                    figure.row()
                }
            );
        }
    }
    Ok(within)
}

/// Runs one in a process of its own: whoever starts a cloud has addresses and users for one only, by its pid.
fn in_a_child(bench: &Bench, arguments: &Arguments) -> anyhow::Result<bool> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args([ALONE, bench.name, "--rounds", &arguments.rounds.to_string()]);
    command.args(arguments.json.then_some("--json"));
    let mut child = command.spawn()?;
    match interrupt::end_of(&mut child)?.code() {
        Some(0) => Ok(true),
        Some(2) => Ok(false),
        // It has said why.
        _ => bail!("{} was not measured", bench.name),
    }
}

/// Exit status 0: measured and within the limits; 2: measured, but a limit is missed; 1: not measured.
fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let outcome = match words.next().as_deref() {
        Some(LEG) => pair::leg(words).map(|()| true),
        _ => run(),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(2),
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
