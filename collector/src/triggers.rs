//! The trigger service: the rule store and the fleet as people and control services call them.

use std::{fmt::Write as _, pin::Pin, sync::Arc, time::Duration};

use gannet_proto::control::{
    DeleteTriggersRequest, DeleteTriggersResponse, GetRolloutRequest, GetTriggersRequest,
    GetTriggersResponse, ListScopesRequest, ListScopesResponse, Rollout, SetTriggersRequest,
    SetTriggersResponse, WatchRolloutRequest, trigger_service_server::TriggerService,
};
use sha2::{Digest as _, Sha256};
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{
    fleet::Fleet,
    rules::{Rules, RulesError},
};

/// A watcher is told of changes at most this often: a revision that reaches a thousand nodes is a few messages.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);

/// The service.
#[derive(Clone)]
pub(crate) struct Triggers {
    pub(crate) rules: Arc<Rules>,
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) stop: CancellationToken,
}

impl From<RulesError> for Status {
    fn from(error: RulesError) -> Self {
        let text = error.to_string();
        match error {
            RulesError::Invalid(violations) => {
                let mut details = ErrorDetails::new();
                for violation in violations {
                    details.add_bad_request_violation(violation.field, violation.description);
                }
                Status::with_error_details(Code::InvalidArgument, text, details)
            }
            RulesError::Stale { .. } => Status::aborted(text),
            RulesError::NoScope(_) => Status::not_found(text),
            RulesError::Corrupt { .. } => Status::failed_precondition(text),
            RulesError::Io(_) => Status::unavailable(text),
        }
    }
}

/// Who calls, as the connection proves it.
fn caller<T>(request: &Request<T>) -> String {
    match request.peer_certs().as_deref().and_then(|certs| certs.first()) {
        Some(cert) => {
            let hash = Sha256::digest(cert.as_ref());
            let name = "certificate sha256:".to_owned();
            hash.iter().take(16).fold(name, |mut name, byte| {
                // Writing into a string does not fail.
                let _ = write!(name, "{byte:02x}");
                name
            })
        }
        None => "anonymous".to_owned(),
    }
}

impl Triggers {
    /// Writes to the disk, so off the asynchronous threads.
    async fn blocking<T: Send + 'static>(
        &self,
        f: impl FnOnce(&Rules) -> Result<T, RulesError> + Send + 'static,
    ) -> Result<T, Status> {
        let rules = Arc::clone(&self.rules);
        let done = tokio::task::spawn_blocking(move || f(&rules)).await;
        Ok(done.map_err(|_| Status::unavailable("the collector is shutting down"))??)
    }

    /// The rollout of a revision, 0 for the newest.
    pub(crate) fn rollout(&self, revision: u64) -> Result<Rollout, Status> {
        match self.rules.revision(revision)? {
            Some((revision, made_ms)) => Ok(self.fleet.rollout(revision, made_ms)),
            None if revision == 0 => Ok(Rollout { settled: true, ..Rollout::default() }),
            None => Err(Status::not_found(format!(
                "revision {revision} is not known: it never was, or it is too long ago; 0 asks for the newest"
            ))),
        }
    }
}

#[tonic::async_trait]
impl TriggerService for Triggers {
    async fn set_triggers(
        &self,
        request: Request<SetTriggersRequest>,
    ) -> Result<Response<SetTriggersResponse>, Status> {
        let who = caller(&request);
        let request = request.into_inner();
        let wanted = request.rules.clone();
        let mut response = self.blocking(move |rules| rules.set(request, &who)).await?;
        response.nodes = self.fleet.nodes_for(&wanted);
        if response.changed {
            self.fleet.touch();
        }
        Ok(Response::new(response))
    }

    async fn get_triggers(
        &self,
        request: Request<GetTriggersRequest>,
    ) -> Result<Response<GetTriggersResponse>, Status> {
        let scope = self.rules.scope(&request.into_inner().scope)?;
        Ok(Response::new(GetTriggersResponse { scope: Some(scope) }))
    }

    async fn delete_triggers(
        &self,
        request: Request<DeleteTriggersRequest>,
    ) -> Result<Response<DeleteTriggersResponse>, Status> {
        let who = caller(&request);
        let request = request.into_inner();
        let response = self.blocking(move |rules| rules.delete(request, &who)).await?;
        self.fleet.touch();
        Ok(Response::new(response))
    }

    async fn list_scopes(
        &self,
        _: Request<ListScopesRequest>,
    ) -> Result<Response<ListScopesResponse>, Status> {
        let (scopes, revision) = self.rules.scopes()?;
        Ok(Response::new(ListScopesResponse { scopes, revision }))
    }

    async fn get_rollout(&self, request: Request<GetRolloutRequest>) -> Result<Response<Rollout>, Status> {
        Ok(Response::new(self.rollout(request.into_inner().revision)?))
    }

    type WatchRolloutStream = Pin<Box<dyn Stream<Item = Result<Rollout, Status>> + Send>>;

    async fn watch_rollout(
        &self,
        request: Request<WatchRolloutRequest>,
    ) -> Result<Response<Self::WatchRolloutStream>, Status> {
        let WatchRolloutRequest { revision, until_settled } = request.into_inner();
        let mut changes = self.fleet.changes();
        let mut last = self.rollout(revision)?;
        let this = self.clone();
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            let watch = async {
                loop {
                    if sender.send(Ok(last.clone())).await.is_err() || (until_settled && last.settled) {
                        return;
                    }
                    loop {
                        tokio::time::sleep(WATCH_INTERVAL).await;
                        if changes.changed().await.is_err() {
                            return;
                        }
                        match this.rollout(revision) {
                            Ok(now) if now == last => {}
                            Ok(now) => {
                                last = now;
                                break;
                            }
                            Err(status) => {
                                let _ = sender.send(Err(status)).await;
                                return;
                            }
                        }
                    }
                }
            };
            tokio::select! {
                () = watch => {}
                () = sender.closed() => {}
                () = this.stop.cancelled() => {
                    let _ = sender.try_send(Err(Status::unavailable("the collector is shutting down")));
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}
