//! TLS 1.3 records, spoken by a machine's process itself: its agent shakes hands, and lends it socket and keys.
//!
//! An agent that carries what a process says costs two copies, two sockets and as many wakings for each byte, which is most of
//! what copying a guest takes. So where nothing but a guest and its end go (no memory that follows, whose lines are agents'),
//! the processes at both ends have the connection; on the wire it is the same TLS. The keys are of this one
//! connection. A key may cover 2^24 records by AES-GCM, and its successor is the agent's secret: agents agree on ChaCha20
//! where more may go.

use std::io::{self, ErrorKind, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use aws_lc_rs::aead::{
    AES_128_GCM, AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey,
};
use fractus_vmm::stream::lane::{Connections, MOST_LANES};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use rustls::{ConnectionTrafficSecrets, ExtractedSecrets};
use serde::{Deserialize, Serialize};

/// Bytes before what a record holds: its type, version and length.
const HEAD: usize = 5;
/// Bytes in a record at most, sealed ones without their own type and tag.
const RECORD: usize = 1 << 14;
const TAG: usize = 16;
/// What a sealed one is longer by at most, padding included.
const MORE: usize = 256;
/// Bytes that are sealed for one write.
const AT_ONCE: usize = 16 * RECORD;
/// Bytes that are read at once.
const BUFFER: usize = 17 * RECORD;
/// Records that one key of AES-GCM covers (RFC 8446, 5.5: 2^24.5); of ChaCha20 more than there are numbers.
const MOST: u64 = 1 << 24;

const ALERT: u8 = 21;
const DATA: u8 = 23;
/// A warning: nothing follows.
const CLOSE: [u8; 2] = [1, 0];

/// What an agent lends of a connection, for both ways.
#[derive(Serialize, Deserialize)]
pub struct Keys {
    suite: Suite,
    sends: Way,
    receives: Way,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Suite {
    Aes128,
    Aes256,
    ChaCha20,
}

#[derive(Serialize, Deserialize)]
struct Way {
    key: Vec<u8>,
    iv: [u8; 12],
    /// The number of the next record.
    next: u64,
}

impl Way {
    fn of((next, secrets): (u64, ConnectionTrafficSecrets)) -> Option<(Suite, Way)> {
        let (suite, key, iv) = match secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (Suite::Aes128, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (Suite::Aes256, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (Suite::ChaCha20, key, iv),
            _ => return None,
        };
        let (key, iv) = (key.as_ref().to_vec(), iv.as_ref().try_into().ok()?);
        Some((suite, Way { key, iv, next }))
    }
}

impl Keys {
    /// None: of a suite that is not known here.
    pub fn of(secrets: ExtractedSecrets) -> Option<Self> {
        let (suite, sends) = Way::of(secrets.tx)?;
        let (other, receives) = Way::of(secrets.rx)?;
        (suite == other).then_some(Self {
            suite,
            sends,
            receives,
        })
    }
}

/// Tells the process at the other end of `end` by what it speaks with another: by connections of its own, the stream's and
/// then its lanes', or, without any, by `end` itself, on which the agent carries what is said.
pub fn lend(end: impl AsFd, connections: &[(BorrowedFd<'_>, &Keys)]) -> io::Result<()> {
    if connections.len() > LENT {
        return Err(ErrorKind::InvalidInput.into());
    }
    let (files, keys): (Vec<_>, Vec<_>) = connections.iter().copied().unzip();
    let keys = match &keys[..] {
        [] => Vec::new(),
        // As processes know it that take no more.
        [keys] => serde_json::to_vec(keys)?,
        keys => serde_json::to_vec(keys)?,
    };
    let length = u16::try_from(keys.len()).map_err(io::Error::other)?;
    let bytes = [&length.to_be_bytes()[..], &keys].concat();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(LENT))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(ErrorKind::InvalidInput.into());
    }
    let bytes = io::IoSlice::new(&bytes);
    // It fits: nothing was written to it before.
    sendmsg(end, &[bytes], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Connections that are lent at once, at most.
const LENT: usize = 1 + MOST_LANES;

/// By what a process speaks with another.
pub struct Connection {
    /// A stream socket, whichever its family: nobody asks for its address.
    pub socket: UnixStream,
    /// None: it says things as they are.
    pub keys: Option<Keys>,
    /// The agent's, of one that was lent: for who is to end with it.
    pub leash: Option<UnixStream>,
    /// What else it has been lent, for memory alone.
    pub lanes: Vec<(UnixStream, Keys)>,
}

impl Connection {
    pub fn plain(socket: UnixStream) -> Self {
        Self {
            socket,
            keys: None,
            leash: None,
            lanes: Vec::new(),
        }
    }

    /// What is said by them; `made` of each socket, the stream's first.
    pub fn sealed<S: AsFd>(
        self,
        mut made: impl FnMut(UnixStream) -> S,
    ) -> io::Result<Connections<Sealed<S>>> {
        let main = Sealed::new(made(self.socket), self.keys.as_ref())?;
        let lanes = self.lanes.into_iter();
        let lanes = lanes.map(|(socket, keys)| Sealed::new(made(socket), Some(&keys)));
        let lanes = lanes.collect::<io::Result<_>>()?;
        Ok(Connections { main, lanes })
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Lent {
    One(Keys),
    Several(Vec<Keys>),
}

/// Waits for what [`lend`] tells, on a socket that blocks or has it.
///
/// # Errors
/// It is gone, or says something else.
pub fn borrow(end: UnixStream) -> io::Result<Connection> {
    let (mut length, mut sockets) = ([0; 2], Vec::new());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(LENT))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [io::IoSliceMut::new(&mut length)];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::WAITALL;
    let received = loop {
        match recvmsg(&end, &mut into, &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            received => break received?,
        }
    };
    if received.bytes != length.len() {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(files) = message {
            sockets.extend(files.map(UnixStream::from));
        }
    }
    let mut keys = vec![0; usize::from(u16::from_be_bytes(length))];
    (&end).read_exact(&mut keys)?;
    if sockets.is_empty() && keys.is_empty() {
        return Ok(Connection::plain(end));
    }
    let keys = match serde_json::from_slice(&keys)? {
        Lent::One(keys) => vec![keys],
        Lent::Several(keys) => keys,
    };
    if keys.len() != sockets.len() {
        return Err(ErrorKind::InvalidData.into());
    }
    let mut lanes = sockets.into_iter().zip(keys);
    let (socket, keys) = lanes.next().ok_or(ErrorKind::InvalidData)?;
    Ok(Connection {
        socket,
        keys: Some(keys),
        leash: Some(end),
        lanes: lanes.collect(),
    })
}

/// A connection that ends with the agent which lent it: the guest that comes by it could not go on without that.
pub struct Leashed {
    socket: UnixStream,
    leash: Option<UnixStream>,
}

impl Leashed {
    /// Waits until there is something to be read, or not at all; an error: the agent has let go.
    fn holds(&self, waits: bool) -> io::Result<()> {
        let Some(leash) = &self.leash else {
            return Ok(());
        };
        loop {
            let mut fds = [
                PollFd::new(leash, PollFlags::IN),
                PollFd::new(&self.socket, PollFlags::IN),
            ];
            let polled = match waits {
                true => poll(&mut fds, None),
                false => poll(&mut fds, Some(&Timespec::default())),
            };
            let [leash, socket] = &fds;
            match polled {
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok(_) if !leash.revents().is_empty() => {
                    let text = "the agent that awaits the guest is gone";
                    return Err(io::Error::new(ErrorKind::ConnectionAborted, text));
                }
                Ok(_) if waits && socket.revents().is_empty() => {}
                Ok(_) => return Ok(()),
            }
        }
    }
}

impl Read for Leashed {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.holds(true)?;
        self.socket.read(bytes)
    }
}

impl Write for Leashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.holds(false)?;
        self.socket.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

impl AsFd for Leashed {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// By which a guest comes to a process that waits for it.
pub fn arrival(mut connection: Connection) -> io::Result<Connections<Sealed<Leashed>>> {
    // With the stream its lanes end.
    let mut leash = connection.leash.take();
    connection.sealed(|socket| Leashed {
        socket,
        leash: leash.take(),
    })
}

/// A connection as it is, or one by which records are spoken. What is written may wait until it is flushed.
pub struct Sealed<S: AsFd> {
    socket: S,
    records: Option<Box<Records>>,
}

struct Records {
    sends: Half,
    receives: Half,
    /// Waits for more, or to be flushed: less than a record.
    held: Vec<u8>,
    /// Sealed, for one write.
    out: Vec<u8>,
    /// What came: of it `at..filled` is sealed yet, and `plain` is to be read.
    buffer: Box<[u8]>,
    at: usize,
    filled: usize,
    plain: std::ops::Range<usize>,
    /// The other side has said that nothing follows.
    ended: bool,
    /// A write failed within a record.
    broken: bool,
}

struct Half {
    key: LessSafeKey,
    iv: [u8; 12],
    next: u64,
    most: u64,
}

impl Half {
    fn new(suite: Suite, way: &Way) -> io::Result<Self> {
        let algorithm = match suite {
            Suite::Aes128 => &AES_128_GCM,
            Suite::Aes256 => &AES_256_GCM,
            Suite::ChaCha20 => &CHACHA20_POLY1305,
        };
        let key = UnboundKey::new(algorithm, &way.key).map_err(io::Error::other)?;
        Ok(Half {
            key: LessSafeKey::new(key),
            iv: way.iv,
            next: way.next,
            most: match suite {
                Suite::Aes128 | Suite::Aes256 => MOST,
                Suite::ChaCha20 => u64::MAX,
            },
        })
    }

    /// Of the next record.
    fn nonce(&mut self) -> io::Result<Nonce> {
        if self.next >= self.most {
            return Err(io::Error::other("more records than one key may cover"));
        }
        let mut nonce = self.iv;
        for (byte, number) in nonce.iter_mut().skip(4).zip(self.next.to_be_bytes()) {
            *byte ^= number;
        }
        self.next += 1;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

fn head(length: usize) -> [u8; HEAD] {
    // At most a record's.
    let [high, low] = (length as u16).to_be_bytes();
    [DATA, 3, 3, high, low]
}

fn garbled(what: &'static str) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what)
}

impl Records {
    fn new(keys: &Keys) -> io::Result<Self> {
        Ok(Records {
            sends: Half::new(keys.suite, &keys.sends)?,
            receives: Half::new(keys.suite, &keys.receives)?,
            held: Vec::new(),
            out: Vec::new(),
            buffer: vec![0; BUFFER].into(),
            at: 0,
            filled: 0,
            plain: 0..0,
            ended: false,
            broken: false,
        })
    }

    /// Seals what is held, and `bytes` behind it.
    fn seal(&mut self, kind: u8, bytes: &[u8]) -> io::Result<()> {
        let (mut held, mut rest) = (std::mem::take(&mut self.held), bytes);
        let mut whole = &held[..];
        while !whole.is_empty() || !rest.is_empty() {
            let (one, behind) = whole.split_at(whole.len().min(RECORD));
            let (two, after) = rest.split_at(rest.len().min(RECORD - one.len()));
            (whole, rest) = (behind, after);
            let head = head(one.len() + two.len() + 1 + TAG);
            let nonce = self.sends.nonce()?;
            self.out.extend_from_slice(&head);
            let start = self.out.len();
            self.out.extend_from_slice(one);
            self.out.extend_from_slice(two);
            self.out.push(kind);
            let content = self.out.get_mut(start..).unwrap_or_default();
            let key = &self.sends.key;
            let tag = key.seal_in_place_separate_tag(nonce, Aad::from(head), content);
            let tag = tag.map_err(io::Error::other)?;
            self.out.extend_from_slice(tag.as_ref());
        }
        held.clear();
        self.held = held;
        Ok(())
    }

    /// Writes what is sealed.
    fn send(&mut self, socket: &mut impl Write) -> io::Result<()> {
        let written = socket.write_all(&self.out);
        self.out.clear();
        self.broken |= written.is_err();
        written
    }

    /// Opens the record at hand; false: not all of it has come.
    fn open(&mut self) -> io::Result<bool> {
        let sealed = self
            .buffer
            .get_mut(self.at..self.filled)
            .unwrap_or_default();
        let Some((head, rest)) = sealed.split_first_chunk_mut::<HEAD>() else {
            return Ok(false);
        };
        let [kind, _, _, high, low] = *head;
        let length = usize::from(u16::from_be_bytes([high, low]));
        if kind != DATA || !(TAG + 1..=RECORD + MORE).contains(&length) {
            return Err(garbled("a record that should not come"));
        }
        let Some(record) = rest.get_mut(..length) else {
            return Ok(false);
        };
        let nonce = self.receives.nonce()?;
        let opened = self
            .receives
            .key
            .open_in_place(nonce, Aad::from(*head), record);
        let content =
            opened.map_err(|_| garbled("a record that was not sealed by the other side"))?;
        // Behind it stand its kind, and zeros.
        let end = content.iter().rposition(|byte| *byte != 0);
        let end = end.ok_or_else(|| garbled("a record without a type"))?;
        let (start, kind) = (self.at + HEAD, content.get(end).copied());
        self.at += HEAD + length;
        match kind {
            Some(DATA) => self.plain = start..start + end,
            Some(ALERT) => {
                self.ended = self.buffer.get(start..start + end) == Some(&CLOSE);
                if !self.ended {
                    return Err(garbled("the other side's TLS has failed"));
                }
            }
            _ => return Err(garbled("a record that should not come")),
        }
        Ok(true)
    }

    /// Until there is something to be read; false: nothing follows.
    fn fill(&mut self, socket: &mut impl Read) -> io::Result<bool> {
        while self.plain.is_empty() {
            if self.ended {
                return Ok(false);
            }
            if self.open()? {
                continue;
            }
            self.buffer.copy_within(self.at..self.filled, 0);
            (self.filled, self.at) = (self.filled - self.at, 0);
            let room = self.buffer.get_mut(self.filled..).unwrap_or_default();
            match socket.read(room)? {
                0 if self.filled == 0 => return Ok(false),
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                read => self.filled += read,
            }
        }
        Ok(true)
    }
}

impl<S: AsFd> Sealed<S> {
    pub fn new(socket: S, keys: Option<&Keys>) -> io::Result<Self> {
        let records = keys.map(Records::new).transpose()?.map(Box::new);
        Ok(Sealed { socket, records })
    }

    /// As it is.
    pub fn plain(socket: S) -> Self {
        Sealed {
            socket,
            records: None,
        }
    }

    pub fn is_sealed(&self) -> bool {
        self.records.is_some()
    }

    pub fn socket(&mut self) -> &mut S {
        &mut self.socket
    }
}

impl<S: AsFd + Write> Write for Sealed<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(records) = &mut self.records else {
            return self.socket.write(bytes);
        };
        if records.held.len() + bytes.len() < RECORD {
            records.held.extend_from_slice(bytes);
            return Ok(bytes.len());
        }
        let now = bytes.get(..AT_ONCE).unwrap_or(bytes);
        records.seal(DATA, now)?;
        records.send(&mut self.socket)?;
        Ok(now.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if let Some(records) = &mut self.records {
            records.seal(DATA, b"")?;
            records.send(&mut self.socket)?;
        }
        self.socket.flush()
    }
}

impl<S: AsFd + Read> Read for Sealed<S> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let Some(records) = &mut self.records else {
            return self.socket.read(bytes);
        };
        if !records.fill(&mut self.socket)? {
            return Ok(0);
        }
        let plain = records
            .buffer
            .get(records.plain.clone())
            .unwrap_or_default();
        let length = plain.len().min(bytes.len());
        if let (Some(into), Some(from)) = (bytes.get_mut(..length), plain.get(..length)) {
            into.copy_from_slice(from);
        }
        records.plain.start += length;
        Ok(length)
    }
}

impl<S: AsFd> AsFd for Sealed<S> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The other side's TLS hears that nothing follows, if there is room for that.
impl<S: AsFd> Drop for Sealed<S> {
    fn drop(&mut self) {
        let Some(records) = self.records.as_mut().filter(|records| !records.broken) else {
            return;
        };
        let said = records
            .seal(DATA, b"")
            .and_then(|()| records.seal(ALERT, &CLOSE));
        if said.is_ok() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let _ = rustix::net::send(&self.socket, &records.out, flags);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// For the two ends of a connection.
    fn keys(suite: Suite, next: u64) -> [Keys; 2] {
        let bytes = match suite {
            Suite::Aes128 => 16,
            Suite::Aes256 | Suite::ChaCha20 => 32,
        };
        let way = |seed: u8| Way {
            key: (0..bytes).map(|at| at ^ seed).collect(),
            iv: [seed; 12],
            next,
        };
        let of = |sends, receives| Keys {
            suite,
            sends: way(sends),
            receives: way(receives),
        };
        [of(1, 2), of(2, 1)]
    }

    fn ends(suite: Suite, next: u64) -> [Sealed<UnixStream>; 2] {
        let (near, far) = UnixStream::pair().unwrap();
        let [one, other] = keys(suite, next);
        [(near, one), (far, other)].map(|(socket, keys)| Sealed::new(socket, Some(&keys)).unwrap())
    }

    /// What goes over the wire, as it is.
    fn tapped(suite: Suite) -> (Sealed<UnixStream>, UnixStream, Keys) {
        let (near, far) = UnixStream::pair().unwrap();
        let [one, other] = keys(suite, 0);
        (Sealed::new(near, Some(&one)).unwrap(), far, other)
    }

    const SUITES: [Suite; 3] = [Suite::Aes128, Suite::Aes256, Suite::ChaCha20];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn what_one_says_the_other_hears(
            sizes in prop::collection::vec((0..80_000usize, any::<bool>()), 1..8),
            reads in 1..40_000usize,
            suite in 0..3usize,
        ) {
            let [mut one, mut other] = ends(SUITES[suite], 7);
            let all: usize = sizes.iter().map(|(size, _)| size).sum();
            let byte = |at: usize| (at / 3) as u8;
            let writes = std::thread::spawn(move || {
                let mut at = 0;
                for (size, flush) in sizes {
                    let bytes: Vec<u8> = (at..at + size).map(byte).collect();
                    one.write_all(&bytes).unwrap();
                    at += size;
                    if flush {
                        one.flush().unwrap();
                    }
                }
                one.flush().unwrap();
                // The last word is the other one's.
                let mut answer = [0; 4];
                one.read_exact(&mut answer).unwrap();
                assert_eq!(&answer, b"done");
                one
            });
            let (mut heard, mut piece) = (Vec::new(), vec![0; reads]);
            while heard.len() < all {
                let read = other.read(&mut piece).unwrap();
                assert!(read > 0);
                heard.extend_from_slice(&piece[..read]);
            }
            prop_assert!(heard.iter().enumerate().all(|(at, is)| *is == byte(at)));
            other.write_all(b"done").unwrap();
            other.flush().unwrap();
            drop(writes.join().unwrap());
            prop_assert_eq!(other.read(&mut piece).unwrap(), 0, "it has said that nothing follows");
        }

        /// Nothing that somebody else has touched is believed.
        #[test]
        fn a_flipped_bit_is_found_and_so_is_an_end_within_a_record(at in 0..200usize, bit in 0..8u32, cut in any::<bool>()) {
            let (mut near, mut far, keys) = tapped(Suite::Aes256);
            near.write_all(&[5; 150]).unwrap();
            near.flush().unwrap();
            let mut record = vec![0; HEAD + 150 + 1 + TAG];
            far.read_exact(&mut record).unwrap();
            let at = at % record.len();
            match cut {
                true => record.truncate(at),
                // The version counts for the seal as well.
                false => record[at] ^= 1 << bit,
            }
            let (mut wire, end) = UnixStream::pair().unwrap();
            wire.write_all(&record).unwrap();
            drop(wire);
            let mut reads = Sealed::new(end, Some(&keys)).unwrap();
            let heard = reads.read(&mut [0; 200]);
            match cut && at == 0 {
                true => prop_assert_eq!(heard.unwrap(), 0),
                false => prop_assert!(heard.is_err(), "{:?}", heard),
            }
        }
    }

    #[test]
    fn little_is_held_until_it_is_flushed() {
        let (mut near, far, _) = tapped(Suite::Aes128);
        far.set_nonblocking(true).unwrap();
        let nothing = |far: &UnixStream| {
            let read = (&*far).read(&mut [0; 8]);
            assert_eq!(read.unwrap_err().kind(), ErrorKind::WouldBlock);
        };
        near.flush().unwrap();
        near.write_all(b"little").unwrap();
        nothing(&far);
        near.flush().unwrap();
        let mut record = [0; HEAD + 6 + 1 + TAG];
        (&far).read_exact(&mut record).unwrap();
        nothing(&far);
    }

    #[test]
    fn a_key_covers_so_many_records_and_no_more() {
        let [mut one, mut other] = ends(Suite::Aes256, MOST - 1);
        one.write_all(b"the last").unwrap();
        one.flush().unwrap();
        let mut heard = [0; 8];
        other.read_exact(&mut heard).unwrap();
        one.write_all(b"one more").unwrap();
        assert!(one.flush().is_err());
        let [mut one, _other] = ends(Suite::ChaCha20, MOST);
        one.write_all(b"one more").unwrap();
        one.flush().unwrap();
    }

    #[test]
    fn a_connection_is_lent_with_its_keys_or_carried() {
        let pair = || UnixStream::pair().unwrap();
        let ((ours, theirs), (tcp, mut peer)) = (pair(), pair());
        let [keys, others] = keys(Suite::Aes256, 3);
        lend(&ours, &[(tcp.as_fd(), &keys)]).unwrap();
        drop((ours, tcp));
        let lent = borrow(theirs).unwrap();
        let mut sealed = Sealed::new(lent.socket, lent.keys.as_ref()).unwrap();
        assert!(sealed.is_sealed());
        sealed.write_all(b"by the other's").unwrap();
        drop(sealed);
        let mut reads = Sealed::new(peer.try_clone().unwrap(), Some(&others)).unwrap();
        let mut heard = String::new();
        reads.read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "by the other's");
        assert_eq!(peer.read(&mut [0]).unwrap(), 0);

        let (mut ours, theirs) = pair();
        lend(&ours, &[]).unwrap();
        ours.write_all(b"as it is").unwrap();
        drop(ours);
        let carried = borrow(theirs).unwrap();
        assert!(carried.keys.is_none() && carried.lanes.is_empty());
        let mut heard = String::new();
        (&carried.socket).read_to_string(&mut heard).unwrap();
        assert_eq!(heard, "as it is");

        let (ours, theirs) = pair();
        drop(ours);
        assert!(borrow(theirs).is_err());
    }

    #[test]
    fn a_guest_that_comes_does_not_outlive_its_agents_interest() {
        let pair = || UnixStream::pair().unwrap();
        let ((ours, theirs), (tcp, peer)) = (pair(), pair());
        let [keys, others] = keys(Suite::Aes128, 0);
        lend(&ours, &[(tcp.as_fd(), &keys)]).unwrap();
        drop(tcp);
        let mut arrives = arrival(borrow(theirs).unwrap()).unwrap().main;
        let mut source = Sealed::new(peer, Some(&others)).unwrap();
        source.write_all(b"memory").unwrap();
        source.flush().unwrap();
        arrives.read_exact(&mut [0; 6]).unwrap();
        let waits = std::thread::spawn(move || {
            let error = arrives.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionAborted);
            arrives.write_all(b"it is here").unwrap();
            assert!(arrives.flush().is_err(), "nobody awaits it");
        });
        drop(ours);
        waits.join().unwrap();
        let mut heard = Vec::new();
        source.read_to_end(&mut heard).unwrap();
        assert_eq!(heard, b"");
    }

    #[test]
    fn lanes_are_lent_with_their_keys_in_their_order() {
        let pair = || UnixStream::pair().unwrap();
        let (ours, theirs) = pair();
        let all: Vec<_> = (0..LENT as u64)
            .map(|number| (pair(), keys(Suite::Aes256, number)))
            .collect();
        let lent: Vec<_> = (all.iter())
            .map(|((near, _), [keys, _])| (near.as_fd(), keys))
            .collect();
        lend(&ours, &lent).unwrap();
        let more = [&lent[..], &lent[..1]].concat();
        assert!(lend(&ours, &more).is_err());
        let connections = borrow(theirs).unwrap().sealed(|socket| socket).unwrap();
        assert_eq!(connections.lanes.len(), MOST_LANES);
        let near = std::iter::once(connections.main).chain(connections.lanes);
        for (number, (mut near, ((_, far), [_, others]))) in near.zip(all).enumerate() {
            near.write_all(&[number as u8]).unwrap();
            near.flush().unwrap();
            let mut heard = [0];
            let mut far = Sealed::new(far, Some(&others)).unwrap();
            far.read_exact(&mut heard).unwrap();
            assert_eq!(usize::from(heard[0]), number);
        }
    }
}
