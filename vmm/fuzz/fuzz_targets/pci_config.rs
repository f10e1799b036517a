//! A guest that reads and writes PCI configuration space and BARs.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| fractus_vmm::fuzzing::pci_config(input));
