//! Frames of interpreters: a program prints its own stack and spins, and the sampled stack must be the same, lines included.
//! Needs root, a kernel with BTF, and `/usr/bin/python3`, CPython 3.8 to 3.15. `GANNET_TEST_PYTHONS` names other
//! interpreters, with `:` between them, and so on for each language. In `ROOT/./PATH` ROOT is the interpreter's root directory: it runs there, in a mount
//! namespace of its own.

mod php;
mod ruby;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    env,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use gannet_proto::profiles::{Location, Profile};

use crate::common::{Recording, Running, program, proven, record_for, slower};

pub(crate) const SYSTEM_PYTHON: &str = "/usr/bin/python3";
/// Says which interpreters to test: paths with `:` between them.
const PYTHONS: &str = "GANNET_TEST_PYTHONS";

/// The version of CPython, which ends with `t` in builds without the global lock, and with `-musl` in those with that library.
const PYTHON_VERSION: &str = r#""%d.%d.%d" % sys.version_info[:3] + sys.abiflags.strip("dmu") + ("-musl" if "musl" in getattr(sys.implementation, "_multiarch", "") else "")"#;

/// Prints the version; then `CASE;FUNCTION LINE;...` for each case, leaf first, and spins in it.
const PYTHON: &str = r#"
import functools, sys, threading, time
print(VERSION)

def stack(case):
    frame, frames = sys._getframe(1), []
    while frame and frame.f_code.co_name != "_bootstrap":
        code = frame.f_code
        frames.append(f"{getattr(code, 'co_qualname', code.co_name)} {frame.f_lineno}")
        frame = frame.f_back
    print(";".join([case, *frames]), flush=True)

def spin(case):
    stack(case)
    end = time.monotonic() + 0.1
    while time.monotonic() < end: pass

def plain():
    spin("plain")

def callback():
    sorted([1],
        key=lambda item: spin("callback"))

def reduction():
    def add(left, right):
        return spin("reduction")
    functools.reduce(add, [1, 2])

def numbers():
    yield 1
    yield spin("generator")

def generator():
    for number in numbers():
        pass

async def awaited():
    return spin("coroutine")

def coroutine():
    async def outer():
        await awaited()
    try:
        outer().send(None)
    except StopIteration:
        pass

class Service:
    class Inner:
        def handle(self):
            return spin("method")
    def handle(self):
        self.Inner().handle()

def recursion(depth):
    if depth:
        recursion(depth - 1)
    else:
        spin("recursion")

def comprehension():
    return [spin("comprehension")
        for _ in range(1)]

def umlaut_\u00e4():
    spin("umlaut")

def thread():
    thread = threading.Thread(target=lambda: spin("thread"))
    thread.start()
    thread.join()

while True:
    plain()
    callback()
    reduction()
    generator()
    coroutine()
    Service().handle()
    recursion(60)
    comprehension()
    umlaut_\u00e4()
    thread()
"#;

/// The mapping of Python functions, and the native function that runs them.
const PYTHON_LOOP: (&str, &str) = ("[cpython]", "_PyEval_EvalFrameDefault");

/// Returns an interpreter's root directory, and its command.
fn command_of(python: &str) -> (PathBuf, Vec<&str>) {
    match python.split_once("/./") {
        Some((root, path)) => (root.into(), vec!["unshare", "--mount", "chroot", root, path]),
        None => ("/".into(), vec![python]),
    }
}

/// Returns the sampled stacks: `FUNCTION LINE` for an interpreted frame of this file, `FUNCTION` for one of another file, empty if
/// it has no name, `|` for a frame of the loop, leaf first.
fn interpreted_frames(
    profile: &Profile,
    (runtime, loop_name): (&str, &str),
    file: &str,
) -> Vec<(Vec<String>, u64)> {
    let text = |index: i64| profile.string_table[index as usize].as_str();
    let functions: HashMap<u64, _> =
        profile.function.iter().map(|function| (function.id, function)).collect();
    let mappings: HashMap<u64, &str> =
        profile.mapping.iter().map(|mapping| (mapping.id, text(mapping.filename))).collect();
    let frame = |location: &Location| -> Option<String> {
        let is_interpreted = mappings.get(&location.mapping_id) == Some(&runtime);
        let Some(line) = location.line.first() else { return is_interpreted.then(String::new) };
        let function = functions[&line.function_id];
        let name = text(function.name);
        if is_interpreted {
            let name = name.to_owned();
            return Some(if text(function.filename) == file {
                format!("{name} {}", line.line)
            } else {
                name
            });
        }
        // Functions that are inlined into the loop stand before it.
        let mut names = location.line.iter().map(|line| text(functions[&line.function_id].name));
        names.any(|name| name == loop_name).then(|| "|".to_owned())
    };
    let frames: HashMap<u64, Option<String>> =
        profile.location.iter().map(|location| (location.id, frame(location))).collect();
    profile
        .sample
        .iter()
        .map(|sample| {
            let stack = sample.location_id.iter().filter_map(|id| frames[id].clone()).collect();
            (stack, sample.value[0] as u64)
        })
        .collect()
}

/// Returns the stacks that samples may have, of the frames that a case printed: `|` stands for a frame of the loop, which C
/// code called.
fn expected(minor: u32, case: &str, printed: &[String]) -> Vec<Vec<String>> {
    let mut frames = printed.to_vec();
    if case == "thread" {
        // These are of the library's file.
        let library = ["Thread.run", "Thread._bootstrap_inner", "Thread._bootstrap"];
        frames.truncate(2);
        frames.extend(
            library.map(|name| (if minor < 11 { &name["Thread.".len()..] } else { name }).to_owned()),
        );
    }
    if minor < 11 {
        // Each function runs in a frame of the loop.
        return vec![frames.into_iter().flat_map(|frame| [frame, "|".to_owned()]).collect()];
    }
    frames.push("|".to_owned());
    let called_at = |places: &[usize]| {
        let mut frames = frames.clone();
        for place in places {
            frames.insert(*place, "|".to_owned());
        }
        frames
    };
    let called = called_at(&[2]);
    match case {
        "callback" | "reduction" => vec![called],
        "generator" | "thread" if minor < 12 => vec![called],
        // The loop calls itself for the first step, and later goes on in the same frame.
        "generator" => vec![frames, called],
        // `send` calls the outer coroutine. The loop calls itself for the inner one, and later goes on in the same frame.
        "coroutine" => vec![called_at(&[3, 2]), called_at(&[3])],
        _ => vec![frames],
    }
}

/// Checks that each stack is the one that the program printed.
#[test]
fn python_stacks_are_those_that_the_program_printed() {
    let pythons = env::var(PYTHONS).unwrap_or_else(|_| SYSTEM_PYTHON.to_owned());
    for python in pythons.split(':') {
        let found = check_python(python, &[]);
        proven::note("python", &found.version, stacks_case(found.loop_has_name), found.good, found.all);
    }
}

/// A program that printed its stack in each of its cases, and a profile of it from then on.
struct Recorded {
    /// The program's file as the interpreter sees it.
    path: PathBuf,
    /// The line that the program printed first: what it is run by.
    first_line: String,
    /// The frames that it printed, by case.
    printed: BTreeMap<String, Vec<String>>,
    recording: Recording,
}

/// Runs a program until it has printed its cases, and records it.
#[track_caller]
fn record_program(interpreter: &str, options: &[&str], name: &str, program: &str, cases: usize) -> Recorded {
    let (root, command) = command_of(interpreter);
    let directory = tempfile::tempdir_in(root.join("tmp")).unwrap();
    let file = directory.path().join(name);
    std::fs::write(&file, program).unwrap();
    let path = Path::new("/").join(file.strip_prefix(&root).unwrap());
    let mut running = Running::start(
        Command::new(command[0]).args(&command[1..]).args(options).arg(&path).stdout(Stdio::piped()),
    );
    let mut lines = BufReader::new(running.0.stdout.take().unwrap()).lines();
    let first_line = lines.next().unwrap().unwrap();
    let mut printed = BTreeMap::new();
    while printed.len() < cases {
        let line = lines.next().unwrap().unwrap();
        let mut frames = line.split(';').map(str::to_owned);
        printed.insert(frames.next().unwrap(), frames.collect());
    }
    // The program would block on a full pipe.
    let reader = std::thread::spawn(move || lines.for_each(drop));
    let recording = record_for(6, 499, &["--pid", &running.0.id().to_string()]);
    drop(running);
    reader.join().unwrap();
    Recorded { path, first_line, printed, recording }
}

impl Recorded {
    /// Checks that all samples have the labels of their runtime.
    #[track_caller]
    fn check_labels(&self, runtime: &str, is_version: impl Fn(Option<&str>) -> bool) {
        let profile = &self.recording.profile;
        let text = |index: i64| profile.string_table[index as usize].as_str();
        for sample in &profile.sample {
            let label =
                |name| sample.label.iter().find(|label| text(label.key) == name).map(|label| text(label.str));
            assert_eq!(label("runtime"), Some(runtime));
            assert!(is_version(label("runtime_version")), "{:?}", label("runtime_version"));
        }
    }

    /// Returns the frames of the program, with how often each stack was sampled.
    fn stacks(&self, runtime_and_loop: (&str, &str)) -> Vec<(Vec<String>, u64)> {
        interpreted_frames(&self.recording.profile, runtime_and_loop, self.path.to_str().unwrap())
    }
}

/// What the stacks of an interpreter proved.
pub(crate) struct Proven {
    version: String,
    loop_has_name: bool,
    good: u64,
    all: u64,
}

/// Checks an interpreter, with options before the path of the program.
#[track_caller]
pub(crate) fn check_python(python: &str, options: &[&str]) -> Proven {
    let program = PYTHON.replace("\\u00e4", "\u{e4}").replace("VERSION", PYTHON_VERSION);
    let recorded = record_program(python, options, "app.py", &program, 10);
    let printed = &recorded.printed;
    let full_version = recorded.first_line.as_str();
    let minor: u32 = full_version.split('.').nth(1).unwrap().parse().unwrap();
    let spin = printed["plain"][0].clone();
    let spin_line: u32 = spin.rsplit(' ').next().unwrap().parse().unwrap();
    // It prints one line, and spins two lines below.
    let spins = format!("spin {}", spin_line + 2);
    let expected: Vec<Vec<Vec<String>>> = printed
        .iter()
        .map(|(case, frames)| {
            let mut frames = frames.clone();
            frames[0].clone_from(&spins);
            expected(minor, case, &frames)
        })
        .collect();
    let version = format!("3.{minor}.");
    recorded
        .check_labels("python", |found| found.is_some_and(|found| found.starts_with(&version) || minor < 11));
    let stacks = recorded.stacks(PYTHON_LOOP);
    // From 3.14 on, Debian's loop is a part of the program that has no name: the order among C frames is not checked there.
    let has_name = stacks.iter().any(|(stack, _)| stack.iter().any(|frame| frame == "|"));
    assert!(has_name || minor >= 14, "no frame of the loop has a name");
    let expected: Vec<Vec<Vec<String>>> = expected
        .into_iter()
        .map(|mut allowed| {
            for stack in &mut allowed {
                stack.retain(|frame| has_name || frame != "|");
            }
            allowed
        })
        .collect();
    let (mut good, mut all, mut without) = (0, 0, 0);
    let mut seen = vec![0; expected.len()];
    let mut odd: BTreeMap<Vec<String>, u64> = BTreeMap::new();
    for (stack, count) in &stacks {
        if !stack.iter().any(|frame| frame != "|") {
            without += count;
        } else if stack.contains(&spins) {
            all += count;
            if let Some(case) = expected.iter().position(|allowed| allowed.contains(stack)) {
                good += count;
                seen[case] += count;
            } else {
                *odd.entry(stack.clone()).or_default() += count;
            }
        }
    }
    eprintln!("3.{minor}: {good} good of {all}, {without} without Python frames; {seen:?}");
    assert!(all >= 300 && good * 100 >= all * 99, "{good} of {all}: {odd:#?}\nexpected {expected:#?}");
    assert!(seen.iter().all(|count| *count >= 10), "{seen:?} of {:?}", printed.keys());
    // The first samples come before the unwind table is built.
    assert!(without * 5 <= all, "{without} of {all} without Python frames");
    Proven { version: full_version.to_owned(), loop_has_name: has_name, good, all }
}

/// Returns the name of the case in which stacks are compared, with the order among C frames if the loop has a name.
fn stacks_case(loop_has_name: bool) -> &'static str {
    if loop_has_name { "stacks, with their order among C frames" } else { "stacks" }
}

/// Starts processes of the interpreter in its first argument, one after another, each of which works for 50 ms.
const SHORT_LIVES: &str = r#"
import subprocess, sys
WORK = """
import time
def inner(end):
    n = 0
    while time.perf_counter() < end:
        n += 1
    return n
def outer():
    return [inner(end) for end in [time.perf_counter() + 0.05]]
outer()
"""
while True:
    subprocess.run([*sys.argv[1:], "-c", WORK])
"#;

fn python_version(python: &str) -> String {
    let (_, command) = command_of(python);
    let print = format!("import sys; print({PYTHON_VERSION})");
    let output = Command::new(command[0]).args(&command[1..]).args(["-c", &print]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Checks that processes of 50 ms have the names of their functions, with lines, from their first sample on: they end before the
/// agent can read their memory.
#[test]
fn python_processes_of_50_ms_keep_their_names() {
    let pythons = env::var(PYTHONS).unwrap_or_else(|_| SYSTEM_PYTHON.to_owned());
    for python in pythons.split(':') {
        let storm =
            Running::start(Command::new(SYSTEM_PYTHON).args(["-c", SHORT_LIVES]).args(command_of(python).1));
        let recording = record_for(8, 199, &["--pid", &storm.0.id().to_string()]);
        drop(storm);
        let profile = &recording.profile;
        let pids = profile.sample.iter().filter_map(|sample| {
            sample.label.iter().find(|label| profile.string_table[label.key as usize] == "pid")
        });
        let processes = pids.map(|label| label.num).collect::<HashSet<_>>().len();
        let (mut named, mut lines, mut working, mut all) = (0, 0, 0, 0);
        let mut odd: BTreeMap<Vec<String>, u64> = BTreeMap::new();
        for (stack, count) in interpreted_frames(profile, PYTHON_LOOP, "<string>") {
            // Before its first instruction of Python a process has no frame of the loop. If the loop has no name, as in Debian's
            // 3.14, stacks without any Python frame are not counted.
            if stack.is_empty() {
                continue;
            }
            all += count;
            let is_named = stack
                .iter()
                .zip(std::iter::once(&stack[0]).chain(&stack))
                .all(|(frame, before)| !frame.is_empty() && (frame != "|" || before != "|"));
            if is_named {
                named += count;
            } else {
                *odd.entry(stack.clone()).or_default() += count;
            }
            if stack[0].starts_with("inner ") {
                working += count;
                let outer = stack.iter().any(|frame| frame == "outer 9");
                let module = stack.iter().any(|frame| frame == "<module> 10");
                lines +=
                    if outer && module && ["inner 5", "inner 6"].contains(&&*stack[0]) { count } else { 0 };
            }
        }
        let log = &recording.log;
        eprintln!("{python}: {named} named of {all}, {lines} with lines of {working}; {processes} processes");
        assert!(processes > 20 && all > 200, "{processes} processes, {all} samples\n{log}");
        // On an emulated machine these processes take seconds.
        let least = if slower() > 1 { 85 } else { 95 };
        assert!(
            named * 100 >= all * least,
            "{named} named of {all} in {processes} processes: {odd:#?}\n{log}"
        );
        let version = python_version(python);
        // The build for musl needs as long to start as it works.
        let share = if version.ends_with("-musl") { 3 } else { 2 };
        assert!(
            working * share > all && lines * 100 >= working * 99,
            "{lines} with lines of {working} of {all}"
        );
        proven::note("python", &version, "names in processes of 50 ms", named, all);
    }
}

/// Looks like CPython 3.11, but nothing ever answers a read of its interpreter: a userfaultfd handles that memory.
const UNANSWERED: &str = r#"
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
unsigned Py_Version = 0x030b02f0;
char PyCode_Type[400];
unsigned long _PyRuntime[512];
volatile unsigned long n;
__attribute__((noinline)) void _PyEval_EvalFrameDefault(void) { for (int i = 0; i < 1000; i++) n += i; }
int main(void) {
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register all = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC);
	void *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	all.range.start = (unsigned long)page;
	all.range.len = 4096;
	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &all))
		return 1;
	_PyRuntime[5] = (unsigned long)page;
	puts("ready");
	fflush(stdout);
	for (;;)
		_PyEval_EvalFrameDefault();
}"#;

/// Checks that a process whose memory cannot be read costs another one no names.
#[test]
fn memory_that_never_answers_holds_up_no_other_names() {
    let forged = program("unanswered", UNANSWERED, &["-rdynamic"]);
    let mut hostile = Running::start(Command::new(forged).stdout(Stdio::piped()));
    let mut ready = String::new();
    BufReader::new(hostile.0.stdout.take().unwrap()).read_line(&mut ready).unwrap();
    assert_eq!(ready, "ready\n", "the kernel has userfaultfd");
    let script = "def busy():\n  while True: pass\nbusy()";
    let beside = Running::start(Command::new(SYSTEM_PYTHON).args(["-c", script]));
    let pids = [hostile.0.id(), beside.0.id()].map(|pid| pid.to_string());
    let recording = record_for(3, 199, &["--pid", &pids[0], "--pid", &pids[1]]);
    let (named, all) = recording.share("python3", |stack| stack.iter().any(|frame| frame == "busy"));
    // The other process may wait for one deadline of half a second. Held up for good, none would have a name.
    assert!(all > 100 && named * 100 >= all * 50, "{named} of {all}\n{}", recording.log);
    let name = "(reading the memory of its interpreter)";
    assert_eq!(recording.log.matches(name).count(), 1, "{}", recording.log);
    assert!(recording.share("unanswered", |_| true).1 > 100, "{}", recording.log);
}
