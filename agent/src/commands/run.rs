//! `gannet-agent run`: the daemon. Builds the parts, wires them as the data flows, waits.

use std::{
    fs, io,
    path::PathBuf,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use gannet_proto::{connect::DialError, control::RuleError};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

use crate::{
    cgroup::CgroupNames,
    commands::check::{self, Refusal},
    config::{ConfigError, RunOptions},
    control::{Control, LastGoodRules, restore},
    debug::{ListenError, Listeners},
    engine::{Engine, EngineError, EngineOptions},
    export::{Bounds, ExportConfig, Exporter, Spool, SpoolError, SpoolStats},
    kernel::KernelOptions,
    ledger::NodeLedger,
    node::Node,
    pipeline::{self, RecentProfiles, WindowQueue},
    pods::{self, Pods},
    rules::{
        FileWatcher, PodQuery, PodResolver, RuleFilesError, RuleSource, SourceRules,
        files::{self, RuleFilesStamp},
    },
    symbols::{Symbolizer, SymbolizerConfig},
    tables::TableSources,
};

/// How often rule files are looked at, besides whenever something changes beside them.
const FILES_PAUSE: Duration = Duration::from_millis(500);
/// How often the file of the kill switch is looked for.
const SWITCH_PAUSE: Duration = Duration::from_millis(250);
/// How long the last profiles may take to be delivered when the agent is told to end; the rest stays in the spool.
const LAST_DELIVERY: Duration = Duration::from_secs(5);

/// Why the daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// What it was told cannot be.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// This machine cannot.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// A port is in use.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The spool cannot be used.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The kernel side cannot work.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The collector's address or certificates are wrong.
    #[error("--endpoint: {0}")]
    Dial(#[from] DialError),
    /// The node's own rules cannot be read.
    #[error(transparent)]
    Files(#[from] RuleFilesError),
    /// The node's own rules cannot be applied.
    #[error("--rules: {}", list(.0))]
    Rules(Vec<RuleError>),
    /// The state directory cannot be made.
    #[error("--state-dir {}: {source}", path.display())]
    State {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// No thread, no signal handler.
    #[error("cannot start: {0}")]
    Start(#[source] io::Error),
}

fn list(errors: &[RuleError]) -> String {
    errors
        .iter()
        .map(|error| format!("rule {}: {}: {}", error.rule_id, error.field, error.reason))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Runs until SIGTERM or SIGINT; then everything in flight is delivered or in the spool.
pub async fn run(options: RunOptions) -> Result<(), RunError> {
    let config = options.complete()?;
    check::preflight()?;
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Start)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Start)?;
    let off = signal(SignalKind::user_defined1()).map_err(RunError::Start)?;
    let on = signal(SignalKind::user_defined2()).map_err(RunError::Start)?;
    let local = files::read(&config.options.rules)?;
    let listeners = Listeners::open(config.options.http_listen, config.options.debug_listen).await?;
    fs::create_dir_all(&config.options.state_dir)
        .map_err(|source| RunError::State { path: config.options.state_dir.clone(), source })?;

    let ledger = NodeLedger::new();
    let spool_stats = Arc::new(SpoolStats::default());
    let bounds = Bounds { bytes: config.options.spool_bytes.0, age: config.options.spool_age.0 };
    let spool = Spool::open(
        &config.options.state_dir.join("spool"),
        bounds,
        ledger.clone(),
        Arc::clone(&spool_stats),
    )?;
    let symbolizer = Symbolizer::start(SymbolizerConfig::default()).map_err(RunError::Start)?;
    let recent = RecentProfiles::default();
    let pods = Pods::new(config.pod_labels.clone());
    let (queue, windows) = WindowQueue::new(ledger.clone());
    let engine = Engine::start(
        EngineOptions {
            node: config.node.clone(),
            kernel: KernelOptions {
                ring_bytes: config.ring_bytes,
                table_bytes: config.table_bytes,
                processes: config.options.processes,
                lifecycle: config.options.lifecycle,
                ..KernelOptions::default()
            },
            window: config.options.window.0,
            caps: config.caps.clone(),
            deny: config.deny.clone(),
            budgets: config.budgets,
            tables: Some(TableSources {
                cache_dir: Some(config.options.state_dir.join("tables")),
                override_dir: Some(config.options.state_dir.join("overrides")),
                ..TableSources::with_debug_files()
            }),
        },
        queue,
    )?;
    let export = ExportConfig {
        node: config.node.clone(),
        version: gannet_proto::VERSION.to_owned(),
        collector: config.dial.clone(),
    };
    let exporter =
        Arc::new(Exporter::start(export, spool, ledger.clone(), Arc::default()).map_err(RunError::Start)?);
    let submit = {
        let exporter = Arc::clone(&exporter);
        move |batches| exporter.submit(batches)
    };
    let naming = tokio::spawn(pipeline::run(
        windows,
        symbolizer,
        ledger.clone(),
        recent.clone(),
        pods.clone(),
        submit,
    ));
    let (queries_sender, queries) = watch::channel(Vec::new());
    let groups = engine.groups().filter(|_| config.pods.is_some()).map(Arc::clone);
    if groups.is_some() {
        engine.know_pods(KnowsPods { pods: pods.clone(), queries: queries_sender });
    }
    let node = Arc::new(Node::new(config, engine, ledger, spool_stats, recent, pods));

    let store = LastGoodRules::in_dir(&node.config.options.state_dir);
    let active = restore(&node, &store).await;
    let partial = node
        .engine
        .replace(RuleSource::Local, SourceRules { rules: local, ..SourceRules::default() })
        .await
        .map_err(RunError::Rules)?;
    for error in partial {
        tracing::warn!(rule = error.rule_id, field = error.field, "has no effect here: {}", error.reason);
    }
    node.rules_loaded.store(true, Relaxed);

    let cancel = CancellationToken::new();
    let serving = tokio::spawn(listeners.serve(Arc::clone(&node), cancel.clone()));
    let following = tokio::spawn(follow_files(Arc::clone(&node), cancel.clone()));
    let switching = tokio::spawn(follow_switch(Arc::clone(&node), off, on, cancel.clone()));
    let controlling = match &node.config.dial {
        Some(dial) => {
            Some(tokio::spawn(Control::new(Arc::clone(&node), dial, store, active)?.run(cancel.clone())))
        }
        None => None,
    };
    let telling = node.config.pods.as_ref().map(|options| {
        if options.kubelet_insecure {
            tracing::warn!("--kubelet-insecure: whoever answers at the kubelet's address is believed");
        }
        let feeds = pods::feeds(options);
        tokio::spawn(pods::follow(node.pods.clone(), feeds, options.only.is_some(), cancel.clone()))
    });
    let arming = groups.map(|groups| {
        let containers = node.engine.containers();
        let select = move |selection| containers.select(selection);
        tokio::spawn(pods::keep_resolving(node.pods.clone(), groups, queries, select, cancel.clone()))
    });
    tracing::info!(node = node.config.node, "gannet-agent {} runs", gannet_proto::VERSION);

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("ending: what is in flight is delivered or kept");
    cancel.cancel();
    if let Some(controlling) = controlling {
        let _ = controlling.await;
    }
    let _ = following.await;
    let _ = switching.await;
    for task in [telling, arming].into_iter().flatten() {
        let _ = task.await;
    }
    // Requests that are being answered hold the node too.
    serving.abort();
    let _ = serving.await;
    match Arc::try_unwrap(node) {
        // Dropping the engine flushes its last window into the pipeline, which ends with it.
        Ok(node) => drop(tokio::task::spawn_blocking(move || node.engine.stop()).await),
        Err(node) => drop(node.engine.flush().await),
    }
    if tokio::time::timeout(LAST_DELIVERY, naming).await.is_err() {
        tracing::warn!("the last window was not named in time");
    }
    if !exporter.shutdown(LAST_DELIVERY).await {
        tracing::info!("what the collector did not take in time is in the spool");
    }
    Ok(())
}

/// What the engine tells of rules over pods and of containers goes to who follows pods.
struct KnowsPods {
    pods: Pods,
    queries: watch::Sender<Vec<PodQuery>>,
}

impl PodResolver for KnowsPods {
    fn set_queries(&mut self, queries: Vec<PodQuery>) {
        self.queries.send_replace(queries);
    }

    fn container_seen(&mut self, container: &CgroupNames) {
        self.pods.request(&container.container_id, &container.pod_uid);
    }
}

/// The kill switch: while the file `disable` is in the state directory, or from SIGUSR1 to SIGUSR2, nothing of the agent
/// is attached to the kernel.
async fn follow_switch(node: Arc<Node>, mut off: Signal, mut on: Signal, cancel: CancellationToken) {
    let file = node.config.options.state_dir.join("disable");
    let (mut by_signal, mut now) = (false, None);
    loop {
        let reason = if by_signal {
            Some("switched off by SIGUSR1; SIGUSR2 switches on again".to_owned())
        } else if file.exists() {
            Some(format!("switched off by {}; remove it to switch on again", file.display()))
        } else {
            None
        };
        if reason != now {
            now.clone_from(&reason);
            if node.engine.switch_off(reason.clone()).await.is_err() {
                return;
            }
            node.set_degraded("switch", reason);
        }
        tokio::select! {
            () = tokio::time::sleep(SWITCH_PAUSE) => {}
            _ = off.recv() => by_signal = true,
            _ = on.recv() => by_signal = false,
            () = cancel.cancelled() => return,
        }
        if let Ok(view) = node.engine.view().await {
            node.set_degraded("budget", view.governed.filter(|_| now.is_none()));
        }
    }
}

/// Applies rule files again whenever they change. A set that is wrong changes nothing.
async fn follow_files(node: Arc<Node>, cancel: CancellationToken) {
    let watcher = FileWatcher::of(&node.config.options.rules);
    let mut stamp = RuleFilesStamp::of(&node.config.options.rules);
    loop {
        tokio::select! {
            () = watcher.changed(FILES_PAUSE) => {}
            () = cancel.cancelled() => return,
        }
        let now = RuleFilesStamp::of(&node.config.options.rules);
        if now == stamp {
            continue;
        }
        stamp = now;
        let trouble = match files::read(&node.config.options.rules) {
            Err(error) => Some(error.to_string()),
            Ok(rules) => {
                let count = rules.len();
                let replaced = node
                    .engine
                    .replace(RuleSource::Local, SourceRules { rules, ..SourceRules::default() })
                    .await;
                if replaced.is_ok() {
                    tracing::info!(rules = count, "the rule files have changed and are in force");
                }
                replaced.err().map(|errors| list(&errors))
            }
        };
        if let Some(trouble) = &trouble {
            tracing::warn!(
                "the rule files have changed and cannot be used, the former rules stay: {trouble}"
            );
        }
        node.set_degraded("rule files", trouble);
    }
}
