//! Kernel modules for an initial file system: those wanted, with what they depend on.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::archive::Archive;

/// What is wanted.
#[derive(Debug, Clone, Copy)]
pub struct Selection {
    /// Folders below `kernel/` that are taken whole.
    pub folders: &'static [&'static str],
    /// Modules by name, as the kernel spells them (`_`, no `-`).
    pub names: &'static [&'static str],
}

/// For a lab host: networks, storage, virtualisation.
pub const HOST: Selection = Selection {
    folders: &[
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
    ],
    names: &[
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
    ],
};

/// For the tiny guest: every device that our machines may have.
pub const TINY: Selection = Selection {
    folders: &["drivers/virtio", "drivers/misc/pvpanic"],
    names: &[
        "af_packet",
        "button",
        "evdev",
        "ext4",
        "isofs",
        "nls_utf8",
        "virtio_balloon",
        "virtio_blk",
        "virtio_console",
        "virtio_mem",
        "virtio_net",
        "virtio_pci",
        "virtio_rng",
        "vmw_vsock_virtio_transport",
        "wdat_wdt",
    ],
};

/// Puts the modules below `PREFIXlib/modules/RELEASE`, with the indices by which modprobe and the
/// kernel find them. `modules` is the folder of that release.
pub fn add<W: Write>(
    archive: &mut Archive<W>,
    prefix: &str,
    selection: Selection,
    busybox: &Path,
    release: &str,
    modules: &Path,
) -> Result<()> {
    let staging = tempfile::tempdir()?;
    let folder = staging.path().join("lib/modules").join(release);
    let wanted = wanted(modules, selection)?;
    for path in &wanted {
        let to = folder.join(path);
        if let Some(parent) = to.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::copy(modules.join(path), to)?;
    }
    let status = Command::new(busybox)
        .args(["depmod", "-b"])
        .arg(staging.path())
        .arg(release)
        .status()?;
    if !status.success() {
        bail!("busybox depmod: {status}");
    }
    let names = ["modules.alias", "modules.dep", "modules.symbols"];
    let names = names.map(PathBuf::from);
    for path in wanted.iter().chain(&names) {
        let name = format!("{prefix}lib/modules/{release}/{}", path.display());
        archive
            .copy(&name, 0o644, &folder.join(path))
            .with_context(|| name.clone())?;
    }
    Ok(())
}

/// Paths below `modules/RELEASE`, in order: everything wanted, with its dependencies.
fn wanted(modules: &Path, selection: Selection) -> Result<BTreeSet<PathBuf>> {
    let mut all = BTreeMap::new();
    walk(&modules.join("kernel"), &mut all)?;
    let taken = |path: &Path| {
        let mut folders = selection.folders.iter();
        folders.any(|folder| path.starts_with(modules.join("kernel").join(folder)))
    };
    let mut open: Vec<String> = selection
        .names
        .iter()
        .map(|&name| name.to_owned())
        .collect();
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
