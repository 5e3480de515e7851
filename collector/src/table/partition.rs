//! The partition of a row: day and hour of the start of its profile, in UTC.

use std::collections::BTreeMap;

use super::action::Add;
use crate::time::HOUR_MS;

/// An hour, counted from 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Partition(pub(super) u64);

impl Partition {
    /// Returns the partition of a profile that starts then.
    pub(super) fn at(start_ms: u64) -> Self {
        Self(start_ms / HOUR_MS)
    }

    /// Returns the partition of a data file.
    pub(super) fn of(add: &Add) -> Option<Self> {
        let value = |name| add.partition_values.get(name).and_then(Option::as_deref);
        let date: jiff::civil::Date = value("date")?.parse().ok()?;
        let hour: i8 = value("hour")?.parse().ok()?;
        let at = date.to_datetime(jiff::civil::Time::new(hour, 0, 0, 0).ok()?);
        let at = at.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp();
        u64::try_from(at.as_second() / 3600).ok().map(Self)
    }

    pub(super) fn date_and_hour(self) -> (String, u64) {
        let at = jiff::Timestamp::from_second((self.0 * 3600) as i64).unwrap_or_default();
        (at.strftime("%Y-%m-%d").to_string(), self.0 % 24)
    }

    /// Returns the directory of the partition in its table.
    pub(super) fn path(self) -> String {
        let (date, hour) = self.date_and_hour();
        format!("date={date}/hour={hour}")
    }

    /// Returns the values of the partition columns.
    pub(super) fn values(self) -> BTreeMap<String, Option<String>> {
        let (date, hour) = self.date_and_hour();
        [("date", date), ("hour", hour.to_string())]
            .map(|(name, value)| (name.to_owned(), Some(value)))
            .into()
    }
}

/// Converts a time in milliseconds to that of a column.
pub(super) fn micros(ms: u64) -> i64 {
    i64::try_from(ms.saturating_mul(1000)).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_has_the_day_and_hour_of_its_profiles() {
        let partition = Partition::at(1_700_000_000_000);
        assert_eq!(partition.path(), "date=2023-11-14/hour=22");
        let add = Add {
            path: String::new(),
            partition_values: partition.values(),
            size: 0,
            modification_time: 0,
            data_change: true,
            stats: None,
            tags: None,
        };
        assert_eq!(Partition::of(&add), Some(partition));
    }
}
