//! Text and JSON forms of everything that gannetctl prints. The JSON keys are those of the collector's HTTP API.

use std::{fmt::Write as _, io, time::Duration};

use gannet_proto::{
    control::{MatchedProcess, NodeRollout, RuleError, RuleStatus, node_rollout, rule_status},
    query::ReadReport,
};
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::{args::Format, error::Error};

/// The output streams of a command.
pub struct Console<'a> {
    /// Receives results (standard output).
    pub out: &'a mut (dyn io::Write + Send),
    /// Receives errors (standard error).
    pub err: &'a mut (dyn io::Write + Send),
    /// True if `out` is a terminal, which allows colours, redrawing and the interactive graph.
    pub terminal: bool,
}

impl Console<'_> {
    /// Prints a result: `value` as JSON or YAML, or the text of `table` for people.
    pub(crate) fn show(
        &mut self,
        format: Format,
        value: impl FnOnce() -> Value,
        table: impl FnOnce() -> String,
    ) -> Result<(), Error> {
        match format {
            Format::Table => self.out.write_all(table().as_bytes())?,
            Format::Json => writeln!(self.out, "{:#}", value())?,
            Format::Yaml => {
                let text =
                    serde_saphyr::to_string(&value()).map_err(|error| Error::Failed(error.to_string()))?;
                writeln!(self.out, "{}", text.trim_end())?;
            }
        }
        self.out.flush()?;
        Ok(())
    }

    /// Reports on standard error that a result lacks names which the next answer may have.
    pub(crate) fn note_names(&mut self, is_incomplete: bool) {
        if is_incomplete {
            // A closed standard error must not fail the command.
            let _ = writeln!(
                self.err,
                "gannetctl: names of functions are missing, because the collector still reads their debug information; repeat the command \
                 in a minute"
            );
        }
    }

    /// Reports on standard error how many profiles a result lacks.
    pub(crate) fn note_unreadable(&mut self, profiles: u64) {
        if profiles > 0 {
            let lacks = count(profiles as usize, "profile");
            // A closed standard error must not fail the command.
            let _ = writeln!(
                self.err,
                "gannetctl: the result lacks {lacks}, because the collector cannot read the files; see the collector's log"
            );
        }
    }
}

/// Replaces control characters, which a terminal would execute. Names of processes, nodes and functions come from
/// untrusted places.
pub(crate) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Formats a table with columns as wide as their longest cell. A heading that begins with `>` aligns its column to the
/// right, for numbers.
pub(crate) fn table<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> String {
    let columns = headings.map(|heading| (heading.trim_start_matches('>'), heading.starts_with('>')));
    wide_table(&columns, rows.iter().map(<[String; N]>::as_slice))
}

/// Formats a table whose columns are known at run time: the heading of each, and whether it aligns to the right.
pub(crate) fn wide_table<'r>(columns: &[(&str, bool)], rows: impl Iterator<Item = &'r [String]>) -> String {
    let headings: Vec<String> = columns.iter().map(|(heading, _)| clean(heading)).collect();
    let cleaned: Vec<Vec<String>> = rows.map(|row| row.iter().map(|cell| clean(cell)).collect()).collect();
    let mut width = vec![0; columns.len()];
    for row in std::iter::once(&headings).chain(&cleaned) {
        for (width, cell) in width.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in std::iter::once(&headings).chain(&cleaned) {
        let mut line = String::new();
        for (i, cell) in row.iter().enumerate() {
            let width = width[i];
            let _ = if columns[i].1 {
                write!(line, "{cell:>width$}  ")
            } else {
                write!(line, "{cell:<width$}  ")
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Formats a value of a sample type: `12.30s`, `4.56ms`, `1234`.
pub(crate) fn amount(value: i128, unit: &str) -> String {
    if unit != "nanoseconds" {
        return value.to_string();
    }
    let sign = if value < 0 { "-" } else { "" };
    let nanos = value.unsigned_abs() as f64;
    let (divisor, unit) = match nanos {
        n if n >= 60e9 => (60e9, "min"),
        n if n >= 1e9 => (1e9, "s"),
        n if n >= 1e6 => (1e6, "ms"),
        n if n >= 1e3 => (1e3, "us"),
        _ => (1.0, "ns"),
    };
    if nanos == 0.0 { "0".to_owned() } else { format!("{sign}{:.2}{unit}", nanos / divisor) }
}

/// Formats a share: `12.34%`, or `-` if the whole is 0.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.2}%", part as f64 * 100.0 / whole as f64) }
}

/// Converts a protobuf timestamp. Returns `None` for one that is missing or out of range.
pub(crate) fn time(wire: Option<prost_types::Timestamp>) -> Option<Timestamp> {
    wire.and_then(|at| Timestamp::new(at.seconds, at.nanos).ok())
}

/// Formats a time in whole seconds: `2026-01-31T12:00:00Z`, or `-`.
pub(crate) fn show_time(wire: Option<prost_types::Timestamp>) -> String {
    time(wire).map_or_else(|| "-".to_owned(), |at| at.round(jiff::Unit::Second).unwrap_or(at).to_string())
}

/// Formats the age of a time: `12s ago`, or `-`.
pub(crate) fn ago(wire: Option<prost_types::Timestamp>) -> String {
    time(wire).map_or_else(
        || "-".to_owned(),
        |at| {
            let seconds = Timestamp::now().duration_since(at).as_secs().max(0).unsigned_abs();
            format!("{} ago", coarse(Duration::from_secs(seconds)))
        },
    )
}

/// Formats a duration in one unit, the largest that leaves at least two: `45s`, `12m`, `5h`, `3d`.
fn coarse(duration: Duration) -> String {
    match duration.as_secs() {
        s @ 0..120 => format!("{s}s"),
        s @ 120..7200 => format!("{}m", s / 60),
        s @ 7200..172_800 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    }
}

/// Converts a protobuf duration.
pub(crate) fn span(wire: Option<prost_types::Duration>) -> Option<SignedDuration> {
    wire.map(|span| {
        SignedDuration::from_secs(span.seconds).saturating_add(SignedDuration::from_nanos(span.nanos.into()))
    })
}

/// Formats a duration: `12.00ms`, `1.50s`, or `-`.
pub(crate) fn show_span(wire: Option<prost_types::Duration>) -> String {
    span(wire).map_or_else(|| "-".to_owned(), |span| amount(span.as_nanos(), "nanoseconds"))
}

/// Converts a time to Unix milliseconds for JSON.
pub(crate) fn millis(wire: Option<prost_types::Timestamp>) -> Value {
    time(wire).map_or(Value::Null, |at| at.as_millisecond().into())
}

/// Converts a duration to milliseconds for JSON.
pub(crate) fn span_millis(wire: Option<prost_types::Duration>) -> Value {
    span(wire).map_or(Value::Null, |span| Value::from(span.as_millis_f64()))
}

/// Formats a size: `1.5 MiB`.
pub(crate) fn bytes(count: u64) -> String {
    match count as f64 {
        n if n >= f64::from(1 << 30) => format!("{:.1} GiB", n / f64::from(1 << 30)),
        n if n >= f64::from(1 << 20) => format!("{:.1} MiB", n / f64::from(1 << 20)),
        n if n >= 1024.0 => format!("{:.1} KiB", n / 1024.0),
        _ => format!("{count} B"),
    }
}

/// Formats what a collector read for an answer: `120 profiles, 1.2 MiB read in 0.31s`.
pub(crate) fn read_text(read: &ReadReport) -> String {
    let ReadReport {
        segment_profiles,
        segment_bytes,
        table_profiles,
        table_bytes,
        sum_profiles,
        sum_bytes,
        cached_profiles,
        took,
    } = *read;
    let profiles = |n: u64| count(n as usize, "profile");
    let took = show_span(took);
    let sum = |numbers: [u64; 3]| numbers.into_iter().fold(0, u64::saturating_add);
    let all = sum([segment_profiles, table_profiles, sum_profiles]);
    let size = sum([segment_bytes, table_bytes, sum_bytes]);
    if cached_profiles > 0 && cached_profiles == all {
        return format!(
            "{}, in the collector's memory from an earlier query; answered in {took}",
            profiles(all)
        );
    }
    let mut text = format!("{}, {} read in {took}", profiles(all), bytes(size));
    for (some, from) in [
        (table_profiles, "from the tables, by ClickHouse"),
        (sum_profiles, "from sums by minute or hour"),
        (cached_profiles, "in the collector's memory from an earlier query"),
    ] {
        if some > 0 {
            let _ = write!(text, "; {} {from}", profiles(some));
        }
    }
    text
}

/// Returns what a collector read as JSON.
pub(crate) fn read_value(read: &ReadReport) -> Value {
    let ReadReport {
        segment_profiles,
        segment_bytes,
        table_profiles,
        table_bytes,
        sum_profiles,
        sum_bytes,
        cached_profiles,
        took,
    } = read;
    json!({
        "segment_profiles": segment_profiles, "segment_bytes": segment_bytes, "table_profiles": table_profiles,
        "table_bytes": table_bytes, "sum_profiles": sum_profiles, "sum_bytes": sum_bytes, "cached_profiles": cached_profiles, "took_ms": span_millis(*took),
    })
}

/// Formats a number with its noun in singular or plural: `1 rule`, `3 rules`.
pub(crate) fn count(n: usize, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{n} {noun}s") }
}

/// Formats an error of a rule in one line: "rule `a`: capture.hz: is 500, …".
pub(crate) fn error_line(RuleError { rule_id, field, reason }: &RuleError) -> String {
    let location = [
        (!rule_id.is_empty()).then(|| format!("rule `{rule_id}`")),
        (!field.is_empty()).then(|| field.clone()),
    ];
    let location: Vec<_> = location.into_iter().flatten().collect();
    if location.is_empty() { reason.clone() } else { format!("{}: {reason}", location.join(": ")) }
}

pub(crate) fn error_json(RuleError { rule_id, field, reason }: &RuleError) -> Value {
    json!({ "rule_id": rule_id, "field": field, "reason": reason })
}

/// Returns the name of a node's state in a rollout, as in the HTTP API.
pub(crate) fn rollout_state(state: node_rollout::State) -> &'static str {
    match state {
        node_rollout::State::Unspecified => "UNKNOWN",
        node_rollout::State::Pending => "PENDING",
        node_rollout::State::Applied => "APPLIED",
        node_rollout::State::Rejected => "REJECTED",
        node_rollout::State::Partial => "PARTIAL",
        node_rollout::State::Skipped => "SKIPPED",
        node_rollout::State::Offline => "OFFLINE",
    }
}

pub(crate) fn node_rollout_json(node: &NodeRollout) -> Value {
    json!({
        "node": node.node, "state": rollout_state(node.state()), "since_ms": millis(node.since),
        "took_ms": span_millis(node.took), "errors": node.errors.iter().map(error_json).collect::<Vec<_>>(),
        "note": node.note,
    })
}

/// Returns the name of a rule's state on a node, as in the HTTP API.
pub(crate) fn rule_state(state: rule_status::State) -> &'static str {
    match state {
        rule_status::State::Unspecified => "UNKNOWN",
        rule_status::State::Waiting => "WAITING",
        rule_status::State::Capturing => "CAPTURING",
        rule_status::State::Expired => "EXPIRED",
        rule_status::State::Unsupported => "UNSUPPORTED",
    }
}

pub(crate) fn rule_status_json(status: &RuleStatus) -> Value {
    json!({
        "rule_id": status.rule_id, "state": rule_state(status.state()), "reason": status.reason,
        "processes": status.processes, "samples": status.samples, "last_sample_ms": millis(status.last_sample),
        "expires_at_ms": millis(status.expires_at),
    })
}

pub(crate) fn process_json(process: &MatchedProcess) -> Value {
    let MatchedProcess { pid, comm, exe, cgroup, pod, container, cpus, runtime, runtime_version, service } =
        process;
    json!({
        "pid": pid, "comm": comm, "exe": exe, "cgroup": cgroup, "pod": pod, "container": container, "cpus": cpus,
        "runtime": runtime, "runtime_version": runtime_version, "service": service,
    })
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[test]
    fn a_report_has_all_places_that_values_come_from() {
        let read = ReadReport {
            segment_profiles: 2,
            segment_bytes: 1024,
            sum_profiles: 60,
            sum_bytes: 512,
            ..ReadReport::default()
        };
        assert_eq!(
            read_text(&read),
            "62 profiles, 1.5 KiB read in -; 60 profiles from sums by minute or hour"
        );
        let value = read_value(&read);
        assert_eq!((&value["sum_profiles"], &value["sum_bytes"]), (&json!(60), &json!(512)));
    }

    #[test]
    fn a_table_aligns_columns_and_drops_control_characters() {
        let rows = [
            ["a".to_owned(), "5".to_owned(), String::new()],
            ["long\x1b[2J".to_owned(), "12345".to_owned(), "x".to_owned()],
        ];
        assert_eq!(
            table(["NAME", ">COUNT", "NOTE"], &rows),
            "NAME      COUNT  NOTE\na             5\nlong\u{fffd}[2J  12345  x\n"
        );
    }

    #[rstest]
    #[case(0, "nanoseconds", "0")]
    #[case(999, "nanoseconds", "999.00ns")]
    #[case(12_345_678, "nanoseconds", "12.35ms")]
    #[case(-1_500_000_000, "nanoseconds", "-1.50s")]
    #[case(90_000_000_000, "nanoseconds", "1.50min")]
    #[case(1234, "count", "1234")]
    fn an_amount_has_its_unit(#[case] value: i128, #[case] unit: &str, #[case] text: &str) {
        assert_eq!(amount(value, unit), text);
    }
}
