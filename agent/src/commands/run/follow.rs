//! Follows the kill switch and the rule files of this node.

use std::{io, sync::Arc, time::Duration};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::list_errors;
use crate::{
    node::Node,
    rules::{
        FileWatcher, RuleSource, SourceRules,
        files::{self, RuleFilesStamp},
    },
};

/// Interval at which the agent checks the rule files, besides the events of their directories.
const FILES_INTERVAL: Duration = Duration::from_millis(500);
/// Interval at which the agent checks for the file of the kill switch.
const SWITCH_INTERVAL: Duration = Duration::from_millis(250);

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
    let (mut off_by_signal, mut current) = (false, None);
    loop {
        let reason = if off_by_signal {
            Some("switched off by SIGUSR1; SIGUSR2 switches on again".to_owned())
        } else if file.exists() {
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

/// Applies the rule files again when they change. Invalid files change nothing.
pub(super) async fn follow_files(node: Arc<Node>, cancel: CancellationToken) {
    let watcher = FileWatcher::of(&node.config.options.rules);
    let mut stamp = RuleFilesStamp::of(&node.config.options.rules);
    loop {
        tokio::select! {
            () = watcher.changed(FILES_INTERVAL) => {}
            () = cancel.cancelled() => return,
        }
        let now = RuleFilesStamp::of(&node.config.options.rules);
        if now == stamp {
            continue;
        }
        stamp = now;
        let error = match files::read(&node.config.options.rules) {
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
        if let Some(error) = &error {
            tracing::warn!("cannot use the changed rule files, the former rules stay in force: {error}");
        }
        node.set_degraded("rule files", error);
    }
}
