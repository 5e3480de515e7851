//! The stored content of the rule store: all scopes, the latest revisions, and the answers to remember.
//!
//! The content is a protobuf message behind a magic number and a SHA-256 of the message.

use gannet_proto::{
    control::{AuditEntry, DeleteTriggersResponse, Rule, RuleScope, SetTriggersResponse, Staged},
    rules,
};
use prost::Message;
use sha2::{Digest as _, Sha256};

use super::error::RulesError;
use crate::time;

const MAGIC: &[u8; 8] = b"GNRULES1";
/// Answers that the store remembers for repeated requests.
const MAX_REQUESTS: usize = 1024;
/// Revisions whose rollout a client can ask for.
const MAX_REVISIONS: usize = 64;

/// The complete content of the rule storage.
#[derive(Clone, PartialEq, Message)]
pub(super) struct SavedRules {
    /// The newest revision. 0: there was never a rule.
    #[prost(uint64, tag = "1")]
    pub(super) revision: u64,
    /// Scopes, sorted by name.
    #[prost(message, repeated, tag = "2")]
    pub(super) scopes: Vec<RuleScope>,
    /// The newest last.
    #[prost(message, repeated, tag = "3")]
    pub(super) revisions: Vec<SavedRevision>,
    /// The newest last.
    #[prost(message, repeated, tag = "4")]
    requests: Vec<SavedRequest>,
    /// The newest revision that the custom resources certainly show. Below `revision`, a collector has to write them.
    /// Unused without custom resources.
    #[prost(uint64, tag = "5")]
    pub(super) mirrored: u64,
}

/// A revision and its time.
#[derive(Clone, PartialEq, Message)]
pub(super) struct SavedRevision {
    #[prost(uint64, tag = "1")]
    pub(super) revision: u64,
    #[prost(uint64, tag = "2")]
    pub(super) at_ms: u64,
}

/// A request with an id, and its answer.
#[derive(Clone, PartialEq, Message)]
pub(super) struct SavedRequest {
    #[prost(string, tag = "1")]
    request_id: String,
    /// SHA-256 of the request without its id.
    #[prost(bytes = "vec", tag = "2")]
    call: Vec<u8>,
    #[prost(message, optional, tag = "3")]
    pub(super) set: Option<SetTriggersResponse>,
    #[prost(message, optional, tag = "4")]
    pub(super) delete: Option<DeleteTriggersResponse>,
}

impl SavedRules {
    /// Parses stored content. An error says what is damaged.
    pub(super) fn parse(content: &[u8]) -> Result<Self, String> {
        let rest = content.strip_prefix(MAGIC).ok_or("it does not start like a rule file")?;
        let (sum, message) = rest.split_first_chunk::<32>().ok_or("it is cut short")?;
        if Sha256::digest(message).as_slice() != sum {
            return Err("its checksum does not match its content".into());
        }
        Self::decode(message).map_err(|e| e.to_string())
    }

    /// Returns the content to store.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let message = self.encode_to_vec();
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&Sha256::digest(&message));
        out.extend_from_slice(&message);
        out
    }

    /// Returns a scope.
    pub(super) fn scope(&self, name: &str) -> Option<&RuleScope> {
        self.scopes.iter().find(|s| s.scope == name)
    }

    /// Returns a scope that is staged, with its staging.
    pub(super) fn staged_scope(&self, name: &str) -> Result<(&RuleScope, &Staged), RulesError> {
        let scope = self.scope(name).ok_or_else(|| RulesError::NoScope(name.to_owned()))?;
        let staged = scope.staged.as_ref().ok_or_else(|| RulesError::NotStaged(name.to_owned()))?;
        Ok((scope, staged))
    }

    /// Puts rules into a scope as a new revision.
    pub(super) fn put(
        &mut self,
        scope: &str,
        rules: Vec<Rule>,
        staged: Option<Staged>,
        who: &str,
    ) -> SetTriggersResponse {
        let revision = self.begin_revision();
        let etag = format!("{revision}-{:.16}", rules::digest(&rules));
        self.remove_scope(scope);
        self.scopes.push(RuleScope {
            scope: scope.to_owned(),
            rules,
            etag: etag.clone(),
            revision,
            changed_at: Some(time::timestamp(time::now_ms())),
            changed_by: who.to_owned(),
            staged,
        });
        self.scopes.sort_by(|a, b| a.scope.cmp(&b.scope));
        SetTriggersResponse { revision, etag, changed: true, ..SetTriggersResponse::default() }
    }

    /// Removes a scope without a new revision.
    pub(super) fn remove_scope(&mut self, scope: &str) {
        self.scopes.retain(|s| s.scope != scope);
    }

    /// Starts a new revision and returns its number.
    pub(super) fn begin_revision(&mut self) -> u64 {
        self.revision += 1;
        self.revisions.push(SavedRevision { revision: self.revision, at_ms: time::now_ms() });
        let excess = self.revisions.len().saturating_sub(MAX_REVISIONS);
        self.revisions.drain(..excess);
        self.revision
    }

    /// Returns the answer to an earlier request with the same id. The same id with another content is an error.
    pub(super) fn replay(&self, request_id: &str, call: &[u8]) -> Result<Option<SavedRequest>, RulesError> {
        let before = self.requests.iter().find(|a| !request_id.is_empty() && a.request_id == request_id);
        match before {
            Some(before) if before.call != call => Err(RulesError::invalid(
                "request_id",
                "it was used for another call with other content: make a new one",
            )),
            before => Ok(before.cloned()),
        }
    }

    /// Remembers the answer to a request with an id.
    pub(super) fn remember(&mut self, request_id: &str, call: &[u8], fill: impl FnOnce(&mut SavedRequest)) {
        if request_id.is_empty() {
            return;
        }
        let mut request = SavedRequest {
            request_id: request_id.to_owned(),
            call: call.to_vec(),
            ..SavedRequest::default()
        };
        fill(&mut request);
        self.requests.push(request);
        let excess = self.requests.len().saturating_sub(MAX_REQUESTS);
        self.requests.drain(..excess);
    }
}

/// Returns the hash of a request, for [`SavedRules::replay`].
pub(super) fn fingerprint(call: &impl Message) -> Vec<u8> {
    Sha256::digest(call.encode_to_vec()).to_vec()
}

/// Returns the audit entry of a change from `before` to `after`.
pub(super) fn audit_entry(
    action: &str,
    who: &str,
    scope: &str,
    revision: u64,
    before: &[Rule],
    after: &[Rule],
) -> AuditEntry {
    let is_absent = |rule: &&Rule, from: &[Rule]| !from.iter().any(|r| r.id == rule.id);
    AuditEntry {
        at: Some(time::timestamp(time::now_ms())),
        revision,
        action: action.to_owned(),
        who: who.to_owned(),
        scope: scope.to_owned(),
        added: after.iter().filter(|r| is_absent(r, before)).map(|r| r.id.clone()).collect(),
        removed: before.iter().filter(|r| is_absent(r, after)).map(|r| r.id.clone()).collect(),
        changed: after
            .iter()
            .filter(|r| before.iter().any(|b| b.id == r.id && b != *r))
            .map(|r| r.id.clone())
            .collect(),
        ..AuditEntry::default()
    }
}
