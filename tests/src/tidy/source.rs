//! A Rust file, split into code and comments, so that no check stumbles over a string or a comment.
//!
//! Owns the lexer. It knows comments (nested), strings (raw, byte, C), characters and lifetimes, and
//! nothing else of the language.

use std::ops::Range;

/// One file. `code` and `comments` are as long as `text`, line by line; what belongs to the other
/// (and what is inside of string literals) is blank.
#[derive(Debug)]
pub struct Source {
    /// Relative to the checkout, with `/`.
    pub path: String,
    pub text: String,
    pub code: String,
    pub comments: String,
}

/// A function with its body.
#[derive(Debug, PartialEq, Eq)]
pub struct Function {
    pub name: String,
    /// From 1.
    pub line: usize,
    pub lines: usize,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Code,
    Comment,
    Literal,
}

impl Source {
    pub fn new(path: impl Into<String>, text: impl Into<String>) -> Self {
        let text = text.into();
        let kinds = kinds(text.as_bytes());
        let keep = |wanted: Kind| -> String {
            // Whole bytes are blanked, so what stays is made of whole characters of one kind.
            let bytes: Vec<u8> = text
                .bytes()
                .zip(&kinds)
                .map(|(byte, kind)| {
                    if byte == b'\n' || *kind == wanted {
                        byte
                    } else {
                        b' '
                    }
                })
                .collect();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let (code, comments) = (keep(Kind::Code), keep(Kind::Comment));
        Self {
            path: path.into(),
            text,
            code,
            comments,
        }
    }

    /// Line number (from 1) of a byte offset.
    pub fn line_of(&self, offset: usize) -> usize {
        self.text.as_bytes()[..offset]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count()
            + 1
    }

    /// Offsets of `word` in the code, where it is not a part of a longer identifier.
    pub fn words(&self, word: &str) -> Vec<usize> {
        let code = self.code.as_bytes();
        let identifier = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        self.code
            .match_indices(word)
            .map(|(at, _)| at)
            .filter(|at| *at == 0 || !identifier(code[at - 1]))
            .filter(|at| {
                let last_is_word = word.as_bytes().last().is_some_and(|byte| identifier(*byte));
                !last_is_word
                    || code
                        .get(at + word.len())
                        .is_none_or(|byte| !identifier(*byte))
            })
            .collect()
    }

    /// From the brace at `open` to its partner; `None` when the file ends before.
    pub fn block(&self, open: usize) -> Option<Range<usize>> {
        let mut depth = 0usize;
        for (offset, byte) in self.code.bytes().enumerate().skip(open) {
            match byte {
                b'{' => depth += 1,
                b'}' => {
                    depth = depth.checked_sub(1)?;
                    if depth == 0 {
                        return Some(open..offset + 1);
                    }
                }
                _ => {}
            }
        }
        None
    }

    /// Every function that has a body, nested ones too.
    pub fn functions(&self) -> Vec<Function> {
        let mut functions = Vec::new();
        for at in self.words("fn") {
            let rest = &self.code[at + 2..];
            let name: String = rest
                .trim_start()
                .chars()
                .take_while(|letter| letter.is_alphanumeric() || *letter == '_')
                .collect();
            if name.is_empty() {
                continue; // the type `fn(…)`
            }
            let Some(open) = body(rest) else { continue };
            let Some(block) = self.block(at + 2 + open) else {
                continue;
            };
            let line = self.line_of(at);
            functions.push(Function {
                name,
                line,
                lines: self.line_of(block.end - 1) - line + 1,
            });
        }
        functions
    }

    /// What is compiled for tests only: the whole of a file under a `tests` folder, and modules
    /// behind `#[cfg(test)]`.
    pub fn test_regions(&self) -> Vec<Range<usize>> {
        let in_tests_folder = self.path.split('/').any(|part| part == "tests");
        if in_tests_folder || self.path.ends_with("tests.rs") {
            return std::iter::once(0..self.text.len()).collect();
        }
        let mut regions = Vec::new();
        for (at, _) in self.code.match_indices("#[cfg(test)]") {
            let rest = &self.code[at..];
            let (open, end) = (rest.find('{'), rest.find(';'));
            match (open, end) {
                (Some(open), end) if end.is_none_or(|end| open < end) => {
                    regions.extend(self.block(at + open));
                }
                _ => {}
            }
        }
        regions
    }
}

/// Offset of the brace that opens a function's body, in the text after `fn`; `None` for a
/// declaration without one.
fn body(signature: &str) -> Option<usize> {
    let mut depth = 0i32;
    for (offset, byte) in signature.bytes().enumerate() {
        match byte {
            b'(' | b'[' => depth += 1,
            b')' | b']' => depth -= 1,
            b'{' if depth == 0 => return Some(offset),
            b';' if depth == 0 => return None,
            _ => {}
        }
    }
    None
}

/// The kind of every byte.
fn kinds(text: &[u8]) -> Vec<Kind> {
    let mut kinds = vec![Kind::Code; text.len()];
    let mut at = 0;
    while at < text.len() {
        let rest = &text[at..];
        let (length, kind) = if rest.starts_with(b"//") {
            (
                rest.iter()
                    .position(|byte| *byte == b'\n')
                    .unwrap_or(rest.len()),
                Kind::Comment,
            )
        } else if rest.starts_with(b"/*") {
            (block_comment(rest), Kind::Comment)
        } else if let Some(length) = raw_string(text, at) {
            (length, Kind::Literal)
        } else if rest[0] == b'"' {
            (quoted(rest, b'"'), Kind::Literal)
        } else if rest[0] == b'\'' {
            character(rest).map_or((1, Kind::Code), |length| (length, Kind::Literal))
        } else {
            (1, Kind::Code)
        };
        let end = (at + length.max(1)).min(text.len());
        kinds[at..end].fill(kind);
        at = end;
    }
    kinds
}

fn block_comment(rest: &[u8]) -> usize {
    let (mut depth, mut at) = (0usize, 0);
    while at < rest.len() {
        if rest[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

/// Length of the raw string that starts at `at` (`r"`, `r#"`, `br"`, `cr"`), if one does.
fn raw_string(text: &[u8], at: usize) -> Option<usize> {
    let rest = &text[at..];
    if rest[0] != b'r' {
        return None;
    }
    let before = at.checked_sub(1).map(|before| text[before]);
    let prefix = matches!(before, Some(b'b' | b'c'));
    if !prefix && before.is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
        return None;
    }
    let hashes = rest[1..].iter().take_while(|byte| **byte == b'#').count();
    if rest.get(1 + hashes) != Some(&b'"') {
        return None;
    }
    let mut end = vec![b'"'];
    end.resize(1 + hashes, b'#');
    let content = &rest[2 + hashes..];
    let close = content.windows(end.len()).position(|window| window == end);
    Some(close.map_or(rest.len(), |close| 2 + hashes + close + end.len()))
}

fn quoted(rest: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// Length of a character literal; `None` when the apostrophe begins a lifetime.
fn character(rest: &[u8]) -> Option<usize> {
    if rest.get(1) == Some(&b'\\') {
        return Some(quoted(rest, b'\''));
    }
    let text = std::str::from_utf8(&rest[1..rest.len().min(6)])
        .or_else(|fault| std::str::from_utf8(&rest[1..1 + fault.valid_up_to()]))
        .ok()?;
    let length = text.chars().next()?.len_utf8();
    (rest.get(1 + length) == Some(&b'\'')).then_some(length + 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_and_comments_are_not_code() {
        let source = Source::new(
            "a.rs",
            "let a = \"todo!()\"; // unsafe\nlet b = r#\"dbg!\"#;",
        );
        assert!(
            !source.code.contains("todo") && !source.code.contains("dbg"),
            "{}",
            source.code
        );
        assert!(!source.code.contains("unsafe") && source.comments.contains("// unsafe"));
    }

    #[test]
    fn a_lifetime_does_not_begin_a_literal() {
        let source = Source::new("a.rs", "fn a<'t>(x: &'t str) { let c = '\"'; todo!() }");
        assert!(source.code.contains("todo!"), "{}", source.code);
    }

    #[test]
    fn a_nested_comment_ends_where_the_outer_one_does() {
        let source = Source::new("a.rs", "/* a /* b */ c */ unsafe");
        assert_eq!(source.words("unsafe").len(), 1);
        assert!(!source.code.contains('c'));
    }

    #[test]
    fn functions_are_measured_with_their_body_and_declarations_are_not() {
        let source = Source::new(
            "a.rs",
            "trait T { fn declared(&self) -> [u8; 2]; }\nfn f(g: fn(u8) -> u8)\nwhere\n  u8: Copy,\n{\n}\n",
        );
        assert_eq!(
            source.functions(),
            [Function {
                name: "f".into(),
                line: 2,
                lines: 5
            }]
        );
    }

    #[test]
    fn test_modules_are_told_from_the_rest() {
        let source = Source::new(
            "src/a.rs",
            "fn a() {}\n#[cfg(test)]\nmod tests { fn b() {} }\n",
        );
        let regions = source.test_regions();
        assert_eq!(regions.len(), 1);
        assert_eq!(&source.text[regions[0].clone()], "{ fn b() {} }");
        assert_eq!(
            Source::new("tests/src/a.rs", "fn a() {}").test_regions(),
            std::slice::from_ref(&(0..9))
        );
    }
}
