//! Partition tables: GPT, else MBR.
//!
//! A damaged table is not an error by itself: what is found is given, with a remark on what was wrong,
//! because the whole disk may still be a file system.

mod gpt;
mod mbr;

use crate::disk::{Disk, Fault};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    Gpt,
    Mbr,
}

impl Scheme {
    /// As GRUB names it.
    pub fn grub_name(self) -> &'static str {
        match self {
            Scheme::Gpt => "gpt",
            Scheme::Mbr => "msdos",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Partition {
    pub scheme: Scheme,
    /// From 1; logical ones of an MBR from 5.
    pub number: u32,
    /// Bytes.
    pub start: u64,
    pub size: u64,
    /// GPT: the type's GUID in lower case; MBR: the type's two hexadecimal digits.
    pub kind: String,
}

#[derive(Debug, Default)]
pub struct Table {
    pub partitions: Vec<Partition>,
    /// For people: what kind of table there is, or what is wrong with it.
    pub remark: String,
}

/// Looks for a table.
pub fn table(disk: &Disk<'_>) -> Result<Table, Fault> {
    let gpt = gpt::read(disk)?;
    if !gpt.partitions.is_empty() {
        return Ok(gpt);
    }
    let mbr = mbr::read(disk)?;
    match (gpt.remark.is_empty(), mbr.partitions.is_empty()) {
        (true, _) => Ok(mbr),
        (false, true) => Ok(gpt),
        (false, false) => Ok(Table {
            remark: format!("{}; {}", gpt.remark, mbr.remark),
            partitions: mbr.partitions,
        }),
    }
}

/// What reading past the end or a bad sector means here: nothing is there.
fn tolerate<T>(result: Result<T, Fault>) -> Result<Option<T>, Fault> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(fault) if fault.ends_the_search() => Err(fault),
        Err(_) => Ok(None),
    }
}
