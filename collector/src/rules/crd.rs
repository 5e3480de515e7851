//! The definition of the TriggerRule custom resource, made from the protobuf types and the validator's limits.

use gannet_proto::rules::json_schema;
use serde_json::{Value, json};

use super::{
    resource::{GROUP, KIND, PLURAL, VERSION},
    status::STATES,
};

/// Returns the CustomResourceDefinition. `None` means that the descriptors in this program do not match its types.
pub(crate) fn custom_resource() -> Option<Value> {
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
                    column("InForce", "string", ".status.conditions[?(@.type==\"Applied\")].status", 0),
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
                        "description": "A rule: which processes to profile, when, how deep and for how long.",
                        "required": ["spec"],
                        "properties": {
                            "apiVersion": { "type": "string" }, "kind": { "type": "string" },
                            "metadata": { "type": "object" }, "spec": spec_schema()?, "status": status_schema(),
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

/// Returns the schema of a rule without its id, with the checks that the API server can make.
fn spec_schema() -> Option<Value> {
    let mut spec = json_schema()?;
    spec.get_mut("properties")?.as_object_mut()?.remove("id");
    spec["description"] = "A trigger rule. Its id is the name of the resource.".into();
    spec["required"] = json!(["match"]);
    spec["x-kubernetes-validations"] = json!([
        {
            "rule": "has(self.when) && size(self.when) > 0 || !has(self.capture) || !(has(self.capture.duration) || has(self.capture.cooldown) || has(self.capture.lead_up))",
            "message": "duration, cooldown and lead_up have no meaning without `when`: bound the rule with lifetime.ttl",
        },
        {
            "rule": "!has(self.capture) || !has(self.capture.hz) || self.capture.hz <= 99 || (has(self.lifetime) && has(self.lifetime.ttl))",
            "message": "a rule above 99 Hz must end by itself: give lifetime.ttl",
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
    Some(spec)
}

fn status_schema() -> Value {
    let count = |what: &str| json!({ "type": "integer", "format": "int64", "description": what });
    let collector = json!({
        "type": "object",
        "properties": STATES
            .iter()
            .chain(&["at"])
            .map(|name| ((*name).to_owned(), json!({ "type": "integer", "format": "int64" })))
            .chain([("why".to_owned(), json!({ "type": "string" }))])
            .collect::<Value>(),
    });
    json!({
        "type": "object",
        "properties": {
            "observedGeneration": count("Generation of the specification that this status describes."),
            "revision": count("The newest revision of all rules."),
            "applied": count("Nodes on which the rule is in force."),
            "partial": count("Nodes on which the rule is in force without effect."),
            "rejected": count("Nodes that rejected the rules and keep their former ones."),
            "pending": count("Nodes that have not answered."),
            "skipped": count("Nodes that the rule is not for."),
            "offline": count("Nodes that are not connected."),
            "collectors": {
                "type": "object", "description": "The same counts by collector.", "additionalProperties": collector,
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
    })
}
