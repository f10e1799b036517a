//! What lies compressed in a Linux bzImage: QEMU boots the ELF file in it by PVH.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// How the payload is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    Xz,
    Gzip,
    Lz4,
    Zstandard,
}

/// The packed payload of a bzImage (Documentation/arch/x86/boot.rst, `payload_offset`), without the
/// size that Linux's build appends.
pub fn payload(image: &[u8]) -> Result<(Compression, &[u8])> {
    let word = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("a bzImage's header")?;
        Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
    };
    if image.get(0x202..0x206) != Some(b"HdrS".as_slice()) {
        bail!("not a bzImage");
    }
    let sectors = match image[0x1f1] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let start = (sectors + 1) * 512 + word(0x248)?;
    let packed = image
        .get(start..start + word(0x24c)?)
        .context("a bzImage's payload")?;
    let compression = match packed {
        [0xfd, b'7', b'z', b'X', b'Z', ..] => Compression::Xz,
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x02, 0x21, 0x4c, 0x18, ..] => Compression::Lz4,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstandard,
        _ => bail!("a payload of unknown compression"),
    };
    Ok((compression, &packed[..packed.len().saturating_sub(4)]))
}

/// The ELF file in a bzImage.
pub fn vmlinux(image: &Path) -> Result<Vec<u8>> {
    let bytes = std::fs::read(image).with_context(|| format!("reading {}", image.display()))?;
    let (compression, packed) =
        payload(&bytes).with_context(|| format!("in {}", image.display()))?;
    let program = match compression {
        Compression::Xz => "xz",
        Compression::Gzip => "gzip",
        Compression::Lz4 => "lz4",
        Compression::Zstandard => "zstd",
    };
    let mut child = Command::new(program)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("running {program}: scripts/setup --lab installs it"))?;
    let mut input = child.stdin.take().context("its input")?;
    let output = std::thread::scope(|scope| {
        scope.spawn(move || input.write_all(packed));
        child.wait_with_output()
    })?;
    if !output.stdout.starts_with(b"\x7fELF") {
        bail!("{}: its payload is not an ELF file", image.display());
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_kernel_is_an_error() {
        assert!(payload(b"").is_err());
        let mut image = vec![0; 4096];
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(payload(&image).is_err());
    }
}
