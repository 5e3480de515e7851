//! Selection of the samples of a span or trace, by the labels that agents and SDKs set.

use std::{borrow::Cow, collections::HashSet};

use gannet_proto::profiles::{Profile, Sample};

use super::QueryError;

/// Maximum number of ids in one request. It bounds the request.
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
    /// Samples in one of these spans, by their ids of 16 lower-case hex digits.
    Spans(HashSet<String>),
    /// Samples in one of these traces, by their ids of 32 lower-case hex digits.
    Traces(HashSet<String>),
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
        if !spans.is_empty() && !traces.is_empty() {
            return Err(QueryError::Invalid("span_id and trace_id: give one of them, not both".to_owned()));
        }
        Ok(Self::of_checked(spans, traces))
    }

    /// Chooses the ids of one kind, which the caller has checked: those of spans, if there are any.
    pub(crate) fn of_checked(spans: Vec<String>, traces: Vec<String>) -> Self {
        let lower_case = |ids: Vec<String>| ids.into_iter().map(|id| id.to_ascii_lowercase()).collect();
        match (spans.is_empty(), traces.is_empty()) {
            (true, true) => Self::All,
            (false, _) => Self::Spans(lower_case(spans)),
            (true, false) => Self::Traces(lower_case(traces)),
        }
    }

    /// Returns a profile with only the selected samples.
    pub(crate) fn of<'p>(&self, profile: Cow<'p, Profile>) -> Cow<'p, Profile> {
        let Some(labels) = self.labels(&profile.string_table) else { return profile };
        let mut profile = profile.into_owned();
        profile.sample.retain(|sample| labels.are_of(sample));
        Cow::Owned(profile)
    }

    /// Returns the sums of the values of the selected samples, or `None` if the profile has none of them.
    pub(super) fn totals(&self, profile: &Profile) -> Option<Vec<i64>> {
        let labels = self.labels(&profile.string_table);
        let mut totals = None;
        for sample in &profile.sample {
            if labels.as_ref().is_none_or(|labels| labels.are_of(sample)) {
                let totals: &mut Vec<i64> = totals.get_or_insert_with(|| vec![0; profile.sample_type.len()]);
                for (total, value) in totals.iter_mut().zip(&sample.value) {
                    *total = total.saturating_add(*value);
                }
            }
        }
        totals
    }

    /// Returns the labels of the selected samples in a profile with these strings, or `None` if every sample is selected.
    fn labels(&self, strings: &[String]) -> Option<SpanLabels> {
        let (names, digits, ids): (&[&str], _, _) = match self {
            Self::All => return None,
            Self::Spans(ids) => (&SPAN_LABELS, 16, ids),
            Self::Traces(ids) => (&TRACE_LABELS, 32, ids),
        };
        let mut labels = SpanLabels::default();
        for (index, text) in (0_i64..).zip(strings) {
            if names.contains(&text.as_str()) {
                labels.names.insert(index);
            } else if text.len() == digits && ids.contains(&text.to_ascii_lowercase()) {
                labels.ids.insert(index);
            }
        }
        Some(labels)
    }
}

/// The labels that select samples, as indexes of the strings of one profile.
#[derive(Default)]
struct SpanLabels {
    names: HashSet<i64>,
    ids: HashSet<i64>,
}

impl SpanLabels {
    fn are_of(&self, sample: &Sample) -> bool {
        !self.ids.is_empty()
            && sample
                .label
                .iter()
                .any(|label| self.ids.contains(&label.str) && self.names.contains(&label.key))
    }
}
