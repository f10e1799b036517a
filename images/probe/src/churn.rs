//! Memory written as fast as it can be, with a look at the clock after every page: what a guest loses while it is
//! copied, and while it stands still.

use core::fmt::Write as _;

use crate::serial::{self, Line};
use crate::{clock, cpu, memory};

const PAGE: u64 = 4096;
/// So many seconds a line tells of, the last of them first: one that a line was lost of is in the next.
const TOLD: usize = 24;

#[derive(Clone, Copy)]
struct Second {
    /// Pages written, or looks at the clock where none are.
    turns: u64,
    /// Between two looks, at most.
    gap: u64,
}

/// Writes to `pages` pages from `start` on, one after the other and over again, until something is typed. A line a
/// second; what it takes to say it counts for none, nor does what befalls the guest just then.
pub fn run(start: u64, pages: u64) {
    let mut told = [Second { turns: 0, gap: 0 }; TOLD];
    let (mut number, mut place) = (0u64, 0);
    while !serial::has_input() {
        let mut last = cpu::tsc();
        let end = last + clock::tsc_of_us(1_000_000);
        let mut this = Second { turns: 0, gap: 0 };
        while last < end {
            if place < pages {
                memory::write_u64(start + place * PAGE, last);
            }
            place = if place + 1 < pages { place + 1 } else { 0 };
            let now = cpu::tsc();
            this.gap = this.gap.max(now - last);
            this.turns += 1;
            last = now;
        }
        told.rotate_right(1);
        told[0] = this;
        number += 1;
        say(number, &told);
    }
}

fn say(number: u64, told: &[Second]) {
    let mut line = Line::new();
    let _ = write!(line, "churn second={number} turns");
    for (index, second) in told.iter().enumerate() {
        let _ = write!(
            line,
            "{}{}",
            if index == 0 { '=' } else { ',' },
            second.turns
        );
    }
    let _ = line.write_str(" gaps_us");
    for (index, second) in told.iter().enumerate() {
        let gap = clock::us(second.gap);
        let _ = write!(line, "{}{gap}", if index == 0 { '=' } else { ',' });
    }
    line.push(b'\n');
    serial::write(line.as_bytes());
}
