//! The two checksums that disks carry, bit-reflected: CRC-32 (GPT) and CRC-32C (ext4).

const fn table(polynomial: u32) -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut value = index as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 {
                value >> 1 ^ polynomial
            } else {
                value >> 1
            };
            bit += 1;
        }
        table[index] = value;
        index += 1;
    }
    table
}

const CRC32: [u32; 256] = table(0xedb8_8320);
const CRC32C: [u32; 256] = table(0x82f6_3b78);

fn update(table: &[u32; 256], seed: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(seed, |crc, byte| {
        let index = (crc as u8 ^ byte) as usize;
        crc >> 8 ^ table.get(index).copied().unwrap_or_default()
    })
}

/// As GPT has it: inverted at both ends.
pub fn crc32(bytes: &[u8]) -> u32 {
    !update(&CRC32, !0, bytes)
}

/// As ext4 has it: neither end inverted; the seed of a file system is `crc32c(!0, uuid)`.
pub fn crc32c(seed: u32, bytes: &[u8]) -> u32 {
    update(&CRC32C, seed, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_give_their_check_values() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
        assert_eq!(!crc32c(!0, b"123456789"), 0xe306_9283);
    }
}
