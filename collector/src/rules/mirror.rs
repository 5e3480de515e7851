//! TriggerRule custom resources: the second interface to the rule store.
//!
//! The rules lie in one ConfigMap, and each rule is also a resource of its own. A collector that changes the rules writes
//! the resources afterwards. Until it is done, no collector takes the resources for a change by people, and any collector
//! finishes the writing. Once they are written, a differing resource is a change by people (`kubectl apply`), and the
//! rules follow it. An invalid resource changes nothing, and its status shows the fault.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt as _;
use gannet_proto::control::{Rule, RuleScope};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams},
    runtime::{WatchStreamExt as _, watcher},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{
    Mirrored, Rules,
    error::RulesError,
    events::{RuleEvents, events},
    nodes::NodeStates,
    resource::{RuleResource, api_resource, is_same, to_resource},
    status::{StateCounts, refusals, status},
};

/// Name of this writer in the API server's records.
const MANAGER: &str = "gannet-collector";
/// Changes within this time are handled together.
const DEBOUNCE: Duration = Duration::from_millis(30);
/// Time between two synchronizations without a cause, in case the watch missed one.
const SYNC_INTERVAL: Duration = Duration::from_secs(10);
/// Delay after a failure.
const RETRY_DELAY: Duration = Duration::from_secs(2);
/// Shortest time between two writings of node states.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

/// Keeps the rules and the resources of one namespace equal.
pub(crate) struct Mirror {
    api: Api<DynamicObject>,
    events: RuleEvents,
    rules: Arc<Rules>,
    nodes: Arc<dyn NodeStates>,
    /// Name of this collector among those that share the resources.
    name: String,
}

impl Mirror {
    pub(crate) fn new(
        client: Client,
        namespace: &str,
        rules: Arc<Rules>,
        nodes: Arc<dyn NodeStates>,
        name: String,
    ) -> Self {
        let events = RuleEvents::new(client.clone(), namespace, &name);
        Self { api: Api::namespaced_with(client, namespace, &api_resource()), events, rules, nodes, name }
    }

    /// Synchronizes rules and resources until `stop`.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut events = watcher(self.api.clone(), watcher::Config::default()).default_backoff().boxed();
        let mut published = self.rules.subscribe();
        let mut changes = self.nodes.changes();
        let mut sync = tokio::time::interval(SYNC_INTERVAL);
        let mut status = tokio::time::interval(STATUS_INTERVAL);
        status.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // Each run of failures is logged once.
        let mut is_logged = false;
        loop {
            let is_status_only = tokio::select! {
                () = stop.cancelled() => return,
                event = events.next() => match event {
                    Some(Err(error)) => {
                        if !std::mem::replace(&mut is_logged, true) {
                            tracing::warn!("cannot watch the TriggerRules: {error}");
                        }
                        continue;
                    }
                    Some(Ok(_)) => false,
                    None => return,
                },
                changed = published.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    false
                }
                _ = sync.tick() => false,
                _ = status.tick(), if changes.has_changed().unwrap_or(false) => true,
            };
            if !is_status_only {
                tokio::time::sleep(DEBOUNCE).await;
                // One synchronization handles all events that have arrived by now.
                while let Some(Some(Ok(_))) = futures::FutureExt::now_or_never(events.next()) {}
                published.mark_unchanged();
            }
            changes.mark_unchanged();
            match self.synchronize().await {
                Ok(()) => is_logged = false,
                Err(error) => {
                    if !std::mem::replace(&mut is_logged, true) {
                        tracing::warn!("cannot synchronize the TriggerRules with the rules: {error}");
                    }
                    tokio::select! {
                        () = tokio::time::sleep(RETRY_DELAY) => {}
                        () = stop.cancelled() => return,
                    }
                    sync.reset_immediately();
                }
            }
        }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        f: impl FnOnce(&Rules) -> T + Send + 'static,
    ) -> Result<T, MirrorError> {
        let rules = Arc::clone(&self.rules);
        tokio::task::spawn_blocking(move || f(&rules)).await.map_err(|_| MirrorError::Ending)
    }

    /// Makes rules and resources equal, and writes the states of the nodes.
    async fn synchronize(&self) -> Result<(), MirrorError> {
        // The rules are read first, so the resources are at least as new as the rules that they are compared with.
        self.blocking(Rules::refresh_shared).await?;
        let state = self.rules.mirrored()?;
        let list = self.api.list(&ListParams::default()).await?;
        let resources: Vec<RuleResource> = list.items.into_iter().map(RuleResource::parse).collect();
        let mut wrong = BTreeMap::new();
        if state.is_written {
            wrong = self.adopt(&state, &resources).await?;
        } else {
            self.write(&state, &resources).await?;
            let revision = state.revision;
            self.blocking(move |rules| rules.mark_mirrored(revision)).await??;
        }
        self.report(&resources, &wrong).await
    }

    /// Makes the resources show the rules.
    async fn write(&self, state: &Mirrored, resources: &[RuleResource]) -> Result<(), MirrorError> {
        let mut wanted: BTreeMap<&str, (&str, &Rule)> = BTreeMap::new();
        for scope in &state.scopes {
            wanted.extend(scope.rules.iter().map(|rule| (rule.id.as_str(), (scope.scope.as_str(), rule))));
        }
        for resource in resources {
            match wanted.get(resource.name.as_str()) {
                Some((scope, rule)) if resource.shows(scope, rule) => {
                    wanted.remove(resource.name.as_str());
                }
                Some(_) => {}
                // An invalid rule was never part of the rules, so the collector does not remove its resource.
                None if resource.rule.is_err() => {}
                None => match self.api.delete(&resource.name, &DeleteParams::default()).await {
                    Ok(_) => {}
                    Err(kube::Error::Api(status)) if status.code == 404 => {}
                    Err(error) => return Err(error.into()),
                },
            }
        }
        for (id, (scope, rule)) in wanted {
            self.replace(id, &to_resource(scope, rule)).await?;
        }
        Ok(())
    }

    /// Creates a resource, or replaces its complete specification, so that removed fields disappear.
    async fn replace(&self, id: &str, object: &Value) -> Result<(), MirrorError> {
        let fresh: DynamicObject = serde_json::from_value(object.clone()).map_err(MirrorError::Form)?;
        let params = PostParams { field_manager: Some(MANAGER.into()), ..PostParams::default() };
        match self.api.get_opt(id).await? {
            None => drop(self.api.create(&params, &fresh).await?),
            Some(mut present) => {
                present.data["spec"] = object["spec"].clone();
                present.labels_mut().extend(fresh.metadata.labels.unwrap_or_default());
                self.api.replace(id, &params, &present).await?;
            }
        }
        Ok(())
    }

    /// Takes over changes that people made to the resources. Returns the names of invalid resources with their faults.
    async fn adopt(
        &self,
        state: &Mirrored,
        resources: &[RuleResource],
    ) -> Result<BTreeMap<String, String>, MirrorError> {
        let mut wrong = BTreeMap::new();
        let mut scopes: BTreeSet<&str> = state.scopes.iter().map(|s| s.scope.as_str()).collect();
        scopes.extend(resources.iter().map(|resource| resource.scope.as_str()));
        for scope in scopes {
            let former: &[Rule] =
                state.scopes.iter().find(|s| s.scope == scope).map_or(&[], |RuleScope { rules, .. }| rules);
            let mut wanted: Vec<Rule> = Vec::new();
            let mut writers = BTreeSet::new();
            for resource in resources.iter().filter(|resource| resource.scope == scope) {
                match &resource.rule {
                    Ok(rule) => wanted.push(rule.clone()),
                    Err(why) => {
                        wrong.insert(resource.name.clone(), why.clone());
                        // The last valid form stays in force, as with every rejected set.
                        wanted.extend(former.iter().find(|rule| rule.id == resource.name).cloned());
                    }
                }
                writers.extend(resource.last_writer());
            }
            if is_same(&wanted, former) {
                continue;
            }
            let writers: Vec<String> = writers.into_iter().collect();
            let who = if writers.is_empty() {
                "Kubernetes".into()
            } else {
                format!("Kubernetes: {}", writers.join(", "))
            };
            let (name, revision) = (scope.to_owned(), state.revision);
            match self.blocking(move |rules| rules.adopt(&name, wanted, revision, &who)).await? {
                // One scope at a time. The next synchronization sees the new revision.
                Ok(()) => break,
                Err(RulesError::Invalid(violations)) => {
                    let faults: Vec<String> =
                        violations.iter().map(|v| format!("{}: {}", v.field, v.description)).collect();
                    for resource in resources.iter().filter(|resource| resource.scope == scope) {
                        wrong.entry(resource.name.clone()).or_insert_with(|| faults.join("; "));
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(wrong)
    }

    /// Writes into each resource how many nodes of this collector run it, and publishes the news as Events.
    async fn report(
        &self,
        resources: &[RuleResource],
        wrong: &BTreeMap<String, String>,
    ) -> Result<(), MirrorError> {
        let Some((revision, made_ms)) = self.rules.revision(0)? else { return Ok(()) };
        let rollout = self.nodes.rollout(revision, made_ms);
        for resource in resources {
            let why_not = match (&resource.rule, wrong.get(&resource.name)) {
                (Err(why), _) | (Ok(_), Some(why)) => Some(why.as_str()),
                (Ok(_), None) => None,
            };
            let counts = resource.rule.as_ref().map_or_else(
                |_| StateCounts::default(),
                |rule| StateCounts::of(rule, &rollout.nodes, self.nodes.as_ref()),
            );
            let refusals = match resource.rule {
                Ok(_) => refusals(&resource.name, &rollout.nodes),
                Err(_) => Vec::new(),
            };
            let now = status(&resource.object, &self.name, revision, why_not, &counts, &refusals);
            let Some(now) = now else { continue };
            let patch = Patch::Merge(json!({ "status": now }));
            match self.api.patch_status(&resource.name, &PatchParams::default(), &patch).await {
                Ok(_) => {
                    let who = resource.last_writer().unwrap_or_else(|| "an unknown client".into());
                    let before = &resource.object.data["status"];
                    let events = events(before, &now, &self.name, &who, &refusals);
                    self.events.publish(&resource.object, events).await;
                }
                // The resource was deleted in the meantime.
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

/// Why rules and resources were not synchronized.
#[derive(Debug, thiserror::Error)]
enum MirrorError {
    #[error("{0}; are the TriggerRule resources installed, and may the collector read and write them?")]
    Api(#[from] kube::Error),
    #[error(transparent)]
    Rules(#[from] RulesError),
    #[error("cannot write a rule as a resource: {0}")]
    Form(#[source] serde_json::Error),
    #[error("the collector is ending")]
    Ending,
}
