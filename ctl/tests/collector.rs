//! gannetctl against a running collector. The tests send it profiles and node states through its gRPC services.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use gannet_collector::{Collector, Config, Running, TlsOptions};
use gannet_proto::{
    connect::{self, Dial},
    control::{
        AgentMessage, Answer, CaptureChunk, CaptureDone, CaptureProgress, CaptureStarted, NodeHello,
        NodeStatus, Question, RuleError, RuleStatus, RulesApplied, RulesRejected, ServerMessage,
        agent_message, agent_service_client::AgentServiceClient, answer, capture_progress, rule_status,
        server_message,
    },
    ingest::{Batch, PushRequest, ingest_service_client::IngestServiceClient, push_request, push_response},
    ledger::Ledger,
    pprof::{self, Builder, Header, Label, LabelValue, Line, Mapping},
};
use gannetctl::{Console, parse, run};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

const RULES: &str = "rules:\n- id: sample\n  match: {comm: [sample*]}\n- id: web\n  match: {exe: [/usr/bin/web]}\n  \
                     capture: {hz: 199}\n  lifetime: {ttl: 20m}\n";

/// Id of the span of the function `work`.
const SPAN: &str = "53995c3f42cd8ad8";

struct Setup {
    collector: Option<Running>,
    url: String,
    dir: tempfile::TempDir,
}

struct Outcome {
    code: u8,
    out: String,
    err: String,
}

impl Setup {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::new(dir.path().join("data"));
        change(&mut config);
        let collector = Collector::start(config).await.unwrap();
        let url = format!("http://{}", collector.grpc_addr);
        Self { collector: Some(collector), url, dir }
    }

    async fn end(mut self) {
        self.collector.take().unwrap().shutdown().await;
    }

    /// Runs gannetctl with arguments that are separated by spaces.
    async fn ctl(&self, words: &str) -> Outcome {
        self.run(&words.split(' ').collect::<Vec<_>>()).await
    }

    async fn run(&self, args: &[&str]) -> Outcome {
        let args = ["gannetctl", "--endpoint", &self.url].into_iter().chain(args.iter().copied());
        let cli = parse(args.map(Into::into)).unwrap_or_else(|error| panic!("{error}"));
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut console = Console { out: &mut out, err: &mut err, terminal: false };
        let code = run(cli, &mut console).await;
        Outcome {
            code,
            out: String::from_utf8_lossy(&out).into_owned(),
            err: String::from_utf8(err).unwrap(),
        }
    }

    #[track_caller]
    fn file(&self, name: &str, text: &str) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn connection(&self) -> connect::Connection {
        connect::connect(&Dial { url: self.url.clone(), ..Dial::default() }).unwrap()
    }

    /// Pushes one profile of a service with `work` samples of the function `work`. Returns its id.
    async fn push(&self, service: &str, work: i64, seconds_ago: i64) -> String {
        let start = std::time::SystemTime::now() - Duration::from_secs(seconds_ago.unsigned_abs());
        let span = [Label { key: "span_id", value: LabelValue::Str(SPAN) }];
        let profile = app_profile(work, start, &span);
        let batch_id = ulid::Ulid::new().to_string();
        let samples = work.unsigned_abs() + 10;
        let ledger = Ledger { ticks: 1000, taken: samples, delivered: samples, ..Ledger::default() };
        let batch = Batch {
            batch_id: batch_id.clone(),
            sequence: 1,
            labels: BTreeMap::from([
                ("service_name".to_owned(), service.to_owned()),
                ("node".to_owned(), "n1".to_owned()),
            ]),
            pprof: pprof::encode(&profile),
            samples,
            start: Some(start.into()),
            duration: Some(prost_types::Duration { seconds: 10, nanos: 0 }),
            rule_id: "sample".to_owned(),
            revision: 1,
            reason: "always".to_owned(),
            window_id: ulid::Ulid::new().to_string(),
            ledger: Some(ledger.into()),
            piece: None,
        };
        let hello = push_request::Hello {
            node: "n1".to_owned(),
            version: gannet_proto::VERSION.to_owned(),
            at: None,
        };
        let messages = [push_request::Message::Hello(hello), push_request::Message::Batch(batch)]
            .map(|message| PushRequest { message: Some(message) });
        let mut client = IngestServiceClient::new(self.connection());
        let mut answers = client.push(tokio_stream::iter(messages)).await.unwrap().into_inner();
        loop {
            match answers.message().await.unwrap().expect("an answer").message.unwrap() {
                push_response::Message::Limits(_) => {}
                push_response::Message::Accepted(accepted) => {
                    assert_eq!(accepted.batch_id, batch_id);
                    return batch_id;
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn profiles_are_deleted_after_a_dry_run_and_a_yes() {
    let setup = Setup::new().await;
    let ids = [setup.push("checkout", 20, 60).await, setup.push("checkout", 5, 7200).await];
    let other = setup.push("search", 30, 60).await;
    let delete = ["profiles", "delete", "--selector", "{service_name=\"checkout\"}"];
    let run = async |more: &[&str]| setup.run(&[&delete[..], more].concat()).await;

    let dry = run(&["--dry-run"]).await;
    assert_eq!((dry.code, dry.err.as_str()), (0, ""));
    assert!(dry.out.starts_with("would delete 2 profiles of 1 series with 45 samples, "), "{}", dry.out);
    let json = run(&["--dry-run", "--since", "1h", "-o", "json"]).await;
    let value: Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!((&value["profiles"], &value["deletion_id"]), (&json!(1), &Value::Null), "{value}");
    // The standard input of a test is no terminal, so there is no answer.
    let unasked = run(&[]).await;
    assert_eq!(unasked.code, 2);
    assert!(unasked.err.contains("give --yes") && unasked.err.contains("2 profiles"), "{}", unasked.err);
    let none = run(&["--until", "now-5h"]).await;
    assert_eq!((none.code, none.out.as_str()), (0, "no profile matches; nothing is deleted\n"));
    for (args, says) in [
        (&["profiles", "delete", "--yes"][..], "give labels, `from` or `until`"),
        (&["profiles", "delete", "-q", "{nmaespace=\"x\"}", "--yes"], "has the label `nmaespace`"),
        (&["profiles", "delete", "--from", "now-1h", "--until", "now-2h", "--yes"], "exchange both"),
    ] {
        let refused = setup.run(args).await;
        assert!(refused.code == 1 && refused.err.contains(says), "{}", refused.err);
    }
    assert_eq!(setup.ctl("profiles list --since 5h").await.out.lines().count(), 4);

    let deleted = run(&["--until", "now-1h", "--yes"]).await;
    assert_eq!((deleted.code, deleted.err.as_str()), (0, ""));
    assert!(deleted.out.starts_with("deleted 1 profile of 1 series with 15 samples, "), "{}", deleted.out);
    let id = deleted.out.trim().rsplit(' ').next().unwrap().to_owned();
    let listed = setup.ctl("profiles list --since 5h").await.out;
    assert!(listed.contains(&ids[0]) && listed.contains(&other) && !listed.contains(&ids[1]), "{listed}");
    let audit = setup.ctl("rules audit").await.out;
    assert!(audit.contains("delete-profiles") && audit.contains("1 profiles (15 samples, "), "{audit}");
    let mut pending = setup.ctl("profiles deletions").await;
    for _ in 0..600 {
        if pending.out == "all deletions are carried out\n" {
            break;
        }
        assert!(pending.code == 0 && pending.out.contains(&id), "{}", pending.out);
        tokio::time::sleep(Duration::from_millis(100)).await;
        pending = setup.ctl("profiles deletions").await;
    }
    assert_eq!(setup.ctl("profiles deletions -o json").await.out, "{\n  \"deletions\": []\n}\n");
    setup.end().await;
}

/// Returns a profile with `work` samples of the function `work`, which have the labels, and ten of others.
fn app_profile(work: i64, start: std::time::SystemTime, labels: &[Label<'_>]) -> pprof::Profile {
    let mut builder = Builder::new(Header {
        sample_types: &[("samples", "count"), ("cpu", "nanoseconds")],
        period_type: ("cpu", "nanoseconds"),
        period: 10_000_000,
        time_nanos: start.duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as i64,
        duration_nanos: 10_000_000_000,
    });
    let app =
        builder.mapping(Mapping { start: 0x1000, limit: 0x9000, file: "/usr/bin/app", ..Mapping::default() });
    let line = |name| Line { name, ..Line::default() };
    let main = builder.location(Some(app), 0x1100, &[line("main")]);
    let worker = builder.location(Some(app), 0x1200, &[line("work")]);
    let idle = builder.location(Some(app), 0x1300, &[line("idle")]);
    builder.sample(&[worker, main], &[work, work * 10_000_000], labels);
    builder.sample(&[idle, main], &[10, 100_000_000], &[]);
    builder.finish()
}

/// An agent that accepts each rule set, or rejects it because of one rule.
struct Agent {
    sender: mpsc::Sender<AgentMessage>,
    task: tokio::task::JoinHandle<()>,
}

impl Agent {
    async fn new(setup: &Setup, name: &str, rejects: Option<&'static str>) -> Self {
        let (sender, receiver) = mpsc::channel(8);
        let say = |message| AgentMessage { message: Some(message) };
        let hello = NodeHello {
            node: name.to_owned(),
            version: "0.1.0".to_owned(),
            kernel: "6.12.1".to_owned(),
            arch: "x86_64".to_owned(),
            ..NodeHello::default()
        };
        sender.send(say(agent_message::Message::Hello(hello))).await.unwrap();
        let mut client = AgentServiceClient::new(setup.connection());
        let mut rules = client.connect(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        let answers = sender.clone();
        let task = tokio::spawn(async move {
            while let Ok(Some(ServerMessage { message: Some(server_message::Message::Rules(set)) })) =
                rules.message().await
            {
                let (revision, nonce) = (set.revision, set.nonce);
                let rejected = rejects.filter(|id| set.rules.iter().any(|rule| rule.id == *id));
                let answer = match rejected {
                    None => agent_message::Message::Applied(RulesApplied {
                        revision,
                        nonce,
                        digest: set.digest.clone(),
                        partial: Vec::new(),
                    }),
                    Some(id) => agent_message::Message::Rejected(RulesRejected {
                        revision,
                        nonce,
                        errors: vec![RuleError {
                            rule_id: id.to_owned(),
                            field: "capture.hz".to_owned(),
                            reason: "is 199, and the cap (max_hz) is 100: give 1 to 100".to_owned(),
                        }],
                    }),
                };
                if answers.send(say(answer)).await.is_err() {
                    return;
                }
                let rules = set
                    .rules
                    .iter()
                    .filter(|_| rejected.is_none())
                    .map(|rule| RuleStatus {
                        rule_id: rule.id.clone(),
                        state: rule_status::State::Capturing.into(),
                        processes: 3,
                        samples: 77,
                        ..RuleStatus::default()
                    })
                    .collect();
                let status = NodeStatus {
                    active_revision: if rejected.is_none() { revision } else { 0 },
                    active_digest: if rejected.is_none() { set.digest } else { String::new() },
                    rules,
                    processes_armed: 3,
                    ..NodeStatus::default()
                };
                if answers.send(say(agent_message::Message::Status(status))).await.is_err() {
                    return;
                }
            }
        });
        Self { sender, task }
    }

    async fn end(self) {
        drop(self.sender);
        self.task.abort();
        let _ = self.task.await;
    }
}

#[tokio::test]
async fn rules_are_applied_listed_shown_and_deleted() {
    let setup = Setup::new().await;
    let file = setup.file("rules.yaml", RULES);

    let dry = setup.ctl(&format!("rules apply -f {file} --dry-run")).await;
    assert_eq!((dry.code, dry.out.contains("would change")), (0, true), "{}{}", dry.out, dry.err);
    assert_eq!(setup.ctl("rules list").await.out, "no rules\n");

    let applied = setup.ctl(&format!("rules apply -f {file} -o json")).await;
    assert_eq!(applied.code, 0, "{}", applied.err);
    let answer: Value = serde_json::from_str(&applied.out).unwrap();
    assert_eq!(answer["changed"], true);
    let again = setup.ctl(&format!("rules apply -f {file}")).await;
    assert!(again.out.contains("is unchanged"), "{}", again.out);

    let list = setup.ctl("rules list").await.out;
    assert!(list.contains("sample") && list.contains("comm=sample*") && list.contains("20m"), "{list}");
    let shown = setup.ctl("rules show").await.out;
    let back = setup.file("back.yaml", &shown);
    assert!(setup.ctl(&format!("rules apply -f {back}")).await.out.contains("is unchanged"), "{shown}");
    let one: Value = serde_json::from_str(&setup.ctl("rules show web -o json").await.out).unwrap();
    assert_eq!(one["rules"][0]["capture"]["hz"], 199);
    let missing = setup.ctl("rules show nothing").await;
    assert_eq!(missing.code, 1);
    assert!(
        missing.err.contains("scope `default` has no rule `nothing`; it has sample, web"),
        "{}",
        missing.err
    );

    let stale = setup.ctl(&format!("rules apply -f {file} --etag stale")).await;
    assert_eq!(stale.code, 1);
    assert!(stale.err.contains("another change of scope `default` came first"), "{}", stale.err);

    assert_eq!(setup.ctl("rules delete web").await.code, 0);
    assert!(!setup.ctl("rules list").await.out.contains("web"));
    assert_eq!(setup.ctl("rules delete --all").await.code, 0);
    assert_eq!(setup.ctl("rules list").await.out, "no rules\n");
    setup.end().await;
}

#[tokio::test]
async fn mistakes_in_rules_are_named_by_gannetctl_and_the_collector() {
    let setup = Setup::new().await;
    let bad = setup.file("bad.yaml", "rules:\n- id: a\n  match: {com: [x]}\n- id: b\n  capture: {hz: 0}\n");
    let outcome = setup.ctl(&format!("rules apply -f {bad}")).await;
    assert_eq!(outcome.code, 1);
    assert_eq!(outcome.err.lines().count(), 2, "{}", outcome.err);
    assert!(outcome.err.contains("bad.yaml:3:11: rule `a`: match.com: unknown field"), "{}", outcome.err);
    let bad =
        setup.file("bad.yaml", "rules: [{id: a, match: {comm: [sixteen-bytes-xx]}, capture: {hz: 5000}}]");
    let outcome = setup.ctl(&format!("rules validate -f {bad}")).await;
    assert_eq!(outcome.code, 1);
    for field in ["match.comm[0]", "capture.hz", "lifetime.ttl"] {
        assert!(outcome.err.contains(field), "{}", outcome.err);
    }
    let empty = setup.file("empty.yaml", "rules: []");
    let outcome = setup.ctl(&format!("rules apply -f {empty}")).await;
    assert_eq!((outcome.code, outcome.err.contains("--allow-empty")), (2, true), "{}", outcome.err);
    assert_eq!(setup.ctl(&format!("rules apply -f {empty} --allow-empty")).await.code, 0);
    // The collector checks the name of the scope and answers with one line for each field.
    let always = setup.file("always.yaml", "rules: [{id: a, match: {comm: [x]}, capture: {hz: 99}}]");
    let outcome = setup.ctl(&format!("rules apply -f {always}")).await;
    assert!(outcome.err.contains("lifetime.ttl: is missing: a rule without `when`"), "{}", outcome.err);
    let good = setup.file("good.yaml", RULES);
    let outcome = setup.ctl(&format!("rules apply -f {good} --scope Not_A_Scope")).await;
    assert_eq!(outcome.code, 1);
    assert!(
        outcome.err.lines().any(|line| line.contains("scope") && line.contains("Not_A_Scope")),
        "{}",
        outcome.err
    );
    let outcome = setup.ctl("rules validate -f /nonexistent.yaml").await;
    assert!(outcome.err.contains("/nonexistent.yaml: No such file"), "{}", outcome.err);
    setup.end().await;
}

#[tokio::test]
async fn a_rejection_fails_the_watch_of_a_rollout() {
    let setup = Setup::new().await;
    let n1 = Agent::new(&setup, "n1", None).await;
    let file = setup.file("rules.yaml", RULES);
    let applied = setup.ctl(&format!("rules apply -f {file} --wait --timeout 20s")).await;
    assert_eq!(applied.code, 0, "{}{}", applied.out, applied.err);
    assert!(applied.out.contains("n1 APPLIED"), "{}", applied.out);

    let n2 = Agent::new(&setup, "n2", Some("web")).await;
    let watched = setup.ctl("rollout watch --timeout 20s").await;
    assert_eq!(watched.code, 1, "{}", watched.out);
    assert!(watched.out.contains("n2 REJECTED"), "{}", watched.out);
    assert!(watched.out.contains("rule `web`: capture.hz: is 199"), "{}", watched.out);
    assert!(watched.err.contains("was rejected by n2"), "{}", watched.err);

    let explained = setup.ctl("rules explain web --node n2").await.out;
    assert!(explained.contains("REJECTED") && explained.contains("capture.hz: is 199"), "{explained}");
    assert!(explained.contains("the node does not run it"), "{explained}");
    // The node sends its status after the acknowledgement.
    let explained = loop {
        let explained: Value =
            serde_json::from_str(&setup.ctl("rules explain sample --node n1 -o json").await.out).unwrap();
        if !explained["status"].is_null() {
            break explained;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert_eq!(explained["status"]["state"], "CAPTURING");
    assert_eq!(explained["rollout"], "APPLIED");
    let unknown = setup.ctl("rules explain web --node n9").await;
    assert!(unknown.err.contains("does not know a node `n9`; it knows n1, n2"), "{}", unknown.err);

    let audit = setup.ctl("rules audit --node n2").await.out;
    assert!(audit.contains("REJECTED") && audit.contains("capture.hz: is 199"), "{audit}");
    let check = setup.ctl("check").await;
    assert_eq!(check.code, 1, "{}", check.out);
    assert!(check.out.contains("n2: rejected the newest rules"), "{}", check.out);
    let staged = setup.ctl(&format!("rules apply -f {file} --canary 50")).await;
    assert!(
        staged.out.contains("is unchanged"),
        "rules that all nodes have cannot be staged: {}",
        staged.out
    );
    let file = setup.file("other.yaml", &RULES.replace("sample", "another"));
    assert_eq!(setup.ctl(&format!("rules apply -f {file} --canary 50")).await.code, 0);
    let shown: Value = serde_json::from_str(
        setup.ctl("rollout watch --timeout 20s -o json").await.out.lines().last().unwrap(),
    )
    .unwrap();
    assert_eq!(shown["staged"][0]["percent"], 50);
    let aborted = setup.ctl("rollout abort").await;
    assert_eq!((aborted.code, aborted.out.contains("is restored")), (0, true), "{}", aborted.err);
    let over = setup.ctl("rollout resume").await;
    assert!(over.code == 1 && over.err.contains("not staged"), "{}", over.err);

    let nodes = setup.ctl("nodes").await.out;
    assert!(nodes.lines().any(|line| line.starts_with("n1") && line.contains("connected")), "{nodes}");
    let nodes: Value = serde_json::from_str(&setup.ctl("nodes -o json").await.out).unwrap();
    assert_eq!(nodes["nodes"][1]["rollout"]["errors"][0]["field"], "capture.hz");
    assert!(setup.ctl("nodes -o yaml").await.out.contains("name: n1"));
    n1.end().await;
    n2.end().await;
    setup.end().await;
}

#[tokio::test]
async fn profiles_are_listed_downloaded_merged_and_compared() {
    let setup = Setup::new().await;
    let none = setup.ctl("profiles list").await;
    assert_eq!((none.code, none.out.contains("no profiles in this selection")), (0, true), "{}", none.err);
    let id = setup.push("app", 30, 60).await;
    setup.push("app", 50, 30).await;
    setup.push("other", 10, 30).await;

    let list = setup.ctl("profiles list --since 10m").await.out;
    assert_eq!(list.lines().count(), 4, "{list}");
    assert!(list.contains(&id) && list.contains("cpu/nanoseconds"), "{list}");
    let limited = setup.ctl("profiles list --limit 2").await.out;
    assert!(limited.contains("there are more"), "{limited}");
    let value: Value =
        serde_json::from_str(&setup.ctl("profiles list -q {service_name=\"other\"} -o json").await.out)
            .unwrap();
    assert_eq!(value["profiles"][0]["samples"], 20);

    let out = setup.dir.path().join("one.pb.gz");
    let got = setup.ctl(&format!("profiles get {id} -O {}", out.display())).await;
    assert_eq!(got.code, 0, "{}", got.err);
    let one = pprof::decode(&std::fs::read(&out).unwrap(), 1 << 20).unwrap();
    assert_eq!(pprof::check(&one).unwrap().totals, [40, 400_000_000]);
    assert_eq!(setup.ctl("profiles get 01ARZ3NDEKTSV4RRFFQ69G5FAV -O -").await.code, 1);

    // For other tools, by the ending of the file, and from a file without the collector.
    for (name, holds) in [
        ("one.folded", "main;"),
        ("one.speedscope.json", "speedscope.app/file-format-schema.json"),
        ("one.firefox.json", "preprocessedProfileVersion"),
        ("one.perf", "cpu-clock:"),
    ] {
        let file = setup.dir.path().join(name);
        let got = setup.ctl(&format!("profiles get {id} -O {}", file.display())).await;
        assert_eq!(got.code, 0, "{}", got.err);
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.contains(holds), "{name}: {text}");
        let form = name.split('.').nth(1).unwrap();
        let again = setup.ctl(&format!("profiles convert {} --as {form}", out.display())).await;
        assert_eq!((again.code, again.out), (0, text), "{}", again.err);
    }
    let unknown = setup.ctl(&format!("profiles convert {} -O x.json", out.display())).await;
    assert!(unknown.code == 2 && unknown.err.contains(".speedscope.json"), "{}", unknown.err);
    let kind = setup.ctl(&format!("profiles convert {} --as folded --type heap", out.display())).await;
    assert!(kind.code == 2 && kind.err.contains("samples/count, cpu/nanoseconds"), "{}", kind.err);

    let merged = setup.dir.path().join("merged.pb.gz");
    let done =
        setup.ctl(&format!("profiles merge -q {{service_name=\"app\"}} -O {}", merged.display())).await;
    assert_eq!(done.code, 0, "{}", done.err);
    let profile = pprof::decode(&std::fs::read(&merged).unwrap(), 1 << 20).unwrap();
    assert_eq!(pprof::check(&profile).unwrap().totals, [100, 1_000_000_000]);
    let read = done.out.lines().nth(1).unwrap();
    assert!(read.starts_with("2 profiles, ") && read.contains(" B read in "), "{read}");

    let top = setup.ctl("top -q {service_name=\"app\"}").await.out;
    assert!(top.starts_with("cpu/nanoseconds: 1.00s in total"), "{top}");
    assert!(top.lines().nth(2).unwrap().contains("800.00ms  80.00%"), "{top}");
    let flame = setup.ctl("flame -q {service_name=\"app\"}").await.out;
    let read = flame.lines().nth(1).unwrap();
    assert!(read.starts_with("2 profiles, in the collector's memory from an earlier query;"), "{read}");
    assert!(flame.contains("████████░░  80.00%  800.00ms"), "{flame}");
    let file = setup.ctl(&format!("flame --input {} --type samples/count", merged.display())).await.out;
    assert!(file.starts_with("samples/count: 100 in total"), "{file}");
    let json: Value =
        serde_json::from_str(&setup.ctl("flame -q {service_name=\"app\"} -o json").await.out).unwrap();
    assert_eq!(json["root"]["children"][0]["name"], "main");
    assert_eq!((&json["read"]["segment_profiles"], &json["read"]["cached_profiles"]), (&json!(2), &json!(2)));

    let diff =
        setup.ctl("profiles diff -q {service_name=\"app\"} --base-query {service_name=\"other\"}").await.out;
    assert!(diff.lines().nth(2).unwrap().trim().starts_with("+30.00"), "{diff}");
    let compared =
        setup.ctl("flame -q {service_name=\"app\"} --base-query {service_name=\"other\"}").await.out;
    assert!(compared.contains("+30.00"), "{compared}");
    assert_eq!(setup.ctl("profiles diff").await.code, 2);
    let wrong = setup.ctl("top -q {service_name=").await;
    assert_eq!((wrong.code, wrong.out.as_str()), (1, ""));
    assert!(!wrong.err.is_empty());
    let kind = setup.ctl(&format!("flame --input {} --type heap", merged.display())).await;
    assert!(kind.err.contains("it has samples/count, cpu/nanoseconds"), "{}", kind.err);
    setup.end().await;
}

/// Checks that each command with a selection reads only the samples of a span.
#[tokio::test]
async fn commands_select_the_samples_of_a_span() {
    let setup = Setup::new().await;
    let id = setup.push("app", 30, 60).await;
    setup.push("app", 50, 30).await;
    let file = setup.dir.path().join("span.pb.gz");
    for (command, totals) in [
        (format!("profiles get {id} --span-id {SPAN}"), [30, 300_000_000]),
        (format!("profiles merge --span-id {SPAN}"), [80, 800_000_000]),
    ] {
        let got = setup.ctl(&format!("{command} -O {}", file.display())).await;
        assert_eq!(got.code, 0, "{command}: {}", got.err);
        let profile = pprof::decode(&std::fs::read(&file).unwrap(), 1 << 20).unwrap();
        assert_eq!(pprof::check(&profile).unwrap().totals, totals, "{command}");
    }
    for (command, says) in [
        ("flame", "cpu/nanoseconds: 800.00ms in total"),
        ("top", "cpu/nanoseconds: 800.00ms in total"),
        ("profiles diff --base-query {node=\"n1\"}", "cpu/nanoseconds: 800.00ms against 800.00ms"),
    ] {
        let got = setup.ctl(&format!("{command} --span-id {SPAN}")).await;
        assert!(got.code == 0 && got.out.starts_with(says), "{command}: {}{}", got.out, got.err);
    }
    let list = format!("profiles list --span-id {SPAN} -o json");
    let value: Value = serde_json::from_str(&setup.ctl(&list).await.out).unwrap();
    assert_eq!(
        (&value["profiles"][0]["samples"], &value["profiles"][1]["samples"]),
        (&json!(50), &json!(30))
    );
    let other = "0".repeat(16);
    for command in ["flame", "profiles merge -O -", "profiles open", &format!("profiles get {id} -O -")] {
        let got = setup.ctl(&format!("{command} --span-id {other}")).await;
        assert!(
            got.code == 1 && got.err.contains("only if its program publishes spans"),
            "{command}: {}",
            got.err
        );
    }
    let got = setup.ctl(&format!("profiles list --trace-id {SPAN}")).await;
    assert!(got.code == 1 && got.err.contains("give 32 hex digits"), "{}", got.err);
    setup.end().await;
}

/// Checks that a request of OTLP comes back with everything that the collector has: profiles, labels and the id. A merged profile
/// has the labels that all its parts share, and a file none.
#[tokio::test]
async fn otlp_files_have_labels_and_ids() {
    let setup = Setup::new().await;
    let id = setup.push("app", 30, 60).await;
    setup.push("app", 50, 30).await;
    setup.push("web", 10, 30).await;
    let read = |text: &str| {
        let mut decoded = gannet_otlp::decode(gannet_otlp::from_json(text.as_bytes()).unwrap()).unwrap();
        assert_eq!((decoded.rejected, decoded.profiles.len()), (0, 1));
        decoded.profiles.remove(0)
    };
    let normal = |profile: &pprof::Profile| {
        let mut merger = pprof::Merger::new();
        merger.add(profile).unwrap();
        merger.finish().unwrap()
    };
    let file = setup.dir.path().join("one.otlp.json");
    let got = setup.ctl(&format!("profiles get {id} -O {}", file.display())).await;
    assert_eq!(got.code, 0, "{}", got.err);
    let one = read(&std::fs::read_to_string(&file).unwrap());
    let plain = setup.ctl(&format!("profiles get {id} -O {}/one.pb.gz", setup.dir.path().display())).await;
    assert_eq!(plain.code, 0, "{}", plain.err);
    let plain = std::fs::read(setup.dir.path().join("one.pb.gz")).unwrap();
    assert_eq!(normal(&one.profile), normal(&pprof::decode(&plain, 1 << 20).unwrap()));
    assert_eq!(one.id.to_string(), id);
    let labels = |service: Option<&str>| {
        let pairs = service.map(|name| ("service_name", name)).into_iter().chain([("node", "n1")]);
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect::<BTreeMap<_, _>>()
    };
    assert_eq!(one.labels, labels(Some("app")));

    let app = read(&setup.ctl("profiles merge -q {service_name=\"app\"} -O - --as otlp").await.out);
    assert_eq!(app.labels, labels(Some("app")));
    assert_eq!(pprof::check(&app.profile).unwrap().totals, [100, 1_000_000_000]);
    let all = read(&setup.ctl("profiles merge -O - --as otlp").await.out);
    assert_eq!((all.labels, all.id == app.id), (labels(Some("unknown_service")), false));
    let converted =
        setup.ctl(&format!("profiles convert {}/one.pb.gz --as otlp", setup.dir.path().display())).await.out;
    assert!(!converted.contains("service.name") && converted.ends_with("}\n"), "{converted}");
    assert_eq!(normal(&read(&converted).profile), normal(&one.profile));
    setup.end().await;
}

/// Checks that a capture of a node has the same samples in both formats, and in OTLP the labels that the node gives.
#[tokio::test]
async fn a_capture_in_otlp_has_labels_and_all_samples() {
    let setup = Setup::new().await;
    let span = [Label { key: "span_id", value: LabelValue::Str(SPAN) }];
    let profile = pprof::encode(&app_profile(7, std::time::SystemTime::now(), &span));
    let labels: BTreeMap<String, String> =
        [("service_name", "app"), ("pod", "app-1")].map(|(k, v)| (k.to_owned(), v.to_owned())).into();
    let node = CapturingNode::start(&setup, profile, labels.clone()).await;
    let [plain, otlp] = ["now.pb.gz", "now.otlp.json"].map(|name| setup.dir.path().join(name));
    for file in [&plain, &otlp] {
        let got = setup.ctl(&format!("profile --comm app --for 1s -o {}", file.display())).await;
        assert_eq!(got.code, 0, "{}", got.err);
    }
    let request = gannet_otlp::from_json(&std::fs::read(&otlp).unwrap()).unwrap();
    let mut decoded = gannet_otlp::decode(request).unwrap();
    assert_eq!((decoded.rejected, decoded.profiles.len()), (0, 1));
    let one = decoded.profiles.remove(0);
    let normal = |profile: &pprof::Profile| {
        let mut merger = pprof::Merger::new();
        merger.add(profile).unwrap();
        merger.finish().unwrap()
    };
    let plain = pprof::decode(&std::fs::read(&plain).unwrap(), 1 << 20).unwrap();
    assert_eq!(normal(&one.profile), normal(&plain));
    let node_label = [("node".to_owned(), "n1".to_owned())];
    assert_eq!(one.labels, labels.into_iter().chain(node_label).collect());
    node.abort();
    setup.end().await;
}

/// A node that answers each capture with the same profile.
struct CapturingNode;

impl CapturingNode {
    async fn start(
        setup: &Setup,
        profile: Vec<u8>,
        labels: BTreeMap<String, String>,
    ) -> tokio::task::JoinHandle<()> {
        let (sender, receiver) = mpsc::channel(8);
        let say = |message| AgentMessage { message: Some(message) };
        let hello = NodeHello {
            node: "n1".to_owned(),
            version: "0.1.0".to_owned(),
            features: vec!["questions".to_owned(), "capture".to_owned()],
            ..NodeHello::default()
        };
        sender.send(say(agent_message::Message::Hello(hello))).await.unwrap();
        let mut client = AgentServiceClient::new(setup.connection());
        let mut messages = client.connect(ReceiverStream::new(receiver)).await.unwrap().into_inner();
        tokio::spawn(async move {
            while let Ok(Some(ServerMessage { message })) = messages.message().await {
                let Some(server_message::Message::Question(Question { id, .. })) = message else { continue };
                let chunk = CaptureChunk { data: profile.clone(), ..CaptureChunk::default() };
                let done = CaptureDone { samples: 17, labels: labels.clone(), ..CaptureDone::default() };
                for part in [
                    capture_progress::Message::Started(CaptureStarted::default()),
                    capture_progress::Message::Chunk(chunk),
                    capture_progress::Message::Done(done),
                ] {
                    let answer = answer::Answer::Capture(CaptureProgress { message: Some(part) });
                    let answer = Answer { id: id.clone(), answer: Some(answer) };
                    sender.send(say(agent_message::Message::Answer(answer))).await.unwrap();
                }
            }
        })
    }
}

/// Sends a GET to the page of a link, and returns its answer with the headers.
fn fetch(link: &str, path: &str) -> String {
    let addr = link.strip_prefix("http://").unwrap().split_once('/').unwrap().0;
    let mut socket = std::net::TcpStream::connect(addr).unwrap();
    write!(socket, "GET {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    answer
}

/// Checks that the page has a file, and the merged profiles of a collector. The program is that beside gannetctl.
#[tokio::test(flavor = "multi_thread")]
async fn profiles_open_on_a_page_of_this_machine() {
    let gannetctl = Path::new(env!("CARGO_BIN_EXE_gannetctl"));
    let collector = gannetctl.with_file_name("gannet-collector");
    assert!(
        collector.is_file(),
        "{} is not built: run the tests by `make test`, which builds it",
        collector.display()
    );
    let setup = Setup::new().await;
    let id = setup.push("app", 30, 60).await;
    setup.push("app", 50, 30).await;
    setup.push("web", 10, 30).await;
    let file = setup.dir.path().join("one.pb.gz");
    assert_eq!(setup.ctl(&format!("profiles get {id} -O {}", file.display())).await.code, 0);
    for (args, services, total) in [
        (vec![file.to_str().unwrap()], "[\"one\"]", 400_000_000),
        (vec!["-q", "{service_name=\"app\"}"], "[\"app\"]", 1_000_000_000),
        (vec![], "[\"merged\"]", 1_200_000_000),
    ] {
        let mut child = Command::new(gannetctl)
            .args(["--endpoint", &setup.url, "profiles", "open"])
            .args(&args)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut link = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut link).unwrap();
        let range = link.trim().split_once("/?").unwrap().1.split_once("&profile=").unwrap().0.to_owned();
        let values = fetch(&link, &format!("/api/v1/labels/service_name/values?{range}"));
        assert!(values.ends_with(&format!("{{\"values\":{services}}}")), "{args:?}: {values}");
        let graph = fetch(&link, &format!("/api/v1/flamegraph?{range}"));
        assert!(graph.contains(&format!("\"total\":{total},")) && graph.contains("\"work\""), "{graph}");
        let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        assert!(killed.success() && child.wait().unwrap().success(), "Ctrl-C ends it");
    }
    // A copy alone has no page.
    let alone = setup.dir.path().join("gannetctl");
    std::fs::copy(gannetctl, &alone).unwrap();
    let output = Command::new(&alone).args(["profiles", "open", "x.pb.gz"]).env("PATH", "").output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && text.contains("install it beside gannetctl"), "{text}");
    setup.end().await;
}

/// Writes a certificate authority and a certificate for `localhost` that it signed: `ca.pem`, `cert.pem`, `key.pem`.
fn authority(dir: &std::path::Path) {
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};

    std::fs::create_dir_all(dir).unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let cert =
        CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    for (name, text) in [("ca.pem", issuer.pem()), ("cert.pem", cert.pem()), ("key.pem", key.serialize_pem())]
    {
        std::fs::write(dir.join(name), text).unwrap();
    }
}

#[tokio::test]
async fn a_query_prints_its_rows_as_table_json_or_csv() {
    let setup = Setup::new().await;
    let refused = setup.ctl("profiles query --sql VALUES(1)").await;
    assert!(refused.code == 1 && refused.err.contains("start it with --table"), "{}", refused.err);
    setup.end().await;

    let setup = Setup::with(|config| {
        config.table.table = true;
        config.table.table_interval = gannet_base::TimeSpan(Duration::from_millis(100));
    })
    .await;
    setup.push("app", 30, 60).await;
    setup.push("shop, web", 10, 60).await;
    let sql = "SELECT service_name, sum(count) AS n, sum(value) / 1e9 AS seconds FROM samples GROUP BY 1 ORDER BY 1";
    let csv = async || setup.run(&["profiles", "query", "--sql", sql, "-o", "csv"]).await;
    let began = std::time::Instant::now();
    while csv().await.out.lines().count() < 3 && began.elapsed() < Duration::from_secs(30) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let out = csv().await.out;
    let wanted = "service_name,n,seconds\r\napp,40,0.4\r\n\"shop, web\",20,0.2\r\n";
    assert_eq!(out, wanted);
    let json = setup.run(&["profiles", "query", "--sql", sql, "--limit", "1", "-o", "json"]).await;
    let value: Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(value["rows"], json!([{ "service_name": "app", "n": 40, "seconds": 0.4 }]));
    assert_eq!(value["more"], json!(true));
    let table = setup.run(&["profiles", "query", "--sql", sql, "--timeout", "10s"]).await.out;
    assert!(table.starts_with("service_name   n  seconds\napp           40      0.4\n"), "{table}");
    let wrong = setup.ctl("profiles query --sql DELETE").await;
    assert!(wrong.code == 1 && wrong.err.contains("sql: "), "{}", wrong.err);
    let wrong = setup.ctl("nodes -o csv").await;
    assert!(wrong.code == 2 && wrong.err.contains("only `profiles query`"), "{}", wrong.err);
    setup.end().await;
}

#[tokio::test]
async fn tls_needs_both_certificates_and_failures_are_explained() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
    authority(&ours);
    authority(&theirs);
    let mut config = Config::new(dir.path().join("data"));
    config.tls = TlsOptions {
        tls_client_ca: Some(ours.join("ca.pem")),
        ..TlsOptions::new(ours.join("cert.pem"), ours.join("key.pem"))
    };
    let collector = Collector::start(config).await.unwrap();
    let url = format!("https://localhost:{}", collector.grpc_addr.port());
    let setup = Setup { collector: Some(collector), url: url.clone(), dir };
    let flag =
        |name: &str, dir: &std::path::Path, file: &str| format!("--tls-{name} {}", dir.join(file).display());
    let identity = format!("{} {}", flag("cert", &ours, "cert.pem"), flag("key", &ours, "key.pem"));

    let good = setup.ctl(&format!("nodes {} {identity}", flag("ca", &ours, "ca.pem"))).await;
    assert_eq!((good.code, good.err.as_str()), (0, ""));
    let stranger = setup.ctl(&format!("nodes {} {identity}", flag("ca", &theirs, "ca.pem"))).await;
    assert_eq!(stranger.code, 1);
    assert!(stranger.err.contains(&url) && stranger.err.contains("--tls-ca"), "{}", stranger.err);
    let anonymous = setup.ctl(&format!("nodes {}", flag("ca", &ours, "ca.pem"))).await;
    assert_eq!(anonymous.code, 1);
    assert!(anonymous.err.contains("give --tls-cert and --tls-key"), "{}", anonymous.err);
    setup.end().await;
}

/// Checks that an old variable ends the program with one line that has the new name.
#[test]
fn an_old_variable_is_refused_with_its_new_name() {
    for (old, new) in [("GANNET_COLLECTOR", "GANNET_ENDPOINT"), ("GANNET_TLS_CA", "GANNETCTL_TLS_CA")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gannetctl"));
        let output = command.arg("nodes").env(old, "x").output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(text, format!("error: the environment variable {old} is now {new}\n"));
    }
}

/// Checks that completions and man pages need no collector and name the commands.
#[tokio::test]
async fn completions_and_man_pages_name_the_commands() {
    let mut words = Vec::new();
    for line in ["completion bash", "completion zsh", "man"] {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let cli = parse(format!("gannetctl {line}").split(' ').map(Into::into)).unwrap();
        let code = run(cli, &mut Console { out: &mut out, err: &mut err, terminal: false }).await;
        assert_eq!((code, err), (0, Vec::new()), "{line}");
        words.push(String::from_utf8(out).unwrap());
    }
    assert!(words.iter().all(|text| text.contains("rollout")));
}

#[test]
fn the_program_returns_its_exit_codes() {
    let program = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_gannetctl")).args(args).output().unwrap();
        (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(program(&["--help"]).0, 0);
    assert_eq!(program(&["rules"]).0, 2);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("http://127.0.0.1:{port}");
    let (code, err) = program(&["--endpoint", &url, "nodes"]);
    assert_eq!(code, 1);
    assert_eq!(
        err,
        format!(
            "gannetctl: cannot reach the collector at {url}: connection refused; is gannet-collector running there?\n"
        )
    );
    let (code, err) = program(&["--endpoint", "http://10.0.0.1:4100", "nodes"]);
    assert_eq!((code, err.contains("--insecure")), (1, true), "{err}");
}

/// Runs `gannetctl mcp` and talks to it with the client of the official library.
async fn mcp(setup: &Setup) -> rmcp::service::RunningService<rmcp::RoleClient, ()> {
    let mut child = tokio::process::Command::new(env!("CARGO_BIN_EXE_gannetctl"))
        .args(["mcp", "--endpoint", &setup.url])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let pipes = (child.stdout.take().unwrap(), child.stdin.take().unwrap());
    // The program ends when the client closes its input.
    tokio::spawn(async move { assert!(child.wait().await.unwrap().success()) });
    rmcp::ServiceExt::serve((), pipes).await.unwrap()
}

/// Calls a tool. Returns whether it succeeded, and its text.
async fn call(client: &rmcp::Peer<rmcp::RoleClient>, tool: &'static str, arguments: Value) -> (bool, String) {
    let Value::Object(arguments) = arguments else { panic!("no object") };
    let request = rmcp::model::CallToolRequestParams::new(tool).with_arguments(arguments);
    let result = client.call_tool(request).await.unwrap();
    let text = result.content.iter().filter_map(|block| block.as_text()).map(|text| text.text.as_str());
    (result.is_error != Some(true), text.collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_assistant_reads_profiles_through_the_tools() {
    let setup = Setup::new().await;
    setup.push("shop", 90, 60).await;
    setup.push("shop", 10, 3600 + 60).await;
    setup.push("web", 30, 60).await;
    let client = mcp(&setup).await;
    let tools = client.list_all_tools().await.unwrap();
    let names: Vec<_> = tools.iter().map(|tool| tool.name.as_ref()).collect();
    assert_eq!(names, ["list_services", "top_functions", "diff_functions", "flame_graph", "explain_rule"]);
    for tool in &tools {
        assert_eq!(tool.annotations.as_ref().unwrap().read_only_hint, Some(true), "{}", tool.name);
        assert_eq!(tool.input_schema["additionalProperties"], false);
        for (name, argument) in tool.input_schema["properties"].as_object().unwrap() {
            assert!(argument["description"].as_str().is_some_and(|text| text.len() > 10), "{name}");
        }
    }

    let (good, text) = call(&client, "list_services", json!({ "since": "3h" })).await;
    let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert!(good && rows[1][0] == "shop" && rows[2][0] == "web", "{text}");
    let (good, text) = call(&client, "list_services", json!({ "limit": 1, "query": "{node=\"n1\"}" })).await;
    assert!(good && text.contains("there are 2 services; a larger limit"), "{text}");
    let shop = "{service_name=\"shop\"}";
    let (good, text) = call(&client, "top_functions", json!({ "query": shop, "limit": 1 })).await;
    assert!(good && text.contains("900.00ms  90.00%") && !text.contains("idle"), "{text}");
    let compared = json!({ "query": shop, "base_from": "now-2h", "base_until": "now-1h" });
    let (good, text) = call(&client, "diff_functions", compared).await;
    assert!(
        good && text.lines().nth(2).is_some_and(|line| line.starts_with("+40.00") && line.contains("work")),
        "{text}"
    );
    let (good, text) = call(&client, "flame_graph", json!({ "query": shop, "min_percent": 50 })).await;
    assert!(good && text.contains("work") && !text.contains("idle"), "{text}");
    // Of the function `idle` no sample is in a span.
    for (tool, of_all) in [("top_functions", json!({})), ("flame_graph", json!({ "min_percent": 0 }))] {
        let (good, text) = call(&client, tool, of_all.clone()).await;
        assert!(good && text.contains("work") && text.contains("idle"), "{text}");
        let mut in_span = of_all;
        in_span["span_id"] = json!(format!("{}, {SPAN}", "0".repeat(15) + "1"));
        let (good, text) = call(&client, tool, in_span).await;
        assert!(good && text.contains("work") && !text.contains("idle"), "{text}");
    }

    for (tool, arguments, want) in [
        ("top_functions", json!({ "span_id": "7" }), "16 hex digits"),
        (
            "flame_graph",
            json!({ "span_id": SPAN, "trace_id": SPAN.repeat(2) }),
            "span_id, trace_id: give one",
        ),
        ("top_functions", json!({ "query": "{shop" }), "query"),
        ("top_functions", json!({ "limit": 0 }), "limit: give a number from 1 to 200"),
        ("top_functions", json!({ "since": "yesterday" }), "since: write a duration"),
        ("diff_functions", json!({ "query": shop }), "base_query, base_since"),
        ("flame_graph", json!({ "type": "wall/seconds" }), "wall/seconds"),
        ("explain_rule", json!({ "rule": "sample" }), "node: this argument is required"),
        ("explain_rule", json!({ "rule": "sample", "node": "n9" }), "does not know a node `n9`"),
    ] {
        let (good, text) = call(&client, tool, arguments).await;
        assert!(!good && text.contains(want), "{tool}: {text}");
    }
    let unknown =
        client.call_tool(rmcp::model::CallToolRequestParams::new("delete_rules")).await.unwrap_err();
    assert!(unknown.to_string().contains("there are list_services"), "{unknown}");
    client.cancel().await.unwrap();
    setup.end().await;
}
