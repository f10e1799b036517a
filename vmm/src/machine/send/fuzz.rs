//! What the other side of a machine whose memory follows may say, driven by bytes.

use std::error::Error;

use super::debt::{Answers, Debt, Paying};
use crate::config::{MemoryConfig, PageSize};
use crate::memory::{GuestMemory, PageSet};
use crate::stream::BLOCK;
use crate::stream::frame::FrameWriter;

const MEMORY: u64 = 64 * BLOCK as u64;

/// Hears `says`, and pays after each word; `anew`: by another connection, which begins with what is lacking.
///
/// # Errors
/// It says what is none, or not that it has everything.
///
/// # Panics
/// If what is owed cannot be sent, or goes twice: a bug.
pub fn answers(says: &[u8], anew: bool) -> Result<(), Box<dyn Error>> {
    let config = MemoryConfig {
        bytes: MEMORY,
        pages: PageSize::default(),
        host_nodes: Vec::new(),
    };
    let memory = GuestMemory::create_with(&config, None)?;
    let (mut owed, mut recent) = (PageSet::new(MEMORY), PageSet::new(MEMORY));
    owed.add_range(0, MEMORY);
    recent.add_range(7 * BLOCK as u64, 9 * BLOCK as u64);
    let mut debt = Debt::new(owed, recent);
    let mut answers = Answers::behind(says, 0);
    if anew {
        debt.begin_anew(&mut answers)?;
    }
    let mut left = debt.left();
    let mut out = FrameWriter::new(Vec::new());
    while !debt.is_over() {
        let (kind, payload) = answers.next()?;
        debt.hear(kind, payload)?;
        let paying = debt.pay(&memory, &mut out);
        assert!(paying.is_ok(), "{paying:?}");
        out.get_mut().clear();
        let now = debt.left();
        assert!(now <= left, "what has gone is owed again");
        assert!(debt.is_over() || paying.ok() != Some(Paying::Paid));
        left = now;
    }
    Ok(())
}
