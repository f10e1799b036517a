//! `fractus server migration show`: what a migration took, for people by rounds and in units that they read, for programs
//! as the API says it.

use indicatif::HumanBytes;
use serde_json::Value;

use super::row;
use crate::cli::CliError;
use crate::cli::output::{Output, Row};

const FIELDS: &[(&str, &str)] = &[
    ("id", "/id"),
    ("number", "/number"),
    ("kind", "/kind"),
    ("server_id", "/server_id"),
    ("status", "/status"),
    ("reason", "/reason"),
    ("from", "/source"),
    ("to", "/target"),
    ("created", "/created_at"),
    ("ended", "/ended_at"),
    ("memory_total", "/progress/memory_total"),
    ("memory_sent", "/progress/memory_sent"),
    ("memory_left", "/progress/memory_left"),
    ("disk_total", "/progress/disk_total"),
    ("disk_sent", "/progress/disk_sent"),
    ("disk_left", "/progress/disk_left"),
    ("elapsed_us", "/progress/elapsed_us"),
    ("throttled", "/progress/throttled"),
    ("lanes", "/progress/lanes"),
    ("pause", "/progress/pause"),
    ("followed", "/progress/followed"),
    ("broken", "/progress/broken"),
    ("starving", "/starving"),
    ("handover", "/handover"),
    (ROUNDS, "/progress/rounds"),
];

const ROUNDS: &str = "rounds";
const COLUMNS: &[&str] = &[
    "Round",
    "Memory",
    "Disk",
    "Took",
    "Left",
    "Dirtied",
    "Rate",
    "Throttled",
    "Cut",
    "Decision",
    "Why",
];

pub fn show(migration: &Value, output: &Output) -> Result<(), CliError> {
    let whole = row(migration, FIELDS);
    if !output.is_for_people() {
        return output.fields(whole);
    }
    let rounds = migration["progress"][ROUNDS].as_array().into_iter();
    let rounds = rounds.flatten().enumerate();
    let rounds: Vec<Row> = rounds.map(|(n, it)| readable(n + 1, it)).collect();
    let fields = whole.into_iter().filter(|(name, _)| *name != ROUNDS);
    let fields: Row = fields
        .map(|(name, value)| (name, field(name, value)))
        .collect();
    if fields.iter().any(|(name, _)| output.wants(name)) {
        output.fields(fields)?;
    }
    match output.wants(ROUNDS) && !rounds.is_empty() {
        true => output.table(COLUMNS, &rounds),
        false => Ok(()),
    }
}

/// One line of the fields.
fn field(name: &str, value: Value) -> Value {
    let is_bytes = ["_total", "_sent", "_left"];
    match (value.as_u64(), name) {
        (Some(us), "elapsed_us") => duration(us).into(),
        (Some(percent), "throttled") => format!("{percent} %").into(),
        (Some(bytes), name) if is_bytes.iter().any(|end| name.ends_with(end)) => {
            HumanBytes(bytes).to_string().into()
        }
        _ => value,
    }
}

/// One line of the rounds.
fn readable(number: usize, round: &Value) -> Row {
    let of = |name: &str| round[name].as_u64().unwrap_or_default();
    let (memory, disk, took) = (of("memory_bytes"), of("disk_bytes"), of("took_us"));
    let rate = match of("rate") {
        // Nothing was known, or an agent of before does not say: as much as went.
        0 => per_second(memory.saturating_add(disk), took),
        rate => Some(rate),
    };
    let speed =
        |rate: Option<u64>| rate.map_or_else(String::new, |rate| format!("{}/s", HumanBytes(rate)));
    let throttled = match of("throttled") {
        0 => String::new(),
        percent => format!("{percent} %"),
    };
    let cut = if round["cut"] == true { "yes" } else { "" };
    let word = |name: &str| round[name].as_str().unwrap_or_default().to_owned();
    let cells = [
        number.to_string(),
        HumanBytes(memory).to_string(),
        HumanBytes(disk).to_string(),
        duration(took),
        HumanBytes(of("left")).to_string(),
        speed(per_second(of("left"), took)),
        speed(rate),
        throttled,
        cut.to_owned(),
        word("decision"),
        word("why"),
    ];
    let columns = COLUMNS.iter().copied();
    columns.zip(cells.map(Value::from)).collect()
}

fn per_second(bytes: u64, us: u64) -> Option<u64> {
    let us = (us > 0).then_some(us)?;
    u64::try_from(u128::from(bytes) * 1_000_000 / u128::from(us)).ok()
}

/// Microseconds, for people.
fn duration(us: u64) -> String {
    let tenths = |unit: u64| format!("{}.{}", us / unit, us % unit * 10 / unit);
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{} ms", tenths(1_000)),
        1_000_000..60_000_000 => format!("{} s", tenths(1_000_000)),
        _ => format!("{} min {} s", us / 60_000_000, us / 1_000_000 % 60),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::cli::output::text;

    fn cell(row: &Row, name: &str) -> String {
        let (_, value) = row.iter().find(|(column, _)| *column == name).unwrap();
        text(value)
    }

    #[test]
    fn a_round_is_a_row_in_units_that_people_read() {
        let round = json!({
            "memory_bytes": 512 << 20, "disk_bytes": 0, "took_us": 500_000, "left": 128 << 20, "rate": 1_u64 << 30,
            "throttled": 40, "cut": true, "decision": "again", "why": "it writes half as fast",
        });
        let row = readable(3, &round);
        let cells: Vec<String> = row.iter().map(|(_, cell)| text(cell)).collect();
        let expected = [
            "3",
            "512.00 MiB",
            "0 B",
            "500.0 ms",
            "128.00 MiB",
            "256.00 MiB/s",
            "1.00 GiB/s",
            "40 %",
            "yes",
            "again",
            "it writes half as fast",
        ];
        assert_eq!(cells, expected);
    }

    #[test]
    fn what_an_agent_of_before_does_not_say_is_found_or_left_out() {
        let round = json!({
            "memory_bytes": 1 << 20, "disk_bytes": 1 << 20, "took_us": 1_000_000, "left": 0, "decision": "stop",
        });
        let row = readable(1, &round);
        assert_eq!(cell(&row, "Rate"), "2.00 MiB/s");
        assert_eq!(cell(&row, "Dirtied"), "0 B/s");
        for name in ["Throttled", "Cut", "Why"] {
            assert_eq!(cell(&row, name), "");
        }
        let none = readable(1, &json!({"took_us": 0, "left": 5}));
        assert_eq!(
            (cell(&none, "Rate"), cell(&none, "Dirtied")),
            Default::default()
        );
    }

    #[test]
    fn times_and_bytes_of_the_whole_are_read_too() {
        for (us, shown) in [
            (0, "0 us"),
            (999, "999 us"),
            (12_345, "12.3 ms"),
            (9_990_000, "9.9 s"),
            (125_000_000, "2 min 5 s"),
        ] {
            assert_eq!(duration(us), shown);
        }
        assert_eq!(field("memory_left", json!(2048)), "2.00 KiB");
        assert_eq!(field("elapsed_us", json!(2048)), "2.0 ms");
        assert_eq!(field("throttled", json!(12)), "12 %");
        assert_eq!(field("memory_left", Value::Null), Value::Null);
        assert_eq!(field("number", json!(7)), 7);
    }
}
