//! Checks of requests that change rules.

use std::time::Duration;

use gannet_proto::{
    control::{Rule, RuleScope, Staging},
    rules::{self, Caps},
};

use super::error::{RulesError, Violation};

/// Name of the scope in requests that name none.
pub(crate) const DEFAULT_SCOPE: &str = "default";
/// Scopes at one time.
const MAX_SCOPES: usize = 256;
/// Length of a request id in bytes.
const MAX_REQUEST_ID: usize = 128;
/// Longest time that a staged rule set soaks.
const MAX_SOAK: Duration = Duration::from_secs(7 * 24 * 3600);

/// Returns the name of the scope that a request means.
pub(super) fn scope_name(name: &str) -> Result<&str, RulesError> {
    if name.is_empty() {
        return Ok(DEFAULT_SCOPE);
    }
    rules::check_scope(name).map_err(|e| RulesError::invalid("scope", e))?;
    Ok(name)
}

pub(super) fn check_request_id(id: &str) -> Result<(), RulesError> {
    if id.len() > MAX_REQUEST_ID {
        return Err(RulesError::invalid(
            "request_id",
            format!("it has {} bytes, the limit is {MAX_REQUEST_ID}", id.len()),
        ));
    }
    Ok(())
}

pub(super) fn check_staging(staging: Staging) -> Result<Staging, RulesError> {
    let Staging { percent, soak } = staging;
    if !(1..=99).contains(&percent) {
        return Err(RulesError::invalid(
            "staging.percent",
            format!("is {percent}: give 1 to 99, or leave `staging` out for all nodes at once"),
        ));
    }
    if let Some(soak) = soak
        && !Duration::try_from(soak).is_ok_and(|soak| soak <= MAX_SOAK)
    {
        return Err(RulesError::invalid("staging.soak", "is not a time from 0 to 7 days"));
    }
    Ok(staging)
}

/// Checks the etag of a request against the scope. An empty etag matches every scope.
pub(super) fn check_etag(scope: &str, present: Option<&RuleScope>, given: &str) -> Result<(), RulesError> {
    let current = present.map_or("", |p| p.etag.as_str());
    if given.is_empty() || given == current {
        return Ok(());
    }
    Err(RulesError::Stale { scope: scope.to_owned(), current: current.to_owned(), given: given.to_owned() })
}

/// Checks a rule set alone and together with the other scopes.
pub(super) fn check_rules(set: &[Rule], scope: &str, scopes: &[RuleScope]) -> Result<(), RulesError> {
    let violations = violations(set, scope, scopes);
    if violations.is_empty() { Ok(()) } else { Err(RulesError::Invalid(violations)) }
}

fn violations(set: &[Rule], scope: &str, scopes: &[RuleScope]) -> Vec<Violation> {
    let mut found = Vec::new();
    let others = || scopes.iter().filter(|s| s.scope != scope);
    if others().count() >= MAX_SCOPES {
        found.push(Violation {
            field: "scope".into(),
            description: format!("there are {MAX_SCOPES} scopes already"),
        });
    }
    let caps = Caps::fleet();
    // A node gets the rules of all scopes, so the caps on a set count for all scopes together.
    let all: Vec<Rule> = others().flat_map(present_rules).chain(set).cloned().collect();
    if let Some(error) = rules::validate(&all, &caps).into_iter().find(|e| e.field == "rules") {
        let description = format!("all scopes together: {}", error.reason);
        found.push(Violation { field: error.field, description });
        return found;
    }
    for (i, rule) in set.iter().enumerate() {
        let mut add = |field: &str, reason: &str| {
            let field = if field.is_empty() { format!("rules[{i}]") } else { format!("rules[{i}].{field}") };
            found.push(Violation {
                field,
                description: format!("rule `{}`: {reason}", rule.id.escape_debug()),
            });
        };
        for error in rules::validate(std::slice::from_ref(rule), &caps) {
            add(&error.field, &error.reason);
        }
        if let Some(first) = set[..i].iter().position(|r| r.id == rule.id) {
            add("id", &format!("rules[{first}] has the same id"));
        }
        if let Some(other) = others().find(|s| present_rules(s).any(|r| r.id == rule.id)) {
            add(
                "id",
                &format!(
                    "scope `{}` has a rule of this id, and a node gets the rules of all scopes",
                    other.scope
                ),
            );
        }
    }
    found
}

/// Returns all rules of a scope that any node may run: while the scope is staged, the former ones too.
fn present_rules(scope: &RuleScope) -> impl Iterator<Item = &Rule> {
    let former = scope.staged.as_ref().map_or(&[][..], |staged| &staged.former);
    let removed = former.iter().filter(|f| scope.rules.iter().all(|r| r.id != f.id));
    scope.rules.iter().chain(removed)
}
