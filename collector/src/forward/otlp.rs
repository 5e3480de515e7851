//! The client of OTLP receivers, by gRPC or HTTP, and the requests that it sends.

use std::{
    collections::{BTreeMap, VecDeque},
    io::Write as _,
};

use flate2::{Compression, write::GzEncoder};
use gannet_otlp::{Encoder, Outgoing};
use gannet_proto::{connect::Connection, pprof};
use opentelemetry_proto::tonic::collector::profiles::v1development::{
    ExportProfilesPartialSuccess, ExportProfilesServiceRequest, ExportProfilesServiceResponse,
    profiles_service_client::ProfilesServiceClient,
};
use prost::Message as _;
use reqwest::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderValue};
use tonic::{Code, codec::CompressionEncoding};
use tonic_types::StatusExt as _;

use super::{
    Delivery, ForwardError, ForwardItem, ForwardOptions, ForwardTarget, grpc_connection, http::HttpClient,
    part_id,
};

/// Path of OTLP over HTTP.
const PATH: &str = "/v1development/profiles";
/// Registered port of OTLP over HTTP.
const HTTP_PORT: u16 = 4318;
/// Header with the version of the protocol, which is in development.
const VERSION_HEADER: &str = "otlp-profiles-development-version";
const VERSION: &str = "1";
/// Bytes of the largest request: receivers read messages of up to 4 MiB by default.
const MAX_REQUEST_BYTES: usize = (4 << 20) - (64 << 10);
/// Bytes of the pprof profiles that one request is made from.
const MAX_PPROF_BYTES: usize = 2 << 20;
const MAX_PART_SAMPLES: usize = 16_000;

pub(super) enum OtlpClient {
    Grpc(Box<ProfilesServiceClient<Connection>>),
    Http { client: HttpClient, url: String },
}

impl OtlpClient {
    /// Builds the client, which connects with the first call. A URL with a path, or with the port 4318, means HTTP.
    pub(super) fn new(target: &ForwardTarget, options: &ForwardOptions) -> Result<Self, ForwardError> {
        let uri: ::http::Uri = target.url.parse().unwrap_or_default();
        let path = uri.path().trim_end_matches('/');
        if !path.is_empty() || uri.port_u16() == Some(HTTP_PORT) {
            let url = if path.ends_with(PATH) { target.url.clone() } else { target.url.clone() + PATH };
            return Ok(Self::Http { client: HttpClient::new(target, options)?, url });
        }
        let connection = grpc_connection(target, options)?;
        // A receiver may answer with the compression of the request.
        let client = ProfilesServiceClient::new(connection)
            .send_compressed(CompressionEncoding::Gzip)
            .accept_compressed(CompressionEncoding::Gzip);
        Ok(Self::Grpc(Box::new(client)))
    }

    pub(super) async fn send(&self, request: &ExportProfilesServiceRequest) -> Delivery {
        let answer = match self {
            Self::Grpc(client) => {
                let mut request = tonic::Request::new(request.clone());
                let version = tonic::metadata::MetadataValue::from_static(VERSION);
                request.metadata_mut().insert(VERSION_HEADER, version);
                match client.as_ref().clone().export(request).await {
                    Ok(response) => response.into_inner(),
                    Err(status) => return of_status(&status),
                }
            }
            Self::Http { client, url } => {
                let mut headers = HeaderMap::new();
                headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-protobuf"));
                headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
                headers.insert(VERSION_HEADER, HeaderValue::from_static(VERSION));
                match client.post(url, headers, gzip(&request.encode_to_vec())).await {
                    // An answer that cannot be read accepts the request all the same.
                    Ok(body) => ExportProfilesServiceResponse::decode(&*body).unwrap_or_default(),
                    Err(delivery) => return delivery,
                }
            }
        };
        match answer.partial_success {
            Some(ExportProfilesPartialSuccess { rejected_profiles, error_message })
                if rejected_profiles > 0 || !error_message.is_empty() =>
            {
                let rejected = u64::try_from(rejected_profiles).unwrap_or(0);
                Delivery::Partly { rejected, why: error_message }
            }
            _ => Delivery::Accepted,
        }
    }
}

/// The protocol says which codes may be sent again. UNKNOWN is a broken connection here, and a token file may soon hold a valid
/// token.
fn of_status(status: &tonic::Status) -> Delivery {
    let why = status.to_string();
    let after = status.get_details_retry_info().and_then(|info| info.retry_delay);
    match status.code() {
        Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unavailable
        | Code::DataLoss
        | Code::Unauthenticated
        | Code::Unknown => Delivery::Retry { why, after },
        Code::ResourceExhausted if after.is_some() => Delivery::Retry { why, after },
        _ => Delivery::Refused(why),
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    // Writing to memory cannot fail.
    let _ = encoder.write_all(bytes);
    encoder.finish().unwrap_or_default()
}

/// A profile, or a part of a large one, that goes into a request.
pub(super) struct OtlpPart {
    id: String,
    labels: BTreeMap<String, String>,
    profile: pprof::Profile,
}

/// Parts that travel in one request.
pub(super) type Parts = VecDeque<OtlpPart>;

/// Returns the parts of a profile.
pub(super) fn parts(item: &ForwardItem, max_inflated: usize) -> Result<Vec<OtlpPart>, pprof::PprofError> {
    let profile = pprof::decode(&item.pprof, max_inflated)?;
    pprof::check(&profile)?;
    let parts = pprof::split(profile, MAX_PART_SAMPLES, MAX_PPROF_BYTES).into_iter().enumerate();
    Ok(parts
        .map(|(number, profile)| OtlpPart {
            id: part_id(&item.id, number),
            labels: item.labels.clone(),
            profile,
        })
        .collect())
}

/// Distributes parts to as few requests as their size allows.
pub(super) fn together(parts: Vec<OtlpPart>) -> Vec<Parts> {
    let (mut all, mut bytes) = (Vec::<Parts>::new(), usize::MAX);
    for part in parts {
        let more = part.profile.encoded_len();
        match all.last_mut() {
            Some(last) if bytes.saturating_add(more) <= MAX_PPROF_BYTES => {
                last.push_back(part);
                bytes += more;
            }
            _ => {
                all.push(Parts::from([part]));
                bytes = more;
            }
        }
    }
    all
}

/// Returns the request of these parts, or `None` if no receiver would read it.
pub(super) fn request(parts: &Parts) -> Option<ExportProfilesServiceRequest> {
    let mut encoder = Encoder::new();
    for OtlpPart { id, labels, profile } in parts {
        encoder.add(&Outgoing { id, labels, profile });
    }
    let request = encoder.finish();
    (request.encoded_len() <= MAX_REQUEST_BYTES).then_some(request)
}

/// Returns the most OTLP profiles that a part becomes: one for each sample type.
pub(super) fn profiles_of_a_part(parts: &Parts) -> u64 {
    parts.iter().map(|part| part.profile.sample_type.len() as u64).max().unwrap_or(1).max(1)
}

/// Returns the ids of the parts for a line of the log.
pub(super) fn ids(parts: &Parts) -> String {
    match (parts.front(), parts.len()) {
        (Some(part), 1) => part.id.clone(),
        (Some(part), more) => format!("{} and {} more", part.id, more - 1),
        (None, _) => String::new(),
    }
}
