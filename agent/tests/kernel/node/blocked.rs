//! Off-CPU stacks: a program prints the stack by which it blocks, and the sampled one must be the same.

use super::*;

const BLOCKING: &str = "tests/data/blocked.js";
const BLOCKING_CASES: [&str; 4] = ["callback", "deep", "read", "wait"];

/// Node 26 reads a file with 8.6 KB of stack in C, and the program has 3.6 KB of arguments between its own frames.
#[track_caller]
fn check(node: &str) {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join(BLOCKING);
    // The other cases take less time, so that the program waits for each byte.
    let mut writer = Running::start(
        Command::new("sh").args(["-c", "while sleep 0.2; do echo; done"]).stdout(Stdio::piped()),
    );
    let mut command = Command::new(node);
    command.arg(&program).stdin(writer.0.stdout.take().unwrap()).stdout(Stdio::piped());
    let mut running = Running::start(&mut command);
    let mut printed: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in BufReader::new(running.0.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        if line == "ready" {
            break;
        }
        let mut frames = line.split(';').map(str::to_owned);
        printed.insert(frames.next().unwrap(), frames.collect());
    }
    assert!(printed.keys().eq(&BLOCKING_CASES), "{printed:?}");
    let mut problem = None;
    // Each recording counts for itself: an off-CPU stack does not wait for the table of the engine, which takes the agent seconds on a
    // busy machine.
    for seconds in [8, 16, 32] {
        let recording = record_for(seconds, 99, &["--off-cpu", "--pid", &running.0.id().to_string()]);
        let (mut good, mut all, mut without) = (0, 0, 0);
        let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
        let mut odd: BTreeMap<String, u64> = BTreeMap::new();
        for sampled in stacks(&recording.profile, program.to_str().unwrap()) {
            let Sampled { frames, count, is_whole, all: shown } = sampled;
            // The engine's other threads wait too, and none of them runs generated code.
            if !shown.iter().any(|frame| frame.starts_with([' ', '[']) || frame.contains("Builtins_")) {
                continue;
            }
            // The kernel has unwound it by frame pointers, before it had the table of the engine.
            if is_whole && frames.is_empty() {
                without += count;
                continue;
            }
            all += count;
            match printed.iter().find(|(_, stack)| **stack == frames) {
                Some((case, _)) if is_whole => {
                    good += count;
                    *seen.entry(case).or_default() += count;
                }
                _ => *odd.entry(format!("{is_whole} {shown:?}")).or_default() += count,
            }
        }
        eprintln!("{node}: {good} good of {all}, {without} before the table; {seen:?}");
        if all >= 30 && good * 100 >= all * 97 && BLOCKING_CASES.iter().all(|case| seen.contains_key(case)) {
            proven::note("node", version(node).trim().trim_start_matches('v'), "off-CPU stacks", good, all);
            return;
        }
        problem = Some(format!("{good} of {all}, {seen:?}: {odd:#?}\n{}", recording.log));
    }
    panic!("{}\nexpected {printed:#?}", problem.unwrap_or_default());
}

#[test]
fn off_cpu_stacks_of_javascript_are_those_printed() {
    for node in nodes() {
        check(&node);
    }
}
