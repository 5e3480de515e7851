//! The audit log: every change of the rules with its author, and every node's answer. One JSON object a line, in an
//! append-only file. The changes also go to the log.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread,
};

use gannet_proto::control::{AuditEntry, RuleError, node_rollout::State};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::{metrics::Metrics, time};

/// Size at which the collector renames the file to `audit.jsonl.1`, in place of the one before.
const MAX_BYTES: u64 = 16 << 20;
/// Answers that wait for the disk. A revision that reaches a thousand nodes makes a thousand of them.
const QUEUED_ANSWERS: usize = 16_384;
/// Errors of one answer that go into the file.
const MAX_ERRORS: usize = 16;
/// Entries of one reading.
pub(crate) const MAX_ENTRIES: usize = 10_000;
/// Text that only lines with a node's answer contain. In texts of an entry, JSON escapes the quotes.
const ANSWER_MARK: &str = r#""action":"answer""#;
/// Author of the changes that the collector makes by itself.
pub(crate) const COLLECTOR: &str = "gannet-collector";

/// The audit log.
pub(crate) struct Audit {
    file: Mutex<AuditFile>,
    answers: SyncSender<AuditEntry>,
    metrics: Metrics,
}

#[derive(Clone)]
struct AuditFile {
    path: PathBuf,
    /// The renamed former file.
    former: PathBuf,
}

impl Audit {
    /// Opens the log in an existing directory, and starts the thread that writes the answers.
    pub(crate) fn open(dir: &Path, metrics: Metrics) -> io::Result<Arc<Self>> {
        let file = AuditFile { path: dir.join("audit.jsonl"), former: dir.join("audit.jsonl.1") };
        let (answers, queue) = sync_channel(QUEUED_ANSWERS);
        let audit = Arc::new(Self { file: Mutex::new(file), answers, metrics });
        let weak = Arc::downgrade(&audit);
        thread::Builder::new().name("gannet-audit".into()).spawn(move || write_answers(&queue, &weak))?;
        Ok(audit)
    }

    /// Writes a change and syncs it. Blocking.
    pub(crate) fn record_change(&self, entry: &AuditEntry) {
        tracing::info!(
            target: "gannet_collector::audit",
            who = entry.who, action = entry.action, scope = entry.scope, revision = entry.revision,
            added = entry.added.join(","), removed = entry.removed.join(","), changed = entry.changed.join(","),
            node = entry.node, note = entry.note, "rules changed"
        );
        self.append(std::slice::from_ref(entry), true);
    }

    /// Writes an entry for a deletion of profiles and syncs it. Returns an error if the log does not have it. `note` describes the
    /// profiles. Blocking.
    pub(crate) fn record_deletion(&self, who: &str, note: String) -> io::Result<()> {
        let entry = deletion(who.to_owned(), note);
        tracing::info!(
            target: "gannet_collector::audit",
            who = entry.who, action = entry.action, note = entry.note, "profiles deleted"
        );
        self.file.lock().append(&format!("{}\n", line(&entry)), true)
    }

    /// Queues a node's answer for writing, without waiting. A full queue drops and counts it.
    pub(crate) fn record_answer(&self, entry: AuditEntry) {
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
        let file = self.file.lock();
        if let Err(error) = file.append(&text, sync) {
            self.metrics.audit_lost.inc_by(entries.len() as u64);
            tracing::error!(path = %file.path.display(), %error, "cannot write the audit log");
        }
    }

    /// Calls `each` for every line, the oldest first. Blocking.
    fn lines(&self, mut each: impl FnMut(&str)) -> io::Result<()> {
        let AuditFile { path, former } = self.file.lock().clone();
        for path in [former, path] {
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            for text in BufReader::new(file).lines() {
                each(&text?);
            }
        }
        Ok(())
    }

    /// Returns up to `limit` of the newest entries, newest first. An empty `scope` or `node` matches every entry. Blocking.
    pub(crate) fn read(&self, scope: &str, node: &str, limit: usize) -> io::Result<Vec<AuditEntry>> {
        let mut newest: VecDeque<AuditEntry> = VecDeque::new();
        self.lines(|text| {
            // The last line may be incomplete.
            let Some(entry) = parse(text) else { return };
            if (scope.is_empty() || entry.scope == scope) && (node.is_empty() || entry.node == node) {
                newest.push_back(entry);
                if newest.len() > limit {
                    newest.pop_front();
                }
            }
        })?;
        Ok(newest.into_iter().rev().collect())
    }

    /// Returns up to `limit` of the newest changes in the range, oldest first, and the number of older ones in it. It does not parse
    /// the answers of nodes: a revision for a thousand nodes has a thousand of them. Blocking.
    pub(crate) fn changes(
        &self,
        from_ms: u64,
        until_ms: u64,
        limit: usize,
    ) -> io::Result<(Vec<AuditEntry>, usize)> {
        let mut newest: VecDeque<AuditEntry> = VecDeque::new();
        let mut older = 0;
        self.lines(|text| {
            if text.contains(ANSWER_MARK) {
                return;
            }
            let Some(entry) = parse(text) else { return };
            let at_ms = entry.at.as_ref().and_then(time::to_ms).unwrap_or(0);
            // When a rule expires, each node reports it. A thousand reports would displace the changes that people made.
            if entry.node.is_empty() && (from_ms..until_ms).contains(&at_ms) {
                newest.push_back(entry);
                if newest.len() > limit {
                    newest.pop_front();
                    older += 1;
                }
            }
        })?;
        Ok((newest.into(), older))
    }
}

/// Returns the entry of a deletion of profiles.
fn deletion(who: String, note: String) -> AuditEntry {
    AuditEntry {
        at: Some(time::timestamp(time::now_ms())),
        action: "delete-profiles".to_owned(),
        who,
        note,
        ..AuditEntry::default()
    }
}

/// Writes an entry for a deletion of profiles into the log in this directory, while no collector runs. `note` describes the profiles.
pub(crate) fn record_deletion(dir: &Path, note: String) -> io::Result<()> {
    let file = AuditFile { path: dir.join("audit.jsonl"), former: dir.join("audit.jsonl.1") };
    let entry = deletion(format!("uid {}", rustix::process::getuid().as_raw()), note);
    file.append(&format!("{}\n", line(&entry)), true)
}

impl AuditFile {
    fn append(&self, text: &str, sync: bool) -> io::Result<()> {
        let Self { path, former } = self;
        if fs::metadata(path).is_ok_and(|meta| meta.len() > MAX_BYTES) {
            fs::rename(path, former)?;
        }
        let mut file = File::options().create(true).read(true).append(true).open(path)?;
        let before = file.metadata()?.len();
        // A crash can leave an incomplete line, and this entry would become a part of it.
        let mut last = [b'\n'];
        if before > 0 {
            file.read_exact_at(&mut last, before - 1)?;
        }
        let end = if last == [b'\n'] { "" } else { "\n" };
        if let Err(error) = file.write_all(format!("{end}{text}").as_bytes()) {
            // A full disk can take half of a line, which would swallow the next one.
            let _ = file.set_len(before);
            return Err(error);
        }
        if sync { file.sync_data() } else { Ok(()) }
    }
}

/// Writes all queued answers together, so that one revision needs few writes however many nodes answer.
fn write_answers(queue: &Receiver<AuditEntry>, audit: &Weak<Audit>) {
    while let Ok(first) = queue.recv() {
        let mut entries = vec![first];
        entries.extend(queue.try_iter().take(QUEUED_ANSWERS));
        let Some(audit) = audit.upgrade() else { return };
        audit.append(&entries, false);
    }
}

/// Returns at most `max` errors. If there are more, the last one says how many are left out, and that number comes second.
pub(crate) fn bounded_errors(errors: &[RuleError], max: usize) -> (Vec<RuleError>, u64) {
    if errors.len() <= max {
        return (errors.to_vec(), 0);
    }
    let (kept, left_out) = errors.split_at(max.saturating_sub(1));
    let reason = format!("{} further errors are not shown; correct the others first", left_out.len());
    let last = RuleError { reason, ..RuleError::default() };
    (kept.iter().cloned().chain([last]).collect(), left_out.len() as u64)
}

/// Returns an entry in the form of the file.
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
    let errors: Vec<Value> = bounded_errors(errors, MAX_ERRORS)
        .0
        .iter()
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

/// Parses a line of the file. The inverse of [`line`].
fn parse(text: &str) -> Option<AuditEntry> {
    entry(&serde_json::from_str(text).ok()?)
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
    fn errors_beyond_the_limit_are_counted_in_the_last_one() {
        let errors = |count: usize| {
            let error = |number: usize| RuleError { rule_id: number.to_string(), ..RuleError::default() };
            (0..count).map(error).collect::<Vec<_>>()
        };
        assert_eq!(bounded_errors(&errors(MAX_ERRORS), MAX_ERRORS), (errors(MAX_ERRORS), 0));
        let (kept, left_out) = bounded_errors(&errors(MAX_ERRORS + 4), MAX_ERRORS);
        assert_eq!((kept.len(), left_out), (MAX_ERRORS, 5));
        assert_eq!(kept[..MAX_ERRORS - 1], errors(MAX_ERRORS - 1));
        assert!(kept[MAX_ERRORS - 1].reason.starts_with("5 further errors"), "{:?}", kept.last());
    }

    #[test]
    fn changes_of_a_range_leave_out_reports_of_nodes() {
        let dir = tempfile::tempdir().unwrap();
        let audit = Audit::open(dir.path(), Metrics::new()).unwrap();
        let at = 1_700_000_000_000;
        let change = |revision: u64, at: u64, note: &str| AuditEntry {
            at: Some(time::timestamp(at)),
            revision,
            action: "set".into(),
            note: note.into(),
            ..AuditEntry::default()
        };
        // The mark of an answer in a note does not make the entry an answer.
        let entries = [change(1, at, ""), change(2, at + 5, ANSWER_MARK), change(3, at + 9, "")];
        for entry in &entries {
            audit.record_change(entry);
            audit
                .append(&[AuditEntry { action: "answer".into(), node: "n1".into(), ..entry.clone() }], false);
            audit.append(
                &[AuditEntry { action: "expired".into(), node: "n1".into(), ..entry.clone() }],
                false,
            );
        }
        assert_eq!(audit.changes(at, at + 10, 10).unwrap(), (entries.to_vec(), 0));
        assert_eq!(audit.changes(at + 1, at + 9, 10).unwrap(), (entries[1..2].to_vec(), 0));
        assert_eq!(audit.changes(at, at + 10, 2).unwrap(), (entries[1..].to_vec(), 1));
        assert_eq!(audit.changes(at + 10, at + 99, 2).unwrap(), (vec![], 0));
    }

    #[test]
    fn entries_round_trip_newest_first_despite_a_torn_line() {
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
        audit.record_change(&change);
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
        assert_eq!(audit.read("", "", 1).unwrap(), std::slice::from_ref(&answer));
        assert!(fs::read_to_string(path).unwrap().lines().count() == 3);
        audit.append(std::slice::from_ref(&answer), false);
        assert_eq!(audit.read("", "n1", 10).unwrap(), [answer.clone(), answer]);
    }
}
