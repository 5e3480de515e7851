//! Checks rules before they come into force: against the format, the node's caps and its abilities.

use std::collections::{BTreeMap, BTreeSet};

use gannet_proto::{
    control::{Capture, Condition, Match, Rule, RuleError, condition},
    rules::{Caps, validate},
};

use super::{
    CaptureError, MANUAL_RULE_ID, RuleSource, SourceRules, compile::Compiled, condition_name, error,
};

/// Reports which conditions a node can watch.
pub(crate) trait ConditionSupport {
    /// Returns why this node cannot watch the condition, if it cannot.
    fn missing(&self, kind: &condition::Kind) -> Option<String>;
}

/// Supports every condition.
struct AllConditions;

impl ConditionSupport for AllConditions {
    fn missing(&self, _: &condition::Kind) -> Option<String> {
        None
    }
}

/// Owns what rules are checked against.
pub(super) struct RuleChecks {
    caps: Caps,
    support: Box<dyn ConditionSupport + Send>,
}

impl RuleChecks {
    pub(super) fn new(caps: Caps) -> Self {
        Self { caps, support: Box::new(AllConditions) }
    }

    pub(super) fn set_support(&mut self, support: impl ConditionSupport + Send + 'static) {
        self.support = Box::new(support);
    }

    /// Returns all errors of a set that is to replace the rules of `source`.
    pub(super) fn check(
        &self,
        source: RuleSource,
        rules: &[Rule],
        sources: &BTreeMap<RuleSource, SourceRules>,
    ) -> Vec<RuleError> {
        let mut errors = validate(rules, &self.caps);
        let others: BTreeSet<&str> = sources
            .iter()
            .filter(|(other, _)| **other != source)
            .flat_map(|(_, set)| &set.rules)
            .map(|rule| rule.id.as_str())
            .collect();
        for rule in rules.iter().filter(|rule| others.contains(rule.id.as_str())) {
            let owner = match source {
                RuleSource::Local => "the collector's rules",
                RuleSource::Remote => "the node's own rule files",
            };
            let reason = format!("{owner} already contain a rule of this name; choose another name");
            errors.push(error(rule, "id", &reason));
        }
        for rule in rules.iter().filter(|rule| rule.id == MANUAL_RULE_ID) {
            let reason = "this name is reserved for captures that people start by hand; choose another name";
            errors.push(error(rule, "id", reason));
        }
        errors
    }

    /// Returns the parts of a rule that cannot work on this node; and a reason if nothing of the rule can work.
    pub(super) fn unsupported(&self, rule: &Rule, has_pods: bool) -> (Vec<RuleError>, Option<String>) {
        if Compiled::of(rule).pods && !has_pods {
            let reason = "this node has no pod metadata, so the rule matches nothing here";
            return (vec![error(rule, pod_field(rule), reason)], Some(reason.to_owned()));
        }
        let mut faults = Vec::new();
        for (number, condition) in rule.when.iter().enumerate() {
            let Some(kind) = &condition.kind else { continue };
            if let Some(reason) = self.support.missing(kind) {
                faults.push(error(rule, &format!("when[{number}].{}", condition_name(kind)), &reason));
            }
        }
        let none_works = !faults.is_empty() && faults.len() == rule.when.len();
        let reason = none_works.then(|| faults[0].reason.clone());
        (faults, reason)
    }

    /// Builds the rule of a manual capture, or returns what is wrong with it.
    pub(super) fn manual_rule(
        &self,
        matches: Match,
        capture: Capture,
        has_pods: bool,
    ) -> Result<Rule, CaptureError> {
        let rule = Rule {
            id: MANUAL_RULE_ID.into(),
            r#match: Some(matches),
            capture: Some(Capture { duration: None, ..capture.clone() }),
            ..Rule::default()
        };
        // Validated as a rule with a condition: such a rule may have a duration and needs no ttl.
        let validated = Rule {
            capture: Some(capture),
            when: vec![Condition { kind: Some(condition::Kind::Exec(condition::Exec {})) }],
            ..rule.clone()
        };
        let errors = validate(&[validated], &Caps { ttl_above_hz: u32::MAX, ..self.caps.clone() });
        if !errors.is_empty() {
            return Err(CaptureError::Invalid(errors));
        }
        match self.unsupported(&rule, has_pods) {
            (faults, Some(_)) => Err(CaptureError::Invalid(faults)),
            (_, None) => Ok(rule),
        }
    }
}

/// Returns the first field over pods that a rule uses.
fn pod_field(rule: &Rule) -> &'static str {
    let matches = rule.r#match.clone().unwrap_or_default();
    if !matches.namespaces.is_empty() {
        "match.namespaces"
    } else if !matches.pod_labels.is_empty() {
        "match.pod_labels"
    } else if !matches.containers.is_empty() {
        "match.containers"
    } else {
        "match.workloads"
    }
}
