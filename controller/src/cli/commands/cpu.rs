//! What CPUs hosts have, and what they have in common.

use std::collections::{BTreeMap, BTreeSet};

use fractus_agent_api::cpu::{Cpu, baseline, beyond, missing};
use fractus_agent_api::host::CpuReport;
use serde_json::{Value, json};

use crate::cli::CliError;
use crate::cli::output::{Output, Row};

const HEADER: [&str; 6] = [
    "Host",
    "CPU",
    "Address bits",
    "TSC kHz",
    "Features",
    "Lacks",
];

/// A host as the API shows it.
struct Host {
    name: String,
    /// None: its agent does not say.
    cpu: Option<Box<Cpu>>,
    model: String,
}

impl Host {
    fn of(host: &Value) -> Self {
        let report: Option<CpuReport> = serde_json::from_value(host["cpu"].clone()).ok();
        let (model, cpu) =
            report.map_or_else(Default::default, |report| (report.model, report.guest));
        let name = host["hostname"].as_str().unwrap_or_default().to_owned();
        Self { name, cpu, model }
    }
}

/// One host in fields.
pub fn show(host: &Value, output: &Output) -> Result<(), CliError> {
    let text = |name: &str| host[name].clone();
    let mut fields = vec![
        ("ID", text("id")),
        ("Name", text("hostname")),
        ("State", text("state")),
        ("Disabled", text("disabled")),
        ("CPUs", text("cpus")),
        ("Memory MiB", text("memory_mib")),
        ("Disk GiB", text("disk_gib")),
        ("Agent", text("agent_version")),
        ("Kernel", text("kernel")),
        ("Endpoint", text("endpoint")),
        ("Seen", text("seen_at")),
        ("Lacks", text("lacks")),
    ];
    let Host { cpu, model, .. } = Host::of(host);
    fields.push(("CPU", json!(model)));
    if let Some(cpu) = cpu {
        let Cpu {
            family,
            model,
            stepping,
            offers,
            tsc_scales,
        } = *cpu;
        fields.extend([
            ("CPU vendor", json!(offers.vendor)),
            (
                "CPU signature",
                json!(format!(
                    "family {family}, model {model}, stepping {stepping}"
                )),
            ),
            ("XCR0", json!(format!("{:#x}", offers.xcr0))),
            ("Address bits", json!(offers.physical_bits)),
            ("TSC kHz", json!(offers.tsc_khz)),
            ("TSC scales", json!(tsc_scales)),
            ("CPU features", json!(offers.features().join(" "))),
        ]);
    }
    output.fields(fields)
}

/// What they have in common, make by make, and what each has beyond that, or lacks of what another has.
pub fn compare(hosts: &[Value], output: &Output) -> Result<(), CliError> {
    let hosts: Vec<Host> = hosts.iter().map(Host::of).collect();
    output.rows(&HEADER, table(&hosts))
}

fn table(hosts: &[Host]) -> Vec<Row> {
    let mut makes: BTreeMap<&str, Vec<(&Host, &Cpu)>> = BTreeMap::new();
    let mut rows = Vec::new();
    for host in hosts {
        match host.cpu.as_deref() {
            Some(cpu) => makes
                .entry(&cpu.offers.vendor)
                .or_default()
                .push((host, cpu)),
            None => rows.push(row([
                &host.name,
                &host.model,
                "",
                "",
                "",
                "its agent does not say",
            ])),
        }
    }
    for (vendor, alike) in makes {
        let Ok(common) = baseline(alike.iter().map(|(_, cpu)| *cpu)) else {
            continue;
        };
        let khz = common
            .tsc_khz
            .map_or_else(|| "any".to_owned(), |khz| khz.to_string());
        let bits = common.physical_bits.to_string();
        let features = common.features().join(" ");
        rows.push(row(["(baseline)", vendor, &bits, &khz, &features, ""]));
        for (host, cpu) in &alike {
            let others = alike
                .iter()
                .flat_map(|(_, other)| missing(&other.offers, cpu));
            let lacks: BTreeSet<String> = others.collect();
            let khz = cpu
                .offers
                .tsc_khz
                .map_or_else(String::new, |khz| khz.to_string());
            rows.push(row([
                &host.name,
                &host.model,
                &cpu.offers.physical_bits.to_string(),
                &khz,
                &beyond(&cpu.offers, &common).join(" "),
                &lacks.into_iter().collect::<Vec<_>>().join(", "),
            ]));
        }
    }
    rows
}

fn row(cells: [&str; 6]) -> Row {
    let cells = cells.into_iter().map(|cell| json!(cell));
    HEADER.into_iter().zip(cells).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agents::simulated::cpu;

    #[test]
    fn hosts_are_compared_with_those_of_their_make() {
        let host = |name: &str, cpu: Option<Cpu>| Host {
            name: name.to_owned(),
            cpu: cpu.map(Box::new),
            model: "M".to_owned(),
        };
        let mut amd = cpu(&["sse4a"]);
        amd.offers.vendor = "AuthenticAMD".to_owned();
        let mut small = cpu(&["avx"]);
        small.offers.physical_bits = 39;
        let hosts = [
            host("new", Some(cpu(&["avx", "avx2", "rtm"]))),
            host("small", Some(small)),
            host("amd", Some(amd)),
            host("old", None),
        ];
        let table = table(&hosts);
        let told: Vec<String> = table
            .iter()
            .map(|row| {
                let cells = row.iter().filter_map(|(_, cell)| cell.as_str());
                cells.collect::<Vec<_>>().join("|")
            })
            .collect();
        assert_eq!(
            told,
            [
                "old|M||||its agent does not say",
                "(baseline)|AuthenticAMD|46|any|sse4a|",
                "amd|M|46|2000000||",
                "(baseline)|GenuineIntel|39|any|avx|",
                "new|M|46|2000000|avx2 rtm 46 bits of address|",
                "small|M|39|2000000||46 bits of address, avx2, rtm",
            ]
        );
    }
}
