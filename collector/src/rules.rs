//! The rule store: named sets of rules in one file, replaced whole, numbered by revision.
//!
//! Whoever changes a set gets an answer only once the file is durable; then the union of all sets is published to the
//! fleet room. A file that cannot be read is never replaced and never taken for an empty set: nothing is published
//! then, so that every node keeps the rules that it has.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use gannet_proto::{
    control::{
        DeleteTriggersRequest, DeleteTriggersResponse, Rule, RuleScope, SetTriggersRequest,
        SetTriggersResponse,
    },
    rules::{self, Caps},
};
use prost::Message;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use crate::{durable, metrics::Metrics, time};

/// Before the checksum and the content.
const MAGIC: &[u8; 8] = b"GNRULES1";
/// Calls whose answer is remembered for a retry.
const MAX_REQUESTS: usize = 1024;
/// Revisions whose rollout can still be asked for.
const MAX_REVISIONS: usize = 64;
/// Sets at one time.
const MAX_SCOPES: usize = 256;
const MAX_REQUEST_ID: usize = 128;
const DEFAULT_SCOPE: &str = "default";

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
    /// The file is damaged.
    #[error(
        "the rule file {path} is damaged ({what}), so no rules are sent and every node keeps what it has: restore the file \
         (the version before is {path}.prev) and restart, or move it away and restart to begin with no rules"
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// In which way.
        what: String,
    },
    /// The file could not be written.
    #[error("the rules could not be made durable, and are not changed: {0}")]
    Io(#[from] io::Error),
}

fn invalid(field: &str, description: impl Into<String>) -> RulesError {
    RulesError::Invalid(vec![Violation { field: field.to_owned(), description: description.into() }])
}

/// What all nodes shall have, of which each takes what is for it.
#[derive(Debug)]
pub(crate) struct Published {
    pub(crate) revision: u64,
    /// Of all scopes, by id.
    pub(crate) rules: Vec<Rule>,
}

/// The content of the file.
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
    Good(Saved),
    Corrupt(String),
}

/// The rule store.
pub(crate) struct Rules {
    path: PathBuf,
    state: Mutex<State>,
    published: watch::Sender<Option<Arc<Published>>>,
    metrics: Metrics,
}

impl Rules {
    /// Reads the file below the data directory, or begins without rules if there is none.
    pub(crate) fn open(data: &Path, metrics: Metrics) -> io::Result<Self> {
        let dir = data.join("rules");
        fs::create_dir_all(&dir)?;
        let path = dir.join("rules.pb");
        let state = match fs::read(&path) {
            Ok(content) => read(&content).map_or_else(State::Corrupt, State::Good),
            Err(e) if e.kind() == io::ErrorKind::NotFound => State::Good(Saved::default()),
            Err(e) => State::Corrupt(e.to_string()),
        };
        let published = match &state {
            State::Good(saved) => {
                metrics.rules_revision.set(saved.revision as i64);
                Some(publish(saved))
            }
            State::Corrupt(what) => {
                metrics.rules_corrupt.set(1);
                let error = RulesError::Corrupt { path: path.clone(), what: what.clone() };
                tracing::error!("{error}");
                None
            }
        };
        Ok(Self { path, state: Mutex::new(state), published: watch::Sender::new(published), metrics })
    }

    /// The newest rules, and every newer set. `None`: the file is damaged.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Option<Arc<Published>>> {
        self.published.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn good<'a>(&self, state: &'a mut State) -> Result<&'a mut Saved, RulesError> {
        match state {
            State::Good(saved) => Ok(saved),
            State::Corrupt(what) => Err(RulesError::Corrupt { path: self.path.clone(), what: what.clone() }),
        }
    }

    /// Why it cannot be used, if it cannot.
    pub(crate) fn health(&self) -> Result<(), RulesError> {
        self.good(&mut self.lock()).map(drop)
    }

    /// All sets, and the newest revision.
    pub(crate) fn scopes(&self) -> Result<(Vec<RuleScope>, u64), RulesError> {
        let mut state = self.lock();
        let saved = self.good(&mut state)?;
        Ok((saved.scopes.clone(), saved.revision))
    }

    pub(crate) fn scope(&self, name: &str) -> Result<RuleScope, RulesError> {
        let name = scope_name(name)?;
        let scopes = self.scopes()?.0;
        scopes.into_iter().find(|s| s.scope == name).ok_or_else(|| RulesError::NoScope(name.to_owned()))
    }

    /// The newest revision for 0, and when it was made. `None`: there is none of this number, or it is forgotten.
    pub(crate) fn revision(&self, revision: u64) -> Result<Option<(u64, u64)>, RulesError> {
        let mut state = self.lock();
        let saved = self.good(&mut state)?;
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
        let SetTriggersRequest { scope, rules, etag, request_id, allow_empty, validate_only } = request;
        let scope = scope_name(&scope)?.to_owned();
        check_request_id(&request_id)?;
        let mut state = self.lock();
        let saved = self.good(&mut state)?;
        if let Some(before) = replay(saved, &request_id, &call)? {
            return before
                .set
                .ok_or_else(|| invalid("request_id", "it was used for another call: make a new one"));
        }
        let present = saved.scopes.iter().find(|s| s.scope == scope);
        check_etag(&scope, present, &etag)?;
        let violations = violations(&rules, &scope, &saved.scopes);
        if !violations.is_empty() {
            return Err(RulesError::Invalid(violations));
        }
        if rules.is_empty() && !allow_empty {
            return Err(invalid(
                "rules",
                format!(
                    "the set is empty, which would remove every rule of scope `{scope}`: say allow_empty if that is meant"
                ),
            ));
        }
        let rules = rules::canonical(rules);
        let unchanged = match present {
            Some(present) => rules::digest(&present.rules) == rules::digest(&rules),
            None => rules.is_empty(),
        };
        if validate_only {
            return Ok(SetTriggersResponse {
                revision: saved.revision,
                etag: present.map_or_else(String::new, |p| p.etag.clone()),
                changed: !unchanged,
                nodes: Vec::new(),
            });
        }
        let mut next = saved.clone();
        let response = if unchanged {
            SetTriggersResponse {
                revision: present.map_or(saved.revision, |p| p.revision),
                etag: present.map_or_else(String::new, |p| p.etag.clone()),
                changed: false,
                nodes: Vec::new(),
            }
        } else {
            let revision = begin_revision(&mut next);
            let etag = format!("{revision}-{:.16}", rules::digest(&rules));
            audit(who, &scope, revision, present.map_or(&[], |p| &p.rules), &rules);
            next.scopes.retain(|s| s.scope != scope);
            next.scopes.push(RuleScope {
                scope,
                rules,
                etag: etag.clone(),
                revision,
                changed_at: Some(time::timestamp(time::now_ms())),
                changed_by: who.to_owned(),
            });
            next.scopes.sort_by(|a, b| a.scope.cmp(&b.scope));
            SetTriggersResponse { revision, etag, changed: true, nodes: Vec::new() }
        };
        remember(&mut next, request_id, call, |answered| answered.set = Some(response.clone()));
        self.save(saved, next)?;
        Ok(response)
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
        let mut state = self.lock();
        let saved = self.good(&mut state)?;
        if let Some(before) = replay(saved, &request_id, &call)? {
            return before
                .delete
                .ok_or_else(|| invalid("request_id", "it was used for another call: make a new one"));
        }
        let present = saved.scopes.iter().find(|s| s.scope == scope);
        check_etag(scope, present, &etag)?;
        let present = present.ok_or_else(|| RulesError::NoScope(scope.to_owned()))?;
        let mut next = saved.clone();
        let revision = begin_revision(&mut next);
        audit(who, scope, revision, &present.rules, &[]);
        next.scopes.retain(|s| s.scope != scope);
        let response = DeleteTriggersResponse { revision };
        remember(&mut next, request_id, call, |answered| answered.delete = Some(response));
        self.save(saved, next)?;
        Ok(response)
    }

    /// Makes the next state durable, then the present one, and tells the fleet if it is another revision.
    fn save(&self, saved: &mut Saved, next: Saved) -> Result<(), RulesError> {
        if next == *saved {
            return Ok(());
        }
        if self.path.exists() {
            let before = PathBuf::from(format!("{}.prev", self.path.display()));
            let _ = fs::remove_file(&before);
            fs::hard_link(&self.path, &before)?;
        }
        durable::replace(&self.path, &write(&next))?;
        let is_new = next.revision != saved.revision;
        *saved = next;
        if is_new {
            self.metrics.rules_revision.set(saved.revision as i64);
            self.published.send_replace(Some(publish(saved)));
        }
        Ok(())
    }
}

fn publish(saved: &Saved) -> Arc<Published> {
    let rules = saved.scopes.iter().flat_map(|s| s.rules.iter().cloned()).collect();
    Arc::new(Published { revision: saved.revision, rules: rules::canonical(rules) })
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

fn remember(next: &mut Saved, request_id: String, call: Vec<u8>, fill: impl FnOnce(&mut Answered)) {
    if request_id.is_empty() {
        return;
    }
    let mut answered = Answered { request_id, call, ..Answered::default() };
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
    let caps = Caps::default();
    // A node sees the rules of all scopes, so the caps on a set are for all together.
    let all: Vec<Rule> = others().flat_map(|s| &s.rules).chain(set).cloned().collect();
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
        if let Some(other) = others().find(|s| s.rules.iter().any(|r| r.id == rule.id)) {
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

/// One line for each change: who, what, which rules.
fn audit(who: &str, scope: &str, revision: u64, before: &[Rule], after: &[Rule]) {
    let ids = |rules: &[Rule]| rules.iter().map(|r| r.id.clone()).collect::<Vec<_>>().join(",");
    let absent = |rule: &&Rule, from: &[Rule]| !from.iter().any(|r| r.id == rule.id);
    let added: Vec<Rule> = after.iter().filter(|r| absent(r, before)).cloned().collect();
    let removed: Vec<Rule> = before.iter().filter(|r| absent(r, after)).cloned().collect();
    let changed: Vec<Rule> =
        after.iter().filter(|r| before.iter().any(|b| b.id == r.id && b != *r)).cloned().collect();
    tracing::info!(
        target: "gannet_collector::audit",
        who, scope, revision, added = ids(&added), removed = ids(&removed), changed = ids(&changed), "rules changed"
    );
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
