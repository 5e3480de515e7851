//! A survey of all running processes, sampled or not, for requests about rules. Nothing of it is stored.

use std::{
    collections::HashMap,
    fs, mem,
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use super::{
    images::on_worker,
    proc::{ProcError, RealProc, link, owner, parse_stat, text},
};
use crate::{
    cgroup::{CgroupHierarchy, CgroupNames, parse_path},
    model::ProcessKey,
    runtimes::{RuntimeFinder, RuntimeSearch},
};

/// Processes in one survey; the others are left out and counted.
const MAX_PROCESSES: usize = 65_536;
/// Processes that surveys left out.
static SURVEY_LEFT_OUT: AtomicU64 = AtomicU64::new(0);

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
    /// Name and version of its language runtime; empty without one, and before [`add_runtimes`].
    pub(crate) runtime: (String, String),
    /// The name of its service, as it gives it; empty if it gives none, and before its owner adds it.
    pub(crate) service: String,
}

/// Returns all running processes. Blocking. A worker reads each of them: one that does not answer is left out, and the
/// caller waits for it once.
pub(crate) fn survey(hierarchy: CgroupHierarchy) -> Vec<SurveyedProcess> {
    let (seen, left_out) = survey_some(hierarchy, MAX_PROCESSES);
    if left_out > 0 && SURVEY_LEFT_OUT.fetch_add(left_out, Relaxed) == 0 {
        tracing::warn!(
            left_out,
            "this node has more processes than the {MAX_PROCESSES} that a preview or an explanation of rules reads: they do not \
             count the others; rules in force sample them all the same"
        );
    }
    seen
}

/// Returns the number of processes that surveys have left out so far.
pub(crate) fn left_out_of_surveys() -> u64 {
    SURVEY_LEFT_OUT.load(Relaxed)
}

/// Returns the first `max` processes, and the number of the others.
fn survey_some(hierarchy: CgroupHierarchy, max: usize) -> (Vec<SurveyedProcess>, u64) {
    let Ok(entries) = fs::read_dir("/proc") else { return Default::default() };
    let mut tgids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let read = |tgid| {
        let key = ProcessKey { tgid, start_boottime_ns: 0 };
        on_worker(key, move || survey_process(key, hierarchy)).ok()?.ok()
    };
    let seen = tgids.by_ref().take(max).filter_map(read).collect();
    (seen, tgids.count() as u64)
}

/// Reads one process. It uses the PID of the key only.
fn survey_process(key: ProcessKey, hierarchy: CgroupHierarchy) -> Result<SurveyedProcess, ProcError> {
    let proc = RealProc::default();
    let stat = parse_stat(&text(&proc, key, "stat")?).ok_or(ProcError::Gone(key.tgid))?;
    let cgroup = text(&proc, key, "cgroup").unwrap_or_default();
    let cgroup = parse_path(&cgroup, hierarchy.controller()).unwrap_or_default();
    // A kernel thread has no executable.
    let exe = link(&proc, key, "exe").unwrap_or_default();
    Ok(SurveyedProcess {
        pid: key.tgid,
        start_ticks: stat.start_ticks,
        comm: text(&proc, key, "comm")?.trim_end_matches('\n').to_owned(),
        exe: exe.strip_suffix(" (deleted)").unwrap_or(&exe).to_owned(),
        names: CgroupNames::of(&cgroup),
        cgroup,
        uid: owner(&proc, key).ok(),
        runtime: Default::default(),
        service: String::new(),
        cpu: TICK.saturating_mul(u32::try_from(stat.cpu_ticks).unwrap_or(u32::MAX)),
    })
}

/// Finds the language runtimes of all these processes. Blocking, in the same way as [`survey`].
pub(crate) fn add_runtimes(processes: &mut [SurveyedProcess]) {
    let mut finder = RuntimeFinder::default();
    // A kernel thread has no executable.
    for process in processes.iter_mut().filter(|process| !process.exe.is_empty()) {
        let (pid, mut theirs) = (process.pid, mem::take(&mut finder));
        let key = ProcessKey { tgid: pid, start_boottime_ns: 0 };
        let found = on_worker(key, move || {
            let found = theirs.find(pid);
            (theirs, found)
        });
        // The call of a process that does not answer has what was read so far: the others read those files again.
        let Ok((theirs, found)) = found else { continue };
        finder = theirs;
        if let Ok(RuntimeSearch { found: Some((file, _)), is_cut: _ }) = found {
            let (name, version) = file.names();
            process.runtime = (name.to_owned(), version.to_owned());
        }
    }
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
    fn processes_beyond_the_limit_are_counted() {
        let hierarchy = CgroupHierarchy::detect();
        let running = || {
            fs::read_dir("/proc")
                .unwrap()
                .flatten()
                .filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok())
                .count() as u64
        };
        let (all, none) = survey_some(hierarchy, MAX_PROCESSES);
        assert!(all.len() > 1 && none == 0, "{} and {none}", all.len());
        // Other tests start and end processes meanwhile.
        let exact = (0..100).any(|_| {
            let before = running();
            let (one, others) = survey_some(hierarchy, 1);
            before == running() && one.len() == 1 && others == before - 1
        });
        assert!(exact, "all but one are counted");
    }

    #[test]
    fn the_language_runtimes_of_processes_are_found() {
        let mut python = std::process::Command::new("/usr/bin/python3")
            .args(["-c", "input()"])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let of = |pid: u32| SurveyedProcess { pid, exe: "/x".into(), ..SurveyedProcess::default() };
        let end = std::time::Instant::now() + Duration::from_secs(20);
        // Until it has mapped its library.
        let seen = loop {
            let mut seen = [of(std::process::id()), of(python.id()), of(python.id()), of(u32::MAX)];
            add_runtimes(&mut seen);
            if !seen[1].runtime.0.is_empty() || std::time::Instant::now() > end {
                break seen;
            }
        };
        python.kill().unwrap();
        python.wait().unwrap();
        let names = seen.each_ref().map(|process| process.runtime.0.as_str());
        assert_eq!(names, ["", "python", "python", ""]);
        assert!(seen[1].runtime.1.starts_with("3."), "{seen:?}");
    }

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
        let key = ProcessKey { tgid: me, start_boottime_ns: 0 };
        let after = vec![survey_process(key, hierarchy).unwrap()];
        let used = cpu_usage(&before, &after, Duration::from_millis(300))[&me];
        assert!(used > 0.0, "{used}");
    }
}
