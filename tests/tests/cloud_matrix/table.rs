//! What came out, for people: a row for each message, a column for each fault.

use std::fmt::Write as _;

use super::spot::{End, Fault, How, Spot};

/// Where a server was in the end, and what was said; or what was wrong.
type Tried = Result<(End, String), String>;

/// Of each cell that was tried.
pub struct Table {
    how: How,
    cells: Vec<(Spot, Fault, Tried)>,
}

/// Characters of a column.
const WIDTH: usize = 11;
const TITLE: usize = 27;

impl Table {
    pub fn of(how: How) -> Self {
        let cells = Vec::new();
        Self { how, cells }
    }

    pub fn add(&mut self, spot: Spot, fault: Fault, tried: Tried) {
        self.cells.push((spot, fault, tried));
    }

    /// What was not as it is to be.
    pub fn wrong(&self) -> Vec<String> {
        let wrong = self.cells.iter().filter_map(|(spot, fault, tried)| {
            let (spot_title, title) = (spot.title(), fault.title());
            let why = match tried {
                Err(why) => why.clone(),
                Ok((end, _)) if fault.ends(self.how, *spot).contains(end) => return None,
                Ok((end, said)) => format!(
                    "{end:?}, where only {:?} is right: {said}",
                    fault.ends(self.how, *spot)
                ),
            };
            Some(format!("{spot_title} x {title}: {why}"))
        });
        wrong.collect()
    }

    /// The table, and under it what its words stand for.
    pub fn text(&self) -> String {
        let mut notes: Vec<String> = Vec::new();
        let mut note = |text: &str| -> usize {
            let known = notes.iter().position(|known| known == text);
            known.unwrap_or_else(|| {
                notes.push(text.to_owned());
                notes.len() - 1
            }) + 1
        };
        let mut text = format!("{:TITLE$}", "on its way");
        for fault in Fault::ALL {
            let _ = write!(text, "{:>WIDTH$}", fault.title());
        }
        text.push('\n');
        for &spot in Spot::of(self.how) {
            let _ = write!(text, "{:TITLE$}", spot.title());
            for fault in Fault::ALL {
                let tried = self
                    .cells
                    .iter()
                    .find(|(s, f, _)| (*s, *f) == (spot, fault));
                let cell = match (fault.cannot(spot), tried) {
                    (Some(why), _) => format!("n/a {}", note(why)),
                    (None, None) => "-".to_owned(),
                    (None, Some((_, _, Err(_)))) => "WRONG".to_owned(),
                    (None, Some((_, _, Ok((end, said))))) => {
                        let right = fault.ends(self.how, spot).contains(end);
                        match end {
                            End::Here => if right { "here" } else { "HERE!" }.to_owned(),
                            End::There => if right { "there" } else { "THERE!" }.to_owned(),
                            End::Error => {
                                let mark = if right { "" } else { "!" };
                                format!("ERROR{mark} {}", note(said))
                            }
                        }
                    }
                };
                let _ = write!(text, "{cell:>WIDTH$}");
            }
            text.push('\n');
        }
        text.push_str("here: the same guest runs where it was; there: on the other host; -: tried by scripts/test --full\n");
        for (number, note) in notes.iter().enumerate() {
            let _ = writeln!(text, "{:>3}: {note}", number + 1);
        }
        text
    }
}
