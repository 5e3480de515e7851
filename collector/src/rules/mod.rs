//! The rule store: named rule sets (scopes), stored as one piece of content, numbered by revision.
//!
//! A client gets its answer once the change is durable. Then the store publishes the new revision to the fleet. Damaged
//! content is never replaced and never counts as an empty set: the store then publishes nothing, and every node keeps
//! its rules. Collectors that share a storage see each other's changes. Each change applies to the newest version, and is
//! repeated if another collector was faster.

mod audit;
mod change;
mod check;
mod crd;
mod error;
mod events;
mod mirror;
mod nodes;
mod published;
mod resource;
mod saved;
mod status;
mod storage;

use std::{
    collections::BTreeMap,
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use gannet_proto::control::{RuleScope, Staged};
use parking_lot::Mutex;
use tokio::sync::watch;

pub use self::storage::RulesLocation;
pub(crate) use self::{
    audit::{Audit, COLLECTOR, MAX_ENTRIES as MAX_AUDIT_ENTRIES, bounded_errors, record_deletion},
    check::DEFAULT_SCOPE,
    crd::custom_resource,
    error::RulesError,
    mirror::Mirror,
    nodes::NodeStates,
    published::{NodeRules, Published},
    storage::{ConfigMapStorage, FileStorage, RuleStorage},
};
use self::{
    change::RuleChange,
    check::scope_name,
    saved::SavedRules,
    storage::{Loaded, StorageError},
};
use crate::metrics::Metrics;

/// Attempts of one change while other collectors change the rules too.
const MAX_ATTEMPTS: usize = 20;

enum RulesState {
    /// The content of the last read or written version.
    Good(SavedRules),
    /// The content is damaged. Holds what is wrong.
    Corrupt(String),
    /// The storage has not answered since the start. Holds the error.
    Unread(String),
}

struct RulesInner {
    state: RulesState,
    /// The last read or written version.
    version: Option<String>,
}

/// The rules in the form that the custom resources show.
struct Mirrored {
    revision: u64,
    scopes: Vec<RuleScope>,
    /// The custom resources show them already.
    is_written: bool,
}

/// The rule store.
pub(crate) struct Rules {
    storage: Box<dyn RuleStorage>,
    /// Held during every access to the storage, which may take long. Locked before `inner`.
    access: Mutex<()>,
    /// Held for moments only.
    inner: Mutex<RulesInner>,
    published: watch::Sender<Option<Arc<Published>>>,
    is_unreachable: AtomicBool,
    audit: Arc<Audit>,
    metrics: Metrics,
}

impl Rules {
    /// Reads the stored rules, or starts without rules if there are none. `dir` holds the audit log. Blocking.
    pub(crate) fn open(storage: Box<dyn RuleStorage>, dir: &Path, metrics: Metrics) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let audit = Audit::open(dir, metrics.clone())?;
        let inner = RulesInner { state: RulesState::Good(SavedRules::default()), version: None };
        let rules = Self {
            storage,
            access: Mutex::default(),
            inner: Mutex::new(inner),
            published: watch::Sender::new(None),
            is_unreachable: AtomicBool::new(false),
            audit,
            metrics,
        };
        if let Err(StorageError::Io(error)) = rules.refresh() {
            // `refresh_shared` reads them as soon as the storage answers.
            tracing::error!(location = rules.storage.location(), %error, "cannot read the rules, so none are sent");
            rules.inner.lock().state = RulesState::Unread(error.to_string());
            rules.is_unreachable.store(true, Relaxed);
        }
        let inner = rules.inner.lock();
        if matches!(inner.state, RulesState::Good(_)) && rules.published.borrow().is_none() {
            rules.publish(&inner);
        }
        drop(inner);
        Ok(rules)
    }

    /// The audit log.
    pub(crate) fn audit(&self) -> &Arc<Audit> {
        &self.audit
    }

    /// Time between two calls of [`Rules::refresh_shared`].
    pub(crate) fn refresh_interval(&self) -> Duration {
        self.storage.refresh_interval()
    }

    /// Takes over changes of other collectors. Blocking.
    pub(crate) fn refresh_shared(&self) {
        let _access = self.access.lock();
        match self.refresh() {
            Err(StorageError::Io(error)) => {
                if !self.is_unreachable.swap(true, Relaxed) {
                    tracing::warn!(
                        location = self.storage.location(), %error,
                        "cannot read the rules; the former ones stay in force"
                    );
                }
            }
            Ok(()) | Err(StorageError::Conflict) => {
                if self.is_unreachable.swap(false, Relaxed) {
                    tracing::info!(location = self.storage.location(), "the rules can be read again");
                }
            }
        }
    }

    /// Subscribes to the newest rules. The value is `None` while the content is damaged or unread.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Option<Arc<Published>>> {
        self.published.subscribe()
    }

    fn good<'a>(&self, inner: &'a RulesInner) -> Result<&'a SavedRules, RulesError> {
        let location = || self.storage.location();
        match &inner.state {
            RulesState::Good(saved) => Ok(saved),
            RulesState::Corrupt(what) => {
                Err(RulesError::Corrupt { location: location(), what: what.clone() })
            }
            RulesState::Unread(what) => Err(RulesError::Unread { location: location(), what: what.clone() }),
        }
    }

    /// Reads the stored content, if it is not the known version.
    fn refresh(&self) -> Result<(), StorageError> {
        let known = self.inner.lock().version.clone();
        let loaded = self.storage.load(known.as_deref())?;
        let inner = &mut *self.inner.lock();
        match loaded {
            Loaded::Same => {}
            Loaded::Nothing => self.handle_missing(inner),
            Loaded::New(version, content) => {
                inner.version = Some(version);
                match SavedRules::parse(&content) {
                    Ok(saved) => {
                        self.metrics.rules_corrupt.set(0);
                        let is_new = !matches!(
                            &inner.state, RulesState::Good(before) if before.revision == saved.revision
                        );
                        inner.state = RulesState::Good(saved);
                        if is_new {
                            self.publish(inner);
                        }
                    }
                    Err(what) => self.mark_corrupt(inner, what),
                }
            }
        }
        Ok(())
    }

    /// Handles a storage without content. Rules that were there before stay in force.
    fn handle_missing(&self, inner: &mut RulesInner) {
        if matches!(inner.state, RulesState::Unread(_)) {
            inner.state = RulesState::Good(SavedRules::default());
            self.publish(inner);
        }
        if inner.version.take().is_some() {
            tracing::error!(
                location = self.storage.location(),
                "the stored rules are gone; the collector keeps them and writes them again with the next change"
            );
        }
    }

    fn mark_corrupt(&self, inner: &mut RulesInner, what: String) {
        self.metrics.rules_corrupt.set(1);
        inner.state = RulesState::Corrupt(what.clone());
        let error = RulesError::Corrupt { location: self.storage.location(), what };
        tracing::error!("{error}");
        self.published.send_replace(None);
    }

    fn publish(&self, inner: &RulesInner) {
        let RulesState::Good(saved) = &inner.state else { return };
        self.metrics.rules_revision.set(saved.revision as i64);
        let published = Published { revision: saved.revision, scopes: saved.scopes.clone() };
        self.published.send_replace(Some(Arc::new(published)));
    }

    /// Applies a change to the newest rules. Returns once the change is durable, in the audit log, and published.
    /// `change` may run several times. Blocking.
    fn transact<T>(
        &self,
        change: impl Fn(&SavedRules) -> Result<RuleChange<T>, RulesError>,
    ) -> Result<T, RulesError> {
        let _access = self.access.lock();
        for _ in 0..MAX_ATTEMPTS {
            match self.refresh() {
                Ok(()) => {}
                Err(StorageError::Conflict) => continue,
                Err(StorageError::Io(error)) => return Err(error.into()),
            }
            let (saved, known) = {
                let inner = self.inner.lock();
                (self.good(&inner)?.clone(), inner.version.clone())
            };
            let RuleChange { next, answer, audit } = change(&saved)?;
            let Some(next) = next.filter(|next| *next != saved) else { return Ok(answer) };
            match self.storage.replace(known.as_deref(), &next.to_bytes()) {
                Ok(version) => {
                    if let Some(entry) = audit {
                        self.audit.record_change(&entry);
                    }
                    let is_new = next.revision != saved.revision;
                    let mut inner = self.inner.lock();
                    inner.version = Some(version);
                    inner.state = RulesState::Good(next);
                    if is_new {
                        self.publish(&inner);
                    }
                    return Ok(answer);
                }
                Err(StorageError::Conflict) => {}
                Err(StorageError::Io(error)) => return Err(error.into()),
            }
        }
        Err(RulesError::Busy)
    }

    /// Returns an error while the rules cannot be used.
    pub(crate) fn health(&self) -> Result<(), RulesError> {
        self.good(&self.inner.lock()).map(drop)
    }

    /// Returns all scopes, and the newest revision.
    pub(crate) fn scopes(&self) -> Result<(Vec<RuleScope>, u64), RulesError> {
        let inner = self.inner.lock();
        let saved = self.good(&inner)?;
        Ok((saved.scopes.clone(), saved.revision))
    }

    /// Returns one scope. An empty name means [`DEFAULT_SCOPE`].
    pub(crate) fn scope(&self, name: &str) -> Result<RuleScope, RulesError> {
        let name = scope_name(name)?;
        let inner = self.inner.lock();
        self.good(&inner)?.scope(name).cloned().ok_or_else(|| RulesError::NoScope(name.to_owned()))
    }

    /// Returns a revision and its time in milliseconds, or `None` for an unknown or forgotten one. 0 means the newest.
    pub(crate) fn revision(&self, revision: u64) -> Result<Option<(u64, u64)>, RulesError> {
        let inner = self.inner.lock();
        let saved = self.good(&inner)?;
        let wanted = if revision == 0 { saved.revision } else { revision };
        Ok(saved.revisions.iter().find(|r| r.revision == wanted).map(|r| (wanted, r.at_ms)))
    }

    /// Returns the rules that the custom resources have to show.
    fn mirrored(&self) -> Result<Mirrored, RulesError> {
        let inner = self.inner.lock();
        let saved = self.good(&inner)?;
        Ok(Mirrored {
            revision: saved.revision,
            scopes: saved.scopes.clone(),
            is_written: saved.mirrored == saved.revision,
        })
    }

    /// Returns the staged scopes with their revisions, by name.
    pub(crate) fn staged(&self) -> BTreeMap<String, (u64, Staged)> {
        let inner = self.inner.lock();
        let scopes = self.good(&inner).map_or(&[][..], |saved| &saved.scopes);
        scopes.iter().filter_map(|s| Some((s.scope.clone(), (s.revision, s.staged.clone()?)))).collect()
    }
}
