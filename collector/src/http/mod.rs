//! The HTTP side: the page, the HTTP API, metrics and probes.

mod json;
mod page;
mod params;

use std::sync::{Arc, atomic::Ordering};

use axum::{
    Router,
    body::Body,
    extract::{Extension, Path, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    middleware::{Next, from_fn, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::json;
use tonic::Code;

use self::params::{GRAPH, Params, RANGE, RawParams, SPANS};
use crate::{
    auth::{Auth, Caller, Role},
    ingest::Ingest,
    metrics::Metrics,
    otlp_service::{self, OtlpReceiver},
    pyroscope,
    query::{Download, MergeProgress, Query, QueryError, parse_profile_id},
    recording::Recorder,
    store::{Store, StoreError},
    triggers::Triggers,
};

/// Maximum number of changes of rules in one answer.
const MAX_CHANGES: usize = 500;

/// Everything that the handlers need.
#[derive(Clone)]
pub(crate) struct HttpState {
    pub(crate) query: Arc<Query>,
    /// `None`: clients of Pyroscope cannot push profiles.
    pub(crate) ingest: Option<Ingest>,
    /// `None`: senders of OTLP cannot either.
    pub(crate) otlp: Option<OtlpReceiver>,
    /// None without recording rules.
    pub(crate) recorder: Option<Arc<Recorder>>,
    pub(crate) store: Arc<Store>,
    pub(crate) triggers: Triggers,
    pub(crate) metrics: Metrics,
    pub(crate) auth: Arc<Auth>,
}

/// Returns all routes of the HTTP listener.
pub(crate) fn router(state: HttpState) -> Router {
    let api = Router::new()
        .route("/labels", get(label_names))
        .route("/labels/{name}/values", get(label_values))
        .route("/series", get(series))
        .route("/profiles", get(profiles))
        .route("/profiles/{id}", get(profile))
        .route("/merge", get(merge))
        .route("/flamegraph", get(flamegraph))
        .route("/top", get(top))
        .route("/timeline", get(timeline))
        .route("/heatmap", get(heatmap))
        .route("/annotations", get(annotations))
        .route("/nodes", get(nodes))
        .route("/rules", get(rules))
        .route("/rollout", get(rollout))
        .fallback(|| async { ApiError(StatusCode::NOT_FOUND, "there is no such path in /api/v1".into()) });
    let otlp = state.otlp.clone().map(|receiver| {
        Router::new()
            .route("/v1development/profiles", post(otlp_profiles))
            .layer(Extension(receiver))
            .layer(from_fn_with_state((state.clone(), Role::Agent), require))
    });
    Router::new()
        .nest("/api/v1", api)
        .route("/metrics", get(metrics))
        .merge(page::router())
        .fallback(pyroscope::unknown)
        .layer(from_fn_with_state((state.clone(), Role::Viewer), require))
        .merge(pyroscope::router(Arc::clone(&state.query), state.ingest.clone(), Arc::clone(&state.auth)))
        .merge(otlp.unwrap_or_default())
        .route("/livez", get(|| async { "alive\n" }))
        .route("/readyz", get(readyz))
        .layer(from_fn(add_security_headers))
        .with_state(state)
}

/// Returns the same routes without authentication, for the loopback listener. It answers only to a local host name, so
/// that no foreign page can read it through a browser on this machine. It takes no profiles.
pub(crate) fn debug_router(state: HttpState) -> Router {
    router(HttpState { auth: Auth::open(), ingest: None, otlp: None, ..state })
        .layer(from_fn(require_local_name))
}

async fn require_local_name(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or("");
    let name = if host.ends_with(']') { host } else { host.rsplit_once(':').map_or(host, |(name, _)| name) };
    if gannet_proto::connect::is_loopback(name) {
        return next.run(request).await;
    }
    ApiError(StatusCode::FORBIDDEN, "--debug-listen answers to localhost only".to_owned()).into_response()
}

/// An error response: a status and a human-readable reason.
struct ApiError(StatusCode, String);

impl ApiError {
    fn bad_request(reason: String) -> Self {
        Self(StatusCode::BAD_REQUEST, reason)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.0, axum::Json(json!({ "error": self.1 }))).into_response()
    }
}

impl From<QueryError> for ApiError {
    fn from(error: QueryError) -> Self {
        let status = match &error {
            QueryError::Invalid(_) => StatusCode::BAD_REQUEST,
            QueryError::NotFound(_) => StatusCode::NOT_FOUND,
            QueryError::TooLarge(_) => StatusCode::UNPROCESSABLE_ENTITY,
            QueryError::Store(StoreError::Damaged(_)) => StatusCode::INTERNAL_SERVER_ERROR,
            QueryError::Busy(_) | QueryError::Store(_) => StatusCode::SERVICE_UNAVAILABLE,
            QueryError::Engine(_) => StatusCode::BAD_GATEWAY,
        };
        Self(status, error.to_string())
    }
}

impl From<tonic::Status> for ApiError {
    fn from(status: tonic::Status) -> Self {
        let code = match status.code() {
            Code::InvalidArgument => StatusCode::BAD_REQUEST,
            Code::NotFound => StatusCode::NOT_FOUND,
            _ => StatusCode::SERVICE_UNAVAILABLE,
        };
        Self(code, status.message().to_owned())
    }
}

type ApiResult<T = axum::Json<serde_json::Value>> = Result<T, ApiError>;

/// Tells the reader of a download that the search for names in debug information ran out of time.
const NAMES_INCOMPLETE: HeaderName = HeaderName::from_static("gannet-names-incomplete");

/// Has what the collector read for a download, as JSON.
const READ: HeaderName = HeaderName::from_static("gannet-read");

fn download(name: &str, Download { bytes, lacks_names }: Download) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "application/octet-stream".to_owned()),
        (header::CONTENT_DISPOSITION, format!("attachment; filename=\"{name}.pb.gz\"")),
    ];
    let mut response = (headers, Body::from(bytes)).into_response();
    if lacks_names {
        response.headers_mut().insert(NAMES_INCOMPLETE, HeaderValue::from_static("true"));
    }
    response
}

async fn label_names(State(state): State<HttpState>, params: RawParams) -> ApiResult {
    let params = Params::new(params, &RANGE, &[])?;
    Ok(axum::Json(json!({ "names": state.query.label_names(params.selection()?).await? })))
}

async fn label_values(
    State(state): State<HttpState>,
    Path(name): Path<String>,
    params: RawParams,
) -> ApiResult {
    let params = Params::new(params, &RANGE, &[])?;
    Ok(axum::Json(json!({ "values": state.query.label_values(params.selection()?, &name).await? })))
}

async fn series(State(state): State<HttpState>, params: RawParams) -> ApiResult {
    let params = Params::new(params, &RANGE, &[])?;
    Ok(axum::Json(json::series(&state.query.series(params.selection()?).await?)))
}

async fn profiles(State(state): State<HttpState>, params: RawParams) -> ApiResult {
    let params = Params::new(params, &RANGE, &["limit", "page_token"])?;
    let (limit, token) = (params.number("limit")?, params.text("page_token").to_owned());
    let (profiles, next) = state.query.list(params.selection()?, limit, token).await?;
    Ok(axum::Json(json::profiles(&profiles, &next)))
}

async fn profile(
    State(state): State<HttpState>,
    Path(id): Path<String>,
    params: RawParams,
) -> ApiResult<Response> {
    let spans = Params::new(params, &SPANS, &[])?.spans()?;
    let id = parse_profile_id(&id)?;
    Ok(download(&id.to_string(), state.query.profile(id, spans).await?))
}

async fn merge(State(state): State<HttpState>, params: RawParams) -> ApiResult<Response> {
    let params = Params::new(params, &RANGE, &["profile_id", "type"])?;
    let progress: Arc<MergeProgress> = Arc::default();
    let bytes = state.query.merge(&params.selection()?, params.text("type"), &progress).await?;
    let lacks_names = progress.lacks_names.load(Ordering::Relaxed);
    let mut response = download("gannet", Download { bytes, lacks_names });
    let read = json::read_report(Some(&progress.report())).to_string();
    if let Ok(read) = HeaderValue::from_str(&read) {
        response.headers_mut().insert(READ, read);
    }
    Ok(response)
}

async fn flamegraph(State(state): State<HttpState>, params: RawParams) -> ApiResult<Response> {
    let params = Params::new(params, &GRAPH, &["max_nodes"])?;
    let (of, base) = (params.selection()?, params.base()?);
    let shape = params.shape("max_nodes")?;
    let graph = state.query.flamegraph(&of, base.as_ref(), params.text("type"), shape).await?;
    Ok(([(header::CONTENT_TYPE, "application/json")], json::flamegraph(&graph)).into_response())
}

async fn top(State(state): State<HttpState>, params: RawParams) -> ApiResult {
    let params = Params::new(params, &GRAPH, &["limit"])?;
    let (of, base) = (params.selection()?, params.base()?);
    let shape = params.shape("limit")?;
    Ok(axum::Json(json::top(&state.query.top(&of, base.as_ref(), params.text("type"), shape).await?)))
}

async fn timeline(State(state): State<HttpState>, params: RawParams) -> ApiResult {
    let params = Params::new(params, &RANGE, &["type", "step_ms"])?;
    let step = if params.text("step_ms").is_empty() { None } else { Some(params.number("step_ms")?) };
    let timeline = state.query.timeline(params.selection()?, params.text("type").to_owned(), step).await?;
    Ok(axum::Json(json::timeline(&timeline)))
}

async fn heatmap(State(state): State<HttpState>, params: RawParams) -> ApiResult {
    let params = Params::new(params, &RANGE, &["type", "step_ms", "by"])?;
    let selection = params.selection()?;
    let from_ms = selection.range().map_or(0, |(from_ms, _)| from_ms);
    let (sample_type, by) = (params.text("type"), params.text("by").to_owned());
    let map = state.query.heatmap(selection, sample_type.to_owned(), params.number("step_ms")?, by).await?;
    Ok(axum::Json(json::heatmap(&map, sample_type, from_ms)))
}

async fn annotations(State(state): State<HttpState>, params: RawParams) -> ApiResult {
    let selection = Params::new(params, &RANGE, &[])?.selection()?;
    let (from_ms, until_ms) = selection.range().unwrap_or_default();
    let (changes, older_changes) = state.triggers.changes(from_ms, until_ms, MAX_CHANGES).await?;
    let (captures, older_captures) = state.query.captures(selection).await?;
    Ok(axum::Json(json::annotations((&changes, older_changes), (&captures, older_captures))))
}

async fn nodes(State(state): State<HttpState>, params: RawParams) -> ApiResult {
    Params::new(params, &[], &[])?;
    let newest = state.triggers.rules.revision(0).ok().flatten().map_or(0, |(revision, _)| revision);
    Ok(axum::Json(json::nodes(&state.triggers.fleet.nodes(), newest)))
}

async fn rules(State(state): State<HttpState>, params: RawParams) -> ApiResult {
    Params::new(params, &[], &[])?;
    let (scopes, revision) = state.triggers.rules.scopes().map_err(tonic::Status::from)?;
    Ok(axum::Json(json::scopes(&scopes, revision)))
}

async fn rollout(State(state): State<HttpState>, params: RawParams) -> ApiResult {
    let params = Params::new(params, &["revision"], &[])?;
    Ok(axum::Json(json::rollout(&state.triggers.rollout(params.number("revision")?)?)))
}

async fn metrics(State(state): State<HttpState>) -> Response {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let mut text = state.metrics.text();
    if let Some(recorder) = &state.recorder {
        text = recorder.add_to(text);
    }
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

/// Reports whether rules and store can be used.
async fn readyz(State(state): State<HttpState>) -> Response {
    let mut faults = Vec::new();
    if let Err(error) = state.triggers.rules.health() {
        faults.push(error.to_string());
    }
    let store = Arc::clone(&state.store);
    match tokio::task::spawn_blocking(move || store.health()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => faults.push(error.to_string()),
        Err(_) => faults.push(StoreError::Ended.to_string()),
    }
    if faults.is_empty() {
        "ready\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, faults.join("\n") + "\n").into_response()
    }
}

async fn otlp_profiles(
    Extension(receiver): Extension<OtlpReceiver>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    otlp_service::export(&receiver, &caller, &headers, body).await
}

/// Refuses callers that lack the role. Handlers find the caller in the extensions.
async fn require(
    State((state, role)): State<(HttpState, Role)>,
    mut request: Request,
    next: Next,
) -> Response {
    match state.auth.admit(request.extensions(), request.headers(), role).await {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(status) => {
            let code = match status.code() {
                Code::Unauthenticated => StatusCode::UNAUTHORIZED,
                Code::PermissionDenied => StatusCode::FORBIDDEN,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            };
            ApiError(code, status.message().to_owned()).into_response()
        }
    }
}

/// Adds security headers to a response. The page has its own policy already.
async fn add_security_headers(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.entry(header::X_CONTENT_TYPE_OPTIONS).or_insert(HeaderValue::from_static("nosniff"));
    headers
        .entry(header::CONTENT_SECURITY_POLICY)
        .or_insert(HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'"));
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}
