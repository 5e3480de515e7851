//! From finished windows to batches for the exporter: names the frames, keeps the account.

use std::{sync::Arc, time::SystemTime};

use gannet_proto::{ingest::Batch, ledger::LossReason, pprof};
use tokio::sync::mpsc;

use crate::{
    engine::{Sink, Window},
    finish::finish,
    ledger::{NodeLedger, Stage},
    node::Recent,
    pods::Pods,
    symbols::Symbolizer,
};

/// Windows that wait for their names. One comes every window's length, and naming one takes a fraction of that; but the
/// first waits for every file that it names to be read, on a busy node for some windows' length.
const QUEUE: usize = 16;

/// Where the engine puts its windows.
pub struct Entrance {
    ledger: NodeLedger,
    windows: mpsc::Sender<Window>,
}

/// Makes the two ends. The pipeline ends when the entrance is dropped and everything is through.
pub fn pipeline(ledger: NodeLedger) -> (Entrance, mpsc::Receiver<Window>) {
    let (windows, receiver) = mpsc::channel(QUEUE);
    (Entrance { ledger, windows }, receiver)
}

impl Sink for Entrance {
    fn window(&mut self, window: Window) {
        self.ledger.tick(window.ledger.ticks);
        for (reason, count) in &window.ledger.lost {
            self.ledger.take_lost(*reason, *count);
        }
        let samples = window.ledger.delivered;
        self.ledger.take(samples);
        if let Err(error) = self.windows.try_send(window) {
            self.ledger.lose(Stage::Window, LossReason::QueueFull, samples);
            let why = match error {
                mpsc::error::TrySendError::Full(_) => "naming its frames is too slow",
                mpsc::error::TrySendError::Closed(_) => "the agent is going down",
            };
            tracing::warn!(samples, "a window is lost: {why}");
        }
    }
}

/// Turns windows into batches until there are no more. `submit` takes a window's batches to the exporter.
pub async fn run(
    mut windows: mpsc::Receiver<Window>,
    symbolizer: Symbolizer,
    ledger: NodeLedger,
    recent: Recent,
    pods: Pods,
    mut submit: impl FnMut(Vec<Batch>),
) {
    while let Some(window) = windows.recv().await {
        let Window { id, start, duration, ledger: mut account, mut profiles } = window;
        let denied = pods.join(&mut profiles).await;
        if denied > 0 {
            account.delivered = account.delivered.saturating_sub(denied);
            account.lose(LossReason::Denied, denied);
            ledger.lose(Stage::Window, LossReason::Denied, denied);
        }
        let series: Vec<_> = profiles
            .iter()
            // Of a lead-up it is before the window.
            .map(|p| (p.labels.clone(), p.rule.clone(), p.samples, p.raw.start, p.raw.duration))
            .collect();
        let finished = match finish(&symbolizer, profiles, &account).await {
            Ok(finished) => finished,
            Err(error) => {
                let samples = series.iter().map(|(_, _, samples, ..)| samples).sum();
                tracing::error!(samples, "a window is lost, its frames cannot be named: {error}");
                ledger.lose(Stage::Window, LossReason::Shutdown, samples);
                Vec::new()
            }
        };
        let mut batches = Vec::with_capacity(series.len());
        let mut named = Vec::with_capacity(series.len());
        for ((labels, rule, samples, start, duration), profile) in series.into_iter().zip(finished) {
            let why = rule.why();
            batches.push(Batch {
                // The spool names and numbers it.
                batch_id: String::new(),
                sequence: 0,
                labels,
                pprof: pprof::encode(&profile),
                samples,
                start: Some(start.into()),
                duration: duration.try_into().ok(),
                rule_id: rule.id,
                revision: rule.revision,
                reason: why,
                window_id: id.to_string(),
                ledger: Some((&account).into()),
            });
            named.push((rule.capture, Arc::new(profile)));
        }
        recent.add(id, start, named);
        if batches.is_empty() {
            // Nothing but losses: they are told too.
            batches.push(ledger_only(id.to_string(), start, duration, &account));
        }
        submit(batches);
    }
}

fn ledger_only(
    window_id: String,
    start: SystemTime,
    duration: std::time::Duration,
    account: &gannet_proto::ledger::Ledger,
) -> Batch {
    Batch {
        window_id,
        start: Some(start.into()),
        duration: duration.try_into().ok(),
        ledger: Some(account.into()),
        ..Batch::default()
    }
}
