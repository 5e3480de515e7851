//! The services of Pyroscope: Grafana reads the profiles of this collector through them, and Pyroscope's clients push.
//!
//! Grafana's data source calls the methods of `querier.v1.QuerierService` in protobuf, its app Profiles Drilldown in JSON. The
//! state is that of `query`. Clients of Pyroscope also push profiles here, which go to `ingest`.

mod flamegraph;
pub(crate) mod fuzz;
mod grpc_web;
mod heatmap;
mod legacy;
mod metadata;
mod profiles;
mod push;
mod scope;
mod series;
mod upload;
mod wire;

use std::sync::Arc;

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request, State},
    http::{Method as HttpMethod, StatusCode},
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, post},
};
use gannet_proto::foreign::pyroscope_querier as api;
use prost::Message;
use tonic::Status;

pub(crate) use self::push::{Pushed, batch_of};
use self::{
    push::Pushes,
    wire::{MAX_QUERY_BYTES, Method},
};
use crate::{
    auth::{Auth, Role},
    ingest::Ingest,
    query::Query,
};

const QUERIER: &str = "querier.v1.QuerierService";

/// Returns the routes of the services. A query needs the role of a viewer, a push that of an agent. Without `ingest` nothing
/// can be pushed.
pub(crate) fn router<S>(query: Arc<Query>, ingest: Option<Ingest>, auth: Arc<Auth>) -> Router<S>
where
    S: Clone + Send + Sync + 'static,
{
    let pushes = ingest.map(|ingest| push_router(ingest, Arc::clone(&auth)));
    let mut router = Router::new();
    for (name, route) in methods() {
        router = router.route(&format!("/{QUERIER}/{name}"), route);
    }
    router
        // Grafana takes an answer without flags, or without rules, as all that it needs.
        .route("/capabilities.v1.FeatureFlagsService/GetFeatureFlags", post(wire::empty))
        .route("/settings.v1.RecordingRulesService/ListRecordingRules", post(wire::empty))
        .route("/pyroscope/render", get(legacy::render))
        .route("/pyroscope/render-diff", get(legacy::render_diff))
        .layer(from_fn_with_state(auth, require_viewer))
        .with_state(query)
        .merge(pushes.unwrap_or_default())
}

fn push_router<S>(ingest: Ingest, auth: Arc<Auth>) -> Router<S>
where
    S: Clone + Send + Sync + 'static,
{
    Router::new()
        .route("/push.v1.PusherService/Push", post(push::push))
        .route("/ingest", post(upload::ingest))
        .route("/pyroscope/ingest", post(upload::ingest))
        // The handlers have a limit of their own.
        .layer(DefaultBodyLimit::disable())
        .layer(from_fn_with_state(auth, require_agent))
        .with_state(Pushes::new(ingest))
}

/// Returns the methods of the query service.
fn methods() -> [(&'static str, MethodRouter<Arc<Query>>); 12] {
    [
        call("ProfileTypes", metadata::profile_types),
        call("LabelNames", metadata::label_names),
        call("LabelValues", metadata::label_values),
        call("Series", metadata::series),
        call("SelectMergeStacktraces", profiles::stacktraces),
        call("SelectMergeSpanProfile", profiles::span_profile),
        call("SelectMergeProfile", profiles::profile),
        call("SelectSeries", series::select_series),
        call("SelectHeatmap", heatmap::select_heatmap),
        call("Diff", profiles::diff),
        call("GetProfileStats", metadata::profile_stats),
        // Nothing here knows the cost of a query before it runs.
        call("AnalyzeQuery", |_, _: api::AnalyzeQueryRequest| async { Ok(api::AnalyzeQueryResponse {}) }),
    ]
}

fn call<Req, Res, F>(
    name: &'static str,
    handler: impl Fn(Arc<Query>, Req) -> F + Clone + Send + Sync + 'static,
) -> (&'static str, MethodRouter<Arc<Query>>)
where
    Req: Message + Default + Send + 'static,
    Res: Message + 'static,
    F: Future<Output = Result<Res, Status>> + Send + 'static,
{
    let method = Method { service: QUERIER, name, max_bytes: MAX_QUERY_BYTES };
    let route = post(move |State(query): State<Arc<Query>>, request: Request| {
        wire::unary(method, request, move |message: Req| handler(query, message))
    });
    (name, route)
}

/// Answers a call of any other service: clients take the status 501 as a sign to go on without it.
pub(crate) async fn unknown(request: Request) -> Response {
    let path = request.uri().path();
    let is_call =
        path.strip_prefix('/').and_then(|path| path.split_once('/')).is_some_and(|(service, method)| {
            service.contains('.') && !method.is_empty() && !method.contains(['/', '.'])
        });
    if request.method() != HttpMethod::POST || !is_call {
        return StatusCode::NOT_FOUND.into_response();
    }
    let path: String = path.chars().take(200).collect();
    wire::error_response(&Status::unimplemented(format!("this collector does not serve {path}")))
}

/// Refuses callers that lack the viewer role.
async fn require_viewer(State(auth): State<Arc<Auth>>, request: Request, next: Next) -> Response {
    match auth.admit(request.extensions(), request.headers(), Role::Viewer).await {
        Ok(_) => next.run(request).await,
        Err(status) => wire::error_response(&status),
    }
}

/// Refuses callers that lack the agent role, and browsers.
async fn require_agent(State(auth): State<Arc<Auth>>, mut request: Request, next: Next) -> Response {
    match auth.admit(request.extensions(), request.headers(), Role::Agent).await {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(status) => wire::error_response(&status),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_has_its_messages() {
        let set = gannet_proto::foreign::PYROSCOPE_DESCRIPTORS;
        let pool = prost_reflect::DescriptorPool::decode(set).unwrap();
        let service = pool.get_service_by_name(QUERIER).unwrap();
        let described: Vec<String> = service.methods().map(|method| method.name().to_owned()).collect();
        let mut served: Vec<String> = methods().into_iter().map(|(name, _)| name.to_owned()).collect();
        for name in &described {
            assert!(served.contains(name), "{name}");
        }
        served.retain(|name| !described.contains(name));
        assert_eq!(served, [""; 0]);
    }
}
