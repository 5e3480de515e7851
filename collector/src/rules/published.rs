//! The published rules, and the part of them that one node gets.

use std::collections::BTreeMap;

use gannet_proto::{
    control::{Rule, RuleScope},
    rules,
};

/// One revision of all rules.
#[derive(Debug)]
pub(crate) struct Published {
    pub(crate) revision: u64,
    pub(super) scopes: Vec<RuleScope>,
}

/// The rule set that a node must apply.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct NodeRules {
    /// Rules, sorted by id.
    pub(crate) rules: Vec<Rule>,
    /// Scopes whose newest rules are staged and do not include this node.
    pub(crate) held: Vec<String>,
    /// Scopes whose newest rules are staged and include this node.
    pub(crate) tried: Vec<String>,
}

impl Published {
    /// Returns the rules of a node with this name and these labels.
    pub(crate) fn for_node(&self, name: &str, labels: &BTreeMap<String, String>) -> NodeRules {
        let mut of_node = NodeRules::default();
        for scope in &self.scopes {
            let is_for = |rule: &&Rule| rules::is_for_node(rule, name, labels);
            let new = scope.rules.iter().filter(is_for);
            let Some(staged) = &scope.staged else {
                of_node.rules.extend(new.cloned());
                continue;
            };
            let former = staged.former.iter().filter(is_for);
            if rules::canary_rank(name) < staged.percent {
                // A node without any of the new rules cannot try them.
                if new.clone().next().is_some() {
                    of_node.tried.push(scope.scope.clone());
                }
                of_node.rules.extend(new.cloned());
            } else {
                if !new.eq(former.clone()) {
                    of_node.held.push(scope.scope.clone());
                }
                of_node.rules.extend(former.cloned());
            }
        }
        of_node.rules = rules::canonical(of_node.rules);
        of_node
    }

    /// Returns a copy with other rules in one scope, for a preview.
    pub(crate) fn with(&self, scope: &str, rules: Vec<Rule>) -> Self {
        let mut scopes: Vec<RuleScope> = self.scopes.iter().filter(|s| s.scope != scope).cloned().collect();
        scopes.push(RuleScope { scope: scope.to_owned(), rules, ..RuleScope::default() });
        Self { revision: self.revision, scopes }
    }

    /// Returns the staged scopes that hold a rule with one of these ids, or all staged scopes if none does.
    pub(crate) fn staged_with(&self, rule_ids: &[&str]) -> Vec<String> {
        let staged = || self.scopes.iter().filter(|s| s.staged.is_some());
        let holds = |s: &&RuleScope| s.rules.iter().any(|r| rule_ids.contains(&r.id.as_str()));
        let with: Vec<String> = staged().filter(holds).map(|s| s.scope.clone()).collect();
        if with.is_empty() { staged().map(|s| s.scope.clone()).collect() } else { with }
    }
}
