//! The gRPC service. It reads messages itself, so that a request of an older layout gets an answer that says so.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf as _, Bytes};
use opentelemetry_proto::tonic::collector::profiles::v1development::ExportProfilesServiceResponse;
use tonic::{
    Code, Request, Response, Status,
    body::Body,
    codec::{Codec, CompressionEncoding, DecodeBuf, Decoder, EnabledCompressionEncodings},
    server::{Grpc, NamedService, UnaryService},
};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::{Format, MAX_REQUEST_BYTES, OtlpReceiver, RETRY_AFTER, Rejection, VERSION_HEADER, check_version};
use crate::auth::Caller;

/// The one method of the service.
const EXPORT: &str = "/opentelemetry.proto.collector.profiles.v1development.ProfilesService/Export";

/// The service of OTLP profiles.
#[derive(Clone)]
pub(crate) struct OtlpGrpc(pub(crate) OtlpReceiver);

impl NamedService for OtlpGrpc {
    const NAME: &'static str = "opentelemetry.proto.collector.profiles.v1development.ProfilesService";
}

impl tower::Service<http::Request<Body>> for OtlpGrpc {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let receiver = self.0.clone();
        Box::pin(async move {
            if request.uri().path() != EXPORT {
                return Ok(Status::unimplemented("the service has the method Export").into_http());
            }
            let _slot = match receiver.slot() {
                Ok(slot) => slot,
                Err(rejection) => return Ok(of_rejection(&rejection).into_http()),
            };
            let mut accepted = EnabledCompressionEncodings::default();
            accepted.enable(CompressionEncoding::Gzip);
            accepted.enable(CompressionEncoding::Zstd);
            let mut grpc = Grpc::new(RawCodec)
                .apply_compression_config(accepted, EnabledCompressionEncodings::default())
                .apply_max_message_size_config(Some(MAX_REQUEST_BYTES), None);
            Ok(grpc.unary(Export(receiver), request).await)
        })
    }
}

struct Export(OtlpReceiver);

impl UnaryService<Bytes> for Export {
    type Response = ExportProfilesServiceResponse;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Self::Response>, Status>> + Send>>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        let receiver = self.0.clone();
        Box::pin(async move {
            let versions = request.metadata().get_all(VERSION_HEADER).iter();
            check_version(versions.map(|value| value.to_str().ok()))
                .map_err(|rejection| of_rejection(&rejection))?;
            let caller = request.extensions().get::<Caller>().cloned().unwrap_or_default();
            let received = receiver.receive(&caller, request.into_inner(), Format::Protobuf).await;
            received.map(Response::new).map_err(|rejection| of_rejection(&rejection))
        })
    }
}

fn of_rejection(rejection: &Rejection) -> Status {
    let message = rejection.to_string();
    match rejection {
        Rejection::Invalid(_) | Rejection::Version(_) => Status::invalid_argument(message),
        Rejection::Busy { .. } => {
            let details = ErrorDetails::with_retry_info(Some(RETRY_AFTER));
            Status::with_error_details(Code::Unavailable, message, details)
        }
    }
}

/// Reads a message as its bytes.
struct RawCodec;

impl Codec for RawCodec {
    type Encode = ExportProfilesServiceResponse;
    type Decode = Bytes;
    type Encoder = tonic_prost::ProstEncoder<ExportProfilesServiceResponse>;
    type Decoder = RawDecoder;

    fn encoder(&mut self) -> Self::Encoder {
        tonic_prost::ProstEncoder::default()
    }

    fn decoder(&mut self) -> RawDecoder {
        RawDecoder
    }
}

struct RawDecoder;

impl Decoder for RawDecoder {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}
