//! What a machine does when one of its own devices fails it, with a real guest.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::config::CpuProfile;
use crate::device::SavedDevice;
use crate::stream::converge;
use crate::stream::frame::HEAD;

#[path = "../../tests/common/mod.rs"]
pub(super) mod common;

use common::{Guest, Rig};

/// Comes to rest only while it is willing.
#[derive(Default)]
struct Stubborn {
    willing: AtomicBool,
}

impl Device for Stubborn {
    fn id(&self) -> &str {
        "stubborn0"
    }

    fn pause(&self) -> Result<(), DeviceError> {
        match self.willing.load(Ordering::Acquire) {
            true => Ok(()),
            false => Err(DeviceError::new(self.id(), "pause", "its storage hangs")),
        }
    }

    fn reset(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        SavedDevice::pack(self.id(), 1, &())
    }
}

/// 1: in al, LSR; test al, 1; jz 1b; then echo what came; jmp 1b.
pub(super) fn echo() -> Guest {
    Guest::new()
        .bytes(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb])
        .echo(0x3f8)
        .bytes(&[0xeb, 0xeb])
}

pub(super) fn answers(rig: &mut Rig, text: &str) {
    rig.serial.write_all(text.as_bytes()).unwrap();
    assert_eq!(rig.hear(text.len()), text);
}

#[test]
fn a_guest_whose_pause_fails_runs_on_and_can_be_paused_later() {
    let mut rig = Rig::build(common::config(), &echo());
    let stubborn = Arc::new(Stubborn::default());
    rig.machine.devices.push(stubborn.clone());
    rig.machine.start().unwrap();
    answers(&mut rig, "before");

    let error = rig.machine.pause().unwrap_err();
    assert!(matches!(error, MachineError::Device(_)), "{error}");
    assert_eq!(rig.machine.state(), RunState::Running);
    answers(&mut rig, "it runs on");

    stubborn.willing.store(true, Ordering::Release);
    rig.machine.pause().unwrap();
    assert_eq!(rig.machine.state(), RunState::Paused);
    rig.machine.resume().unwrap();
    answers(&mut rig, "and on");
}

/// A machine that goes on where `rig`'s was saved, after so long on its way.
fn arrives(rig: &Rig, missed: Duration) -> (Machine, UnixStream) {
    arrives_as(&echo(), rig, missed)
}

fn arrives_as(guest: &Guest, rig: &Rig, missed: Duration) -> (Machine, UnixStream) {
    let state = rig.machine.save().unwrap();
    let (files, serial) = common::files(common::kernel_file(&guest.elf()));
    let memory = rig.machine.memory.clone();
    let chassis = build::Chassis::new(&state.config, &files, memory, None).unwrap();
    let machine = build::restore_on(chassis, state, files, || missed).unwrap();
    (machine, serial)
}

#[test]
fn a_guests_clocks_go_on_while_it_is_on_its_way() {
    const MISSED: Duration = Duration::from_secs(1000);
    let mut rig = Rig::build(common::config(), &echo());
    rig.machine.start().unwrap();
    rig.machine.pause().unwrap();
    // (kvm-pvm has every guest read the host's time stamp counter: what is written to it cannot be seen here.)
    let clock = |machine: &Machine| machine.saved().unwrap().1.clock.clock;
    let before = clock(&rig.machine);
    let (machine, _serial) = arrives(&rig, MISSED);
    let after = clock(&machine);
    let passed = u64::try_from(MISSED.as_nanos()).unwrap();
    assert!(after >= before + passed, "{after} after {before}");
    assert!(after < before + 2 * passed, "{after} after {before}");
}

/// Memory type range registers, and what a guest writes to them: the default, fixed ranges of 64, 16 and 4 KiB, and the
/// first and the last of the variable ones.
const RANGES: [(u32, u64); 8] = [
    (0x2ff, 0xc00),
    (0x250, 0x0606_0606_0606_0606),
    (0x259, 0x0404_0606_0505_0000),
    (0x26f, 0x0505_0505_0505_0505),
    (0x200, 0x00c0_0000_0000),
    (0x201, 0x000f_c000_0800),
    (0x20e, 0x00a0_0000_0006),
    (0x20f, 0x000f_e000_0800),
];
/// Write-back by default, as firmware leaves them, and of no range anything.
const AT_POWER_ON: [u64; 8] = [0x806, 0, 0, 0, 0, 0, 0, 0];

/// Says what the range registers hold, writes them when it hears something, says so again, at the next byte again, and
/// at one more resets.
fn ranged() -> Guest {
    let wait = [0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb];
    let wait = |guest: Guest| guest.bytes(&wait).bytes(&[0x66, 0xba, 0xf8, 0x03, 0xec]);
    // mov ecx, 4; 1: out dx, al; shr eax, 8; loop 1b
    let say = [0xb9, 4, 0, 0, 0, 0xee, 0xc1, 0xe8, 8, 0xe2, 0xfa];
    let read = |guest: Guest| {
        RANGES.into_iter().fold(guest, |guest, (msr, _)| {
            // mov ecx, msr; rdmsr; mov ebx, edx; mov dx, 0x3f8; both halves, of which mov eax, ebx is the second
            (guest.bytes(&[0xb9]).bytes(&msr.to_le_bytes()))
                .bytes(&[0x0f, 0x32, 0x89, 0xd3, 0x66, 0xba, 0xf8, 0x03])
                .bytes(&say)
                .bytes(&[0x89, 0xd8])
                .bytes(&say)
        })
    };
    let write = |guest: Guest| {
        RANGES.into_iter().fold(guest, |guest, (msr, value)| {
            // mov ecx, msr; mov eax, low; mov edx, high; wrmsr
            (guest.bytes(&[0xb9]).bytes(&msr.to_le_bytes()))
                .bytes(&[0xb8])
                .bytes(&(value as u32).to_le_bytes())
                .bytes(&[0xba])
                .bytes(&((value >> 32) as u32).to_le_bytes())
                .bytes(&[0x0f, 0x30])
        })
    };
    let written = read(write(wait(read(Guest::new()))));
    wait(read(wait(written))).out(0xcf9, 0x06).halt()
}

fn ranges_by(serial: &mut UnixStream) -> [u64; 8] {
    [(); 8].map(|()| {
        let mut value = [0; 8];
        io::Read::read_exact(serial, &mut value).unwrap();
        u64::from_le_bytes(value)
    })
}

#[test]
fn what_a_guest_says_of_memory_ranges_goes_with_it_and_ends_with_its_reset() {
    let guest = ranged();
    let mut rig = Rig::build(common::config(), &guest);
    rig.machine.start().unwrap();
    assert_eq!(ranges_by(&mut rig.serial), AT_POWER_ON);
    rig.serial.write_all(b"1").unwrap();
    let written = RANGES.map(|(_, value)| value);
    assert_eq!(ranges_by(&mut rig.serial), written);
    rig.machine.pause().unwrap();
    let (mut machine, mut serial) = arrives_as(&guest, &rig, Duration::ZERO);
    machine.resume().unwrap();
    serial.write_all(b"2").unwrap();
    assert_eq!(ranges_by(&mut serial), written);
    serial.write_all(b"3").unwrap();
    while machine.wait_event(common::PATIENCE).unwrap() != Event::GuestReset {}
    assert_eq!(ranges_by(&mut serial), AT_POWER_ON);
}

/// By which some of a guest's state comes late.
struct Held {
    line: UnixStream,
    held: bool,
}

/// How late.
const HELD: Duration = Duration::from_millis(1500);

impl io::Read for Held {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.line.read(buffer)?;
        // A frame's head is read by itself; its first word says that there is state in it.
        let state = buffer.len() == HEAD && buffer.starts_with(&[3, 0]);
        if state && !std::mem::replace(&mut self.held, true) {
            // sleeps because lines may be slow.
            std::thread::sleep(HELD);
        }
        Ok(read)
    }
}

impl Write for Held {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.line.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.line.flush()
    }
}

impl std::os::fd::AsFd for Held {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.line.as_fd()
    }
}

/// Where a guest's clock would be had it run since the host booted, in milliseconds. Negative: it began later.
fn at_boot(machine: &Machine) -> i64 {
    let clock = Duration::from_nanos(machine.saved().unwrap().1.clock.clock);
    clock.as_millis() as i64 - clocks::now().as_millis() as i64
}

/// It has lost less than two thirds of what was held, and gained nothing.
fn went_on(before: i64, after: i64) {
    let lost = before - after;
    let most = HELD.as_millis() as i64 * 2 / 3;
    assert!((-10..most).contains(&lost), "{lost} of {HELD:?} lost");
}

#[test]
fn a_guest_that_is_sent_by_a_slow_line_does_not_lose_the_time() {
    let mut rig = Rig::build(common::config(), &echo());
    rig.machine.start().unwrap();
    rig.machine.pause().unwrap();
    let before = at_boot(&rig.machine);
    rig.machine.resume().unwrap();
    let here = rig.machine.config().clone();
    let (near, line) = UnixStream::pair().unwrap();
    let (files, _serial) = common::files(common::kernel_file(&echo().elf()));
    let land = |_: &[u8]| {
        Ok(Landing {
            files,
            most: Vec::new(),
            faults: None,
        })
    };
    let held = Held { line, held: false };
    let arrival = std::thread::spawn(move || receive(held, &here, land, None).unwrap());
    let mut sender = Sender::begin(rig.machine, near, POLICY, Luggage::default());
    let _offered = loop {
        match sender.and_then(Sender::advance).unwrap() {
            Progress::Copying(mut sending) => {
                while sending.machine_mut().next_event().is_some() {}
                sender = Ok(sending);
            }
            Progress::Offered(offered) => break offered,
        }
    };
    let arrived = arrival.join().unwrap();
    went_on(before, at_boot(&arrived.machine));
}

#[test]
fn a_guest_that_is_handed_over_slowly_does_not_lose_the_time() {
    let mut rig = Rig::build(common::config(), &echo());
    rig.machine.start().unwrap();
    rig.machine.pause().unwrap();
    let before = at_boot(&rig.machine);
    rig.machine.resume().unwrap();
    let (near, line) = UnixStream::pair().unwrap();
    let kvm = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    let host = HostFiles {
        kvm: kvm.unwrap().into(),
        vhost: Vec::new(),
    };
    let held = Held { line, held: false };
    let taken = std::thread::spawn(move || take_over(held, host, None).unwrap());
    let mut handing = Handing::begin(rig.machine, near, b"", &[]).unwrap();
    let _handed = loop {
        match handing.advance().unwrap() {
            HandingStep::Waiting(mut waiting) => {
                while waiting.machine_mut().next_event().is_some() {}
                handing = waiting;
            }
            HandingStep::Over(handed) => break handed,
        }
    };
    let taken = taken.join().unwrap();
    went_on(before, at_boot(&taken.machine));
}

/// As the host's kernel does, which moves a network's packets.
#[derive(Default)]
struct Unseen {
    here: AtomicBool,
}

impl Device for Unseen {
    fn id(&self) -> &str {
        "unseen0"
    }

    fn writes_unseen(&self) -> bool {
        !self.here.load(Ordering::SeqCst)
    }

    fn write_here(&self, here: bool) {
        self.here.store(here, Ordering::SeqCst);
    }

    fn reset(&self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        SavedDevice::pack(self.id(), 1, &())
    }
}

#[test]
fn after_a_device_that_wrote_unseen_the_next_snapshot_is_to_be_a_whole_one() {
    let mut rig = Rig::build(common::config(), &echo());
    rig.machine.start().unwrap();
    let write = |rig: &mut Rig, scope| {
        let file = tempfile::tempfile().unwrap();
        rig.machine.snapshot_of(scope, file, b"").map(drop)
    };
    write(&mut rig, Scope::Tracked).unwrap();
    write(&mut rig, Scope::Since).unwrap();
    // It comes and goes.
    rig.machine.fill(9, Arc::new(Unseen::default()));
    let unseen = |device: &Arc<dyn Device>| device.id() == "unseen0";
    let at = rig.machine.devices.iter().position(unseen).unwrap();
    let device = rig.machine.devices.remove(at);
    let untracked = |written| matches!(written, Err(SnapshotError::Untracked));
    assert!(untracked(write(&mut rig, Scope::Since)));
    write(&mut rig, Scope::Tracked).unwrap();
    write(&mut rig, Scope::Since).unwrap();
    // While it is there, there is a whole one only, which says nothing of the next.
    rig.machine.fill(9, device);
    assert!(untracked(write(&mut rig, Scope::Tracked)));
    write(&mut rig, Scope::Whole).unwrap();
    rig.machine.devices.remove(at);
    assert!(untracked(write(&mut rig, Scope::Since)));
    answers(&mut rig, "it runs on");
}

#[test]
fn nobody_writes_unseen_while_a_machine_is_sent() {
    let mut rig = Rig::build(common::config(), &echo());
    rig.machine.start().unwrap();
    let unseen = Arc::new(Unseen::default());
    rig.machine.fill(9, Arc::clone(&unseen) as Arc<dyn Device>);
    let (here, there) = UnixStream::pair().unwrap();
    let hears = std::thread::spawn(move || io::copy(&mut &there, &mut io::sink()));
    let sender = Sender::begin(rig.machine, here, POLICY, Luggage::default()).unwrap();
    assert!(!unseen.writes_unseen());
    rig.machine = sender.give_up();
    assert!(unseen.writes_unseen());
    hears.join().unwrap().unwrap();

    let (here, there) = UnixStream::pair().unwrap();
    drop(there);
    let mut sender = Sender::begin(rig.machine, here, POLICY, Luggage::default());
    let unsent = loop {
        match sender.and_then(Sender::advance) {
            Ok(Progress::Copying(sending)) => sender = Ok(sending),
            Ok(Progress::Offered(_)) => panic!("nobody has it"),
            Err(unsent) => break unsent,
        }
    };
    assert!(unseen.writes_unseen(), "{unsent:?}");
    rig.machine = *unsent.machine;
    answers(&mut rig, "it runs on");
}

#[test]
fn a_guest_may_panic_once_in_each_of_its_lives() {
    let panics = Guest::new().out(0x505, 1).out(0x505, 1).out(0x505, 2);
    let mut rig = Rig::start(&panics.out(0xcf9, 0x06).halt());
    let mut events = Vec::new();
    while events.len() < 4 {
        let event = rig.machine.wait_event(common::PATIENCE).unwrap();
        if event != Event::Running {
            events.push(event);
        }
    }
    let panicked = Event::Panicked {
        crash_loaded: false,
    };
    let life = [panicked, Event::GuestReset];
    assert_eq!(events, [life.clone(), life].concat());
}

#[test]
fn a_new_generation_is_in_memory_and_told_by_an_event_and_a_resume_alone_is_none() {
    // Wait for a byte (as `echo`), then say what the event register of the power port holds.
    let wait = [0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb];
    let events = crate::layout::ACPI_PM_PORT + 4;
    let guest = Guest::new().bytes(&wait).echo(events).halt();
    let mut rig = Rig::build(common::config(), &guest);
    let id = |rig: &Rig| {
        let place = vm_memory::GuestAddress(crate::layout::GENERATION.base);
        vm_memory::Bytes::read_obj::<u128>(&**rig.machine.memory(), place).unwrap()
    };
    rig.machine.start().unwrap();
    let first = id(&rig);
    assert_ne!(first, 0);
    assert!(rig.machine.change_generation().is_err(), "it runs");
    rig.machine.pause().unwrap();
    rig.machine.resume().unwrap();
    rig.machine.pause().unwrap();
    assert_eq!(id(&rig), first);
    rig.machine.change_generation().unwrap();
    assert_ne!(id(&rig), first);
    rig.machine.resume().unwrap();
    rig.serial.write_all(b"x").unwrap();
    assert_eq!(rig.hear(1).as_bytes(), [EVENT_GENERATION]);
}

const POLICY: converge::Policy = converge::Policy {
    downtime: Duration::from_secs(1),
    longest: Duration::from_secs(30),
    limit: Duration::from_secs(30),
    at_limit: converge::AtLimit::Stop,
    throttle: None,
};

#[test]
fn a_disk_is_copied_or_sent_by_one_at_a_time() {
    let mut config = common::config();
    let disk = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file
    };
    config.disks = vec![crate::config::DiskConfig {
        read_only: false,
        serial_number: "one".to_owned(),
        direct: false,
        limit: None,
        queues: 1,
    }];
    let (mut files, serial) = common::files(common::kernel_file(&echo().elf()));
    files.disks = vec![disk()];
    let machine = Machine::build(config, files, None).unwrap();
    let mut rig = Rig { machine, serial };
    rig.machine.start().unwrap();
    let policy = DiskCopyPolicy {
        converge: POLICY,
        reserve: 0,
    };
    let copying = rig.machine.copy_disk(0, &disk(), policy).unwrap();

    let untouched = disk();
    io::Write::write_all(&mut &untouched, b"mine").unwrap();
    let refused = rig.machine.copy_disk(0, &untouched, policy).err();
    assert!(matches!(refused, Some(DiskCopyError::Logged { index: 0 })));
    let mut text = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&untouched, &mut text, 0).unwrap();
    assert_eq!(&text, b"mine", "what was refused has emptied no file");

    let luggage = || Luggage {
        disks: true,
        ..Luggage::default()
    };
    let (near, _far) = UnixStream::pair().unwrap();
    let unsent = Sender::begin(rig.machine, near, POLICY, luggage())
        .err()
        .unwrap();
    let said = in_full(&unsent.error);
    assert!(
        said.contains("disk 0") && said.contains("being copied"),
        "{said}"
    );
    rig.machine = *unsent.machine;
    answers(&mut rig, "it runs on");

    drop(copying);
    let (near, _far) = UnixStream::pair().unwrap();
    let sender = Sender::begin(rig.machine, near, POLICY, luggage()).unwrap();
    let refused = sender.machine().copy_disk(0, &disk(), policy).err();
    assert!(matches!(refused, Some(DiskCopyError::Logged { index: 0 })));
    rig.machine = sender.give_up();
    rig.machine.copy_disk(0, &disk(), policy).unwrap();
    answers(&mut rig, "and on");
}

/// KVM gives it to nobody.
const MISSING: &str = "enqcmd";

#[test]
fn a_guest_whose_cpu_this_host_lacks_something_of_is_refused_by_its_name() {
    let kvm = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    let hypervisor = crate::kvm::Hypervisor::open(kvm.unwrap().into()).unwrap();
    let offers = crate::cpu::offered(&hypervisor).unwrap().offers;
    let mut config = common::config();
    config.cpus.profile = CpuProfile::Custom(Box::new(offers));
    let mut rig = Rig::build(config, &echo());
    let here = rig.machine.config().clone();
    // As if another host had made it.
    let (word, bit) = fractus_cpuid::by_name(MISSING).unwrap();
    let CpuProfile::Kept(kept) = &mut rig.machine.config.cpus.profile else {
        panic!("it keeps what it began with");
    };
    let mut leaves = kept.leaves.iter_mut();
    let leaf = leaves.find(|leaf| (leaf.leaf, leaf.index) == (word.leaf, word.index));
    leaf.unwrap().ecx |= 1 << bit;
    rig.machine.start().unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    let (files, _serial) = common::files(common::kernel_file(&echo().elf()));
    let land = |_: &[u8]| {
        Ok(Landing {
            files,
            most: Vec::new(),
            faults: None,
        })
    };
    let arrival = std::thread::spawn(move || receive(far, &here, land, None).err());
    let mut sender = Sender::begin(rig.machine, near, POLICY, Luggage::default());
    let unsent = loop {
        match sender.and_then(Sender::advance) {
            Ok(Progress::Copying(sending)) => sender = Ok(sending),
            Ok(Progress::Offered(_)) => panic!("it was taken"),
            Err(unsent) => break unsent,
        }
    };
    let refused = arrival.join().unwrap().unwrap();
    assert!(refused.to_string().contains(MISSING), "{refused}");
    let MigrationError::Refused { reason } = &unsent.error else {
        panic!("{:?}", unsent.error);
    };
    assert!(reason.contains(&format!("lacks {MISSING}")), "{reason}");
    rig.machine = *unsent.machine;
    answers(&mut rig, "it runs on here");
}
