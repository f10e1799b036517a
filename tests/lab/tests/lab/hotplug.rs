//! What comes and goes while a stock kernel runs: a disk, a network device, a processor, memory. Asked of
//! `/fractus/v1/machines`, until volumes, ports and the live resize ask for it.

use fractus_lab::TinyGuest;
use fractus_tests::harness::{Client, until};
use reqwest::Method;
use serde_json::{Value, json};

use crate::cloud::{GUEST_ACTS, act, create, flavor, lab, logged, settled, tiny_image};
use crate::terminal::Terminal;

const DISK: &str = "5a1f6f0e-6f57-4c43-9f5d-2a54f6f70001";
const NIC: &str = "5a1f6f0e-6f57-4c43-9f5d-2a54f6f70002";
const MAC: &str = "02:00:00:00:77:01";
/// As a guest reads it: the beginning of the disk's id.
const SERIAL: &str = "5a1f6f0e-6f57-4c43-9";

/// What a machine may become while it runs: from its next start on.
pub fn room() -> Value {
    json!({"max_vcpus": 3, "max_memory_mib": 1280})
}

pub async fn change(admin: &Client, server: &str, fields: Value) {
    let path = format!("/fractus/v1/machines/{server}");
    let body = json!({"machine": fields});
    let answer = admin.request(Method::PATCH, &path, Some(body)).await;
    answer.unwrap().expect_status(202).unwrap();
}

/// Waits until the machine's host says that of it.
async fn reports(admin: &Client, server: &str, what: &str, is: impl Fn(&Value) -> bool) {
    let path = format!("/fractus/v1/machines/{server}");
    let seen = until(what, GUEST_ACTS, || async {
        let answer = admin.get(&path).await.map_err(|e| format!("{e:#}"))?;
        let report = answer.body["machine"]["report"].clone();
        match is(&report) {
            true => Ok(()),
            false => Err(report.to_string()),
        }
    });
    seen.await.unwrap();
}

/// A state such as `attached`, of a disk or a network device.
async fn stands(admin: &Client, server: &str, list: &str, id: &str, state: &str) {
    let what = format!("{id} is {state}");
    let is = |report: &Value| {
        let devices = report[list].as_array();
        devices.is_some_and(|all| all.iter().any(|it| it["id"] == id && it["state"] == state))
    };
    reports(admin, server, &what, is).await;
}

/// All of it, in a guest of 2 vCPUs that was started with [`room`], whose root shell waits at the console.
pub async fn comes_and_goes(admin: &Client, server: &str, memory_mib: u64) {
    let mut guest = Terminal::shell(admin, server).await;
    disk(admin, server, &mut guest).await;
    network(admin, server, &mut guest).await;
    processor(admin, server, &mut guest).await;
    memory(admin, server, &mut guest, memory_mib).await;
}

async fn disk(admin: &Client, server: &str, guest: &mut Terminal) {
    let disk = |presence: &str| json!([{"id": DISK, "size": 64 << 20, "presence": presence}]);
    let appears = format!("until grep -q {SERIAL} /sys/block/vd*/serial; do sleep 1; done");
    let name = format!("hot=/dev/$(grep -l {SERIAL} /sys/block/vd*/serial | cut -d/ -f4)");
    let goes = format!("while grep -q {SERIAL} /sys/block/vd*/serial; do sleep 1; done");

    change(admin, server, json!({"disks": disk("attached")})).await;
    guest.run(&appears).await;
    stands(admin, server, "disks", DISK, "attached").await;
    let write = "dd if=/dev/urandom of=$hot bs=1M count=64 && sync && sha256sum $hot | cut -c1-64 >/run/hot";
    guest.run(&format!("{name}; {write}")).await;

    change(admin, server, json!({"disks": disk("detached")})).await;
    guest.run(&goes).await;
    stands(admin, server, "disks", DISK, "detached").await;

    // What was written is there when it comes again.
    change(admin, server, json!({"disks": disk("attached")})).await;
    guest.run(&appears).await;
    let same = "[ \"$(sha256sum $hot | cut -c1-64)\" = \"$(cat /run/hot)\" ]";
    guest.run(&format!("{name}; {same}")).await;
    change(admin, server, json!({"disks": disk("deleted")})).await;
    guest.run(&goes).await;
    stands(admin, server, "disks", DISK, "deleted").await;
}

async fn network(admin: &Client, server: &str, guest: &mut Terminal) {
    let nics = json!([{"id": NIC, "mac": MAC, "queues": 2}]);
    change(admin, server, json!({"nics": nics})).await;
    let address = format!("grep -q {MAC} /sys/class/net/*/address");
    guest
        .run(&format!("until {address}; do sleep 1; done"))
        .await;
    stands(admin, server, "nics", NIC, "attached").await;
    let name = format!("hot=$(grep -l {MAC} /sys/class/net/*/address | cut -d/ -f5)");
    // With a carrier, once it is up.
    let up = "ip link set $hot up && until [ \"$(cat /sys/class/net/$hot/carrier)\" = 1 ]; do sleep 1; done";
    guest.run(&format!("{name}; {up}")).await;

    change(admin, server, json!({"nics": []})).await;
    guest
        .run(&format!("while {address}; do sleep 1; done"))
        .await;
    let gone = |report: &Value| {
        let nics = report["nics"].as_array();
        nics.is_none_or(|all| all.iter().all(|nic| nic["id"] != NIC))
    };
    reports(admin, server, "the network device is gone", gone).await;
}

async fn processor(admin: &Client, server: &str, guest: &mut Terminal) {
    const NEW: &str = "/sys/devices/system/cpu/cpu2";
    change(admin, server, json!({"vcpus": 3})).await;
    guest
        .run(&format!("until [ -e {NEW}/online ]; do sleep 1; done"))
        .await;
    // Debian leaves that to its administrator.
    let online = format!("[ $(cat {NEW}/online) = 1 ] || echo 1 >{NEW}/online");
    guest.run(&online).await;
    guest.run("[ $(nproc) = 3 ]").await;
    // It does work there.
    guest
        .run("taskset -c 2 true 2>/dev/null || taskset 4 true")
        .await;
    let used = |report: &Value| report["size"]["vcpus_used"] == 3;
    reports(admin, server, "3 vCPUs are used", used).await;

    change(admin, server, json!({"vcpus": 2})).await;
    guest
        .run(&format!("while [ -e {NEW}/online ]; do sleep 1; done"))
        .await;
    guest.run("[ $(nproc) = 2 ]").await;
    let used = |report: &Value| report["size"]["vcpus_used"] == 2;
    reports(admin, server, "2 vCPUs are used", used).await;
}

async fn memory(admin: &Client, server: &str, guest: &mut Terminal, memory_mib: u64) {
    let total = |than: &str, mib: u64| {
        let now = "$(sed -n 's/^MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo)";
        format!("until [ {now} -{than} {} ]; do sleep 1; done", mib * 1024)
    };
    // Debian neither loads it in the tiny guest, nor takes memory into use by itself.
    let ready =
        "modprobe virtio_mem; echo online_movable >/sys/devices/system/memory/auto_online_blocks";
    guest.run(ready).await;
    let more = memory_mib + 512;
    change(admin, server, json!({"memory_mib": more})).await;
    guest.run(&total("gt", more - 150)).await;
    let used = |report: &Value| report["size"]["memory_mib_used"] == more;
    reports(admin, server, "the guest took its memory", used).await;

    change(admin, server, json!({"memory_mib": memory_mib})).await;
    guest.run(&total("lt", memory_mib + 1)).await;
    let used = |report: &Value| report["size"]["memory_mib_used"] == memory_mib;
    reports(admin, server, "the guest gave its memory back", used).await;
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn scenario_devices_come_and_go_while_a_stock_kernel_runs() {
    let lab = lab(1).await;
    let tiny = TinyGuest::make().unwrap();
    let admin = lab.controller.admin().await.unwrap();
    let image = tiny_image(&admin, &tiny, "console=ttyS0 quiet panic=-1").await;
    let flavor = flavor(&admin, 2, 256, 1).await;
    let server = json!({"name": "grows", "imageRef": image, "flavorRef": flavor});
    let server = create(&admin, server).await;
    logged(&admin, &server, "tiny: ready").await;
    change(&admin, &server, room()).await;
    act(&admin, &server, json!({"reboot": {"type": "HARD"}})).await;
    logged(&admin, &server, "boots=2").await;
    settled(&admin, &server, "ACTIVE").await;
    comes_and_goes(&admin, &server, 256).await;
}
