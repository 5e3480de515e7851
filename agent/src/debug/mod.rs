//! What a node shows of itself: probes and metrics for the cluster, and on loopback a debug page for one node.
//!
//! Nothing here changes state, except that `/debug/profile` starts the capture that a request asks for. The page answers
//! only to a local host name, so that a web page elsewhere cannot read it through a user's browser.

mod metrics;
mod profile;
mod views;

pub use metrics::METRICS;

use std::{fmt::Write as _, io, net::SocketAddr, sync::Arc, time::Instant};

use axum::{
    Router,
    extract::{Query, Request, State},
    http::{HeaderValue, StatusCode, header},
    middleware::{self, Next},
    response::{Html, IntoResponse, Response},
    routing::get,
};
use serde::Deserialize;
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;

use crate::{
    access::{WORKERS_OUTLIVE, WORKERS_PAUSE},
    engine::EngineError,
    node::Node,
};
use profile::MAX_PROFILES;

/// An address that the agent cannot listen on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}; give another address with --{flag}")]
pub struct ListenError {
    address: SocketAddr,
    flag: &'static str,
    #[source]
    source: io::Error,
}

#[derive(Clone)]
struct Shared {
    node: Arc<Node>,
    profiles: Arc<Semaphore>,
}

/// The two open listeners.
pub(crate) struct Listeners {
    probes: TcpListener,
    page: TcpListener,
}

impl Listeners {
    /// Opens the listeners. The agent does this first, so that a port in use shows before anything else starts.
    pub(crate) async fn open(probes: SocketAddr, page: SocketAddr) -> Result<Self, ListenError> {
        let listen =
            async |address, flag| bind(address).await.map_err(|source| ListenError { address, flag, source });
        Ok(Self { probes: listen(probes, "http-listen").await?, page: listen(page, "debug-listen").await? })
    }

    /// Serves until cancelled.
    pub(crate) async fn serve(self, node: Arc<Node>, cancel: CancellationToken) {
        let shared = Shared { node, profiles: Arc::new(Semaphore::new(MAX_PROFILES)) };
        let probes = probes_router().with_state(shared.clone());
        let page = page_router().with_state(shared);
        let stop = |cancel: CancellationToken| async move { cancel.cancelled().await };
        let (probes, page) = tokio::join!(
            axum::serve(self.probes, probes).with_graceful_shutdown(stop(cancel.clone())),
            axum::serve(self.page, page).with_graceful_shutdown(stop(cancel)),
        );
        for error in [probes.err(), page.err()].into_iter().flatten() {
            tracing::error!("an HTTP listener has ended: {error}");
        }
    }
}

/// Opens a listener. Waits for an address that an agent before this one may still have.
async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let until = Instant::now() + WORKERS_OUTLIVE;
    loop {
        match TcpListener::bind(address).await {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < until => {
                tokio::time::sleep(WORKERS_PAUSE).await;
            }
            bound => return bound,
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
        .route("/debug/flame", get(profile::flame))
        .route("/debug/profile", get(profile::profile))
        .route("/debug/bundle", get(bundle))
        .layer(middleware::from_fn(guard))
}

/// Returns the options in force as YAML; paths of secrets, never secrets.
fn options(node: &Node) -> String {
    node.config.options.to_yaml().unwrap_or_else(|error| error.to_string())
}

/// Answers requests for a local host name only, and forbids browsers to embed or extend the page.
async fn guard(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("");
    if !is_local_host(host) {
        let text = "this page answers to localhost only; use kubectl port-forward or ssh -L\n";
        return (StatusCode::FORBIDDEN, text).into_response();
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

/// Returns whether a Host header, with or without a port, names this machine.
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

/// Parameters of the views.
#[derive(Deserialize)]
struct ViewQuery {
    format: Option<String>,
    pid: Option<u32>,
}

/// Returns a view as JSON if the query asks for it, else as human-readable text.
fn show<T: serde::Serialize>(query: &ViewQuery, view: &T, text: impl FnOnce(&T) -> String) -> Response {
    match query.format.as_deref() {
        Some("json") => axum::Json(view).into_response(),
        None | Some("text") => text(view).into_response(),
        Some(other) => {
            (StatusCode::BAD_REQUEST, format!("format={other}: give json or text\n")).into_response()
        }
    }
}

async fn status(State(shared): State<Shared>, Query(query): Query<ViewQuery>) -> Response {
    show(&query, &views::status(&shared.node), views::StatusView::text)
}

async fn rules(State(shared): State<Shared>, Query(query): Query<ViewQuery>) -> Response {
    match views::rules(&shared.node).await {
        Ok(view) => show(&query, &view, |view| views::rules_text(view)),
        Err(error) => failed(&error),
    }
}

async fn processes(State(shared): State<Shared>, Query(query): Query<ViewQuery>) -> Response {
    match views::processes(&shared.node, query.pid).await {
        Ok(view) => show(&query, &view, |view| views::processes_text(view)),
        Err(error) => failed(&error),
    }
}

async fn pods(State(shared): State<Shared>, Query(query): Query<ViewQuery>) -> Response {
    show(&query, &views::pods(&shared.node), views::PodsView::text)
}

async fn maps(State(shared): State<Shared>, Query(query): Query<ViewQuery>) -> Response {
    match views::maps(&shared.node).await {
        Ok(view) => show(&query, &view, views::MapsView::text),
        Err(error) => failed(&error),
    }
}

async fn ledger(State(shared): State<Shared>, Query(query): Query<ViewQuery>) -> Response {
    show(&query, &views::ledger(&shared.node), views::LedgerView::text)
}

async fn events(State(shared): State<Shared>, Query(query): Query<ViewQuery>) -> Response {
    match views::events(&shared.node).await {
        Ok(view) => show(&query, &view, |lines| lines.join("\n") + "\n"),
        Err(error) => failed(&error),
    }
}

async fn bundle(State(shared): State<Shared>) -> Response {
    let node = &shared.node;
    let text = |result: Result<String, EngineError>| result.unwrap_or_else(|error| error.to_string());
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
    fn only_local_host_names_pass_the_guard() {
        for host in ["localhost", "LOCALHOST:6060", "127.0.0.1:6060", "127.9.9.9", "[::1]:6060", "[::1]"] {
            assert!(is_local_host(host), "{host}");
        }
        for host in
            ["", "evil.example", "localhost.evil.example:6060", "10.0.0.1:6060", "[::2]:1", "localhost:x:y"]
        {
            assert!(!is_local_host(host), "{host}");
        }
    }

    #[tokio::test]
    async fn an_address_that_becomes_free_soon_is_waited_for() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let former = TcpListener::bind(any).await.unwrap();
        let address = former.local_addr().unwrap();
        let held = tokio::spawn(async move {
            tokio::time::sleep(WORKERS_OUTLIVE / 4).await;
            drop(former);
        });
        let listeners = Listeners::open(address, any).await.map_err(|error| error.to_string()).unwrap();
        held.await.unwrap();
        assert_eq!(listeners.probes.local_addr().unwrap(), address);
        // This one stays: the error names the flag.
        let begun = Instant::now();
        let Err(error) = Listeners::open(any, address).await else { panic!("the address is in use") };
        assert!(begun.elapsed() >= WORKERS_OUTLIVE, "{:?}", begun.elapsed());
        assert!(error.to_string().contains("--debug-listen"), "{error}");
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
