//! Forwarding, to servers that record what they receive.

use std::{
    collections::VecDeque,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
};

use axum::{Router, body::Bytes, extract::State, http::HeaderMap, routing::post};
use gannet_collector::{Collector, Running};
use gannet_proto::{
    foreign::{
        parca::{
            WriteRawRequest, WriteRawResponse,
            profile_store_service_server::{ProfileStoreService, ProfileStoreServiceServer},
        },
        pyroscope::PushRequest,
    },
    ingest::Batch,
    labels,
    pprof::{self, Encoding},
};
use prost::Message as _;
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use crate::{
    support::{OFF_CPU, Pusher, batch, config_with, eventually, get, metric, now_ms, typed_batch},
    tls::{Authority, Pair},
};

/// A profile that a target received.
#[derive(Clone, Debug)]
struct Received {
    labels: Vec<(String, String)>,
    pprof: Vec<u8>,
    id: String,
}

#[derive(Clone, Default)]
struct Target {
    received: Arc<Mutex<Vec<Received>>>,
    headers: Arc<Mutex<Vec<HeaderMap>>>,
    /// Statuses of the next answers. After them the target accepts everything.
    script: Arc<Mutex<VecDeque<u16>>>,
}

impl Target {
    fn all(&self) -> Vec<Received> {
        self.received.lock().unwrap().clone()
    }

    async fn has(&self, n: usize) -> Vec<Received> {
        eventually("all profiles are forwarded", || async { self.all().len() >= n }).await;
        assert_eq!(self.all().len(), n);
        self.all()
    }

    /// Serves as Pyroscope, in plaintext.
    async fn pyroscope(&self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let router = self.router();
        tokio::spawn(async move { axum::serve(listener, router).await });
        addr
    }

    fn router(&self) -> Router {
        let push = async |State(target): State<Self>, headers: HeaderMap, body: Bytes| {
            target.headers.lock().unwrap().push(headers);
            if let Some(status) = target.script.lock().unwrap().pop_front() {
                return (axum::http::StatusCode::from_u16(status).unwrap(), "scripted".to_owned());
            }
            for series in PushRequest::decode(body).unwrap().series {
                let labels: Vec<_> = series.labels.into_iter().map(|l| (l.name, l.value)).collect();
                for sample in series.samples {
                    let (pprof, id) = (sample.raw_profile, sample.id);
                    target.received.lock().unwrap().push(Received { labels: labels.clone(), pprof, id });
                }
            }
            (axum::http::StatusCode::OK, String::new())
        };
        Router::new().route("/push.v1.PusherService/Push", post(push)).with_state(self.clone())
    }
}

#[tonic::async_trait]
impl ProfileStoreService for Target {
    async fn write_raw(
        &self,
        request: Request<WriteRawRequest>,
    ) -> Result<Response<WriteRawResponse>, Status> {
        if self.script.lock().unwrap().pop_front().is_some() {
            return Err(Status::unavailable("scripted"));
        }
        self.headers.lock().unwrap().push(request.metadata().clone().into_headers());
        for series in request.into_inner().series {
            let labels: Vec<_> =
                series.labels.unwrap_or_default().labels.into_iter().map(|l| (l.name, l.value)).collect();
            for sample in series.samples {
                let received =
                    Received { labels: labels.clone(), pprof: sample.raw_profile, id: String::new() };
                self.received.lock().unwrap().push(received);
            }
        }
        Ok(Response::new(WriteRawResponse {}))
    }
}

async fn forwarding(dir: &Path, target: &str) -> Running {
    let config = config_with(dir, |config| {
        config.forward.forward = vec![target.parse().unwrap()];
        config.forward.forward_tenant = Some("team".into());
    });
    Collector::start(config).await.unwrap()
}

fn label<'a>(received: &'a Received, name: &str) -> &'a str {
    received.labels.iter().find(|(have, _)| have == name).map_or("", |(_, value)| value)
}

const LEDGER: &str = "ticks=9 taken=6 delivered=5 unaccounted=0 lost.ring_full=1";

/// Adds the comment with the ledger, and encodes the profile, as agents do.
fn with_ledger(mut batch: Batch) -> Batch {
    let mut profile = pprof::decode(&batch.pprof, 1 << 20).unwrap();
    profile.comment.push(profile.string_table.len() as i64);
    profile.string_table.push(format!("ledger {LEDGER}"));
    batch.pprof = pprof::encode_as(&profile, Encoding::Zstd);
    batch
}

#[tokio::test]
async fn pyroscope_gets_each_profile_once_with_labels_and_id() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::default();
    target.script.lock().unwrap().extend([503, 429]);
    let running = forwarding(dir.path(), &format!("pyroscope=http://{}", target.pyroscope().await)).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let sent = with_ledger(batch("shop", now_ms(), &[("main;work", 3), ("main", 2)]));
    pusher.store(sent.clone()).await;
    let received = target.has(1).await.remove(0);
    assert_eq!((label(&received, "__name__"), label(&received, "service_name")), ("process_cpu", "shop"));
    assert_eq!(label(&received, "node"), "n1");
    assert!(received.labels.is_sorted());
    assert_eq!(received.id, sent.batch_id);
    let profile = pprof::decode(&received.pprof, 1 << 20).unwrap();
    assert_eq!(pprof::check(&profile).unwrap().totals[0], 5);
    assert_eq!(&received.pprof[..2], &[0x1f, 0x8b], "gzip");
    let headers = target.headers.lock().unwrap()[0].clone();
    assert_eq!(headers["content-type"], "application/proto");
    assert_eq!(headers["x-scope-orgid"], "team");
    assert_eq!(headers["x-gannet-ledger"], LEDGER);

    // A duplicate is not forwarded again, and off-CPU profiles have a name of their own.
    pusher.push(sent).await;
    pusher.store(typed_batch(OFF_CPU, "shop", now_ms(), &[("main", 1)])).await;
    let received = target.has(2).await;
    assert_eq!(label(&received[1], "__name__"), "off_cpu");

    // A profile refused for good is counted and not sent again.
    target.script.lock().unwrap().push_back(400);
    pusher.store(batch("bad", now_ms(), &[("main", 1)])).await;
    pusher.store(batch("good", now_ms(), &[("main", 1)])).await;
    target.has(3).await;
    let counted = |what: &str| {
        let line = what.to_owned();
        let addr = running.http_addr;
        async move { get(addr, "/metrics").await.text().contains(&line) }
    };
    let lost = r#"gannet_collector_forward_lost_profiles_total{target="pyroscope",reason="refused"} 1"#;
    eventually("the refusal is counted", || counted(lost)).await;
    assert!(counted(r#"gannet_collector_forward_retries_total{target="pyroscope"} 2"#).await);
    running.shutdown().await;
}

/// Checks that no label is missing in silence: two series have the most labels that the collector takes, and the name of the profile
/// is one more.
#[tokio::test]
async fn labels_beyond_the_targets_limit_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::default();
    let running = forwarding(dir.path(), &format!("pyroscope=http://{}", target.pyroscope().await)).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    for (at, spare) in [(0, 1), (1, 0), (2, 0)] {
        let mut sent = batch("shop", now_ms() + at, &[("main", 1)]);
        let more = labels::MAX_LABELS - sent.labels.len() - spare;
        sent.labels.extend((0..more).map(|number| (format!("own_{number:02}"), "x".to_owned())));
        pusher.store(sent).await;
    }
    let received = target.has(3).await;
    for one in &received {
        assert_eq!((one.labels.len(), label(one, "service_name")), (labels::MAX_LABELS, "shop"));
    }
    let counted = r#"gannet_collector_forward_labels_dropped_total{target="pyroscope"} 2"#;
    let addr = running.http_addr;
    eventually("the two labels are counted", || async move {
        get(addr, "/metrics").await.text().contains(counted)
    })
    .await;
    running.shutdown().await;
}

/// A listener that speaks TLS.
struct TlsListener {
    tcp: TcpListener,
    acceptor: TlsAcceptor,
}

impl axum::serve::Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, addr) = self.tcp.accept().await.unwrap();
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, addr);
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.tcp.local_addr()
    }
}

impl TlsListener {
    async fn new(pair: &Pair) -> Self {
        let cert = CertificateDer::from_pem_slice(pair.cert.as_bytes()).unwrap();
        let key = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert], key)
            .unwrap();
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { tcp, acceptor: TlsAcceptor::from(Arc::new(config)) }
    }
}

/// Checks that the client of an https target trusts exactly the authorities of `--forward-ca`.
#[tokio::test]
async fn an_https_target_must_have_a_trusted_certificate() {
    let dir = tempfile::tempdir().unwrap();
    let (ca, target) = (Authority::new(), Target::default());
    let listener = TlsListener::new(&ca.sign("localhost")).await;
    let url = format!("pyroscope=https://localhost:{}", listener.tcp.local_addr().unwrap().port());
    let router = target.router();
    tokio::spawn(async move { axum::serve(listener, router).await });
    let start = async |name: &str, ca: &Authority| {
        let path = dir.path().join(format!("{name}.pem"));
        std::fs::write(&path, ca.pem()).unwrap();
        let config = config_with(&dir.path().join(name), |config| {
            config.forward.forward = vec![url.parse().unwrap()];
            config.forward.forward_ca = Some(path);
            config.server.shutdown_timeout = std::time::Duration::from_millis(100);
        });
        Collector::start(config).await.unwrap()
    };
    let stranger = start("stranger", &Authority::new()).await;
    Pusher::open(stranger.grpc_addr).await.store(batch("shop", now_ms(), &[("main", 1)])).await;
    eventually("the untrusted target is retried", || async {
        metric(stranger.http_addr, r#"gannet_collector_forward_retries_total{target="pyroscope"}"#).await
            > 0.0
    })
    .await;
    assert!(target.all().is_empty());
    stranger.shutdown().await;
    let running = start("friend", &ca).await;
    Pusher::open(running.grpc_addr).await.store(batch("shop", now_ms(), &[("main", 1)])).await;
    target.has(1).await;
    running.shutdown().await;
}

#[tokio::test]
async fn parts_of_a_large_profile_add_up_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::default();
    let running = forwarding(dir.path(), &format!("pyroscope=http://{}", target.pyroscope().await)).await;
    let stacks: Vec<(String, i64)> = (0..40_000).map(|i| (format!("main;f{i}"), 1)).collect();
    let stacks: Vec<(&str, i64)> = stacks.iter().map(|(stack, n)| (stack.as_str(), *n)).collect();
    let sent = batch("large", now_ms(), &stacks);
    Pusher::open(running.grpc_addr).await.store(sent.clone()).await;
    eventually("all parts are there", || async {
        let sum: i64 = target
            .all()
            .iter()
            .map(|r| pprof::check(&pprof::decode(&r.pprof, 8 << 20).unwrap()).unwrap().totals[0] as i64)
            .sum();
        sum == 40_000
    })
    .await;
    let parts = target.all();
    assert!(parts.len() >= 3, "{}", parts.len());
    for part in &parts {
        let profile = pprof::decode(&part.pprof, 8 << 20).unwrap();
        assert!(profile.sample.len() <= 16_000 && profile.encoded_len() <= 4 << 20);
        assert!(part.id.starts_with(&sent.batch_id));
    }
    running.shutdown().await;
}

/// Checks a stack that no part can hold, beside one that fits: the target gets the one, and the other is counted.
#[tokio::test]
async fn a_stack_that_the_target_cannot_take_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::default();
    let running = forwarding(dir.path(), &format!("pyroscope=http://{}", target.pyroscope().await)).await;
    // Text that hardly compresses, and text that compresses to nearly nothing.
    let mut state = 1_u64;
    let mut letter = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        char::from(b'a' + (state >> 60) as u8)
    };
    let large: String = (0..5 << 20).map(|_| letter()).collect();
    for large in [large, "x".repeat(5 << 20)] {
        let sent = batch("large", now_ms(), &[("main;small", 3), (&large, 2)]);
        Pusher::open(running.grpc_addr).await.store(sent).await;
    }
    for received in target.has(2).await {
        let profile = pprof::decode(&received.pprof, 8 << 20).unwrap();
        assert_eq!(pprof::check(&profile).unwrap().totals[0], 3);
    }
    let lost = "gannet_collector_forward_lost_profiles_total{target=\"pyroscope\",reason=\"too_large\"} 2";
    eventually("the other is counted", || async {
        get(running.http_addr, "/metrics").await.text().contains(lost)
    })
    .await;
    running.shutdown().await;
}

#[tokio::test]
async fn parca_gets_profiles_also_after_a_failure() {
    let dir = tempfile::tempdir().unwrap();
    let target = Target::default();
    target.script.lock().unwrap().push_back(1);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let server = tonic::transport::Server::builder()
        .add_service(ProfileStoreServiceServer::new(target.clone()))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    let running = forwarding(dir.path(), &format!("parca=http://{addr}")).await;
    let sent = with_ledger(batch("shop", now_ms(), &[("main;work", 3)]));
    Pusher::open(running.grpc_addr).await.store(sent).await;
    let received = target.has(1).await.remove(0);
    assert_eq!(target.headers.lock().unwrap()[0]["x-gannet-ledger"], LEDGER);
    assert_eq!((label(&received, "__name__"), label(&received, "service_name")), ("process_cpu", "shop"));
    let profile = pprof::decode(&received.pprof, 1 << 20).unwrap();
    assert_eq!(pprof::check(&profile).unwrap().totals[0], 3);
    running.shutdown().await;
}

#[tokio::test]
async fn a_missing_target_delays_neither_batches_nor_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let config = config_with(dir.path(), |config| {
        config.forward.forward = vec![format!("pyroscope=http://127.0.0.1:{port}").parse().unwrap()];
        config.server.shutdown_timeout = std::time::Duration::from_secs(2);
    });
    let running = Collector::start(config).await.unwrap();
    let mut pusher = Pusher::open(running.grpc_addr).await;
    for _ in 0..20 {
        pusher.store(batch("shop", now_ms(), &[("main", 1)])).await;
    }
    drop(pusher);
    let begin = std::time::Instant::now();
    running.shutdown().await;
    assert!(begin.elapsed() < std::time::Duration::from_secs(20));
}
