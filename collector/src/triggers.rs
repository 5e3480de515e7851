//! The trigger service: changes and previews of rules, rollouts, and the audit log.

use std::{collections::HashSet, pin::Pin, sync::Arc, time::Duration};

use futures::{StreamExt as _, stream};
use gannet_proto::control::{
    AbortRolloutRequest, AuditEntry, DeleteTriggersRequest, DeleteTriggersResponse, GetRolloutRequest,
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
    auth::Caller,
    fleet::Fleet,
    rules::{DEFAULT_SCOPE, MAX_AUDIT_ENTRIES, NodeStates as _, Rules, RulesError},
};

/// Concurrent preview requests to nodes.
const CONCURRENT_PREVIEWS: usize = 128;
/// Shortest time between two messages of a watch, so that a revision for a thousand nodes makes few messages.
const WATCH_INTERVAL: Duration = Duration::from_millis(50);

/// The trigger service.
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

/// Returns the name of an authenticated caller.
fn caller_name<T>(request: &Request<T>) -> String {
    let caller = request.extensions().get::<Caller>();
    caller.map_or_else(|| "anonymous".to_owned(), |caller| caller.display_name.clone())
}

impl Triggers {
    /// Runs an operation that accesses the disk on a blocking thread.
    async fn blocking<T: Send + 'static>(
        &self,
        f: impl FnOnce(&Rules) -> Result<T, RulesError> + Send + 'static,
    ) -> Result<T, Status> {
        let rules = Arc::clone(&self.rules);
        let done = tokio::task::spawn_blocking(move || f(&rules)).await;
        Ok(done.map_err(|_| Status::unavailable("the collector is shutting down"))??)
    }

    /// Asks each of these nodes for a preview of the rules: the processes and sample rates that they would have now.
    async fn previews(&self, scope: &str, wanted: Vec<Rule>, nodes: &[String]) -> Vec<NodePreview> {
        let scope = if scope.is_empty() { DEFAULT_SCOPE } else { scope };
        let ids: HashSet<String> = wanted.iter().map(|rule| rule.id.clone()).collect();
        let published = self.rules.subscribe().borrow().clone();
        let Some(changed) = published.map(|published| published.with(scope, wanted)) else {
            return Vec::new();
        };
        let (changed, ids) = (&changed, &ids);
        let preview = |node: String| async move {
            // All rules of the node, because its caps and unique ids apply to the complete set.
            let rules = changed.for_node(&node, &self.fleet.labels(&node)).rules;
            let question = question::Question::Preview(PreviewQuestion { rules });
            let mut preview = match self.fleet.request_once(&node, question).await {
                Ok(answer::Answer::Preview(preview)) => preview,
                Ok(_) => NodePreview {
                    unanswered: "it sent the wrong kind of answer".into(),
                    ..Default::default()
                },
                Err(error) => NodePreview { unanswered: error.to_string(), ..Default::default() },
            };
            preview.node = node;
            preview.rules.retain(|rule| ids.contains(&rule.rule_id));
            preview.samples_per_second = preview.rules.iter().map(|rule| rule.samples_per_second).sum();
            preview
        };
        let mut previews: Vec<NodePreview> = stream::iter(nodes.iter().cloned())
            .map(preview)
            .buffer_unordered(CONCURRENT_PREVIEWS)
            .collect()
            .await;
        previews.sort_by(|a, b| a.node.cmp(&b.node));
        previews
    }

    /// Returns the newest changes of the rules in a range of Unix milliseconds, oldest first, and the number of older ones.
    pub(crate) async fn changes(
        &self,
        from_ms: u64,
        until_ms: u64,
        limit: usize,
    ) -> Result<(Vec<AuditEntry>, usize), Status> {
        self.blocking(move |rules| Ok(rules.audit().changes(from_ms, until_ms, limit)?)).await
    }

    /// Returns the rollout of a revision. 0 means the newest.
    pub(crate) fn rollout(&self, revision: u64) -> Result<Rollout, Status> {
        match self.rules.revision(revision)? {
            Some((revision, made_ms)) => Ok(self.fleet.rollout(revision, made_ms)),
            None if revision == 0 => Ok(Rollout { settled: true, ..Rollout::default() }),
            None => Err(Status::not_found(format!(
                "revision {revision} is not known: it never existed, or it is too old; 0 asks for the newest"
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
        let who = caller_name(&request);
        let request = request.into_inner();
        let wanted = request.rules.clone();
        let (scope, validate_only) = (request.scope.clone(), request.validate_only);
        let mut response = self.blocking(move |rules| rules.set(request, &who)).await?;
        response.nodes = self.fleet.nodes_for(&wanted);
        if validate_only {
            response.previews = self.previews(&scope, wanted, &response.nodes).await;
        }
        if response.changed {
            self.fleet.notify_changed();
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
        let who = caller_name(&request);
        let request = request.into_inner();
        let response = self.blocking(move |rules| rules.delete(request, &who)).await?;
        self.fleet.notify_changed();
        Ok(Response::new(response))
    }

    async fn resume_rollout(
        &self,
        request: Request<ResumeRolloutRequest>,
    ) -> Result<Response<SetTriggersResponse>, Status> {
        let who = caller_name(&request);
        let request = request.into_inner();
        let response = self.blocking(move |rules| rules.resume(&request, &who)).await?;
        self.fleet.notify_changed();
        Ok(Response::new(response))
    }

    async fn abort_rollout(
        &self,
        request: Request<AbortRolloutRequest>,
    ) -> Result<Response<SetTriggersResponse>, Status> {
        let who = caller_name(&request);
        let request = request.into_inner();
        let response = self.blocking(move |rules| rules.abort(&request, &who)).await?;
        self.fleet.notify_changed();
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
