//! Profile types: the names by which Pyroscope's clients know the sample types of profiles.
//!
//! A profile type is `name:sample_type:sample_unit:period_type:period_unit`. Grafana stores these texts in dashboards, and
//! chooses units and rates by them. So a sample type of Gannet has the type under which Pyroscope shows the same values:
//!
//! | sample types of a profile | profile types |
//! |---|---|
//! | `samples/count`, `cpu/nanoseconds` | `process_cpu:samples:count:cpu:nanoseconds`, `process_cpu:cpu:nanoseconds:cpu:nanoseconds` |
//! | `events/count`, `offcpu/nanoseconds` | `off_cpu:events:count:offcpu:nanoseconds`, `off_cpu:offcpu:nanoseconds:offcpu:nanoseconds` |

use std::fmt;

use tonic::Status;

/// The label of a series with the name of its profiles, where the sample types do not show it: `mutex` and `block` have
/// the same.
pub(crate) const PROFILE_NAME: &str = "profile_name";

/// Names of profiles by a sample type that they contain. The first type that a profile has decides.
const NAMES: [(&str, &str); 14] = [
    ("offcpu", "off_cpu"),
    ("wall", "wall"),
    ("cpu", "process_cpu"),
    ("inuse_space", "memory"),
    ("alloc_space", "memory"),
    ("inuse_objects", "memory"),
    ("alloc_objects", "memory"),
    ("space", "memory"),
    ("objects", "memory"),
    ("contentions", "mutex"),
    ("delay", "mutex"),
    ("goroutine", "goroutine"),
    ("samples", "process_cpu"),
    ("events", "off_cpu"),
];

/// Period types by the name of the profiles. Other profiles have the period of their last sample type.
const PERIODS: [(&str, &str, &str); 8] = [
    ("process_cpu", "cpu", "nanoseconds"),
    ("off_cpu", "offcpu", "nanoseconds"),
    ("wall", "wall", "nanoseconds"),
    ("memory", "space", "bytes"),
    ("mutex", "contentions", "count"),
    ("block", "contentions", "count"),
    ("goroutine", "goroutine", "count"),
    ("goroutines", "goroutine", "count"),
];

/// The five parts of a profile type. An empty part is allowed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ProfileType {
    /// All five parts, joined by `:`.
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) sample_type: String,
    pub(crate) sample_unit: String,
    pub(crate) period_type: String,
    pub(crate) period_unit: String,
}

impl ProfileType {
    fn new([name, sample_type, sample_unit, period_type, period_unit]: [&str; 5]) -> Self {
        // A colon would change the number of parts.
        let [name, sample_type, sample_unit, period_type, period_unit] =
            [name, sample_type, sample_unit, period_type, period_unit].map(|part| part.replace(':', "_"));
        Self {
            id: [&*name, &*sample_type, &*sample_unit, &*period_type, &*period_unit].join(":"),
            name,
            sample_type,
            sample_unit,
            period_type,
            period_unit,
        }
    }

    /// Parses an id of five parts, or of six if the last one is `delta`.
    pub(crate) fn parse(id: &str) -> Result<Self, Status> {
        let parts: Vec<&str> = id.split(':').collect();
        let five = match parts.as_slice() {
            [five @ .., "delta"] if five.len() == 5 => five,
            five => five,
        };
        five.try_into().map(Self::new).map_err(|_| {
            let id: String = id.chars().take(200).collect();
            Status::invalid_argument(format!(
                "profile_typeID: `{id}` is no profile type: write name:sample_type:sample_unit:period_type:period_unit, \
                 for instance process_cpu:cpu:nanoseconds:cpu:nanoseconds"
            ))
        })
    }

    /// Returns the name of profiles with these sample types.
    pub(crate) fn name_of<'a>(types: &[&'a str]) -> &'a str {
        let kinds = || types.iter().map(|t| t.split_once('/').map_or(*t, |(kind, _)| kind));
        let known = NAMES.iter().find(|(of, _)| kinds().any(|kind| kind == *of));
        known.map_or_else(|| kinds().next_back().unwrap_or_default(), |(_, name)| name)
    }

    /// Returns the profile types of a profile, one for each sample type in their order. `types`: the sample types as the index
    /// has them, `cpu/nanoseconds`. `name`: the value of [`PROFILE_NAME`], if the series has it.
    pub(crate) fn of_profile(name: Option<&str>, types: &[&str]) -> Vec<Self> {
        let name = name.unwrap_or_else(|| Self::name_of(types));
        let types: Vec<(&str, &str)> = types.iter().map(|t| t.split_once('/').unwrap_or((t, ""))).collect();
        let last = types.last().copied().unwrap_or_default();
        let period = PERIODS.iter().find(|(of, ..)| *of == name);
        let (period_type, period_unit) = period.map_or(last, |(_, kind, unit)| (kind, unit));
        // The CPU time beside wall-clock time has the name that all CPU time has, as in Pyroscope.
        let name_of = |kind: &str| if (name, kind) == ("wall", "cpu") { "process_cpu" } else { name };
        let types = types.iter();
        types.map(|(kind, unit)| Self::new([name_of(kind), kind, unit, period_type, period_unit])).collect()
    }
}

impl fmt::Display for ProfileType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(None, &["samples/count", "cpu/nanoseconds"], &[
        "process_cpu:samples:count:cpu:nanoseconds", "process_cpu:cpu:nanoseconds:cpu:nanoseconds"])]
    #[case(None, &["events/count", "offcpu/nanoseconds"], &[
        "off_cpu:events:count:offcpu:nanoseconds", "off_cpu:offcpu:nanoseconds:offcpu:nanoseconds"])]
    #[case(None, &["samples/count", "wall/nanoseconds"], &[
        "wall:samples:count:wall:nanoseconds", "wall:wall:nanoseconds:wall:nanoseconds"])]
    #[case(None, &["samples/count", "wall/nanoseconds", "cpu/nanoseconds"], &[
        "wall:samples:count:wall:nanoseconds", "wall:wall:nanoseconds:wall:nanoseconds",
        "process_cpu:cpu:nanoseconds:wall:nanoseconds"])]
    #[case(None, &["inuse_objects/count", "inuse_space/bytes"], &[
        "memory:inuse_objects:count:space:bytes", "memory:inuse_space:bytes:space:bytes"])]
    #[case(Some("block"), &["contentions/count", "delay/nanoseconds"], &[
        "block:contentions:count:contentions:count", "block:delay:nanoseconds:contentions:count"])]
    #[case(None, &["a:b/c:d"], &["a_b:a_b:c_d:a_b:c_d"])]
    #[case(None, &["odd"], &["odd:odd::odd:"])]
    #[case(None, &[], &[])]
    fn sample_types_have_the_types_of_pyroscope(
        #[case] name: Option<&str>,
        #[case] types: &[&str],
        #[case] ids: &[&str],
    ) {
        let found = ProfileType::of_profile(name, types);
        assert_eq!(found.iter().map(|t| &*t.id).collect::<Vec<_>>(), ids);
        for found in found {
            assert_eq!(ProfileType::parse(&found.id).unwrap(), found);
        }
    }

    #[rstest]
    #[case(
        "process_cpu:cpu:nanoseconds:cpu:nanoseconds:delta",
        Some("process_cpu:cpu:nanoseconds:cpu:nanoseconds")
    )]
    #[case("memory:alloc_in_new_tlab_bytes:bytes::", Some("memory:alloc_in_new_tlab_bytes:bytes::"))]
    #[case("a:b:c:d:delta", Some("a:b:c:d:delta"))]
    #[case("a:b:c:d:e:f", None)]
    #[case("a:b:c:d", None)]
    #[case("", None)]
    fn an_id_has_five_parts_or_a_delta(#[case] id: &str, #[case] want: Option<&str>) {
        let parsed = ProfileType::parse(id);
        assert_eq!(parsed.as_ref().ok().map(|t| &*t.id), want, "{parsed:?}");
    }
}
