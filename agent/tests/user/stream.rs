//! The stream against a server with scripted answers, over real sockets.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use gannet_agent::{
    export::{Bounds, ExportConfig, Exporter, Spool, StreamStats},
    ledger::{Account, NodeLedger, Stage},
};
use gannet_proto::{
    connect::Dial,
    ingest::{
        Batch, PushRequest, PushResponse,
        batch::Piece,
        ingest_service_server::{IngestService, IngestServiceServer},
        push_request::Message as Request,
        push_response::{Accepted, Limits, Message as Response, Refused, Throttled},
    },
    ledger::LossReason,
    pprof::{self, Builder, Encoding, Header, Line, PIECES, PieceDecoder, Profile},
};
use tokio::{
    net::{TcpListener, TcpSocket},
    sync::mpsc,
    task::JoinHandle,
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Status, Streaming};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    Accept,
    /// Stores the batch and breaks the connection without an answer.
    AcceptAndBreak,
    /// Stores all samples of the batch but one, and says so.
    AcceptOneLess,
    /// Does not say how many samples it has stored, as a collector of an earlier version.
    AcceptUncounted,
    Refuse,
    Throttle,
    /// Ends the stream as a collector that cannot read a piece.
    LosePieces,
}

#[derive(Default)]
struct Seen {
    /// Next answers; if it is empty, the server accepts each batch.
    script: VecDeque<Answer>,
    /// Number of times that each batch arrived, by id.
    stored: BTreeMap<String, u64>,
    samples: u64,
    hellos: Vec<String>,
    refused: u64,
    throttled: Vec<(String, Instant)>,
    /// Encodings that the server reads beside gzip.
    encodings: Vec<String>,
    /// Profiles in the order of their arrival, pieces inflated.
    profiles: Vec<Vec<u8>>,
    /// Number and bytes of each piece.
    pieces: Vec<(u64, usize)>,
}

#[derive(Clone, Default)]
struct Server(Arc<Mutex<Seen>>);

#[tonic::async_trait]
impl IngestService for Server {
    type PushStream = ReceiverStream<Result<PushResponse, Status>>;

    async fn push(
        &self,
        request: tonic::Request<Streaming<PushRequest>>,
    ) -> Result<tonic::Response<Self::PushStream>, Status> {
        let (seen, mut requests) = (Arc::clone(&self.0), request.into_inner());
        let (answers, receiver) = mpsc::channel(8);
        tokio::spawn(async move {
            let mut frame = PieceDecoder::new().unwrap();
            while let Ok(Some(request)) = requests.message().await {
                let answer = match request.message {
                    Some(Request::Hello(hello)) => {
                        seen.lock().unwrap().hellos.push(hello.node);
                        let encodings = seen.lock().unwrap().encodings.clone();
                        Ok(Response::Limits(Limits { max_batch_bytes: 1000, max_in_flight: 2, encodings }))
                    }
                    Some(Request::Batch(batch)) => seen.lock().unwrap().answer(batch, &mut frame),
                    None => Err(Status::invalid_argument("no message")),
                };
                let answer = match answer {
                    Ok(answer) => answer,
                    Err(status) => {
                        let _ = answers.send(Err(status)).await;
                        return;
                    }
                };
                if answers.send(Ok(PushResponse { message: Some(answer) })).await.is_err() {
                    return;
                }
            }
        });
        Ok(tonic::Response::new(ReceiverStream::new(receiver)))
    }
}

impl Seen {
    fn answer(&mut self, batch: Batch, frame: &mut PieceDecoder) -> Result<Response, Status> {
        let Batch { batch_id, samples, pprof, piece, .. } = batch;
        let pprof = match piece {
            None => pprof,
            Some(Piece { number, bytes }) => {
                self.pieces.push((number, pprof.len()));
                frame.decode(number, bytes, &pprof).map_err(|error| Status::data_loss(error.to_string()))?
            }
        };
        self.profiles.push(pprof);
        let answer = self.script.pop_front().unwrap_or(Answer::Accept);
        let answered = match answer {
            Answer::LosePieces => return Err(Status::data_loss("told to lose pieces")),
            Answer::AcceptOneLess => {
                self.samples += samples - 1;
                let samples = Some(samples - 1);
                Response::Accepted(Accepted { batch_id, duplicate: false, samples })
            }
            Answer::AcceptUncounted => {
                Response::Accepted(Accepted { batch_id, duplicate: false, samples: None })
            }
            Answer::Accept | Answer::AcceptAndBreak => {
                let times = self.stored.entry(batch_id.clone()).or_default();
                *times += 1;
                let duplicate = *times > 1;
                if !duplicate {
                    self.samples += samples;
                }
                let samples = (!duplicate).then_some(samples);
                if answer == Answer::AcceptAndBreak {
                    return Err(Status::unavailable("told to break"));
                }
                Response::Accepted(Accepted { batch_id, duplicate, samples })
            }
            Answer::Refuse => {
                self.refused += samples;
                Response::Refused(Refused {
                    batch_id,
                    code: "not_pprof".to_owned(),
                    reason: "told to".to_owned(),
                })
            }
            Answer::Throttle => {
                self.throttled.push((batch_id.clone(), Instant::now()));
                Response::Throttled(Throttled {
                    batch_id,
                    retry_after: Some(Duration::from_millis(300).try_into().unwrap()),
                    reason: "told to".to_owned(),
                })
            }
        };
        Ok(answered)
    }
}

async fn serve(server: Server, address: SocketAddr) -> (SocketAddr, JoinHandle<()>) {
    serve_on(server, TcpListener::bind(address).await.unwrap())
}

fn serve_on(server: Server, listener: TcpListener) -> (SocketAddr, JoinHandle<()>) {
    let address = listener.local_addr().unwrap();
    let serving = tonic::transport::Server::builder()
        .add_service(IngestServiceServer::new(server))
        .serve_with_incoming(TcpListenerStream::new(listener));
    (address, tokio::spawn(async move { drop(serving.await) }))
}

struct Node {
    exporter: Exporter,
    ledger: NodeLedger,
    stats: Arc<StreamStats>,
}

fn start(dir: &Path, collector: Option<SocketAddr>) -> Node {
    let ledger = NodeLedger::new();
    let bounds = Bounds { bytes: 1 << 20, age: Duration::from_secs(3600) };
    let spool = Spool::open(dir, bounds, ledger.clone(), Arc::default()).unwrap();
    let config = ExportConfig {
        node: "n1".to_owned(),
        version: "test".to_owned(),
        collector: collector.map(|address| Dial { url: format!("http://{address}"), ..Dial::default() }),
    };
    let stats = Arc::new(StreamStats::default());
    let exporter = Exporter::start(config, spool, ledger.clone(), Arc::clone(&stats)).unwrap();
    Node { exporter, ledger, stats }
}

impl Node {
    fn submit(&self, samples: &[u64], bytes: usize) {
        self.ledger.take(samples.iter().sum());
        let batch = |&samples: &u64| Batch { samples, pprof: vec![1; bytes], ..Batch::default() };
        self.exporter.submit(samples.iter().map(batch).collect());
    }

    /// Submits a profile, as the pipeline encodes it.
    fn submit_profile(&self, profile: &Profile) {
        let samples = pprof::samples(profile);
        self.ledger.take(samples);
        let pprof = pprof::encode_as(profile, Encoding::Zstd);
        self.exporter.submit(vec![Batch { samples, pprof, ..Batch::default() }]);
    }

    fn lost(&self, reason: LossReason) -> u64 {
        self.ledger.snapshot().lost.get(&reason).copied().unwrap_or_default()
    }

    async fn delivered(&self, samples: u64) {
        self.until(|account| account.delivered >= samples).await;
    }

    /// Waits until all submitted batches are on disk; a busy disk takes its time.
    async fn written(&self) {
        self.until(|account| account.at_stage(Stage::Queue) == 0).await;
    }

    async fn until(&self, is_so: impl Fn(&Account) -> bool) {
        let waited = tokio::time::timeout(Duration::from_secs(60), async {
            while !is_so(&self.ledger.account_now()) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        assert!(waited.await.is_ok(), "{:?}", self.ledger.account_now());
    }
}

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);

#[tokio::test(flavor = "multi_thread")]
async fn each_submitted_batch_arrives_once() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::default();
    let (address, _serving) = serve(server.clone(), ANY).await;
    let node = start(dir.path(), Some(address));
    for _ in 0..5 {
        node.submit(&[1, 2, 3], 100);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(node.exporter.shutdown(Duration::from_secs(10)).await);
    let seen = server.0.lock().unwrap();
    assert_eq!((seen.samples, seen.stored.len(), seen.hellos.as_slice()), (30, 15, &["n1".to_owned()][..]));
    let snapshot = node.ledger.snapshot();
    assert_eq!((snapshot.delivered, snapshot.pending, snapshot.lost_total()), (30, 0, 0));
    assert!(snapshot.check().is_ok());
}

/// Returns a profile of two stacks with three samples.
fn profile() -> Profile {
    let types = [("samples", "count"), ("cpu", "nanoseconds")];
    let mut builder = Builder::new(Header {
        sample_types: &types,
        period_type: types[1],
        period: 10,
        time_nanos: 1,
        duration_nanos: 2,
    });
    for (name, count) in [("work", 1), ("wait", 2)] {
        let line = Line { name, system_name: name, file: "a.c", line: 1, column: 0, start_line: 1 };
        let location = builder.location(None, 0x1000, &[line]);
        builder.sample(&[location], &[count, count * 10], &[]);
    }
    builder.finish()
}

/// Checks that each collector receives the same samples: an earlier one as gzip, one that reads zstd as the spool has them.
#[rstest::rstest]
#[case::an_earlier_collector(&[], Encoding::Gzip)]
#[case::one_that_reads_zstd(&["later", "zstd"], Encoding::Zstd)]
#[tokio::test(flavor = "multi_thread")]
async fn a_profile_arrives_in_an_encoding_of_the_collector(
    #[case] encodings: &[&str],
    #[case] expected: Encoding,
) {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::default();
    server.0.lock().unwrap().encodings = encodings.iter().map(ToString::to_string).collect();
    let (address, _serving) = serve(server.clone(), ANY).await;
    let node = start(dir.path(), Some(address));
    node.submit_profile(&profile());
    node.delivered(3).await;
    let seen = server.0.lock().unwrap();
    assert_eq!(seen.profiles.iter().map(|bytes| Encoding::of(bytes)).collect::<Vec<_>>(), [Some(expected)]);
    assert_eq!(pprof::decode(&seen.profiles[0], 1 << 20).unwrap(), profile());
}

/// Returns a profile of one function in a file of its own.
fn profile_of(name: &str, file: &str) -> Profile {
    let types = [("samples", "count"), ("cpu", "nanoseconds")];
    let (period_type, period, time_nanos, duration_nanos) = (types[1], 10, 1, 2);
    let mut builder =
        Builder::new(Header { sample_types: &types, period_type, period, time_nanos, duration_nanos });
    let line = Line { name, system_name: name, file, line: 1, column: 0, start_line: 1 };
    let location = builder.location(None, 0x1000, &[line]);
    builder.sample(&[location], &[1, 10], &[]);
    builder.finish()
}

/// Returns the path of a file that zstd makes little smaller, of 500 bytes.
fn long_path() -> String {
    let digits = |n: u64| format!("{:016x}", (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (0..32).map(digits).collect::<String>()[..500].to_owned()
}

/// Checks that a profile repeats nothing of those before it, and that answers and breaks of all kinds lose and double nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_path_travels_once_for_each_stream() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::default();
    let path = long_path();
    {
        let mut seen = server.0.lock().unwrap();
        seen.encodings = vec!["zstd".to_owned(), PIECES.to_owned()];
        let (refuse, throttle, end) = (Answer::Refuse, Answer::Throttle, Answer::AcceptAndBreak);
        seen.script = [Answer::Accept, throttle, Answer::Accept, refuse, Answer::Accept, end].into();
    }
    let (address, _serving) = serve(server.clone(), ANY).await;
    let node = start(dir.path(), Some(address));
    let sent: Vec<Profile> = (0..10).map(|n| profile_of(&format!("f{n}"), &path)).collect();
    for profile in &sent {
        node.submit_profile(profile);
    }
    node.delivered(9).await;
    assert_eq!((node.lost(LossReason::Refused), node.stats.connects()), (1, 2));
    let seen = server.0.lock().unwrap();
    assert_eq!((seen.samples, seen.stored.len(), seen.refused), (9, 9, 1));
    let firsts: Vec<usize> = (0..seen.pieces.len()).filter(|at| seen.pieces[*at].0 == 1).collect();
    assert_eq!((firsts.len(), firsts[0], seen.pieces.len()), (2, 0, seen.profiles.len()));
    for (number, bytes) in &seen.pieces {
        assert_eq!(*number == 1, *bytes > 250, "piece {number} has {bytes} bytes");
    }
    let raw: Vec<Vec<u8>> = sent.iter().map(prost::Message::encode_to_vec).collect();
    assert!(raw.iter().all(|raw| seen.profiles.contains(raw)));
    assert!(seen.profiles.iter().all(|arrived| raw.contains(arrived)));
}

/// Checks that a fault of the pieces costs no profile: the agent then sends them as the spool has them.
#[tokio::test(flavor = "multi_thread")]
async fn after_an_unreadable_piece_profiles_travel_as_zstd() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::default();
    {
        let mut seen = server.0.lock().unwrap();
        seen.encodings = vec!["zstd".to_owned(), PIECES.to_owned()];
        seen.script = [Answer::Accept, Answer::LosePieces].into();
    }
    let (address, _serving) = serve(server.clone(), ANY).await;
    let node = start(dir.path(), Some(address));
    for _ in 0..5 {
        node.submit_profile(&profile());
    }
    node.delivered(15).await;
    let seen = server.0.lock().unwrap();
    assert_eq!((seen.samples, seen.stored.len(), node.stats.connects()), (15, 5, 2));
    assert!(seen.pieces.len() >= 2, "{:?}", seen.pieces);
    let plain = seen.profiles.iter().filter(|bytes| Encoding::of(bytes) == Some(Encoding::Zstd));
    assert_eq!(plain.count(), 4);
    assert!(node.ledger.snapshot().check().is_ok());
}

/// Checks that `delivered` is the collector's count: what it drops is missing, and is lost once the collector says why.
#[tokio::test(flavor = "multi_thread")]
async fn a_sample_that_the_collector_drops_is_unaccounted() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::default();
    let script = [Answer::AcceptOneLess, Answer::AcceptUncounted, Answer::Refuse, Answer::Accept];
    server.0.lock().unwrap().script = script.into();
    let (address, _serving) = serve(server.clone(), ANY).await;
    let node = start(dir.path(), Some(address));
    node.submit(&[5, 4, 1, 3], 100);
    node.delivered(11).await;
    assert!(node.exporter.shutdown(Duration::from_secs(10)).await);
    let ledger = node.ledger.snapshot();
    assert_eq!((ledger.taken, ledger.delivered, ledger.pending), (13, 11, 0));
    assert_eq!((node.lost(LossReason::Refused), ledger.unaccounted()), (1, 1), "{ledger}");
}

#[tokio::test(flavor = "multi_thread")]
async fn refused_and_too_large_batches_are_lost_and_not_resent() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::default();
    server.0.lock().unwrap().script = [Answer::Refuse].into();
    let (address, _serving) = serve(server.clone(), ANY).await;
    let node = start(dir.path(), Some(address));
    node.submit(&[5, 7], 100);
    node.submit(&[11], 1001);
    node.delivered(7).await;
    assert!(node.exporter.shutdown(Duration::from_secs(10)).await);
    assert_eq!(node.lost(LossReason::Refused), 5);
    assert_eq!(node.lost(LossReason::TooLarge), 11);
    assert_eq!(node.stats.refused(), BTreeMap::from([("not_pprof".to_owned(), 1)]));
    assert_eq!(server.0.lock().unwrap().refused, 5);
    assert!(node.ledger.snapshot().check().is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_throttled_batch_is_sent_again_after_the_delay() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::default();
    server.0.lock().unwrap().script = [Answer::Throttle].into();
    let (address, _serving) = serve(server.clone(), ANY).await;
    let node = start(dir.path(), Some(address));
    node.submit(&[9], 100);
    node.delivered(9).await;
    let seen = server.0.lock().unwrap();
    assert_eq!(seen.throttled.len(), 1);
    assert!(seen.throttled[0].1.elapsed() >= Duration::from_millis(300));
    assert_eq!(seen.stored.get(&seen.throttled[0].0), Some(&1));
    assert_eq!(node.stats.throttled(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn unanswered_batches_are_resent_with_the_same_id() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::default();
    server.0.lock().unwrap().script = [Answer::Accept, Answer::AcceptAndBreak].into();
    let (address, _serving) = serve(server.clone(), ANY).await;
    let node = start(dir.path(), Some(address));
    node.submit(&[1, 2, 4, 8], 100);
    node.delivered(15).await;
    let seen = server.0.lock().unwrap();
    assert_eq!((seen.samples, seen.stored.len()), (15, 4));
    assert_eq!(seen.stored.values().max(), Some(&2), "the unanswered batch was not sent again");
    assert!(node.stats.duplicates() >= 1 && node.stats.connects() == 2);
    assert!(node.ledger.snapshot().check().is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn profiles_wait_in_the_spool_for_the_next_run() {
    let dir = tempfile::tempdir().unwrap();
    // A reserved port without a listener so far.
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(ANY).unwrap();
    let address = socket.local_addr().unwrap();
    for collector in [None, Some(address)] {
        let node = start(dir.path(), collector);
        node.submit(&[3], 100);
        node.written().await;
        assert!(!node.exporter.shutdown(Duration::from_millis(500)).await);
        assert_eq!(node.lost(LossReason::Shutdown), 0);
        let snapshot = node.ledger.snapshot();
        assert!(snapshot.check().is_ok());
        assert_eq!((snapshot.delivered, snapshot.pending), (0, snapshot.taken));
    }
    let server = Server::default();
    let (address, _serving) = serve_on(server.clone(), socket.listen(16).unwrap());
    let node = start(dir.path(), Some(address));
    node.delivered(6).await;
    assert_eq!(server.0.lock().unwrap().stored.len(), 2);
    assert_eq!(node.ledger.account_now().inherited, 6);
    assert_eq!(node.ledger.account_now().at_stage(Stage::Wire), 0);
}
