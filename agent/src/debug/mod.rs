//! What a node shows of itself: probes and metrics for the cluster, and on loopback a page for whoever looks into one
//! node.
//!
//! Nothing here changes state, but that `/debug/profile` samples what it is asked for, for as long as it is asked. The page answers only to a local name, so that a web page elsewhere cannot read it
//! through somebody's browser.

mod metrics;
mod views;

use std::{
    fmt::Write as _,
    io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use axum::{
    Router,
    extract::{Query, Request, State},
    http::{HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{Html, IntoResponse, Response},
    routing::get,
};
use gannet_proto::{
    control::{Match, capture},
    pprof,
};
use serde::Deserialize;
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;

use crate::{
    cgroup::find_container,
    engine::{EngineError, Manual},
    node::Node,
    output::{Details, Format, OutputError, render},
    pods::LONGEST_JOIN,
    rules::CaptureError,
};

/// `/debug/profile` requests that are served at one time.
const PROFILES_AT_ONCE: usize = 4;
/// How long the last window of `/debug/profile` may take to be named: the wait for the names of pods, and some.
const LAST_WINDOW: Duration = Duration::from_secs(10);
const _: () = assert!(LAST_WINDOW.as_secs() > LONGEST_JOIN.as_secs());
/// How long the last window of a capture may take to be named.
const NAMING: Duration = Duration::from_secs(30);
/// The longest that `/debug/profile` collects.
const LONGEST_PROFILE: u64 = 600;

/// Why a listener does not start.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}; give another address with --{flag}")]
pub struct ListenError {
    /// Where.
    pub address: SocketAddr,
    /// The flag that sets it.
    pub flag: &'static str,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

#[derive(Clone)]
struct Shared {
    node: Arc<Node>,
    profiles: Arc<Semaphore>,
}

/// Both listeners, open.
pub struct Listeners {
    probes: TcpListener,
    page: TcpListener,
}

impl Listeners {
    /// Opens the listeners, so that a port in use shows before anything else is started.
    pub async fn open(probes: SocketAddr, page: SocketAddr) -> Result<Self, ListenError> {
        let listen = async |address, flag| {
            TcpListener::bind(address).await.map_err(|source| ListenError { address, flag, source })
        };
        Ok(Self { probes: listen(probes, "http-listen").await?, page: listen(page, "debug-listen").await? })
    }

    /// Where the page is.
    pub fn page_address(&self) -> io::Result<SocketAddr> {
        self.page.local_addr()
    }

    /// Serves until cancelled.
    pub async fn serve(self, node: Arc<Node>, cancel: CancellationToken) {
        let shared = Shared { node, profiles: Arc::new(Semaphore::new(PROFILES_AT_ONCE)) };
        let probes = probes_router().with_state(shared.clone());
        let page = page_router().with_state(shared);
        let stop = |cancel: CancellationToken| async move { cancel.cancelled().await };
        let (probes, page) = tokio::join!(
            axum::serve(self.probes, probes).with_graceful_shutdown(stop(cancel.clone())),
            axum::serve(self.page, page).with_graceful_shutdown(stop(cancel)),
        );
        for error in [probes.err(), page.err()].into_iter().flatten() {
            tracing::error!("a listener has ended: {error}");
        }
    }
}

fn probes_router() -> Router<Shared> {
    Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(show_metrics))
}

fn page_router() -> Router<Shared> {
    Router::new()
        .route("/", get(|| async { Html(include_str!("page.html")) }))
        .route(
            "/page.css",
            get(|| async { ([(header::CONTENT_TYPE, "text/css")], include_str!("page.css")) }),
        )
        .route(
            "/page.js",
            get(|| async { ([(header::CONTENT_TYPE, "text/javascript")], include_str!("page.js")) }),
        )
        .route("/statusz", get(status))
        .route("/flagz", get(|State(shared): State<Shared>| async move { options(&shared.node) }))
        .route("/metrics", get(show_metrics))
        .route("/debug/rules", get(rules))
        .route("/debug/processes", get(processes))
        .route("/debug/pods", get(pods))
        .route("/debug/maps", get(maps))
        .route("/debug/ledger", get(ledger))
        .route("/debug/events", get(events))
        .route("/debug/flame", get(flame))
        .route("/debug/profile", get(profile))
        .route("/debug/bundle", get(bundle))
        .layer(middleware::from_fn(guard))
}

/// Returns the options in force as YAML; paths of secrets, never secrets.
fn options(node: &Node) -> String {
    node.config.options.to_yaml().unwrap_or_else(|error| error.to_string())
}

/// Local names only, and nothing that a page could be made to do for somebody else.
async fn guard(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("");
    if !is_local_host(host) {
        let words = "this page answers to localhost only: use kubectl port-forward, or ssh -L\n";
        return (StatusCode::FORBIDDEN, words).into_response();
    }
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.entry(header::CONTENT_SECURITY_POLICY).or_insert(HeaderValue::from_static(
        "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; frame-src 'self'",
    ));
    response
}

/// Whether a Host header names this machine: without a port, or with any.
fn is_local_host(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(""),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

async fn ready(State(shared): State<Shared>) -> Response {
    let node = &shared.node;
    let mut text = String::new();
    for reason in node.degraded() {
        let _ = writeln!(text, "degraded: {reason}");
    }
    match node.not_ready() {
        None => (StatusCode::OK, format!("ready\n{text}")).into_response(),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n{text}")).into_response(),
    }
}

async fn show_metrics(State(shared): State<Shared>) -> Response {
    match metrics::render(&shared.node).await {
        Ok(text) => {
            ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
                .into_response()
        }
        Err(error) => failed(&error),
    }
}

fn failed(error: &dyn std::fmt::Display) -> Response {
    (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response()
}

#[derive(Deserialize)]
struct Look {
    format: Option<String>,
    pid: Option<u32>,
}

/// A view as JSON if asked for, else as text for people.
fn show<T: serde::Serialize>(look: &Look, view: &T, text: impl FnOnce(&T) -> String) -> Response {
    match look.format.as_deref() {
        Some("json") => axum::Json(view).into_response(),
        None | Some("text") => text(view).into_response(),
        Some(other) => {
            (StatusCode::BAD_REQUEST, format!("format={other}: give json or text\n")).into_response()
        }
    }
}

async fn status(State(shared): State<Shared>, Query(look): Query<Look>) -> Response {
    show(&look, &views::status(&shared.node), views::Status::text)
}

async fn rules(State(shared): State<Shared>, Query(look): Query<Look>) -> Response {
    match views::rules(&shared.node).await {
        Ok(view) => show(&look, &view, |view| views::rules_text(view)),
        Err(error) => failed(&error),
    }
}

async fn processes(State(shared): State<Shared>, Query(look): Query<Look>) -> Response {
    match views::processes(&shared.node, look.pid).await {
        Ok(view) => show(&look, &view, |view| views::processes_text(view)),
        Err(error) => failed(&error),
    }
}

async fn pods(State(shared): State<Shared>, Query(look): Query<Look>) -> Response {
    show(&look, &views::pods(&shared.node), views::PodsView::text)
}

async fn maps(State(shared): State<Shared>, Query(look): Query<Look>) -> Response {
    match views::maps(&shared.node).await {
        Ok(view) => show(&look, &view, views::Maps::text),
        Err(error) => failed(&error),
    }
}

async fn ledger(State(shared): State<Shared>, Query(look): Query<Look>) -> Response {
    show(&look, &views::ledger(&shared.node), views::LedgerView::text)
}

async fn events(State(shared): State<Shared>, Query(look): Query<Look>) -> Response {
    match views::events(&shared.node).await {
        Ok(view) => show(&look, &view, |lines| lines.join("\n") + "\n"),
        Err(error) => failed(&error),
    }
}

async fn flame(State(shared): State<Shared>, Query(look): Query<Look>) -> Response {
    let merged = match shared.node.recent.merged(None, look.pid) {
        Ok(merged) => merged,
        Err(error) => return failed(&error),
    };
    let title = format!("{}: the last windows", shared.node.config.node);
    let details = Details { title, ledger: shared.node.ledger.snapshot() };
    match merged.map_or(Err(OutputError::Empty), |profile| render(&profile, Format::Svg, &details)) {
        Ok(bytes) => (
            [
                (header::CONTENT_TYPE, "image/svg+xml"),
                // The picture brings its own script and style, and may do nothing else.
                (
                    header::CONTENT_SECURITY_POLICY,
                    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'",
                ),
            ],
            bytes,
        )
            .into_response(),
        Err(OutputError::Empty) => (
            StatusCode::NOT_FOUND,
            "no samples in the last windows: is there a rule that names something that runs?\n",
        )
            .into_response(),
        Err(error) => failed(&error),
    }
}

#[derive(Deserialize)]
struct ProfileQuery {
    pid: Option<u32>,
    comm: Option<String>,
    container: Option<String>,
    seconds: Option<u64>,
    hz: Option<u32>,
    kind: Option<String>,
}

/// Starts a capture of what is asked for and gives its profile. Asked for nothing, it collects what the rules in force
/// sample.
async fn profile(State(shared): State<Shared>, Query(query): Query<ProfileQuery>) -> Response {
    let seconds = query.seconds.unwrap_or(10);
    if !(1..=LONGEST_PROFILE).contains(&seconds) {
        return (StatusCode::BAD_REQUEST, format!("seconds={seconds}: give 1 to {LONGEST_PROFILE}\n"))
            .into_response();
    }
    let Ok(_place) = shared.profiles.try_acquire() else {
        return (
            StatusCode::TOO_MANY_REQUESTS,
            format!("{PROFILES_AT_ONCE} profiles are being taken already\n"),
        )
            .into_response();
    };
    match manual(&query, Duration::from_secs(seconds)) {
        Ok(Some(manual)) => return capture(&shared.node, manual).await,
        Ok(None) => {}
        Err(words) => return (StatusCode::BAD_REQUEST, words).into_response(),
    }
    let node = &shared.node;
    // What is sampled up to now belongs to nobody who asked now.
    if let Err(error) = node.engine.flush().await {
        return failed(&error);
    }
    let begun = SystemTime::now();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let next = node.recent.next();
    if let Err(error) = node.engine.flush().await {
        return failed(&error);
    }
    // The last window is still being named; without a sample there is none to wait for.
    let _ = tokio::time::timeout(LAST_WINDOW, next).await;
    // Windows are stamped when they begin, a moment before this was asked.
    let since = begun.checked_sub(Duration::from_millis(50)).unwrap_or(begun);
    match node.recent.merged(Some(since), query.pid) {
        Ok(Some(profile)) => attached(&profile),
        Ok(None) => (
            StatusCode::NOT_FOUND,
            "nothing was sampled: no rule names it, or it used no CPU; /debug/processes tells which\n",
        )
            .into_response(),
        Err(error) => failed(&error),
    }
}

fn attached(profile: &gannet_proto::profiles::Profile) -> Response {
    (
        [
            (header::CONTENT_TYPE, "application/octet-stream"),
            (header::CONTENT_DISPOSITION, "attachment; filename=\"profile.pb.gz\""),
        ],
        pprof::encode(profile),
    )
        .into_response()
}

/// What a query asks to capture; none if it names nothing.
fn manual(query: &ProfileQuery, duration: Duration) -> Result<Option<Manual>, String> {
    let ProfileQuery { pid, comm, container, seconds: _, hz, kind } = query;
    if pid.is_none() && comm.is_none() && container.is_none() {
        return Ok(None);
    }
    let cgroup = match container {
        None => Vec::new(),
        Some(id) => {
            let path = find_container(id).ok_or_else(|| {
                format!(
                    "container={id}: no process of such a container runs here; give the beginning of its id\n"
                )
            })?;
            vec![format!("{path}/*"), path]
        }
    };
    let kind = match kind.as_deref() {
        None | Some("on_cpu") => capture::Kind::OnCpu,
        Some("off_cpu") => capture::Kind::OffCpu,
        Some(other) => return Err(format!("kind={other}: give on_cpu or off_cpu\n")),
    };
    Ok(Some(Manual {
        matches: Match {
            pids: pid.iter().copied().collect(),
            comm: comm.iter().cloned().collect(),
            cgroup,
            ..Match::default()
        },
        hz: hz.unwrap_or(99),
        kinds: vec![kind],
        duration,
        evidence: "asked for on the node's page".into(),
    }))
}

/// Runs a capture to its end.
async fn capture(node: &Node, manual: Manual) -> Response {
    let running = match node.engine.capture_now(manual).await {
        Ok(running) => running,
        Err(error @ CaptureError::Invalid(_)) => {
            return (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response();
        }
        Err(error) => return (StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n")).into_response(),
    };
    let collecting = node.recent.collect(running.capture);
    let Ok(last) = running.over.await else { return failed(&EngineError::Ended) };
    match tokio::time::timeout(NAMING, collecting.finish(last)).await {
        Ok(Ok(Some(profile))) => attached(&profile),
        Ok(Ok(None)) => (
            StatusCode::NOT_FOUND,
            "nothing was sampled: nothing that matches runs, it used no CPU, or this node denies it\n",
        )
            .into_response(),
        Ok(Err(error)) => failed(&error),
        Err(_) => failed(&"its frames were not named in time"),
    }
}

async fn bundle(State(shared): State<Shared>) -> Response {
    let node = &shared.node;
    let text =
        |result: Result<String, crate::engine::EngineError>| result.unwrap_or_else(|error| error.to_string());
    let files = [
        ("statusz", views::status(node).text()),
        ("flagz", options(node)),
        ("ledger", views::ledger(node).text()),
        ("rules", text(views::rules(node).await.map(|view| views::rules_text(&view)))),
        ("processes", text(views::processes(node, None).await.map(|view| views::processes_text(&view)))),
        ("pods", views::pods(node).text()),
        ("maps", text(views::maps(node).await.map(|view| view.text()))),
        ("events", text(views::events(node).await.map(|lines| lines.join("\n")))),
        ("metrics", text(metrics::render(node).await)),
    ];
    match archive(&files) {
        Ok(bytes) => (
            [
                (header::CONTENT_TYPE, "application/gzip"),
                (header::CONTENT_DISPOSITION, "attachment; filename=\"gannet-bundle.tar.gz\""),
            ],
            bytes,
        )
            .into_response(),
        Err(error) => failed(&error),
    }
}

fn archive(files: &[(&str, String)]) -> io::Result<Vec<u8>> {
    let mut archive =
        tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default()));
    for (name, text) in files {
        let mut head = tar::Header::new_gnu();
        head.set_size(text.len() as u64);
        head.set_mode(0o644);
        archive.append_data(&mut head, format!("gannet/{name}.txt"), text.as_bytes())?;
    }
    archive.into_inner()?.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_local_names_are_answered() {
        for host in ["localhost", "LOCALHOST:6060", "127.0.0.1:6060", "127.9.9.9", "[::1]:6060", "[::1]"] {
            assert!(is_local_host(host), "{host}");
        }
        for host in
            ["", "evil.example", "localhost.evil.example:6060", "10.0.0.1:6060", "[::2]:1", "localhost:x:y"]
        {
            assert!(!is_local_host(host), "{host}");
        }
    }

    #[test]
    fn a_bundle_is_a_tar_of_its_files() {
        let bytes = archive(&[("a", "one".into()), ("b", "two".into())]).unwrap();
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(bytes.as_slice()));
        let names: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().display().to_string())
            .collect();
        assert_eq!(names, ["gannet/a.txt", "gannet/b.txt"]);
    }
}
