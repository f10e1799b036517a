//! What a guest says of its own memory, through the statistics queue (virtio 1.2 §5.5.6.3).

/// Each field is `None` where the guest's driver does not know it. Bytes, unless it is a count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BalloonStatistics {
    pub swapped_in: Option<u64>,
    pub swapped_out: Option<u64>,
    /// Count of page faults that had to read.
    pub major_faults: Option<u64>,
    pub minor_faults: Option<u64>,
    /// Not used for anything.
    pub free: Option<u64>,
    pub total: Option<u64>,
    /// What the guest guesses could be had without swapping.
    pub available: Option<u64>,
    /// Caches that could be dropped.
    pub caches: Option<u64>,
    pub huge_page_allocations: Option<u64>,
    pub huge_page_failures: Option<u64>,
}

/// struct virtio_balloon_stat: a tag of 16 bits, a value of 64.
const ENTRY: usize = 10;
/// Bytes of the longest list that is looked at: more than all tags that there are.
pub const LIST_MAX: usize = 64 * ENTRY;

impl BalloonStatistics {
    /// Tags that are not known, and half an entry at the end, are passed over.
    pub fn parse(list: &[u8]) -> Self {
        let mut found = Self::default();
        for entry in list.chunks_exact(ENTRY) {
            let (tag, value) = entry.split_at(2);
            let (Ok(tag), Ok(value)) = (tag.try_into(), value.try_into()) else {
                continue;
            };
            if let Some(place) = found.place(u16::from_le_bytes(tag)) {
                *place = Some(u64::from_le_bytes(value));
            }
        }
        found
    }

    fn place(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swapped_in,
            1 => &mut self.swapped_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free,
            5 => &mut self.total,
            6 => &mut self.available,
            7 => &mut self.caches,
            8 => &mut self.huge_page_allocations,
            9 => &mut self.huge_page_failures,
            _ => return None,
        })
    }
}
