//! Samples added up by window: from single events to what one profile holds.

mod raw;
mod recorder;
mod window;

pub use raw::{RawProcess, RawProfile, RawStack};
pub use recorder::{Recorder, RecorderStats};
pub use window::{ContainerRef, Flushed, RuleTag, SeriesProfile, WindowSamples, slots};
