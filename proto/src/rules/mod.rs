//! Trigger rules: how they are written, what makes one good, and what their fields mean where they are left out. The one
//! validator of the whole system is here; the collector, the agent, files and the command line all ask it.

mod form;
mod pattern;
mod schema;
mod text;
mod validate;

use std::{collections::BTreeMap, fmt::Write as _};

use prost::Message as _;
use sha2::{Digest as _, Sha256};

pub use pattern::{Pattern, PatternError};
pub use schema::json_schema;
pub use text::{MAX_FILE_BYTES, ParseError, parse, to_json, to_yaml};
pub use validate::{Caps, MAX_COMM_BYTES, check_scope, validate};

use crate::{
    control::{NodeSelector, Rule, RuleSet, capture},
    selector::LabelSelector,
};

/// The rate of a capture that a condition starts.
pub const TRIGGERED_HZ: u32 = 99;
/// The rate of a capture that always runs. A prime, so as not to beat with periodic work.
pub const ALWAYS_HZ: u32 = 19;

/// Samples a second and CPU that the rule asks for.
pub fn effective_hz(rule: &Rule) -> u32 {
    match rule.capture.as_ref().map_or(0, |capture| capture.hz) {
        0 if rule.when.is_empty() => ALWAYS_HZ,
        0 => TRIGGERED_HZ,
        hz => hz,
    }
}

/// What the rule captures.
pub fn effective_kinds(rule: &Rule) -> Vec<capture::Kind> {
    match &rule.capture {
        Some(capture) if !capture.kind.is_empty() => capture.kind().collect(),
        _ => vec![capture::Kind::OnCpu],
    }
}

/// The rules in the one order, and without parts that say nothing (`capture: {}`), so that the same rules have the same
/// digest wherever they come from.
pub fn canonical(mut rules: Vec<Rule>) -> Vec<Rule> {
    fn empty<T: Default + PartialEq>(part: &mut Option<T>) {
        if part.as_ref().is_some_and(|part| *part == T::default()) {
            *part = None;
        }
    }
    for rule in &mut rules {
        empty(&mut rule.r#match);
        empty(&mut rule.nodes);
        empty(&mut rule.capture);
        empty(&mut rule.lifetime);
    }
    rules.sort_by(|a, b| a.id.cmp(&b.id));
    rules
}

/// Lower-case hex SHA-256 of the canonical rules: what a node holds is what was meant exactly if this is the same.
pub fn digest(rules: &[Rule]) -> String {
    let set = RuleSet { rules: canonical(rules.to_vec()), ..RuleSet::default() };
    Sha256::digest(set.encode_to_vec()).iter().fold(String::with_capacity(64), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// Whether a rule is for this node. What cannot be evaluated does not match.
pub fn is_for_node(rule: &Rule, node_name: &str, labels: &BTreeMap<String, String>) -> bool {
    let Some(NodeSelector { selector, names, percent }) = &rule.nodes else { return true };
    (names.is_empty() || names.iter().any(|name| name == node_name))
        && LabelSelector::parse(selector).is_ok_and(|selector| selector.matches(labels))
        && (*percent == 0 || canary_rank(node_name) < *percent)
}

/// Where a node stands in a staged rollout: 0 to 99, the same for ever.
pub fn canary_rank(node_name: &str) -> u32 {
    let hash = Sha256::digest(node_name.as_bytes());
    let number = hash.iter().take(8).fold(0_u64, |number, byte| number << 8 | u64::from(*byte));
    (number % 100) as u32
}

#[cfg(test)]
mod tests;
