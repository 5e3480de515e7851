//! Samples added up by window: from single events to what one profile holds.

mod raw;

pub use raw::{RawProcess, RawProfile, RawStack, SampleKind, StackEnd};
