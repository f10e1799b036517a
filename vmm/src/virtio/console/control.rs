//! Control messages of virtio-console (virtio 1.2 §5.3.6.2).

/// What a message is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Event {
    DeviceReady = 0,
    PortAdd = 1,
    PortReady = 3,
    ConsolePort = 4,
    PortOpen = 6,
    PortName = 7,
}

/// Bytes of struct virtio_console_control.
pub(super) const LENGTH: usize = 8;

/// A message for the driver.
pub(super) fn message(port: u32, event: Event, value: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(LENGTH);
    bytes.extend(port.to_le_bytes());
    bytes.extend((event as u16).to_le_bytes());
    bytes.extend(value.to_le_bytes());
    bytes
}

/// The name of a port, as it is followed by in its message.
pub(super) fn name(port: u32, name: &str) -> Vec<u8> {
    let mut bytes = message(port, Event::PortName, 1);
    bytes.extend(name.as_bytes());
    bytes
}

/// A message of the driver: port, event, value. `None` if it is none that drivers send.
pub(super) fn read(bytes: &[u8; LENGTH]) -> Option<(usize, Event, u16)> {
    let [p0, p1, p2, p3, e0, e1, v0, v1] = *bytes;
    let event = match u16::from_le_bytes([e0, e1]) {
        0 => Event::DeviceReady,
        3 => Event::PortReady,
        6 => Event::PortOpen,
        _ => return None,
    };
    let port = u32::from_le_bytes([p0, p1, p2, p3]);
    Some((port as usize, event, u16::from_le_bytes([v0, v1])))
}
