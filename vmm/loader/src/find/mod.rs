//! The search: partitions, what is on them, and the first configuration that leads to a kernel. It can
//! also be made among file systems that somebody else reads: in the fallback, where Linux has mounted them.

mod among;

use std::fmt;

use crate::config::{self, Entry, MAX_CONFIG, Place, bls, extlinux, grub, uki};
use crate::disk::{Disk, Fault, Limits, Piece, ReadAt, Volume, cut};
use crate::fs::{self, Content, Tree};
use crate::partition::{self, Partition};

pub use among::{Chosen, find_among};

/// A file on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundFile {
    /// For people: `partition 1 (ext4) /boot/vmlinuz`.
    pub name: String,
    /// Bytes; the sum of the pieces.
    pub size: u64,
    pub pieces: Vec<Piece>,
}

/// What the disk boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub kernel: FoundFile,
    /// To be put one after the other, each at a multiple of 4 bytes.
    pub initrds: Vec<FoundFile>,
    pub command_line: String,
    /// For people: which entry of which file.
    pub how: String,
}

/// Why a disk does not boot. What was looked for is told to people, who have nothing else to go by.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    #[error("nothing to boot was found on the disk: {}", Remarks(looked_for))]
    NotBootable { looked_for: Vec<String> },
    /// There is something on it that only Linux itself reads.
    #[error(
        "nothing to boot was found on the disk, but {partition} is {file_system}, which cannot be read \
         before Linux runs: give the host the fallback that does it (fractus-agent check), use an image \
         with /boot on ext4 or FAT, or set kernel_id on the image; looked at: {}",
        Remarks(looked_for)
    )]
    NeedsFallback {
        file_system: &'static str,
        partition: String,
        looked_for: Vec<String>,
    },
    /// A limit was met.
    #[error(
        "the search for something to boot was given up: {why}; looked at: {}",
        Remarks(looked_for)
    )]
    GaveUp {
        why: String,
        looked_for: Vec<String>,
    },
}

struct Remarks<'a>(&'a [String]);

/// Characters of an error that are for remarks: it goes to a console and into a database.
const MAX_REMARKS: usize = 2000;

impl fmt::Display for Remarks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return write!(f, "nothing");
        }
        let mut length = 0;
        for (index, remark) in self.0.iter().enumerate() {
            // What a disk says is not to steer the terminal that shows it.
            let remark: String = remark
                .chars()
                .filter(|c| !c.is_control())
                .take(300)
                .collect();
            length += remark.len() + 2;
            if length > MAX_REMARKS {
                return write!(f, "; and {} more", self.0.len() - index);
            }
            let comma = if index == 0 { "" } else { "; " };
            write!(f, "{comma}{remark}")?;
        }
        Ok(())
    }
}

/// Partitions that are looked at.
const MAX_VOLUMES: usize = 64;

const GRUB: &[&str] = &[
    "/boot/grub/grub.cfg",
    "/grub/grub.cfg",
    "/boot/grub2/grub.cfg",
    "/grub2/grub.cfg",
];
const EXTLINUX: &[&str] = &[
    "/boot/extlinux.conf",
    "/extlinux.conf",
    "/boot/extlinux/extlinux.conf",
    "/extlinux/extlinux.conf",
    "/boot/syslinux/syslinux.cfg",
    "/syslinux/syslinux.cfg",
    "/boot/syslinux.cfg",
    "/syslinux.cfg",
];
const BLS: &[&str] = &["/loader/entries", "/boot/loader/entries"];
/// Where the vendors' folders with a small grub.cfg are.
const EFI: &[&str] = &["/EFI", "/boot/efi/EFI"];

/// Looks for what `source` boots.
pub fn find(source: &mut dyn ReadAt, limits: &Limits) -> Result<Found, FindError> {
    let disk = Disk::new(source, *limits);
    let mut search = Search::new(&disk);
    let outcome = search
        .open_all()
        .and_then(|()| search.look(&|search, entry, origin| search.load(entry, origin)));
    search.answer(outcome)
}

/// What is made of an entry that was found in some place; or what is wrong with it.
type Make<'m, 'a, T> = &'m dyn Fn(&Search<'a>, &Entry, &str) -> Result<Result<T, String>, Fault>;

struct Search<'a> {
    /// What the search may cost.
    disk: &'a Disk<'a>,
    trees: Vec<Tree<'a>>,
    /// What is wrong with configurations that are there: told first.
    problems: Vec<String>,
    remarks: Vec<String>,
    /// A file system that only Linux reads, and where it is.
    other: Option<(&'static str, String)>,
}

impl<'a> Search<'a> {
    fn new(disk: &'a Disk<'a>) -> Search<'a> {
        Search {
            disk,
            trees: Vec::new(),
            problems: Vec::new(),
            remarks: Vec::new(),
            other: None,
        }
    }

    fn answer<T>(self, outcome: Result<Option<T>, Fault>) -> Result<T, FindError> {
        let mut looked_for = self.problems;
        looked_for.extend(self.remarks);
        match (outcome, self.other) {
            (Ok(Some(found)), _) => Ok(found),
            (Ok(None), None) => Err(FindError::NotBootable { looked_for }),
            (Ok(None), Some((file_system, partition))) => Err(FindError::NeedsFallback {
                file_system,
                partition,
                looked_for,
            }),
            (Err(fault), _) => Err(FindError::GaveUp {
                why: fault.to_string(),
                looked_for,
            }),
        }
    }

    /// Errors are those that end the search.
    fn open_all(&mut self) -> Result<(), Fault> {
        let table = partition::table(self.disk)?;
        self.remarks.push(table.remark);
        for partition in table.partitions.iter().take(MAX_VOLUMES) {
            self.open(Some(partition))?;
        }
        self.open(None)
    }

    fn look<T>(&mut self, make: Make<'_, 'a, T>) -> Result<Option<T>, Fault> {
        for tree in 0..self.trees.len() {
            for path in GRUB {
                if self.is_there(tree, path)? {
                    let entry = grub::read(self.disk, &self.trees, tree, path);
                    if let Some(found) = self.try_entry(tree, path, entry, make)? {
                        return Ok(Some(found));
                    }
                }
            }
        }
        for tree in 0..self.trees.len() {
            for path in EXTLINUX {
                if self.is_there(tree, path)? {
                    let entry = extlinux::read(&self.trees, tree, path);
                    if let Some(found) = self.try_entry(tree, path, entry, make)? {
                        return Ok(Some(found));
                    }
                }
            }
        }
        if let Some(found) = self.boot_loader_specification(make)? {
            return Ok(Some(found));
        }
        for tree in 0..self.trees.len() {
            for path in self.vendors(tree)? {
                let entry = grub::read(self.disk, &self.trees, tree, &path);
                if let Some(found) = self.try_entry(tree, &path, entry, make)? {
                    return Ok(Some(found));
                }
            }
        }
        self.say_what_is_missing();
        Ok(None)
    }

    /// Finds out what is on a partition, or on the disk without any.
    fn open(&mut self, partition: Option<&Partition>) -> Result<(), Fault> {
        let volume = Volume {
            disk: self.disk,
            start: partition.map_or(0, |partition| partition.start),
            size: partition.map_or(self.disk.size(), |partition| partition.size),
        };
        let place = match partition {
            Some(partition) => format!("partition {}", partition.number),
            None => "the whole disk".to_owned(),
        };
        match fs::open(volume)? {
            Content::Readable(kind, system) => self.trees.push(Tree {
                system,
                disk: self.disk,
                name: format!("{place} ({kind})"),
                device: partition.map_or("hd0".to_owned(), |partition| {
                    format!("hd0,{}{}", partition.scheme.grub_name(), partition.number)
                }),
                number: partition.map(|partition| partition.number),
                kind: partition.map_or(String::new(), |partition| partition.kind.clone()),
            }),
            Content::Broken(kind, fault) => {
                self.remarks
                    .push(format!("{place}: {kind} that cannot be read: {fault}"));
                // Linux knows more features.
                if matches!(fault, Fault::Unsupported(_)) && self.other.is_none() {
                    self.other = Some((kind, place));
                }
            }
            Content::Other(other) => {
                self.remarks.push(format!("{place} is {}", other.name));
                if other.may_hold_linux && self.other.is_none() {
                    self.other = Some((other.name, place));
                }
            }
            Content::Unknown if partition.is_some() => {
                self.remarks.push(format!("{place}: no known file system"));
            }
            Content::Unknown => {}
        }
        Ok(())
    }

    /// Whether there is such a file; what is wrong on the way to it is said.
    fn is_there(&mut self, tree: usize, path: &str) -> Result<bool, Fault> {
        let Some(tree) = self.trees.get(tree) else {
            return Ok(false);
        };
        match tree.node(path) {
            Ok(node) => Ok(node.kind == fs::Kind::File),
            Err(fault) if fault.ends_the_search() => Err(fault),
            Err(Fault::NotFound | Fault::NotAFolder) => Ok(false),
            Err(fault) => {
                // The same is wrong on the way to every path, mostly.
                let (name, fault) = (&tree.name, fault.to_string());
                let mut said = self.problems.iter();
                if !said.any(|said| said.starts_with(name) && said.ends_with(&fault)) {
                    self.problems.push(format!("{name} {path}: {fault}"));
                }
                Ok(false)
            }
        }
    }

    /// An entry whose files are all there is what was looked for; else it is said what is wrong.
    fn try_entry<T>(
        &mut self,
        tree: usize,
        path: &str,
        entry: Result<Result<Entry, String>, Fault>,
        make: Make<'_, 'a, T>,
    ) -> Result<Option<T>, Fault> {
        let name = self.trees.get(tree).map_or("", |tree| &tree.name);
        let origin = format!("{name} {path}");
        let problem = match entry {
            Ok(Ok(entry)) => match make(self, &entry, &origin)? {
                Ok(found) => return Ok(Some(found)),
                Err(problem) => problem,
            },
            Ok(Err(problem)) => problem,
            Err(fault) if fault.ends_the_search() => return Err(fault),
            Err(fault) => fault.to_string(),
        };
        self.problems.push(format!("{origin}: {problem}"));
        Ok(None)
    }

    fn load(&self, entry: &Entry, origin: &str) -> Result<Result<Found, String>, Fault> {
        let memory = self.disk.limits().memory;
        let kernel = match self.file(&entry.kernel, memory)? {
            Ok(kernel) => kernel,
            Err(problem) => return Ok(Err(format!("entry '{}': kernel {problem}", entry.title))),
        };
        let mut initrds = Vec::new();
        let mut left = memory;
        for place in &entry.initrds {
            match self.file(place, left)? {
                Ok(initrd) => {
                    left = left.saturating_sub(initrd.size);
                    initrds.push(initrd);
                }
                Err(problem) => {
                    return Ok(Err(format!("entry '{}': initrd {problem}", entry.title)));
                }
            }
        }
        Ok(Ok(Found {
            kernel,
            initrds,
            command_line: entry.command_line.clone(),
            how: format!("entry '{}' of {origin}", entry.title),
        }))
    }

    fn file(&self, place: &Place, limit: u64) -> Result<Result<FoundFile, String>, Fault> {
        let Some(tree) = self.trees.get(place.tree) else {
            return Ok(Err(format!("{}: on no partition", place.path)));
        };
        let name = format!("{} {}", tree.name, place.path);
        let mut file = tree.file(&place.path, limit);
        if let Ok((size, pieces)) = &mut file {
            self.disk.keep(size_of_val(pieces.as_slice()) as u64)?;
            if let Some(part) = place.part {
                let Some(cut) = cut(pieces, part.offset, part.size) else {
                    return Ok(Err(format!("{name}: a section outside of its file")));
                };
                (*size, *pieces) = (part.size, cut);
            }
        }
        match file {
            Ok((_, pieces)) if !pieces.iter().all(|piece| self.holds(piece)) => {
                Ok(Err(format!("{name}: it leaves the disk")))
            }
            Ok((size, pieces)) if size > 0 => Ok(Ok(FoundFile { name, size, pieces })),
            Ok(_) => Ok(Err(format!("{name}: empty"))),
            Err(fault) if fault.ends_the_search() => Err(fault),
            Err(Fault::TooLarge { size, .. }) => Ok(Err(format!(
                "{name}: its {size} bytes do not fit into the machine's memory"
            ))),
            Err(fault) => Ok(Err(format!("{name}: {fault}"))),
        }
    }

    /// Whatever a file system says, nothing behind the disk's end is promised.
    fn holds(&self, piece: &Piece) -> bool {
        match piece {
            Piece::Disk { offset, length } => {
                let end = offset.checked_add(*length);
                end.is_some_and(|end| end <= self.disk.size())
            }
            Piece::Zero { .. } | Piece::Bytes(_) => true,
        }
    }

    /// Entries of all partitions together, as the specification has them on two.
    fn boot_loader_specification<T>(&mut self, make: Make<'_, 'a, T>) -> Result<Option<T>, Fault> {
        let (mut items, mut pattern) = (Vec::new(), None);
        for (index, tree) in self.trees.iter().enumerate() {
            for folder in BLS {
                let left = config::MAX_ENTRIES.saturating_sub(items.len());
                if left == 0 {
                    break;
                }
                match bls::read(&self.trees, index, folder, &mut self.remarks) {
                    Ok(more) => items.extend(more.into_iter().take(left)),
                    Err(fault) if fault.ends_the_search() => return Err(fault),
                    Err(_) => {}
                }
            }
            let limit = self.disk.limits().memory;
            match uki::read(&self.trees, index, limit, &mut self.remarks) {
                Ok(more) => items.extend(more),
                Err(fault) if fault.ends_the_search() => return Err(fault),
                Err(_) => {}
            }
            if let Ok(text) = tree.text("/loader/loader.conf", MAX_CONFIG) {
                pattern = pattern.or(bls::default_pattern(&text).map(str::to_owned));
            }
        }
        let chosen = bls::choose(self.disk, items, pattern.as_deref())?;
        let Some(item) = chosen else {
            return Ok(None);
        };
        let entry = item.entry().map(|mut entry| {
            let path = entry.kernel.path.clone();
            let below = Place::new(item.tree, format!("/boot{path}"));
            // Entries of a /boot that is no file system of its own.
            if matches!(self.is_there(item.tree, &path), Ok(false))
                && matches!(self.is_there(item.tree, &below.path), Ok(true))
            {
                entry.kernel = below;
                for initrd in &mut entry.initrds {
                    initrd.path = format!("/boot{}", initrd.path);
                }
            }
            entry
        });
        let entry = entry.ok_or_else(|| "it names no kernel".to_owned());
        let path = match item.unified {
            Some(_) => format!("{}/{}", uki::FOLDER, item.id),
            None => format!("/loader/entries/{}.conf", item.id),
        };
        self.try_entry(item.tree, &path, Ok(entry), make)
    }

    /// The grub.cfg of an EFI partition's folders.
    fn vendors(&mut self, tree: usize) -> Result<Vec<String>, Fault> {
        let mut found = Vec::new();
        for folder in EFI {
            let names = match self.trees.get(tree).map(|tree| tree.names(folder)) {
                Some(Err(fault)) if fault.ends_the_search() => return Err(fault),
                Some(Ok(names)) => names,
                _ => continue,
            };
            for name in names.iter().take(32) {
                let path = format!("{folder}/{name}/grub.cfg");
                if name != "." && name != ".." && self.is_there(tree, &path)? {
                    found.push(path);
                }
            }
        }
        Ok(found)
    }

    /// Readable file systems on which there was no configuration.
    fn say_what_is_missing(&mut self) {
        for tree in &self.trees {
            let mut said = self.problems.iter().chain(&self.remarks);
            let said = said.any(|remark| remark.starts_with(&tree.name));
            if !said {
                self.remarks.push(format!(
                    "{} has neither /boot/grub/grub.cfg, /boot/extlinux.conf nor /loader/entries",
                    tree.name
                ));
            }
        }
    }
}
