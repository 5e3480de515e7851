//! The query parameters of the HTTP API.

use std::collections::HashMap;

use axum::extract::Query as UrlQuery;

use super::ApiError;
use crate::{
    query::{Selection, Shape, SpanFilter},
    time,
};

/// Parameters of a range of time, and of spans in it.
pub(super) const RANGE: [&str; 5] = ["query", "from", "until", "span_id", "trace_id"];
/// Parameters of spans.
pub(super) const SPANS: [&str; 2] = ["span_id", "trace_id"];
/// Parameters of a flame graph and a table.
pub(super) const GRAPH: [&str; 12] = [
    "query",
    "from",
    "until",
    "profile_id",
    "type",
    "base_query",
    "base_from",
    "base_until",
    "interpreter_frames",
    "hide_error_frames",
    "span_id",
    "trace_id",
];

/// The query string of a request, before its names are checked.
pub(super) type RawParams = UrlQuery<HashMap<String, String>>;

/// The parameters of one request.
pub(super) struct Params(HashMap<String, String>);

impl Params {
    /// Checks that each parameter is in one of the lists.
    pub(super) fn new(raw: RawParams, known: &[&str], more: &[&str]) -> Result<Self, ApiError> {
        let unknown = raw.0.keys().find(|k| !known.contains(&k.as_str()) && !more.contains(&k.as_str()));
        match unknown {
            None => Ok(Self(raw.0)),
            Some(unknown) => {
                let known: Vec<&str> = known.iter().chain(more).copied().collect();
                Err(ApiError::bad_request(format!(
                    "parameter `{unknown}` is not known here; known parameters: {}",
                    known.join(", ")
                )))
            }
        }
    }

    /// Returns a parameter, or an empty text if it is missing.
    pub(super) fn text(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    /// Parses a number. A missing parameter is 0.
    pub(super) fn number<T: std::str::FromStr + Default>(&self, name: &str) -> Result<T, ApiError> {
        match self.text(name) {
            "" => Ok(T::default()),
            text => text.parse().map_err(|_| {
                ApiError::bad_request(format!("parameter {name}: `{text}` is not a number that fits"))
            }),
        }
    }

    /// Parses a switch. A missing parameter is false.
    pub(super) fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.text(name) {
            "" | "false" => Ok(false),
            "true" => Ok(true),
            text => {
                Err(ApiError::bad_request(format!("parameter {name}: `{text}` is neither true nor false")))
            }
        }
    }

    /// Parses a time into milliseconds since 1970.
    fn time_ms(&self, name: &str) -> Result<Option<u64>, ApiError> {
        match self.text(name) {
            "" => Ok(None),
            text => {
                let at = time::parse(text, time::now_ms())
                    .map_err(|e| ApiError::bad_request(format!("parameter {name}: {e}")))?;
                Ok(Some(at))
            }
        }
    }

    /// Parses `span_id` or `trace_id`, which select samples. Commas separate several ids.
    pub(super) fn spans(&self) -> Result<SpanFilter, ApiError> {
        let ids =
            |name: &str| self.text(name).split(',').filter(|id| !id.is_empty()).map(str::to_owned).collect();
        Ok(SpanFilter::new(ids("span_id"), ids("trace_id"))?)
    }

    /// Builds the shape of a graph or a table. `max` is the parameter for its size.
    pub(super) fn shape(&self, max: &str) -> Result<Shape, ApiError> {
        Ok(Shape {
            max: self.number(max)?,
            interpreter_frames: self.flag("interpreter_frames")?,
            hide_error_frames: self.flag("hide_error_frames")?,
        })
    }

    /// Builds the main selection.
    pub(super) fn selection(&self) -> Result<Selection, ApiError> {
        Ok(Selection::new(
            self.text("query"),
            self.time_ms("from")?,
            self.time_ms("until")?,
            self.text("profile_id"),
        )?
        .in_spans(self.spans()?))
    }

    /// Builds the base selection, if at least one of its three parameters is given. Missing ones, and the spans, come from the
    /// main selection.
    pub(super) fn base(&self) -> Result<Option<Selection>, ApiError> {
        if ["base_query", "base_from", "base_until"].iter().all(|name| self.text(name).is_empty()) {
            return Ok(None);
        }
        let or_main =
            |base: &'static str, main: &'static str| if self.text(base).is_empty() { main } else { base };
        let query = self.text(or_main("base_query", "query"));
        let from = self.time_ms(or_main("base_from", "from"))?;
        let until = self.time_ms(or_main("base_until", "until"))?;
        Ok(Some(
            Selection::new(query, from, until, "")
                .map_err(|e| ApiError::bad_request(format!("base: {e}")))?
                .in_spans(self.spans()?),
        ))
    }
}
