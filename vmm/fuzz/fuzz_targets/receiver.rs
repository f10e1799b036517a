//! What arrives at a host that awaits a machine: a live stream, or a snapshot's file.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fractus_vmm::fuzzing::receiver(input));
