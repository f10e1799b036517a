//! extlinux.conf and syslinux.cfg (syslinux 6, doc/syslinux.txt).

use super::{Entry, MAX_CONFIG, MAX_ENTRIES, Place, join};
use crate::disk::Fault;
use crate::fs::{Tree, normal, parent};

#[derive(Debug, Clone, Default)]
struct Label {
    name: String,
    kernel: Option<String>,
    initrds: Vec<String>,
    /// None: the global one holds.
    append: Option<String>,
}

#[derive(Default)]
struct Config {
    default: Option<String>,
    /// ONTIMEOUT, which is what boots where nobody types.
    on_timeout: Option<String>,
    menu_default: Option<usize>,
    append: String,
    labels: Vec<Label>,
}

const MAX_INCLUDES: u32 = 16;
const MAX_LABELS: usize = 512;

/// The default entry of a configuration at `path`; or what speaks against it.
pub fn read(trees: &[Tree<'_>], tree: usize, path: &str) -> Result<Result<Entry, String>, Fault> {
    let Some(place) = trees.get(tree) else {
        return Err(Fault::NotFound);
    };
    let mut config = Config::default();
    let mut includes = 0;
    config.parse(place, path, &mut includes)?;
    let Some(label) = config.chosen() else {
        return Ok(Err("it has no label that loads Linux".to_owned()));
    };
    let folder = parent(path);
    let at = |file: &str| match file.starts_with('/') {
        true => Place::new(tree, normal(file)),
        false => Place::new(tree, normal(&format!("{folder}/{file}"))),
    };
    let append = label
        .append
        .clone()
        .unwrap_or_else(|| config.append.clone());
    let mut initrds = label.initrds.clone();
    let mut words = Vec::new();
    for word in append.split_ascii_whitespace() {
        match word.strip_prefix("initrd=") {
            Some(files) if initrds.is_empty() => {
                initrds.extend(files.split(',').take(MAX_ENTRIES).map(str::to_owned));
            }
            Some(_) => {}
            None => words.push(word),
        }
    }
    let kernel = label.kernel.clone().unwrap_or_else(|| label.name.clone());
    let image = format!("BOOT_IMAGE={kernel}");
    Ok(Ok(Entry {
        title: label.name.clone(),
        kernel: at(&kernel),
        initrds: initrds
            .iter()
            .filter(|file| !file.is_empty())
            .map(|file| at(file))
            .collect(),
        command_line: join([image.as_str()].into_iter().chain(words)),
    }))
}

impl Config {
    fn parse(&mut self, tree: &Tree<'_>, path: &str, includes: &mut u32) -> Result<(), Fault> {
        *includes += 1;
        if *includes > MAX_INCLUDES {
            return Ok(());
        }
        let text = tree.text(path, MAX_CONFIG)?;
        tree.disk.step_over(text.len())?;
        for line in text.lines() {
            tree.disk.step()?;
            let line = line.trim();
            let (key, value) = line.split_once([' ', '\t']).unwrap_or((line, ""));
            let value = value.trim();
            match key.to_ascii_uppercase().as_str() {
                "INCLUDE" => self.include(tree, path, value, includes)?,
                "MENU" => self.menu(tree, path, value, includes)?,
                key => self.line(key, value),
            }
        }
        Ok(())
    }

    fn line(&mut self, key: &str, value: &str) {
        if key == "LABEL" && self.labels.len() < MAX_LABELS {
            self.labels.push(Label {
                name: value.to_owned(),
                ..Label::default()
            });
            return;
        }
        match (key, self.labels.last_mut()) {
            ("DEFAULT", _) => self.default = Some(value.to_owned()),
            ("ONTIMEOUT", _) => self.on_timeout = Some(value.to_owned()),
            ("APPEND", None) => self.append = value.to_owned(),
            ("LINUX" | "KERNEL", Some(label)) => label.kernel = Some(value.to_owned()),
            ("INITRD", Some(label)) => {
                label.initrds = value
                    .split(',')
                    .take(MAX_ENTRIES)
                    .map(|file| file.trim().to_owned())
                    .collect();
            }
            // A dash: nothing, not even the global one.
            ("APPEND", Some(label)) => {
                label.append = Some(if value == "-" { "" } else { value }.to_owned());
            }
            _ => {}
        }
    }

    fn menu(
        &mut self,
        tree: &Tree<'_>,
        path: &str,
        value: &str,
        includes: &mut u32,
    ) -> Result<(), Fault> {
        let (key, rest) = value.split_once([' ', '\t']).unwrap_or((value, ""));
        match key.to_ascii_uppercase().as_str() {
            "DEFAULT" => self.menu_default = self.labels.len().checked_sub(1),
            "INCLUDE" => self.include(tree, path, rest.trim(), includes)?,
            _ => {}
        }
        Ok(())
    }

    /// A file that is not there is passed over, as syslinux does.
    fn include(
        &mut self,
        tree: &Tree<'_>,
        from: &str,
        value: &str,
        includes: &mut u32,
    ) -> Result<(), Fault> {
        let file = value.split_ascii_whitespace().next().unwrap_or_default();
        let path = match file.starts_with('/') {
            true => file.to_owned(),
            false => format!("{}/{file}", parent(from)),
        };
        match self.parse(tree, &path, includes) {
            Err(fault) if fault.ends_the_search() => Err(fault),
            _ => Ok(()),
        }
    }

    /// MENU DEFAULT, ONTIMEOUT, DEFAULT (which often names the menu instead), else the first label.
    fn chosen(&self) -> Option<&Label> {
        let by_name = |name: &Option<String>| {
            let name = name.as_ref()?.split_ascii_whitespace().next()?;
            self.labels
                .iter()
                .find(|label| label.name.eq_ignore_ascii_case(name))
        };
        let marked = self.menu_default.and_then(|index| self.labels.get(index));
        let named = marked
            .or_else(|| by_name(&self.on_timeout))
            .or_else(|| by_name(&self.default));
        let named = named.filter(|label| loads_linux(label));
        named.or_else(|| self.labels.iter().find(|label| loads_linux(label)))
    }
}

/// And no module of syslinux, boot sector or disk.
fn loads_linux(label: &Label) -> bool {
    let Some(kernel) = &label.kernel else {
        return false;
    };
    let ending = kernel.rsplit_once('.').map_or("", |(_, ending)| ending);
    let other = ["c32", "com", "cbt", "bin", "bs", "bss", "0", "img"];
    !kernel.is_empty() && !other.iter().any(|other| ending.eq_ignore_ascii_case(other))
}
