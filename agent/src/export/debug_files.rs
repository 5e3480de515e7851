//! Uploads files with debug information to the collector, each once, and only those that it lacks.

use std::{
    os::unix::fs::FileExt as _,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use gannet_proto::{
    connect::{self, Connection, Dial},
    debuginfo::{
        OfferDebugInfoRequest, UploadDebugInfoRequest,
        agent_debug_info_service_client::AgentDebugInfoServiceClient,
        upload_debug_info_request::{Begin, Message},
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::Backoff;
use crate::{
    access::read_file,
    symbols::{OfferedFile, SymbolizerStats},
};

/// Files of one offer.
const MAX_FILES: usize = 64;
/// Bytes of one message. Its part of a second at the lowest rate is far below the collector's limit of 30 s.
const CHUNK_BYTES: usize = 128 << 10;
/// Messages that wait for the network.
const WAITING_CHUNKS: usize = 2;
/// Time for the files of one window to be offered together.
const GATHER_TIME: Duration = Duration::from_secs(1);

/// Limits of the uploads.
#[derive(Clone, Debug)]
pub(crate) struct DebugUploadOptions {
    /// How to reach the collector.
    pub(crate) dial: Dial,
    /// Bytes a second, over all files.
    pub(crate) bytes_per_second: u64,
    /// Larger files are not sent.
    pub(crate) file_bytes: u64,
}

type Client = AgentDebugInfoServiceClient<Connection>;

/// Uploads offered files until the queue ends.
pub(crate) async fn upload_debug_files(
    options: DebugUploadOptions,
    mut offers: mpsc::Receiver<OfferedFile>,
    stats: Arc<SymbolizerStats>,
) {
    let (mut files, mut backoff) = (Vec::new(), Backoff::new());
    while offers.recv_many(&mut files, MAX_FILES).await > 0 {
        tokio::time::sleep(GATHER_TIME).await;
        while files.len() < MAX_FILES
            && let Ok(file) = offers.try_recv()
        {
            files.push(file);
        }
        while let Err(status) = upload(&options, &files, &stats).await {
            if status.code() == Code::Unimplemented {
                tracing::warn!(
                    "the collector takes no debug information: give it the version of this agent, or start the agent without \
                     --debuginfo-upload"
                );
                break;
            }
            let pause = backoff.next();
            tracing::debug!(%status, ?pause, "cannot offer debug information to the collector; trying again");
            tokio::time::sleep(pause).await;
        }
        backoff.reset();
        files.clear();
    }
}

/// Offers files, and uploads those that the collector wants. An error means that the collector cannot be reached now.
async fn upload(
    options: &DebugUploadOptions,
    files: &[OfferedFile],
    stats: &SymbolizerStats,
) -> Result<(), Status> {
    let connection =
        connect::connect(&options.dial).map_err(|error| Status::unavailable(error.to_string()))?;
    let mut client = Client::new(connection);
    let build_ids = files.iter().map(|file| file.build_id.clone()).collect();
    let answer = client.offer_debug_info(OfferDebugInfoRequest { build_ids }).await?.into_inner();
    let max_bytes = options.file_bytes.min(answer.max_bytes);
    for file in files.iter().filter(|file| answer.wanted.contains(&file.build_id)) {
        match send(&mut client, options, file, max_bytes).await {
            Ok(bytes) => {
                stats.debug_files_uploaded.fetch_add(1, Relaxed);
                stats.debug_bytes_uploaded.fetch_add(bytes, Relaxed);
                tracing::info!(
                    path = file.file.path,
                    build_id = file.build_id,
                    bytes,
                    "uploaded debug information"
                );
            }
            // Another node was faster.
            Err(status) if status.code() == Code::AlreadyExists => {}
            Err(status) if status.code() == Code::Unavailable => return Err(status),
            Err(status) => {
                stats.debug_uploads_failed.fetch_add(1, Relaxed);
                tracing::info!(
                    path = file.file.path,
                    build_id = file.build_id,
                    reason = status.message(),
                    "cannot upload debug information"
                );
            }
        }
    }
    Ok(())
}

/// Sends one file within the rate. Returns its size.
async fn send(
    client: &mut Client,
    options: &DebugUploadOptions,
    offered: &OfferedFile,
    max_bytes: u64,
) -> Result<u64, Status> {
    let theirs = Arc::clone(&offered.file);
    let size = tokio::task::spawn_blocking(move || read_file(&theirs, std::fs::File::metadata));
    let bytes = match size.await {
        Ok(Ok(Ok(Ok(metadata)))) => metadata.len(),
        _ => return Err(Status::aborted("the file cannot be read")),
    };
    if bytes > max_bytes {
        return Err(Status::resource_exhausted(format!(
            "the file has {bytes} bytes, the limit is {max_bytes} (--debuginfo-upload-file-bytes, and --debuginfo-file-bytes of the \
             collector)"
        )));
    }
    let (sender, receiver) = mpsc::channel(WAITING_CHUNKS);
    let begin = Begin { build_id: offered.build_id.clone(), bytes };
    let feed = feed(sender, begin, offered, options.bytes_per_second);
    let (answer, ()) = tokio::join!(client.send_debug_info(ReceiverStream::new(receiver)), feed);
    answer.map(|_| bytes)
}

/// Reads the file piece by piece, on the workers that read all files of processes. Ends early if it cannot be read, or if the
/// collector has answered; the collector refuses a file that is not complete.
async fn feed(sender: mpsc::Sender<UploadDebugInfoRequest>, begin: Begin, offered: &OfferedFile, rate: u64) {
    let message = |message| UploadDebugInfoRequest { message: Some(message) };
    let bytes = begin.bytes;
    if sender.send(message(Message::Begin(begin))).await.is_err() {
        return;
    }
    let mut offset = 0;
    while offset < bytes {
        let theirs = Arc::clone(&offered.file);
        let wanted = CHUNK_BYTES.min(usize::try_from(bytes - offset).unwrap_or(CHUNK_BYTES));
        let read = move |open: &std::fs::File| {
            let mut chunk = vec![0; wanted];
            open.read_exact_at(&mut chunk, offset).map(|()| chunk)
        };
        let chunk = tokio::task::spawn_blocking(move || read_file(&theirs, read)).await;
        let Ok(Ok(Ok(Ok(chunk)))) = chunk else { return };
        offset += chunk.len() as u64;
        let pause = Duration::from_secs_f64(chunk.len() as f64 / rate.max(1) as f64);
        if sender.send(message(Message::Data(chunk))).await.is_err() {
            return;
        }
        tokio::time::sleep(pause).await;
    }
}
