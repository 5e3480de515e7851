//! Spans and traces in every query: each reads only the samples that have them.

use gannet_collector::Running;
use gannet_proto::{
    ingest::Batch,
    pprof::{Profile, check, decode, encode},
    profiles::Label,
    query::{
        FlameGraphRequest, GetProfileRequest, LabelValuesRequest, ListProfilesRequest, MergeRequest,
        ProfileChunk, Selection, SeriesRequest, TimelineRequest, merge_progress,
    },
};
use rstest::rstest;
use serde_json::{Value, json};
use tempfile::TempDir;
use tonic::Code;

use crate::support::{CPU, OFF_CPU, Pusher, at, batch, get, now_ms, profile, queries, start, typed_batch};

const A: &str = "00000000000000aa";
const B: &str = "00000000000000bb";
const TRACE: &str = "000000000000000000000000000000cc";
const NOTHING: &str = "00000000000000ff";

/// A stack with its samples, and the label of its span.
type Traced<'a> = (&'a str, i64, Option<(&'a str, &'a str)>);

/// Returns a batch whose samples have labels of spans.
fn traced(service: &str, start_ms: u64, stacks: &[Traced<'_>]) -> Batch {
    let plain: Vec<(&str, i64)> = stacks.iter().map(|(stack, n, _)| (*stack, *n)).collect();
    let mut profile = profile(CPU, &plain);
    let Profile { sample, string_table, .. } = &mut profile;
    for sample in sample {
        // The builder sorts samples, so their values tell them apart.
        let of_sample = stacks.iter().find(|(_, n, _)| *n == sample.value[0]);
        if let Some((_, _, Some((key, text)))) = of_sample {
            let mut string = |text: &str| {
                string_table.push(text.to_owned());
                string_table.len() as i64 - 1
            };
            sample.label.push(Label { key: string(key), str: string(text), ..Label::default() });
        }
    }
    Batch { pprof: encode(&profile), ..batch(service, start_ms, &plain) }
}

/// Starts a collector with profiles of four minutes. The oldest one has other sample types and no span.
async fn filled() -> (TempDir, Running, u64) {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let t = now_ms() - 600_000;
    pusher.store(typed_batch(OFF_CPU, "shop", t, &[("main;wait", 3)])).await;
    let shop: [Traced<'_>; 2] = [("main;pay", 4, Some(("span_id", A))), ("main;other", 8, None)];
    pusher.store(traced("shop", t + 1, &shop)).await;
    pusher.store(batch("shop", t + 60_000, &[("main;pay", 16)])).await;
    let cart: [Traced<'_>; 3] = [
        ("main;add", 32, Some(("profile_id", &A.to_uppercase()))),
        ("main;sum", 64, Some(("span_id", B))),
        ("main;all", 128, Some(("trace_id", TRACE))),
    ];
    pusher.store(traced("cart", t + 120_000, &cart)).await;
    (dir, running, t)
}

// The form of the requests' fields.
#[allow(clippy::unnecessary_wraps)]
fn of(t: u64, spans: &[&str]) -> Option<Selection> {
    let span_id = spans.iter().map(|id| (*id).to_owned()).collect();
    Some(Selection { from: Some(at(t)), until: Some(at(t + 240_000)), span_id, ..Selection::default() })
}

fn joined(chunks: impl IntoIterator<Item = ProfileChunk>) -> Profile {
    let bytes: Vec<u8> = chunks.into_iter().flat_map(|chunk| chunk.data).collect();
    decode(&bytes, 1 << 20).unwrap()
}

async fn merged(running: &Running, selection: Option<Selection>) -> Result<Profile, tonic::Status> {
    let request = MergeRequest { selection, ..Default::default() };
    let mut answer = queries(running).await.merge(request).await?.into_inner();
    let mut chunks = Vec::new();
    while let Some(message) = answer.message().await? {
        if let Some(merge_progress::Message::Chunk(chunk)) = message.message {
            chunks.push(chunk);
        }
    }
    Ok(joined(chunks))
}

fn functions(profile: &Profile) -> Vec<&str> {
    let mut names: Vec<_> =
        profile.function.iter().map(|f| profile.string_table[f.name as usize].as_str()).collect();
    names.sort_unstable();
    names
}

/// Checks series, label values, list, timeline and flame graph of the gRPC service.
#[tokio::test]
async fn a_selection_of_a_span_has_only_its_samples() {
    let (_dir, running, t) = filled().await;
    let mut client = queries(&running).await;
    let series = client.series(SeriesRequest { selection: of(t, &[A]) }).await.unwrap().into_inner().series;
    let found: Vec<_> =
        series.iter().map(|s| (s.labels["service_name"].as_str(), s.profiles, s.samples)).collect();
    assert_eq!(found, [("cart", 1, 32), ("shop", 1, 4)]);
    let request = LabelValuesRequest { selection: of(t, &[B]), name: "service_name".into() };
    assert_eq!(client.label_values(request).await.unwrap().into_inner().values, ["cart"]);

    let request = ListProfilesRequest { selection: of(t, &[A]), limit: 1, ..Default::default() };
    let first = client.list_profiles(request.clone()).await.unwrap().into_inner();
    let page_token = first.next_page_token;
    let second =
        client.list_profiles(ListProfilesRequest { page_token, ..request }).await.unwrap().into_inner();
    let samples = |profiles: &[gannet_proto::query::ProfileInfo]| {
        profiles.iter().map(|profile| profile.samples).collect::<Vec<_>>()
    };
    assert_eq!((samples(&first.profiles), samples(&second.profiles)), (vec![32], vec![4]));
    assert_eq!(second.next_page_token, "");
    let id = &second.profiles[0].id;
    let one = Selection { profile_id: id.clone(), ..of(t, &[B]).unwrap() };
    let request = ListProfilesRequest { selection: Some(one), ..Default::default() };
    assert_eq!(client.list_profiles(request).await.unwrap().into_inner().profiles, []);

    let request = TimelineRequest {
        selection: of(t, &[A, B]),
        sample_type: "cpu/nanoseconds".into(),
        step: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
    };
    let timeline = client.timeline(request).await.unwrap().into_inner();
    let points: Vec<_> = timeline.points.iter().map(|p| (p.value / 10_000_000, p.profiles)).collect();
    assert_eq!(points, [(4, 1), (0, 0), (96, 1), (0, 0)]);

    // The sides of a comparison may have different spans.
    let request = FlameGraphRequest {
        selection: of(t, &[A]),
        base: of(t, &[B]),
        sample_type: "samples/count".into(),
        ..Default::default()
    };
    let graph = client.flame_graph(request).await.unwrap().into_inner();
    assert_eq!((graph.total, graph.base_total), (36, 64));
    // Without a type, those of the oldest profile with such a sample.
    let request = FlameGraphRequest { selection: of(t, &[A]), ..Default::default() };
    assert_eq!(client.flame_graph(request).await.unwrap().into_inner().sample_type, "cpu/nanoseconds");
    running.shutdown().await;
}

/// Checks that a downloaded profile has neither other samples nor the functions of others.
#[tokio::test]
async fn a_download_of_a_span_has_only_its_samples() {
    let (_dir, running, t) = filled().await;
    let profile = merged(&running, of(t, &[A])).await.unwrap();
    assert_eq!(check(&profile).unwrap().totals, [36, 360_000_000]);
    assert_eq!(functions(&profile), ["add", "main", "pay"]);
    let status = merged(&running, of(t, &[NOTHING])).await.unwrap_err();
    assert!(status.code() == Code::NotFound && status.message().contains("no sample"), "{status}");

    let mut client = queries(&running).await;
    let request = ListProfilesRequest { selection: of(t, &[B]), ..Default::default() };
    let id = client.list_profiles(request).await.unwrap().into_inner().profiles.remove(0).id;
    let request =
        GetProfileRequest { id: id.clone(), trace_id: vec![TRACE.into()], ..GetProfileRequest::default() };
    let mut answer = client.get_profile(request.clone()).await.unwrap().into_inner();
    let mut chunks = Vec::new();
    while let Some(chunk) = answer.message().await.unwrap() {
        chunks.push(chunk);
    }
    let one = joined(chunks);
    assert_eq!(
        (check(&one).unwrap().totals, functions(&one)),
        (vec![128, 1_280_000_000], vec!["all", "main"])
    );
    let both = GetProfileRequest { span_id: vec![A.into()], ..request };
    let status = client.get_profile(both).await.unwrap_err();
    assert!(status.message().contains("not both"), "{status}");

    let path = format!("/api/v1/profiles/{id}?span_id={B}");
    let answer = get(running.http_addr, &path).await;
    assert_eq!(functions(&decode(&answer.body, 1 << 20).unwrap()), ["main", "sum"]);
    let path = format!("/api/v1/merge?from={t}&span_id={A},{B}");
    let answer = get(running.http_addr, &path).await;
    assert_eq!(functions(&decode(&answer.body, 1 << 20).unwrap()), ["add", "main", "pay", "sum"]);
    for path in [format!("profiles/{id}?span_id={NOTHING}"), format!("merge?from={t}&span_id={NOTHING}")] {
        let answer = get(running.http_addr, &format!("/api/v1/{path}")).await;
        assert!(answer.status == 404 && answer.text().contains("no sample"), "{path}: {}", answer.text());
    }
    running.shutdown().await;
}

/// Checks every endpoint of the page. `pointer` leads to a part of the answer.
#[rstest]
#[case::timeline("timeline?type=samples/count&step_ms=120000", "/points", json!([{ "value": 4, "profiles": 1 }, { "value": 96, "profiles": 1 }]))]
#[case::heat_by_label("heatmap?type=samples/count&step_ms=120000&by=service_name", "/rows", json!([{ "name": "cart", "cells": [0, 96] }, { "name": "shop", "cells": [4, 0] }]))]
#[case::heat_by_value("heatmap?type=samples/count&step_ms=240000", "/rows/0/cells", json!([1]))]
#[case::list("profiles?limit=5", "/profiles/1/samples", json!(4))]
#[case::list_length("profiles?limit=5", "/profiles/2", Value::Null)]
#[case::series("series?query={service_name=\"shop\"}", "/series/0/profiles", json!(1))]
#[case::labels("labels/service_name/values?query={service_name!=\"cart\"}", "/values", json!(["shop"]))]
#[case::graph("flamegraph?type=samples/count", "/total", json!(100))]
#[case::top("top?type=samples/count", "/total", json!(100))]
#[tokio::test]
async fn the_http_api_selects_spans(#[case] path: &str, #[case] pointer: &str, #[case] expected: Value) {
    let (_dir, running, t) = filled().await;
    let path = format!("/api/v1/{path}&from={t}&until={}&span_id={A},{B}", t + 240_000);
    let answer = get(running.http_addr, &path).await.json();
    let mut found = answer.pointer(pointer).cloned().unwrap_or_default();
    for point in found.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
        point.remove("t_ms");
    }
    assert_eq!(found, expected, "{answer}");
    let wrong = get(running.http_addr, &path.replace(A, "aa")).await;
    assert!(wrong.status == 400 && wrong.text().contains("16 hex digits"), "{}", wrong.text());
    running.shutdown().await;
}

/// Checks that a list finds an old profile behind many without the span, in pages that each read a bounded number.
#[tokio::test]
async fn a_list_finds_an_old_span_page_by_page() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let t = now_ms() - 600_000;
    let old: [Traced<'_>; 1] = [("main;pay", 4, Some(("span_id", A)))];
    pusher.store(traced("shop", t, &old)).await;
    let others: Vec<Batch> = (1..=1100).map(|n| batch("shop", t + n, &[("main;pay", 1)])).collect();
    pusher.store_all(&others).await;
    let (mut client, mut token, mut found) = (queries(&running).await, String::new(), Vec::new());
    let mut pages = 0;
    loop {
        let selection = of(t, &[A]);
        let request = ListProfilesRequest { selection, limit: 10, page_token: token };
        let page = client.list_profiles(request).await.unwrap().into_inner();
        found.extend(page.profiles.iter().map(|profile| profile.samples));
        pages += 1;
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!((found, pages), (vec![4], 2));
    running.shutdown().await;
}
