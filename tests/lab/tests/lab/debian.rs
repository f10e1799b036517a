//! A whole Debian, from its first boot to its last: what a stock distribution must find in our machine.

use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use fractus_lab::Host;
use fractus_tests::harness::{Client, until};
use serde_json::json;

use crate::cloud::{act, create, debian_disk, debian_image, flavor, lab, logged, said, settled};
use crate::hotplug;
use crate::terminal::Terminal;

/// Shows what the machine is to the guest, and leaves a shell on the serial line for what comes later.
pub const USER_DATA: &str = r#"#!/bin/bash
mkdir -p /var/lib/lab /etc/systemd/system/serial-getty@ttyS0.service.d
cat >/etc/systemd/system/serial-getty@ttyS0.service.d/lab.conf <<'END'
[Service]
ExecStart=
ExecStart=-/sbin/agetty --autologin root --noclear 115200 ttyS0 dumb
END
cat >/etc/systemd/system/lab.service <<'END'
[Unit]
After=multi-user.target
[Service]
Type=oneshot
ExecStart=/var/lib/lab/boot
[Install]
WantedBy=multi-user.target
END
cat >/var/lib/lab/boot <<'END'
#!/bin/bash
boots=$(($(cat /var/lib/lab/boots 2>/dev/null) + 1))
echo "$boots" >/var/lib/lab/boots
sync
# By the kernel, on one line: a login that begins on the terminal hangs up on all who write there.
echo "<6>lab: boot=$boots hostname=$(hostname) cpus=$(nproc) kib=$(sed -n 's/^MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo)" \
  "data=$(cat /var/lib/lab/data) kernel=$(uname -r) arguments=$(tr ' ' , </proc/cmdline)" >/dev/kmsg
END
chmod 755 /var/lib/lab/boot
head -c 4M /dev/urandom >/var/lib/lab/bytes
sync
sha256sum </var/lib/lab/bytes | cut -c1-32 >/var/lib/lab/data
sync
echo "lab: user data of $(hostname), key $(cat /home/*/.ssh/authorized_keys)"
systemctl daemon-reload
systemctl enable --quiet lab.service
systemctl start lab.service
systemctl restart serial-getty@ttyS0.service
"#;

/// The next kernel of this guest: another name, another entry, by Debian's own tools.
const NEW_KERNEL: &str = "cd /boot && mv vmlinuz-*-cloud-amd64 vmlinuz-99-lab && \
    mv initrd.img-*-cloud-amd64 initrd.img-99-lab && \
    sed -i 's/^GRUB_CMDLINE_LINUX=.*/GRUB_CMDLINE_LINUX=\"console=ttyS0,115200 lab.kernel=second\"/' \
    /etc/default/grub && update-grub && sync && cd /";

/// KiB of memory of the machine's process: the most that it had, and what it has.
fn memory(host: &Host) -> (u64, u64) {
    let script = "for pid in $(ps -o pid,args | grep '[f]ractus-agent vm' | awk '{print $1}'); do \
        grep -E '^Vm(HWM|RSS):' /proc/$pid/status; done";
    let text = host.done(script).unwrap();
    let most = |name: &str| {
        let values = text.lines().filter_map(|line| line.strip_prefix(name));
        let kib = values.filter_map(|value| value.split_whitespace().next()?.parse().ok());
        kib.max().unwrap_or(0)
    };
    (most("VmHWM:"), most("VmRSS:"))
}

#[tokio::test]
#[ignore = "takes hosts in software: scripts/lab test"]
async fn debian_lives_its_life_on_two_hosts() {
    let disk = debian_disk();
    let lab = lab(2).await;
    let admin = lab.controller.admin().await.unwrap();
    let image = debian_image(&admin, disk).await;
    let flavor = flavor(&admin, 2, 768, 4).await;
    let key =
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDdE0nzmvpTJ2gu3fnyxXEKnb8Iu1nXHPQ3gGd9qbC1p lab";
    let keypair = json!({"keypair": {"name": "lab", "public_key": key}});
    let made = admin.post("/compute/v2.1/os-keypairs", keypair).await;
    made.unwrap().expect_status(200).unwrap();
    let mut servers = Vec::new();
    let began = Instant::now();
    for host in &lab.hosts {
        let server = json!({"name": format!("debian-on-{}", host.name), "imageRef": image,
            "flavorRef": flavor, "host": host.name, "key_name": "lab",
            "user_data": STANDARD.encode(USER_DATA)});
        servers.push(create(&admin, server).await);
    }
    for (server, host) in servers.iter().zip(&lab.hosts) {
        let name = format!("debian-on-{}", host.name);
        let log = logged(&admin, server, "lab: boot=1 ").await;
        let seconds = began.elapsed().as_secs_f64();
        println!("{log}\n{name} booted {seconds:.0} s after both were asked for");
        assert!(
            log.contains(&format!("lab: user data of {name}, key {key}")),
            "{log}"
        );
        shows(&log, 1, &name);
        assert!(!log.contains("Failed to start"), "a unit failed: {log}");
    }

    // Where the time went, for who wants it shorter.
    let mut terminal = Terminal::shell(&admin, &servers[1]).await;
    let analysed = "systemd-analyze; systemd-analyze blame | head -n 20; cloud-init analyze blame | head -n 20";
    println!("{}", terminal.run(analysed).await);
    println!("{}", lab.hosts[1].exits().unwrap());

    stops_and_starts_with_its_data(&admin, &servers[0], "debian-on-host1").await;
    boots_its_new_kernel(&admin, &servers[0], "debian-on-host1").await;
    hotplug::comes_and_goes(&admin, &servers[0], 768).await;
    gives_memory_back(&admin, &servers[1], &lab.hosts[1]).await;

    // It goes by itself, and the cloud sees that nobody is to start it.
    let mut terminal = Terminal::shell(&admin, &servers[1]).await;
    terminal.send("systemctl poweroff").await;
    settled(&admin, &servers[1], "SHUTOFF").await;
}

/// What the guest says of itself at that boot.
fn shows(log: &str, boot: usize, name: &str) {
    let mark = format!("lab: boot={boot} ");
    assert_eq!(said(log, &mark, "hostname"), Some(name));
    assert_eq!(said(log, &mark, "cpus"), Some("2"));
    let kib: u64 = said(log, &mark, "kib").unwrap().parse().unwrap();
    // Of 768 MiB the kernel keeps some for itself.
    assert!(
        (650 * 1024..768 * 1024).contains(&kib),
        "{kib} KiB of memory"
    );
    assert_eq!(said(log, &mark, "data").map(str::len), Some(32), "{log}");
}

async fn stops_and_starts_with_its_data(admin: &Client, server: &str, name: &str) {
    let log = logged(admin, server, "lab: boot=1 ").await;
    let data = said(&log, "lab: boot=1 ", "data").unwrap().to_owned();
    act(admin, server, json!({"os-stop": null})).await;
    let log = logged(admin, server, "reboot: Power down").await;
    let (_, shutdown) = log.split_once("lab: boot=1 ").unwrap();
    for step in ["Stopped", "Reached target", "Unmounted"] {
        assert!(shutdown.contains(step), "{step}: {shutdown}");
    }
    settled(admin, server, "SHUTOFF").await;
    hotplug::change(admin, server, hotplug::room()).await;
    act(admin, server, json!({"os-start": null})).await;
    let log = logged(admin, server, "lab: boot=2 ").await;
    shows(&log, 2, name);
    assert_eq!(said(&log, "lab: boot=2 ", "data"), Some(&*data));
    assert!(
        !log.contains("recovering journal"),
        "it was not unmounted: {log}"
    );
}

/// The file that booted before is not there any more, and the new entry says something of its own.
async fn boots_its_new_kernel(admin: &Client, server: &str, name: &str) {
    let mut terminal = Terminal::shell(admin, server).await;
    println!("{}", terminal.run(NEW_KERNEL).await);
    terminal.send("systemctl reboot").await;
    let log = logged(admin, server, "lab: boot=3 ").await;
    shows(&log, 3, name);
    let arguments = said(&log, "lab: boot=3 ", "arguments").unwrap();
    println!("booted by its new configuration: {arguments}");
    assert!(arguments.contains("lab.kernel=second"), "{arguments}");
    let before = said(&log, "lab: boot=2 ", "arguments").unwrap();
    assert!(!before.contains("lab.kernel=second"), "{before}");
    settled(admin, server, "ACTIVE").await;
}

/// What the guest frees is its host's again.
async fn gives_memory_back(admin: &Client, server: &str, host: &Host) {
    let mut terminal = Terminal::shell(admin, server).await;
    let fill = "mkdir -p /run/full && mount -t tmpfs -o size=400M full /run/full && \
        head -c 256M /dev/urandom >/run/full/bytes";
    terminal.run(fill).await;
    let (_, full) = memory(host);
    let began = Instant::now();
    terminal.run("umount /run/full").await;
    let shrinks = until(
        "the process gives 100 MiB back",
        Duration::from_secs(120),
        || async {
            let (_, now) = memory(host);
            match full.saturating_sub(now) {
                less if less >= 100 * 1024 => Ok(now),
                less => Err(format!("{less} KiB less than {full}")),
            }
        },
    );
    let now = shrinks.await.unwrap();
    let seconds = began.elapsed().as_secs_f64();
    println!("the machine's process: {full} KiB full, {now} KiB {seconds:.1} s after it was freed");
}
