//! What is allowed, each exception with its reason. Nothing else decides what tidy accepts.

/// Names that may stand at the top of the checkout; names that begin with a dot may as well.
pub const TOP_LEVEL: &[&str] = &[
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE",
    "README.md",
    "agent",
    "clippy.toml",
    "controller",
    "deny.toml",
    "images",
    "rust-toolchain.toml",
    "rustfmt.toml",
    "scripts",
    "tests",
    "vmm",
];

/// Where `unsafe` lives (invariant 8): a file, or a folder with all that is in it, and why.
pub const UNSAFE: &[(&str, &str)] = &[
    (
        "vmm/src/memory",
        "guest memory: mmap, memfd, volatile access",
    ),
    ("vmm/src/kvm", "ioctls of KVM"),
    ("vmm/src/cpu", "vCPU set-up: ioctls of KVM and its run page"),
    (
        "vmm/src/virtio/block",
        "io_uring: buffers that the kernel writes to",
    ),
    (
        "vmm/src/virtio/net/frame.rs",
        "packets read and written in guest memory",
    ),
    ("vmm/src/virtio/net/tap.rs", "ioctls of tun"),
    ("vmm/src/virtio/net/vhost.rs", "ioctls of vhost"),
    ("vmm/tests/tap", "a tap in a namespace of its own"),
    (
        "agent/src/vm",
        "the jail: clone, namespaces, seccomp, descriptors inherited from the parent",
    ),
    (
        "agent/src/network/tap.rs",
        "ioctls of tun and of interfaces",
    ),
    (
        "agent/src/machine/process",
        "spawning: descriptors and namespaces between fork and exec",
    ),
    ("images/fallback/src/kexec.rs", "kexec_file_load"),
    (
        "images/fallback/src/verdict.rs",
        "an instruction for a port",
    ),
    ("images/probe", "a guest without an operating system"),
];

/// A file longer than this fails.
pub const FILE_LINES: usize = 800;
/// A file longer than this is printed as a hint: it may be two modules.
pub const COMFORTABLE_FILE_LINES: usize = 600;
/// A function longer than this fails: it does not fit a screen.
pub const FUNCTION_LINES: usize = 100;

/// Macros that say "not done yet", or were left over from looking for a fault.
pub const UNFINISHED: &[&str] = &["todo!", "unimplemented!", "dbg!"];

/// Words in a comment that mean the file was copied from elsewhere under a licence (or with a
/// notice) that this repository does not have.
pub const FOREIGN_NOTICES: &[&str] = &[
    "GNU General Public License",
    "GNU Lesser General Public License",
    "GNU Affero General Public License",
    "All rights reserved",
    "Mozilla Public License",
    "Business Source License",
    "Server Side Public License",
    "Copyright (c)",
    "Copyright (C)",
    "Copyright ©",
];
/// The only licence a file of ours may name.
pub const LICENCE: &str = "Apache-2.0";

/// A sleep in a test must say why waiting for the event is impossible: this mark in a comment on the
/// same line or on a line just above it.
pub const SLEEP_REASON: &str = "sleeps because";
