//! Frames of JavaScript: a program prints its own stack and spins, and the sampled stack must be the same, lines included.
//! Needs root, a kernel with BTF, and `node`, an own build of Node in a version that the agent reads. `GANNET_TEST_NODES` names
//! others, with `:` between them; `scripts/node` fetches them.

use std::{
    collections::{BTreeMap, HashMap},
    env,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
};

use gannet_proto::profiles::{Location, Profile};

use crate::common::{Running, record_for};

const SYSTEM_NODE: &str = "node";
/// Says which engines to test: paths with `:` between them.
const NODES: &str = "GANNET_TEST_NODES";
const PROGRAM: &str = "tests/data/spin.js";
const CASES: usize = 10;

/// One sampled stack: the frames of the program's own file, `FUNCTION LINE`, leaf first.
struct Sampled {
    frames: Vec<String>,
    count: u64,
    is_whole: bool,
    /// All frames, for messages.
    all: Vec<String>,
}

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
    let of = |sample: &gannet_proto::profiles::Sample| {
        let all: Vec<_> = sample.location_id.iter().map(|id| &locations[id]).collect();
        Sampled {
            frames: all.iter().filter(|(is_own, ..)| *is_own).map(|(_, shown, _)| shown.clone()).collect(),
            count: sample.value[0] as u64,
            is_whole: all.iter().all(|(.., name)| !name.starts_with("[broken")),
            all: all.iter().map(|(_, shown, _)| shown.clone()).collect(),
        }
    };
    profile.sample.iter().map(of).collect()
}

/// The stacks that the test accepts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// Nearly all are those printed.
    All,
    /// None has a function that is not on the stack; some may lack names.
    NoneWrong,
}

/// Checks that each stack is the one that the program printed.
#[track_caller]
fn check(flags: &[&str], rounds: u32, wanted: Wanted) {
    let nodes = env::var(NODES).unwrap_or_else(|_| SYSTEM_NODE.to_owned());
    for node in nodes.split(':') {
        check_node(node, flags, rounds, wanted);
    }
}

#[track_caller]
fn check_node(node: &str, flags: &[&str], rounds: u32, wanted: Wanted) {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join(PROGRAM);
    let mut command = Command::new(node);
    command.args(flags).arg(&program).arg(rounds.to_string());
    let mut running = Running::start(command.stdout(Stdio::piped()));
    let output = BufReader::new(running.0.stdout.take().unwrap());
    let mut lines = output.lines();
    let mut printed: BTreeMap<String, Vec<String>> = BTreeMap::new();
    loop {
        let line = lines.next().unwrap().unwrap();
        if line == "ready" {
            break;
        }
        let mut frames = line.split(';').map(str::to_owned);
        printed.insert(frames.next().unwrap(), frames.collect());
    }
    assert_eq!(printed.len(), CASES);
    let recording = record_for(3, 499, &["--pid", &running.0.id().to_string()]);
    drop(running);

    let text = |index: i64| recording.profile.string_table[index as usize].as_str();
    for sample in &recording.profile.sample {
        let label =
            |name| sample.label.iter().find(|label| text(label.key) == name).map(|label| text(label.str));
        assert_eq!(label("runtime"), Some("node"));
        assert!(label("runtime_version").is_some_and(|version| version.split('.').count() == 3));
    }
    // It prints in the first line of `spin`, and loops until two lines below.
    let spin_line = |frame: &str| frame.strip_prefix("spin ").and_then(|line| line.parse::<u32>().ok());
    let first = spin_line(&printed["plain"][0]).unwrap();
    let (mut good, mut all, mut broken, mut samples, mut wrong, mut in_burn) = (0, 0, 0, 0, 0, 0);
    let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
    let mut odd: BTreeMap<String, u64> = BTreeMap::new();
    for sampled in stacks(&recording.profile, program.to_str().unwrap()) {
        let Sampled { frames, count, is_whole, all: whole } = sampled;
        samples += count;
        if !is_whole {
            broken += count;
            *odd.entry(format!("broken {whole:?}")).or_default() += count;
        }
        let Some(spin) = frames.iter().position(|frame| spin_line(frame).is_some()) else {
            *odd.entry(format!("without spin {whole:?}")).or_default() += count;
            continue;
        };
        all += count;
        let lines_fit = spin_line(&frames[spin]).is_some_and(|line| (first..=first + 2).contains(&line));
        let case = printed.iter().find(|(_, stack)| stack[1..] == frames[spin + 1..]);
        match case {
            Some((case, _))
                if spin <= 1 && frames[..spin].iter().all(|leaf| leaf.starts_with("burn ")) && lines_fit =>
            {
                good += count;
                in_burn += if spin == 1 { count } else { 0 };
                *seen.entry(case).or_default() += count;
            }
            _ => {
                let is_named = whole.iter().all(|frame| !frame.starts_with(' '));
                wrong += if is_named { count } else { 0 };
                *odd.entry(format!("wrong {is_named} {whole:?}")).or_default() += count;
            }
        }
    }
    eprintln!(
        "{node} {flags:?}: {good} good of {all} of {samples}, {broken} broken, {wrong} wrong, {in_burn} in burn; {seen:?}"
    );
    let mut worst: Vec<_> = odd.iter().collect();
    worst.sort_unstable_by_key(|(_, count)| std::cmp::Reverse(**count));
    worst.truncate(12);
    if wanted == Wanted::NoneWrong {
        assert!(all >= 300 && wrong == 0, "{wrong} of {all} of {samples} are wrong: {worst:#?}");
        return;
    }
    assert!(
        all >= 300 && all * 100 >= samples * 99 && good * 100 >= all * 99,
        "{good} of {all} of {samples}: {worst:#?}\nexpected {printed:#?}"
    );
    // Nearly all time of slow code is in the innermost function: a frame that was skipped shows.
    let is_slow = flags.contains(&"--no-opt");
    assert!(!is_slow || in_burn * 100 >= good * 97, "{in_burn} of {good} are in burn");
    assert!(broken * 100 <= samples, "{broken} of {samples} broken: {worst:#?}");
    assert!(seen.len() == CASES && seen.values().all(|count| *count >= 10), "{seen:?}");
}

#[test]
fn stacks_of_the_javascript_interpreter_are_those_printed() {
    check(&["--no-opt", "--no-sparkplug"], 1, Wanted::All);
}

#[test]
fn stacks_of_baseline_javascript_are_those_printed() {
    check(&["--no-opt", "--always-sparkplug"], 4, Wanted::All);
}

#[test]
fn stacks_of_optimized_javascript_are_those_printed() {
    check(&["--max-inlined-bytecode-size=0", "--max-inlined-bytecode-size-small=0"], 3000, Wanted::All);
}

#[test]
fn stacks_of_inlined_javascript_are_those_printed() {
    check(&[], 3000, Wanted::All);
}

#[test]
fn names_are_right_while_the_collector_moves_functions() {
    check(
        &["--stress-compaction", "--gc-interval=300", "--semi-space-growth-factor=1"],
        20,
        Wanted::NoneWrong,
    );
}
