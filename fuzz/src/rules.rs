//! Rule files and selectors.

use std::{collections::BTreeMap, time::SystemTime};

use gannet_agent::rules::{RuleBook, RuleSource, SourceRules};
use gannet_proto::{
    control::Rule,
    rules::{Caps, canonical, digest, parse, to_json, to_yaml, validate},
    selector::LabelSelector,
};

/// Reads a rule file. Rules that are valid can be compiled and written, and the written ones mean the same.
pub(crate) fn file(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(rules) = parse(text, "rules.yaml") {
        check(rules);
    }
}

pub(crate) fn check(rules: Vec<Rule>) {
    let now = SystemTime::UNIX_EPOCH;
    let mut book = RuleBook::new(Caps::default());
    let errors = book.check(RuleSource::Local, &rules);
    let _ = validate(&rules, &Caps::fleet());
    let given = digest(&rules);
    let written = to_yaml(&rules);
    for rule in &rules {
        let _ = to_json(rule);
    }
    if !errors.is_empty() {
        return;
    }
    let read = parse(&written, "written.yaml");
    // A part that is there but empty means what an absent one means, and is not written.
    let rules = canonical(rules);
    assert_eq!(read.map(canonical).as_ref(), Ok(&rules), "{written}");
    assert_eq!(digest(&rules), given);
    book.replace(RuleSource::Local, SourceRules { rules, ..SourceRules::default() }, now);
    let _ = book.kernel_rules(now);
}

/// Reads the selectors of nodes and of series.
pub(crate) fn selectors(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let labels = BTreeMap::from([("a".to_owned(), "b".to_owned()), ("env".to_owned(), text.to_owned())]);
    if let Ok(selector) = LabelSelector::parse(text) {
        let _ = (selector.matches(&labels), selector.is_empty());
    }
    gannet_collector::fuzz::selector(text, &labels);
}
