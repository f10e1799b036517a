//! Where a guest's memory and processors are on the host: page sizes, NUMA nodes, pinned vCPUs; and what
//! is said where the host lacks them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a fault fails the test"
)]

mod probe_guest;

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, Stdio};

use fractus_vmm::config::{HotMemoryConfig, PageSize};
use fractus_vmm::memory::{GuestMemory, MemoryError};
use probe_guest::{Guest, Setup};

/// The lines of /proc/self/NAME about the mapping that begins the guest's memory.
fn mapping(guest: &Guest, name: &str) -> String {
    let start = guest.machine.memory().slots()[0].host;
    let text = fs::read_to_string(format!("/proc/self/{name}")).unwrap();
    let mut found = String::new();
    let mut inside = false;
    for line in text.lines() {
        // The head of a mapping begins with its address, in hexadecimal; fields have a name and a colon.
        let word = line.split(['-', ' ']).next().unwrap_or_default();
        if let Ok(address) = u64::from_str_radix(word, 16) {
            inside = address == start;
        }
        if inside {
            found.push_str(line);
            found.push('\n');
        }
    }
    assert!(!found.is_empty(), "no mapping at {start:#x} in {name}");
    found
}

/// More huge pages than there would be, until dropped, or until this test is killed. Another run may do
/// the same beside it: each adds and takes away its own.
struct HugePages(Child);

/// Gives them back when our end of its standard input closes. In a session of its own, because a test
/// that takes too long is killed with its process group.
const GIVE_BACK: &str = r#"
pool=/proc/sys/vm/nr_hugepages
read -r _
exec 9<$pool && flock 9 && echo $(($(cat $pool) - $0)) > $pool
"#;
const POOL: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    /// `None` where the host gives none.
    fn more(count: u64) -> Option<Self> {
        let pool = fs::File::open(POOL).ok()?;
        pool.lock().ok()?;
        let read = || -> Option<u64> { fs::read_to_string(POOL).ok()?.trim().parse().ok() };
        let before = read()?;
        fs::write(POOL, (before + count).to_string()).ok()?;
        let got = read()?.saturating_sub(before);
        let guardian = Command::new("setsid")
            .args(["sh", "-c", GIVE_BACK, &got.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let pages = Self(guardian);
        // The guardian takes it in its turn.
        drop(pool);
        (got == count).then_some(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let given_back = self.0.wait().is_ok_and(|status| status.success());
        assert!(
            given_back || std::thread::panicking(),
            "huge pages are left"
        );
    }
}

#[test]
fn a_guest_runs_on_huge_pages_through_a_reset_and_is_refused_where_there_are_none() {
    let mut config = Setup::new().config.memory;
    config.pages = PageSize::Huge2MiB;
    // More than any host of these tests has.
    config.bytes = 1 << 40;
    let refused = GuestMemory::create(&config).unwrap_err();
    assert!(matches!(refused, MemoryError::Reserve { .. }), "{refused}");
    assert!(refused.to_string().contains("huge pages"), "{refused}");

    let Some(_pages) = HugePages::more(76) else {
        println!("this host gives no huge pages: no guest was tried");
        return;
    };
    let mut setup = Setup::new();
    setup.config.memory.pages = PageSize::Huge2MiB;
    setup.config.hot_memory = Some(HotMemoryConfig {
        max: 16 << 20,
        bytes: 8 << 20,
    });
    let mut guest = setup.start();
    let nonce = guest.booted()["nonce"].clone();
    assert!(guest.ok("touch 16").starts_with("mib=16 "));
    let smaps = mapping(&guest, "smaps");
    let size = smaps
        .lines()
        .find(|line| line.starts_with("KernelPageSize:"));
    assert!(size.unwrap().contains(" 2048 kB"), "{smaps}");
    // What is plugged is of such pages, which go back with it.
    let taken = |guest: &Guest| rustix::fs::fstat(guest.machine.memory()).unwrap().st_blocks * 512;
    assert_eq!(taken(&guest), 64 << 20);
    for _ in 0..3 {
        assert_eq!(guest.ok("memory plug 2 4"), "answer=0");
        assert_eq!(taken(&guest), 72 << 20);
        guest.ok("memory check 2 4 0");
        guest.ok("memory fill 2 4 9");
        assert_eq!(guest.ok("memory unplug 2 4"), "answer=0");
        assert_eq!(taken(&guest), 64 << 20);
        guest.ok("memory check 2 4 0");
    }
    assert_eq!(guest.ok("memory plug 0 4"), "answer=0");
    // Memory is given back and taken again meanwhile.
    guest.send("reboot");
    assert_ne!(guest.booted()["nonce"], nonce);
    assert!(guest.ok("touch 16").starts_with("mib=16 "));
    assert_eq!(taken(&guest), 64 << 20);

    // It goes on in such pages from a file, with what is plugged.
    assert_eq!(guest.ok("memory plug 1 3"), "answer=0");
    guest.ok("memory fill 1 2 7");
    let file = tempfile::tempfile().unwrap();
    guest
        .machine
        .snapshot(file.try_clone().unwrap(), b"")
        .unwrap();
    let mut other = guest.cloned_from(file, &[]);
    // Also the one that nobody has touched.
    assert_eq!(taken(&other), 70 << 20);
    other.ok("memory check 1 2 7");
    other.ok("memory check 3 1 0");
    assert_eq!(other.ok("memory unplug 1 3"), "answer=0");
    assert_eq!(taken(&other), 64 << 20);
    guest.ok("memory check 1 2 7");
}

#[test]
fn a_guest_asks_for_transparent_huge_pages_and_gets_them_where_the_host_has_them() {
    let mut setup = Setup::new();
    setup.config.memory.pages = PageSize::Transparent;
    let mut guest = setup.boot();
    assert!(guest.ok("touch 32").starts_with("mib=32 "));
    let smaps = mapping(&guest, "smaps");
    let field = |name: &str| {
        let line = smaps.lines().find_map(|line| line.strip_prefix(name));
        line.map(|rest| rest.trim().to_owned())
    };
    let host = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    let Ok(host) = host else {
        println!("a kernel without transparent huge pages: small ones were used");
        return;
    };
    let flags = field("VmFlags:").unwrap();
    assert!(flags.split(' ').any(|flag| flag == "hg"), "{smaps}");
    if ["[always]", "[within_size]", "[advise]"]
        .iter()
        .any(|mode| host.contains(mode))
    {
        assert_ne!(field("ShmemPmdMapped:").unwrap(), "0 kB", "{smaps}");
    }
}

#[test]
fn memory_is_bound_to_the_nodes_asked_for_and_refused_on_one_that_is_not_there() {
    let mut setup = Setup::new();
    setup.config.memory.host_nodes = vec![0];
    let mut guest = setup.boot();
    assert!(guest.ok("touch 16").starts_with("mib=16 "));
    let bound = mapping(&guest, "numa_maps");
    assert!(bound.contains(" bind:0 "), "{bound}");

    let mut config = Setup::new().config.memory;
    config.host_nodes = vec![63];
    let refused = GuestMemory::create(&config).unwrap_err();
    assert!(matches!(refused, MemoryError::Bind { .. }), "{refused}");
    assert!(refused.to_string().contains("[63]"), "{refused}");
}

/// Numbers and allowed processors of this process's vCPU threads.
fn vcpus() -> BTreeMap<u8, String> {
    let mut found = BTreeMap::new();
    for task in fs::read_dir("/proc/self/task").unwrap() {
        let task = task.unwrap().path();
        let (Ok(name), Ok(status)) = (
            fs::read_to_string(task.join("comm")),
            fs::read_to_string(task.join("status")),
        ) else {
            continue;
        };
        let allowed = status
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        // The test's own thread has the test's name.
        let number = name.trim().strip_prefix("vcpu");
        if let Some(Ok(number)) = number.map(str::parse::<u8>) {
            found.insert(number, allowed.unwrap().trim().to_owned());
        }
    }
    found
}

#[test]
fn vcpus_run_where_they_are_pinned_and_nowhere_is_an_error() {
    let last = std::thread::available_parallelism().unwrap().get() as u32 - 1;
    let mut setup = Setup::new().cpus(3);
    setup.config.cpus.host_cpus = vec![last, 0];
    let _guest = setup.boot();
    let expected = [last, 0, last].map(|cpu| cpu.to_string());
    assert_eq!(vcpus().into_values().collect::<Vec<_>>(), expected);

    let mut setup = Setup::new();
    setup.config.cpus.host_cpus = vec![1023];
    let refused = setup.refused();
    assert!(refused.contains("1023"), "{refused}");
}
