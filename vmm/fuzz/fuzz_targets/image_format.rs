//! An image file of a user: what its first bytes are told to be.
//!
//! The controller's modules are taken in as files: they are pure, and the controller itself would be a
//! long build under the fuzzer for the sake of two functions.
#![no_main]

#[path = "../../../controller/src/image/format.rs"]
mod format;
#[path = "../../../controller/src/image/format_fuzz.rs"]
mod format_fuzz;

libfuzzer_sys::fuzz_target!(|input: &[u8]| format_fuzz::image_format(input));
