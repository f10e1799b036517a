//! The root disk copied to a file while the guest runs, a piece at each turn of the loop.

use std::fs::File;
use std::os::fd::OwnedFd;

use uuid::Uuid;

use super::guest::GuestError;
use super::log;
use super::protocol::{FromMachine, ToMachine};
use super::supervise::Supervisor;

impl Supervisor {
    pub(super) fn obey_about_copies(&mut self, message: ToMachine, files: Vec<OwnedFd>) {
        match message {
            ToMachine::Copy {
                request_id,
                attempt,
            } => {
                log::request(request_id);
                self.copy(attempt, files);
            }
            ToMachine::NoCopy { request_id } => {
                log::request(request_id);
                self.copy_no_more("it is not wanted any more");
            }
            _ => {}
        }
    }

    /// Begins anew, whatever was begun before.
    fn copy(&mut self, attempt: Uuid, files: Vec<OwnedFd>) {
        self.guest.copy_no_more();
        self.copying = None;
        let file = files.into_iter().next();
        let begun = match file {
            Some(file) => self.guest.copy(File::from(file)),
            None => Err(GuestError::Machine("no file came for its disk".to_owned())),
        };
        match begun {
            Ok(()) => self.copying = Some(attempt),
            Err(error) => self.copied(attempt, Some(error.to_string())),
        }
    }

    /// Some more of it.
    pub(super) fn copy_on(&mut self) {
        let Some(attempt) = self.copying else { return };
        self.lean.happened();
        if let Some(copied) = self.guest.copy_on() {
            self.copied(attempt, copied.err().map(|error| error.to_string()));
        }
    }

    /// Something else is done with the guest, which a copy would be in the way of.
    pub(super) fn copy_no_more(&mut self, why: &str) {
        self.guest.copy_no_more();
        if let Some(attempt) = self.copying {
            self.copied(attempt, Some(why.to_owned()));
        }
    }

    fn copied(&mut self, attempt: Uuid, error: Option<String>) {
        self.copying = None;
        if let Some(error) = &error {
            log::line(format_args!("no copy of its disk: {error}"));
        }
        self.tell(&FromMachine::Copied { attempt, error });
    }
}
