//! Times as the compute API writes and reads them. Inside, a time is `i64` microseconds UTC.

use jiff::Timestamp;

/// `2026-11-22T09:25:49Z`: `created` and `updated` of servers, `created` of faults.
pub fn seconds(at_us: i64) -> String {
    shape(at_us, "%Y-%m-%dT%H:%M:%SZ")
}

/// `2026-11-22T09:25:49.000000`: all other times.
pub fn micros(at_us: i64) -> String {
    shape(at_us, "%Y-%m-%dT%H:%M:%S%.6f")
}

fn shape(at_us: i64, format: &str) -> String {
    Timestamp::from_microsecond(at_us)
        .map(|at| at.strftime(format).to_string())
        .unwrap_or_default()
}

/// ISO 8601 with or without an offset (none: UTC), as `changes-since` and its kin take it.
pub fn parse(text: &str) -> Option<i64> {
    // A plus sign in a query that was not escaped arrives as a space.
    let text = text.trim().replace(' ', "+");
    if let Ok(at) = text.parse::<Timestamp>() {
        return Some(at.as_microsecond());
    }
    let civil: jiff::civil::DateTime = text.parse().ok()?;
    let at = civil.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp();
    Some(at.as_microsecond())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_in_both_shapes_and_read_back() {
        let at = parse("2026-11-22T09:25:49Z").unwrap();
        assert_eq!(seconds(at + 1), "2026-11-22T09:25:49Z");
        assert_eq!(micros(at + 1), "2026-11-22T09:25:49.000001");
        assert_eq!(parse("2026-11-22T09:25:49"), Some(at));
        assert_eq!(parse("2026-11-22T10:25:49+01:00"), Some(at));
        assert_eq!(parse("2011/01/01"), None);
    }
}
