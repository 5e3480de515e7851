//! The reader of the ring buffer's records on any bytes, for the fuzzer.

use super::event::{Event, SampleNumber};

/// Decodes a record.
pub fn event(bytes: &[u8]) {
    let _ = (Event::decode(bytes), SampleNumber::of(bytes));
}
