//! The stream to the collector: batches leave the spool, and answers settle them there.
//!
//! A worker writes submitted batches to the spool; it syncs files and may wait for the disk. A task keeps the stream
//! connected and the in-flight window full; another worker performs its operations on the spool ([`super::disk`]).

use std::{
    collections::{BTreeMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    time::{Duration, Instant, SystemTime},
};

use gannet_base::format_duration;
use gannet_proto::{
    connect::{self, Dial, FileStamps},
    ingest::{
        Batch, PushRequest, PushResponse,
        batch::Piece,
        ingest_service_client::IngestServiceClient,
        push_request::{Hello, Message as Request},
        push_response::{Limits, Message as Response},
    },
    ledger::LossReason,
    pprof::{self, Encoding, PIECES, PIECES_WINDOW, PieceEncoder},
};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, watch};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tokio_util::task::TaskTracker;

use super::{
    Backoff, Spool,
    disk::{Disk, DiskWorker},
    explain, files_changed,
    spool::MAX_INFLATED,
};
use crate::{
    access::spawn_apart,
    ledger::{NodeLedger, Stage},
};

/// Windows that may wait for the disk. One arrives every few seconds, so a full queue means that the disk hangs.
const MAX_QUEUED_WINDOWS: usize = 16;
/// Upper limit of batches in flight, even if the collector allows more: each is held in memory.
const MAX_IN_FLIGHT: u32 = 64;
/// Time for a disk that answered until now to end its last operation.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// Time for the collector to send its limits, and to answer a batch.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest pause of a throttled stream.
const MAX_PAUSE: Duration = Duration::from_secs(60);
/// Interval at which the stream drops old batches and notices a silent collector.
const TICK: Duration = Duration::from_secs(5);
/// Code of a refusal for a batch whose parts the collector may accept.
const TOO_LARGE: &str = "too_large";
/// Interval between log lines of one kind; the counters show the rest.
const LOG_INTERVAL: Duration = Duration::from_secs(30);

/// Identity of the exporter, and the address of its collector.
#[derive(Clone, Debug)]
pub struct ExportConfig {
    /// Name of the node.
    pub node: String,
    /// Version of the agent.
    pub version: String,
    /// The collector. Without one, profiles stay in the spool within its bounds.
    pub collector: Option<Dial>,
}

/// Counters of the stream for metrics.
#[derive(Debug, Default)]
pub struct StreamStats {
    pub(crate) connected: AtomicBool,
    pub(crate) connects: AtomicU64,
    pub(crate) failures: AtomicU64,
    pub(crate) sent: AtomicU64,
    pub(crate) accepted: AtomicU64,
    pub(crate) duplicates: AtomicU64,
    pub(crate) throttled: AtomicU64,
    pub(crate) refused: Mutex<BTreeMap<String, u64>>,
}

impl StreamStats {
    /// Returns whether the collector has answered on the present connection.
    pub fn connected(&self) -> bool {
        self.connected.load(Relaxed)
    }

    /// Returns the number of connections that the collector answered.
    pub fn connects(&self) -> u64 {
        self.connects.load(Relaxed)
    }

    /// Returns the number of connections that failed or broke.
    pub fn failures(&self) -> u64 {
        self.failures.load(Relaxed)
    }

    /// Returns the number of batches sent, retries included.
    pub fn sent(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    /// Returns the number of acknowledged batches, duplicates included.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Relaxed)
    }

    /// Returns the number of acknowledged batches that the collector already had.
    pub fn duplicates(&self) -> u64 {
        self.duplicates.load(Relaxed)
    }

    /// Returns the number of batches that the collector deferred.
    pub fn throttled(&self) -> u64 {
        self.throttled.load(Relaxed)
    }

    /// Returns the numbers of refused batches by the code of the collector.
    pub fn refused(&self) -> BTreeMap<String, u64> {
        self.refused.lock().clone()
    }
}

/// Delivers profiles to the collector by way of the spool.
#[derive(Debug)]
pub struct Exporter {
    /// Emptied at shutdown, so that the spool's thread ends after the last queued window.
    queue: Mutex<Option<SyncSender<Vec<Batch>>>>,
    ledger: NodeLedger,
    stats: Arc<StreamStats>,
    shared: Arc<Shared>,
    /// Deadline of the shutdown.
    stop: watch::Sender<Option<Instant>>,
    tasks: TaskTracker,
    /// The worker of the stream's operations.
    workers: TaskTracker,
    log: Mutex<LogLimit>,
}

#[derive(Debug)]
struct Shared {
    /// Emptied at the end of the shutdown.
    worker: Mutex<Option<Arc<DiskWorker>>>,
    /// Wakes the stream after an append, and at the end of the spool's thread.
    appended: Notify,
    writer_done: AtomicBool,
}

impl Shared {
    /// Runs one operation on the spool on its worker, since it may touch the disk. Returns `None` after the shutdown.
    async fn with<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut Spool) -> T + Send + 'static,
    ) -> Option<T> {
        let worker = self.worker.lock().clone()?;
        worker.perform(operation).await
    }
}

impl Exporter {
    /// Starts the spool's thread, and the stream on the current tokio runtime.
    pub fn start(
        config: ExportConfig,
        spool: Spool,
        ledger: NodeLedger,
        stats: Arc<StreamStats>,
    ) -> std::io::Result<Self> {
        let (queue, submitted) = sync_channel(MAX_QUEUED_WINDOWS);
        let disk = Disk::new(spool);
        tokio::spawn(Disk::watch(Arc::downgrade(&disk)));
        let workers = TaskTracker::new();
        let shared = Arc::new(Shared {
            worker: Mutex::new(Some(Arc::new(DiskWorker::start(Arc::clone(&disk), workers.token())?))),
            appended: Notify::new(),
            writer_done: AtomicBool::new(false),
        });
        let (stop, stopped) = watch::channel(None);
        let tasks = TaskTracker::new();
        let (writer, token) = (Arc::clone(&shared), tasks.token());
        spawn_apart("gannet-spool", move || {
            write(&writer, &disk, &submitted);
            // The shutdown waits for the token: the spool must be free for the next run when it returns.
            drop(disk);
            drop(writer);
            drop(token);
        })?;
        workers.close();
        let stream = Stream {
            config,
            shared: Arc::clone(&shared),
            stats: Arc::clone(&stats),
            stop: stopped,
            may_send_pieces: true,
        };
        tasks.spawn(stream.run());
        tasks.close();
        Ok(Self {
            queue: Mutex::new(Some(queue)),
            ledger,
            stats,
            shared,
            stop,
            tasks,
            workers,
            log: Mutex::default(),
        })
    }

    /// Queues the profiles of a window, whose samples are at [`Stage::Window`]. Never waits: if the queue is full, the
    /// samples are lost and counted.
    pub fn submit(&self, batches: Vec<Batch>) {
        let samples = batches.iter().map(|batch| batch.samples).sum();
        self.ledger.pass(Stage::Window, Stage::Queue, samples);
        let queue = self.queue.lock();
        let reason = match queue.as_ref().map(|queue| queue.try_send(batches)) {
            Some(Ok(())) => return,
            Some(Err(TrySendError::Full(_))) => LossReason::QueueFull,
            Some(Err(TrySendError::Disconnected(_))) | None => LossReason::Shutdown,
        };
        self.ledger.lose(Stage::Queue, reason, samples);
        if let Some(suppressed) = self.log.lock().now() {
            tracing::warn!(samples, %reason, suppressed, "the spool did not accept the profiles of a window; is the disk slow?");
        }
    }

    /// Returns the counters for metrics.
    pub fn stats(&self) -> &Arc<StreamStats> {
        &self.stats
    }

    /// Ends the export: queued batches go to disk, and batches on disk to the collector as far as the time allows. The
    /// rest stays in the spool for the next run. Returns whether everything was delivered.
    pub async fn shutdown(&self, within: Duration) -> bool {
        self.queue.lock().take();
        let deadline = Instant::now() + within;
        self.stop.send_replace(Some(deadline));
        // A disk that hangs must not keep the agent from ending.
        let ended =
            tokio::time::timeout_at((deadline + Duration::from_secs(1)).into(), self.tasks.wait()).await;
        if !self.shared.writer_done.load(Relaxed) {
            let left = self.ledger.account_now().at_stage(Stage::Queue);
            self.ledger.lose(Stage::Queue, LossReason::Shutdown, left);
            tracing::warn!(
                samples = left,
                "the last windows were not written to disk in time; they are lost"
            );
        }
        if ended.is_err() {
            return false;
        }
        let is_empty = self.shared.with(|spool| spool.is_empty());
        let is_empty = tokio::time::timeout(CLOSE_TIMEOUT, is_empty).await;
        self.shared.worker.lock().take();
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, self.workers.wait()).await;
        is_empty.ok().flatten().unwrap_or(false)
    }
}

/// Body of the spool's writer.
fn write(shared: &Shared, disk: &Disk, submitted: &Receiver<Vec<Batch>>) {
    let mut log = LogLimit::default();
    while let Ok(batches) = submitted.recv() {
        if let Err(error) = disk.perform(|spool| spool.append(batches))
            && let Some(before) = log.now()
        {
            tracing::warn!(%error, suppressed = before, "profiles are lost");
        }
        shared.appended.notify_one();
    }
    shared.writer_done.store(true, Relaxed);
    shared.appended.notify_one();
}

struct Stream {
    config: ExportConfig,
    shared: Arc<Shared>,
    stats: Arc<StreamStats>,
    stop: watch::Receiver<Option<Instant>>,
    /// Cleared when a collector could not read a piece, so that a fault of this encoding cannot stop the export.
    may_send_pieces: bool,
}

/// Reasons for the end of a connection.
enum End {
    /// Everything is sent, and nothing more will be submitted.
    Done,
    /// The deadline of the shutdown has passed.
    Deadline,
    Broken(String),
}

impl Stream {
    async fn run(mut self) {
        let Some(dial) = self.config.collector.clone() else {
            tracing::info!(
                "no --endpoint is given: profiles stay on this node, within the bounds of the spool"
            );
            return self.keep_bounded().await;
        };
        let mut backoff = Backoff::new();
        let mut log = LogLimit::default();
        loop {
            let files = dial.stamps();
            let end = self.connection(&dial, &mut backoff).await;
            self.stats.connected.store(false, Relaxed);
            self.shared.with(Spool::release_all).await;
            match end {
                End::Done | End::Deadline => return,
                End::Broken(error) => {
                    self.stats.failures.fetch_add(1, Relaxed);
                    let wait = backoff.next();
                    if let Some(suppressed) = log.now() {
                        let retry_in = format_duration(Duration::from_secs(wait.as_secs()));
                        tracing::warn!(%error, retry_in, suppressed, "profiles wait in the spool");
                    }
                    if !self.pause(wait, &dial, &files).await {
                        return;
                    }
                    if dial.stamps() != files {
                        backoff.reset();
                    }
                }
            }
        }
    }

    /// Waits, at most until the files of the connection are not `files` any more. Returns false if the agent shuts down
    /// first: then it does not wait for a collector that did not answer before.
    async fn pause(&mut self, wait: Duration, dial: &Dial, files: &FileStamps) -> bool {
        let until = tokio::time::Instant::now() + wait;
        loop {
            let deadline = *self.stop.borrow_and_update();
            let finished = match deadline {
                Some(deadline) => {
                    let idle =
                        self.writer_done() && self.shared.with(|spool| spool.is_empty()).await != Some(false);
                    idle || deadline <= Instant::now() || tokio::time::Instant::from_std(deadline) < until
                }
                None => false,
            };
            if finished {
                self.until_written(deadline).await;
                return false;
            }
            tokio::select! {
                () = tokio::time::sleep_until(until) => return true,
                () = files_changed(dial, files) => return true,
                _ = self.stop.changed() => {}
                () = tokio::time::sleep(TICK) => {
                    self.shared.with(|spool| spool.expire(SystemTime::now())).await;
                }
            }
        }
    }

    /// Waits until the spool's thread has written all submitted batches.
    async fn until_written(&self, deadline: Option<Instant>) {
        let Some(deadline) = deadline else { return };
        while !self.writer_done() && Instant::now() < deadline {
            let woken = self.shared.appended.notified();
            drop(tokio::time::timeout_at(deadline.into(), woken).await);
        }
    }

    async fn keep_bounded(&mut self) {
        loop {
            let deadline = *self.stop.borrow_and_update();
            if deadline.is_some() {
                return self.until_written(deadline).await;
            }
            tokio::select! {
                _ = self.stop.changed() => {}
                () = tokio::time::sleep(TICK) => {
                    self.shared.with(|spool| spool.expire(SystemTime::now())).await;
                }
            }
        }
    }

    fn writer_done(&self) -> bool {
        self.shared.writer_done.load(Relaxed)
    }

    async fn connection(&mut self, dial: &Dial, backoff: &mut Backoff) -> End {
        let channel = match connect::connect(dial) {
            Ok(channel) => channel,
            Err(error) => return End::Broken(error.to_string()),
        };
        // Room for all batches in flight and the hello, so that sending never waits for the network.
        let (sender, outgoing) = mpsc::channel(MAX_IN_FLIGHT as usize + 1);
        let hello = Hello {
            node: self.config.node.clone(),
            version: self.config.version.clone(),
            at: Some(SystemTime::now().into()),
        };
        if sender.try_send(PushRequest { message: Some(Request::Hello(hello)) }).is_err() {
            return End::Broken("the stream did not accept the hello".to_owned());
        }
        let mut client = IngestServiceClient::new(channel);
        let opening = async {
            let mut answers = client.push(ReceiverStream::new(outgoing)).await?.into_inner();
            let first = answers.message().await?;
            Ok::<_, tonic::Status>((answers, first))
        };
        let opened = tokio::select! {
            opened = tokio::time::timeout(ANSWER_TIMEOUT, opening) => opened,
            () = stopped_at(&mut self.stop) => return End::Deadline,
        };
        let (answers, limits) = match opened {
            Ok(Ok((answers, Some(PushResponse { message: Some(Response::Limits(limits)) })))) => {
                (answers, limits)
            }
            Ok(Ok(_)) => {
                return End::Broken(format!(
                    "the server at {} did not send its limits; is it a collector?",
                    dial.url
                ));
            }
            Ok(Err(status)) => return End::Broken(explain(dial, &status).await),
            Err(_) => return End::Broken(format!("the collector at {} does not answer", dial.url)),
        };
        self.stats.connected.store(true, Relaxed);
        self.stats.connects.fetch_add(1, Relaxed);
        tracing::info!(collector = dial.url, "sending profiles to the collector");
        self.exchange(&dial.url, &sender, answers, &limits, backoff).await
    }

    /// Sends batches and settles answers until the connection ends.
    async fn exchange(
        &mut self,
        url: &str,
        sender: &mpsc::Sender<PushRequest>,
        answers: tonic::Streaming<PushResponse>,
        limits: &Limits,
        backoff: &mut Backoff,
    ) -> End {
        tokio::pin!(answers);
        let max_in_flight = limits.max_in_flight.clamp(1, MAX_IN_FLIGHT) as usize;
        let max_bytes = if limits.max_batch_bytes == 0 { u64::MAX } else { limits.max_batch_bytes };
        let mut wire = Wire::of(limits, self.may_send_pieces);
        let mut in_flight: HashSet<String> = HashSet::new();
        let mut last_answer = Instant::now();
        let mut paused_until = Instant::now();
        let mut refusals = LogLimit::default();
        loop {
            // Fill the window.
            while in_flight.len() < max_in_flight && paused_until <= Instant::now() {
                // Read before the spool, so that a batch appended between the two is not missed.
                let writer_done = self.writer_done();
                let Some(next) = self.shared.with(move |spool| spool.next(max_bytes)).await else {
                    return End::Deadline;
                };
                let Some(batch) = next else {
                    if in_flight.is_empty() && writer_done {
                        return End::Done;
                    }
                    break;
                };
                if in_flight.is_empty() {
                    last_answer = Instant::now();
                }
                in_flight.insert(batch.batch_id.clone());
                let batch = wire.encode(batch, max_bytes).await;
                if sender.send(PushRequest { message: Some(Request::Batch(batch)) }).await.is_err() {
                    // The answer stream has the reason.
                    break;
                }
                self.stats.sent.fetch_add(1, Relaxed);
            }
            let appended = self.shared.appended.notified();
            tokio::select! {
                answer = answers.next() => {
                    last_answer = Instant::now();
                    let message = match answer {
                        Some(Ok(answer)) => answer.message,
                        Some(Err(status)) => {
                            if status.code() == tonic::Code::DataLoss {
                                self.may_send_pieces = false;
                            }
                            return End::Broken(connect::explain(url, &status));
                        }
                        None => return End::Broken(format!("the collector at {url} ended the stream")),
                    };
                    match message {
                        Some(Response::Accepted(accepted)) => {
                            in_flight.remove(&accepted.batch_id);
                            backoff.reset();
                            let (id, samples) = (accepted.batch_id, accepted.samples);
                            let settled = self.shared.with(move |spool| spool.accepted(&id, samples)).await;
                            if settled == Some(true) {
                                self.stats.accepted.fetch_add(1, Relaxed);
                                self.stats.duplicates.fetch_add(u64::from(accepted.duplicate), Relaxed);
                            }
                        }
                        Some(Response::Refused(refused)) => {
                            in_flight.remove(&refused.batch_id);
                            let id = refused.batch_id.clone();
                            if refused.code == TOO_LARGE {
                                if self.shared.with(move |spool| spool.refused_as_too_large(&id)).await == Some(true) {
                                    self.count_refused(&refused.code);
                                }
                            } else if self.shared.with(move |spool| spool.refused(&id)).await == Some(true) {
                                self.count_refused(&refused.code);
                                if let Some(suppressed) = refusals.now() {
                                    tracing::warn!(
                                        batch_id = refused.batch_id, code = refused.code, reason = refused.reason,
                                        suppressed, "the collector refused a profile; its samples are lost"
                                    );
                                }
                            }
                        }
                        Some(Response::Throttled(throttled)) => {
                            in_flight.remove(&throttled.batch_id);
                            self.stats.throttled.fetch_add(1, Relaxed);
                            let asked = throttled.retry_after.and_then(|delay| Duration::try_from(delay).ok());
                            let delay = asked.unwrap_or(Duration::from_secs(1)).clamp(Duration::from_millis(10), MAX_PAUSE);
                            paused_until = paused_until.max(Instant::now() + delay);
                            let id = throttled.batch_id;
                            self.shared.with(move |spool| spool.release(&id)).await;
                        }
                        Some(Response::Limits(_)) | None => {}
                    }
                }
                () = appended => {}
                () = tokio::time::sleep_until(paused_until.into()), if paused_until > Instant::now() => {}
                () = tokio::time::sleep(TICK) => {
                    self.shared.with(|spool| spool.expire(SystemTime::now())).await;
                    if !in_flight.is_empty() && last_answer.elapsed() > ANSWER_TIMEOUT {
                        return End::Broken(format!("the collector at {url} does not answer"));
                    }
                }
                () = stopped_at(&mut self.stop) => return End::Deadline,
            }
        }
    }

    fn count_refused(&self, code: &str) {
        let mut refused = self.stats.refused.lock();
        // The collector chooses the code: one that invents codes must not grow the agent's metrics.
        let code = if refused.contains_key(code) || refused.len() < 32 { code } else { "other" };
        *refused.entry(code.to_owned()).or_default() += 1;
    }
}

/// The encoding of profiles on one stream. The spool has them in zstd.
enum Wire {
    Gzip,
    Zstd,
    /// The frame of the stream; `None` begins another one.
    Pieces(Option<Box<PieceEncoder>>),
}

impl Wire {
    fn of(limits: &Limits, may_send_pieces: bool) -> Self {
        let reads = |name: &str| limits.encodings.iter().any(|encoding| encoding == name);
        if may_send_pieces && reads(PIECES) {
            Self::Pieces(None)
        } else if reads(Encoding::Zstd.name()) {
            Self::Zstd
        } else {
            Self::Gzip
        }
    }

    async fn encode(&mut self, batch: Batch, max_bytes: u64) -> Batch {
        match self {
            Self::Gzip => with_gzip(batch).await,
            Self::Zstd => batch,
            Self::Pieces(frame) => as_piece(batch, max_bytes, frame).await,
        }
    }
}

/// Returns a batch whose profile is the next piece of the stream's frame. A profile that does not fit stays in zstd.
async fn as_piece(batch: Batch, max_bytes: u64, frame: &mut Option<Box<PieceEncoder>>) -> Batch {
    if batch.pprof.is_empty() {
        return batch;
    }
    let (kept, taken) = (batch.clone(), frame.take());
    let convert = move || {
        let mut encoder = match taken {
            Some(encoder) => encoder,
            None => Box::new(PieceEncoder::new()?),
        };
        let piece = pprof::inflate(&batch.pprof, PIECES_WINDOW).ok().and_then(|raw| {
            let (number, pprof) = encoder.encode(&raw)?;
            if pprof.len() as u64 > max_bytes {
                // The collector does not see this piece.
                encoder.restart();
                return None;
            }
            Some((Piece { number, bytes: raw.len() as u64 }, pprof))
        });
        let batch = match piece {
            Some((piece, pprof)) => Batch { piece: Some(piece), pprof, ..batch },
            None => batch,
        };
        Some((batch, encoder))
    };
    match tokio::task::spawn_blocking(convert).await {
        Ok(Some((batch, encoder))) => {
            *frame = Some(encoder);
            batch
        }
        _ => kept,
    }
}

/// Returns a batch whose profile is compressed with gzip, for a collector of an earlier version.
async fn with_gzip(batch: Batch) -> Batch {
    if Encoding::of(&batch.pprof) != Some(Encoding::Zstd) {
        return batch;
    }
    let kept = batch.clone();
    let convert = move || match pprof::to_gzip(&batch.pprof, MAX_INFLATED) {
        Ok(gzip) => Batch { pprof: gzip.into_owned(), ..batch },
        // The collector refuses it with a reason, and its samples are counted.
        Err(_) => batch,
    };
    tokio::task::spawn_blocking(convert).await.unwrap_or(kept)
}

/// Waits for the deadline of the shutdown.
async fn stopped_at(stop: &mut watch::Receiver<Option<Instant>>) {
    let deadline = match stop.wait_for(Option::is_some).await {
        Ok(deadline) => *deadline,
        Err(_) => return,
    };
    if let Some(deadline) = deadline {
        tokio::time::sleep_until(deadline.into()).await;
    }
}

/// Limits how often a log line is written.
#[derive(Debug, Default)]
struct LogLimit {
    last: Option<Instant>,
    suppressed: u64,
}

impl LogLimit {
    /// Returns the number of suppressed lines if a line may be written now.
    fn now(&mut self) -> Option<u64> {
        if self.last.is_some_and(|last| last.elapsed() < LOG_INTERVAL) {
            self.suppressed += 1;
            return None;
        }
        self.last = Some(Instant::now());
        Some(std::mem::take(&mut self.suppressed))
    }
}
