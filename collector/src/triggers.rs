//! The trigger service: the rule store and the fleet as people and control services call them.

use std::{collections::HashSet, pin::Pin, sync::Arc, time::Duration};

use futures::{StreamExt as _, stream};

use gannet_proto::control::{
    AbortRolloutRequest, DeleteTriggersRequest, DeleteTriggersResponse, GetRolloutRequest,
    GetTriggersRequest, GetTriggersResponse, ListAuditRequest, ListAuditResponse, ListScopesRequest,
    ListScopesResponse, NodePreview, PreviewQuestion, ResumeRolloutRequest, Rollout, Rule,
    SetTriggersRequest, SetTriggersResponse, WatchRolloutRequest, answer, question,
    trigger_service_server::TriggerService,
};
use tokio::sync::mpsc;
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::{
    auth::Who,
    fleet::Fleet,
    rules::{DEFAULT_SCOPE, MAX_AUDIT_ENTRIES, Rules, RulesError},
};

/// Nodes that are asked at one time what they would do.
const PREVIEWS_AT_ONCE: usize = 128;
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
            RulesError::NotStaged(_) | RulesError::Corrupt { .. } => Status::failed_precondition(text),
            RulesError::Unread { .. } | RulesError::Io(_) | RulesError::Busy => Status::unavailable(text),
        }
    }
}

/// Who calls, as proven.
fn caller<T>(request: &Request<T>) -> String {
    request.extensions().get::<Who>().map_or_else(|| "anonymous".to_owned(), |who| who.shown.clone())
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

    /// Asks each of these nodes what it would do now if the scope held these rules.
    async fn previews(&self, scope: &str, wanted: Vec<Rule>, nodes: &[String]) -> Vec<NodePreview> {
        let scope = if scope.is_empty() { DEFAULT_SCOPE } else { scope };
        let ids: HashSet<String> = wanted.iter().map(|rule| rule.id.clone()).collect();
        let published = self.rules.subscribe().borrow().clone();
        let Some(whole) = published.map(|published| published.with(scope, wanted)) else { return Vec::new() };
        let (whole, ids) = (&whole, &ids);
        let ask = |node: String| async move {
            // All that the node would have: its caps are on the whole, and ids must differ in it.
            let rules = whole.for_node(&node, &self.fleet.labels(&node)).rules;
            let question = question::Question::Preview(PreviewQuestion { rules });
            let mut preview = match self.fleet.ask_once(&node, question).await {
                Ok(answer::Answer::Preview(preview)) => preview,
                Ok(_) => {
                    NodePreview { unanswered: "it answered something else".into(), ..Default::default() }
                }
                Err(error) => NodePreview { unanswered: error.to_string(), ..Default::default() },
            };
            preview.node = node;
            preview.rules.retain(|rule| ids.contains(&rule.rule_id));
            preview.samples_per_second = preview.rules.iter().map(|rule| rule.samples_per_second).sum();
            preview
        };
        let mut previews: Vec<NodePreview> =
            stream::iter(nodes.iter().cloned()).map(ask).buffer_unordered(PREVIEWS_AT_ONCE).collect().await;
        previews.sort_by(|a, b| a.node.cmp(&b.node));
        previews
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
        let (scope, validate_only) = (request.scope.clone(), request.validate_only);
        let mut response = self.blocking(move |rules| rules.set(request, &who)).await?;
        response.nodes = self.fleet.nodes_for(&wanted);
        if validate_only {
            response.previews = self.previews(&scope, wanted, &response.nodes).await;
        }
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

    async fn resume_rollout(
        &self,
        request: Request<ResumeRolloutRequest>,
    ) -> Result<Response<SetTriggersResponse>, Status> {
        let who = caller(&request);
        let request = request.into_inner();
        let response = self.blocking(move |rules| rules.resume(&request, &who)).await?;
        self.fleet.touch();
        Ok(Response::new(response))
    }

    async fn abort_rollout(
        &self,
        request: Request<AbortRolloutRequest>,
    ) -> Result<Response<SetTriggersResponse>, Status> {
        let who = caller(&request);
        let request = request.into_inner();
        let response = self.blocking(move |rules| rules.abort(&request, &who)).await?;
        self.fleet.touch();
        Ok(Response::new(response))
    }

    async fn list_audit(
        &self,
        request: Request<ListAuditRequest>,
    ) -> Result<Response<ListAuditResponse>, Status> {
        let ListAuditRequest { scope, node, limit } = request.into_inner();
        let limit = if limit == 0 { 100 } else { limit as usize };
        if limit > MAX_AUDIT_ENTRIES {
            return Err(Status::invalid_argument(format!("limit: give 1 to {MAX_AUDIT_ENTRIES}")));
        }
        let read = move |rules: &Rules| Ok(rules.audit().read(&scope, &node, limit)?);
        let entries = self.blocking(read).await?;
        Ok(Response::new(ListAuditResponse { entries }))
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
