//! Commands: where they come from, what they do, one answer each.

use core::fmt::{self, Write as _};

use crate::acpi::Acpi;
use crate::devices::Devices;
use crate::disk_load::Load;
use crate::pci::Bus;
use crate::serial::{self, Line};
use crate::stack::{self, Stack};
use crate::start_info::StartInfo;
use crate::{churn, clock, cpu, hot_memory, memory, misuse, nonce, smp};

const PAGE: u64 = 4096;
const PAGES_PER_MIB: u64 = 256;
/// Filled, asked for, eject: 32 bits each, as our DSDT has them.
const SLOTS_PORT: u16 = 0x640;

/// Which vCPUs are there, came, are asked for: 64 bits each; then eject, as our DSDT has them.
const PROCESSORS_PORT: u16 = 0x660;
/// A processor that was told to start does within this time.
const START_MS: u64 = 5000;

/// Why a command was not carried out, as its `err` line says it.
pub enum Refusal {
    Unknown,
    Usage(&'static str),
    NoDevice,
    Device(virtio_drivers::Error),
    At(u64),
    Failed(&'static str),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.write_str("unknown command"),
            Self::Usage(usage) => write!(f, "usage: {usage}"),
            Self::NoDevice => f.write_str("no such device"),
            Self::Device(error) => write!(f, "{error}"),
            Self::At(offset) => write!(f, "at={offset}"),
            Self::Failed(what) => f.write_str(what),
        }
    }
}

impl From<virtio_drivers::Error> for Refusal {
    fn from(error: virtio_drivers::Error) -> Self {
        Self::Device(error)
    }
}

type Outcome = Result<(), Refusal>;

/// Words of a command, as numbers when asked for.
pub struct Words<'a>(core::str::SplitAsciiWhitespace<'a>);

impl<'a> Words<'a> {
    pub fn word(&mut self) -> Option<&'a str> {
        self.0.next()
    }

    pub fn number(&mut self) -> Option<u64> {
        let word = self.word()?;
        match word.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => word.parse().ok(),
        }
    }
}

/// The booted guest.
pub struct Probe {
    info: StartInfo,
    pub acpi: Acpi,
    pub devices: Devices,
    stack: Option<&'static mut Stack>,
    /// There was a stack: its memory is taken for good.
    spoke: bool,
    typed: Line,
    spoken: Line,
    serial_interrupts: u64,
    heeds_button: bool,
}

impl Probe {
    pub fn new(info: StartInfo, acpi: Acpi, devices: Devices) -> Self {
        let (typed, spoken) = (Line::new(), Line::new());
        let mut probe = Self {
            info,
            acpi,
            devices,
            stack: None,
            spoke: false,
            typed,
            spoken,
            serial_interrupts: u64::MAX,
            heeds_button: true,
        };
        probe.speak();
        probe
    }

    /// Takes a network into use, the first that there is.
    fn speak(&mut self) {
        if let Some(address) = self.info.option("net_ip").filter(|_| !self.spoke)
            && let Some(net) = self.devices.net.take()
        {
            self.stack = Stack::new(net, address);
            self.spoke = true;
        }
    }

    /// Carries out the command line's commands, then those that come in.
    pub fn run(mut self) -> ! {
        if let Some(mode) = self.info.option("stamp") {
            let mut line = Line::new();
            let _ = write!(line, "stamp {mode}");
            self.carry_out(line.as_str(), false);
        }
        let mut script = Line::new();
        let _ = script.write_str(self.info.option("run").unwrap_or(""));
        for command in script.as_str().split(';') {
            self.carry_out(command, false);
        }
        loop {
            let seen = cpu::events();
            clock::pulse(nonce());
            if self
                .acpi
                .button_pressed_since(cpu::interrupts_of(cpu::VECTOR_SCI))
            {
                crate::say!("button");
                if self.heeds_button {
                    self.acpi.power_off();
                }
            }
            let mut busy = self.stack.as_mut().is_some_and(|stack| stack.turn());
            busy |= (self.devices.vsock.as_mut()).is_some_and(|vsock| vsock.turn());
            if !self.listen() && !busy {
                let due = (self.stack.as_mut()).map_or(clock::FOREVER, |stack| stack.due());
                clock::doze(seen, due);
            }
        }
    }

    /// Takes in what was typed; true if there was something.
    fn listen(&mut self) -> bool {
        let mut heard = false;
        let interrupts = cpu::interrupts_of(cpu::VECTOR_SERIAL);
        if interrupts != self.serial_interrupts || !cpu::has_interrupts() {
            self.serial_interrupts = interrupts;
            while let Some(byte) = serial::read() {
                heard = true;
                if is_end(byte) {
                    let line = core::mem::replace(&mut self.typed, Line::new());
                    self.carry_out(line.as_str(), false);
                } else {
                    self.typed.push(byte);
                }
            }
        }
        let Some(console) = self
            .devices
            .console
            .as_mut()
            .filter(|console| console.has_input())
        else {
            return heard;
        };
        let mut lines = Line::new();
        core::mem::swap(&mut lines, &mut self.spoken);
        let _ = console.read(|byte| {
            lines.push(byte);
        });
        let text = lines.as_str();
        let (whole, rest) = text.rsplit_once(['\n', '\r']).unwrap_or(("", text));
        let _ = self.spoken.write_str(rest);
        for command in whole.split(['\n', '\r']) {
            self.carry_out(command, true);
        }
        true
    }

    fn carry_out(&mut self, command: &str, from_console: bool) {
        let mut words = Words(command.split_ascii_whitespace());
        let Some(mut name) = words.word() else { return };
        if name == "loudly" {
            let Some(what) = words.word() else { return };
            name = what;
            let mut begun = Line::new();
            let _ = writeln!(begun, "begun {name}");
            serial::write(begun.as_bytes());
        }
        // A pause may lie between the last look at the clock and this command, which may ask for it.
        clock::pulse(nonce());
        let mut answer = Line::new();
        let _ = write!(answer, "ok {name}");
        if let Err(refusal) = self.dispatch(name, &mut words, &mut answer) {
            answer.clear();
            let _ = write!(answer, "err {name} {refusal}");
        }
        answer.push(b'\n');
        serial::write(answer.as_bytes());
        if let Some(console) = self.devices.console.as_mut().filter(|_| from_console) {
            let _ = console.write(answer.as_bytes());
        }
    }

    fn dispatch(&mut self, name: &str, words: &mut Words, out: &mut Line) -> Outcome {
        match name {
            "info" => self.tell_info(out),
            "time" => tell_time(out),
            "random" => self.random(words, out),
            "touch" => self.touch(words, out),
            "zeros" => self.zeros(words, out),
            "fill" | "filled" => self.pattern(name, words, out),
            "dirty" => self.dirty(words, out),
            "weave" => self.weave(words, out),
            "churn" => self.churn(words),
            "balloon" => self.balloon(words, out),
            "memory" => self.hot_memory(words, out),
            "slots" => self.slots(out),
            "eject" => self.eject(words),
            "cpus" => self.cpus(out),
            "cpu-start" => self.start_cpu(words),
            "cpu-eject" => eject_cpu(words),
            "spin" => spin(words),
            "cpuid" => tell_cpuid(words, out),
            "stamp" => stamp(words),
            "gaps" => tell_gaps(out),
            "interrupts" => tell_interrupts(out),
            "echo" => {
                while let Some(word) = words.word() {
                    let _ = write!(out, " {word}");
                }
                Ok(())
            }
            "command-line" => {
                let _ = write!(out, " {}", self.info.command_line.as_str());
                Ok(())
            }
            "ignore-button" | "heed-button" => {
                self.heeds_button = name == "heed-button";
                Ok(())
            }
            "poweroff" => {
                self.acpi.power_off();
                after("still powered on")
            }
            "reboot" => {
                self.acpi.reboot();
                after("not reset")
            }
            "triple-fault" => cpu::triple_fault(),
            "panic" => {
                self.devices.panicked();
                Ok(())
            }
            "halt" => cpu::halt_forever(),
            "net" => match (&self.stack, &self.devices.net) {
                (Some(stack), _) => {
                    stack.tell(out);
                    Ok(())
                }
                (None, Some(net)) => {
                    stack::tell(net, out);
                    Ok(())
                }
                (None, None) => Err(Refusal::NoDevice),
            },
            "vsock" => self.vsock(words, out),
            "misuse" => misuse::act(self, words, out),
            "blk-bench" => self.load_disk(words, out),
            _ => self.disk(name, words, out),
        }
    }

    fn disk(&mut self, name: &str, words: &mut Words, out: &mut Line) -> Outcome {
        const RANGE: &str = "DEV OFF LEN";
        if !name.starts_with("disk-") {
            return Err(Refusal::Unknown);
        }
        let index = words.number().ok_or(Refusal::Usage("DEV …"))?;
        let disk = self.devices.disk(index as usize).ok_or(Refusal::NoDevice)?;
        let mut range = || -> Result<(u64, u64), Refusal> {
            let (offset, length) = words
                .number()
                .zip(words.number())
                .ok_or(Refusal::Usage(RANGE))?;
            if offset % 512 != 0 || length % 512 != 0 {
                return Err(Refusal::Failed("not whole sectors"));
            }
            Ok((offset, length))
        };
        match name {
            "disk-info" => {
                let (bytes, ro) = (disk.capacity, u8::from(disk.read_only()));
                let serial = disk.serial()?;
                let length = serial.iter().position(|&b| b == 0).unwrap_or(serial.len());
                let text = core::str::from_utf8(&serial[..length]).unwrap_or("?");
                let _ = write!(out, " bytes={bytes} ro={ro} serial={text}");
            }
            "disk-hash" => {
                let (offset, length) = range()?;
                let hash = disk.hash(offset, length)?;
                let _ = write!(out, " {hash:016x}");
            }
            "disk-write" => {
                let (offset, length) = range()?;
                let mut seed = words.number().ok_or(Refusal::Usage("DEV OFF LEN SEED"))?;
                let again = words.word() == Some("again");
                let begin = cpu::tsc();
                loop {
                    disk.write(offset, length, seed)?;
                    if !again || serial::has_input() {
                        break;
                    }
                    seed += 1;
                }
                disk.flush()?;
                let _ = write!(out, " us={}", clock::us(cpu::tsc() - begin));
                if again {
                    let _ = write!(out, " seed={seed}");
                }
            }
            "disk-check" => {
                let (offset, length) = range()?;
                let seed = words.number().ok_or(Refusal::Usage("DEV OFF LEN SEED"))?;
                let again = words.word() == Some("again");
                loop {
                    if let Some(place) = disk.check(offset, length, seed)? {
                        return Err(Refusal::At(place));
                    }
                    if !again || serial::has_input() {
                        break;
                    }
                }
            }
            "disk-discard" => range().and_then(|(o, l)| Ok(disk.clear(o, l, false)?))?,
            "disk-zero" => range().and_then(|(o, l)| Ok(disk.clear(o, l, true)?))?,
            "disk-flush" => disk.flush()?,
            _ => return Err(Refusal::Unknown),
        }
        Ok(())
    }

    fn vsock(&mut self, words: &mut Words, out: &mut Line) -> Outcome {
        let vsock = self.devices.vsock.as_mut().ok_or(Refusal::NoDevice)?;
        match (words.word(), words.number()) {
            (None, _) => vsock.tell(out),
            (Some("connect"), Some(port)) => vsock.connect(port as u32)?,
            _ => return Err(Refusal::Usage("[connect PORT]")),
        }
        Ok(())
    }

    fn load_disk(&mut self, words: &mut Words, out: &mut Line) -> Outcome {
        const USAGE: Refusal =
            Refusal::Usage("DEV read|write seq|random DEPTH COUNT [SIZE [poll]]");
        let index = words.number().ok_or(USAGE)?;
        let mut choice = |no: &str, yes: &str| match words.word() {
            Some(word) if word == no => Ok(false),
            Some(word) if word == yes => Ok(true),
            _ => Err(USAGE),
        };
        let (write, random) = (choice("read", "write")?, choice("seq", "random")?);
        let (depth, count) = words.number().zip(words.number()).ok_or(USAGE)?;
        let load = Load {
            write,
            random,
            depth: u16::try_from(depth).map_err(|_| USAGE)?,
            count,
            size: words.number().unwrap_or(PAGE),
            poll: words.word() == Some("poll"),
        };
        let disk = self.devices.disk(index as usize).ok_or(Refusal::NoDevice)?;
        let score = disk.bear(&load)?;
        let _ = write!(
            out,
            " ops={count} us={} interrupts={} kicks={}",
            clock::us(score.tsc),
            score.interrupts,
            score.kicks
        );
        Ok(())
    }

    fn tell_info(&self, out: &mut Line) -> Outcome {
        let _ = write!(
            out,
            " version={} nonce={:016x} vcpus={} memory_mib={} disks={} ticks={}",
            env!("CARGO_PKG_VERSION"),
            nonce(),
            smp::alive(),
            self.info.memory_mib(),
            self.devices.disk_count(),
            clock::ticks(),
        );
        for function in self.devices.bus.functions() {
            let (vendor, device) = (function.vendor, function.device);
            let _ = write!(
                out,
                " pci{:02x}={vendor:04x}:{device:04x}",
                function.devfn >> 3
            );
        }
        Ok(())
    }

    fn random(&mut self, words: &mut Words, out: &mut Line) -> Outcome {
        let count = words.number().unwrap_or(16).clamp(1, 512) as usize;
        let rng = self.devices.rng.as_mut().ok_or(Refusal::NoDevice)?;
        out.push(b' ');
        for byte in rng.bytes(count)? {
            let _ = write!(out, "{byte:02x}");
        }
        Ok(())
    }

    /// Writes a word into the next `pages` pages of free memory from `skip` on; pages written.
    fn write_pages(&self, skip: u64, pages: u64, value: u64) -> u64 {
        let (mut skip, mut left) = (skip, pages);
        for stretch in memory::free(&self.info) {
            let here = stretch.length / PAGE;
            if skip >= here {
                skip -= here;
                continue;
            }
            let count = left.min(here - skip);
            memory::dirty(stretch.start + skip * PAGE, count, value);
            (skip, left) = (0, left - count);
        }
        pages - left
    }

    fn touch(&self, words: &mut Words, out: &mut Line) -> Outcome {
        let mib = words.number().ok_or(Refusal::Usage("MIB"))?;
        let begin = cpu::tsc();
        let mut done = 0;
        while done < mib * PAGES_PER_MIB {
            let wrote = self.write_pages(done, PAGES_PER_MIB, begin);
            clock::pulse(nonce());
            done += wrote;
            if wrote < PAGES_PER_MIB {
                break;
            }
        }
        let _ = write!(
            out,
            " mib={} us={}",
            done / PAGES_PER_MIB,
            clock::us(cpu::tsc() - begin)
        );
        Ok(())
    }

    /// Where `touch` writes.
    fn zeros(&self, words: &mut Words, out: &mut Line) -> Outcome {
        let mib = words.number().ok_or(Refusal::Usage("MIB"))?;
        let (mut left, mut zeros) = (mib * PAGES_PER_MIB, 0);
        for stretch in memory::free(&self.info) {
            let count = left.min(stretch.length / PAGE);
            let pages = (0..count).map(|page| stretch.start + page * PAGE);
            zeros += pages.filter(|page| memory::read_u64(*page) == 0).count();
            left -= count;
        }
        let _ = write!(out, " pages={zeros}");
        Ok(())
    }

    /// Each page's first and last word, by its place and a seed: `fill` writes them, `filled` looks for them.
    fn pattern(&self, name: &str, words: &mut Words, out: &mut Line) -> Outcome {
        let given = words.number().zip(words.number());
        let (mib, seed) = given.ok_or(Refusal::Usage("MIB SEED"))?;
        let start = self.in_a_row(mib)?.start;
        for page in 0..mib * PAGES_PER_MIB {
            let at = start + page * PAGE;
            let word = (at ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            if name == "fill" {
                memory::write_u64(at, word);
                memory::write_u64(at + PAGE - 8, !word);
            } else if (memory::read_u64(at), memory::read_u64(at + PAGE - 8)) != (word, !word) {
                return Err(Refusal::At(at));
            }
            if page % 64 == 0 {
                clock::pulse(nonce());
            }
        }
        let _ = write!(out, " mib={mib}");
        Ok(())
    }

    fn slots(&mut self, out: &mut Line) -> Outcome {
        let (up, down) = (cpu::inl(SLOTS_PORT), cpu::inl(SLOTS_PORT + 4));
        self.devices.bus = Bus::scan(self.acpi.ecam);
        for slot in (0..32).filter(|slot| up & 1 << slot != 0) {
            self.devices.arrived(slot);
        }
        self.speak();
        let _ = write!(out, " up={up:x} down={down:x}");
        Ok(())
    }

    fn eject(&mut self, words: &mut Words) -> Outcome {
        let slot = words.number().filter(|slot| *slot < 32);
        let slot = slot.ok_or(Refusal::Usage("SLOT"))? as u8;
        if self.devices.left(slot) {
            self.stack = None;
        }
        cpu::outl(SLOTS_PORT + 8, 1 << slot);
        Ok(())
    }

    fn hot_memory(&mut self, words: &mut Words, out: &mut Line) -> Outcome {
        const USAGE: Refusal =
            Refusal::Usage("[plug|unplug|unplug-all|state|fill|check FIRST COUNT [VALUE]]");
        let memory = self.devices.hot_memory.as_mut().ok_or(Refusal::NoDevice)?;
        let (verb, range) = (words.word(), words.number().zip(words.number()));
        let mut ask = |kind, (first, count): (u64, u64)| memory.ask(kind, first, count as u16);
        match (verb, range) {
            (None, None) => {
                let sizes = memory.sizes()?;
                let _ = write!(out, " region={} usable={}", sizes.region, sizes.usable);
                let _ = write!(
                    out,
                    " plugged={} requested={}",
                    sizes.plugged, sizes.requested
                );
            }
            (Some("plug"), Some(range)) => tell_answer(out, ask(hot_memory::PLUG, range)?.0),
            (Some("unplug"), Some(range)) => tell_answer(out, ask(hot_memory::UNPLUG, range)?.0),
            (Some("unplug-all"), None) => tell_answer(out, ask(hot_memory::UNPLUG_ALL, (0, 0))?.0),
            (Some("state"), Some(range)) => {
                let (answer, state) = ask(hot_memory::STATE, range)?;
                tell_answer(out, answer);
                let _ = write!(out, " state={state}");
            }
            (Some(verb), Some((first, count))) => {
                let value = words.number().ok_or(USAGE)?;
                match verb {
                    "fill" => memory.fill(first, count, value),
                    "check" => match memory.check(first, count, value) {
                        None => {}
                        Some(place) => return Err(Refusal::At(place)),
                    },
                    _ => return Err(USAGE),
                }
            }
            _ => return Err(USAGE),
        }
        Ok(())
    }

    /// Looks at the processors' registers and starts those that came.
    fn cpus(&mut self, out: &mut Line) -> Outcome {
        let word = |offset| u64::from(cpu::inl(PROCESSORS_PORT + offset));
        let register = |offset| word(offset) | word(offset + 4) << 32;
        let (present, up, down) = (register(0), register(8), register(16));
        for id in (0..64).filter(|id| up & 1 << id != 0) {
            if !smp::start_one(&self.info, id, START_MS * 1000) {
                return Err(Refusal::Failed("one did not start"));
            }
        }
        let alive = smp::alive();
        let _ = write!(
            out,
            " present={present:x} up={up:x} down={down:x} vcpus={alive}"
        );
        Ok(())
    }

    /// Tells a processor to start, whatever the registers say of it.
    fn start_cpu(&mut self, words: &mut Words) -> Outcome {
        let id = words.number().ok_or(Refusal::Usage("APIC_ID [MS]"))?;
        let patience_ms = words.number().unwrap_or(START_MS);
        match smp::start_one(&self.info, id as u32, patience_ms * 1000) {
            true => Ok(()),
            false => Err(Refusal::Failed("it did not start")),
        }
    }

    fn balloon(&mut self, words: &mut Words, out: &mut Line) -> Outcome {
        const USAGE: Refusal = Refusal::Usage("free MIB | target");
        let balloon = self.devices.balloon.as_mut().ok_or(Refusal::NoDevice)?;
        match (words.word(), words.number()) {
            (Some("target"), None) => {
                let _ = write!(out, " pages={}", balloon.target()?);
            }
            (Some("free"), Some(mib)) => {
                let begin = cpu::tsc();
                let mut left = mib << 20;
                for stretch in memory::free(&self.info) {
                    let length = stretch.length.min(left);
                    balloon.report_free(stretch.start, length)?;
                    left -= length;
                }
                let us = clock::us(cpu::tsc() - begin);
                let _ = write!(out, " mib={} us={us}", mib - (left >> 20));
            }
            _ => return Err(USAGE),
        }
        Ok(())
    }

    /// A MiB at a time over a working set of one second's worth, at the rate asked for.
    fn dirty(&self, words: &mut Words, out: &mut Line) -> Outcome {
        let (rate, seconds) = words
            .number()
            .zip(words.number())
            .ok_or(Refusal::Usage("RATE_MIB SECONDS"))?;
        let begin = cpu::tsc();
        let end = begin + clock::tsc_of_us(seconds * 1_000_000);
        let (mut done, mut place) = (0u64, 0u64);
        while cpu::tsc() < end && rate > 0 {
            let allowed = clock::us(cpu::tsc() - begin) * rate / 1_000_000;
            clock::pulse(nonce());
            if done > allowed {
                core::hint::spin_loop();
                continue;
            }
            let wrote = self.write_pages(place, PAGES_PER_MIB, cpu::tsc());
            place += wrote;
            if wrote < PAGES_PER_MIB || place >= rate * PAGES_PER_MIB {
                place = 0;
            }
            done += 1;
        }
        let _ = write!(out, " mib={done} us={}", clock::us(cpu::tsc() - begin));
        Ok(())
    }

    /// Free memory of so many MiB, or more.
    fn in_a_row(&self, mib: u64) -> Result<memory::Stretch, Refusal> {
        memory::free(&self.info)
            .find(|stretch| stretch.length >> 20 >= mib)
            .ok_or(Refusal::Failed("no so much free memory in a row"))
    }

    fn churn(&self, words: &mut Words) -> Outcome {
        let mib = words.number().ok_or(Refusal::Usage("MIB"))?;
        let stretch = self.in_a_row(mib)?;
        churn::run(stretch.start, mib * PAGES_PER_MIB);
        Ok(())
    }

    /// Numbers its writes, a page each in turn and the last word of it too, until something is typed; afterwards every
    /// page must hold the number of the last write to it, so one that was lost or came from another moment shows.
    fn weave(&self, words: &mut Words, out: &mut Line) -> Outcome {
        let mib = words.number().filter(|mib| *mib > 0);
        let mib = mib.ok_or(Refusal::Usage("MIB"))?;
        let stretch = self.in_a_row(mib)?;
        let pages = mib * PAGES_PER_MIB;
        // The place of a number: neighbours lie apart, and each page has its turn (641 is a prime).
        let place = |number: u64| stretch.start + (number * 641 % pages) * PAGE;
        let look = |number: u64, out: &mut Line| {
            let at = place(number);
            let (first, last) = (memory::read_u64(at), memory::read_u64(at + PAGE - 8));
            if first == number && last == !number {
                return Ok(());
            }
            let _ = write!(
                out,
                " at={at:#x} number={number} found={first} {:#x}",
                !last
            );
            Err(Refusal::Failed("a write is not there"))
        };
        let mut number = 0;
        while number < pages || number % 4096 != 0 || !serial::has_input() {
            // What is written over is looked at first.
            if let Some(before) = number.checked_sub(pages) {
                look(before, out)?;
            }
            memory::write_u64(place(number), number);
            memory::write_u64(place(number) + PAGE - 8, !number);
            number += 1;
            if number % 64 == 0 {
                clock::pulse(nonce());
            }
        }
        for written in number - pages..number {
            look(written, out)?;
        }
        let _ = write!(out, " writes={number}");
        Ok(())
    }
}

fn tell_answer(out: &mut Line, answer: u16) {
    let _ = write!(out, " answer={answer}");
}

/// Lets go of a processor: by force (also if it is unknown here), or only the one that was started last.
fn eject_cpu(words: &mut Words) -> Outcome {
    let id = words.number().ok_or(Refusal::Usage("APIC_ID [force]"))?;
    if words.word() != Some("force") && !smp::forget(id as u32) {
        return Err(Refusal::Failed("not the one that was started last"));
    }
    cpu::outl(PROCESSORS_PORT + 24, id as u32);
    Ok(())
}

fn is_end(byte: u8) -> bool {
    byte == b'\n' || byte == b'\r'
}

/// The machine should be gone; it may need a moment.
fn after(failure: &'static str) -> Outcome {
    crate::wait_for(2_000_000, || false);
    Err(Refusal::Failed(failure))
}

fn tell_time(out: &mut Line) -> Outcome {
    let _ = write!(
        out,
        " uptime_us={} tsc={} tsc_ring0={} tsc_khz={} ticks={}",
        clock::since_boot_us(),
        cpu::tsc(),
        cpu::tsc_of_ring0(),
        clock::khz(),
        clock::ticks()
    );
    Ok(())
}

/// `cpuid LEAF INDEX`: the four registers, in hexadecimal.
fn tell_cpuid(words: &mut Words, out: &mut Line) -> Outcome {
    let (Some(leaf), Some(index)) = (words.number(), words.number()) else {
        return Err(Refusal::Usage("LEAF INDEX"));
    };
    let [a, b, c, d] = cpu::cpuid(leaf as u32, index as u32);
    let _ = write!(out, " eax={a:x} ebx={b:x} ecx={c:x} edx={d:x}");
    Ok(())
}

fn spin(words: &mut Words) -> Outcome {
    let ms = words.number().ok_or(Refusal::Usage("MS [CPU]"))?;
    match words.number() {
        None | Some(0) => clock::spin(ms, nonce()),
        Some(cpu) => {
            if !smp::give(cpu as usize, smp::Job::Spin { ms: ms as u32 }) {
                return Err(Refusal::Failed("no such CPU, or it is busy"));
            }
        }
    }
    Ok(())
}

fn stamp(words: &mut Words) -> Outcome {
    let mode = match words.word() {
        Some("spin") => clock::STAMP_SPIN,
        Some("off") => clock::STAMP_NEVER,
        Some(ms) => ms.parse().map_err(|_| Refusal::Usage("spin|MS|off"))?,
        None => return Err(Refusal::Usage("spin|MS|off")),
    };
    clock::set_stamp_mode(mode);
    smp::wake_all();
    Ok(())
}

fn tell_gaps(out: &mut Line) -> Outcome {
    if clock::stamp_mode() == clock::STAMP_NEVER {
        return Err(Refusal::Failed("first: stamp spin|MS"));
    }
    for cpu in 0..smp::alive() {
        let _ = write!(out, " {}", clock::take_gap_us(cpu));
    }
    Ok(())
}

fn tell_interrupts(out: &mut Line) -> Outcome {
    for vector in 32..=254 {
        let count = cpu::interrupts_of(vector);
        if count != 0 {
            let _ = write!(out, " {vector:02x}={count}");
        }
    }
    Ok(())
}
