//! Labels that a program gives its own tasks, as Go its goroutines.

use gannet_proto::{labels::RESERVED, pprof::GUESSED_FROM};

/// Labels of the agent's own that only samples have, beside those of series. A program must not pass for another one by them.
const OWN: [&str; 10] =
    ["pid", "tid", "thread", "container_id", "pod_uid", "state", "unwinding", GUESSED_FROM, "cmdline", "cwd"];
/// Own labels that show variables of the environment begin with this.
const VARIABLE: &str = "env_";
/// Before a name that the agent has a label of its own for.
const OF_TASK: &str = "task_";
/// Stands for the rest of a text that was too long.
const REST: char = '…';

/// The way to the labels of tasks in one process: `struct label_source` of gannet.h without its image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LabelLayout {
    /// Offset from the thread pointer of the object on whose stack the thread runs.
    pub(crate) thread_offset: i64,
    /// Offset of its owner in such an object.
    pub(crate) owner: i32,
    /// Offset in an owner of the object whose labels count.
    pub(crate) current: i32,
    /// Offset of the labels in that object.
    pub(crate) labels: i32,
    /// How the object keeps them.
    pub(crate) form: LabelForm,
}

/// How a program keeps the labels of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LabelForm {
    /// An array of names and values, sorted by name.
    Array,
    /// A hash table, as up to Go 1.23.
    Buckets,
}

/// Returns a text of a process as it may be shown: without characters that steer a terminal.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// The labels of one task, by name. Names differ, and neither names nor values are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskLabels(Box<[(String, String)]>);

impl TaskLabels {
    /// Builds the labels from texts, each with whether it was cut. A label whose name was cut would have another one's name, so it
    /// is left out. So are empty texts, which profiles cannot hold, and all but the last label of one name.
    pub(crate) fn new<'t>(labels: impl Iterator<Item = (CopiedText<'t>, CopiedText<'t>)>) -> Self {
        let is_kept = |((name, is_cut), (value, _)): &(CopiedText<'t>, CopiedText<'t>)| {
            !is_cut && !name.is_empty() && !value.is_empty()
        };
        let labels = labels.filter(is_kept).map(|((name, _), value)| {
            let name = text((name, false));
            let is_own = OWN.contains(&name.as_str())
                || RESERVED.contains(&name.as_str())
                || name.starts_with(VARIABLE);
            (if is_own { format!("{OF_TASK}{name}") } else { name }, text(value))
        });
        let mut labels: Vec<_> = labels.collect();
        labels.sort_by(|(one, _), (other, _)| one.cmp(other));
        labels.dedup_by(|later, earlier| {
            let is_same = later.0 == earlier.0;
            if is_same {
                earlier.1 = std::mem::take(&mut later.1);
            }
            is_same
        });
        Self(labels.into())
    }

    /// Returns these labels and others. One that both have is the other's.
    pub(crate) fn with(&self, others: &Self) -> Self {
        let mut labels: std::collections::BTreeMap<_, _> = self.0.iter().cloned().collect();
        labels.extend(others.0.iter().cloned());
        Self(labels.into_iter().collect())
    }

    /// Returns names and values.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }
}

/// A text as it was copied, and whether it is longer.
type CopiedText<'t> = (&'t [u8], bool);

/// Returns a text as it may be shown, without half a character at the place where it was cut.
fn text((bytes, is_cut): CopiedText<'_>) -> String {
    if !is_cut {
        return printable(&String::from_utf8_lossy(bytes));
    }
    // A cut in a character leaves an error without a length.
    let whole = match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => &bytes[..error.valid_up_to()],
        _ => bytes,
    };
    let mut text = printable(&String::from_utf8_lossy(whole));
    text.push(REST);
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn labels<'t>(given: &[(&'t str, bool, &'t str, bool)]) -> Vec<(String, String)> {
        let texts = given
            .iter()
            .map(|(name, cut, value, value_cut)| ((name.as_bytes(), *cut), (value.as_bytes(), *value_cut)));
        TaskLabels::new(texts).iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn labels_have_whole_names_in_order() {
        let given = [
            ("b", false, "2", false),
            ("a", false, "x", true),
            ("cut", true, "3", false),
            ("", false, "4", false),
        ];
        assert_eq!(labels(&given), [("a".into(), "x…".into()), ("b".into(), "2".into())]);
        assert_eq!(labels(&[("a", false, "1", false), ("a", false, "2", false)]), [("a".into(), "2".into())]);
        assert_eq!(labels(&[("a", false, "", false)]), []);
        assert_eq!(labels(&[("pid", false, "1", false)]), [("task_pid".into(), "1".into())]);
        assert_eq!(labels(&[("pod", false, "1", false)]), [("task_pod".into(), "1".into())]);
        assert_eq!(labels(&[("a", false, "x\x1b[2J", false)]), [("a".into(), "x\u{fffd}[2J".into())]);
    }

    #[test]
    fn a_cut_leaves_no_half_character() {
        let whole = "Zoë".as_bytes();
        let cut = TaskLabels::new([((&b"a"[..], false), (&whole[..3], true))].into_iter());
        assert_eq!(cut.iter().next(), Some(("a", "Zo…")));
    }

    proptest! {
        #[test]
        fn no_texts_break_the_order(texts: Vec<(Vec<u8>, bool, Vec<u8>, bool)>) {
            let given = texts.iter().map(|(name, cut, value, value_cut)| ((&name[..], *cut), (&value[..], *value_cut)));
            let labels = TaskLabels::new(given);
            let names: Vec<&str> = labels.iter().map(|(name, _)| name).collect();
            prop_assert!(names.is_sorted_by(|one, other| one < other));
            prop_assert!(labels.iter().all(|(name, value)| !name.is_empty() && !value.is_empty()));
        }
    }
}
