//! The device as a driver sees it, on wires instead of a tap.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use rstest::rstest;
use rustix::io::Errno;

use super::control::{
    F_CTRL_RX, F_GUEST_ANNOUNCE, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_MQ, F_MRG_RXBUF,
    HEADER,
};
use super::testing::{Far, wires};
use super::*;
use crate::config::NetLimit;
use crate::device::Device;
use crate::virtio::VirtioPciDevice;
use crate::virtio::feature;
use crate::virtio::testing::{DEADLINE, Driver, Rig, read_part, think, write_part};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const BUFFERS: u64 = 0x10_0000;

fn config(queues: u16) -> NetConfig {
    NetConfig {
        mac: MAC,
        queues,
        mtu: Some(9000),
        limit: None,
        addresses: Vec::new(),
    }
}

struct Bench {
    rig: Rig,
    driver: Driver,
    far: Vec<Far>,
}

fn start_with(config: &NetConfig, features: u64) -> Bench {
    let rig = Rig::new();
    let (board, recorder) = rig.with_recorder();
    let wires = wires(config.queues);
    let files = NetFiles {
        taps: wires.files,
        vhost: Vec::new(),
    };
    let net = Net::open("net0", config, &files, &rig.board.threads).unwrap();
    let device = VirtioPciDevice::new("net0", Box::new(net), &board).unwrap();
    let driver = Driver::start_with(&rig, device, recorder, features);
    let far = wires.far;
    Bench { rig, driver, far }
}

/// Takes every packet at once and never has one, so that nothing but the driver and the clock wakes its
/// thread. What it is to answer first, the last one before the others, can be given to it.
struct Sink {
    quiet: EventFd,
    answers: Vec<Errno>,
    /// How often it was told what may be left to the driver.
    told: Arc<AtomicUsize>,
}

impl NetBackend for Sink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.quiet.as_fd()
    }

    fn receive(&mut self, _: &mut Frame) -> Result<usize, Errno> {
        Err(Errno::AGAIN)
    }

    fn send(&mut self, _: &Frame) -> Result<(), Errno> {
        self.answers.pop().map_or(Ok(()), Err)
    }

    fn send_bytes(&mut self, _: &[u8]) -> Result<(), Errno> {
        Ok(())
    }

    fn set_offloads(&mut self, _: Offloads) -> Result<(), Errno> {
        self.told.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn set_enabled(&mut self, _: bool) -> Result<(), Errno> {
        Ok(())
    }
}

impl Sink {
    fn new() -> Self {
        Self {
            quiet: EventFd::new().unwrap(),
            answers: Vec::new(),
            told: Arc::default(),
        }
    }
}

fn start_on(sink: Sink, limit: Option<NetLimit>) -> Bench {
    let rig = Rig::new();
    let (board, recorder) = rig.with_recorder();
    let config = NetConfig { limit, ..config(1) };
    let net = Net::new("net0", &config, vec![Box::new(sink)], &rig.board.threads).unwrap();
    let device = VirtioPciDevice::new("net0", Box::new(net), &board).unwrap();
    let driver = Driver::start_with(&rig, device, recorder, u64::MAX);
    let far = Vec::new();
    Bench { rig, driver, far }
}

fn start(queues: u16) -> Bench {
    start_with(&config(queues), u64::MAX)
}

/// A packet with its header: `length` bytes in all.
fn packet(to: [u8; 6], length: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    bytes.extend(to);
    let at = bytes.len();
    bytes.extend((at..length).map(|place| (place as u8).wrapping_mul(31) ^ seed));
    bytes
}

impl Bench {
    /// Posts receive buffers of that many bytes, one after the other in memory.
    fn post(&mut self, queue: usize, count: u64, length: u32) {
        for step in 0..count {
            let place = BUFFERS + step * u64::from(length);
            self.driver.submit(queue, &[write_part(place, length)]);
        }
        self.driver.kick(queue);
    }

    fn control(&mut self, queue: usize, command: &[u8]) -> u8 {
        self.driver.put(0x1000, command);
        self.driver.put(0x2000, &[0xee]);
        let mut parts = vec![read_part(0x1000, 2)];
        // Not every command has data.
        if command.len() > 2 {
            parts.push(read_part(0x1002, command.len() as u32 - 2));
        }
        parts.push(write_part(0x2000, 1));
        assert_eq!(self.driver.request(queue, &parts), 1);
        self.driver.take(0x2000, 1)[0]
    }

    /// Waits for a whole announcement: each of its frames, without the header. None is said afterwards.
    fn announced(&mut self, control: usize) -> Vec<Vec<u8>> {
        let frames = (0..5)
            .map(|_| self.far[0].take().split_off(HEADER))
            .collect();
        // By the same thread, after all that belongs to the last time.
        assert_eq!(self.control(control, &[0, 0, 1]), 0);
        frames
    }

    fn status(&self) -> Vec<u8> {
        self.driver.config(6, 2)
    }
}

/// Where RARP has the sender's address.
const SENDER: std::ops::Range<usize> = 22..28;

#[test]
fn configuration_says_address_link_pairs_and_mtu() {
    let bench = start(3);
    assert_eq!(bench.driver.config(0, 6), MAC);
    assert_eq!(bench.driver.config(6, 6), [1, 0, 3, 0, 0x28, 0x23]);
    assert_eq!(bench.driver.offered() & F_MQ, F_MQ);
    assert_eq!(start(1).driver.offered() & F_MQ, 0);
}

#[test]
fn packets_pass_both_ways_with_their_headers() {
    let mut bench = start(1);
    let mut out = packet(OTHER, 1500, 1);
    out[..4].copy_from_slice(&[1, 0, 0, 0]);
    bench.driver.put(0x3000, &out);
    let parts = [read_part(0x3000, 12), read_part(0x300c, 1488)];
    assert_eq!(bench.driver.request(TRANSMIT, &parts), 0);
    assert_eq!(bench.far[0].take(), out);

    bench.post(RECEIVE, 1, 2048);
    let mut packet = packet(MAC, 900, 2);
    bench.far[0].send(&packet).unwrap();
    assert_eq!(bench.driver.used(RECEIVE), (0, 900));
    packet[10] = 1;
    assert_eq!(bench.driver.take(BUFFERS, 900), packet);
}

/// As with disks: the driver kicks only when it is asked to.
#[rstest]
fn no_packet_is_overlooked(#[values(true, false)] event_index: bool) {
    let features = match event_index {
        true => u64::MAX,
        false => !feature::EVENT_IDX,
    };
    let mut bench = start_with(&config(1), features);
    let out = packet(OTHER, 300, 1);
    bench.driver.put(0x3000, &out);
    for number in 0..3000 {
        think(number);
        let head = bench.driver.submit(TRANSMIT, &[read_part(0x3000, 300)]);
        bench.driver.kick_if_asked(TRANSMIT, 1, event_index);
        assert_eq!(bench.driver.used(TRANSMIT), (head, 0), "packet {number}");
        assert_eq!(bench.far[0].take().len(), 300);
    }
}

#[test]
fn a_long_packet_is_spread_over_as_many_buffers_as_it_needs_and_shown_at_once() {
    let mut bench = start(1);
    bench.post(RECEIVE, 50, 1536);
    let mut long = packet(MAC, 60_000, 3);
    bench.far[0].send(&long).unwrap();
    let (mut used, mut rest) = (Vec::new(), long.len());
    used.push(bench.driver.used(RECEIVE));
    // With the first all of them are there: no wait for the others.
    used.extend(std::iter::from_fn(|| bench.driver.try_used(RECEIVE)));
    for (step, (head, length)) in used.iter().enumerate() {
        assert_eq!((*head, *length as usize), (step as u16, rest.min(1536)));
        rest -= rest.min(1536);
    }
    assert_eq!((used.len(), rest), (40, 0));
    long[10] = 40;
    assert!(bench.driver.take(BUFFERS, long.len()) == long);
    // The next one goes on with the buffer after it.
    bench.far[0].send(&packet(MAC, 100, 4)).unwrap();
    assert_eq!(bench.driver.used(RECEIVE), (40, 100));
}

/// The kernel writes to them; of a header alone, which the device completes, it would show by itself.
#[test]
fn packets_mark_the_pages_that_they_fill_dirty() {
    use vm_memory::bitmap::Bitmap;
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
    let mut bench = start(1);
    let memory = bench.rig.board.memory.clone();
    let region = memory.iter().next().unwrap();
    let dirty = |page: u64| {
        let address = BUFFERS + page * 4096;
        GuestMemoryRegion::bitmap(region).dirty_at(address as usize)
    };
    // Pages 0 to 2 and 16 to 17 in one buffer, 32 to 33 in the next.
    let at = |page: u64, pages: u32| write_part(BUFFERS + page * 4096, pages * 4096);
    bench.driver.submit(RECEIVE, &[at(0, 3), at(16, 2)]);
    bench.driver.submit(RECEIVE, &[at(32, 2)]);
    bench.driver.kick(RECEIVE);
    assert!((0..34).all(|page| !dirty(page)));
    let filled = |page: u64| (0..34).filter(|page| dirty(*page)).eq(0..=page);
    bench.far[0].send(&packet(MAC, 5000, 1)).unwrap();
    assert_eq!(bench.driver.used(RECEIVE), (0, 5000));
    assert!(filled(1), "the rest of its buffer is as it was");

    bench.driver.submit(RECEIVE, &[at(0, 3), at(16, 2)]);
    bench.driver.kick(RECEIVE);
    bench.far[0].send(&packet(MAC, 20_000, 2)).unwrap();
    let [first, second] = [(); 2].map(|()| bench.driver.used(RECEIVE).1);
    assert_eq!([first, second], [8192, 11808]);
    let wanted = (0..3).chain(32..34);
    assert!((0..34).filter(|page| dirty(*page)).eq(wanted));
}

#[test]
fn a_packet_waits_for_buffers_that_are_missing() {
    let mut bench = start(1);
    bench.post(RECEIVE, 2, 1024);
    let mut long = packet(MAC, 3000, 5);
    bench.far[0].send(&long).unwrap();
    // A command passes: the thread is past the packet by then.
    assert_eq!(bench.control(2, &[0, 0, 1]), 0);
    assert_eq!(bench.driver.try_used(RECEIVE), None);
    let third = BUFFERS + 2048;
    bench.driver.submit(RECEIVE, &[write_part(third, 1024)]);
    bench.driver.kick(RECEIVE);
    assert_eq!(bench.driver.used(RECEIVE), (0, 1024));
    assert_eq!(bench.driver.used(RECEIVE), (1, 1024));
    assert_eq!(bench.driver.used(RECEIVE), (2, 952));
    long[10] = 3;
    assert!(bench.driver.take(BUFFERS, 3000) == long);
}

#[test]
fn without_mergeable_buffers_what_is_too_long_is_dropped() {
    let features = !(F_MRG_RXBUF | F_GUEST_TSO4 | F_GUEST_TSO6);
    let mut bench = start_with(&config(1), features);
    bench.post(RECEIVE, 2, 1600);
    bench.far[0].send(&packet(MAC, 1700, 6)).unwrap();
    bench.far[0].send(&packet(MAC, 1600, 7)).unwrap();
    assert_eq!(bench.driver.used(RECEIVE), (0, 1600));
    assert_eq!(bench.driver.take(BUFFERS + 10, 2), [1, 0]);
    assert_eq!(bench.driver.try_used(RECEIVE), None);
}

#[test]
fn the_filter_keeps_out_what_is_for_others() {
    let mut bench = start(1);
    assert_eq!(bench.control(2, &[0, 0, 0]), 0, "not promiscuous");
    bench.post(RECEIVE, 4, 2048);
    bench.far[0].send(&packet(OTHER, 100, 8)).unwrap();
    bench.far[0].send(&packet(MAC, 101, 9)).unwrap();
    assert_eq!(bench.driver.used(RECEIVE), (0, 101));
    assert_eq!(
        bench.control(2, &[1, 1, 2, 0, 0, 0, 0, 2]),
        0,
        "the address"
    );
    assert_eq!(bench.driver.config(0, 6), OTHER);
    bench.far[0].send(&packet(MAC, 102, 10)).unwrap();
    bench.far[0].send(&packet(OTHER, 103, 11)).unwrap();
    assert_eq!(bench.driver.used(RECEIVE), (1, 103));
    assert_eq!(bench.control(2, &[2, 0, 1, 0]), 1, "no VLAN filter");
}

#[test]
fn pairs_are_used_once_the_driver_asks_for_them() {
    let mut bench = start(2);
    bench.post(RECEIVE, 1, 2048);
    bench.driver.put(0x3000, &packet(OTHER, 200, 12));
    bench.driver.submit(3, &[read_part(0x3000, 200)]);
    bench.driver.kick(3);
    assert_eq!(bench.control(4, &[4, 0, 3, 0]), 1, "there are only two");
    assert!(bench.far[1].try_take().is_none(), "not in use yet");
    assert_eq!(bench.control(4, &[4, 0, 2, 0]), 0);
    assert_eq!(bench.far[1].take(), packet(OTHER, 200, 12));
    assert_eq!(bench.driver.used(3), (0, 0));
    bench.post(2, 1, 2048);
    bench.far[1].send(&packet(MAC, 300, 13)).unwrap();
    assert_eq!(bench.driver.used(2), (0, 300));
}

#[test]
fn without_multi_queue_the_control_queue_is_the_third() {
    let mut bench = start_with(&config(4), !F_MQ);
    assert_eq!(bench.control(2, &[0, 0, 0]), 0);
    let mut bench = start_with(&config(1), !(F_CTRL_RX | F_MQ));
    assert_eq!(bench.control(2, &[0, 0, 0]), 1, "was not negotiated");
}

#[test]
fn a_pause_gives_unused_buffers_back_and_loses_no_packet() {
    let mut bench = start(1);
    bench.post(RECEIVE, 60, 1536);
    for round in 0..20u8 {
        bench.far[0].send(&packet(MAC, 400, round)).unwrap();
        bench.driver.device.pause().unwrap();
        bench.driver.device.save().unwrap();
        bench.driver.device.resume().unwrap();
    }
    for round in 0..20u8 {
        assert_eq!(bench.driver.used(RECEIVE), (round.into(), 400));
        let mut sent = packet(MAC, 400, round);
        sent[10] = 1;
        let place = BUFFERS + 1536 * u64::from(round);
        assert!(bench.driver.take(place, 400) == sent, "round {round}");
    }
}

#[test]
fn a_restored_device_goes_on_where_the_saved_one_stopped() {
    let mut bench = start(2);
    assert_eq!(bench.control(4, &[4, 0, 2, 0]), 0);
    assert_eq!(bench.control(4, &[0, 0, 0]), 0);
    bench.post(2, 3, 2048);
    bench.far[1].send(&packet(MAC, 500, 14)).unwrap();
    assert_eq!(bench.driver.used(2), (0, 500));
    bench.driver.device.pause().unwrap();
    let saved = bench.driver.device.save().unwrap();

    let (board, recorder) = bench.rig.with_recorder();
    let wires = wires(2);
    let files = NetFiles {
        taps: wires.files,
        vhost: Vec::new(),
    };
    let restored = VirtioPciDevice::restore(&saved, &board, |saved| {
        let net = Net::open("net0", &config(2), &files, &board.threads)?;
        Ok(Box::new(Net::restore(saved, net)?))
    })
    .unwrap();
    // The old one is gone, and its doorbells with it.
    let old = std::mem::replace(&mut bench.driver.device, restored);
    drop(old);
    bench.driver.recorder = recorder;
    bench.driver.device.resume().unwrap();
    wires.far[1].send(&packet(OTHER, 600, 15)).unwrap();
    wires.far[1].send(&packet(MAC, 601, 16)).unwrap();
    assert_eq!(bench.driver.used(2), (1, 601), "the filter holds too");
}

#[test]
fn a_reset_forgets_filter_and_pairs() {
    let mut bench = start(2);
    assert_eq!(bench.control(4, &[4, 0, 2, 0]), 0);
    assert_eq!(bench.control(4, &[0, 0, 0]), 0);
    bench.driver.initialise(u64::MAX);
    bench.post(RECEIVE, 1, 2048);
    bench.far[0].send(&packet(OTHER, 100, 17)).unwrap();
    assert_eq!(bench.driver.used(RECEIVE), (0, 100));
}

#[test]
fn a_buffer_the_wrong_way_round_takes_the_device_out_of_service_until_its_reset() {
    let mut bench = start(1);
    bench.driver.submit(TRANSMIT, &[write_part(0x3000, 100)]);
    bench.driver.kick(TRANSMIT);
    bench.driver.wait_for_needs_reset();
    bench.driver.initialise(u64::MAX);
    bench.driver.put(0x3000, &packet(OTHER, 64, 18));
    bench.driver.request(TRANSMIT, &[read_part(0x3000, 64)]);
    assert_eq!(bench.far[0].take(), packet(OTHER, 64, 18));
}

#[test]
fn what_is_no_packet_is_dropped_and_the_next_one_goes() {
    let mut bench = start(1);
    bench.driver.put(0x3000, &packet(OTHER, 64, 19));
    let huge = [read_part(0x3000, 1 << 20)];
    assert_eq!(bench.driver.request(TRANSMIT, &huge), 0);
    assert_eq!(bench.driver.request(TRANSMIT, &[read_part(0x3000, 11)]), 0);
    bench.driver.request(TRANSMIT, &[read_part(0x3000, 64)]);
    assert_eq!(bench.far[0].take(), packet(OTHER, 64, 19));
    assert!(bench.far[0].try_take().is_none());
}

#[test]
fn a_rate_limit_holds_each_direction() {
    let mut limited = config(1);
    limited.limit = Some(NetLimit {
        bytes_per_second: None,
        packets_per_second: Some(50),
        burst_ms: 100,
    });
    let mut bench = start_with(&limited, u64::MAX);
    bench.driver.put(0x3000, &packet(OTHER, 64, 20));
    bench.post(RECEIVE, 15, 2048);
    let begin = Instant::now();
    for _ in 0..15 {
        bench.driver.submit(TRANSMIT, &[read_part(0x3000, 64)]);
        bench.far[0].send(&packet(MAC, 64, 21)).unwrap();
    }
    bench.driver.kick(TRANSMIT);
    for _ in 0..15 {
        bench.driver.used(TRANSMIT);
        bench.driver.used(RECEIVE);
    }
    // 5 at once, then 10 at 50 a second.
    let took = begin.elapsed();
    assert!(took >= Duration::from_millis(180), "{took:?}");
}

#[test]
fn a_limit_that_lets_go_just_as_the_thread_goes_to_sleep_wakes_it() {
    // Waits of one to some microseconds: the limit is over before or after the thread has looked.
    for packets_per_second in [1_000_000, 300_000, 100_000] {
        let limit = NetLimit {
            bytes_per_second: None,
            packets_per_second: Some(packets_per_second),
            burst_ms: 1,
        };
        let mut bench = start_on(Sink::new(), Some(limit));
        bench.driver.put(0x3000, &packet(OTHER, 64, 22));
        for _ in 0..50 {
            for _ in 0..200 {
                bench.driver.submit(TRANSMIT, &[read_part(0x3000, 64)]);
            }
            // One kick for all of them.
            bench.driver.kick(TRANSMIT);
            for _ in 0..200 {
                bench.driver.used(TRANSMIT);
            }
        }
    }
}

#[test]
fn a_packet_for_which_the_host_has_no_memory_is_dropped_and_holds_up_nobody() {
    let mut sink = Sink::new();
    sink.answers.push(Errno::NOBUFS);
    let mut bench = start_on(sink, None);
    // Commands pass: whatever woke the thread at its begin is over by then.
    for _ in 0..2 {
        assert_eq!(bench.control(2, &[0, 0, 1]), 0);
    }
    bench.driver.put(0x3000, &packet(OTHER, 64, 23));
    let head = bench.driver.submit(TRANSMIT, &[read_part(0x3000, 64)]);
    bench.driver.kick(TRANSMIT);
    assert_eq!(bench.driver.used(TRANSMIT), (head, 0));
}

#[test]
fn a_driver_that_turns_offloads_on_and_off_does_not_keep_the_hosts_networks_busy() {
    let sink = Sink::new();
    let told = sink.told.clone();
    let mut bench = start_on(sink, None);
    let set = |bench: &mut Bench, bits: u64| {
        let command = [&[5, 0][..], &bits.to_le_bytes()].concat();
        assert_eq!(bench.control(2, &command), 0);
    };
    set(&mut bench, 0);
    let before = told.load(Ordering::Relaxed);
    for _ in 0..20 {
        set(&mut bench, 0);
    }
    assert_eq!(told.load(Ordering::Relaxed), before, "it was so already");
    let begin = Instant::now();
    for step in 1..=100 {
        set(&mut bench, (step & 1) * F_GUEST_CSUM);
    }
    assert_eq!(told.load(Ordering::Relaxed), before + 100);
    // 64 at once, less the one before, the rest at 100 a second.
    let took = begin.elapsed();
    assert!(took >= Duration::from_millis(300), "{took:?}");
}

#[rstest]
#[case(1)]
#[case(2)]
fn a_device_that_has_come_here_says_so_by_its_first_pair_and_has_its_driver_do_likewise(
    #[case] pairs: u16,
) {
    let control = 2 * usize::from(pairs);
    let mut bench = start(pairs);
    bench.driver.device.announce();
    assert!(bench.driver.recorder.wait(0, DEADLINE), "an interrupt");
    for frame in bench.announced(control) {
        assert_eq!(frame[12..14], [0x80, 0x35]);
        assert_eq!(frame[SENDER], MAC);
    }
    assert_eq!(bench.status(), [3, 0], "it is asked until it answers");
    assert_eq!(bench.control(control, &[3, 0, 0]), 1, "that is no answer");
    assert_eq!(bench.control(control, &[3, 1]), 1);
    assert_eq!(bench.status(), [3, 0]);
    assert_eq!(bench.control(control, &[3, 0]), 0);
    assert_eq!(bench.status(), [1, 0]);
    assert!(bench.far.iter().all(|far| far.try_take().is_none()));
}

#[test]
fn a_driver_that_did_not_agree_to_announce_is_not_asked() {
    let mut bench = start_with(&config(1), !F_GUEST_ANNOUNCE);
    bench.driver.device.announce();
    bench.announced(2);
    assert_eq!(bench.status(), [1, 0]);
    assert_eq!(bench.control(2, &[3, 0]), 1);
}

#[test]
fn a_drivers_reset_takes_the_question_with_it() {
    let mut bench = start(1);
    bench.driver.device.announce();
    bench.announced(2);
    assert_eq!(bench.status(), [3, 0]);
    bench.driver.initialise(u64::MAX);
    assert_eq!(bench.status(), [1, 0]);
}

#[test]
fn what_is_announced_is_the_address_that_the_driver_has_set_and_those_that_are_known() {
    let mut named = config(1);
    named.addresses = vec!["10.0.0.1".parse().unwrap(), "fe80::1".parse().unwrap()];
    let mut bench = start_with(&named, u64::MAX);
    let set = [&[1, 1][..], &OTHER].concat();
    assert_eq!(bench.control(2, &set), 0);
    bench.driver.device.announce();
    for (number, kind) in [[0x80, 0x35], [0x08, 0x06], [0x86, 0xdd]]
        .iter()
        .enumerate()
    {
        let frame = bench.far[0].take().split_off(HEADER);
        assert_eq!(frame[6..12], OTHER, "frame {number}");
        assert_eq!(&frame[12..14], kind, "frame {number}");
    }
}

/// Its guest may be going on elsewhere.
#[test]
fn nothing_is_announced_of_a_device_at_rest_until_it_goes_on() {
    let mut bench = start(1);
    bench.driver.device.announce();
    bench.far[0].take();
    bench.driver.device.pause().unwrap();
    while bench.far[0].try_take().is_some() {}
    // sleeps because that nothing comes is seen in no event: three more times are due by then
    std::thread::sleep(Duration::from_millis(500));
    assert!(bench.far[0].try_take().is_none());
    bench.driver.device.resume().unwrap();
    bench.far[0].take();
    assert_eq!(bench.control(2, &[0, 0, 1]), 0);
}

/// A machine of a build from before has a driver that never heard of it, and a record like any.
#[test]
fn a_question_is_in_no_record_and_a_restored_device_asks_anew() {
    for (features, asked) in [(u64::MAX, [3, 0]), (!F_GUEST_ANNOUNCE, [1, 0])] {
        let mut bench = start_with(&config(1), features);
        bench.driver.device.pause().unwrap();
        let before = bench.driver.device.save().unwrap();
        bench.driver.device.resume().unwrap();
        bench.driver.device.announce();
        bench.announced(2);
        assert_eq!(bench.status(), asked);
        bench.driver.device.pause().unwrap();
        let saved = bench.driver.device.save().unwrap();
        assert_eq!((&saved.id, saved.version), (&before.id, before.version));
        assert_eq!(saved.state.len(), before.state.len());
        let (board, recorder) = bench.rig.with_recorder();
        let wires = wires(1);
        let files = NetFiles {
            taps: wires.files,
            vhost: Vec::new(),
        };
        let restored = VirtioPciDevice::restore(&saved, &board, |saved| {
            let net = Net::open("net0", &config(1), &files, &board.threads)?;
            Ok(Box::new(Net::restore(saved, net)?))
        })
        .unwrap();
        drop(std::mem::replace(&mut bench.driver.device, restored));
        (bench.driver.recorder, bench.far) = (recorder, wires.far);
        bench.driver.device.resume().unwrap();
        assert_eq!(bench.status(), [1, 0], "nobody has asked yet");
        bench.driver.device.announce();
        bench.announced(2);
        assert_eq!(bench.status(), asked);
    }
}
