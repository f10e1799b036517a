//! Boots a kernel with its serial line on standard output, for work on the VMM:
//! `boot KERNEL|disk [--memory MIB] [--cpus N] [--initrd FILE] [--disk FILE]... [--direct-disk FILE]...
//! [--append TEXT]`. A direct disk's file is opened O_DIRECT.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Duration;

use anyhow::{Context, bail};
use fractus_vmm::config::{BootSource, ConsoleFiles, DiskConfig, MachineConfig, MachineFiles};
use fractus_vmm::machine::{Event, Machine};

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let kernel = arguments.next().context("which kernel?")?;
    let mut config = MachineConfig::minimal(256 << 20);
    let kernel = match kernel.as_str() {
        "disk" => {
            config.boot = BootSource::Disk(0);
            None
        }
        path => Some(File::open(path)?),
    };
    let mut files = MachineFiles {
        kvm: OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm")?
            .into(),
        kernel,
        initrd: None,
        fallback: None,
        disks: Vec::new(),
        serial: ConsoleFiles {
            output: Some(std::io::stdout().as_fd().try_clone_to_owned()?),
            input: Some(std::io::stdin().as_fd().try_clone_to_owned()?),
        },
        console_ports: Vec::new(),
        nets: Vec::new(),
        vsock: None,
    };
    while let Some(option) = arguments.next() {
        let value = arguments
            .next()
            .with_context(|| format!("{option} wants a value"))?;
        match option.as_str() {
            "--memory" => config.memory.bytes = value.parse::<u64>()? << 20,
            "--cpus" => config.cpus.count = value.parse()?,
            "--initrd" => files.initrd = Some(File::open(value)?),
            "--append" => config.command_line = value,
            "--disk" | "--direct-disk" => {
                let direct = option == "--direct-disk";
                let mut options = OpenOptions::new();
                options.read(true).write(true);
                options.custom_flags(if direct { libc::O_DIRECT } else { 0 });
                files.disks.push(options.open(value)?);
                config.disks.push(DiskConfig {
                    read_only: false,
                    serial_number: format!("disk{}", files.disks.len()),
                    direct,
                    limit: None,
                    queues: 1,
                });
            }
            _ => bail!("unknown option {option}"),
        }
    }
    let mut machine = Machine::build(config, files, None)?;
    machine.start()?;
    loop {
        match machine.wait_event(Duration::from_secs(3600)) {
            Some(Event::Stopped(reason)) => {
                eprintln!("\n[{reason}]");
                return Ok(());
            }
            Some(event) => eprintln!("\n[{event:?}]"),
            None => {}
        }
    }
}
