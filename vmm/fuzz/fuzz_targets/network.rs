//! A guest that may do anything to its network and its sockets, while others speak to both.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fractus_vmm::fuzzing::network(input));
