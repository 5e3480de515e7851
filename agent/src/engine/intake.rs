//! Where finished samples go: into the open window, or into the flight recorder.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use crate::{
    model::{Image, ImageKey, Sample},
    process::ProcessTable,
    profile::{FlushedWindow, Recorder, RecorderStats, WindowSamples},
    rules::RuleBook,
};

/// Memory of the flight recorder.
const RECORDER_BYTES: usize = 16 << 20;
/// Different stacks in one window. A window that has more is closed early.
const MAX_STACKS: usize = 200_000;

pub(super) struct Intake {
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
    /// Samples that were added, once for each rule that asked.
    pub(super) added: u64,
    pub(super) flushed: FlushedWindow,
}

impl Intake {
    /// Opens the first window. Each is `length` long.
    pub(super) fn new(length: Duration) -> Self {
        Self {
            samples: WindowSamples::default(),
            started: (SystemTime::now(), Instant::now()),
            length,
            recorder: Recorder::new(RECORDER_BYTES),
            recorded: 0,
        }
    }

    pub(super) fn add(&mut self, sample: Sample) {
        if let Some(sample) = self.record(sample) {
            self.samples.add(sample);
        }
    }

    /// Adds a sample that was taken before other files took the place of some of its image's.
    pub(super) fn add_former(&mut self, former: &Arc<Image>, sample: Sample) {
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
        let added = self.samples.deliveries();
        let image = |key: &ImageKey| processes.get(key);
        let flushed = self.samples.flush(start, duration, node, image, |slot| rules.tag(slot));
        Closed { start, duration, added, flushed }
    }
}
