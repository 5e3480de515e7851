//! `gannet-agent run`: the daemon. Builds the parts in the order in which data flows, starts their tasks and waits.

mod follow;
mod parts;
mod tasks;

use std::{io, path::PathBuf, process, sync::atomic::Ordering::Relaxed, thread, time::Duration};

use gannet_proto::{
    connect::DialError,
    control::{Rule, RuleError},
};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    commands::check::{self, Refusal, UnsafeKernel},
    config::{ConfigError, RunOptions},
    control::{LastGoodRules, restore},
    debug::{ListenError, Listeners},
    engine::EngineError,
    export::SpoolError,
    node::Node,
    rules::{
        RuleFilesError, RuleSource, SourceRules,
        files::{self, RuleFilesStamp},
    },
};
use follow::SwitchSignals;
use parts::{OpenSpool, Parts};
use tasks::Tasks;

/// The agent ends within this time after SIGTERM: the chart's grace period is 30 s.
const END_TIMEOUT: Duration = Duration::from_secs(25);

/// Reasons why the daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A required check failed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// An address is in use.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The spool cannot be used.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The engine cannot start.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The address or a certificate of the collector is wrong.
    #[error("--endpoint: {0}")]
    Dial(#[from] DialError),
    /// The rule files of this node cannot be read.
    #[error(transparent)]
    Files(#[from] RuleFilesError),
    /// The rule files of this node cannot be applied.
    #[error("--rules: {}", list_errors(.0))]
    Rules(Vec<RuleError>),
    /// The state directory cannot be created.
    #[error("--state-dir {}: {source}", path.display())]
    State {
        /// Path of the directory.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// A thread or a signal handler cannot start.
    #[error("cannot start: {0}")]
    Start(#[source] io::Error),
}

fn list_errors(errors: &[RuleError]) -> String {
    errors
        .iter()
        .map(|error| format!("rule {}: {}: {}", error.rule_id, error.field, error.reason))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Runs until SIGTERM or SIGINT. Then it delivers pending samples, or leaves them in the spool.
pub async fn run(options: RunOptions) -> Result<(), RunError> {
    let config = options.complete()?;
    check::preflight(UnsafeKernel::of(config.options.allow_unsafe_kernel))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Start)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Start)?;
    let switch = SwitchSignals::listen().map_err(RunError::Start)?;
    // Before the reading: a change in between is applied later.
    let rule_files = RuleFilesStamp::take(&config.options.rules).await;
    let local_rules = files::read(&config.options.rules).await?;
    let listeners = Listeners::open(config.options.http_listen, config.options.debug_listen).await?;
    let opened = tokio::select! {
        opened = OpenSpool::open(&config) => opened?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };

    let (supplied_stamp, supplied) = follow::first_supplied(&config.override_dir).await;
    let parts = Parts::start(config, supplied, opened)?;
    let store = LastGoodRules::in_dir(&parts.node.config.options.state_dir);
    let active = restore(&parts.node, &store).await;
    apply_local_rules(&parts.node, local_rules).await?;
    // After an error, the first check reads the files again.
    let stamps = (rule_files.ok(), supplied_stamp);
    let tasks = Tasks::start(&parts, listeners, switch, stamps, store, active)?;
    tracing::info!(node = parts.node.config.node, "gannet-agent {} is running", gannet_proto::VERSION);

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("shutting down: delivering pending samples or leaving them in the spool");
    if let Err(error) = end_in_time() {
        tracing::warn!("cannot start the thread that ends the agent in any case: {error}");
    }
    tasks.stop().await;
    parts.stop().await;
    Ok(())
}

/// Ends the process after [`END_TIMEOUT`], whatever still waits for an answer then.
fn end_in_time() -> io::Result<()> {
    let end = || {
        thread::sleep(END_TIMEOUT);
        tracing::error!(
            "ending without the last samples: a part of the agent did not end within {} s; please report this",
            END_TIMEOUT.as_secs()
        );
        super::end_workers();
        process::exit(1);
    };
    thread::Builder::new().name("gannet-end".into()).spawn(end).map(drop)
}

async fn apply_local_rules(node: &Node, rules: Vec<Rule>) -> Result<(), RunError> {
    let partial = node
        .engine
        .replace(RuleSource::Local, SourceRules { rules, ..SourceRules::default() })
        .await
        .map_err(RunError::Rules)?;
    for error in partial {
        tracing::warn!(
            rule = error.rule_id,
            field = error.field,
            "this field has no effect on this node: {}",
            error.reason
        );
    }
    node.rules_loaded.store(true, Relaxed);
    Ok(())
}
