//! Durations, as people write them.

use std::{fmt, str::FromStr, time::Duration};

/// Units that `Display` uses, the largest first, in nanoseconds.
const UNITS: [(&str, u128); 7] = [
    ("d", 86_400_000_000_000),
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1000),
    ("ns", 1),
];

/// A duration: `500ms`, `10s`, `2m`, `1h30m`, `1h 30m`, `7d`.
///
/// `Display` writes days to nanoseconds without spaces and reads back as exactly the same duration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimeSpan(pub Duration);

/// A text that is no duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a duration: write it like 30s, 2m or 1h30m")]
pub struct TimeSpanError {
    text: String,
}

impl TimeSpan {
    /// Returns a duration of whole seconds.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }
}

impl From<TimeSpan> for Duration {
    fn from(span: TimeSpan) -> Self {
        span.0
    }
}

impl FromStr for TimeSpan {
    type Err = TimeSpanError;

    fn from_str(text: &str) -> Result<Self, TimeSpanError> {
        humantime::parse_duration(text).map(Self).map_err(|_| TimeSpanError { text: text.to_owned() })
    }
}

impl fmt::Display for TimeSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0.as_nanos();
        if rest == 0 {
            return f.write_str("0s");
        }
        for (unit, length) in UNITS {
            let count = rest / length;
            rest %= length;
            if count > 0 {
                write!(f, "{count}{unit}")?;
            }
        }
        Ok(())
    }
}

/// Returns the text form of a duration, as [`TimeSpan`] writes it.
pub fn format_duration(duration: Duration) -> String {
    TimeSpan(duration).to_string()
}

crate::serde_as_text!(TimeSpan);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::seconds("10s", 10_000)]
    #[case::spaces("1h 30m", 5_400_000)]
    #[case::together("1h30m", 5_400_000)]
    #[case::words("2 hours 5 min", 7_500_000)]
    #[case::days("7d", 604_800_000)]
    #[case::small("500ms", 500)]
    #[case::fraction("1.5s", 1500)]
    fn a_duration_is_read_with_its_units(#[case] text: &str, #[case] milliseconds: u64) {
        assert_eq!(text.parse(), Ok(TimeSpan(Duration::from_millis(milliseconds))));
    }

    #[rstest]
    #[case::word("fast")]
    #[case::no_unit("10")]
    #[case::negative("-5s")]
    #[case::unit("5 parsecs")]
    #[case::empty("")]
    fn a_wrong_duration_is_explained(#[case] text: &str) {
        let error = text.parse::<TimeSpan>().unwrap_err().to_string();
        assert_eq!(error, format!("`{text}` is not a duration: write it like 30s, 2m or 1h30m"));
    }

    #[rstest]
    #[case(0, "0s")]
    #[case(10_000, "10s")]
    #[case(5_400_000, "1h30m")]
    #[case(604_800_000, "7d")]
    #[case(90_061_001, "1d1h1m1s1ms")]
    fn a_duration_is_written_with_its_units(#[case] milliseconds: u64, #[case] text: &str) {
        assert_eq!(format_duration(Duration::from_millis(milliseconds)), text);
    }

    proptest! {
        #[test]
        fn a_duration_reads_back_from_its_text(seconds in 0_u64..1 << 40, nanos in 0_u32..1_000_000_000) {
            let span = TimeSpan(Duration::new(seconds, nanos));
            prop_assert_eq!(span.to_string().parse(), Ok(span));
            let json = serde_json::to_string(&span).unwrap();
            prop_assert_eq!(serde_json::from_str::<TimeSpan>(&json).unwrap(), span);
        }
    }
}
