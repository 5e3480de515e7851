//! The readers of pushed profiles on any bytes, for the fuzzer.

#![allow(clippy::panic, clippy::expect_used, reason = "a panic is how a target reports a fault")]

use axum::http::{HeaderMap, HeaderValue, header};
use gannet_proto::{
    foreign::pyroscope::{PushRequest, RawProfileSeries},
    labels,
    pprof::{self, Profile},
};
use tonic::Status;

use super::{
    grpc_web::GrpcWeb,
    legacy::parse_time,
    push::{Pushed, batch_of, parse_id},
    upload::{self, Format},
    wire::{self, Codec},
};

/// Inflated bytes of a profile.
const MAX_BYTES: usize = 4 << 20;

/// Reads a request of a client that pushes profiles. The first byte chooses the endpoint and the encoding.
pub fn pushed(bytes: &[u8]) {
    let Some((kind, bytes)) = bytes.split_first() else { return };
    match kind % 8 {
        0 => push(wire::read_push(Codec::Proto, bytes)),
        1 => push(wire::read_push(Codec::Json, bytes)),
        2 => web(GrpcWeb::Binary, bytes),
        3 => web(GrpcWeb::Text, bytes),
        4 => form(bytes),
        5 => text("folded", bytes),
        6 => text("lines", bytes),
        _ => text("pprof", bytes),
    }
}

fn web(form: GrpcWeb, bytes: &[u8]) {
    if let Ok(message) = form.message(bytes.to_vec()) {
        push(wire::read_push(Codec::Proto, &message));
    }
}

/// Reads the profiles of a message.
fn push(message: Result<PushRequest, Status>) {
    let Ok(PushRequest { series }) = message else { return };
    for RawProfileSeries { labels, samples } in series {
        for sample in samples {
            let labels = labels.iter().map(|label| (label.name.clone(), label.value.clone())).collect();
            let id = parse_id(&sample.id);
            store(labels, profile(&sample.raw_profile), id);
        }
    }
}

/// Reads a form of `/ingest`. The boundary of its parts is `b`, so that the fuzzer need not find it.
fn form(bytes: &[u8]) {
    let mut headers = HeaderMap::new();
    let kind = HeaderValue::from_static("multipart/form-data; boundary=b");
    headers.insert(header::CONTENT_TYPE, kind);
    // The body is in memory, so nothing waits.
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().build() else { return };
    if let Ok((body, config)) = runtime.block_on(upload::parts(headers, bytes.to_vec())) {
        let _ = config.as_deref().and_then(upload::name_of_config);
        store(Vec::new(), profile(&body), None);
    }
}

/// Reads a request of `/ingest`: `name`, `from` and `units` on lines of their own, then the body.
fn text(format: &str, bytes: &[u8]) {
    let mut parts = bytes.splitn(4, |byte| *byte == b'\n');
    let mut line = || String::from_utf8_lossy(parts.next().unwrap_or_default()).into_owned();
    let (name, from, units) = (line(), line(), line());
    let body = parts.next().unwrap_or_default();
    let _ = parse_time(&from, 1_700_000_000_000);
    let Ok(labels) = upload::parse_name(&name) else { return };
    let read = match upload::format_of(format, &HeaderMap::new()) {
        Ok(Format::Folded) => upload::parse_lines(body, true, &units, 100),
        Ok(Format::Lines) => upload::parse_lines(body, false, &units, 100),
        Ok(Format::Pprof) => {
            store(labels, profile(body), None);
            return;
        }
        Err(status) => panic!("{status}"),
    };
    let Ok(read) = read else { return };
    assert!(pprof::check(&read).is_ok(), "a profile of lines is valid");
    store(labels, Some(read), None);
}

/// Reads a profile, packed or plain: the fuzzer cannot pack.
fn profile(bytes: &[u8]) -> Option<Profile> {
    pprof::decode(bytes, MAX_BYTES).or_else(|_| pprof::decode_raw(bytes, MAX_BYTES)).ok()
}

/// Builds the batch of a profile. The store takes it as one of an agent, so it must pass the same checks.
fn store(labels: Vec<(String, String)>, profile: Option<Profile>, id: Option<ulid::Ulid>) {
    let Some(profile) = profile else { return };
    let sender = "fuzz".to_owned();
    let pushed = Pushed { labels, profile, id, start_ms: None, duration_ms: 0, sender };
    let Ok(Some(batch)) = batch_of(pushed) else { return };
    assert!(labels::check(&batch.labels).is_ok(), "a batch has valid labels");
    let stored = pprof::decode(&batch.pprof, usize::MAX / 2).expect("a batch has a profile");
    let summary = pprof::check(&stored).expect("a batch has a valid profile");
    assert!(summary.samples > 0, "a batch has a sample");
    assert_eq!(u64::try_from(summary.totals[0]), Ok(batch.samples));
}
