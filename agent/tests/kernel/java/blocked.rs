//! Off-CPU stacks: a program prints the stack by which it blocks, and the sampled one must be the same.

use super::*;
use crate::{common::program, spans};

const BLOCKING: &str = "tests/data/Blocked.java";
const CASES: [&str; 6] = ["deep", "lock", "never", "park", "sleep", "wait"];
/// From when on the program has a thread that waits for ever. The recording has begun before.
const NEVER_AFTER_MS: u32 = 3000;
const SECONDS: u32 = 8;

/// Returns the frames of the program's own class.
fn own(frames: &[String]) -> Vec<String> {
    frames.iter().filter(|frame| frame.starts_with("Blocked.")).cloned().collect()
}

#[track_caller]
fn check(java: &str, case: &str, flags: &[&str], directory: &Path) {
    let never_after = NEVER_AFTER_MS * slower();
    let mut command = Command::new(java);
    command.args(flags).arg("-cp").arg(directory).args(["Blocked", &never_after.to_string()]);
    let mut running = Running::start(command.stdout(Stdio::piped()));
    let lines = BufReader::new(running.0.stdout.take().unwrap()).lines();
    // What it prints while it is recorded is read too.
    let (ready, is_ready) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut printed: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for line in lines.map_while(Result::ok) {
            if line == "ready" {
                let _ = ready.send(());
                continue;
            }
            let mut frames = line.split(';').map(str::to_owned);
            let name = frames.next().unwrap();
            printed.insert(name, own(&frames.collect::<Vec<_>>()));
        }
        printed
    });
    is_ready.recv().unwrap();
    let recording = record_for(SECONDS, 99, &["--off-cpu", "--pid", &running.0.id().to_string()]);
    drop(running);
    let printed = reader.join().unwrap();
    assert!(printed.keys().eq(CASES), "{printed:?}");

    let (mut good, mut all) = (0, 0);
    let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
    let mut odd: BTreeMap<String, u64> = BTreeMap::new();
    let stacks = java_stacks(&recording.profile).into_iter().zip(&recording.profile.sample);
    for (Sampled { frames, count, is_whole }, sample) in stacks {
        let frames = own(&frames);
        // The main thread waits for the others by lines that print nothing.
        let other = ["Blocked.hold ", "Blocked.print "];
        let is_main = frames.len() == 1 && frames[0].starts_with("Blocked.main ");
        let joins = frames.first().is_some_and(|leaf| leaf.starts_with("Blocked.lock "));
        if frames.is_empty() || is_main || other.iter().any(|name| frames[0].starts_with(name)) {
            continue;
        }
        let found = printed.iter().find(|(_, stack)| **stack == frames);
        if found.is_none() && joins {
            continue;
        }
        all += count;
        match found {
            Some((case, _)) if is_whole => {
                good += count;
                *seen.entry(case).or_default() += sample.value[1] as u64;
            }
            _ => *odd.entry(format!("{is_whole} {frames:?}")).or_default() += count,
        }
    }
    eprintln!("{java} {flags:?}: {good} good of {all}, {seen:?}");
    assert!(all >= 50 && good * 100 >= all * 99, "{good} of {all}: {odd:#?}\nexpected {printed:#?}");
    assert!(seen.keys().eq(&CASES), "{seen:?}");
    // Its thread is still blocked at the end.
    assert!(seen["never"] >= 1_000_000_000, "{seen:?}");
    proven::note("java", proven::version_of(&recording.profile), case, good, all);
}

#[test]
fn off_cpu_stacks_of_java_are_those_printed() {
    let directory = compiled(BLOCKING);
    for java in javas() {
        check(&java, "off-CPU stacks of the interpreter", &["-Xint"], directory.path());
        let compile = ["-Xcomp", "-XX:CompileCommand=quiet", "-XX:CompileCommand=compileonly,Blocked::*"];
        check(&java, "off-CPU stacks of compiled methods", &compile, directory.path());
    }
}

/// A library that is loaded with the virtual machine puts each thread into a span while it waits. The stacks come raw, and the span with
/// them.
#[test]
fn blocked_java_threads_have_their_span() {
    let flags = ["-shared", "-fPIC", "-ftls-model=initial-exec", "-DOWN_VARIABLE", "-DPRELOAD", "-ldl"];
    let library = program("spans-preload.so", spans::PROGRAM, &flags);
    let directory = compiled(BLOCKING);
    let mut command = Command::new(javas().into_iter().next().unwrap());
    // Its thread that waits for ever begins while it is recorded.
    let never_after = (5000 * slower()).to_string();
    command.arg("-Xint").arg("-cp").arg(directory.path()).args(["Blocked", &never_after]);
    let running = Running::start(command.env("LD_PRELOAD", library).stdout(Stdio::null()));
    // The agent reads a process of this age at its first sample.
    std::thread::sleep(Duration::from_secs(2));
    let recording = record_for(7, 99, &["--off-cpu", "--pid", &running.0.id().to_string()]);
    let (mut good, mut without, mut wrong) = (BTreeMap::new(), 0, Vec::new());
    for (stack, labels, count) in spans::samples(&recording) {
        let case = ["never", "park", "sleep"]
            .into_iter()
            .find(|case| stack.iter().any(|frame| frame.starts_with(&format!("Blocked.{case}"))));
        let Some(case) = case else { continue };
        match (labels.get("span_id"), labels["tid"].parse::<u64>()) {
            (None, _) => without += count,
            (Some(span), Ok(tid)) if *span == format!("{tid:016x}") => {
                *good.entry(case).or_insert(0) += count;
            }
            _ => wrong.push(format!("{stack:?} {labels:?}")),
        }
    }
    eprintln!("{good:?} good, {without} without, {} wrong", wrong.len());
    assert!(wrong.is_empty(), "{:#?}", &wrong[..wrong.len().min(9)]);
    assert!(good.len() == 3 && without * 20 <= good.values().sum(), "{good:?} {without}");
}
