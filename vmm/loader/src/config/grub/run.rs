//! Runs a script: variables, files, and the commands that matter for what is loaded.

use std::collections::HashMap;

use super::condition::{self, Files, Look};
use super::menu::{Action, MenuEntry, select, steps};
use super::script::{Block, Command, Part, SyntaxError, Word, parse};
use super::search::{Search, device};
use super::{block, search};
use crate::config::{Entry, MAX_CONFIG, MAX_ENTRIES, Place, bls, join, version};
use crate::disk::{Disk, Fault};
use crate::fs::{Kind, Tree, normal};

/// Calls of functions and files within each other.
const MAX_DEPTH: u32 = 24;
/// Bytes of a word or value, and of all words of a command.
const MAX_WORD: usize = 16 << 10;
const MAX_WORDS: usize = 256 << 10;
/// Bytes that are kept over a run, as values and menu entries.
const MAX_KEPT: usize = 16 << 20;
/// Variables; functions.
const MAX_NAMES: usize = 2048;

/// Why a script came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum Stop {
    #[error(transparent)]
    Fault(#[from] Fault),
    #[error("{path}: {fault}")]
    File { path: String, fault: Fault },
    #[error("{path}: {error}")]
    Syntax { path: String, error: SyntaxError },
    #[error("functions or files that call each other without end")]
    TooDeep,
    #[error("{0} without end")]
    TooMuch(&'static str),
    #[error("it makes no menu and loads no kernel")]
    NoEntry,
    #[error("its entry '{title}' loads no Linux kernel{}", because(why))]
    NoKernel { title: String, why: Option<String> },
}

fn because(why: &Option<String>) -> String {
    why.as_ref()
        .map_or(String::new(), |why| format!(" ({why})"))
}

/// What `linux` and `initrd` have loaded.
#[derive(Default)]
struct Loaded {
    kernel: Option<(Place, String)>,
    initrds: Vec<Place>,
    /// Why one of them did not work.
    problem: Option<String>,
}

pub struct Run<'r, 'a> {
    disk: &'a Disk<'a>,
    trees: &'r [Tree<'a>],
    variables: HashMap<String, String>,
    functions: HashMap<String, Block>,
    menu: Vec<MenuEntry>,
    words: Vec<String>,
    loaded: Loaded,
    depth: u32,
    kept: usize,
    /// `$?` is 0.
    good: bool,
}

impl<'r, 'a> Run<'r, 'a> {
    pub fn new(disk: &'a Disk<'a>, trees: &'r [Tree<'a>]) -> Run<'r, 'a> {
        let mut run = Run {
            disk,
            trees,
            variables: HashMap::new(),
            functions: HashMap::new(),
            menu: Vec::new(),
            words: Vec::new(),
            loaded: Loaded::default(),
            depth: 0,
            kept: 0,
            good: true,
        };
        for (name, value) in [
            ("grub_platform", "pc"),
            ("grub_cpu", "i386"),
            ("feature_menuentry_id", "y"),
            ("feature_menuentry_options", "y"),
            ("feature_default_font_path", "y"),
            ("feature_all_video_module", "y"),
            ("feature_timeout_style", "y"),
            ("feature_platform_search_hint", "y"),
            ("feature_chainloader_bpb", "y"),
            ("feature_ntldr", "y"),
            ("feature_nativedisk_cmd", "y"),
            // Ubuntu tries without an initrd first, and notes in grubenv that it did, to take it the
            // next time. Nothing is noted here: with the initrd, at once.
            ("initrdfail", "1"),
        ] {
            run.set(name, value);
        }
        run
    }

    pub fn set(&mut self, name: &str, value: &str) {
        if self.variables.len() < MAX_NAMES || self.variables.contains_key(name) {
            self.kept += name.len() + value.len();
            self.variables.insert(name.to_owned(), value.to_owned());
        }
    }

    fn get(&self, name: &str) -> &str {
        self.variables.get(name).map_or("", String::as_str)
    }

    /// The default entry, after the script has run.
    pub fn chosen(&mut self) -> Result<Entry, Stop> {
        let path = steps(self.get("default"));
        let mut path = path.iter().map(String::as_str);
        let mut titles: Vec<String> = Vec::new();
        loop {
            let entry = select(&self.menu, path.next()).cloned();
            let Some(MenuEntry { title, id, action }) = entry else {
                let loaded = std::mem::take(&mut self.loaded);
                return match titles.is_empty() {
                    true => finish(loaded, "(none)").map_err(|_| Stop::NoEntry),
                    false => Err(Stop::NoEntry),
                };
            };
            titles.push(title.clone());
            self.loaded = Loaded::default();
            self.set("chosen", id.as_deref().unwrap_or(&title));
            match action {
                Action::Submenu { body } => {
                    self.menu.clear();
                    self.enter()?;
                    self.block(&body)?;
                    self.depth -= 1;
                }
                Action::Script { body, words } => {
                    self.words = words;
                    self.block(&body)?;
                    return finish(std::mem::take(&mut self.loaded), &titles.join(" > "));
                }
                Action::Item(item) => {
                    self.item(&item)?;
                    return finish(std::mem::take(&mut self.loaded), &title);
                }
            }
        }
    }

    fn enter(&mut self) -> Result<(), Stop> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(Stop::TooDeep);
        }
        Ok(())
    }

    /// Runs another file.
    pub fn source(&mut self, path: &str) -> Result<(), Stop> {
        self.enter()?;
        let text = self.text(path)?;
        self.disk.step_over(text.len())?;
        let parsed = parse(&text, self.disk.room()).map_err(|error| Stop::Syntax {
            path: path.to_owned(),
            error,
        })?;
        drop(text);
        self.disk.keep(parsed.kept)?;
        self.block(&parsed.block)?;
        self.depth -= 1;
        Ok(())
    }

    fn block(&mut self, block: &[Command]) -> Result<(), Stop> {
        for command in block {
            self.command(command)?;
        }
        Ok(())
    }

    fn command(&mut self, command: &Command) -> Result<(), Stop> {
        self.disk.step()?;
        if self.kept > MAX_KEPT {
            return Err(Stop::TooMuch("values"));
        }
        match command {
            Command::Simple { words, block } => self.simple(words, block.as_ref()),
            Command::If(branches) => {
                for (condition, body) in branches {
                    self.good = true;
                    self.block(condition)?;
                    if self.good {
                        return self.block(body);
                    }
                }
                self.good = true;
                Ok(())
            }
            Command::While {
                until,
                condition,
                body,
            } => loop {
                self.disk.step()?;
                self.block(condition)?;
                if self.good == *until {
                    self.good = true;
                    return Ok(());
                }
                self.block(body)?;
            },
            Command::For { name, words, body } => {
                for word in self.expand(words)? {
                    self.disk.step()?;
                    self.set(name, &word);
                    self.block(body)?;
                }
                Ok(())
            }
            Command::Function { name, body } => {
                if self.functions.len() >= MAX_NAMES {
                    return Err(Stop::TooMuch("functions"));
                }
                self.functions.insert(name.clone(), body.clone());
                Ok(())
            }
        }
    }

    fn expand(&mut self, words: &[Word]) -> Result<Vec<String>, Stop> {
        let mut expanded = Vec::new();
        let mut total = 0;
        for word in words {
            let mut text = String::new();
            let mut something = word.quoted;
            for part in &word.parts {
                let (value, splits) = match part {
                    Part::Text(more) => (more.clone(), false),
                    Part::Variable { name, quoted } => (self.value(name), !quoted),
                };
                total += value.len();
                if text.len() + value.len() > MAX_WORD || total > MAX_WORDS {
                    return Err(Stop::TooMuch("words"));
                }
                if !splits {
                    text.push_str(&value);
                    continue;
                }
                // Without quotes, spaces part words.
                let mut parts = value.split([' ', '\t', '\n']).peekable();
                while let Some(part) = parts.next() {
                    text.push_str(part);
                    if parts.peek().is_some() && (something || !text.is_empty()) {
                        expanded.push(std::mem::take(&mut text));
                        something = false;
                    }
                }
            }
            if something || !text.is_empty() {
                expanded.push(text);
            }
        }
        // A word takes as much as some letters, however short it is.
        self.disk.step_over(total + 16 * expanded.len())?;
        Ok(expanded)
    }

    fn value(&self, name: &str) -> String {
        let numbered = |number: usize| number.checked_sub(1).and_then(|at| self.words.get(at));
        match name {
            "?" => if self.good { "0" } else { "1" }.to_owned(),
            "#" => self.words.len().to_string(),
            "@" | "*" => self.words.join(" "),
            name => match name.parse::<usize>() {
                Ok(number) => numbered(number).cloned().unwrap_or_default(),
                Err(_) => self.get(name).to_owned(),
            },
        }
    }

    fn simple(&mut self, words: &[Word], block: Option<&Block>) -> Result<(), Stop> {
        let words = self.expand(words)?;
        let Some((name, rest)) = words.split_first() else {
            return match block {
                Some(block) => self.block(block),
                None => Ok(()),
            };
        };
        if let Some(function) = self.functions.get(name).cloned() {
            self.enter()?;
            let before = std::mem::replace(&mut self.words, rest.to_vec());
            self.block(&function)?;
            self.words = before;
            self.depth -= 1;
            return Ok(());
        }
        self.good = match (name.as_str(), block) {
            ("menuentry", Some(block)) => self.menu_entry(rest, |words| Action::Script {
                body: block.clone(),
                words,
            })?,
            ("submenu", Some(block)) => self.menu_entry(rest, |_| Action::Submenu {
                body: block.clone(),
            })?,
            (_, Some(_)) => false,
            (name, None) => self.built_in(name, rest)?,
        };
        Ok(())
    }

    /// True: it worked.
    fn built_in(&mut self, name: &str, words: &[String]) -> Result<bool, Stop> {
        let first = words.first().map_or("", String::as_str);
        Ok(match name {
            "set" => words.iter().all(|word| self.assign(word)),
            "unset" => {
                self.variables.remove(first);
                true
            }
            "[" => match words.split_last() {
                Some((last, words)) if last == "]" => self.test(words)?,
                _ => false,
            },
            "test" => self.test(words)?,
            "load_env" => self.load_environment(words)?,
            "search" => self.search(&Search::parse(words))?,
            "search.fs_uuid" | "search.fs_label" | "search.file" => {
                let by = match name {
                    "search.fs_uuid" => search::By::Uuid,
                    "search.fs_label" => search::By::Label,
                    _ => search::By::File,
                };
                let variable = words.get(1).cloned();
                let name = first.to_owned();
                self.search(&Search { by, variable, name })?
            }
            "linux" | "linux16" | "linuxefi" => {
                self.linux(first, words.get(1..).unwrap_or_default())?
            }
            "initrd" | "initrd16" | "initrdefi" => self.initrd(words)?,
            "configfile" | "source" | "." | "normal" => self.other_file(name, first)?,
            "blscfg" => self.items()?,
            "increment" | "decrement" => {
                let step = if name == "increment" { 1 } else { -1 };
                let value = self
                    .get(first)
                    .parse::<i64>()
                    .unwrap_or(0)
                    .saturating_add(step);
                self.set(first, &value.to_string());
                true
            }
            "false" | "fwsetup" | "chainloader" | "multiboot" | "multiboot2" | "loadfont" => false,
            "true" | ":" | "echo" | "insmod" | "rmmod" | "export" | "save_env"
            | "terminal_output" | "terminal_input" | "terminal" | "serial" | "play" | "sleep"
            | "clear" | "boot" | "background_image" | "password" | "password_pbkdf2"
            | "gfxpayload" => true,
            word => match word.split_once('=') {
                Some((name, _)) if !name.is_empty() => self.assign(word),
                _ => false,
            },
        })
    }

    fn assign(&mut self, word: &str) -> bool {
        match word.split_once('=') {
            Some((name, value)) => {
                self.set(name, value);
                true
            }
            None => false,
        }
    }

    fn test(&mut self, words: &[String]) -> Result<bool, Stop> {
        let mut looks = Looks {
            run: self,
            fault: None,
        };
        let value = condition::evaluate(words, &mut looks);
        match looks.fault {
            Some(fault) => Err(fault.into()),
            None => Ok(value),
        }
    }

    fn search(&mut self, search: &Search) -> Result<bool, Stop> {
        for _ in self.trees {
            self.disk.step()?;
        }
        let found = search
            .find(self.trees)
            .and_then(|index| self.trees.get(index));
        if let (Some(tree), Some(variable)) = (found, &search.variable) {
            self.set(variable, &tree.device);
        }
        if found.is_none() && self.loaded.problem.is_none() {
            self.loaded.problem = Some(format!("no file system {}", search.name));
        }
        Ok(found.is_some())
    }

    /// Where a path leads: `(hd0,gpt1)/x`, or `/x` on `$root`.
    fn place(&self, path: &str) -> Option<Place> {
        let (device_name, path) = match path.strip_prefix('(') {
            Some(rest) => rest.split_once(')')?,
            None => (self.get("root"), path),
        };
        let tree = device(self.trees, device_name)?;
        path.starts_with('/')
            .then(|| Place::new(tree, normal(path)))
    }

    fn text(&self, path: &str) -> Result<String, Stop> {
        let failed = |fault: Fault| match fault.ends_the_search() {
            true => Stop::Fault(fault),
            false => Stop::File {
                path: path.to_owned(),
                fault,
            },
        };
        let place = self.place(path).ok_or_else(|| failed(Fault::NotFound))?;
        let tree = self
            .trees
            .get(place.tree)
            .ok_or_else(|| failed(Fault::NotFound))?;
        tree.text(&place.path, MAX_CONFIG).map_err(failed)
    }

    fn load_environment(&mut self, words: &[String]) -> Result<bool, Stop> {
        let mut file = format!("{}/grubenv", self.get("prefix"));
        let mut only = Vec::new();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "-f" | "--file" => file = words.next().cloned().unwrap_or_default(),
                word => match word.strip_prefix("--file=") {
                    Some(path) => file = path.to_owned(),
                    None if word.starts_with('-') => {}
                    None => only.push(word),
                },
            }
        }
        let text = match self.text(&file) {
            Ok(text) => text,
            Err(Stop::Fault(fault)) => return Err(fault.into()),
            Err(_) => return Ok(false),
        };
        self.disk.step_over(text.len())?;
        let Some(pairs) = block::parse(&text) else {
            return Ok(false);
        };
        for (name, value) in pairs {
            self.disk.step_over(16 * only.len())?;
            if self.kept > MAX_KEPT {
                return Err(Stop::TooMuch("values"));
            }
            if only.is_empty() || only.contains(&name.as_str()) {
                self.set(&name, &value);
            }
        }
        Ok(true)
    }

    /// A file that is not there is passed over, as GRUB does; one that is not understood is not.
    fn other_file(&mut self, command: &str, path: &str) -> Result<bool, Stop> {
        let path = match (command, path) {
            ("normal", "") => format!("{}/grub.cfg", self.get("prefix")),
            (_, path) => path.to_owned(),
        };
        let depth = self.depth;
        match self.source(&path) {
            Ok(()) => Ok(true),
            Err(Stop::File { path, fault }) => {
                self.depth = depth;
                self.loaded.problem = Some(format!("{path}: {fault}"));
                Ok(false)
            }
            Err(stop) => Err(stop),
        }
    }

    fn menu_entry(
        &mut self,
        words: &[String],
        action: impl FnOnce(Vec<String>) -> Action,
    ) -> Result<bool, Stop> {
        let (mut title, mut id, mut rest) = (None, None, Vec::new());
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match word.as_str() {
                "--id" => id = words.next().cloned(),
                "--class" | "--users" | "--hotkey" => drop(words.next()),
                "--unrestricted" => {}
                word => match word.strip_prefix("--id=") {
                    Some(value) => id = Some(value.to_owned()),
                    None if word.starts_with("--") => {}
                    None if title.is_none() => title = Some(word.to_owned()),
                    None => rest.push(word.to_owned()),
                },
            }
        }
        if self.menu.len() >= MAX_ENTRIES {
            return Err(Stop::TooMuch("menu entries"));
        }
        let Some(title) = title else { return Ok(false) };
        self.kept += words_length(&rest) + title.len();
        let action = action(rest);
        self.menu.push(MenuEntry { title, id, action });
        Ok(true)
    }

    fn linux(&mut self, path: &str, words: &[String]) -> Result<bool, Stop> {
        let Some(place) = self.place(path) else {
            self.loaded.problem = Some(format!("no device for {path:?}"));
            return Ok(false);
        };
        let words: Vec<String> = words.iter().map(|word| quote(word)).collect();
        let image = format!("BOOT_IMAGE={path}");
        let words = [image.as_str()]
            .into_iter()
            .chain(words.iter().map(String::as_str));
        let command_line = join(words);
        if command_line.len() > MAX_WORD {
            return Err(Stop::TooMuch("a command line"));
        }
        self.loaded.kernel = Some((place, command_line));
        Ok(true)
    }

    fn initrd(&mut self, words: &[String]) -> Result<bool, Stop> {
        let mut initrds = Vec::new();
        for path in words
            .iter()
            .filter(|word| !word.starts_with("--"))
            .take(MAX_ENTRIES)
        {
            match self.place(path) {
                Some(place) => initrds.push(place),
                None => self.loaded.problem = Some(format!("no device for {path:?}")),
            }
        }
        self.loaded.initrds = initrds;
        Ok(true)
    }

    /// Fedora's command: entries of the Boot Loader Specification become menu entries.
    fn items(&mut self) -> Result<bool, Stop> {
        let mut folders = vec![
            "/loader/entries".to_owned(),
            "/boot/loader/entries".to_owned(),
        ];
        if !self.get("blsdir").is_empty() {
            folders.insert(0, self.get("blsdir").to_owned());
        }
        let mut found = Vec::new();
        'trees: for variable in ["boot", "root"] {
            let Some(tree) = device(self.trees, self.get(variable)) else {
                continue;
            };
            for folder in &folders {
                match bls::read(self.trees, tree, folder, &mut Vec::new()) {
                    Ok(items) if !items.is_empty() => {
                        found = items;
                        break 'trees;
                    }
                    Err(fault) if fault.ends_the_search() => return Err(fault.into()),
                    _ => {}
                }
            }
        }
        found.retain(|item| item.linux.is_some());
        let found = bls::sorted(self.disk, found, |a, b| version::rpm(&b.id, &a.id))?;
        let worked = !found.is_empty();
        for item in found {
            if self.menu.len() >= MAX_ENTRIES {
                return Err(Stop::TooMuch("menu entries"));
            }
            self.menu.push(MenuEntry {
                title: item.title(),
                id: Some(item.id.clone()),
                action: Action::Item(Box::new(item)),
            });
        }
        Ok(worked)
    }

    /// Loads what an entry of `blscfg` says, with its variables.
    fn item(&mut self, item: &bls::Item) -> Result<(), Stop> {
        let place = |path: &str| {
            let path = normal(path);
            let below = format!("/boot{path}");
            let tree = self.trees.get(item.tree);
            // Where /boot is no file system of its own, some entries leave it out.
            let is_below = tree.is_some_and(|tree| {
                matches!(tree.node(&path), Err(Fault::NotFound)) && tree.node(&below).is_ok()
            });
            Place::new(item.tree, if is_below { below } else { path })
        };
        let options = item.options.clone();
        let options = options.unwrap_or_else(|| "$default_kernelopts".to_owned());
        let options = self.expand_text(&options);
        let linux = item.linux.clone().unwrap_or_default();
        let image = format!("BOOT_IMAGE={linux}");
        let mut initrds = Vec::new();
        for line in item.initrds.iter().take(MAX_ENTRIES) {
            let line = self.expand_text(line);
            initrds.extend(line.split_ascii_whitespace().map(&place));
        }
        let kernel = place(&linux);
        let words = [image.as_str()]
            .into_iter()
            .chain(options.split_ascii_whitespace());
        let command_line = join(words);
        if command_line.len() > MAX_WORD {
            return Err(Stop::TooMuch("a command line"));
        }
        self.loaded = Loaded {
            kernel: Some((kernel, command_line)),
            initrds,
            problem: None,
        };
        Ok(())
    }

    /// Puts values in the place of `$name` and `${name}`.
    fn expand_text(&self, text: &str) -> String {
        let mut expanded = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('$') {
            expanded.push_str(before);
            let braced = after
                .strip_prefix('{')
                .and_then(|inner| inner.split_once('}'));
            let (name, next) = braced.unwrap_or_else(|| {
                let letter = |c: char| c.is_ascii_alphanumeric() || c == '_';
                after.split_at(after.find(|c| !letter(c)).unwrap_or(after.len()))
            });
            if expanded.len() < MAX_WORD {
                expanded.push_str(self.get(name));
            }
            rest = next;
        }
        expanded.push_str(rest);
        expanded
    }
}

fn words_length(words: &[String]) -> usize {
    words.iter().map(String::len).sum()
}

fn finish(loaded: Loaded, title: &str) -> Result<Entry, Stop> {
    let Some((kernel, command_line)) = loaded.kernel else {
        return Err(Stop::NoKernel {
            title: title.to_owned(),
            why: loaded.problem,
        });
    };
    Ok(Entry {
        title: title.to_owned(),
        kernel,
        initrds: loaded.initrds,
        command_line,
    })
}

/// As GRUB hands words to Linux: those with spaces in quotes.
fn quote(word: &str) -> String {
    let mut text = String::with_capacity(word.len());
    let spaced = word.contains(' ');
    text.extend(spaced.then_some('"'));
    for c in word.chars() {
        if matches!(c, '\\' | '\'' | '"') {
            text.push('\\');
        }
        text.push(c);
    }
    text.extend(spaced.then_some('"'));
    text
}

struct Looks<'l, 'r, 'a> {
    run: &'l Run<'r, 'a>,
    fault: Option<Fault>,
}

impl Files for Looks<'_, '_, '_> {
    fn look(&mut self, path: &str) -> Option<Look> {
        let place = self.run.place(path)?;
        match self.run.trees.get(place.tree)?.node(&place.path) {
            Ok(node) if node.kind == Kind::Folder => Some(Look::Folder),
            Ok(node) => Some(Look::File(node.size)),
            Err(fault) => {
                if fault.ends_the_search() {
                    self.fault = Some(fault);
                }
                None
            }
        }
    }
}
