//! Turns finished windows into batches for the exporter: joins pod names, symbolizes frames, and enters into the node's
//! ledger what happened to each sample.

mod annotate;
mod recent;

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use gannet_proto::{
    ingest::Batch,
    labels::Labels,
    ledger::{Ledger, LossReason},
    pprof::{self, Encoding},
};
use tokio::sync::mpsc;

pub(crate) use self::annotate::finish;
use self::recent::NewProfile;
pub use self::recent::RecentProfiles;
use crate::{
    engine::{Window, WindowSink},
    ledger::{NodeLedger, Stage},
    pods::Pods,
    symbols::Symbolizer,
};

/// Windows that wait to be symbolized. Symbolizing takes a fraction of a window's length. Only the first window waits
/// longer, because the symbolizer reads each file for the first time: some windows' length on a busy node.
const MAX_QUEUED_WINDOWS: usize = 16;

/// Takes the engine's windows into the pipeline's queue and enters them into the node's ledger.
pub struct WindowQueue {
    ledger: NodeLedger,
    windows: mpsc::Sender<Window>,
}

impl WindowQueue {
    /// Returns the queue's two ends. [`run`] returns once the sending end is dropped and the queue is empty.
    pub fn new(ledger: NodeLedger) -> (Self, mpsc::Receiver<Window>) {
        let (windows, receiver) = mpsc::channel(MAX_QUEUED_WINDOWS);
        (Self { ledger, windows }, receiver)
    }
}

impl WindowSink for WindowQueue {
    fn window(&mut self, window: Window) {
        self.ledger.take_window(&window.ledger);
        let samples = window.ledger.delivered;
        if let Err(error) = self.windows.try_send(window) {
            self.ledger.lose(Stage::Window, LossReason::QueueFull, samples);
            let why = match error {
                mpsc::error::TrySendError::Full(_) => "symbolizing is too slow",
                mpsc::error::TrySendError::Closed(_) => "the agent is shutting down",
            };
            tracing::warn!(samples, "lost a window: {why}");
        }
    }
}

/// Turns windows into batches until the queue is closed and empty. `submit` hands a window's batches to the exporter.
pub async fn run(
    mut windows: mpsc::Receiver<Window>,
    symbolizer: Symbolizer,
    ledger: NodeLedger,
    recent: RecentProfiles,
    pods: Pods,
    mut submit: impl FnMut(Vec<Batch>),
) {
    while let Some(window) = windows.recv().await {
        let Window { id, start, duration, ledger: mut account, mut profiles } = window;
        let received = account.delivered;
        let denied = pods.label(&mut profiles).await;
        if denied > 0 {
            account.delivered = account.delivered.saturating_sub(denied);
            account.lose(LossReason::Denied, denied);
            ledger.lose(Stage::Window, LossReason::Denied, denied);
        }
        let series: Vec<_> = profiles
            .iter()
            // A pre-trigger profile starts before the window does.
            .map(|p| (p.labels.clone(), p.rule.clone(), p.raw.start, p.raw.duration))
            .collect();
        let mut handled = denied;
        let finished = match finish(&symbolizer, profiles, &account).await {
            Ok(finished) => finished,
            Err(error) => {
                let samples = account.delivered;
                tracing::error!(samples, "lost a window, cannot symbolize it: {error}");
                ledger.lose(Stage::Window, LossReason::Shutdown, samples);
                account.lose(LossReason::Shutdown, samples);
                handled += samples;
                Vec::new()
            }
        };
        // Counted in the profiles themselves.
        account.delivered = finished.iter().map(pprof::samples).sum();
        let mut batches = Vec::with_capacity(series.len());
        let mut symbolized = Vec::with_capacity(series.len());
        for ((labels, rule, start, duration), profile) in series.into_iter().zip(finished) {
            let why = rule.why();
            // Only a capture needs them.
            let shared = if rule.capture == 0 { Labels::new() } else { labels.clone() };
            batches.push(Batch {
                // The spool sets both.
                batch_id: String::new(),
                sequence: 0,
                labels,
                // The stream converts it for a collector that reads only gzip.
                pprof: pprof::encode_as(&profile, Encoding::Zstd),
                samples: pprof::samples(&profile),
                start: Some(start.into()),
                duration: duration.try_into().ok(),
                rule_id: rule.id,
                revision: rule.revision,
                reason: why,
                window_id: id.to_string(),
                ledger: Some((&account).into()),
                piece: None,
            });
            symbolized.push(NewProfile { capture: rule.capture, labels: shared, profile: Arc::new(profile) });
        }
        handled += batches.iter().map(|batch| batch.samples).sum::<u64>();
        recent.add(id, start, symbolized, &account);
        if batches.is_empty() {
            // A window that only lost samples still reports its losses.
            batches.push(ledger_only(id.to_string(), start, duration, &account));
        }
        submit(batches);
        ledger.settle(Stage::Window, received, handled);
    }
}

fn ledger_only(window_id: String, start: SystemTime, duration: Duration, account: &Ledger) -> Batch {
    Batch {
        window_id,
        start: Some(start.into()),
        duration: duration.try_into().ok(),
        ledger: Some(account.into()),
        ..Batch::default()
    }
}
