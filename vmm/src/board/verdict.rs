//! The port by which a fallback kernel ([`crate::boot::Fallback`]) says how its search ended.
//!
//! It is asked when the machine loads that kernel, and heard once: a zero byte says that what it has found
//! begins now, text with a zero byte behind it says why there is nothing. Afterwards, and in a machine that
//! was not asked, nothing happens here: a guest that runs cannot say of itself that it cannot be booted.

use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::device::{BusDevice, Device, DeviceError, Restore, SavedDevice};
use crate::request::{Request, RequestSender};

pub const ID: &str = "boot_verdict";
const STATE_VERSION: u32 = 1;
/// Bytes of text that are kept.
const MOST: usize = 2000;
/// What is read while a verdict is awaited; nothing there reads as ones.
const AWAITED: u8 = b'?';

pub struct BootVerdict {
    requests: RequestSender,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum State {
    #[default]
    NotAsked,
    Awaited {
        /// What has come of the text.
        text: Vec<u8>,
    },
}

impl BootVerdict {
    pub fn new(requests: RequestSender) -> Self {
        Self {
            requests,
            state: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What runs next is the fallback. Called while no vCPU runs.
    pub fn ask(&self) {
        *self.lock() = State::Awaited { text: Vec::new() };
    }

    /// The fallback runs and has not said how its search ended.
    pub fn awaited(&self) -> bool {
        *self.lock() != State::NotAsked
    }
}

impl BusDevice for BootVerdict {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let [first, ..] = data
            && self.awaited()
        {
            *first = AWAITED;
        }
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let mut state = self.lock();
        let (State::Awaited { text }, [byte]) = (&mut *state, data) else {
            return;
        };
        if *byte != 0 {
            if text.len() < MOST {
                text.push(*byte);
            }
            return;
        }
        let text = std::mem::take(text);
        *state = State::NotAsked;
        if !text.is_empty() {
            let detail = String::from_utf8_lossy(&text).into_owned();
            self.requests.send(Request::NotBootable { detail });
        }
    }
}

impl Device for BootVerdict {
    fn id(&self) -> &str {
        ID
    }

    fn reset(&self) -> Result<(), DeviceError> {
        *self.lock() = State::NotAsked;
        Ok(())
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        SavedDevice::pack(ID, STATE_VERSION, &*self.lock())
    }
}

impl Restore for BootVerdict {
    type State = State;
    type Resources = RequestSender;
    const VERSION: u32 = STATE_VERSION;

    fn restore(requests: RequestSender, state: State) -> Result<Self, DeviceError> {
        Ok(Self {
            requests,
            state: Mutex::new(state),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::channel;

    fn say(port: &BootVerdict, text: &[u8]) {
        for byte in text {
            port.write(0, &[*byte]);
        }
    }

    #[test]
    fn only_a_fallback_that_was_asked_is_heard_and_once() {
        let (sender, receiver) = channel().unwrap();
        let port = BootVerdict::new(sender);
        let mut byte = [0];
        port.read(0, &mut byte);
        assert_eq!(byte, [0xff]);
        say(&port, b"I am not bootable\0");
        assert_eq!(receiver.try_next(), None);

        port.ask();
        port.read(0, &mut byte);
        assert_eq!(byte, [AWAITED]);
        say(&port, b"\0and no more\0");
        assert!(!port.awaited());
        assert_eq!(receiver.try_next(), None);

        port.ask();
        say(&port, b"nothing there");
        // The middle of a text is part of what is saved.
        let saved = port.save().unwrap();
        let (sender, receiver) = channel().unwrap();
        let port = BootVerdict::restore_saved(sender, &saved).unwrap();
        say(&port, &vec![b'!'; 5000]);
        say(&port, b"\0");
        let Some(Request::NotBootable { detail }) = receiver.try_next() else {
            panic!("no verdict");
        };
        assert!(detail.starts_with("nothing there!!!") && detail.len() == MOST);

        port.ask();
        port.reset().unwrap();
        assert!(!port.awaited());
    }
}
