//! Runtimes whose functions have the names that the process lists: the agent says for each process whether it does, and what helps
//! if not. Needs root, a kernel with BTF, and Erlang, LuaJIT and Perl.

use std::{
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use gannet_agent::{
    engine::Engine,
    rules::{RuleSource, SourceRules, ad_hoc},
};
use gannet_proto::control::Match;

use crate::{
    common::{Running, in_order, proven, record_for, required, slower},
    runtimes::engine_with_tables,
};

const BUSY_PERL: &str =
    r#"$| = 1; print "ready\n"; sub inner { my $s = 0; $s += $_ for 1..1000; $s } inner() while 1;"#;

/// Starts a program, and waits until it says that it is ready.
fn start(command: &mut Command) -> Running {
    let mut running = Running::start(command.stdout(Stdio::piped()));
    let mut line = String::new();
    BufReader::new(running.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    running
}

fn data(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name).to_str().unwrap().to_owned()
}

/// Returns what a command prints.
fn printed(command: &mut Command) -> String {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}; scripts/install-packages test"));
    let text = String::from_utf8(output.stdout).unwrap();
    text.trim().to_owned()
}

/// Compiles the Erlang program into a directory, and starts it with more options.
fn erlang(directory: &Path, options: &[&str]) -> Running {
    let compiled = Command::new("erlc").arg("-o").arg(directory).arg(data("spin.erl")).status();
    assert!(
        compiled.is_ok_and(|status| status.success()),
        "this test runs erlc: apt-get install erlang-base"
    );
    start(Command::new("erl").args(options).args(["-noshell", "-s", "spin", "main", "-pa"]).arg(directory))
}

fn erlang_release() -> String {
    let print = "io:format(erlang:system_info(otp_release)), halt().";
    printed(Command::new("erl").args(["-noshell", "-eval", print]))
}

/// Checks that the Erlang functions of a process that lists them have names, and stand in the order of their calls.
#[test]
fn functions_of_erlang_have_the_names_of_its_perf_map() {
    let directory = tempfile::tempdir().unwrap();
    let running = erlang(directory.path(), &["+JPperf", "true"]);
    let recording = record_for(3, 199, &["--pid", &running.0.id().to_string()]);
    let share = |names: &[&str]| {
        let stacks = recording.stacks.iter().filter(|(stack, _)| in_order(stack, names));
        stacks.map(|(_, count)| count).sum::<u64>()
    };
    // In its first instruction a function has no frame yet, so that its caller is missing.
    let (all, named) = (share(&[]), share(&["$spin:loop/1", "$spin:inner/2"]));
    let in_full = share(&["$spin:loop/1", "$spin:outer/1", "$spin:inner/2"]);
    eprintln!("{in_full} and {named} of {all}");
    let is_good = all >= 100 && named * 100 >= all * 90 && in_full * 100 >= all * 80;
    assert!(is_good, "{in_full} and {named} of {all}: {:#?}", recording.stacks);
    let profile = &recording.profile;
    let text = |index: i64| profile.string_table[index as usize].as_str();
    for sample in &profile.sample {
        let label =
            |name| sample.label.iter().find(|label| text(label.key) == name).map(|label| text(label.str));
        assert_eq!((label("runtime"), label("runtime_version")), (Some("erlang"), Some(&*erlang_release())));
    }
    proven::note("erlang", &erlang_release(), "caller and function, by the perf map", named, all);
}

/// The version that `scripts/dotnet` fetches.
const DOTNET: &str = "3.1.23";

/// Starts the .NET program. `GANNET_TEST_DOTNET` names the host of the runtime, and the compiled program behind a `:`.
fn dotnet(perf_map: &str) -> Running {
    let paths = required("GANNET_TEST_DOTNET", "scripts/dotnet");
    let (host, program) = paths.split_once(':').unwrap();
    start(
        Command::new(host)
            .arg(program)
            .env("COMPlus_PerfMapEnabled", perf_map)
            .env("DOTNET_PerfMapEnabled", perf_map),
    )
}

#[test]
fn functions_of_dotnet_have_the_names_of_its_perf_map() {
    let running = dotnet("1");
    let recording = record_for(3, 199, &["--pid", &running.0.id().to_string()]);
    let (mut all, mut named) = (0, 0);
    for (stack, count) in &recording.stacks {
        all += count;
        let at = |function: &str| stack.iter().position(|name| name.contains(function));
        let calls = [at("Spin::Main("), at("Spin::Outer("), at("Spin::Inner(")];
        // A tick in one of the callers is none of the inner function.
        named += if calls.iter().flatten().count() >= 2 && calls.iter().flatten().is_sorted() {
            *count
        } else {
            0
        };
    }
    eprintln!("{named} of {all}");
    assert!(all >= 100 && named * 100 >= all * 90, "{named} of {all}: {:#?}", recording.stacks);
    proven::note("dotnet", DOTNET, "caller and function, by the perf map", named, all);
}

#[tokio::test]
async fn a_dotnet_process_shows_why_its_functions_have_no_names() {
    let (plain, mapped) = (dotnet("0"), dotnet("1"));
    let wanted = [
        (plain.0.id(), "it does not list the code that it makes: start it with COMPlus_PerfMapEnabled=1"),
        (mapped.0.id(), "ok, names from its perf map"),
    ]
    .map(|(pid, text)| (pid, format!("dotnet {DOTNET}: {text}")));
    let engine = sampling(&wanted).await;
    wait_for(&engine, &wanted).await;
    engine.stop();
}

/// Starts an engine that samples these processes.
async fn sampling(processes: &[(u32, String)]) -> Engine {
    let engine = engine_with_tables();
    let pids = processes.iter().map(|(pid, _)| *pid).collect();
    let rule = ad_hoc("listed", Match { pids, ..Match::default() }, 99, &[]);
    let set = SourceRules { rules: vec![rule], ..SourceRules::default() };
    assert_eq!(engine.replace(RuleSource::Local, set).await.unwrap(), []);
    engine
}

/// Waits until the engine says this of the interpreters of these processes.
async fn wait_for(engine: &Engine, wanted: &[(u32, String)]) {
    let end = Instant::now() + Duration::from_secs(90) * slower();
    loop {
        let mut seen = Vec::new();
        for (pid, _) in wanted {
            let process = engine.processes(Some(*pid)).await.unwrap().pop();
            seen.push((*pid, process.map_or_else(String::new, |process| process.interpreter)));
        }
        if seen == wanted {
            return;
        }
        assert!(Instant::now() < end, "{seen:#?}\nwanted {wanted:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Checks that the agent says of each process why it has no names, or where they come from.
#[tokio::test]
async fn each_process_shows_why_its_functions_have_no_names() {
    let directory = tempfile::tempdir().unwrap();
    let plain = erlang(directory.path(), &[]);
    let mapped = erlang(directory.path(), &["+JPperf", "map"]);
    let dumped = erlang(directory.path(), &["+JPperf", "dump"]);
    let luajit = start(Command::new("luajit").arg(data("spin.lua")));
    let perl = start(Command::new("perl").args(["-e", BUSY_PERL]));
    let release = erlang_release();
    let of_perl = printed(Command::new("perl").args(["-e", "printf '%vd', $^V"]));
    let of_luajit = printed(Command::new("luajit").args(["-e", "print(jit.version)"]));
    let of_luajit = of_luajit.strip_prefix("LuaJIT ").unwrap();
    let unlisted = "it does not list the code that it makes";
    let wanted = [
        (&plain, format!("erlang {release}: {unlisted}: start it with +JPperf true")),
        (&mapped, format!("erlang {release}: ok, names from its perf map")),
        (&dumped, format!("erlang {release}: ok, names from its jitdump")),
        (&luajit, format!("luajit {of_luajit}: {unlisted}: only builds with LUAJIT_USE_PERFTOOLS list it")),
        (&perl, format!("perl {of_perl}: the agent shows the C functions of the interpreter alone")),
    ]
    .map(|(running, text)| (running.0.id(), text));
    let engine = sampling(&wanted).await;
    wait_for(&engine, &wanted).await;
    // A runtime may begin to list its code while it runs.
    let map = format!("/tmp/perf-{}.map", plain.0.id());
    std::fs::write(&map, "").unwrap();
    let late = [(plain.0.id(), format!("erlang {release}: ok, names from its perf map"))];
    wait_for(&engine, &late).await;
    std::fs::remove_file(map).unwrap();
    engine.stop();
}
