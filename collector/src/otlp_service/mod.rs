//! The receiver of OTLP profiles, by gRPC and HTTP: stores them as if an agent had sent them.
//!
//! The receiver answers a request when all its profiles are durable or refused. If the collector is busy it asks for the whole
//! request again. Profiles that it has stored are then duplicates, because their ids come from their content.

mod grpc;
mod http;

use std::{sync::Arc, time::Duration};

use futures::{StreamExt as _, stream};
use gannet_otlp::{self as otlp, Incoming, OtlpError};
use gannet_proto::{
    ingest::Batch,
    labels,
    pprof::{self, Encoding},
};
use opentelemetry_proto::tonic::collector::profiles::v1development::{
    ExportProfilesPartialSuccess, ExportProfilesServiceResponse,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use ulid::Ulid;

pub(crate) use self::{grpc::OtlpGrpc, http::export};
use crate::{
    auth::Caller,
    ingest::{Ingest, NotStored},
    time,
};

/// Header or metadata with the version of the protocol, which is in development.
const VERSION_HEADER: &str = "otlp-profiles-development-version";
/// The one version that exists.
const VERSION: &str = "1";
/// Bytes of the largest request, without compression.
const MAX_REQUEST_BYTES: usize = 32 << 20;
/// Maximum number of requests in memory. The receiver refuses further ones before it reads them.
const MAX_REQUESTS: usize = 16;
/// Maximum number of requests that the receiver decodes at one time. A hostile one takes 128 MiB.
const CONCURRENT_READS: usize = 2;
/// Profiles of one request that are stored at the same time.
const CONCURRENT_PROFILES: usize = 16;
/// Bytes of one stored profile, without compression. Larger ones are stored in parts.
const MAX_PROFILE_BYTES: usize = 8 << 20;
/// Time after which a busy collector wants a request again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// The reason of the profiles in lists.
const REASON: &str = "received by OTLP";

/// Why a request is not accepted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Rejection {
    /// Sending it again changes nothing.
    #[error(transparent)]
    Invalid(#[from] OtlpError),
    /// The sender speaks another version.
    #[error("{VERSION_HEADER}: this collector speaks version {VERSION}, and {0}")]
    Version(String),
    /// The sender may send it again after [`RETRY_AFTER`].
    #[error("{why}")]
    Busy { why: String },
}

/// Checks the version that a sender names. None means version 1.
fn check_version<'h>(mut values: impl Iterator<Item = Option<&'h str>>) -> Result<(), Rejection> {
    match (values.next(), values.next()) {
        (None, _) | (Some(Some(VERSION)), None) => Ok(()),
        (Some(_), Some(_)) => Err(Rejection::Version("the request names several".into())),
        (Some(other), None) => {
            let other = other.unwrap_or("no text").chars().take(64).collect::<String>();
            Err(Rejection::Version(format!("the request names `{}`", other.escape_debug())))
        }
    }
}

/// The encoding of a request.
#[derive(Clone, Copy)]
enum Format {
    Protobuf,
    Json,
}

/// The receiver of both transports.
#[derive(Clone)]
pub(crate) struct OtlpReceiver {
    ingest: Ingest,
    slots: Arc<Semaphore>,
    reads: Arc<Semaphore>,
}

impl OtlpReceiver {
    pub(crate) fn new(ingest: Ingest) -> Self {
        let [slots, reads] =
            [MAX_REQUESTS, CONCURRENT_READS].map(|permits| Arc::new(Semaphore::new(permits)));
        Self { ingest, slots, reads }
    }

    /// Returns the permit to hold one request in memory. The caller holds it until it has the answer.
    fn slot(&self) -> Result<OwnedSemaphorePermit, Rejection> {
        Arc::clone(&self.slots).try_acquire_owned().map_err(|_| Rejection::Busy {
            why: format!("{MAX_REQUESTS} other requests are in progress: try again"),
        })
    }

    /// Stores the profiles of a request.
    async fn receive(
        &self,
        caller: &Caller,
        bytes: bytes::Bytes,
        format: Format,
    ) -> Result<ExportProfilesServiceResponse, Rejection> {
        let busy = |why: &str| Rejection::Busy { why: why.to_owned() };
        let Ok(turn) = self.reads.acquire().await else {
            return Err(busy("the collector is shutting down"));
        };
        let decoded = tokio::task::spawn_blocking(move || {
            let request = match format {
                Format::Protobuf => otlp::from_protobuf(&bytes),
                Format::Json => otlp::from_json(&bytes),
            }?;
            drop(bytes);
            otlp::decode(request)
        });
        let decoded = decoded.await.map_err(|_| busy("the collector is shutting down"))??;
        drop(turn);
        let (mut rejected, mut why) = (decoded.rejected, decoded.error.map(|error| error.to_string()));
        let stored = stream::iter(decoded.profiles).map(async |incoming| {
            let parts = incoming.parts;
            (parts, self.store(caller, incoming).await)
        });
        let mut stored = stored.buffer_unordered(CONCURRENT_PROFILES);
        let mut throttled = None;
        while let Some((parts, outcome)) = stored.next().await {
            match outcome {
                Ok(()) => {}
                Err(Outcome::Refused(reason)) => {
                    rejected += parts;
                    why.get_or_insert(reason);
                }
                Err(Outcome::Throttled { why }) => throttled = Some(Rejection::Busy { why }),
            }
        }
        if let Some(busy) = throttled {
            return Err(busy);
        }
        let partial_success = (rejected > 0).then(|| ExportProfilesPartialSuccess {
            rejected_profiles: i64::try_from(rejected).unwrap_or(i64::MAX),
            error_message: why.unwrap_or_default(),
        });
        if let Some(partial) = &partial_success {
            tracing::warn!(
                sender = %caller.display_name,
                rejected,
                "refused profiles that came by OTLP: {}",
                partial.error_message.escape_debug()
            );
        }
        Ok(ExportProfilesServiceResponse { partial_success })
    }

    /// Stores one profile, in parts if it is large.
    async fn store(&self, caller: &Caller, incoming: Incoming) -> Result<(), Outcome> {
        let Incoming { id, labels, profile, .. } = incoming;
        let node = labels.get(labels::NODE).map_or("", String::as_str);
        if caller.may_be_node(node).is_err() {
            return Err(Outcome::Refused(format!(
                "the profile comes from node `{node}` (k8s.node.name, host.name), and {} may not speak for it \
                 (--node-identity)",
                caller.display_name
            )));
        }
        let start = u64::try_from(profile.time_nanos).unwrap_or(0) / 1_000_000;
        let duration = u64::try_from(profile.duration_nanos).unwrap_or(0) / 1_000_000;
        let encoded = tokio::task::spawn_blocking(move || {
            let parts = match pprof::check(&profile) {
                Ok(_) => pprof::split(profile, usize::MAX, MAX_PROFILE_BYTES),
                // The ingest says what is wrong with it.
                Err(_) => vec![profile],
            };
            let encode =
                |part: &pprof::Profile| (pprof::samples(part), pprof::encode_as(part, Encoding::Zstd));
            parts.iter().map(encode).collect::<Vec<_>>()
        });
        let shutting_down = || Outcome::Throttled { why: "the collector is shutting down".into() };
        let encoded = encoded.await.map_err(|_| shutting_down())?;
        for (number, (samples, pprof)) in encoded.into_iter().enumerate() {
            // The parts of a profile follow its id.
            let id = Ulid::from_parts(id.timestamp_ms(), id.random().wrapping_add(number as u128));
            let batch = Batch {
                batch_id: id.to_string(),
                labels: labels.clone(),
                pprof,
                samples,
                start: Some(time::timestamp(start)),
                duration: Some(time::duration_from_ms(duration)),
                reason: REASON.to_owned(),
                ..Batch::default()
            };
            self.ingest.store_one(batch).await.map_err(|error| match error {
                NotStored::Refused(reason) => Outcome::Refused(reason),
                NotStored::Throttled(why) => Outcome::Throttled { why },
            })?;
        }
        Ok(())
    }
}

/// Why a profile is not stored.
enum Outcome {
    Refused(String),
    Throttled { why: String },
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case(&[], true)]
    #[case(&[Some("1")], true)]
    #[case(&[Some("2")], false)]
    #[case(&[Some("")], false)]
    #[case(&[None], false)]
    #[case(&[Some("1"), Some("1")], false)]
    fn only_version_one_is_spoken(#[case] values: &[Option<&str>], #[case] is_known: bool) {
        assert_eq!(check_version(values.iter().copied()).is_ok(), is_known);
    }
}
