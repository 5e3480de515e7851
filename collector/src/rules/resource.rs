//! TriggerRule resources: the form of a rule in the Kubernetes API.

use gannet_proto::{control::Rule, rules};
use kube::{
    ResourceExt as _,
    api::{ApiResource, DynamicObject},
    core::GroupVersionKind,
};
use serde_json::{Value, json};

use super::check::DEFAULT_SCOPE;

pub(super) const GROUP: &str = "gannet.dev";
pub(super) const VERSION: &str = "v1alpha1";
pub(super) const KIND: &str = "TriggerRule";
pub(super) const PLURAL: &str = "triggerrules";
/// Label with the scope of the rule. Without it the scope is [`DEFAULT_SCOPE`].
const SCOPE_LABEL: &str = "gannet.dev/scope";

/// Returns the address of the resources in the API.
pub(super) fn api_resource() -> ApiResource {
    ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(GROUP, VERSION, KIND), PLURAL)
}

/// A TriggerRule as it is in the API, with its rule read.
pub(super) struct RuleResource {
    pub(super) name: String,
    pub(super) scope: String,
    /// The rule, or what is wrong with it.
    pub(super) rule: Result<Rule, String>,
    pub(super) object: DynamicObject,
}

impl RuleResource {
    /// Parses a resource with the parser and validator of rule files.
    pub(super) fn parse(object: DynamicObject) -> Self {
        let name = object.name_any();
        let scope = object.labels().get(SCOPE_LABEL).map_or(DEFAULT_SCOPE, String::as_str).to_owned();
        let rule = parse_rule(&name, &scope, &object.data["spec"]);
        Self { name, scope, rule, object }
    }

    /// Returns the client that changed the resource last, as the API server reports it.
    pub(super) fn last_writer(&self) -> Option<String> {
        self.object
            .managed_fields()
            .iter()
            .filter(|entry| entry.subresource.as_deref() != Some("status"))
            .max_by_key(|entry| entry.time.as_ref().map(|time| time.0))
            .and_then(|entry| entry.manager.clone())
    }

    /// Reports whether the resource shows this rule in this scope.
    pub(super) fn shows(&self, scope: &str, rule: &Rule) -> bool {
        scope == self.scope
            && self
                .rule
                .as_ref()
                .is_ok_and(|have| is_same(std::slice::from_ref(have), std::slice::from_ref(rule)))
    }
}

/// Returns the resource of a rule, without the fields that the API server fills in.
pub(super) fn to_resource(scope: &str, rule: &Rule) -> Value {
    json!({
        "apiVersion": format!("{GROUP}/{VERSION}"), "kind": KIND,
        "metadata": { "name": rule.id, "labels": { SCOPE_LABEL: scope } },
        "spec": spec(rule),
    })
}

/// Returns the specification of a rule: everything but its id, which is the name of the resource.
fn spec(rule: &Rule) -> Value {
    let mut spec = rules::to_json(rule);
    if let Some(spec) = spec.as_object_mut() {
        spec.remove("id");
    }
    spec
}

fn parse_rule(name: &str, scope: &str, spec: &Value) -> Result<Rule, String> {
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
        let errors: Vec<String> = errors.iter().map(|e| format!("{}: {}", e.field, e.reason)).collect();
        errors.join("; ")
    })?;
    let errors = rules::validate(&parsed, &rules::Caps::fleet());
    if !errors.is_empty() {
        let errors: Vec<String> = errors.iter().map(|e| format!("{}: {}", e.field, e.reason)).collect();
        return Err(errors.join("; "));
    }
    parsed.into_iter().next().ok_or_else(|| "it holds no rule".to_owned())
}

/// Reports whether two rule sets are equal.
pub(super) fn is_same(a: &[Rule], b: &[Rule]) -> bool {
    rules::digest(a) == rules::digest(b)
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
    fn a_rule_round_trips_through_a_resource() {
        let text = "rules: [{id: a, description: why, match: {comm: ['x*'], pod_labels: {app: b}}, when: [{schedule: \
                    {every: 10m, for: 30s}}], capture: {kind: [off_cpu], stacks: {kernel: false}}, lifetime: {ttl: 1h}}]";
        let rule = rules::parse(text, "t").unwrap().remove(0);
        let read = RuleResource::parse(object("a", &spec(&rule)));
        assert_eq!(read.scope, "default");
        assert!(is_same(&[read.rule.unwrap()], &[rule]));
    }

    #[test]
    fn an_invalid_rule_names_its_fault() {
        let fault = |name: &str, spec: Value| RuleResource::parse(object(name, &spec)).rule.unwrap_err();
        assert!(fault("a", json!({ "match": { "com": ["x"] } })).contains("match.com"));
        assert!(fault("a", json!({})).contains("match"));
        assert!(fault("a", json!({ "match": { "comm": ["x"] }, "capture": { "hz": 500 } })).contains("ttl"));
        assert!(fault("a.b", json!({ "match": { "comm": ["x"] } })).contains("id"));
        assert!(fault("a", json!({ "id": "b", "match": { "comm": ["x"] } })).contains("spec.id"));
    }
}
