//! What the writer makes, read back by programs that others wrote, and byte by byte.

use std::process::Command;

use super::*;

fn files() -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for version in ["2012-08-10", "latest"] {
        let folder = format!("openstack/{version}");
        files.insert(
            format!("{folder}/meta_data.json"),
            b"{\"uuid\": 1}".to_vec(),
        );
        files.insert(format!("{folder}/user_data"), vec![b'#'; 5000]);
    }
    files.insert("openstack/content/0000".to_owned(), Vec::new());
    files.insert("ec2/latest/meta-data.json".to_owned(), b"{}".to_vec());
    // Enough for a second block of records.
    for number in 0..60 {
        let path = format!("many/a-name-of-some-length-{number:03}.json");
        files.insert(path, vec![number; 10]);
    }
    files
}

/// A reader of its own, by the standard: every file below the folder at `extent`, by its path.
/// `joliet`: names are in UCS-2, else in Rock Ridge's NM.
fn walk(
    iso: &[u8],
    extent: (usize, usize),
    joliet: bool,
    above: &str,
    found: &mut BTreeMap<String, Vec<u8>>,
) {
    let records = &iso[extent.0 * 2048..][..extent.1];
    let mut at = 0;
    let mut last = Vec::new();
    while at < records.len() {
        let length = usize::from(records[at]);
        if length == 0 {
            at = (at + 1).next_multiple_of(2048);
            continue;
        }
        assert!(
            at / 2048 == (at + length - 1) / 2048,
            "a record crosses a block"
        );
        let record = &records[at..at + length];
        at += length;
        let number = |at: usize| {
            let little = u32::from_le_bytes(record[at..at + 4].try_into().unwrap());
            let big = u32::from_be_bytes(record[at + 4..at + 8].try_into().unwrap());
            assert_eq!(little, big);
            little as usize
        };
        let (extent, is_folder) = ((number(2), number(10)), record[25] & 2 != 0);
        let plain = &record[33..33 + usize::from(record[32])];
        if plain == [0] || plain == [1] {
            continue;
        }
        assert!(last.as_slice() < plain, "records are in order");
        last = plain.to_vec();
        let name = if joliet {
            let units = plain
                .chunks_exact(2)
                .map(|two| u16::from_be_bytes([two[0], two[1]]));
            let name: String = char::decode_utf16(units).map(Result::unwrap).collect();
            name.trim_end_matches(";1").to_owned()
        } else {
            let mut fields = &record[(33 + plain.len()).next_multiple_of(2)..];
            loop {
                let field = &fields[..usize::from(fields[2])];
                if field.starts_with(b"NM") {
                    break String::from_utf8(field[5..].to_vec()).unwrap();
                }
                fields = &fields[field.len()..];
            }
        };
        let path = format!("{above}{name}");
        if is_folder {
            walk(iso, extent, joliet, &format!("{path}/"), found);
        } else {
            found.insert(path, iso[extent.0 * 2048..][..extent.1].to_vec());
        }
    }
}

fn found(joliet: bool) -> BTreeMap<String, Vec<u8>> {
    let iso = image("config-2", &files(), 1_800_000_000).unwrap();
    let descriptor = &iso[if joliet { 17 } else { 16 } * 2048..][..2048];
    assert_eq!(descriptor[0], if joliet { 2 } else { 1 });
    assert_eq!(&descriptor[1..6], b"CD001");
    let four = |at: usize| u32::from_le_bytes(descriptor[at..at + 4].try_into().unwrap()) as usize;
    assert_eq!(four(80) * 2048, iso.len());
    let mut found = BTreeMap::new();
    walk(&iso, (four(158), four(166)), joliet, "", &mut found);
    found
}

#[test]
fn every_file_is_found_by_rock_ridge() {
    assert_eq!(found(false), files());
}

#[test]
fn every_file_is_found_by_joliet() {
    assert_eq!(found(true), files());
}

#[test]
fn the_label_is_what_cloud_init_looks_for() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), image("config-2", &files(), 0).unwrap()).unwrap();
    let blkid = Command::new("blkid")
        .arg("-p")
        .arg(file.path())
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&blkid.stdout).into_owned();
    assert!(words.contains(" LABEL=\"config-2\""), "{words}");
    assert!(words.contains(" TYPE=\"iso9660\""), "{words}");
}

#[test]
fn the_same_content_is_there_once() {
    let mut files = BTreeMap::new();
    for number in 0..10 {
        files.insert(format!("f{number}"), vec![7; 100_000]);
    }
    assert!(image("x", &files, 0).unwrap().len() < 200_000);
}

#[test]
fn paths_that_lead_elsewhere_are_refused() {
    for path in ["", "/a", "a//b", "../a", "a/./b", "a b", &"n".repeat(65)] {
        let files = BTreeMap::from([(path.to_owned(), Vec::new())]);
        assert_eq!(image("x", &files, 0), Err(IsoError::Path(path.to_owned())));
    }
    let clash = BTreeMap::from([("a".to_owned(), vec![]), ("a/b".to_owned(), vec![])]);
    assert_eq!(image("x", &clash, 0), Err(IsoError::Path("a/b".to_owned())));
}
