//! Patterns with `*`, `?` and `[…]`, as systemd-boot's `default` has them.

/// Whether all of `text` is of the pattern; letters of both sizes are the same.
pub fn matches(pattern: &str, text: &str) -> bool {
    let pattern: Vec<char> = pattern.to_lowercase().chars().collect();
    let text: Vec<char> = text.to_lowercase().chars().collect();
    // The last `*`, and what it stands for so far: it alone may grow, which keeps this quadratic.
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        let step = match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
                continue;
            }
            Some(first) => one(&pattern, p, *first, text.get(t).copied()),
            None => None,
        };
        match (step, star) {
            (Some(length), _) => {
                p += length;
                t += 1;
            }
            (None, Some((at, taken))) => {
                star = Some((at, taken + 1));
                p = at + 1;
                t = taken + 1;
            }
            (None, None) => return false,
        }
    }
    pattern
        .get(p..)
        .is_none_or(|rest| rest.iter().all(|c| *c == '*'))
}

/// Characters of the pattern that stand for this one of the text.
fn one(pattern: &[char], p: usize, first: char, text: Option<char>) -> Option<usize> {
    let text = text?;
    match first {
        '?' => Some(1),
        '[' => {
            let rest = pattern.get(p + 1..)?;
            let end = rest.iter().skip(1).position(|c| *c == ']')? + 1;
            let set = rest.get(..end)?;
            let mut found = set.contains(&text);
            for range in set.windows(3) {
                if let [low, '-', high] = range {
                    found |= (*low..=*high).contains(&text);
                }
            }
            found.then_some(end + 2)
        }
        c => (c == text).then_some(1),
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns_stand_for_whole_names() {
        assert!(matches("debian-*", "debian-6.1.0.conf"));
        assert!(matches("*.conf", "a.conf"));
        assert!(matches("a?c-[0-9]*", "ABC-7x"));
        assert!(!matches("debian-*", "arch"));
        assert!(!matches("abc", "abcd"));
        assert!(!matches("[", "["));
        assert!(matches("***", ""));
    }
}
