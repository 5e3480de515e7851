//! Labels of goroutines: the function that a sample is in says which labels it must have. Needs root, a kernel with BTF, and Go
//! from 1.18 on. `GANNET_TEST_GO_PROGRAMS` names builds of the same program by other versions, which it tests instead: paths with `:`
//! between them.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use gannet_agent::{
    engine::{Engine, Window},
    rules::{RuleSource, SourceRules, ad_hoc},
};
use gannet_proto::control::Match;

use crate::common::{Running, engine_options, is_marked, proven, record_for, slower};

const PROGRAMS: &str = "GANNET_TEST_GO_PROGRAMS";
const PROGRAM: &str = "tests/data/Labels.go";
/// A part in C with a thread-local variable, so that Go's own is somewhere else.
const C_PART: &str = "package main\n\n// static __thread long words[5];\n// long touch(void) { return words[1]++; }\n\
                      import \"C\"\n\nfunc init() { C.touch() }\n";
/// The agent's own labels.
const OWN: [&str; 8] =
    ["pid", "tid", "thread", "comm", "runtime", "runtime_version", "unwinding", "guessed_from"];
/// The function that `main.walk` has run on the thread's own stack.
const ON_OTHER_STACK: &str = "runtime.Stack.func1";
/// Labels that the agent takes of a task.
const MOST: usize = 64;

type Labels = BTreeMap<String, String>;

/// How a program is built.
struct Build {
    name: &'static str,
    has_c: bool,
    flags: &'static [&'static str],
}

const BUILDS: [Build; 4] = [
    Build { name: "plain", has_c: false, flags: &[] },
    Build { name: "stripped pie", has_c: false, flags: &["-buildmode=pie", "-ldflags=-s -w"] },
    Build { name: "cgo", has_c: true, flags: &[] },
    Build { name: "stripped cgo pie", has_c: true, flags: &["-buildmode=pie", "-ldflags=-s -w"] },
];

fn build(directory: &Path, build: &Build) -> PathBuf {
    build_program(PROGRAM, directory, build)
}

fn build_program(program: &str, directory: &Path, build: &Build) -> PathBuf {
    let source = directory.join("source");
    std::fs::create_dir_all(&source).unwrap();
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join(program), source.join("labels.go")).unwrap();
    // Beside a file in assembly, functions of the runtime may be named without a body.
    std::fs::write(source.join("empty.s"), "").unwrap();
    if build.has_c {
        std::fs::write(source.join("part.go"), C_PART).unwrap();
    }
    let program = directory.join(build.name.replace(' ', "-"));
    let mut command = Command::new("go");
    command
        .current_dir(&source)
        .env("GO111MODULE", "off")
        // All builds share what they compile.
        .env("GOCACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("go-cache"))
        .env("CGO_ENABLED", if build.has_c { "1" } else { "0" })
        .args(["build", "-o"])
        .arg(&program)
        .args(build.flags)
        .arg(".");
    let done = command.output().unwrap_or_else(|error| panic!("go: {error}; apt-get install golang-go"));
    assert!(done.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&done.stderr));
    program
}

fn start(program: &Path, arguments: &[&str]) -> Running {
    let mut running = Running::start(Command::new(program).args(arguments).stdout(Stdio::piped()));
    let mut line = String::new();
    BufReader::new(running.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    running
}

fn labels(given: &[(&str, &str)]) -> Labels {
    given.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// The labels that each function must have.
fn expected() -> BTreeMap<&'static str, Labels> {
    let digits = "0123456789".repeat(30);
    let cut = format!("{}…", &digits[..256]);
    let many = (0..70).map(|i| (format!("key{i:02}"), format!("value{i}"))).collect();
    BTreeMap::from([
        ("main.spinWithout", labels(&[])),
        ("main.spinPlain", labels(&[("case", "plain")])),
        ("main.spinTwo", labels(&[("case", "two"), ("user", "Zoë")])),
        ("main.spinNested", labels(&[("case", "nested"), ("kept", "yes")])),
        ("main.spinLong", labels(&[("case", "long"), ("text", &digits[..200]), ("cut", &cut)])),
        ("main.spinInherited", labels(&[("case", "inherited")])),
        ("main.spinMany", many),
    ])
}

/// Samples of one program, with the names of their functions.
struct Sampled {
    /// The version of Go.
    version: String,
    samples: Vec<(Vec<String>, Labels, u64)>,
}

fn sampled(running: &Running) -> Sampled {
    let recording = record_for(4, 499, &["--pid", &running.0.id().to_string()]);
    let profile = &recording.profile;
    let text = |index: i64| profile.string_table[index as usize].as_str();
    let samples = profile.sample.iter().zip(&recording.stacks).map(|(sample, (stack, count))| {
        let of =
            |name| sample.label.iter().find(|label| text(label.key) == name).map(|label| text(label.str));
        assert_eq!(of("runtime"), Some("go"));
        assert!(of("runtime_version").is_some_and(|version| version.starts_with("1.")));
        let given = sample.label.iter().filter(|label| !OWN.contains(&text(label.key)));
        let labels = given.map(|label| (text(label.key).to_owned(), text(label.str).to_owned())).collect();
        (stack.clone(), labels, *count)
    });
    Sampled { version: proven::version_of(profile).to_owned(), samples: samples.collect() }
}

/// Checks that samples have the labels of the function that they are in.
#[track_caller]
fn check(what: &str, program: &Path) {
    let running = start(program, &[]);
    let Sampled { version, samples } = sampled(&running);
    let (expected, walking) = (expected(), labels(&[("case", "walk")]));
    let (mut all, mut good, mut without) = (0, 0, 0);
    let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
    let mut wrong: BTreeSet<String> = BTreeSet::new();
    for (stack, labels, count) in &samples {
        // A stack that is cut below a signal handler does not say whose it is.
        let is_burning = stack.iter().any(|name| name == "main.burn") && !is_marked(stack);
        let is_walking = stack.iter().any(|name| name == ON_OTHER_STACK);
        if !is_burning && !is_walking {
            continue;
        }
        let spin = stack.iter().find_map(|name| expected.get_key_value(name.as_str()));
        let is_right = match spin {
            None if is_walking => *labels == walking,
            Some((&"main.spinMany", wanted)) => {
                labels.len() == MOST && labels.iter().all(|(name, value)| wanted.get(name) == Some(value))
            }
            Some((_, wanted)) => labels == wanted,
            None => {
                labels.get("case").is_some_and(|case| case == "short")
                    && labels.get("number").is_some_and(|number| number.parse::<u32>().is_ok_and(|n| n < 7))
            }
        };
        all += count;
        if is_right {
            good += count;
            let other = if is_walking { "walk" } else { "short" };
            *seen.entry(spin.map_or(other, |(name, _)| name)).or_default() += count;
        } else if labels.is_empty() {
            without += count;
        } else {
            wrong.insert(format!("{stack:?} {labels:?}"));
        }
    }
    eprintln!("{what}: {good} good of {all}, {without} without labels; {seen:?}");
    assert!(wrong.is_empty(), "{what}: {wrong:#?}");
    // Until the agent has read the program's file, its samples have no labels.
    assert!(all >= 300 && without * 10 <= all, "{what}: {good} of {all}");
    assert!(seen.len() == expected.len() + 2, "{what}: {seen:?}");
    proven::note("go", &version, &format!("labels in a {what} build"), good, all);
}

#[test]
fn samples_have_the_labels_of_their_goroutine() {
    if let Ok(programs) = env::var(PROGRAMS) {
        for program in programs.split(':') {
            let program = Path::new(program);
            check(&program.file_name().unwrap().to_str().unwrap().replace('-', " "), program);
        }
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    for how in &BUILDS {
        let directory = directory.path().join(how.name.replace(' ', "-") + "-source");
        check(how.name, &build(&directory, how));
    }
}

#[test]
fn goroutines_without_labels_have_none() {
    let directory = tempfile::tempdir().unwrap();
    let program = build(directory.path(), &BUILDS[0]);
    let running = start(&program, &["without"]);
    let Sampled { samples, .. } = sampled(&running);
    let all: u64 = samples.iter().map(|(.., count)| count).sum();
    assert!(all >= 300, "{all}");
    assert!(samples.iter().all(|(_, labels, _)| labels.is_empty()), "no goroutine has labels");
}

/// Checks that processes of 50 ms have the labels of their goroutines from their first sample on, once the agent knows the executable.
#[test]
fn processes_of_50_ms_have_labels_from_their_first_sample() {
    let directory = tempfile::tempdir().unwrap();
    let program = build(directory.path(), &BUILDS[0]);
    let script = "while :; do \"$0\" once; done";
    let storm = Running::start(Command::new("sh").args(["-c", script]).arg(&program));
    // The agent reads the executable meanwhile.
    let recording = record_for(6, 199, &["--pid", &storm.0.id().to_string()]);
    drop(storm);
    let profile = &recording.profile;
    let text = |index: i64| profile.string_table[index as usize].as_str();
    // By process, oldest first: samples inside of the labelled function; those that have its label; those that have the runtime's.
    let mut processes: BTreeMap<i64, [u64; 3]> = BTreeMap::new();
    for (sample, (stack, count)) in profile.sample.iter().zip(&recording.stacks) {
        if !stack.iter().any(|name| name == "main.spinPlain") {
            continue;
        }
        let label = |name| sample.label.iter().find(|label| text(label.key) == name);
        let case = label("case").map(|label| text(label.str));
        assert!(case.is_none_or(|case| case == "plain"), "{case:?}");
        let of_process = processes.entry(label("pid").unwrap().num).or_default();
        of_process[0] += count;
        of_process[1] += if case.is_some() { *count } else { 0 };
        of_process[2] += if label("runtime").is_some() { *count } else { 0 };
    }
    let unknown = processes.values().take_while(|[_, labelled, _]| *labelled == 0).count();
    let [inside, labelled, named] =
        [0, 1, 2].map(|part| processes.values().skip(unknown).map(|counts| counts[part]).sum::<u64>());
    let known = processes.len() - unknown;
    eprintln!(
        "{labelled} with labels, {named} with a runtime of {inside} in {known} of {} processes",
        processes.len()
    );
    assert!(known >= 10 && known >= unknown, "{processes:?}");
    assert!(inside >= 100 && labelled * 100 >= inside * 99, "{labelled} of {inside}: {processes:?}");
    // The agent learns the runtime of each process by itself: a process may end first.
    assert!(named * 2 >= inside, "{named} of {inside}: {processes:?}");
}

/// The samples of one program: all, those with labels, those with a label that was cut, and those that were lost; and the counters
/// `labels_cut` and `labels_unsent`.
struct Counted {
    all: u64,
    labelled: u64,
    cut: u64,
    lost: u64,
    labels_cut: u64,
    labels_unsent: u64,
}

async fn counted(arguments: &[&str]) -> Counted {
    let directory = tempfile::tempdir().unwrap();
    let program = build_program("tests/data/LabelCounts.go", directory.path(), &BUILDS[0]);
    let windows = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&windows);
    let options = engine_options();
    let engine = Engine::start(options, move |window: Window| sink.lock().unwrap().push(window)).unwrap();
    let running = Running::start(Command::new(&program).args(arguments));
    let rule = ad_hoc("go", Match { pids: vec![running.0.id()], ..Match::default() }, 499, &[]);
    let set = SourceRules { rules: vec![rule], ..SourceRules::default() };
    assert_eq!(engine.replace(RuleSource::Local, set).await.unwrap(), []);
    tokio::time::sleep(Duration::from_secs(4) * slower()).await;
    drop(running);
    // The kernel takes no further sample, and the engine has those that it took.
    engine.flush().await.unwrap();
    let counters = engine.view().await.unwrap().counters.unwrap();
    engine.stop();
    let windows = windows.lock().unwrap();
    let profiles = windows.iter().flat_map(|window| &window.profiles);
    let stacks = profiles.flat_map(|profile| &profile.raw.processes).flat_map(|process| &process.stacks);
    let mut counted = Counted {
        all: 0,
        labelled: 0,
        cut: 0,
        lost: windows.iter().flat_map(|window| window.ledger.lost.values()).sum(),
        labels_cut: counters.labels_cut,
        labels_unsent: counters.labels_unsent,
    };
    for stack in stacks {
        let labels = stack.labels.as_ref().map(|labels| format!("{labels:?}")).unwrap_or_default();
        counted.all += stack.count;
        counted.labelled += if labels.is_empty() { 0 } else { stack.count };
        counted.cut += if labels.contains('…') { stack.count } else { 0 };
    }
    counted
}

#[tokio::test(flavor = "multi_thread")]
async fn each_sample_with_cut_labels_is_counted_once() {
    let Counted { all, labelled, cut, lost, labels_cut, labels_unsent } = counted(&[]).await;
    assert!(cut >= 50 && labelled >= cut + 50, "{cut} of {labelled} of {all}");
    assert!((cut..=cut + lost).contains(&labels_cut), "{labels_cut} counted, {cut} seen, {lost} lost");
    assert_eq!(labels_unsent, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_sample_whose_labels_cannot_be_read_is_counted_once() {
    let Counted { all, labelled, cut: _, lost, labels_cut, labels_unsent } = counted(&["unreadable"]).await;
    // Those from before the agent has read the program's file are not counted, nor those of the runtime's own threads.
    assert!(
        all >= 300 && 2 * labels_unsent >= all && labels_unsent <= all + lost,
        "{labels_unsent} of {all}"
    );
    assert_eq!((labelled, labels_cut), (0, 0));
}
