//! Follows the first source that works, and the next one when that fails.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant, SystemTime},
};

use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;

use super::{Change, PodSource, SourceError, SourceKind};
use crate::{export::Backoff, pods::Pods};

/// How long a source may take to its first answer before the next is tried.
const FIRST_ANSWER: Duration = Duration::from_secs(30);
/// Where nothing speaks for Kubernetes, how often it is looked for.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// A source that told for so long was a good one: the next attempt comes soon.
const GOOD: Duration = Duration::from_secs(30);

/// Follows `sources` until cancelled. `must`: they were asked for by name, so that readiness waits for them even if
/// nothing is there.
pub fn follow(
    pods: Pods,
    sources: Vec<Arc<dyn PodSource>>,
    must: bool,
    cancel: CancellationToken,
) -> impl Future<Output = ()> + Send + 'static {
    // At once, so that the node is not ready for a moment before it waits for pods.
    look(&pods, &sources, must);
    following(pods, sources, must, cancel)
}

/// Whether there is anything to follow; readiness waits for it then.
fn look(pods: &Pods, sources: &[Arc<dyn PodSource>], must: bool) -> bool {
    let there = must || sources.iter().any(|source| source.is_there());
    pods.0.active.store(there, Relaxed);
    pods.set_status(|status| status.awaited = there);
    there
}

async fn following(pods: Pods, sources: Vec<Arc<dyn PodSource>>, must: bool, cancel: CancellationToken) {
    let run = async {
        let mut backoff = Backoff::new();
        let mut quiet = false;
        loop {
            if !look(&pods, &sources, must) {
                if !std::mem::replace(&mut quiet, true) {
                    tracing::info!("no sign of Kubernetes on this node: profiles are without pods");
                }
                tokio::time::sleep(LOOK_AGAIN).await;
                continue;
            }
            quiet = false;
            let begun = Instant::now();
            if attempt(&pods, &sources).await && begun.elapsed() > GOOD {
                backoff.reset();
            }
            tokio::time::sleep(backoff.next()).await;
        }
    };
    tokio::select! {
        () = run => {}
        () = cancel.cancelled() => {}
    }
    pods.close();
}

/// Tries the sources in their order and follows the first that answers until it fails. Whether one did.
async fn attempt(pods: &Pods, sources: &[Arc<dyn PodSource>]) -> bool {
    let mut passed_over: Vec<(SourceKind, String)> = Vec::new();
    for source in sources {
        let kind = source.kind();
        let mut changes = source.changes(pods.wanted());
        let mut asked_at = Instant::now();
        let first = match tokio::time::timeout(FIRST_ANSWER, changes.next()).await {
            Ok(Some(Ok(change))) => Ok(change),
            Ok(Some(Err(error))) => Err(error),
            Ok(None) => Err(SourceError::Ended { at: kind.to_string(), said: String::new() }),
            Err(_) => Err(SourceError::Slow { at: kind.to_string(), seconds: FIRST_ANSWER.as_secs() }),
        };
        let first = match first {
            Ok(change) => change,
            Err(error) => {
                failed(pods, kind, &error, !matches!(error, SourceError::Absent(_)));
                passed_over.push((kind, error.to_string()));
                pods.set_status(|status| status.passed_over.clone_from(&passed_over));
                continue;
            }
        };
        if pods.status().source != Some(kind) {
            let why = passed_over
                .iter()
                .fold(String::new(), |text, (kind, why)| text + &format!("; not {kind}: {why}"));
            tracing::info!("pods come from {kind}{why}");
        }
        pods.set_status(|status| {
            status.source = Some(kind);
            status.passed_over.clone_from(&passed_over);
        });
        take(pods, first, asked_at);
        loop {
            asked_at = Instant::now();
            match changes.next().await {
                Some(Ok(change)) => take(pods, change, asked_at),
                Some(Err(error)) => {
                    failed(pods, kind, &error, true);
                    return true;
                }
                None => return true,
            }
        }
    }
    false
}

fn take(pods: &Pods, change: Change, asked_at: Instant) {
    pods.store().apply(change, asked_at, Instant::now());
    pods.set_status(|status| {
        status.updates += 1;
        status.last_update = Some(SystemTime::now());
        status.last_error = None;
    });
    pods.0.told.send_modify(|count| *count += 1);
}

/// Counts a failure, and says it where it is not the same as before.
fn failed(pods: &Pods, kind: SourceKind, error: &SourceError, is_fault: bool) {
    let text = format!("{kind}: {error}");
    let mut news = false;
    pods.set_status(|status| {
        status.errors += u64::from(is_fault);
        news = is_fault && status.last_error.as_ref() != Some(&text);
        if is_fault {
            status.last_error = Some(text.clone());
        }
    });
    if news {
        tracing::warn!("pods: {text}");
    }
}
