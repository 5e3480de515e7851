//! Says which control groups the rules over pods mean, and says it again whenever pods, rules or control groups change.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, watch},
    task::spawn_blocking,
};
use tokio_util::sync::CancellationToken;

use super::{
    Pods,
    resolve::{PodRule, resolve},
};
use crate::{
    cgroup::CgroupTree,
    engine::Containers,
    rules::{PodQuery, PodSelection},
};

/// Where new control groups are not told of, how late they are noticed.
const ANYHOW: Duration = Duration::from_secs(10);
/// A pod makes several groups at once; a walk over all takes a few milliseconds.
const SETTLED: Duration = Duration::from_millis(20);

/// Does so until cancelled.
pub async fn arm(
    pods: Pods,
    groups: Arc<CgroupTree>,
    engine: Containers,
    mut rules: watch::Receiver<Vec<PodQuery>>,
    cancel: CancellationToken,
) {
    let made = Arc::new(Notify::new());
    let bell = Arc::clone(&made);
    if let Err(error) = groups.watch(move || bell.notify_one()) {
        tracing::warn!("new containers are noticed up to {} s late: {error}", ANYHOW.as_secs());
    }
    let mut told = pods.changes();
    let mut former = PodSelection::default();
    loop {
        let wanted = rules.borrow_and_update().clone();
        let (known, tree) = (pods.clone(), Arc::clone(&groups));
        // Nothing asks for pods, and no pod asks to be left alone: nothing is looked at.
        let selection = if wanted.is_empty() && !known.any_denied() {
            PodSelection::default()
        } else {
            match spawn_blocking(move || select(&known, &tree, &wanted)).await {
                Ok(selection) => selection,
                Err(error) => {
                    tracing::error!("rules over pods stay as they are: {error}");
                    former.clone()
                }
            }
        };
        if selection != former {
            engine.select(selection.clone());
            former = selection;
        }
        tokio::select! {
            changed = rules.changed() => if changed.is_err() { return },
            _ = told.changed() => {}
            () = made.notified() => {}
            () = tokio::time::sleep(ANYHOW) => {}
            () = cancel.cancelled() => return,
        }
        tokio::time::sleep(SETTLED).await;
    }
}

fn select(pods: &Pods, groups: &CgroupTree, wanted: &[PodQuery]) -> PodSelection {
    // What asks nothing of pods means none: it is not for this one to open it to all.
    let (ids, rules): (Vec<&String>, Vec<PodRule>) =
        wanted.iter().filter_map(|rule| Some((&rule.rule_id, PodRule::of(&rule.matches)?))).unzip();
    let resolved = resolve(pods, &rules, &groups.scan());
    for names in &resolved.unknown {
        pods.ask(&names.container_id, &names.pod_uid);
    }
    let rules = ids.into_iter().cloned().zip(resolved.rules).collect();
    PodSelection { rules, denied: resolved.denied }
}
