//! Load on a disk: reads or writes of one size, one after the other or all over the disk, with so many
//! in flight at any time. What `blk-bench` measures.

use virtio_drivers::transport::{DeviceStatus, Transport};
use virtio_drivers::{Error, Result};

use crate::disk::{Disk, FEATURE_FLUSH, READ, SECTOR, WRITE, header, mix};
use crate::ring::{EVENT_INDEX, Ring, RingMemory, SLOTS};
use crate::{clock, cpu, nonce};

/// No request takes longer; beyond it the device is given up.
const PATIENCE_US: u64 = 60_000_000;
/// Sleeps are no longer than this, so that one timer serves many of them.
const DOZE_US: u64 = 3_000_000;

#[derive(Clone, Copy)]
pub struct Load {
    pub write: bool,
    pub random: bool,
    /// Requests in flight.
    pub depth: u16,
    /// Requests in all.
    pub count: u64,
    /// Bytes of each, whole sectors.
    pub size: u64,
    /// Look for completions without rest, instead of sleeping until an interrupt.
    pub poll: bool,
}

/// What it took.
pub struct Score {
    pub tsc: u64,
    pub interrupts: u64,
    pub kicks: u64,
}

impl Load {
    /// Whether `disk` can bear it.
    pub fn fits(&self, disk: &Disk) -> bool {
        let whole = self.size > 0 && self.size.is_multiple_of(SECTOR);
        let room = disk.buffer_length() / u64::from(self.depth.max(1));
        whole && (1..=SLOTS).contains(&self.depth) && self.size <= room.min(disk.capacity)
    }

    /// Where the request of this number goes.
    fn sector(&self, number: u64, capacity: u64) -> u64 {
        let places = capacity / self.size;
        let place = if self.random { mix(number) } else { number } % places;
        place * (self.size / SECTOR)
    }
}

/// What requests in flight need beside their data.
struct Slots {
    headers: [[u8; 16]; SLOTS as usize],
    status: [u8; SLOTS as usize],
    data: u64,
}

impl Disk {
    /// Puts the load on the disk, through a queue of its own; afterwards the disk is as before.
    pub fn bear(&mut self, load: &Load) -> Result<Score> {
        if !load.fits(self) {
            return Err(Error::InvalidParam);
        }
        let place = match self.load_ring {
            Some(place) => place,
            None => *self.load_ring.insert(RingMemory::take()?),
        };
        self.fill(nonce());
        self.transport.reset();
        // With flushes known to the driver a write need not be durable when it is done.
        let agreed = self.transport.negotiate(EVENT_INDEX | FEATURE_FLUSH)?;
        let ring = Ring::new(&mut self.transport, 0, place, agreed & EVENT_INDEX != 0)?;
        self.transport.finish_init();
        let score = self.run(load, ring);
        self.transport.reset();
        self.set_up()?;
        score
    }

    fn run(&mut self, load: &Load, mut ring: Ring) -> Result<Score> {
        let mut slots = Slots {
            headers: [[0; 16]; SLOTS as usize],
            status: [0xff; SLOTS as usize],
            data: self.buffer_address(),
        };
        let capacity = self.capacity;
        let vector = self.transport.vector_of(0);
        let interrupts = cpu::interrupts_of(vector);
        let begin = cpu::tsc();
        let (mut started, mut done) = (0, 0);
        while started < load.count.min(load.depth.into()) {
            slots.submit(
                &mut ring,
                load,
                started as u16,
                load.sector(started, capacity),
            );
            started += 1;
        }
        while done < load.count {
            while let Some(slot) = ring.take() {
                done += 1;
                if slots.status(slot) != Some(0) {
                    return Err(Error::IoError);
                }
                if started < load.count {
                    slots.submit(&mut ring, load, slot, load.sector(started, capacity));
                    started += 1;
                }
            }
            if load.poll {
                ring.mute();
            }
            ring.kick(&mut self.transport);
            if done < load.count && !wait(&ring, load.poll) {
                self.transport.set_status(DeviceStatus::empty());
                return Err(Error::IoError);
            }
        }
        Ok(Score {
            tsc: cpu::tsc() - begin,
            interrupts: cpu::interrupts_of(vector) - interrupts,
            kicks: ring.kicks,
        })
    }
}

impl Slots {
    fn submit(&mut self, ring: &mut Ring, load: &Load, slot: u16, sector: u64) {
        let index = usize::from(slot);
        self.headers[index] = header(if load.write { WRITE } else { READ }, sector);
        self.status[index] = 0xff;
        let data = self.data + u64::from(slot) * load.size;
        ring.submit(
            slot,
            [
                ((&raw const self.headers[index]) as u64, 16, false),
                (data, load.size as u32, !load.write),
                ((&raw const self.status[index]) as u64, 1, true),
            ],
        );
    }

    fn status(&self, slot: u16) -> Option<u8> {
        let status = self.status.get(usize::from(slot))?;
        Some(crate::memory::read_u8((&raw const *status) as u64))
    }
}

/// Until a request is done; false if that takes too long.
fn wait(ring: &Ring, poll: bool) -> bool {
    let end = cpu::tsc().saturating_add(clock::tsc_of_us(PATIENCE_US));
    loop {
        let seen = cpu::events();
        if if poll { ring.has_used() } else { ring.listen() } {
            return true;
        }
        let now = cpu::tsc();
        if now > end {
            return false;
        }
        if poll {
            core::hint::spin_loop();
        } else {
            clock::pulse(nonce());
            clock::doze(seen, now + clock::tsc_of_us(DOZE_US));
        }
    }
}
