//! The packets of virtio-vsock (virtio 1.2 §5.10.6): a header, and the bytes of a stream behind it.

/// Bytes of struct virtio_vsock_hdr.
pub const HEADER: usize = 44;
/// The host's context id.
pub const HOST: u64 = 2;
/// VIRTIO_VSOCK_TYPE_STREAM, the only kind of socket here.
pub const STREAM: u16 = 1;

/// Flags of [`Operation::Shutdown`] (§5.10.6.6.1): the sender receives no more, sends no more.
pub const NO_RECEIVE: u32 = 1;
pub const NO_SEND: u32 = 2;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Operation {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Operation {
    /// None of a number that means nothing.
    pub fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Operation::Request,
            2 => Operation::Response,
            3 => Operation::Reset,
            4 => Operation::Shutdown,
            5 => Operation::Data,
            6 => Operation::CreditUpdate,
            7 => Operation::CreditRequest,
            _ => return None,
        })
    }
}

/// One end of a connection on each side; the context ids are always the guest's and the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ports {
    pub host: u32,
    pub guest: u32,
}

/// struct virtio_vsock_hdr, numbers as they stand there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    pub source_cid: u64,
    pub destination_cid: u64,
    pub source_port: u32,
    pub destination_port: u32,
    /// Bytes behind the header.
    pub length: u32,
    pub kind: u16,
    pub operation: u16,
    pub flags: u32,
    /// Bytes that the sender can hold of this connection.
    pub buffer: u32,
    /// Bytes of it that the sender has passed on, since the connection began (it wraps).
    pub forwarded: u32,
}

impl Header {
    pub fn from_bytes(bytes: &[u8; HEADER]) -> Self {
        let part = |at: usize, length: usize| {
            let mut word = [0; 8];
            word[..length].copy_from_slice(&bytes[at..at + length]);
            u64::from_le_bytes(word)
        };
        Self {
            source_cid: part(0, 8),
            destination_cid: part(8, 8),
            source_port: part(16, 4) as u32,
            destination_port: part(20, 4) as u32,
            length: part(24, 4) as u32,
            kind: part(28, 2) as u16,
            operation: part(30, 2) as u16,
            flags: part(32, 4) as u32,
            buffer: part(36, 4) as u32,
            forwarded: part(40, 4) as u32,
        }
    }

    pub fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
        put(0, &self.source_cid.to_le_bytes());
        put(8, &self.destination_cid.to_le_bytes());
        put(16, &self.source_port.to_le_bytes());
        put(20, &self.destination_port.to_le_bytes());
        put(24, &self.length.to_le_bytes());
        put(28, &self.kind.to_le_bytes());
        put(30, &self.operation.to_le_bytes());
        put(32, &self.flags.to_le_bytes());
        put(36, &self.buffer.to_le_bytes());
        put(40, &self.forwarded.to_le_bytes());
        bytes
    }

    /// A packet from the host's port to the guest's, without bytes behind it.
    pub fn to_guest(cid: u64, ports: Ports, operation: Operation) -> Self {
        Self {
            source_cid: HOST,
            destination_cid: cid,
            source_port: ports.host,
            destination_port: ports.guest,
            kind: STREAM,
            operation: operation as u16,
            ..Self::default()
        }
    }

    /// The connection that a packet of the guest belongs to.
    pub fn ports(&self) -> Ports {
        Ports {
            host: self.destination_port,
            guest: self.source_port,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_header_is_what_was_written(bytes in any::<[u8; 32]>(), rest in any::<[u8; 12]>()) {
            let mut all = [0; HEADER];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&rest);
            prop_assert_eq!(Header::from_bytes(&all).bytes(), all);
        }
    }

    #[test]
    fn fields_lie_where_the_standard_puts_them() {
        let ports = Ports {
            host: 0x0102,
            guest: 0x0304,
        };
        let bytes = Header::to_guest(3, ports, Operation::Shutdown).bytes();
        assert_eq!((bytes[0], bytes[8]), (2, 3));
        assert_eq!((&bytes[16..18], &bytes[20..22]), (&[2, 1][..], &[4, 3][..]));
        assert_eq!((bytes[28], bytes[30]), (1, 4));
    }
}
