//! Whether somebody has said, in this boot of the host, that the machine is wanted here.

use fractus_agent_api::decision;
use fractus_agent_api::machine::PutMachine;

use super::Actor;
use crate::machine::process::Launcher;

impl<L: Launcher> Actor<L> {
    /// Nobody has said in this boot of the host that the machine is wanted here.
    pub(super) fn is_unheard(&self) -> bool {
        let boot = self.surroundings.makings.boot_id();
        boot.is_some() && self.record.heard != boot
    }

    /// It is wanted here, in this boot of the host.
    pub(super) fn hear(&mut self) {
        if !self.is_unheard() {
            return;
        }
        self.record.heard = self.surroundings.makings.boot_id();
        // Asked for again, should that be lost.
        self.note();
        tracing::info!(machine = %self.record.id, "it is wanted here still");
        self.publish();
    }

    /// It says so.
    pub(super) fn is_word(&self, put: &PutMachine) -> bool {
        decision::is_word(put, self.surroundings.makings.boot_id())
    }

    /// What a new intent says of it, for the record that it is written to with.
    pub(super) fn hears(&mut self, put: &PutMachine) {
        if self.is_word(put) {
            self.record.heard = self.surroundings.makings.boot_id();
        } else if put.generation != self.record.intent.generation {
            // What was said before was said of another owner's machine.
            self.record.heard = None;
        }
    }
}
