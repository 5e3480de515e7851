//! The tables of a received request, whose indexes may be wrong.

use std::borrow::Cow;

use opentelemetry_proto::tonic::{
    common::v1::{AnyValue, KeyValue, any_value::Value},
    profiles::v1development as otlp,
};

use super::OtlpError;

/// Number of values that an array of an attribute shows as text.
const MAX_SHOWN_VALUES: usize = 64;

/// The value of an attribute, as a label shows it.
pub(crate) enum Scalar<'d> {
    Number(i64),
    Text(Cow<'d, str>),
}

impl Scalar<'_> {
    /// Reports whether the value is the truth value true.
    pub(crate) fn is_true(&self) -> bool {
        matches!(self, Self::Text(text) if text == "true")
    }

    /// Returns the value as text.
    pub(crate) fn into_text(self) -> String {
        match self {
            Self::Number(number) => number.to_string(),
            Self::Text(text) => text.into_owned(),
        }
    }
}

/// Looks up entries of a request's tables, and names the table of an index that is out of range.
pub(crate) struct Dictionary(otlp::ProfilesDictionary);

fn entry<'t, T>(table: &'t [T], index: i32, name: &'static str) -> Result<&'t T, OtlpError> {
    let found = usize::try_from(index).ok().and_then(|at| table.get(at));
    found.ok_or(OtlpError::Index { table: name, index, entries: table.len() })
}

impl Dictionary {
    /// Takes the tables of a request. Its first string must be the empty one: else every index means something else.
    pub(crate) fn new(tables: otlp::ProfilesDictionary) -> Result<Self, OtlpError> {
        match tables.string_table.first() {
            Some(first) if !first.is_empty() => Err(OtlpError::FirstString),
            _ => Ok(Self(tables)),
        }
    }

    /// Returns a text. Index 0 is the empty one.
    pub(crate) fn string(&self, index: i32) -> Result<&str, OtlpError> {
        if index == 0 {
            return Ok("");
        }
        entry(&self.0.string_table, index, "string_table").map(String::as_str)
    }

    pub(crate) fn stack(&self, index: i32) -> Result<&[i32], OtlpError> {
        // Index 0 is the empty stack, also in a request without stacks.
        if index == 0 && self.0.stack_table.is_empty() {
            return Ok(&[]);
        }
        entry(&self.0.stack_table, index, "stack_table").map(|stack| stack.location_indices.as_slice())
    }

    pub(crate) fn location(&self, index: i32) -> Result<&otlp::Location, OtlpError> {
        entry(&self.0.location_table, index, "location_table")
    }

    pub(crate) fn function(&self, index: i32) -> Result<&otlp::Function, OtlpError> {
        entry(&self.0.function_table, index, "function_table")
    }

    pub(crate) fn mapping(&self, index: i32) -> Result<&otlp::Mapping, OtlpError> {
        entry(&self.0.mapping_table, index, "mapping_table")
    }

    /// Returns trace and span of a link, or `None` for index 0.
    pub(crate) fn link(&self, index: i32) -> Result<Option<&otlp::Link>, OtlpError> {
        if index == 0 {
            return Ok(None);
        }
        entry(&self.0.link_table, index, "link_table").map(Some)
    }

    /// Returns key, value and unit of an attribute.
    pub(crate) fn attribute(&self, index: i32) -> Result<(&str, Scalar<'_>, &str), OtlpError> {
        let attribute = entry(&self.0.attribute_table, index, "attribute_table")?;
        let key = self.string(attribute.key_strindex)?;
        let value = self.scalar(attribute.value.as_ref())?;
        Ok((key, value, self.string(attribute.unit_strindex)?))
    }

    /// Returns the texts of an attribute that is a list, or its one text.
    pub(crate) fn texts(&self, index: i32) -> Result<Vec<String>, OtlpError> {
        let attribute = entry(&self.0.attribute_table, index, "attribute_table")?;
        match attribute.value.as_ref().and_then(|value| value.value.as_ref()) {
            Some(Value::ArrayValue(list)) => {
                list.values.iter().map(|value| Ok(self.scalar(Some(value))?.into_text())).collect()
            }
            _ => Ok(vec![self.scalar(attribute.value.as_ref())?.into_text()]),
        }
    }

    /// Returns key and value of an attribute of a resource or scope. A relay may have moved both into the tables.
    pub(crate) fn key_value<'d>(&'d self, of: &'d KeyValue) -> Result<(&'d str, Scalar<'d>), OtlpError> {
        let key = if of.key_strindex == 0 { of.key.as_str() } else { self.string(of.key_strindex)? };
        Ok((key, self.scalar(of.value.as_ref())?))
    }

    fn scalar<'d>(&'d self, value: Option<&'d AnyValue>) -> Result<Scalar<'d>, OtlpError> {
        Ok(match value.and_then(|value| value.value.as_ref()) {
            None | Some(Value::KvlistValue(_)) => Scalar::Text("".into()),
            Some(Value::StringValue(text)) => Scalar::Text(text.as_str().into()),
            Some(Value::StringValueStrindex(index)) => Scalar::Text(self.string(*index)?.into()),
            Some(Value::IntValue(number)) => Scalar::Number(*number),
            Some(Value::BoolValue(flag)) => Scalar::Text(flag.to_string().into()),
            Some(Value::DoubleValue(number)) => Scalar::Text(number.to_string().into()),
            Some(Value::BytesValue(bytes)) => Scalar::Text(gannet_base::hex(bytes).into()),
            Some(Value::ArrayValue(list)) => {
                // Lists in lists stay empty.
                let shown = list.values.iter().take(MAX_SHOWN_VALUES).map(|value| match &value.value {
                    Some(Value::ArrayValue(_)) => Ok(String::new()),
                    _ => Ok(self.scalar(Some(value))?.into_text()),
                });
                Scalar::Text(shown.collect::<Result<Vec<_>, OtlpError>>()?.join(",").into())
            }
        })
    }
}
