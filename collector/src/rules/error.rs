//! Errors of the rule store.

use std::io;

/// One fault of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Violation {
    /// Path of the field, like `rules[2].capture.hz`.
    pub(crate) field: String,
    /// The fault and its cure.
    pub(crate) description: String,
}

/// Why the rules were not changed, or cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RulesError {
    /// The request is wrong.
    #[error("{}", .0.iter().map(|v| format!("{}: {}", v.field, v.description)).collect::<Vec<_>>().join("; "))]
    Invalid(Vec<Violation>),
    /// Another client has changed the scope.
    #[error(
        "scope `{scope}` has changed: its etag is `{current}` now, not `{given}`; read it again and apply the change to that"
    )]
    Stale { scope: String, current: String, given: String },
    /// The scope does not exist.
    #[error("there is no scope `{0}`; `gannetctl rules list` lists the scopes")]
    NoScope(String),
    /// There is no rollout to resume or abort.
    #[error("scope `{0}` is not staged: its rules are on all nodes already")]
    NotStaged(String),
    /// The stored content is damaged.
    #[error(
        "the rule file {location} is damaged ({what}), so the collector sends no rules and every node keeps its rules: \
         restore the file (the version before is {location}.prev), or stop every collector that uses it, move it away and \
         start without rules"
    )]
    Corrupt { location: String, what: String },
    /// The stored content has been unreadable since the start.
    #[error(
        "cannot read the rules from {location}, so the collector sends none and every node keeps its rules: {what}"
    )]
    Unread { location: String, what: String },
    /// The storage returned an error.
    #[error("cannot make the rules durable, nothing was changed: {0}")]
    Io(#[from] io::Error),
    /// Other clients change the rules too often.
    #[error("too many concurrent rule changes; nothing was changed, try again")]
    Busy,
}

impl RulesError {
    /// Builds an error with one fault.
    pub(super) fn invalid(field: &str, description: impl Into<String>) -> Self {
        Self::Invalid(vec![Violation { field: field.to_owned(), description: description.into() }])
    }
}
