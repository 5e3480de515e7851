//! Trigger rules: their YAML form, their validator, and the defaults of their fields. The agent, the collector and
//! gannetctl use this validator; no other one exists.

mod convert;
mod form;
mod pattern;
mod schema;
mod text;
mod time;
mod validate;

use std::{collections::BTreeMap, fmt::Write as _};

use prost::Message as _;
use sha2::{Digest as _, Sha256};

pub use pattern::{Pattern, PatternError};
pub use schema::json_schema;
pub use text::{MAX_FILE_BYTES, ParseError, parse, to_json, to_yaml};
pub use validate::{Caps, RUNTIMES, check_scope, validate};

use crate::{
    control::{NodeSelector, Rule, RuleSet, capture},
    selector::LabelSelector,
};

/// Default rate of a rule with a condition, in samples per second and CPU.
pub const TRIGGERED_HZ: u32 = 99;
/// Default rate of a rule without a condition. It is a prime number, so that it does not beat with periodic work.
pub(crate) const ALWAYS_HZ: u32 = 19;

/// Reports whether `version` is one of those that `wanted` stands for: `3.11` stands for 3.11 and each 3.11.x, not for 3.110.
pub fn is_version(wanted: &str, version: &str) -> bool {
    version.strip_prefix(wanted).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// Returns the rate of a rule in samples per second and CPU.
pub fn effective_hz(rule: &Rule) -> u32 {
    match rule.capture.as_ref().map_or(0, |capture| capture.hz) {
        0 if rule.when.is_empty() => ALWAYS_HZ,
        0 => TRIGGERED_HZ,
        hz => hz,
    }
}

/// Returns the kinds of profiles that a rule captures.
pub fn effective_kinds(rule: &Rule) -> Vec<capture::Kind> {
    match &rule.capture {
        Some(capture) if !capture.kind.is_empty() => capture.kind().collect(),
        _ => vec![capture::Kind::OnCpu],
    }
}

/// Sorts rules by id and removes empty parts (`capture: {}`), so that equal rules have the same digest regardless of
/// their source.
pub fn canonical(mut rules: Vec<Rule>) -> Vec<Rule> {
    fn remove_if_empty<T: Default + PartialEq>(part: &mut Option<T>) {
        if part.as_ref().is_some_and(|part| *part == T::default()) {
            *part = None;
        }
    }
    for rule in &mut rules {
        remove_if_empty(&mut rule.r#match);
        remove_if_empty(&mut rule.nodes);
        remove_if_empty(&mut rule.capture);
        remove_if_empty(&mut rule.lifetime);
    }
    rules.sort_by(|a, b| a.id.cmp(&b.id));
    rules
}

/// Returns the lower-case hex SHA-256 of the canonical rules. A node has the intended rules if and only if the digests
/// are equal.
pub fn digest(rules: &[Rule]) -> String {
    let set = RuleSet { rules: canonical(rules.to_vec()), ..RuleSet::default() };
    Sha256::digest(set.encode_to_vec()).iter().fold(String::with_capacity(64), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// Reports whether a rule selects a node. A selector that cannot be parsed selects no node.
pub fn is_for_node(rule: &Rule, node_name: &str, labels: &BTreeMap<String, String>) -> bool {
    let Some(NodeSelector { selector, names, percent }) = &rule.nodes else { return true };
    (names.is_empty() || names.iter().any(|name| name == node_name))
        && LabelSelector::parse(selector).is_ok_and(|selector| selector.matches(labels))
        && (*percent == 0 || canary_rank(node_name) < *percent)
}

/// Returns the rank of a node in staged rollouts, 0 to 99. It depends only on the name, so it never changes.
pub fn canary_rank(node_name: &str) -> u32 {
    let hash = Sha256::digest(node_name.as_bytes());
    let number = hash.iter().take(8).fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    (number % 100) as u32
}

#[cfg(test)]
mod tests;
