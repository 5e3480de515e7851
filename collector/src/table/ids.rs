//! Ids of stacks, frames and label sets, and the rows that define them.
//!
//! An id is the version of the commit that added its row, and the number of the row in that commit. So no two rows of a table
//! have one id, whichever process wrote them, and a join by id alone never doubles a sample. A row that is written twice, because
//! this process forgot it or never knew it, has two ids: that costs space and nothing else.

use std::collections::{BTreeMap, HashMap};

use gannet_proto::pprof::{Distinct, Frame, Label, LabelValue, Line, Mapping};
use parquet::data_type::ByteArray;
use sha2::{Digest as _, Sha256};

use super::{
    TableError,
    action::Action,
    file::{Cell, FileWriter, Rows},
    log::{Committed, Log},
    partition::Partition,
};

/// Bits of an id for the number of the row in its commit.
const ROW_BITS: u32 = 24;
/// Rows of one commit, at most.
const MAX_NEW_ROWS: usize = 1 << ROW_BITS;
/// Rows that a reader can skip together.
pub(super) const GROUP_ROWS: usize = 128 << 10;
/// Known rows of a table, at most: about 64 bytes each. Beyond that the process forgets the oldest hours, and then all.
const MAX_KNOWN: usize = 1 << 20;
/// Commits that other writers may win in a row.
const MAX_CONFLICTS: usize = 100;

/// The hour and the service to which rows of stacks, frames and label sets belong.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Scope {
    pub(super) partition: Partition,
    pub(super) service: String,
}

/// Ids that this process has written, by the hash of the content.
#[derive(Default)]
pub(super) struct KnownIds {
    ids: BTreeMap<Scope, HashMap<u128, i64>>,
    len: usize,
}

impl KnownIds {
    fn get(&self, scope: &Scope, hash: u128) -> Option<i64> {
        self.ids.get(scope)?.get(&hash).copied()
    }

    fn insert(&mut self, scope: &Scope, hash: u128, id: i64) {
        if !self.ids.contains_key(scope) {
            self.ids.insert(scope.clone(), HashMap::new());
        }
        if let Some(ids) = self.ids.get_mut(scope)
            && ids.insert(hash, id).is_none()
        {
            self.len += 1;
        }
    }

    /// Forgets ids beyond the limit.
    fn limit(&mut self) {
        while self.len > MAX_KNOWN
            && let Some((_, oldest)) = self.ids.pop_first()
        {
            self.len -= oldest.len();
        }
    }

    /// Forgets partitions before this one, whose rows retention removes.
    pub(super) fn forget_before(&mut self, partition: Partition) {
        while let Some(first) = self.ids.first_entry()
            && first.key().partition < partition
        {
            self.len -= first.remove().len();
        }
    }
}

/// New rows of a table, each with its scope and its hash.
pub(super) struct NewRows<T> {
    rows: Vec<(u32, u128, T)>,
}

impl<T> Default for NewRows<T> {
    fn default() -> Self {
        Self { rows: Vec::new() }
    }
}

impl<T: Copy> NewRows<T> {
    pub(super) fn push(&mut self, scope: u32, hash: u128, row: T) {
        self.rows.push((scope, hash, row));
    }

    /// Commits the rows, one file for each partition, and notes their ids. `scopes` are sorted. `fill` adds one row.
    pub(super) async fn write(
        mut self,
        log: &mut Log,
        known: &mut KnownIds,
        scopes: &[Scope],
        mut fill: impl FnMut(&mut Rows, i64, &ByteArray, u128, u32, T),
    ) -> Result<(), TableError> {
        self.rows.sort_by_key(|(scope, ..)| *scope);
        for rows in self.rows.chunks(MAX_NEW_ROWS) {
            let first = append(log, rows, scopes, &mut fill).await?;
            for (number, (scope, hash, _)) in rows.iter().enumerate() {
                known.insert(&scopes[*scope as usize], *hash, first + number as i64);
            }
        }
        Ok(())
    }
}

/// Commits rows, and returns the id of the first one.
async fn append<T: Copy>(
    log: &mut Log,
    rows: &[(u32, u128, T)],
    scopes: &[Scope],
    fill: &mut impl FnMut(&mut Rows, i64, &ByteArray, u128, u32, T),
) -> Result<i64, TableError> {
    for _ in 0..MAX_CONFLICTS {
        let first = (log.next_version() << ROW_BITS) as i64;
        let mut id = first;
        let mut adds = Vec::new();
        let partition = |(scope, ..): &(u32, u128, T)| scopes[*scope as usize].partition;
        for part in rows.chunk_by(|a, b| partition(a) == partition(b)) {
            let mut file = FileWriter::new(log.schema).map_err(TableError::Parquet)?;
            for group in part.chunks(GROUP_ROWS) {
                let mut out = Rows::new(log.schema);
                for same in group.chunk_by(|a, b| a.0 == b.0) {
                    let service = ByteArray::from(scopes[same[0].0 as usize].service.as_str());
                    for (scope, hash, row) in same {
                        fill(&mut out, id, &service, *hash, *scope, *row);
                        id += 1;
                    }
                }
                file.write(out).map_err(TableError::Parquet)?;
            }
            let file = file.finish().map_err(TableError::Parquet)?;
            adds.push(log.put_file(partition(&part[0]), file, true).await?);
        }
        let actions = adds.iter().map(|add| Action { add: Some(add.clone()), ..Action::default() });
        match log.commit("WRITE", actions.collect()).await? {
            Committed::Done => return Ok(first),
            // The ids of these files belong to the other commit.
            Committed::Conflict => {
                for add in &adds {
                    log.drop_file(add).await;
                }
            }
        }
    }
    Err(TableError::Contended)
}

/// The ids of one process for all tables.
#[derive(Default)]
pub(super) struct Ids {
    frames: KnownIds,
    stacks: KnownIds,
    labels: KnownIds,
}

impl Ids {
    /// Forgets partitions before this one.
    pub(super) fn forget_before(&mut self, partition: Partition) {
        for known in [&mut self.frames, &mut self.stacks, &mut self.labels] {
            known.forget_before(partition);
        }
    }

    /// Returns the ids of stacks and label sets, given as pairs of scope and number in `distinct`. Writes the rows of those that
    /// have none: frames before the stacks that refer to them.
    pub(super) async fn of(
        &mut self,
        logs: [&mut Log; 3],
        distinct: &Distinct,
        scopes: &[Scope],
        stacks: &[(u32, u32)],
        labels: &[(u32, u32)],
    ) -> Result<[Vec<i64>; 2], TableError> {
        let Self { frames: known_frames, stacks: known_stacks, labels: known_labels } = self;
        for known in [&mut *known_frames, &mut *known_stacks, &mut *known_labels] {
            known.limit();
        }
        let [frames_log, stacks_log, labels_log] = logs;
        let frames = distinct.frames();
        let frame_hashes: Vec<u128> = frames.iter().map(hash_frame).collect();
        let all_stacks = distinct.stacks();
        let stack_hashes: Vec<u128> =
            all_stacks.iter().map(|stack| hash_stack(stack, &frame_hashes)).collect();

        let is_new = |(scope, stack): &&(u32, u32)| {
            known_stacks.get(&scopes[*scope as usize], stack_hashes[*stack as usize]).is_none()
        };
        let new: Vec<(u32, u32)> = stacks.iter().filter(is_new).copied().collect();
        let mut needed: Vec<(u32, u32)> = new
            .iter()
            .flat_map(|(scope, stack)| all_stacks[*stack as usize].iter().map(|frame| (*scope, *frame)))
            .collect();
        needed.sort_unstable();
        needed.dedup();
        let mut new_frames = NewRows::default();
        for (scope, frame) in needed {
            let hash = frame_hashes[frame as usize];
            if known_frames.get(&scopes[scope as usize], hash).is_none() {
                new_frames.push(scope, hash, frame);
            }
        }
        let fill = |rows: &mut Rows, id, service: &ByteArray, hash: u128, _, frame: u32| {
            push_frame(rows, id, service, hash, &frames[frame as usize]);
        };
        new_frames.write(frames_log, known_frames, scopes, fill).await?;

        let mut new_stacks = NewRows::default();
        for (scope, stack) in new {
            new_stacks.push(scope, stack_hashes[stack as usize], stack);
        }
        let fill = |rows: &mut Rows, id, service: &ByteArray, hash: u128, scope: u32, stack: u32| {
            let frame_id = |frame: &u32| {
                known_frames.get(&scopes[scope as usize], frame_hashes[*frame as usize]).unwrap_or_default()
            };
            let ids: Vec<i64> = all_stacks[stack as usize].iter().map(frame_id).collect();
            let hash = ByteArray::from(hash.to_be_bytes().to_vec());
            rows.push([Cell::Long(id), Cell::Text(service), Cell::Text(&hash), Cell::Longs(&ids)]);
        };
        new_stacks.write(stacks_log, known_stacks, scopes, fill).await?;

        let sets = distinct.label_sets();
        let set_hashes: Vec<u128> = sets.iter().map(|set| hash_labels(set)).collect();
        let mut new_labels = NewRows::default();
        for (scope, set) in labels {
            let hash = set_hashes[*set as usize];
            if known_labels.get(&scopes[*scope as usize], hash).is_none() {
                new_labels.push(*scope, hash, *set);
            }
        }
        let fill = |rows: &mut Rows, id, service: &ByteArray, hash: u128, _, set: u32| {
            push_labels(rows, id, service, hash, &sets[set as usize]);
        };
        new_labels.write(labels_log, known_labels, scopes, fill).await?;

        let ids = |known: &KnownIds, pairs: &[(u32, u32)], hashes: &[u128]| {
            let id = |(scope, number): &(u32, u32)| {
                known.get(&scopes[*scope as usize], hashes[*number as usize]).unwrap_or_default()
            };
            pairs.iter().map(id).collect()
        };
        Ok([ids(known_stacks, stacks, &stack_hashes), ids(known_labels, labels, &set_hashes)])
    }
}

fn push_frame(rows: &mut Rows, id: i64, service: &ByteArray, hash: u128, frame: &Frame<'_>) {
    let Frame { mapping, address, line, inlined, folded } = *frame;
    let hash = ByteArray::from(hash.to_be_bytes().to_vec());
    let texts = line.map(|line| [line.name, line.system_name, line.file].map(ByteArray::from));
    let Line { line, column, start_line, .. } = line.unwrap_or_default();
    let files = mapping.map(|mapping| [mapping.file, mapping.build_id].map(ByteArray::from));
    let Mapping { start, limit, offset, .. } = mapping.unwrap_or_default();
    let text = |at: usize| optional(texts.as_ref().map(|texts| &texts[at]));
    let file = |at: usize| optional(files.as_ref().map(|files| &files[at]));
    rows.push([
        Cell::Long(id),
        Cell::Text(service),
        Cell::Text(&hash),
        text(0),
        text(1),
        text(2),
        Cell::Long(line),
        Cell::Long(column),
        Cell::Long(start_line),
        Cell::Bool(inlined),
        Cell::Long(address as i64),
        file(0),
        file(1),
        Cell::Long(start as i64),
        Cell::Long(limit as i64),
        Cell::Long(offset as i64),
        Cell::Bool(folded),
    ]);
}

/// Returns the cell of a text that may be missing.
pub(super) fn optional(text: Option<&ByteArray>) -> Cell<'_> {
    text.map_or(Cell::Null, Cell::Text)
}

fn push_labels(rows: &mut Rows, id: i64, service: &ByteArray, hash: u128, set: &[Label<'_>]) {
    let hash = ByteArray::from(hash.to_be_bytes().to_vec());
    let (mut texts, mut numbers, mut units) = (Vec::new(), Vec::new(), Vec::new());
    for Label { key, value } in set {
        let key = ByteArray::from(*key);
        match value {
            LabelValue::Str(text) => texts.push((key, ByteArray::from(*text))),
            LabelValue::Num(number, unit) => {
                if !unit.is_empty() {
                    units.push((key.clone(), ByteArray::from(*unit)));
                }
                numbers.push((key, *number));
            }
        }
    }
    rows.push([
        Cell::Long(id),
        Cell::Text(service),
        Cell::Text(&hash),
        Cell::TextMap(&texts),
        Cell::LongMap(&numbers),
        Cell::TextMap(&units),
    ]);
}

/// Hashes fields so that no two lists of fields give the same bytes.
struct Hasher(Sha256);

impl Hasher {
    fn new() -> Self {
        Self(Sha256::new())
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.update(text);
    }

    fn number(&mut self, number: u64) {
        self.0.update(number.to_le_bytes());
    }

    fn finish(self) -> u128 {
        let hash: [u8; 32] = self.0.finalize().into();
        let mut half = [0; 16];
        half.copy_from_slice(&hash[..16]);
        u128::from_be_bytes(half)
    }
}

fn hash_frame(frame: &Frame<'_>) -> u128 {
    let Frame { mapping, address, line, inlined, folded } = *frame;
    let mut hash = Hasher::new();
    hash.number(address);
    let flags = [mapping.is_some(), line.is_some(), inlined, folded];
    hash.number(flags.iter().fold(0, |bits, flag| bits << 1 | u64::from(*flag)));
    if let Some(Mapping { start, limit, offset, file, build_id }) = mapping {
        for number in [start, limit, offset] {
            hash.number(number);
        }
        for text in [file, build_id] {
            hash.text(text);
        }
    }
    if let Some(Line { name, system_name, file, line, column, start_line }) = line {
        for text in [name, system_name, file] {
            hash.text(text);
        }
        for number in [line, column, start_line] {
            hash.number(number as u64);
        }
    }
    hash.finish()
}

fn hash_stack(stack: &[u32], frames: &[u128]) -> u128 {
    let mut hash = Hasher::new();
    for frame in stack {
        hash.0.update(frames[*frame as usize].to_be_bytes());
    }
    hash.finish()
}

fn hash_labels(set: &[Label<'_>]) -> u128 {
    let mut hash = Hasher::new();
    for Label { key, value } in set {
        hash.text(key);
        match value {
            LabelValue::Str(text) => {
                hash.number(0);
                hash.text(text);
            }
            LabelValue::Num(number, unit) => {
                hash.number(1);
                hash.number(*number as u64);
                hash.text(unit);
            }
        }
    }
    hash.finish()
}
