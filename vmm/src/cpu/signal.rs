//! How a vCPU is called out of KVM_RUN: a signal whose handler sets `immediate_exit`.
//!
//! A plain flag would race (set between the check and KVM_RUN, it would be missed); the handler runs on
//! the vCPU's own thread and writes into its own kvm_run, so that either the running KVM_RUN or the
//! next one ends.

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::time::Duration;

use kvm_bindings::kvm_run;
use libc::{c_int, c_void, itimerspec, siginfo_t, timespec};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

thread_local! {
    /// `immediate_exit` of this thread's vCPU, null on other threads.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(ptr::null_mut()) };
}

/// The signal that is used; its handler is the process's, installed once.
pub fn number() -> c_int {
    SIGRTMIN()
}

extern "C" fn handle(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
    let flag = IMMEDIATE_EXIT.get();
    if !flag.is_null() {
        // SAFETY: the pointer is into this thread's kvm_run, which is mapped until `Armed` is dropped
        // and has reset the cell; the write is volatile, since KVM reads it behind the compiler's back.
        unsafe { ptr::write_volatile(flag, 1) };
    }
}

/// Installs the handler; the first call does it, later ones repeat its outcome.
pub fn install() -> Result<(), std::io::Error> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let outcome = INSTALLED
        .get_or_init(|| register_signal_handler(number(), handle).map_err(|error| error.errno()));
    outcome.map_err(std::io::Error::from_raw_os_error)
}

/// While it lives the signal ends this thread's KVM_RUN.
pub struct Armed {
    /// A thread's cell must be reset by the same thread.
    _not_send: std::marker::PhantomData<*mut u8>,
}

impl Armed {
    /// `run` must stay mapped, at its place, until the value is dropped.
    pub fn new(run: &mut kvm_run) -> Armed {
        IMMEDIATE_EXIT.set(&raw mut run.immediate_exit);
        // Fails for signal numbers that do not exist only.
        let _ = unblock_signal(number());
        Armed {
            _not_send: std::marker::PhantomData,
        }
    }
}

impl Drop for Armed {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.set(ptr::null_mut());
    }
}

/// Sends that signal to the thread that made it, after a time.
pub struct Alarm {
    timer: libc::timer_t,
}

impl Alarm {
    /// Of the calling thread.
    pub fn new() -> io::Result<Alarm> {
        let mut timer = ptr::null_mut();
        // SAFETY: a sigevent of zeros is one; the kernel reads it and writes the timer's number.
        let made = unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = number();
            event.sigev_notify_thread_id = libc::gettid();
            libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer)
        };
        match made {
            0 => Ok(Alarm { timer }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Once, in so long; one that was set before is set anew. It may be in none: then it is stopped.
    pub fn set(&self, after: Duration) {
        let none = timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let value = itimerspec {
            it_interval: none,
            it_value: timespec {
                tv_sec: after.as_secs() as i64,
                tv_nsec: i64::from(after.subsec_nanos()),
            },
        };
        // SAFETY: the timer is ours, and the kernel reads the value. It fails for what is no time only.
        unsafe { libc::timer_settime(self.timer, 0, &raw const value, ptr::null_mut()) };
    }

    /// A signal that is on its way comes nonetheless.
    pub fn stop(&self) {
        self.set(Duration::ZERO);
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer is ours, and nobody uses it any more.
        unsafe { libc::timer_delete(self.timer) };
    }
}
