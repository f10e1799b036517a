//! The sockets of a machine that have a path: made here and handed over open, since its process has none.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::net::{bind, listen, socket_with};

use crate::paths::MachinePaths;

/// Programs that may wait at a machine's sockets before they are let in.
const BACKLOG: i32 = 128;

/// By which an agent finds the process. Bound, not listening: the process listens itself.
pub(super) fn control(path: &Path) -> io::Result<OwnedFd> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let socket = socket(SocketType::SEQPACKET)?;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// The control socket of the process that takes a machine over is in the place of the one before afterwards. May be
/// repeated.
pub(super) fn settle(paths: &MachinePaths) -> io::Result<()> {
    match std::fs::rename(paths.next_socket(), &paths.socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// To which programs of the host come that want to speak with the guest; it listens. Nobody but root may
/// connect. A socket that an earlier process has left there is replaced, nothing else is.
pub(crate) fn vsock(path: &Path) -> io::Result<OwnedFd> {
    match std::fs::symlink_metadata(path) {
        Ok(old) if old.file_type().is_socket() => std::fs::remove_file(path)?,
        Ok(_) => return Err(io::ErrorKind::AlreadyExists.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let socket = socket(SocketType::STREAM)?;
    // Before it has a name: it never is anybody else's.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind_to(&socket, path)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn bind_to(socket: &OwnedFd, path: &Path) -> io::Result<()> {
    let (folder, name) = match (SocketAddrUnix::new(path), path.parent(), path.file_name()) {
        // An address is shorter than the path of a state folder may be.
        (Err(Errno::NAMETOOLONG), Some(folder), Some(name)) => (folder, name),
        (address, ..) => return Ok(bind(socket, &address?)?),
    };
    let folder = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(folder)?;
    let folder_name = folder.as_raw_fd().to_string();
    let short = Path::new("/proc/self/fd").join(folder_name).join(name);
    Ok(bind(socket, &SocketAddrUnix::new(short)?)?)
}

fn socket(kind: SocketType) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, kind, flags, None)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_socket_of_a_guest_is_its_owners_alone_and_takes_the_place_of_a_dead_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock.sock");
        let first = vsock(&path).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
        assert_eq!(metadata.uid(), rustix::process::geteuid().as_raw());
        UnixStream::connect(&path).unwrap();
        drop(first);
        let refused = UnixStream::connect(&path).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        let _second = vsock(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn what_is_no_socket_stays_where_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        std::fs::write(&path, b"of a user").unwrap();
        let error = vsock(&path).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"of a user");
    }

    #[test]
    fn a_folders_path_may_be_longer_than_an_address() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("x".repeat(200));
        std::fs::create_dir(&deep).unwrap();
        let _socket = vsock(&deep.join("vsock.sock")).unwrap();
        assert!(deep.join("vsock.sock").exists());
    }
}
