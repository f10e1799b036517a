//! Kernel and initial file systems that were found, as files that kexec takes.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;

use fractus_loader::Chosen;
use fractus_loader::config::{Part, Place};
use fractus_loader::disk::{Piece, cut};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::volumes::Origin;

/// Bytes that are copied at once.
const CHUNK: u64 = 1 << 20;

/// A file: itself where Linux has it mounted, else a copy in memory.
pub fn one(chosen: &Chosen<'_>, origins: &[Origin], place: &Place) -> Result<File, String> {
    if let (Some(Origin::Mounted(mounted)), None) = (origins.get(place.tree), place.part) {
        let tree = chosen.trees.get(place.tree).ok_or("no such tree")?;
        let node = tree.node(&place.path).map_err(|fault| fault.to_string());
        let opened = node.and_then(|node| mounted.open(node).map_err(|error| error.to_string()));
        return opened.map_err(|error| format!("{} {}: {error}", tree.name, place.path));
    }
    joined(chosen, origins, std::slice::from_ref(place))?.ok_or_else(|| "no file".to_owned())
}

/// All of them, each at a multiple of 4 bytes, as Linux wants archives.
pub fn joined(
    chosen: &Chosen<'_>,
    origins: &[Origin],
    places: &[Place],
) -> Result<Option<File>, String> {
    match places {
        [] => return Ok(None),
        [only] if only.part.is_none() && is_mounted(origins, only) => {
            return one(chosen, origins, only).map(Some);
        }
        _ => {}
    }
    let memory = memfd_create("boot", MemfdFlags::CLOEXEC);
    let mut memory = File::from(memory.map_err(|error| format!("memfd: {error}"))?);
    for place in places {
        let name = chosen.trees.get(place.tree).map_or("", |tree| &tree.name);
        append(chosen, origins, place, &mut memory)
            .map_err(|error| format!("{name} {}: {error}", place.path))?;
    }
    Ok(Some(memory))
}

fn is_mounted(origins: &[Origin], place: &Place) -> bool {
    matches!(origins.get(place.tree), Some(Origin::Mounted(_)))
}

fn append(
    chosen: &Chosen<'_>,
    origins: &[Origin],
    place: &Place,
    memory: &mut File,
) -> Result<(), String> {
    let end = memory.seek(SeekFrom::End(0)).map_err(|e| e.to_string())?;
    let begin = end.next_multiple_of(4);
    memory
        .seek(SeekFrom::Start(begin))
        .map_err(|e| e.to_string())?;
    let tree = chosen.trees.get(place.tree).ok_or("no such tree")?;
    let node = tree.node(&place.path).map_err(|fault| fault.to_string())?;
    let part = place.part.unwrap_or(Part {
        offset: 0,
        size: node.size,
    });
    match origins.get(place.tree) {
        Some(Origin::Mounted(mounted)) => {
            let copied = mounted.open(node).and_then(|mut file| {
                file.seek(SeekFrom::Start(part.offset))?;
                io::copy(&mut file.take(part.size), memory)
            });
            match copied {
                Ok(copied) if copied == part.size => Ok(()),
                Ok(_) => Err("shorter than it is said to be".to_owned()),
                Err(error) => Err(error.to_string()),
            }
        }
        Some(Origin::Device(device)) => {
            let (_, pieces) = tree
                .file(&place.path, tree.disk.limits().memory)
                .map_err(|fault| fault.to_string())?;
            let pieces = cut(&pieces, part.offset, part.size);
            let pieces = pieces.ok_or("a section outside of its file")?;
            copy_pieces(&pieces, device, memory).map_err(|error| error.to_string())
        }
        None => Err("no such tree".to_owned()),
    }
}

fn copy_pieces(pieces: &[Piece], device: &File, memory: &mut File) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK as usize];
    for piece in pieces {
        match piece {
            Piece::Disk { offset, length } => {
                let mut done = 0;
                while done < *length {
                    let take = CHUNK.min(length - done) as usize;
                    let part = buffer.get_mut(..take).unwrap_or_default();
                    device.read_exact_at(part, offset + done)?;
                    memory.write_all(part)?;
                    done += take as u64;
                }
            }
            Piece::Zero { length } => {
                let at = memory.stream_position()?;
                memory.set_len(at + length)?;
                memory.seek(SeekFrom::End(0))?;
            }
            Piece::Bytes(bytes) => memory.write_all(bytes)?,
        }
    }
    Ok(())
}
