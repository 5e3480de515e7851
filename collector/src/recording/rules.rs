//! Recording rules: their file, the checks of the file, and the value of a profile by a rule.

use std::collections::{BTreeMap, BTreeSet};

use gannet_proto::{labels::Labels, pprof::Profile};
use regex::{Regex, RegexBuilder};
use serde::Deserialize;

use crate::selector::Selector;

/// Maximum number of rules in one file.
const MAX_RULES: usize = 200;
/// Maximum number of labels of one metric.
const MAX_GROUP_LABELS: usize = 10;
const MAX_SERIES: u32 = 10_000;
const MAX_NAME_BYTES: usize = 200;
/// Maximum memory of one compiled regular expression.
const MAX_REGEX_BYTES: usize = 1 << 20;
/// Prefixes of the metrics of the collector itself and of scrapers.
const RESERVED: [&str; 4] = ["gannet_", "process_", "go_", "scrape_"];

/// A mistake in the file of recording rules. The text names rule, field and cure.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RecordingError {
    /// The YAML is malformed, or has another structure.
    #[error("{0}")]
    Yaml(String),
    /// An invalid field of a rule.
    #[error("rules[{index}] ({name}): {field}: {what}")]
    Field {
        /// Position in the file, from 0.
        index: usize,
        /// The rule's name as written.
        name: String,
        field: &'static str,
        what: String,
    },
    /// The file has too many rules.
    #[error(
        "rules: {0} rules, the limit is {MAX_RULES}: put several functions into one rule with function_regex"
    )]
    TooMany(usize),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    rules: Vec<Written>,
}

/// A rule in the form of the file.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    name: String,
    #[serde(default)]
    help: String,
    #[serde(default)]
    selector: String,
    #[serde(default = "cpu", rename = "type")]
    sample_type: String,
    function: Option<String>,
    function_regex: Option<String>,
    mapping: Option<String>,
    mapping_regex: Option<String>,
    #[serde(default)]
    value: Part,
    #[serde(default = "by_service")]
    group_by: Vec<String>,
    #[serde(default = "series")]
    max_series: u32,
}

fn cpu() -> String {
    "cpu/nanoseconds".to_owned()
}

fn by_service() -> Vec<String> {
    vec!["service_name".to_owned()]
}

const fn series() -> u32 {
    100
}

/// The part of a function's value that counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Part {
    /// Samples in the function itself.
    #[serde(rename = "self")]
    Own,
    /// Samples in the function or its callees.
    #[default]
    Total,
}

/// A text to compare with, or a regular expression for the complete text.
#[derive(Clone, Debug)]
enum Pattern {
    Any,
    Exact(String),
    Regex(Regex),
}

impl Pattern {
    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(wanted) => wanted == text,
            Self::Regex(regex) => regex.is_match(text),
        }
    }
}

/// A checked rule.
#[derive(Clone, Debug)]
pub(crate) struct RecordingRule {
    written: Written,
    selector: Selector,
    function: Pattern,
    mapping: Pattern,
    unit: Unit,
}

/// The unit of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unit {
    Seconds,
    Bytes,
    Count,
}

impl Unit {
    /// Returns the unit of a sample type, and the suffix of metrics in that unit.
    fn of(sample_type: &str) -> Option<(Self, &'static str)> {
        match sample_type.split_once('/').filter(|(kind, _)| !kind.is_empty())?.1 {
            "nanoseconds" => Some((Self::Seconds, "_seconds_total")),
            "bytes" => Some((Self::Bytes, "_bytes_total")),
            "count" => Some((Self::Count, "_total")),
            _ => None,
        }
    }
}

/// Values of the labels of `group_by`, in that order; empty if the profile lacks the label.
pub(crate) type SeriesKey = Vec<String>;

impl RecordingRule {
    /// Returns the name of the metric.
    pub(crate) fn name(&self) -> &str {
        &self.written.name
    }

    /// Returns the help text of the metric.
    pub(crate) fn help(&self) -> String {
        let Written { help, sample_type, .. } = &self.written;
        if help.is_empty() { format!("Values of {sample_type} by a recording rule") } else { help.clone() }
    }

    /// Returns the labels of the metric.
    pub(crate) fn group_by(&self) -> &[String] {
        &self.written.group_by
    }

    /// Returns the maximum number of series of the metric.
    pub(crate) fn max_series(&self) -> usize {
        self.written.max_series as usize
    }

    /// Formats a value of the sample type in the unit of the metric.
    pub(crate) fn format(&self, value: u64) -> String {
        const NANOS: u64 = 1_000_000_000;
        match self.unit {
            Unit::Bytes | Unit::Count => value.to_string(),
            // An f64 would lose nanoseconds after some days of many cores.
            Unit::Seconds => format!("{}.{:09}", value / NANOS, value % NANOS),
        }
    }

    /// Reports whether both rules count the same values, so that one can take over the counts of the other.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        self.written == other.written
    }

    /// Reports whether the rule selects profiles with these labels.
    pub(crate) fn selects(&self, labels: &Labels) -> bool {
        self.selector.matches(labels)
    }

    /// Returns the series of profiles with these labels.
    pub(crate) fn key(&self, labels: &Labels) -> SeriesKey {
        self.written.group_by.iter().map(|name| labels.get(name).cloned().unwrap_or_default()).collect()
    }

    /// Returns the value of a profile that has passed `pprof::check`: the sum over the stacks with a frame whose function and file
    /// both match. A stack counts once.
    pub(crate) fn value(&self, profile: &Profile) -> u64 {
        let text = |index: i64| {
            usize::try_from(index).ok().and_then(|at| profile.string_table.get(at)).map_or("", String::as_str)
        };
        let (kind, unit) = self.written.sample_type.split_once('/').unwrap_or_default();
        let is_type = |index: usize| {
            profile.sample_type.get(index).is_some_and(|of| text(of.r#type) == kind && text(of.unit) == unit)
        };
        let Some(index) = (0..profile.sample_type.len()).find(|index| is_type(*index)) else { return 0 };
        // The rule compares each name once, however many addresses have it.
        let functions: BTreeMap<u64, bool> = profile
            .function
            .iter()
            .map(|function| {
                let name = text(function.name);
                let name = if name.is_empty() { text(function.system_name) } else { name };
                (function.id, self.function.matches(name))
            })
            .collect();
        let mappings: BTreeMap<u64, bool> = profile
            .mapping
            .iter()
            .map(|mapping| {
                let path = text(mapping.filename);
                (mapping.id, self.mapping.matches(path.rsplit('/').next().unwrap_or(path)))
            })
            .collect();
        let any_function = matches!(self.function, Pattern::Any);
        let any_mapping = matches!(self.mapping, Pattern::Any);
        // Per location: whether any frame matches, and whether the innermost frame matches.
        let locations: BTreeMap<u64, (bool, bool)> = profile
            .location
            .iter()
            .map(|location| {
                let in_mapping =
                    any_mapping || mappings.get(&location.mapping_id).copied().unwrap_or_default();
                let mut lines = location
                    .line
                    .iter()
                    .map(|line| functions.get(&line.function_id).copied().unwrap_or_default());
                let innermost = any_function || lines.next().unwrap_or_default();
                let anywhere = innermost || lines.any(|matches| matches);
                (location.id, (in_mapping && anywhere, in_mapping && innermost))
            })
            .collect();
        let at = |id: &u64| locations.get(id).copied().unwrap_or_default();
        profile
            .sample
            .iter()
            .filter(|sample| match self.written.value {
                Part::Own => sample.location_id.first().is_some_and(|id| at(id).1),
                Part::Total => sample.location_id.iter().any(|id| at(id).0),
            })
            .filter_map(|sample| u64::try_from(*sample.value.get(index)?).ok())
            .fold(0, u64::saturating_add)
    }
}

/// Reads and checks a file of recording rules.
pub(crate) fn parse(text: &str) -> Result<Vec<RecordingRule>, RecordingError> {
    let file: File = serde_saphyr::from_str(text).map_err(|error| {
        let text = error.without_snippet().to_string();
        RecordingError::Yaml(text.lines().next().unwrap_or_default().to_owned())
    })?;
    if file.rules.len() > MAX_RULES {
        return Err(RecordingError::TooMany(file.rules.len()));
    }
    let mut names = BTreeSet::new();
    let mut rules = Vec::with_capacity(file.rules.len());
    for (index, written) in file.rules.into_iter().enumerate() {
        let name = written.name.clone();
        let rule = check(written).map_err(|(field, what)| RecordingError::Field {
            index,
            name: name.chars().take(MAX_NAME_BYTES).collect(),
            field,
            what,
        })?;
        if !names.insert(name.clone()) {
            let what = "another rule has this name: give each metric one rule".to_owned();
            return Err(RecordingError::Field { index, name, field: "name", what });
        }
        rules.push(rule);
    }
    Ok(rules)
}

type FieldError = (&'static str, String);

fn check(written: Written) -> Result<RecordingRule, FieldError> {
    let Written { name, selector, sample_type, function, function_regex, mapping, mapping_regex, .. } =
        &written;
    let (unit, suffix) = Unit::of(sample_type).ok_or_else(|| {
        let what = format!("`{sample_type}` has an unknown unit: write it like cpu/nanoseconds, samples/count, alloc_space/bytes");
        ("type", what)
    })?;
    check_name(name, suffix)?;
    let selector = Selector::parse(selector).map_err(|error| ("selector", error.to_string()))?;
    let function = pattern(function.as_ref(), function_regex.as_ref(), "function", "function_regex")?;
    let mapping = pattern(mapping.as_ref(), mapping_regex.as_ref(), "mapping", "mapping_regex")?;
    let group_by = &written.group_by;
    if group_by.len() > MAX_GROUP_LABELS {
        return Err(("group_by", format!("{} labels, the limit is {MAX_GROUP_LABELS}", group_by.len())));
    }
    for (index, label) in group_by.iter().enumerate() {
        if !is_name(label) || label.starts_with("__") || label.contains(':') {
            return Err((
                "group_by",
                format!(
                    "`{label}` is not a label of Prometheus: write letters, digits and _, without __ in front"
                ),
            ));
        }
        if group_by[..index].contains(label) {
            return Err(("group_by", format!("has `{label}` twice: remove one")));
        }
    }
    if !(1..=MAX_SERIES).contains(&written.max_series) {
        return Err(("max_series", format!("{} is not between 1 and {MAX_SERIES}", written.max_series)));
    }
    if written.help.contains(['\n', '\\']) || written.help.len() > 1000 {
        return Err(("help", "write one line of at most 1000 bytes without backslashes".to_owned()));
    }
    Ok(RecordingRule { written, selector, function, mapping, unit })
}

fn is_name(text: &str) -> bool {
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b':';
    !text.is_empty()
        && text.len() <= MAX_NAME_BYTES
        && text.bytes().all(is_good)
        && !text.starts_with(|c: char| c.is_ascii_digit())
}

fn check_name(name: &str, suffix: &str) -> Result<(), FieldError> {
    let wrong = |what: String| Err(("name", what));
    if !is_name(name) {
        return wrong(
            "write the name of a metric: at most 200 letters, digits, _ and :, no digit in front".to_owned(),
        );
    }
    if let Some(start) = RESERVED.iter().find(|start| name.starts_with(**start)) {
        return wrong(format!("the prefix {start} belongs to other metrics: choose another one"));
    }
    let has_other_unit =
        suffix == "_total" && (name.ends_with("_seconds_total") || name.ends_with("_bytes_total"));
    if name.len() <= suffix.len() || !name.ends_with(suffix) || has_other_unit {
        return wrong(format!(
            "must end in {suffix}, the suffix for the unit of `type`, with text before it"
        ));
    }
    Ok(())
}

fn pattern(
    exact: Option<&String>,
    regex: Option<&String>,
    exact_field: &'static str,
    regex_field: &'static str,
) -> Result<Pattern, FieldError> {
    match (exact, regex) {
        (None, None) => Ok(Pattern::Any),
        (Some(_), Some(_)) => Err((regex_field, format!("give {exact_field} or {regex_field}, not both"))),
        (Some(exact), None) if exact.is_empty() => {
            Err((exact_field, "is empty: leave it out to match all".to_owned()))
        }
        (Some(exact), None) => Ok(Pattern::Exact(exact.clone())),
        (None, Some(regex)) => {
            let compiled = RegexBuilder::new(&format!("^(?s:{regex})$")).size_limit(MAX_REGEX_BYTES).build();
            let cure = "write it in RE2's syntax; it must match the complete name";
            compiled.map(Pattern::Regex).map_err(|error| {
                let text = error.to_string();
                (regex_field, format!("{}: {cure}", text.lines().last().unwrap_or_default().trim()))
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use gannet_proto::pprof::{Builder, Header, Line, Mapping};
    use rstest::rstest;

    use super::*;

    /// A rule with these lines.
    fn rule(lines: &str) -> String {
        format!("rules:\n- name: json_cpu_seconds_total\n{lines}")
    }

    #[rstest]
    #[case("  function: a\n  functon: b\n", "functon")]
    #[case(
        "  max_series: 0\n",
        "rules[0] (json_cpu_seconds_total): max_series: 0 is not between 1 and 10000"
    )]
    #[case("  type: cpu\n", "type: `cpu` has an unknown unit: write it like cpu/nanoseconds")]
    #[case(
        "  type: samples/count\n",
        "name: must end in _total, the suffix for the unit of `type`, with text before it"
    )]
    #[case("  selector: '{a'\n", "selector: query, character")]
    #[case(
        "  function: a\n  function_regex: b\n",
        "function_regex: give function or function_regex, not both"
    )]
    #[case("  function_regex: '(a'\n", "function_regex: ")]
    #[case("  mapping_regex: 'a{1000}{1000}'\n", "mapping_regex: ")]
    #[case("  group_by: [a, b, a]\n", "group_by: has `a` twice")]
    #[case("  group_by: ['a-b']\n", "group_by: `a-b` is not a label of Prometheus")]
    #[case("  value: both\n", "both")]
    #[case(
        "- name: json_cpu_seconds_total\n",
        "rules[1] (json_cpu_seconds_total): name: another rule has this name"
    )]
    #[case("- name: gannet_cpu_seconds_total\n", "name: the prefix gannet_ belongs to other metrics")]
    #[case("- name: _seconds_total\n", "name: must end in _seconds_total")]
    #[case("- name: 'a b'\n", "name: write the name of a metric")]
    fn a_mistake_is_named_with_its_field_and_cure(#[case] lines: &str, #[case] want: &str) {
        let error = parse(&rule(lines)).unwrap_err().to_string();
        assert!(error.contains(want) && !error.contains('\n'), "{error}");
    }

    fn profile() -> Profile {
        let mut builder = Builder::new(Header {
            sample_types: &[("samples", "count"), ("cpu", "nanoseconds")],
            period_type: ("cpu", "nanoseconds"),
            period: 1,
            time_nanos: 0,
            duration_nanos: 1,
        });
        let line = |name| Line { name, ..Line::default() };
        let file = |file| Mapping { file, start: 1, limit: 9, ..Mapping::default() };
        let (app, library) = (builder.mapping(file("/bin/app")), builder.mapping(file("/lib/libz.so.1")));
        let main = builder.location(Some(app), 1, &[line("main")]);
        // `copy` is inlined into `encode`.
        let encode = builder.location(Some(app), 2, &[line("copy"), line("json.encode")]);
        let inflate = builder.location(Some(library), 3, &[line("inflate")]);
        builder.sample(&[main], &[1, 1_000], &[]);
        builder.sample(&[encode, main], &[2, 20_000], &[]);
        // Recursion counts once.
        builder.sample(&[inflate, encode, encode, main], &[3, 3_000_000_000], &[]);
        builder.finish()
    }

    #[rstest]
    #[case("", 3_000_021_000)]
    #[case("  value: self\n  function: main\n", 1_000)]
    #[case("  function: json.encode\n", 3_000_020_000)]
    #[case("  value: self\n  function: json.encode\n", 0)]
    #[case("  value: self\n  function: copy\n", 20_000)]
    #[case("  function_regex: 'json\\..*|nothing'\n", 3_000_020_000)]
    #[case("  function_regex: json\n", 0)]
    #[case("  mapping: libz.so.1\n", 3_000_000_000)]
    #[case("  mapping_regex: 'libz\\.so.*'\n  value: self\n", 3_000_000_000)]
    #[case("  mapping: libz.so.1\n  function: main\n", 0)]
    #[case("  type: offcpu/nanoseconds\n", 0)]
    fn stacks_with_a_matching_frame_count_once(#[case] lines: &str, #[case] want: u64) {
        let rules = parse(&rule(lines)).unwrap();
        assert_eq!(rules[0].value(&profile()), want);
    }

    #[test]
    fn time_is_shown_in_seconds_without_a_loss() {
        let rules = parse(&(rule("") + "- {name: calls_total, type: samples/count}\n")).unwrap();
        assert_eq!(rules[0].format(u64::MAX), "18446744073.709551615");
        assert_eq!(rules[0].format(20_000), "0.000020000");
        assert_eq!((rules[1].format(7), rules[1].value(&profile())), ("7".to_owned(), 6));
    }
}
