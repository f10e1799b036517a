//! A guest that may do anything to all devices of a machine at once.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fractus_vmm::fuzzing::board(input));
