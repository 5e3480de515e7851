//! Labels of a series of profiles, and the limits that every profile store accepts.

use std::collections::BTreeMap;

/// Labels of one series: values by name.
pub type Labels = BTreeMap<String, String>;

/// The profiled service. docs/tracing.md has the order of its sources.
pub const SERVICE_NAME: &str = "service_name";
/// The namespace of the service: a group of services, not that of Kubernetes.
pub const SERVICE_NAMESPACE: &str = "service_namespace";
/// The version of the service: `1.2`.
pub const SERVICE_VERSION: &str = "service_version";
/// The node's name.
pub const NODE: &str = "node";
/// The pod's namespace.
pub const NAMESPACE: &str = "namespace";
/// The pod's name.
pub const POD: &str = "pod";
/// The container's name in its pod.
pub const CONTAINER: &str = "container";
/// The name of the controller of the pod.
pub const WORKLOAD: &str = "workload";
/// The kind of the controller of the pod, in lower case.
pub const WORKLOAD_KIND: &str = "workload_kind";
/// The cluster's name.
pub const CLUSTER: &str = "cluster";
/// The rule that asked for the profile.
pub const RULE_ID: &str = "rule_id";
/// The kind of trigger that started the capture: `always`, `pressure`, ...
pub const REASON: &str = "reason";
/// The systemd unit.
pub const UNIT: &str = "unit";
/// The command name.
pub const COMM: &str = "comm";
/// The executable's path as the process sees it.
pub const EXE: &str = "exe";
/// The language runtime of the process: `java`.
pub const RUNTIME: &str = "runtime";
/// The version of that runtime: `17.0.15`.
pub const RUNTIME_VERSION: &str = "runtime_version";

/// The labels that the agent sets itself; a rule's own labels cannot replace them.
pub const RESERVED: [&str; 17] = [
    SERVICE_NAME,
    SERVICE_NAMESPACE,
    SERVICE_VERSION,
    NODE,
    NAMESPACE,
    POD,
    CONTAINER,
    WORKLOAD,
    WORKLOAD_KIND,
    CLUSTER,
    RULE_ID,
    REASON,
    UNIT,
    COMM,
    EXE,
    RUNTIME,
    RUNTIME_VERSION,
];

/// The labels that can name the service of a series. The first one that a series has does.
const SERVICE_LABELS: [&str; 6] = [SERVICE_NAME, WORKLOAD, CONTAINER, UNIT, COMM, POD];

/// Returns the name of the service of a series: its `service_name`, which agents always set, or else the next best label.
pub fn service_name(labels: &Labels) -> &str {
    let mut values = SERVICE_LABELS.iter().filter_map(|name| labels.get(*name));
    values.find(|value| !value.is_empty()).map_or("unknown_service", String::as_str)
}

/// Maximum number of labels of a series: the default limit of Pyroscope.
pub const MAX_LABELS: usize = 30;
/// Maximum length of a label name in bytes.
pub const MAX_NAME_BYTES: usize = 128;
/// Maximum length of a label value in bytes: the default limit of Pyroscope.
pub const MAX_VALUE_BYTES: usize = 2048;

/// Reasons why a set of labels is not valid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// The series has more labels than [`MAX_LABELS`].
    #[error("{0} labels, and at most {MAX_LABELS} are allowed; remove some")]
    TooMany(usize),
    /// The name is not a valid label name of Prometheus.
    #[error(
        "label name `{0}` is not allowed: letters, digits and `_`, not starting with a digit or `__` (for instance `{suggestion}`)",
        suggestion = safe_name(.0)
    )]
    Name(String),
    /// The name is longer than [`MAX_NAME_BYTES`].
    #[error("label name `{}…` has {} bytes, and at most {MAX_NAME_BYTES} are allowed", head(.0), .0.len())]
    NameTooLong(String),
    /// The value is longer than [`MAX_VALUE_BYTES`].
    #[error("the value of label `{name}` has {bytes} bytes, and at most {MAX_VALUE_BYTES} are allowed")]
    ValueTooLong {
        /// Name of the label.
        name: String,
        /// Length of the value.
        bytes: usize,
    },
}

fn head(text: &str) -> String {
    text.chars().take(32).collect()
}

/// Checks a label name: valid for Prometheus, and without the prefix `__`, which profile stores reserve.
pub(crate) fn check_name(name: &str) -> Result<(), LabelError> {
    if name.len() > MAX_NAME_BYTES {
        return Err(LabelError::NameTooLong(name.to_owned()));
    }
    let mut bytes = name.bytes();
    let starts = bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    if starts && !name.starts_with("__") && bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        Ok(())
    } else {
        Err(LabelError::Name(name.to_owned()))
    }
}

/// Checks the labels of a series.
pub fn check(labels: &Labels) -> Result<(), LabelError> {
    if labels.len() > MAX_LABELS {
        return Err(LabelError::TooMany(labels.len()));
    }
    for (name, value) in labels {
        check_name(name)?;
        if value.len() > MAX_VALUE_BYTES {
            return Err(LabelError::ValueTooLong { name: name.clone(), bytes: value.len() });
        }
    }
    Ok(())
}

/// Returns the closest valid label name: `app.kubernetes.io/name` becomes `app_kubernetes_io_name`.
pub fn safe_name(name: &str) -> String {
    let name = name.trim_start_matches(|c: char| !c.is_ascii_alphanumeric());
    let mut safe: String = name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
    if safe.starts_with(|c: char| !c.is_ascii_alphabetic()) || safe.is_empty() {
        safe.insert(0, '_');
    }
    // The name is ASCII here, so every byte is a character boundary.
    safe.truncate(MAX_NAME_BYTES);
    safe
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("team", true)]
    #[case("_x9", true)]
    #[case("", false)]
    #[case("9lives", false)]
    #[case("__name__", false)]
    #[case("app.kubernetes.io/name", false)]
    #[case("größe", false)]
    fn label_names_are_valid_for_prometheus(#[case] name: &str, #[case] good: bool) {
        assert_eq!(check_name(name).is_ok(), good, "{name}");
    }

    #[test]
    fn limits_are_enforced_and_named() {
        let many: Labels = (0..31).map(|i| (format!("l{i}"), String::new())).collect();
        assert_eq!(check(&many), Err(LabelError::TooMany(31)));
        let long = Labels::from([("a".into(), "x".repeat(2049))]);
        assert_eq!(check(&long), Err(LabelError::ValueTooLong { name: "a".into(), bytes: 2049 }));
        assert_eq!(check(&Labels::from([("a".into(), "x".repeat(2048))])), Ok(()));
        let error = check_name("app.kubernetes.io/name").map_err(|e| e.to_string());
        assert_eq!(
            error.unwrap_err(),
            "label name `app.kubernetes.io/name` is not allowed: letters, digits and `_`, not starting with a digit \
             or `__` (for instance `app_kubernetes_io_name`)"
        );
        for name in RESERVED {
            assert_eq!(check_name(name), Ok(()));
        }
    }

    #[rstest]
    #[case(&[("service_name", "shop"), ("workload", "w")], "shop")]
    #[case(&[("service_name", ""), ("pod", "p"), ("workload", "w")], "w")]
    #[case(&[("comm", "c"), ("unit", "u"), ("container", "k")], "k")]
    #[case(&[("comm", "c"), ("unit", "u")], "u")]
    #[case(&[("pod", "p"), ("comm", "c")], "c")]
    #[case(&[("pod", "p"), ("node", "n")], "p")]
    #[case(&[("node", "n")], "unknown_service")]
    fn every_series_has_a_service(#[case] labels: &[(&str, &str)], #[case] service: &str) {
        let labels = labels.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
        assert_eq!(service_name(&labels), service);
    }

    proptest! {
        #[test]
        fn a_safe_name_is_always_valid(name in ".{0,200}") {
            prop_assert_eq!(check_name(&safe_name(&name)), Ok(()));
        }
        #[test]
        fn a_valid_name_is_unchanged(name in "[a-zA-Z][a-zA-Z0-9_]{0,100}") {
            prop_assert_eq!(safe_name(&name), name);
        }
    }
}
