//! The memory map that a kernel is given.

use crate::layout::{FIRMWARE, HIGH_MEMORY, LOW_MEMORY_END, Layout, PCI_ECAM, Window};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapKind {
    Ram,
    Reserved,
}

impl MapKind {
    /// The same numbers in E820 and in PVH's table.
    pub const fn code(self) -> u32 {
        match self {
            MapKind::Ram => 1,
            MapKind::Reserved => 2,
        }
    }
}

/// Ranges in ascending order. What firmware leaves is reserved rather than reclaimable: it stays.
pub fn memory_map(layout: &Layout) -> Vec<(Window, MapKind)> {
    let conventional = Window {
        base: 0,
        size: LOW_MEMORY_END,
    };
    let extended = Window {
        base: HIGH_MEMORY,
        size: layout.low.end() - HIGH_MEMORY,
    };
    let mut map = vec![
        (conventional, MapKind::Ram),
        (FIRMWARE, MapKind::Reserved),
        (extended, MapKind::Ram),
        (PCI_ECAM, MapKind::Reserved),
    ];
    map.extend(layout.high.map(|high| (high, MapKind::Ram)));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_ascend_and_do_not_overlap() {
        for bytes in [2 << 20, 3 << 30, 8 << 30] {
            let map = memory_map(&Layout::new(bytes));
            assert!(map.windows(2).all(|pair| pair[0].0.end() <= pair[1].0.base));
        }
    }
}
