//! gRPC-Web for calls with one request and one response: a frame with the message and one with the status, as bytes or in base64.
//!
//! A frame is a byte of flags, four bytes of length, and its content. The frame of the status has lines like those of HTTP headers.

use std::time::Duration;

use axum::{
    http::{HeaderMap, HeaderName, HeaderValue, header},
    response::{IntoResponse, Response},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use tonic::Status;

const COMPRESSED: u8 = 0x01;
const STATUS: u8 = 0x80;
/// Bytes of a frame before its content.
const HEAD_BYTES: usize = 5;
const TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// The form of the frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum GrpcWeb {
    Binary,
    Text,
}

impl GrpcWeb {
    /// Returns the form with this content type, which has no parameters.
    pub(super) fn of(content_type: &str) -> Option<Self> {
        match content_type {
            "application/grpc-web" | "application/grpc-web+proto" => Some(Self::Binary),
            "application/grpc-web-text" | "application/grpc-web-text+proto" => Some(Self::Text),
            _ => None,
        }
    }

    /// Returns the bytes of the largest body that has a message of `max` bytes.
    pub(super) fn max_body(self, max: usize) -> usize {
        match self {
            Self::Binary => max + HEAD_BYTES,
            Self::Text => (max + HEAD_BYTES).div_ceil(3) * 4,
        }
    }

    /// Returns the message of a request.
    pub(super) fn message(self, body: Vec<u8>) -> Result<Bytes, Status> {
        let bytes = Bytes::from(match self {
            Self::Binary => body,
            Self::Text => from_base64(&body)?,
        });
        let invalid = |why: &str| Status::invalid_argument(format!("gRPC-Web: {why}"));
        let [flags, length @ ..] =
            *bytes.first_chunk::<HEAD_BYTES>().ok_or_else(|| invalid("the body has no frame"))?;
        if flags & COMPRESSED != 0 {
            return Err(Status::unimplemented(
                "grpc-encoding: this server reads messages without compression",
            ));
        }
        let message = bytes.slice(HEAD_BYTES..);
        if flags != 0 || u32::try_from(message.len()) != Ok(u32::from_be_bytes(length)) {
            return Err(invalid("the body is not one frame with a message of its length"));
        }
        Ok(message)
    }

    /// Returns the response with a message, or with an error. Both have the status 200 of HTTP.
    pub(super) fn respond(self, answer: Result<Vec<u8>, Status>) -> Response {
        let mut body = Vec::new();
        let status = match answer {
            Ok(message) => {
                frame(&mut body, 0, &message);
                Status::ok("")
            }
            Err(status) => status,
        };
        let mut lines = HeaderMap::new();
        // It fails only for metadata that is no header, and a status of ours has none.
        let _ = status.add_header(&mut lines);
        let mut text = Vec::new();
        for (name, value) in &lines {
            text.extend([name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
        }
        frame(&mut body, STATUS, &text);
        let kind = match self {
            Self::Binary => "application/grpc-web+proto",
            Self::Text => {
                body = STANDARD.encode(body).into_bytes();
                "application/grpc-web-text+proto"
            }
        };
        ([(header::CONTENT_TYPE, HeaderValue::from_static(kind))], body).into_response()
    }
}

fn frame(body: &mut Vec<u8>, flags: u8, content: &[u8]) {
    body.push(flags);
    body.extend(u32::try_from(content.len()).unwrap_or(u32::MAX).to_be_bytes());
    body.extend(content);
}

/// Decodes base64. A client may encode each piece of a body by itself, so padding may stand inside.
fn from_base64(text: &[u8]) -> Result<Vec<u8>, Status> {
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    for group in text.chunk_by(|before, after| *before != b'=' || *after == b'=') {
        let piece =
            STANDARD.decode(group).map_err(|error| Status::invalid_argument(format!("gRPC-Web: {error}")))?;
        bytes.extend(piece);
    }
    Ok(bytes)
}

/// Returns the time that the client waits: up to 8 digits and a unit.
pub(super) fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, Status> {
    let Some(value) = headers.get(TIMEOUT) else { return Ok(None) };
    let parse = || {
        let (digits, unit) = value.to_str().ok()?.split_at_checked(value.len().checked_sub(1)?)?;
        let count: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
        Some(match unit {
            "H" => Duration::from_secs(count * 3600),
            "M" => Duration::from_secs(count * 60),
            "S" => Duration::from_secs(count),
            "m" => Duration::from_millis(count),
            "u" => Duration::from_micros(count),
            "n" => Duration::from_nanos(count),
            _ => return None,
        })
    };
    parse()
        .map(Some)
        .ok_or_else(|| Status::invalid_argument("grpc-timeout: not up to 8 digits and a unit, as in 10S"))
}
