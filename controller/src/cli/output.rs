//! What is printed: tables for people, JSON and bare values for programs, errors on stderr.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value};

use super::CliError;
use super::arguments::{Color, OutputArguments};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    #[default]
    Table,
    Json,
    /// Bare values, one line a row
    Value,
}

/// Where and how a command prints.
#[derive(Debug)]
pub struct Output {
    format: Format,
    columns: Vec<String>,
    /// Colour and moving bars: only on a terminal, unless asked for.
    lively: bool,
}

/// One thing to show, as `(column, value)` in order.
pub type Row = Vec<(&'static str, Value)>;

impl Output {
    pub fn new(arguments: &OutputArguments) -> Self {
        let wanted = match arguments.color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => {
                std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none()
            }
        };
        Self {
            format: arguments.format,
            columns: arguments.column.clone(),
            lively: wanted,
        }
    }

    pub fn raw(&self, bytes: &[u8]) -> std::io::Result<()> {
        let mut out = std::io::stdout().lock();
        out.write_all(bytes)?;
        out.flush()
    }

    fn line(&self, text: &str) -> Result<(), CliError> {
        match self.raw(format!("{text}\n").as_bytes()) {
            // Whoever reads has had enough.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            other => other.map_err(|error| CliError::Local {
                what: "writing",
                error,
            }),
        }
    }

    /// A list: one row each.
    pub fn rows(&self, header: &[&'static str], rows: Vec<Row>) -> Result<(), CliError> {
        let shown: Vec<&'static str> = header
            .iter()
            .copied()
            .filter(|name| self.wants(name))
            .collect();
        let pick = |row: &Row, name: &str| {
            row.iter()
                .find(|(column, _)| *column == name)
                .map_or(Value::Null, |(_, value)| value.clone())
        };
        match self.format {
            Format::Json => {
                let rows: Vec<Value> = rows
                    .iter()
                    .map(|row| {
                        let fields = shown
                            .iter()
                            .map(|name| ((*name).to_owned(), pick(row, name)));
                        Value::Object(fields.collect::<Map<String, Value>>())
                    })
                    .collect();
                self.line(&pretty(&Value::Array(rows)))
            }
            Format::Value => {
                let lines: Vec<String> = rows
                    .iter()
                    .map(|row| {
                        let values: Vec<String> =
                            shown.iter().map(|name| text(&pick(row, name))).collect();
                        values.join(" ")
                    })
                    .collect();
                if lines.is_empty() {
                    Ok(())
                } else {
                    self.line(&lines.join("\n"))
                }
            }
            Format::Table => {
                let mut table = table();
                table.set_header(shown.iter());
                for row in &rows {
                    table.add_row(shown.iter().map(|name| text(&pick(row, name))));
                }
                self.line(&table.to_string())
            }
        }
    }

    /// One thing: a line a field.
    pub fn fields(&self, row: Row) -> Result<(), CliError> {
        let shown: Row = row
            .into_iter()
            .filter(|(name, _)| self.wants(name))
            .collect();
        match self.format {
            Format::Json => {
                let fields = shown
                    .into_iter()
                    .map(|(name, value)| (name.to_owned(), value));
                self.line(&pretty(&Value::Object(fields.collect())))
            }
            Format::Value => {
                let lines: Vec<String> = shown.iter().map(|(_, value)| text(value)).collect();
                self.line(&lines.join("\n"))
            }
            Format::Table => {
                let mut table = table();
                table.set_header(["Field", "Value"]);
                for (name, value) in shown {
                    table.add_row([name.to_owned(), text(&value)]);
                }
                self.line(&table.to_string())
            }
        }
    }

    /// Nobody but people reads this.
    pub fn is_for_people(&self) -> bool {
        self.format == Format::Table
    }

    /// A part of what is shown to people, with all of its columns.
    pub fn table(&self, header: &[&'static str], rows: &[Row]) -> Result<(), CliError> {
        let mut table = table();
        table.set_header(header);
        for row in rows {
            table.add_row(row.iter().map(|(_, value)| text(value)));
        }
        self.line(&table.to_string())
    }

    /// A remark for people, on stderr so that it never mixes with what is asked for.
    pub fn remark(&self, text: &str) {
        if self.format == Format::Table {
            eprintln!("{text}");
        }
    }

    /// Prints an error with what to do about it, and gives the code to exit with.
    pub fn failure(&self, error: &CliError) -> ExitCode {
        let theme = if self.lively {
            miette::GraphicalTheme::unicode()
        } else {
            miette::GraphicalTheme::unicode_nocolor()
        };
        let mut said = String::new();
        let handler = miette::GraphicalReportHandler::new_themed(theme).with_width(100);
        if handler.render_report(&mut said, error).is_err() {
            said = format!("{error}\n");
        }
        eprint!("{}", said.trim_start_matches('\n'));
        error.exit_code()
    }

    /// A bar for `total` bytes; hidden where nobody looks.
    pub fn bar(&self, total: Option<u64>, what: &str) -> ProgressBar {
        let bar = match total {
            Some(total) => ProgressBar::new(total),
            None => ProgressBar::new_spinner(),
        };
        bar.set_draw_target(self.target());
        let style = ProgressStyle::with_template(
            "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        );
        if let (Some(_), Ok(style)) = (total, style) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what.to_owned());
        bar
    }

    /// A sign of life while something is waited for.
    pub fn spinner(&self, what: &str) -> ProgressBar {
        let spinner = ProgressBar::new_spinner();
        spinner.set_draw_target(self.target());
        spinner.set_message(what.to_owned());
        spinner.enable_steady_tick(Duration::from_millis(120));
        spinner
    }

    /// Somebody looks.
    pub fn has_bars(&self) -> bool {
        self.lively && std::io::stderr().is_terminal()
    }

    fn target(&self) -> ProgressDrawTarget {
        if self.has_bars() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        }
    }

    /// It is among the columns that were asked for.
    pub fn wants(&self, name: &str) -> bool {
        self.columns.is_empty()
            || self
                .columns
                .iter()
                .any(|column| column.eq_ignore_ascii_case(name))
    }
}

fn table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    table
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default()
}

/// A value as a person reads it.
pub fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Array(items) if items.iter().all(|item| !item.is_object()) => {
            items.iter().map(text).collect::<Vec<_>>().join(", ")
        }
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| format!("{name}={}", text(value)))
            .collect::<Vec<_>>()
            .join(", "),
        other => other.to_string(),
    }
}
