//! The HTTP service: `POST /v1development/profiles` in protobuf or JSON.

use std::io::Read as _;

use axum::{
    body::Bytes,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use flate2::read::MultiGzDecoder;
use opentelemetry_proto::tonic::collector::profiles::v1development::ExportProfilesServiceResponse;
use prost::Message as _;
use serde_json::json;
use tonic::Code;

use super::{Format, MAX_REQUEST_BYTES, OtlpReceiver, RETRY_AFTER, Rejection, VERSION_HEADER, check_version};
use crate::auth::Caller;

/// The error of OTLP over HTTP: `google.rpc.Status`.
#[derive(Clone, PartialEq, prost::Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
}

/// Answers a request.
pub(crate) async fn export(
    receiver: &OtlpReceiver,
    caller: &Caller,
    headers: &HeaderMap,
    body: Bytes,
) -> Response {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or("");
    let format = match kind.split(';').next().unwrap_or("").trim() {
        "application/x-protobuf" => Format::Protobuf,
        "application/json" => Format::Json,
        other => {
            let why = format!(
                "content-type is `{}`: send application/x-protobuf or application/json",
                other.chars().take(64).collect::<String>().escape_debug()
            );
            return error(Format::Json, StatusCode::UNSUPPORTED_MEDIA_TYPE, Code::InvalidArgument, why);
        }
    };
    let invalid = |why| error(format, StatusCode::BAD_REQUEST, Code::InvalidArgument, why);
    let body = match inflated(headers, body) {
        Ok(body) => body,
        Err(why) => return invalid(why),
    };
    let versions = headers.get_all(VERSION_HEADER).iter().map(|value| value.to_str().ok());
    let received = match check_version(versions) {
        Ok(()) => receiver.receive(caller, body, format).await,
        Err(rejection) => Err(rejection),
    };
    match received {
        Ok(response) => answer(format, StatusCode::OK, &response),
        Err(Rejection::Busy { why }) => {
            let mut response = error(format, StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable, why);
            let seconds = HeaderValue::from(RETRY_AFTER.as_secs());
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
            response
        }
        Err(rejection) => invalid(rejection.to_string()),
    }
}

/// Returns the body without compression.
fn inflated(headers: &HeaderMap, body: Bytes) -> Result<Bytes, String> {
    let encoding = headers.get(header::CONTENT_ENCODING).and_then(|encoding| encoding.to_str().ok());
    let body = match encoding.map_or("identity", str::trim) {
        "identity" | "" => body,
        "gzip" => {
            let mut inflated = Vec::new();
            let limit = MAX_REQUEST_BYTES as u64 + 1;
            MultiGzDecoder::new(&*body)
                .take(limit)
                .read_to_end(&mut inflated)
                .map_err(|error| format!("the gzip body is damaged: {error}"))?;
            inflated.into()
        }
        other => {
            let other = other.chars().take(64).collect::<String>();
            return Err(format!("content-encoding is `{}`: send gzip, or none", other.escape_debug()));
        }
    };
    if body.len() > MAX_REQUEST_BYTES {
        return Err(format!(
            "the request is larger than {MAX_REQUEST_BYTES} bytes: send fewer profiles at a time"
        ));
    }
    Ok(body)
}

fn answer(format: Format, status: StatusCode, response: &ExportProfilesServiceResponse) -> Response {
    match format {
        Format::Protobuf => {
            (status, [(header::CONTENT_TYPE, "application/x-protobuf")], response.encode_to_vec())
                .into_response()
        }
        Format::Json => {
            let body = match &response.partial_success {
                // JSON of protobuf has 64-bit numbers as text.
                Some(partial) => json!({ "partialSuccess": {
                    "rejectedProfiles": partial.rejected_profiles.to_string(),
                    "errorMessage": partial.error_message,
                } }),
                None => json!({}),
            };
            (status, axum::Json(body)).into_response()
        }
    }
}

fn error(format: Format, status: StatusCode, code: Code, message: String) -> Response {
    match format {
        Format::Protobuf => {
            let body = RpcStatus { code: code as i32, message }.encode_to_vec();
            (status, [(header::CONTENT_TYPE, "application/x-protobuf")], body).into_response()
        }
        Format::Json => {
            (status, axum::Json(json!({ "code": code as i32, "message": message }))).into_response()
        }
    }
}
