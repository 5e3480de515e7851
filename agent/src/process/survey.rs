//! A survey of all running processes, sampled or not, for requests about rules. Nothing of it is stored.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Read as _,
    sync::LazyLock,
    time::Duration,
};

use super::proc::parse_stat;
use crate::cgroup::{CgroupHierarchy, CgroupNames, parse_path};

/// Processes in one survey; the others are left out.
const MAX_PROCESSES: usize = 65_536;
/// Bytes that are read of one file of a process.
const MAX_FILE_BYTES: u64 = 64 << 10;

/// The length of a clock tick.
static TICK: LazyLock<Duration> = LazyLock::new(|| {
    Duration::from_secs(1) / u32::try_from(rustix::param::clock_ticks_per_second()).unwrap_or(100).max(1)
});

/// A process as a survey saw it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SurveyedProcess {
    /// Thread group id.
    pub(crate) pid: u32,
    /// Its start time in clock ticks. It tells the process from a later one with the same PID.
    pub(crate) start_ticks: u64,
    /// Command name of the leader.
    pub(crate) comm: String,
    /// Path of the executable as the process sees it; empty for a kernel thread.
    pub(crate) exe: String,
    /// Path of its control group.
    pub(crate) cgroup: String,
    /// The names in that path.
    pub(crate) names: CgroupNames,
    /// Effective user id.
    pub(crate) uid: Option<u32>,
    /// CPU time of all its threads.
    pub(crate) cpu: Duration,
}

/// Returns all running processes. Blocking.
pub(crate) fn survey(hierarchy: CgroupHierarchy) -> Vec<SurveyedProcess> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .take(MAX_PROCESSES)
        .filter_map(|pid| survey_process(pid, hierarchy))
        .collect()
}

/// Reads one process; `None` if it has exited.
fn survey_process(pid: u32, hierarchy: CgroupHierarchy) -> Option<SurveyedProcess> {
    let stat = parse_stat(&read(pid, "stat")?)?;
    let cgroup =
        parse_path(&read(pid, "cgroup").unwrap_or_default(), hierarchy.controller()).unwrap_or_default();
    // A kernel thread has no executable.
    let exe = fs::read_link(format!("/proc/{pid}/exe"))
        .map_or_else(|_| String::new(), |path| path.to_string_lossy().into_owned());
    Some(SurveyedProcess {
        pid,
        start_ticks: stat.start_ticks,
        comm: read(pid, "comm")?.trim_end_matches('\n').to_owned(),
        exe: exe.strip_suffix(" (deleted)").unwrap_or(&exe).to_owned(),
        names: CgroupNames::of(&cgroup),
        cgroup,
        uid: fs::metadata(format!("/proc/{pid}")).ok().map(|of| std::os::unix::fs::MetadataExt::uid(&of)),
        cpu: TICK.saturating_mul(u32::try_from(stat.cpu_ticks).unwrap_or(u32::MAX)),
    })
}

/// Reads one file of a process, up to a bound.
fn read(pid: u32, file: &str) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(format!("/proc/{pid}/{file}")).ok()?.take(MAX_FILE_BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Returns by PID how many CPUs each process used on average between two surveys.
pub(crate) fn cpu_usage(
    before: &[SurveyedProcess],
    after: &[SurveyedProcess],
    between: Duration,
) -> HashMap<u32, f64> {
    let known: HashMap<(u32, u64), Duration> =
        before.iter().map(|seen| ((seen.pid, seen.start_ticks), seen.cpu)).collect();
    after
        .iter()
        .map(|seen| {
            // A process that started meanwhile has used all of its CPU time meanwhile.
            let former = known.get(&(seen.pid, seen.start_ticks)).copied().unwrap_or_default();
            let used = seen.cpu.saturating_sub(former);
            (seen.pid, used.as_secs_f64() / between.as_secs_f64().max(0.001))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_surveyed_with_its_cpu_time() {
        let hierarchy = CgroupHierarchy::detect();
        let before = survey(hierarchy);
        let me = std::process::id();
        let mine = before.iter().find(|seen| seen.pid == me).unwrap();
        assert!(mine.exe.contains("gannet_agent"), "{mine:?}");
        assert_eq!(mine.uid, Some(rustix::process::geteuid().as_raw()));
        let until = std::time::Instant::now() + Duration::from_millis(300);
        while std::time::Instant::now() < until {
            std::hint::black_box(0_u64);
        }
        let after = vec![survey_process(me, hierarchy).unwrap()];
        let used = cpu_usage(&before, &after, Duration::from_millis(300))[&me];
        assert!(used > 0.0, "{used}");
    }
}
