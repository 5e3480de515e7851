//! Profiles that clients of Pyroscope push: `push.v1.PusherService/Push` and `/ingest`.
//!
//! A pushed profile becomes a batch like that of an agent and takes the same way, through the same checks and limits.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::Response,
};
use gannet_proto::{
    foreign::pyroscope::{PushRequest, PushResponse, RawProfileSeries},
    ingest::Batch,
    labels::{self, Labels},
    pprof::{self, Encoding, MAX_STACK_FRAMES, Profile},
};
use tokio::sync::Semaphore;
use tonic::Status;
use ulid::Ulid;

use super::wire::{self, Method};
use crate::{
    auth::Caller,
    ingest::{Ingest, NotStored},
    limits::MAX_INFLATION,
    profile_type::{PROFILE_NAME, ProfileType},
    time,
};

/// Requests whose profiles are in memory at one time.
const CONCURRENT_PUSHES: usize = 16;
/// Profiles that are decoded at one time. A hostile one takes some hundred MiB.
const CONCURRENT_READS: usize = 2;
/// Profiles of one request.
const MAX_PROFILES: usize = 256;
/// Bytes of a message beside its profiles: labels and ids.
const MESSAGE_BYTES: usize = 1 << 20;

/// The way of pushed profiles into the store, with a bound on those in memory.
pub(super) struct Pushes {
    ingest: Ingest,
    slots: Semaphore,
    reads: Semaphore,
}

/// A profile and its labels, as a client sent them.
pub(crate) struct Pushed {
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) profile: Profile,
    /// `None`: the client has no id for it.
    pub(crate) id: Option<Ulid>,
    /// Start in milliseconds since 1970, for a profile without one.
    pub(crate) start_ms: Option<u64>,
    /// Length, for a profile without one.
    pub(crate) duration_ms: u64,
    /// Name of the sender, for the reason that the page shows.
    pub(crate) sender: String,
}

pub(super) async fn push(State(pushes): State<Arc<Pushes>>, request: Request) -> Response {
    let Ok(_slot) = pushes.slots.try_acquire() else { return wire::error_response(&busy()) };
    let caller = request.extensions().get::<Caller>().cloned().unwrap_or_default();
    let sender = user_agent(request.headers());
    let method =
        Method { service: "push.v1.PusherService", name: "Push", max_bytes: pushes.max_message_bytes() };
    let take = |message: PushRequest| pushes.store_all(message, &caller, &sender);
    retry_later(wire::unary(method, request, take).await)
}

pub(super) fn busy() -> Status {
    Status::resource_exhausted(format!("{CONCURRENT_PUSHES} other pushes are in progress: try again"))
}

/// Adds the time after which a throttled client may try again.
pub(super) fn retry_later(mut response: Response) -> Response {
    if response.status() == StatusCode::TOO_MANY_REQUESTS {
        response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}

/// Returns the first word of the client's name: `pyroscope-rs/pyspy/1.4.0`.
pub(super) fn user_agent(headers: &HeaderMap) -> String {
    let name = headers.get(header::USER_AGENT).and_then(|name| name.to_str().ok()).unwrap_or_default();
    name.split(' ').next().unwrap_or_default().chars().take(64).collect()
}

impl Pushes {
    pub(super) fn new(ingest: Ingest) -> Arc<Self> {
        Arc::new(Self {
            ingest,
            slots: Semaphore::new(CONCURRENT_PUSHES),
            reads: Semaphore::new(CONCURRENT_READS),
        })
    }

    pub(super) fn slots(&self) -> &Semaphore {
        &self.slots
    }

    /// Bytes of the largest request: several profiles, or one that is too large, so that the answer can say so.
    pub(super) fn max_message_bytes(&self) -> usize {
        self.ingest.max_batch_bytes() as usize * 2 + MESSAGE_BYTES
    }

    /// Bytes of the largest profile without compression.
    pub(super) fn max_inflated(&self) -> usize {
        self.ingest.max_batch_bytes() as usize * MAX_INFLATION
    }

    /// Stores all profiles of a message. The error of one does not keep the others from the store, as in Pyroscope.
    async fn store_all(
        &self,
        message: PushRequest,
        caller: &Caller,
        sender: &str,
    ) -> Result<PushResponse, Status> {
        let count: usize = message.series.iter().map(|series| series.samples.len()).sum();
        if count == 0 {
            return Err(Status::invalid_argument("series: the message has no profile"));
        }
        if count > MAX_PROFILES {
            return Err(Status::invalid_argument(format!(
                "series: {count} profiles, and at most {MAX_PROFILES} are allowed in one message"
            )));
        }
        let mut first_error = None;
        for (index, series) in message.series.into_iter().enumerate() {
            let RawProfileSeries { labels, samples } = series;
            let labels: Vec<(String, String)> =
                labels.into_iter().map(|label| (label.name, label.value)).collect();
            for sample in samples {
                let (id, id_text) = (parse_id(&sample.id), sample.id.clone());
                let (labels, sender, max) = (labels.clone(), sender.to_owned(), self.max_inflated());
                let read = move || {
                    let profile = pprof::decode(&sample.raw_profile, max).map_err(|error| invalid(&error))?;
                    Ok(Pushed { labels, profile, id, start_ms: None, duration_ms: 0, sender })
                };
                let stored = self.store(read, caller).await;
                if let Err(status) = stored {
                    let id: String = id_text.chars().take(64).collect();
                    let text = format!("series[{index}], profile `{id}`: {}", status.message());
                    first_error.get_or_insert(Status::new(status.code(), text));
                }
            }
        }
        first_error.map_or(Ok(PushResponse {}), Err)
    }

    /// Stores the profile that `read` returns. One without a sample is accepted and not stored.
    pub(super) async fn store(
        &self,
        read: impl FnOnce() -> Result<Pushed, Status> + Send + 'static,
        caller: &Caller,
    ) -> Result<(), Status> {
        let ended = || Status::unavailable("the collector is shutting down");
        let turn = self.reads.acquire().await.map_err(|_| ended())?;
        let batch = tokio::task::spawn_blocking(move || read().and_then(batch_of)).await;
        drop(turn);
        let Some(batch) = batch.map_err(|_| ended())?? else { return Ok(()) };
        if let Some(node) = batch.labels.get(labels::NODE)
            && caller.may_be_node(node).is_err()
        {
            return Err(Status::permission_denied(format!(
                "labels: node is `{node}`, and {} may not speak for it (--node-identity)",
                caller.display_name
            )));
        }
        self.ingest.store_one(batch).await.map_err(|error| match error {
            NotStored::Refused(reason) => Status::invalid_argument(reason),
            NotStored::Throttled(reason) => Status::resource_exhausted(reason),
        })
    }
}

pub(super) fn invalid(error: &pprof::PprofError) -> Status {
    Status::invalid_argument(error.to_string())
}

/// Returns the 128 bits of a UUID, or a ULID. A profile that comes twice with one id is stored once.
pub(super) fn parse_id(text: &str) -> Option<Ulid> {
    let digits: String = text.chars().filter(|c| *c != '-').take(33).collect();
    let uuid = u128::from_str_radix(&digits, 16).ok().filter(|id| digits.len() == 32 && *id != 0).map(Ulid);
    uuid.or_else(|| Ulid::from_string(text).ok())
}

/// Builds the batch of a profile, or `None` if no sample is left.
pub(crate) fn batch_of(pushed: Pushed) -> Result<Option<Batch>, Status> {
    let Pushed { labels, mut profile, id, start_ms, duration_ms, sender } = pushed;
    tidy(&mut profile);
    let summary = pprof::check(&profile).map_err(|error| invalid(&error))?;
    if summary.samples == 0 {
        return Ok(None);
    }
    let types: Vec<&str> = summary.sample_types.iter().map(String::as_str).collect();
    let labels = series_labels(labels, &types)?;
    let ms = |nanos: i64| u64::try_from(nanos / 1_000_000).ok().filter(|ms| *ms > 0);
    let start = ms(profile.time_nanos).or(start_ms).unwrap_or_else(time::now_ms);
    let duration = ms(profile.duration_nanos).unwrap_or(duration_ms);
    Ok(Some(Batch {
        batch_id: id.unwrap_or_else(Ulid::new).to_string(),
        labels,
        pprof: pprof::encode_as(&profile, Encoding::Zstd),
        samples: summary.totals.first().and_then(|total| u64::try_from(*total).ok()).unwrap_or(0),
        start: Some(time::timestamp(start)),
        duration: Some(time::duration_from_ms(duration)),
        reason: if sender.is_empty() { "pushed".to_owned() } else { format!("pushed by {sender}") },
        ..Batch::default()
    }))
}

/// Removes samples that Pyroscope drops too: those with a negative value, and those without any. Cuts the leaf end of stacks
/// that are too deep. Of labels with one key, as Go writes them, the first stays.
fn tidy(profile: &mut Profile) {
    let frames: std::collections::HashMap<u64, usize> =
        profile.location.iter().map(|location| (location.id, location.line.len().max(1))).collect();
    profile.sample.retain_mut(|sample| {
        let mut room = MAX_STACK_FRAMES;
        let fits = sample.location_id.iter().rev().take_while(|id| {
            let frames = frames.get(*id).copied().unwrap_or(1);
            let fits = frames <= room;
            room -= frames.min(room);
            fits
        });
        let cut = sample.location_id.len() - fits.count();
        sample.location_id.drain(..cut);
        let mut keys = std::collections::HashSet::new();
        sample.label.retain(|label| keys.insert(label.key));
        // The check of the profile reports a sample with too few or too many values.
        sample.value.iter().all(|value| *value >= 0) && sample.value.iter().any(|value| *value != 0)
    });
}

/// Returns the labels of a series from those of Pyroscope. `types`: the sample types of the profile.
fn series_labels(pushed: Vec<(String, String)>, types: &[&str]) -> Result<Labels, Status> {
    let (mut series, mut name) = (Labels::new(), None);
    for (label, value) in pushed {
        if label == "__name__" {
            name = Some(value.strip_prefix("godeltaprof_").unwrap_or(&value).to_owned());
            continue;
        }
        // Notes to Pyroscope, such as `__delta__` and `__session_id__`.
        if label.starts_with("__") || value.is_empty() {
            continue;
        }
        let safe = labels::safe_name(&label);
        if series.insert(safe.clone(), value).is_some() {
            return Err(Status::invalid_argument(format!(
                "labels: two of them are `{safe}`, with `_` for other characters than letters and digits"
            )));
        }
    }
    let service = series.entry(labels::SERVICE_NAME.to_owned()).or_default();
    if service.is_empty() {
        "unknown_service".clone_into(service);
    }
    if let Some(name) = name.filter(|name| !name.is_empty() && *name != ProfileType::name_of(types)) {
        series.insert(PROFILE_NAME.to_owned(), name);
    }
    labels::check(&series).map_err(|error| Status::invalid_argument(format!("labels: {error}")))?;
    Ok(series)
}

#[cfg(test)]
mod tests {
    use gannet_proto::profiles::{Label, Location, Sample, ValueType};
    use rstest::rstest;

    use super::*;

    fn labels_of(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[rstest]
    #[case(&[("__name__", "process_cpu"), ("service_name", "a"), ("otel.scope.name", "x"), ("__delta__", "false")],
        "otel_scope_name=x service_name=a")]
    #[case(&[("__name__", "godeltaprof_block"), ("empty", "")], "profile_name=block service_name=unknown_service")]
    #[case(&[], "service_name=unknown_service")]
    fn labels_become_those_of_a_series(#[case] pushed: &[(&str, &str)], #[case] want: &str) {
        let found = series_labels(labels_of(pushed), &["cpu/nanoseconds"]).unwrap();
        let text: Vec<String> = found.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(text.join(" "), want);
    }

    #[test]
    fn labels_that_clash_or_are_too_long_are_refused() {
        let clash = series_labels(labels_of(&[("a.b", "1"), ("a-b", "2")]), &[]).unwrap_err();
        assert!(clash.message().contains("`a_b`"), "{clash}");
        let long = series_labels(labels_of(&[("a", &"x".repeat(5000))]), &[]).unwrap_err();
        assert!(long.message().contains("2048"), "{long}");
    }

    #[test]
    fn samples_are_cut_and_dropped_as_by_pyroscope() {
        let sample = |value: i64, stack: Vec<u64>| Sample {
            value: vec![value],
            location_id: stack,
            label: vec![
                Label { key: 1, num: 1, ..Label::default() },
                Label { key: 1, num: 2, ..Label::default() },
            ],
        };
        let mut profile = Profile {
            sample_type: vec![ValueType { r#type: 1, unit: 1 }],
            string_table: vec![String::new(), "x".into()],
            location: vec![Location { id: 1, ..Location::default() }],
            sample: vec![
                sample(1, vec![1; 5000]),
                sample(0, vec![1]),
                sample(-3, vec![1]),
                sample(2, vec![1]),
            ],
            ..Profile::default()
        };
        tidy(&mut profile);
        let left: Vec<(i64, usize, usize)> =
            profile.sample.iter().map(|s| (s.value[0], s.location_id.len(), s.label.len())).collect();
        assert_eq!(left, [(1, MAX_STACK_FRAMES, 1), (2, 1, 1)]);
    }

    #[rstest]
    #[case("4db10b29-e8c1-458d-b917-c3df6377d63d", Some(0x4db1_0b29_e8c1_458d_b917_c3df_6377_d63d))]
    #[case("01ARZ3NDEKTSV4RRFFQ69G5FAV", Some(Ulid::from_string("01ARZ3NDEKTSV4RRFFQ69G5FAV").unwrap().0))]
    #[case("00000000-0000-0000-0000-000000000000", None)]
    #[case("", None)]
    #[case("7", None)]
    fn ids_are_uuids_or_ulids(#[case] text: &str, #[case] id: Option<u128>) {
        assert_eq!(parse_id(text).map(|id| id.0), id);
    }
}
