//! When captures start and end, and which processes they sample.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use gannet_agent::{
    conditions::PressureFile,
    engine::{Engine, EngineOptions, ManualCapture, Window},
    governor::Budgets,
    model::boot_time,
    rules::{Deny, RuleSource, SourceRules},
};
use gannet_proto::{
    control::{Match, capture::Kind},
    ledger::LossReason,
    rules::{Caps, parse},
};

use crate::common::{
    Running,
    cgroup::{Group, enter},
    engine_options, idle_functions, program, slower,
};

/// A program: `spin MS` uses a CPU for MS milliseconds, or for ever.
const SPIN: &str = r"
#include <stdlib.h>
#include <time.h>
int main(int c, char **v) {
	long ms = c > 2 ? atol(v[2]) : 1000000;
	struct timespec begin, now;
	clock_gettime(CLOCK_MONOTONIC, &begin);
	do {
		for (volatile int i = 0; i < 20000; i++)
			;
		clock_gettime(CLOCK_MONOTONIC, &now);
	} while ((now.tv_sec - begin.tv_sec) * 1000 + (now.tv_nsec - begin.tv_nsec) / 1000000 < ms);
	return 0;
}
";

/// The windows that an engine delivered.
#[derive(Clone, Default)]
struct Profiles(Arc<Mutex<Vec<Window>>>);

impl Profiles {
    /// Returns by process the samples of profiles with this rule and reason.
    fn of(&self, rule: &str, reason: &str) -> BTreeMap<u32, u64> {
        let mut samples = BTreeMap::new();
        for window in &*self.0.lock().unwrap() {
            for profile in window.profiles.iter().filter(|p| p.rule.id == rule && p.rule.reason == reason) {
                for process in &profile.raw.processes {
                    *samples.entry(process.key.tgid).or_default() +=
                        process.stacks.iter().map(|stack| stack.count).sum::<u64>();
                }
            }
        }
        samples
    }

    /// Returns the captures of a rule, each with its evidence.
    fn evidence(&self, rule: &str) -> BTreeSet<(u64, String)> {
        let windows = self.0.lock().unwrap();
        let profiles = windows.iter().flat_map(|window| &window.profiles);
        profiles
            .filter(|profile| profile.rule.id == rule)
            .map(|profile| (profile.rule.capture, profile.rule.evidence.clone()))
            .collect()
    }

    /// Returns the samples that were lost for a reason.
    fn lost(&self, reason: LossReason) -> u64 {
        let windows = self.0.lock().unwrap();
        windows.iter().map(|window| window.ledger.lost.get(&reason).copied().unwrap_or(0)).sum()
    }

    fn check_ledgers(&self) {
        for window in &*self.0.lock().unwrap() {
            window.ledger.check().unwrap();
        }
    }
}

fn engine(deny: Deny) -> (Engine, Profiles) {
    engine_within(deny, Budgets::default())
}

fn engine_within(deny: Deny, budgets: Budgets) -> (Engine, Profiles) {
    let profiles = Profiles::default();
    let sink = profiles.clone();
    let options = EngineOptions {
        node: "test".into(),
        window: Duration::from_secs(1),
        caps: Caps::default(),
        deny,
        budgets,
        ..engine_options()
    };
    let engine = Engine::start(options, move |window: Window| sink.0.lock().unwrap().push(window)).unwrap();
    (engine, profiles)
}

async fn apply(engine: &Engine, rules: &str) {
    let rules = parse(&format!("rules:\n{rules}"), "test").unwrap();
    let partial =
        engine.replace(RuleSource::Local, SourceRules { rules, ..SourceRules::default() }).await.unwrap();
    assert_eq!(partial, []);
}

async fn until(what: &str, seconds: u64, mut met: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(seconds);
    while !met() {
        assert!(Instant::now() < end, "not within {seconds} s: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn spinner(directory: &Path, name: &str) -> PathBuf {
    let copy = directory.join(name);
    fs::copy(program("gannet-spin", SPIN, &[]), &copy).unwrap();
    copy
}

fn in_group(group: &Group, program: &Path, arguments: &[&str]) -> Running {
    let mut command = Command::new(enter());
    command.args(group.entry_files()).arg("--").arg(program).args(arguments);
    Running::start(&mut command)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_captures_of_one_process_get_their_samples_and_end() {
    let directory = tempfile::tempdir().unwrap();
    let program = spinner(directory.path(), "cap-two");
    let busy = Running::start(&mut Command::new(&program));
    let pid = busy.0.id();
    let (engine, profiles) = engine(Deny::default());
    apply(&engine, "  - {id: always, match: {comm: [cap-two]}, capture: {hz: 19}}\n").await;
    let manual = |hz, duration| ManualCapture {
        matches: Match { pids: vec![pid], ..Match::default() },
        hz,
        kinds: vec![Kind::OnCpu],
        duration: Duration::from_secs(duration),
        evidence: format!("at {hz}"),
    };
    let short = engine.capture_now(manual(199, 2)).await.unwrap();
    let long = engine.capture_now(manual(99, 4)).await.unwrap();
    let begun = Instant::now();
    assert!(short.over.await.unwrap().is_some());
    assert!(long.over.await.unwrap().is_some());
    assert!(begun.elapsed() >= Duration::from_millis(3900));
    let taken = profiles.of("manual", "manual")[&pid];
    let always = profiles.of("always", "always")[&pid];
    assert!(taken >= 100 && always >= 50, "{taken} {always}");
    let captures = profiles.evidence("manual");
    assert_eq!(captures.len(), 2, "{captures:?}");
    // They deliver nothing after their end.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(profiles.of("manual", "manual")[&pid], taken);
    assert!(profiles.of("always", "always")[&pid] > always);
    // An error names the cap: the agent never applies one silently.
    let error = engine.capture_now(manual(5000, 1)).await.unwrap_err().to_string();
    assert!(error.contains("capture.hz") && error.contains("1000"), "{error}");
    profiles.check_ledgers();
}

#[tokio::test(flavor = "multi_thread")]
async fn two_rules_of_one_process_keep_their_parts_of_stacks() {
    let directory = tempfile::tempdir().unwrap();
    let program = spinner(directory.path(), "cap-parts");
    let _busy = Running::start(&mut Command::new(&program));
    let (engine, profiles) = engine(Deny::default());
    apply(
        &engine,
        "  - {id: both, match: {comm: [cap-parts]}, capture: {hz: 99}}\n\
         \x20 - {id: kernel, match: {comm: [cap-parts]}, capture: {hz: 99, stacks: {user: false, kernel: true}}}\n",
    )
    .await;
    until("samples of both rules", 20, || {
        ["both", "kernel"].iter().all(|rule| !profiles.of(rule, "always").is_empty())
    })
    .await;
    let windows = profiles.0.lock().unwrap();
    let with_user = |rule: &str| {
        let of_rule = windows.iter().flat_map(|window| &window.profiles).filter(|p| p.rule.id == rule);
        let processes = of_rule.flat_map(|profile| &profile.raw.processes);
        processes.flat_map(|process| &process.stacks).filter(|stack| !stack.user.is_empty()).count()
    };
    assert!(with_user("both") > 0);
    assert_eq!(with_user("kernel"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_capture_ends_when_its_last_samples_are_unwound() {
    // On a busy machine its unwind table takes longer than the capture. Both programs are built, so that slow machines, which
    // have no compiler, get the smaller one.
    let large = [500_000, 100_000]
        .map(|count| program("cap-large", &(SPIN.to_owned() + &idle_functions(count)), &[]));
    let busy: Vec<Running> =
        (0..8).map(|_| Running::start(&mut Command::new(&large[usize::from(slower() > 1)]))).collect();
    let pid = busy[0].0.id();
    let (engine, profiles) = engine(Deny::default());
    let manual = ManualCapture {
        matches: Match { pids: vec![pid], ..Match::default() },
        hz: 199 / slower(),
        kinds: vec![Kind::OnCpu],
        duration: Duration::from_secs(1) * slower(),
        evidence: "while there is no table".into(),
    };
    let capture = engine.capture_now(manual).await.unwrap();
    assert!(capture.over.await.unwrap().is_some(), "a window with its samples");
    let taken = profiles.of("manual", "manual")[&pid];
    assert!(taken >= 10, "{taken}");
    profiles.check_ledgers();
}

#[test]
fn a_pressure_window_of_a_second_is_used_where_permitted() {
    let (stall, window) = (Duration::from_millis(100), Duration::from_secs(1));
    let file = Path::new("/proc/pressure/cpu");
    let pressure = PressureFile::open(file, false, stall, window, boot_time()).unwrap();
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap().trim();
    // CAP_SYS_RESOURCE: without it the kernel may insist on multiples of two seconds.
    let may = u64::from_str_radix(effective, 16).unwrap() >> 24 & 1 == 1;
    let (stall_watched, window_watched) = pressure.threshold();
    let exactly = (stall_watched, window_watched) == (stall, window);
    let adapted = !may && (stall_watched, window_watched) == (2 * stall, 2 * window);
    assert!(exactly || adapted, "{may}: {pressure:?}");
    assert!(pressure.fd().is_some(), "the kernel watches it: {pressure:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pressure_captures_the_container_with_evidence_and_lead_up() {
    let directory = tempfile::tempdir().unwrap();
    let program = spinner(directory.path(), "cap-pressed");
    let group = Group::new("pressed");
    // Half a CPU for three processes that use one each. Under the v1 controller the file has another name.
    let (v1, v2) = (group.directory.join("cpu.cfs_quota_us"), group.unified.join("cpu.max"));
    if v1.exists() {
        fs::write(v1, "50000").unwrap();
    } else {
        let root = group.unified.parent().unwrap().parent().unwrap().to_owned();
        for above in [root, group.unified.parent().unwrap().to_owned()] {
            fs::write(above.join("cgroup.subtree_control"), "+cpu").unwrap();
        }
        fs::write(v2, "50000 100000").unwrap();
    }
    let (engine, profiles) = engine(Deny::default());
    apply(
        &engine,
        "  - id: pressed
    match: {comm: [cap-pressed]}
    when: [{pressure: {resource: cpu, kind: some, stall_us: 100000, window_us: 1000000}}]
    capture: {hz: 49, duration: 3s, cooldown: 5s, lead_up: 10s}
  - id: throttled
    match: {comm: [cap-pressed]}
    when: [{throttled: {above_percent: 20, for: 2s}}]
    capture: {hz: 49, duration: 2s, cooldown: 60s}
  - id: used
    match: {comm: [cap-pressed]}
    when: [{cpu_usage: {above_millicores: 200, for: 2s}}]
    capture: {hz: 49, duration: 2s, cooldown: 60s}
  - id: idle
    match: {comm: [cap-pressed]}
    when: [{cpu_usage: {above_millicores: 5000, for: 2s}}]
",
    )
    .await;
    let three: Vec<Running> = (0..3).map(|_| in_group(&group, &program, &[])).collect();
    let pids: BTreeSet<u32> = three.iter().map(|running| running.0.id()).collect();
    let all =
        |reason: &str, rule: &str| profiles.of(rule, reason).into_keys().collect::<BTreeSet<u32>>() == pids;
    until("all three by pressure", 40, || all("pressure", "pressed")).await;
    until("all three by throttling", 40, || all("throttled", "throttled")).await;
    until("all three by CPU use", 40, || all("cpu_usage", "used")).await;
    until("another one after the cooldown, with its pre-trigger window", 40, || {
        profiles.evidence("pressed").len() >= 2 && all("pressure lead-up", "pressed")
    })
    .await;
    for (_, evidence) in profiles.evidence("pressed") {
        assert!(evidence.starts_with("cpu some ") && evidence.contains(" ms/s at "), "{evidence}");
        assert!(evidence.contains(&group.path), "{evidence}");
    }
    let evidence = profiles.evidence("throttled").pop_first().unwrap().1;
    assert!(evidence.contains(" % of the periods at "), "{evidence}");
    assert_eq!(profiles.evidence("idle"), BTreeSet::new());
    let statuses = engine.view().await.unwrap().rules;
    let idle = statuses.iter().find(|status| status.rule_id == "idle").unwrap();
    assert!(idle.reason.starts_with("waits for cpu_usage") && idle.processes == 3, "{idle:?}");
    // A capture ends when its rule is removed.
    apply(&engine, "  - {id: nothing, match: {comm: [nobody]}}\n").await;
    engine.flush().await.unwrap();
    let before = profiles.of("pressed", "pressure");
    tokio::time::sleep(Duration::from_secs(2)).await;
    engine.flush().await.unwrap();
    assert_eq!(profiles.of("pressed", "pressure"), before);
    profiles.check_ledgers();
}

/// Starts programs under a rule with an exec condition: two of three are captured, for two seconds each, and not the one that
/// already ran.
async fn check_exec_trigger(name: &str, matches: &str, program: &Path) {
    let before = Running::start(&mut Command::new(program));
    let (engine, profiles) = engine(Deny::default());
    let rule = format!(
        "  - id: at-exec
    match: {matches}
    when: [{{exec: {{}}}}]
    capture: {{hz: 99, duration: 2s, max_concurrent: 2}}
"
    );
    apply(&engine, &rule).await;
    let mut started: Vec<Running> = Vec::new();
    for _ in 0..3 {
        started.push(Running::start(&mut Command::new(program)));
    }
    let pid = |running: &Running| running.0.id();
    until(&format!("two of them by {name}"), 30, || profiles.of("at-exec", "exec").len() >= 2).await;
    // They end: the count stops growing, however late a slow machine delivers.
    let mut taken = profiles.of("at-exec", "exec");
    let begun = Instant::now();
    loop {
        tokio::time::sleep(Duration::from_secs(3)).await;
        let now = profiles.of("at-exec", "exec");
        if now == taken {
            break;
        }
        taken = now;
        assert!(begun.elapsed() < Duration::from_secs(60), "they do not end: {taken:?}");
    }
    // Two seconds at 99 Hz, and a part of a third.
    assert!(taken.values().all(|samples| *samples <= 250), "{taken:?}");
    // Any two of the three, which is max_concurrent: the first to start may be the last to end its execve. The process that ran
    // before is not sampled.
    let all: Vec<u32> = started.iter().map(pid).collect();
    assert!(taken.len() == 2 && taken.keys().all(|pid| all.contains(pid)), "{taken:?} of {all:?}");
    assert!(!taken.contains_key(&pid(&before)));
    // There is room again for the next one.
    let next = Running::start(Command::new(program).args(["spin", "1000"]));
    until("the next one", 30, || profiles.of("at-exec", "exec").contains_key(&pid(&next))).await;
    profiles.check_ledgers();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exec_trigger_samples_from_the_first_tick_and_ends() {
    let directory = tempfile::tempdir().unwrap();
    let program = spinner(directory.path(), "cap-exec");
    check_exec_trigger("command name", "{comm: [cap-exec]}", &program).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exec_trigger_captures_what_the_agent_decides() {
    let directory = tempfile::tempdir().unwrap();
    let program = spinner(directory.path(), "cap-path");
    let matches = format!("{{exe: [\"{}\"]}}", program.display());
    check_exec_trigger("executable", &matches, &program).await;
}

/// A program whose child spins, as it does itself. `pair SECONDS` waits before.
const PAIR: &str = r"
#include <signal.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>
int main(int c, char **v) {
	if (c > 1)
		sleep(atoi(v[1]));
	if (!fork())
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (volatile long i = 0;; i++)
		;
}
";

/// Checks that a change of the rules does not end captures of processes that the agent matched, and that a child belongs to the
/// capture of its parent and not to one if its parent has none.
#[tokio::test(flavor = "multi_thread")]
async fn a_capture_that_the_agent_granted_outlives_a_change_of_rules() {
    let directory = tempfile::tempdir().unwrap();
    let program = directory.path().join("cap-pair");
    fs::copy(crate::common::program("gannet-pair", PAIR, &[]), &program).unwrap();
    let (engine, profiles) = engine(Deny::default());
    let rule = format!(
        "  - id: at-exec
    match: {{exe: [\"{}\"]}}
    when: [{{exec: {{}}}}]
    capture: {{hz: 49, duration: 60s, max_concurrent: 1}}
",
        program.display()
    );
    // It calls no execve under the rule. Its child appears under it.
    let older = Running::start(Command::new(&program).arg("2"));
    apply(&engine, &rule).await;
    let captured = Pair::of(Running::start(&mut Command::new(&program)));
    let of = |pid| profiles.of("at-exec", "exec").get(&pid).copied().unwrap_or(0);
    until("both processes", 30, || captured.pids.iter().all(|pid| of(*pid) > 0)).await;
    let refused = [older, Running::start(&mut Command::new(&program))].map(Pair::of);
    for change in ["always", "other"] {
        apply(&engine, &format!("{rule}  - {{id: {change}, match: {{exe: ['/nothing/*']}}}}\n")).await;
        engine.flush().await.unwrap();
        let before: Vec<u64> = captured.pids.iter().map(|pid| of(*pid)).collect();
        until("samples behind a change of rules", 30, || {
            captured.pids.iter().zip(&before).all(|(pid, before)| of(*pid) > before + 20)
        })
        .await;
    }
    let all = profiles.of("at-exec", "exec");
    assert_eq!(all.into_keys().collect::<BTreeSet<u32>>(), captured.pids.iter().copied().collect());
    assert_eq!(profiles.lost(LossReason::CaptureOver), 0, "nothing is sampled only to be thrown away");
    drop(refused);
    profiles.check_ledgers();
}

/// A process and its child.
struct Pair {
    pids: Vec<u32>,
    _parent: Running,
}

impl Pair {
    /// Waits for the child.
    fn of(parent: Running) -> Self {
        let pid = parent.0.id();
        let children = PathBuf::from(format!("/proc/{pid}/task/{pid}/children"));
        let end = Instant::now() + Duration::from_secs(30);
        loop {
            let child = fs::read_to_string(&children).unwrap();
            if let Ok(child) = child.trim().parse() {
                return Self { pids: vec![pid, child], _parent: parent };
            }
            assert!(Instant::now() < end, "it makes a child");
        }
    }
}

/// Checks the kill switch and the governor (R40).
#[tokio::test(flavor = "multi_thread")]
async fn the_kill_switch_detaches_all_and_budgets_lower_rates() {
    let directory = tempfile::tempdir().unwrap();
    let program = spinner(directory.path(), "cap-switched");
    let (engine, profiles) = engine_within(Deny::default(), Budgets { cpu: Some(1e-9), memory_bytes: None });
    let first = Running::start(&mut Command::new(&program));
    apply(&engine, "  - {id: always, match: {comm: [cap-switched]}, capture: {hz: 99}}\n").await;
    let of = |running: &Running| profiles.of("always", "always").get(&running.0.id()).copied().unwrap_or(0);
    until("the first", 30, || of(&first) > 0).await;

    engine.switch_off(Some("switched off by a test".into())).await.unwrap();
    let ticks = async || {
        let view = engine.view().await.unwrap();
        (view.counters.unwrap().ticks, view.governed)
    };
    let (before, governed) = ticks().await;
    assert_eq!(governed.as_deref(), Some("switched off by a test"));
    let second = Running::start(&mut Command::new(&program));
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(ticks().await.0, before, "no program is called");
    let manual = ManualCapture {
        matches: Match { pids: vec![second.0.id()], ..Match::default() },
        hz: 99,
        kinds: vec![Kind::OnCpu],
        duration: Duration::from_secs(1),
        evidence: String::new(),
    };
    let refused = engine.capture_now(manual).await.unwrap_err().to_string();
    assert!(refused.contains("switched off by a test"), "{refused}");
    engine.switch_off(None).await.unwrap();
    until("the process that started meanwhile", 30, || of(&second) > 0).await;

    // The budget is impossibly small: rates go down step by step, and profiles carry that.
    let end = Instant::now() + Duration::from_secs(40);
    loop {
        let view = engine.view().await.unwrap();
        if view.rate_divisor >= 4 {
            assert!(view.governed.unwrap().contains("the budget is"));
            break;
        }
        assert!(Instant::now() < end, "not lowered");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let slower = || {
        let windows = profiles.0.lock().unwrap();
        windows.iter().flat_map(|window| &window.profiles).any(|profile| {
            profile.raw.period_ns >= 4 * (1_000_000_000 / 99) && profile.rule.governed.is_some()
        })
    };
    until("a profile at the lower rate", 30, slower).await;
    profiles.check_ledgers();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_captures_and_denied_processes_are_not_sampled() {
    let directory = tempfile::tempdir().unwrap();
    let (yes, no) = (spinner(directory.path(), "cap-yes"), spinner(directory.path(), "cap-no"));
    let deny = Deny { comm: vec![gannet_proto::rules::Pattern::parse("cap-n*").unwrap()], ..Deny::default() };
    let (engine, profiles) = engine(deny);
    let (yes, no) = (Running::start(&mut Command::new(yes)), Running::start(&mut Command::new(no)));
    apply(
        &engine,
        "  - id: clock
    match: {comm: ['cap-*']}
    when: [{schedule: {every: 1h, for: 2s}}]
  - {id: always, match: {comm: ['*']}, capture: {hz: 19}}
",
    )
    .await;
    let manual = engine
        .capture_now(ManualCapture {
            matches: Match { pids: vec![no.0.id()], ..Match::default() },
            hz: 99,
            kinds: vec![Kind::OnCpu],
            duration: Duration::from_secs(1),
            evidence: String::new(),
        })
        .await
        .unwrap();
    manual.over.await.unwrap();
    until("the schedule", 30, || profiles.of("clock", "schedule").contains_key(&yes.0.id())).await;
    for (rule, reason) in [("clock", "schedule"), ("always", "always"), ("manual", "manual")] {
        assert!(!profiles.of(rule, reason).contains_key(&no.0.id()), "{rule}");
    }
    profiles.check_ledgers();
}
