//! vhost-net in the kernel of a host: Debian's stock drivers on the one side, its stock vhost_net on the
//! other, and our process between them only to set them up.

use std::time::Duration;

use fractus_lab::{Host, TinyGuest};
use fractus_tests::harness::until;
use serde_json::json;

use crate::cloud::{GUEST_ACTS, lab};

const FOLDER: &str = "/var/lib/fractus-agent";
const HOST: &str = "10.99.0.1";
const GUEST: &str = "10.99.0.2";

/// Waits until a command succeeds on the host.
async fn until_done(host: &Host, what: &str, command: &str) -> String {
    let seen = until(what, GUEST_ACTS, || async {
        let log = || host.done("cat /tmp/guest.log").unwrap_or_default();
        let done = host.done(command);
        done.map_err(|error| format!("{error:#}\n{}", log()))
    });
    seen.await.unwrap()
}

/// Sends 4 MB through the guest's echo and compares what comes back.
fn bulk(host: &Host) {
    let script = format!(
        "head -c 4000000 /dev/urandom >/tmp/sent
         timeout 280 nc {GUEST} 7 </tmp/sent >/tmp/back
         cmp /tmp/sent /tmp/back"
    );
    let output = host.run_within(&script, Duration::from_secs(300)).unwrap();
    assert_eq!(output.status, 0, "{}", output.text);
}

/// How many threads the kernel has for networks, and how often that of the machine has woken which would
/// move the packets.
fn threads(host: &Host) -> (u64, u64) {
    // Since Linux 6.4 they are the process's, before they are the kernel's own.
    let script = "
        cat /proc/[0-9]*/task/*/comm | grep -c '^vhost-'
        machine=$(ps -o pid,args | awk '/[v]m by-hand/ {print $1}')
        cat /proc/$machine/task/*/status |
          awk '/^Name/ {name=$2} /^voluntary/ && name==\"net0\" {print $2}'";
    let said = host.done(script).unwrap();
    match said.split_whitespace().collect::<Vec<_>>()[..] {
        [kernel, woken] => (kernel.parse().unwrap(), woken.parse().unwrap()),
        _ => panic!("not two numbers: {said}"),
    }
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn vhost_the_hosts_kernel_moves_a_guests_packets() {
    let lab = lab(1).await;
    let host = &lab.hosts[0];
    let tiny = TinyGuest::make().unwrap();
    for (name, file) in [("kernel", &tiny.kernel), ("initrd", &tiny.initrd)] {
        let bytes = std::fs::read(file).unwrap();
        host.put(&format!("{FOLDER}/{name}"), 0o644, &bytes)
            .unwrap();
    }
    let commands = format!(
        "killall udhcpc; ip address add {GUEST}/24 dev eth0; \
         (nc -l -p 8 >/dev/null; reboot -f) & nc -ll -p 7 -e /bin/cat"
    );
    let machine = json!({
        "machine": {
            "uuid": "00000000-0000-0000-0000-000000000001",
            "cpus": {"count": 1},
            "memory": {"bytes": 256 << 20},
            "command_line": format!("console=ttyS0 quiet panic=-1 -- {commands}"),
        },
        "kernel": format!("{FOLDER}/kernel"), "initrd": format!("{FOLDER}/initrd"),
        "taps": ["vh0"], "vhost": true,
    });
    host.put("/tmp/vhost.json", 0o644, machine.to_string().as_bytes())
        .unwrap();
    host.done("setsid fractus-agent vm --config /tmp/vhost.json >/tmp/guest.log 2>&1 </dev/null &")
        .unwrap();
    let up = format!("ip address add {HOST}/24 dev vh0 && ip link set vh0 up");
    until_done(host, "the tap", &up).await;
    let ping = format!("ping -c 3 -W 2 {GUEST}");
    until_done(host, "the guest's first answer", &ping).await;

    // The kernel has it in hand: our thread is woken for no packet.
    let (kernel, before) = threads(host);
    assert_eq!(kernel, 1, "threads of vhost-net");
    bulk(host);
    let answers = host.done(&format!("ping -c 20 {GUEST}")).unwrap();
    assert!(answers.contains(" 0% packet loss"), "{answers}");
    let (_, after) = threads(host);
    assert!(after - before < 20, "woken {} times", after - before);

    // The next driver gives other rings.
    let _ = host.run_within(&format!("nc {GUEST} 8 </dev/null"), Duration::from_secs(60));
    let again = "[ $(grep -c 'tiny: ready' /tmp/guest.log) = 2 ]";
    until_done(host, "the guest's second boot", again).await;
    until_done(host, "an answer after the reboot", &ping).await;
    assert_eq!(threads(host).0, 1);
    bulk(host);
    println!("{}", host.done("cat /tmp/guest.log").unwrap());
}
