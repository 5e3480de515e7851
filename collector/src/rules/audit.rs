//! What happened to the rules: who changed what, and what each node made of it. One JSON object a line, in a file that
//! is only appended to, and in the log.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
};

use gannet_proto::control::{AuditEntry, RuleError, node_rollout::State};
use serde_json::{Value, json};

use crate::{metrics::Metrics, time};

/// The file is set aside at this size, and the one that was set aside before is removed.
const MAX_BYTES: u64 = 16 << 20;
/// Answers of nodes that wait for the disk. A revision that reaches a thousand nodes is a thousand of them.
const QUEUE: usize = 16_384;
/// Errors of one answer that are written down.
const MAX_ERRORS: usize = 16;
/// Entries in one reading.
pub(crate) const MAX_ENTRIES: usize = 10_000;
/// What the collector calls itself where it acts by itself.
pub(crate) const SELF: &str = "gannet-collector";

pub(crate) struct Audit {
    file: Mutex<Writer>,
    answers: SyncSender<AuditEntry>,
    metrics: Metrics,
}

#[derive(Clone)]
struct Paths {
    now: PathBuf,
    before: PathBuf,
}

struct Writer {
    paths: Paths,
}

impl Audit {
    /// Below this directory, which exists.
    pub(crate) fn open(dir: &Path, metrics: Metrics) -> io::Result<std::sync::Arc<Self>> {
        let paths = Paths { now: dir.join("audit.jsonl"), before: dir.join("audit.jsonl.1") };
        let (answers, queue) = sync_channel(QUEUE);
        let audit = std::sync::Arc::new(Self { file: Mutex::new(Writer { paths }), answers, metrics });
        let weak = std::sync::Arc::downgrade(&audit);
        thread::Builder::new().name("gannet-audit".into()).spawn(move || write_answers(&queue, &weak))?;
        Ok(audit)
    }

    /// Writes down a change before it is answered. Blocking.
    pub(crate) fn change(&self, entry: &AuditEntry) {
        tracing::info!(
            target: "gannet_collector::audit",
            who = entry.who, action = entry.action, scope = entry.scope, revision = entry.revision,
            added = entry.added.join(","), removed = entry.removed.join(","), changed = entry.changed.join(","),
            node = entry.node, note = entry.note, "rules changed"
        );
        self.append(std::slice::from_ref(entry), true);
    }

    /// Writes down what a node made of a revision, soon. Does not wait.
    pub(crate) fn answer(&self, entry: AuditEntry) {
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = self.answers.try_send(entry) {
            self.metrics.audit_lost.inc();
        }
    }

    fn append(&self, entries: &[AuditEntry], sync: bool) {
        let mut text = String::new();
        for entry in entries {
            text.push_str(&line(entry).to_string());
            text.push('\n');
        }
        let file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = file.write(&text, sync) {
            self.metrics.audit_lost.inc_by(entries.len() as u64);
            tracing::error!(path = %file.paths.now.display(), %error, "the audit could not be written");
        }
    }

    /// The newest entries that are asked for, newest first. Blocking.
    pub(crate) fn read(&self, scope: &str, node: &str, limit: usize) -> io::Result<Vec<AuditEntry>> {
        let paths = self.file.lock().unwrap_or_else(PoisonError::into_inner).paths.clone();
        let mut kept: VecDeque<AuditEntry> = VecDeque::new();
        for path in [paths.before, paths.now] {
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            for text in BufReader::new(file).lines() {
                // The last line may be half written.
                let Some(entry) = serde_json::from_str(&text?).ok().and_then(|value| entry(&value)) else {
                    continue;
                };
                if (scope.is_empty() || entry.scope == scope) && (node.is_empty() || entry.node == node) {
                    kept.push_back(entry);
                    if kept.len() > limit {
                        kept.pop_front();
                    }
                }
            }
        }
        Ok(kept.into_iter().rev().collect())
    }
}

impl Writer {
    fn write(&self, text: &str, sync: bool) -> io::Result<()> {
        let Paths { now, before } = &self.paths;
        if fs::metadata(now).is_ok_and(|of| of.len() > MAX_BYTES) {
            fs::rename(now, before)?;
        }
        let mut file = File::options().create(true).append(true).open(now)?;
        file.write_all(text.as_bytes())?;
        if sync { file.sync_data() } else { Ok(()) }
    }
}

/// What is there is written together: one revision is one or two writes, however many nodes answer.
fn write_answers(queue: &Receiver<AuditEntry>, audit: &std::sync::Weak<Audit>) {
    while let Ok(first) = queue.recv() {
        let mut entries = vec![first];
        entries.extend(queue.try_iter().take(QUEUE));
        let Some(audit) = audit.upgrade() else { return };
        audit.append(&entries, false);
    }
}

fn line(entry: &AuditEntry) -> Value {
    let AuditEntry {
        at,
        revision,
        action,
        who,
        scope,
        added,
        removed,
        changed,
        node,
        state: _,
        errors,
        note,
    } = entry;
    let errors: Vec<Value> = errors
        .iter()
        .take(MAX_ERRORS)
        .map(|RuleError { rule_id, field, reason }| json!([rule_id, field, reason]))
        .collect();
    let mut value =
        json!({ "at_ms": at.as_ref().and_then(time::to_ms), "revision": revision, "action": action });
    let state = entry.state();
    for (key, part) in [
        ("who", json!(who)),
        ("scope", json!(scope)),
        ("added", json!(added)),
        ("removed", json!(removed)),
        ("changed", json!(changed)),
        ("node", json!(node)),
        ("state", json!(if state == State::Unspecified { "" } else { state.as_str_name() })),
        ("errors", json!(errors)),
        ("note", json!(note)),
    ] {
        if part.as_str() != Some("") && part.as_array().is_none_or(|list| !list.is_empty()) {
            value[key] = part;
        }
    }
    value
}

fn entry(value: &Value) -> Option<AuditEntry> {
    let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
    let texts = |value: &Value| -> Vec<String> {
        value
            .as_array()
            .map(|list| list.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect())
            .unwrap_or_default()
    };
    let errors = value["errors"].as_array().map_or_else(Vec::new, |list| {
        list.iter()
            .filter_map(|error| {
                let [rule_id, field, reason] = <[String; 3]>::try_from(texts(error)).ok()?;
                Some(RuleError { rule_id, field, reason })
            })
            .collect()
    });
    Some(AuditEntry {
        at: Some(time::timestamp(value["at_ms"].as_u64()?)),
        revision: value["revision"].as_u64()?,
        action: text("action"),
        who: text("who"),
        scope: text("scope"),
        added: texts(&value["added"]),
        removed: texts(&value["removed"]),
        changed: texts(&value["changed"]),
        node: text("node"),
        state: State::from_str_name(&text("state")).unwrap_or(State::Unspecified).into(),
        errors,
        note: text("note"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_back_newest_first_and_half_a_line_costs_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::open(dir.path(), Metrics::new()).unwrap();
        let change = AuditEntry {
            at: Some(time::timestamp(1_700_000_000_000)),
            revision: 3,
            action: "set".into(),
            who: "anna".into(),
            scope: "default".into(),
            added: vec!["a".into()],
            ..AuditEntry::default()
        };
        audit.change(&change);
        let answer = AuditEntry {
            at: change.at,
            revision: 3,
            action: "answer".into(),
            node: "n1".into(),
            state: State::Rejected.into(),
            errors: vec![RuleError { rule_id: "a".into(), field: "f".into(), reason: "no".into() }],
            ..AuditEntry::default()
        };
        audit.append(std::slice::from_ref(&answer), false);
        let path = dir.path().join("audit.jsonl");
        let mut file = File::options().append(true).open(&path).unwrap();
        file.write_all(b"{\"at_ms\":17").unwrap();
        assert_eq!(audit.read("", "", 10).unwrap(), [answer.clone(), change.clone()]);
        assert_eq!(audit.read("default", "", 10).unwrap(), [change]);
        assert_eq!(audit.read("", "n1", 10).unwrap(), std::slice::from_ref(&answer));
        assert_eq!(audit.read("", "", 1).unwrap(), [answer]);
        assert!(fs::read_to_string(path).unwrap().lines().count() == 3);
    }
}
