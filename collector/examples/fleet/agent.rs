//! Agents that push batches over real connections.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, bail};
use gannet_proto::{
    ingest::{
        Batch, PushRequest, PushResponse, batch::Piece, ingest_service_client::IngestServiceClient,
        push_request, push_response::Message,
    },
    pprof::PieceEncoder,
};
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Streaming, transport::Channel};
use ulid::Ulid;

use super::profiles::Encoded;

/// Length of a window.
pub(crate) const WINDOW: Duration = Duration::from_secs(10);
/// Time until an agent sends a throttled batch again.
const RETRY: Duration = Duration::from_millis(100);

/// A pod of a service on a node, with the labels that an agent gives it.
#[derive(Clone, Copy)]
pub(crate) struct Pod {
    pub(crate) namespace: &'static str,
    pub(crate) service: u64,
    pub(crate) number: u64,
}

impl Pod {
    fn labels(&self) -> BTreeMap<String, String> {
        let Self { namespace, service, number } = self;
        [
            ("service_name", format!("{namespace}-{service}")),
            ("node", format!("node-{number}")),
            ("namespace", (*namespace).to_owned()),
            ("pod", format!("{namespace}-{service}-5d8f7c-{number}")),
            ("container", "main".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    /// Returns a batch of this pod.
    pub(crate) fn batch(&self, start: SystemTime, profile: &Encoded) -> Batch {
        Batch {
            batch_id: Ulid::from_datetime(start).to_string(),
            labels: self.labels(),
            pprof: profile.pprof.clone(),
            samples: profile.samples,
            start: Some(start.into()),
            duration: Some(prost_types::Duration { seconds: 10, nanos: 0 }),
            rule_id: "always".into(),
            revision: 7,
            reason: "always".into(),
            ..Batch::default()
        }
    }
}

/// Counts of all agents of one measurement.
#[derive(Default)]
pub(crate) struct Counts {
    /// Whether answers count.
    pub(crate) is_measuring: AtomicBool,
    pub(crate) throttled: AtomicU64,
    /// Times from the first sending of a batch to its acknowledgement.
    pub(crate) latencies: Mutex<Vec<Duration>>,
}

/// The stream of one agent.
pub(crate) struct Stream {
    requests: mpsc::Sender<PushRequest>,
    answers: Streaming<PushResponse>,
    /// Set: the agent sends pieces of one zstd frame.
    pieces: Option<PieceEncoder>,
    /// Batches without an answer, with the time when they were sent first.
    unanswered: HashMap<String, (Instant, Batch)>,
    counts: Arc<Counts>,
}

impl Stream {
    pub(crate) async fn open(
        channel: Channel,
        node: u64,
        in_flight: usize,
        as_pieces: bool,
        counts: Arc<Counts>,
    ) -> anyhow::Result<Self> {
        let (requests, receiver) = mpsc::channel(in_flight + 1);
        let hello = push_request::Hello {
            node: format!("node-{node}"),
            version: "measure".into(),
            at: Some(SystemTime::now().into()),
        };
        requests.send(PushRequest { message: Some(push_request::Message::Hello(hello)) }).await?;
        let mut client = IngestServiceClient::new(channel);
        let mut answers = client.push(ReceiverStream::new(receiver)).await?.into_inner();
        answers.message().await?.context("the stream ended before the limits")?;
        let pieces = as_pieces.then(|| PieceEncoder::new().context("no memory")).transpose()?;
        Ok(Self { requests, answers, pieces, unanswered: HashMap::new(), counts })
    }

    async fn send(&mut self, batch: Batch) -> anyhow::Result<()> {
        let id = batch.batch_id.clone();
        // The content is needed again only if the collector puts it off, which it does not while it keeps up.
        self.unanswered.insert(id, (Instant::now(), batch.clone()));
        self.transmit(batch).await
    }

    async fn transmit(&mut self, mut batch: Batch) -> anyhow::Result<()> {
        if let Some(encoder) = &mut self.pieces {
            let bytes = batch.pprof.len() as u64;
            let (number, pprof) =
                encoder.encode(&batch.pprof).context("a profile does not fit into a piece")?;
            batch.piece = Some(Piece { number, bytes });
            batch.pprof = pprof;
        }
        self.requests.send(PushRequest { message: Some(push_request::Message::Batch(batch)) }).await?;
        Ok(())
    }

    /// Waits for the next answer.
    async fn answer(&mut self) -> anyhow::Result<()> {
        match self.answers.message().await?.context("the collector ended the stream")?.message {
            Some(Message::Accepted(accepted)) => {
                let (began, _) =
                    self.unanswered.remove(&accepted.batch_id).context("an answer to an unknown batch")?;
                if self.counts.is_measuring.load(Ordering::Relaxed) {
                    self.counts.latencies.lock().push(began.elapsed());
                }
            }
            Some(Message::Throttled(throttled)) => {
                self.counts.throttled.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(RETRY).await;
                let again = self.unanswered.get(&throttled.batch_id).map(|(_, batch)| batch.clone());
                self.transmit(again.context("an answer to an unknown batch")?).await?;
            }
            Some(Message::Limits(_)) => {}
            other => bail!("unexpected answer: {other:?}"),
        }
        Ok(())
    }
}

/// Sends batches from this iterator, with this many unanswered ones, until all are acknowledged.
pub(crate) async fn push(
    mut stream: Stream,
    in_flight: usize,
    mut batches: impl Iterator<Item = Batch>,
) -> anyhow::Result<()> {
    let mut is_complete = false;
    loop {
        while !is_complete && stream.unanswered.len() < in_flight {
            match batches.next() {
                Some(batch) => stream.send(batch).await?,
                None => is_complete = true,
            }
        }
        if stream.unanswered.is_empty() {
            return Ok(());
        }
        stream.answer().await?;
    }
}

/// Sends one batch of each pod every ten seconds, as an agent does, without an end. `phase`: time until the first ones.
pub(crate) async fn agent(
    mut stream: Stream,
    pods: Vec<Pod>,
    profiles: Arc<Vec<Encoded>>,
    phase: Duration,
) -> anyhow::Result<()> {
    let mut next = tokio::time::Instant::now() + phase;
    let mut n = phase.as_millis() as usize;
    loop {
        tokio::time::sleep_until(next).await;
        next += WINDOW;
        for pod in &pods {
            n += 1;
            stream.send(pod.batch(SystemTime::now() - WINDOW, &profiles[n * 7919 % profiles.len()])).await?;
        }
        while !stream.unanswered.is_empty() {
            stream.answer().await?;
        }
    }
}
