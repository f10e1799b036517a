//! The QEMU that is a host: its command line, and its process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::debian::{Tree, tree};
use crate::image::HostImage;
use crate::mended;
use crate::segment::Ports;

/// Bytes of a host's memory, in MiB.
pub const MEMORY_MIB: u32 = 2048;
/// With two, guests of two vCPUs broke within minutes of load, on QEMU 10.0 and 11.1. ARCHITECTURE.md says
/// what was seen.
const CPUS: u32 = 1;

/// A host's files in its folder.
#[derive(Debug, Clone)]
pub struct Files {
    pub folder: PathBuf,
    /// Read only; the agent under test.
    pub payload: PathBuf,
    /// The host's own disk.
    pub state: PathBuf,
}

impl Files {
    pub fn monitor(&self) -> PathBuf {
        self.folder.join("monitor")
    }

    pub fn console(&self) -> PathBuf {
        self.folder.join("console")
    }

    pub fn identity(&self) -> PathBuf {
        self.folder.join("identity")
    }

    pub fn serial_log(&self) -> PathBuf {
        self.folder.join("serial.log")
    }

    pub fn qemu_log(&self) -> PathBuf {
        self.folder.join("qemu.log")
    }
}

/// A newer QEMU than Debian 12 has: that one does not intercept XSETBV.
pub fn package() -> Result<Tree> {
    tree(&["--suite", "trixie-backports", "qemu-system-x86"])
}

/// What has to be the same for a saved host to be restored.
pub fn shape(image: &HostImage) -> Result<Vec<String>> {
    let tsc = tsc_khz()?;
    // Without the frequency of the clock a busy machine measures a wrong one.
    let append = format!(
        "console=ttyS0 quiet panic=-1 mitigations=off nokaslr no_timer_check tsc=reliable \
         tsc_early_khz={tsc} cryptomgr.notests"
    );
    let memory = MEMORY_MIB.to_string();
    let cpus = CPUS.to_string();
    let kernel = image.vmlinux.display().to_string();
    let initrd = image.initrd.display().to_string();
    let arguments = [
        ["-accel", "tcg,thread=multi,tb-size=256"],
        ["-cpu", "EPYC"],
        ["-M", "pc"],
        ["-smp", &cpus],
        ["-m", &memory],
        ["-kernel", &kernel],
        ["-initrd", &initrd],
        ["-append", &append],
        // A restored host must not repeat what another one draws.
        ["-device", "vmgenid,guid=auto"],
        ["-device", "virtio-blk-pci,drive=payload"],
        ["-device", "virtio-blk-pci,drive=state"],
        [
            "-device",
            "virtio-net-pci,netdev=control,mac=52:54:00:77:00:01,romfile=",
        ],
        [
            "-device",
            "virtio-net-pci,netdev=guests,mac=52:54:00:77:00:02,romfile=",
        ],
    ];
    Ok(arguments.into_iter().flatten().map(str::to_owned).collect())
}

/// Starts QEMU; the kernel kills it when this thread dies. `incoming`: it waits to be restored.
pub fn start(image: &HostImage, files: &Files, ports: &Ports, incoming: bool) -> Result<Child> {
    let package = package()?;
    let program = package.command(&mended::program(&package)?)?;
    let log = std::fs::File::options()
        .create(true)
        .append(true)
        .open(files.qemu_log())?;
    let socket = |path: &Path| format!("path={},server=on,wait=off", path.display());
    // setpriv turns into the program: same pid. Nice: what is under test comes first.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--", "nice"])
        .arg(program.get_program())
        .args(program.get_args())
        .arg("-L")
        .arg(package.path("usr/share/qemu"))
        .arg("-L")
        .arg(package.path("usr/share/seabios"))
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        // A host that resets or powers off stands still and can be asked why.
        .args(["-action", "reboot=shutdown,shutdown=pause"])
        // Of a triple fault of the host itself nothing else tells.
        .args(["-d", "cpu_reset"])
        .args(shape(image)?)
        .arg("-drive")
        .arg(format!(
            "if=none,id=payload,format=raw,readonly=on,file={}",
            files.payload.display()
        ))
        .arg("-drive")
        .arg(format!(
            "if=none,id=state,format=raw,discard=unmap,cache=unsafe,file={}",
            files.state.display()
        ))
        .arg("-netdev")
        .arg(tap("control", &ports.control))
        .arg("-netdev")
        .arg(tap("guests", &ports.guests))
        .arg("-chardev")
        .arg(format!(
            "socket,id=console,{},logfile={},logappend=on",
            socket(&files.console()),
            files.serial_log().display()
        ))
        .args(["-serial", "chardev:console"])
        .arg("-chardev")
        .arg(format!("socket,id=identity,{}", socket(&files.identity())))
        .args(["-serial", "chardev:identity"])
        .arg("-qmp")
        .arg(format!(
            "unix:{},server=on,wait=off",
            files.monitor().display()
        ));
    if incoming {
        command.args(["-incoming", "defer"]);
    }
    for socket in [files.monitor(), files.console(), files.identity()] {
        let _ = std::fs::remove_file(socket);
    }
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .context("starting QEMU")
}

fn tap(id: &str, interface: &str) -> String {
    format!("tap,id={id},ifname={interface},script=no,downscript=no")
}

/// The rate of the time stamp counter. Linux says it as twice the number of bogomips, which unlike the
/// frequency does not change with load.
fn tsc_khz() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/cpuinfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("bogomips"));
    let value = line.and_then(|line| line.split(':').nth(1)?.trim().parse::<f64>().ok());
    let bogomips = value.context("bogomips in /proc/cpuinfo")?;
    Ok((bogomips * 500.0) as u64)
}
