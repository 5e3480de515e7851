//! Pods from a kubelet that speaks real TLS and checks tokens, and does everything that a kubelet should not do.

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

/// A real answer: a Deployment of two pods with init container and side-car, a finished Job, a static pod, a Guaranteed
/// pod.
const REAL: &str = include_str!("../data/kubelet-pods-1.20.2.json");
const APP: &str = "d1a625c9b251e0501e0d269bc9eb6c619b4fdeaa8b16006fb981a715eae2c7cb";
const TOKEN: &str = "first-token";
/// How long anything may take on a busy machine.
const LONG: Duration = Duration::from_secs(60);

/// What the kubelet does with a request that has the right token.
#[derive(Clone, Debug)]
enum Manner {
    Answer(Bytes),
    Status(u16, &'static str),
    /// As many bytes of a list as are read.
    Endless,
    /// Half an answer, then the connection is cut.
    Cut(Bytes),
    /// Nothing at all.
    Silent,
}

struct Kubelet {
    address: SocketAddr,
    state: Arc<Inner>,
    files: TempDir,
}

struct Inner {
    manner: Mutex<Manner>,
    token: Mutex<String>,
    requests: AtomicUsize,
    sent: AtomicUsize,
}

/// Hands out connections after their TLS handshake.
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
    /// A certificate for 127.0.0.1, signed by an authority of its own.
    async fn start(manner: Manner) -> Self {
        let files = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new(["127.0.0.1".to_owned()]).unwrap().signed_by(&key, &authority).unwrap();
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
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Inner {
            manner: Mutex::new(manner),
            token: Mutex::new(TOKEN.into()),
            requests: AtomicUsize::new(0),
            sent: AtomicUsize::new(0),
        });
        let router = Router::new().route("/pods", get(answer)).with_state(Arc::clone(&state));
        let listener = TlsListener { listener, acceptor: TlsAcceptor::from(Arc::new(config)) };
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, state, files }
    }

    fn set(&self, manner: Manner) {
        *self.state.manner.lock().unwrap() = manner;
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
    let manner = state.manner.lock().unwrap().clone();
    match manner {
        Manner::Answer(bytes) => bytes.into_response(),
        Manner::Status(status, text) => (StatusCode::from_u16(status).unwrap(), text).into_response(),
        Manner::Cut(bytes) => {
            let half = bytes.slice(..bytes.len() / 2);
            let pieces = [Ok(half), Err(io::Error::other("cut"))];
            Body::from_stream(futures::stream::iter(pieces)).into_response()
        }
        Manner::Endless => {
            let piece = Bytes::from(format!("{{\"metadata\":{{\"name\":\"{}\"}}}},", "x".repeat(64 << 10)));
            let head = Bytes::from_static(b"{\"items\":[");
            // 200 MB.
            let pieces = std::iter::once(head).chain(std::iter::repeat_n(piece, 3200)).map(move |piece| {
                state.sent.fetch_add(piece.len(), SeqCst);
                Ok::<_, io::Error>(piece)
            });
            Body::from_stream(futures::stream::iter(pieces)).into_response()
        }
        Manner::Silent => std::future::pending().await,
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

fn real() -> Manner {
    Manner::Answer(Bytes::from_static(REAL.as_bytes()))
}

#[tokio::test]
async fn the_kubelets_pods_are_known_by_container() {
    let kubelet = Kubelet::start(real()).await;
    let following = Following::start(&kubelet.options());
    // Nobody takes the node for ready in between.
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
async fn only_the_right_kubelet_is_believed(
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
    // The token goes to nobody who is not trusted.
    assert_eq!(kubelet.requests(), 0);
}

#[rstest]
#[case::forbidden(
    Manner::Status(403, "Forbidden (user=system:serviceaccount:gannet:agent, verb=get, resource=nodes)"),
    &["nodes/pods", "serviceaccount:gannet:agent"]
)]
#[case::broken(Manner::Status(500, "disk on fire"), &["500", "disk on fire"])]
#[case::moved(Manner::Status(302, ""), &["302"])]
#[case::garbage(Manner::Answer(Bytes::from_static(b"<html>hello")), &["something else than pods"])]
#[case::other_json(Manner::Answer(Bytes::from_static(b"{\"kind\":\"Status\"}")), &["no `items`"])]
#[case::empty(Manner::Answer(Bytes::new()), &["something else than pods"])]
#[case::cut(Manner::Cut(Bytes::from_static(REAL.as_bytes())), &["the kubelet at https://127.0.0.1"])]
#[case::silent(Manner::Silent, &["did not answer within 1 s"])]
#[tokio::test]
async fn what_goes_wrong_is_told_and_got_over(#[case] manner: Manner, #[case] words: &[&str]) {
    let kubelet = Kubelet::start(manner).await;
    let following =
        Following::start(&PodFeedOptions { kubelet_timeout: Duration::from_secs(1), ..kubelet.options() });
    let error = following.until_error().await;
    for words in words {
        assert!(error.contains(words), "{error}");
    }
    assert!(!following.pods.is_synced());
    assert_eq!(following.names(APP), "Unknown");
    kubelet.set(real());
    // The bound of one second was for silence only.
    following.until("synced", |pods| pods.status().updates > 0).await;
    assert_eq!(following.names(APP), "default/checkout-6794f7b79-z5mvl/app");
    assert_eq!(following.pods.status().last_error, None);
}

#[tokio::test]
async fn a_kubelet_that_fails_later_takes_nothing_away() {
    let kubelet = Kubelet::start(real()).await;
    let following = Following::start(&kubelet.options());
    following.until("synced", |pods| pods.status().updates > 0).await;
    kubelet.set(Manner::Status(500, "later"));
    following.pods.request("somebody-new", "");
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
async fn an_unknown_container_is_asked_for_at_once_and_not_often() {
    let kubelet = Kubelet::start(Manner::Answer(Bytes::from_static(b"{\"items\":null}"))).await;
    let following = Following::start(&kubelet.options());
    following.until("synced", |pods| pods.status().updates > 0).await;
    let begun = Instant::now();
    let before = kubelet.requests();
    // Many that nobody knows, at the same time as one that starts.
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
    let kubelet = Kubelet::start(Manner::Endless).await;
    let before = peak_bytes();
    let following = Following::start(&kubelet.options());
    let error = following.until_error().await;
    assert!(error.contains("more than") || error.contains("did not answer within"), "{error}");
    assert!(kubelet.state.sent.load(SeqCst) < 120 << 20);
    // Names of 64 KiB are kept while the list is read, and there are as many as the bound on the answer allows.
    assert!(peak_bytes() - before < 256 << 20, "{} bytes more", peak_bytes() - before);
}

#[tokio::test]
async fn a_thousand_pods_take_little_memory() {
    let (answer, last) = many(250);
    let kubelet = Kubelet::start(Manner::Answer(answer)).await;
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

/// The real answer `times` over, with ids of their own; and the id of the last checkout's app.
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

/// The most memory that this process has had. Each test is a process of its own.
fn peak_bytes() -> usize {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[tokio::test]
async fn auto_takes_the_first_that_works_and_says_why_not_the_others() {
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
    // What is not there is no fault.
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
