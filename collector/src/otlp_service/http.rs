//! The HTTP service: `POST /v1development/profiles` in protobuf or JSON.

use axum::{
    body::{Body, Bytes},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use opentelemetry_proto::tonic::collector::profiles::v1development::ExportProfilesServiceResponse;
use prost::Message as _;
use serde_json::json;
use tonic::Code;

use super::{Format, MAX_REQUEST_BYTES, OtlpReceiver, RETRY_AFTER, Rejection, VERSION_HEADER, check_version};
use crate::{auth::Caller, http_body::read_message};

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
    body: Body,
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
    let refused = |rejection: Rejection| match rejection {
        Rejection::Busy { why } => {
            let mut response = error(format, StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable, why);
            let seconds = HeaderValue::from(RETRY_AFTER.as_secs());
            response.headers_mut().insert(header::RETRY_AFTER, seconds);
            response
        }
        rejection => error(format, StatusCode::BAD_REQUEST, Code::InvalidArgument, rejection.to_string()),
    };
    let _slot = match receiver.slot() {
        Ok(slot) => slot,
        Err(rejection) => return refused(rejection),
    };
    let body = match read_message(headers, body, MAX_REQUEST_BYTES).await {
        Ok(body) => Bytes::from(body),
        Err(status) => {
            let http = match status.code() {
                Code::ResourceExhausted => StatusCode::PAYLOAD_TOO_LARGE,
                Code::DeadlineExceeded => StatusCode::REQUEST_TIMEOUT,
                _ => StatusCode::BAD_REQUEST,
            };
            return error(format, http, status.code(), status.message().to_owned());
        }
    };
    let versions = headers.get_all(VERSION_HEADER).iter().map(|value| value.to_str().ok());
    let received = match check_version(versions) {
        Ok(()) => receiver.receive(caller, body, format).await,
        Err(rejection) => Err(rejection),
    };
    match received {
        Ok(response) => answer(format, StatusCode::OK, &response),
        Err(rejection) => refused(rejection),
    }
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
