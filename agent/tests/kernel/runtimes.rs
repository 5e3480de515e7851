//! Programs of language runtimes, which must be installed. The machines of `make kernels` lack them, and skip this module.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use gannet_agent::{
    engine::{Engine, EngineOptions, Window},
    kernel::KernelOptions,
    rules::{RuleSource, SourceRules, ad_hoc},
    tables::TableSources,
};
use gannet_proto::control::Match;

use crate::{
    common::{Running, engine_options, slower},
    jit::{assert_named, record_command},
};

const PYTHON: &str = "/usr/bin/python3";

const SHORT_JS: &str = include_str!("../data/cases/short.js");

#[test]
fn functions_of_node_have_names_after_its_end() {
    let directory = tempfile::tempdir().unwrap();
    let script = directory.path().join("short.js");
    // By the clock on the wall, a starved process would spend most of its few samples on the start of node.
    let by_cpu_time = SHORT_JS.replace("Date.now()", "process.cpuUsage().user / 1000");
    assert_ne!(by_cpu_time, SHORT_JS);
    fs::write(&script, by_cpu_time).unwrap();
    let version = Command::new("node").arg("--version").output();
    assert!(
        version.is_ok_and(|output| output.status.success()),
        "this test runs node: apt-get install nodejs"
    );
    // V8 writes a log beside the perf map, into the working directory.
    let command = format!("cd {} && exec node", directory.path().display());
    let run = |flags: &str| {
        let flags = format!("{command} --interpreted-frames-native-stack {flags} short.js");
        record_command(&["sh", "-c", &flags])
    };
    // The perf map has no lines for functions that V8 has inlined into others. V8's own objects, if the agent can read this version, have.
    assert_named(&run("--perf-basic-prof --no-turbo-inlining"), "hotInner");
    assert_named(&run("--perf-basic-prof --turbo-inlining"), "hot");
    assert_named(&run("--perf-prof --no-turbo-inlining"), "hotInner");
}

fn engine(kernel: KernelOptions, tables: Option<TableSources>) -> Engine {
    let options = EngineOptions { kernel, tables, ..engine_options() };
    Engine::start(options, |_: Window| {}).unwrap()
}

/// Starts an engine that unwinds by tables, without rules.
pub(crate) fn engine_with_tables() -> Engine {
    engine(KernelOptions::default(), Some(TableSources::default()))
}

fn python(script: &str) -> Running {
    Running::start(Command::new(PYTHON).args(["-c", script]))
}

/// Returns the CPU time of a process with one thread.
fn cpu_time(pid: u32) -> Duration {
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// Checks that rules select processes by their language runtime: one that runs already, and one that starts later.
#[tokio::test]
async fn rules_match_processes_by_their_language_runtime() {
    let print = "import sys\nprint(f'{sys.version_info[0]}.{sys.version_info[1]}')";
    let printed = Command::new(PYTHON).args(["-c", print]).output().unwrap();
    let version = String::from_utf8(printed.stdout).unwrap().trim().to_owned();
    let of_version = |version: &str| Match {
        runtime: vec!["python".to_owned()],
        runtime_version: vec![version.to_owned()],
        ..Match::default()
    };
    let python = || python("import time\ntime.sleep(600)");
    let engine = engine(KernelOptions::default(), None);
    let before = python();
    let native = Running::start(Command::new("sleep").arg("600"));
    let of_java = Match { runtime: vec!["java".to_owned()], ..Match::default() };
    let rules = vec![
        ad_hoc("rule-0", of_version(&version), 19, &[]),
        ad_hoc("rule-1", of_version("2.7"), 19, &[]),
        ad_hoc("rule-2", of_java, 19, &[]),
    ];
    let set = SourceRules { rules, ..SourceRules::default() };
    assert_eq!(engine.replace(RuleSource::Local, set).await.unwrap(), []);
    let after = python();
    // The virtual machine is in a library, which the launcher maps later.
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/Spin.java");
    let java = Running::start(Command::new("java").arg(program).arg("1").stdout(Stdio::null()));
    let end = Instant::now() + Duration::from_secs(30) * slower();
    loop {
        let mut wanted = Vec::new();
        for (process, rule) in [(&before, "rule-0"), (&after, "rule-0"), (&java, "rule-2")] {
            let processes = engine.processes(Some(process.0.id())).await.unwrap();
            wanted.push(processes.iter().any(|process| process.rules == [rule]));
        }
        // The fourth is none, which the agent knows once it has read its files.
        let other = engine.processes(Some(native.0.id())).await.unwrap();
        let is_none = |(_, why): &(_, String)| why.contains("no language runtime");
        wanted
            .push(other.iter().any(|other| other.rules.is_empty() && other.explanation.iter().any(is_none)));
        if wanted == [true; 4] {
            break;
        }
        assert!(
            Instant::now() < end,
            "the running one, the new one, Java, and another: {wanted:?}, {other:?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    engine.stop();
}

/// Checks that BPF copies the texts of a function again if the ring buffer had no room for them: a function that was marked as
/// copied all the same would fail once.
#[tokio::test]
async fn texts_that_found_no_room_are_copied_again() {
    const BUSY: &str = "def busy():\n  while True: pass\nbusy()";
    let kernel = KernelOptions { ring_bytes: 32 << 10, ..KernelOptions::default() };
    let engine = engine(kernel, Some(TableSources::default()));
    let rule = ad_hoc("python", Match { comm: vec!["python3*".into()], ..Match::default() }, 499, &[]);
    let set = SourceRules { rules: vec![rule], ..SourceRules::default() };
    assert_eq!(engine.replace(RuleSource::Local, set).await.unwrap(), []);
    // From this one the agent learns the file's layout. It is older than the processes whose texts are copied.
    let first = python(BUSY);
    tokio::time::sleep(Duration::from_secs(2) * slower()).await;
    let unsent = async || engine.view().await.unwrap().counters.unwrap().functions_unsent;
    let before = unsent().await;
    let (go, wait) = mpsc::channel::<()>();
    engine.hold(wait).await.unwrap();
    // The ring buffer fills with the samples of the first. On a loaded machine it waits for a CPU most of the time.
    let full = cpu_time(first.0.id()) + Duration::from_secs(1) * slower();
    while cpu_time(first.0.id()) < full {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let _young = python(BUSY);
    tokio::time::sleep(Duration::from_millis(800)).await;
    drop(go);
    let failed = unsent().await - before;
    // Its two functions are in each sample, and those of its start are some fifty.
    assert!(failed > 100, "{failed} copies failed");
    engine.stop();
}
