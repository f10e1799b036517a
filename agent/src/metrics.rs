//! Prometheus text: what the agent counts, and what it sees of host and machines at the time.

use std::collections::BTreeMap;
use std::fmt::Write;

use fractus_agent_api::host::HostReport;
use fractus_agent_api::machine::{MachineReport, Observed};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

/// Installs the recorder of the process; counters of every module go there.
pub fn install() -> Option<PrometheusHandle> {
    PrometheusBuilder::new().install_recorder().ok()
}

pub fn render(
    recorded: Option<&PrometheusHandle>,
    host: &HostReport,
    machines: &[MachineReport],
) -> String {
    let mut text = recorded.map(PrometheusHandle::render).unwrap_or_default();
    let mut states: BTreeMap<&str, u64> = STATES.iter().map(|state| (*state, 0)).collect();
    for machine in machines {
        *states.entry(state(&machine.observed)).or_default() += 1;
    }
    text.push_str("# HELP fractus_machines Machines by what was observed last.\n");
    text.push_str("# TYPE fractus_machines gauge\n");
    for (state, count) in states {
        let _ = writeln!(text, "fractus_machines{{state=\"{state}\"}} {count}");
    }
    let gauges: [(&str, &str, f64); 8] = [
        ("fractus_host_cpus", "Processors.", f64::from(host.cpus)),
        ("fractus_host_load1", "Load over a minute.", host.load[0]),
        (
            "fractus_host_memory_bytes",
            "Memory.",
            (host.memory_mib << 20) as f64,
        ),
        (
            "fractus_host_memory_free_bytes",
            "Available.",
            (host.memory_free_mib << 20) as f64,
        ),
        (
            "fractus_host_disk_bytes",
            "Machines' disks.",
            (host.disk_gib << 30) as f64,
        ),
        (
            "fractus_host_disk_free_bytes",
            "Free of it.",
            (host.disk_free_gib << 30) as f64,
        ),
        (
            "fractus_host_uptime_seconds",
            "Since boot.",
            host.uptime_s as f64,
        ),
        (
            "fractus_host_lacks",
            "Things that `check` misses.",
            host.lacks.len() as f64,
        ),
    ];
    for (name, help, value) in gauges {
        let _ = writeln!(
            text,
            "# HELP {name} {help}\n# TYPE {name} gauge\n{name} {value}"
        );
    }
    text
}

const STATES: [&str; 7] = [
    "starting",
    "running",
    "paused",
    "suspended",
    "stopped",
    "failed",
    "absent",
];

pub fn state(observed: &Observed) -> &'static str {
    match observed {
        Observed::Starting { .. } => "starting",
        Observed::Running => "running",
        Observed::Paused => "paused",
        Observed::Suspended => "suspended",
        Observed::Arriving => "arriving",
        Observed::Offered => "offered",
        Observed::Stopped { .. } => "stopped",
        Observed::Failed { .. } => "failed",
        Observed::Absent => "absent",
    }
}
