//! The queue of steps that the worker has still to take.
//!
//! A step never takes another step itself: it adds effects, and the worker's loop takes one after the other. So nothing
//! happens in the middle of something else, and the loop can catch up with the kernel between any two of them.

use std::{collections::VecDeque, mem, time::SystemTime};

use tokio::sync::oneshot;

use super::{CaptureAnswer, captures::ManualCapture};
use crate::{
    conditions::{CaptureStart, WatchScope},
    rules::{CaptureId, RuleId},
};

/// A step of the worker. Each is taken right behind a [catch-up](super::worker).
pub(super) enum Effect {
    /// Adds the time of threads that are off the CPU now to the open window.
    AddOffCpu,
    /// Closes the window and hands it to the sink.
    CloseWindow,
    /// Pauses off-CPU time: the kernel reports no thread any more.
    PauseOffCpu,
    /// Puts the rules as they are now into the kernel: some that waited have got slots.
    ApplyRules,
    /// The kernel has new rules and has reported all processes that they want: finishes the change.
    SettleRules,
    /// Compares the process table with `/proc`.
    Reconcile,
    /// Begins a capture that a condition has started. Its window is open.
    BeginCapture(CaptureStart),
    /// Begins a capture that a client asks for, likewise.
    BeginManualCapture(Box<ManualCapture>, oneshot::Sender<CaptureAnswer>),
    /// Adds the flight recorder's samples from before a capture.
    AddPreTrigger { rule: RuleId, scope: WatchScope, capture: CaptureId, begun: SystemTime },
    /// Ends the captures whose time is over.
    EndDueCaptures,
    /// Finds the captures that are over and whose samples are complete.
    SettleCaptures,
    /// Reports these captures as over. The window with their last samples is closed.
    FinishCaptures(Vec<CaptureId>),
    /// Answers a command.
    Answer(Box<dyn FnOnce() + Send>),
}

/// Keeps order: what a step adds comes directly behind it, in the order in which it was added, before the steps that were
/// queued already.
pub(super) struct EffectQueue<E = Effect> {
    queue: VecDeque<E>,
    /// Added by the step that the worker takes now.
    added: Vec<E>,
}

impl<E> Default for EffectQueue<E> {
    fn default() -> Self {
        Self { queue: VecDeque::new(), added: Vec::new() }
    }
}

impl<E> EffectQueue<E> {
    pub(super) fn add(&mut self, effect: E) {
        self.added.push(effect);
    }

    /// Takes the next effect. The step that was taken before it is over.
    pub(super) fn next(&mut self) -> Option<E> {
        for effect in mem::take(&mut self.added).into_iter().rev() {
            self.queue.push_front(effect);
        }
        self.queue.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_step_adds_comes_before_what_waited_already() {
        let mut effects = EffectQueue::default();
        let (mut taken, mut next) = (Vec::new(), vec!["start a", "start b", "end"]);
        loop {
            for effect in next {
                effects.add(effect);
            }
            let Some(effect) = effects.next() else { break };
            taken.push(effect);
            next = match effect {
                "start a" => vec!["close", "begin a"],
                "begin a" => vec!["settle rules"],
                _ => Vec::new(),
            };
        }
        assert_eq!(taken, ["start a", "close", "begin a", "settle rules", "start b", "end"]);
    }
}
