//! What the log says of a live migration that has ended: all of its report, in one line.

use fractus_agent_api::migration::{Pause, Progress, Round};

use crate::reconcile::migration::Model;

/// Its row as it was left.
pub(super) fn tell(row: &Model) {
    let progress: Progress = row.progress().unwrap_or_default();
    let last = progress.rounds.last();
    let throttled = progress.rounds.iter().map(|round| round.throttled).max();
    tracing::info!(
        migration = row.uuid,
        number = row.id,
        server = row.server_id,
        source = row.source,
        target = row.target,
        status = row.status,
        reason = row.reason,
        rounds = progress.rounds.len(),
        memory_bytes = progress.memory_sent,
        disk_bytes = progress.disk_sent,
        took_us = progress.elapsed_us,
        rate = last.map(|round| round.rate),
        throttled = throttled.filter(|most| *most > 0),
        lanes = Some(progress.lanes).filter(|lanes| *lanes > 0),
        pause_us = progress.pause.map(total),
        pause = progress.pause.and_then(|pause| json(&pause)).map(display),
        handover = row.handover().map(display),
        followed = progress
            .followed
            .and_then(|followed| json(&followed))
            .map(display),
        decision = last.and_then(|round| json(&round.decision)).map(display),
        why = last.and_then(|round: &Round| round.why.as_deref()),
        "a live migration has ended"
    );
}

fn total(pause: Pause) -> u64 {
    let parts = [
        pause.stop_us,
        pause.state_us,
        pause.send_us,
        pause.answer_us,
    ];
    parts.into_iter().fold(0, u64::saturating_add)
}

fn json(part: &impl serde::Serialize) -> Option<String> {
    serde_json::to_string(part).ok()
}
