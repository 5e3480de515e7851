//! How the kernel side reports processes that start, change and exit.

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::{BufRead as _, BufReader, Write as _},
    os::unix::{fs::MetadataExt as _, process::ExitStatusExt as _},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use gannet_agent::{
    kernel::{
        Event, Kernel, KernelOptions, KernelRules, LifecycleCounts, NamePattern, handlers_are_preemptible,
        lifecycle_lost,
    },
    model::{MappingEvent, ProcessKey},
    process::check_identity,
};

use rstest::rstest;

use crate::common::{
    Running, agent,
    life::{COMM, life, life_as, run},
};

/// Long enough for a busy machine.
const TIMEOUT: Duration = Duration::from_secs(60);

fn rules_for(comms: &[&str], hz: u64) -> KernelRules {
    let name = |comm: &str| NamePattern { text: comm.into(), prefix: false };
    let mut rules = KernelRules::for_comm(name(comms[0]), 1_000_000_000 / hz);
    rules.comms = comms.iter().map(|comm| (name(comm), 1)).collect();
    rules
}

/// Builds rules for which every process is a candidate, so that the agent decides.
fn every_process() -> KernelRules {
    let mut rules = rules_for(&["nobody"], 1);
    rules.masks.any_comm = 1;
    rules.masks.by_agent = 1;
    rules
}

fn kernel_with(options: KernelOptions, rules: &KernelRules) -> Kernel {
    let mut kernel = Kernel::start(options).unwrap();
    kernel.set_lifecycle(true);
    kernel.set_sampling(true);
    kernel.set_rules(rules).unwrap();
    kernel
}

fn kernel(comms: &[&str], hz: u64) -> Kernel {
    let kernel = kernel_with(KernelOptions::default(), &rules_for(comms, hz));
    assert_eq!(kernel.degraded(), &[] as &[String]);
    kernel
}

/// Reads events until `enough` holds for all of them.
#[track_caller]
fn read_until(kernel: &mut Kernel, enough: impl Fn(&[Event]) -> bool) -> Vec<Event> {
    let begun = Instant::now();
    let mut events = Vec::new();
    loop {
        events.extend(kernel.read().unwrap());
        if enough(&events) {
            return events;
        }
        assert!(begun.elapsed() < TIMEOUT, "{events:?}");
        sleep(Duration::from_millis(5));
    }
}

fn exit_of(events: &[Event], pid: u32) -> Option<(u32, u32)> {
    let mut exits = events.iter().filter_map(|event| match event {
        Event::Exit { subject, status, .. } if subject.key.tgid == pid => {
            Some((status.code(), status.signal()))
        }
        _ => None,
    });
    let first = exits.next();
    assert_eq!(exits.next(), None, "one exit");
    first
}

fn tgid_of(event: &Event) -> u32 {
    match event {
        Event::Sample(sample) => sample.subject.key.tgid,
        Event::Mapping(MappingEvent::Cleared { tgid, .. } | MappingEvent::Mapped { tgid, .. }) => *tgid,
        Event::Exec { subject, .. }
        | Event::Fork { subject, .. }
        | Event::Exit { subject, .. }
        | Event::Function { subject, .. }
        | Event::Labels { subject, .. }
        | Event::Running { subject, .. } => subject.key.tgid,
    }
}

fn balance(counts: &LifecycleCounts) -> u64 {
    counts.filtered + counts.sent + counts.lost_rate + counts.lost_ring_full
}

/// Checks that a process exits with its last thread, not with its leader (R16), and that its exit event has the status of
/// `wait(2)` (R21).
#[test]
fn a_process_exits_with_its_last_thread_and_its_status() {
    let mut kernel = kernel(&[COMM], 99);
    let start = |arguments: &[&str]| Command::new(life()).args(arguments).spawn().unwrap();
    let mut worker = start(&["leader-leaves", "1500"]);
    let mut others = [
        (start(&["exit", "7"]), Some((7, 0))),
        (start(&["kill-self", "9"]), Some((0, 9))),
        (start(&["kill-self", "15"]), Some((0, 15))),
        // The status is that of the last thread on some kernels, and that of the leader on others.
        (start(&["last-thread", "50"]), None),
    ];
    let pids: Vec<u32> = others.iter().map(|(child, _)| child.id()).collect();
    let mut events = read_until(&mut kernel, |events| pids.iter().all(|pid| exit_of(events, *pid).is_some()));
    for (child, wanted) in &mut others {
        let status = child.wait().unwrap();
        let reported = exit_of(&events, child.id());
        let waited = (status.code().unwrap_or(0) as u32, status.signal().unwrap_or(0) as u32);
        assert_eq!(reported, Some(waited), "as wait(2) returns it");
        assert!(wanted.is_none_or(|wanted| waited == wanted), "{status}");
    }
    // The leader is a zombie by now, and another thread still runs.
    if worker.try_wait().unwrap().is_none() {
        events.extend(kernel.read().unwrap());
        if worker.try_wait().unwrap().is_none() {
            assert_eq!(exit_of(&events, worker.id()), None, "a thread of it is alive");
        }
    }
    assert_eq!(worker.wait().unwrap().code(), Some(5));
    let more = read_until(&mut kernel, |events| exit_of(events, worker.id()).is_some());
    assert_eq!(exit_of(&more, worker.id()), Some((5, 0)));
}

/// Checks that many threads that exit at once make one event (R17).
#[test]
fn each_process_has_one_exit_event() {
    let mut kernel = kernel(&[COMM], 1);
    kernel.set_sampling(false);
    let mut crowd = Command::new(life()).args(["crowd", "1000"]).spawn().unwrap();
    let ended = |events: &[Event]| exit_of(events, crowd.id()).is_some();
    let begun = Instant::now();
    let mut events = Vec::new();
    while !ended(&events) {
        assert!(begun.elapsed() < 5 * TIMEOUT);
        events.extend(kernel.read().unwrap());
        sleep(Duration::from_millis(5));
    }
    assert_eq!(crowd.wait().unwrap().code(), Some(0));
    let exits: Vec<ProcessKey> = events
        .iter()
        .filter_map(|event| match event {
            Event::Exit { subject, origin, status } if origin.parent == crowd.id() => {
                assert_eq!((status.code(), status.signal()), (1, 0));
                Some(subject.key)
            }
            _ => None,
        })
        .collect();
    assert_eq!(exits.len(), 1000);
    assert_eq!(exits.iter().collect::<HashSet<_>>().len(), 1000, "each once");
    let counters = kernel.counters().unwrap();
    assert_eq!(lifecycle_lost(&counters), 0);
    assert_eq!(counters.procs_full, 0);
}

/// Checks that each event is reported (R17) or bounded by the kernel's skip counters (R23).
#[rstest]
#[case::one_handler(false, &[])]
#[case::redundant(true, &[])]
#[case::the_second_alone(true, &["on_exec", "on_fork", "on_exit"])]
fn an_event_is_reported_once_or_counted_as_skipped(
    #[case] redundant_handlers: bool,
    #[case] without: &'static [&'static str],
) {
    const PARENTS: usize = 4;
    const CHILDREN: usize = 250;
    let options =
        KernelOptions { redundant_handlers, without, report_rate: 1_000_000, ..KernelOptions::default() };
    let mut kernel = kernel_with(options, &rules_for(&[COMM], 1));
    kernel.set_sampling(false);
    let program = life();
    let mut parents: Vec<_> = (0..PARENTS)
        .map(|_| {
            let arguments = ["spawn", &CHILDREN.to_string(), program.to_str().unwrap(), "exit", "0"];
            Running::start(Command::new(&program).args(arguments))
        })
        .collect();
    let pids: HashSet<u32> = parents.iter().map(|parent| parent.0.id()).collect();
    let mut events = Vec::new();
    let begun = Instant::now();
    while parents.iter_mut().any(|parent| parent.0.try_wait().unwrap().is_none()) {
        assert!(begun.elapsed() < 5 * TIMEOUT);
        events.extend(kernel.read().unwrap());
        sleep(Duration::from_millis(5));
    }
    events.extend(kernel.read().unwrap());
    let mut reported: HashMap<&str, Vec<ProcessKey>> = HashMap::new();
    for event in &events {
        let (kind, subject, parent) = match event {
            Event::Exec { subject, origin, .. } => ("exec", subject, origin.parent),
            Event::Fork { subject, origin } => ("fork", subject, origin.parent),
            Event::Exit { subject, origin, .. } => ("exit", subject, origin.parent),
            _ => continue,
        };
        if pids.contains(&parent) {
            reported.entry(kind).or_default().push(subject.key);
        }
    }
    let counters = kernel.counters().unwrap();
    let programs = kernel.programs();
    let skips = |name: &str| programs.iter().find(|cost| cost.name == name).map(|cost| cost.skipped);
    // The exit of a child is reported only if its fork or its exec was.
    let known = reported["fork"].iter().chain(&reported["exec"]).collect::<HashSet<_>>().len();
    let all = PARENTS * CHILDREN;
    for (kind, happened, counts) in
        [("fork", all, &counters.fork), ("exec", all, &counters.exec), ("exit", known, &counters.exit)]
    {
        let keys = &reported[kind];
        let once = keys.iter().collect::<HashSet<_>>().len();
        let first = format!("on_{kind}");
        let attached = [
            (!without.contains(&first.as_str())).then_some(first),
            redundant_handlers.then(|| format!("on_{kind}_again")),
        ];
        let skipped = attached.into_iter().flatten().map(|name| skips(&name).unwrap()).min().unwrap();
        let what = format!(
            "{kind}: {once} of {happened} reported, {} times, {skipped} skipped, {counts:?}",
            keys.len()
        );
        eprintln!("{what}");
        assert!(once <= happened && once as u64 + skipped >= happened as u64, "{what}");
        // A kernel that can preempt one of the handlers may report an event by both.
        let often = if handlers_are_preemptible() { once / 20 } else { 0 };
        assert!(keys.len() <= once + often, "{what}");
        if without.is_empty() {
            assert_eq!(counts.skipped, skipped, "{what}");
        }
        assert_eq!(counts.seen, balance(counts), "{what}");
    }
    assert_eq!(lifecycle_lost(&counters), 0);
}

/// Checks the exec of a thread that is not the leader (R18).
#[test]
fn exec_by_a_thread_is_one_exec_and_no_exit() {
    let mut kernel = kernel(&[COMM], 99);
    let program = life();
    let mut child =
        Command::new(&program).args(["thread-exec", program.to_str().unwrap(), "exit", "4"]).spawn().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(4));
    let events = read_until(&mut kernel, |events| exit_of(events, child.id()).is_some());
    let its: Vec<&Event> = events.iter().filter(|event| tgid_of(event) == child.id()).collect();
    let execs: Vec<(bool, u32, ProcessKey)> = its
        .iter()
        .filter_map(|event| match event {
            Event::Exec { subject, by_thread, .. } => Some((*by_thread, subject.exec_id, subject.key)),
            _ => None,
        })
        .collect();
    let [(false, first, key), (true, second, same)] = execs.as_slice() else { panic!("{execs:?}") };
    assert_eq!((*second, *same), (first + 1, *key), "the same process, its next image");
    let last = its.iter().rev().find(|event| !matches!(event, Event::Sample(_)));
    assert!(matches!(last, Some(Event::Exit { .. })), "only samples of its last work come after the exit");
}

/// Checks that handlers do nothing, not even count, while lifecycle events are off (R19).
#[test]
fn the_switch_stops_the_handlers_before_all_other_work() {
    let mut kernel = kernel(&[COMM], 1);
    kernel.set_sampling(false);
    let program = life();
    let spawn = ["spawn", "1000", program.to_str().unwrap(), "exit", "0"];
    kernel.set_lifecycle(false);
    kernel.read().unwrap();
    let before = kernel.counters().unwrap();
    run(&spawn);
    let after = kernel.counters().unwrap();
    let mut events = kernel.read().unwrap();
    events.retain(|event| !matches!(event, Event::Mapping(_)));
    assert_eq!(events, [], "off: nothing is written");
    assert_eq!(
        (after.exec.seen, after.fork.seen, after.exit.seen),
        (before.exec.seen, before.fork.seen, before.exit.seen)
    );
    kernel.set_lifecycle(true);
    run(&["spawn", "10", program.to_str().unwrap(), "exit", "0"]);
    let ended = |events: &[Event]| {
        events
            .iter()
            .filter(|event| matches!(event, Event::Exit { subject, .. } if subject.comm == COMM))
            .count()
    };
    read_until(&mut kernel, |events| ended(events) >= 10);
}

/// Checks the filter and the rate limit of reports, and that the counters balance (R20).
#[test]
fn reports_are_filtered_bounded_and_all_counted() {
    // Fewer than the slowest machine executes.
    const RATE: u64 = 100;
    let options = KernelOptions { report_rate: RATE, ..KernelOptions::default() };
    let mut kernel = kernel_with(options, &every_process());
    kernel.set_sampling(false);
    kernel.read().unwrap();
    let before = kernel.counters().unwrap();
    let begun = Instant::now();
    let program = life();
    let mut read = 0;
    for _ in 0..10 {
        run(&["spawn", "1000", program.to_str().unwrap(), "exit", "0"]);
        let events = kernel.read().unwrap();
        read += events.iter().filter(|event| matches!(event, Event::Exec { .. })).count() as u64;
    }
    // An exec of another process is in one of the two reads.
    kernel.set_lifecycle(false);
    read += kernel.read().unwrap().iter().filter(|event| matches!(event, Event::Exec { .. })).count() as u64;
    let tenths = begun.elapsed().as_millis() as u64 / 100;
    let counters = kernel.counters().unwrap();
    assert!(counters.exec.seen + counters.exec.skipped - before.exec.seen >= 10_000);
    for counts in [&counters.exec, &counters.fork, &counters.exit, &counters.running] {
        assert_eq!(counts.seen, balance(counts), "{counts:?}");
    }
    let sent = counters.exec.sent + counters.fork.sent - before.exec.sent - before.fork.sent;
    assert_eq!(counters.exec.sent - before.exec.sent, read);
    // Two CPUs that race may each take the last token.
    assert!(sent <= (tenths + 2) * (RATE / 10 + 1) * 11 / 10, "{sent} in {tenths} tenths of a second");
    assert!(counters.exec.lost_rate - before.exec.lost_rate > 0, "{:?}", counters.exec);

    // Without a rule for every process, an unmatched one is not even a candidate.
    kernel.set_lifecycle(true);
    kernel.set_rules(&rules_for(&["nobody"], 1)).unwrap();
    let before = kernel.counters().unwrap();
    run(&["spawn", "1000", program.to_str().unwrap(), "exit", "0"]);
    let after = kernel.counters().unwrap();
    assert!(after.exec.filtered - before.exec.filtered >= 990, "{before:?} {after:?}");
    assert_eq!(after.exec.seen, balance(&after.exec));
}

/// Checks the fields of an exec event against `/proc` (R21).
#[test]
fn an_exec_event_has_process_parent_path_and_file() {
    let mut kernel = kernel(&[COMM], 99);
    let program = life();
    let mut child = Command::new(&program).args(["sleep", "20000"]).spawn().unwrap();
    let pid = child.id();
    let events = read_until(&mut kernel, |events| {
        events.iter().any(|event| matches!(event, Event::Exec { subject, .. } if subject.key.tgid == pid))
    });
    let Some(Event::Exec { subject, path, by_thread, origin, file }) =
        events.iter().find(|event| matches!(event, Event::Exec { subject, .. } if subject.key.tgid == pid))
    else {
        panic!("{events:?}")
    };
    assert_eq!((subject.comm.as_str(), path.as_str(), *by_thread), (COMM, program.to_str().unwrap(), false));
    assert_eq!((origin.parent, origin.uid), (std::process::id(), rustix::process::geteuid().as_raw()));
    assert_eq!(file.inode, fs::metadata(&program).unwrap().ino());
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let device = format!("{:02x}:{:02x}", rustix::fs::major(file.dev), rustix::fs::minor(file.dev));
    assert!(
        maps.lines().any(|line| line.contains(&format!(" {device} {} ", file.inode))),
        "{device} {}: {maps}",
        file.inode
    );
    check_identity(subject.key).unwrap();
    let clock = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let now = clock.tv_sec as u64 * 1_000_000_000 + clock.tv_nsec as u64;
    assert!(subject.key.start_boottime_ns <= subject.ktime_ns && subject.ktime_ns <= now);
    assert_ne!(subject.cgroup_id, 0);
    child.kill().unwrap();
    child.wait().unwrap();
    let events = read_until(&mut kernel, |events| exit_of(events, pid).is_some());
    assert_eq!(exit_of(&events, pid), Some((0, 9)));
    let Some(Event::Exit { subject: exited, .. }) =
        events.iter().find(|event| matches!(event, Event::Exit { subject, .. } if subject.key.tgid == pid))
    else {
        panic!("{events:?}")
    };
    assert_eq!((exited.key, exited.exec_id), (subject.key, subject.exec_id));
}

/// Checks that records, which are in the order of their reservation, are in the order of kernel time (R22).
#[test]
fn the_order_of_the_ring_buffer_is_that_of_kernel_time() {
    let mut kernel = kernel(&[COMM], 999);
    let program = life();
    let path = program.to_str().unwrap();
    let children: Vec<_> = (0..6)
        .map(|i| {
            let arguments: &[&str] = match i % 3 {
                0 => &["thread-exec", path, "forks", "10", "5"],
                1 => &["exec", "30", path, "exec", "10", path, "spin", "20"],
                _ => &["forks", "15", "5"],
            };
            Command::new(&program).args(arguments).spawn().unwrap()
        })
        .collect();
    let pids: Vec<u32> = children.iter().map(std::process::Child::id).collect();
    let events = read_until(&mut kernel, |events| pids.iter().all(|pid| exit_of(events, *pid).is_some()));
    for mut child in children {
        child.wait().unwrap();
    }
    let mut images: HashMap<ProcessKey, u32> = HashMap::new();
    let mut ended: HashMap<ProcessKey, u64> = HashMap::new();
    let (mut samples, mut overtaken) = (0, 0);
    for event in &events {
        match event {
            Event::Exec { subject, .. } => {
                assert!(!ended.contains_key(&subject.key));
                let before = images.insert(subject.key, subject.exec_id);
                assert!(before.is_none_or(|before| before < subject.exec_id));
            }
            Event::Exit { subject, .. } => {
                assert_eq!(ended.insert(subject.key, subject.ktime_ns), None);
            }
            Event::Sample(sample) => {
                samples += 1;
                let subject = &sample.subject;
                if let Some(image) = images.get(&subject.key) {
                    assert!(subject.exec_id >= *image, "a sample of a replaced image");
                }
                // A process still uses the CPU after its exit event, but no earlier sample may come after that event. A
                // thread may be held up between its reading of the clock and the reservation of the record.
                overtaken += u32::from(ended.get(&subject.key).is_some_and(|end| subject.ktime_ns < *end));
            }
            _ => {}
        }
    }
    assert!(overtaken * 200 <= samples, "{overtaken} of {samples} were overtaken by the exit");
    assert!(samples > 100, "{samples}");
    assert_eq!(ended.len(), ended.keys().collect::<HashSet<_>>().len());
    let counters = kernel.counters().unwrap();
    assert_eq!((counters.taken, lifecycle_lost(&counters)), (counters.sent, 0));
}

/// Checks that a missing tracepoint is reported and costs only its own events (R25).
#[test]
fn without_a_tracepoint_the_rest_works_and_is_reported() {
    let options = KernelOptions { without: &["sched_process_exec"], ..KernelOptions::default() };
    let mut kernel = kernel_with(options, &rules_for(&[COMM], 99));
    assert!(
        matches!(kernel.degraded(), [one] if one.contains("sched_process_exec")),
        "{:?}",
        kernel.degraded()
    );
    let mut child = Command::new(life()).args(["spin", "400"]).spawn().unwrap();
    sleep(Duration::from_millis(50));
    kernel.scan_processes().unwrap();
    child.wait().unwrap();
    let events = read_until(&mut kernel, |events| exit_of(events, child.id()).is_some());
    assert!(
        events
            .iter()
            .any(|event| matches!(event, Event::Running { subject, .. } if subject.key.tgid == child.id())),
        "{events:?}"
    );
    assert!(events.iter().any(|event| matches!(event, Event::Sample(_))));
}

/// Checks that samples and events of a reused PID belong to the right process (R27).
#[test]
fn two_processes_with_one_pid_stay_apart() {
    let directory = tempfile::tempdir().unwrap();
    let (first, second) =
        (life_as(directory.path(), "gannet-first"), life_as(directory.path(), "gannet-second"));
    let mut kernel = kernel(&["gannet-first", "gannet-second"], 199);
    // A PID that is free and stays free for a while: the kernel assigns PIDs in turn.
    let number = (2..30_000).rev().find(|pid| !fs::exists(format!("/proc/{pid}")).unwrap()).unwrap();
    run(&["reborn", &number.to_string(), "60", first.to_str().unwrap(), second.to_str().unwrap()]);
    let count = |events: &[Event]| {
        events
            .iter()
            .filter(|event| matches!(event, Event::Exit { subject, .. } if subject.key.tgid == number))
            .count()
    };
    let events = read_until(&mut kernel, |events| count(events) == 2);
    let mut lives: HashMap<ProcessKey, HashSet<&str>> = HashMap::new();
    let mut sampled: HashMap<ProcessKey, u64> = HashMap::new();
    for event in &events {
        match event {
            Event::Exec { subject, .. } | Event::Exit { subject, .. } if subject.key.tgid == number => {
                lives.entry(subject.key).or_default().insert(&subject.comm);
            }
            Event::Sample(sample) if sample.subject.key.tgid == number => {
                lives.entry(sample.subject.key).or_default().insert(&sample.subject.comm);
                *sampled.entry(sample.subject.key).or_default() += 1;
            }
            _ => {}
        }
    }
    assert_eq!(lives.len(), 2, "{lives:?}");
    assert!(lives.values().all(|comms| comms.len() == 1), "each has its own name: {lives:?}");
    assert_eq!(sampled.len(), 2, "{sampled:?}");
}

/// Checks that the start times of BPF and of `/proc` name the same process (R28).
#[test]
fn start_times_of_the_kernel_and_of_proc_agree() {
    let comm = fs::read_to_string("/proc/self/comm").unwrap().trim_end().to_owned();
    let mut parent = Command::new(life())
        .args(["children", "100"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    BufReader::new(parent.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
    let mut kernel = kernel(&[COMM, &comm], 1);
    let events = kernel.read().unwrap();
    let keys: HashSet<ProcessKey> = events
        .iter()
        .filter_map(|event| match event {
            Event::Running { subject, origin } => {
                let ours = origin.parent == parent.id() || subject.key.tgid == std::process::id();
                ours.then_some(subject.key)
            }
            _ => None,
        })
        .collect();
    assert_eq!(keys.len(), 101);
    for key in &keys {
        check_identity(*key).unwrap();
        let other = ProcessKey { start_boottime_ns: key.start_boottime_ns + 20_000_000, ..*key };
        assert!(check_identity(other).is_err(), "two ticks later is another process");
    }
    parent.stdin.take().unwrap().write_all(b"!").unwrap();
    parent.wait().unwrap();
}

/// Checks start times in a time namespace with another boot clock (R28).
#[test]
fn start_times_agree_in_a_time_namespace() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out.folded");
    // With a wrong key the agent could read nothing of the process, and its function would have no name.
    let done = Command::new(life())
        .args(["later", "86400", agent().to_str().unwrap(), "record", "--hz", "199", "-o"])
        .arg(&out)
        .arg("--")
        .arg(life())
        .args(["spin", "300"])
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
    let text = fs::read_to_string(out).unwrap();
    assert!(text.lines().any(|line| line.contains("spin_here")), "{text}");
}
