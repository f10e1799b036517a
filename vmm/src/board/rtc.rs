//! The CMOS clock (Motorola MC146818A): date and time of the host, 114 bytes of RAM, no interrupts.
//!
//! A guest that sets the clock is heard politely: what it writes into time registers is dropped, since
//! the host keeps the time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::device::{BusDevice, Device, DeviceError, Restore, SavedDevice};

pub(super) const ID: &str = "rtc";
const STATE_VERSION: u32 = 1;

/// Where the clock gets the time from.
pub type Now = Arc<dyn Fn() -> SystemTime + Send + Sync>;

const INDEX: u64 = 0;
const DATA: u64 = 1;
/// The century, as Linux and the FADT know it.
const CENTURY: u8 = 0x32;
/// Register A: a divider that runs; B: 24 hours, BCD; D: the battery is good.
const REGISTER_A: u8 = 0x26;
const REGISTER_B: u8 = 0x02;
const REGISTER_D: u8 = 0x80;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    index: u8,
    /// 128 bytes; those below 14 are not used.
    memory: Vec<u8>,
}

impl Default for RtcState {
    fn default() -> Self {
        RtcState {
            index: 0,
            memory: vec![0; 128],
        }
    }
}

pub struct Rtc {
    state: Mutex<RtcState>,
    now: Now,
}

impl Rtc {
    pub fn new(now: Now) -> Rtc {
        Rtc {
            state: Mutex::default(),
            now,
        }
    }

    fn lock(&self) -> MutexGuard<'_, RtcState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn register(&self, state: &RtcState) -> u8 {
        let seconds = (self.now)()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let date = Date::of_day(seconds / 86_400);
        let value = match state.index {
            0 => seconds % 60,
            2 => seconds / 60 % 60,
            4 => seconds / 3600 % 24,
            // Sunday is 1; day 0 was a Thursday.
            6 => (seconds / 86_400 + 4) % 7 + 1,
            7 => date.day,
            8 => date.month,
            9 => date.year % 100,
            CENTURY => date.year / 100,
            0xa => return REGISTER_A,
            0xb => return REGISTER_B,
            0xd => return REGISTER_D,
            1 | 3 | 5 | 0xc => return 0,
            index => return state.memory.get(usize::from(index)).copied().unwrap_or(0),
        };
        (value / 10 % 10 * 16 + value % 10) as u8
    }
}

/// A day of the Gregorian calendar.
struct Date {
    year: u64,
    month: u64,
    day: u64,
}

impl Date {
    /// From days since 1970-01-01, by counting in 400-year eras that begin in March, so that a leap
    /// day is the last of its year.
    fn of_day(days: u64) -> Date {
        let days = days + 719_468;
        let (era, day) = (days / 146_097, days % 146_097);
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        Date {
            year: era * 400 + year + u64::from(month <= 2),
            month,
            day,
        }
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let ([value], DATA) = (data, offset) {
            *value = self.register(&self.lock());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [value] = data else { return };
        let mut state = self.lock();
        match offset {
            // The top bit masks NMIs on a PC, of which there are none here.
            INDEX => state.index = value & 0x7f,
            DATA => {
                let index = usize::from(state.index);
                if index >= 0xe
                    && state.index != CENTURY
                    && let Some(byte) = state.memory.get_mut(index)
                {
                    *byte = *value;
                }
            }
            _ => {}
        }
    }
}

impl Device for Rtc {
    fn id(&self) -> &str {
        ID
    }

    /// The RAM has a battery: it stays.
    fn reset(&self) -> Result<(), DeviceError> {
        self.lock().index = 0;
        Ok(())
    }

    fn save(&self) -> Result<SavedDevice, DeviceError> {
        SavedDevice::pack(ID, STATE_VERSION, &*self.lock())
    }
}

impl Restore for Rtc {
    type State = RtcState;
    type Resources = Now;
    const VERSION: u32 = STATE_VERSION;

    fn restore(now: Now, mut state: RtcState) -> Result<Self, DeviceError> {
        state.memory.resize(128, 0);
        Ok(Rtc {
            state: Mutex::new(state),
            now,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn at(seconds: u64) -> Rtc {
        Rtc::new(Arc::new(move || UNIX_EPOCH + Duration::from_secs(seconds)))
    }

    fn get(rtc: &Rtc, index: u8) -> u8 {
        rtc.write(INDEX, &[index]);
        let mut data = [0];
        rtc.read(DATA, &mut data);
        data[0]
    }

    #[test]
    fn the_time_is_read_in_bcd() {
        // 2024-02-29 23:59:58 UTC, a Thursday.
        let rtc = at(1_709_251_198);
        let read: Vec<u8> = [CENTURY, 9, 8, 7, 6, 4, 2, 0]
            .map(|index| get(&rtc, index))
            .into();
        assert_eq!(read, [0x20, 0x24, 0x02, 0x29, 0x05, 0x23, 0x59, 0x58]);
    }

    #[test]
    fn ram_keeps_what_is_written_and_time_does_not() {
        let rtc = at(0);
        for index in [0x40, 4] {
            rtc.write(INDEX, &[index]);
            rtc.write(DATA, &[0x17]);
        }
        let state = rtc.save().unwrap().unpack(STATE_VERSION).unwrap();
        let rtc = Rtc::restore(Arc::new(|| UNIX_EPOCH), state).unwrap();
        assert_eq!((get(&rtc, 0x40), get(&rtc, 4)), (0x17, 0));
    }
}
