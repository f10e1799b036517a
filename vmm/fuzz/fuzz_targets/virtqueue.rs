//! A guest whose rings and descriptors lie.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fractus_vmm::fuzzing::virtqueue(input));
