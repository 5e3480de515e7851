//! Conversions between milliseconds, protobuf times and the times that people write.

use std::time::{Duration, SystemTime};

use gannet_base::TimeSpan;
use prost_types::Timestamp;

/// Milliseconds of a minute.
pub(crate) const MINUTE_MS: u64 = 60_000;
/// Milliseconds of an hour.
pub(crate) const HOUR_MS: u64 = 3_600_000;

/// Returns the current time in milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}

pub(crate) fn timestamp(ms: u64) -> Timestamp {
    Timestamp { seconds: (ms / 1000) as i64, nanos: (ms % 1000 * 1_000_000) as i32 }
}

/// Returns `None` for a time before 1970 and for an invalid time.
pub(crate) fn to_ms(at: &Timestamp) -> Option<u64> {
    let ms = at.seconds.checked_mul(1000)?.checked_add(i64::from(at.nanos) / 1_000_000)?;
    u64::try_from(ms).ok()
}

pub(crate) fn duration(d: Duration) -> prost_types::Duration {
    prost_types::Duration { seconds: d.as_secs() as i64, nanos: d.subsec_nanos() as i32 }
}

pub(crate) fn duration_from_ms(ms: u64) -> prost_types::Duration {
    duration(Duration::from_millis(ms))
}

/// Returns `None` for a negative duration.
pub(crate) fn duration_to_ms(d: &prost_types::Duration) -> Option<u64> {
    Duration::try_from(*d).ok().map(|d| d.as_millis() as u64)
}

/// Parses a time as people write it in a query: Unix milliseconds, RFC 3339, `now`, `now-15m`. Returns milliseconds since
/// 1970, or a text that says which forms are valid.
pub(crate) fn parse(text: &str, now_ms: u64) -> Result<u64, String> {
    let text = text.trim();
    if let Ok(ms) = text.parse::<u64>() {
        return Ok(ms);
    }
    if let Some(rest) = text.strip_prefix("now") {
        if rest.is_empty() {
            return Ok(now_ms);
        }
        let ago = rest.strip_prefix('-').and_then(|d| d.parse::<TimeSpan>().ok());
        return match ago {
            Some(ago) => Ok(now_ms.saturating_sub(ago.0.as_millis() as u64)),
            None => Err(format!("`{text}` is not a time: write `now` or `now-15m`")),
        };
    }
    match text.parse::<jiff::Timestamp>() {
        Ok(at) => u64::try_from(at.as_millisecond()).map_err(|_| format!("`{text}` is before 1970")),
        Err(_) => Err(format!(
            "`{text}` is not a time: write Unix milliseconds, `now`, `now-15m` or RFC 3339 as in 2026-01-31T12:00:00Z"
        )),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("1700000000000", Some(1_700_000_000_000))]
    #[case("now", Some(5_000_000))]
    #[case("now-15m", Some(4_100_000))]
    #[case("now-1h30m", Some(0))]
    #[case("2023-11-14T22:13:20Z", Some(1_700_000_000_000))]
    #[case("2023-11-14T23:13:20+01:00", Some(1_700_000_000_000))]
    #[case("now+5m", None)]
    #[case("yesterday", None)]
    #[case("", None)]
    #[case("-5", None)]
    fn times_in_all_forms_of_a_query_are_parsed(#[case] text: &str, #[case] want: Option<u64>) {
        assert_eq!(parse(text, 5_000_000).ok(), want);
    }

    #[test]
    fn milliseconds_round_trip_through_protobuf_times() {
        for ms in [0, 1, 999, 1000, 1_700_000_000_123] {
            assert_eq!(to_ms(&timestamp(ms)), Some(ms));
            assert_eq!(duration_to_ms(&duration_from_ms(ms)), Some(ms));
        }
        assert_eq!(to_ms(&Timestamp { seconds: -1, nanos: 0 }), None);
        assert_eq!(to_ms(&Timestamp { seconds: i64::MAX, nanos: 0 }), None);
        assert_eq!(duration_to_ms(&prost_types::Duration { seconds: -1, nanos: 0 }), None);
    }
}
