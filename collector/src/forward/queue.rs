//! The sender of one target: takes profiles from its queue, splits them, and repeats failed attempts.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt as _;
use gannet_proto::{labels, pprof};
use opentelemetry_proto::tonic::collector::profiles::v1development::ExportProfilesServiceRequest;
use prost::Message as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use super::{
    Delivery, ForwardItem, Part, QueuedItem, TargetClient,
    otlp::{self, OtlpClient, Parts},
    parca::ParcaClient,
    part_id,
    pyroscope::PyroscopeClient,
};
use crate::{
    limits::MAX_INFLATION,
    metrics::Metrics,
    profile_type::{PROFILE_NAME, ProfileType},
    time,
};

/// Pyroscope's default limits on one profile: decompressed bytes, samples, labels.
const MAX_PART_BYTES: usize = 4 << 20;
const MAX_PART_SAMPLES: usize = 16_000;
const MAX_LABELS: usize = 30;
/// Age of the oldest window that Pyroscope ingests.
const MAX_AGE_MS: u64 = 3600 * 1000;
/// A small profile may inflate to this size: the stacks of one program are alike, and compress well.
const MIN_INFLATED_BYTES: usize = 64 << 20;
/// Bytes of a ledger in a header: all reasons fit.
const MAX_LEDGER_BYTES: usize = 1024;
/// Concurrent transmissions to one target.
const CONCURRENT_SENDS: usize = 8;
/// Waiting profiles that one transmission takes, if requests of the target hold several.
const MAX_TOGETHER: usize = 64;
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
const MIN_RETRY_DELAY: Duration = Duration::from_millis(500);
const MAX_RETRY_DELAY: Duration = Duration::from_secs(30);
/// Longest delay that a target may ask for.
const MAX_ASKED_DELAY: Duration = Duration::from_secs(300);

/// Sends the queued profiles of one target.
pub(super) struct Sender {
    name: &'static str,
    client: TargetClient,
    metrics: Metrics,
    waiting: Arc<AtomicU64>,
    /// Whether the log has a line about series with too many labels.
    has_logged_labels: AtomicBool,
}

impl Sender {
    pub(super) fn new(
        name: &'static str,
        client: TargetClient,
        metrics: Metrics,
        waiting: Arc<AtomicU64>,
    ) -> Arc<Self> {
        Arc::new(Self { name, client, metrics, waiting, has_logged_labels: AtomicBool::new(false) })
    }

    /// Sends profiles until `stop`, and then the waiting ones for up to `timeout`.
    pub(super) async fn run(
        self: Arc<Self>,
        mut items: mpsc::Receiver<QueuedItem>,
        stop: CancellationToken,
        timeout: Duration,
    ) {
        let closing = stop.clone();
        let together = if matches!(self.client, TargetClient::Otlp(_)) { MAX_TOGETHER } else { 1 };
        let (feed, fed) = mpsc::channel(together);
        let feeding = tokio::spawn(async move {
            loop {
                tokio::select! {
                    item = items.recv() => match item {
                        Some(item) => if feed.send(item).await.is_err() { break },
                        None => break,
                    },
                    () = closing.cancelled() => {
                        // Accepts nothing new, and drains the rest.
                        items.close();
                        while let Some(item) = items.recv().await {
                            if feed.send(item).await.is_err() { break }
                        }
                        break;
                    }
                }
            }
        });
        let this = Arc::clone(&self);
        // What waits while all transmissions are busy goes into one.
        let chunks = ReceiverStream::new(fed).ready_chunks(together);
        let send = chunks.for_each_concurrent(CONCURRENT_SENDS, move |queued| {
            let this = Arc::clone(&this);
            async move {
                let waited = queued.len() as u64;
                let (items, _permits): (Vec<_>, Vec<_>) =
                    queued.into_iter().map(|QueuedItem { item, bytes }| (item, bytes)).unzip();
                match &this.client {
                    TargetClient::Otlp(client) => this.forward_together(client, items).await,
                    _ => {
                        for item in items {
                            this.forward(item).await;
                        }
                    }
                }
                this.waiting.fetch_sub(waited, Relaxed);
            }
        });
        let over = async {
            stop.cancelled().await;
            tokio::time::sleep(timeout).await;
        };
        tokio::select! {
            () = send => {}
            () = over => {}
        }
        feeding.abort();
        let left = self.waiting.load(Relaxed);
        if left > 0 {
            self.metrics.forward_lost(self.name, "shutdown", left);
            tracing::warn!(
                target = self.name,
                profiles = left,
                "the collector ended before it forwarded all profiles; they are in the store"
            );
        }
    }

    /// Sends one profile in as many parts as it needs. Counts it as forwarded or lost.
    async fn forward(&self, item: ForwardItem) {
        let ForwardItem { id, labels, pprof, start_ms } = item;
        let max_inflated = max_inflated(pprof.len());
        let split = tokio::task::spawn_blocking(move || {
            let profile = pprof::decode(&pprof, max_inflated)?;
            let (types, ledger) = (types_of(&profile), ledger_of(&profile));
            let mut parts = pprof::split(profile, MAX_PART_SAMPLES, MAX_PART_BYTES);
            let all = parts.len();
            // A single stack can be larger than the limit. It cannot be sent.
            parts.retain(|part| part.encoded_len() <= MAX_PART_BYTES);
            let too_large = (all - parts.len()) as u64;
            let parts: Vec<Bytes> = parts.iter().map(|part| pprof::encode(part).into()).collect();
            Ok::<_, pprof::PprofError>((types, ledger, parts, too_large))
        });
        let (types, ledger, parts, too_large) = match split.await {
            Ok(Ok(split)) => split,
            Ok(Err(error)) => {
                tracing::warn!(profile = id, target = self.name, "cannot forward a profile: {error}");
                return self.metrics.forward_lost(self.name, "unreadable", 1);
            }
            Err(_) => return self.metrics.forward_lost(self.name, "shutdown", 1),
        };
        if too_large > 0 {
            self.metrics.forward_lost(self.name, "too_large", too_large);
            tracing::warn!(
                profile = id,
                target = self.name,
                stacks = too_large,
                "stacks are larger than the target accepts; they are in the store"
            );
        }
        if parts.is_empty() {
            return;
        }
        let Series { labels: series, dropped } = series(&types, labels);
        self.report_dropped(&dropped);
        for (number, part) in parts.iter().enumerate() {
            let part = Part { id: &part_id(&id, number), pprof: part, ledger: &ledger };
            let sending = match &self.client {
                TargetClient::Pyroscope(client) => Transmission::Pyroscope(client, &series, &part),
                TargetClient::Parca(client) => Transmission::Parca(client, &series, &part),
                TargetClient::Otlp(_) => continue,
            };
            if let Err(reason) = self.deliver(part.id, start_ms, sending).await {
                return self.metrics.forward_lost(self.name, reason, 1);
            }
        }
        self.metrics.forwarded(self.name, parts.len() as u64);
    }

    /// Sends profiles in as few requests as their size allows. Counts each as forwarded or lost.
    async fn forward_together(&self, client: &OtlpClient, items: Vec<ForwardItem>) {
        let start_ms = items.iter().map(|item| item.start_ms).min().unwrap_or(0);
        let waited = items.len() as u64;
        let split = tokio::task::spawn_blocking(move || {
            let (mut parts, mut unreadable) = (Vec::new(), Vec::new());
            for item in items {
                match otlp::parts(&item, max_inflated(item.pprof.len())) {
                    Ok(more) => parts.extend(more),
                    Err(error) => unreadable.push((item.id, error)),
                }
            }
            (otlp::together(parts), unreadable)
        });
        let Ok((mut open, unreadable)) = split.await else {
            return self.metrics.forward_lost(self.name, "shutdown", waited);
        };
        for (id, error) in unreadable {
            tracing::warn!(profile = id, target = self.name, "cannot forward a profile: {error}");
            self.metrics.forward_lost(self.name, "unreadable", 1);
        }
        while let Some(parts) = open.pop() {
            let count = parts.len() as u64;
            let encoded = tokio::task::spawn_blocking(move || (otlp::request(&parts), parts)).await;
            let Ok((request, parts)) = encoded else {
                return self.metrics.forward_lost(self.name, "shutdown", count);
            };
            let refused = match request {
                None => "too_large",
                Some(request) => {
                    let sending = Transmission::Otlp(client, &request);
                    match self.deliver(&otlp::ids(&parts), start_ms, sending).await {
                        Ok(rejected) => {
                            let lost = rejected.div_ceil(otlp::profiles_of_a_part(&parts)).min(count);
                            if lost > 0 {
                                self.metrics.forward_lost(self.name, "rejected", lost);
                            }
                            self.metrics.forwarded(self.name, count - lost);
                            continue;
                        }
                        Err(reason) => reason,
                    }
                }
            };
            // One profile may be the fault of all, so each half gets its own request.
            if count > 1 && ["refused", "too_large"].contains(&refused) {
                open.extend(halves(parts));
            } else {
                self.metrics.forward_lost(self.name, refused, count);
            }
        }
    }

    /// Counts labels that the target does not get, and logs the first ones.
    fn report_dropped(&self, dropped: &[String]) {
        if dropped.is_empty() {
            return;
        }
        self.metrics.forward_labels_dropped(self.name, dropped.len() as u64);
        if !self.has_logged_labels.swap(true, Relaxed) {
            tracing::warn!(
                target = self.name,
                labels = %dropped.join(", "),
                "a series has more than {MAX_LABELS} labels with its name, which the target would refuse: it gets the profiles \
                 without these; give rules fewer labels, or the agents fewer --pod-label; logged once, \
                 gannet_collector_forward_labels_dropped_total counts on"
            );
        }
    }

    /// Repeats a transmission until the target accepts the request. Returns the number of profiles that it left out, or the reason for
    /// which the sender gives up.
    async fn deliver(&self, id: &str, start_ms: u64, sending: Transmission<'_>) -> Result<u64, &'static str> {
        let mut delay = MIN_RETRY_DELAY;
        let mut is_logged = false;
        loop {
            if time::now_ms().saturating_sub(start_ms) > MAX_AGE_MS {
                return Err("too_old");
            }
            let sent = tokio::time::timeout(SEND_TIMEOUT, sending.send()).await;
            let sent = sent.unwrap_or_else(|_| {
                Delivery::retry(format!("no answer within {} s", SEND_TIMEOUT.as_secs()))
            });
            match sent {
                Delivery::Accepted => return Ok(0),
                Delivery::Partly { rejected, why } => {
                    tracing::warn!(
                        profile = id,
                        target = self.name,
                        rejected,
                        "the target accepted a request with a warning: {why}"
                    );
                    return Ok(rejected);
                }
                Delivery::Refused(why) => {
                    tracing::warn!(profile = id, target = self.name, "the target refused a profile: {why}");
                    return Err("refused");
                }
                Delivery::Retry { why, after } => {
                    self.metrics.forward_retried(self.name);
                    if !std::mem::replace(&mut is_logged, true) {
                        tracing::warn!(
                            target = self.name,
                            "cannot forward a profile yet, trying again: {why}"
                        );
                    }
                    // Half to all of the delay, so that the waiting profiles do not return all at once.
                    let jittered = delay.mul_f64(jitter(id));
                    tokio::time::sleep(after.map_or(jittered, |after| after.min(MAX_ASKED_DELAY))).await;
                    delay = (delay * 2).min(MAX_RETRY_DELAY);
                }
            }
        }
    }
}

/// The content of one call, with its client.
enum Transmission<'a> {
    Pyroscope(&'a PyroscopeClient, &'a [(String, String)], &'a Part<'a>),
    Parca(&'a ParcaClient, &'a [(String, String)], &'a Part<'a>),
    Otlp(&'a OtlpClient, &'a ExportProfilesServiceRequest),
}

impl Transmission<'_> {
    async fn send(&self) -> Delivery {
        match self {
            Self::Pyroscope(client, series, part) => client.send(series, part).await,
            Self::Parca(client, series, part) => client.send(series, part).await,
            Self::Otlp(client, request) => client.send(request).await,
        }
    }
}

/// Returns the bytes to which a profile of this size may inflate.
fn max_inflated(bytes: usize) -> usize {
    bytes.saturating_mul(MAX_INFLATION).max(MIN_INFLATED_BYTES)
}

fn halves(mut parts: Parts) -> [Parts; 2] {
    let second = parts.split_off(parts.len() / 2);
    [parts, second]
}

/// Returns 0.5 to 1 from the time and the id. Profiles that wait together have different ids.
fn jitter(id: &str) -> f64 {
    let hash = id.bytes().fold(time::now_ms(), |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    0.5 + (hash % 1000) as f64 / 2000.0
}

/// Returns the sample types of a profile, without their units.
fn types_of(profile: &pprof::Profile) -> Vec<String> {
    let types = profile.sample_type.iter();
    types
        .filter_map(|kind| {
            usize::try_from(kind.r#type).ok().and_then(|at| profile.string_table.get(at)).cloned()
        })
        .collect()
}

/// Returns the account of samples that the agent wrote into the comments; empty if there is none. Headers take ASCII only.
fn ledger_of(profile: &pprof::Profile) -> String {
    let text = |index: &i64| {
        usize::try_from(*index).ok().and_then(|at| profile.string_table.get(at)).map_or("", String::as_str)
    };
    let line = profile.comment.iter().find_map(|index| text(index).strip_prefix("ledger ")).unwrap_or("");
    line.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(MAX_LEDGER_BYTES).collect()
}

/// The labels of a series in the form of the targets.
struct Series {
    /// Sorted, with the profile's name, at most [`MAX_LABELS`].
    labels: Vec<(String, String)>,
    /// The names of those beyond the limit.
    dropped: Vec<String>,
}

/// Returns the labels of a series. Beyond the limit, labels of the rule and of pods are the first to go, the last name first.
fn series(types: &[String], mut labels: BTreeMap<String, String>) -> Series {
    // The name under which a client pushed the profile, or the one of its sample types.
    let name = labels.remove(PROFILE_NAME).unwrap_or_else(|| {
        let types: Vec<&str> = types.iter().map(String::as_str).collect();
        ProfileType::name_of(&types).to_owned()
    });
    labels.insert("__name__".to_owned(), name);
    let mut dropped = Vec::new();
    while labels.len() > MAX_LABELS {
        let of_rule = labels
            .keys()
            .rev()
            .find(|name| !labels::RESERVED.contains(&name.as_str()) && *name != "__name__");
        let Some(last) = of_rule.or_else(|| labels.keys().next_back()).cloned() else { break };
        labels.remove(&last);
        dropped.push(last);
    }
    Series { labels: labels.into_iter().collect(), dropped }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_labels_stay_when_a_series_has_too_many() {
        let mut many: BTreeMap<String, String> =
            (0..MAX_LABELS).map(|i| (format!("own_{i:02}"), "x".to_owned())).collect();
        many.insert(labels::SERVICE_NAME.to_owned(), "shop".to_owned());
        many.insert(labels::NODE.to_owned(), "n1".to_owned());
        let Series { labels: series, dropped } = series(&["samples".to_owned(), "cpu".to_owned()], many);
        assert_eq!(series.len(), MAX_LABELS);
        assert_eq!(dropped, ["own_29", "own_28", "own_27"]);
        for name in ["__name__", labels::SERVICE_NAME, labels::NODE, "own_00"] {
            assert!(series.iter().any(|(have, _)| have == name), "{name}");
        }
        assert!(series.is_sorted());
        assert!(series.contains(&("__name__".to_owned(), "process_cpu".to_owned())), "{series:?}");
    }

    #[test]
    fn a_pushed_profile_keeps_its_name() {
        let labels = BTreeMap::from([(PROFILE_NAME.to_owned(), "block".to_owned())]);
        let found = super::series(&["contentions".to_owned(), "delay".to_owned()], labels);
        assert_eq!(found.labels, [("__name__".to_owned(), "block".to_owned())]);
    }
}
