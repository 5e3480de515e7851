//! TriggerRule custom resources: the other door to the rule store.
//!
//! The store's state lies in one ConfigMap; each rule of it is also a resource of its own. Whoever changes the state
//! writes the resources behind it, and until that is done nobody takes them for a change by somebody else; any collector
//! finishes what another one began. Once they are written, a resource that says something else was changed by people
//! (`kubectl apply`), and the state follows. A resource that is no good rule changes nothing, and its status says why.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt as _;
use gannet_proto::{
    control::{NodeRollout, Rule, RuleScope, node_rollout::State},
    rules::{self, json_schema},
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{ApiResource, DeleteParams, DynamicObject, ListParams, Patch, PatchParams},
    core::GroupVersionKind,
    runtime::{WatchStreamExt as _, watcher},
};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{
    DEFAULT_SCOPE, Mirrored, Rules, RulesError,
    events::{Events, news},
};
use crate::{fleet::Fleet, time};

const GROUP: &str = "gannet.dev";
const VERSION: &str = "v1alpha1";
const KIND: &str = "TriggerRule";
const PLURAL: &str = "triggerrules";
/// A label; not given: the scope `default`.
const SCOPE_LABEL: &str = "gannet.dev/scope";
/// Who writes, as the API server notes it.
const MANAGER: &str = "gannet-collector";
/// Changes that come together are looked at together.
const DEBOUNCE: Duration = Duration::from_millis(30);
/// A look without a cause, in case one was missed.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// After a failure.
const RETRY: Duration = Duration::from_secs(2);
/// How often states of nodes are written into the resources at most.
const STATUS_EVERY: Duration = Duration::from_secs(1);
/// What a collector has written is left out of the sums when it is so old, and written again before.
const STATUS_HOLDS_MS: u64 = 180_000;
const STATUS_REFRESH_MS: u64 = 60_000;

/// Of how many nodes an Event tells why.
const REFUSALS_TOLD: usize = 3;

/// The collector's end of the resources of one namespace.
pub(crate) struct Mirror {
    api: Api<DynamicObject>,
    events: Events,
    rules: Arc<Rules>,
    fleet: Arc<Fleet>,
    /// This collector among those that share the resources.
    name: String,
}

/// A resource, as it was read.
struct Read {
    name: String,
    scope: String,
    rule: Result<Rule, String>,
    object: DynamicObject,
}

impl Mirror {
    pub(crate) fn new(
        client: Client,
        namespace: &str,
        rules: Arc<Rules>,
        fleet: Arc<Fleet>,
        name: String,
    ) -> Self {
        let kind = GroupVersionKind::gvk(GROUP, VERSION, KIND);
        let resource = ApiResource::from_gvk_with_plural(&kind, PLURAL);
        let events = Events::new(client.clone(), namespace, &name);
        Self { api: Api::namespaced_with(client, namespace, &resource), events, rules, fleet, name }
    }

    /// Keeps resources and rules the same until told to stop.
    pub(crate) async fn run(self, stop: CancellationToken) {
        let mut events = watcher(self.api.clone(), watcher::Config::default()).default_backoff().boxed();
        let mut published = self.rules.subscribe();
        let mut changes = self.fleet.changes();
        let mut look = tokio::time::interval(LOOK_EVERY);
        let mut status = tokio::time::interval(STATUS_EVERY);
        status.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut told = false;
        loop {
            let states_only = tokio::select! {
                () = stop.cancelled() => return,
                event = events.next() => match event {
                    Some(Err(error)) => {
                        if !std::mem::replace(&mut told, true) {
                            tracing::warn!("the TriggerRules cannot be watched: {error}");
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
                _ = look.tick() => false,
                _ = status.tick(), if changes.has_changed().unwrap_or(false) => true,
            };
            if !states_only {
                tokio::time::sleep(DEBOUNCE).await;
                // Whatever has come until now is seen in one look.
                while let Some(Some(Ok(_))) = futures::FutureExt::now_or_never(events.next()) {}
                published.mark_unchanged();
            }
            changes.mark_unchanged();
            match self.look().await {
                Ok(()) => told = false,
                Err(error) => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!("TriggerRules and rules cannot be brought together: {error}");
                    }
                    tokio::select! {
                        () = tokio::time::sleep(RETRY) => {}
                        () = stop.cancelled() => return,
                    }
                    look.reset_immediately();
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

    /// One look: brings both sides together, and writes what nodes say.
    async fn look(&self) -> Result<(), MirrorError> {
        // In this order: what is read of the resources is at least as new as the state that it is compared with.
        self.blocking(Rules::look).await?;
        let state = self.rules.mirrored()?;
        let list = self.api.list(&ListParams::default()).await?;
        let resources: Vec<Read> = list.items.into_iter().map(read).collect();
        let mut wrong = BTreeMap::new();
        if state.is_written {
            wrong = self.adopt(&state, &resources).await?;
        } else {
            self.write(&state, &resources).await?;
            let revision = state.revision;
            self.blocking(move |rules| rules.mark_mirrored(revision)).await??;
        }
        self.tell(&resources, &wrong).await
    }

    /// Makes the resources say what the state says.
    async fn write(&self, state: &Mirrored, resources: &[Read]) -> Result<(), MirrorError> {
        let mut wanted: BTreeMap<&str, (&str, &Rule)> = BTreeMap::new();
        for scope in &state.scopes {
            wanted.extend(scope.rules.iter().map(|rule| (rule.id.as_str(), (scope.scope.as_str(), rule))));
        }
        for read in resources {
            let is_same = |(scope, rule): &(&str, &Rule)| {
                *scope == read.scope
                    && read
                        .rule
                        .as_ref()
                        .is_ok_and(|have| same(std::slice::from_ref(have), std::slice::from_ref(*rule)))
            };
            match wanted.get(read.name.as_str()) {
                Some(want) if is_same(want) => drop(wanted.remove(read.name.as_str())),
                Some(_) => {}
                // What is no good rule was never in the state, so it is not for the state to remove.
                None if read.rule.is_err() => {}
                None => match self.api.delete(&read.name, &DeleteParams::default()).await {
                    Ok(_) => {}
                    Err(kube::Error::Api(status)) if status.code == 404 => {}
                    Err(error) => return Err(error.into()),
                },
            }
        }
        for (id, (scope, rule)) in wanted {
            let object = json!({
                "apiVersion": format!("{GROUP}/{VERSION}"), "kind": KIND,
                "metadata": { "name": id, "labels": { SCOPE_LABEL: scope } },
                "spec": spec(rule),
            });
            self.replace(id, &object).await?;
        }
        Ok(())
    }

    /// Creates a resource, or replaces its specification whole: fields that are gone must be gone there, too.
    async fn replace(&self, id: &str, object: &Value) -> Result<(), MirrorError> {
        let fresh: DynamicObject = serde_json::from_value(object.clone()).map_err(MirrorError::Form)?;
        let params = kube::api::PostParams { field_manager: Some(MANAGER.into()), ..Default::default() };
        match self.api.get_opt(id).await? {
            None => drop(self.api.create(&params, &fresh).await?),
            Some(mut there) => {
                there.data["spec"] = object["spec"].clone();
                there.labels_mut().extend(fresh.metadata.labels.unwrap_or_default());
                self.api.replace(id, &params, &there).await?;
            }
        }
        Ok(())
    }

    /// Takes over what others have changed. Gives the resources that cannot be taken, and why.
    async fn adopt(
        &self,
        state: &Mirrored,
        resources: &[Read],
    ) -> Result<BTreeMap<String, String>, MirrorError> {
        let mut wrong = BTreeMap::new();
        let mut scopes: BTreeSet<&str> = state.scopes.iter().map(|s| s.scope.as_str()).collect();
        scopes.extend(resources.iter().map(|read| read.scope.as_str()));
        for scope in scopes {
            let former: &[Rule] =
                state.scopes.iter().find(|s| s.scope == scope).map_or(&[], |RuleScope { rules, .. }| rules);
            let mut wanted: Vec<Rule> = Vec::new();
            let mut by = BTreeSet::new();
            for read in resources.iter().filter(|read| read.scope == scope) {
                match &read.rule {
                    Ok(rule) => wanted.push(rule.clone()),
                    Err(why) => {
                        wrong.insert(read.name.clone(), why.clone());
                        // The last good form stays in force, as with every other set that is rejected.
                        wanted.extend(former.iter().find(|rule| rule.id == read.name).cloned());
                    }
                }
                by.extend(last_writer(&read.object));
            }
            if same(&wanted, former) {
                continue;
            }
            let by: Vec<String> = by.into_iter().collect();
            let who =
                if by.is_empty() { "Kubernetes".into() } else { format!("Kubernetes: {}", by.join(", ")) };
            let (name, revision) = (scope.to_owned(), state.revision);
            match self.blocking(move |rules| rules.adopt(&name, wanted, revision, &who)).await? {
                // One scope at a time: the next look sees the new revision.
                Ok(()) => break,
                Err(RulesError::Invalid(violations)) => {
                    for read in resources.iter().filter(|read| read.scope == scope) {
                        let words: Vec<String> =
                            violations.iter().map(|v| format!("{}: {}", v.field, v.description)).collect();
                        wrong.entry(read.name.clone()).or_insert_with(|| words.join("; "));
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(wrong)
    }

    /// Writes into each resource what became of it on the nodes of this collector.
    async fn tell(&self, resources: &[Read], wrong: &BTreeMap<String, String>) -> Result<(), MirrorError> {
        let Some((revision, made_ms)) = self.rules.revision(0)? else { return Ok(()) };
        let rollout = self.fleet.rollout(revision, made_ms);
        for read in resources {
            let why_not = match (&read.rule, wrong.get(&read.name)) {
                (Err(why), _) | (Ok(_), Some(why)) => Some(why.as_str()),
                (Ok(_), None) => None,
            };
            let counts = read.rule.as_ref().map(|rule| self.count(rule, &rollout.nodes)).unwrap_or_default();
            let now = status(&read.object, &self.name, revision, why_not, &counts);
            let Some(now) = now else { continue };
            let patch = Patch::Merge(json!({ "status": now }));
            match self.api.patch_status(&read.name, &PatchParams::default(), &patch).await {
                Ok(_) => {
                    let who = last_writer(&read.object).unwrap_or_else(|| "somebody".into());
                    let refusals = refusals(&read.name, &rollout.nodes);
                    let news = news(&read.object.data["status"], &now, &self.name, &who, &refusals);
                    self.events.tell(&read.object, news).await;
                }
                // It was deleted meanwhile.
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn count(&self, rule: &Rule, nodes: &[NodeRollout]) -> Counts {
        let mut counts = Counts::default();
        for node in nodes {
            let meant = rules::is_for_node(rule, &node.node, &self.fleet.labels(&node.node));
            let mine = node.errors.iter().any(|e| e.rule_id == rule.id || e.rule_id.is_empty());
            let which = match node.state() {
                _ if !meant => "skipped",
                State::Rejected => "rejected",
                State::Partial if mine => "partial",
                State::Applied | State::Partial => "applied",
                State::Skipped => "skipped",
                State::Offline => "offline",
                State::Pending | State::Unspecified => "pending",
            };
            *counts.0.entry(which).or_default() += 1;
        }
        counts
    }
}

/// What the first few nodes said that do not do as a rule asks.
fn refusals(id: &str, nodes: &[NodeRollout]) -> Vec<String> {
    let said = nodes.iter().flat_map(|node| {
        let mine = node.errors.iter().filter(|error| error.rule_id == id || error.rule_id.is_empty());
        mine.map(|error| format!("{}: {}: {}", node.node, error.field, error.reason))
    });
    said.take(REFUSALS_TOLD).collect()
}

/// Nodes by what became of the rule there.
#[derive(Default)]
struct Counts(BTreeMap<&'static str, u64>);

/// Each of them has a column or at least a field.
const STATES: [&str; 6] = ["applied", "partial", "rejected", "pending", "skipped", "offline"];

/// What is to be written; none: it says so already.
fn status(
    object: &DynamicObject,
    collector: &str,
    revision: u64,
    why_not: Option<&str>,
    counts: &Counts,
) -> Option<Value> {
    let had = &object.data["status"];
    let now_ms = time::now_ms();
    let mut mine: Value =
        STATES.iter().map(|state| ((*state).to_owned(), json!(counts.0.get(state).unwrap_or(&0)))).collect();
    let before = &had["collectors"][collector];
    let is_same = STATES.iter().all(|state| before[*state] == mine[*state]);
    let written_ms = before["at"].as_u64().unwrap_or(0);
    let is_fresh = written_ms + STATUS_REFRESH_MS > now_ms;
    mine["at"] = json!(if is_same && is_fresh { written_ms } else { now_ms });
    let mut collectors = serde_json::Map::new();
    let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
    let others = had["collectors"].as_object().into_iter().flatten().filter(|(name, _)| *name != collector);
    for (name, theirs) in others.chain([(&collector.to_owned(), &mine)]) {
        let is_old = theirs["at"].as_u64().unwrap_or(0) + STATUS_HOLDS_MS < now_ms;
        // Null takes it away.
        collectors.insert(name.clone(), if is_old { Value::Null } else { theirs.clone() });
        for state in STATES.iter().filter(|_| !is_old) {
            *sums.entry(*state).or_default() += theirs[*state].as_u64().unwrap_or(0);
        }
    }
    let accepted = why_not.is_none();
    let had_condition = had["conditions"][0].clone();
    let word = if accepted { "True" } else { "False" };
    let since = match had_condition["lastTransitionTime"].as_str() {
        Some(since) if had_condition["status"] == word => since.to_owned(),
        _ => jiff::Timestamp::now().round(jiff::Unit::Second).unwrap_or_default().to_string(),
    };
    let generation = object.metadata.generation.unwrap_or(0);
    let mut status = json!({
        "observedGeneration": generation,
        "revision": revision,
        "collectors": collectors,
        "conditions": [{
            "type": "Accepted", "status": word, "reason": if accepted { "Valid" } else { "Invalid" },
            "message": why_not.unwrap_or("the rule is in force where its nodes have applied it"),
            "lastTransitionTime": since, "observedGeneration": generation,
        }],
    });
    for state in STATES {
        status[state] = json!(sums.get(state).unwrap_or(&0));
    }
    (status != *had).then_some(status)
}

/// Why both sides were not brought together.
#[derive(Debug, thiserror::Error)]
enum MirrorError {
    #[error("{0}; are the TriggerRule resources installed, and may the collector read and write them?")]
    Api(#[from] kube::Error),
    #[error(transparent)]
    Rules(#[from] RulesError),
    #[error("a rule cannot be written as a resource: {0}")]
    Form(#[source] serde_json::Error),
    #[error("the collector is ending")]
    Ending,
}

fn same(a: &[Rule], b: &[Rule]) -> bool {
    rules::digest(a) == rules::digest(b)
}

/// A rule as the specification of a resource: all but its id, which is the resource's name.
fn spec(rule: &Rule) -> Value {
    let mut spec = rules::to_json(rule);
    if let Some(spec) = spec.as_object_mut() {
        spec.remove("id");
    }
    spec
}

/// A resource as a rule, by the same reader and validator as everything else.
fn read(object: DynamicObject) -> Read {
    let name = object.name_any();
    let scope = object.labels().get(SCOPE_LABEL).map_or(DEFAULT_SCOPE, String::as_str).to_owned();
    let rule = parse(&name, &scope, &object.data["spec"]);
    Read { name, scope, rule, object }
}

fn parse(name: &str, scope: &str, spec: &Value) -> Result<Rule, String> {
    rules::check_scope(scope).map_err(|error| format!("the label {SCOPE_LABEL}: {error}"))?;
    let mut rule = match spec {
        Value::Null => json!({}),
        spec => spec.clone(),
    };
    if rule.get("id").is_some() {
        return Err("spec.id: the resource's name is the rule's id: remove the field".into());
    }
    rule["id"] = name.into();
    let text = json!({ "rules": [rule] }).to_string();
    let parsed = rules::parse(&text, name).map_err(|errors| {
        let words: Vec<String> = errors.iter().map(|e| format!("{}: {}", e.field, e.reason)).collect();
        words.join("; ")
    })?;
    let faults = rules::validate(&parsed, &rules::Caps::fleet());
    if !faults.is_empty() {
        let words: Vec<String> = faults.iter().map(|f| format!("{}: {}", f.field, f.reason)).collect();
        return Err(words.join("; "));
    }
    parsed.into_iter().next().ok_or_else(|| "it holds no rule".to_owned())
}

/// Who changed a resource last, as far as the API server tells.
fn last_writer(object: &DynamicObject) -> Option<String> {
    object
        .managed_fields()
        .iter()
        .filter(|entry| entry.subresource.as_deref() != Some("status"))
        .max_by_key(|entry| entry.time.as_ref().map(|time| time.0))
        .and_then(|entry| entry.manager.clone())
}

/// The definition of the resource, made from the types and the validator's limits. `None` only if the descriptors that
/// were built into this program are not those of its types.
pub(crate) fn custom_resource() -> Option<Value> {
    let mut spec = json_schema()?;
    spec.get_mut("properties")?.as_object_mut()?.remove("id");
    spec["description"] = "A trigger rule; its id is the name of the resource.".into();
    spec["required"] = json!(["match"]);
    spec["x-kubernetes-validations"] = json!([
        {
            "rule": "has(self.when) && size(self.when) > 0 || !has(self.capture) || !(has(self.capture.duration) || has(self.capture.cooldown) || has(self.capture.lead_up))",
            "message": "duration, cooldown and lead_up have no meaning without `when`: bound the rule with lifetime.ttl",
        },
        {
            "rule": "!has(self.capture) || !has(self.capture.hz) || self.capture.hz <= 99 || (has(self.lifetime) && has(self.lifetime.ttl))",
            "message": "a rule above 99 Hz must say when it ends: give lifetime.ttl",
        },
        {
            "rule": "!has(self.capture) || !has(self.capture.hz) || self.capture.hz <= 1000",
            "message": "hz is 1 to 1000",
        },
        {
            "rule": "!has(self.nodes) || !has(self.nodes.percent) || (self.nodes.percent >= 1 && self.nodes.percent <= 100)",
            "message": "percent is 1 to 100",
        },
    ]);
    let count = |what: &str| json!({ "type": "integer", "format": "int64", "description": what });
    let collector = json!({
        "type": "object",
        "properties": STATES.iter().chain(&["at"]).map(|name| ((*name).to_owned(), json!({ "type": "integer", "format": "int64" }))).collect::<Value>(),
    });
    let status = json!({
        "type": "object",
        "properties": {
            "observedGeneration": count("Of the specification that this is about."),
            "revision": count("The newest revision of all rules."),
            "applied": count("Nodes on which the rule is in force."),
            "partial": count("Nodes on which it is in force and cannot work."),
            "rejected": count("Nodes that keep their former rules."),
            "pending": count("Nodes that have not answered."),
            "skipped": count("Nodes that it is not for."),
            "offline": count("Nodes that are not connected."),
            "collectors": {
                "type": "object", "description": "The same by collector.", "additionalProperties": collector,
            },
            "conditions": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["type", "status"],
                    "properties": {
                        "type": { "type": "string" }, "status": { "type": "string" }, "reason": { "type": "string" },
                        "message": { "type": "string" },
                        "lastTransitionTime": { "type": "string", "format": "date-time" },
                        "observedGeneration": { "type": "integer", "format": "int64" },
                    },
                },
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
            },
        },
    });
    let column = |name: &str, kind: &str, path: &str, priority: u32| json!({ "name": name, "type": kind, "jsonPath": path, "priority": priority });
    Some(json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("{PLURAL}.{GROUP}"),
            "labels": { "app.kubernetes.io/part-of": "gannet" },
        },
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND, "listKind": "TriggerRuleList", "plural": PLURAL, "singular": "triggerrule",
                "shortNames": ["trule"], "categories": ["gannet"],
            },
            "versions": [{
                "name": VERSION, "served": true, "storage": true,
                "subresources": { "status": {} },
                "additionalPrinterColumns": [
                    column("Accepted", "string", ".status.conditions[?(@.type==\"Accepted\")].status", 0),
                    column("Applied", "integer", ".status.applied", 0),
                    column("Rejected", "integer", ".status.rejected", 0),
                    column("Skipped", "integer", ".status.skipped", 0),
                    column("Pending", "integer", ".status.pending", 1),
                    column("Offline", "integer", ".status.offline", 1),
                    column("TTL", "string", ".spec.lifetime.ttl", 0),
                    column("Age", "date", ".metadata.creationTimestamp", 0),
                ],
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "description": "What to profile, when, how deep and for how long.",
                        "required": ["spec"],
                        "properties": {
                            "apiVersion": { "type": "string" }, "kind": { "type": "string" },
                            "metadata": { "type": "object" }, "spec": spec, "status": status,
                        },
                        "x-kubernetes-validations": [{
                            "rule": "self.metadata.name.matches('^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$')",
                            "message": "the name is the rule's id: 1 to 63 of a-z, 0-9 and -",
                        }],
                    },
                },
            }],
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(name: &str, spec: &Value) -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "gannet.dev/v1alpha1", "kind": "TriggerRule",
            "metadata": { "name": name, "generation": 3 }, "spec": spec,
        }))
        .unwrap()
    }

    #[test]
    fn a_rule_is_the_same_as_a_resource_and_back() {
        let text = "rules: [{id: a, description: why, match: {comm: ['x*'], pod_labels: {app: b}}, when: [{schedule: \
                    {every: 10m, for: 30s}}], capture: {kind: [off_cpu], stacks: {kernel: false}}, lifetime: {ttl: 1h}}]";
        let rule = rules::parse(text, "t").unwrap().remove(0);
        let read = read(object("a", &spec(&rule)));
        assert_eq!(read.scope, "default");
        assert!(same(&[read.rule.unwrap()], &[rule]));
    }

    #[test]
    fn what_is_no_good_rule_says_why() {
        let words = |name: &str, spec: Value| read(object(name, &spec)).rule.unwrap_err();
        assert!(words("a", json!({ "match": { "com": ["x"] } })).contains("match.com"));
        assert!(words("a", json!({})).contains("match"));
        assert!(words("a", json!({ "match": { "comm": ["x"] }, "capture": { "hz": 500 } })).contains("ttl"));
        assert!(words("a.b", json!({ "match": { "comm": ["x"] } })).contains("id"));
        assert!(words("a", json!({ "id": "b", "match": { "comm": ["x"] } })).contains("spec.id"));
    }

    #[test]
    fn the_status_sums_up_all_collectors_and_is_not_written_twice() {
        let mut there = object("a", &json!({ "match": { "comm": ["x"] } }));
        let counts = |applied| Counts([("applied", applied), ("skipped", 1)].into());
        let first = status(&there, "one", 7, None, &counts(3)).unwrap();
        assert_eq!((first["applied"].as_u64(), first["revision"].as_u64()), (Some(3), Some(7)));
        assert_eq!(first["conditions"][0]["status"], "True");
        there.data["status"] = first;
        assert_eq!(status(&there, "one", 7, None, &counts(3)), None);
        let second = status(&there, "two", 7, None, &counts(2)).unwrap();
        assert_eq!((second["applied"].as_u64(), second["skipped"].as_u64()), (Some(5), Some(2)));
        there.data["status"] = second;
        there.data["status"]["collectors"]["one"]["at"] = json!(1);
        let third = status(&there, "two", 7, Some("no"), &counts(2)).unwrap();
        assert_eq!((third["applied"].as_u64(), third["collectors"]["one"].is_null()), (Some(2), true));
        assert_eq!(third["conditions"][0]["message"], "no");
    }
}
