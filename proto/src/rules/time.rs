//! Durations in rules. Rule files have the same grammar as flags and config files, see [`TimeSpan`].

use gannet_base::TimeSpan;
use jiff::SignedDuration;

/// Parses a duration as [`TimeSpan`] does. Rules also accept a sign, which the validator refuses with the allowed range,
/// and ISO 8601 (`PT30S`).
pub(super) fn parse_duration(text: &str) -> Result<SignedDuration, gannet_base::TimeSpanError> {
    match text.parse::<TimeSpan>() {
        Ok(TimeSpan(duration)) => Ok(SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)),
        Err(error) => text.parse().map_err(|_| error),
    }
}

/// Formats a duration as [`TimeSpan`] does: `1h30m`.
pub(super) fn show_duration(duration: SignedDuration) -> String {
    let sign = if duration.is_negative() { "-" } else { "" };
    format!("{sign}{}", TimeSpan(duration.unsigned_abs()))
}

/// Converts a protobuf duration. One that is out of range becomes the longest possible.
pub(super) fn signed(wire: prost_types::Duration) -> SignedDuration {
    SignedDuration::from_secs(wire.seconds).saturating_add(SignedDuration::from_nanos(wire.nanos.into()))
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::seconds("30s", 30_000)]
    #[case::days("7d", 604_800_000)]
    #[case::words("2 hours 5 min", 7_500_000)]
    #[case::iso_8601("PT1H30M", 5_400_000)]
    #[case::iso_fraction("PT1.5S", 1500)]
    #[case::comma("1h, 30m", 5_400_000)]
    #[case::clock("01:30:00", 5_400_000)]
    #[case::negative("-30s", -30_000)]
    #[case::ago("30s ago", -30_000)]
    fn a_duration_is_read_in_each_accepted_form(#[case] text: &str, #[case] milliseconds: i64) {
        assert_eq!(parse_duration(text), Ok(SignedDuration::from_millis(milliseconds)));
    }

    #[rstest]
    #[case("366d", 366 * 86_400)]
    #[case("1h30m", 5400)]
    #[case("-30s", -30)]
    #[case("0s", 0)]
    fn a_duration_reads_back_from_its_text(#[case] text: &str, #[case] seconds: i64) {
        let duration = SignedDuration::from_secs(seconds);
        assert_eq!(show_duration(duration), text);
        assert_eq!(parse_duration(text), Ok(duration));
    }

    #[test]
    fn a_wrong_duration_is_explained() {
        let error = parse_duration("soon").unwrap_err().to_string();
        assert_eq!(error, "`soon` is not a duration: write it like 30s, 2m or 1h30m");
    }

    #[test]
    fn a_duration_beyond_the_range_is_the_longest() {
        assert_eq!(parse_duration("18446744073709551615s"), Ok(SignedDuration::MAX));
    }
}
