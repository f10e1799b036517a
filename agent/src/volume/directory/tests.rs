//! Disks made in a real directory, from images made by hand.

use std::io::Write;

use super::*;

fn going() -> AtomicBool {
    AtomicBool::new(false)
}

#[test]
fn a_raw_image_fills_the_start_of_a_larger_sparse_disk() {
    let folder = tempfile::tempdir().unwrap();
    let mut image = tempfile::tempfile().unwrap();
    image.write_all(b"content").unwrap();
    let path = folder.path().join("root.raw");
    make(
        &path,
        Old::Keep,
        8 << 20,
        Some((image, ImageFormat::Raw)),
        &going(),
    )
    .unwrap();
    let disk = fs::read(&path).unwrap();
    assert_eq!(disk.len(), 8 << 20);
    assert!(disk.starts_with(b"content"));
    use std::os::unix::fs::MetadataExt;
    assert!(fs::metadata(&path).unwrap().blocks() * 512 < 4 << 20);
}

/// A qcow2 of one cluster of data, by hand (docs/interop/qcow2.txt).
fn qcow2(backing: u64, virtual_size: u64) -> File {
    const CLUSTER: u64 = 1 << 16;
    let mut bytes = vec![0u8; 5 * CLUSTER as usize];
    let mut put = |at: u64, value: &[u8]| {
        bytes[at as usize..at as usize + value.len()].copy_from_slice(value);
    };
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    put(8, &backing.to_be_bytes());
    put(20, &16u32.to_be_bytes()); // cluster_bits
    put(24, &virtual_size.to_be_bytes());
    put(36, &1u32.to_be_bytes()); // l1_size
    put(40, &CLUSTER.to_be_bytes()); // l1 table
    put(48, &(3 * CLUSTER).to_be_bytes()); // refcount table
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes()); // refcount_order
    put(100, &104u32.to_be_bytes()); // header_length
    put(CLUSTER, &((2 * CLUSTER) | 1 << 63).to_be_bytes());
    put(2 * CLUSTER, &((4 * CLUSTER) | 1 << 63).to_be_bytes());
    put(4 * CLUSTER, b"qcow2 content");
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    file
}

#[test]
fn a_qcow2_image_becomes_a_raw_disk_of_its_virtual_size() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("root.raw");
    make(
        &path,
        Old::Keep,
        0,
        Some((qcow2(0, 1 << 20), ImageFormat::Qcow2)),
        &going(),
    )
    .unwrap();
    let disk = fs::read(&path).unwrap();
    assert_eq!(disk.len(), 1 << 20);
    assert!(disk.starts_with(b"qcow2 content"));
}

#[test]
fn an_image_that_names_another_file_is_refused_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("root.raw");
    let image = Some((qcow2(1024, 1 << 20), ImageFormat::Qcow2));
    let error = make(&path, Old::Keep, 0, image, &going()).unwrap_err();
    assert!(error.to_string().contains("backing file"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn work_that_is_no_longer_wanted_stops_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("root.raw");
    let cancelled = AtomicBool::new(true);
    assert!(matches!(
        make(&path, Old::Keep, 4096, None, &cancelled),
        Err(VolumeError::Cancelled)
    ));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_disk_that_stands_there_is_replaced_only_when_that_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("root.raw");
    fs::write(&path, b"of a user").unwrap();
    make(&path, Old::Keep, 4096, None, &going()).unwrap();
    assert_eq!(fs::read(&path).unwrap(), b"of a user");
    make(&path, Old::Replace, 4096, None, &going()).unwrap();
    assert_eq!(fs::read(&path).unwrap(), [0; 4096]);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn a_disk_is_opened_as_it_stands_and_only_ever_made_larger() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    let length = |size| {
        let open = open_or_make(&path, size, false).unwrap();
        assert_eq!(open.file.metadata().unwrap().len(), open.bytes);
        open.bytes
    };
    assert_eq!(length(1), 4096);
    let mut content = fs::read(&path).unwrap();
    content[..7].copy_from_slice(b"content");
    fs::write(&path, &content).unwrap();
    assert_eq!((length(8192), length(4096)), (8192, 8192));
    assert!(fs::read(&path).unwrap().starts_with(b"content"));
    // Whoever may only read cannot write by the descriptor either.
    let reader = open_or_make(&path, 8192, true).unwrap();
    assert!(reader.file.set_len(0).is_err());

    delete(&path).unwrap();
    delete(&path).unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    fs::create_dir(&path).unwrap();
    let error = open_or_make(&path, 4096, false).unwrap_err().to_string();
    assert!(error.contains("disk.raw"), "{error}");
    assert!(delete(&path).is_err() && path.is_dir());
}

/// As a host that has no room for it is told of no copy, and has nothing of it.
#[test]
fn a_copy_ends_when_it_is_not_wanted_or_has_no_room_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let from = folder.path().join("root.raw");
    fs::write(&from, vec![7; 3 << 20]).unwrap();
    let to = folder.path().join("copy.raw");
    let open = || File::open(&from).unwrap();
    let cancelled = AtomicBool::new(true);
    assert!(matches!(
        copy_disk(open(), &to, &cancelled),
        Err(VolumeError::Cancelled)
    ));
    let no_room = |_: &File, at: u64| match at {
        0 => Ok(()),
        _ => Room { free: 0, total: 1 }
            .takes(1)
            .map_err(VolumeError::from),
    };
    let image = Some((open(), ImageFormat::Raw));
    let refused = make_while(&to, Old::Replace, 3 << 20, image, &no_room);
    assert!(
        matches!(refused, Err(VolumeError::NoRoom(_))),
        "{refused:?}"
    );
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    assert_eq!(copy_disk(open(), &to, &going()).unwrap(), 3 << 20);
    assert_eq!(fs::read(&to).unwrap(), fs::read(&from).unwrap());
}
