//! Disks that only Linux reads, in a host with a real `kvm_amd`: the fallback finds what a distribution's
//! own kernel is and starts it, also after the distribution has replaced it. Run by `scripts/lab test`.
//!
//! The disks are made on the host by the file systems' own tools; the tiny guest's kernel is the
//! distribution's, with an initial file system that says what it was started with.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

#[path = "../../../vmm/loader/tests/image/mod.rs"]
mod image;

use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use fractus_lab::{Archive, Host, Lab, Options, TinyGuest, Tree, outside, tree};
use fractus_tests::harness::{Client, until};
use fractus_tests::tidy::checkout;
use image::distributions::{FEDORA_GRUB, esp, grubenv, opensuse_grub};
use image::{BOOT_UUID, ROOT_UUID};
use serde_json::{Value, json};

/// On the host, on its own disk.
const FOLDER: &str = "/var/lib/fractus-agent/disks";
/// A kernel in software starts another in software, twice.
const BOOTS: Duration = Duration::from_secs(200);

/// Programs that make the disks, and where they are in their packages.
const TOOLS: [&str; 7] = [
    "sbin/mkfs.xfs",
    "sbin/mkfs.btrfs",
    "bin/btrfs",
    "sbin/lvm",
    "sbin/sfdisk",
    "sbin/losetup",
    "sbin/dmsetup",
];

/// Modules that the distribution's initial file system has besides the tiny guest's, in their order.
const MODULES: [&str; 6] = [
    "lib/libcrc32c",
    "fs/xfs/xfs",
    "lib/zstd/zstd_compress",
    "lib/raid6/raid6_pq",
    "crypto/xor",
    "fs/btrfs/btrfs",
];

/// What images/fallback builds.
fn fallback() -> PathBuf {
    let output = outside(checkout().join("images/fallback/build"))
        .stderr(std::process::Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success(), "images/fallback/build failed");
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

/// The distribution's part of its initial file system.
fn more() -> Vec<u8> {
    let debian = tree(&["--alone", "linux-image-cloud-amd64", "busybox-static"]).unwrap();
    let (release, _) = debian.kernel().unwrap();
    let mut archive = Archive::new(Vec::new());
    for (number, module) in MODULES.iter().enumerate() {
        let from = debian.path(&format!("lib/modules/{release}/kernel/{module}.ko"));
        let name = from.file_name().unwrap().to_str().unwrap();
        let name = format!("more/{number}-{name}");
        archive.copy(&name, 0o644, &from).unwrap();
    }
    archive.folder("mnt").unwrap();
    archive
        .file("init", 0o755, include_bytes!("fallback/init"))
        .unwrap();
    archive.finish().unwrap()
}

/// The programs with their libraries.
fn add_tools(archive: &mut Archive<Vec<u8>>) {
    let packages = [
        "xfsprogs",
        "btrfs-progs",
        "lvm2",
        "dmsetup",
        "fdisk",
        "mount",
    ];
    let tools: Tree = tree(&packages).unwrap();
    let mut libraries = vec![tools.path("lib/x86_64-linux-gnu/ld-linux-x86-64.so.2")];
    for program in TOOLS {
        let path = tools.path(program);
        let mut list = tools.command(Path::new("--list")).unwrap();
        let output = list.arg(&path).output().unwrap();
        assert!(output.status.success(), "{program}");
        let text = String::from_utf8(output.stdout).unwrap();
        let found = text
            .lines()
            .filter_map(|line| line.split_once(" => ")?.1.split(' ').next());
        libraries.extend(found.map(PathBuf::from));
        let name = path.file_name().unwrap().to_str().unwrap();
        archive.copy(&format!("bin/{name}"), 0o755, &path).unwrap();
    }
    libraries.sort_by_key(|library| library.file_name().map(ToOwned::to_owned));
    libraries.dedup_by_key(|library| library.file_name().map(ToOwned::to_owned));
    for library in libraries {
        let name = library.file_name().unwrap().to_str().unwrap();
        archive
            .copy(&format!("lib/{name}"), 0o755, &library)
            .unwrap();
    }
}

/// All that the host needs for making and booting the disks.
fn bundle() -> Vec<u8> {
    let mut archive = Archive::new(Vec::new());
    add_tools(&mut archive);
    archive
        .file("disks", 0o755, include_bytes!("fallback/disks"))
        .unwrap();
    let tiny = TinyGuest::make().unwrap();
    archive.copy("files/vmlinuz", 0o644, &tiny.kernel).unwrap();
    archive.copy("files/initrd", 0o644, &tiny.initrd).unwrap();
    archive.file("files/more.img", 0o644, &more()).unwrap();
    let kernelopts = "kernelopts=root=/dev/mapper/rocky-root ro rd.lvm.lv=rocky/root \n";
    let entry = "title Rocky Linux (1) 9\nversion 1\nlinux /vmlinuz-1\n\
        initrd /initramfs-1.img $tuned_initrd\n\
        options $kernelopts console=ttyS0 quiet panic=-1 layout=rocky generation=1 $tuned_params\n\
        grub_users $grub_users\ngrub_arg --unrestricted\ngrub_class rocky\n";
    let opensuse = opensuse_grub(
        "6.4.0-1-default",
        "/boot/initrd-6.4.0-1-default /boot/more.img",
        "console=ttyS0 quiet panic=-1 layout=opensuse generation=1",
    );
    for (name, text) in [
        ("red-hat-grub", FEDORA_GRUB.as_bytes()),
        ("red-hat-grubenv", grubenv(kernelopts).as_bytes()),
        ("red-hat-entry", entry.as_bytes()),
        ("opensuse-grub", opensuse.as_bytes()),
        ("esp-rocky", &esp("rocky", BOOT_UUID, "/grub2")),
        ("esp-opensuse", &esp("opensuse", ROOT_UUID, "/boot/grub2")),
    ] {
        archive.file(&format!("files/{name}"), 0o644, text).unwrap();
    }
    let fallback = fallback();
    for name in ["vmlinuz", "initrd"] {
        archive
            .copy(&format!("fallback/{name}"), 0o644, &fallback.join(name))
            .unwrap();
    }
    archive.finish().unwrap()
}

/// Hands the bundle to the host, which unpacks it into its folder.
fn deliver(host: &Host, bundle: Vec<u8>) {
    // In the lab's network, as this thread is.
    let listener = TcpListener::bind("10.77.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 4096];
        let _ = std::io::Read::read(&mut stream, &mut request).unwrap();
        let head = format!(
            "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n",
            bundle.len()
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream.write_all(&bundle).unwrap();
    });
    let fetch = format!(
        "mkdir -p {FOLDER} && cd {FOLDER} && wget -q -O - http://10.77.0.1:{port}/ | cpio -idu 2>&1"
    );
    host.done(&fetch).unwrap();
    serve.join().unwrap();
}

/// Makes a disk and boots it until its machine ends; gives the console and what was said of the end.
fn boot(host: &Host, layout: &str, cpus: u8) -> (String, String) {
    let machine = json!({
        "machine": {
            "uuid": "01234567-89ab-cdef-0123-456789abcdef",
            "cpus": {"count": cpus},
            "memory": {"bytes": 512 << 20},
            "boot": {"disk": 0},
            "command_line": "from=\"our host\"",
        },
        "fallback": format!("{FOLDER}/fallback"),
        "disks": [format!("{FOLDER}/{layout}.raw")],
    });
    let run = |script: &str| host.run_within(script, BOOTS).unwrap();
    let made = run(&format!("{FOLDER}/disks {layout}"));
    assert_eq!(made.status, 0, "{layout}: {}", made.text);
    let seconds = BOOTS.as_secs() - 10;
    let ended = run(&format!(
        "cd {FOLDER} && echo '{machine}' >{layout}.json && time timeout -s KILL {seconds} \
         fractus-agent vm --config {layout}.json </dev/null >{layout}.log 2>{layout}.end; \
         echo ended with $? >>{layout}.end; rm {layout}.raw"
    ));
    let console = host.done(&format!("cat {FOLDER}/{layout}.log")).unwrap();
    let end = host.done(&format!("cat {FOLDER}/{layout}.end")).unwrap();
    println!("--- {layout}\n{console}\n{end}\n{}", ended.text);
    (console, end)
}

/// The lines that the distribution's kernels were started with.
fn lines(console: &str) -> Vec<&str> {
    let lines = console
        .lines()
        .filter_map(|line| line.split_once("distribution: cpus=2 line="));
    lines.map(|(_, line)| line.trim()).collect()
}

/// A host with all that the tests need.
async fn lab() -> Lab {
    let lab = Lab::start(Options {
        hosts: 1,
        ..Options::default()
    });
    let lab = lab.await.unwrap();
    deliver(&lab.hosts[0], bundle());
    lab
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn lab_fallback_boots_rocky_from_xfs_and_again_after_an_upgrade() {
    let lab = lab().await;
    let (console, end) = boot(&lab.hosts[0], "rocky", 2);
    let line = |generation: u32| {
        format!(
            "BOOT_IMAGE=/vmlinuz-{generation} root=/dev/mapper/rocky-root ro rd.lvm.lv=rocky/root \
             console=ttyS0 quiet panic=-1 layout=rocky generation={generation} from=\"our host\""
        )
    };
    assert_eq!(lines(&console), [line(1), line(2)], "{console}");
    assert!(console.contains("ACPI: RSDP"), "{console}");
    assert!(end.contains("ended with 0"), "{end}");
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn lab_fallback_boots_opensuse_from_btrfs_and_again_after_an_upgrade() {
    let lab = lab().await;
    let (console, end) = boot(&lab.hosts[0], "opensuse", 2);
    let line = |generation: u32| {
        format!(
            "BOOT_IMAGE=/boot/vmlinuz-6.4.0-1-default root=UUID={ROOT_UUID} console=ttyS0 quiet \
             panic=-1 layout=opensuse generation={generation} from=\"our host\""
        )
    };
    assert_eq!(lines(&console), [line(1), line(2)], "{console}");
    assert!(end.contains("ended with 0"), "{end}");
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn lab_fallback_boots_from_a_logical_volume() {
    let lab = lab().await;
    let (console, end) = boot(&lab.hosts[0], "volume", 2);
    let started = lines(&console);
    let wanted = "BOOT_IMAGE=/boot/vmlinuz-1 ";
    assert!(
        started.len() == 1 && started[0].starts_with(wanted),
        "{console}"
    );
    assert!(
        console.contains("logical volume my--group-root"),
        "{console}"
    );
    assert!(end.contains("ended with 0"), "{end}");
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn lab_fallback_says_what_it_did_not_find() {
    let lab = lab().await;
    let (console, end) = boot(&lab.hosts[0], "empty", 1);
    assert!(end.contains("NotBootable"), "{end}");
    let missing = "partition 1 (XFS) /vmlinuz-1: not there";
    assert!(
        end.contains(missing) && console.contains(missing),
        "{end}\n{console}"
    );
}

/// Who is no administrator, in the administrator's project: is told a fault as users are.
async fn member(admin: &Client) -> Client {
    let user = json!({"user": {"name": "ann", "password": "pw"}});
    let user = admin.post("/identity/v3/users", user).await.unwrap();
    let user = user.expect_status(201).unwrap().text("/user/id");
    let find = async |path: &str, at: &str| {
        let found = admin.get(path).await.unwrap();
        found.expect_status(200).unwrap().text(at)
    };
    let project = find("/identity/v3/projects?name=admin", "/projects/0/id").await;
    let role = find("/identity/v3/roles?name=member", "/roles/0/id").await;
    let grant = format!("/identity/v3/projects/{project}/users/{user}/roles/{role}");
    let granted = admin.put(&grant, Value::Null).await.unwrap();
    granted.expect_status(204).unwrap();
    admin.log_in("ann", "pw", "admin").await.unwrap()
}

#[tokio::test]
#[ignore = "takes a host in software: scripts/lab test"]
async fn lab_what_the_fallback_cannot_boot_is_the_servers_fault() {
    let lab = lab().await;
    let host = &lab.hosts[0];
    host.done(&format!("cp -r {FOLDER}/fallback /var/lib/fractus-agent/"))
        .unwrap();
    let admin = lab.controller.admin().await.unwrap();
    // XFS by its first bytes, and no more.
    let mut disk = vec![0; 4 << 20];
    disk[..4].copy_from_slice(b"XFSB");
    let image = json!({"name": "xfs", "disk_format": "raw", "container_format": "bare"});
    let made = admin.post("/image/v2/images", image).await.unwrap();
    let image = made.expect_status(201).unwrap().text("/id");
    let path = format!("/image/v2/images/{image}/file");
    let done = admin.upload(&path, disk).await.unwrap();
    done.expect_status(204).unwrap();
    let flavor = json!({"flavor": {"name": "f", "vcpus": 1, "ram": 512, "disk": 1}});
    let made = admin.post("/compute/v2.1/flavors", flavor).await.unwrap();
    let flavor = made.expect_status(200).unwrap().text("/flavor/id");
    let server = admin.create_server("xfs", &image, &flavor).await.unwrap();
    let owner = member(&admin).await;
    let path = format!("/compute/v2.1/servers/{server}");
    let fault = until("the server's fault", BOOTS / 2, || async {
        let answer = owner.get(&path).await.map_err(|e| format!("{e:#}"))?;
        let body: &Value = &answer.body;
        match body.pointer("/server/fault/message") {
            Some(fault) => Ok(fault.to_string()),
            None => Err(format!("{} {body}", answer.status)),
        }
    })
    .await
    .unwrap();
    println!("{fault}");
    assert!(fault.contains("XFS: it cannot be mounted"), "{fault}");
    let log = admin
        .until_logged(&server, "it cannot be mounted")
        .await
        .unwrap();
    assert!(log.contains("fallback: "), "{log}");
}
