//! Processes in control groups as container runtimes make them: their series are named after their pods.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use gannet_agent::{
    cgroup::CgroupNames,
    engine::{Engine, EngineOptions},
    ledger::NodeLedger,
    pipeline::{self, RecentProfiles, WindowQueue},
    pods::{
        Pod, PodChange, PodContainer, PodFeed, PodFeedError, PodFeedKind, PodLabelOptions, Pods, Workload,
        follow,
    },
    rules::{PodQuery, PodResolver, RuleSource, SourceRules, ad_hoc},
    symbols::{Symbolizer, SymbolizerConfig},
    tables::TableSources,
};
use gannet_proto::{
    control::{Match, capture},
    ingest::Batch,
    ledger::LossReason,
    pprof,
    rules::Caps,
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::common::{Running, engine_options};

const KNOWN: char = 'a';
const DENIED: char = 'b';
const UNKNOWN: char = 'c';
/// A container of Docker in the known one, with a control group below the pod's.
const NESTED: char = 'd';
/// Another one, with a control group outside of the pod's.
const OUTSIDE: char = 'e';

fn id(letter: char) -> String {
    letter.to_string().repeat(64)
}

fn uid(letter: char) -> String {
    format!("{letter}0000000-1111-4222-8333-444444444444")
}

/// A feed that sends two pods once: one with a container, and one whose annotation forbids profiling.
struct Given;

impl PodFeed for Given {
    fn kind(&self) -> PodFeedKind {
        PodFeedKind::Kubelet
    }

    fn is_present(&self) -> bool {
        true
    }

    fn changes<'a>(&'a self, _: &'a Notify) -> BoxStream<'a, Result<PodChange, PodFeedError>> {
        let pod = |letter, name: &str| Pod {
            uid: uid(letter),
            namespace: "shop".into(),
            name: name.into(),
            workload: Some(Workload { kind: "deployment".into(), name: "checkout".into() }),
            containers: vec![PodContainer { name: "app".into(), id: id(letter) }],
            ..Pod::default()
        };
        let pods = vec![pod(KNOWN, "checkout-1"), Pod { denied: true, ..pod(DENIED, "secret-1") }];
        stream::iter([Ok(PodChange::All(pods.into()))]).chain(stream::pending()).boxed()
    }
}

/// Tells the pods which containers the engine has seen.
struct Seen(Pods);

impl PodResolver for Seen {
    fn set_queries(&mut self, _: Vec<PodQuery>) {}

    fn container_seen(&mut self, container: &CgroupNames, pid: u32) {
        self.0.container_seen(container, pid);
    }
}

/// The control group of a container.
struct Group(PathBuf);

impl Group {
    fn make(root: &Path, letter: char) -> Self {
        Self::at(root.join(format!("kubepods/burstable/pod{}/{}", uid(letter), id(letter))))
    }

    fn at(path: PathBuf) -> Self {
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Starts a shell in it as container runtimes do: the process enters the group, then executes the program.
    fn start(&self, script: &str) -> Running {
        let enter = format!("echo $$ > '{}/cgroup.procs' && exec sh -c '{script}'", self.0.display());
        Running::start(Command::new("sh").args(["-c", &enter]).stdout(Stdio::null()))
    }
}

/// The control group of this test, removed at its end.
struct Top(PathBuf);

impl Drop for Top {
    fn drop(&mut self) {
        // Leaves first; a group is busy as long as a process in it exits.
        for _ in 0..200 {
            remove(&self.0);
            if !self.0.exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Kills the processes in the control groups, which may outlive the shell that started them, and removes the groups.
fn remove(directory: &Path) {
    let inside = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    for pid in inside.lines().filter_map(|pid| pid.parse().ok()).filter_map(rustix::process::Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    }
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path());
        }
    }
    let _ = fs::remove_dir(directory);
}

fn in_container(batch: &Batch, letter: char) -> bool {
    let profile = pprof::decode(&batch.pprof, 64 << 20).unwrap();
    let text = |index: i64| profile.string_table[usize::try_from(index).unwrap()].as_str();
    profile
        .sample
        .iter()
        .flat_map(|sample| &sample.label)
        .any(|label| text(label.key) == "container_id" && text(label.str) == id(letter))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn series_of_containers_are_named_after_their_pods() {
    let ledger = NodeLedger::new();
    let (queue, windows) = WindowQueue::new(ledger.clone());
    let engine = Engine::start(
        EngineOptions {
            node: "test-node".into(),
            window: Duration::from_secs(600),
            caps: Caps::default(),
            tables: Some(TableSources::with_debug_files()),
            ..engine_options()
        },
        queue,
    )
    .unwrap();
    let groups = Arc::clone(engine.groups().unwrap());
    let made = Arc::new(Notify::new());
    let wake_up = Arc::clone(&made);
    groups.watch(move || wake_up.notify_one()).unwrap();

    let pods = Pods::new(PodLabelOptions { cluster: "test".into(), pod_labels: vec![] });
    engine.resolve_pods(Seen(pods.clone()));
    let cancel = CancellationToken::new();
    tokio::spawn(follow(pods.clone(), vec![Arc::new(Given)], true, cancel.clone()));
    let batches = Arc::new(Mutex::new(Vec::<Batch>::new()));
    let symbolizer = Symbolizer::start(SymbolizerConfig::default()).unwrap();
    let submit = {
        let batches = Arc::clone(&batches);
        move |more| batches.lock().unwrap().extend(more)
    };
    let naming = tokio::spawn(pipeline::run(
        windows,
        symbolizer,
        ledger.clone(),
        RecentProfiles::default(),
        pods,
        submit,
    ));

    let top = Top(groups.root().join(format!("gannet-test-pods-{}", std::process::id())));
    let name = top.0.file_name().unwrap().to_str().unwrap();
    let matches = Match { cgroup: vec![format!("/{name}/*")], ..Match::default() };
    let rule = ad_hoc("containers", matches, 99, &[capture::Kind::OnCpu]);
    engine
        .replace(RuleSource::Local, SourceRules { rules: vec![rule], ..SourceRules::default() })
        .await
        .unwrap();

    let [known, denied, unknown] = [KNOWN, DENIED, UNKNOWN].map(|letter| Group::make(&top.0, letter));
    let spin = "i=0; while [ $i -lt 100000000 ]; do i=$((i+1)); done";
    let spinning = [&known, &denied, &unknown].map(|group| group.start(spin));
    let inner = [
        Group::at(known.0.join(format!("docker/{}", id(NESTED)))),
        Group::at(top.0.join(format!("docker/{}", id(OUTSIDE)))),
    ];
    // Docker's own process in the known container is the parent of both.
    let starts: Vec<String> = inner
        .iter()
        .map(|group| format!("(echo $BASHPID > {}/cgroup.procs; {spin}) & ", group.0.display()))
        .collect();
    let enter = format!("echo $$ > {}/cgroup.procs; {} wait", known.0.display(), starts.concat());
    let docker = Running::start(Command::new("bash").args(["-c", &enter]).stdout(Stdio::null()));
    // One that has exited, and whose control group was removed, before the agent reads /proc.
    let brief = Group::make(&top.0.join("brief"), KNOWN);
    let mut ended = brief.start("i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done");
    ended.0.wait().unwrap();
    fs::remove_dir(&brief.0).unwrap();

    // Until each of the five has samples.
    let until = Instant::now() + Duration::from_secs(60);
    loop {
        let processes = engine.processes(None).await.unwrap();
        let sampled: Vec<String> = processes
            .into_iter()
            .filter(|process| !process.is_past && process.samples > 20)
            .map(|process| process.names.container_id)
            .collect();
        if [KNOWN, DENIED, UNKNOWN, NESTED, OUTSIDE].iter().all(|letter| sampled.contains(&id(*letter))) {
            break;
        }
        assert!(Instant::now() < until, "sampled: {sampled:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    drop((spinning, docker));
    tokio::task::spawn_blocking(move || engine.stop()).await.unwrap();
    naming.await.unwrap();
    cancel.cancel();

    let batches = std::mem::take(&mut *batches.lock().unwrap());
    let of = |letter| batches.iter().filter(|batch| in_container(batch, letter)).collect::<Vec<_>>();
    for letter in [KNOWN, NESTED, OUTSIDE] {
        assert!(!of(letter).is_empty(), "{letter}");
    }
    for batch in [KNOWN, NESTED, OUTSIDE].into_iter().flat_map(of) {
        let mut show: Vec<_> = batch.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
        show.sort();
        assert_eq!(
            show.join(" "),
            "cluster=test container=app namespace=shop node=test-node pod=checkout-1 reason=always \
             rule_id=containers service_name=checkout workload=checkout workload_kind=deployment"
        );
    }
    // No feed knows this pod: the series is named after the program.
    for batch in of(UNKNOWN) {
        assert!(!batch.labels.contains_key("pod") && !batch.labels.contains_key("namespace"));
        assert!(!batch.labels["service_name"].is_empty());
    }
    assert!(!of(UNKNOWN).is_empty());
    // Its pod forbids profiling: nothing is delivered, and the ledger counts it.
    assert!(of(DENIED).is_empty());
    let account = ledger.snapshot();
    assert!(account.lost[&LossReason::Denied] > 20, "{account:?}");
    // What the kernel took, against what the pipeline handed on and what was denied.
    assert_eq!(account.unaccounted(), 0, "{account}");
}
