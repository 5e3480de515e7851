//! Rule files: parses YAML and JSON into rules, and writes rules as YAML and JSON.

use std::fmt;

use serde::{
    Deserialize, Serialize,
    de::{self, Deserializer},
};
use serde_json::Value;
use serde_path_to_error::{Path, Segment};
use serde_saphyr::{Location, Spanned};

use super::form::RuleForm;
use crate::control::Rule;

/// Maximum size of a rule file in bytes. The parser refuses larger files at once.
pub const MAX_FILE_BYTES: usize = 4 << 20;

/// A mistake in a rule file, with its location.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// Name of the file.
    pub source: String,
    /// Line, counted from 1; 0 if the location is unknown.
    pub line: u64,
    /// Column, counted from 1; 0 if the location is unknown.
    pub column: u64,
    /// Id of the rule, or its index (`rules[2]`) if it has none; empty outside of rules.
    pub rule: String,
    /// Path of the field in the rule: `match.comm[1]`.
    pub field: String,
    /// The mistake and its remedy.
    pub reason: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { source, line, column, rule, field, reason } = self;
        f.write_str(source)?;
        if *line > 0 {
            write!(f, ":{line}:{column}")?;
        }
        if !rule.is_empty() {
            write!(f, ": rule {rule}")?;
        }
        if !field.is_empty() {
            write!(f, ": {field}")?;
        }
        write!(f, ": {reason}")
    }
}

impl std::error::Error for ParseError {}

/// Any YAML value, with the locations of its parts.
enum Node {
    Scalar(Value),
    List(Vec<Spanned<Node>>),
    Map(Vec<(Spanned<String>, Spanned<Node>)>),
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Node;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_unit<E>(self) -> Result<Node, E> {
                Ok(Node::Scalar(Value::Null))
            }

            fn visit_none<E>(self) -> Result<Node, E> {
                Ok(Node::Scalar(Value::Null))
            }

            fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
                Ok(Node::Scalar(value.into()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
                Ok(Node::Scalar(value.into()))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
                Ok(Node::Scalar(value.into()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
                Ok(Node::Scalar(value.into()))
            }

            fn visit_str<E>(self, value: &str) -> Result<Node, E> {
                Ok(Node::Scalar(value.into()))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<Node, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = list.next_element()? {
                    items.push(item);
                }
                Ok(Node::List(items))
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Node::Map(entries))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl Node {
    fn value(&self) -> Value {
        match self {
            Self::Scalar(value) => value.clone(),
            Self::List(items) => items.iter().map(|item| item.value.value()).collect(),
            Self::Map(entries) => {
                entries.iter().map(|(key, entry)| (key.value.clone(), entry.value.value())).collect()
            }
        }
    }

    fn entry(&self, wanted: &str) -> Option<&(Spanned<String>, Spanned<Self>)> {
        match self {
            Self::Map(entries) => entries.iter().find(|(key, _)| key.value == wanted),
            Self::Scalar(_) | Self::List(_) => None,
        }
    }

    fn id(&self) -> Option<&str> {
        match &self.entry("id")?.1.value {
            Self::Scalar(value) => value.as_str(),
            Self::List(_) | Self::Map(_) => None,
        }
    }
}

/// Returns the location of a path in a rule, and the path as people write it.
fn locate(rule: &Spanned<Node>, path: &Path) -> (Location, String) {
    use fmt::Write as _;

    let (mut at, mut field, mut node) = (rule.referenced, String::new(), Some(&rule.value));
    for segment in path {
        match segment {
            Segment::Seq { index } => {
                let _ = write!(field, "[{index}]");
                node = match node {
                    Some(Node::List(items)) => items.get(*index).map(|item| {
                        at = item.referenced;
                        &item.value
                    }),
                    _ => None,
                };
            }
            Segment::Map { key } | Segment::Enum { variant: key } => {
                let _ = write!(field, "{}{key}", if field.is_empty() { "" } else { "." });
                node = node.and_then(|node| node.entry(key)).map(|(name, entry)| {
                    at = name.referenced;
                    &entry.value
                });
            }
            Segment::Unknown => {}
        }
    }
    (at, field)
}

const SHAPE: &str = "a rule file is `rules:` followed by a list of rules";

/// Parses rules from YAML or JSON documents that hold `rules:` with a list. Returns the mistakes of all rules, each with
/// its line and field. [`super::validate`] checks the values.
pub fn parse(text: &str, source: &str) -> Result<Vec<Rule>, Vec<ParseError>> {
    let mut errors = Vec::new();
    let error = |at: Location, rule: &str, field: &str, reason: String| ParseError {
        source: source.to_owned(),
        line: at.line(),
        column: at.column(),
        rule: rule.to_owned(),
        field: field.to_owned(),
        reason,
    };
    if text.len() > MAX_FILE_BYTES {
        let reason = format!("the file has {} bytes, and at most {MAX_FILE_BYTES} are allowed", text.len());
        return Err(vec![error(Location::UNKNOWN, "", "", reason)]);
    }
    let documents: Vec<Spanned<Node>> = match serde_saphyr::from_multiple(text) {
        Ok(documents) => documents,
        Err(yaml) => {
            let at = yaml.location().unwrap_or(Location::UNKNOWN);
            return Err(vec![error(at, "", "", format!("not YAML: {}", plain(&yaml)))]);
        }
    };
    let mut rules = Vec::new();
    for document in &documents {
        let Node::Map(entries) = &document.value else {
            errors.push(error(document.referenced, "", "", SHAPE.to_owned()));
            continue;
        };
        for (key, _) in entries.iter().filter(|(key, _)| key.value != "rules") {
            errors.push(error(key.referenced, "", &key.value, format!("unknown field: {SHAPE}")));
        }
        let items = match document.value.entry("rules").map(|(_, list)| (&list.value, list.referenced)) {
            Some((Node::List(items), _)) => items.as_slice(),
            Some((Node::Scalar(Value::Null), _)) => &[],
            Some((_, at)) => {
                errors.push(error(at, "", "rules", SHAPE.to_owned()));
                continue;
            }
            None => {
                errors.push(error(document.referenced, "", "", format!("`rules` is missing: {SHAPE}")));
                continue;
            }
        };
        for (number, item) in items.iter().enumerate() {
            match serde_path_to_error::deserialize::<_, RuleForm>(item.value.value()) {
                Ok(form) => rules.push(form.into()),
                Err(fault) => {
                    let (at, field) = locate(item, fault.path());
                    let rule =
                        item.value.id().map_or_else(|| format!("rules[{number}]"), |id| format!("`{id}`"));
                    let mut reason = fault.inner().to_string();
                    if reason.ends_with("expected a string") && !reason.contains("null") {
                        reason.push_str(": put the value in quotes");
                    }
                    errors.push(error(at, &rule, &field, reason));
                }
            }
        }
    }
    if errors.is_empty() { Ok(rules) } else { Err(errors) }
}

/// Returns the message of the YAML library in one line. [`ParseError`] has its own location.
fn plain(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    let line = text.lines().next().unwrap_or_default();
    line.split(" at line ").next().unwrap_or(line).to_owned()
}

#[derive(Serialize)]
struct Document {
    rules: Vec<RuleForm>,
}

/// Formats rules as a YAML file that [`parse`] reads back.
pub fn to_yaml(rules: &[Rule]) -> String {
    let document = Document { rules: rules.iter().map(RuleForm::from).collect() };
    // Maps of strings and numbers always serialize.
    serde_saphyr::to_string(&document).unwrap_or_default()
}

/// Formats one rule as JSON, in the form of the files.
pub fn to_json(rule: &Rule) -> Value {
    // Serializes for the same reason as in `to_yaml`.
    serde_json::to_value(RuleForm::from(rule)).unwrap_or_default()
}
