//! How long the worker waits before it reads the ring buffer again, if nothing wakes it earlier.

use std::time::Duration;

/// Usually. A sample waits this long at most; each reading costs a few microseconds.
const PAUSE: Duration = Duration::from_millis(50);
/// After a file that was not open yet: its program has just started, is about to map its libraries, and may end soon.
const EAGER_PAUSE: Duration = Duration::from_millis(5);
/// The number of eager pauses in a row: a program that opens files all the time does not keep the worker awake.
const MAX_EAGER: u32 = 20;
/// While processes that already ran wait to be read.
const DISCOVERED_PAUSE: Duration = Duration::from_millis(20);
/// After a frame without a name because its code may have changed between the sample and its reading. The sooner the agent reads, the
/// fewer there are.
const UNPROVEN_PAUSE: Duration = Duration::from_millis(10);
/// The number of such pauses in a row, some ten seconds.
const MAX_UNPROVEN: u32 = 1000;
/// The shortest time that `poll` can wait for.
const MIN_PAUSE: Duration = Duration::from_millis(1);

#[derive(Default)]
pub(super) struct ReadPause {
    /// Files opened since the start, as of the last turn.
    opened: u64,
    eager: u32,
    /// Frames without a name since the start, as of the last turn, and the pauses that are left.
    unproven: u64,
    hurried: u32,
}

impl ReadPause {
    /// Returns the pause before the next turn. `opened` counts the files opened since the start, `unproven` the frames
    /// without a name because their code may have changed, `window_left` is how much longer the window stays open.
    pub(super) fn next(
        &mut self,
        opened: u64,
        unproven: u64,
        has_discovered: bool,
        window_left: Duration,
    ) -> Duration {
        self.eager = if opened > self.opened { MAX_EAGER } else { self.eager.saturating_sub(1) };
        self.opened = opened;
        self.hurried = if unproven > self.unproven { MAX_UNPROVEN } else { self.hurried.saturating_sub(1) };
        self.unproven = unproven;
        let pause = match () {
            () if self.eager > 0 => EAGER_PAUSE,
            () if self.hurried > 0 => UNPROVEN_PAUSE,
            () if has_discovered => DISCOVERED_PAUSE,
            () => PAUSE,
        };
        pause.min(window_left).max(MIN_PAUSE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_file_makes_the_next_turns_eager_but_not_for_ever() {
        let mut pause = ReadPause::default();
        let long = Duration::from_secs(10);
        assert_eq!(pause.next(0, 0, false, long), PAUSE);
        let eager: Vec<bool> = (0..30).map(|_| pause.next(3, 0, false, long) == EAGER_PAUSE).collect();
        assert_eq!(eager.iter().filter(|eager| **eager).count(), MAX_EAGER as usize);
        assert!(eager[0] && !eager[29]);
        assert_eq!(pause.next(3, 0, true, long), DISCOVERED_PAUSE);
    }

    #[test]
    fn frames_without_a_proof_hurry_the_next_turns() {
        let mut pause = ReadPause::default();
        let mut next = |unproven| pause.next(0, unproven, false, Duration::from_secs(10));
        assert_eq!(next(0), PAUSE);
        let hurried = (0..3000).filter(|_| next(7) == UNPROVEN_PAUSE).count();
        assert_eq!(hurried, MAX_UNPROVEN as usize);
        assert_eq!([next(7), next(8)], [PAUSE, UNPROVEN_PAUSE]);
    }

    #[test]
    fn no_pause_goes_over_the_end_of_the_window() {
        let mut pause = ReadPause::default();
        assert_eq!(pause.next(0, 0, false, Duration::from_millis(7)), Duration::from_millis(7));
        assert_eq!(pause.next(0, 0, false, Duration::ZERO), MIN_PAUSE);
    }
}
