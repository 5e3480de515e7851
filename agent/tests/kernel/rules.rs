//! Which processes rules match, decided in the kernel.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant, SystemTime},
};

use gannet_agent::{
    engine::{Engine, EngineOptions, Window},
    kernel::{Event, Kernel, KernelOptions},
    rules::{Deny, RuleBook, RuleSource, SourceRules, ad_hoc},
};
use gannet_proto::{
    control::{Match, Rule, rule_status::State},
    rules::{Caps, Pattern},
};
use proptest::{
    prelude::*,
    test_runner::{Config, TestRunner},
};

use crate::common::{
    Running,
    cgroup::{Group, enter},
    engine_options, program,
};

/// A program: `sleep MS`; or `swarm N PROGRAM`, which starts N children one after the other. Each lives 4 ms and then prints its
/// PID and the time.
const KNOT: &str = r#"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
static void rest(long ms) {
	struct timespec t = { ms / 1000, ms % 1000 * 1000000 };
	nanosleep(&t, 0);
}
int main(int c, char **v) {
	if (!strcmp(v[1], "life")) {
		struct timespec t;
		rest(4);
		clock_gettime(CLOCK_BOOTTIME, &t);
		char line[64];
		int n = snprintf(line, 64, "%d %lld\n", getpid(), t.tv_sec * 1000000000ll + t.tv_nsec);
		return write(1, line, n) != n;
	}
	if (!strcmp(v[1], "swarm")) {
		for (int i = 0; i < atoi(v[2]); i++) {
			if (!fork()) {
				execl(v[3], v[3], "life", (char *)0);
				_exit(1);
			}
			rest(2);
		}
		while (wait(0) > 0)
			;
		return 0;
	}
	rest(atol(v[2]));
	return 0;
}
"#;

fn knot() -> PathBuf {
    program("gannet-knot", KNOT, &[])
}

/// Copies the program to another name.
fn named(directory: &Path, name: &str) -> PathBuf {
    let copy = directory.join(name);
    fs::copy(knot(), &copy).unwrap();
    copy
}

fn kernel() -> Kernel {
    let mut kernel = Kernel::start(KernelOptions::default()).unwrap();
    assert_eq!(kernel.degraded(), &[] as &[String]);
    kernel.set_lifecycle(true);
    kernel
}

fn book(rules: Vec<Rule>) -> RuleBook {
    let mut book = RuleBook::new(Caps::default());
    book.enable_pods();
    let errors = book.check(RuleSource::Local, &rules);
    assert_eq!(errors, []);
    assert_eq!(
        book.replace(RuleSource::Local, SourceRules { rules, ..SourceRules::default() }, SystemTime::now()),
        []
    );
    book
}

fn rule(number: usize, matches: Match) -> Rule {
    ad_hoc(&format!("rule-{number}"), matches, 19, &[])
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

/// Reads events until `pick` returns an answer for one.
#[track_caller]
fn wait_for<T>(kernel: &mut Kernel, what: &str, mut pick: impl FnMut(&Event) -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(30);
    while Instant::now() < end {
        if let Some(found) = kernel.read().unwrap().iter().find_map(&mut pick) {
            return found;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("not seen: {what}");
}

fn exec_of(pid: u32, comm: &str) -> impl FnMut(&Event) -> Option<u64> {
    move |event| match event {
        Event::Exec { subject, .. } if subject.key.tgid == pid && subject.comm == comm => Some(subject.rules),
        _ => None,
    }
}

fn running(pid: u32) -> impl FnMut(&Event) -> Option<u64> {
    move |event| match event {
        Event::Running { subject, .. } if subject.key.tgid == pid => Some(subject.rules),
        _ => None,
    }
}

/// Checks the kernel's tries against [`Pattern::matches`] (R17).
#[test]
fn the_kernels_tries_match_as_the_patterns_do() {
    let kernel = std::cell::RefCell::new(kernel());
    let patterns = || prop::collection::vec("[ab]{1,3}\\*?", 0..3);
    let rules = prop::collection::vec((patterns(), patterns()), 1..8);
    let names = prop::collection::vec(("[ab]{1,5}", "[ab/]{0,5}"), 1..12);
    let mut runner = TestRunner::new(Config { cases: 64, failure_persistence: None, ..Config::default() });
    runner
        .run(&(rules, names), |(rules, names)| {
            let rules: Vec<Rule> = rules
                .into_iter()
                .filter(|(comm, cgroup)| !(comm.is_empty() && cgroup.is_empty()))
                .enumerate()
                .map(|(number, (comm, cgroup))| {
                    let cgroup = cgroup.iter().map(|path| format!("/{path}")).collect();
                    rule(number, Match { comm, cgroup, ..Match::default() })
                })
                .collect();
            let asks = |patterns: &[String], text: &str| {
                patterns.iter().any(|pattern| Pattern::parse(pattern).unwrap().matches(text.as_bytes()))
            };
            let mut kernel = kernel.borrow_mut();
            kernel.set_rules(&book(rules.clone()).kernel_rules(SystemTime::now())).unwrap();
            for (comm, path) in &names {
                let path = format!("/{path}");
                let (mut by_comm, mut by_cgroup) = (0, 0);
                for (slot, rule) in rules.iter().enumerate() {
                    let matches = rule.r#match.clone().unwrap();
                    by_comm |= u64::from(asks(&matches.comm, comm)) << slot;
                    by_cgroup |= u64::from(asks(&matches.cgroup, &path)) << slot;
                }
                prop_assert_eq!(kernel.look_up_comm(comm).unwrap(), by_comm, "{}", comm);
                prop_assert_eq!(kernel.look_up_cgroup(&path).unwrap(), by_cgroup, "{}", path);
            }
            Ok(())
        })
        .unwrap();
}

/// Checks that all fields of a rule must match, at exec, for a process that already runs, and after it moves (R17).
#[test]
fn all_fields_of_a_rule_match_at_exec_and_while_it_runs() {
    let group = Group::new("outer");
    let inner = Group::new("outer/inner");
    let directory = tempfile::tempdir().unwrap();
    let program = named(directory.path(), "knot-matched");
    let enter = enter();
    let below = format!("{}/*", group.path);
    let comm = || strings(&["knot-matched"]);
    let namespaces = || strings(&["shop"]);
    // Each match with whether it holds for a process of that name in the inner group.
    let cases = [
        (Match { comm: comm(), ..Match::default() }, true),
        (Match { comm: strings(&["knot-m*"]), ..Match::default() }, true),
        (Match { comm: strings(&["knot-match"]), ..Match::default() }, false),
        (Match { cgroup: vec![inner.path.clone()], ..Match::default() }, true),
        (Match { cgroup: vec![group.path.clone()], ..Match::default() }, false),
        (Match { cgroup: vec![below.clone()], ..Match::default() }, true),
        (Match { comm: comm(), cgroup: vec![below.clone()], ..Match::default() }, true),
        (Match { comm: comm(), cgroup: strings(&["/nowhere"]), ..Match::default() }, false),
        (Match { comm: strings(&["nobody"]), cgroup: vec![below.clone()], ..Match::default() }, false),
        (Match { comm: comm(), uid: vec![0, 4711], ..Match::default() }, true),
        (Match { comm: comm(), uid: vec![4711], ..Match::default() }, false),
        (Match { namespaces: namespaces(), ..Match::default() }, true),
        (Match { namespaces: namespaces(), comm: strings(&["nobody"]), ..Match::default() }, false),
        (Match { containers: strings(&["other"]), ..Match::default() }, false),
    ];
    let mut book =
        book(cases.iter().enumerate().map(|(number, (matches, _))| rule(number, matches.clone())).collect());
    // The container is the outer group, which covers the inner one.
    assert!(book.select_containers("rule-11", BTreeSet::from([group.id()])));
    assert!(book.select_containers("rule-12", BTreeSet::from([group.id()])));
    let expected =
        cases.iter().enumerate().fold(0, |bits, (slot, (_, matches))| bits | u64::from(*matches) << slot);
    let rules = book.kernel_rules(SystemTime::now());

    let mut kernel = kernel();
    kernel.set_rules(&rules).unwrap();
    let mut command = Command::new(&enter);
    command.args(inner.entry_files()).arg("--").arg(&program).args(["sleep", "60000"]);
    let started = Running::start(&mut command);
    let pid = started.0.id();
    assert_eq!(wait_for(&mut kernel, "exec", exec_of(pid, "knot-matched")), expected, "at exec");

    // The process already runs when the rules come into force.
    kernel.set_rules(&book_of_nothing()).unwrap();
    kernel.read().unwrap();
    kernel.set_rules(&rules).unwrap();
    assert_eq!(wait_for(&mut kernel, "running", running(pid)), expected, "while it runs");

    // Moved to another group, and back.
    let elsewhere = Group::new("elsewhere");
    let by_group = [3, 5, 6, 11].iter().fold(0, |bits, slot| bits | 1 << slot);
    elsewhere.take(pid);
    assert_eq!(wait_for(&mut kernel, "moved", running(pid)), expected & !by_group, "moved away");
    inner.take(pid);
    assert_eq!(
        wait_for(&mut kernel, "moved back", |event| running(pid)(event).filter(|rules| rules & 1 << 3 != 0)),
        expected,
        "moved back"
    );

    // A rule on a PID, and processes that the node denies whatever rules ask for.
    let pids =
        book_of(&[Match { pids: vec![pid], ..Match::default() }, Match { comm: comm(), ..Match::default() }]);
    kernel.set_rules(&pids).unwrap();
    assert_eq!(wait_for(&mut kernel, "by pid", running(pid)), 0b11);
    for deny in [
        Deny { comm: vec![Pattern::parse("knot-ma*").unwrap()], ..Deny::default() },
        Deny { cgroup: vec![Pattern::parse(&below).unwrap()], ..Deny::default() },
        Deny { containers: BTreeSet::from([group.id()]), ..Deny::default() },
    ] {
        let mut book = book_with(&[
            Match { comm: strings(&["*"]), ..Match::default() },
            Match { pids: vec![pid], ..Match::default() },
        ]);
        book.set_deny(deny.clone());
        kernel.read().unwrap();
        kernel.set_rules(&book.kernel_rules(SystemTime::now())).unwrap();
        let events = kernel.read().unwrap();
        assert!(events.iter().any(|event| running(std::process::id())(event).is_some()), "others match");
        assert!(events.iter().all(|event| running(pid)(event).is_none()), "{deny:?}");
    }
}

fn book_with(matches: &[Match]) -> RuleBook {
    book(matches.iter().enumerate().map(|(number, matches)| rule(number, matches.clone())).collect())
}

fn book_of(matches: &[Match]) -> gannet_agent::kernel::KernelRules {
    book_with(matches).kernel_rules(SystemTime::now())
}

fn book_of_nothing() -> gannet_agent::kernel::KernelRules {
    book_of(&[])
}

/// Checks that a process that starts while rules change is seen at its exec or by the scan (R17).
#[test]
fn no_process_is_missed_while_rules_change() {
    let directory = tempfile::tempdir().unwrap();
    let (swarm, one) = (knot(), named(directory.path(), "knot-swarm"));
    let mut kernel = kernel();
    let rules = book_of(&[Match { comm: strings(&["knot-swarm"]), ..Match::default() }]);
    let mut command = Command::new(&swarm);
    command.arg("swarm").arg("400").arg(&one).stdout(Stdio::piped());
    let mut running = Running::start(&mut command);
    let mut output = running.0.stdout.take().unwrap();
    let printed = std::thread::spawn(move || {
        let mut text = String::new();
        output.read_to_string(&mut text).unwrap();
        text
    });
    // The processes that the kernel side reported, and the times in which the rules were in force.
    let mut seen: HashSet<u32> = HashSet::new();
    let mut in_force: Vec<(u64, u64)> = Vec::new();
    let collect = |kernel: &mut Kernel, seen: &mut HashSet<u32>| {
        for event in kernel.read().unwrap() {
            if let Event::Exec { subject, .. } | Event::Running { subject, .. } = event
                && subject.rules != 0
            {
                seen.insert(subject.key.tgid);
            }
        }
    };
    while running.0.try_wait().unwrap().is_none() {
        kernel.set_rules(&rules).unwrap();
        let begun = boot_clock();
        for _ in 0..10 {
            std::thread::sleep(Duration::from_millis(3));
            collect(&mut kernel, &mut seen);
        }
        in_force.push((begun, boot_clock()));
        kernel.set_rules(&book_of_nothing()).unwrap();
        std::thread::sleep(Duration::from_millis(3));
        collect(&mut kernel, &mut seen);
    }
    collect(&mut kernel, &mut seen);
    let ends: HashMap<u32, u64> = printed
        .join()
        .unwrap()
        .lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(pid, end)| (pid.parse().unwrap(), end.parse().unwrap()))
        .collect();
    let must: Vec<u32> = ends
        .iter()
        .filter(|(_, end)| in_force.iter().any(|(begun, over)| (begun..=over).contains(end)))
        .map(|(pid, _)| *pid)
        .collect();
    assert!(must.len() > 50 && in_force.len() > 3, "{} of {} in {in_force:?}", must.len(), ends.len());
    let missed: Vec<&u32> = must.iter().filter(|pid| !seen.contains(pid)).collect();
    // A kernel that preempts handlers may skip both redundant handlers of an event, and counts that; others skip none.
    let counters = kernel.counters().unwrap();
    assert!(missed.len() as u64 <= counters.exec.skipped, "{missed:?} of {}: {counters:?}", must.len());
    assert!(counters.exec.skipped * 20 < counters.exec.seen, "{counters:?}");
}

fn boot_clock() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(time.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap()
}

/// Checks that rules which replace as many others all come into force, one window later at most, and that the node says so. A
/// node has slots for 48 rules, and the former 30 keep theirs until their last samples are out.
#[tokio::test]
async fn thirty_rules_that_replace_thirty_others_all_sample() {
    let options = EngineOptions { caps: Caps::default(), tables: None, ..engine_options() };
    let engine = Engine::start(options, |_: Window| {}).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let sleeper = named(directory.path(), "gannet-29");
    let set = |prefix: &str| SourceRules {
        rules: (0..30)
            .map(|n| {
                let comm = vec![format!("{prefix}-{n}")];
                ad_hoc(&format!("{prefix}-{n}"), Match { comm, ..Match::default() }, 19, &[])
            })
            .collect(),
        ..SourceRules::default()
    };
    assert_eq!(engine.replace(RuleSource::Remote, set("former")).await.unwrap(), []);
    let _running = Running::start(Command::new(&sleeper).args(["sleep", "60000"]));
    let waiting = engine.replace(RuleSource::Remote, set("gannet")).await.unwrap();
    assert_eq!(waiting.len(), 12, "{waiting:?}");
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let view = engine.view().await.unwrap();
        let last = view.rules.iter().find(|rule| rule.rule_id == "gannet-29").unwrap();
        if view.rule_faults.is_empty() {
            assert!(view.rules.iter().all(|rule| rule.state() == State::Capturing), "{:?}", view.rules);
            assert_eq!((view.rules.len(), last.processes), (30, 1), "{last:?}");
            break;
        }
        assert!(Instant::now() < end, "{:?}", view.rule_faults);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    engine.stop();
}
