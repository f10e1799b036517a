//! How the search ended, for the machine: its port (`vmm/src/board/verdict.rs`) takes text and a zero byte.
//!
//! By an instruction of our own: Debian's cloud kernel has no /dev/port.

use std::arch::asm;
use std::io;

use rustix::system::RebootCommand;

/// `VERDICT_PORT` of the machine's layout.
const PORT: u16 = 0x6c0;

/// What was found begins now.
pub fn found() {
    if let Err(error) = say("") {
        crate::say(&format!("the machine's port: {error}"));
    }
}

/// Says why there is nothing to boot, which ends the machine.
pub fn fail(reason: &str) -> ! {
    crate::say(reason);
    // A zero would end it too soon.
    let reason = reason.replace('\0', " ");
    let reason = if reason.is_empty() { "?" } else { &reason };
    if let Err(error) = say(reason) {
        crate::say(&format!("the machine's port: {error}"));
    }
    // Not reached in a machine that listens.
    let _ = rustix::system::reboot(RebootCommand::PowerOff);
    loop {
        std::thread::park();
    }
}

fn say(text: &str) -> io::Result<()> {
    // SAFETY: it lets this thread use one port, behind which there is nothing of ours.
    if unsafe { libc::ioperm(PORT.into(), 1, 1) } != 0 {
        return Err(io::Error::last_os_error());
    }
    for byte in text.bytes().chain([0]) {
        // SAFETY: the port was given to this thread, and what is written to it changes no memory of ours.
        unsafe {
            asm!("out dx, al", in("dx") PORT, in("al") byte, options(nomem, nostack, preserves_flags));
        }
    }
    Ok(())
}
