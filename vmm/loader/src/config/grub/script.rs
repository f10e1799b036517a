//! GRUB's script language: words, commands, `if`, loops and functions, as a tree.

use std::rc::Rc;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    Text(String),
    /// A variable; within quotes its value stays one word.
    Variable {
        name: String,
        quoted: bool,
    },
}

/// Parts that stand together without a space.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Word {
    pub parts: Vec<Part>,
    /// Something was quoted: an empty word stays a word.
    pub quoted: bool,
}

impl Word {
    /// The text of a word that was written without quotes and variables.
    fn plain(&self) -> Option<&str> {
        match self.parts.as_slice() {
            [Part::Text(text)] if !self.quoted => Some(text),
            _ => None,
        }
    }
}

pub type Block = Rc<[Command]>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Words, and the block behind them that a menu entry has.
    Simple {
        words: Vec<Word>,
        block: Option<Block>,
    },
    /// Conditions with what they lead to; the last one of an `else` is empty.
    If(Vec<(Block, Block)>),
    While {
        until: bool,
        condition: Block,
        body: Block,
    },
    For {
        name: String,
        words: Vec<Word>,
        body: Block,
    },
    Function {
        name: String,
        body: Block,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Word(Word),
    /// A new line or a semicolon.
    End,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("line {line}: {problem}")]
pub struct SyntaxError {
    line: u32,
    problem: &'static str,
}

/// Deeper than any configuration is nested.
const MAX_DEPTH: u32 = 48;

/// Bytes of memory that a token takes, and the commands that are made of it; that a part of a word
/// takes, besides its text. Lists are twice as long as what is in them, for a moment three times.
const TOKEN: usize = 3 * (size_of::<(Token, u32)>() + size_of::<Word>() + size_of::<Command>());
const PART: usize = 2 * size_of::<Part>() + 16;

/// A script that was understood.
#[derive(Debug)]
pub struct Parsed {
    pub block: Block,
    /// Bytes of memory that it has taken.
    pub kept: u64,
}

/// Understands a script, for which there are `room` bytes of memory.
pub fn parse(text: &str, room: u64) -> Result<Parsed, SyntaxError> {
    let mut lexer = Lexer::new(text, room);
    let mut tokens = lexer.all()?;
    let mut parser = Parser {
        tokens: &mut tokens,
        at: 0,
        depth: 0,
    };
    let block = parser.block(&[])?;
    match parser.tokens.get(parser.at) {
        None => Ok(Parsed {
            block,
            kept: room - lexer.room,
        }),
        Some(_) => Err(parser.error("a word that ends something that was not begun")),
    }
}

struct Lexer<'a> {
    rest: std::iter::Peekable<std::str::Chars<'a>>,
    line: u32,
    /// Bytes of memory that are left.
    room: u64,
}

impl<'a> Lexer<'a> {
    fn new(text: &'a str, room: u64) -> Self {
        Lexer {
            rest: text.chars().peekable(),
            line: 1,
            room,
        }
    }

    fn pay(&mut self, cost: usize) -> Result<(), SyntaxError> {
        self.room = self.room.checked_sub(cost as u64).ok_or(SyntaxError {
            line: self.line,
            problem: "more words than there is memory for",
        })?;
        Ok(())
    }

    fn all(&mut self) -> Result<Vec<(Token, u32)>, SyntaxError> {
        let mut tokens = Vec::new();
        while let Some(first) = self.rest.peek().copied() {
            let line = self.line;
            match first {
                '\n' | ';' => {
                    self.next();
                    // Several ends are one.
                    if !matches!(tokens.last(), None | Some((Token::End, _))) {
                        self.pay(TOKEN)?;
                        tokens.push((Token::End, line));
                    }
                }
                ' ' | '\t' | '\r' => drop(self.next()),
                '#' => while self.rest.next_if(|c| *c != '\n').is_some() {},
                _ => {
                    let word = self.word()?;
                    // A line that goes on is a word of nothing.
                    if word.quoted || !word.parts.is_empty() {
                        self.pay(TOKEN + PART + word.text_length())?;
                        tokens.push((Token::Word(word), line));
                    }
                }
            }
        }
        Ok(tokens)
    }

    fn next(&mut self) -> Option<char> {
        let next = self.rest.next();
        self.line += u32::from(next == Some('\n'));
        next
    }

    fn word(&mut self) -> Result<Word, SyntaxError> {
        let mut word = Word::default();
        while let Some(next) = self.rest.peek().copied() {
            match next {
                ' ' | '\t' | '\r' | '\n' | ';' => break,
                '\'' => {
                    self.next();
                    word.quoted = true;
                    loop {
                        match self.next().ok_or(self.open())? {
                            '\'' => break,
                            c => word.push(c),
                        }
                    }
                }
                '"' => {
                    self.next();
                    word.quoted = true;
                    self.quoted(&mut word)?;
                }
                '\\' => {
                    self.next();
                    match self.next() {
                        // The line goes on.
                        None | Some('\n') => {}
                        Some(c) => word.push(c),
                    }
                }
                '$' => self.variable(&mut word, false)?,
                c => {
                    self.next();
                    word.push(c);
                }
            }
        }
        Ok(word)
    }

    fn quoted(&mut self, word: &mut Word) -> Result<(), SyntaxError> {
        loop {
            match self.rest.peek().copied().ok_or(self.open())? {
                '"' => {
                    self.next();
                    return Ok(());
                }
                '$' => self.variable(word, true)?,
                '\\' => {
                    self.next();
                    match self.next().ok_or(self.open())? {
                        '\n' => {}
                        c @ ('"' | '\\' | '$' | '`') => word.push(c),
                        c => {
                            word.push('\\');
                            word.push(c);
                        }
                    }
                }
                c => {
                    self.next();
                    word.push(c);
                }
            }
        }
    }

    /// `$name`, `${name}`, `$1`, `$?`; a `$` before anything else is itself.
    fn variable(&mut self, word: &mut Word, quoted: bool) -> Result<(), SyntaxError> {
        self.next();
        let mut name = String::new();
        match self.rest.peek().copied() {
            Some('{') => {
                self.next();
                loop {
                    match self.next().ok_or(self.open())? {
                        '}' => break,
                        c => name.push(c),
                    }
                }
            }
            Some(c @ ('?' | '@' | '*' | '#' | '0'..='9')) => {
                self.next();
                name.push(c);
            }
            _ => {
                let letter = |c: &char| c.is_ascii_alphanumeric() || *c == '_';
                while let Some(c) = self.rest.next_if(letter) {
                    name.push(c);
                }
            }
        }
        if name.is_empty() {
            word.push('$');
        } else {
            // Text may follow it.
            self.pay(2 * (PART + name.len()))?;
            word.parts.push(Part::Variable { name, quoted });
        }
        Ok(())
    }

    fn open(&self) -> SyntaxError {
        SyntaxError {
            line: self.line,
            problem: "a quote or brace that is not closed",
        }
    }
}

impl Word {
    /// Bytes of memory for the text in it.
    fn text_length(&self) -> usize {
        let length = |part: &Part| match part {
            Part::Text(text) => 2 * text.len(),
            Part::Variable { .. } => 0,
        };
        self.parts.iter().map(length).sum()
    }

    fn push(&mut self, c: char) {
        match self.parts.last_mut() {
            Some(Part::Text(text)) => text.push(c),
            _ => self.parts.push(Part::Text(c.to_string())),
        }
    }
}

struct Parser<'a> {
    /// Words are taken out of it.
    tokens: &'a mut [(Token, u32)],
    at: usize,
    depth: u32,
}

impl Parser<'_> {
    fn error(&self, problem: &'static str) -> SyntaxError {
        let last = self.tokens.get(self.at).or(self.tokens.last());
        SyntaxError {
            line: last.map_or(1, |(_, line)| *line),
            problem,
        }
    }

    /// The next token, if it is a word that was written plainly.
    fn plain(&self) -> Option<&str> {
        match self.tokens.get(self.at) {
            Some((Token::Word(word), _)) => word.plain(),
            _ => None,
        }
    }

    fn skip_ends(&mut self) {
        while matches!(self.tokens.get(self.at), Some((Token::End, _))) {
            self.at += 1;
        }
    }

    fn expect(&mut self, wanted: &str, problem: &'static str) -> Result<(), SyntaxError> {
        self.skip_ends();
        if self.plain() != Some(wanted) {
            return Err(self.error(problem));
        }
        self.at += 1;
        Ok(())
    }

    /// Commands up to one of the words in `ends`, which is not taken, or to the end of all.
    fn block(&mut self, ends: &[&str]) -> Result<Block, SyntaxError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.error("nested too deeply"));
        }
        let mut commands = Vec::new();
        loop {
            self.skip_ends();
            if self.at >= self.tokens.len() {
                break;
            }
            match self.plain() {
                Some(word) if ends.contains(&word) => break,
                Some("}" | "fi" | "then" | "else" | "elif" | "do" | "done") => {
                    return Err(self.error("a word that ends something that was not begun"));
                }
                _ => commands.push(self.command()?),
            }
        }
        self.depth -= 1;
        Ok(commands.into())
    }

    fn command(&mut self) -> Result<Command, SyntaxError> {
        match self.plain() {
            Some("if") => self.conditional(),
            Some(word @ ("while" | "until")) => {
                let until = word == "until";
                self.at += 1;
                let condition = self.block(&["do"])?;
                let body = self.loop_body()?;
                Ok(Command::While {
                    until,
                    condition,
                    body,
                })
            }
            Some("for") => {
                self.at += 1;
                let name = self.plain().map(str::to_owned);
                let name = name.ok_or(self.error("a loop without a variable"))?;
                self.at += 1;
                self.expect("in", "a loop without `in`")?;
                let words = self.words();
                let body = self.loop_body()?;
                Ok(Command::For { name, words, body })
            }
            Some("function") => {
                self.at += 1;
                let name = self.plain().map(str::to_owned);
                let name = name.ok_or(self.error("a function without a name"))?;
                self.at += 1;
                self.skip_ends();
                let body = self.braces()?;
                let body = body.ok_or(self.error("a function without a body"))?;
                Ok(Command::Function { name, body })
            }
            _ => self.simple(),
        }
    }

    fn conditional(&mut self) -> Result<Command, SyntaxError> {
        self.at += 1;
        let mut branches = Vec::new();
        loop {
            let condition = self.block(&["then"])?;
            self.expect("then", "`if` without `then`")?;
            let body = self.block(&["elif", "else", "fi"])?;
            branches.push((condition, body));
            match self.plain() {
                Some("elif") => self.at += 1,
                Some("else") => {
                    self.at += 1;
                    let body = self.block(&["fi"])?;
                    branches.push((Rc::new([]), body));
                    break;
                }
                _ => break,
            }
        }
        self.expect("fi", "`if` without `fi`")?;
        Ok(Command::If(branches))
    }

    fn loop_body(&mut self) -> Result<Block, SyntaxError> {
        self.expect("do", "a loop without `do`")?;
        let body = self.block(&["done"])?;
        self.expect("done", "a loop without `done`")?;
        Ok(body)
    }

    /// Words up to the end of the command, or a brace.
    fn words(&mut self) -> Vec<Word> {
        let mut words = Vec::new();
        while let Some((Token::Word(word), _)) = self.tokens.get_mut(self.at) {
            if word.plain() == Some("{") || (word.plain() == Some("}")) {
                break;
            }
            words.push(std::mem::take(word));
            self.at += 1;
        }
        words
    }

    fn braces(&mut self) -> Result<Option<Block>, SyntaxError> {
        if self.plain() != Some("{") {
            return Ok(None);
        }
        self.at += 1;
        let block = self.block(&["}"])?;
        self.expect("}", "a brace that is not closed")?;
        Ok(Some(block))
    }

    fn simple(&mut self) -> Result<Command, SyntaxError> {
        let words = self.words();
        let block = self.braces()?;
        if words.is_empty() && block.is_none() {
            return Err(self.error("a command without words"));
        }
        Ok(Command::Simple { words, block })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_distributions_write_is_understood() {
        let text = r#"
            # comment
            if [ "${next_entry}" ] ; then
               set default="${next_entry}"
            elif [ x$a = xy ]; then true; else false
            fi
            function gfxmode {
            	set gfxpayload="${1}"
            }
            menuentry 'A "b" $c' --class x $menuentry_id_option 'id' {
            	if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
            	linux	/vmlinuz root=UUID=1 \
            	  ro
            }
            submenu "S" { menuentry x { true; } ; }
        "#;
        let block = parse(text, 1 << 20).unwrap().block;
        assert_eq!(block.len(), 4);
        let Command::If(branches) = &block[0] else {
            panic!("{:?}", block[0])
        };
        assert_eq!(branches.len(), 3);
        let Command::Simple {
            words,
            block: Some(body),
        } = &block[2]
        else {
            panic!()
        };
        assert_eq!(words.len(), 6);
        assert_eq!(words[1].parts, [Part::Text("A \"b\" $c".to_owned())]);
        let Command::Simple { words, .. } = &body[1] else {
            panic!()
        };
        assert_eq!(words.len(), 4);
    }

    #[test]
    fn what_is_not_closed_is_named_with_its_line() {
        for (text, line) in [
            ("\nif true; then", 2),
            ("echo 'a", 1),
            ("}", 1),
            ("x {\n\n", 1),
        ] {
            assert_eq!(parse(text, 1 << 20).unwrap_err().line, line, "{text:?}");
        }
        let deep = "if true; then ".repeat(5000);
        assert!(parse(&deep, 64 << 20).is_err());
    }

    #[test]
    fn what_takes_more_memory_than_there_is_ends_where_that_is_used_up() {
        let room = 1 << 20;
        for text in ["a ", "a;", "$a", "'a'$b", "\"$a$b\"\n", "'' "] {
            let text = text.repeat(100_000);
            let error = parse(&text, room).unwrap_err();
            assert_eq!(error.problem, "more words than there is memory for");
            assert!(parse(&text, 1 << 30).is_ok());
        }
        let empty = "\n;\n".repeat(100_000);
        assert_eq!(parse(&empty, 0).unwrap().kept, 0);
        let kept = parse("linux /vmlinuz root=$x\n", room).unwrap().kept;
        assert!((100..4000).contains(&kept), "{kept}");
    }
}
