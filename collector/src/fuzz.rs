//! The collector's readers on any bytes, for the fuzzer.

use gannet_otlp::{self as otlp, Encoder, Outgoing};
use gannet_proto::{labels::Labels, pprof};

use crate::selector::Selector;

pub use crate::{debuginfo::fuzz::debug_file, pyroscope::fuzz::pushed, store::fuzz::stored_object};

/// Parses a selector of series, and asks it about these labels.
pub fn selector(text: &str, labels: &Labels) {
    match Selector::parse(text) {
        Ok(selector) => {
            let _ = selector.matches(labels);
        }
        Err(error) => assert!(error.position <= text.chars().count() + 1, "{error}"),
    }
}

/// Reads a request of OTLP, in JSON or protobuf. A profile that can be read comes back with the same sums.
pub fn otlp(bytes: &[u8]) {
    let request = match bytes {
        [b'{', ..] => otlp::from_json(bytes),
        _ => otlp::from_protobuf(bytes),
    };
    let Ok(decoded) = request.and_then(otlp::decode) else { return };
    for incoming in decoded.profiles {
        let (id, profile) = (incoming.id.to_string(), &incoming.profile);
        let Ok(summary) = pprof::check(profile) else { continue };
        let mut encoder = Encoder::new();
        encoder.add(&Outgoing { id: &id, labels: &incoming.labels, profile });
        let again = otlp::decode(encoder.finish()).map(|decoded| decoded.profiles);
        let again: Vec<_> =
            again.into_iter().flatten().filter_map(|one| pprof::check(&one.profile).ok()).collect();
        // Sample types that are equal, or without samples, come back as profiles of their own.
        if let [one] = &again[..] {
            assert_eq!(one.totals, summary.totals);
        }
    }
}
