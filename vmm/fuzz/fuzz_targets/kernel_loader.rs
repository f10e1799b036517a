//! A kernel file of a user: what it is, and if it is one, loaded into a small machine.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fractus_vmm::fuzzing::kernel_loader(input));
