//! A kernel and initial file system of the host's, which run in the guest where the loader cannot read
//! the disk: they mount it as only Linux can, find by the loader's own code what it boots, and start that
//! by kexec. `images/fallback` builds them; [`crate::board::BootVerdict`] hears how it went.

use super::{Boot, BootError, load};
use crate::config::FallbackFiles;
use crate::cpu::BootRegisters;
use crate::layout::Layout;
use crate::memory::GuestMemory;

/// A panic is a reset, which ends the machine while the verdict is awaited.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 oops=panic";

#[derive(Debug)]
pub struct Fallback(FallbackFiles);

impl Fallback {
    pub fn new(files: FallbackFiles) -> Fallback {
        Fallback(files)
    }

    pub fn files(&self) -> &FallbackFiles {
        &self.0
    }

    /// Loads it, to boot the disk of this number; `more` goes behind the command line of what it finds.
    /// Memory is zero.
    pub fn load(
        &self,
        disk: usize,
        more: &str,
        rsdp: u64,
        memory: &GuestMemory,
        layout: &Layout,
    ) -> Result<BootRegisters, BootError> {
        // What is behind the dashes is not for the kernel itself.
        let command_line = format!("{COMMAND_LINE} -- disk={disk} {more}");
        let boot = Boot {
            kernel: &self.0.kernel,
            initrd: Some(&self.0.initrd),
            command_line: command_line.trim_end(),
            rsdp,
        };
        load(&boot, memory, layout).map_err(|source| BootError::Fallback(Box::new(source)))
    }
}
