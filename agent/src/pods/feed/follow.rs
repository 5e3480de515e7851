//! Follows the first pod feed that works, and the next one when it fails.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;

use super::{PodFeed, PodFeedError, PodFeedKind};
use crate::{export::Backoff, pods::Pods};

/// Time limit for a feed's first answer, before the agent tries the next feed.
const FIRST_ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How often the agent checks for Kubernetes where nothing indicates it.
const DETECTION_PAUSE: Duration = Duration::from_secs(60);
/// After a feed has worked for this long, the next attempt comes soon.
const STABLE: Duration = Duration::from_secs(30);

/// Follows `feeds` until cancelled. `required`: the user has named the feed, so readiness waits for it even if nothing
/// indicates that it exists.
pub fn follow(
    pods: Pods,
    feeds: Vec<Arc<dyn PodFeed>>,
    required: bool,
    cancel: CancellationToken,
) -> impl Future<Output = ()> + Send + 'static {
    // Before the task runs, so that the node does not become ready before it waits for pods.
    detect(&pods, &feeds, required);
    run(pods, feeds, required, cancel)
}

/// Checks whether there is a feed to follow. Readiness waits for it if so.
fn detect(pods: &Pods, feeds: &[Arc<dyn PodFeed>], required: bool) -> bool {
    let present = required || feeds.iter().any(|feed| feed.is_present());
    pods.set_active(present);
    present
}

async fn run(pods: Pods, feeds: Vec<Arc<dyn PodFeed>>, required: bool, cancel: CancellationToken) {
    let attempts = async {
        let mut backoff = Backoff::new();
        let mut logged = false;
        loop {
            if !detect(&pods, &feeds, required) {
                if !std::mem::replace(&mut logged, true) {
                    tracing::info!("no sign of Kubernetes on this node: profiles are without pods");
                }
                tokio::time::sleep(DETECTION_PAUSE).await;
                continue;
            }
            logged = false;
            let begun = Instant::now();
            if attempt(&pods, &feeds).await && begun.elapsed() > STABLE {
                backoff.reset();
            }
            tokio::time::sleep(backoff.next()).await;
        }
    };
    tokio::select! {
        () = attempts => {}
        () = cancel.cancelled() => {}
    }
    pods.close();
}

/// Tries the feeds in their order and follows the first that answers until it fails. Returns false if none answered.
async fn attempt(pods: &Pods, feeds: &[Arc<dyn PodFeed>]) -> bool {
    let mut passed_over: Vec<(PodFeedKind, String)> = Vec::new();
    for feed in feeds {
        let kind = feed.kind();
        let mut changes = feed.changes(pods.requested());
        let mut asked_at = Instant::now();
        let first = match tokio::time::timeout(FIRST_ANSWER_TIMEOUT, changes.next()).await {
            Ok(Some(Ok(change))) => Ok(change),
            Ok(Some(Err(error))) => Err(error),
            Ok(None) => Err(PodFeedError::Ended { at: kind.to_string(), said: String::new() }),
            Err(_) => {
                Err(PodFeedError::Timeout { at: kind.to_string(), seconds: FIRST_ANSWER_TIMEOUT.as_secs() })
            }
        };
        let first = match first {
            Ok(change) => change,
            Err(error) => {
                failed(pods, kind, &error, !matches!(error, PodFeedError::Absent(_)));
                passed_over.push((kind, error.to_string()));
                pods.set_status(|status| status.passed_over.clone_from(&passed_over));
                continue;
            }
        };
        if pods.status().kind != Some(kind) {
            let why = passed_over
                .iter()
                .fold(String::new(), |text, (kind, why)| text + &format!("; not {kind}: {why}"));
            tracing::info!("pods come from {kind}{why}");
        }
        pods.set_status(|status| {
            status.kind = Some(kind);
            status.passed_over.clone_from(&passed_over);
        });
        pods.apply(first, asked_at);
        loop {
            asked_at = Instant::now();
            match changes.next().await {
                Some(Ok(change)) => pods.apply(change, asked_at),
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

/// Counts a failure, and logs it unless the last failure was the same.
fn failed(pods: &Pods, kind: PodFeedKind, error: &PodFeedError, is_fault: bool) {
    let text = format!("{kind}: {error}");
    let mut is_new = false;
    pods.set_status(|status| {
        status.errors += u64::from(is_fault);
        is_new = is_fault && status.last_error.as_ref() != Some(&text);
        if is_fault {
            status.last_error = Some(text.clone());
        }
    });
    if is_new {
        tracing::warn!("cannot get pods from {text}");
    }
}
