//! The way of the tests' programs to a machine's sockets.

use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use crate::virtio::testing::DEADLINE;

/// The machine's socket, as a name that no file system has.
pub(crate) struct Entrance {
    pub(crate) listener: UnixListener,
    address: SocketAddr,
}

impl Entrance {
    pub(crate) fn new() -> Self {
        let name = format!("fractus-vsock-{}", uuid::Uuid::new_v4());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        Self {
            listener: UnixListener::bind_addr(&address).unwrap(),
            address,
        }
    }

    pub(crate) fn visit(&self, line: &str) -> UnixStream {
        let mut stream = UnixStream::connect_addr(&self.address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        stream
    }
}
