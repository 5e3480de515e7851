//! Which rules hold for a process that changes its name, or whose name is not that of its executable.

use std::{
    collections::BTreeSet,
    fs::{self, Permissions},
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{ChildStdin, ChildStdout, Command, Stdio},
    time::SystemTime,
};

use gannet_agent::{
    kernel::{Event, Kernel, KernelOptions, KernelRules},
    rules::{RuleBook, RuleSource, SourceRules, ad_hoc},
};
use gannet_proto::{control::Match, rules::Caps};

use crate::{
    common::{
        Running,
        cgroup::{Group, enter},
        in_order, is_marked, program, record_for,
    },
    daemon::Daemon,
};

const DEAD_LEADER: &str = include_str!("../data/cases/dead_leader.c");

/// A program that does what its input says, a line each: `m NAME` renames its main thread; `o NAME` does it by the file of
/// another thread; `t NAME` starts a thread with this name; `f NAME` starts a thread with this name that forks a child, which
/// ends with the program; `s` spins for 2 s. It answers each line with the PID of the child, or 0.
const RENAMER: &str = r#"
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>
static char line[64];
static int child, ends[2];
static void *thread(void *x) {
	if (*line == 'o') {
		FILE *comm = fopen("/proc/self/comm", "w");
		fputs(line + 2, comm);
		fclose(comm);
		return x;
	}
	prctl(PR_SET_NAME, line + 2);
	if (*line == 'f' && !(child = fork())) {
		char byte;
		close(ends[1]);
		_exit(read(ends[0], &byte, 1));
	}
	return x;
}
int main(void) {
	if (pipe(ends))
		return 1;
	while (fgets(line, sizeof(line), stdin)) {
		pthread_t t;
		line[strcspn(line, "\n")] = child = 0;
		if (*line == 'm')
			prctl(PR_SET_NAME, line + 2);
		else if (*line == 's')
			for (time_t end = time(0) + 2; time(0) < end;)
				;
		else if (!pthread_create(&t, 0, thread, 0))
			pthread_join(t, 0);
		printf("%d\n", child);
		fflush(stdout);
	}
	return 0;
}
"#;

struct Renamer {
    running: Running,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Renamer {
    /// Starts it as `renamer`.
    fn start() -> Self {
        let path = program("renamer", RENAMER, &["-pthread"]);
        let mut running = Running::start(Command::new(path).stdin(Stdio::piped()).stdout(Stdio::piped()));
        let (input, output) = (running.0.stdin.take().unwrap(), running.0.stdout.take().unwrap());
        Self { running, input, output: BufReader::new(output) }
    }

    fn pid(&self) -> u32 {
        self.running.0.id()
    }

    /// Returns the answer when it has done what the line says.
    fn tell(&mut self, line: &str) -> u32 {
        writeln!(self.input, "{line}").unwrap();
        let mut answer = String::new();
        self.output.read_line(&mut answer).unwrap();
        answer.trim_end().parse().unwrap()
    }
}

fn kernel() -> Kernel {
    let mut kernel = Kernel::start(KernelOptions::default()).unwrap();
    assert_eq!(kernel.degraded(), &[] as &[String]);
    kernel.set_lifecycle(true);
    kernel
}

/// Compiles one rule for each of these, in this order.
fn rules(matches: &[Match]) -> KernelRules {
    let rule =
        |(number, matches): (usize, &Match)| ad_hoc(&format!("rule-{number}"), matches.clone(), 19, &[]);
    let rules = matches.iter().enumerate().map(rule).collect();
    let mut book = RuleBook::new(Caps::default());
    book.replace(RuleSource::Local, SourceRules { rules, ..SourceRules::default() }, SystemTime::now());
    book.kernel_rules(SystemTime::now())
}

fn comm(pattern: &str) -> Match {
    Match { comm: vec![pattern.to_owned()], ..Match::default() }
}

/// Returns name and rules of each new report of a process, other than exec and exit.
fn reports(kernel: &mut Kernel, pid: u32) -> Vec<(String, u64)> {
    let of = |event: Event| match event {
        Event::Running { subject, .. } | Event::Fork { subject, .. } => {
            (subject.key.tgid == pid).then_some((subject.comm, subject.rules | subject.candidates))
        }
        _ => None,
    };
    kernel.read().unwrap().into_iter().filter_map(of).collect()
}

/// Checks that a rule holds for the name that the main thread has now, whichever came first: the name, or the rule.
#[test]
fn a_rule_follows_a_process_that_renames_itself() {
    let mut kernel = kernel();
    let in_force = rules(&[
        comm("renamed"),
        comm("rename*"),
        Match { uid: vec![4711], ..comm("rename*") },
        // The agent compares the path, and only of a process with the name.
        Match { exe: vec!["/nowhere/*".into()], ..comm("other") },
    ]);
    let mut renamer = Renamer::start();
    renamer.tell("m unnamed");
    let pid = renamer.pid();
    let named = |name: &str, rules: u64| vec![(name.to_owned(), rules)];
    // The rules come first.
    kernel.set_rules(&in_force).unwrap();
    assert_eq!(reports(&mut kernel, pid), []);
    for (line, expected) in [
        ("m renamed", named("renamed", 0b11)),
        ("o rename-2", named("rename-2", 0b10)),
        ("m renamed-to-something-long", named("renamed-to-some", 0b10)),
        // The name of another thread is not that of the process.
        ("t renamed", Vec::new()),
        ("m other", named("other", 0b1000)),
        ("m unnamed", named("unnamed", 0)),
        // The agent shows the name of a process that it knows.
        ("m stranger", named("stranger", 0)),
    ] {
        renamer.tell(line);
        assert_eq!(reports(&mut kernel, pid), expected, "{line}");
    }
    // The name comes first, and then any other change of the rules.
    for (name, matched) in [("renamed", 0b11), ("rename-2", 0b10), ("other", 0b1000), ("unnamed", 0)] {
        kernel.set_rules(&rules(&[])).unwrap();
        renamer.tell(&format!("m {name}"));
        kernel.read().unwrap();
        for _ in 0..2 {
            kernel.set_rules(&in_force).unwrap();
            let expected = if matched == 0 { Vec::new() } else { named(name, matched) };
            assert_eq!(reports(&mut kernel, pid), expected, "{name}");
        }
    }
}

/// Checks a child that a thread with a name of its own forks: the child gets the name of the thread.
#[test]
fn a_child_of_a_named_thread_matches_by_its_own_name() {
    let mut kernel = kernel();
    let in_force = rules(&[comm("renamed")]);
    kernel.set_rules(&in_force).unwrap();
    let mut renamer = Renamer::start();
    let first = renamer.tell("f renamed");
    assert_eq!(reports(&mut kernel, first), [("renamed".to_owned(), 1)]);
    renamer.tell("m renamed");
    let (second, third) = (renamer.tell("f renamed"), renamer.tell("f thread"));
    let mut seen = |change: bool| {
        if change {
            kernel.set_rules(&in_force).unwrap();
        }
        let tgid = |event: Event| match event {
            Event::Fork { subject, .. } | Event::Running { subject, .. } => Some(subject.key.tgid),
            _ => None,
        };
        kernel.read().unwrap().into_iter().filter_map(tgid).collect::<BTreeSet<u32>>()
    };
    let mine = [first, second, third];
    let forked = seen(false);
    assert_eq!(mine.map(|pid| forked.contains(&pid)), [false, true, false]);
    let scanned = seen(true);
    assert_eq!(mine.map(|pid| scanned.contains(&pid)), [true, true, false]);
}

/// Checks that a process with endless renames costs others no report, and that each rename is reported or counted.
#[test]
fn endless_renames_take_no_reports_from_others() {
    let options = KernelOptions { report_rate: 50, ..KernelOptions::default() };
    let mut kernel = Kernel::start(options).unwrap();
    kernel.set_lifecycle(true);
    kernel.set_rules(&rules(&[comm("rename*")])).unwrap();
    let mut renamer = Renamer::start();
    for number in 0..200 {
        renamer.tell(&format!("m renamed-{number}"));
    }
    let reported = reports(&mut kernel, renamer.pid()).len() as u64;
    let counts = kernel.counters().unwrap().running;
    assert_eq!(counts.seen, counts.filtered + counts.sent + counts.lost_rate + counts.lost_ring_full);
    assert!(reported < 200 && reported + counts.lost_rate == 200, "{reported}: {counts:?}");
    let other = Renamer::start();
    let started = kernel
        .read()
        .unwrap()
        .into_iter()
        .any(|event| matches!(event, Event::Exec { subject, .. } if subject.key.tgid == other.pid()));
    assert!(started);
}

/// Checks that what is sampled and what the agent explains agree, before and after renames and changes of rules.
#[test]
fn the_explanation_of_a_renamed_process_is_true() {
    let mut renamer = Renamer::start();
    let daemon = Daemon::start(&[]);
    let line = format!("/debug/processes?pid={}", renamer.pid());
    let shows = |what: &str| {
        daemon.wait_for(what, || daemon.page(&line).contains(what));
    };
    let set = |comms: &[&str]| {
        let rule =
            |name: &&str| format!("- id: {name}\n  match: {{comm: [{name}]}}\n  capture: {{hz: 99}}\n");
        daemon.set_rules(&format!("rules:\n{}", comms.iter().map(rule).collect::<String>()));
    };
    set(&["renamed"]);
    shows("not profiled: renamed does not match: its command name is `renamer`");
    renamer.tell("m renamed");
    shows("profiled: wanted by renamed");
    renamer.tell("s");
    set(&["renamed", "another"]);
    shows("profiled: wanted by renamed");
    renamer.tell("m another");
    shows("profiled: wanted by another");
    renamer.tell("m unnamed");
    shows("no rule wants it now: renamed does not match: its command name is `unnamed`");
    renamer.tell("m stranger");
    shows("its command name is `stranger`");
    renamer.tell("m renamed");
    shows("profiled: wanted by renamed");
    // A rule that is gone is not shown for a process that it matched.
    set(&["another"]);
    shows("no rule wants it now: another does not match: its command name is `renamed`");
    daemon.end();
}

const STARTED: &str = "volatile unsigned long n;
__attribute__((noinline)) void started_leaf(void) { for (int i = 0; i < 100000; i++) n += i; }
int main(void) { for (;;) started_leaf(); }";

/// Returns the dynamic linker of this machine.
fn linker() -> PathBuf {
    let candidates = ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"];
    PathBuf::from(candidates.into_iter().find(|path| Path::new(path).exists()).unwrap())
}

/// Checks programs whose name or executable is not that of the file: run by the dynamic linker, by `#!`, with another first
/// argument. Each starts once before the agent, and once after.
#[test]
fn rules_match_however_a_program_is_started() {
    let started = program("started", STARTED, &[]);
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("script");
    fs::write(&script, format!("#!{}\n", started.display())).unwrap();
    fs::set_permissions(&script, Permissions::from_mode(0o755)).unwrap();
    let by_linker = || Running::start(Command::new(linker()).arg(&started));
    let by_script = || Running::start(&mut Command::new(&script));
    let by_name = || Running::start(Command::new(&started).arg0("another"));
    let before = [by_linker(), by_script(), by_name()];
    let daemon = Daemon::start(&[]);
    let after = [by_linker(), by_script(), by_name()];
    let real_linker = fs::canonicalize(linker()).unwrap();
    let linker_name = linker().file_name().unwrap().to_str().unwrap()[..15].to_owned();
    let comm_of_linker = linker_name.as_str();
    let rule = |id: &str, field: &str, value: &str| format!("- id: {id}\n  match: {{{field}: [{value}]}}\n");
    daemon.set_rules(&format!(
        "rules:\n{}{}{}{}{}",
        rule("exe", "exe", started.to_str().unwrap()),
        rule("comm", "comm", "started"),
        rule("script", "comm", "script"),
        rule("linker", "exe", real_linker.to_str().unwrap()),
        rule("comm-of-linker", "comm", comm_of_linker),
    ));
    for group in [&before, &after] {
        for (process, wanted) in group.iter().zip(["linker, comm-of-linker", "exe, script", "exe, comm"]) {
            let line = format!("/debug/processes?pid={}", process.0.id());
            let sorted = |text: &str| {
                let mut names: Vec<String> = text.trim().split(", ").map(str::to_owned).collect();
                names.sort();
                names
            };
            daemon.wait_for(wanted, || {
                let page = daemon.page(&line);
                page.split_once("wanted by ").is_some_and(|(_, names)| sorted(names) == sorted(wanted))
            });
        }
    }
    // Why the linker's process does not match a rule on the program.
    daemon.set_rules(&format!("rules:\n{}", rule("exe", "exe", started.to_str().unwrap())));
    let line = format!("/debug/processes?pid={}", after[0].0.id());
    daemon.wait_for("the reason", || daemon.page(&line).contains("(a dynamic linker runs the program: "));
    daemon.end();
    drop(after);
    // Stacks and names are those of the program.
    for (process, comm) in before.iter().zip([comm_of_linker, "script", "started"]) {
        let recording = record_for(2, 99, &["--pid", &process.0.id().to_string()]);
        let whole = |stack: &[String]| in_order(stack, &[comm, "main", "started_leaf"]) && !is_marked(stack);
        let (good, all) = recording.share("started_leaf", whole);
        let odd = recording.odd_ones("started_leaf", whole);
        // A few samples are from main() itself, which calls the function again and again, and from before its tables are there.
        assert!(
            all > 8 && good == all && all * 20 >= recording.delivered * 19,
            "{good} of {all}, {} delivered: {odd:?}\n{}",
            recording.delivered,
            recording.log
        );
    }
}

/// Checks that samples carry how their process was started if the user asks for it, without its secrets.
#[test]
fn samples_show_how_their_process_was_started() {
    let started = program("started", STARTED, &[]);
    let directory = tempfile::tempdir().unwrap();
    let _running = Running::start(
        Command::new(&started)
            .args(["--port", "80", "--password=hidden-word"])
            .current_dir(&directory)
            .env("APP_VERSION", "1.2")
            .env("DB_PASSWORD", "hidden-word"),
    );
    let labels = |more: &[&str]| {
        let recording = record_for(1, 99, &[&["--comm", "started"], more].concat());
        let text = |index: i64| recording.profile.string_table[usize::try_from(index).unwrap()].as_str();
        let labels = recording.profile.sample.iter().flat_map(|sample| &sample.label);
        let shown: BTreeSet<(String, String)> = labels
            .map(|label| (text(label.key).to_owned(), text(label.str).to_owned()))
            .filter(|(name, _)| ["cmdline", "cwd"].contains(&name.as_str()) || name.starts_with("env_"))
            .collect();
        assert!(!recording.profile.string_table.iter().any(|text| text.contains("hidden-word")));
        shown
    };
    assert_eq!(labels(&[]), BTreeSet::new());
    let all = ["--label-cmdline", "--label-cwd", "--label-env", "APP_VERSION", "--label-env", "DB_PASSWORD"];
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let expected = [
        ("cmdline", format!("{} --port 80 --password=[redacted]", path(&started))),
        ("cwd", path(&fs::canonicalize(&directory).unwrap())),
        ("env_APP_VERSION", "1.2".to_owned()),
        ("env_DB_PASSWORD", "[redacted]".to_owned()),
    ];
    assert_eq!(labels(&all), expected.map(|(name, value)| (name.to_owned(), value)).into());
}

/// Checks each kind of rule on a process whose first thread has ended, started before the agent and after it.
#[test]
fn rules_match_a_process_whose_first_thread_has_ended() {
    let dead_leader = program("dead_leader", DEAD_LEADER, &["-pthread"]);
    let group = Group::new("dead_leader");
    let start = || {
        let mut command = Command::new(enter());
        Running::start(command.args(group.entry_files()).arg("--").arg(&dead_leader))
    };
    let before = start();
    let daemon = Daemon::start(&[]);
    let after = start();
    let rule = |id: &str, field: &str, value: &str| format!("- id: {id}\n  match: {{{field}: [{value}]}}\n");
    daemon.set_rules(&format!(
        "rules:\n{}{}{}",
        rule("exe", "exe", dead_leader.to_str().unwrap()),
        rule("comm", "comm", "dead_leader"),
        rule("group", "cgroup", &group.path),
    ));
    // And while the rules are in force.
    let last = start();
    for process in [&before, &after, &last] {
        let line = format!("/debug/processes?pid={}", process.0.id());
        daemon.wait_for("all three rules, and samples", || {
            let page = daemon.page(&line);
            let fields: Vec<&str> = page.lines().last().unwrap_or_default().split_whitespace().collect();
            let sampled = fields.get(3).is_some_and(|samples| samples.parse::<u64>().is_ok_and(|n| n > 0));
            let wanted = page.split_once("wanted by ").map_or("", |(_, names)| names);
            sampled
                && fields.get(2) == Some(&"dead_leader")
                && ["exe", "comm", "group"].iter().all(|rule| wanted.contains(rule))
        });
    }
    daemon.end();
}
