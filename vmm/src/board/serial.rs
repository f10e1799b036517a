//! The first serial port: a 16550A (of vm-superio) with its line to the IOAPIC and its two ends.

use std::convert::Infallible;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState as Registers};

use crate::config::ConsoleFiles;
use crate::device::{Board, BusDevice, Device, DeviceError, Restore, SavedDevice};
use crate::interrupt::InterruptLine;
use crate::output::{Output, make_nonblocking};
use crate::reactor::{Interest, Reactor, Ready, Registration, Subscriber};

const STATE_VERSION: u32 = 1;

/// What a port has of its host.
pub struct SerialResources {
    id: String,
    line: Arc<dyn InterruptLine>,
    output: Option<Output>,
    input: Option<OwnedFd>,
    reactor: Reactor,
}

impl SerialResources {
    /// Duplicates the descriptors of `files`.
    pub fn open(
        id: &str,
        files: &ConsoleFiles,
        line: Arc<dyn InterruptLine>,
        board: &Board,
    ) -> Result<SerialResources, DeviceError> {
        let failed = |error| DeviceError::new(id, "open its ends", error);
        let reactor = board.reactor.clone();
        let output = files
            .output
            .as_ref()
            .map(|fd| Output::open(fd.as_fd(), &reactor));
        let input = files.input.as_ref().map(|fd| {
            make_nonblocking(fd.as_fd())?;
            fd.try_clone()
        });
        Ok(SerialResources {
            id: id.to_owned(),
            line,
            output: output.transpose().map_err(failed)?,
            input: input.transpose().map_err(failed)?,
            reactor,
        })
    }
}

/// vm-superio's `SerialState`, in a form that is ours to keep.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
}

/// The interrupt of the port: one edge.
struct Edge(Arc<dyn InterruptLine>);

impl Trigger for Edge {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.pulse();
        Ok(())
    }
}

/// Where the port's transmitter writes.
struct Transmitter(Option<Output>);

impl Write for Transmitter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(output) = &self.0 {
            bytes.iter().for_each(|byte| output.put(*byte));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Uart = Serial<Edge, NoEvents, Transmitter>;

pub struct SerialPort {
    /// For the reactor, which must own whom it calls.
    me: Weak<SerialPort>,
    id: String,
    line: Arc<dyn InterruptLine>,
    output: Option<Output>,
    input: Option<OwnedFd>,
    reactor: Reactor,
    state: Mutex<State>,
}

struct State {
    uart: Uart,
    /// There from the first `resume` on, until the other end closes.
    watch: Option<Registration>,
    /// What the watch waits for.
    interest: Interest,
    paused: bool,
}

impl SerialPort {
    pub fn new(resources: SerialResources) -> Result<Arc<SerialPort>, DeviceError> {
        SerialPort::with_registers(resources, &Registers::default())
    }

    fn with_registers(
        resources: SerialResources,
        registers: &Registers,
    ) -> Result<Arc<SerialPort>, DeviceError> {
        let SerialResources {
            id,
            line,
            output,
            input,
            reactor,
        } = resources;
        let uart = uart(&id, &line, &output, registers)?;
        let state = State {
            uart,
            watch: None,
            interest: Interest::NONE,
            paused: true,
        };
        let state = Mutex::new(state);
        Ok(Arc::new_cyclic(|me| {
            let me = Weak::clone(me);
            SerialPort {
                me,
                id,
                line,
                output,
                input,
                reactor,
                state,
            }
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for input exactly while there is room for it.
    fn update_interest(&self, state: &mut State) {
        let wanted = match state.paused || state.uart.fifo_capacity() == 0 {
            true => Interest::NONE,
            false => Interest::READ,
        };
        if let Some(watch) = &state.watch
            && wanted != state.interest
            && watch.set_interest(wanted).is_ok()
        {
            state.interest = wanted;
        }
    }
}

fn uart(
    id: &str,
    line: &Arc<dyn InterruptLine>,
    output: &Option<Output>,
    registers: &Registers,
) -> Result<Uart, DeviceError> {
    Serial::from_state(
        registers,
        Edge(Arc::clone(line)),
        NoEvents,
        Transmitter(output.clone()),
    )
    .map_err(|error| DeviceError::new(id, "take its registers", format!("{error:?}")))
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let [value] = data {
            let mut state = self.lock();
            *value = state.uart.read(offset as u8);
            self.update_interest(&mut state);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let [value] = data {
            // Neither the transmitter nor the edge can fail.
            let _ = self.lock().uart.write(offset as u8, *value);
        }
    }
}

impl Subscriber for SerialPort {
    fn ready(&self, _tag: u32, ready: Ready) {
        let mut state = self.lock();
        let room = state.uart.fifo_capacity();
        let mut buffer = [0; 64];
        let target = buffer.get_mut(..room).unwrap_or_default();
        let closed = match &self.input {
            Some(fd) if ready.readable && !state.paused && !target.is_empty() => {
                match rustix::io::read(fd, target) {
                    Ok(0) => true,
                    Ok(read) => {
                        let _ = state
                            .uart
                            .enqueue_raw_bytes(buffer.get(..read).unwrap_or_default());
                        false
                    }
                    Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => false,
                    Err(_) => true,
                }
            }
            // What is left to read is read first.
            _ => ready.closed && !ready.readable,
        };
        if closed {
            state.watch = None;
        } else {
            self.update_interest(&mut state);
        }
    }
}

impl Device for SerialPort {
    fn id(&self) -> &str {
        &self.id
    }

    fn pause(&self) -> Result<(), DeviceError> {
        let mut state = self.lock();
        state.paused = true;
        self.update_interest(&mut state);
        if let Some(output) = &self.output {
            output.flush();
        }
        Ok(())
    }

    fn resume(&self) -> Result<(), DeviceError> {
        let mut state = self.lock();
        state.paused = false;
        if let (None, Some(fd), Some(subscriber)) = (&state.watch, &self.input, self.me.upgrade()) {
            match self
                .reactor
                .register(fd.as_fd(), Interest::NONE, subscriber, 0)
            {
                Ok(watch) => {
                    state.watch = Some(watch);
                    state.interest = Interest::NONE;
                }
                // A regular file or /dev/null: no input ever comes.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                Err(error) => return Err(DeviceError::new(&self.id, "watch its input", error)),
            }
        }
        self.update_interest(&mut state);
        Ok(())
    }

    fn reset(&self) -> Result<(), DeviceError> {
        self.lock().uart = uart(&self.id, &self.line, &self.output, &Registers::default())?;
        Ok(())
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        let registers = self.lock().uart.state();
        let state = SerialState {
            divisor: [registers.baud_divisor_low, registers.baud_divisor_high],
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            line_status: registers.line_status,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            input: registers.in_buffer,
        };
        SavedDevice::pack(&self.id, STATE_VERSION, &state)
    }
}

impl Restore for Arc<SerialPort> {
    type State = SerialState;
    type Resources = SerialResources;
    const VERSION: u32 = STATE_VERSION;

    fn restore(resources: SerialResources, state: SerialState) -> Result<Self, DeviceError> {
        let [baud_divisor_low, baud_divisor_high] = state.divisor;
        let registers = Registers {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.input,
        };
        SerialPort::with_registers(resources, &registers)
    }
}
