//! The parts of the daemon, wired in the order in which data flows: engine, pipeline, exporter.

use std::{fs, pin::pin, sync::Arc, time::Duration};

use tokio::{sync::watch, task::JoinHandle};

use super::RunError;
use crate::{
    access::run_apart,
    cgroup::{CgroupNames, CgroupTree},
    config::Config,
    engine::{Engine, EngineOptions},
    export::{
        Bounds, DebugUploadOptions, ExportConfig, Exporter, Spool, SpoolStats, StreamStats,
        upload_debug_files,
    },
    kernel::KernelOptions,
    ledger::NodeLedger,
    node::Node,
    pipeline::{self, RecentProfiles, WindowQueue},
    pods::Pods,
    rules::{PodQuery, PodResolver},
    symbols::{Symbolizer, SymbolizerConfig, offered_files},
    tables::{SuppliedTables, TableSources},
};

/// Time for the delivery of the last profiles at the end; the rest stays in the spool.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(5);
/// After this time without an answer of the spool's disk, the log says so.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// The spool, opened before the other parts: its disk may not answer.
pub(super) struct OpenSpool {
    spool: Spool,
    ledger: NodeLedger,
    stats: Arc<SpoolStats>,
}

impl OpenSpool {
    /// Creates the state directory and opens the spool in it.
    pub(super) async fn open(config: &Config) -> Result<Self, RunError> {
        let (ledger, stats) = (NodeLedger::new(), Arc::new(SpoolStats::default()));
        let bounds = Bounds { bytes: config.options.spool_bytes.0, age: config.options.spool_age.0 };
        let (state_dir, theirs) = (config.options.state_dir.clone(), (ledger.clone(), Arc::clone(&stats)));
        let holder = std::process::id();
        let open = move || -> Result<Spool, RunError> {
            fs::create_dir_all(&state_dir)
                .map_err(|source| RunError::State { path: state_dir.clone(), source })?;
            Ok(Spool::open_as(holder, &state_dir.join("spool"), bounds, theirs.0, theirs.1)?)
        };
        let mut opening = pin!(run_apart("gannet-spool-open", open));
        if let Ok(opened) = tokio::time::timeout(OPEN_TIMEOUT, &mut opening).await {
            return Ok(Self { spool: opened.map_err(RunError::Start)??, ledger, stats });
        }
        tracing::warn!(
            "the file system of {} does not answer: the agent starts when it does; check this disk, or give a --state-dir on \
             another one",
            config.options.state_dir.display()
        );
        Ok(Self { spool: opening.await.map_err(RunError::Start)??, ledger, stats })
    }
}

pub(super) struct Parts {
    pub(super) node: Arc<Node>,
    /// The control groups, if there is a pod source that resolves rules to them.
    pub(super) groups: Option<Arc<CgroupTree>>,
    /// Pod queries of the rules in force.
    pub(super) queries: watch::Receiver<Vec<PodQuery>>,
    exporter: Arc<Exporter>,
    pipeline: JoinHandle<()>,
    /// Uploads debug information, if it is asked for.
    uploads: Option<JoinHandle<()>>,
}

impl Parts {
    pub(super) fn start(
        config: Config,
        supplied: SuppliedTables,
        opened: OpenSpool,
    ) -> Result<Self, RunError> {
        let OpenSpool { spool, ledger, stats: spool_stats } = opened;
        let upload = debug_upload_options(&config).map(|options| (options, offered_files()));
        let offers = upload.as_ref().map(|(_, (sender, _))| sender.clone());
        let symbolizer = Symbolizer::start(SymbolizerConfig { offers, ..SymbolizerConfig::default() })
            .map_err(RunError::Start)?;
        let symbols = Arc::clone(symbolizer.stats());
        let uploads = upload.map(|(options, (_, offered))| {
            tokio::spawn(upload_debug_files(options, offered, Arc::clone(&symbols)))
        });
        let recent = RecentProfiles::default();
        let pods = Pods::new(config.pod_labels.clone());
        let (queue, windows) = WindowQueue::new(ledger.clone());
        let engine = Engine::start(engine_options(&config, &supplied), queue)?;
        let stream_stats = Arc::new(StreamStats::default());
        let exporter =
            Exporter::start(export_config(&config), spool, ledger.clone(), Arc::clone(&stream_stats));
        let exporter = Arc::new(exporter.map_err(RunError::Start)?);
        let submit = {
            let exporter = Arc::clone(&exporter);
            move |batches| exporter.submit(batches)
        };
        let pipeline = tokio::spawn(pipeline::run(
            windows,
            symbolizer,
            ledger.clone(),
            recent.clone(),
            pods.clone(),
            submit,
        ));
        let (sender, queries) = watch::channel(Vec::new());
        let groups = engine.groups().filter(|_| config.pods.is_some()).map(Arc::clone);
        if groups.is_some() {
            engine.resolve_pods(QueryForwarder { pods: pods.clone(), queries: sender });
        }
        let node = Node::new(config, engine, ledger, (spool_stats, stream_stats), symbols, recent, pods);
        node.set_supplied(supplied);
        let node = Arc::new(node);
        Ok(Self { node, groups, queries, exporter, pipeline, uploads })
    }

    /// Ends the engine, then the pipeline, then the exporter, so that the last window passes all of them.
    pub(super) async fn stop(self) {
        if let Some(uploads) = self.uploads {
            uploads.abort();
        }
        match Arc::try_unwrap(self.node) {
            // Dropping the engine flushes its last window into the pipeline, which then ends.
            Ok(node) => drop(tokio::task::spawn_blocking(move || node.engine.stop()).await),
            Err(node) => drop(node.engine.flush().await),
        }
        if tokio::time::timeout(SHUTDOWN_TIMEOUT, self.pipeline).await.is_err() {
            tracing::warn!("the last window was not symbolized in time");
        }
        if !self.exporter.shutdown(SHUTDOWN_TIMEOUT).await {
            tracing::info!(
                "the collector did not accept all profiles in time: those on the disk stay in the spool"
            );
        }
    }
}

fn debug_upload_options(config: &Config) -> Option<DebugUploadOptions> {
    let options = &config.options;
    config.dial.clone().filter(|_| options.debuginfo_upload).map(|dial| DebugUploadOptions {
        dial,
        bytes_per_second: options.debuginfo_upload_rate.0,
        file_bytes: options.debuginfo_upload_file_bytes.0,
    })
}

fn export_config(config: &Config) -> ExportConfig {
    ExportConfig {
        node: config.node.clone(),
        version: gannet_proto::VERSION.to_owned(),
        collector: config.dial.clone(),
    }
}

fn engine_options(config: &Config, supplied: &SuppliedTables) -> EngineOptions {
    let options = &config.options;
    EngineOptions {
        node: config.node.clone(),
        kernel: KernelOptions {
            ring_bytes: config.ring_bytes,
            table_bytes: config.table_bytes,
            processes: options.processes,
            lifecycle: options.lifecycle,
            ..KernelOptions::default()
        },
        window: options.window.0,
        caps: config.caps.clone(),
        deny: config.deny.clone(),
        budgets: config.budgets,
        start_labels: config.start_labels.clone(),
        tables: Some(TableSources {
            cache_dir: Some(options.state_dir.join("tables")),
            supplied: Arc::clone(&supplied.tables),
            ..TableSources::with_debug_files()
        }),
    }
}

/// Forwards pod queries and containers from the engine to the task that follows pods.
struct QueryForwarder {
    pods: Pods,
    queries: watch::Sender<Vec<PodQuery>>,
}

impl PodResolver for QueryForwarder {
    fn set_queries(&mut self, queries: Vec<PodQuery>) {
        self.queries.send_replace(queries);
    }

    fn container_seen(&mut self, container: &CgroupNames, pid: u32) {
        self.pods.container_seen(container, pid);
    }
}
