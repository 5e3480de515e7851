//! Which processes the agent marks for sampling, and why: the decisions that the BPF programs cannot make themselves.
//!
//! A rule that the BPF programs match by themselves needs no mark. The agent marks a process for the rules that only it can
//! decide, and takes rules off a process for which their capture is over ("refused"). This owner holds a copy of what is in
//! the kernel's map `marks`; it answers with the change, and the worker writes it.

use std::collections::HashMap;

use crate::{
    kernel::{SamplingMark, Want},
    model::{ImageKey, ProcessKey},
};

/// A change of one entry of the kernel's map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MarkChange {
    Write(SamplingMark),
    /// By thread group id.
    Remove(u32),
}

#[derive(Default)]
pub(super) struct Sampled {
    /// By thread group id.
    marks: HashMap<u32, Decided>,
    /// Rules whose capture is over for an image that the BPF programs matched, by thread group id.
    refused: HashMap<u32, (ImageKey, u64)>,
    /// Counts the changes of rules: each mark must be decided again in each.
    round: u64,
}

struct Decided {
    mark: SamplingMark,
    round: u64,
}

impl Sampled {
    /// Decides what an image is marked for. `matched` is what the BPF programs sample it for, with `period_of` the shortest
    /// period of a set of rules, 0 for none.
    pub(super) fn mark(
        &mut self,
        key: ImageKey,
        want: Want,
        matched: u64,
        period_of: impl FnOnce(u64) -> u64,
    ) -> Option<MarkChange> {
        let tgid = key.process.tgid;
        let refused = self.refused_of(&key);
        if want.rules == 0 && refused == 0 {
            return self.marks.remove(&tgid).map(|_| MarkChange::Remove(tgid));
        }
        let mark = SamplingMark {
            key: key.process,
            exec_id: key.exec_id,
            sticky: false,
            want,
            refused,
            period_ns: period_of(matched & !refused),
        };
        self.marks.insert(tgid, Decided { mark, round: self.round });
        Some(MarkChange::Write(mark))
    }

    /// Takes a rule off an image, though the BPF programs matched it.
    pub(super) fn refuse(
        &mut self,
        key: ImageKey,
        slot: u32,
        matched: u64,
        period_of: impl FnOnce(u64) -> u64,
    ) -> Option<MarkChange> {
        let tgid = key.process.tgid;
        let refused = self.refused_of(&key) | 1 << slot;
        self.refused.insert(tgid, (key, refused));
        let is_current = |decided: &&Decided| decided.mark.key == key.process && decided.round == self.round;
        let want =
            self.marks.get(&tgid).filter(is_current).map_or(Want::default(), |decided| decided.mark.want);
        self.mark(key, want, matched, period_of)
    }

    /// The process has a new image: no rule is refused to it yet.
    pub(super) fn replace_image(&mut self, tgid: u32) {
        self.refused.remove(&tgid);
    }

    /// The process has ended.
    pub(super) fn remove(&mut self, tgid: u32) -> Option<MarkChange> {
        self.refused.remove(&tgid);
        self.marks.remove(&tgid).map(|_| MarkChange::Remove(tgid))
    }

    /// The rules have changed: each mark must be decided again, or [`Self::undecided`] returns it.
    pub(super) fn begin_round(&mut self) {
        self.round += 1;
    }

    /// Returns the marked images that were not decided again since the rules changed: no rule wants them any more.
    pub(super) fn undecided(&self) -> Vec<ImageKey> {
        let old = self.marks.values().filter(|decided| decided.round != self.round);
        old.map(|Decided { mark, .. }| ImageKey { process: mark.key, exec_id: mark.exec_id }).collect()
    }

    pub(super) fn processes(&self) -> impl Iterator<Item = ProcessKey> {
        self.marks.values().map(|decided| decided.mark.key)
    }

    /// Forgets all marks: the kernel has forgotten them.
    pub(super) fn clear_marks(&mut self) {
        self.marks.clear();
    }

    fn refused_of(&self, key: &ImageKey) -> u64 {
        self.refused.get(&key.process.tgid).filter(|(of, _)| of == key).map_or(0, |(_, rules)| *rules)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(tgid: u32, exec_id: u32) -> ImageKey {
        ImageKey { process: ProcessKey { tgid, start_boottime_ns: 1 }, exec_id }
    }

    fn want(rules: u64) -> Want {
        Want { rules, period_ns: 10 }
    }

    /// Marks and returns what the kernel gets: wanted and refused rules and the period of the matched rules.
    fn written(change: Option<MarkChange>) -> Option<(u64, u64, u64)> {
        match change {
            Some(MarkChange::Write(mark)) => Some((mark.want.rules, mark.refused, mark.period_ns)),
            _ => None,
        }
    }

    #[test]
    fn an_image_that_no_rule_wants_has_no_mark() {
        let mut sampled = Sampled::default();
        assert_eq!(sampled.mark(image(1, 1), Want::default(), 0, |_| 0), None);
        assert_eq!(written(sampled.mark(image(1, 1), want(0b10), 0, |_| 0)), Some((0b10, 0, 0)));
        assert_eq!(sampled.mark(image(1, 1), Want::default(), 0, |_| 0), Some(MarkChange::Remove(1)));
        assert_eq!(sampled.remove(1), None);
    }

    #[test]
    fn a_refused_rule_leaves_the_period_of_the_others() {
        let mut sampled = Sampled::default();
        sampled.mark(image(1, 1), want(0b100), 0b11, |_| 0);
        let change = sampled.refuse(image(1, 1), 0, 0b11, |rules| if rules == 0b10 { 7 } else { 0 });
        assert_eq!(written(change), Some((0b100, 0b1, 7)));
        let change = sampled.refuse(image(1, 1), 1, 0b11, |rules| rules);
        assert_eq!(written(change), Some((0b100, 0b11, 0)));
        // Neither its next image nor another process of this number is refused anything.
        assert_eq!(written(sampled.mark(image(1, 2), want(0b100), 0, |_| 0)), Some((0b100, 0, 0)));
        sampled.replace_image(1);
        assert_eq!(written(sampled.mark(image(1, 1), want(0b100), 0, |_| 0)), Some((0b100, 0, 0)));
    }

    #[test]
    fn marks_that_new_rules_do_not_confirm_are_found() {
        let mut sampled = Sampled::default();
        for tgid in 1..=4 {
            sampled.mark(image(tgid, 1), want(1), 0, |_| 0);
        }
        sampled.begin_round();
        sampled.mark(image(2, 1), want(2), 0, |_| 0);
        sampled.remove(3);
        // What it was wanted for before the change does not count; that it is refused something does.
        assert_eq!(written(sampled.refuse(image(4, 1), 5, 0, |_| 0)), Some((0, 1 << 5, 0)));
        assert_eq!(sampled.undecided(), [image(1, 1)]);
        let change = sampled.mark(image(1, 1), Want::default(), 0, |_| 0);
        assert_eq!((change, sampled.undecided()), (Some(MarkChange::Remove(1)), Vec::new()));
    }
}
