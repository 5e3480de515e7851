//! The rule store: named sets of rules, kept as one piece, replaced whole, numbered by revision.
//!
//! Whoever changes a set gets an answer only once the new state is durable; then it is published to the fleet room.
//! Content that cannot be read is never replaced and never taken for an empty set: nothing is published then, so that
//! every node keeps the rules that it has. Collectors that share a place see each other's changes: every change is made
//! to the newest version, and is made again if somebody else was faster.

mod audit;
mod events;
mod mirror;
mod storage;

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use gannet_proto::{
    control::{
        AbortRolloutRequest, AuditEntry, DeleteTriggersRequest, DeleteTriggersResponse, ResumeRolloutRequest,
        Rule, RuleScope, SetTriggersRequest, SetTriggersResponse, Staged, Staging,
    },
    rules::{self, Caps},
};
use prost::Message;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

pub(crate) use self::audit::{Audit, MAX_ENTRIES as MAX_AUDIT_ENTRIES, SELF};
use self::storage::{KeepError, Loaded};
pub(crate) use self::{
    mirror::{Mirror, custom_resource},
    storage::{ConfigMapKeep, FileKeep, Keep},
};
use crate::{metrics::Metrics, time};

/// Before the checksum and the content.
const MAGIC: &[u8; 8] = b"GNRULES1";
/// Calls whose answer is remembered for a retry.
const MAX_REQUESTS: usize = 1024;
/// Revisions whose rollout can still be asked for.
const MAX_REVISIONS: usize = 64;
/// Sets at one time.
const MAX_SCOPES: usize = 256;
const MAX_REQUEST_ID: usize = 128;
pub(crate) const DEFAULT_SCOPE: &str = "default";
/// How often a change is made anew because somebody else was faster.
const MAX_ATTEMPTS: usize = 20;
/// The longest time that a staged set waits before it goes on by itself.
const MAX_SOAK: Duration = Duration::from_secs(7 * 24 * 3600);

/// One thing that is wrong with a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// `rules[2].capture.hz`
    pub field: String,
    /// What is wrong and what to do about it.
    pub description: String,
}

/// Why rules were not changed, or cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum RulesError {
    /// The call is wrong.
    #[error("{}", .0.iter().map(|v| format!("{}: {}", v.field, v.description)).collect::<Vec<_>>().join("; "))]
    Invalid(Vec<Violation>),
    /// Somebody else was faster.
    #[error(
        "scope `{scope}` has changed: its etag is `{current}` now, not `{given}`; read it again and apply the change to that"
    )]
    Stale {
        /// Which set.
        scope: String,
        /// What it is.
        current: String,
        /// What it was taken for.
        given: String,
    },
    /// No such set.
    #[error("there is no scope `{0}`; `gannetctl rules list` shows those that there are")]
    NoScope(String),
    /// Nothing to resume or abort.
    #[error("scope `{0}` is not staged: its rules are on all nodes already")]
    NotStaged(String),
    /// The content is damaged.
    #[error(
        "the rule file {place} is damaged ({what}), so no rules are sent and every node keeps what it has: restore the file \
         (the version before is {place}.prev), or stop every collector that uses it, move it away and start to begin with \
         no rules"
    )]
    Corrupt {
        /// Where it is.
        place: String,
        /// In which way.
        what: String,
    },
    /// The content could not be read since the start.
    #[error(
        "the rules cannot be read from {place}, so none are sent and every node keeps what it has: {what}"
    )]
    Unread {
        /// Where they are.
        place: String,
        /// Why not.
        what: String,
    },
    /// The content could not be read or written.
    #[error("the rules could not be made durable, and are not changed: {0}")]
    Io(#[from] io::Error),
    /// Too many others change it.
    #[error("the rules are changed by others all the time, and are not changed: try again")]
    Busy,
}

fn invalid(field: &str, description: impl Into<String>) -> RulesError {
    RulesError::Invalid(vec![Violation { field: field.to_owned(), description: description.into() }])
}

/// What all nodes shall have, of which each takes what is for it.
#[derive(Debug)]
pub(crate) struct Published {
    pub(crate) revision: u64,
    scopes: Vec<RuleScope>,
}

/// What one node shall have.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct ForNode {
    /// By id.
    pub(crate) rules: Vec<Rule>,
    /// Scopes whose newest rules are staged and have not come to this node.
    pub(crate) held: Vec<String>,
    /// Scopes whose newest rules are staged and are tried on this node.
    pub(crate) tried: Vec<String>,
}

impl Published {
    /// What a node shall have of all this.
    pub(crate) fn for_node(&self, name: &str, labels: &BTreeMap<String, String>) -> ForNode {
        let mut whole = ForNode::default();
        for scope in &self.scopes {
            let is_for = |rule: &&Rule| rules::is_for_node(rule, name, labels);
            let new = scope.rules.iter().filter(is_for);
            let Some(staged) = &scope.staged else {
                whole.rules.extend(new.cloned());
                continue;
            };
            let former = staged.former.iter().filter(is_for);
            if rules::canary_rank(name) < staged.percent {
                // Who has nothing of the new rules cannot try them.
                if new.clone().next().is_some() {
                    whole.tried.push(scope.scope.clone());
                }
                whole.rules.extend(new.cloned());
            } else {
                if !new.eq(former.clone()) {
                    whole.held.push(scope.scope.clone());
                }
                whole.rules.extend(former.cloned());
            }
        }
        whole.rules = rules::canonical(whole.rules);
        whole
    }

    /// The same with other rules in one scope: for a preview.
    pub(crate) fn with(&self, scope: &str, rules: Vec<Rule>) -> Self {
        let mut scopes: Vec<RuleScope> = self.scopes.iter().filter(|s| s.scope != scope).cloned().collect();
        scopes.push(RuleScope { scope: scope.to_owned(), rules, ..RuleScope::default() });
        Self { revision: self.revision, scopes }
    }

    /// The staged scopes that a rule of this id may have come from; all of them for an id that none has.
    pub(crate) fn staged_with(&self, rule_ids: &[&str]) -> Vec<String> {
        let staged = || self.scopes.iter().filter(|s| s.staged.is_some());
        let holds = |s: &&RuleScope| s.rules.iter().any(|r| rule_ids.contains(&r.id.as_str()));
        let with: Vec<String> = staged().filter(holds).map(|s| s.scope.clone()).collect();
        if with.is_empty() { staged().map(|s| s.scope.clone()).collect() } else { with }
    }
}

/// The content.
#[derive(Clone, PartialEq, Message)]
struct Saved {
    /// The newest; 0: there never was a rule.
    #[prost(uint64, tag = "1")]
    revision: u64,
    /// By name.
    #[prost(message, repeated, tag = "2")]
    scopes: Vec<RuleScope>,
    /// The newest last.
    #[prost(message, repeated, tag = "3")]
    revisions: Vec<Made>,
    /// The newest last.
    #[prost(message, repeated, tag = "4")]
    requests: Vec<Answered>,
    /// The newest revision of which the custom resources are known to say the same. Below `revision`: they are to be
    /// written. Not used where there are none.
    #[prost(uint64, tag = "5")]
    mirrored: u64,
}

#[derive(Clone, PartialEq, Message)]
struct Made {
    #[prost(uint64, tag = "1")]
    revision: u64,
    #[prost(uint64, tag = "2")]
    at_ms: u64,
}

#[derive(Clone, PartialEq, Message)]
struct Answered {
    #[prost(string, tag = "1")]
    request_id: String,
    /// SHA-256 of the call without its id.
    #[prost(bytes = "vec", tag = "2")]
    call: Vec<u8>,
    #[prost(message, optional, tag = "3")]
    set: Option<SetTriggersResponse>,
    #[prost(message, optional, tag = "4")]
    delete: Option<DeleteTriggersResponse>,
}

enum State {
    /// Of the version that was read or written last.
    Good(Saved),
    Corrupt(String),
    /// Not read yet: whatever keeps it does not answer.
    Unread(String),
}

struct Inner {
    state: State,
    /// Of what was read or written last.
    version: Option<String>,
}

/// All of the state that the custom resources stand for.
pub(crate) struct Mirrored {
    pub(crate) revision: u64,
    pub(crate) scopes: Vec<RuleScope>,
    /// They are known to say the same.
    pub(crate) is_written: bool,
}

/// What a change makes of the present state.
struct Change<T> {
    /// Not given: nothing changes.
    next: Option<Saved>,
    answer: T,
    audit: Option<AuditEntry>,
}

impl<T> Change<T> {
    fn nothing(answer: T) -> Self {
        Self { next: None, answer, audit: None }
    }
}

/// The rule store.
pub(crate) struct Rules {
    keep: Box<dyn Keep>,
    /// Held over everything that reads or writes the place, which may take long. Taken before `inner`.
    turn: Mutex<()>,
    /// Held for moments only.
    inner: Mutex<Inner>,
    published: watch::Sender<Option<Arc<Published>>>,
    out_of_reach: AtomicBool,
    audit: Arc<Audit>,
    metrics: Metrics,
}

impl Rules {
    /// Reads what is kept, or begins without rules if there is nothing. The audit lies in this directory. Blocking.
    pub(crate) fn open(keep: Box<dyn Keep>, dir: &Path, metrics: Metrics) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let audit = Audit::open(dir, metrics.clone())?;
        let inner = Mutex::new(Inner { state: State::Good(Saved::default()), version: None });
        let published = watch::Sender::new(None);
        let out_of_reach = AtomicBool::new(false);
        let rules = Self { keep, turn: Mutex::default(), inner, published, out_of_reach, audit, metrics };
        if let Err(KeepError::Io(error)) = rules.refresh() {
            // Read as soon as it answers: see `look`.
            tracing::error!(place = rules.keep.place(), %error, "the rules cannot be read, so none are sent");
            rules.lock().state = State::Unread(error.to_string());
            rules.out_of_reach.store(true, Relaxed);
        }
        let inner = rules.lock();
        if matches!(inner.state, State::Good(_)) && rules.published.borrow().is_none() {
            rules.publish(&inner);
        }
        drop(inner);
        Ok(rules)
    }

    /// What happened to the rules.
    pub(crate) fn audit(&self) -> &Arc<Audit> {
        &self.audit
    }

    /// How often [`Rules::look`] is worth it.
    pub(crate) fn look_every(&self) -> Duration {
        self.keep.look_every()
    }

    /// Takes over what others have put into the place. Blocking.
    pub(crate) fn look(&self) {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        match self.refresh() {
            Err(KeepError::Io(error)) => {
                // Once for as long as it lasts.
                if !self.out_of_reach.swap(true, Relaxed) {
                    tracing::warn!(place = self.keep.place(), %error, "the rules cannot be read; the former ones stay");
                }
            }
            Ok(()) | Err(KeepError::Conflict) => {
                if self.out_of_reach.swap(false, Relaxed) {
                    tracing::info!(place = self.keep.place(), "the rules can be read again");
                }
            }
        }
    }

    /// The newest rules, and every newer set. `None`: the content is damaged.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Option<Arc<Published>>> {
        self.published.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn good<'a>(&self, inner: &'a Inner) -> Result<&'a Saved, RulesError> {
        match &inner.state {
            State::Good(saved) => Ok(saved),
            State::Corrupt(what) => Err(RulesError::Corrupt { place: self.keep.place(), what: what.clone() }),
            State::Unread(what) => Err(RulesError::Unread { place: self.keep.place(), what: what.clone() }),
        }
    }

    fn spoil(&self, inner: &mut Inner, what: String) {
        self.metrics.rules_corrupt.set(1);
        inner.state = State::Corrupt(what.clone());
        let error = RulesError::Corrupt { place: self.keep.place(), what };
        tracing::error!("{error}");
        self.published.send_replace(None);
    }

    /// Takes over a version that is not the one that was read or written last.
    fn refresh(&self) -> Result<(), KeepError> {
        let known = self.lock().version.clone();
        let loaded = self.keep.load(known.as_deref())?;
        let inner = &mut *self.lock();
        match loaded {
            Loaded::Same => {}
            Loaded::Nothing => {
                if matches!(inner.state, State::Unread(_)) {
                    inner.state = State::Good(Saved::default());
                    self.publish(inner);
                }
                if inner.version.take().is_some() {
                    tracing::error!(
                        place = self.keep.place(),
                        "the rules have vanished from their place; they stay as they are, and the next change writes them again"
                    );
                }
            }
            Loaded::New(version, content) => {
                inner.version = Some(version);
                match read(&content) {
                    Ok(saved) => {
                        self.metrics.rules_corrupt.set(0);
                        let is_new =
                            !matches!(&inner.state, State::Good(before) if before.revision == saved.revision);
                        inner.state = State::Good(saved);
                        if is_new {
                            self.publish(inner);
                        }
                    }
                    Err(what) => self.spoil(inner, what),
                }
            }
        }
        Ok(())
    }

    fn publish(&self, inner: &Inner) {
        let State::Good(saved) = &inner.state else { return };
        self.metrics.rules_revision.set(saved.revision as i64);
        let published = Published { revision: saved.revision, scopes: saved.scopes.clone() };
        self.published.send_replace(Some(Arc::new(published)));
    }

    /// Makes a change to the newest state. Blocking: returns once the new one is durable, audited and published.
    fn transact<T>(&self, change: impl Fn(&Saved) -> Result<Change<T>, RulesError>) -> Result<T, RulesError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..MAX_ATTEMPTS {
            match self.refresh() {
                Ok(()) => {}
                Err(KeepError::Conflict) => continue,
                Err(KeepError::Io(error)) => return Err(error.into()),
            }
            let (saved, known) = {
                let inner = self.lock();
                (self.good(&inner)?.clone(), inner.version.clone())
            };
            let Change { next, answer, audit } = change(&saved)?;
            let Some(next) = next.filter(|next| *next != saved) else { return Ok(answer) };
            match self.keep.replace(known.as_deref(), &write(&next)) {
                Ok(version) => {
                    if let Some(entry) = audit {
                        self.audit.change(&entry);
                    }
                    let is_new = next.revision != saved.revision;
                    let mut inner = self.lock();
                    inner.version = Some(version);
                    inner.state = State::Good(next);
                    if is_new {
                        self.publish(&inner);
                    }
                    return Ok(answer);
                }
                Err(KeepError::Conflict) => {}
                Err(KeepError::Io(error)) => return Err(error.into()),
            }
        }
        Err(RulesError::Busy)
    }

    /// Why it cannot be used, if it cannot.
    pub(crate) fn health(&self) -> Result<(), RulesError> {
        self.good(&self.lock()).map(drop)
    }

    /// All sets, and the newest revision.
    pub(crate) fn scopes(&self) -> Result<(Vec<RuleScope>, u64), RulesError> {
        let inner = self.lock();
        let saved = self.good(&inner)?;
        Ok((saved.scopes.clone(), saved.revision))
    }

    pub(crate) fn scope(&self, name: &str) -> Result<RuleScope, RulesError> {
        let name = scope_name(name)?;
        let scopes = self.scopes()?.0;
        scopes.into_iter().find(|s| s.scope == name).ok_or_else(|| RulesError::NoScope(name.to_owned()))
    }

    /// The newest revision for 0, and when it was made. `None`: there is none of this number, or it is forgotten.
    pub(crate) fn revision(&self, revision: u64) -> Result<Option<(u64, u64)>, RulesError> {
        let inner = self.lock();
        let saved = self.good(&inner)?;
        let wanted = if revision == 0 { saved.revision } else { revision };
        Ok(saved.revisions.iter().find(|m| m.revision == wanted).map(|m| (wanted, m.at_ms)))
    }

    /// Replaces one set. Blocking: returns once it is durable. The answer's nodes are the caller's to fill in.
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
        let rules = Checked::new(rules);
        self.transact(|saved| {
            if let Some(before) = replay(saved, &request_id, &call)? {
                return before
                    .set
                    .map(Change::nothing)
                    .ok_or_else(|| invalid("request_id", "it was used for another call: make a new one"));
            }
            let present = saved.scopes.iter().find(|s| s.scope == scope);
            check_etag(&scope, present, &etag)?;
            let violations = violations(&rules.given, &scope, &saved.scopes);
            if !violations.is_empty() {
                return Err(RulesError::Invalid(violations));
            }
            if rules.given.is_empty() && !allow_empty {
                return Err(invalid(
                    "rules",
                    format!(
                        "the set is empty, which would remove every rule of scope `{scope}`: say allow_empty if that is meant"
                    ),
                ));
            }
            let same_rules = match present {
                Some(present) => rules::digest(&present.rules) == rules.digest,
                None => rules.given.is_empty(),
            };
            let was_staged = present.and_then(|p| p.staged.as_ref());
            let unchanged = same_rules
                && match (was_staged, &staging) {
                    // What is on all nodes cannot be tried on some.
                    (None, _) => true,
                    (Some(was), Some(staging)) => was.percent == staging.percent,
                    (Some(_), None) => false,
                };
            if validate_only {
                return Ok(Change::nothing(SetTriggersResponse {
                    revision: saved.revision,
                    etag: present.map_or_else(String::new, |p| p.etag.clone()),
                    changed: !unchanged,
                    ..SetTriggersResponse::default()
                }));
            }
            let mut next = saved.clone();
            let mut entry = None;
            let answer = if unchanged {
                SetTriggersResponse {
                    revision: present.map_or(saved.revision, |p| p.revision),
                    etag: present.map_or_else(String::new, |p| p.etag.clone()),
                    ..SetTriggersResponse::default()
                }
            } else {
                let before = present.map_or(&[][..], |p| &p.rules);
                let staged = staging.as_ref().map(|Staging { percent, soak }| Staged {
                    percent: *percent,
                    soak: *soak,
                    paused: String::new(),
                    // The other nodes may hold what was there before the last set that was staged.
                    former: was_staged.map_or_else(|| before.to_vec(), |was| was.former.clone()),
                    since: Some(time::timestamp(time::now_ms())),
                });
                let note = staged.as_ref().map_or_else(String::new, |s| format!("staged at {} %", s.percent));
                let answer =
                    put(&mut next, &scope, rules.canonical.clone(), staged, who);
                entry = Some(AuditEntry {
                    note,
                    ..difference("set", who, &scope, answer.revision, before, &rules.canonical)
                });
                answer
            };
            remember(&mut next, &request_id, &call, |answered| answered.set = Some(answer.clone()));
            Ok(Change { next: Some(next), answer, audit: entry })
        })
    }

    /// Removes one set. Blocking: returns once that is durable.
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
            if let Some(before) = replay(saved, &request_id, &call)? {
                return before
                    .delete
                    .map(Change::nothing)
                    .ok_or_else(|| invalid("request_id", "it was used for another call: make a new one"));
            }
            let present = saved.scopes.iter().find(|s| s.scope == scope);
            check_etag(scope, present, &etag)?;
            let present = present.ok_or_else(|| RulesError::NoScope(scope.to_owned()))?;
            let mut next = saved.clone();
            let revision = begin_revision(&mut next);
            let entry = difference("delete", who, scope, revision, &present.rules, &[]);
            next.scopes.retain(|s| s.scope != scope);
            let answer = DeleteTriggersResponse { revision };
            remember(&mut next, &request_id, &call, |answered| answered.delete = Some(answer));
            Ok(Change { next: Some(next), answer, audit: Some(entry) })
        })
    }

    /// Brings a staged set to more nodes. Blocking.
    pub(crate) fn resume(
        &self,
        request: &ResumeRolloutRequest,
        who: &str,
    ) -> Result<SetTriggersResponse, RulesError> {
        let scope = scope_name(&request.scope)?;
        let percent = if request.percent == 0 { 100 } else { request.percent };
        if percent > 100 {
            return Err(invalid("percent", format!("is {percent}: give 1 to 100, or 0 for all nodes")));
        }
        self.transact(|saved| {
            let (present, staged) = staged(saved, scope)?;
            if percent < staged.percent {
                return Err(invalid(
                    "percent",
                    format!(
                        "is {percent}, and {} % of the nodes have the rules already: give more, or abort the rollout",
                        staged.percent
                    ),
                ));
            }
            let mut next = saved.clone();
            let still = (percent < 100).then(|| Staged {
                percent,
                paused: String::new(),
                since: Some(time::timestamp(time::now_ms())),
                ..staged.clone()
            });
            let answer = put(&mut next, scope, present.rules.clone(), still, who);
            let action = if who == SELF { "complete" } else { "resume" };
            let entry = AuditEntry {
                note: format!("from {} % to {percent} % of the nodes", staged.percent),
                ..difference(action, who, scope, answer.revision, &present.rules, &present.rules)
            };
            Ok(Change { next: Some(next), answer, audit: Some(entry) })
        })
    }

    /// Takes a staged set back. Blocking.
    pub(crate) fn abort(
        &self,
        request: &AbortRolloutRequest,
        who: &str,
    ) -> Result<SetTriggersResponse, RulesError> {
        let scope = scope_name(&request.scope)?;
        self.transact(|saved| {
            let (present, staged) = staged(saved, scope)?;
            let mut next = saved.clone();
            let answer = put(&mut next, scope, staged.former.clone(), None, who);
            let entry = difference("abort", who, scope, answer.revision, &present.rules, &staged.former);
            if staged.former.is_empty() {
                // As it was: there was no such scope, or an empty one.
                next.scopes.retain(|s| s.scope != scope);
            }
            Ok(Change { next: Some(next), answer, audit: Some(entry) })
        })
    }

    /// A node has rejected what is tried on it: nothing goes on by itself. Blocking.
    pub(crate) fn pause(&self, scope: &str, revision: u64, why: &str) -> Result<(), RulesError> {
        self.transact(|saved| {
            let Some(place) = saved.scopes.iter().position(|s| {
                s.scope == scope
                    && s.revision <= revision
                    && s.staged.as_ref().is_some_and(|st| st.paused.is_empty())
            }) else {
                return Ok(Change::nothing(()));
            };
            let mut next = saved.clone();
            if let Some(staged) = &mut next.scopes[place].staged {
                why.clone_into(&mut staged.paused);
            }
            let entry = AuditEntry {
                note: why.to_owned(),
                ..difference("pause", SELF, scope, saved.scopes[place].revision, &[], &[])
            };
            // The same revision: no node is to get anything. Others learn of it as they read.
            Ok(Change { next: Some(next), answer: (), audit: Some(entry) })
        })
    }

    /// What the custom resources shall say.
    pub(crate) fn mirrored(&self) -> Result<Mirrored, RulesError> {
        let inner = self.lock();
        let saved = self.good(&inner)?;
        Ok(Mirrored {
            revision: saved.revision,
            scopes: saved.scopes.clone(),
            is_written: saved.mirrored == saved.revision,
        })
    }

    /// The custom resources say the same as this revision. Blocking.
    pub(crate) fn mark_mirrored(&self, revision: u64) -> Result<(), RulesError> {
        self.transact(|saved| {
            // Somebody has changed the rules meanwhile: they are written again.
            let next = (saved.revision == revision).then(|| Saved { mirrored: revision, ..saved.clone() });
            Ok(Change { next, answer: (), audit: None })
        })
    }

    /// Somebody has changed the custom resources of a scope to say this. Nothing happens if the rules have changed since
    /// `revision`. Blocking.
    pub(crate) fn adopt(
        &self,
        scope: &str,
        rules: Vec<Rule>,
        revision: u64,
        who: &str,
    ) -> Result<(), RulesError> {
        let rules = Checked::new(rules);
        self.transact(|saved| {
            if saved.revision != revision {
                return Ok(Change::nothing(()));
            }
            let violations = violations(&rules.given, scope, &saved.scopes);
            if !violations.is_empty() {
                return Err(RulesError::Invalid(violations));
            }
            let present = saved.scopes.iter().find(|s| s.scope == scope);
            let before = present.map_or(&[][..], |p| &p.rules);
            let mut next = saved.clone();
            let answer = put(&mut next, scope, rules.canonical.clone(), None, who);
            if rules.canonical.is_empty() {
                next.scopes.retain(|s| s.scope != scope);
            }
            next.mirrored = next.revision;
            let entry = difference("set", who, scope, answer.revision, before, &rules.canonical);
            Ok(Change { next: Some(next), answer: (), audit: Some(entry) })
        })
    }

    /// Scopes that are on some of the nodes only, as they are now, with the revision that made them so.
    pub(crate) fn staged(&self) -> BTreeMap<String, (u64, Staged)> {
        let inner = self.lock();
        let scopes = self.good(&inner).map_or(&[][..], |saved| &saved.scopes);
        scopes.iter().filter_map(|s| Some((s.scope.clone(), (s.revision, s.staged.clone()?)))).collect()
    }
}

/// Rules as they were given, and in the form in which they are compared and kept.
struct Checked {
    given: Vec<Rule>,
    canonical: Vec<Rule>,
    digest: String,
}

impl Checked {
    fn new(given: Vec<Rule>) -> Self {
        let canonical = rules::canonical(given.clone());
        let digest = rules::digest(&canonical);
        Self { given, canonical, digest }
    }
}

fn staged<'a>(saved: &'a Saved, scope: &str) -> Result<(&'a RuleScope, &'a Staged), RulesError> {
    let present = saved.scopes.iter().find(|s| s.scope == scope);
    let present = present.ok_or_else(|| RulesError::NoScope(scope.to_owned()))?;
    let staged = present.staged.as_ref().ok_or_else(|| RulesError::NotStaged(scope.to_owned()))?;
    Ok((present, staged))
}

/// Puts rules into a scope as a new revision.
fn put(
    next: &mut Saved,
    scope: &str,
    rules: Vec<Rule>,
    staged: Option<Staged>,
    who: &str,
) -> SetTriggersResponse {
    let revision = begin_revision(next);
    let etag = format!("{revision}-{:.16}", rules::digest(&rules));
    next.scopes.retain(|s| s.scope != scope);
    next.scopes.push(RuleScope {
        scope: scope.to_owned(),
        rules,
        etag: etag.clone(),
        revision,
        changed_at: Some(time::timestamp(time::now_ms())),
        changed_by: who.to_owned(),
        staged,
    });
    next.scopes.sort_by(|a, b| a.scope.cmp(&b.scope));
    SetTriggersResponse { revision, etag, changed: true, ..SetTriggersResponse::default() }
}

fn begin_revision(next: &mut Saved) -> u64 {
    next.revision += 1;
    next.revisions.push(Made { revision: next.revision, at_ms: time::now_ms() });
    let forgotten = next.revisions.len().saturating_sub(MAX_REVISIONS);
    next.revisions.drain(..forgotten);
    next.revision
}

fn fingerprint(call: &impl Message) -> Vec<u8> {
    Sha256::digest(call.encode_to_vec()).to_vec()
}

/// The answer that this call had before. The same id for another call is the caller's mistake.
fn replay(saved: &Saved, request_id: &str, call: &[u8]) -> Result<Option<Answered>, RulesError> {
    let before = saved.requests.iter().find(|a| !request_id.is_empty() && a.request_id == request_id);
    match before {
        Some(before) if before.call != call => {
            Err(invalid("request_id", "it was used for another call with other content: make a new one"))
        }
        before => Ok(before.cloned()),
    }
}

fn remember(next: &mut Saved, request_id: &str, call: &[u8], fill: impl FnOnce(&mut Answered)) {
    if request_id.is_empty() {
        return;
    }
    let mut answered =
        Answered { request_id: request_id.to_owned(), call: call.to_vec(), ..Answered::default() };
    fill(&mut answered);
    next.requests.push(answered);
    let forgotten = next.requests.len().saturating_sub(MAX_REQUESTS);
    next.requests.drain(..forgotten);
}

fn check_request_id(id: &str) -> Result<(), RulesError> {
    if id.len() > MAX_REQUEST_ID {
        return Err(invalid(
            "request_id",
            format!("it has {} bytes, the limit is {MAX_REQUEST_ID}", id.len()),
        ));
    }
    Ok(())
}

fn check_staging(staging: Staging) -> Result<Staging, RulesError> {
    let Staging { percent, soak } = staging;
    if !(1..=99).contains(&percent) {
        return Err(invalid(
            "staging.percent",
            format!("is {percent}: give 1 to 99, or leave `staging` out for all nodes at once"),
        ));
    }
    if let Some(soak) = soak
        && !Duration::try_from(soak).is_ok_and(|soak| soak <= MAX_SOAK)
    {
        return Err(invalid("staging.soak", "is not a time from 0 to 7 days"));
    }
    Ok(staging)
}

fn check_etag(scope: &str, present: Option<&RuleScope>, given: &str) -> Result<(), RulesError> {
    let current = present.map_or("", |p| p.etag.as_str());
    if given.is_empty() || given == current {
        return Ok(());
    }
    Err(RulesError::Stale { scope: scope.to_owned(), current: current.to_owned(), given: given.to_owned() })
}

fn scope_name(name: &str) -> Result<&str, RulesError> {
    if name.is_empty() {
        return Ok(DEFAULT_SCOPE);
    }
    rules::check_scope(name).map_err(|e| invalid("scope", e))?;
    Ok(name)
}

/// Everything that is wrong with a set, alone and beside the other sets.
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
    // A node sees the rules of all scopes, so the caps on a set are for all together.
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
                    "scope `{}` has a rule of this id, and a node sees the rules of all scopes",
                    other.scope
                ),
            );
        }
    }
    found
}

/// All rules of a scope that are on any node: while it is staged, the former ones as well.
fn present_rules(scope: &RuleScope) -> impl Iterator<Item = &Rule> {
    let former = scope.staged.as_ref().map_or(&[][..], |staged| &staged.former);
    let gone = former.iter().filter(|f| scope.rules.iter().all(|r| r.id != f.id));
    scope.rules.iter().chain(gone)
}

/// What an entry says of a change: who, what, which rules.
fn difference(
    action: &str,
    who: &str,
    scope: &str,
    revision: u64,
    before: &[Rule],
    after: &[Rule],
) -> AuditEntry {
    let absent = |rule: &&Rule, from: &[Rule]| !from.iter().any(|r| r.id == rule.id);
    AuditEntry {
        at: Some(time::timestamp(time::now_ms())),
        revision,
        action: action.to_owned(),
        who: who.to_owned(),
        scope: scope.to_owned(),
        added: after.iter().filter(|r| absent(r, before)).map(|r| r.id.clone()).collect(),
        removed: before.iter().filter(|r| absent(r, after)).map(|r| r.id.clone()).collect(),
        changed: after
            .iter()
            .filter(|r| before.iter().any(|b| b.id == r.id && b != *r))
            .map(|r| r.id.clone())
            .collect(),
        ..AuditEntry::default()
    }
}

fn write(saved: &Saved) -> Vec<u8> {
    let content = saved.encode_to_vec();
    let mut out = MAGIC.to_vec();
    out.extend_from_slice(&Sha256::digest(&content));
    out.extend_from_slice(&content);
    out
}

fn read(file: &[u8]) -> Result<Saved, String> {
    let rest = file.strip_prefix(MAGIC).ok_or("it does not begin as a rule file")?;
    let (sum, content) = rest.split_first_chunk::<32>().ok_or("it is cut short")?;
    if Sha256::digest(content).as_slice() != sum {
        return Err("its checksum does not fit its content".into());
    }
    Saved::decode(content).map_err(|e| e.to_string())
}
