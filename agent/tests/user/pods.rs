//! Pods from a fake kubelet with real TLS and token checks, which also makes every mistake that a kubelet can make.

use std::{
    fs, io,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use gannet_agent::pods::{
    KUBELET_TIMEOUT, PodFeedKind, PodFeedOptions, PodLabelOptions, PodLookup, Pods, feeds, follow,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rstest::rstest;
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_util::sync::CancellationToken;

use crate::is_own_process;

/// A real answer: a Deployment of two pods with init container and side-car, a finished Job, a static pod, a Guaranteed
/// pod.
const REAL: &str = include_str!("../data/kubelet-pods-1.20.2.json");
const APP: &str = "d1a625c9b251e0501e0d269bc9eb6c619b4fdeaa8b16006fb981a715eae2c7cb";
const TOKEN: &str = "first-token";
/// Time limit of a step on a busy machine.
const LONG: Duration = Duration::from_secs(60);

/// How the kubelet answers a request with the right token.
#[derive(Clone, Debug)]
enum Behavior {
    Answer(Bytes),
    Status(u16, &'static str),
    /// A list without end.
    Endless,
    /// Half an answer, then the end of the connection.
    Cut(Bytes),
    /// No answer.
    Silent,
}

struct Kubelet {
    address: SocketAddr,
    state: Arc<Inner>,
    files: TempDir,
}

struct Inner {
    behavior: Mutex<Behavior>,
    token: Mutex<String>,
    requests: AtomicUsize,
    sent: AtomicUsize,
}

/// Accepts connections and completes their TLS handshake.
struct TlsListener {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl axum::serve::Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            let Ok((stream, peer)) = self.listener.accept().await else { continue };
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, peer);
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl Kubelet {
    /// Starts a kubelet with a certificate for 127.0.0.1, signed by an authority of its own.
    async fn start(behavior: Behavior) -> Self {
        Self::start_at("127.0.0.1", &["127.0.0.1"], behavior).await
    }

    /// Starts a kubelet on this address, with a certificate for these names.
    async fn start_at(ip: &str, names: &[&str], behavior: Behavior) -> Self {
        let files = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new(names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
                .unwrap()
                .signed_by(&key, &authority)
                .unwrap();
        fs::write(files.path().join("ca.crt"), authority.pem()).unwrap();
        fs::write(files.path().join("kubelet.crt"), certificate.pem()).unwrap();
        fs::write(files.path().join("token"), format!("{TOKEN}\n")).unwrap();
        let other = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        fs::write(files.path().join("other.crt"), other.cert.pem()).unwrap();

        let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(
                vec![certificate.der().clone()],
                PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der())),
            )
            .unwrap();
        let listener = TcpListener::bind((ip, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Inner {
            behavior: Mutex::new(behavior),
            token: Mutex::new(TOKEN.into()),
            requests: AtomicUsize::new(0),
            sent: AtomicUsize::new(0),
        });
        let router = Router::new().route("/pods", get(answer)).with_state(Arc::clone(&state));
        let listener = TlsListener { listener, acceptor: TlsAcceptor::from(Arc::new(config)) };
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, state, files }
    }

    fn set(&self, behavior: Behavior) {
        *self.state.behavior.lock().unwrap() = behavior;
    }

    fn requests(&self) -> usize {
        self.state.requests.load(SeqCst)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    fn options(&self) -> PodFeedOptions {
        PodFeedOptions {
            only: Some(PodFeedKind::Kubelet),
            node: "test-node".into(),
            podinfo_sockets: vec![],
            kubelet_address: self.address.to_string(),
            kubelet_ca: self.file("ca.crt"),
            kubelet_certificate: None,
            kubelet_insecure: false,
            token_file: self.file("token"),
            kubelet_timeout: KUBELET_TIMEOUT,
            apiserver: false,
        }
    }
}

async fn answer(State(state): State<Arc<Inner>>, headers: HeaderMap) -> Response {
    state.requests.fetch_add(1, SeqCst);
    let wanted = format!("Bearer {}", state.token.lock().unwrap());
    let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    if given != Some(&wanted) {
        return (StatusCode::UNAUTHORIZED, "Unauthorized").into_response();
    }
    let behavior = state.behavior.lock().unwrap().clone();
    match behavior {
        Behavior::Answer(bytes) => bytes.into_response(),
        Behavior::Status(status, text) => (StatusCode::from_u16(status).unwrap(), text).into_response(),
        Behavior::Cut(bytes) => {
            let half = bytes.slice(..bytes.len() / 2);
            let pieces = [Ok(half), Err(io::Error::other("cut"))];
            Body::from_stream(futures::stream::iter(pieces)).into_response()
        }
        Behavior::Endless => {
            let piece = Bytes::from(format!("{{\"metadata\":{{\"name\":\"{}\"}}}},", "x".repeat(64 << 10)));
            let head = Bytes::from_static(b"{\"items\":[");
            // 200 MB.
            let pieces = std::iter::once(head).chain(std::iter::repeat_n(piece, 3200)).map(move |piece| {
                state.sent.fetch_add(piece.len(), SeqCst);
                Ok::<_, io::Error>(piece)
            });
            Body::from_stream(futures::stream::iter(pieces)).into_response()
        }
        Behavior::Silent => std::future::pending().await,
    }
}

/// Follows a kubelet until it is dropped.
struct Following {
    pods: Pods,
    cancel: CancellationToken,
}

impl Drop for Following {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

impl Following {
    fn start(options: &PodFeedOptions) -> Self {
        let pods = Pods::new(PodLabelOptions::default());
        let cancel = CancellationToken::new();
        tokio::spawn(follow(pods.clone(), feeds(options), options.only.is_some(), cancel.clone()));
        Self { pods, cancel }
    }

    #[track_caller]
    fn names(&self, container: &str) -> String {
        match self.pods.look_up(container, "") {
            PodLookup::Known { pod, container } => {
                format!("{}/{}/{}", pod.namespace, pod.name, container.as_deref().unwrap_or("-"))
            }
            other => format!("{other:?}"),
        }
    }

    async fn until(&self, what: &str, holds: impl Fn(&Pods) -> bool) {
        let until = Instant::now() + LONG;
        while !holds(&self.pods) {
            assert!(Instant::now() < until, "never {what}: {:?}", self.pods.status());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn until_error(&self) -> String {
        self.until("an error", |pods| pods.status().last_error.is_some()).await;
        self.pods.status().last_error.unwrap()
    }
}

fn real() -> Behavior {
    Behavior::Answer(Bytes::from_static(REAL.as_bytes()))
}

#[tokio::test]
async fn the_kubelets_pods_are_known_by_container() {
    let kubelet = Kubelet::start(real()).await;
    let following = Following::start(&kubelet.options());
    // The node must not become ready before the first answer.
    assert!(!following.pods.is_synced());
    following.until("synced", |pods| pods.status().updates > 0).await;
    assert!(following.pods.is_synced());
    assert_eq!(following.names(APP), "default/checkout-6794f7b79-z5mvl/app");
    let status = following.pods.status();
    assert_eq!((status.kind, status.errors), (Some(PodFeedKind::Kubelet), 0));
    assert_eq!(following.pods.listed().len(), 5);
}

#[rstest]
#[case::signed("ca.crt", None, false, "")]
#[case::pinned("missing", Some("kubelet.crt"), false, "")]
#[case::insecure("missing", None, true, "")]
#[case::other_authority("other.crt", None, false, "--kubelet-ca")]
#[case::other_certificate("ca.crt", Some("other.crt"), false, "--kubelet-certificate")]
#[case::no_authority("missing", None, false, "cluster's authority")]
#[case::no_pem("token", None, false, "no certificate in PEM")]
#[tokio::test]
async fn only_a_trusted_kubelet_gets_the_token(
    #[case] ca: &str,
    #[case] certificate: Option<&str>,
    #[case] insecure: bool,
    #[case] words: &str,
) {
    let kubelet = Kubelet::start(real()).await;
    let following = Following::start(&PodFeedOptions {
        kubelet_ca: kubelet.file(ca),
        kubelet_certificate: certificate.map(|name| kubelet.file(name)),
        kubelet_insecure: insecure,
        ..kubelet.options()
    });
    if words.is_empty() {
        following.until("synced", |pods| pods.status().updates > 0).await;
        return;
    }
    let error = following.until_error().await;
    assert!(error.contains(words), "{error}");
    assert!(!following.pods.is_synced());
    // The agent must not send the token to a server that it does not trust.
    assert_eq!(kubelet.requests(), 0);
}

#[rstest]
#[case::ipv6("::1", "[::1]:PORT", &["::1"], "")]
#[case::ipv6_by_url("::1", "https://[::1]:PORT/", &["::1"], "")]
#[case::by_host_name("127.0.0.1", "localhost:PORT", &["localhost"], "")]
#[case::host_name_with_a_certificate_for_the_address("127.0.0.1", "localhost:PORT", &["127.0.0.1"], "")]
#[case::address_with_a_certificate_for_the_node("127.0.0.1", "127.0.0.1:PORT", &["test-node"], "")]
#[case::ipv6_with_a_certificate_for_the_node("::1", "[::1]:PORT", &["test-node"], "")]
#[case::another_node("127.0.0.1", "127.0.0.1:PORT", &["other-node"], "--kubelet-address")]
#[case::another_address("::1", "[::1]:PORT", &["::2"], "--kubelet-address")]
#[case::another_name("127.0.0.1", "localhost:PORT", &["localhost.example"], "--kubelet-address")]
#[tokio::test]
async fn kubelets_are_known_by_name_or_address(
    #[case] ip: &str,
    #[case] address: &str,
    #[case] names: &[&str],
    #[case] words: &str,
) {
    let kubelet = Kubelet::start_at(ip, names, real()).await;
    let kubelet_address = address.replace("PORT", &kubelet.address.port().to_string());
    let following = Following::start(&PodFeedOptions { kubelet_address, ..kubelet.options() });
    if words.is_empty() {
        following.until("synced", |pods| pods.status().updates > 0).await;
        return;
    }
    let error = following.until_error().await;
    assert!(error.contains(words) && error.contains(names[0]), "{error}");
    assert_eq!(kubelet.requests(), 0, "a stranger got the token");
}

#[rstest]
#[case::forbidden(
    Behavior::Status(403, "Forbidden (user=system:serviceaccount:gannet:agent, verb=get, resource=nodes)"),
    &["nodes/pods", "serviceaccount:gannet:agent"]
)]
#[case::broken(Behavior::Status(500, "disk on fire"), &["500", "disk on fire"])]
#[case::moved(Behavior::Status(302, ""), &["302"])]
#[case::garbage(Behavior::Answer(Bytes::from_static(b"<html>hello")), &["something else than pods"])]
#[case::other_json(Behavior::Answer(Bytes::from_static(b"{\"kind\":\"Status\"}")), &["no `items`"])]
#[case::empty(Behavior::Answer(Bytes::new()), &["something else than pods"])]
#[case::cut(Behavior::Cut(Bytes::from_static(REAL.as_bytes())), &["the kubelet at https://127.0.0.1"])]
#[case::silent(Behavior::Silent, &["did not answer within 1 s"])]
#[tokio::test]
async fn failures_are_reported_and_overcome(#[case] behavior: Behavior, #[case] words: &[&str]) {
    let kubelet = Kubelet::start(behavior).await;
    let following =
        Following::start(&PodFeedOptions { kubelet_timeout: Duration::from_secs(1), ..kubelet.options() });
    let error = following.until_error().await;
    for words in words {
        assert!(error.contains(words), "{error}");
    }
    assert!(!following.pods.is_synced());
    assert_eq!(following.names(APP), "Unknown");
    kubelet.set(real());
    // The limit of one second serves the silent case only.
    following.until("synced", |pods| pods.status().updates > 0).await;
    assert_eq!(following.names(APP), "default/checkout-6794f7b79-z5mvl/app");
    assert_eq!(following.pods.status().last_error, None);
}

#[tokio::test]
async fn a_later_failure_keeps_the_known_pods() {
    let kubelet = Kubelet::start(real()).await;
    let following = Following::start(&kubelet.options());
    following.until("synced", |pods| pods.status().updates > 0).await;
    kubelet.set(Behavior::Status(500, "later"));
    following.pods.request("new-container", "");
    assert!(following.until_error().await.contains("later"));
    assert_eq!(following.names(APP), "default/checkout-6794f7b79-z5mvl/app");
    assert!(following.pods.is_synced());
}

#[tokio::test]
async fn the_token_is_read_for_each_request() {
    let kubelet = Kubelet::start(real()).await;
    *kubelet.state.token.lock().unwrap() = "second-token".into();
    let following = Following::start(&kubelet.options());
    let error = following.until_error().await;
    assert!(error.contains("401") && error.contains("webhook"), "{error}");
    assert!(!error.contains(TOKEN), "{error}");
    fs::write(kubelet.file("token"), "second-token\n").unwrap();
    following.until("synced", |pods| pods.status().updates > 0).await;
}

#[tokio::test]
async fn a_token_that_runs_out_costs_one_request() {
    let kubelet = Kubelet::start(real()).await;
    let following = Following::start(&kubelet.options());
    following.until("synced", |pods| pods.status().updates > 0).await;
    // The kubelet knows the new token only, and the file has it a moment later.
    *kubelet.state.token.lock().unwrap() = "second-token".into();
    following.pods.request("new-container", "");
    following.until_error().await;
    fs::write(kubelet.file("token"), "second-token\n").unwrap();
    let begun = Instant::now();
    following.until("synced again", |pods| pods.status().last_error.is_none()).await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    let status = following.pods.status();
    assert_eq!((status.kind, status.errors), (Some(PodFeedKind::Kubelet), 1));
}

#[tokio::test]
async fn an_unknown_container_is_requested_at_once_but_rarely() {
    let kubelet = Kubelet::start(Behavior::Answer(Bytes::from_static(b"{\"items\":null}"))).await;
    let following = Following::start(&kubelet.options());
    following.until("synced", |pods| pods.status().updates > 0).await;
    let begun = Instant::now();
    let before = kubelet.requests();
    // Many unlisted containers, and one that starts at the same time.
    for n in 0..500 {
        following.pods.request(&format!("sandbox-{n}"), "");
    }
    following.pods.request(APP, "");
    kubelet.set(real());
    following
        .until("the container known", |pods| {
            pods.request(APP, "");
            matches!(pods.look_up(APP, ""), PodLookup::Known { .. })
        })
        .await;
    let asked = kubelet.requests() - before;
    let at_most = 2 + begun.elapsed().as_secs() as usize;
    assert!((1..=at_most).contains(&asked), "{asked} requests in {:?}", begun.elapsed());
}

#[tokio::test]
async fn an_endless_answer_is_not_read_to_its_end() {
    if !is_own_process("pods::an_endless_answer_is_not_read_to_its_end") {
        return;
    }
    let kubelet = Kubelet::start(Behavior::Endless).await;
    let before = peak_bytes();
    let following = Following::start(&kubelet.options());
    let error = following.until_error().await;
    assert!(error.contains("more than") || error.contains("did not answer within"), "{error}");
    assert!(kubelet.state.sent.load(SeqCst) < 120 << 20);
    // The parser keeps names of 64 KiB, up to the limit for an answer.
    assert!(peak_bytes() - before < 256 << 20, "{} bytes more", peak_bytes() - before);
}

#[tokio::test]
async fn a_thousand_pods_take_little_memory() {
    if !is_own_process("pods::a_thousand_pods_take_little_memory") {
        return;
    }
    let (answer, last) = many(250);
    let kubelet = Kubelet::start(Behavior::Answer(answer)).await;
    let before = peak_bytes();
    let begun = Instant::now();
    let following = Following::start(&kubelet.options());
    following.until("synced", |pods| pods.status().updates > 0).await;
    let took = begun.elapsed();
    assert_eq!(following.pods.listed().len(), 1250);
    assert_eq!(following.names(&last), "default/checkout-6794f7b79-z5mvl/app");
    let more = peak_bytes() - before;
    eprintln!("1,250 pods: {took:?}, {more} bytes more at the peak");
    assert!(more < 48 << 20, "{more} bytes more");
}

/// Returns the real answer repeated `times` with different ids, and the id of the last checkout's app.
fn many(times: usize) -> (Bytes, String) {
    let mut list: serde_json::Value = serde_json::from_str(REAL).unwrap();
    let template = list["items"].as_array().unwrap().clone();
    let mut last = String::new();
    let mut items = Vec::new();
    for n in 0..times {
        let mark = format!("{n:08x}");
        last = format!("{mark}{}", &APP[8..]);
        for pod in &template {
            let mut text = pod.to_string();
            let uid = pod["metadata"]["uid"].as_str().unwrap();
            text = text.replace(uid, &format!("{mark}{}", &uid[8..]));
            for part in text.clone().split("containerd://").skip(1) {
                let id = &part[..64];
                text = text.replace(id, &format!("{mark}{}", &id[8..]));
            }
            items.push(serde_json::from_str(&text).unwrap());
        }
    }
    list["items"] = serde_json::Value::Array(items);
    (Bytes::from(list.to_string()), last)
}

/// Returns the peak of this process's memory.
fn peak_bytes() -> usize {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[tokio::test]
async fn auto_follows_the_first_feed_that_works() {
    let kubelet = Kubelet::start(real()).await;
    let socket = kubelet.file("no.sock");
    let options = PodFeedOptions { only: None, podinfo_sockets: vec![socket], ..kubelet.options() };
    let following = Following::start(&options);
    following.until("synced", |pods| pods.status().updates > 0).await;
    let status = following.pods.status();
    assert_eq!(status.kind, Some(PodFeedKind::Kubelet));
    let (kind, why) = &status.passed_over[0];
    assert_eq!(*kind, PodFeedKind::PodInfo);
    assert!(why.contains("no socket at") && why.contains("no.sock"), "{why}");
    // A missing socket is no fault.
    assert_eq!(status.errors, 0);
}

#[tokio::test]
async fn a_machine_without_kubernetes_is_ready_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let missing = directory.path().join("missing");
    let following = Following::start(&PodFeedOptions {
        podinfo_sockets: vec![missing.clone()],
        kubelet_address: "127.0.0.1:1".into(),
        token_file: missing,
        kubelet_timeout: Duration::from_secs(1),
        ..PodFeedOptions::default()
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(following.pods.is_synced());
    let status = following.pods.status();
    assert_eq!((status.kind, status.errors, status.awaited), (None, 0, false));
}
