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
/// The shortest time that `poll` can wait for.
const MIN_PAUSE: Duration = Duration::from_millis(1);

#[derive(Default)]
pub(super) struct ReadPause {
    /// Files opened since the start, as of the last turn.
    opened: u64,
    eager: u32,
}

impl ReadPause {
    /// Returns the pause before the next turn. `opened` counts the files opened since the start, `window_left` is how much
    /// longer the window stays open.
    pub(super) fn next(&mut self, opened: u64, has_discovered: bool, window_left: Duration) -> Duration {
        self.eager = if opened > self.opened { MAX_EAGER } else { self.eager.saturating_sub(1) };
        self.opened = opened;
        let pause = match () {
            () if self.eager > 0 => EAGER_PAUSE,
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
        assert_eq!(pause.next(0, false, long), PAUSE);
        let eager: Vec<bool> = (0..30).map(|_| pause.next(3, false, long) == EAGER_PAUSE).collect();
        assert_eq!(eager.iter().filter(|eager| **eager).count(), MAX_EAGER as usize);
        assert!(eager[0] && !eager[29]);
        assert_eq!(pause.next(3, true, long), DISCOVERED_PAUSE);
    }

    #[test]
    fn no_pause_goes_over_the_end_of_the_window() {
        let mut pause = ReadPause::default();
        assert_eq!(pause.next(0, false, Duration::from_millis(7)), Duration::from_millis(7));
        assert_eq!(pause.next(0, false, Duration::ZERO), MIN_PAUSE);
    }
}
