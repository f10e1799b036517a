//! A machine that was sent, and stands still until it is known where it goes on.

use std::io::{Read, Write};
use std::os::fd::AsFd;

use super::debt::{self, Answers, Debt, Paid, Paying};
use super::journal::Journal;
use super::{MigrationError, SendReport};
use crate::machine::{Machine, MachineError};
use crate::stream::frame::FrameWriter;

/// A machine that stands still here and, unless there is a [`Offered::doubt`], there. Dropping it ends this one.
pub struct Offered<S> {
    /// It takes a while to end it: not before somebody knows of the offer.
    pub(super) journal: Journal,
    pub(super) machine: Machine,
    pub(super) out: FrameWriter<S>,
    pub(super) answers: u32,
    pub(super) debt: Option<Debt>,
    pub(super) ran: bool,
    pub(super) doubt: Option<MigrationError>,
    pub(super) report: SendReport,
}

impl<S: Read + Write + AsFd> Offered<S> {
    /// Sends some more of what follows, a megabyte at most, first what the other side waits for.
    ///
    /// # Errors
    /// The connection is broken. The guest stands still where it needs what it has not got, until the two have another
    /// ([`Offered::go_on_by`]).
    pub fn pay(&mut self) -> Result<Paying, MigrationError> {
        let Some(debt) = &mut self.debt else {
            return Ok(Paying::Paid);
        };
        for _ in 0..debt::HEARD {
            if debt.is_over() || !debt::is_readable(self.out.get_mut())? {
                break;
            }
            let mut answers = Answers::behind(self.out.get_mut(), self.answers);
            let (kind, payload) = answers.next()?;
            debt.hear(kind, payload)?;
            self.answers = answers.frames();
        }
        debt.pay(&self.machine.memory, &mut self.out)
    }

    /// By another connection, to the same machine, of which [`crate::machine::Feeder::go_on_by`] is called. Waits until it has
    /// said what it lacks.
    ///
    /// # Errors
    /// This one is broken, too.
    pub fn go_on_by(&mut self, connection: S) -> Result<(), MigrationError> {
        self.out = FrameWriter::new(connection);
        let mut answers = Answers::behind(self.out.get_mut(), 0);
        if let Some(debt) = &mut self.debt {
            debt.begin_anew(&mut answers)?;
        }
        self.answers = answers.frames();
        Ok(())
    }
}

impl<S: Write> Offered<S> {
    /// What it is sent by.
    pub fn connection(&mut self) -> &mut S {
        self.out.get_mut()
    }

    /// The same, to wait for it.
    pub fn line(&self) -> &S {
        self.out.get_ref()
    }

    /// Memory that the other side does not have: this machine has to stay until it has.
    pub fn owes(&self) -> bool {
        self.debt.as_ref().is_some_and(|debt| !debt.is_over())
    }

    /// Bytes of that which were not sent yet.
    pub fn left(&self) -> u64 {
        self.debt.as_ref().map_or(0, Debt::left)
    }

    /// What has followed so far.
    pub fn paid(&self) -> Paid {
        self.debt.as_ref().map_or(Paid::default(), Debt::paid)
    }

    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    pub fn report(&self) -> &SendReport {
        &self.report
    }

    /// Whether the guest ran here, and is to run there.
    pub fn ran(&self) -> bool {
        self.ran
    }

    /// Why nobody knows whether the other side has a machine.
    pub fn doubt(&self) -> Option<&MigrationError> {
        self.doubt.as_ref()
    }

    /// The other machine is the guest's: this one ends.
    pub fn let_go(self) -> SendReport {
        self.report
    }

    /// The other machine is not, and never will be: the guest goes on here, if it ran.
    ///
    /// # Errors
    /// The machine cannot run any more; it has ended.
    pub fn take_back(self) -> Result<Machine, MachineError> {
        let Offered {
            journal,
            mut machine,
            ran,
            ..
        } = self;
        drop(journal);
        machine.write_here(false);
        if ran && let Err(error) = machine.run() {
            machine.run_on(&error);
            return Err(error);
        }
        Ok(machine)
    }
}
