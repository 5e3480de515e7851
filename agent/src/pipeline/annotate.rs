//! Symbolizes a window's profiles and writes into each which rule, window and agent it comes from.

use std::fmt::Write as _;

use gannet_proto::{ledger::Ledger, profiles::Profile};

use crate::{
    profile::{RawProfile, SeriesProfile},
    symbols::{Symbolizer, SymbolizerError},
};

/// Symbolizes the profiles of one window. Each gets comments: rule, revision, reason, the window's ledger, versions. The
/// results are in the order of `profiles`.
pub(crate) async fn finish(
    symbolizer: &Symbolizer,
    profiles: Vec<SeriesProfile>,
    ledger: &Ledger,
) -> Result<Vec<Profile>, SymbolizerError> {
    let raw = profiles.into_iter().map(|profile| with_comments(profile, ledger)).collect();
    symbolizer.symbolize_all(raw).await
}

fn with_comments(profile: SeriesProfile, ledger: &Ledger) -> RawProfile {
    let SeriesProfile { rule, mut raw, .. } = profile;
    raw.comments = vec![
        format!("rule {} revision {}", rule.id, rule.revision),
        format!("reason {}", rule.why()),
        ledger_line(ledger),
        format!("gannet-agent {}", gannet_proto::VERSION),
        format!("kernel {}", rustix::system::uname().release().to_string_lossy()),
    ];
    raw.comments.extend(rule.governed.map(|reason| format!("governor {reason}")));
    raw
}

/// Writes the ledger as one line: `ledger ticks=… taken=… delivered=… unaccounted=… lost.ring_full=…`.
fn ledger_line(ledger: &Ledger) -> String {
    let mut line = format!(
        "ledger ticks={} taken={} delivered={} unaccounted={}",
        ledger.ticks,
        ledger.taken,
        ledger.delivered,
        ledger.unaccounted()
    );
    for (reason, count) in &ledger.lost {
        let _ = write!(line, " lost.{reason}={count}");
    }
    line
}
