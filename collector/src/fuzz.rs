//! The collector's readers on any bytes, for the fuzzer.

use gannet_proto::labels::Labels;

use crate::selector::Selector;

pub use crate::store::fuzz::stored_object;

/// Parses a selector of series, and asks it about these labels.
pub fn selector(text: &str, labels: &Labels) {
    match Selector::parse(text) {
        Ok(selector) => {
            let _ = selector.matches(labels);
        }
        Err(error) => assert!(error.position <= text.chars().count() + 1, "{error}"),
    }
}
