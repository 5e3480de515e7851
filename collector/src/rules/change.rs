//! The changes of rules: set, delete, resume, abort, pause, adopt. All of them block until the change is durable.

use gannet_proto::{
    control::{
        AbortRolloutRequest, AuditEntry, DeleteTriggersRequest, DeleteTriggersResponse, ResumeRolloutRequest,
        Rule, RuleScope, SetTriggersRequest, SetTriggersResponse, Staged, Staging,
    },
    rules,
};

use super::{
    Rules,
    audit::COLLECTOR,
    check::{check_etag, check_request_id, check_rules, check_staging, scope_name},
    error::RulesError,
    saved::{SavedRules, audit_entry, fingerprint},
};
use crate::time;

/// The result of a change to the present rules.
pub(super) struct RuleChange<T> {
    /// The new rules. `None` changes nothing.
    pub(super) next: Option<SavedRules>,
    pub(super) answer: T,
    pub(super) audit: Option<AuditEntry>,
}

impl<T> RuleChange<T> {
    /// Returns an answer without a change.
    fn unchanged(answer: T) -> Self {
        Self { next: None, answer, audit: None }
    }
}

/// A rule set as given, and in its canonical form.
struct RuleSetForms {
    given: Vec<Rule>,
    canonical: Vec<Rule>,
    digest: String,
}

impl RuleSetForms {
    fn new(given: Vec<Rule>) -> Self {
        let canonical = rules::canonical(given.clone());
        let digest = rules::digest(&canonical);
        Self { given, canonical, digest }
    }
}

/// A checked request to replace one scope.
struct SetChange {
    scope: String,
    rules: RuleSetForms,
    staging: Option<Staging>,
    who: String,
}

impl SetChange {
    /// Reports whether the request asks for the present state. A set that is on all nodes cannot become staged again.
    fn is_present(&self, present: Option<&RuleScope>) -> bool {
        let has_same_rules = match present {
            Some(present) => rules::digest(&present.rules) == self.rules.digest,
            None => self.rules.given.is_empty(),
        };
        has_same_rules
            && match (present.and_then(|p| p.staged.as_ref()), &self.staging) {
                (None, _) => true,
                (Some(staged), Some(staging)) => staged.percent == staging.percent,
                (Some(_), None) => false,
            }
    }

    /// Puts the set into `next` as a new revision.
    fn apply(&self, present: Option<&RuleScope>, next: &mut SavedRules) -> (SetTriggersResponse, AuditEntry) {
        let before = present.map_or(&[][..], |p| &p.rules);
        let was_staged = present.and_then(|p| p.staged.as_ref());
        let staged = self.staging.as_ref().map(|Staging { percent, soak }| Staged {
            percent: *percent,
            soak: *soak,
            paused: String::new(),
            // While the scope is staged, the other nodes still run the rules from before the first staged set.
            former: was_staged.map_or_else(|| before.to_vec(), |was| was.former.clone()),
            since: Some(time::timestamp(time::now_ms())),
        });
        let note = staged.as_ref().map_or_else(String::new, |s| format!("staged at {} %", s.percent));
        let answer = next.put(&self.scope, self.rules.canonical.clone(), staged, &self.who);
        let entry =
            audit_entry("set", &self.who, &self.scope, answer.revision, before, &self.rules.canonical);
        (answer, AuditEntry { note, ..entry })
    }
}

impl Rules {
    /// Replaces one scope. The caller fills in the nodes of the answer.
    pub(crate) fn set(
        &self,
        request: SetTriggersRequest,
        who: &str,
    ) -> Result<SetTriggersResponse, RulesError> {
        let call = fingerprint(&SetTriggersRequest { request_id: String::new(), ..request.clone() });
        let SetTriggersRequest { scope, rules, etag, request_id, allow_empty, validate_only, staging } =
            request;
        let scope = scope_name(&scope)?.to_owned();
        check_request_id(&request_id)?;
        let staging = staging.map(check_staging).transpose()?;
        let change = SetChange { scope, rules: RuleSetForms::new(rules), staging, who: who.to_owned() };
        self.transact(|saved| {
            if let Some(before) = saved.replay(&request_id, &call)? {
                return before.set.map(RuleChange::unchanged).ok_or_else(|| {
                    RulesError::invalid("request_id", "it was used for another call: make a new one")
                });
            }
            let SetChange { scope, rules, .. } = &change;
            let present = saved.scope(scope);
            check_etag(scope, present, &etag)?;
            check_rules(&rules.given, scope, &saved.scopes)?;
            if rules.given.is_empty() && !allow_empty {
                return Err(RulesError::invalid(
                    "rules",
                    format!(
                        "the set is empty, which would remove every rule of scope `{scope}`: set allow_empty if you mean it"
                    ),
                ));
            }
            let is_present = change.is_present(present);
            let unchanged = SetTriggersResponse {
                revision: saved.revision,
                etag: present.map_or_else(String::new, |p| p.etag.clone()),
                ..SetTriggersResponse::default()
            };
            if validate_only {
                let answer = SetTriggersResponse { changed: !is_present, ..unchanged };
                return Ok(RuleChange::unchanged(answer));
            }
            let mut next = saved.clone();
            let (answer, audit) = if is_present {
                let revision = present.map_or(saved.revision, |p| p.revision);
                (SetTriggersResponse { revision, ..unchanged }, None)
            } else {
                let (answer, entry) = change.apply(present, &mut next);
                (answer, Some(entry))
            };
            next.remember(&request_id, &call, |request| request.set = Some(answer.clone()));
            Ok(RuleChange { next: Some(next), answer, audit })
        })
    }

    /// Removes one scope.
    pub(crate) fn delete(
        &self,
        request: DeleteTriggersRequest,
        who: &str,
    ) -> Result<DeleteTriggersResponse, RulesError> {
        let call = fingerprint(&DeleteTriggersRequest { request_id: String::new(), ..request.clone() });
        let DeleteTriggersRequest { scope, etag, request_id } = request;
        let scope = scope_name(&scope)?;
        check_request_id(&request_id)?;
        self.transact(|saved| {
            if let Some(before) = saved.replay(&request_id, &call)? {
                return before.delete.map(RuleChange::unchanged).ok_or_else(|| {
                    RulesError::invalid("request_id", "it was used for another call: make a new one")
                });
            }
            let present = saved.scope(scope);
            check_etag(scope, present, &etag)?;
            let present = present.ok_or_else(|| RulesError::NoScope(scope.to_owned()))?;
            let mut next = saved.clone();
            let revision = next.begin_revision();
            let entry = audit_entry("delete", who, scope, revision, &present.rules, &[]);
            next.remove_scope(scope);
            let answer = DeleteTriggersResponse { revision };
            next.remember(&request_id, &call, |request| request.delete = Some(answer));
            Ok(RuleChange { next: Some(next), answer, audit: Some(entry) })
        })
    }

    /// Brings a staged scope to more nodes.
    pub(crate) fn resume(
        &self,
        request: &ResumeRolloutRequest,
        who: &str,
    ) -> Result<SetTriggersResponse, RulesError> {
        let scope = scope_name(&request.scope)?;
        let percent = if request.percent == 0 { 100 } else { request.percent };
        if percent > 100 {
            return Err(RulesError::invalid(
                "percent",
                format!("is {percent}: give 1 to 100, or 0 for all nodes"),
            ));
        }
        self.transact(|saved| {
            let (present, staged) = saved.staged_scope(scope)?;
            if percent < staged.percent {
                return Err(RulesError::invalid(
                    "percent",
                    format!(
                        "is {percent}, and {} % of the nodes have the rules already: give more, or abort the rollout",
                        staged.percent
                    ),
                ));
            }
            let mut next = saved.clone();
            let still_staged = (percent < 100).then(|| Staged {
                percent,
                paused: String::new(),
                since: Some(time::timestamp(time::now_ms())),
                ..staged.clone()
            });
            let answer = next.put(scope, present.rules.clone(), still_staged, who);
            let action = if who == COLLECTOR { "complete" } else { "resume" };
            let entry = AuditEntry {
                note: format!("from {} % to {percent} % of the nodes", staged.percent),
                ..audit_entry(action, who, scope, answer.revision, &present.rules, &present.rules)
            };
            Ok(RuleChange { next: Some(next), answer, audit: Some(entry) })
        })
    }

    /// Restores the rules from before a staged change.
    pub(crate) fn abort(
        &self,
        request: &AbortRolloutRequest,
        who: &str,
    ) -> Result<SetTriggersResponse, RulesError> {
        let scope = scope_name(&request.scope)?;
        self.transact(|saved| {
            let (present, staged) = saved.staged_scope(scope)?;
            let mut next = saved.clone();
            let answer = next.put(scope, staged.former.clone(), None, who);
            let entry = audit_entry("abort", who, scope, answer.revision, &present.rules, &staged.former);
            if staged.former.is_empty() {
                // Before, the scope did not exist or was empty.
                next.remove_scope(scope);
            }
            Ok(RuleChange { next: Some(next), answer, audit: Some(entry) })
        })
    }

    /// Pauses a staged rollout, because a node has rejected its rules. A change after `revision` is not paused.
    pub(crate) fn pause(&self, scope: &str, revision: u64, why: &str) -> Result<(), RulesError> {
        self.transact(|saved| {
            let Some(index) = saved.scopes.iter().position(|s| {
                s.scope == scope
                    && s.revision <= revision
                    && s.staged.as_ref().is_some_and(|st| st.paused.is_empty())
            }) else {
                return Ok(RuleChange::unchanged(()));
            };
            let mut next = saved.clone();
            if let Some(staged) = &mut next.scopes[index].staged {
                why.clone_into(&mut staged.paused);
            }
            let entry = AuditEntry {
                note: why.to_owned(),
                ..audit_entry("pause", COLLECTOR, scope, saved.scopes[index].revision, &[], &[])
            };
            // The revision stays the same, because no node gets other rules. Other collectors see the pause as they read.
            Ok(RuleChange { next: Some(next), answer: (), audit: Some(entry) })
        })
    }

    /// Notes that the custom resources show this revision. A newer revision makes it do nothing.
    pub(super) fn mark_mirrored(&self, revision: u64) -> Result<(), RulesError> {
        self.transact(|saved| {
            let mark = |mut next: SavedRules| {
                next.mirrored = revision;
                next
            };
            let next = (saved.revision == revision).then(|| mark(saved.clone()));
            Ok(RuleChange { next, answer: (), audit: None })
        })
    }

    /// Takes over the custom resources of a scope, which people have changed. A revision newer than `revision` makes it
    /// do nothing.
    pub(super) fn adopt(
        &self,
        scope: &str,
        rules: Vec<Rule>,
        revision: u64,
        who: &str,
    ) -> Result<(), RulesError> {
        let rules = RuleSetForms::new(rules);
        self.transact(|saved| {
            if saved.revision != revision {
                return Ok(RuleChange::unchanged(()));
            }
            check_rules(&rules.given, scope, &saved.scopes)?;
            let before = saved.scope(scope).map_or(&[][..], |p| &p.rules);
            let mut next = saved.clone();
            let answer = next.put(scope, rules.canonical.clone(), None, who);
            if rules.canonical.is_empty() {
                next.remove_scope(scope);
            }
            next.mirrored = next.revision;
            let entry = audit_entry("set", who, scope, answer.revision, before, &rules.canonical);
            Ok(RuleChange { next: Some(next), answer: (), audit: Some(entry) })
        })
    }
}
