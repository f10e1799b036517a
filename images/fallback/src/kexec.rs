//! kexec_file_load(2): the kernel of the fallback loads another beside itself.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

const NO_INITRAMFS: libc::c_ulong = 4;

/// Loads a kernel; `reboot` starts it.
pub fn load(kernel: &File, initrd: Option<&File>, command_line: &str) -> Result<(), String> {
    let text = CString::new(command_line).map_err(|_| "its command line holds a zero byte")?;
    let bytes = text.as_bytes_with_nul();
    let (initrd, flags) = match initrd {
        Some(initrd) => (initrd.as_raw_fd(), 0),
        None => (-1 as RawFd, NO_INITRAMFS),
    };
    // SAFETY: both descriptors are open or not looked at, and the text is as long as is said, with its
    // zero; the kernel copies it and keeps no pointer.
    let status = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initrd,
            bytes.len(),
            bytes.as_ptr(),
            flags,
        )
    };
    if status == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    Err(match error.raw_os_error() {
        Some(libc::ENOEXEC) => "it is no bzImage of x86-64".to_owned(),
        Some(libc::ENOMEM | libc::EADDRNOTAVAIL) => {
            "it does not fit into the machine's memory".to_owned()
        }
        Some(libc::EINVAL) => {
            format!(
                "Linux refuses it, or its command line of {} bytes",
                bytes.len()
            )
        }
        _ => error.to_string(),
    })
}
