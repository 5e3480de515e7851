//! Adding up samples: from single events to the profiles of a window.

mod raw;
mod recorder;
mod window;

pub use self::{
    raw::{RawProcess, RawProfile, RawStack},
    recorder::RecorderStats,
    window::{ContainerRef, RuleTag, SeriesProfile},
};
pub(crate) use self::{
    recorder::Recorder,
    window::{FlushedWindow, WindowSamples, slots},
};
