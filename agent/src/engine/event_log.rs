//! The newest lifecycle events, for the debug page.

use std::{collections::VecDeque, time::SystemTime};

const MAX_EVENTS: usize = 256;

#[derive(Default)]
pub(super) struct EventLog(VecDeque<(SystemTime, String)>);

impl EventLog {
    pub(super) fn add(&mut self, at: SystemTime, text: String) {
        if self.0.len() == MAX_EVENTS {
            self.0.pop_front();
        }
        self.0.push_back((at, text));
    }

    /// Returns the events, oldest first.
    pub(super) fn to_vec(&self) -> Vec<(SystemTime, String)> {
        self.0.iter().cloned().collect()
    }
}
