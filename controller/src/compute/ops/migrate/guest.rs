//! What a guest's own devices have said while it was on its way, when nobody but its operation looks after it.
//!
//! The reconciler tells it, once the operation has ended, by what differs between the row and the owner's report. So
//! what is settled here says nothing of a panic, and of a watchdog only what has been told; and what the source said
//! last, which nobody hears of any more once the row has moved, is told with the move.

use fractus_agent_api::guest::GuestReport;
use fractus_agent_api::machine::{MachineReport, Observed, Power, Wanted};
use fractus_agent_api::migration::State as Stream;
use sea_orm::{DatabaseTransaction, DbErr};

use super::State;
use crate::compute::ops::Tools;
use crate::event::{self, Event, Origin, Phase};
use crate::reconcile::machine::Machine;
use crate::reconcile::state_of;

/// The row is about to be the target's, and this is what the source has said. A guest that its watchdog has paused
/// there is not let go on by its move.
pub(super) async fn leaves(
    tools: &Tools,
    tx: &DatabaseTransaction,
    (known, said): (&Machine, &MachineReport),
    state: &mut State,
    wanted: &mut Wanted,
) -> Result<(), DbErr> {
    let stands = matches!(
        state_of(said, state.migration),
        Some(Stream::Offered { ran: false, .. })
    );
    if stands && wanted.power == Power::Running {
        wanted.power = Power::Paused;
    }
    let told = known.report.as_ref();
    let told = told.filter(|told| told.starts == said.starts);
    let told = told.map_or(0, |told| told.guest.watchdog_fired);
    state.fired = said.guest.watchdog_fired.max(told);
    if state.fired > told {
        let event = Event {
            id: tools.random.uuid(),
            at_us: tools.clock.now_us(),
            subject: known.server.to_string(),
            action: event::WATCHDOG_FIRED.to_owned(),
            phase: Phase::Observed,
            message: None,
            operation_id: None,
            origin: Origin::default(),
            host_id: Some(state.source.to_string()),
        };
        event::record(tx, event).await?;
    }
    Ok(())
}

/// What of the owner's report is settled by the operation; none: all of it is the reconciler's to tell, as of a guest
/// that has ended, has failed, or was paused by its watchdog where it is now.
pub(super) fn settled(
    known: &Machine,
    said: &MachineReport,
    state: &State,
) -> Option<MachineReport> {
    let as_wanted = match said.observed {
        Observed::Running => true,
        Observed::Paused => known.wanted.power == Power::Paused,
        _ => false,
    };
    (said.settled && as_wanted).then(|| MachineReport {
        guest: GuestReport {
            panicked: false,
            // Its count may have come along with it, or have begun anew.
            watchdog_fired: said.guest.watchdog_fired.min(state.fired),
        },
        ..said.clone()
    })
}
