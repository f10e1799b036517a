//! Unified kernel images (UAPI.5): a PE file whose sections are kernel, initrd and command line. Those
//! in `/EFI/Linux` are entries of the Boot Loader Specification, type #2.
//!
//! Signatures and measurements are not looked at: there is no firmware that would ask for them.

use super::bls::{Item, key_of};
use super::{Entry, MAX_ENTRIES, MAX_ITEM, Part, Place};
use crate::bytes::{le16, le32, slice, text};
use crate::disk::{Fault, Piece, cut, read_pieces};
use crate::fs::Tree;

pub const FOLDER: &str = "/EFI/Linux";
/// Bytes of the file that hold its headers.
const HEAD: u64 = 4096;
/// PE/COFF: where the header's place stands, the header, and an entry of the table of sections.
const HEADER_AT: usize = 0x3c;
const HEADER: usize = 24;
const SECTION: usize = 40;
const MAX_SECTIONS: usize = 96;
const X86_64: u16 = 0x8664;

/// Images of a folder, unsorted. What is none is passed over, with a remark if it cannot be read.
pub fn read(
    trees: &[Tree<'_>],
    tree: usize,
    limit: u64,
    remarks: &mut Vec<String>,
) -> Result<Vec<Item>, Fault> {
    let Some(place) = trees.get(tree) else {
        return Err(Fault::NotFound);
    };
    let mut names = place.names(FOLDER)?;
    names.retain(|name| name.to_lowercase().ends_with(".efi"));
    names.sort();
    names.truncate(MAX_ENTRIES);
    let mut items = Vec::new();
    for name in names {
        let path = format!("{FOLDER}/{name}");
        match item(place, tree, &path, limit) {
            Ok(Some(item)) => items.push(item),
            Ok(None) => {}
            Err(fault) if fault.ends_the_search() => return Err(fault),
            Err(fault) => remarks.push(format!("{}: {path}: {fault}", place.name)),
        }
    }
    Ok(items)
}

/// `None`: an EFI program of another kind.
fn item(tree: &Tree<'_>, index: usize, path: &str, limit: u64) -> Result<Option<Item>, Fault> {
    let (size, pieces) = tree.file(path, limit)?;
    tree.disk.keep(size_of_val(pieces.as_slice()) as u64)?;
    let Some(sections) = sections(&read_part(tree, &pieces, 0, HEAD.min(size))?) else {
        return Ok(None);
    };
    // Where there are several profiles, the first stands before them and holds for all.
    let base = sections.iter().take_while(|(name, _)| name != ".profile");
    let base: Vec<_> = base.collect();
    let part = |wanted: &str| {
        let found = base.iter().find(|(name, _)| name == wanted);
        found.map(|(_, part)| *part).filter(|part| part.size > 0)
    };
    let text_of = |wanted: &str| match part(wanted) {
        Some(part) => {
            let bytes = read_part(tree, &pieces, part.offset, part.size.min(MAX_ITEM))?;
            Ok(text(&bytes))
        }
        None => Ok(String::new()),
    };
    let Some(kernel) = part(".linux") else {
        return Ok(None);
    };
    let at = |part: Part| Place {
        part: Some(part),
        ..Place::new(index, path)
    };
    let name = path.rsplit_once('/').map_or(path, |(_, name)| name);
    let (stem, _) = name.rsplit_once('.').unwrap_or((name, ""));
    let release = text_of(".osrel")?;
    let command_line = text_of(".cmdline")?;
    let title = value(&release, &["PRETTY_NAME", "NAME", "ID"]);
    let mut item = Item::named(stem);
    item.id = key_of(&format!("{}.efi", item.id));
    item.tree = index;
    item.sort_key = value(&release, &["IMAGE_ID", "ID"]).map(|key| key_of(&key));
    let version = value(
        &release,
        &["IMAGE_VERSION", "VERSION", "VERSION_ID", "BUILD_ID"],
    );
    item.version = key_of(&version.unwrap_or_default());
    item.title = title.clone();
    item.unified = Some(Entry {
        title: title.unwrap_or_else(|| item.id.clone()),
        kernel: at(kernel),
        initrds: [part(".ucode"), part(".initrd")]
            .into_iter()
            .flatten()
            .map(at)
            .collect(),
        command_line: super::join(command_line.split_whitespace()),
    });
    Ok(Some(item))
}

/// Names and places of a PE file's sections.
fn sections(head: &[u8]) -> Option<Vec<(String, Part)>> {
    let header = le32(head, HEADER_AT) as usize;
    let ours = slice(head, 0, 2) == b"MZ"
        && slice(head, header, 4) == b"PE\0\0"
        && le16(head, header.saturating_add(4)) == X86_64;
    let count = usize::from(le16(head, header.saturating_add(6)));
    let optional = usize::from(le16(head, header.saturating_add(20)));
    if !ours || count > MAX_SECTIONS {
        return None;
    }
    let first = header + HEADER + optional;
    let section = |index: usize| {
        let bytes = head.get(first + index * SECTION..first + (index + 1) * SECTION)?;
        let (virtual_size, raw_size) = (le32(bytes, 8), le32(bytes, 16));
        let part = Part {
            offset: le32(bytes, 20).into(),
            // The raw size is filled up to the file's alignment.
            size: virtual_size.min(raw_size).into(),
        };
        Some((text(slice(bytes, 0, 8)), part))
    };
    (0..count).map(section).collect()
}

fn read_part(tree: &Tree<'_>, pieces: &[Piece], offset: u64, size: u64) -> Result<Vec<u8>, Fault> {
    let part = cut(pieces, offset, size).ok_or(Fault::Damaged("a section outside of its file"))?;
    read_pieces(tree.disk, &part)
}

/// The first of `names` that an os-release(5) has.
fn value(release: &str, names: &[&str]) -> Option<String> {
    names.iter().find_map(|name| {
        let mut values = release.lines().filter_map(|line| {
            let value = line.trim().strip_prefix(name)?.strip_prefix('=')?;
            let quotes = ['"', '\''];
            Some(value.trim_matches(quotes).to_owned())
        });
        values.find(|value| !value.is_empty())
    })
}
