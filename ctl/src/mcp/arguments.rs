//! The arguments of tools. One declaration is the source of the JSON schemas for clients, and of the checks of their calls.

use std::time::Duration;

use gannet_base::TimeSpan;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use crate::args::{Base, Select, Spans, moment};

/// The kind of value of an argument.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    /// An optional text of at most [`MAX_TEXT_BYTES`] bytes. The default is an empty text.
    Text,
    /// A required text.
    Required,
    /// An optional number: its minimum, its maximum and its default.
    Number(f64, f64, f64),
}

/// An argument of a tool.
#[derive(Clone, Copy, Debug)]
pub(super) struct Argument {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// Meaning of the argument, for the model that chooses its value.
    pub(super) description: &'static str,
}

/// Maximum size of a text, in bytes. Selectors and times are shorter.
const MAX_TEXT_BYTES: usize = 4096;

/// Returns the JSON schema of a tool's arguments.
pub(super) fn schema(arguments: &[Argument]) -> Map<String, Value> {
    let property = |argument: &Argument| {
        let Argument { name, kind, description } = argument;
        let value = match kind {
            Kind::Text | Kind::Required => {
                json!({ "type": "string", "maxLength": MAX_TEXT_BYTES, "description": description })
            }
            Kind::Number(min, max, default) => json!({
                "type": "number", "minimum": min, "maximum": max, "default": default, "description": description,
            }),
        };
        ((*name).to_owned(), value)
    };
    let required: Vec<_> = arguments
        .iter()
        .filter(|argument| argument.kind == Kind::Required)
        .map(|argument| argument.name)
        .collect();
    let mut schema = Map::new();
    schema.insert("type".to_owned(), json!("object"));
    schema.insert("properties".to_owned(), arguments.iter().map(property).collect::<Map<_, _>>().into());
    schema.insert("required".to_owned(), json!(required));
    schema.insert("additionalProperties".to_owned(), json!(false));
    schema
}

/// Checked arguments of a call.
#[derive(Debug)]
pub(super) struct Given<'a> {
    declared: &'a [Argument],
    values: Map<String, Value>,
}

impl<'a> Given<'a> {
    /// Checks the arguments of a call. An error names the argument and the cure.
    pub(super) fn check(declared: &'a [Argument], values: Map<String, Value>) -> Result<Self, String> {
        for (name, value) in &values {
            let Some(argument) = declared.iter().find(|argument| argument.name == name) else {
                let names: Vec<_> = declared.iter().map(|argument| argument.name).collect();
                return Err(format!(
                    "{}: there is no such argument; this tool takes {}",
                    name.escape_debug(),
                    names.join(", ")
                ));
            };
            let is_good = match argument.kind {
                Kind::Text | Kind::Required => {
                    value.as_str().is_some_and(|text| text.len() <= MAX_TEXT_BYTES)
                }
                Kind::Number(min, max, _) => {
                    value.as_f64().is_some_and(|number| (min..=max).contains(&number))
                }
            };
            if !is_good {
                return Err(match argument.kind {
                    Kind::Text | Kind::Required => {
                        format!("{name}: give a text of at most {MAX_TEXT_BYTES} bytes")
                    }
                    Kind::Number(min, max, _) => format!("{name}: give a number from {min} to {max}"),
                });
            }
        }
        let given = Self { declared, values };
        for argument in declared.iter().filter(|argument| argument.kind == Kind::Required) {
            if given.text(argument.name).is_empty() {
                return Err(format!(
                    "{}: this argument is required: {}",
                    argument.name, argument.description
                ));
            }
        }
        Ok(given)
    }

    /// Returns a text; empty if the call does not have it.
    pub(super) fn text(&self, name: &str) -> String {
        self.values.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    /// Returns a text, if the call has it.
    pub(super) fn optional(&self, name: &str) -> Option<String> {
        Some(self.text(name)).filter(|text| !text.is_empty())
    }

    /// Returns a number, or its default.
    pub(super) fn number(&self, name: &str) -> f64 {
        let default =
            self.declared.iter().find(|argument| argument.name == name).map_or(
                0.0,
                |argument| match argument.kind {
                    Kind::Number(_, _, default) => default,
                    Kind::Text | Kind::Required => 0.0,
                },
            );
        self.values.get(name).and_then(Value::as_f64).unwrap_or(default)
    }

    /// Returns the profiles that `query`, `since`, `from` and `until` select, and the samples that `span_id` or `trace_id` selects.
    pub(super) fn select(&self) -> Result<Select, String> {
        let (since, from, until) = self.range(["since", "from", "until"])?;
        let ids = |name: &str| {
            self.text(name).split(',').map(|id| id.trim().to_owned()).filter(|id| !id.is_empty()).collect()
        };
        let spans = Spans { span_id: ids("span_id"), trace_id: ids("trace_id") };
        if !spans.span_id.is_empty() && !spans.trace_id.is_empty() {
            return Err("span_id, trace_id: give one of them, not both".to_owned());
        }
        Ok(Select { query: self.text("query"), since, from, until, spans, ..Select::default() })
    }

    /// Returns the base of a comparison. Returns an error if the base would be the same as the selection.
    pub(super) fn base(&self) -> Result<Base, String> {
        let (base_since, base_from, base_until) = self.range(["base_since", "base_from", "base_until"])?;
        let base = Base { base_query: self.optional("base_query"), base_since, base_from, base_until };
        if base.is_given() {
            return Ok(base);
        }
        Err("base_query, base_since, base_from, base_until: give at least one of them, to select the base of the comparison"
            .to_owned())
    }

    #[expect(clippy::type_complexity, reason = "the three values of a range, as the flags have them")]
    fn range(
        &self,
        [since, from, until]: [&str; 3],
    ) -> Result<(Option<TimeSpan>, Option<Timestamp>, Option<Timestamp>), String> {
        let span = |name: &str| match self.optional(name) {
            None => Ok(None),
            Some(text) => text
                .parse()
                .map(Some)
                .ok()
                .filter(|span: &Option<TimeSpan>| {
                    span.is_none_or(|span| Duration::from(span) > Duration::ZERO)
                })
                .ok_or_else(|| format!("{name}: write a duration like 30s, 15m or 1h30m")),
        };
        let time = |name: &str| match self.optional(name) {
            None => Ok(None),
            Some(text) => moment(&text).map(Some).map_err(|cure| format!("{name}: {cure}")),
        };
        let (span, start, end) = (span(since)?, time(from)?, time(until)?);
        if span.is_some() && start.is_some() {
            return Err(format!("{since}, {from}: give one of them, not both"));
        }
        Ok((span, start, end))
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const ARGUMENTS: [Argument; 7] = [
        Argument { name: "query", kind: Kind::Text, description: "labels" },
        Argument { name: "rule", kind: Kind::Required, description: "id of the rule" },
        Argument { name: "since", kind: Kind::Text, description: "length" },
        Argument { name: "from", kind: Kind::Text, description: "start" },
        Argument { name: "span_id", kind: Kind::Text, description: "spans" },
        Argument { name: "trace_id", kind: Kind::Text, description: "traces" },
        Argument { name: "limit", kind: Kind::Number(1.0, 200.0, 30.0), description: "rows" },
    ];

    #[rstest]
    #[case(json!({}), "rule: this argument is required: id of the rule")]
    #[case(json!({ "rule": "" }), "rule: this argument is required")]
    #[case(json!({ "rule": "a", "limit": 0 }), "limit: give a number from 1 to 200")]
    #[case(json!({ "rule": "a", "limit": "10" }), "limit: give a number from 1 to 200")]
    #[case(json!({ "rule": 7 }), "rule: give a text")]
    #[case(json!({ "rule": "a", "servce": "b" }), "servce: there is no such argument; this tool takes query, rule, since")]
    #[case(json!({ "rule": "a", "since": "soon" }), "since: write a duration like 30s")]
    #[case(json!({ "rule": "a", "from": "noon" }), "from: write a time as RFC 3339")]
    #[case(json!({ "rule": "a", "from": "now-1h", "since": "1h" }), "since, from: give one of them")]
    #[case(json!({ "rule": "a", "span_id": "1", "trace_id": "2" }), "span_id, trace_id: give one of them")]
    fn a_bad_argument_is_named_with_its_cure(#[case] values: Value, #[case] want: &str) {
        let Value::Object(values) = values else { panic!("no object") };
        let error = Given::check(&ARGUMENTS, values).and_then(|given| given.select()).unwrap_err();
        assert!(error.starts_with(want), "{error}");
    }

    #[test]
    fn arguments_that_are_not_given_have_their_defaults() {
        let Value::Object(values) = json!({ "rule": "a", "since": "15m" }) else { panic!("no object") };
        let given = Given::check(&ARGUMENTS, values).unwrap();
        assert_eq!((given.text("query"), given.number("limit")), (String::new(), 30.0));
        assert_eq!(given.select().unwrap().since, Some(TimeSpan::from_secs(900)));
    }
}
