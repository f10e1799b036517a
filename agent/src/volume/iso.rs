//! Small ISO 9660 images (ECMA-119), for config drives: a tree of a few files, whole in memory.
//!
//! Names are kept by Rock Ridge (IEEE P1282, for Linux and BSD) and by Joliet (for Windows); the plain
//! names are numbers, since nobody reads them. Files with the same content share their blocks, as a
//! config drive says the same under many versions. Must never hold what does not fit in memory.

use std::collections::{BTreeMap, HashMap};

/// Bytes of a logical block.
const BLOCK: usize = 2048;
/// Most bytes of one name: a record with it fits in its one byte of length, in either tree.
const NAME: usize = 64;
/// Blocks before the path tables: the system area and three volume descriptors.
const HEAD: usize = 19;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IsoError {
    #[error("{0:?} cannot be a path on a config drive")]
    Path(String),
    #[error("the files are too many or too large for a config drive")]
    Size,
}

/// An image with these files (by path, `/` between names) and this volume label (at most 16 ASCII
/// characters). `time` is seconds since the epoch.
pub fn image(
    label: &str,
    files: &BTreeMap<String, Vec<u8>>,
    time: i64,
) -> Result<Vec<u8>, IsoError> {
    let tree = Tree::new(files)?;
    let stamp = Stamp::of(time);
    let plan = Plan::new(&tree)?;
    let mut out = vec![0; plan.blocks * BLOCK];
    let mut put = |block: usize, bytes: &[u8]| -> Result<(), IsoError> {
        let at = block * BLOCK;
        let place = out.get_mut(at..at + bytes.len()).ok_or(IsoError::Size)?;
        place.copy_from_slice(bytes);
        Ok(())
    };
    for (index, kind) in [Names::RockRidge, Names::Joliet].into_iter().enumerate() {
        let side = &plan.sides[index];
        put(16 + index, &descriptor(kind, label, &plan, side, stamp))?;
        put(
            side.little,
            &tree.path_table(kind, side, u32::to_le_bytes, u16::to_le_bytes),
        )?;
        put(
            side.big,
            &tree.path_table(kind, side, u32::to_be_bytes, u16::to_be_bytes),
        )?;
        for folder in 0..tree.folders.len() {
            let records = tree.records(kind, folder, &plan, side, stamp);
            put(side.folders[folder].0, &records)?;
        }
    }
    let end = [&[255_u8][..], b"CD001", &[1]].concat();
    put(18, &end)?;
    for (content, block) in &plan.contents {
        put(*block, content)?;
    }
    Ok(out)
}

/// How a tree names its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Names {
    /// Numbers, with the real name in the record's system use area.
    RockRidge,
    /// UCS-2, big endian.
    Joliet,
}

#[derive(Debug)]
struct Folder<'a> {
    parent: usize,
    name: &'a str,
    /// Number of its record's plain name.
    number: usize,
    folders: Vec<usize>,
    files: Vec<(&'a str, &'a [u8])>,
}

/// Folders level by level, and by name within their parent: the order of path tables.
#[derive(Debug)]
struct Tree<'a> {
    folders: Vec<Folder<'a>>,
}

impl<'a> Tree<'a> {
    fn new(files: &'a BTreeMap<String, Vec<u8>>) -> Result<Self, IsoError> {
        let mut levels: BTreeMap<(usize, Vec<&str>), ()> = BTreeMap::new();
        for path in files.keys() {
            let names: Vec<&str> = path.split('/').collect();
            let fits = |name: &&str| {
                let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
                (1..=NAME).contains(&name.len())
                    && name.bytes().all(plain)
                    && *name != "."
                    && *name != ".."
            };
            if !names.iter().all(fits) || names.len() > 7 {
                return Err(IsoError::Path(path.clone()));
            }
            for depth in 1..names.len() {
                let folder = names[..depth].to_vec();
                if files.contains_key(&folder.join("/")) {
                    return Err(IsoError::Path(path.clone()));
                }
                levels.insert((depth, folder), ());
            }
        }
        let mut places: HashMap<Vec<&str>, usize> = HashMap::new();
        places.insert(Vec::new(), 0);
        let mut tree = Self {
            folders: vec![Folder {
                parent: 0,
                name: "",
                number: 0,
                folders: Vec::new(),
                files: Vec::new(),
            }],
        };
        for ((_, path), ()) in levels {
            let index = tree.folders.len();
            let (Some(name), parent) = (path.last().copied(), place(&places, &path)) else {
                continue;
            };
            let number = tree.folders[parent].folders.len();
            tree.folders[parent].folders.push(index);
            tree.folders.push(Folder {
                parent,
                name,
                number,
                folders: Vec::new(),
                files: Vec::new(),
            });
            places.insert(path, index);
        }
        for (path, content) in files {
            let names: Vec<&str> = path.split('/').collect();
            let folder = place(&places, &names);
            if let Some(name) = names.last() {
                tree.folders[folder].files.push((name, content));
            }
        }
        Ok(tree)
    }

    /// ECMA-119 §9.4, in either byte order.
    fn path_table(
        &self,
        kind: Names,
        side: &Side,
        four: fn(u32) -> [u8; 4],
        two: fn(u16) -> [u8; 2],
    ) -> Vec<u8> {
        let mut table = Vec::new();
        for (index, folder) in self.folders.iter().enumerate() {
            let name = match index {
                0 => vec![0],
                _ => identifier(kind, folder.name, folder.number, Entry::Folder),
            };
            table.push(name.len() as u8);
            table.push(0);
            table.extend(four(side.folders[index].0 as u32));
            table.extend(two(folder.parent as u16 + 1));
            table.extend(&name);
            if name.len() % 2 == 1 {
                table.push(0);
            }
        }
        table
    }

    /// The records of a folder, in the order of their identifiers; none crosses a block.
    fn records(
        &self,
        kind: Names,
        index: usize,
        plan: &Plan<'_>,
        side: &Side,
        stamp: Stamp,
    ) -> Vec<u8> {
        let folder = &self.folders[index];
        let record = |name: &[u8], extent: Extent, is_folder: bool, real: &str| {
            let links = self.folders[index].folders.len() as u32 + 2;
            let system_use = match kind {
                Names::RockRidge => rock_ridge(real, is_folder, links),
                Names::Joliet => Vec::new(),
            };
            directory_record(name, extent, is_folder, stamp, &system_use)
        };
        let mut records = Vec::new();
        let own = record(&[0], side.folders[index], true, "");
        records.push(match (kind, index) {
            (Names::RockRidge, 0) => {
                directory_record(&[0], side.folders[0], true, stamp, &first_rock_ridge())
            }
            _ => own,
        });
        records.push(record(&[1], side.folders[folder.parent], true, ""));
        let mut named = Vec::new();
        for child in &folder.folders {
            let Folder { name, number, .. } = self.folders[*child];
            let identifier = identifier(kind, name, number, Entry::Folder);
            let record = record(&identifier, side.folders[*child], true, name);
            named.push((identifier, record));
        }
        for (number, (name, content)) in folder.files.iter().enumerate() {
            let identifier = identifier(kind, name, number, Entry::File);
            let block = plan.contents.get(content).copied().unwrap_or_default();
            let record = record(&identifier, (block, content.len()), false, name);
            named.push((identifier, record));
        }
        named.sort();
        records.extend(named.into_iter().map(|(_, record)| record));
        let mut out: Vec<u8> = Vec::new();
        for record in records {
            let left = BLOCK - out.len() % BLOCK;
            if record.len() > left {
                out.resize(out.len() + left, 0);
            }
            out.extend(record);
        }
        out.resize(out.len().next_multiple_of(BLOCK), 0);
        out
    }
}

/// The folder that something with this path is in.
fn place(places: &HashMap<Vec<&str>, usize>, path: &[&str]) -> usize {
    let above = path.split_last().map_or(&[][..], |(_, above)| above);
    places.get(above).copied().unwrap_or_default()
}

/// First block, and bytes.
type Extent = (usize, usize);

/// Where one of the two trees lies.
#[derive(Debug, Default)]
struct Side {
    /// Path tables of either byte order, and their bytes.
    little: usize,
    big: usize,
    table: usize,
    folders: Vec<Extent>,
}

/// Where everything lies.
#[derive(Debug)]
struct Plan<'a> {
    sides: [Side; 2],
    /// Each content once.
    contents: HashMap<&'a [u8], usize>,
    blocks: usize,
}

impl<'a> Plan<'a> {
    fn new(tree: &Tree<'a>) -> Result<Self, IsoError> {
        let mut plan = Self {
            sides: [Side::default(), Side::default()],
            contents: HashMap::new(),
            blocks: HEAD,
        };
        for (index, kind) in [Names::RockRidge, Names::Joliet].into_iter().enumerate() {
            let mut side = Side {
                folders: vec![(0, 0); tree.folders.len()],
                ..Side::default()
            };
            let table = tree.path_table(kind, &side, u32::to_le_bytes, u16::to_le_bytes);
            side.table = table.len();
            side.little = plan.take(side.table);
            side.big = plan.take(side.table);
            for folder in 0..tree.folders.len() {
                // A record is as long wherever its file lies.
                let length = tree.records(kind, folder, &plan, &side, Stamp::of(0)).len();
                side.folders[folder] = (plan.take(length), length);
            }
            plan.sides[index] = side;
        }
        for folder in &tree.folders {
            for (_, content) in &folder.files {
                if !plan.contents.contains_key(content) {
                    let block = plan.take(content.len().max(1));
                    plan.contents.insert(content, block);
                }
            }
        }
        // Extents are of 32 bits; a config drive is far from it.
        if plan.blocks > 1 << 20 || tree.folders.len() > 1 << 12 {
            return Err(IsoError::Size);
        }
        Ok(plan)
    }

    fn take(&mut self, bytes: usize) -> usize {
        let block = self.blocks;
        self.blocks += bytes.div_ceil(BLOCK);
        block
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    Folder,
    File,
}

/// A record's identifier: ECMA-119 §7.5 and §7.6, or Joliet's.
fn identifier(kind: Names, name: &str, number: usize, entry: Entry) -> Vec<u8> {
    let text = match (kind, entry) {
        (Names::RockRidge, Entry::Folder) => format!("D{number:07}"),
        (Names::RockRidge, Entry::File) => format!("F{number:07}.;1"),
        (Names::Joliet, Entry::Folder) => name.to_owned(),
        (Names::Joliet, Entry::File) => format!("{name};1"),
    };
    match kind {
        Names::RockRidge => text.into_bytes(),
        Names::Joliet => text.encode_utf16().flat_map(u16::to_be_bytes).collect(),
    }
}

/// ECMA-119 §9.1.
fn directory_record(
    name: &[u8],
    (block, bytes): Extent,
    is_folder: bool,
    stamp: Stamp,
    system_use: &[u8],
) -> Vec<u8> {
    let mut record = vec![0, 0];
    record.extend(both4(block));
    record.extend(both4(bytes));
    record.extend(stamp.short());
    record.extend([if is_folder { 2 } else { 0 }, 0, 0]);
    record.extend(both2(1));
    record.push(name.len() as u8);
    record.extend(name);
    if record.len() % 2 == 1 {
        record.push(0);
    }
    record.extend(system_use);
    if record.len() % 2 == 1 {
        record.push(0);
    }
    record[0] = record.len() as u8;
    record
}

/// PX and NM of Rock Ridge: mode, links, owner; the real name.
fn rock_ridge(name: &str, is_folder: bool, links: u32) -> Vec<u8> {
    let (mode, links) = if is_folder {
        (0o040_555, links)
    } else {
        (0o100_444, 1)
    };
    let mut fields = b"PX\x24\x01".to_vec();
    for number in [mode, links as usize, 0, 0] {
        fields.extend(both4(number));
    }
    if !name.is_empty() {
        fields.extend([b'N', b'M', name.len() as u8 + 5, 1, 0]);
        fields.extend(name.bytes());
    }
    fields
}

/// What the first record of the root has besides: that System Use fields are there (SP), and whose
/// they are (ER).
fn first_rock_ridge() -> Vec<u8> {
    let mut fields = b"SP\x07\x01\xbe\xef\x00".to_vec();
    fields.extend(rock_ridge("", true, 2));
    let (id, words) = (&b"RRIP_1991A"[..], &b"ROCK RIDGE"[..]);
    let length = 8 + id.len() + 2 * words.len();
    fields.extend([b'E', b'R', length as u8, 1]);
    fields.extend([id.len() as u8, words.len() as u8, words.len() as u8, 1]);
    fields.extend([id, words, words].concat());
    fields
}

/// The primary volume descriptor (ECMA-119 §8.4), or Joliet's supplementary one (§8.5).
fn descriptor(kind: Names, label: &str, plan: &Plan<'_>, side: &Side, stamp: Stamp) -> Vec<u8> {
    let text = |text: &str, length: usize| -> Vec<u8> {
        let mut bytes: Vec<u8> = match kind {
            Names::RockRidge => text.bytes().collect(),
            Names::Joliet => text.encode_utf16().flat_map(u16::to_be_bytes).collect(),
        };
        while bytes.len() < length {
            match kind {
                Names::RockRidge => bytes.push(b' '),
                Names::Joliet => bytes.extend([0, b' ']),
            }
        }
        bytes.truncate(length);
        bytes
    };
    let joliet = kind == Names::Joliet;
    let mut out = vec![if joliet { 2 } else { 1 }];
    out.extend(b"CD001\x01\x00");
    out.extend(text("LINUX", 32));
    out.extend(text(label, 32));
    out.extend([0; 8]);
    out.extend(both4(plan.blocks));
    let escape: &[u8] = if joliet { b"%/E" } else { b"" };
    out.extend(escape);
    out.resize(120, 0);
    out.extend(both2(1));
    out.extend(both2(1));
    out.extend(both2(BLOCK as u16));
    out.extend(both4(side.table));
    out.extend((side.little as u32).to_le_bytes());
    out.extend([0; 4]);
    out.extend((side.big as u32).to_be_bytes());
    out.extend([0; 4]);
    let root = side.folders.first().copied().unwrap_or_default();
    out.extend(directory_record(&[0], root, true, stamp, &[]));
    for (words, length) in [("", 128), ("", 128), ("", 128), ("FRACTUS", 128)] {
        out.extend(text(words, length));
    }
    for _ in 0..3 {
        out.extend(text("", 37));
    }
    out.extend(stamp.long());
    out.extend(stamp.long());
    out.extend(Stamp::NEVER);
    out.extend(Stamp::NEVER);
    out.push(1);
    out.resize(BLOCK, 0);
    out
}

fn both4(number: usize) -> Vec<u8> {
    let number = number as u32;
    [number.to_le_bytes(), number.to_be_bytes()].concat()
}

fn both2(number: u16) -> Vec<u8> {
    [number.to_le_bytes(), number.to_be_bytes()].concat()
}

/// A moment, UTC.
#[derive(Debug, Clone, Copy)]
struct Stamp {
    year: i16,
    /// Month, day, hour, minute, second.
    parts: [i8; 5],
}

impl Stamp {
    const NEVER: [u8; 17] = *b"0000000000000000\0";

    fn of(time: i64) -> Self {
        let moment = jiff::Timestamp::from_second(time).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
        let moment = moment.to_zoned(jiff::tz::TimeZone::UTC);
        Self {
            year: moment.year(),
            parts: [
                moment.month(),
                moment.day(),
                moment.hour(),
                moment.minute(),
                moment.second(),
            ],
        }
    }

    /// ECMA-119 §9.1.5.
    fn short(self) -> [u8; 7] {
        let [month, day, hour, minute, second] = self.parts.map(|part| part as u8);
        let year = (self.year - 1900).clamp(0, 255) as u8;
        [year, month, day, hour, minute, second, 0]
    }

    /// ECMA-119 §8.4.26.1.
    fn long(self) -> Vec<u8> {
        let [month, day, hour, minute, second] = self.parts;
        let year = self.year;
        let text = format!("{year:04}{month:02}{day:02}{hour:02}{minute:02}{second:02}00\0");
        text.into_bytes()
    }
}

#[cfg(test)]
mod tests;
