//! The device with a stand-in for the kernel: what it is told and in which order, and what comes of what
//! it does to the rings. The kernel itself is tried in the lab (tests/lab).

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::*;
use crate::config::{HOT_BLOCK, HotMemoryConfig, NetConfig};
use crate::device::Device;
use crate::virtio::VirtioPciDevice;
use crate::virtio::net::testing::{Far, wires};
use crate::virtio::net::{Net, NetBackend, Wire};
use crate::virtio::testing::{DEADLINE, Driver, Rig, read_part, write_part};
use crate::virtio::transport::{NO_VECTOR, status};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

/// What the kernel knows of a ring.
#[derive(Default)]
struct Ring {
    size: u32,
    base: u32,
    placed: Rings,
    kick: Option<EventFd>,
    call: Option<EventFd>,
    error: Option<EventFd>,
    running: bool,
}

#[derive(Default)]
struct State {
    owned: bool,
    features: u64,
    memory: Vec<Region>,
    rings: [Ring; 2],
    /// What fails from now on.
    refuses: Option<fn(&Call<'_>) -> bool>,
}

#[derive(Clone, Default)]
pub(crate) struct Fake(Arc<Mutex<State>>);

impl Fake {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Waits until the device's thread has brought that about.
    fn wait(&self, wanted: impl Fn(&State) -> bool) {
        let begin = Instant::now();
        while !wanted(&self.state()) {
            assert!(begin.elapsed() < DEADLINE, "it does not come about");
            std::thread::yield_now();
        }
    }

    pub(crate) fn wait_for_running(&self, running: bool) {
        self.wait(|state| state.rings.iter().all(|ring| ring.running == running));
    }

    /// Uses the next chain of a ring, which is `head`, as the kernel would.
    fn use_chain(&self, driver: &Driver, number: usize, head: u16, length: u32) {
        let mut state = self.state();
        let ring = &mut state.rings[number];
        assert!(ring.running);
        let used = driver.rings[number].device();
        let place = u64::from(ring.base % ring.size);
        let element = u64::from(head) | u64::from(length) << 32;
        let memory = &driver.memory;
        memory
            .write_obj(element, GuestAddress(used + 4 + 8 * place))
            .unwrap();
        ring.base += 1;
        memory
            .write_obj(ring.base as u16, GuestAddress(used + 2))
            .unwrap();
        ring.call.as_ref().unwrap().signal();
    }
}

fn copy(fd: BorrowedFd<'_>) -> Option<EventFd> {
    Some(fd.try_clone_to_owned().unwrap().into())
}

impl Kernel for Fake {
    fn call(&mut self, call: Call<'_>) -> Result<u64, Errno> {
        let mut state = self.state();
        assert!(
            state.owned != matches!(call, Call::SetOwner),
            "owned once, and first"
        );
        if state.refuses.is_some_and(|refuses| refuses(&call)) {
            return Err(Errno::FAULT);
        }
        let at_work = state.rings.iter().any(|ring| ring.running);
        assert!(
            !at_work || matches!(call, Call::SetBackend(..)),
            "told of {call:?} while it works"
        );
        match call {
            Call::SetOwner => state.owned = true,
            Call::GetFeatures => return Ok(u64::MAX),
            Call::SetFeatures(features) => state.features = features,
            Call::SetMemory(regions) => state.memory = regions.to_vec(),
            Call::SetSize(ring, size) => state.rings[ring as usize].size = size,
            Call::SetBase(ring, base) => state.rings[ring as usize].base = base,
            Call::GetBase(ring) => return Ok(state.rings[ring as usize].base.into()),
            Call::SetRings(placed) => state.rings[placed.ring as usize].placed = placed,
            Call::SetKick(ring, fd) => state.rings[ring as usize].kick = copy(fd),
            Call::SetCall(ring, fd) => state.rings[ring as usize].call = copy(fd),
            Call::SetError(ring, fd) => state.rings[ring as usize].error = copy(fd),
            Call::SetBackend(ring, tap) => {
                let ready = !state.memory.is_empty();
                let ring = &mut state.rings[ring as usize];
                let whole = ring.size > 0 && ring.placed.used != 0 && ring.kick.is_some();
                assert!(
                    tap.is_none() || (ready && whole),
                    "joined before it was set up"
                );
                ring.running = tap.is_some();
            }
        }
        Ok(0)
    }
}

struct Bench {
    rig: Rig,
    kernel: Fake,
    driver: Driver,
    far: Vec<Far>,
}

fn config(queues: u16) -> NetConfig {
    NetConfig {
        mac: MAC,
        queues,
        mtu: None,
        limit: None,
        addresses: Vec::new(),
    }
}

/// A device whose pairs are in these kernels.
pub(crate) fn net(rig: &Rig, kernels: &[Fake]) -> (Net, Vec<Far>) {
    let pairs = kernels.len() as u16;
    let wires = wires(pairs);
    let wire = |file| Box::new(Wire::new(file)) as Box<dyn NetBackend>;
    let backends = wires.files.into_iter().map(wire).collect();
    let owned = |kernel: &Fake| Vhost::with(Box::new(kernel.clone())).unwrap();
    let kernels = kernels.iter().map(owned).collect();
    let threads = &rig.board.threads;
    let net = Net::with_kernels("net0", &config(pairs), backends, kernels, threads).unwrap();
    (net, wires.far)
}

fn start(kernel: Fake) -> Bench {
    start_with(kernel, Rig::new())
}

fn start_with(kernel: Fake, rig: Rig) -> Bench {
    start_all(&[kernel], rig)
}

fn start_all(kernels: &[Fake], rig: Rig) -> Bench {
    let (net, far) = net(&rig, kernels);
    let (board, recorder) = rig.with_recorder();
    let device = VirtioPciDevice::new("net0", Box::new(net), &board).unwrap();
    let driver = Driver::start(&rig, device, recorder);
    Bench {
        rig,
        kernel: kernels[0].clone(),
        driver,
        far,
    }
}

#[test]
fn the_kernel_is_told_all_of_the_rings_and_then_set_to_work() {
    let bench = start(Fake::default());
    bench.kernel.wait_for_running(true);
    let state = bench.kernel.state();
    assert_eq!(state.features, FEATURES, "the driver took all");
    let region = state.memory[0];
    let host = |guest: u64| region.host + (guest - region.guest);
    for (ring, known) in bench.driver.rings.iter().zip(&state.rings) {
        assert_eq!(known.size, u32::from(ring.size));
        assert_eq!(known.placed.descriptors, host(ring.descriptors()));
        assert_eq!(known.placed.available, host(ring.driver()));
        assert_eq!(known.placed.used, host(ring.device()));
        // What the driver had made available before is looked at.
        assert!(known.kick.as_ref().unwrap().take() > 0);
    }
    drop(state);
    bench.driver.kick(TRANSMIT);
    let state = bench.kernel.state();
    let kick = state.rings[TRANSMIT].kick.as_ref().unwrap();
    assert_eq!(kick.take(), 1, "a kick goes to the kernel");
}

#[test]
fn of_hot_memory_the_kernel_has_what_the_guest_has() {
    let (max, bytes) = (4 * HOT_BLOCK, 0);
    let rig = Rig::with_hot_memory(Some(HotMemoryConfig { max, bytes }));
    let memory = rig.board.memory.clone();
    let bench = start_with(Fake::default(), rig);
    bench.kernel.wait_for_running(true);
    let told = bench.kernel.state().memory.clone();
    let slots: Vec<Region> = memory.slots().iter().map(Region::of).collect();
    assert_eq!(told, slots, "KVM's own");
    // The view, which follows what is plugged without a word; not our whole mapping.
    let window = memory.hot().unwrap().window();
    let hot = told
        .iter()
        .find(|region| region.guest == window.base)
        .unwrap();
    assert_eq!(hot.size, window.size);
    let whole = memory.get_host_address(GuestAddress(window.base)).unwrap();
    assert_ne!(hot.host, whole as u64);
}

#[test]
fn its_interrupts_reach_the_driver_and_wait_while_masked() {
    let mut bench = start(Fake::default());
    bench.kernel.wait_for_running(true);
    let head = bench.driver.submit(RECEIVE, &[write_part(0x3000, 2048)]);
    bench.kernel.use_chain(&bench.driver, RECEIVE, head, 100);
    assert_eq!(bench.driver.used(RECEIVE), (head, 100));

    let mask = |masked: u8| bench.driver.write(0x4000 + 16 + 12, &[masked, 0, 0, 0]);
    mask(1);
    let before = bench.driver.recorder.triggers(1);
    let call = || {
        bench.kernel.state().rings[RECEIVE]
            .call
            .as_ref()
            .unwrap()
            .signal()
    };
    call();
    assert_eq!(bench.driver.recorder.triggers(1), before);
    mask(0);
    assert_eq!(bench.driver.recorder.triggers(1), before + 1);
}

#[test]
fn a_saved_device_goes_on_in_another_kernel_where_it_stopped() {
    let mut bench = start(Fake::default());
    bench.kernel.wait_for_running(true);
    for _ in 0..3 {
        let head = bench.driver.submit(TRANSMIT, &[read_part(0x3000, 100)]);
        bench.kernel.use_chain(&bench.driver, TRANSMIT, head, 0);
        assert_eq!(bench.driver.used(TRANSMIT).0, head);
    }
    bench.driver.device.pause().unwrap();
    assert!(!bench.kernel.state().rings[TRANSMIT].running);
    let saved = bench.driver.device.save().unwrap();

    let other = Fake::default();
    let (board, recorder) = bench.rig.with_recorder();
    let mut far = Vec::new();
    let restored = VirtioPciDevice::restore(&saved, &board, |saved| {
        let (net, ends) = net(&bench.rig, std::slice::from_ref(&other));
        far = ends;
        Ok(Box::new(Net::restore(saved, net)?))
    })
    .unwrap();
    let old = std::mem::replace(&mut bench.driver.device, restored);
    drop(old);
    bench.driver.recorder = recorder;
    bench.driver.device.resume().unwrap();
    other.wait_for_running(true);
    assert_eq!(other.state().rings[TRANSMIT].base, 3);
    let head = bench.driver.submit(TRANSMIT, &[read_part(0x3000, 100)]);
    other.use_chain(&bench.driver, TRANSMIT, head, 0);
    assert_eq!(bench.driver.used(TRANSMIT).0, head);
}

#[test]
fn a_reset_takes_the_rings_from_the_kernel_and_the_next_driver_gives_others() {
    let mut bench = start(Fake::default());
    bench.kernel.wait_for_running(true);
    let head = bench.driver.submit(TRANSMIT, &[read_part(0x3000, 100)]);
    bench.kernel.use_chain(&bench.driver, TRANSMIT, head, 0);
    bench.driver.set(0x14, 0, 1);
    assert_eq!(bench.driver.status(), 0);
    assert!(!bench.kernel.state().rings[TRANSMIT].running);
    bench.driver.initialise(u64::MAX);
    bench.kernel.wait_for_running(true);
    assert_eq!(bench.kernel.state().rings[TRANSMIT].base, 0);
}

#[test]
fn a_ring_that_the_kernel_finds_broken_takes_the_device_out_of_service() {
    let bench = start(Fake::default());
    bench.kernel.wait_for_running(true);
    bench.kernel.state().rings[TRANSMIT]
        .error
        .as_ref()
        .unwrap()
        .signal();
    bench.driver.wait_for_needs_reset();
    // Or each kick would be one more error.
    bench.kernel.wait_for_running(false);
}

#[test]
fn the_kernel_leaves_its_packets_to_this_process_and_goes_on_where_that_stopped() {
    let mut bench = start(Fake::default());
    bench.kernel.wait_for_running(true);
    let by_kernel = |bench: &mut Bench| {
        let head = bench.driver.submit(TRANSMIT, &[read_part(0x3000, 100)]);
        bench.kernel.use_chain(&bench.driver, TRANSMIT, head, 0);
        assert_eq!(bench.driver.used(TRANSMIT).0, head);
    };
    let sends = |bench: &mut Bench, byte: u8| {
        bench.driver.put(0x3000, &[byte; 100]);
        assert_eq!(bench.driver.request(TRANSMIT, &[read_part(0x3000, 100)]), 0);
        assert_eq!(bench.far[0].take(), [byte; 100]);
    };
    by_kernel(&mut bench);
    assert!(bench.driver.device.writes_unseen());
    // Nobody has heard of it here when the kernel gives it back.
    bench.far[0].send(&[9; 80]).unwrap();

    bench.driver.device.write_here(true);
    assert!(!bench.driver.device.writes_unseen());
    bench.kernel.wait_for_running(false);
    let head = bench.driver.submit(RECEIVE, &[write_part(0x5000, 2048)]);
    bench.driver.kick(RECEIVE);
    assert_eq!(bench.driver.used(RECEIVE), (head, 80));
    sends(&mut bench, 7);
    // A pause within is no reason.
    bench.driver.device.pause().unwrap();
    bench.driver.device.resume().unwrap();
    sends(&mut bench, 8);
    bench.kernel.wait_for_running(false);

    bench.driver.device.write_here(false);
    bench.kernel.wait_for_running(true);
    let bases = bench.kernel.state().rings.each_ref().map(|ring| ring.base);
    assert_eq!(bases, [1, 3]);
    by_kernel(&mut bench);
}

#[test]
fn a_device_at_rest_is_told_who_is_to_move_its_packets() {
    let mut bench = start(Fake::default());
    bench.kernel.wait_for_running(true);
    bench.driver.device.write_here(true);
    bench.driver.device.pause().unwrap();
    bench.driver.device.write_here(false);
    assert!(!bench.kernel.state().rings[TRANSMIT].running);
    bench.driver.device.resume().unwrap();
    bench.kernel.wait_for_running(true);
    let head = bench.driver.submit(TRANSMIT, &[read_part(0x3000, 100)]);
    bench.kernel.use_chain(&bench.driver, TRANSMIT, head, 0);
    assert_eq!(bench.driver.used(TRANSMIT).0, head);
}

#[test]
fn what_the_kernel_refuses_this_process_does() {
    let kernel = Fake::default();
    kernel.state().refuses = Some(|call| matches!(call, Call::SetMemory(_)));
    let mut bench = start(kernel);
    bench.driver.put(0x3000, &[7; 100]);
    assert_eq!(bench.driver.request(TRANSMIT, &[read_part(0x3000, 100)]), 0);
    assert_eq!(bench.far[0].take(), [7; 100]);
}

#[test]
fn what_it_refuses_half_way_this_process_does_until_the_next_driver() {
    let kernel = Fake::default();
    // The receiving ring is joined by then.
    kernel.state().refuses = Some(|call| matches!(call, Call::SetBackend(1, Some(_))));
    let mut bench = start(kernel);
    bench.driver.put(0x3000, &[7; 100]);
    assert_eq!(bench.driver.request(TRANSMIT, &[read_part(0x3000, 100)]), 0);
    assert_eq!(bench.far[0].take(), [7; 100]);
    assert!(!bench.kernel.state().rings[RECEIVE].running);
    bench.kernel.state().refuses = None;
    bench.driver.initialise(u64::MAX);
    bench.kernel.wait_for_running(true);
}

#[test]
fn a_descriptor_that_is_no_vhost_net_is_done_without() {
    let device = File::open("/dev/null").unwrap();
    assert!(crate::virtio::net::own("net0", &[device]).is_empty());
}

#[test]
fn an_error_is_of_the_rings_that_had_it_not_of_the_next_drivers() {
    let mut bench = start(Fake::default());
    for _ in 0..20 {
        bench.kernel.wait_for_running(true);
        let error = |state: &State| state.rings[TRANSMIT].error.as_ref().unwrap().signal();
        error(&bench.kernel.state());
        bench.driver.initialise(u64::MAX);
    }
    bench.kernel.wait_for_running(true);
    let head = bench.driver.submit(TRANSMIT, &[read_part(0x3000, 100)]);
    bench.kernel.use_chain(&bench.driver, TRANSMIT, head, 0);
    assert_eq!(bench.driver.used(TRANSMIT).0, head);
    assert_eq!(bench.driver.status() & status::NEEDS_RESET, 0);
}

#[test]
fn the_kernel_signals_the_vector_that_the_queue_has_now() {
    let bench = start(Fake::default());
    let vector = |vector| {
        bench.driver.set(0x16, TRANSMIT as u64, 2);
        bench.driver.set(0x1a, vector, 2);
        bench.kernel.wait_for_running(true);
    };
    let signal = || {
        let state = bench.kernel.state();
        state.rings[TRANSMIT].call.as_ref().unwrap().signal();
    };
    bench.kernel.wait_for_running(true);
    vector(1);
    let before = bench.driver.recorder.triggers(1);
    signal();
    assert_eq!(bench.driver.recorder.triggers(1), before + 1);
    // None: the driver looks at the register, and this process fills it in.
    vector(NO_VECTOR.into());
    signal();
    let (begin, mut isr) = (Instant::now(), [0]);
    while isr[0] & 1 == 0 {
        assert!(begin.elapsed() < DEADLINE, "nobody fills it in");
        bench.driver.read(0x1000, &mut isr);
    }
}

#[test]
fn a_pair_is_joined_while_the_driver_uses_it() {
    const CONTROL: usize = 4;
    let kernels = [Fake::default(), Fake::default()];
    let mut bench = start_all(&kernels, Rig::new());
    kernels[0].wait_for_running(true);
    assert!(!kernels[1].state().rings[RECEIVE].running);
    for (pairs, running) in [(2, true), (1, false), (2, true)] {
        bench.driver.put(0x1000, &[4, 0, pairs, 0]);
        let parts = [
            read_part(0x1000, 2),
            read_part(0x1002, 2),
            write_part(0x2000, 1),
        ];
        assert_eq!(bench.driver.request(CONTROL, &parts), 1);
        assert_eq!(bench.driver.take(0x2000, 1), [0]);
        kernels[1].wait_for_running(running);
        kernels[0].wait_for_running(true);
    }
}

#[test]
fn a_device_that_goes_takes_the_rings_along() {
    let bench = start(Fake::default());
    bench.kernel.wait_for_running(true);
    drop(bench.driver);
    bench.kernel.wait_for_running(false);
}

#[test]
fn a_kernel_without_what_drivers_may_use_is_refused() {
    struct Poor;
    impl Kernel for Poor {
        fn call(&mut self, call: Call<'_>) -> Result<u64, Errno> {
            Ok(match call {
                Call::GetFeatures => !F_MRG_RXBUF,
                _ => 0,
            })
        }
    }
    let refused = Vhost::with(Box::new(Poor)).err().unwrap();
    assert!(matches!(
        refused,
        VhostError::Features {
            missing: F_MRG_RXBUF
        }
    ));
}

#[test]
fn where_it_is_is_said_by_the_tap_while_the_kernel_moves_its_packets() {
    let bench = start(Fake::default());
    bench.kernel.wait_for_running(true);
    bench.driver.device.announce();
    let frame = bench.far[0].take();
    assert_eq!(frame[12 + 6..12 + 12], MAC);
    assert_eq!(frame[12 + 12..12 + 14], [0x80, 0x35]);
    assert!(
        bench.driver.recorder.wait(0, DEADLINE),
        "the driver is asked"
    );
    bench.kernel.wait_for_running(true);
}
