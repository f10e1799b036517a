//! `[ … ]` and `test`.

use std::cmp::Ordering;

/// What a condition asks of the outside.
pub trait Files {
    /// Size of the file at a GRUB path, or `None`; folders have one too.
    fn look(&mut self, path: &str) -> Option<Look>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    Folder,
    File(u64),
}

/// Evaluates the words between the brackets; a syntax error is false, as in GRUB.
pub fn evaluate(words: &[String], files: &mut dyn Files) -> bool {
    let mut condition = Condition {
        words,
        at: 0,
        files,
    };
    let value = condition.or(0);
    value && condition.at >= words.len()
}

struct Condition<'a> {
    words: &'a [String],
    at: usize,
    files: &'a mut dyn Files,
}

const MAX_DEPTH: u32 = 32;

impl Condition<'_> {
    fn peek(&self, ahead: usize) -> Option<&str> {
        self.words.get(self.at + ahead).map(String::as_str)
    }

    fn or(&mut self, depth: u32) -> bool {
        let mut value = self.and(depth);
        while self.peek(0) == Some("-o") {
            self.at += 1;
            value |= self.and(depth);
        }
        value
    }

    fn and(&mut self, depth: u32) -> bool {
        let mut value = self.not(depth);
        while self.peek(0) == Some("-a") {
            self.at += 1;
            value &= self.not(depth);
        }
        value
    }

    fn not(&mut self, depth: u32) -> bool {
        let mut value = true;
        // `! = x` compares a mark of exclamation.
        while self.peek(0) == Some("!") && !self.is_comparison() {
            self.at += 1;
            value = !value;
        }
        if self.peek(0) == Some("(") && !self.is_comparison() && depth < MAX_DEPTH {
            self.at += 1;
            let inner = self.or(depth + 1);
            self.at += usize::from(self.peek(0) == Some(")"));
            return inner == value;
        }
        self.one() == value
    }

    fn is_comparison(&self) -> bool {
        self.peek(1)
            .is_some_and(|operator| compare(operator, "", "").is_some())
            && self.peek(2).is_some()
    }

    fn one(&mut self) -> bool {
        let (first, second, third) = (self.peek(0), self.peek(1), self.peek(2));
        if let (Some(left), Some(operator), Some(right)) = (first, second, third)
            && let Some(value) = compare(operator, left, right)
        {
            self.at += 3;
            return value;
        }
        let (Some(first), second) = (first, second.map(str::to_owned)) else {
            return false;
        };
        let unary = matches!(first, "-n" | "-z" | "-d" | "-e" | "-f" | "-s");
        let (true, Some(operand)) = (unary, second) else {
            let value = !first.is_empty();
            self.at += 1;
            return value;
        };
        let first = first.to_owned();
        self.at += 2;
        match first.as_str() {
            "-n" => !operand.is_empty(),
            "-z" => operand.is_empty(),
            "-d" => self.files.look(&operand) == Some(Look::Folder),
            "-e" => self.files.look(&operand).is_some(),
            "-s" => matches!(self.files.look(&operand), Some(Look::File(1..))),
            _ => matches!(self.files.look(&operand), Some(Look::File(_))),
        }
    }
}

/// `None`: no operator.
fn compare(operator: &str, left: &str, right: &str) -> Option<bool> {
    let number = |text: &str| text.trim().parse::<i64>().unwrap_or(0);
    let numbers = number(left).cmp(&number(right));
    Some(match operator {
        "=" | "==" => left == right,
        "!=" => left != right,
        "<" => left < right,
        "<=" => left <= right,
        ">" => left > right,
        ">=" => left >= right,
        "-eq" => numbers == Ordering::Equal,
        "-ne" => numbers != Ordering::Equal,
        "-lt" => numbers == Ordering::Less,
        "-le" => numbers != Ordering::Greater,
        "-gt" => numbers == Ordering::Greater,
        "-ge" => numbers != Ordering::Less,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;

    impl Files for Nothing {
        fn look(&mut self, path: &str) -> Option<Look> {
            (path == "/here").then_some(Look::File(3))
        }
    }

    #[test]
    fn conditions_are_as_in_grub() {
        let cases = [
            ("", false),
            ("x", true),
            ("a = a", true),
            ("! a = a", false),
            ("-z x", false),
            ("-n x -a -f /here", true),
            ("-s /there -o 3 -gt 2", true),
            ("( a = b -o a = a ) -a ! -e /there", true),
            ("a = a b", false),
            ("= = =", true),
        ];
        for (text, wanted) in cases {
            let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
            assert_eq!(evaluate(&words, &mut Nothing), wanted, "{text}");
        }
        assert!(!evaluate(&[String::new()], &mut Nothing));
        // Deeper than any condition: an answer, whichever.
        let words = vec!["(".to_owned(); 4096];
        assert!(!evaluate(&words, &mut Nothing));
    }
}
