//! Frames of JavaScript: a program prints its own stack and spins, and the sampled stack must be the same, lines included.
//! Needs root, a kernel with BTF, and `node`, an own build of Node in a version that the agent reads. `GANNET_TEST_NODES` names
//! others, with `:` between them; `scripts/node` fetches them.

mod blocked;

use std::{
    collections::{BTreeMap, HashMap},
    env,
    io::{BufRead as _, BufReader},
    mem,
    path::Path,
    process::{Command, Stdio},
};

use gannet_proto::profiles::{Location, Profile, Sample};

use crate::common::{Running, proven, record_for};

const SYSTEM_NODE: &str = "node";
/// Says which engines to test: paths with `:` between them.
const NODES: &str = "GANNET_TEST_NODES";
const PROGRAM: &str = "tests/data/spin.js";
const CASES: usize = 10;
/// What `spin` calls.
const INNERMOST: [&str; 2] = ["burn", "stack"];

/// One sampled stack: the frames of the program's own file, `FUNCTION LINE`, leaf first.
struct Sampled {
    frames: Vec<String>,
    count: u64,
    is_whole: bool,
    /// All frames, for messages.
    all: Vec<String>,
}

/// Reports whether a sample says that it is Node's, and of which version. The first ones do not, until the agent has read its file.
#[track_caller]
fn is_node(profile: &Profile, sample: &Sample) -> bool {
    let text = |index: i64| profile.string_table[index as usize].as_str();
    let label = |name| sample.label.iter().find(|label| text(label.key) == name).map(|label| text(label.str));
    let Some(runtime) = label("runtime") else { return false };
    assert_eq!(runtime, "node");
    assert!(label("runtime_version").is_some_and(|version| version.split('.').count() == 3));
    true
}

/// Returns the stacks of samples from when on the agent knows the program as Node's.
fn stacks(profile: &Profile, file: &str) -> Vec<Sampled> {
    let text = |index: i64| profile.string_table[index as usize].as_str();
    let functions: HashMap<u64, _> =
        profile.function.iter().map(|function| (function.id, function)).collect();
    let mappings: HashMap<u64, &str> =
        profile.mapping.iter().map(|mapping| (mapping.id, text(mapping.filename))).collect();
    let frame = |location: &Location| {
        let line = location.line.first();
        let function = line.map(|line| functions[&line.function_id]);
        let name = function.map_or("", |function| text(function.name));
        // Profiles show where a function begins.
        let bare = name.split(" (").next().unwrap_or_default();
        let bare = if name.starts_with('(') { name } else { bare };
        let is_js = mappings.get(&location.mapping_id) == Some(&"[v8]");
        let is_own = is_js && function.is_some_and(|function| text(function.filename) == file);
        let shown = format!("{bare} {}", line.map_or(0, |line| line.line));
        (is_own, shown, name.to_owned())
    };
    let locations: HashMap<u64, _> =
        profile.location.iter().map(|location| (location.id, frame(location))).collect();
    let of = |sample: &Sample| {
        let all: Vec<_> = sample.location_id.iter().map(|id| &locations[id]).collect();
        Sampled {
            frames: all.iter().filter(|(is_own, ..)| *is_own).map(|(_, shown, _)| shown.clone()).collect(),
            count: sample.value[0] as u64,
            is_whole: all.iter().all(|(.., name)| !name.starts_with("[broken")),
            all: all.iter().map(|(_, shown, _)| shown.clone()).collect(),
        }
    };
    profile.sample.iter().filter(|sample| is_node(profile, sample)).map(of).collect()
}

/// What the samples of a program must show.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// Nearly all stacks are those printed.
    All,
    /// No stack with all names has a function that is not on it. Those that lack names may.
    NoneWrong,
    /// No stack has a function that is not on it, but some may lack names.
    NoneUnproven,
}

/// How V8 compiles the program.
struct Mode {
    /// The name of this, in the table of what was proven.
    case: &'static str,
    flags: &'static [&'static str],
    /// How often the program calls all functions before it prints their stacks.
    rounds: u32,
    wanted: Wanted,
}

const MODE: Mode =
    Mode { case: "stacks of all, with inlining", flags: &[], rounds: 3000, wanted: Wanted::All };

/// Checks that each stack is the one that the program printed.
#[track_caller]
fn check(mode: &Mode) {
    for node in nodes() {
        check_node(&node, mode);
    }
}

fn nodes() -> Vec<String> {
    let nodes = env::var(NODES).unwrap_or_else(|_| SYSTEM_NODE.to_owned());
    nodes.split(':').map(str::to_owned).collect()
}

/// Returns the version that an engine prints: `v24.22.3`.
fn version(node: &str) -> String {
    let output = Command::new(node).arg("--version").output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

fn name_of(frame: &str) -> &str {
    frame.rsplit_once(' ').map_or(frame, |(name, _)| name)
}

/// The stacks that a program printed, leaf first, by case.
struct Printed(BTreeMap<String, Vec<String>>);

impl Printed {
    /// Reports whether functions of the program, outermost first, are a part of what it calls in one of the cases. Between them
    /// may be others if frames `lack` names.
    fn has_calls(&self, functions: &[&str], lack: bool) -> bool {
        self.0.values().any(|stack| {
            let outer = stack.iter().rev().map(|frame| name_of(frame));
            let calls: Vec<&str> = outer.collect();
            INNERMOST.iter().any(|leaf| {
                let mut rest = calls.iter().chain([leaf]);
                if lack {
                    functions.iter().all(|function| rest.any(|call| call == function))
                } else {
                    functions.iter().all(|function| rest.next() == Some(function))
                }
            })
        })
    }

    /// The line of `spin` in which it prints.
    fn first_line(&self) -> u32 {
        spin_line(&self.0["plain"][0]).unwrap()
    }

    /// Returns the case whose stack this is, from `spin` on.
    fn case(&self, frames: &[String]) -> Option<&str> {
        let (spin, callers) = frames.split_first()?;
        // The program loops until two lines below the one in which it prints.
        let first = self.first_line();
        let lines_fit = spin_line(spin).is_some_and(|line| (first..=first + 2).contains(&line));
        let found = self.0.iter().find(|(_, stack)| stack[1..] == *callers);
        found.filter(|_| lines_fit).map(|(case, _)| case.as_str())
    }
}

fn spin_line(frame: &str) -> Option<u32> {
    frame.strip_prefix("spin ").and_then(|line| line.parse().ok())
}

/// Numbers of samples.
#[derive(Debug, Default)]
struct Counts {
    all: u64,
    broken: u64,
    /// In or below `spin`, where the program spends its time.
    spinning: u64,
    /// Of these: with the printed stack, and in `burn` then.
    good: u64,
    in_burn: u64,
    /// With functions that do not call each other.
    wrong: u64,
    /// By case.
    seen: BTreeMap<String, u64>,
    odd: BTreeMap<String, u64>,
}

impl Counts {
    fn add(&mut self, sampled: &Sampled, printed: &Printed, wanted: Wanted) {
        let Sampled { frames, count, is_whole, all } = sampled;
        let mut odd = |why: &str| *self.odd.entry(format!("{why} {all:?}")).or_default() += count;
        self.all += count;
        if !is_whole {
            self.broken += count;
            odd("broken");
        }
        let functions: Vec<&str> = frames.iter().rev().map(|frame| name_of(frame)).collect();
        let lack = all.iter().any(|frame| frame.starts_with([' ', '[']));
        // Of a stack that the collector has moved meanwhile, a part may have the names of another one, if nothing proves them.
        let is_unproven = lack && wanted == Wanted::NoneWrong;
        if !is_unproven && !printed.has_calls(&functions, lack) {
            self.wrong += count;
            odd("wrong");
        }
        let Some(spin) = frames.iter().position(|frame| spin_line(frame).is_some()) else {
            odd("without spin");
            return;
        };
        self.spinning += count;
        match printed.case(&frames[spin..]) {
            Some(case) => {
                self.good += count;
                self.in_burn += if frames[0].starts_with("burn ") { *count } else { 0 };
                *self.seen.entry(case.to_owned()).or_default() += count;
            }
            None => odd("not printed"),
        }
    }

    /// Returns what is missing, if there is something.
    fn missing(&self, mode: &Mode) -> Option<&'static str> {
        let Self { all, broken, spinning, good, in_burn, .. } = self;
        // Nearly all time of slow code is in the innermost function: a frame that was skipped shows.
        let is_slow = mode.flags.contains(&"--no-opt");
        let is_complete = self.seen.len() == CASES && self.seen.values().all(|count| *count >= 10);
        match mode.wanted {
            // While the collector moves all objects all the time, few stacks have names.
            Wanted::NoneWrong | Wanted::NoneUnproven => {
                (*spinning < 100).then_some("too few samples in spin")
            }
            Wanted::All if *spinning < 300 => Some("too few samples in spin"),
            Wanted::All if spinning * 100 < all * 97 => Some("too many samples without spin"),
            Wanted::All if good * 100 < spinning * 99 => Some("too many stacks that were not printed"),
            Wanted::All if broken * 100 > *all => Some("too many broken stacks"),
            Wanted::All if is_slow && in_burn * 100 < good * 95 => Some("too few samples in burn"),
            Wanted::All => (!is_complete).then_some("a case without samples"),
        }
    }
}

#[track_caller]
fn check_node(node: &str, mode: &Mode) {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join(PROGRAM);
    let mut command = Command::new(node);
    command.args(mode.flags).arg(&program).arg(mode.rounds.to_string());
    let mut running = Running::start(command.stdout(Stdio::piped()));
    let output = BufReader::new(running.0.stdout.take().unwrap());
    let mut printed = BTreeMap::new();
    for line in output.lines() {
        let line = line.unwrap();
        if line == "ready" {
            break;
        }
        let mut frames = line.split(';').map(str::to_owned);
        printed.insert(frames.next().unwrap(), frames.collect());
    }
    if let Some(compilers) = printed.remove("compilers") {
        assert_eq!(compilers, ["maglev"], "{node}");
    }
    assert_eq!(printed.len(), CASES, "{node} {:?}: {printed:?}", mode.flags);
    let printed = Printed(printed);
    let wanted = match mode.wanted {
        Wanted::NoneWrong if version(node).starts_with("v24.") => Wanted::NoneUnproven,
        wanted => wanted,
    };
    let mut counts = Counts::default();
    let mut missing = None;
    // On a busy machine the program gets fewer samples, and the agent reads its code late, or gives it up for the whole recording.
    // So each recording counts for itself.
    for seconds in [2, 4, 8, 16] {
        counts = Counts::default();
        let recording = record_for(seconds, 999, &["--pid", &running.0.id().to_string()]);
        for sampled in stacks(&recording.profile, program.to_str().unwrap()) {
            counts.add(&sampled, &printed, wanted);
        }
        missing = counts.missing(mode);
        if missing.is_none() || counts.wrong > 0 {
            break;
        }
    }
    let odd = mem::take(&mut counts.odd);
    eprintln!("{node} {:?}: {counts:?}", mode.flags);
    let mut worst: Vec<_> = odd.iter().collect();
    worst.sort_unstable_by_key(|(what, count)| (!what.starts_with("wrong"), std::cmp::Reverse(**count)));
    worst.truncate(12);
    let expected = &printed.0;
    assert!(
        counts.wrong == 0,
        "{} have functions that call no such: {worst:#?}\nexpected {expected:#?}",
        counts.wrong
    );
    assert!(missing.is_none(), "{missing:?}: {counts:?} {worst:#?}\nexpected {expected:#?}");
    let (equal, compared) = match mode.wanted {
        Wanted::All => (counts.good, counts.spinning),
        Wanted::NoneWrong | Wanted::NoneUnproven => (counts.all - counts.wrong, counts.all),
    };
    proven::note("node", version(node).trim().trim_start_matches('v'), mode.case, equal, compared);
}

#[test]
fn stacks_of_the_javascript_interpreter_are_those_printed() {
    check(&Mode {
        case: "stacks of the interpreter",
        flags: &["--no-opt", "--no-sparkplug"],
        rounds: 1,
        ..MODE
    });
}

#[test]
fn stacks_of_baseline_javascript_are_those_printed() {
    check(&Mode {
        case: "stacks of baseline code",
        flags: &["--no-opt", "--always-sparkplug"],
        rounds: 4,
        ..MODE
    });
}

#[test]
fn stacks_of_optimized_javascript_are_those_printed() {
    check(&Mode {
        case: "stacks of TurboFan, without inlining",
        flags: &["--max-inlined-bytecode-size=0", "--max-inlined-bytecode-size-small=0"],
        ..MODE
    });
}

#[test]
fn stacks_of_inlined_javascript_are_those_printed() {
    check(&MODE);
}

/// Builds without this compiler say so.
#[test]
fn stacks_of_javascript_of_maglev_are_those_printed() {
    for node in nodes() {
        let flags: &[&str] = &["--maglev", "--no-turbofan", "--allow-natives-syntax"];
        let program = "function f() { return 1; } %PrepareFunctionForOptimization(f); f(); \
                       %OptimizeMaglevOnNextCall(f); f(); console.log(%ActiveTierIsMaglev(f))";
        let output = Command::new(&node).args(flags).args(["-e", program]).output().unwrap();
        let has_maglev = output.stdout == b"true\n";
        let built_with = "process.config.variables.v8_enable_maglev";
        let says = Command::new(&node).args(["-p", built_with]).output().unwrap().stdout;
        assert_eq!(has_maglev, says == b"1\n", "{}", version(&node));
        if has_maglev {
            check_node(&node, &Mode { case: "stacks of Maglev", flags, ..MODE });
        }
    }
}

#[test]
fn names_are_right_while_the_collector_moves_functions() {
    check(&Mode {
        case: "stacks without a wrong name, while all objects move",
        flags: &["--stress-compaction", "--gc-interval=300", "--semi-space-growth-factor=1"],
        rounds: 20,
        wanted: Wanted::NoneWrong,
    });
}
