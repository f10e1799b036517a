//! The search among file systems that somebody else reads: in the fallback, where Linux has mounted them.

use super::{FindError, Search};
use crate::config::Entry;
use crate::disk::{Disk, Fault};
use crate::fs::{self, Tree};

/// Looks among `trees`; `remarks` are on what is not among them, for people. `budget` is what all of it
/// may cost; trees may have budgets of their own. The files of the entry are there.
pub fn find_among<'a>(
    budget: &'a Disk<'a>,
    trees: Vec<Tree<'a>>,
    remarks: Vec<String>,
) -> Result<Chosen<'a>, FindError> {
    let mut search = Search {
        trees,
        remarks,
        ..Search::new(budget)
    };
    let outcome = search.look(&|search, entry, origin| search.look_at(entry, origin));
    let chosen = outcome.map(|chosen| {
        chosen.map(|(entry, how)| Chosen {
            entry,
            how,
            trees: std::mem::take(&mut search.trees),
        })
    });
    search.answer(chosen)
}

/// What [`find_among`] has found.
pub struct Chosen<'a> {
    pub entry: Entry,
    /// For people: which entry of which file.
    pub how: String,
    pub trees: Vec<Tree<'a>>,
}

impl Search<'_> {
    /// The entry itself, if what it names is there.
    fn look_at(
        &self,
        entry: &Entry,
        origin: &str,
    ) -> Result<Result<(Entry, String), String>, Fault> {
        let files = std::iter::once(&entry.kernel).chain(&entry.initrds);
        for place in files {
            let problem = match self.trees.get(place.tree) {
                None => "on no partition".to_owned(),
                Some(tree) => match tree.node(&place.path) {
                    Ok(node) if node.kind != fs::Kind::File => Fault::NotAFile.to_string(),
                    Ok(node) if node.size == 0 => "empty".to_owned(),
                    Ok(_) => continue,
                    Err(fault) if fault.ends_the_search() => return Err(fault),
                    Err(fault) => fault.to_string(),
                },
            };
            let (title, path) = (&entry.title, &place.path);
            let name = self.trees.get(place.tree).map_or("", |tree| &tree.name);
            return Ok(Err(format!("entry '{title}': {name} {path}: {problem}")));
        }
        let how = format!("entry '{}' of {origin}", entry.title);
        Ok(Ok((entry.clone(), how)))
    }
}
