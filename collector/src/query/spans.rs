//! Samples of one span or trace, by the labels that agents and SDKs give them.

use std::borrow::Cow;

use gannet_proto::profiles::Profile;

/// The labels with the id of a span. Pyroscope's SDKs have their own name for it.
const SPAN_LABELS: [&str; 2] = ["span_id", "profile_id"];
const TRACE_LABELS: [&str; 1] = ["trace_id"];

/// The spans or the traces whose samples a query wants; all samples by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum SpanFilter {
    /// Every sample is wanted.
    #[default]
    All,
    /// Samples in one of these spans, by their ids of 16 hex digits.
    Spans(Vec<String>),
    /// Samples in one of these traces, by their ids of 32 hex digits.
    Traces(Vec<String>),
}

impl SpanFilter {
    /// Returns a profile with the wanted samples alone.
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
