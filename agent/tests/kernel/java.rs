//! Frames of Java programs: a program prints its own stack and spins, and the sampled stack must be the same, lines included.
//! Needs root, a kernel with BTF, and `java` and `javac` from 11 on. `GANNET_TEST_JAVAS` names other virtual machines, with `:`
//! between them.

mod blocked;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    env, fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use gannet_proto::profiles::{Location, Profile};

use crate::common::{Running, proven, record_for, slower};

const SYSTEM_JAVA: &str = "java";
/// Says which virtual machines to test: paths with `:` between them.
const JAVAS: &str = "GANNET_TEST_JAVAS";
const PROGRAM: &str = "tests/data/Spin.java";
/// Unloads six classes about every 60 ms, which is about how long a sample waits for its reading.
const UNLOADING: &str = "tests/data/Unload.java";
/// Redefines its class each time after some milliseconds.
const REDEFINING: &str = "tests/data/Redefine.java";
/// Makes it an agent in its own virtual machine.
const MANIFEST: &str = "Premain-Class: Redefine\nCan-Redefine-Classes: true\n";
/// A stack of a virtual thread goes on with the thread that carries it, which a `Throwable` does not show.
const VIRTUAL_END: &str = "java.lang.VirtualThread.run ";
const CARRIER: [&str; 3] = [
    "jdk.internal.vm.Continuation.run ",
    "java.lang.VirtualThread.runContinuation ",
    "java.util.concurrent.ForkJoinWorkerThread.run ",
];

/// One sampled stack of Java frames: `CLASS.METHOD LINE`, leaf first, how often it was sampled, and whether it is whole.
struct Sampled {
    frames: Vec<String>,
    count: u64,
    is_whole: bool,
}

/// Frames that a `Throwable` does not show either.
fn is_hidden(name: &str) -> bool {
    name.contains("$$Lambda") || name.contains("LambdaForm") || name == "java.lang.Thread.runWith"
}

fn java_stacks(profile: &Profile) -> Vec<Sampled> {
    let text = |index: i64| profile.string_table[index as usize].as_str();
    let functions: HashMap<u64, _> =
        profile.function.iter().map(|function| (function.id, function)).collect();
    let mappings: HashMap<u64, &str> =
        profile.mapping.iter().map(|mapping| (mapping.id, text(mapping.filename))).collect();
    let name = |location: &Location| {
        location.line.first().map_or("", |line| text(functions[&line.function_id].name)).to_owned()
    };
    let frame = |location: &Location| -> Option<String> {
        let name = name(location);
        let is_java = mappings.get(&location.mapping_id) == Some(&"[jvm]");
        // Blocks of code that are no methods have no class.
        let is_method = name.contains('.') && !is_hidden(&name);
        (is_java && is_method).then(|| format!("{name} {}", location.line[0].line))
    };
    let locations: HashMap<u64, (Option<String>, String)> =
        profile.location.iter().map(|location| (location.id, (frame(location), name(location)))).collect();
    let of = |sample: &gannet_proto::profiles::Sample| Sampled {
        frames: sample.location_id.iter().filter_map(|id| locations[id].0.clone()).collect(),
        count: sample.value[0] as u64,
        is_whole: sample.location_id.iter().all(|id| !locations[id].1.starts_with("[broken")),
    };
    profile.sample.iter().map(of).collect()
}

/// Reports whether the sampled frames of a case are those of the printed stack, and what carries it.
fn is_stack(case: &str, printed: &[String], sampled: &[String]) -> bool {
    if printed.last().is_some_and(|last| last.starts_with(VIRTUAL_END)) {
        let same = printed.iter().zip(sampled).take_while(|(printed, sampled)| printed == sampled).count();
        // The callers of a thread that waited may still be in the heap, not on its stack.
        let least = if case == "virtual thread that waited" { 1 } else { printed.len() };
        let mut rest = sampled[same..].iter();
        same >= least
            && CARRIER.iter().all(|name| rest.any(|frame| frame.starts_with(name)))
            && rest.next().is_none()
    } else {
        printed == sampled
    }
}

/// Compiles a program into a directory.
#[track_caller]
fn compiled(program: &str) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join(program);
    let compiled =
        Command::new("javac").args(["--release", "11", "-d"]).arg(directory.path()).arg(program).status();
    assert!(compiled.unwrap().success());
    directory
}

/// Returns the virtual machines to test.
fn javas() -> Vec<String> {
    let javas = env::var(JAVAS).unwrap_or_else(|_| SYSTEM_JAVA.to_owned());
    javas.split(':').map(str::to_owned).collect()
}

/// Checks that each stack is the one that the program printed. `case` says what runs the methods.
#[track_caller]
fn check(case: &str, flags: &[&str], rounds: u32) {
    let directory = compiled(PROGRAM);
    for java in javas() {
        check_java(&java, case, flags, directory.path(), rounds);
    }
}

#[track_caller]
fn check_java(java: &str, case: &str, flags: &[&str], directory: &Path, rounds: u32) {
    let mut command = Command::new(java);
    command.args(flags).arg("-cp").arg(directory).args(["Spin", &rounds.to_string()]);
    let mut running = Running::start(command.stdout(Stdio::piped()));
    let output = BufReader::new(running.0.stdout.take().unwrap());
    let mut lines = output.lines();
    let mut printed: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let cases: usize = lines.next().unwrap().unwrap().parse().unwrap();
    while printed.len() < cases {
        let line = lines.next().unwrap().unwrap();
        let mut frames = line.split(';').map(str::to_owned);
        let case = frames.next().unwrap();
        // Virtual machines whose debug information was stripped print -1.
        let line = |frame: String| frame.strip_suffix(" -1").map(|name| format!("{name} 0")).unwrap_or(frame);
        printed.insert(case, frames.filter(|frame| !is_hidden(frame)).map(line).collect());
    }
    let recording = record_for(5, 499, &["--pid", &running.0.id().to_string()]);
    drop(running);

    let text = |index: i64| recording.profile.string_table[index as usize].as_str();
    for sample in &recording.profile.sample {
        let label =
            |name| sample.label.iter().find(|label| text(label.key) == name).map(|label| text(label.str));
        assert_eq!(label("runtime"), Some("java"));
        assert!(label("runtime_version").is_some_and(|version| version.split('.').count() >= 3));
    }
    // It prints in the first line of `spin`, and loops until two lines below.
    let spin_line = |frame: &str| frame.strip_prefix("Spin.spin ").and_then(|line| line.parse::<u32>().ok());
    let first = spin_line(&printed["plain"][0]).unwrap();
    let (mut good, mut all, mut broken, mut java_samples, mut taken) = (0, 0, 0, 0, 0);
    let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
    let mut odd: BTreeMap<String, u64> = BTreeMap::new();
    for Sampled { frames, count, is_whole } in java_stacks(&recording.profile) {
        taken += count;
        if frames.is_empty() {
            continue;
        }
        java_samples += count;
        if !is_whole {
            broken += count;
            *odd.entry(format!("broken {frames:?}")).or_default() += count;
        }
        let Some(spin) = frames.iter().position(|frame| spin_line(frame).is_some()) else { continue };
        all += count;
        let leaves = ["Spin.burn ", "Spin.stack ", "java.lang.System.nanoTime "];
        let is_leaf = |frame: &String| leaves.iter().any(|leaf| frame.starts_with(leaf));
        let lines_fit = spin_line(&frames[spin]).is_some_and(|line| (first..=first + 2).contains(&line));
        let found = printed.iter().find(|(case, stack)| is_stack(case, &stack[1..], &frames[spin + 1..]));
        match found {
            Some((case, _))
                if frames[..spin].len() <= 1 && frames[..spin].iter().all(is_leaf) && lines_fit =>
            {
                good += count;
                *seen.entry(case).or_default() += count;
            }
            _ => *odd.entry(format!("{frames:?}")).or_default() += count,
        }
    }
    eprintln!(
        "{java} {flags:?}: {good} good of {all}, {broken} broken of {java_samples}, {taken} in all; {seen:?}"
    );
    // The others are of threads that compile and collect.
    assert!(all * 10 >= taken * 8, "{all} of {taken} samples are in the program");
    assert!(all >= 300 && good * 100 >= all * 99, "{good} of {all}: {odd:#?}\nexpected {printed:#?}");
    assert!(broken * 100 <= java_samples, "{broken} of {java_samples} broken: {odd:#?}");
    assert!(seen.len() == cases && seen.values().all(|count| *count >= 10), "{seen:?}");
    proven::note("java", proven::version_of(&recording.profile), case, good, all);
}

#[test]
fn stacks_of_the_java_interpreter_are_those_printed() {
    check("stacks of the interpreter", &["-Xint"], 1);
}

#[test]
fn stacks_of_the_first_java_compiler_are_those_printed() {
    check("stacks of C1", &["-XX:TieredStopAtLevel=1"], 20);
}

#[test]
fn stacks_of_inlined_java_methods_are_those_printed() {
    check("stacks of all, with inlining of C2", &[], 40);
}

/// Returns the number of the class, and the generation's last digit, that a frame of [`UNLOADING`] names.
fn number_and_generation(frame: &str) -> (Option<u32>, Option<u32>) {
    let digits = |rest: &str| rest.chars().take_while(char::is_ascii_digit).collect::<String>().parse().ok();
    let after = |prefix| frame.strip_prefix(prefix).and_then(digits);
    (after("Unload$Class"), after("Unload.generation"))
}

/// Checks that no stack has frames of two classes, or a class that another generation's method calls. At least `least` samples must
/// show a class and the method that called it.
#[track_caller]
fn check_unloaded(java: &str, flags: &[&str], least: u64, directory: &Path) {
    let mut command = Command::new(java);
    // A collection of such a heap takes few milliseconds.
    command.args(["-XX:+UseSerialGC", "-Xmx64m"]).args(flags).arg("-cp").arg(directory).arg("Unload");
    let mut running = Running::start(command.stdout(Stdio::piped()));
    BufReader::new(running.0.stdout.take().unwrap()).lines().next().unwrap().unwrap();
    let recording = record_for(4, 299, &["--pid", &running.0.id().to_string()]);
    drop(running);

    let (mut right, mut callers, mut taken, mut wrong) = (0, 0, 0, BTreeMap::<String, u64>::new());
    for Sampled { frames, count, .. } in java_stacks(&recording.profile) {
        taken += count;
        let (mut numbers, mut generations) = (BTreeSet::new(), BTreeSet::new());
        for (number, generation) in frames.iter().map(|frame| number_and_generation(frame)) {
            numbers.extend(number);
            generations.extend(generation);
        }
        let may_be = |number: &u32| generations.iter().all(|generation| number / 100 % 10 == *generation);
        if numbers.len() > 1 || generations.len() > 1 || !numbers.iter().all(may_be) {
            *wrong.entry(format!("{frames:?}")).or_default() += count;
        } else if !numbers.is_empty() && !generations.is_empty() {
            right += count;
        } else if !generations.is_empty() {
            callers += count;
        }
    }
    eprintln!(
        "{java} {flags:?}: {right} right, {} wrong, {callers} without a class, {taken} in all",
        wrong.values().sum::<u64>()
    );
    assert!(wrong.is_empty(), "{wrong:#?}");
    // A sample whose class may have been unloaded since has no name of a class. Methods that stay keep their names.
    assert!(
        right >= least && right + callers >= 20,
        "{right} of {taken} have a class, {callers} only a generation"
    );
    let case = "stacks without a wrong name, while classes are unloaded";
    proven::note("java", proven::version_of(&recording.profile), case, taken, taken);
}

#[test]
fn classes_that_are_unloaded_leave_no_wrong_names() {
    let directory = compiled(UNLOADING);
    for java in javas() {
        check_unloaded(&java, &[], 5, directory.path());
        // No class runs long enough to be known before a sample.
        check_unloaded(&java, &["-XX:-UsePerfData"], 0, directory.path());
    }
}

/// Returns the last digit of a frame's name in [`REDEFINING`].
fn chain_digit(frame: &str) -> Option<char> {
    let (name, _) = frame.split_once(' ')?;
    let named = ["Redefine.chain_", "Redefine$Work.outer_", "Redefine$Work.middle_", "Redefine$Work.leaf_"];
    named.iter().any(|begin| name.starts_with(begin)).then(|| name.chars().last()).flatten()
}

/// Checks that no stack has methods of two chains while the program redefines its class each time after some milliseconds. At least
/// `least` percent of the samples must show methods of the class that is redefined.
#[track_caller]
fn check_redefined(java: &str, flags: &[&str], milliseconds: u32, least: u64, jar: &Path) {
    let mut command = Command::new(java);
    command.args(flags).arg(format!("-javaagent:{}", jar.display())).arg("-cp").arg(jar);
    command.args(["Redefine", &milliseconds.to_string()]);
    let mut running = Running::start(command.stdout(Stdio::piped()));
    BufReader::new(running.0.stdout.take().unwrap()).lines().next().unwrap().unwrap();
    let recording = record_for(4, 299, &["--pid", &running.0.id().to_string()]);
    drop(running);

    let (mut whole, mut some, mut taken, mut wrong) = (0, 0, 0, BTreeMap::<String, u64>::new());
    for Sampled { frames, count, .. } in java_stacks(&recording.profile) {
        taken += count;
        let digits: BTreeSet<char> = frames.iter().filter_map(|frame| chain_digit(frame)).collect();
        let is_redefined = |frame: &String| frame.starts_with("Redefine$Work.");
        if digits.len() > 1 {
            *wrong.entry(format!("{frames:?}")).or_default() += count;
        } else if frames.iter().any(is_redefined) {
            whole += count;
        } else if !digits.is_empty() {
            some += count;
        }
    }
    eprintln!(
        "{java} {flags:?} each {milliseconds} ms: {whole} right, {} wrong, {some} with callers alone, {taken} in all",
        wrong.values().sum::<u64>()
    );
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(whole * 100 >= taken * least, "{whole} of {taken} name a method that is redefined");
    let case = "stacks without a wrong name, while a class is redefined";
    proven::note("java", proven::version_of(&recording.profile), case, taken, taken);
}

#[test]
fn classes_that_are_redefined_leave_no_wrong_names() {
    let directory = compiled(REDEFINING);
    let (manifest, jar) = (directory.path().join("manifest"), directory.path().join("redefine.jar"));
    fs::write(&manifest, MANIFEST).unwrap();
    let mut command = Command::new("jar");
    command.arg("--create").arg("--file").arg(&jar).arg("--manifest").arg(manifest);
    assert!(command.arg("-C").arg(directory.path()).arg(".").status().unwrap().success());
    for java in javas() {
        // An agent that redefines nothing costs no names.
        check_redefined(&java, &["-Xint"], 0, 80, &jar);
        for flags in [&[][..], &["-Xint"]] {
            check_redefined(&java, flags, 100, 10, &jar);
            check_redefined(&java, flags, 20, 0, &jar);
        }
    }
}
