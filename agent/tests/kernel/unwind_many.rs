//! Many processes that hardly run, tables that do not all fit, and the state of processes that have ended. The engine runs in
//! the test itself. Needs root, a kernel with BTF, and gcc.

use std::{
    env, fs,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use gannet_agent::{
    engine::{Engine, EngineOptions, Window},
    kernel::{Counters, KernelOptions, UnwindDriver},
    model::{MappingKind, StackEnd},
    profile::RawProcess,
    rules::{RuleSource, SourceRules, ad_hoc},
    tables::TableStats,
};
use gannet_proto::control::{Match, capture};

use crate::{
    common::{Running, engine_options, idle_functions, program, slower},
    daemon::Daemon,
};

/// An engine, and the windows that it finished.
struct Machine {
    engine: Engine,
    windows: Arc<Mutex<Vec<Window>>>,
    runtime: tokio::runtime::Runtime,
}

impl Machine {
    fn start(kernel: KernelOptions) -> Self {
        let windows = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&windows);
        let options = EngineOptions { kernel, window: Duration::from_secs(600), ..engine_options() };
        let engine = Engine::start(options, move |window| kept.lock().unwrap().push(window)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        Self { engine, windows, runtime }
    }

    fn sample(&self, matches: Match, hz: u32) {
        self.sample_kind(matches, hz, capture::Kind::OnCpu);
    }

    fn sample_kind(&self, matches: Match, hz: u32, kind: capture::Kind) {
        let rules = vec![ad_hoc("test", matches, hz, &[kind])];
        self.runtime
            .block_on(self.engine.replace(RuleSource::Local, SourceRules { rules, ..SourceRules::default() }))
            .unwrap();
    }

    /// Returns the counters, the counts of tables, and the entries of the mapping trie and of the images.
    fn look(&self) -> (Counters, TableStats, (usize, usize)) {
        self.runtime.block_on(async {
            let view = self.engine.view().await.unwrap();
            let entries = self.engine.unwind_entries().await.unwrap();
            (view.counters.unwrap(), view.unwind_tables.unwrap(), entries)
        })
    }

    /// Returns the counters while no tick is running; then continues sampling, or not.
    fn stand_still(&self, go_on: bool) -> Counters {
        self.runtime.block_on(async {
            self.engine.set_sampling(false).await.unwrap();
            // A tick that has begun ends within microseconds; on an emulated machine, later.
            std::thread::sleep(Duration::from_millis(200));
            let counters = self.engine.view().await.unwrap().counters.unwrap();
            self.engine.set_sampling(go_on).await.unwrap();
            counters
        })
    }

    /// Stops sampling. Returns the stacks of processes of this command name, and the number of lost samples.
    fn finish(self, comm: &str) -> (Vec<RawProcess>, u64) {
        self.engine.stop();
        let mut lost = 0;
        let mut found = Vec::new();
        for window in self.windows.lock().unwrap().drain(..) {
            lost += window.ledger.lost_total();
            let processes = window.profiles.into_iter().flat_map(|profile| profile.raw.processes);
            found.extend(processes.filter(|process| process.comm == comm));
        }
        (found, lost)
    }

    #[track_caller]
    fn until(&self, what: &str, mut is_so: impl FnMut(&Self) -> bool) {
        let begin = Instant::now();
        while !is_so(self) {
            assert!(begin.elapsed() < Duration::from_secs(60), "{what}: {:?}", self.look());
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn quietly(command: &mut Command) -> Running {
    Running::start(command.stdin(Stdio::null()).stdout(Stdio::null()))
}

const LIBRARY: &str = "volatile long sink;\n\
    #define N(a, b) __attribute__((noinline)) static long a(long n) { long r = b(n); sink += r; return r + 1; }\n\
    __attribute__((noinline)) static long work(long n) { for (long i = 0; i < n; i++) sink += i; return sink; }\n\
    N(l5, work) N(l4, l5) N(l3, l4) N(l2, l3) N(l1, l2)\n\
    long enter(long n) { long r = l1(n); return r + 1; }\n";

const WAKER: &str = "#include <dlfcn.h>\n#include <time.h>\n#include <unistd.h>\nvolatile long sink;\n\
    static long now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1000000000L + t.tv_nsec; }\n\
    int main(int c, char **v) { long (*f[16])(long); int n = 0;\n\
    for (int i = 1; i < c; i++) { void *l = dlopen(v[i], RTLD_NOW); if (!l) return 1; f[n++] = (long (*)(long))dlsym(l, \"enter\"); }\n\
    for (long i = 0;; i++) { usleep(500000); long until = now() + 500000; while (now() < until) sink += f[i % n](2000); } }\n";

/// The number of processes that wake; a benchmark uses more.
fn wakers() -> usize {
    env::var("GANNET_TEST_WAKERS").map_or(100 / slower() as usize, |text| text.parse().unwrap())
}

#[test]
fn every_tick_that_hits_one_of_many_processes_is_a_whole_stack() {
    let directory = tempfile::tempdir().unwrap();
    let library = program("waker-lib.so", LIBRARY, &["-shared", "-fPIC"]);
    // Ten libraries: files of their own, so that none is mapped twice.
    let libraries: Vec<_> = (0..10).map(|n| directory.path().join(format!("waker-lib-{n}.so"))).collect();
    for path in &libraries {
        fs::copy(&library, path).unwrap();
    }
    let waker = program("waker", WAKER, &["-ldl"]);
    let _running: Vec<Running> =
        (0..wakers()).map(|_| quietly(Command::new(&waker).args(&libraries))).collect();
    let machine = Machine::start(KernelOptions::default());
    machine.sample(Match { comm: vec!["*".into()], ..Match::default() }, 199 / slower());
    // Count from the moment when the rule is in force: the clocks tick a little earlier.
    let before = machine.stand_still(true);
    std::thread::sleep(Duration::from_secs(6) * slower());
    let after = machine.stand_still(false);
    let (taken, sent) = (after.taken - before.taken, after.sent - before.sent);
    let hits = (after.ticks - before.ticks) - (after.idle_ticks - before.idle_ticks);
    assert_eq!(taken, hits, "every tick that hit a process");
    assert_eq!(taken, sent);
    let (found, lost) = machine.finish("waker");
    assert_eq!(lost, 0);
    let mut all = 0;
    let mut in_library = 0;
    for process in &found {
        for stack in &process.stacks {
            all += stack.count;
            assert!(
                stack.end == StackEnd::Complete,
                "{stack:x?} {:x?}",
                process.image.mappings.iter().map(|m| (m.start, m.end)).collect::<Vec<_>>()
            );
            in_library += u64::from(stack.user.iter().any(|address| {
                process.image.find(*address).is_some_and(|mapping| {
                    matches!(&mapping.kind, MappingKind::File(file) if file.path.contains("waker-lib"))
                })
            }));
        }
    }
    assert!(all >= 20 && in_library * 4 > all, "{in_library} in a library, of {all}");
}

/// Checks a node whose tables do not fit: 600 libraries and one with much unwind data in 100 processes, 128 KiB for tables. The
/// daemon goes on with complete stacks and a quiet log.
#[test]
fn six_hundred_libraries_in_little_room_have_complete_stacks() {
    let directory = tempfile::tempdir().unwrap();
    let library = program("crowd-lib.so", LIBRARY, &["-shared", "-fPIC"]);
    let original = fs::read(library).unwrap();
    let mut libraries: Vec<_> = (0..600).map(|n| directory.path().join(format!("crowd-{n}.so"))).collect();
    for (number, path) in libraries.iter().enumerate() {
        // Another length makes another content.
        fs::write(path, [original.as_slice(), &vec![0; number + 1]].concat()).unwrap();
    }
    let large = format!("{}{LIBRARY}", idle_functions(200_000));
    libraries.push(program("crowd-large.so", &large, &["-shared", "-fPIC"]));
    let source = "#include <dlfcn.h>\n#include <sys/prctl.h>\n#include <unistd.h>\nvolatile long sink;\n\
        int main(int c, char **v) { static long (*f[1024])(long); int n = 0, me = 0;\n\
        for (int i = 1; i < c; i++) { void *l = dlopen(v[i], RTLD_NOW); if (!l) return 1; f[n++] = (long (*)(long))dlsym(l, \"enter\"); }\n\
        for (int i = 1; i < 100; i++) if (!fork()) { prctl(PR_SET_PDEATHSIG, 9); me = i; break; }\n\
        for (long i = me * 7;; i++) { sink += f[i % n](1000000); usleep(200000); } }\n";
    let crowd = program("crowd", source, &["-ldl"]);
    let daemon = Daemon::start(&["--table-bytes", "128KiB"]);
    daemon.set_rules("rules:\n- id: crowd\n  match: {comm: [crowd]}\n  capture: {hz: 99}\n");
    let running = quietly(Command::new(&crowd).args(&libraries));
    let ends = || {
        let text = daemon.metrics();
        let of = |end: &str| {
            let name = format!("gannet_agent_sampler_stacks_total{{end=\"{end}\"}} ");
            text.lines().find_map(|line| line.strip_prefix(&name)?.parse::<f64>().ok()).unwrap_or_default()
        };
        ["complete", "broken", "truncated", "guessed"].map(of)
    };
    daemon.wait_for("samples", || ends()[0] > 100.0);
    std::thread::sleep(Duration::from_secs(4) * slower());
    let settled = ends();
    daemon.wait_for("more samples", || ends()[0] > settled[0] + 150.0);
    let last = ends();
    let new: Vec<f64> = last.iter().zip(settled).map(|(last, before)| last - before).collect();
    assert!(new[1..].iter().sum::<f64>() * 100.0 < new[0], "complete, broken, truncated, guessed: {new:?}");
    drop(running);
    let log = daemon.end();
    let loud: Vec<&str> =
        log.lines().filter(|line| line.contains(" WARN ") || line.contains(" ERROR ")).collect();
    assert!(loud.len() < 20, "{loud:#?}");
}

/// Checks the eviction of tables under load (R49).
#[test]
fn more_programs_than_tables_fit_have_complete_stacks() {
    let directory = tempfile::tempdir().unwrap();
    let original = fs::read(program(
        "one-of-many",
        "#include <stdlib.h>\nvolatile long sink;\n\
         __attribute__((noinline)) long inner(long n) { for (long i = 0; i < n; i++) sink += i; return sink; }\n\
         __attribute__((noinline)) long outer(long n) { long r = inner(n); return r + 1; }\n\
         int main(int c, char **v) { for (int i = 0; i < 400 * atoi(v[1]); i++) sink += outer(1000000); return 0; }\n",
        &["-static"],
    ))
    .unwrap();
    // The table of one static program is some 40 KiB: three fit.
    let machine = Machine::start(KernelOptions { table_bytes: 128 << 10, ..KernelOptions::default() });
    machine.sample(Match { comm: vec!["many-*".into()], ..Match::default() }, 499 / slower());
    let before = machine.look().2;
    let mut most = 0;
    for batch in 0..6 {
        let running: Vec<Running> = (0..4)
            .map(|n| {
                // Another length makes another content.
                let number = batch * 4 + n;
                let path = directory.path().join(format!("many-{number}"));
                let mut bytes = original.clone();
                bytes.extend(std::iter::repeat_n(0, number + 1));
                fs::write(&path, bytes).unwrap();
                std::os::unix::fs::chown(&path, None, None).unwrap();
                let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
                fs::set_permissions(&path, mode).unwrap();
                quietly(Command::new(&path).arg(slower().to_string()))
            })
            .collect();
        for mut running in running {
            assert!(running.0.wait().unwrap().success());
        }
        let stats = machine.look().1;
        assert!(stats.resident_bytes <= stats.budget_bytes, "{stats:?}");
        most = most.max(stats.resident);
    }
    machine.until("ended processes leave nothing behind", |machine| machine.look().2 == before);
    let (_, stats, _) = machine.look();
    assert!(stats.evicted > 5 && stats.made >= 24, "{stats:?}, at most {most} at a time");
    machine.engine.stop();
    let mut programs = 0;
    for window in machine.windows.lock().unwrap().drain(..) {
        for process in window.profiles.iter().flat_map(|profile| &profile.raw.processes) {
            programs += 1;
            for stack in &process.stacks {
                let whole = matches!(stack.end, StackEnd::Complete | StackEnd::None);
                // A sample inside of execve has no stack yet, or one that is being built.
                let in_kernel = !stack.kernel.is_empty() && stack.user.len() <= 1;
                assert!(whole || in_kernel, "{}: {stack:x?}", process.comm);
            }
        }
    }
    assert!(programs >= 24, "{programs} programs were seen");
}

/// A program that computes and sleeps below DEPTH calls: `calls DEPTH`.
const CALLS: &str = r"
#include <stdlib.h>
#include <time.h>
volatile long sink;
__attribute__((noinline)) long work(long n) {
	struct timespec t = { 0, 2000000 };
	for (int i = 0; i < 2000000; i++) sink += i;
	nanosleep(&t, 0);
	return sink + n;
}
__attribute__((noinline)) long down(long depth) { long r = depth ? down(depth - 1) : work(depth); sink++; return r + 1; }
int main(int c, char **v) { for (;;) sink += down(atol(v[1])); }
";

/// Returns the ends of a program's stacks with their numbers of user frames and their samples. The tail calls unwind them.
fn chained(depth: u32, kind: capture::Kind) -> Vec<(StackEnd, usize, u64)> {
    let calls = program("calls", CALLS, &[]);
    let _running = [1, 2].map(|_| quietly(Command::new(&calls).arg(depth.to_string())));
    let options = KernelOptions { unwind_driver: UnwindDriver::TailCalls, ..KernelOptions::default() };
    let machine = Machine::start(options);
    machine.sample_kind(Match { comm: vec!["calls".into()], ..Match::default() }, 199 / slower(), kind);
    std::thread::sleep(Duration::from_secs(4) * slower());
    let (found, _) = machine.finish("calls");
    let stacks = found.into_iter().flat_map(|process| process.stacks);
    stacks.map(|stack| (stack.end, stack.user.len(), stack.count)).collect()
}

/// The number of frames that tail calls unwind at most.
const CHAIN_FRAMES: usize = 232;

/// Checks the driver for kernels without bpf_loop: complete stacks up to its limit, and a mark on each stack that it cuts.
#[test]
fn tail_calls_unwind_complete_stacks_and_mark_cut_ones() {
    let samples = |stacks: &[(StackEnd, usize, u64)], is_so: fn(&(StackEnd, usize, u64)) -> bool| {
        stacks.iter().filter(|stack| is_so(stack)).map(|(_, _, count)| count).sum::<u64>()
    };
    let stacks = chained(100, capture::Kind::OnCpu);
    assert!(stacks.iter().all(|stack| stack.0 == StackEnd::Complete), "{stacks:?}");
    assert!(samples(&stacks, |stack| stack.1 > 100) >= 50, "{stacks:?}");

    // The agent unwinds the first samples of an image itself, without this limit.
    let stacks = chained(300, capture::Kind::OnCpu);
    let is_right = |(end, frames, _): &(StackEnd, usize, u64)| match end {
        StackEnd::Truncated => *frames == CHAIN_FRAMES,
        end => *end == StackEnd::Complete && *frames != CHAIN_FRAMES,
    };
    assert!(stacks.iter().all(is_right), "{stacks:?}");
    assert!(samples(&stacks, |stack| stack.0 == StackEnd::Truncated) >= 50, "{stacks:?}");
}

/// Checks the same for threads that block. The kernel unwinds the first of their stacks by frame pointers.
#[test]
fn tail_calls_unwind_the_stacks_of_blocked_threads() {
    for (depth, end, frames) in
        [(100, StackEnd::Complete, 101..110), (300, StackEnd::Truncated, CHAIN_FRAMES..CHAIN_FRAMES + 1)]
    {
        let stacks = chained(depth, capture::Kind::OffCpu);
        let sum = |is_so: &dyn Fn(&(StackEnd, usize, u64)) -> bool| {
            stacks.iter().filter(|stack| is_so(stack)).map(|(_, _, count)| count).sum::<u64>()
        };
        let (good, all) = (sum(&|stack| stack.0 == end && frames.contains(&stack.1)), sum(&|_| true));
        assert!(all >= 50 && good * 10 >= all * 9, "{good} of {all} at depth {depth}: {stacks:?}");
    }
}
