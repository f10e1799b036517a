//! Which version is newer: by the UAPI group's version format specification, and as RPM compares.

use std::cmp::Ordering;

/// UAPI.10, "Version Format Specification": `~` is older than the end, `-` begins a release, `^` a
/// patch, `.` a part; numbers by value, letters by code, capitals first.
pub fn uapi(left: &str, right: &str) -> Ordering {
    let known = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '~' | '-' | '^' | '.');
    let (mut a, mut b) = (left, right);
    loop {
        a = a.trim_start_matches(|c| !known(&c));
        b = b.trim_start_matches(|c| !known(&c));
        for mark in ['~', '-', '^', '.'] {
            // The end stands where the specification puts it: after `~`, before `-`.
            if mark == '-' && (a.is_empty() || b.is_empty()) {
                return (!a.is_empty()).cmp(&!b.is_empty());
            }
            match (a.strip_prefix(mark), b.strip_prefix(mark)) {
                (Some(rest_a), Some(rest_b)) => {
                    (a, b) = (rest_a, rest_b);
                    break;
                }
                (Some(_), None) => return Ordering::Less,
                (None, Some(_)) => return Ordering::Greater,
                (None, None) => {}
            }
        }
        let order = match starts_with_digit(a) || starts_with_digit(b) {
            true => {
                let (x, rest_a) = split(a, |c| c.is_ascii_digit());
                let (y, rest_b) = split(b, |c| c.is_ascii_digit());
                (a, b) = (rest_a, rest_b);
                numbers(x, y)
            }
            false => {
                let (x, rest_a) = split(a, |c| c.is_ascii_alphabetic());
                let (y, rest_b) = split(b, |c| c.is_ascii_alphabetic());
                (a, b) = (rest_a, rest_b);
                x.cmp(y)
            }
        };
        if order != Ordering::Equal {
            return order;
        }
    }
}

/// RPM's comparison, by which Fedora's GRUB sorts the names of entries.
pub fn rpm(left: &str, right: &str) -> Ordering {
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '~' | '^');
    let (mut a, mut b) = (left, right);
    loop {
        a = a.trim_start_matches(|c| !known(c));
        b = b.trim_start_matches(|c| !known(c));
        match (a.strip_prefix('~'), b.strip_prefix('~')) {
            (Some(rest_a), Some(rest_b)) => {
                (a, b) = (rest_a, rest_b);
                continue;
            }
            (Some(_), None) => return Ordering::Less,
            (None, Some(_)) => return Ordering::Greater,
            (None, None) => {}
        }
        if a.is_empty() || b.is_empty() {
            return (!a.is_empty()).cmp(&!b.is_empty());
        }
        match (a.strip_prefix('^'), b.strip_prefix('^')) {
            (Some(rest_a), Some(rest_b)) => {
                (a, b) = (rest_a, rest_b);
                continue;
            }
            (Some(_), None) => return Ordering::Less,
            (None, Some(_)) => return Ordering::Greater,
            (None, None) => {}
        }
        let digits = starts_with_digit(a);
        let of_kind = |c: char| match digits {
            true => c.is_ascii_digit(),
            false => c.is_ascii_alphabetic(),
        };
        let (x, rest_a) = split(a, of_kind);
        let (y, rest_b) = split(b, of_kind);
        // Of different kinds: numbers are newer than letters.
        if y.is_empty() {
            return if digits {
                Ordering::Greater
            } else {
                Ordering::Less
            };
        }
        let order = if digits { numbers(x, y) } else { x.cmp(y) };
        if order != Ordering::Equal {
            return order;
        }
        (a, b) = (rest_a, rest_b);
    }
}

fn starts_with_digit(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_digit())
}

fn split(text: &str, keep: impl Fn(char) -> bool) -> (&str, &str) {
    let end = text.find(|c| !keep(c)).unwrap_or(text.len());
    text.split_at(end)
}

/// By value, of any length; nothing is 0.
fn numbers(left: &str, right: &str) -> Ordering {
    let (left, right) = (left.trim_start_matches('0'), right.trim_start_matches('0'));
    left.len().cmp(&right.len()).then_with(|| left.cmp(right))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_specifications_examples_are_in_order() {
        let ascending = [
            "122.1",
            "123~rc1-1",
            "123",
            "123-a",
            "123-a.1",
            "123-1",
            "123-1.1",
            "123^post1",
            "123.a-1",
            "123.1-1",
            "123a-1",
            "124-1",
        ];
        for pair in ascending.windows(2) {
            assert_eq!(uapi(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(uapi(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
        assert_eq!(uapi("6.1.0-9-amd64", "6.1.0-13-amd64"), Ordering::Less);
        assert_eq!(uapi("1.02", "1.2"), Ordering::Equal);
    }

    #[test]
    fn kernels_of_fedora_are_in_order() {
        let ascending = [
            "m-0-rescue",
            "m-6.5.6~rc1-300.fc39.x86_64",
            "m-6.5.6-300.fc39.x86_64",
            "m-6.10.3-200.fc40.x86_64",
        ];
        for pair in ascending.windows(2) {
            assert_eq!(rpm(pair[0], pair[1]), Ordering::Less, "{pair:?}");
        }
        assert_eq!(rpm("1a", "1.1"), Ordering::Less);
        assert_eq!(rpm("2.0", "2_0"), Ordering::Equal);
    }
}
