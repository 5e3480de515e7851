//! Spans of traces on samples: programs that publish their spans record them too, and samples must agree with what they record. Needs
//! root and a kernel with BTF.

use std::{
    collections::{BTreeMap, HashMap},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use gannet_agent::{
    engine::{Engine, Window},
    rules::{RuleSource, SourceRules, ad_hoc},
};
use gannet_proto::control::{Capture, Match, Rule, capture};

use crate::common::{MUSL, Recording, Running, engine_options, program, record_for, slower};

pub(crate) const PROGRAM: &str = include_str!("../data/spans.c");
/// The part that has the thread-local variable, as a library.
const VARIABLE: &str = "#ifdef LARGE\n__thread char room[1 << 20];\nchar *use_room(void) { return room; }\n#endif\n\
                        __thread void *otel_thread_ctx_v1;\n\
                        void set_span(void *record) { *(void *volatile *)&otel_thread_ctx_v1 = record; }\n";
/// The flags of a static program that offers the variable to others.
const STATIC: [&str; 4] =
    ["-pthread", "-DOWN_VARIABLE", "-static-pie", "-Wl,--export-dynamic-symbol=otel_thread_ctx_v1"];
/// The agent reads a process that is older than this at its first sample, at a younger one later.
const OLD: Duration = Duration::from_millis(1300);

/// Spans as a program has recorded them, by id: thread, trace, function and local root span.
type Spans = HashMap<String, [String; 4]>;

/// A running program, and the spans that it has recorded so far.
pub(crate) struct Traced {
    running: Running,
    spans: Arc<Mutex<Spans>>,
}

impl Traced {
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut running = Running::start(command.stdout(Stdio::piped()));
        let mut lines = BufReader::new(running.0.stdout.take().unwrap()).lines();
        assert_eq!(lines.next().unwrap().unwrap(), "ready");
        let spans = Arc::<Mutex<Spans>>::default();
        let theirs = Arc::clone(&spans);
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let [thread, trace, span, function, root] = line.split(' ').collect::<Vec<_>>()[..] else {
                    continue;
                };
                let facts = [thread, trace, function, root].map(str::to_owned);
                theirs.lock().unwrap().insert(span.to_owned(), facts);
            }
        });
        thread::sleep(OLD);
        Self { running, spans }
    }

    fn record(&self, more: &[&str]) -> Recording {
        record_for(4, 499, &[&["--pid", &self.running.0.id().to_string()], more].concat())
    }
}

/// Returns the labels of each sample with its stack and count.
pub(crate) fn samples(
    recording: &Recording,
) -> impl Iterator<Item = (&Vec<String>, BTreeMap<&str, String>, u64)> {
    let profile = &recording.profile;
    let text = |index: i64| profile.string_table[index as usize].as_str();
    profile.sample.iter().zip(&recording.stacks).map(move |(sample, (stack, count))| {
        let of = |label: &gannet_proto::profiles::Label| match label.str {
            0 => label.num.to_string(),
            index => text(index).to_owned(),
        };
        let labels = sample.label.iter().map(|label| (text(label.key), of(label))).collect();
        (stack, labels, *count)
    })
}

/// Checks that each sample has the span that its thread was in, and none outside of spans.
#[track_caller]
pub(crate) fn check(what: &str, traced: &Traced, has_routes: bool) {
    agree(what, traced, has_routes, &traced.record(&[]));
}

/// Checks that each sample of a recording has the span that its thread was in, and none outside of spans.
#[track_caller]
fn agree(what: &str, traced: &Traced, has_routes: bool, recording: &Recording) {
    let spans = traced.spans.lock().unwrap().clone();
    let (mut good, mut without, mut outside) = (0, 0, 0);
    let mut wrong = Vec::new();
    for (stack, labels, count) in samples(recording) {
        let of = |name: &str| labels.get(name).map(String::as_str);
        let spin = stack.iter().find(|name| name.starts_with("spin_"));
        let Some(spin) = spin else {
            if stack.iter().any(|name| name == "outside") {
                outside += count;
                if of("span_id").is_some() || of("trace_id").is_some() {
                    wrong.push(format!("outside {labels:?}"));
                }
            }
            continue;
        };
        let Some(span) = of("span_id") else {
            without += count;
            continue;
        };
        let facts = ["tid", "trace_id", "function", "local_root_span_id"].map(|name| match name {
            "function" => Some(spin.as_str()),
            name => of(name),
        });
        let is_recorded = spans
            .get(span)
            .is_some_and(|recorded| recorded.each_ref().map(|fact| Some(fact.as_str())) == facts);
        let route = has_routes.then(|| format!("/{}", &spin[5..]));
        let is_right = is_recorded && of("http.route") == route.as_deref();
        if is_right {
            good += count;
        } else {
            wrong.push(format!("{spin} {labels:?}, recorded {:?}", spans.get(span)));
        }
    }
    eprintln!("{what}: {good} good, {without} without, {outside} outside of spans, {} wrong", wrong.len());
    assert!(wrong.is_empty(), "{what}: {:#?}", &wrong[..wrong.len().min(9)]);
    // Until the agent has read where the spans are, samples have none.
    assert!(good >= 40 && without <= good && outside >= 10, "{what}: {good} {without} {outside}");
}

fn library(name: &str, flags: &[&str]) -> PathBuf {
    program(name, VARIABLE, &[&["-shared", "-fPIC"], flags].concat())
}

/// A program that links a library with the variable. It finds the library by its own place, so that both can be copied to another system.
fn linked(what: &str, flags: &[&str]) -> Command {
    let file = format!("libspans-{what}.so");
    let library = library(&file, &[flags, &[&format!("-Wl,-soname,{file}")]].concat());
    let directory = library.parent().and_then(Path::file_name).unwrap().to_str().unwrap();
    let name = format!("-l:{file}");
    let (search, path) = (format!("-L../../{directory}"), format!("-Wl,-rpath,$ORIGIN/../{directory}"));
    Command::new(program(&format!("spans-{what}"), PROGRAM, &["-pthread", &search, &path, &name]))
}

#[test]
fn samples_have_the_span_of_their_thread() {
    let own = ["-pthread", "-DOWN_VARIABLE", "-rdynamic"];
    for (what, mut command) in [
        ("a program", Command::new(program("spans-own", PROGRAM, &own))),
        ("a static program", Command::new(program("spans-static", PROGRAM, &STATIC))),
        ("a program of musl", Command::new(program("spans-musl", PROGRAM, &[&own[..], &MUSL].concat()))),
        ("a library by descriptor", linked("descriptor", &["-mtls-dialect=gnu2"])),
        ("a library by call", linked("call", &["-mtls-dialect=gnu"])),
        ("a library by distance", linked("distance", &["-ftls-model=initial-exec"])),
    ] {
        check(what, &Traced::start(command.arg("3")), true);
    }
}

#[test]
fn samples_have_spans_of_libraries_opened_later() {
    for (what, libc) in [("glibc", &[][..]), ("musl", &MUSL)] {
        let opens = program("spans-opens", PROGRAM, &[libc, &["-pthread", "-DOPENS", "-ldl"]].concat());
        for access in ["-mtls-dialect=gnu2", "-mtls-dialect=gnu"] {
            // More than the loader has room for beside the program's own variables.
            let library =
                library(&format!("opened{access}-{what}.so"), &[libc, &[access, "-DLARGE"]].concat());
            let traced = Traced::start(Command::new(&opens).arg("3").arg(library));
            check(&format!("an opened library of {what} by {access}"), &traced, true);
        }
    }
}

#[test]
fn blocked_threads_have_their_span() {
    let own = ["-pthread", "-DOWN_VARIABLE", "-rdynamic", "-DBLOCKS"];
    let traced = Traced::start(Command::new(program("spans-blocks", PROGRAM, &own)).arg("3"));
    agree("blocked", &traced, true, &traced.record(&["--off-cpu"]));
}

fn rule(id: &str, matches: Match, only_in_span: bool) -> Rule {
    let rule = ad_hoc(id, matches, 199, &[]);
    let capture = rule.capture.map(|capture| Capture { only_in_span, ..capture });
    Rule { capture, ..rule }
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_select_services_and_spans() {
    let windows = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&windows);
    let options = engine_options();
    let engine = Engine::start(options, move |window: Window| sink.lock().unwrap().push(window)).unwrap();
    let own = ["-pthread", "-DOWN_VARIABLE", "-rdynamic"];
    let traced = Traced::start(Command::new(program("spans-own", PROGRAM, &own)).arg("2"));
    let sleeps = program("spans-blocks", PROGRAM, &[&own[..], &["-DBLOCKS"]].concat());
    let _sleeps = Traced::start(Command::new(sleeps).arg("2"));
    let of_service = |name: &str| Match { service: vec![name.into()], ..Match::default() };
    let pids = Match { pids: vec![traced.running.0.id()], ..Match::default() };
    let mut blocked = rule("blocked", of_service("span-shop"), true);
    blocked.capture.as_mut().unwrap().kind = vec![capture::Kind::OffCpu.into()];
    let rules = vec![
        rule("service", of_service("span-sh*"), false),
        rule("elsewhere", of_service("span-sh"), false),
        rule("in-span", pids, true),
        blocked,
    ];
    let set = SourceRules { rules, ..SourceRules::default() };
    assert_eq!(engine.replace(RuleSource::Local, set).await.unwrap(), []);
    // A process that comes later, and gives its name by a variable.
    let mut shell = Command::new("sh");
    let shell = shell.args(["-c", "while :; do :; done"]).env("OTEL_SERVICE_NAME", "span-shell");
    let shell = Running::start(shell);
    tokio::time::sleep(Duration::from_secs(5) * slower()).await;
    engine.flush().await.unwrap();
    engine.stop();
    drop(shell);
    let windows = windows.lock().unwrap();
    let mut seen: BTreeMap<(String, String), [u64; 2]> = BTreeMap::new();
    for profile in windows.iter().flat_map(|window| &window.profiles) {
        let stacks = profile.raw.processes.iter().flat_map(|process| &process.stacks);
        for stack in stacks {
            let labels = stack.labels.as_ref().map(|labels| format!("{labels:?}")).unwrap_or_default();
            let key = (profile.rule.id.clone(), profile.labels["service_name"].clone());
            let [all, in_span] = seen.entry(key).or_default();
            *all += stack.count;
            *in_span += if labels.contains("span_id") { stack.count } else { 0 };
        }
    }
    eprintln!("{seen:?}");
    let of =
        |rule: &str, service: &str| seen.get(&(rule.into(), service.into())).copied().unwrap_or_default();
    let [all, in_span] = of("service", "span-shop");
    assert!(all > in_span && in_span >= 20, "{seen:?}");
    assert!(of("service", "span-shell")[0] >= 20, "{seen:?}");
    let [all, in_span] = of("blocked", "span-shop");
    assert!(all == in_span && all >= 20, "{seen:?}");
    let [all, in_span] = of("in-span", "span-shop");
    assert!(all == in_span && all >= 20, "{seen:?}");
    assert!(seen.keys().all(|(rule, _)| rule != "elsewhere"), "{seen:?}");
}
