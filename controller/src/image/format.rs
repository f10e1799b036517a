//! What an image's bytes are, told from its first bytes alone.
//!
//! Pure: it looks at a prefix and never at a file, so that a hostile image can be refused before
//! anything opens it. Layouts: qcow2 (QEMU docs/interop/qcow2), VMDK 5.0 (sparse extent header and
//! descriptor), VDI, VHD and VHDX (Microsoft's format documents), ISO 9660 (ECMA-119), ploop.

use std::fmt;

/// Bytes of an image that [`inspect`] wants to see: enough for every signature and descriptor.
pub const PREFIX: usize = 64 << 10;

/// A format that is recognised by its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Nothing is recognised: raw, or a kernel, or a ramdisk.
    Raw,
    Qcow2,
    Vmdk,
    Vdi,
    Vhd,
    Vhdx,
    Iso,
    Ploop,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vdi => "vdi",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
            Self::Iso => "iso",
            Self::Ploop => "ploop",
        })
    }
}

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inspected {
    pub format: Format,
    /// Bytes that a guest would see, where the header says it. For raw it is the image's own size.
    pub virtual_size: Option<u64>,
}

/// Why an image must not be taken, whatever it claims to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Danger {
    #[error("a qcow2 image with a backing file is not accepted; flatten it with qemu-img convert")]
    BackingFile,
    #[error("a qcow2 image with an external data file is not accepted; use qemu-img convert")]
    DataFile,
    #[error("the qcow2 image needs features that are not known here (incompatible bits {0:#x})")]
    UnknownFeatures(u64),
    #[error("the qcow2 image is encrypted by the old method, which is not accepted")]
    Encrypted,
    #[error("the {0} header is damaged: {1}")]
    Damaged(Format, &'static str),
    #[error("a VMDK of type `{0}` is not accepted; use monolithicSparse or streamOptimized")]
    VmdkType(String),
    #[error("a VMDK descriptor that names other files is not accepted")]
    VmdkExtents,
}

/// Tells what begins with `prefix` (the first [`PREFIX`] bytes, or all where there are fewer).
pub fn inspect(prefix: &[u8]) -> Result<Inspected, Danger> {
    let found = |format, virtual_size| {
        Ok(Inspected {
            format,
            virtual_size,
        })
    };
    if prefix.starts_with(b"QFI\xfb") {
        return found(Format::Qcow2, Some(qcow2(prefix)?));
    }
    if prefix.starts_with(b"KDMV") {
        return found(Format::Vmdk, Some(vmdk(prefix)?));
    }
    if prefix.starts_with(b"# Disk DescriptorFile") {
        return Err(Danger::VmdkExtents);
    }
    if u32_le(prefix, 0x40) == Some(0xbeda_107f) {
        return found(Format::Vdi, u64_le(prefix, 0x170));
    }
    if prefix.starts_with(b"vhdxfile") {
        return found(Format::Vhdx, None);
    }
    if prefix.starts_with(b"conectix") {
        return found(Format::Vhd, u64_be(prefix, 48));
    }
    if prefix.starts_with(b"WithoutFreeSpace") || prefix.starts_with(b"WithouFreSpacExt") {
        return found(Format::Ploop, None);
    }
    if prefix.get(0x8001..0x8006) == Some(b"CD001") {
        return found(Format::Iso, None);
    }
    found(Format::Raw, None)
}

/// Whether an image that claims `claimed` (a `disk_format`) may have content of `format`.
///
/// A claim of a structured format without its signature is let through, as glance does: it can be
/// stored, and nothing will boot it. What is refused is content that is recognised and is not what
/// was claimed, raw above all: a guest that is given such bytes as raw could write a header that
/// names a file of the host.
pub fn agrees(claimed: &str, format: Format) -> bool {
    match format {
        Format::Raw => true,
        // An installation medium is bootable as a plain disk too.
        Format::Iso => matches!(claimed, "iso" | "raw"),
        other => claimed == other.to_string(),
    }
}

/// The virtual size in a qcow2 header, if nothing in it reaches outside of the image.
fn qcow2(prefix: &[u8]) -> Result<u64, Danger> {
    let damaged = |what| Danger::Damaged(Format::Qcow2, what);
    let short = || damaged("it ends within the header");
    let version = u32_be(prefix, 4).ok_or_else(short)?;
    let backing = u64_be(prefix, 8).ok_or_else(short)?;
    let cluster_bits = u32_be(prefix, 20).ok_or_else(short)?;
    let size = u64_be(prefix, 24).ok_or_else(short)?;
    let encryption = u32_be(prefix, 32).ok_or_else(short)?;
    if backing != 0 {
        return Err(Danger::BackingFile);
    }
    if !(9..=21).contains(&cluster_bits) {
        return Err(damaged("clusters of a size that is not allowed"));
    }
    if encryption == 1 {
        return Err(Danger::Encrypted);
    }
    let header_length = match version {
        2 => 72,
        3 => {
            let features = u64_be(prefix, 72).ok_or_else(short)?;
            if features & 0b100 != 0 {
                return Err(Danger::DataFile);
            }
            if features & !0b1_1111 != 0 {
                return Err(Danger::UnknownFeatures(features));
            }
            u32_be(prefix, 100).ok_or_else(short)? as usize
        }
        _ => return Err(damaged("a version other than 2 and 3")),
    };
    if header_length < 72 || header_length > 1 << cluster_bits {
        return Err(damaged("a header of a length that is not allowed"));
    }
    extensions(prefix, header_length, 1 << cluster_bits)?;
    Ok(size)
}

/// Walks the header extensions: type, length, data padded to 8 bytes, until type 0 or the end of the
/// first cluster. What cannot be seen is refused: another extension could hide behind it.
fn extensions(prefix: &[u8], mut at: usize, cluster: usize) -> Result<(), Danger> {
    const BACKING_FORMAT: u32 = 0xe279_2aca;
    const DATA_FILE: u32 = 0x4441_5441;
    let unseen = || {
        Danger::Damaged(
            Format::Qcow2,
            "its header extensions leave the first 64 KiB, or the image",
        )
    };
    loop {
        if at + 8 > cluster {
            return Ok(());
        }
        let (Some(kind), Some(length)) = (u32_be(prefix, at), u32_be(prefix, at + 4)) else {
            return Err(unseen());
        };
        match kind {
            0 => return Ok(()),
            BACKING_FORMAT => return Err(Danger::BackingFile),
            DATA_FILE => return Err(Danger::DataFile),
            _ => {}
        }
        let padded = (length as usize).next_multiple_of(8);
        at = match at.checked_add(8).and_then(|next| next.checked_add(padded)) {
            Some(next) if next <= prefix.len() => next,
            _ => return Err(unseen()),
        };
    }
}

/// The capacity in a sparse VMDK's header, if its descriptor names no other file.
fn vmdk(prefix: &[u8]) -> Result<u64, Danger> {
    const SECTOR: u64 = 512;
    let damaged = |what| Danger::Damaged(Format::Vmdk, what);
    let short = || damaged("it ends within the header");
    let capacity = u64_le(prefix, 12).ok_or_else(short)?;
    let offset = u64_le(prefix, 28).ok_or_else(short)?;
    let length = u64_le(prefix, 36).ok_or_else(short)?;
    let begin = offset
        .checked_mul(SECTOR)
        .and_then(|at| usize::try_from(at).ok());
    let end = length
        .checked_mul(SECTOR)
        .and_then(|length| usize::try_from(length).ok())
        .and_then(|length| begin?.checked_add(length));
    let descriptor = begin
        .zip(end)
        .filter(|(begin, _)| *begin >= 512)
        .and_then(|(begin, end)| prefix.get(begin..end.min(prefix.len())))
        .ok_or_else(|| damaged("its descriptor is not within the first 64 KiB"))?;
    let text = String::from_utf8_lossy(descriptor);
    let kind = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("createType="))
        .map(|kind| kind.trim().trim_matches('"').to_owned())
        .ok_or_else(|| damaged("its descriptor names no type"))?;
    if !matches!(kind.as_str(), "monolithicSparse" | "streamOptimized") {
        return Err(Danger::VmdkType(kind.chars().take(64).collect()));
    }
    let mut extents = text.lines().filter_map(|line| {
        let mut words = line.split(is_space).filter(|word| !word.is_empty());
        matches!(words.next(), Some("RW" | "RDONLY" | "NOACCESS")).then(|| words.nth(1))
    });
    // The one extent is this file; a flat one would be another, whatever the type says.
    if extents.next().is_some_and(|kind| kind != Some("SPARSE")) || extents.next().is_some() {
        return Err(Danger::VmdkExtents);
    }
    capacity
        .checked_mul(SECTOR)
        .ok_or_else(|| damaged("a capacity beyond 64 bits"))
}

/// What C takes for a space, and so everyone who reads descriptors with scanf.
fn is_space(c: char) -> bool {
    c.is_ascii_whitespace() || c == '\x0b'
}

fn bytes<const N: usize>(prefix: &[u8], at: usize) -> Option<[u8; N]> {
    prefix.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u32_be(prefix: &[u8], at: usize) -> Option<u32> {
    bytes(prefix, at).map(u32::from_be_bytes)
}

fn u32_le(prefix: &[u8], at: usize) -> Option<u32> {
    bytes(prefix, at).map(u32::from_le_bytes)
}

fn u64_be(prefix: &[u8], at: usize) -> Option<u64> {
    bytes(prefix, at).map(u64::from_be_bytes)
}

fn u64_le(prefix: &[u8], at: usize) -> Option<u64> {
    bytes(prefix, at).map(u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A version 3 header with 64 KiB clusters and nothing after it.
    fn header(size: u64) -> Vec<u8> {
        let mut bytes = vec![0; 112];
        bytes[..4].copy_from_slice(b"QFI\xfb");
        bytes[4..8].copy_from_slice(&3_u32.to_be_bytes());
        bytes[20..24].copy_from_slice(&16_u32.to_be_bytes());
        bytes[24..32].copy_from_slice(&size.to_be_bytes());
        bytes[100..104].copy_from_slice(&104_u32.to_be_bytes());
        bytes
    }

    #[test]
    fn a_plain_qcow2_tells_its_virtual_size() {
        let expected = Inspected {
            format: Format::Qcow2,
            virtual_size: Some(1 << 30),
        };
        assert_eq!(inspect(&header(1 << 30)), Ok(expected));
    }

    #[test]
    fn a_qcow2_that_reaches_outside_of_itself_is_refused() {
        let mut backing = header(1 << 30);
        backing[15] = 112;
        assert_eq!(inspect(&backing), Err(Danger::BackingFile));

        let mut data_file = header(1 << 30);
        data_file[79] = 0b100;
        assert_eq!(inspect(&data_file), Err(Danger::DataFile));

        let mut extension = header(1 << 30);
        extension[104..108].copy_from_slice(&0x4441_5441_u32.to_be_bytes());
        assert_eq!(inspect(&extension), Err(Danger::DataFile));

        // Behind an extension that is skipped.
        let mut second = header(1 << 30);
        second[104..108].copy_from_slice(&7_u32.to_be_bytes());
        second[108..112].copy_from_slice(&3_u32.to_be_bytes());
        second.extend([0; 8]);
        second.extend(0xe279_2aca_u32.to_be_bytes());
        second.extend([0; 12]);
        assert_eq!(inspect(&second), Err(Danger::BackingFile));

        // Behind an extension that ends beyond what is looked at.
        let mut far = header(1 << 30);
        far[23] = 21;
        far[104..108].copy_from_slice(&7_u32.to_be_bytes());
        far[108..112].copy_from_slice(&(PREFIX as u32).to_be_bytes());
        far.resize(PREFIX, 0);
        assert!(matches!(
            inspect(&far),
            Err(Danger::Damaged(Format::Qcow2, _))
        ));

        let mut unknown = header(1 << 30);
        unknown[78] = 1;
        assert_eq!(inspect(&unknown), Err(Danger::UnknownFeatures(0x100)));
    }

    #[test]
    fn a_vmdk_is_taken_only_when_it_is_one_file() {
        let make = |kind: &str, extents: &str| {
            let mut bytes = vec![0; 2048];
            bytes[..4].copy_from_slice(b"KDMV");
            bytes[12..20].copy_from_slice(&2048_u64.to_le_bytes());
            bytes[28..36].copy_from_slice(&1_u64.to_le_bytes());
            bytes[36..44].copy_from_slice(&2_u64.to_le_bytes());
            let text = format!("# Disk DescriptorFile\ncreateType=\"{kind}\"\n{extents}");
            bytes[512..512 + text.len()].copy_from_slice(text.as_bytes());
            bytes
        };
        let one = "RW 2048 SPARSE \"a.vmdk\"\n";
        let sparse = inspect(&make("monolithicSparse", one)).unwrap();
        assert_eq!(
            (sparse.format, sparse.virtual_size),
            (Format::Vmdk, Some(1 << 20))
        );
        assert_eq!(
            inspect(&make("monolithicFlat", one)),
            Err(Danger::VmdkType("monolithicFlat".to_owned()))
        );
        let two = format!("{one}RW 1 FLAT \"/etc/shadow\" 0\n");
        assert_eq!(
            inspect(&make("monolithicSparse", &two)),
            Err(Danger::VmdkExtents)
        );
        let flat = "RW 2048 FLAT \"/etc/shadow\" 0\n";
        assert_eq!(
            inspect(&make("monolithicSparse", flat)),
            Err(Danger::VmdkExtents)
        );
        assert_eq!(
            inspect(b"# Disk DescriptorFile\nversion=1\n"),
            Err(Danger::VmdkExtents)
        );
    }

    #[test]
    fn content_must_be_what_is_claimed_where_it_is_recognised() {
        assert!(agrees("qcow2", Format::Qcow2));
        assert!(agrees("qcow2", Format::Raw));
        assert!(agrees("raw", Format::Iso));
        assert!(!agrees("raw", Format::Qcow2));
        assert!(!agrees("aki", Format::Vmdk));
        assert!(!agrees("vmdk", Format::Qcow2));
    }

    proptest! {
        #[test]
        fn any_bytes_get_an_answer(magic in 0_usize..6, mut bytes in prop::collection::vec(any::<u8>(), 0..700)) {
            let signatures: [&[u8]; 6] = [b"", b"QFI\xfb\0\0\0\x03", b"KDMV", b"vhdxfile", b"conectix", b"# Disk"];
            let signature = signatures[magic];
            if bytes.len() >= signature.len() {
                bytes[..signature.len()].copy_from_slice(signature);
            }
            let _ = inspect(&bytes);
        }
    }
}
