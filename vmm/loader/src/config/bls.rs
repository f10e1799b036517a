//! Entries of the Boot Loader Specification (UAPI.1), of both types, and systemd-boot's loader.conf.

use std::cmp::Ordering;

use super::{Entry, MAX_ENTRIES, MAX_ITEM, MAX_PATTERN, Place, glob, version};
use crate::disk::{Disk, Fault};
use crate::fs::Tree;

/// One `*.conf`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Item {
    /// The file's name without `.conf` and without the count of tries.
    pub id: String,
    /// No tries are left (`+0` or `+0-N` in the file's name).
    pub exhausted: bool,
    pub tree: usize,
    pub title: Option<String>,
    pub version: String,
    pub sort_key: Option<String>,
    pub machine_id: String,
    pub linux: Option<String>,
    pub initrds: Vec<String>,
    /// None: no such line.
    pub options: Option<String>,
    /// Not for this processor.
    pub foreign: bool,
    /// What it loads is in one file (type #2).
    pub unified: Option<Entry>,
}

impl Item {
    /// From a file's name without its ending.
    pub fn named(name: &str) -> Item {
        let (id, exhausted) = match name.rsplit_once('+') {
            Some((id, tries)) if is_count(tries) => (id, tries.split('-').next() == Some("0")),
            _ => (name, false),
        };
        Item {
            id: key_of(id),
            exhausted,
            ..Item::default()
        }
    }

    pub fn parse(file: &str, text: &str) -> Item {
        let mut item = Item::named(file.strip_suffix(".conf").unwrap_or(file));
        for line in text.lines() {
            let line = line.trim();
            let (key, value) = line.split_once([' ', '\t']).unwrap_or((line, ""));
            let value = value.trim();
            match key {
                "title" => item.title = Some(value.to_owned()),
                "version" => item.version = key_of(value),
                "sort-key" => item.sort_key = Some(key_of(value)),
                "machine-id" => item.machine_id = key_of(&value.to_lowercase()),
                "linux" => item.linux = Some(value.to_owned()),
                "initrd" => item.initrds.push(value.to_owned()),
                "options" => {
                    let options = item.options.get_or_insert_default();
                    if !options.is_empty() && !value.is_empty() {
                        options.push(' ');
                    }
                    options.push_str(value);
                }
                "architecture" => item.foreign = !value.eq_ignore_ascii_case("x64"),
                _ => {}
            }
        }
        item
    }

    pub fn title(&self) -> String {
        self.title.clone().unwrap_or_else(|| self.id.clone())
    }

    /// Bytes that a comparison may look at.
    fn weight(&self) -> usize {
        let key = self.sort_key.as_ref().map_or(0, String::len);
        self.id.len() + self.version.len() + self.machine_id.len() + key
    }
}

/// The items in `order`; each comparison is paid for, and so the order need not even be one.
pub fn sorted(
    disk: &Disk<'_>,
    items: Vec<Item>,
    order: impl Fn(&Item, &Item) -> Ordering,
) -> Result<Vec<Item>, Fault> {
    let mut sorted: Vec<Item> = Vec::with_capacity(items.len());
    for item in items {
        let (mut low, mut high) = (0, sorted.len());
        while low < high {
            let middle = low.midpoint(high);
            let Some(other) = sorted.get(middle) else {
                break;
            };
            disk.step_over(4 * (item.weight() + other.weight()))?;
            match order(&item, other) {
                Ordering::Less => high = middle,
                Ordering::Equal | Ordering::Greater => low = middle + 1,
            }
        }
        sorted.insert(low, item);
    }
    Ok(sorted)
}

/// What entries are sorted by: no longer than it is worth comparing.
pub(super) fn key_of(value: &str) -> String {
    value.chars().take(MAX_PATTERN).collect()
}

fn is_count(tries: &str) -> bool {
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let (left, done) = tries.split_once('-').unwrap_or((tries, "0"));
    digits(left) && digits(done)
}

/// The specification's order: the first is the one to boot.
pub fn order(a: &Item, b: &Item) -> Ordering {
    let keys = match (&a.sort_key, &b.sort_key) {
        (Some(x), Some(y)) => x
            .cmp(y)
            .then_with(|| a.machine_id.cmp(&b.machine_id))
            .then_with(|| version::uapi(&b.version, &a.version)),
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (None, None) => Ordering::Equal,
    };
    let exhausted = a.exhausted.cmp(&b.exhausted);
    exhausted
        .then(keys)
        .then_with(|| version::uapi(&b.id, &a.id))
}

/// All entries of a folder, unsorted. A file that cannot be read is passed over with a remark.
pub fn read(
    trees: &[Tree<'_>],
    tree: usize,
    folder: &str,
    remarks: &mut Vec<String>,
) -> Result<Vec<Item>, Fault> {
    let Some(place) = trees.get(tree) else {
        return Err(Fault::NotFound);
    };
    let mut names = place.names(folder)?;
    names.retain(|name| name.ends_with(".conf"));
    names.sort();
    if names.len() > MAX_ENTRIES {
        remarks.push(format!(
            "{}: {folder} has more than {MAX_ENTRIES} entries",
            place.name
        ));
        names.truncate(MAX_ENTRIES);
    }
    let mut items = Vec::new();
    for name in names {
        let path = format!("{folder}/{name}");
        match place.text(&path, MAX_ITEM) {
            Ok(text) => {
                place.disk.step_over(text.len())?;
                let mut item = Item::parse(&name, &text);
                item.tree = tree;
                items.push(item);
            }
            Err(fault) if fault.ends_the_search() => return Err(fault),
            Err(fault) => remarks.push(format!("{}: {path}: {fault}", place.name)),
        }
    }
    Ok(items)
}

/// `default` of a loader.conf, if it names an entry by a pattern.
pub fn default_pattern(text: &str) -> Option<&str> {
    let mut lines = text.lines().rev();
    let pattern = lines.find_map(|line| {
        let line = line.trim_start();
        let value = line.strip_prefix("default")?;
        value.starts_with([' ', '\t']).then(|| value.trim())
    })?;
    // @saved and the like are in variables of the firmware.
    let usable = !pattern.is_empty() && pattern.len() <= MAX_PATTERN && !pattern.starts_with('@');
    usable.then_some(pattern)
}

/// The entry to boot: the first of the pattern, else the first that can be booted at all.
pub fn choose(
    disk: &Disk<'_>,
    mut items: Vec<Item>,
    pattern: Option<&str>,
) -> Result<Option<Item>, Fault> {
    items.retain(|item| (item.linux.is_some() || item.unified.is_some()) && !item.foreign);
    let mut items = sorted(disk, items, order)?;
    let mut place = 0;
    if let Some(pattern) = pattern {
        for (index, item) in items.iter().enumerate() {
            let name = format!("{}.conf", item.id);
            // A `*` may grow by a character of the name as often as there are some.
            disk.step_over(2 * pattern.len() * name.len())?;
            if glob::matches(pattern, &item.id) || glob::matches(pattern, &name) {
                place = index;
                break;
            }
        }
    }
    Ok((place < items.len()).then(|| items.swap_remove(place)))
}

impl Item {
    /// As systemd-boot loads it; GRUB expands variables first.
    pub fn entry(&self) -> Option<Entry> {
        if let Some(entry) = &self.unified {
            return Some(entry.clone());
        }
        let at = |path: &str| Place::new(self.tree, path);
        Some(Entry {
            title: self.title(),
            kernel: at(self.linux.as_deref()?),
            initrds: self.initrds.iter().map(|path| at(path)).collect(),
            command_line: self.options.clone().unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::Limits;

    fn item(file: &str, text: &str) -> Item {
        Item::parse(file, text)
    }

    #[test]
    fn entries_are_in_the_specifications_order() {
        let linux = "linux /vmlinuz\n";
        let keyed = |version: &str| format!("sort-key debian\nversion {version}\n{linux}");
        let items = vec![
            item("z-9.conf", linux),
            item("b.conf", &keyed("6.1.0-9")),
            item("c.conf", &keyed("6.1.0-13")),
            item("d+0-3.conf", &keyed("6.2.0")),
            item(
                "e.conf",
                "sort-key debian\nversion 7\narchitecture aa64\nlinux /v\n",
            ),
            item("f.conf", "sort-key a\nefi /x.efi\n"),
        ];
        let mut nothing: &[u8] = &[];
        let disk = Disk::new(&mut nothing, Limits::for_memory(0));
        let chosen = |pattern| choose(&disk, items.clone(), pattern).unwrap().unwrap().id;
        assert_eq!(chosen(None), "c");
        assert_eq!(chosen(Some("z-*")), "z-9");
        assert_eq!(chosen(Some("none")), "c");
    }

    #[test]
    fn lines_that_repeat_add_up() {
        let item = item(
            "debian-6.1+3-1.conf",
            "# x\ntitle\tDebian\nlinux /l\ninitrd /a\ninitrd /b\noptions root=x\noptions quiet\n",
        );
        assert_eq!((item.id.as_str(), item.exhausted), ("debian-6.1", false));
        assert_eq!(item.initrds, ["/a", "/b"]);
        assert_eq!(item.options.as_deref(), Some("root=x quiet"));
        assert_eq!(item.title.as_deref(), Some("Debian"));
    }

    #[test]
    fn the_default_of_a_loader_conf_is_the_last_one_that_is_a_pattern() {
        assert_eq!(
            default_pattern("timeout 3\ndefault debian-*\n"),
            Some("debian-*")
        );
        assert_eq!(default_pattern("default @saved\n"), None);
        assert_eq!(default_pattern("#default x\n"), None);
    }
}
