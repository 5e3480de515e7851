//! The gRPC services of the fleet: the control stream of agents, and the list of nodes, explanations and captures.

use std::{pin::Pin, sync::Arc, time::Duration};

use gannet_proto::{
    control::{
        AgentMessage, Capture, CaptureProgress, CaptureRequest, ExplainRequest, ExplainResponse, Lifetime,
        ListNodesRequest, ListNodesResponse, Rule, RuleError, ServerMessage,
        agent_service_server::AgentService, answer, fleet_service_server::FleetService, question,
    },
    rules,
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};

use super::{
    Fleet,
    request::{CAPTURE_FEATURE, is_last_progress},
    session,
};
use crate::{auth::Caller, time};

/// Time beyond a capture's duration, in which the agent unwinds and symbolizes the last samples.
const CAPTURE_GRACE: Duration = Duration::from_secs(60);
const DEFAULT_CAPTURE: Duration = Duration::from_secs(30);
const MAX_CAPTURE: Duration = Duration::from_secs(600);

/// The gRPC services of the fleet.
#[derive(Clone)]
pub(crate) struct FleetGrpc(pub(crate) Arc<Fleet>);

#[tonic::async_trait]
impl AgentService for FleetGrpc {
    type ConnectStream = Pin<Box<dyn Stream<Item = Result<ServerMessage, Status>> + Send>>;

    async fn connect(
        &self,
        request: Request<Streaming<AgentMessage>>,
    ) -> Result<Response<Self::ConnectStream>, Status> {
        let fleet = Arc::clone(&self.0);
        let caller = request.extensions().get::<Caller>().cloned().unwrap_or_default();
        let (out, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            if let Err(status) = session::serve(&fleet, &caller, request.into_inner(), &out).await {
                // The agent may have stopped reading, so the wait is short.
                let _ = tokio::time::timeout(Duration::from_secs(1), out.send(Err(status))).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

#[tonic::async_trait]
impl FleetService for FleetGrpc {
    async fn list_nodes(&self, _: Request<ListNodesRequest>) -> Result<Response<ListNodesResponse>, Status> {
        Ok(Response::new(ListNodesResponse { nodes: self.0.nodes() }))
    }

    async fn explain(&self, request: Request<ExplainRequest>) -> Result<Response<ExplainResponse>, Status> {
        let request = request.into_inner();
        let node = request.node.clone();
        match self.0.request_once(&node, question::Question::Explain(request)).await? {
            answer::Answer::Explain(answer) => Ok(Response::new(answer)),
            _ => Err(wrong_answer(&node)),
        }
    }

    type CaptureStream = Pin<Box<dyn Stream<Item = Result<CaptureProgress, Status>> + Send>>;

    async fn capture(
        &self,
        request: Request<CaptureRequest>,
    ) -> Result<Response<Self::CaptureStream>, Status> {
        let request = check_capture(request.into_inner())?;
        let node = request.node.clone();
        let duration = request.duration.and_then(|d| Duration::try_from(d).ok()).unwrap_or(MAX_CAPTURE);
        let mut pending = self.0.request(&node, CAPTURE_FEATURE, question::Question::Capture(request))?;
        let (sender, receiver) = mpsc::channel(4);
        let stop = self.0.stop.clone();
        tokio::spawn(async move {
            let pass_on = async {
                loop {
                    let part = match pending.next_part(duration + CAPTURE_GRACE).await {
                        Ok(answer::Answer::Capture(part)) => Ok(part),
                        Ok(_) => Err(wrong_answer(&node)),
                        Err(error) => Err(error.into()),
                    };
                    let is_last = part.as_ref().map_or(true, is_last_progress);
                    if sender.send(part).await.is_err() || is_last {
                        return;
                    }
                }
            };
            tokio::select! {
                () = pass_on => {}
                () = sender.closed() => {}
                () = stop.cancelled() => {
                    let _ = sender.try_send(Err(Status::unavailable("the collector is shutting down")));
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

fn wrong_answer(node: &str) -> Status {
    Status::internal(format!("node `{node}` sent the wrong kind of answer"))
}

/// Checks the parameters of a capture and fills in defaults. The node checks whether it permits the capture.
fn check_capture(mut request: CaptureRequest) -> Result<CaptureRequest, Status> {
    let duration = request.duration.get_or_insert_with(|| time::duration(DEFAULT_CAPTURE));
    if !Duration::try_from(*duration).is_ok_and(|d| (Duration::from_secs(1)..=MAX_CAPTURE).contains(&d)) {
        return Err(Status::invalid_argument("duration: give 1 s to 10 min"));
    }
    if request.hz == 0 {
        request.hz = rules::TRIGGERED_HZ;
    }
    // A capture has the form of a rule here, so that one validator serves both.
    let rule = Rule {
        id: "capture".into(),
        r#match: request.r#match.clone(),
        capture: Some(Capture { hz: request.hz, kind: request.kind.clone(), ..Default::default() }),
        lifetime: Some(Lifetime { ttl: request.duration, not_before: None }),
        ..Rule::default()
    };
    if !request.pod.is_empty() && request.pod.split('/').filter(|part| !part.is_empty()).count() != 2 {
        return Err(Status::invalid_argument(format!("pod: `{}` is not namespace/name", request.pod)));
    }
    let errors = rules::validate(&[rule], &rules::Caps::default());
    // A request that names a pod needs no `match`.
    match errors.iter().find(|error| error.field != "match" || request.pod.is_empty()) {
        None => Ok(request),
        Some(RuleError { field, reason, .. }) => {
            Err(Status::invalid_argument(format!("{}: {reason}", field.trim_start_matches("capture."))))
        }
    }
}
