//! A look at everything that runs, whether a rule names it or not: for questions about rules. Nothing of it is kept.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Read as _,
    sync::LazyLock,
    time::Duration,
};

use crate::cgroup::{CgroupHierarchy, CgroupNames, parse_path};

/// More processes than that are not looked at.
const MOST: usize = 65_536;

/// A process as it was a moment ago.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Thread group id.
    pub pid: u32,
    /// When it started, in ticks: tells it from another one that has its number later.
    pub start_ticks: u64,
    /// Command name.
    pub comm: String,
    /// Path of the executable as the process sees it; empty for a kernel thread.
    pub exe: String,
    /// Path of its control group.
    pub cgroup: String,
    /// What that path tells.
    pub names: CgroupNames,
    /// Effective user id.
    pub uid: Option<u32>,
    /// CPU time of all its threads.
    pub cpu: Duration,
}

/// Everything that runs. Blocking.
pub fn survey(hierarchy: CgroupHierarchy) -> Vec<Seen> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .take(MOST)
        .filter_map(|pid| see(pid, hierarchy))
        .collect()
}

/// One process; none if it is gone.
pub fn see(pid: u32, hierarchy: CgroupHierarchy) -> Option<Seen> {
    let (start_ticks, cpu) = times(&read(pid, "stat")?)?;
    let cgroup =
        parse_path(&read(pid, "cgroup").unwrap_or_default(), hierarchy.controller()).unwrap_or_default();
    // A kernel thread has none.
    let exe = fs::read_link(format!("/proc/{pid}/exe"))
        .map_or_else(|_| String::new(), |path| path.to_string_lossy().into_owned());
    Some(Seen {
        pid,
        start_ticks,
        comm: read(pid, "comm")?.trim_end_matches('\n').to_owned(),
        exe: exe.strip_suffix(" (deleted)").unwrap_or(&exe).to_owned(),
        names: CgroupNames::of(&cgroup),
        cgroup,
        uid: fs::metadata(format!("/proc/{pid}")).ok().map(|of| std::os::unix::fs::MetadataExt::uid(&of)),
        cpu,
    })
}

/// One file of a process, up to a bound.
fn read(pid: u32, file: &str) -> Option<String> {
    const MOST: u64 = 64 << 10;
    let mut bytes = Vec::new();
    File::open(format!("/proc/{pid}/{file}")).ok()?.take(MOST).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// How many CPUs each process used on average between two surveys, by pid.
pub fn cpus(before: &[Seen], after: &[Seen], between: Duration) -> HashMap<u32, f64> {
    let known: HashMap<(u32, u64), Duration> =
        before.iter().map(|seen| ((seen.pid, seen.start_ticks), seen.cpu)).collect();
    after
        .iter()
        .map(|seen| {
            // What has started meanwhile has used all of its time meanwhile.
            let former = known.get(&(seen.pid, seen.start_ticks)).copied().unwrap_or_default();
            let used = seen.cpu.saturating_sub(former);
            (seen.pid, used.as_secs_f64() / between.as_secs_f64().max(0.001))
        })
        .collect()
}

/// When it started and how much CPU time it has used, from `/proc/PID/stat`.
fn times(text: &str) -> Option<(u64, Duration)> {
    static TICK: LazyLock<Duration> = LazyLock::new(|| {
        Duration::from_secs(1) / u32::try_from(rustix::param::clock_ticks_per_second()).unwrap_or(100).max(1)
    });
    // The name may hold anything; what counts stands behind the last parenthesis. Fields are numbered from 1 in proc(5),
    // and the state is 3.
    let fields: Vec<&str> = text[text.rfind(')')? + 1..].split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let ticks = field(14)?.checked_add(field(15)?)?;
    Some((field(22)?, TICK.saturating_mul(u32::try_from(ticks).unwrap_or(u32::MAX))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_very_process_is_seen_with_its_cpu_time() {
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
        let after = vec![see(me, hierarchy).unwrap()];
        let used = cpus(&before, &after, Duration::from_millis(300))[&me];
        assert!(used > 0.0, "{used}");
    }

    #[test]
    fn times_are_read_behind_any_name() {
        let text = "42 (x) S 1 ) S 1 1 1 0 -1 4194560 0 0 0 0 30 20 3 4 20 0 1 0 4711 0 0\n";
        let (start, cpu) = times(text).unwrap();
        assert_eq!(start, 4711);
        assert!(cpu > Duration::ZERO);
        assert_eq!(times("42 (x) S 1"), None);
    }
}
