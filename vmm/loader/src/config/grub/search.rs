//! GRUB's devices, and `search`, which finds one by what is on it.

use crate::fs::Tree;

/// What `search` was asked for.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Search {
    pub by: By,
    /// The variable that is set; `None`: it only says yes or no.
    pub variable: Option<String>,
    pub name: String,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum By {
    #[default]
    File,
    Label,
    Uuid,
}

impl Search {
    /// From the words behind `search`.
    pub fn parse(words: &[String]) -> Search {
        let mut search = Search::default();
        let mut names = Vec::new();
        let mut bare_set = false;
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "-u" | "--fs-uuid" => search.by = By::Uuid,
                "-l" | "--label" => search.by = By::Label,
                "-f" | "--file" => search.by = By::File,
                "-s" | "--set" => bare_set = true,
                "--hint" | "-h" | "--cryptodisk-only" => drop(words.next()),
                word => match word.strip_prefix("--set=").or(word.strip_prefix("-s=")) {
                    Some(variable) => search.variable = Some(variable.to_owned()),
                    None if word.starts_with('-') => {}
                    None => names.push(word.to_owned()),
                },
            }
        }
        if bare_set && search.variable.is_none() {
            let given = (names.len() > 1).then(|| names.remove(0));
            search.variable = Some(given.unwrap_or_else(|| "root".to_owned()));
        }
        search.name = names.pop().unwrap_or_default();
        search
    }

    /// The first tree that is it.
    pub fn find(&self, trees: &[Tree<'_>]) -> Option<usize> {
        trees.iter().position(|tree| match self.by {
            By::File => tree.node(&self.name).is_ok(),
            By::Label => tree.system.label() == self.name,
            By::Uuid => tree.system.uuid().eq_ignore_ascii_case(&self.name),
        })
    }
}

/// The tree of a device's name: `hd0,gpt2`, `hd0,msdos1`, `hd0,3`, `lvm/vg-lv`; `hd0` is all of the disk.
pub fn device(trees: &[Tree<'_>], name: &str) -> Option<usize> {
    if let Some(found) = trees.iter().position(|tree| tree.device == name) {
        return Some(found);
    }
    let number = match name.split_once(',') {
        None => None,
        Some((_, partition)) => {
            let digits = partition.trim_start_matches(|c: char| !c.is_ascii_digit());
            let digits = digits.split(',').next().unwrap_or_default();
            Some(digits.parse().ok()?)
        }
    };
    let of_disk = |tree: &Tree<'_>| tree.device.starts_with("hd") && tree.number == number;
    trees.iter().position(of_disk)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Search {
        let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        Search::parse(&words)
    }

    #[test]
    fn all_ways_to_write_it_are_the_same() {
        let wanted = Search {
            by: By::Uuid,
            variable: Some("root".to_owned()),
            name: "ab-1".to_owned(),
        };
        for text in [
            "--no-floppy --fs-uuid --set=root ab-1",
            "--no-floppy --fs-uuid --set ab-1",
            "-u -s root ab-1",
            "--no-floppy --fs-uuid --set=root --hint-bios=hd0,gpt1 --hint hd0,gpt1 ab-1",
        ] {
            assert_eq!(parse(text), wanted, "{text}");
        }
        assert_eq!(parse("--label x").variable, None);
    }
}
