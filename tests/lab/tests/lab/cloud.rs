//! What the tests do to a cloud.

use std::path::Path;
use std::time::Duration;

use fractus_lab::{Lab, Options, TinyGuest, variant};
use fractus_tests::harness::client::PANIC;
use fractus_tests::harness::{Client, until};
use serde_json::{Value, json};

/// Longest wait for what a guest does, on a machine in software that does much else: a distribution
/// boots in a minute or two on a quiet one.
pub const GUEST_ACTS: Duration = Duration::from_secs(900);

pub async fn lab(hosts: u8) -> Lab {
    let options = Options {
        hosts,
        ..Options::default()
    };
    Lab::start(options).await.unwrap()
}

/// Uploads an image; gives its id.
pub async fn upload(client: &Client, image: Value, data: Vec<u8>) -> String {
    let made = client.post("/image/v2/images", image).await.unwrap();
    let id = made.expect_status(201).unwrap().text("/id");
    let path = format!("/image/v2/images/{id}/file");
    let done = client.upload(&path, data).await.unwrap();
    done.expect_status(204).unwrap();
    id
}

pub async fn upload_file(client: &Client, name: &str, path: &Path) -> String {
    let image = json!({"name": name, "disk_format": "raw", "container_format": "bare"});
    upload(client, image, std::fs::read(path).unwrap()).await
}

/// An image that boots the tiny guest with this command line, its disk empty.
pub async fn tiny_image(client: &Client, tiny: &TinyGuest, command_line: &str) -> String {
    tiny_image_of(client, tiny, command_line, 1).await
}

/// The same, of a disk of so many MiB.
pub async fn tiny_image_of(
    client: &Client,
    tiny: &TinyGuest,
    command_line: &str,
    mib: usize,
) -> String {
    let kernel = upload_file(client, "tiny-kernel", &tiny.kernel).await;
    let ramdisk = upload_file(client, "tiny-ramdisk", &tiny.initrd).await;
    let image = json!({"name": "tiny", "disk_format": "raw", "container_format": "bare",
        "kernel_id": kernel, "ramdisk_id": ramdisk, "os_command_line": command_line});
    upload(client, image, vec![0; mib << 20]).await
}

/// The disk image that images/debian builds, which may take a minute: before there is a lab that waits.
pub fn debian_disk() -> Vec<u8> {
    let folder = variant("full").unwrap();
    std::fs::read(folder.join("disk.qcow2")).unwrap()
}

/// Nothing says which kernel: the machine finds it on the disk.
pub async fn debian_image(client: &Client, disk: Vec<u8>) -> String {
    let image = json!({"name": "debian", "disk_format": "qcow2", "container_format": "bare"});
    upload(client, image, disk).await
}

/// GiB of disk, MiB of memory.
pub async fn flavor(client: &Client, vcpus: u32, ram: u32, disk: u32) -> String {
    let flavor = json!({"flavor": {"name": format!("{vcpus}-{ram}-{disk}"), "vcpus": vcpus,
        "ram": ram, "disk": disk}});
    let made = client.post("/compute/v2.1/flavors", flavor).await.unwrap();
    made.expect_status(200).unwrap().text("/flavor/id")
}

/// Makes a server of this body, without networks; gives its id.
pub async fn create(client: &Client, mut server: Value) -> String {
    server["networks"] = json!("none");
    let body = json!({"server": server});
    let made = client.at(96).post("/compute/v2.1/servers", body).await;
    made.unwrap().expect_status(202).unwrap().text("/server/id")
}

/// An action that is taken on.
pub async fn act(client: &Client, server: &str, action: Value) {
    let answer = client.act(server, action).await.unwrap();
    answer.expect_status(202).unwrap();
}

pub async fn delete(client: &Client, server: &str) {
    let path = format!("/compute/v2.1/servers/{server}");
    let answer = client.delete(&path).await.unwrap();
    answer.expect_status(204).unwrap();
    client.until_gone(server).await.unwrap();
}

/// Waits until a whole line of the server's console log holds this; gives the log.
pub async fn logged(client: &Client, server: &str, wanted: &str) -> String {
    let seen = client.until_logged_within(server, wanted, GUEST_ACTS);
    seen.await.unwrap()
}

/// Waits until the server's console asks for this, at the end of no line.
pub async fn prompted(client: &Client, server: &str, prompt: &str) {
    let what = format!("{prompt:?} on the console of {server}");
    let seen = until(&what, GUEST_ACTS, || async {
        let text = client.console_log(server).await?;
        assert!(!text.contains(PANIC), "{what}: its kernel panicked: {text}");
        if text.contains(prompt) {
            Ok(())
        } else {
            Err(text)
        }
    });
    seen.await.unwrap();
}

/// Waits until the server is that, however long its guest takes.
pub async fn settled(client: &Client, server: &str, status: &str) -> Value {
    let seen = client.until_status_within(server, status, GUEST_ACTS).await;
    seen.unwrap()
}

/// The value of `name=` in the last line that holds `mark`.
pub fn said<'a>(log: &'a str, mark: &str, name: &str) -> Option<&'a str> {
    let line = log.lines().rev().find(|line| line.contains(mark))?;
    let words = line.split_whitespace();
    let mut values = words.filter_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    values.next()
}

/// `few`, or what was promised.
pub fn times(few: usize, promised: usize) -> usize {
    match std::env::var_os("FRACTUS_FULL") {
        Some(_) => promised,
        None => few,
    }
}
