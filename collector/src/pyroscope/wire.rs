//! The Connect protocol for calls with one request and one response, in its two encodings: protobuf and JSON. The same calls also come
//! by gRPC-Web.
//!
//! A client of Connect sends the message as the body of a POST, and gets the response in the same encoding. Errors are always JSON:
//! `{"code":"invalid_argument","message":"…"}`. Connect's specification names codes and status codes.

use std::{io::Write as _, sync::LazyLock, time::Duration};

use axum::{
    extract::Request,
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use flate2::{Compression, write::GzEncoder};
use prost::Message;
use prost_reflect::{
    DescriptorPool, DeserializeOptions, DynamicMessage, MessageDescriptor, MethodDescriptor,
};
use serde_json::json;
use tonic::{Code, Status};

use super::grpc_web::{self, GrpcWeb};
use crate::http_body::read_message;

/// Bytes of a request for profiles, with or without compression. Such requests have some hundred bytes.
pub(super) const MAX_QUERY_BYTES: usize = 1 << 20;
/// Size from which a response is compressed, if the client accepts that.
const MIN_GZIP_BYTES: usize = 1024;
/// Size from which a response is encoded on a thread of its own, because that takes milliseconds.
const LARGE_BYTES: usize = 64 << 10;
const PROTOCOL_VERSION: HeaderName = HeaderName::from_static("connect-protocol-version");
const TIMEOUT: HeaderName = HeaderName::from_static("connect-timeout-ms");

/// The messages of all services. `None` if the descriptors in this program are damaged.
static POOL: LazyLock<Option<DescriptorPool>> =
    LazyLock::new(|| DescriptorPool::decode(gannet_proto::foreign::PYROSCOPE_DESCRIPTORS).ok());

/// A method of a service.
#[derive(Clone, Copy, Debug)]
pub(super) struct Method {
    /// Name of the service, with its package.
    pub(super) service: &'static str,
    pub(super) name: &'static str,
    /// Bytes of the largest request.
    pub(super) max_bytes: usize,
}

impl Method {
    fn descriptor(self) -> Option<MethodDescriptor> {
        let service = POOL.as_ref()?.get_service_by_name(self.service)?;
        service.methods().find(|method| method.name() == self.name)
    }
}

/// The encoding of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    Proto,
    Json,
}

impl Codec {
    fn of(headers: &HeaderMap) -> Option<Self> {
        match content_type(headers).as_str() {
            "application/proto" => Some(Self::Proto),
            "application/json" => Some(Self::Json),
            _ => None,
        }
    }

    const fn content_type(self) -> HeaderValue {
        match self {
            Self::Proto => HeaderValue::from_static("application/proto"),
            Self::Json => HeaderValue::from_static("application/json"),
        }
    }
}

/// Returns the content type of a request in lower case, without parameters.
fn content_type(headers: &HeaderMap) -> String {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    kind.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// Serves one call. `call` gets the request; dropping its future must end the work.
pub(super) async fn unary<Req, Res, F>(
    method: Method,
    request: Request,
    call: impl FnOnce(Req) -> F,
) -> Response
where
    Req: Message + Default,
    Res: Message + 'static,
    F: Future<Output = Result<Res, Status>>,
{
    if let Some(web) = GrpcWeb::of(&content_type(request.headers())) {
        let answer = unary_web(method, web, request, call).await;
        return web.respond(answer);
    }
    let (head, body) = request.into_parts();
    let Some(codec) = Codec::of(&head.headers) else {
        let accepted = [(
            "accept-post",
            "application/proto, application/json, application/grpc-web+proto, application/grpc-web-text+proto",
        )];
        return (StatusCode::UNSUPPORTED_MEDIA_TYPE, accepted).into_response();
    };
    let answer = async {
        let Some(descriptor) = method.descriptor() else {
            return Err(Status::internal("this program lacks the description of its messages"));
        };
        let timeout = check_protocol(&head.headers)?;
        let body = read_message(&head.headers, body, method.max_bytes).await?;
        let request = decode(codec, &descriptor.input(), &body)?;
        let response = within(timeout, call(request)).await?;
        let gzip = accepts_gzip(&head.headers);
        let output = descriptor.output();
        if response.encoded_len() < LARGE_BYTES {
            return encode(codec, &output, &response, gzip);
        }
        let encoded = tokio::task::spawn_blocking(move || encode(codec, &output, &response, gzip)).await;
        encoded.map_err(|_| Status::unavailable("the collector is shutting down"))?
    };
    answer.await.unwrap_or_else(|status| error_response(&status))
}

/// Serves one call by gRPC-Web. Returns the encoded response.
async fn unary_web<Req, Res, F>(
    method: Method,
    web: GrpcWeb,
    request: Request,
    call: impl FnOnce(Req) -> F,
) -> Result<Vec<u8>, Status>
where
    Req: Message + Default,
    Res: Message + 'static,
    F: Future<Output = Result<Res, Status>>,
{
    let (head, body) = request.into_parts();
    let timeout = grpc_web::timeout(&head.headers)?;
    let body = read_message(&head.headers, body, web.max_body(method.max_bytes)).await?;
    let request = Req::decode(web.message(body)?)
        .map_err(|error| Status::invalid_argument(format!("{}: {error}", method.name)))?;
    let response = within(timeout, call(request)).await?;
    let encoded = tokio::task::spawn_blocking(move || response.encode_to_vec()).await;
    encoded.map_err(|_| Status::unavailable("the collector is shutting down"))
}

/// Waits for an answer as long as the client does.
async fn within<Res>(
    timeout: Option<Duration>,
    answer: impl Future<Output = Result<Res, Status>>,
) -> Result<Res, Status> {
    let Some(timeout) = timeout else { return answer.await };
    tokio::time::timeout(timeout, answer).await.map_err(|_| {
        Status::deadline_exceeded(format!("no answer within {} ms, the client's limit", timeout.as_millis()))
    })?
}

/// Returns a response with an empty message, whatever the request holds.
pub(super) async fn empty(request: Request) -> Response {
    let (head, body) = request.into_parts();
    let Some(codec) = Codec::of(&head.headers) else {
        return StatusCode::UNSUPPORTED_MEDIA_TYPE.into_response();
    };
    let read = match check_protocol(&head.headers) {
        Ok(_) => read_message(&head.headers, body, MAX_QUERY_BYTES).await,
        Err(status) => Err(status),
    };
    match read {
        Ok(_) => {
            let body: &'static [u8] = if codec == Codec::Json { b"{}" } else { b"" };
            ([(header::CONTENT_TYPE, codec.content_type())], body).into_response()
        }
        Err(status) => error_response(&status),
    }
}

/// Checks the headers of the protocol. Returns the time that the client waits.
fn check_protocol(headers: &HeaderMap) -> Result<Option<Duration>, Status> {
    if let Some(version) = headers.get(PROTOCOL_VERSION)
        && version != "1"
    {
        return Err(Status::invalid_argument("connect-protocol-version: this server speaks version 1"));
    }
    let Some(timeout) = headers.get(TIMEOUT) else { return Ok(None) };
    let ms = timeout.to_str().ok().filter(|text| text.len() <= 10).and_then(|text| text.parse().ok());
    let ms = ms.ok_or_else(|| {
        Status::invalid_argument("connect-timeout-ms: not a number of milliseconds with at most 10 digits")
    })?;
    Ok(Some(Duration::from_millis(ms)))
}

fn accepts_gzip(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok());
    accepted.flat_map(|value| value.split(',')).any(|encoding| {
        let (name, quality) = encoding.split_once(';').unwrap_or((encoding, ""));
        let refused = quality.trim().strip_prefix("q=").and_then(|q| q.parse::<f32>().ok()) == Some(0.0);
        name.trim().eq_ignore_ascii_case("gzip") && !refused
    })
}

/// Reads the message of a push, for the fuzzer.
pub(super) fn read_push(
    codec: Codec,
    body: &[u8],
) -> Result<gannet_proto::foreign::pyroscope::PushRequest, Status> {
    let method = Method { service: "push.v1.PusherService", name: "Push", max_bytes: MAX_QUERY_BYTES };
    let descriptor = method.descriptor().ok_or_else(|| Status::internal("no description of messages"))?;
    decode(codec, &descriptor.input(), body)
}

fn decode<Req: Message + Default>(codec: Codec, of: &MessageDescriptor, body: &[u8]) -> Result<Req, Status> {
    let invalid = |error: &dyn std::fmt::Display| Status::invalid_argument(format!("{}: {error}", of.name()));
    match codec {
        Codec::Proto => Req::decode(body).map_err(|error| invalid(&error)),
        Codec::Json => {
            let mut json = serde_json::Deserializer::from_slice(body);
            // Clients send fields and values of newer servers.
            let options = DeserializeOptions::new().deny_unknown_fields(false);
            let message = DynamicMessage::deserialize_with_options(of.clone(), &mut json, &options)
                .map_err(|error| invalid(&error))?;
            json.end().map_err(|error| invalid(&error))?;
            message.transcode_to().map_err(|error| invalid(&error))
        }
    }
}

fn encode<Res: Message>(
    codec: Codec,
    of: &MessageDescriptor,
    response: &Res,
    gzip: bool,
) -> Result<Response, Status> {
    let internal = |error: &dyn std::fmt::Display| Status::internal(format!("{}: {error}", of.name()));
    let mut body = response.encode_to_vec();
    if codec == Codec::Json {
        let message =
            DynamicMessage::decode(of.clone(), body.as_slice()).map_err(|error| internal(&error))?;
        body = serde_json::to_vec(&message).map_err(|error| internal(&error))?;
    }
    Ok(respond(codec.content_type(), body, gzip))
}

/// Builds a response, compressed if that is accepted and pays.
fn respond(content_type: HeaderValue, body: Vec<u8>, gzip: bool) -> Response {
    let kind = [(header::CONTENT_TYPE, content_type)];
    if !gzip || body.len() < MIN_GZIP_BYTES {
        return (kind, body).into_response();
    }
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    // Writing to memory does not fail.
    let _ = encoder.write_all(&body);
    match encoder.finish() {
        Ok(compressed) => (kind, [(header::CONTENT_ENCODING, "gzip")], compressed).into_response(),
        Err(_) => (kind, body).into_response(),
    }
}

/// Returns a JSON response of the HTTP endpoints that are older than Connect.
pub(super) fn json_response(headers: &HeaderMap, body: Vec<u8>) -> Response {
    respond(Codec::Json.content_type(), body, accepts_gzip(headers))
}

/// Returns an error in Connect's form, with the HTTP status of its code.
pub(super) fn error_response(status: &Status) -> Response {
    let (code, http) = match status.code() {
        Code::Cancelled => ("canceled", 499),
        Code::InvalidArgument => ("invalid_argument", 400),
        Code::DeadlineExceeded => ("deadline_exceeded", 504),
        Code::NotFound => ("not_found", 404),
        Code::AlreadyExists => ("already_exists", 409),
        Code::PermissionDenied => ("permission_denied", 403),
        Code::ResourceExhausted => ("resource_exhausted", 429),
        Code::FailedPrecondition => ("failed_precondition", 400),
        Code::Aborted => ("aborted", 409),
        Code::OutOfRange => ("out_of_range", 400),
        Code::Unimplemented => ("unimplemented", 501),
        Code::Internal => ("internal", 500),
        Code::Unavailable => ("unavailable", 503),
        Code::DataLoss => ("data_loss", 500),
        Code::Unauthenticated => ("unauthenticated", 401),
        Code::Ok | Code::Unknown => ("unknown", 500),
    };
    let http = StatusCode::from_u16(http).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (http, axum::Json(json!({ "code": code, "message": status.message() }))).into_response()
}

#[cfg(test)]
mod tests {
    use gannet_proto::foreign::pyroscope_querier as api;
    use proptest::prelude::*;

    use super::*;

    fn input(name: &'static str) -> MessageDescriptor {
        Method { service: "querier.v1.QuerierService", name, max_bytes: 0 }.descriptor().unwrap().input()
    }

    #[test]
    fn compression_is_for_clients_that_accept_it() {
        for (accepted, wanted) in
            [("gzip", true), ("br, GZIP;q=0.5", true), ("gzip;q=0", false), ("br", false)]
        {
            let headers =
                HeaderMap::from_iter([(header::ACCEPT_ENCODING, HeaderValue::from_static(accepted))]);
            assert_eq!(accepts_gzip(&headers), wanted, "{accepted}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_decoded_without_a_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..80),
            json in "\\{(\"(start|end|step|groupBy|group_by|limit|exemplarType|x)\":(-?[0-9]{0,20}|\"[a-z0-9]{0,4}\"|null|\\[[0-9,\"]{0,6}\\]|\\{\\}|1e[0-9]{1,3}),?){0,4}\\}",
        ) {
            let of = input("SelectSeries");
            for codec in [Codec::Proto, Codec::Json] {
                let _ = decode::<api::SelectSeriesRequest>(codec, &of, &bytes);
                let _ = decode::<api::SelectSeriesRequest>(codec, &of, json.as_bytes());
            }
        }

        /// Checks that both encodings carry the same, through the descriptors.
        #[test]
        fn a_message_survives_both_encodings(
            start: i64,
            // The JSON reader may round the last bit of other numbers.
            step: u32,
            names in proptest::collection::vec("\\PC{0,6}", 0..4),
        ) {
            let sent = api::SelectSeriesRequest {
                start, step: step.into(), group_by: names, limit: Some(0), ..Default::default()
            };
            let of = input("SelectSeries");
            let message = DynamicMessage::decode(of.clone(), sent.encode_to_vec().as_slice()).unwrap();
            let json = serde_json::to_vec(&message).unwrap();
            prop_assert_eq!(&decode::<api::SelectSeriesRequest>(Codec::Json, &of, &json).unwrap(), &sent);
            prop_assert_eq!(&decode::<api::SelectSeriesRequest>(Codec::Proto, &of, &sent.encode_to_vec()).unwrap(), &sent);
        }
    }
}
