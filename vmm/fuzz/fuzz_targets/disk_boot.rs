//! A disk of a user: what it boots, if anything.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fractus_loader::fuzzing::disk_boot(input));
