//! Follows the kill switch, the rule files and the supplied unwind tables of this node.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::list_errors;
use crate::{
    access::{OwnFiles, on_own_files_later, spawn_apart},
    node::Node,
    rules::{
        FileWatcher, RuleSource, SourceRules,
        files::{self, RuleFilesStamp},
    },
    tables::{SuppliedStamp, SuppliedTables},
};

/// Interval at which the agent checks the rule files, besides the events of their directories.
const FILES_INTERVAL: Duration = Duration::from_millis(500);
/// Interval at which the agent checks for the file of the kill switch.
const SWITCH_INTERVAL: Duration = Duration::from_millis(250);

/// Interval at which the agent checks the supplied unwind tables, besides the events of their directory.
const SUPPLIED_INTERVAL: Duration = Duration::from_secs(5);
/// How long the start waits for the supplied unwind tables. Later they come into force when they are read.
const SUPPLIED_TIMEOUT: Duration = Duration::from_secs(2);

/// The signals of the kill switch.
pub(super) struct SwitchSignals {
    off: Signal,
    on: Signal,
}

impl SwitchSignals {
    pub(super) fn listen() -> io::Result<Self> {
        Ok(Self { off: signal(SignalKind::user_defined1())?, on: signal(SignalKind::user_defined2())? })
    }
}

/// Follows the kill switch. While the file `disable` is in the state directory, and from SIGUSR1 to SIGUSR2, no program of
/// the agent is attached to the kernel.
pub(super) async fn follow_switch(node: Arc<Node>, signals: SwitchSignals, cancel: CancellationToken) {
    let SwitchSignals { mut off, mut on } = signals;
    let file = node.config.options.state_dir.join("disable");
    let (mut off_by_signal, mut off_by_file, mut current) = (false, false, None);
    loop {
        let path = file.clone();
        let exists = on_own_files_later(OwnFiles::State, file.clone(), move || path.exists());
        tokio::select! {
            // A disk that does not answer changes nothing.
            exists = exists => off_by_file = exists.unwrap_or(off_by_file),
            () = cancel.cancelled() => return,
        }
        let reason = if off_by_signal {
            Some("switched off by SIGUSR1; SIGUSR2 switches on again".to_owned())
        } else if off_by_file {
            Some(format!("switched off by {}; remove it to switch on again", file.display()))
        } else {
            None
        };
        if reason != current {
            current.clone_from(&reason);
            if node.engine.switch_off(reason.clone()).await.is_err() {
                return;
            }
            node.set_degraded("switch", reason);
        }
        tokio::select! {
            () = tokio::time::sleep(SWITCH_INTERVAL) => {}
            _ = off.recv() => off_by_signal = true,
            _ = on.recv() => off_by_signal = false,
            () = cancel.cancelled() => return,
        }
        if let Ok(view) = node.engine.view().await {
            node.set_degraded("budget", view.governed.filter(|_| current.is_none()));
        }
    }
}

/// Applies the rule files again when they differ from `stamp`, which was taken before they were read first. Invalid files change
/// nothing.
pub(super) async fn follow_files(
    node: Arc<Node>,
    mut stamp: Option<RuleFilesStamp>,
    cancel: CancellationToken,
) {
    let watcher = FileWatcher::of(OwnFiles::Rules, &node.config.options.rules).await;
    loop {
        tokio::select! {
            () = watcher.changed(FILES_INTERVAL) => {}
            () = cancel.cancelled() => return,
        }
        let Ok(now) = RuleFilesStamp::take(&node.config.options.rules).await else { continue };
        if stamp.as_ref() == Some(&now) {
            continue;
        }
        let error = match files::read(&node.config.options.rules).await {
            Err(error) if error.is_unanswered() => continue,
            Err(error) => Some(error.to_string()),
            Ok(rules) => {
                let count = rules.len();
                let replaced = node
                    .engine
                    .replace(RuleSource::Local, SourceRules { rules, ..SourceRules::default() })
                    .await;
                if replaced.is_ok() {
                    tracing::info!(rules = count, "applied the changed rule files");
                }
                replaced.err().map(|errors| list_errors(&errors))
            }
        };
        stamp = Some(now);
        if let Some(error) = &error {
            tracing::warn!("cannot use the changed rule files, the former rules stay in force: {error}");
        }
        node.set_degraded("rule files", error);
    }
}

/// Reads the supplied unwind tables for the start, and creates their directory. Nothing is read from one that does not answer.
pub(super) async fn first_supplied(directory: &Path) -> (SuppliedStamp, SuppliedTables) {
    let path = directory.to_owned();
    let read = read_supplied(path, None);
    if let Ok(read) = tokio::time::timeout(SUPPLIED_TIMEOUT, read).await {
        return read.unwrap_or_default();
    }
    tracing::warn!(
        "{} does not answer: its unwind tables come into force when they can be read",
        directory.display()
    );
    Default::default()
}

/// Reads the supplied unwind tables if their directory has another stamp. The worker of its own may wait for a file system
/// for ever; the agent ends without it.
async fn read_supplied(
    directory: PathBuf,
    former: Option<SuppliedStamp>,
) -> Option<(SuppliedStamp, SuppliedTables)> {
    let (answer, read) = oneshot::channel();
    let work = move || {
        // A user who can write here decides about the stacks of any program.
        let created = fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory);
        if let (Err(error), None) = (created, &former) {
            tracing::warn!(
                "cannot create {}: {error}; create it to supply unwind tables",
                directory.display()
            );
        }
        let stamp = SuppliedStamp::of(&directory);
        let changed = former.is_none_or(|former| former != stamp);
        let _ = answer.send(changed.then(|| (stamp, SuppliedTables::read(&directory))));
    };
    spawn_apart("gannet-supplied", work).ok()?;
    read.await.ok().flatten()
}

/// Follows the directory of supplied unwind tables. A file that cannot be used is refused, and its program keeps the table
/// of its own.
pub(super) async fn follow_supplied(node: Arc<Node>, mut stamp: SuppliedStamp, cancel: CancellationToken) {
    let directory = node.config.override_dir.clone();
    let watcher = FileWatcher::of(OwnFiles::State, &[directory.join("any")]).await;
    loop {
        tokio::select! {
            () = watcher.changed(SUPPLIED_INTERVAL) => {}
            () = cancel.cancelled() => return,
        }
        let read = tokio::select! {
            read = read_supplied(directory.clone(), Some(stamp.clone())) => read,
            () = cancel.cancelled() => return,
        };
        let Some((now, supplied)) = read else { continue };
        stamp = now;
        if let Err(error) = node.engine.supply_tables(Arc::clone(&supplied.tables)).await {
            tracing::warn!("cannot use the changed unwind tables: {error}");
            stamp = SuppliedStamp::default();
            continue;
        }
        node.set_supplied(supplied);
    }
}
