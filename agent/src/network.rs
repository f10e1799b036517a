//! The host's networks, as far as one machine needs them: taps, and a bridge to put them on.

pub mod tap;
pub mod vhost;

use std::os::fd::OwnedFd;

use fractus_agent_api::device::{DeviceId, Nic};

/// Characters of a device's id in the name of its tap, as many as neutron takes.
const OF_ID: usize = 11;

/// The tap of a network device. Whoever looks at the host finds the device by it.
pub fn tap_name(id: DeviceId) -> String {
    let id: String = id.to_string().chars().take(OF_ID).collect();
    format!("tap{id}")
}

/// Makes the host's end of a network device: a tap that is up and a port of `bridge`, where there is one.
/// It is there for as long as its queues are open.
pub fn plug(nic: &Nic, bridge: Option<&str>) -> Result<Vec<OwnedFd>, tap::TapError> {
    let name = tap_name(nic.id);
    let queues = tap::open(&name, nic.queues)?;
    if let Some(mtu) = nic.mtu {
        tap::set_mtu(&name, mtu)?;
    }
    if let Some(bridge) = bridge {
        tap::join(&name, bridge)?;
    }
    Ok(queues)
}
