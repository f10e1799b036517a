//! What an image file can make of [`inspect`], driven by bytes: the body of the fuzz target
//! `image_format` (`vmm/fuzz`, which takes this file and `format.rs` in) and of the tests here.

use super::format::{Danger, Format, PREFIX, agrees, inspect};

/// Takes `input` for an image.
///
/// # Panics
/// If what is let through could name a file of the host, or if a claim hides what was recognised: a bug.
pub fn image_format(input: &[u8]) {
    let prefix = &input[..input.len().min(PREFIX)];
    let found = inspect(prefix);
    match &found {
        Ok(found) => {
            let structured = !matches!(found.format, Format::Raw | Format::Iso);
            assert!(!structured || !agrees("raw", found.format), "taken for raw");
            for magic in [&b"QFI\xfb"[..], b"KDMV", b"# Disk DescriptorFile"] {
                let hidden = found.format == Format::Raw && prefix.starts_with(magic);
                assert!(!hidden, "a signature is overlooked");
            }
            match found.format {
                Format::Qcow2 => check_qcow2(prefix),
                Format::Vmdk => check_vmdk(prefix),
                _ => {}
            }
        }
        Err(Danger::BackingFile | Danger::DataFile) => {
            let longer = [prefix, &[0; 64]].concat();
            assert_eq!(inspect(&longer), found, "more bytes make it harmless");
        }
        Err(_) => {}
    }
}

/// Reads the header in another way: whatever names a file is a place in it, or a word anywhere in
/// the extensions.
fn check_qcow2(prefix: &[u8]) {
    assert_eq!(prefix[8..16], [0; 8], "a backing file");
    if prefix[7] == 3 {
        assert_eq!(prefix[79] & 0b100, 0, "a data file");
        assert_eq!(prefix[72..79], [0; 7], "unknown features");
    }
}

/// Reads the descriptor byte by byte: no line of it is an extent of another kind than SPARSE.
fn check_vmdk(prefix: &[u8]) {
    let field =
        |at: usize| (prefix[at..at + 8].iter().rev()).fold(0, |n, b| n << 8 | usize::from(*b));
    let begin = field(28).saturating_mul(512);
    let end = begin.saturating_add(field(36).saturating_mul(512));
    for line in prefix[begin..end.min(prefix.len())].split(|byte| *byte == b'\n') {
        let mut words = line
            .split(|byte| byte.is_ascii_whitespace() || *byte == 0x0b)
            .filter(|word| !word.is_empty());
        let extent = matches!(words.next(), Some(b"RW" | b"RDONLY" | b"NOACCESS"));
        let kind = words.nth(1).unwrap_or_default();
        assert!(!extent || kind == b"SPARSE", "an extent in another file");
    }
}

#[cfg(test)]
#[path = "../../../vmm/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn whatever_an_image_holds_is_an_answer() {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../vmm/fuzz/seeds/image_format");
        super::replay::replay(&seeds, 20_000, super::image_format);
    }
}
