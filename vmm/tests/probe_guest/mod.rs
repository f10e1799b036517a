//! The probe as a guest under test: boots it on this host's KVM, talks with it over the serial line,
//! and carries out what it asks of its machine meanwhile. What it says is written to the test's
//! output, where it is seen when the test fails.

#![allow(dead_code, reason = "each test file uses its part")]

pub mod wire;

use std::collections::{HashMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use fractus_vmm::config::{
    ConsoleFiles, ConsolePortConfig, DiskConfig, MachineConfig, MachineFiles, NetConfig, NetFiles,
    RngConfig, VsockConfig,
};
use fractus_vmm::machine::{
    self, Arrived, Event, Handed, Handing, HandingStep, HostFiles, Inheritance, Landing, Loading,
    Luggage, Machine, MigrationError, Offered, Progress, Sender, StopReason, Unsent,
};
use fractus_vmm::memory::Faults;
use fractus_vmm::stream::converge::Policy;
use fractus_vmm::stream::lane::Connections;
use fractus_vmm::stream::snapshot::Snapshot;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// For anything that a healthy guest does at once, on a machine that is busy with other tests.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The probe image: of FRACTUS_PROBE, else built now (a matter of milliseconds when it is there).
pub fn image() -> PathBuf {
    if let Some(path) = std::env::var_os("FRACTUS_PROBE") {
        return path.into();
    }
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../images/probe/build.sh");
    let output = Command::new(script)
        .output()
        .expect("run images/probe/build.sh");
    assert!(
        output.status.success(),
        "images/probe/build.sh: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout)
        .expect("a path")
        .trim_end()
        .into()
}

/// A machine to be: config and files grow together.
pub struct Setup {
    pub config: MachineConfig,
    files: MachineFiles,
    serial: UnixStream,
    ports: Vec<UnixStream>,
}

impl Setup {
    /// One vCPU, 64 MiB, the serial line, an entropy device. Fails without /dev/kvm: these tests are
    /// about it.
    pub fn new() -> Self {
        let (serial, end) = UnixStream::pair().expect("a socket pair");
        let mut config = MachineConfig::minimal(64 << 20);
        config.command_line = "tick_ms=0".to_owned();
        config.rng = Some(RngConfig::default());
        let files = MachineFiles {
            kvm: open_kvm(),
            kernel: Some(File::open(image()).expect("the probe image")),
            initrd: None,
            fallback: None,
            disks: Vec::new(),
            serial: both_ways(&end),
            console_ports: Vec::new(),
            nets: Vec::new(),
            vsock: None,
        };
        Self {
            config,
            files,
            serial,
            ports: Vec::new(),
        }
    }

    pub fn cpus(mut self, count: u8) -> Self {
        self.config.cpus.count = count;
        self
    }

    pub fn memory_mib(mut self, mib: u64) -> Self {
        self.config.memory.bytes = mib << 20;
        self
    }

    pub fn command_line(mut self, text: &str) -> Self {
        self.config.command_line = text.to_owned();
        self
    }

    /// A disk on `file`; the rest of its config by `adjust`.
    pub fn disk(mut self, file: &File, adjust: impl FnOnce(&mut DiskConfig)) -> Self {
        let mut disk = DiskConfig {
            read_only: false,
            serial_number: String::new(),
            direct: false,
            limit: None,
            queues: 1,
        };
        adjust(&mut disk);
        self.config.disks.push(disk);
        self.files
            .disks
            .push(file.try_clone().expect("duplicate a disk"));
        self
    }

    pub fn net(mut self, config: NetConfig, files: NetFiles) -> Self {
        self.config.nets.push(config);
        self.files.nets.push(files);
        self
    }

    /// Sockets, to which programs come by `listener`.
    pub fn vsock(mut self, cid: u32, listener: &UnixListener) -> Self {
        self.config.vsock = Some(VsockConfig { cid });
        self.files.vsock = Some(duplicate(listener).into());
        self
    }

    pub fn console_port(mut self, name: &str) -> Self {
        let (near, far) = UnixStream::pair().expect("a socket pair");
        self.config.console_ports.push(ConsolePortConfig {
            name: name.to_owned(),
            console: true,
        });
        self.files.console_ports.push(both_ways(&far));
        self.ports.push(near);
        self
    }

    /// Builds and starts it, and waits for the line that ends its boot.
    pub fn boot(self) -> Guest {
        let mut guest = self.start();
        guest.booted();
        guest
    }

    /// Why it cannot be built, with all causes.
    pub fn refused(self) -> String {
        let built = Machine::build(self.config, self.files, None);
        let error = built.err().expect("it is refused");
        format!("{:#}", anyhow::Error::from(error))
    }

    /// For a machine that boots from a disk.
    pub fn without_kernel(mut self) -> Self {
        self.files.kernel = None;
        self
    }

    pub fn build(self) -> Machine {
        Machine::build(self.config, self.files, None).expect("build the machine")
    }

    pub fn start(self) -> Guest {
        let nets = self.files.nets.iter().map(duplicate_net).collect();
        let vsock = self
            .files
            .vsock
            .as_ref()
            .map(|fd| fd.try_clone().expect("duplicate a socket"));
        let mut machine = Machine::build(self.config, self.files, None).expect("build the machine");
        machine.start().expect("start the machine");
        self.serial.set_nonblocking(true).expect("fcntl");
        Guest {
            machine,
            serial: self.serial,
            ports: self.ports,
            nets,
            vsock: vsock.map(UnixListener::from),
            partial: Vec::new(),
            lines: VecDeque::new(),
            events: VecDeque::new(),
        }
    }
}

fn open_kvm() -> OwnedFd {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    kvm.expect("open /dev/kvm: the probe tests need it").into()
}

fn duplicate(listener: &UnixListener) -> UnixListener {
    listener.try_clone().expect("duplicate a socket")
}

fn duplicate_net(net: &NetFiles) -> NetFiles {
    let duplicate = |tap: &File| tap.try_clone().expect("duplicate a tap");
    let taps = net.taps.iter().map(duplicate).collect();
    NetFiles {
        taps,
        vhost: Vec::new(),
    }
}

fn both_ways(end: &UnixStream) -> ConsoleFiles {
    let duplicate = || {
        Some(
            end.as_fd()
                .try_clone_to_owned()
                .expect("duplicate a socket"),
        )
    };
    ConsoleFiles {
        output: duplicate(),
        input: duplicate(),
    }
}

/// What a machine that goes on where another was needs of its host.
fn files_again(
    nets: &[NetFiles],
    vsock: Option<&UnixListener>,
    disks: &[&File],
    end: &UnixStream,
) -> MachineFiles {
    MachineFiles {
        kvm: open_kvm(),
        kernel: Some(File::open(image()).expect("the probe image")),
        initrd: None,
        fallback: None,
        disks: disks
            .iter()
            .map(|disk| disk.try_clone().expect("duplicate a disk"))
            .collect(),
        serial: both_ways(end),
        console_ports: Vec::new(),
        nets: nets.iter().map(duplicate_net).collect(),
        vsock: vsock.map(|listener| duplicate(listener).into()),
    }
}

/// What a machine's owner keeps with it.
const OWNER: &[u8] = b"its owner's";

/// The disks that a guest finds on its new machine.
#[derive(Clone, Copy)]
pub enum Disks<'a> {
    /// Those that it has.
    Shared(&'a [&'a File]),
    /// Others, which get the content of those, and may have so many bytes at most.
    Go(&'a [&'a File], u64),
}

type Land = Box<dyn FnOnce(&[u8]) -> Result<Landing, String> + Send>;

/// What came of sending a guest.
pub struct Sent<N> {
    pub offer: Result<Offered<N>, Unsent>,
    pub arrival: Result<Arrived, MigrationError>,
    /// The guest of a machine that was taken back, or not sent.
    pub here: Box<dyn FnOnce(Machine) -> Guest>,
    /// The guest of the machine that arrived, which goes on.
    pub there: Box<dyn FnOnce(Machine) -> Guest>,
}

/// What came of handing a guest over.
pub struct HandedOver {
    pub here: Result<Handed, Unsent>,
    pub there: Result<Inheritance, MigrationError>,
    /// The guest of either machine: its lines go along.
    pub guest: Box<dyn FnOnce(Machine) -> Guest>,
}

/// A running probe.
pub struct Guest {
    pub machine: Machine,
    serial: UnixStream,
    pub ports: Vec<UnixStream>,
    /// Of its network devices, for a restore.
    nets: Vec<NetFiles>,
    vsock: Option<UnixListener>,
    partial: Vec<u8>,
    lines: VecDeque<String>,
    events: VecDeque<Event>,
}

impl Guest {
    /// The fields of the next `boot` line.
    pub fn booted(&mut self) -> HashMap<String, String> {
        fields(&self.line("boot nonce="))
    }

    /// The next line that begins with `prefix`; those before it are dropped.
    pub fn line(&mut self, prefix: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            while let Some(line) = self.lines.pop_front() {
                if line.starts_with(prefix) {
                    return line;
                }
            }
            assert!(
                self.pump(deadline),
                "no line {prefix:?} within {PATIENCE:?}; events: {:?}",
                self.events
            );
        }
    }

    /// Sends a command and returns its answer: `ok …` or `err …`.
    pub fn ask(&mut self, command: &str) -> String {
        self.send(command);
        let name = command.split(' ').next().unwrap_or(command);
        let (ok, err) = (format!("ok {name}"), format!("err {name}"));
        loop {
            let line = self.line("");
            if line.starts_with(&ok) || line.starts_with(&err) {
                return line;
            }
        }
    }

    /// Like [`Guest::ask`], for a command that must succeed: what follows `ok NAME`.
    pub fn ok(&mut self, command: &str) -> String {
        let answer = self.ask(command);
        let name = command.split(' ').next().unwrap_or(command);
        match answer.strip_prefix(&format!("ok {name}")) {
            Some(rest) => rest.trim().to_owned(),
            None => panic!("{command}: {answer}"),
        }
    }

    /// Sends a line without waiting for anything.
    pub fn send(&mut self, command: &str) {
        let mut bytes = format!("{command}\n").into_bytes();
        let deadline = Instant::now() + PATIENCE;
        while !bytes.is_empty() {
            match self.serial.write(&bytes) {
                Ok(count) => drop(bytes.drain(..count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    assert!(self.pump(deadline), "the guest reads nothing");
                }
                Err(error) => panic!("write to the serial line: {error}"),
            }
        }
    }

    /// For who types while somebody else has the guest.
    pub fn line_in(&self) -> UnixStream {
        self.serial.try_clone().expect("another descriptor")
    }

    /// The next event for which `wanted` is true; others are dropped.
    pub fn event(&mut self, wanted: impl Fn(&Event) -> bool) -> Event {
        let deadline = Instant::now() + PATIENCE;
        loop {
            while let Some(event) = self.events.pop_front() {
                if wanted(&event) {
                    return event;
                }
            }
            assert!(self.pump(deadline), "no such event within {PATIENCE:?}");
        }
    }

    /// Waits for its end.
    pub fn stopped(&mut self) -> StopReason {
        match self.event(|event| matches!(event, Event::Stopped(_))) {
            Event::Stopped(reason) => reason,
            other => panic!("not asked for: {other:?}"),
        }
    }

    /// Pauses it, saves it, ends it, and makes another machine from what was saved and from its memory,
    /// handed over by descriptor; that one runs.
    pub fn through_a_restore(mut self, disks: &[&File]) -> Guest {
        self.machine.pause().expect("pause");
        let saved = self.machine.save().expect("save");
        let memory = self.machine.memory().as_fd().try_clone_to_owned();
        let memory = File::from(memory.expect("duplicate the memory"));
        drop(self.machine);
        let (serial, end) = UnixStream::pair().expect("a socket pair");
        let files = files_again(&self.nets, self.vsock.as_ref(), disks, &end);
        let machine = Machine::restore(saved, memory, files, None).expect("restore");
        Guest::going_on(machine, serial, self.nets, self.vsock)
    }

    /// Another machine from a snapshot of this one, which may run on; the other runs, too, on the disks that are
    /// given.
    pub fn cloned_from(&self, file: File, disks: &[&File]) -> Guest {
        self.cloned_as(Loading::Eager, file, disks)
    }

    /// The same, with its memory mapped or read first.
    pub fn cloned_as(&self, loading: Loading, file: File, disks: &[&File]) -> Guest {
        self.cloned_of(loading, vec![file], disks)
    }

    /// The same, of a whole snapshot and those that are laid over it.
    pub fn cloned_of(&self, loading: Loading, files: Vec<File>, disks: &[&File]) -> Guest {
        let chain = files.into_iter().map(Snapshot::open);
        let chain: Vec<Snapshot> = chain.map(|one| one.expect("a snapshot")).collect();
        let (serial, end) = UnixStream::pair().expect("a socket pair");
        let nets: Vec<_> = self.nets.iter().map(duplicate_net).collect();
        let files = files_again(&nets, None, disks, &end);
        let here = self.machine.config();
        let chain: Vec<&Snapshot> = chain.iter().collect();
        let machine = Machine::from_snapshots(&chain, here, files, loading, None);
        let machine = machine.expect("restore");
        Guest::going_on(machine, serial, nets, None)
    }

    /// What another machine in its place needs, with the other end of its serial line.
    pub fn files_again(&self, disks: &[&File]) -> (MachineFiles, UnixStream) {
        let (serial, end) = UnixStream::pair().expect("a socket pair");
        (files_again(&self.nets, None, disks, &end), serial)
    }

    /// Waits until the guest has asked for something, which is not carried out yet.
    pub fn wait_for_request(&self) {
        let event_fd = self.machine.event_fd();
        let mut fds = [PollFd::from_borrowed_fd(event_fd, PollFlags::IN)];
        let timeout = Timespec {
            tv_sec: PATIENCE.as_secs() as i64,
            tv_nsec: 0,
        };
        let ready = poll(&mut fds, Some(&timeout)).expect("poll");
        assert_eq!(ready, 1, "the guest asks for nothing");
    }

    /// Sends it to another machine of this process, from `near` to `far`, and serves its events meanwhile. Neither runs
    /// afterwards, unless it was not sent.
    pub fn sent<N: Read + Write>(
        self,
        policy: Policy,
        disks: &[&File],
        near: N,
        far: impl Read + Write + AsFd + Send + 'static,
    ) -> Sent<N> {
        self.sent_with(policy, disks, near, far, |_, _| ())
    }

    /// The same with something that is done before each step, which are counted from 0.
    pub fn sent_with<N: Read + Write>(
        self,
        policy: Policy,
        disks: &[&File],
        near: N,
        far: impl Read + Write + AsFd + Send + 'static,
        before: impl FnMut(usize, &mut Machine),
    ) -> Sent<N> {
        self.sent_to(policy, Disks::Shared(disks), near, far, before)
    }

    /// The same with disks that are shared or go.
    pub fn sent_to<N: Read + Write>(
        self,
        policy: Policy,
        disks: Disks<'_>,
        near: N,
        far: impl Read + Write + AsFd + Send + 'static,
        before: impl FnMut(usize, &mut Machine),
    ) -> Sent<N> {
        let begin = |machine, luggage| Sender::begin(machine, near, policy, luggage);
        let arrive = |here: &_, land| machine::receive(far, here, land, None);
        self.sent_through(disks, begin, arrive, before)
    }

    /// The same by lanes.
    pub fn sent_by<N: Read + Write + AsFd + Send + 'static>(
        self,
        policy: Policy,
        disks: Disks<'_>,
        near: Connections<N>,
        far: Connections<impl Read + Write + AsFd + Send + 'static>,
        before: impl FnMut(usize, &mut Machine),
    ) -> Sent<N> {
        let begin = |machine, luggage| Sender::begin_by(machine, near, policy, luggage);
        let arrive = |here: &_, land| machine::receive_by(far, here, land, None);
        self.sent_through(disks, begin, arrive, before)
    }

    fn sent_through<N: Read + Write>(
        self,
        disks: Disks<'_>,
        begin: impl FnOnce(Machine, Luggage) -> Result<Sender<N>, Unsent>,
        arrive: impl FnOnce(&MachineConfig, Land) -> Result<Arrived, MigrationError> + Send + 'static,
        mut before: impl FnMut(usize, &mut Machine),
    ) -> Sent<N> {
        let Guest {
            machine,
            serial,
            ports,
            nets,
            vsock,
            partial,
            lines,
            mut events,
        } = self;
        let here = machine.config().clone();
        let (other_serial, end) = UnixStream::pair().expect("a socket pair");
        let other_nets: Vec<_> = nets.iter().map(duplicate_net).collect();
        let (files, most) = match disks {
            Disks::Shared(disks) => (disks, Vec::new()),
            Disks::Go(disks, most) => (disks, vec![most; disks.len()]),
        };
        let luggage = Luggage {
            owner: OWNER.to_vec(),
            disks: matches!(disks, Disks::Go(..)),
        };
        let files = files_again(&other_nets, None, files, &end);
        let faults = Some(Faults::open().expect("userfaultfd"));
        let land: Land = Box::new(move |owner: &[u8]| {
            assert_eq!(owner, OWNER);
            Ok(Landing {
                files,
                most,
                faults,
            })
        });
        let arrival = std::thread::spawn(move || arrive(&here, land));
        let mut sender = begin(machine, luggage);
        let mut step = 0;
        let offer = loop {
            let mut sending = match sender {
                Ok(sending) => sending,
                Err(unsent) => break Err(unsent),
            };
            before(step, sending.machine_mut());
            step += 1;
            while let Some(event) = sending.machine_mut().next_event() {
                println!("[{event:?}]");
                events.push_back(event);
            }
            match sending.advance() {
                Ok(Progress::Copying(sending)) => sender = Ok(sending),
                Ok(Progress::Offered(offered)) => break Ok(offered),
                Err(unsent) => break Err(unsent),
            }
        };
        Sent {
            offer,
            arrival: arrival.join().expect("the receiving thread"),
            here: Box::new(move |machine| Guest {
                machine,
                serial,
                ports,
                nets,
                vsock,
                partial,
                lines,
                events,
            }),
            there: Box::new(move |machine| {
                Guest::going_on(machine, other_serial, other_nets, None)
            }),
        }
    }

    /// Hands it over, by `near`, to whoever takes it by `far` in another thread, which gives what became of it there.
    /// Its events are served meanwhile. Neither machine runs afterwards, unless it was not handed over.
    pub fn handed_over_to(
        self,
        near: UnixStream,
        far: UnixStream,
        takes: impl FnOnce(UnixStream, HostFiles) -> Result<Inheritance, MigrationError>
        + Send
        + 'static,
    ) -> HandedOver {
        let Guest {
            machine,
            serial,
            ports,
            nets,
            vsock,
            partial,
            lines,
            mut events,
        } = self;
        let kvm = open_kvm();
        let vhost = Vec::new();
        let there = std::thread::spawn(move || takes(far, HostFiles { kvm, vhost }));
        let mut handing = Handing::begin(machine, near, OWNER, &[]);
        let here = loop {
            let mut waiting = match handing {
                Ok(waiting) => waiting,
                Err(unsent) => break Err(unsent),
            };
            while let Some(event) = waiting.machine_mut().next_event() {
                println!("[{event:?}]");
                events.push_back(event);
            }
            match waiting.advance() {
                Ok(HandingStep::Waiting(waiting)) => {
                    if !waiting.is_awaited() {
                        let mut fds = [PollFd::new(waiting.connection(), PollFlags::IN)];
                        let timeout = Timespec::try_from(PATIENCE).expect("a time");
                        poll(&mut fds, Some(&timeout)).expect("poll");
                    }
                    handing = Ok(waiting);
                }
                Ok(HandingStep::Over(handed)) => break Ok(handed),
                Err(unsent) => break Err(unsent),
            }
        };
        HandedOver {
            here,
            there: there.join().expect("the thread that takes it over"),
            guest: Box::new(move |machine| Guest {
                machine,
                serial,
                ports,
                nets,
                vsock,
                partial,
                lines,
                events,
            }),
        }
    }

    /// The same guest in another machine, which runs if it ran; and for how long it stood still.
    pub fn handed_over(self) -> (Guest, Duration) {
        let (near, far) = UnixStream::pair().expect("a socket pair");
        for end in [&near, &far] {
            end.set_read_timeout(Some(PATIENCE)).expect("a timeout");
            end.set_write_timeout(Some(PATIENCE)).expect("a timeout");
        }
        let takes = |far, host| machine::take_over(far, host, None);
        let handed = self.handed_over_to(near, far, takes);
        let (here, mut there) = (
            handed.here.expect("handed over"),
            handed.there.expect("taken"),
        );
        assert_eq!(there.owner, OWNER);
        if there.ran {
            there.machine.resume().expect("resume");
        }
        let blackout = machine::monotonic() - there.stopped;
        println!("{:?}, made in {:?}: {blackout:?}", here.pause(), there.made);
        drop(here);
        ((handed.guest)(there.machine), blackout)
    }

    fn going_on(
        mut machine: Machine,
        serial: UnixStream,
        nets: Vec<NetFiles>,
        vsock: Option<UnixListener>,
    ) -> Guest {
        machine.resume().expect("resume");
        serial.set_nonblocking(true).expect("fcntl");
        Guest {
            machine,
            serial,
            ports: Vec::new(),
            nets,
            vsock,
            partial: Vec::new(),
            lines: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    /// Attaches a network, which a restore has, too.
    pub fn attach_net(&mut self, config: NetConfig, files: NetFiles) -> String {
        self.nets.push(duplicate_net(&files));
        self.machine.attach_net(config, files).expect("attach")
    }

    /// What it says within `time`, which passes in full.
    pub fn overheard(&mut self, time: Duration) -> Vec<String> {
        let deadline = Instant::now() + time;
        while self.pump(deadline) {}
        self.lines.drain(..).collect()
    }

    /// Waits for output or an event until `deadline` and takes it in; false when that has passed.
    fn pump(&mut self, deadline: Instant) -> bool {
        // Some events are known at once (`pause`, `stop`): no descriptor tells of them.
        if self.take_events() {
            return true;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let event_fd = self.machine.event_fd();
        let mut fds = [
            PollFd::new(&self.serial, PollFlags::IN),
            PollFd::from_borrowed_fd(event_fd, PollFlags::IN),
        ];
        let timeout = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        poll(&mut fds, Some(&timeout)).expect("poll");
        self.take_events();
        self.take_output();
        true
    }

    /// True if there were any.
    fn take_events(&mut self) -> bool {
        let before = self.events.len();
        while let Some(event) = self.machine.next_event() {
            println!("[{event:?}]");
            self.events.push_back(event);
        }
        self.events.len() > before
    }

    fn take_output(&mut self) {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = self.serial.read(&mut buffer) {
            self.partial.extend_from_slice(&buffer[..count]);
        }
        while let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            println!("{line}");
            self.lines.push_back(line);
        }
    }
}

/// `name=value` words of a line.
pub fn fields(line: &str) -> HashMap<String, String> {
    let pairs = line.split(' ').filter_map(|word| word.split_once('='));
    pairs
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// FNV-1a, 64 bit: what `disk-hash` says.
pub fn fnv(bytes: &[u8]) -> String {
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
    });
    format!("{hash:016x}")
}

/// What `disk-write` writes for `seed` at `offset`.
pub fn pattern(seed: u64, offset: u64, length: usize) -> Vec<u8> {
    let mix = |value: u64| {
        let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    };
    let word = |index: u64| mix(seed ^ (offset / 8 + index).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (0..length as u64 / 8)
        .flat_map(|index| word(index).to_le_bytes())
        .collect()
}
