//! Selection of the samples of a span or trace, by the labels that agents and SDKs set.

use std::borrow::Cow;

use gannet_proto::profiles::Profile;

use super::QueryError;

/// Maximum number of ids in one request. The query compares each sample with all of them.
const MAX_IDS: usize = 1000;

/// The labels with the id of a span. Pyroscope's SDKs name it `profile_id`.
const SPAN_LABELS: [&str; 2] = ["span_id", "profile_id"];
const TRACE_LABELS: [&str; 1] = ["trace_id"];

/// The spans or the traces whose samples a query wants; all samples by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum SpanFilter {
    /// All samples of the profile, the default.
    #[default]
    All,
    /// Samples in one of these spans, by their ids of 16 hex digits.
    Spans(Vec<String>),
    /// Samples in one of these traces, by their ids of 32 hex digits.
    Traces(Vec<String>),
}

impl SpanFilter {
    /// Checks the ids of a request, and chooses those of one kind. Without an id, every sample is wanted.
    pub(crate) fn new(spans: Vec<String>, traces: Vec<String>) -> Result<Self, QueryError> {
        for (name, digits, ids) in [("span_id", 16, &spans), ("trace_id", 32, &traces)] {
            let is_id = |id: &str| id.len() == digits && id.bytes().all(|byte| byte.is_ascii_hexdigit());
            if ids.len() > MAX_IDS {
                return Err(QueryError::Invalid(format!("{name}: give at most {MAX_IDS} ids")));
            }
            if let Some(id) = ids.iter().find(|id| !is_id(id)) {
                return Err(QueryError::Invalid(format!(
                    "{name}: `{id}` is not an id: give {digits} hex digits"
                )));
            }
        }
        match (spans.is_empty(), traces.is_empty()) {
            (true, true) => Ok(Self::All),
            (false, true) => Ok(Self::Spans(spans)),
            (true, false) => Ok(Self::Traces(traces)),
            (false, false) => {
                Err(QueryError::Invalid("span_id and trace_id: give one of them, not both".to_owned()))
            }
        }
    }

    /// Returns a profile with only the selected samples.
    pub(crate) fn of<'p>(&self, profile: Cow<'p, Profile>) -> Cow<'p, Profile> {
        let (names, ids): (&[&str], _) = match self {
            Self::All => return profile,
            Self::Spans(ids) => (&SPAN_LABELS, ids),
            Self::Traces(ids) => (&TRACE_LABELS, ids),
        };
        let mut profile = profile.into_owned();
        let Profile { sample, string_table, .. } = &mut profile;
        let text = |index: i64| {
            usize::try_from(index).ok().and_then(|at| string_table.get(at)).map_or("", String::as_str)
        };
        sample.retain(|sample| {
            sample.label.iter().any(|label| {
                names.contains(&text(label.key))
                    && ids.iter().any(|id| id.eq_ignore_ascii_case(text(label.str)))
            })
        });
        Cow::Owned(profile)
    }
}
