//! Spans of traces, as threads publish them (OTEP 4947) and samples carry them.

use gannet_base::hex;

use super::{TaskLabels, printable};

/// Names of attributes that are kept: a record names each by one byte.
const MAX_KEYS: usize = 256;
/// Bytes of such a name that are kept.
const MAX_KEY_BYTES: usize = 64;

/// The labels of a sample's span.
const TRACE_ID: &str = "trace_id";
const SPAN_ID: &str = "span_id";
/// Names of attributes that have another name as labels.
const LABELS: [(&str, &str); 2] =
    [("datadog.local_root_span_id", "local_root_span_id"), ("datadog.trace_endpoint", "endpoint")];

/// The way to the record of a thread: `struct thread_context` of gannet.h without its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ThreadContext {
    /// Offset from the thread pointer of the word from which the steps begin.
    pub(crate) thread_offset: i64,
    /// Offsets of the words that lead from there to the address of the record, if the variable is in the block of a module.
    pub(crate) steps: Option<[i32; 2]>,
}

/// The names of the attributes that a process publishes beside its spans, by number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SpanKeys(Vec<String>);

impl SpanKeys {
    /// Takes the names, and gives those a shorter one that have one.
    pub(crate) fn of<'t>(names: impl Iterator<Item = &'t str>) -> Self {
        let name = |name: &str| {
            let label = LABELS.iter().find(|(known, _)| *known == name).map_or(name, |(_, label)| label);
            if label.len() > MAX_KEY_BYTES { String::new() } else { printable(label) }
        };
        Self(names.take(MAX_KEYS).map(name).collect())
    }
}

/// Bytes of a record before its attributes: trace id, span id, mark of validity, flags, bytes of the attributes.
pub(crate) const RECORD_HEAD_BYTES: usize = 28;

/// Returns the labels of a record, which the BPF programs have found valid, and whether it has an attribute without a name: the
/// process has published more names by now.
pub(crate) fn span_labels(
    head: &[u8; RECORD_HEAD_BYTES],
    mut attributes: &[u8],
    keys: &SpanKeys,
) -> (TaskLabels, bool) {
    let (mut labels, mut is_unknown) = (Vec::new(), false);
    while let [key, length, rest @ ..] = attributes {
        let Some((value, rest)) = rest.split_at_checked(usize::from(*length)) else { break };
        match keys.0.get(usize::from(*key)) {
            Some(name) => labels.push((name.clone(), value.to_vec())),
            None => is_unknown = true,
        }
        attributes = rest;
    }
    // The last label of a name counts, so that no attribute passes for an id.
    for (name, id) in [(TRACE_ID, &head[..16]), (SPAN_ID, &head[16..24])] {
        let is_some = head[16..24].iter().any(|byte| *byte != 0);
        let text = if is_some { hex(id) } else { String::new() };
        labels.retain(|(other, _)| other != name);
        labels.push((name.to_owned(), text.into_bytes()));
    }
    let texts = labels.iter().map(|(name, value)| ((name.as_bytes(), false), (value.as_slice(), false)));
    (TaskLabels::new(texts), is_unknown)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn head(trace: u8, span: u8) -> [u8; RECORD_HEAD_BYTES] {
        let mut head = [0; RECORD_HEAD_BYTES];
        head[..16].fill(trace);
        head[16..24].fill(span);
        head
    }

    fn shown(head: &[u8; RECORD_HEAD_BYTES], attributes: &[u8], keys: &[&str]) -> (String, bool) {
        let (labels, is_unknown) = span_labels(head, attributes, &SpanKeys::of(keys.iter().copied()));
        let all: Vec<_> = labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
        (all.join(" "), is_unknown)
    }

    #[test]
    fn a_record_becomes_labels() {
        let keys = ["datadog.local_root_span_id", "http.route"];
        let ids = format!("span_id={} trace_id={}", "cd".repeat(8), "ab".repeat(16));
        let attributes = b"\x00\x02r1\x01\x02/a\x00\x02r2";
        let expected = format!("http.route=/a local_root_span_id=r2 {ids}");
        assert_eq!(
            shown(&head(0xab, 0xcd), attributes, &keys),
            (expected, false),
            "the last one of a name counts"
        );
        assert_eq!(shown(&head(0xab, 0xcd), b"", &keys), (ids.clone(), false));
        assert_eq!(shown(&head(0xab, 0xcd), b"\x02\x01x\x01\x09cut", &keys), (ids.clone(), true));
        // Attributes pass for no id, and for no label of the agent.
        let names = ["span_id", "pid", "trace_id"];
        let forged = shown(&head(0xab, 0xcd), b"\x00\x01x\x01\x011\x02\x01y", &names);
        assert_eq!(forged, (ids.replace(" trace", " task_pid=1 trace"), false));
        assert_eq!(shown(&head(0, 0), b"\x00\x02/a", &["http.route"]), ("http.route=/a".into(), false));
    }

    proptest! {
        #[test]
        fn no_record_breaks_the_reader(attributes: Vec<u8>, names: Vec<String>) {
            let keys = SpanKeys::of(names.iter().map(String::as_str));
            let (labels, _) = span_labels(&head(1, 2), &attributes, &keys);
            prop_assert!(labels.iter().any(|(name, _)| name == "span_id"));
        }
    }
}
