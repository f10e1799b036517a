//! What a stock kernel complains of under our hypervisor, beside what it complains of under QEMU in the
//! same host: nothing more, but for what `dmesg-differences` allows, with the reason.

use std::collections::BTreeSet;
use std::time::Duration;

use fractus_lab::{Host, Peer, TinyGuest, section, variant};
use fractus_tests::harness::until;
use serde_json::json;

use crate::cloud::{
    act, create, flavor, lab, logged, prompted, settled, tiny_image, upload, upload_file,
};

/// Behind a `#` the reason, then the line that it is of, as [`Complaints`] writes it.
const ALLOWED: &str = include_str!("dmesg-differences");
/// A guest in QEMU in a host in software: longest wait.
const GUEST_ENDS: Duration = Duration::from_secs(900);
/// The last that a kernel says.
const END: &str = "reboot: Power down";
/// Where a host has room.
const FOLDER: &str = "/var/lib/fractus-agent";

/// Kernel messages of level warning and above, each with `#` in place of times, addresses and counts.
#[derive(Debug, PartialEq, Eq)]
struct Complaints(BTreeSet<String>);

impl Complaints {
    /// From `dmesg -r`: `<4>[    0.123456] text`.
    fn from_raw(text: &str) -> Self {
        let complaints = text.lines().filter_map(|line| {
            let (level, message) = line.trim().strip_prefix('<')?.split_once('>')?;
            let level: u32 = level.parse().ok()?;
            // The lower three bits; what is above them is who said it.
            (level & 7 <= 4).then(|| without_numbers(message))
        });
        Self(complaints.collect())
    }

    /// From a console that only shows these (`loglevel=5`): `[    0.123456] text`. cloud-init, which writes
    /// to the console in the kernel's form, is not the kernel.
    fn from_console(text: &str) -> Self {
        let complaints = text.lines().filter_map(kernels);
        Self(complaints.map(without_numbers).collect())
    }

    fn not_in<'a>(&'a self, other: &Self) -> Vec<&'a str> {
        let lines = self.0.iter().filter(|line| !other.0.contains(*line));
        lines.map(String::as_str).collect()
    }
}

/// The kernel's message in a line of a console. What others write to the console may stand before it: a message begins
/// wherever they just are.
fn kernels(line: &str) -> Option<&str> {
    let line = line.trim();
    line.match_indices('[').find_map(|(at, _)| {
        let message = line.get(at..)?;
        let (time, said) = message.get(1..)?.split_once(']')?;
        let (seconds, microseconds) = time.split_once('.')?;
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        let is_time = !seconds.trim().is_empty() && microseconds.len() == 6;
        let is_time = is_time && digits(seconds.trim_start()) && digits(microseconds);
        (is_time && !said.trim_start().starts_with("cloud-init[")).then_some(message)
    })
}

/// Without the time, and every word of digits (also hexadecimal ones, from two digits on) as `#`.
fn without_numbers(message: &str) -> String {
    let text = match message
        .strip_prefix('[')
        .and_then(|rest| rest.split_once(']'))
    {
        Some((time, text)) if time.trim().parse::<f64>().is_ok() => text,
        _ => message,
    };
    let number = |word: &str| {
        let hexadecimal = word.strip_prefix("0x").unwrap_or(word);
        let digits = hexadecimal.bytes().all(|byte| byte.is_ascii_hexdigit());
        digits && word.bytes().any(|byte| byte.is_ascii_digit())
    };
    let mut out = String::new();
    let mut word = String::new();
    for character in text.trim().chars().chain(['\n']) {
        if character.is_ascii_alphanumeric() {
            word.push(character);
            continue;
        }
        out.push_str(if number(&word) { "#" } else { &word });
        word.clear();
        out.push(character);
    }
    out.trim_end().to_owned()
}

fn allowed() -> BTreeSet<&'static str> {
    let mut reason = false;
    let mut lines = BTreeSet::new();
    for line in ALLOWED.lines().filter(|line| !line.is_empty()) {
        match line.starts_with('#') {
            true => reason = true,
            false => {
                assert!(reason, "no reason is given for {line:?}");
                lines.insert(line);
                reason = false;
            }
        }
    }
    lines
}

/// Prints and records what differs; fails for what is not allowed.
fn compare(guest: &str, ours: &Complaints, theirs: &Complaints) {
    let (more, less) = (ours.not_in(theirs), theirs.not_in(ours));
    let both: Vec<&str> = ours.0.intersection(&theirs.0).map(String::as_str).collect();
    let list = |lines: &[&str]| match lines {
        [] => "none\n".to_owned(),
        lines => format!("\n    {}\n", lines.join("\n    ")),
    };
    let text = format!(
        "Warnings and errors only under our hypervisor: {}\nonly under QEMU: {}\nunder both: {}",
        list(&more),
        list(&less),
        list(&both)
    );
    section(&format!("Kernel messages of {guest}"), &text).unwrap();
    let allowed = allowed();
    let new: Vec<_> = more
        .into_iter()
        .filter(|line| !allowed.contains(line))
        .collect();
    assert!(
        new.is_empty(),
        "{guest}: not under QEMU, and not allowed: {new:#?}"
    );
}

/// Runs QEMU in a host until its guest has said `end`; gives what that wrote to its serial line.
fn under_qemu(host: &Host, arguments: &str, end: &str) -> String {
    let peer = Peer::bring(host).unwrap();
    let script = format!(
        "cd {FOLDER} && : >peer.log
        {} -M q35 -cpu host -serial file:peer.log -device virtio-rng-pci \
          -device virtio-balloon-pci {arguments} >qemu.log 2>&1 &
        pid=$!
        until grep -q '{end}' peer.log; do
          kill -0 $pid || {{ cat qemu.log; exit 1; }}
          usleep 200000
        done
        kill $pid
        cat peer.log",
        peer.command
    );
    let output = host.run_within(&script, GUEST_ENDS).unwrap();
    assert_eq!(output.status, 0, "{}", output.text);
    output.text
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn dmesg_of_the_tiny_guest_complains_of_nothing_that_qemu_is_not_blamed_for() {
    let lab = lab(1).await;
    let host = &lab.hosts[0];
    let tiny = TinyGuest::make().unwrap();
    let admin = lab.controller.admin().await.unwrap();
    let command = "console=ttyS0 quiet panic=-1 -- dmesg -r";
    let image = tiny_image(&admin, &tiny, command).await;
    let flavor = flavor(&admin, 2, 256, 1).await;
    let server = json!({"name": "tiny", "imageRef": image, "flavorRef": flavor});
    let server = create(&admin, server).await;
    let ours = logged(&admin, &server, "tiny: command ended with 0").await;

    for (name, file) in [("kernel", &tiny.kernel), ("initrd", &tiny.initrd)] {
        host.put(
            &format!("{FOLDER}/{name}"),
            0o644,
            &std::fs::read(file).unwrap(),
        )
        .unwrap();
    }
    host.done(&format!("truncate -s 1G {FOLDER}/disk")).unwrap();
    let arguments = format!(
        "-smp 2 -m 256 -kernel kernel -initrd initrd -append '{command}' \
         -drive if=none,id=disk,format=raw,file=disk -device virtio-blk-pci,drive=disk"
    );
    let theirs = under_qemu(host, &arguments, "tiny: command ended with 0");
    for log in [&ours, &theirs] {
        assert!(log.contains("<6>["), "no message at all: {log}");
    }
    let title = format!("the tiny guest ({})", tiny.release);
    let (ours, theirs) = (Complaints::from_raw(&ours), Complaints::from_raw(&theirs));
    compare(&title, &ours, &theirs);
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn dmesg_of_debian_complains_of_nothing_that_qemu_is_not_blamed_for() {
    let lab = lab(1).await;
    let host = &lab.hosts[0];
    let admin = lab.controller.admin().await.unwrap();
    let debian = variant("full").unwrap();
    // What the disk's own configuration would boot, but the console shows complaints only.
    let command = std::fs::read_to_string(debian.join("command-line")).unwrap();
    let command = format!("{} loglevel=5", command.trim());
    let kernel = upload_file(&admin, "kernel", &debian.join("vmlinuz")).await;
    let initrd = upload_file(&admin, "initrd", &debian.join("initrd.img")).await;
    let image = json!({"name": "debian", "disk_format": "qcow2", "container_format": "bare",
        "kernel_id": kernel, "ramdisk_id": initrd, "os_command_line": command});
    let disk = std::fs::read(debian.join("disk.qcow2")).unwrap();
    let image = upload(&admin, image, disk).await;
    let flavor = flavor(&admin, 2, 768, 4).await;
    let server = json!({"name": "debian", "imageRef": image, "flavorRef": flavor});
    let server = create(&admin, server).await;
    prompted(&admin, &server, "login:").await;
    act(&admin, &server, json!({"os-stop": null})).await;
    settled(&admin, &server, "SHUTOFF").await;
    // The second boot: the first one's disk is larger than its partitions say, which the kernel remarks.
    act(&admin, &server, json!({"os-start": null})).await;
    let log = until("its second login", Duration::from_secs(300), || async {
        let log = logged(&admin, &server, END).await;
        let (_, second) = log.split_once(END).unwrap();
        match second.contains("login:") {
            true => Ok(second.to_owned()),
            false => Err(log),
        }
    });
    let ours = log.await.unwrap();
    act(&admin, &server, json!({"os-stop": null})).await;
    settled(&admin, &server, "SHUTOFF").await;

    for (name, file) in [("kernel", "vmlinuz"), ("initrd", "initrd.img")] {
        let bytes = std::fs::read(debian.join(file)).unwrap();
        host.put(&format!("{FOLDER}/{name}"), 0o644, &bytes)
            .unwrap();
    }
    // The very disk that the server had.
    let find = format!("ls {FOLDER}/machines/*/root.raw");
    let disk = host.done(&find).unwrap();
    let arguments = format!(
        "-smp 2 -m 768 -kernel kernel -initrd initrd -append '{command}' \
         -drive if=none,id=disk,format=raw,file={} -device virtio-blk-pci,drive=disk",
        disk.trim()
    );
    let theirs = under_qemu(host, &arguments, "login:");
    println!("ours:\n{ours}\nQEMU's:\n{theirs}");
    for log in [&ours, &theirs] {
        // Both boot from their first message on, and so say what is said in any case.
        assert!(log.contains("Loading, please wait"), "{log}");
    }
    let (ours, theirs) = (
        Complaints::from_console(&ours),
        Complaints::from_console(&theirs),
    );
    compare("the whole Debian", &ours, &theirs);
}

#[test]
fn numbers_and_times_do_not_make_a_message_another_one() {
    let raw = "<4>[    0.123456] ACPI: bad table at 0x7f00, 12 entries\n<6>[    0.2] fine\n<12>[ 1.0] user space, too";
    let complaints = Complaints::from_raw(raw);
    let console = "[    0.900000] ACPI: bad table at 0xfeed, 7 entries\nnot the kernel\n\
        [    1.200000] cloud-init[9]: +--+\n[    1.500000] user space, too";
    assert_eq!(complaints, Complaints::from_console(console));
    assert!(complaints.0.contains("ACPI: bad table at #, # entries"));
}

#[test]
fn a_message_is_the_kernels_wherever_in_the_line_it_begins() {
    let console = "\x1b[0;32m  OK  \x1b[0m] Started [sys]…er.[   29.023974] dm: bad table 7\r\n\
        [   30.000001] cloud-init[12]: fi[   31.000000] late\n[12.5] no time\n[  OK  ] Reached target\n[    1.000000] odd\n";
    let expected = ["dm: bad table #", "late", "odd"].map(str::to_owned);
    assert_eq!(
        Complaints::from_console(console),
        Complaints(expected.into())
    );
}
