//! Requests to one node, which travel over the node's control stream: explanations, previews, captures.

use std::time::Duration;

use gannet_proto::control::{CaptureProgress, answer, capture_progress, question};
use tokio::sync::mpsc;
use tonic::Status;
use ulid::Ulid;

use super::Fleet;

/// Pending requests of one node.
pub(super) const MAX_REQUESTS: usize = 32;
/// Parts of one response that wait for the caller. A capture comes in parts of at most 256 KiB.
const MAX_PARTS: usize = 128;
/// Time that a node has for a request that it can answer at once.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Feature of an agent that answers requests.
const REQUESTS_FEATURE: &str = "questions";
/// Feature of an agent that runs captures.
pub(super) const CAPTURE_FEATURE: &str = "capture";

/// A command to the session of a node.
pub(super) enum SessionCommand {
    /// Send a request. The session holds the only sender of `reply`, so a closed channel means that the session ended.
    Send { id: String, question: Box<question::Question>, reply: mpsc::Sender<answer::Answer> },
    /// The caller has gone: cancel the request.
    Cancel { id: String },
}

/// Why a node did not get or answer a request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("there is no node `{0}`; `gannetctl nodes` lists the known nodes")]
    Unknown(String),
    #[error("node `{0}` is not connected to this collector")]
    Offline(String),
    #[error("node `{node}` runs version {version}, which cannot do this: update its agent")]
    TooOld { node: String, version: String },
    #[error("node `{0}` has {MAX_REQUESTS} pending requests: try again")]
    Busy(String),
    #[error("node `{0}` did not answer in time")]
    Timeout(String),
    #[error("node `{node}`: {reason}")]
    Refused { node: String, reason: String },
}

impl From<RequestError> for Status {
    fn from(error: RequestError) -> Self {
        let text = error.to_string();
        match error {
            RequestError::Unknown(_) => Status::not_found(text),
            RequestError::Offline(_) => Status::unavailable(text),
            RequestError::TooOld { .. } | RequestError::Refused { .. } => Status::failed_precondition(text),
            RequestError::Busy(_) => Status::resource_exhausted(text),
            RequestError::Timeout(_) => Status::deadline_exceeded(text),
        }
    }
}

/// A request on its way. Dropping it cancels the request at the node.
pub(super) struct PendingRequest {
    node: String,
    id: String,
    commands: mpsc::Sender<SessionCommand>,
    parts: mpsc::Receiver<answer::Answer>,
}

impl PendingRequest {
    /// Waits for the next part of the response.
    pub(super) async fn next_part(&mut self, timeout: Duration) -> Result<answer::Answer, RequestError> {
        match tokio::time::timeout(timeout, self.parts.recv()).await {
            Ok(Some(answer::Answer::Refused(reason))) => {
                Err(RequestError::Refused { node: self.node.clone(), reason })
            }
            Ok(Some(part)) => Ok(part),
            // The session has ended and dropped its end of the channel.
            Ok(None) => Err(RequestError::Offline(self.node.clone())),
            Err(_) => Err(RequestError::Timeout(self.node.clone())),
        }
    }
}

impl Drop for PendingRequest {
    fn drop(&mut self) {
        let id = std::mem::take(&mut self.id);
        // If the channel is full, the session notices the closed `parts` with the next part.
        let _ = self.commands.try_send(SessionCommand::Cancel { id });
    }
}

/// Reports whether this part of a response is the last one. Only captures have several parts.
pub(super) fn is_last_part(answer: &answer::Answer) -> bool {
    match answer {
        answer::Answer::Capture(progress) => is_last_progress(progress),
        _ => true,
    }
}

/// Reports whether this message of a capture is the last one.
pub(super) fn is_last_progress(progress: &CaptureProgress) -> bool {
    matches!(progress.message, None | Some(capture_progress::Message::Done(_)))
}

impl Fleet {
    /// Sends a request to a node. `feature`: the feature that its agent needs.
    pub(super) fn request(
        &self,
        node: &str,
        feature: &str,
        question: question::Question,
    ) -> Result<PendingRequest, RequestError> {
        let commands = {
            let nodes = self.nodes.lock();
            let known = nodes.get(node).ok_or_else(|| RequestError::Unknown(node.to_owned()))?;
            let connection =
                known.connection.as_ref().ok_or_else(|| RequestError::Offline(node.to_owned()))?;
            if !known.hello.features.iter().any(|have| have == feature) {
                let version = known.hello.version.clone();
                return Err(RequestError::TooOld { node: node.to_owned(), version });
            }
            connection.commands.clone()
        };
        self.metrics.node_requests.inc();
        let (reply, parts) = mpsc::channel(MAX_PARTS);
        let id = Ulid::new().to_string();
        match commands.try_send(SessionCommand::Send { id: id.clone(), question: Box::new(question), reply })
        {
            Ok(()) => Ok(PendingRequest { node: node.to_owned(), id, commands, parts }),
            Err(mpsc::error::TrySendError::Full(_)) => Err(RequestError::Busy(node.to_owned())),
            Err(mpsc::error::TrySendError::Closed(_)) => Err(RequestError::Offline(node.to_owned())),
        }
    }

    /// Sends a request that has one response, and waits for it.
    pub(crate) async fn request_once(
        &self,
        node: &str,
        question: question::Question,
    ) -> Result<answer::Answer, RequestError> {
        self.request(node, REQUESTS_FEATURE, question)?.next_part(ANSWER_TIMEOUT).await
    }
}
