//! Where finished samples go: into the open window, or into the flight recorder.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use gannet_proto::ledger::LossReason;

use crate::{
    model::{Image, ImageKey, Sample, StackEnd},
    process::ProcessTable,
    profile::{FlushedWindow, Recorder, RecorderStats, WindowSamples},
    rules::RuleBook,
};

/// Memory of the flight recorder.
const RECORDER_BYTES: usize = 16 << 20;
/// Different stacks in one window. A window that has more is closed early.
const MAX_STACKS: usize = 200_000;

/// Samples that enter or leave the account between the ring buffer and the window, since the engine started. Each counts once
/// for each of its rules.
#[derive(Clone, Debug, Default)]
pub(super) struct Flow {
    /// Taken by the agent itself: off-CPU intervals that last, and copies from the flight recorder.
    pub(super) taken: u64,
    /// Gone to the flight recorder, which is outside of the account.
    pub(super) recorded: u64,
    pub(super) lost: BTreeMap<LossReason, u64>,
}

impl Flow {
    /// Counts samples as lost.
    pub(super) fn lose(&mut self, reason: LossReason, n: u64) {
        if n > 0 {
            *self.lost.entry(reason).or_default() += n;
        }
    }
}

/// Counts of samples by the end of their stacks. A stack counts once: a complete one with guessed frames as guessed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StackEnds {
    /// Complete, every frame found by a rule; or the sample has no user stack.
    pub complete: u64,
    /// The kernel stack or the user stack has more frames than the sample holds.
    pub truncated: u64,
    /// The unwinder could not go on.
    pub broken: u64,
    /// A page of the stack could not be read.
    pub unreadable: u64,
    /// Complete, with at least one frame that was found by frame pointer without a rule.
    pub guessed: u64,
}

impl StackEnds {
    fn count(&mut self, sample: &Sample) {
        let counter = match sample.end {
            StackEnd::Broken | StackEnd::NotUnwound => &mut self.broken,
            StackEnd::Unreadable => &mut self.unreadable,
            StackEnd::Truncated => &mut self.truncated,
            _ if sample.marks.kernel_truncated => &mut self.truncated,
            _ if sample.marks.guessed_from.is_some() => &mut self.guessed,
            StackEnd::Complete | StackEnd::None => &mut self.complete,
        };
        *counter += 1;
    }
}

pub(super) struct Intake {
    flow: Flow,
    ends: StackEnds,
    samples: WindowSamples,
    started: (SystemTime, Instant),
    length: Duration,
    recorder: Recorder,
    /// The slots whose samples go to the recorder.
    recorded: u64,
}

/// A window that was closed.
pub(super) struct Closed {
    pub(super) start: SystemTime,
    /// By the boot clock.
    pub(super) duration: Duration,
    pub(super) flushed: FlushedWindow,
}

impl Intake {
    /// Opens the first window. Each is `length` long.
    pub(super) fn new(length: Duration) -> Self {
        Self {
            flow: Flow::default(),
            ends: StackEnds::default(),
            samples: WindowSamples::default(),
            started: (SystemTime::now(), Instant::now()),
            length,
            recorder: Recorder::new(RECORDER_BYTES),
            recorded: 0,
        }
    }

    pub(super) fn flow(&self) -> &Flow {
        &self.flow
    }

    /// Counts samples as lost before they could be added.
    pub(super) fn lose(&mut self, reason: LossReason, n: u64) {
        self.flow.lose(reason, n);
    }

    /// Lets `change` take rules off a sample. It is lost for each of them.
    pub(super) fn lose_rules(
        &mut self,
        reason: LossReason,
        sample: &mut Sample,
        change: impl FnOnce(&mut Sample),
    ) {
        let before = sample.subject.rules.count_ones();
        change(sample);
        self.lose(reason, before.saturating_sub(sample.subject.rules.count_ones()).into());
    }

    /// Counts a sample as lost if neither of its stacks could be read. Returns whether it did.
    pub(super) fn lose_unreadable(&mut self, sample: &Sample) -> bool {
        let is_lost = sample.is_unreadable();
        if is_lost {
            self.lose(LossReason::StackFault, sample.subject.rules.count_ones().into());
        }
        is_lost
    }

    /// Drops one sample of the open window without a word.
    #[cfg(test)]
    pub(super) fn drop_one(&mut self) {
        self.samples.drop_one();
    }

    /// Adds a sample that the agent took itself.
    pub(super) fn add_own(&mut self, sample: Sample) {
        self.take_own(&sample);
        self.add(sample);
    }

    /// Counts a sample that the agent took itself and adds later.
    pub(super) fn take_own(&mut self, sample: &Sample) {
        self.flow.taken += u64::from(sample.subject.rules.count_ones());
    }

    /// Returns how the stacks of all samples so far ended.
    pub(super) fn stack_ends(&self) -> StackEnds {
        self.ends
    }

    pub(super) fn add(&mut self, sample: Sample) {
        self.ends.count(&sample);
        if let Some(sample) = self.record(sample) {
            self.samples.add(sample);
        }
    }

    /// Adds a sample that was taken before other files took the place of some of its image's.
    pub(super) fn add_former(&mut self, former: &Arc<Image>, sample: Sample) {
        self.ends.count(&sample);
        if let Some(sample) = self.record(sample) {
            self.samples.add_former(former, sample);
        }
    }

    /// Other files take the place of some of an image's: the samples so far were taken of the `former` ones.
    pub(super) fn replace_image(&mut self, key: ImageKey, former: Arc<Image>) {
        self.samples.split_off_former(key, former);
    }

    /// Adds the sample to the recorder for the recorder's slots. Returns the sample for the other slots, which the window
    /// gets.
    fn record(&mut self, mut sample: Sample) -> Option<Sample> {
        let recorded = sample.subject.rules & self.recorded;
        if recorded != 0 {
            self.flow.recorded += u64::from(recorded.count_ones());
            let mut copy = sample.clone();
            copy.subject.rules = recorded;
            self.recorder.add(copy);
        }
        sample.subject.rules &= !recorded;
        (sample.subject.rules != 0).then_some(sample)
    }

    /// Sets which slots the recorder is for, and how long it keeps their samples.
    pub(super) fn set_recorded(&mut self, slots: u64, keep: Duration) {
        self.recorded = slots;
        self.recorder.set_max_age(keep);
    }

    /// The slots whose samples go to the window.
    pub(super) fn windowed(&self) -> u64 {
        !self.recorded
    }

    /// Switches the recorder. Off, it gives its memory back.
    pub(super) fn switch_recorder(&mut self, on: bool) {
        self.recorder.set_max_bytes(if on { RECORDER_BYTES } else { 0 });
    }

    /// Drops recorded samples that are too old at this boot time in nanoseconds.
    pub(super) fn forget_old(&mut self, now_ns: u64) {
        self.recorder.drop_old(now_ns);
    }

    /// Forgets for which slots samples were recorded: other rules get these slots.
    pub(super) fn forget_slots(&mut self, slots: u64) {
        if slots != 0 {
            self.recorder.clear_slots(slots);
        }
    }

    /// Copies recorded samples into the window: those of the slot `recorded` since a boot time that `is_wanted` selects.
    /// There they are of the slot `capture`, whose pre-trigger window is `length` long and begins at `start`.
    pub(super) fn add_pre_trigger(
        &mut self,
        (recorded, capture): (u32, u32),
        since_ns: u64,
        (start, length): (SystemTime, Duration),
        is_wanted: impl Fn(&Sample) -> bool,
    ) {
        let samples = self.recorder.since(since_ns, recorded, is_wanted);
        self.flow.taken += samples.len() as u64;
        self.samples.add_pre_trigger(capture, start, length, samples);
    }

    /// Returns how much longer the window stays open.
    pub(super) fn time_left(&self) -> Duration {
        self.length.saturating_sub(self.started.1.elapsed())
    }

    /// Reports whether the window is full, by time or by memory.
    pub(super) fn is_full(&self) -> bool {
        self.time_left().is_zero() || self.samples.stacks() >= MAX_STACKS
    }

    /// Samples in the open window, once for each rule that asked.
    pub(super) fn open_samples(&self) -> u64 {
        self.samples.deliveries()
    }

    pub(super) fn recorder_stats(&self) -> RecorderStats {
        self.recorder.stats()
    }

    /// Closes the window and opens the next one.
    pub(super) fn close(&mut self, node: &str, processes: &ProcessTable, rules: &RuleBook) -> Closed {
        let (start, began) = self.started;
        self.started = (SystemTime::now(), Instant::now());
        let duration = self.started.1 - began;
        let image = |key: &ImageKey| processes.get(key);
        let flushed = self.samples.flush(start, duration, node, image, |slot| rules.tag(slot));
        Closed { start, duration, flushed }
    }
}
