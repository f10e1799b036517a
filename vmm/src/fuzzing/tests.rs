//! Every target, briefly.

use std::path::Path;

#[path = "../../fuzz/replay.rs"]
mod replay;

fn replay(target: &str, rounds: u64, body: impl Fn(&[u8])) {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    replay::replay(&seeds.join(target), rounds, body);
}

#[test]
fn whatever_a_guest_does_to_pci_is_an_answer() {
    replay("pci_config", 3000, super::pci_config);
}

#[test]
fn whatever_a_guest_does_to_a_queue_is_an_answer() {
    replay("virtqueue", 3000, super::virtqueue);
}

#[test]
fn whatever_a_kernel_file_holds_is_an_answer() {
    replay("kernel_loader", 2000, super::kernel_loader);
}

#[test]
fn whatever_a_guest_does_to_its_devices_is_an_answer() {
    replay("board", 300, super::board);
}

#[test]
fn whatever_a_guest_does_to_its_network_and_sockets_is_an_answer() {
    replay("network", 300, super::network);
}

#[test]
fn whatever_arrives_at_a_receiver_is_an_answer() {
    replay("receiver", 300, super::receiver);
}
