//! Carries batches from the spool to the collector and takes its answers.

use std::{
    future::Future,
    pin::Pin,
    time::{Duration, Instant, SystemTime},
};

use gannet_proto::{
    connect::{self, Connection, Dial, DialError},
    ingest::{
        Batch, PushRequest, PushResponse, ingest_service_client::IngestServiceClient, push_request,
        push_response,
    },
    ledger::LossReason,
};
use tokio::{
    sync::mpsc::{self, error::TrySendError},
    task::{JoinHandle, block_in_place},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::Spool;
use crate::{
    backoff::Backoff,
    ledger::{NodeLedger, Stage},
};

/// Windows that wait to be written to the spool.
const QUEUE: usize = 8;
/// Before the collector has said its own limits.
const FIRST_IN_FLIGHT: u32 = 1;
const FIRST_BATCH_BYTES: u64 = 4 << 20;
/// Requests that are handed to the transport at one time, whatever the collector allows.
const MOST_IN_FLIGHT: u32 = 64;
/// How often batches that grow old are looked for while nothing comes.
const EXPIRY_PAUSE: Duration = Duration::from_secs(30);

/// A handle to the task that owns the spool.
pub struct Exporter {
    inbox: mpsc::Sender<Vec<Batch>>,
    ledger: NodeLedger,
    task: JoinHandle<()>,
}

impl Exporter {
    /// Starts the task. Without `dial` batches stay in the spool, within its bounds.
    pub fn start(
        spool: Spool,
        dial: Option<&Dial>,
        node: &str,
        ledger: NodeLedger,
    ) -> Result<Self, DialError> {
        let (inbox, batches) = mpsc::channel(QUEUE);
        let worker = Worker {
            spool,
            connection: dial.map(connect::connect).transpose()?,
            url: dial.map_or_else(String::new, |dial| dial.url.clone()),
            node: node.to_owned(),
            backoff: Backoff::default(),
            link: None,
            dialling: None,
            quiet_until: Instant::now(),
            refusals: 0,
        };
        Ok(Self { inbox, ledger, task: tokio::spawn(worker.run(batches)) })
    }

    /// A way to hand over batches, which are at [`Stage::Queue`]. Never waits: what finds no place is counted as lost.
    pub fn submitter(&self) -> impl FnMut(Vec<Batch>) + Send + use<> {
        let (inbox, ledger) = (self.inbox.clone(), self.ledger.clone());
        move |batches| {
            let samples = batches.iter().map(|batch| batch.samples).sum();
            if let Err(error) = inbox.try_send(batches) {
                let reason = match error {
                    TrySendError::Full(_) => LossReason::QueueFull,
                    TrySendError::Closed(_) => LossReason::Shutdown,
                };
                ledger.lose(Stage::Queue, reason, samples);
                tracing::warn!(samples, "a window is lost before the spool: {reason}");
            }
        }
    }

    /// Delivers what it can until the deadline; what is left stays in the spool for the next run. All submitters must
    /// be gone.
    pub async fn shutdown(self, deadline: Duration) {
        drop(self.inbox);
        if tokio::time::timeout(deadline, self.task).await.is_err() {
            tracing::info!("the collector did not take everything in time; the rest is in the spool");
        }
    }
}

type Dialling = Pin<
    Box<dyn Future<Output = Result<(mpsc::Sender<PushRequest>, Streaming<PushResponse>), Status>> + Send>,
>;

struct Worker {
    spool: Spool,
    connection: Option<Connection>,
    url: String,
    node: String,
    backoff: Backoff,
    link: Option<Link>,
    dialling: Option<Dialling>,
    /// Nothing is sent before: the collector asked for a pause, or could not be reached.
    quiet_until: Instant,
    refusals: u64,
}

struct Link {
    requests: mpsc::Sender<PushRequest>,
    answers: Streaming<PushResponse>,
    in_flight: u32,
    max_in_flight: u32,
    max_batch_bytes: u64,
}

impl Worker {
    async fn run(mut self, mut batches: mpsc::Receiver<Vec<Batch>>) {
        let mut expiry = tokio::time::interval(EXPIRY_PAUSE);
        let mut open = true;
        while open || (!self.spool.is_empty() && self.connection.is_some()) {
            self.pump();
            self.dial();
            let pause = tokio::time::sleep_until(self.quiet_until.into());
            let is_quiet = self.quiet_until > Instant::now();
            tokio::select! {
                window = batches.recv(), if open => match window {
                    Some(window) => {
                        // Synced to disk: a matter of milliseconds, for which a worker thread is set aside.
                        if let Err(error) = block_in_place(|| self.spool.append(window)) {
                            tracing::warn!("{error}");
                        }
                    }
                    None => open = false,
                },
                answer = async { match &mut self.link {
                    Some(link) => link.answers.message().await,
                    None => std::future::pending().await,
                } } => match answer {
                    Ok(Some(answer)) => self.answered(answer),
                    Ok(None) => self.hung_up("it ended the stream"),
                    Err(status) => self.hung_up(&connect::explain(&self.url, &status)),
                },
                dialled = async { match &mut self.dialling {
                    Some(dialling) => dialling.await,
                    None => std::future::pending().await,
                } } => {
                    self.dialling = None;
                    match dialled {
                        Ok((requests, answers)) => {
                            self.link = Some(Link {
                                requests,
                                answers,
                                in_flight: 0,
                                max_in_flight: FIRST_IN_FLIGHT,
                                max_batch_bytes: FIRST_BATCH_BYTES,
                            });
                        }
                        Err(status) => self.hung_up(&connect::explain(&self.url, &status)),
                    }
                },
                () = pause, if is_quiet => {}
                _ = expiry.tick() => block_in_place(|| self.spool.expire(SystemTime::now())),
            }
        }
    }

    fn dial(&mut self) {
        let Some(connection) = &self.connection else { return };
        if self.link.is_some()
            || self.dialling.is_some()
            || self.quiet_until > Instant::now()
            || self.spool.is_empty()
        {
            return;
        }
        let mut client = IngestServiceClient::new(connection.clone());
        let hello =
            push_request::Hello { node: self.node.clone(), version: gannet_proto::VERSION.to_owned() };
        self.dialling = Some(Box::pin(async move {
            let (requests, outgoing) = mpsc::channel(MOST_IN_FLIGHT as usize + 1);
            // PROOF: the channel is new and has room.
            let _ = requests.try_send(PushRequest { message: Some(push_request::Message::Hello(hello)) });
            let answers = client.push(ReceiverStream::new(outgoing)).await?.into_inner();
            Ok((requests, answers))
        }));
    }

    /// Sends as much as the collector allows.
    fn pump(&mut self) {
        if self.quiet_until > Instant::now() {
            return;
        }
        while let Some(link) = &mut self.link {
            if link.in_flight >= link.max_in_flight.min(MOST_IN_FLIGHT) {
                return;
            }
            let max_batch_bytes = link.max_batch_bytes;
            let Some(batch) = block_in_place(|| self.spool.next(max_batch_bytes)) else { return };
            let request = PushRequest { message: Some(push_request::Message::Batch(batch)) };
            if link.requests.try_send(request).is_err() {
                self.hung_up("it does not read any more");
                return;
            }
            link.in_flight += 1;
        }
    }

    fn answered(&mut self, answer: PushResponse) {
        use push_response::Message;
        let Some(link) = &mut self.link else { return };
        if !matches!(answer.message, Some(Message::Limits(_)) | None) {
            link.in_flight = link.in_flight.saturating_sub(1);
            self.backoff.reset();
        }
        match answer.message {
            Some(Message::Limits(limits)) => {
                link.max_in_flight = limits.max_in_flight.max(1);
                link.max_batch_bytes = limits.max_batch_bytes;
            }
            Some(Message::Accepted(accepted)) => {
                block_in_place(|| self.spool.accepted(&accepted.batch_id));
            }
            Some(Message::Refused(refused)) => {
                self.refusals += 1;
                // The first ones tell what is wrong; after that one in a thousand shows that it goes on.
                if self.refusals <= 5 || self.refusals.is_multiple_of(1000) {
                    tracing::warn!(
                        batch_id = refused.batch_id,
                        code = refused.code,
                        refusals = self.refusals,
                        "the collector refuses a profile: {}",
                        refused.reason
                    );
                }
                block_in_place(|| self.spool.refused(&refused.batch_id));
            }
            Some(Message::Throttled(throttled)) => {
                self.spool.release(&throttled.batch_id);
                let delay = throttled.retry_after.and_then(|delay| Duration::try_from(delay).ok());
                let delay = delay.unwrap_or(Duration::from_secs(1)).min(Duration::from_secs(60));
                self.quiet_until = Instant::now() + delay;
                tracing::info!("the collector asks for a pause of {delay:?}: {}", throttled.reason);
            }
            None => {}
        }
    }

    fn hung_up(&mut self, why: &str) {
        self.link = None;
        self.spool.release_all();
        let delay = self.backoff.next();
        self.quiet_until = Instant::now() + delay;
        tracing::warn!("profiles stay in the spool, next try in {delay:.1?}: {why}");
    }
}
