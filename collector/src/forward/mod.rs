//! Profiles are handed on to the profile databases that people run already: Pyroscope and Parca.
//!
//! What is handed on is durable here first, so a target that is away delays nobody: what waits for it is bounded, and
//! what does not fit, is too old, or is refused for good is counted by its reason and stays in the store. What a target
//! would refuse for its size is sent in parts.

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt as _;
use gannet_proto::{
    connect::{self, Connection, Dial, DialError},
    foreign::{
        parca::{self, profile_store_service_client::ProfileStoreServiceClient},
        pyroscope, pyroscope_types,
    },
    ingest::Batch,
    labels, pprof,
};
use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use prost::Message as _;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinHandle,
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::{ingest::MAX_INFLATION, metrics::Metrics, time};

/// What Pyroscope takes by default.
const MAX_BYTES: usize = 4 << 20;
const MAX_SAMPLES: usize = 16_000;
const MAX_LABELS: usize = 30;
/// Windows that began longer ago are outside of what Pyroscope ingests.
const MAX_AGE_MS: u64 = 3600 * 1000;
/// For one target.
const QUEUE_BYTES: usize = 64 << 20;
const QUEUE_PROFILES: usize = 10_000;
/// Profiles on their way to one target at a time.
const AT_ONCE: usize = 8;
const TIMEOUT: Duration = Duration::from_secs(30);
const LEAST_WAIT: Duration = Duration::from_millis(500);
const MOST_WAIT: Duration = Duration::from_secs(30);
/// Of an answer that says what is wrong.
const MAX_ANSWER: usize = 64 << 10;

/// Where profiles are handed on to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    kind: Kind,
    url: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pyroscope,
    Parca,
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            Kind::Pyroscope => "pyroscope",
            Kind::Parca => "parca",
        })?;
        write!(f, "={}", self.url)
    }
}

impl FromStr for Forward {
    type Err = String;

    /// `pyroscope=http://pyroscope:4040`, `parca=https://parca:7070`.
    fn from_str(text: &str) -> Result<Self, String> {
        let form = || {
            format!(
                "`{text}` is no target: write pyroscope=URL or parca=URL, for instance pyroscope=http://pyroscope:4040"
            )
        };
        let (kind, url) = text.split_once('=').ok_or_else(form)?;
        let kind = match kind {
            "pyroscope" => Kind::Pyroscope,
            "parca" => Kind::Parca,
            _ => return Err(form()),
        };
        let uri: http::Uri = url.parse().map_err(|_| form())?;
        if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
            return Err(form());
        }
        Ok(Self { kind, url: url.trim_end_matches('/').to_owned() })
    }
}

/// How targets are spoken to.
#[derive(Clone, Debug, Default)]
pub struct ForwardOptions {
    /// Whose profiles they are, for a Pyroscope with several tenants.
    pub tenant: Option<String>,
    /// A file with a bearer token, read again at each call.
    pub token_file: Option<PathBuf>,
    /// Whose certificates are trusted (PEM); none: the system's.
    pub ca: Option<PathBuf>,
}

/// Why profiles cannot be handed on at all.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The address or the certificates are wrong.
    #[error("--forward {target}: {source}")]
    Dial {
        /// Which target.
        target: String,
        /// In which way.
        #[source]
        source: DialError,
    },
    /// The certificates are wrong.
    #[error("--forward-ca: {0}")]
    Ca(String),
}

/// A profile that is to be handed on.
struct Item {
    id: String,
    labels: BTreeMap<String, String>,
    pprof: Bytes,
    start_ms: u64,
    _room: OwnedSemaphorePermit,
}

/// All targets.
pub(crate) struct Forwarder {
    targets: Vec<Target>,
    metrics: Metrics,
}

struct Target {
    name: &'static str,
    room: Arc<Semaphore>,
    queue: mpsc::Sender<Item>,
    /// In the queue or on their way.
    waiting: Arc<AtomicU64>,
}

/// A copy of what a profile is handed on with, made before the batch itself goes to the store.
pub(crate) struct Copied {
    id: String,
    labels: BTreeMap<String, String>,
    pprof: Bytes,
    start_ms: u64,
}

impl Forwarder {
    /// Starts a sender for each target. They end some time after `stop`, and count what they did not send.
    pub(crate) fn start(
        targets: &[Forward],
        options: &ForwardOptions,
        metrics: &Metrics,
        stop: &CancellationToken,
        patience: Duration,
    ) -> Result<(Self, Vec<JoinHandle<()>>), ForwardError> {
        let mut all = Self { targets: Vec::new(), metrics: metrics.clone() };
        let mut tasks = Vec::new();
        for target in targets {
            let sender = Arc::new(Sender {
                name: target.name(),
                to: To::new(target, options)?,
                options: options.clone(),
                metrics: metrics.clone(),
                waiting: Arc::default(),
            });
            let (queue, items) = mpsc::channel(QUEUE_PROFILES);
            let (name, waiting) = (target.name(), Arc::clone(&sender.waiting));
            all.targets.push(Target { name, room: Arc::new(Semaphore::new(QUEUE_BYTES)), queue, waiting });
            tasks.push(tokio::spawn(sender.run(items, stop.clone(), patience)));
        }
        Ok((all, tasks))
    }

    /// What is to be handed on of a batch, if anybody wants it and there is something.
    pub(crate) fn copy(&self, batch: &Batch) -> Option<Copied> {
        if self.targets.is_empty() || batch.pprof.is_empty() {
            return None;
        }
        Some(Copied {
            id: batch.batch_id.clone(),
            labels: batch.labels.clone(),
            pprof: Bytes::copy_from_slice(&batch.pprof),
            start_ms: batch.start.as_ref().and_then(time::to_ms)?,
        })
    }

    /// Hands it on, soon. Does not wait.
    pub(crate) fn offer(&self, Copied { id, labels, pprof, start_ms }: Copied) {
        for target in &self.targets {
            let bytes = u32::try_from(pprof.len().max(1)).unwrap_or(u32::MAX);
            let room = Arc::clone(&target.room).try_acquire_many_owned(bytes);
            let item = room.ok().map(|room| Item {
                id: id.clone(),
                labels: labels.clone(),
                pprof: pprof.clone(),
                start_ms,
                _room: room,
            });
            target.waiting.fetch_add(1, Relaxed);
            if item.is_none_or(|item| target.queue.try_send(item).is_err()) {
                target.waiting.fetch_sub(1, Relaxed);
                self.metrics.forward_lost(target.name, "queue_full", 1);
            }
        }
    }
}

impl Forward {
    fn name(&self) -> &'static str {
        match self.kind {
            Kind::Pyroscope => "pyroscope",
            Kind::Parca => "parca",
        }
    }
}

/// A way to a target.
enum To {
    /// The Connect protocol over HTTP/1.1, as Pyroscope's own clients speak it: it passes through every gateway.
    Pyroscope { client: Box<Client<HttpsConnector<HttpConnector>, Full<Bytes>>>, url: String },
    /// gRPC.
    Parca(Box<ProfileStoreServiceClient<Connection>>),
}

impl To {
    fn new(target: &Forward, options: &ForwardOptions) -> Result<Self, ForwardError> {
        let dial = Dial {
            url: target.url.clone(),
            // Asked for by name: it is written in the target's address.
            insecure: true,
            ca: options.ca.clone().filter(|_| target.url.starts_with("https")),
            token_file: options.token_file.clone(),
            ..Dial::default()
        };
        let wrong = |source| ForwardError::Dial { target: target.to_string(), source };
        match target.kind {
            Kind::Parca => {
                let connection = connect::connect(&dial).map_err(wrong)?;
                Ok(Self::Parca(Box::new(ProfileStoreServiceClient::new(connection))))
            }
            Kind::Pyroscope => {
                let mut roots = rustls::RootCertStore::empty();
                if target.url.starts_with("https") {
                    let pem = connect::authority(options.ca.as_deref()).map_err(wrong)?;
                    for cert in crate::tls::certificates_of(&pem).map_err(ForwardError::Ca)? {
                        // A bundle of the system may hold some that are not understood.
                        let _ = roots.add(cert);
                    }
                }
                let provider = Arc::new(rustls::crypto::ring::default_provider());
                let tls = rustls::ClientConfig::builder_with_provider(provider)
                    .with_safe_default_protocol_versions()
                    .map_err(|error| ForwardError::Ca(error.to_string()))?
                    .with_root_certificates(roots)
                    .with_no_client_auth();
                let https =
                    HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1().build();
                let client = Client::builder(TokioExecutor::new()).build(https);
                let url = format!("{}/push.v1.PusherService/Push", target.url);
                Ok(Self::Pyroscope { client: Box::new(client), url })
            }
        }
    }
}

/// What became of one part.
enum Sent {
    Taken,
    /// Later, perhaps.
    Not(String),
    /// Never.
    Refused(String),
}

struct Sender {
    name: &'static str,
    to: To,
    options: ForwardOptions,
    metrics: Metrics,
    waiting: Arc<AtomicU64>,
}

impl Sender {
    async fn run(
        self: Arc<Self>,
        mut items: mpsc::Receiver<Item>,
        stop: CancellationToken,
        patience: Duration,
    ) {
        let closing = stop.clone();
        let (feed, fed) = mpsc::channel(1);
        // What waits when the collector ends is still sent within its patience; nothing new comes.
        let feeding = tokio::spawn(async move {
            loop {
                tokio::select! {
                    item = items.recv() => match item {
                        Some(item) => if feed.send(item).await.is_err() { break },
                        None => break,
                    },
                    () = closing.cancelled() => {
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
        let send = ReceiverStream::new(fed).for_each_concurrent(AT_ONCE, move |item| {
            let this = Arc::clone(&this);
            async move {
                this.hand_on(item).await;
                this.waiting.fetch_sub(1, Relaxed);
            }
        });
        let over = async {
            stop.cancelled().await;
            tokio::time::sleep(patience).await;
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
                "not handed on before the end; they are in the store"
            );
        }
    }

    /// One profile, in as many parts as it takes, each until it is taken or given up.
    async fn hand_on(&self, item: Item) {
        let Item { id, labels, pprof, start_ms, _room } = item;
        let most = pprof.len().saturating_mul(MAX_INFLATION).max(1 << 20);
        let split = tokio::task::spawn_blocking(move || {
            let profile = pprof::decode(&pprof, most)?;
            let kind = kind_of(&profile);
            let parts: Vec<Bytes> = pprof::split(profile, MAX_SAMPLES, MAX_BYTES)
                .iter()
                .map(|part| (part.encoded_len(), pprof::encode(part)))
                // A single stack that is larger than all that is taken.
                .filter(|(inflated, _)| *inflated <= MAX_BYTES)
                .map(|(_, bytes)| bytes.into())
                .collect();
            Ok::<_, pprof::PprofError>((kind, parts))
        });
        let (kind, parts) = match split.await {
            Ok(Ok(split)) => split,
            Ok(Err(error)) => {
                tracing::warn!(profile = id, target = self.name, "a profile cannot be handed on: {error}");
                return self.metrics.forward_lost(self.name, "unreadable", 1);
            }
            Err(_) => return self.metrics.forward_lost(self.name, "shutdown", 1),
        };
        if parts.is_empty() {
            return self.metrics.forward_lost(self.name, "too_large", 1);
        }
        let series = series(kind, labels);
        for (number, part) in parts.iter().enumerate() {
            let id = part_id(&id, number);
            if let Err(reason) = self.deliver(&series, &id, part, start_ms).await {
                return self.metrics.forward_lost(self.name, reason, 1);
            }
        }
        self.metrics.forwarded(self.name, parts.len() as u64);
    }

    async fn deliver(
        &self,
        series: &[(String, String)],
        id: &str,
        pprof: &Bytes,
        start_ms: u64,
    ) -> Result<(), &'static str> {
        let mut wait = LEAST_WAIT;
        let mut told = false;
        loop {
            if time::now_ms().saturating_sub(start_ms) > MAX_AGE_MS {
                return Err("too_old");
            }
            let sent = tokio::time::timeout(TIMEOUT, self.send(series, id, pprof)).await;
            match sent.unwrap_or_else(|_| Sent::Not(format!("no answer within {} s", TIMEOUT.as_secs()))) {
                Sent::Taken => return Ok(()),
                Sent::Refused(why) => {
                    tracing::warn!(profile = id, target = self.name, "a profile is refused: {why}");
                    return Err("refused");
                }
                Sent::Not(why) => {
                    self.metrics.forward_retries(self.name);
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!(target = self.name, "profiles wait to be handed on: {why}");
                    }
                    // Between half and all of it, so that what waits does not come back all at once.
                    tokio::time::sleep(wait.mul_f64(jitter(id))).await;
                    wait = (wait * 2).min(MOST_WAIT);
                }
            }
        }
    }

    async fn send(&self, series: &[(String, String)], id: &str, pprof: &Bytes) -> Sent {
        match &self.to {
            To::Pyroscope { client, url } => {
                let labels = series.iter().map(|(name, value)| pyroscope_types::LabelPair {
                    name: name.clone(),
                    value: value.clone(),
                });
                let sample = pyroscope::RawSample { raw_profile: pprof.to_vec(), id: id.to_owned() };
                let message = pyroscope::PushRequest {
                    series: vec![pyroscope::RawProfileSeries {
                        labels: labels.collect(),
                        samples: vec![sample],
                    }],
                };
                let mut request = Request::builder()
                    .method(Method::POST)
                    .uri(url)
                    .header(header::CONTENT_TYPE, "application/proto")
                    .header("connect-protocol-version", "1")
                    .header(header::USER_AGENT, concat!("gannet-collector/", env!("CARGO_PKG_VERSION")));
                if let Some(tenant) = &self.options.tenant {
                    request = request.header("x-scope-orgid", tenant);
                }
                if let Some(file) = &self.options.token_file {
                    match tokio::fs::read_to_string(file).await {
                        Ok(token) => {
                            request =
                                request.header(header::AUTHORIZATION, format!("Bearer {}", token.trim()));
                        }
                        Err(error) => {
                            return Sent::Not(format!("--forward-token-file {}: {error}", file.display()));
                        }
                    }
                }
                let request = match request.body(Full::new(message.encode_to_vec().into())) {
                    Ok(request) => request,
                    Err(error) => return Sent::Refused(error.to_string()),
                };
                let answer = match client.request(request).await {
                    Ok(answer) => answer,
                    Err(error) => return Sent::Not(connect::innermost(&error)),
                };
                let status = answer.status();
                if status.is_success() {
                    return Sent::Taken;
                }
                let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
                let text =
                    body.map(|b| String::from_utf8_lossy(&b.to_bytes()).into_owned()).unwrap_or_default();
                let words = format!("{status}: {}", text.trim());
                let later = status.is_server_error()
                    || matches!(
                        status,
                        StatusCode::REQUEST_TIMEOUT
                            | StatusCode::TOO_MANY_REQUESTS
                            | StatusCode::UNAUTHORIZED
                    );
                if later { Sent::Not(words) } else { Sent::Refused(words) }
            }
            To::Parca(client) => {
                let labels = series
                    .iter()
                    .map(|(name, value)| parca::Label { name: name.clone(), value: value.clone() })
                    .collect();
                let request = parca::WriteRawRequest {
                    tenant: String::new(),
                    series: vec![parca::RawProfileSeries {
                        labels: Some(parca::LabelSet { labels }),
                        samples: vec![parca::RawSample { raw_profile: pprof.to_vec() }],
                    }],
                    // Addresses are those of the running process.
                    normalized: false,
                };
                match client.as_ref().clone().write_raw(request).await {
                    Ok(_) => Sent::Taken,
                    Err(status) => {
                        let words = status.to_string();
                        match status.code() {
                            Code::InvalidArgument
                            | Code::NotFound
                            | Code::PermissionDenied
                            | Code::FailedPrecondition
                            | Code::OutOfRange
                            | Code::Unimplemented
                            | Code::AlreadyExists => Sent::Refused(words),
                            _ => Sent::Not(words),
                        }
                    }
                }
            }
        }
    }
}

/// 0.5 to 1, from what is at hand: profiles that wait together have different ids.
fn jitter(id: &str) -> f64 {
    let hash = id.bytes().fold(time::now_ms(), |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    0.5 + (hash % 1000) as f64 / 2000.0
}

/// The first part has the profile's own id, so that one that is sent again after a restart is known.
fn part_id(id: &str, number: usize) -> String {
    if number == 0 { id.to_owned() } else { format!("{id}-{number}") }
}

/// What the target calls profiles of this kind.
fn kind_of(profile: &pprof::Profile) -> &'static str {
    let names = profile.sample_type.iter().filter_map(|kind| {
        usize::try_from(kind.r#type).ok().and_then(|at| profile.string_table.get(at)).map(String::as_str)
    });
    if names.into_iter().any(|name| name == "offcpu") { "off_cpu" } else { "process_cpu" }
}

/// The labels as targets want them: sorted, with the kind, and not too many. The rule's own labels are the first to go.
fn series(kind: &str, mut of: BTreeMap<String, String>) -> Vec<(String, String)> {
    of.insert("__name__".to_owned(), kind.to_owned());
    while of.len() > MAX_LABELS {
        let own =
            of.keys().rev().find(|name| !labels::RESERVED.contains(&name.as_str()) && *name != "__name__");
        let Some(own) = own.or_else(|| of.keys().next_back()).cloned() else { break };
        of.remove(&own);
    }
    of.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case("pyroscope=http://p:4040/", Some("pyroscope=http://p:4040"))]
    #[case("parca=https://parca:7070", Some("parca=https://parca:7070"))]
    #[case("otlp=http://x", None)]
    #[case("pyroscope=", None)]
    #[case("pyroscope=p:4040", None)]
    #[case("http://p:4040", None)]
    fn targets_are_read(#[case] text: &str, #[case] want: Option<&str>) {
        let found = text.parse::<Forward>();
        assert_eq!(found.as_ref().ok().map(ToString::to_string).as_deref(), want, "{found:?}");
    }

    #[test]
    fn there_are_never_more_labels_than_are_taken_and_the_known_ones_stay() {
        let mut many: BTreeMap<String, String> =
            (0..MAX_LABELS).map(|i| (format!("own_{i:02}"), "x".to_owned())).collect();
        many.insert(labels::SERVICE_NAME.to_owned(), "shop".to_owned());
        many.insert(labels::NODE.to_owned(), "n1".to_owned());
        let series = series("process_cpu", many);
        assert_eq!(series.len(), MAX_LABELS);
        for name in ["__name__", labels::SERVICE_NAME, labels::NODE, "own_00"] {
            assert!(series.iter().any(|(have, _)| have == name), "{name}");
        }
        assert!(series.is_sorted());
    }
}
