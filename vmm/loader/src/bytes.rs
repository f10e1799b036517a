//! Fields of what was read: outside of the buffer everything is 0, so that no offset can panic.

fn at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let rest = bytes.get(offset..).and_then(|rest| rest.first_chunk::<N>());
    rest.copied().unwrap_or([0; N])
}

pub fn u8_at(bytes: &[u8], offset: usize) -> u8 {
    bytes.get(offset).copied().unwrap_or_default()
}

pub fn le16(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(at(bytes, offset))
}

pub fn le32(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(at(bytes, offset))
}

pub fn le64(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(at(bytes, offset))
}

pub fn be16(bytes: &[u8], offset: usize) -> u16 {
    u16::from_be_bytes(at(bytes, offset))
}

pub fn be32(bytes: &[u8], offset: usize) -> u32 {
    u32::from_be_bytes(at(bytes, offset))
}

pub fn be64(bytes: &[u8], offset: usize) -> u64 {
    u64::from_be_bytes(at(bytes, offset))
}

/// At most `length` bytes from `offset`; fewer where the buffer ends.
pub fn slice(bytes: &[u8], offset: usize, length: usize) -> &[u8] {
    let rest = bytes.get(offset..).unwrap_or_default();
    rest.get(..length).unwrap_or(rest)
}

/// Text up to the first NUL.
pub fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0);
    let bytes = end.and_then(|end| bytes.get(..end)).unwrap_or(bytes);
    String::from_utf8_lossy(bytes).into_owned()
}

/// Sixteen bytes as 8-4-4-4-12 hexadecimal digits, in the order in which they stand.
pub fn uuid(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(36);
    for (index, byte) in slice(bytes, 0, 16).iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// A GUID as it is written: its first three fields are little-endian.
pub fn guid(bytes: &[u8]) -> String {
    let mut turned = at::<16>(bytes, 0);
    for part in [0..4, 4..6, 6..8] {
        if let Some(part) = turned.get_mut(part) {
            part.reverse();
        }
    }
    uuid(&turned)
}
