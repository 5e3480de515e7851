//! Reads the bodies of HTTP requests, within bounds of size and time.

use std::{io::Read as _, time::Duration};

use axum::{
    body::Body,
    http::{HeaderMap, HeaderValue, header},
};
use flate2::read::MultiGzDecoder;
use futures::StreamExt as _;
use tonic::Status;

/// Time limit for a client to send its request.
const READ_TIMEOUT: Duration = Duration::from_secs(30);

/// Reads the body of a request, and removes its compression.
pub(crate) async fn read_message(headers: &HeaderMap, body: Body, max: usize) -> Result<Vec<u8>, Status> {
    let is_gzip = match headers.get(header::CONTENT_ENCODING).map(HeaderValue::as_bytes) {
        None | Some(b"" | b"identity") => false,
        Some(b"gzip") => true,
        Some(_) => {
            return Err(Status::unimplemented("content-encoding: this server reads gzip and identity"));
        }
    };
    let bytes = read_body(body, max).await?;
    if !is_gzip {
        return Ok(bytes);
    }
    let mut out = Vec::new();
    MultiGzDecoder::new(bytes.as_slice()).take(max as u64 + 1).read_to_end(&mut out).map_err(|error| {
        Status::invalid_argument(format!("cannot decompress the request by gzip: {error}"))
    })?;
    if out.len() > max { Err(too_large(max)) } else { Ok(out) }
}

/// Reads a body of at most `max` bytes.
async fn read_body(body: Body, max: usize) -> Result<Vec<u8>, Status> {
    let read = async {
        let (mut bytes, mut chunks) = (Vec::new(), body.into_data_stream());
        while let Some(chunk) = chunks.next().await {
            let chunk =
                chunk.map_err(|error| Status::cancelled(format!("cannot read the request: {error}")))?;
            if bytes.len() + chunk.len() > max {
                return Err(too_large(max));
            }
            bytes.extend_from_slice(&chunk);
        }
        Ok(bytes)
    };
    tokio::time::timeout(READ_TIMEOUT, read).await.unwrap_or_else(|_| {
        Err(Status::deadline_exceeded(format!(
            "the request did not arrive within {} s",
            READ_TIMEOUT.as_secs()
        )))
    })
}

fn too_large(max: usize) -> Status {
    Status::resource_exhausted(format!("the request is larger than {max} bytes"))
}
