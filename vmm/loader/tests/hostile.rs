//! Disks that are damaged, go in circles or claim the absurd: an error with what was looked for, soon.
//! How soon is counted in steps, which are the same on any machine; that steps take no longer than they
//! are held for is looked at in CPU time, which others on the machine do not use up.

#![allow(clippy::unwrap_used, reason = "a fault fails the test")]

mod image;

use std::time::Duration;

use fractus_loader::{FindError, Limits, ReadAt, find};
use image::distributions::{ALPINE, alpine, debian, debian_grub, unified};
use image::*;
use rustix::time::{ClockId, clock_gettime};

/// What a whole disk may take: a hundredth of a second or two, where it is built for use.
fn few_steps() -> Limits {
    Limits {
        work: Duration::from_secs(3600),
        wait: Duration::from_secs(3600),
        steps: 100_000,
        ..Limits::for_memory(64 << 20)
    }
}

/// What is said of a disk, within few steps.
fn refused(disk: &[u8]) -> String {
    refused_by(&mut &disk[..])
}

fn refused_by(disk: &mut dyn ReadAt) -> String {
    let error = find(disk, &few_steps()).unwrap_err();
    error.to_string()
}

#[track_caller]
fn says(disk: &[u8], wanted: &str) {
    let said = refused(disk);
    assert!(said.contains(wanted), "{said}");
}

const GRUB: &str = "boot/grub/grub.cfg";

fn with_grub(text: &str) -> Vec<u8> {
    Files::new().put(GRUB, text).ext4(4, ROOT_UUID, &[])
}

#[test]
fn a_disk_without_a_table_is_named_as_one() {
    says(&[], "no partition table");
    says(&[0; 512], "no partition table");
    says(&vec![0; MIB], "no partition table");
    let noise: Vec<u8> = (0..MIB as u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    says(&noise, "no partition table");
}

#[test]
fn a_gpt_that_is_broken_twice_is_told_from_none() {
    let mut disk = debian(b"k", b"i");
    let last = disk.len() - 512;
    disk[512 + 60] ^= 1;
    disk[last + 60] ^= 1;
    says(
        &disk,
        "the GPT's header has a wrong checksum, and the second header is no better",
    );
    let mut disk = debian(b"k", b"i");
    let last = disk.len() - 512;
    for header in [512, last] {
        disk[header + 80..header + 84].fill(0xff);
    }
    says(&disk, "wrong checksum");
}

#[test]
fn a_chain_of_logical_partitions_in_a_circle_ends() {
    let mut disk = mbr(&[], &[(0x83, vec![1; 512]), (0x83, vec![1; 512])]);
    // The second link leads back to the first.
    let base = MIB;
    let second = u32::from_le_bytes(disk[base + 446 + 24..][..4].try_into().unwrap()) as usize;
    let at = base + second * 512 + 446 + 16;
    disk[at + 4] = 5;
    disk[at + 12] = 1;
    says(&disk, "chain of logical partitions is broken");
}

#[test]
fn entries_that_name_missing_files_say_which() {
    says(
        &with_grub(&debian_grub("0", &["6.1"], "")),
        "entry 'Debian GNU/Linux': kernel the whole disk (ext4) /boot/vmlinuz-6.1: not there",
    );
    let no_initrd = Files::new()
        .put("boot/extlinux.conf", ALPINE)
        .put("boot/vmlinuz-virt", "k");
    says(
        &no_initrd.ext4(4, ROOT_UUID, &[]),
        "initrd the whole disk (ext4) /boot/initramfs-virt: not there",
    );
}

#[test]
fn a_file_system_without_configuration_is_said_to_have_none() {
    let disk = Files::new().put("etc/fstab", "").ext4(4, ROOT_UUID, &[]);
    says(&disk, "has neither /boot/grub/grub.cfg");
}

#[test]
fn what_only_linux_reads_asks_for_the_fallback() {
    for (offset, magic, name) in [
        (0, &b"XFSB"[..], "XFS"),
        (0x1_0040, b"_BHRfS_M", "btrfs"),
        (0x218, b"LVM2 001", "LVM"),
    ] {
        let mut root = vec![0; MIB];
        root[offset..offset + magic.len()].copy_from_slice(magic);
        let disk = gpt(&[partition(2, LINUX, root)]);
        let error = find(&mut &disk[..], &Limits::for_memory(1 << 20)).unwrap_err();
        let FindError::NeedsFallback {
            file_system,
            partition,
            ..
        } = error
        else {
            panic!("{error}");
        };
        assert_eq!((file_system, partition.as_str()), (name, "partition 2"));
    }
}

#[test]
fn a_unified_image_whose_sections_are_not_there_is_named() {
    let mut image = unified(&[(".osrel", b"ID=x"), (".linux", &[1; 5000])]);
    let size = image.len();
    image.truncate(size - 4096);
    let esp = |image: &[u8]| Files::new().put("EFI/Linux/x.efi", image).fat(4, 16);
    says(
        &esp(&image),
        "/EFI/Linux/x.efi: a section outside of its file",
    );
    // Headers that lead anywhere, and more sections than the head of the file holds.
    for (at, value) in [(0x3c, [0xff; 4]), (70, [0xff; 4]), (84, [0xff; 4])] {
        let mut image = image.clone();
        image[at..at + 4].copy_from_slice(&value);
        assert!(!refused(&esp(&image)).is_empty());
    }
}

#[test]
fn symbolic_links_in_a_circle_end() {
    let disk = Files::new()
        .put(GRUB, "menuentry x {\n linux /a\n}\n")
        .link("a", "b")
        .link("b", "/boot/../a")
        .ext4(4, ROOT_UUID, &[]);
    says(&disk, "more than 40 symbolic links");
}

#[test]
fn files_larger_than_memory_are_refused_before_they_are_read() {
    let files = Files::new()
        .put("boot/vmlinuz", "k")
        .put("boot/initrd", "i")
        .put(
            GRUB,
            "menuentry x {\n linux /boot/vmlinuz\n initrd /boot/initrd /boot/initrd\n}\n",
        );
    let file = std::fs::File::options()
        .write(true)
        .open(files.path().join("boot/initrd"))
        .unwrap();
    file.set_len(40 << 20).unwrap();
    // One would fit, twice it does not.
    says(
        &files.ext4(4, ROOT_UUID, &[]),
        "its 41943040 bytes do not fit into the machine's memory",
    );
    file.set_len(1 << 40).unwrap();
    says(
        &files.ext4(4, ROOT_UUID, &[]),
        "do not fit into the machine's memory",
    );
}

#[test]
fn scripts_without_end_end() {
    let long = format!(
        "set a=x\n{}menuentry x {{ linux $a; }}\n",
        "set a=\"$a$a\"\n".repeat(60)
    );
    for (script, wanted) in [
        ("while true; do set a=1; done\n", "given up"),
        ("function f { f; }\nf\n", "without end"),
        ("source $prefix/grub.cfg\n", "without end"),
        (long.as_str(), "without end"),
        ("if true; then\n", "line 1"),
        (
            "menuentry x {\n chainloader +1\n}\n",
            "loads no Linux kernel",
        ),
        ("linux16", "makes no menu"),
    ] {
        says(&with_grub(script), wanted);
    }
}

/// What a search costs, by the limits that a machine has, in CPU time.
fn cost(disk: &[u8]) -> (Result<String, FindError>, Duration) {
    let now = || Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap();
    let began = now();
    let outcome = find(&mut &disk[..], &Limits::for_memory(64 << 20)).map(|found| found.how);
    (outcome, now() - began)
}

#[test]
fn steps_that_are_as_dear_as_they_can_be_end_within_a_second() {
    // Words, values, comparisons and conditions as long as they may be, for ever.
    let long = "x".repeat(16_000);
    let words = "set w=\"$w $w\"\n".repeat(12);
    let body = |body: &str| format!("set a={long}\nset w=x\n{words}while true; do {body}; done\n");
    let scripts = [
        body("[ $a = ${a}b ]"),
        body("set b=$a"),
        body("test $w $w $w $w $w $w $w $w $w $w $w $w -a x"),
        body("for i in $w $w $w; do true; done"),
        body("load_env $w"),
        body("search --file $a --label $a"),
        body("[ -f /$a ]"),
        body("blscfg"),
        format!("function f {{ [ $@ ]; }}\n{}", body("f $w $w $w")),
    ];
    for script in scripts {
        let mut files = Files::new()
            .put(GRUB, &script)
            .put("boot/grub/grubenv", environment());
        for entry in 0..20 {
            let version = format!("{}{entry}", "1.".repeat(120));
            files = files.put(
                &format!("loader/entries/{entry}.conf"),
                format!("linux /a\nversion {version}\n"),
            );
        }
        let (outcome, took) = cost(&files.ext4(8, ROOT_UUID, &[]));
        let error = outcome.unwrap_err();
        let end = &script[script.len() - 60..];
        assert!(took < Duration::from_secs(1), "{took:?}: {end}: {error}");
        let ended = matches!(error, FindError::GaveUp { .. });
        assert!(
            ended || error.to_string().contains("without end"),
            "{end}: {error}"
        );
    }
}

/// One that is as large as it is read at all.
fn environment() -> String {
    let mut text = "# GRUB Environment Block\n".to_owned();
    while text.len() < 1_000_000 {
        text += "a=\n";
    }
    text
}

/// Entries with the longest version, pattern and name that are looked at, all but the same.
fn entries(count: usize, name: &str) -> Files {
    let mut files = Files::new();
    for entry in 0..count {
        let version = format!("{}{entry}", "0.".repeat(7800));
        let options = "options x\n".repeat(40);
        files = files
            .put(
                &format!("loader/entries/{name}-{entry:04}.conf"),
                format!("linux /vmlinuz-{entry}\nsort-key a\nversion 1.{version}\n{options}"),
            )
            .put(&format!("vmlinuz-{entry}"), "k");
    }
    files
}

#[test]
fn sorting_entries_with_very_long_versions_is_paid_for() {
    let name = "1.".repeat(110);
    let disk = entries(300, &name).ext4(32, ROOT_UUID, &["-N", "2000"]);
    let few = Limits {
        steps: 200_000,
        ..few_steps()
    };
    let error = find(&mut &disk[..], &few).unwrap_err();
    assert!(matches!(error, FindError::GaveUp { .. }), "{error}");
    let enough = Limits {
        steps: 2_000_000,
        ..few_steps()
    };
    let found = find(&mut &disk[..], &enough).unwrap();
    // Their versions are the same as far as they are compared.
    assert!(found.how.contains("-0299'"), "{}", found.how);
    let (outcome, took) = cost(&disk);
    assert!(took < Duration::from_secs(1), "{took:?}: {outcome:?}");
}

#[test]
fn a_pattern_of_stars_is_paid_for() {
    let disk = entries(300, &"a".repeat(230))
        .put(
            "loader/loader.conf",
            format!("default {}b\n", "*a".repeat(120)),
        )
        .ext4(32, ROOT_UUID, &["-N", "2000"]);
    let few = Limits {
        steps: 1_000_000,
        ..few_steps()
    };
    let error = find(&mut &disk[..], &few).unwrap_err();
    assert!(matches!(error, FindError::GaveUp { .. }), "{error}");
    let (outcome, took) = cost(&disk);
    assert!(took < Duration::from_secs(1), "{took:?}: {outcome:?}");
}

#[test]
fn a_script_of_more_words_than_there_is_memory_for_is_refused() {
    for text in ["a ", "a\n", "$a", "'a'$b"] {
        let script = text.repeat(1_000_000 / text.len());
        let disk = with_grub(&script);
        let limits = Limits {
            kept: 8 << 20,
            ..few_steps()
        };
        let error = find(&mut &disk[..], &limits).unwrap_err().to_string();
        assert!(
            error.contains("more words than there is memory for"),
            "{error}"
        );
        let (_, took) = cost(&disk);
        assert!(took < Duration::from_secs(1), "{took:?}: {text}");
    }
}

/// Runs debugfs on an image.
fn debugfs(image: &mut Vec<u8>, commands: &str) -> String {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &*image).unwrap();
    let script = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(script.path(), commands).unwrap();
    let output = tool("debugfs")
        .args(["-w", "-f"])
        .arg(script.path())
        .arg(file.path())
        .output()
        .unwrap();
    *image = std::fs::read(file.path()).unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn damage_within_ext4_is_named() {
    let good = || {
        Files::new()
            .put("boot/vmlinuz", vec![1; 300_000])
            .put(GRUB, "menuentry x {\n linux /boot/vmlinuz\n}\n")
            .ext4(8, ROOT_UUID, &["-O", "^metadata_csum"])
    };
    let mut absurd = good();
    absurd[1024 + 4..1024 + 8].fill(0xff);
    says(&absurd, "the superblock's numbers");
    let mut unknown = good();
    unknown[1024 + 0x62] |= 0x80;
    says(&unknown, "a feature that this loader does not know");
    let mut flipped = Files::new().ext4(8, ROOT_UUID, &[]);
    flipped[1024 + 0x80] ^= 1;
    says(&flipped, "the superblock's checksum");
    // A file that begins behind the file system's end.
    let mut outside = good();
    debugfs(
        &mut outside,
        "set_inode_field /boot/vmlinuz block[2] 0xffff0000\nset_inode_field /boot/vmlinuz block[5] 0x7fffffff\n",
    );
    says(&outside, "damaged");
    // The root folder's data are its own inode table: nonsense entries.
    let mut nonsense = good();
    debugfs(&mut nonsense, "set_inode_field / block[5] 1\n");
    assert!(!refused(&nonsense).is_empty());
}

#[test]
fn a_fat_that_is_larger_than_its_partition_is_damaged() {
    let mut disk = alpine("", b"k", b"i").fat(4, 16);
    disk[19..21].fill(0);
    disk[32..36].fill(0xff);
    says(&disk, "larger than its partition");
}

#[test]
fn clusters_in_a_circle_end() {
    let mut disk = Files::new()
        .put("extlinux.conf", ALPINE.repeat(3))
        .put("vmlinuz-virt", "k")
        .fat(16, 16);
    // Every entry of both tables leads to cluster 3.
    let (reserved, size) = (
        usize::from(disk[14]),
        usize::from(u16::from_le_bytes([disk[22], disk[23]])),
    );
    for entry in disk[reserved * 512 + 4..][..size * 2 * 512 - 4].chunks_mut(2) {
        entry.copy_from_slice(&[3, 0]);
    }
    assert!(!refused(&disk).is_empty());
}

/// Only its first bytes can be read.
struct Failing(Vec<u8>);

impl ReadAt for Failing {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        if offset > 0 {
            return Err(std::io::ErrorKind::Other.into());
        }
        (&self.0[..]).read_at(offset, buffer)
    }

    fn size(&self) -> u64 {
        self.0.len() as u64
    }
}

#[test]
fn a_disk_that_cannot_be_read_is_an_answer() {
    let said = refused_by(&mut Failing(debian(b"k", b"i")));
    assert!(said.contains("partition"), "{said}");
}
