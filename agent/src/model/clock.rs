//! The boot clock, which stamps processes, samples and mappings; and the monotonic clock, by which the sampling clocks run.

use std::{fs, sync::LazyLock, time::Duration};

/// Returns the time since the host booted, suspended time included: the clock of BPF programs and of perf events. In a time
/// namespace this process sees another boot clock; the difference is taken out.
pub fn boot_time() -> Duration {
    Duration::from_nanos(boot_time_ns())
}

/// Returns [`boot_time`] in nanoseconds.
pub(crate) fn boot_time_ns() -> u64 {
    time_ns(rustix::time::ClockId::Boottime, *NAMESPACE_OFFSET_NS)
}

/// Returns the time since the host booted, without suspended time, in nanoseconds: the clock of the kernel's timers.
pub(crate) fn monotonic_ns() -> u64 {
    static OFFSET_NS: LazyLock<i64> = LazyLock::new(|| namespace_offset_ns(["monotonic", "1"]));
    time_ns(rustix::time::ClockId::Monotonic, *OFFSET_NS)
}

fn time_ns(clock: rustix::time::ClockId, offset_ns: i64) -> u64 {
    let now = rustix::time::clock_gettime(clock);
    let here = now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned();
    here.saturating_add_signed(-offset_ns)
}

/// Returns the start time in clock ticks that `/proc/PID/stat` shows for a process that started at this boot time.
pub(crate) fn ticks_of(start_boottime_ns: u64) -> u64 {
    start_boottime_ns.saturating_add_signed(*NAMESPACE_OFFSET_NS) / *NS_PER_TICK
}

/// Returns a boot time that [`ticks_of`] maps to these ticks.
pub(crate) fn boot_time_of_ticks(ticks: u64) -> u64 {
    // In the middle of the tick, so that rounding in a time namespace does not leave it.
    let here = ticks * *NS_PER_TICK + *NS_PER_TICK / 2;
    here.saturating_add_signed(-*NAMESPACE_OFFSET_NS)
}

static NS_PER_TICK: LazyLock<u64> =
    LazyLock::new(|| 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1));

/// In a time namespace `clock_gettime` and `/proc` show a moved boot clock; BPF programs read the true one.
static NAMESPACE_OFFSET_NS: LazyLock<i64> = LazyLock::new(|| namespace_offset_ns(["boottime", "7"]));

/// Returns by how much a time namespace moves a clock. Older kernels write the number of the clock instead of its name.
fn namespace_offset_ns(clock: [&str; 2]) -> i64 {
    fs::read_to_string("/proc/self/timens_offsets")
        .ok()
        .and_then(|text| parse_namespace_offset(&text, clock))
        .unwrap_or(0)
}

/// Parses the text of `/proc/self/timens_offsets`.
fn parse_namespace_offset(text: &str, clock: [&str; 2]) -> Option<i64> {
    text.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let is_it = clock.contains(&fields.next()?);
        let (seconds, nanoseconds): (i64, i64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        is_it.then(|| seconds.checked_mul(1_000_000_000)?.checked_add(nanoseconds)).flatten()
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Checks that the offset of the boot clock is read, not that of another clock (R28).
    #[test]
    fn a_time_namespace_moves_the_boot_clock() {
        let text = "monotonic           3         1\nboottime      -10         5\n";
        assert_eq!(parse_namespace_offset(text, ["boottime", "7"]), Some(-9_999_999_995));
        assert_eq!(parse_namespace_offset(text, ["monotonic", "1"]), Some(3_000_000_001));
        assert_eq!(parse_namespace_offset("", ["boottime", "7"]), None);
    }

    #[test]
    fn ticks_survive_the_way_to_nanoseconds_and_back() {
        for ticks in [0, 1, 4711, 1 << 32] {
            assert_eq!(ticks_of(boot_time_of_ticks(ticks)), ticks);
        }
    }

    proptest! {
        /// Checks that no text makes the parser panic (R55).
        #[test]
        fn any_offsets_text_is_read_without_panic(text in "(?s).{0,400}") {
            let _ = parse_namespace_offset(&text, ["boottime", "7"]);
        }
    }
}
