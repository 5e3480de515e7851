//! Reading and writing rule files.

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

/// Larger files are refused before they are parsed.
pub const MAX_FILE_BYTES: usize = 4 << 20;

/// What is wrong with a rule file, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// The file.
    pub source: String,
    /// From 1; 0 where no place can be named.
    pub line: u64,
    /// From 1; 0 where no place can be named.
    pub column: u64,
    /// The rule's id, or its place in the document (`rules[2]`) if it has none; empty outside of rules.
    pub rule: String,
    /// The path of the field in the rule: `match.comm[1]`.
    pub field: String,
    /// What is wrong and what to do about it.
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

/// Any YAML value, with the places of its parts.
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

/// The place that a path leads to, and the path as people write it.
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

/// Reads rules from YAML or JSON: documents of `rules:` followed by a list. Reports what is wrong in every rule, each
/// with its line and its field. What the rules ask for is [`super::validate`]'s to judge.
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
        let reason = format!("the file has {} bytes, and at most {MAX_FILE_BYTES} are read", text.len());
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

/// The YAML library's words in one line, without its picture of the place, which the error names itself.
fn plain(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    let line = text.lines().next().unwrap_or_default();
    line.split(" at line ").next().unwrap_or(line).to_owned()
}

#[derive(Serialize)]
struct Document {
    rules: Vec<RuleForm>,
}

/// The rules as a file that [`parse`] reads back.
pub fn to_yaml(rules: &[Rule]) -> String {
    let document = Document { rules: rules.iter().map(RuleForm::from).collect() };
    // Maps of strings and numbers: nothing in them can fail to serialise.
    serde_saphyr::to_string(&document).unwrap_or_default()
}

/// One rule in the form of the files, as JSON.
pub fn to_json(rule: &Rule) -> Value {
    // As in `to_yaml`.
    serde_json::to_value(RuleForm::from(rule)).unwrap_or_default()
}
