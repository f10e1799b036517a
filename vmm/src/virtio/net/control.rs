//! The control queue (virtio 1.2 §5.1.6.5): what the driver wants to receive, and how.
//!
//! Pure: a command changes a [`Control`] and says what else has to be done.

use serde::{Deserialize, Serialize};

use super::backend::Offloads;

/// Bytes of virtio_net_hdr before each packet (§5.1.6, with VERSION_1 always with num_buffers).
pub const HEADER: usize = 12;

pub const F_CSUM: u64 = 1 << 0;
pub const F_GUEST_CSUM: u64 = 1 << 1;
pub const F_CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
pub const F_MTU: u64 = 1 << 3;
pub const F_MAC: u64 = 1 << 5;
pub const F_GUEST_TSO4: u64 = 1 << 7;
pub const F_GUEST_TSO6: u64 = 1 << 8;
pub const F_GUEST_ECN: u64 = 1 << 9;
pub const F_HOST_TSO4: u64 = 1 << 11;
pub const F_HOST_TSO6: u64 = 1 << 12;
pub const F_HOST_ECN: u64 = 1 << 13;
pub const F_MRG_RXBUF: u64 = 1 << 15;
pub const F_STATUS: u64 = 1 << 16;
pub const F_CTRL_VQ: u64 = 1 << 17;
pub const F_CTRL_RX: u64 = 1 << 18;
pub const F_CTRL_RX_EXTRA: u64 = 1 << 20;
pub const F_GUEST_ANNOUNCE: u64 = 1 << 21;
pub const F_MQ: u64 = 1 << 22;
pub const F_CTRL_MAC_ADDR: u64 = 1 << 23;

/// The features that say what the driver can receive; the offload command speaks in the same bits.
pub const RECEIVE_OFFLOADS: u64 = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN;

/// A longer command is refused: a table of all that the MAC command could hold fits.
pub const COMMAND_MAX: u64 = 64 << 10;
/// Addresses of a table that are kept; with more, all of that kind are let in.
const TABLE_MAX: usize = 64;
const BROADCAST: [u8; 6] = [0xff; 6];

/// What the driver set, and so all that is saved of the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Control {
    pub mac: [u8; 6],
    /// Pairs of queues in use.
    pub pairs: u16,
    /// Bits of [`RECEIVE_OFFLOADS`]; `None`: all that were negotiated.
    offloads: Option<u64>,
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    unicast: Table,
    multicast: Table,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Table {
    addresses: Vec<[u8; 6]>,
    /// More than could be kept.
    overflow: bool,
}

impl Table {
    fn holds(&self, address: [u8; 6]) -> bool {
        self.overflow || self.addresses.contains(&address)
    }
}

/// What a command asks for beyond what [`Control`] keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Filter,
    Pairs,
    Offloads,
    /// The driver has said where its addresses are.
    Announced,
}

/// The command is not one, was not negotiated, or asks for what cannot be (VIRTIO_NET_ERR).
#[derive(Debug, PartialEq, Eq)]
pub struct Refused;

impl Control {
    /// As after a reset: everything is let in until the driver says otherwise, since without
    /// VIRTIO_NET_F_CTRL_RX it never can.
    pub fn new(mac: [u8; 6]) -> Self {
        Self {
            mac,
            pairs: 1,
            offloads: None,
            promiscuous: true,
            all_multicast: false,
            all_unicast: false,
            no_multicast: false,
            no_unicast: false,
            no_broadcast: false,
            unicast: Table::default(),
            multicast: Table::default(),
        }
    }

    /// What may be left to the driver now.
    pub fn offloads(&self, features: u64) -> Offloads {
        let on = self.offloads.unwrap_or(u64::MAX) & features;
        Offloads {
            checksum: on & F_GUEST_CSUM != 0,
            tso4: on & F_GUEST_TSO4 != 0,
            tso6: on & F_GUEST_TSO6 != 0,
            ecn: on & F_GUEST_ECN != 0,
        }
    }

    /// Whether a packet to that address is for the driver.
    pub fn accepts(&self, to: [u8; 6]) -> bool {
        if self.promiscuous {
            true
        } else if to == BROADCAST {
            !self.no_broadcast
        } else if to[0] & 1 != 0 {
            !self.no_multicast && (self.all_multicast || self.multicast.holds(to))
        } else {
            let known = to == self.mac || self.all_unicast || self.unicast.holds(to);
            !self.no_unicast && known
        }
    }

    /// Carries out a command: class, command and its data. `most`: the device's pairs of queues.
    pub fn command(&mut self, bytes: &[u8], features: u64, most: u16) -> Result<Change, Refused> {
        let [class, command, data @ ..] = bytes else {
            return Err(Refused);
        };
        let has = |feature: u64| features & feature != 0;
        match (*class, *command) {
            (0, mode @ 0..=1) if has(F_CTRL_RX) => self.mode(mode, data),
            (0, mode @ 2..=5) if has(F_CTRL_RX_EXTRA) => self.mode(mode, data),
            (1, 0) if has(F_CTRL_RX) => self.tables(data),
            (1, 1) if has(F_CTRL_MAC_ADDR) => {
                let mac: [u8; 6] = data.try_into().map_err(|_| Refused)?;
                if mac[0] & 1 != 0 {
                    return Err(Refused);
                }
                self.mac = mac;
                Ok(Change::Filter)
            }
            (3, 0) if has(F_GUEST_ANNOUNCE) => match data {
                [] => Ok(Change::Announced),
                _ => Err(Refused),
            },
            (4, 0) if has(F_MQ) => {
                let pairs = u16::from_le_bytes(data.try_into().map_err(|_| Refused)?);
                if !(1..=most).contains(&pairs) {
                    return Err(Refused);
                }
                self.pairs = pairs;
                Ok(Change::Pairs)
            }
            (5, 0) if has(F_CTRL_GUEST_OFFLOADS) => {
                let wanted = u64::from_le_bytes(data.try_into().map_err(|_| Refused)?);
                if wanted & !(features & RECEIVE_OFFLOADS) != 0 {
                    return Err(Refused);
                }
                self.offloads = Some(wanted);
                Ok(Change::Offloads)
            }
            _ => Err(Refused),
        }
    }

    fn mode(&mut self, mode: u8, data: &[u8]) -> Result<Change, Refused> {
        let [on @ (0 | 1)] = data else {
            return Err(Refused);
        };
        let flag = match mode {
            0 => &mut self.promiscuous,
            1 => &mut self.all_multicast,
            2 => &mut self.all_unicast,
            3 => &mut self.no_multicast,
            4 => &mut self.no_unicast,
            _ => &mut self.no_broadcast,
        };
        *flag = *on == 1;
        Ok(Change::Filter)
    }

    /// Two tables, each with its count before it (§5.1.6.5.2).
    fn tables(&mut self, data: &[u8]) -> Result<Change, Refused> {
        let (unicast, rest) = table(data)?;
        let (multicast, rest) = table(rest)?;
        if !rest.is_empty() {
            return Err(Refused);
        }
        (self.unicast, self.multicast) = (unicast, multicast);
        Ok(Change::Filter)
    }
}

fn table(data: &[u8]) -> Result<(Table, &[u8]), Refused> {
    let (count, rest) = data.split_first_chunk::<4>().ok_or(Refused)?;
    let count = u32::from_le_bytes(*count) as usize;
    let length = count.checked_mul(6).filter(|length| *length <= rest.len());
    let (addresses, rest) = rest.split_at(length.ok_or(Refused)?);
    let overflow = count > TABLE_MAX;
    let kept = if overflow { &[] } else { addresses };
    let addresses = kept.as_chunks::<6>().0.to_vec();
    Ok((
        Table {
            addresses,
            overflow,
        },
        rest,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];

    fn tables(unicast: &[[u8; 6]], multicast: &[[u8; 6]]) -> Vec<u8> {
        let mut command = vec![1, 0];
        for table in [unicast, multicast] {
            command.extend((table.len() as u32).to_le_bytes());
            command.extend(table.as_flattened());
        }
        command
    }

    #[test]
    fn only_what_the_driver_asked_for_is_let_in() {
        let mut control = Control::new(OWN);
        assert!(control.accepts(OTHER), "all, until the driver has spoken");
        control.command(&[0, 0, 0], u64::MAX, 1).unwrap();
        assert!(control.accepts(OWN) && control.accepts(BROADCAST));
        assert!(!control.accepts(OTHER) && !control.accepts(GROUP));

        let set = tables(&[OTHER], &[GROUP]);
        assert_eq!(control.command(&set, u64::MAX, 1), Ok(Change::Filter));
        assert!(control.accepts(OTHER) && control.accepts(GROUP));

        for (mode, shut) in [(3, GROUP), (4, OWN), (5, BROADCAST)] {
            control.command(&[0, mode, 1], u64::MAX, 1).unwrap();
            assert!(!control.accepts(shut), "mode {mode}");
        }
    }

    #[test]
    fn a_table_too_long_to_keep_lets_all_of_its_kind_in() {
        let mut control = Control::new(OWN);
        control.command(&[0, 0, 0], u64::MAX, 1).unwrap();
        let set = tables(&[], &[GROUP; TABLE_MAX + 1]);
        control.command(&set, u64::MAX, 1).unwrap();
        assert!(control.accepts([3, 9, 9, 9, 9, 9]) && !control.accepts(OTHER));
    }

    #[test]
    fn offloads_and_pairs_keep_to_what_was_agreed() {
        let mut control = Control::new(OWN);
        let features = F_GUEST_CSUM | F_GUEST_TSO4 | F_CTRL_GUEST_OFFLOADS | F_MQ;
        let offload = |bits: u64| [&[5, 0][..], &bits.to_le_bytes()].concat();
        assert!(control.offloads(features).tso4 && !control.offloads(features).tso6);
        assert_eq!(
            control.command(&offload(F_GUEST_TSO6), features, 4),
            Err(Refused)
        );
        control
            .command(&offload(F_GUEST_CSUM), features, 4)
            .unwrap();
        let now = control.offloads(features);
        assert!(now.checksum && !now.tso4);
        for (pairs, good) in [(0u16, false), (1, true), (4, true), (5, false)] {
            let command = [&[4, 0][..], &pairs.to_le_bytes()].concat();
            assert_eq!(control.command(&command, features, 4).is_ok(), good);
        }
        assert_eq!(control.pairs, 4);
    }

    #[test]
    fn only_an_acknowledgement_that_was_agreed_on_is_one() {
        let mut control = Control::new(OWN);
        let before = control.clone();
        for (command, good) in [
            (&[3, 0][..], true),
            (&[3, 0, 0], false),
            (&[3, 1], false),
            (&[3], false),
        ] {
            let answer = control.command(command, F_GUEST_ANNOUNCE, 1);
            let wanted = if good {
                Ok(Change::Announced)
            } else {
                Err(Refused)
            };
            assert_eq!(answer, wanted, "{command:?}");
        }
        assert_eq!(control.command(&[3, 0], !F_GUEST_ANNOUNCE, 1), Err(Refused));
        assert_eq!(control, before, "nothing that is saved");
    }

    proptest! {
        #[test]
        fn a_refused_command_changes_nothing(
            bytes in prop::collection::vec(0u8..8, 0..40),
            features in any::<u64>(),
        ) {
            let mut control = Control::new(OWN);
            let before = control.clone();
            if control.command(&bytes, features, 2).is_err() {
                prop_assert_eq!(control, before);
            }
        }
    }
}
