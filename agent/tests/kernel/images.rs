//! Whatever a process does, its samples belong to the image from which they were taken.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use gannet_agent::{
    engine::{Engine, EngineOptions, EngineView, ProcessView, Unwinding, Window},
    kernel::KernelOptions,
    model::{Image, MappingKind, ProcessKey, SampleKind, StackEnd},
    process::{ProcessState, check_identity},
    profile::RawProcess,
    rules::{RuleSource, SourceRules, ad_hoc},
};
use gannet_proto::control::{Match, capture};

use crate::common::{
    Running,
    cgroup::{Group, enter},
    engine_options, in_order,
    life::{COMM, life, life_as, run},
    program, record, slower,
};

const STORM: &str = include_str!("../../../scripts/storm.c");
/// Long enough for a busy machine.
const TIMEOUT: Duration = Duration::from_secs(60);

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

struct Watch {
    engine: Engine,
    windows: mpsc::Receiver<Window>,
}

impl Watch {
    /// Starts an engine that samples these commands and ends no window by itself.
    fn of(comms: &[&str], hz: u32, kinds: &[capture::Kind], kernel: KernelOptions) -> Self {
        let (send, windows) = mpsc::channel();
        let options = EngineOptions { kernel, ..engine_options() };
        let engine = Engine::start(options, move |window: Window| drop(send.send(window))).unwrap();
        let comm = comms.iter().map(|comm| (*comm).to_owned()).collect();
        let rules = vec![ad_hoc("test", Match { comm, ..Match::default() }, hz, kinds)];
        let partial =
            block_on(engine.replace(RuleSource::Local, SourceRules { rules, ..SourceRules::default() }))
                .unwrap();
        assert!(partial.is_empty(), "{partial:?}");
        Self { engine, windows }
    }

    fn view(&self) -> EngineView {
        block_on(self.engine.view()).unwrap()
    }

    /// Returns the processes that are alive, or only the one with this PID.
    fn alive(&self, pid: Option<u32>) -> Vec<ProcessView> {
        let mut processes = block_on(self.engine.processes(pid)).unwrap();
        processes.retain(|process| !process.is_past);
        processes
    }

    #[track_caller]
    fn wait_for(&self, what: &str, is: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !is(self) {
            assert!(begun.elapsed() < TIMEOUT, "{what}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Stops the reader of the ring buffer while `meanwhile` runs.
    fn blocked<T>(&self, meanwhile: impl FnOnce() -> T) -> T {
        let (go, wait) = mpsc::channel::<()>();
        block_on(self.engine.hold(wait)).unwrap();
        let done = meanwhile();
        drop(go);
        done
    }

    /// Stops the engine and returns its last window.
    #[track_caller]
    fn end(self) -> Window {
        self.engine.stop();
        let window = self.windows.recv().unwrap();
        assert!(self.windows.recv().is_err(), "one window");
        window
    }
}

/// Returns every process of a window with the labels of its series and the kind of its samples.
fn processes(window: &Window) -> Vec<(&RawProcess, &BTreeMap<String, String>, SampleKind)> {
    window
        .profiles
        .iter()
        .flat_map(|profile| {
            profile.raw.processes.iter().map(|process| (process, &profile.labels, profile.raw.kind))
        })
        .collect()
}

fn samples(process: &RawProcess) -> u64 {
    process.stacks.iter().map(|stack| stack.count).sum()
}

/// Returns the files to which addresses of an image belong; `None` for an address outside of its mappings or in a file that is
/// not open.
fn files_of(image: &Image, addresses: &[u64]) -> BTreeSet<Option<String>> {
    addresses
        .iter()
        .map(|address| match &image.find(*address)?.kind {
            MappingKind::File(file) => file.file.is_some().then(|| file.path.clone()),
            MappingKind::Vdso => Some("[vdso]".into()),
            MappingKind::Anon => None,
        })
        .collect()
}

fn name_of(path: &str) -> &str {
    Path::new(path).file_name().unwrap().to_str().unwrap()
}

/// Checks on-CPU and off-CPU samples before, during and after exec (R37, R38, R39).
#[test]
fn samples_from_before_an_exec_keep_the_old_image() {
    let directory = tempfile::tempdir().unwrap();
    let (old, new) = ("gannet-old", "gannet-new");
    let (first, second) = (life_as(directory.path(), old), life_as(directory.path(), new));
    let kinds = [capture::Kind::OnCpu, capture::Kind::OffCpu];
    let watch = Watch::of(&[old, new], 499, &kinds, KernelOptions::default());
    // Exec by the first thread, and by another; each sleeps and spins in both images.
    for how in [["exec", "150"], ["exec", "60"]] {
        let status = Command::new(&first)
            .args(how)
            .args([second.to_str().unwrap(), "exec", "150", second.to_str().unwrap(), "sleep", "30"])
            .status()
            .unwrap();
        assert!(status.success(), "{status}");
    }
    let window = watch.end();
    assert_eq!(window.ledger.taken, window.ledger.delivered, "none lost: {:?}", window.ledger);
    let mut seen: BTreeMap<(&str, bool), u64> = BTreeMap::new();
    for (process, labels, kind) in processes(&window) {
        let exe = name_of(&labels["exe"]);
        assert_eq!(exe, process.comm, "{labels:?}");
        *seen.entry((exe, kind == SampleKind::OnCpu)).or_default() += samples(process);
        for stack in &process.stacks {
            for file in files_of(&process.image, &stack.user).into_iter().flatten() {
                assert!(file == "[vdso]" || name_of(&file) == exe, "{file} in {exe}");
            }
        }
    }
    assert_eq!(seen.values().sum::<u64>(), window.ledger.delivered);
    for image in [old, new] {
        assert!(seen.get(&(image, true)).is_some_and(|n| *n >= 20), "{seen:?}");
        assert!(seen.get(&(image, false)).is_some_and(|n| *n >= 1), "{seen:?}");
    }
}

/// Checks that short processes are symbolized after they have exited (R33, R34).
#[test]
fn processes_of_30_ms_have_executable_container_and_code() {
    let id = "ab".repeat(32);
    let group = Group::new(&format!("docker-{id}.scope"));
    let enter = enter();
    let watch = Watch::of(&[COMM], 199 / slower(), &[], KernelOptions::default());
    let life_ms = (30 * slower()).to_string();
    let spawners: Vec<_> = (0..2)
        .map(|_| {
            let path = life();
            Command::new(&enter)
                .args(group.entry_files())
                .arg("--")
                .args([path.to_str().unwrap(), "spawn", "100", path.to_str().unwrap(), "spin", &life_ms])
                .spawn()
                .unwrap()
        })
        .collect();
    for mut spawner in spawners {
        assert!(spawner.wait().unwrap().success());
    }
    // All of them have exited by now.
    let window = watch.end();
    assert_eq!(window.ledger.taken, window.ledger.delivered, "{:?}", window.ledger);
    let (mut all, mut good) = (0, 0);
    let mut keys = BTreeSet::new();
    for (process, labels, _) in processes(&window) {
        keys.insert(process.key);
        // The series of a container is named after its pod, or without one after the executable.
        let named = labels["service_name"] == COMM && process.container_id == id;
        for stack in &process.stacks {
            all += stack.count;
            if named && files_of(&process.image, &stack.user).iter().all(Option::is_some) {
                good += stack.count;
            }
        }
    }
    assert!(keys.len() >= 190, "{} processes were sampled", keys.len());
    assert!(good * 100 >= all * 99, "{good} of {all}");
}

/// Checks the images of two processes that had the same PID (R27, R36).
#[test]
fn two_processes_with_one_pid_have_their_own_images() {
    let directory = tempfile::tempdir().unwrap();
    let (first, second) =
        (life_as(directory.path(), "gannet-first"), life_as(directory.path(), "gannet-second"));
    let watch = Watch::of(&["gannet-first", "gannet-second"], 499, &[], KernelOptions::default());
    let number =
        (2..30_000).rev().find(|pid| !Path::new(&format!("/proc/{pid}")).exists()).unwrap().to_string();
    run(&["reborn", &number, "60", first.to_str().unwrap(), second.to_str().unwrap()]);
    let window = watch.end();
    let lives: BTreeMap<ProcessKey, &str> = processes(&window)
        .iter()
        .map(|(process, labels, _)| (process.key, name_of(&labels["exe"])))
        .collect();
    assert_eq!(lives.values().copied().collect::<Vec<_>>(), ["gannet-first", "gannet-second"], "{lives:?}");
    assert!(lives.keys().all(|key| key.tgid.to_string() == number));
}

/// Checks that lost exits and lost execs are repaired (R23).
#[test]
fn lost_events_are_noticed_and_repaired() {
    let kernel = KernelOptions { ring_bytes: 1 << 17, ..KernelOptions::default() };
    let watch = Watch::of(&[COMM], 1, &[], kernel);
    let mut parent = Command::new(life())
        .args(["children", "1200"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    BufReader::new(parent.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
    let pid = parent.id();
    watch.wait_for("all children are in the table", |watch| {
        watch.alive(None).iter().filter(|process| process.parent == pid).count() == 1200
    });
    let late = watch.blocked(|| {
        parent.stdin.take().unwrap().write_all(b"!").unwrap();
        assert!(parent.wait().unwrap().success());
        // The ring buffer is full of exits, so that these events are lost.
        let late: Vec<_> =
            (0..5).map(|_| Command::new(life()).args(["sleep", "60000"]).spawn().unwrap()).collect();
        thread::sleep(Duration::from_millis(200));
        late.into_iter().map(Running).collect::<Vec<_>>()
    });
    let lost = gannet_agent::kernel::lifecycle_lost(&watch.view().counters.unwrap());
    assert!(lost > 0);
    let wanted: BTreeSet<u32> = late.iter().map(|child| child.0.id()).collect();
    watch.wait_for("the table holds what runs", |watch| {
        let all = watch.alive(None);
        let alive: BTreeSet<u32> =
            all.iter().filter(|p| p.comm == COMM).map(|p| p.key.process.tgid).collect();
        alive == wanted && all.iter().all(|p| check_identity(p.key.process).is_ok())
    });
    assert!(watch.view().process_stats.reconciled > 0);
}

/// Checks that scans replace missing tracepoints (R25).
#[test]
fn without_tracepoints_scans_find_processes() {
    let without = &["sched_process_exec", "sched_process_exit", "mappings"];
    let watch = Watch::of(&[COMM], 199, &[], KernelOptions { without, ..KernelOptions::default() });
    let degraded = watch.engine.degraded().join(" ");
    assert!(degraded.contains("sched_process_exec") && degraded.contains("sched_process_exit"), "{degraded}");
    is_found_by_scan(&watch);
}

/// Checks `--lifecycle false`: scans find processes, and no handler runs (R26).
#[test]
fn without_lifecycle_events_scans_find_processes() {
    let watch = Watch::of(&[COMM], 199, &[], KernelOptions { lifecycle: false, ..KernelOptions::default() });
    let degraded = watch.engine.degraded().join(" ");
    assert!(degraded.contains("--lifecycle"), "{degraded}");
    is_found_by_scan(&watch);
    // The kill switch does not switch lifecycle events on when it is released.
    block_on(watch.engine.switch_off(Some("a test".into()))).unwrap();
    block_on(watch.engine.switch_off(None)).unwrap();
    is_found_by_scan(&watch);
    let counters = watch.view().counters.unwrap();
    assert_eq!((counters.exec.seen, counters.fork.seen, counters.exit.seen), (0, 0, 0));
}

#[track_caller]
fn is_found_by_scan(watch: &Watch) {
    let mut child = Command::new(life()).args(["spin", "60000"]).spawn().unwrap();
    let pid = child.id();
    watch.wait_for("a scan finds it, and it is read and sampled", |watch| {
        watch.alive(Some(pid)).iter().any(|p| p.samples > 5 && p.exe.ends_with(COMM))
    });
    child.kill().unwrap();
    child.wait().unwrap();
    watch.wait_for("a scan finds its exit", |watch| watch.alive(Some(pid)).is_empty());
}

/// Checks that an answer of the engine knows each image, with its mappings, that was new before the question.
#[test]
fn an_answer_knows_each_image_from_before_the_question() {
    let directory = tempfile::tempdir().unwrap();
    let second = life_as(directory.path(), "gannet-new");
    let watch = Watch::of(&[COMM, "gannet-new"], 99, &[], KernelOptions::default());
    let arguments = ["exec", "1", second.to_str().unwrap(), "sleep", "60000"];
    // No event is read before all of them sleep in their new images.
    let children = watch.blocked(|| {
        let children: Vec<_> =
            (0..10).map(|_| Running::start(Command::new(life()).args(arguments))).collect();
        for child in &children {
            let begun = Instant::now();
            while !sleeps_in(child.0.id(), &second) {
                assert!(begun.elapsed() < TIMEOUT);
                thread::sleep(Duration::from_millis(1));
            }
        }
        children
    });
    let known = watch.alive(None);
    for child in &children {
        let process = known.iter().find(|process| process.key.process.tgid == child.0.id());
        let process = process.unwrap_or_else(|| panic!("{} is in {known:?}", child.0.id()));
        assert_eq!(process.comm, "gannet-new");
        assert!(process.mappings > 0 && process.state != ProcessState::Unread, "{process:?}");
    }
}

/// Returns whether the process executes this program and sleeps. This reads the program first: the process may have slept in
/// the former one.
fn sleeps_in(pid: u32, program: &Path) -> bool {
    let sleeps = || {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('S'))
    };
    std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == program) && sleeps()
}

/// Checks samples from within `execve`, before it has built a stack for the new image (R37).
#[test]
fn in_the_middle_of_execve_there_is_no_user_stack() {
    let program = life();
    let path = program.to_str().unwrap();
    let recording = record(999, &["--", path, "spawn", "2000", path, "exit", "0"]);
    let in_execve = |stack: &[String]| stack.iter().any(|frame| frame.contains("load_elf_binary"));
    let taken: Vec<_> = recording.stacks.iter().filter(|(stack, _)| in_execve(stack)).collect();
    // Below the kernel's frames is only the command name or, once the new registers are set, their address.
    let entered =
        |frame: &str| ["entry_", "asm_", "ret_from_", "_start"].iter().any(|entry| frame.starts_with(entry));
    let wrong: Vec<_> = taken.iter().filter(|(stack, _)| !entered(&stack[1])).collect();
    let count =
        |stacks: &mut dyn Iterator<Item = &(Vec<String>, u64)>| stacks.map(|(_, count)| count).sum::<u64>();
    let (all, wrong_ones) = (count(&mut taken.iter().copied()), count(&mut wrong.iter().copied().copied()));
    // Some dozen instructions lie between the last mapping and the new registers.
    assert!(all >= 20 && wrong_ones * 20 <= all, "{wrong_ones} of {all}: {wrong:?}");
    // Nor is there a sample of the process that waited to execute the command.
    assert!(recording.stacks.iter().all(|(stack, _)| stack[0] == COMM), "{:?}", recording.stacks);
}

/// Checks samples that are still in the ring buffer when their process exits (R46).
#[test]
fn samples_queued_at_the_exit_of_a_process_are_delivered() {
    let watch = Watch::of(&[COMM], 999 / slower(), &[], KernelOptions::default());
    let mut child = Command::new(life()).args(["spin", &(2500 * slower()).to_string()]).spawn().unwrap();
    let pid = child.id();
    watch.wait_for("the kernel side unwinds its stacks", |watch| {
        watch.alive(Some(pid)).iter().any(|process| process.unwinding == Unwinding::Kernel)
    });
    let before = watch.view().ledger.taken;
    watch.blocked(|| assert!(child.wait().unwrap().success()));
    let window = watch.end();
    assert_eq!(window.ledger.taken, window.ledger.delivered, "{:?}", window.ledger);
    assert!(window.ledger.delivered - before >= 1000, "{before} of {:?}", window.ledger);
    let named: u64 = processes(&window)
        .iter()
        .filter(|(process, labels, _)| process.key.tgid == pid && name_of(&labels["exe"]) == COMM)
        .map(|(process, ..)| samples(process))
        .sum();
    assert_eq!(named, window.ledger.delivered);
}

/// Checks a storm of short processes, the short form of `scripts/bench-storm` (R34).
#[test]
fn a_storm_of_short_processes_is_profiled_completely() {
    let storm = program("gannet-storm", STORM, &[]);
    let directory = tempfile::tempdir().unwrap();
    let child = directory.path().join("storm-child");
    std::fs::copy(&storm, &child).unwrap();
    let watch = Watch::of(&["storm-child"], 499, &[], KernelOptions::default());
    let (a_second, seconds) = (100 / slower(), 5 * slower());
    let due = || watch.view().ticks.unwrap().due;
    let (due_before, fired_before) = (due(), watch.view().ledger.ticks);
    let output = Command::new(&storm)
        .args([a_second.to_string(), seconds.to_string()])
        .arg(&child)
        .arg("4")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    // A machine that is short of CPU time withholds ticks from all processes alike.
    let fired = (watch.view().ledger.ticks - fired_before) as f64 / (due() - due_before) as f64;
    let account: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let window = watch.end();
    assert_eq!(window.ledger.taken, window.ledger.delivered, "{:?}", window.ledger);
    let (mut all, mut named, mut user, mut rooted, mut in_main) = (0, 0, 0, 0, 0);
    for (process, labels, _) in processes(&window) {
        let exe = labels.get("exe").is_some_and(|exe| name_of(exe) == "storm-child");
        for stack in &process.stacks {
            all += stack.count;
            if exe && files_of(&process.image, &stack.user).iter().all(Option::is_some) {
                named += stack.count;
            }
            // The entry point is in every stack behind the dynamic linker, and alone in those of exit().
            let own = |address: &&u64| {
                let files = files_of(&process.image, &[**address]);
                files.iter().flatten().any(|path| name_of(path) == "storm-child")
            };
            if stack.user.iter().filter(own).count() >= 2 {
                in_main += stack.count;
            }
            if !stack.user.is_empty() {
                user += stack.count;
                rooted += if stack.end == StackEnd::Complete { stack.count } else { 0 };
            }
        }
    }
    // Each process has counted its CPU time in main().
    let ticks = account["main_seconds"].as_f64().unwrap() * 499.0 * fired;
    assert!(
        in_main as f64 >= ticks * 0.9,
        "{in_main} samples in main of {ticks} ticks: {account}, {fired} of the ticks fired"
    );
    assert!(named * 100 >= all * 99, "{named} of {all} have their code");
    assert!(rooted * 100 >= user * 95, "{rooted} of {user} are complete");
}

#[test]
fn a_program_of_30_ms_is_recorded_from_its_start() {
    let program = life();
    let recording = record(999, &["--", program.to_str().unwrap(), "spin", "30"]);
    let (complete, all) =
        recording.share("spin_here", |stack| in_order(stack, &["_start", "main", "spin_here"]));
    assert!(all >= 10 && complete * 100 >= all * 95, "{complete} of {all}: {:?}", recording.stacks);
    assert!(recording.lost.values().all(|lost| *lost == 0), "{:?}", recording.lost);
}
