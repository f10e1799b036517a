//! The menu: entries, and which of them is the default.

use super::script::Block;
use crate::config::bls::Item;

#[derive(Clone)]
pub enum Action {
    /// Commands, with the words that became `$1` and so on.
    Script {
        body: Block,
        words: Vec<String>,
    },
    Submenu {
        body: Block,
    },
    Item(Box<Item>),
}

#[derive(Clone)]
pub struct MenuEntry {
    pub title: String,
    pub id: Option<String>,
    pub action: Action,
}

impl MenuEntry {
    fn is_called(&self, name: &str) -> bool {
        self.title == name || self.id.as_deref() == Some(name)
    }
}

/// The entry that a step of `default` names: by number, id or title; else the first.
pub fn select<'a>(menu: &'a [MenuEntry], step: Option<&str>) -> Option<&'a MenuEntry> {
    let step = step.unwrap_or_default();
    let named = match step.parse::<usize>() {
        Ok(number) => menu.get(number),
        Err(_) => menu.iter().find(|entry| entry.is_called(step)),
    };
    named.or(menu.first())
}

/// The steps of `default`, from menu to submenu; `>>` is a `>` of a title.
pub fn steps(default: &str) -> Vec<String> {
    let mut steps = vec![String::new()];
    let mut characters = default.chars().peekable();
    while let Some(c) = characters.next() {
        let doubled = c == '>' && characters.next_if_eq(&'>').is_some();
        match steps.last_mut() {
            Some(last) if c != '>' || doubled => last.push(c),
            _ => steps.push(String::new()),
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_is_a_path_through_menus() {
        assert_eq!(steps("1>2"), ["1", "2"]);
        assert_eq!(steps("a>>b>c"), ["a>b", "c"]);
        assert_eq!(steps(""), [""]);
    }

    #[test]
    fn entries_are_found_by_number_id_and_title() {
        let entry = |title: &str, id: &str| MenuEntry {
            title: title.to_owned(),
            id: Some(id.to_owned()),
            action: Action::Submenu { body: [].into() },
        };
        let menu = [entry("A", "a"), entry("B", "b")];
        let title = |step| select(&menu, Some(step)).unwrap().title.clone();
        assert_eq!(
            (title("1"), title("b"), title("B")),
            ("B".into(), "B".into(), "B".into())
        );
        assert_eq!(
            (title("7"), title("x"), title("")),
            ("A".into(), "A".into(), "A".into())
        );
    }
}
