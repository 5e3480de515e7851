//! The gRPC services of debug information: one for people, one for agents.

use std::{sync::Arc, time::Duration};

use gannet_elf::BuildId;
use gannet_proto::debuginfo::{
    DebugFile, DeleteDebugInfoRequest, DeleteDebugInfoResponse, ListDebugInfoRequest, ListDebugInfoResponse,
    OfferDebugInfoRequest, OfferDebugInfoResponse, UploadDebugInfoRequest, UploadDebugInfoResponse,
    agent_debug_info_service_server::AgentDebugInfoService,
    debug_info_service_server::DebugInfoService,
    upload_debug_info_request::{Begin, Message},
};
use tokio::sync::Semaphore;
use tonic::{Request, Response, Status, Streaming};

use super::{
    DebugInfo, DebugInfoError,
    files::{Origin, StoredFile},
};

/// Maximum number of uploads at the same time.
const MAX_UPLOADS: usize = 4;
/// Time limit between two messages of an upload.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(30);
/// Maximum number of build ids in one offer.
const MAX_OFFERED: usize = 1024;

/// Serves people and agents. Clones share the limit of uploads.
#[derive(Clone)]
pub(crate) struct DebugInfoGrpc {
    debug_info: Arc<DebugInfo>,
    uploads: Arc<Semaphore>,
}

impl From<DebugInfoError> for Status {
    fn from(error: DebugInfoError) -> Self {
        let text = error.to_string();
        match error {
            DebugInfoError::File(_) | DebugInfoError::BuildId => Status::invalid_argument(text),
            DebugInfoError::NoRoom { .. } | DebugInfoError::DiskFull => Status::resource_exhausted(text),
            DebugInfoError::Io(_) | DebugInfoError::Object(_) | DebugInfoError::Server { .. } => {
                Status::unavailable(text)
            }
        }
    }
}

impl DebugInfoGrpc {
    pub(crate) fn new(debug_info: Arc<DebugInfo>) -> Self {
        Self { debug_info, uploads: Arc::new(Semaphore::new(MAX_UPLOADS)) }
    }

    /// Receives and stores one file. Counts and logs it if it refuses the file.
    async fn receive(
        &self,
        messages: Streaming<UploadDebugInfoRequest>,
        origin: Origin,
    ) -> Result<Response<UploadDebugInfoResponse>, Status> {
        let stored = self.receive_file(messages, origin).await.inspect_err(|status| {
            self.debug_info.metrics.debuginfo_refused.inc();
            tracing::info!(origin = origin.name(), reason = status.message(), "refused debug information");
        })?;
        self.debug_info.metrics.debuginfo_stored.inc();
        Ok(Response::new(UploadDebugInfoResponse { file: Some(shown(&stored)) }))
    }

    async fn receive_file(
        &self,
        mut messages: Streaming<UploadDebugInfoRequest>,
        origin: Origin,
    ) -> Result<StoredFile, Status> {
        let Ok(_permit) = self.uploads.try_acquire() else {
            return Err(Status::unavailable(format!(
                "{MAX_UPLOADS} other uploads are running: try again later"
            )));
        };
        let Some(Message::Begin(Begin { build_id, bytes })) = next(&mut messages).await? else {
            return Err(Status::invalid_argument("begin: the first message must begin a file"));
        };
        let build_id = parse(&build_id)?;
        let max = self.debug_info.max_file_bytes;
        if bytes > max {
            return Err(Status::resource_exhausted(format!(
                "begin.bytes is {bytes}, the limit is {max}; start the collector with a larger --debuginfo-file-bytes \
                 (and --debuginfo-bytes), or upload a file with less debug information, as the compiler writes it with `-g1`"
            )));
        }
        if self.debug_info.files.has(&build_id, origin).await? {
            return Err(Status::already_exists(format!(
                "the collector already has debug information of build id {build_id}; to replace it, delete it first"
            )));
        }
        let mut incoming = self.debug_info.begin(bytes).await?;
        let mut left = bytes;
        while let Some(message) = next(&mut messages).await? {
            let Message::Data(data) = message else {
                return Err(Status::invalid_argument("begin: only the first message may begin a file"));
            };
            left = left.checked_sub(data.len() as u64).ok_or_else(|| {
                Status::invalid_argument(format!(
                    "data: the file has more than the {bytes} bytes of begin.bytes"
                ))
            })?;
            incoming.write(&data).await.map_err(DebugInfoError::from)?;
        }
        if left > 0 {
            return Err(Status::invalid_argument(format!(
                "data: the file ends {left} bytes before the {bytes} bytes of begin.bytes"
            )));
        }
        Ok(self.debug_info.store(incoming, &build_id, origin).await?)
    }
}

/// Returns the next message; none at the end of the stream.
async fn next(messages: &mut Streaming<UploadDebugInfoRequest>) -> Result<Option<Message>, Status> {
    let late = |_| Status::deadline_exceeded(format!("no message for {} s", MESSAGE_TIMEOUT.as_secs()));
    match tokio::time::timeout(MESSAGE_TIMEOUT, messages.message()).await.map_err(late)?? {
        None => Ok(None),
        Some(UploadDebugInfoRequest { message: Some(message) }) => Ok(Some(message)),
        Some(UploadDebugInfoRequest { message: None }) => {
            Err(Status::invalid_argument("message: is missing or of an unknown kind"))
        }
    }
}

fn parse(build_id: &str) -> Result<BuildId, DebugInfoError> {
    build_id.parse().ok().filter(BuildId::is_unique).ok_or(DebugInfoError::BuildId)
}

fn shown(file: &StoredFile) -> DebugFile {
    let StoredFile { build_id, origin, bytes, stored } = file;
    DebugFile {
        build_id: build_id.to_string(),
        bytes: *bytes,
        origin: origin.name().to_owned(),
        stored: Some((*stored).into()),
    }
}

#[tonic::async_trait]
impl DebugInfoService for DebugInfoGrpc {
    async fn upload_debug_info(
        &self,
        request: Request<Streaming<UploadDebugInfoRequest>>,
    ) -> Result<Response<UploadDebugInfoResponse>, Status> {
        self.receive(request.into_inner(), Origin::Upload).await
    }

    async fn list_debug_info(
        &self,
        _: Request<ListDebugInfoRequest>,
    ) -> Result<Response<ListDebugInfoResponse>, Status> {
        let files = self.debug_info.files.list().await?;
        Ok(Response::new(ListDebugInfoResponse {
            bytes: files.iter().map(|file| file.bytes).sum(),
            max_bytes: self.debug_info.files.max_bytes(),
            files: files.iter().map(shown).collect(),
        }))
    }

    async fn delete_debug_info(
        &self,
        request: Request<DeleteDebugInfoRequest>,
    ) -> Result<Response<DeleteDebugInfoResponse>, Status> {
        let build_id = parse(&request.into_inner().build_id)?;
        if self.debug_info.remove(&build_id).await? {
            return Ok(Response::new(DeleteDebugInfoResponse {}));
        }
        Err(Status::not_found(format!("the collector has no debug information of build id {build_id}")))
    }
}

#[tonic::async_trait]
impl AgentDebugInfoService for DebugInfoGrpc {
    async fn offer_debug_info(
        &self,
        request: Request<OfferDebugInfoRequest>,
    ) -> Result<Response<OfferDebugInfoResponse>, Status> {
        let offered = request.into_inner().build_ids;
        if offered.len() > MAX_OFFERED {
            return Err(Status::invalid_argument(format!(
                "build_ids has {} entries, the limit is {MAX_OFFERED}",
                offered.len()
            )));
        }
        let max_bytes = self.debug_info.max_file_bytes;
        let mut wanted = Vec::new();
        for text in offered.into_iter().filter(|_| max_bytes > 0) {
            if !self.debug_info.files.has(&parse(&text)?, Origin::Agent).await? {
                wanted.push(text);
            }
        }
        Ok(Response::new(OfferDebugInfoResponse { wanted, max_bytes }))
    }

    async fn send_debug_info(
        &self,
        request: Request<Streaming<UploadDebugInfoRequest>>,
    ) -> Result<Response<UploadDebugInfoResponse>, Status> {
        self.receive(request.into_inner(), Origin::Agent).await
    }
}
