//! Splits a batch that the collector does not take as a whole: because it is larger than the collector's limit, or because
//! the collector refused it as too large once inflated.
//!
//! The parts are batches of their own, with all fields of the whole and a share of its samples. The spool writes them to
//! one file before it forgets the whole. Their ids follow from the id of the whole. So if a crash leaves both on the disk,
//! the spool recognizes the parts at the next start, and if it sends them again, the store does.

use gannet_proto::{
    ingest::Batch,
    ledger::LossReason,
    pprof::{self, Encoding, Profile},
};
use ulid::Ulid;

use super::{Spool, format::PendingFile};
use crate::ledger::Stage;

/// Parts of one batch. A collector whose limit makes more of them is misconfigured.
const MAX_PARTS: usize = 1024;
/// Largest inflated profile. The agent made it from a window in memory, which is smaller.
pub(in crate::export) const MAX_INFLATED: usize = 512 << 20;
/// Bits of a ULID that are not its time.
const RANDOM_BITS: u128 = (1 << Ulid::RAND_BITS) - 1;
/// An odd number, so that the ids of parts, and of parts of parts, do not meet.
const ID_FACTOR: u128 = 0x9e37_79b9_7f4a_7c15_f39d;

/// Returns the id of a part, or `None` if the id of the whole is not a ULID.
pub(super) fn part_id(whole: &str, number: usize) -> Option<String> {
    let whole = Ulid::from_string(whole).ok()?.0;
    let random = (whole & RANDOM_BITS).wrapping_mul(ID_FACTOR).wrapping_add(number as u128 + 1);
    Some(Ulid((whole & !RANDOM_BITS) | (random & RANDOM_BITS)).to_string())
}

impl Spool {
    /// Replaces a batch by parts with at most `max_bytes` of compressed profile each; `None` makes two halves. The parts
    /// wait in the spool. An error is the reason for which the batch is lost, which the caller counts.
    pub(super) fn split(&mut self, batch: Batch, max_bytes: Option<u64>) -> Result<usize, LossReason> {
        let sequence = batch.sequence;
        let samples = batch.samples;
        let parts = parts_of(batch, max_bytes).ok_or(LossReason::TooLarge)?;
        let count = parts.len();
        let mut file = PendingFile::new(self.next_sequence);
        for mut part in parts {
            part.sequence = self.next_sequence;
            self.next_sequence += 1;
            file.push(&part);
        }
        let Some((holder, is_on_wire)) = self.batches.get(&sequence).map(|entry| (entry.file, entry.on_wire))
        else {
            return Err(LossReason::TooLarge);
        };
        // The file of the whole must not make room for the parts.
        self.hold(holder, true);
        let stored = self.store(file);
        self.hold(holder, false);
        if let Err(why) = stored {
            tracing::warn!(why, "cannot store the parts of a large profile");
            return Err(LossReason::SpoolFull);
        }
        if is_on_wire {
            self.ledger.pass(Stage::Wire, Stage::Spool, samples);
        }
        self.remove(sequence);
        self.publish();
        Ok(count)
    }

    /// Protects a file from eviction, or ends that.
    fn hold(&mut self, file: u64, is_held: bool) {
        if let Some(file) = self.files.get_mut(&file) {
            file.on_wire = if is_held { file.on_wire + 1 } else { file.on_wire - 1 };
        }
    }

    /// Forgets batches of which the parts are in the spool too, because a crash came between the two.
    pub(super) fn forget_split(&mut self) {
        let is_split = |id: &String| part_id(id, 0).is_some_and(|part| self.ids.contains_key(&part));
        let split: Vec<u64> =
            self.ids.iter().filter(|(id, _)| is_split(id)).map(|(_, &sequence)| sequence).collect();
        for sequence in split {
            if let Some(entry) = self.remove(sequence) {
                self.ledger.disinherit(entry.samples);
            }
        }
    }
}

/// Returns the parts of a batch, or `None` if it cannot be split.
fn parts_of(batch: Batch, max_bytes: Option<u64>) -> Option<Vec<Batch>> {
    let profile = pprof::decode(&batch.pprof, MAX_INFLATED).ok()?;
    let [first, second] = pprof::halves(profile)?;
    let mut encoded: Vec<(u64, Vec<u8>)> = Vec::new();
    let mut open = vec![second, first];
    while let Some(part) = open.pop() {
        if encoded.len() + open.len() >= MAX_PARTS {
            return None;
        }
        let (samples, bytes) = (samples_of(&part), pprof::encode_as(&part, Encoding::Zstd));
        match max_bytes {
            Some(max_bytes) if bytes.len() as u64 > max_bytes && part.sample.len() > 1 => {
                let [first, second] = pprof::halves(part)?;
                open.extend([second, first]);
            }
            _ => encoded.push((samples, bytes)),
        }
    }
    if encoded.iter().map(|(samples, _)| samples).sum::<u64>() != batch.samples {
        return None;
    }
    let whole = Batch { pprof: Vec::new(), ..batch };
    encoded
        .into_iter()
        .enumerate()
        .map(|(number, (samples, pprof))| {
            Some(Batch { batch_id: part_id(&whole.batch_id, number)?, samples, pprof, ..whole.clone() })
        })
        .collect()
}

/// Returns the sum of the first values of a profile.
fn samples_of(profile: &Profile) -> u64 {
    profile.sample.iter().filter_map(|sample| u64::try_from(*sample.value.first()?).ok()).sum()
}
