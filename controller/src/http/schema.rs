//! JSON Schema as far as the APIs need it, with the messages that nova and keystone give (they come
//! from Python's jsonschema, so values are shown as Python writes them).
//!
//! Keywords: type, enum, required, properties, patternProperties, additionalProperties, items,
//! minItems, maxItems, uniqueItems, minProperties, maxProperties, minLength, maxLength, minimum,
//! maximum, pattern, format, oneOf/anyOf ("is not valid under any of the given schemas"), allOf.

use std::cmp::Ordering;
use std::fmt::Write as _;

use regex::Regex;
use serde_json::{Map, Number, Value};

use crate::http::{ApiError, Query};

/// A schema made once, usually in a `LazyLock`.
#[derive(Debug)]
pub struct Schema {
    root: Node,
}

/// What of a value does not fit: where, what it was, and in which words.
#[derive(Debug, Clone, PartialEq)]
pub struct Misfit {
    /// Names and indices from the outside in.
    pub path: Vec<String>,
    pub value: Value,
    pub message: String,
}

impl Schema {
    /// Compiles a schema; one with an invalid `pattern` matches nothing there (a test compiles all).
    pub fn of(schema: Value) -> Self {
        Self {
            root: Node::compile(&schema),
        }
    }

    /// 400 with nova's words when `body` does not fit.
    pub fn check(&self, body: &Value) -> Result<(), ApiError> {
        self.misfit(body)
            .map_or(Ok(()), |misfit| Err(misfit.into_error("field/attribute")))
    }

    /// The same for query parameters: each schema property sees the list of a name's values.
    pub fn check_query(&self, query: &Query) -> Result<(), ApiError> {
        let mut object = Map::new();
        for (name, value) in query.pairs() {
            let values = object
                .entry(name)
                .or_insert_with(|| Value::Array(Vec::new()));
            if let Value::Array(values) = values {
                values.push(value.into());
            }
        }
        let Some(mut misfit) = self.misfit(&Value::Object(object)) else {
            return Ok(());
        };
        // The last name (not the index within its values) is what the message names.
        if misfit.path.len() > 1 {
            misfit.path.truncate(1);
        }
        Err(misfit.into_error("query parameters"))
    }

    /// The misfit nearest to the root, or none.
    pub fn misfit(&self, value: &Value) -> Option<Misfit> {
        let mut found = Vec::new();
        self.root.check(value, &mut Vec::new(), &mut found);
        found
            .into_iter()
            .reduce(|best, next| match next.path.len().cmp(&best.path.len()) {
                Ordering::Less => next,
                _ => best,
            })
    }
}

impl Misfit {
    fn into_error(self, what: &str) -> ApiError {
        let Self {
            path,
            value,
            message,
        } = self;
        ApiError::bad_request(match path.last() {
            None => message,
            Some(name) => {
                format!(
                    "Invalid input for {what} {name}. Value: {}. {message}",
                    python_str(&value)
                )
            }
        })
    }
}

/// A compiled schema object.
#[derive(Debug, Default)]
struct Node {
    types: Vec<String>,
    options: Option<Vec<Value>>,
    required: Vec<String>,
    properties: Vec<(String, Node)>,
    patterns: Vec<(String, Option<Regex>, Node)>,
    additional: Additional,
    items: Option<Box<Node>>,
    lengths: Lengths,
    unique: bool,
    minimum: Option<f64>,
    maximum: Option<f64>,
    pattern: Option<(String, Option<Regex>)>,
    format: Option<String>,
    any_of: Vec<Node>,
    one_of: Vec<Node>,
    all_of: Vec<Node>,
}

#[derive(Debug, Default)]
enum Additional {
    #[default]
    Allowed,
    Refused,
    Checked(Box<Node>),
}

#[derive(Debug, Default)]
struct Lengths {
    string: (Option<u64>, Option<u64>),
    items: (Option<u64>, Option<u64>),
    properties: (Option<u64>, Option<u64>),
}

impl Node {
    fn compile(schema: &Value) -> Self {
        let get = |name: &str| schema.get(name);
        let number = |name: &str| get(name).and_then(Value::as_u64);
        let children = |name: &str| {
            let list = get(name).and_then(Value::as_array);
            list.map(|list| list.iter().map(Self::compile).collect())
                .unwrap_or_default()
        };
        let named = |name: &str| get(name).and_then(Value::as_object).into_iter().flatten();
        Self {
            types: strings(get("type")),
            options: get("enum").and_then(Value::as_array).cloned(),
            required: strings(get("required")),
            properties: named("properties")
                .map(|(name, schema)| (name.clone(), Self::compile(schema)))
                .collect(),
            patterns: named("patternProperties")
                .map(|(text, schema)| (text.clone(), Regex::new(text).ok(), Self::compile(schema)))
                .collect(),
            additional: match get("additionalProperties") {
                None | Some(Value::Bool(true)) => Additional::Allowed,
                Some(Value::Bool(false)) => Additional::Refused,
                Some(schema) => Additional::Checked(Box::new(Self::compile(schema))),
            },
            items: get("items").map(|schema| Box::new(Self::compile(schema))),
            lengths: Lengths {
                string: (number("minLength"), number("maxLength")),
                items: (number("minItems"), number("maxItems")),
                properties: (number("minProperties"), number("maxProperties")),
            },
            unique: get("uniqueItems") == Some(&Value::Bool(true)),
            minimum: get("minimum").and_then(Value::as_f64),
            maximum: get("maximum").and_then(Value::as_f64),
            pattern: get("pattern")
                .and_then(Value::as_str)
                .map(|text| (text.to_owned(), Regex::new(text).ok())),
            format: get("format").and_then(Value::as_str).map(str::to_owned),
            any_of: children("anyOf"),
            one_of: children("oneOf"),
            all_of: children("allOf"),
        }
    }

    fn fits(&self, value: &Value) -> bool {
        let mut found = Vec::new();
        self.check(value, &mut Vec::new(), &mut found);
        found.is_empty()
    }

    fn check(&self, value: &Value, path: &mut Vec<String>, found: &mut Vec<Misfit>) {
        let mut say = |message: String| {
            found.push(Misfit {
                path: path.clone(),
                value: value.clone(),
                message,
            });
        };
        if !self.types.is_empty() && !self.types.iter().any(|kind| is_type(value, kind)) {
            let kinds: Vec<_> = self.types.iter().map(|kind| format!("'{kind}'")).collect();
            say(format!(
                "{} is not of type {}",
                repr(value),
                kinds.join(", ")
            ));
        }
        if let Some(options) = &self.options
            && !options.contains(value)
        {
            say(format!(
                "{} is not one of {}",
                repr(value),
                repr(&options.clone().into())
            ));
        }
        for (any, schemas) in [(true, &self.any_of), (false, &self.one_of)] {
            let fitting = schemas.iter().filter(|schema| schema.fits(value)).count();
            if !schemas.is_empty() && fitting == 0 {
                say(format!(
                    "{} is not valid under any of the given schemas",
                    repr(value)
                ));
            } else if !any && fitting > 1 {
                say(format!(
                    "{} is valid under each of several schemas",
                    repr(value)
                ));
            }
        }
        match value {
            Value::String(text) => self.check_string(text, &mut say),
            Value::Number(number) => self.check_number(number, &mut say),
            Value::Array(items) => self.check_array(items, path, found),
            Value::Object(object) => self.check_object(object, path, found),
            Value::Null | Value::Bool(_) => {}
        }
        for schema in &self.all_of {
            schema.check(value, path, found);
        }
    }

    fn check_string(&self, text: &str, say: &mut impl FnMut(String)) {
        let shown = || repr(&Value::from(text));
        let length = text.chars().count() as u64;
        let (least, most) = self.lengths.string;
        if least.is_some_and(|least| length < least) {
            let empty = least == Some(1);
            say(format!(
                "{} {}",
                shown(),
                if empty {
                    "should be non-empty"
                } else {
                    "is too short"
                }
            ));
        }
        if most.is_some_and(|most| length > most) {
            say(format!("{} is too long", shown()));
        }
        if let Some((pattern, regex)) = &self.pattern
            && !regex.as_ref().is_some_and(|regex| regex.is_match(text))
        {
            say(format!(
                "{} does not match {}",
                shown(),
                repr(&Value::from(pattern.as_str()))
            ));
        }
        if let Some(format) = &self.format
            && !is_format(text, format)
        {
            say(format!("{} is not a '{format}'", shown()));
        }
        // Bounds hold for numbers written as strings too; nova takes both.
        if let Ok(value) = text.parse::<f64>() {
            if let Some(least) = self.minimum.filter(|least| value < *least) {
                say(format!("{} is less than the minimum of {least}", shown()));
            }
            if let Some(most) = self.maximum.filter(|most| value > *most) {
                say(format!("{} is greater than the maximum of {most}", shown()));
            }
        }
    }

    fn check_number(&self, number: &Number, say: &mut impl FnMut(String)) {
        let value = number.as_f64().unwrap_or(f64::NAN);
        if let Some(least) = self.minimum
            && value < least
        {
            say(format!("{number} is less than the minimum of {least}"));
        }
        if let Some(most) = self.maximum
            && value > most
        {
            say(format!("{number} is greater than the maximum of {most}"));
        }
    }

    fn check_array(&self, items: &[Value], path: &mut Vec<String>, found: &mut Vec<Misfit>) {
        let whole = || Value::Array(items.to_vec());
        let mut say = |message: String| {
            found.push(Misfit {
                path: path.clone(),
                value: whole(),
                message,
            });
        };
        let length = items.len() as u64;
        let (least, most) = self.lengths.items;
        if least.is_some_and(|least| length < least) {
            let words = if least == Some(1) {
                "should be non-empty"
            } else {
                "is too short"
            };
            say(format!("{} {words}", repr(&whole())));
        }
        if most.is_some_and(|most| length > most) {
            say(format!("{} is too long", repr(&whole())));
        }
        let repeated = items
            .iter()
            .enumerate()
            .any(|(at, item)| items[..at].contains(item));
        if self.unique && repeated {
            say(format!("{} has non-unique elements", repr(&whole())));
        }
        let Some(schema) = &self.items else { return };
        for (at, item) in items.iter().enumerate() {
            path.push(at.to_string());
            schema.check(item, path, found);
            path.pop();
        }
    }

    fn check_object(
        &self,
        object: &Map<String, Value>,
        path: &mut Vec<String>,
        found: &mut Vec<Misfit>,
    ) {
        let mut say = |message: String| {
            let value = Value::Object(object.clone());
            found.push(Misfit {
                path: path.clone(),
                value,
                message,
            });
        };
        for name in self
            .required
            .iter()
            .filter(|name| !object.contains_key(*name))
        {
            say(format!(
                "{} is a required property",
                repr(&Value::from(name.as_str()))
            ));
        }
        let count = object.len() as u64;
        let (least, most) = self.lengths.properties;
        if least.is_some_and(|least| count < least) {
            say(format!(
                "{} does not have enough properties",
                repr(&object.clone().into())
            ));
        }
        if most.is_some_and(|most| count > most) {
            say(format!(
                "{} has too many properties",
                repr(&object.clone().into())
            ));
        }
        let extra: Vec<&String> = object.keys().filter(|name| !self.knows(name)).collect();
        if matches!(self.additional, Additional::Refused) && !extra.is_empty() {
            say(self.unexpected(&extra));
        }
        for (name, value) in object {
            path.push(name.clone());
            let matching = self
                .patterns
                .iter()
                .filter(|(_, regex, _)| regex.as_ref().is_some_and(|regex| regex.is_match(name)));
            let known = self.properties.iter().filter(|(known, _)| known == name);
            for schema in known
                .map(|(_, node)| node)
                .chain(matching.map(|(_, _, node)| node))
            {
                schema.check(value, path, found);
            }
            if let Additional::Checked(schema) = &self.additional
                && !self.knows(name)
            {
                schema.check(value, path, found);
            }
            path.pop();
        }
    }

    fn knows(&self, name: &str) -> bool {
        self.properties.iter().any(|(known, _)| known == name)
            || self
                .patterns
                .iter()
                .any(|(_, regex, _)| regex.as_ref().is_some_and(|regex| regex.is_match(name)))
    }

    fn unexpected(&self, extra: &[&String]) -> String {
        let mut names: Vec<_> = extra
            .iter()
            .map(|name| repr(&Value::from(name.as_str())))
            .collect();
        if self.patterns.is_empty() {
            let verb = if names.len() == 1 { "was" } else { "were" };
            let names = names.join(", ");
            return format!("Additional properties are not allowed ({names} {verb} unexpected)");
        }
        names.sort();
        let verb = if names.len() == 1 { "does" } else { "do" };
        let mut patterns: Vec<_> = self
            .patterns
            .iter()
            .map(|(text, ..)| repr(&Value::from(text.as_str())))
            .collect();
        patterns.sort();
        format!(
            "{} {verb} not match any of the regexes: {}",
            names.join(", "),
            patterns.join(", ")
        )
    }
}

fn strings(value: Option<&Value>) -> Vec<String> {
    match value {
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(list)) => list
            .iter()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect(),
        _ => Vec::new(),
    }
}

fn is_type(value: &Value, kind: &str) -> bool {
    match kind {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        "number" => value.is_number(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        _ => false,
    }
}

fn is_format(text: &str, format: &str) -> bool {
    match format {
        "uuid" => uuid::Uuid::try_parse(text).is_ok(),
        "ipv4" => text.parse::<std::net::Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<std::net::Ipv6Addr>().is_ok(),
        "date-time" => {
            text.parse::<jiff::Timestamp>().is_ok() || text.parse::<jiff::civil::DateTime>().is_ok()
        }
        "uri" => text
            .parse::<http::Uri>()
            .is_ok_and(|uri| uri.scheme().is_some()),
        "base64" => fractus_agent_api::guest::decoded(text).is_some(),
        // Letters of any language, no control characters, no blanks around: nova's names.
        "name" => !text.trim().is_empty() && text.trim() == text && printable(text),
        "name_with_leading_trailing_spaces" => !text.trim().is_empty() && printable(text),
        _ => true,
    }
}

fn printable(text: &str) -> bool {
    !text.chars().any(char::is_control)
}

/// `str(value)` of Python: strings bare, all else as [`repr`].
fn python_str(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => repr(other),
    }
}

/// `repr(value)` of Python.
pub fn repr(value: &Value) -> String {
    match value {
        Value::Null => "None".to_owned(),
        Value::Bool(true) => "True".to_owned(),
        Value::Bool(false) => "False".to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => repr_string(text),
        Value::Array(items) => {
            format!(
                "[{}]",
                items.iter().map(repr).collect::<Vec<_>>().join(", ")
            )
        }
        Value::Object(object) => {
            let members = object
                .iter()
                .map(|(name, value)| format!("{}: {}", repr_string(name), repr(value)));
            format!("{{{}}}", members.collect::<Vec<_>>().join(", "))
        }
    }
}

fn repr_string(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if c.is_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push(quote);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn said(schema: Value, body: Value) -> String {
        Schema::of(schema)
            .check(&body)
            .unwrap_err()
            .message()
            .to_owned()
    }

    fn flavor() -> Value {
        json!({
            "type": "object",
            "properties": {"flavor": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "minLength": 1, "maxLength": 5},
                    "ram": {"type": ["integer", "string"], "minimum": 1, "pattern": "^[0-9]+$"},
                },
                "required": ["name", "ram"],
                "additionalProperties": false,
            }},
            "required": ["flavor"],
            "additionalProperties": false,
        })
    }

    /// Expected texts are those of recorded answers.
    #[test]
    fn messages_are_the_recorded_ones() {
        let of = |body| said(flavor(), body);
        assert_eq!(
            of(json!({"flavor": {"name": "x", "ram": 0}})),
            "Invalid input for field/attribute ram. Value: 0. 0 is less than the minimum of 1"
        );
        assert_eq!(
            of(json!({"flavor": {"name": "", "ram": 1}})),
            "Invalid input for field/attribute name. Value: . '' should be non-empty"
        );
        assert_eq!(
            of(json!({"flavor": {"name": 12345, "ram": 1}})),
            "Invalid input for field/attribute name. Value: 12345. 12345 is not of type 'string'"
        );
        assert_eq!(
            of(json!({"flavor": {}})),
            "Invalid input for field/attribute flavor. Value: {}. 'name' is a required property"
        );
        assert_eq!(of(json!([])), "[] is not of type 'object'");
        assert_eq!(of(json!(null)), "None is not of type 'object'");
        assert_eq!(
            of(json!({"flavor": {"name": "x", "ram": 1, "bogus": 1}})),
            "Invalid input for field/attribute flavor. Value: {'name': 'x', 'ram': 1, 'bogus': 1}. \
             Additional properties are not allowed ('bogus' was unexpected)"
        );
        assert_eq!(
            said(
                json!({"type": "object", "properties": {"metadata": {
                    "type": "object", "additionalProperties": false,
                    "patternProperties": {"^[a-zA-Z0-9-_:. ]{1,255}$": {"type": "string"}},
                }}}),
                json!({"metadata": {"": "data1"}})
            ),
            "Invalid input for field/attribute metadata. Value: {'': 'data1'}. '' does not match \
             any of the regexes: '^[a-zA-Z0-9-_:. ]{1,255}$'"
        );
    }

    #[test]
    fn query_parameters_have_their_own_words() {
        let schema = Schema::of(json!({"type": "object", "properties": {
            "limit": {"type": "array", "items": {"type": "string", "pattern": "^[0-9]*$"}},
        }}));
        assert!(schema.check_query(&Query::parse("limit=3&x=1")).is_ok());
        assert_eq!(
            schema
                .check_query(&Query::parse("limit=-1"))
                .unwrap_err()
                .message(),
            "Invalid input for query parameters limit. Value: -1. '-1' does not match '^[0-9]*$'"
        );
    }

    #[test]
    fn strings_are_shown_as_python_shows_them() {
        assert_eq!(repr(&json!("key_/.\\@:")), r"'key_/.\\@:'");
        assert_eq!(repr(&json!("it's")), "\"it's\"");
        assert_eq!(
            repr(&json!({"a": [true, null, 1.5]})),
            "{'a': [True, None, 1.5]}"
        );
    }
}
