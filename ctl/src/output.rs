//! How things are printed.

use std::{fmt::Write as _, io, time::Duration};

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use crate::{Error, args::Format};

/// Where output goes, and what stands there.
pub struct Console<'a> {
    /// Results.
    pub out: &'a mut dyn io::Write,
    /// Everything else.
    pub err: &'a mut dyn io::Write,
    /// `out` is a terminal.
    pub terminal: bool,
}

impl Console<'_> {
    /// Prints a value for programs, or what `table` makes of it for people.
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
}

/// What others named may hold anything; on a terminal a control character is a command.
pub(crate) fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Rows under headings, as wide as they must be. A heading that begins with `>` stands over numbers, which are set to
/// the right.
pub(crate) fn table<const N: usize>(headings: [&str; N], rows: &[[String; N]]) -> String {
    let right = headings.map(|heading| heading.starts_with('>'));
    let headings = headings.map(|heading| heading.trim_start_matches('>').to_owned());
    let cleaned: Vec<[String; N]> = rows.iter().map(|row| std::array::from_fn(|i| clean(&row[i]))).collect();
    let mut width = [0; N];
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
            let _ =
                if right[i] { write!(line, "{cell:>width$}  ") } else { write!(line, "{cell:<width$}  ") };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// `12.3s`, `4.56ms`, `1234`.
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

/// `12.34%`; nothing of nothing is nothing.
pub(crate) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.2}%", part as f64 * 100.0 / whole as f64) }
}

pub(crate) fn time(wire: Option<prost_types::Timestamp>) -> Option<Timestamp> {
    wire.and_then(|at| Timestamp::new(at.seconds, at.nanos).ok())
}

/// `2026-01-31T12:00:00Z`, or `-`.
pub(crate) fn show_time(wire: Option<prost_types::Timestamp>) -> String {
    time(wire).map_or_else(|| "-".to_owned(), |at| at.round(jiff::Unit::Second).unwrap_or(at).to_string())
}

/// `12s ago`, or `-`.
pub(crate) fn ago(wire: Option<prost_types::Timestamp>) -> String {
    time(wire).map_or_else(
        || "-".to_owned(),
        |at| {
            let seconds = Timestamp::now().duration_since(at).as_secs().max(0).unsigned_abs();
            format!("{} ago", coarse(Duration::from_secs(seconds)))
        },
    )
}

/// In the largest unit that says enough: `45s`, `12m`, `5h`, `3d`.
fn coarse(duration: Duration) -> String {
    match duration.as_secs() {
        s @ 0..120 => format!("{s}s"),
        s @ 120..7200 => format!("{}m", s / 60),
        s @ 7200..172_800 => format!("{}h", s / 3600),
        s => format!("{}d", s / 86_400),
    }
}

pub(crate) fn span(wire: Option<prost_types::Duration>) -> Option<SignedDuration> {
    wire.map(|span| {
        SignedDuration::from_secs(span.seconds).saturating_add(SignedDuration::from_nanos(span.nanos.into()))
    })
}

/// `12ms`, `1.5s`, or `-`.
pub(crate) fn show_span(wire: Option<prost_types::Duration>) -> String {
    span(wire).map_or_else(|| "-".to_owned(), |span| amount(span.as_nanos(), "nanoseconds"))
}

/// Unix milliseconds, as in the HTTP API.
pub(crate) fn millis(wire: Option<prost_types::Timestamp>) -> Value {
    time(wire).map_or(Value::Null, |at| at.as_millisecond().into())
}

/// Milliseconds, as in the HTTP API.
pub(crate) fn span_millis(wire: Option<prost_types::Duration>) -> Value {
    span(wire).map_or(Value::Null, |span| Value::from(span.as_millis_f64()))
}

pub(crate) fn bytes(count: u64) -> String {
    match count as f64 {
        n if n >= f64::from(1 << 30) => format!("{:.1} GiB", n / f64::from(1 << 30)),
        n if n >= f64::from(1 << 20) => format!("{:.1} MiB", n / f64::from(1 << 20)),
        n if n >= 1024.0 => format!("{:.1} KiB", n / 1024.0),
        _ => format!("{count} B"),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[test]
    fn columns_line_up_and_control_characters_do_not_reach_the_terminal() {
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
    fn amounts_carry_their_unit(#[case] value: i128, #[case] unit: &str, #[case] text: &str) {
        assert_eq!(amount(value, unit), text);
    }
}
