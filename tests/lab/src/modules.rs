//! Kernel modules for a host: those wanted, with what they depend on.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Folders below `kernel/` that are taken whole (networks, storage, virtualisation).
const FOLDERS: &[&str] = &[
    "arch/x86/kvm",
    "drivers/block",
    "drivers/md",
    "drivers/net/vxlan",
    "drivers/vhost",
    "drivers/virtio",
    "fs/btrfs",
    "fs/ext4",
    "fs/fuse",
    "fs/isofs",
    "fs/overlayfs",
    "fs/xfs",
    "net/8021q",
    "net/bridge",
    "net/ipv4",
    "net/ipv6",
    "net/netfilter",
    "net/openvswitch",
    "net/sched",
    "net/vmw_vsock",
];
/// Modules by name.
const NAMES: &[&str] = &[
    "af_packet",
    "ccp",
    "crc32c_generic",
    "crc32c_intel",
    "dummy",
    "ifb",
    "ipvlan",
    "irqbypass",
    "macvlan",
    "macvtap",
    "tap",
    "tun",
    "veth",
    "virtio_net",
    "vrf",
    "wireguard",
];

/// Paths below `modules/RELEASE`, in order: everything wanted, with its dependencies.
pub fn wanted(modules: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut all = BTreeMap::new();
    walk(&modules.join("kernel"), &mut all)?;
    let taken = |path: &Path| {
        FOLDERS
            .iter()
            .any(|folder| path.starts_with(modules.join("kernel").join(folder)))
    };
    let mut open: Vec<String> = NAMES.iter().map(|&name| name.to_owned()).collect();
    open.extend(
        all.iter()
            .filter(|(_, path)| taken(path))
            .map(|(name, _)| name.clone()),
    );
    let mut found = BTreeSet::new();
    while let Some(name) = open.pop() {
        // What is not there is built in, or belongs to another release.
        let Some(path) = all.get(&name) else { continue };
        if found.insert(path.strip_prefix(modules)?.to_path_buf()) {
            open.extend(needs(path)?);
        }
    }
    Ok(found)
}

/// Every module below `folder`, by its name.
fn walk(folder: &Path, into: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries =
        std::fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            walk(&path, into)?;
        } else if let Some(name) = path.file_name().and_then(|name| name.to_str())
            && let Some(name) = name.strip_suffix(".ko")
        {
            into.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

/// The names in the module's own `depends=` and in its soft dependencies.
fn needs(module: &Path) -> Result<Vec<String>> {
    let bytes = std::fs::read(module)?;
    let mut names = Vec::new();
    for text in bytes.split(|&byte| byte == 0) {
        if let Some(list) = text.strip_prefix(b"depends=") {
            let list = String::from_utf8_lossy(list);
            names.extend(list.split(',').map(|name| name.replace('-', "_")));
        } else if let Some(list) = text.strip_prefix(b"softdep=") {
            let list = String::from_utf8_lossy(list);
            let list = list.split_whitespace().filter(|name| !name.ends_with(':'));
            names.extend(list.map(|name| name.replace('-', "_")));
        }
    }
    Ok(names)
}
