//! Adding up samples: from single events to the profiles of a window.

mod raw;
mod recorder;
mod window;

pub use raw::{RawProcess, RawProfile, RawStack};
pub use recorder::{Recorder, RecorderStats};
pub use window::{ContainerRef, FlushedWindow, RuleTag, SeriesProfile, WindowSamples, slots};
