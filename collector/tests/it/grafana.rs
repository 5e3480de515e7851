//! The query service of Pyroscope, as Grafana's data source (protobuf) and Profiles Drilldown (JSON) call it.

use std::collections::BTreeMap;

use gannet_collector::Running;
use gannet_proto::{
    foreign::{pyroscope_querier as api, pyroscope_types as types},
    pprof::{MAX_STACK_FRAMES, check, decode, encode},
    profiles::{Label, Sample},
};
use prost::Message;
use rstest::rstest;
use serde_json::{Value, json};

use crate::support::{
    Answer, CPU, OFF_CPU, Pusher, Stacks, at, batch, get, now_ms, post, profile, queries, start, typed_batch,
};

const QUERIER: &str = "/querier.v1.QuerierService";
const CPU_TYPE: &str = "process_cpu:cpu:nanoseconds:cpu:nanoseconds";
const SAMPLES_TYPE: &str = "process_cpu:samples:count:cpu:nanoseconds";
const OFF_CPU_TYPE: &str = "off_cpu:offcpu:nanoseconds:offcpu:nanoseconds";

/// Calls a method as Profiles Drilldown does. It sends no version of the protocol.
async fn drilldown(running: &Running, method: &str, request: Value) -> Answer {
    let headers =
        [("content-type", "application/json"), ("accept", "application/json; allow-utf8-labelnames=true")];
    post(running.http_addr, &format!("{QUERIER}/{method}"), &headers, request.to_string().as_bytes()).await
}

async fn json_of(running: &Running, method: &str, request: Value) -> Value {
    let answer = drilldown(running, method, request.clone()).await;
    assert_eq!(answer.status, 200, "{method} {request}: {}", answer.text());
    assert_eq!(answer.headers["content-type"], "application/json");
    answer.json()
}

/// Calls a method as the data source does.
async fn source<Res: Message + Default>(running: &Running, method: &str, request: &impl Message) -> Res {
    let headers = [
        ("content-type", "application/proto"),
        ("connect-protocol-version", "1"),
        ("connect-timeout-ms", "20000"),
    ];
    let path = format!("{QUERIER}/{method}");
    let answer = post(running.http_addr, &path, &headers, &request.encode_to_vec()).await;
    assert_eq!(answer.status, 200, "{method}: {}", answer.text());
    assert_eq!(answer.headers["content-type"], "application/proto");
    Res::decode(answer.body.as_slice()).unwrap()
}

fn stacktraces(
    profile_type: &str,
    selector: &str,
    start: u64,
    end: u64,
) -> api::SelectMergeStacktracesRequest {
    api::SelectMergeStacktracesRequest {
        profile_type_id: profile_type.into(),
        label_selector: selector.into(),
        start: start as i64,
        end: end as i64,
        ..Default::default()
    }
}

/// Returns the flame graph of a request.
async fn graph(running: &Running, request: &api::SelectMergeStacktracesRequest) -> api::FlameGraph {
    let answer: api::SelectMergeStacktracesResponse =
        source(running, "SelectMergeStacktraces", request).await;
    answer.flamegraph.unwrap()
}

/// A bar of a flame graph: its function and the values of one side.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Bar {
    start: i64,
    name: String,
    total: i64,
    own: i64,
}

/// Reads levels as Grafana does: it knows the parent of a bar only by its interval in the level above.
#[track_caller]
fn bars(names: &[String], levels: &[api::Level], width: usize, side: usize) -> Vec<Vec<Bar>> {
    let mut above: Vec<Bar> = Vec::new();
    let mut all = Vec::new();
    for (depth, level) in levels.iter().enumerate() {
        assert!(!level.values.is_empty() && level.values.len() % width == 0, "{level:?}");
        let (mut at, mut read) = (0, Vec::new());
        for bar in level.values.chunks(width) {
            let [offset, total, own] = bar[side * 3..side * 3 + 3] else { panic!("{bar:?}") };
            at += offset;
            assert!(offset >= 0 && own <= total, "{bar:?}");
            let parent = above.iter().any(|p| p.start <= at && at + total <= p.start + p.total);
            assert!(depth == 0 || parent, "no parent of {bar:?} in level {depth}");
            read.push(Bar { start: at, name: names[bar[width - 1] as usize].clone(), total, own });
            at += total;
        }
        all.extend((depth > 0).then(|| std::mem::take(&mut above)));
        above = read;
    }
    all.push(above);
    assert_eq!(names[0], "total", "Grafana takes the name of the root from index 0");
    all
}

#[track_caller]
fn levels_of(graph: &api::FlameGraph) -> Vec<Vec<Bar>> {
    bars(&graph.names, &graph.levels, 4, 0)
}

async fn filled(stacks: Stacks<'_>) -> (tempfile::TempDir, Running, u64) {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let t = now_ms() - 600_000;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    pusher.store(batch("shop", t, stacks)).await;
    pusher.store(batch("cart", t + 1, &[("main;add", 2)])).await;
    pusher.store(typed_batch(OFF_CPU, "shop", t + 2, &[("main;wait", 3)])).await;
    (dir, running, t)
}

#[tokio::test]
async fn save_and_test_and_the_dropdown_list_types() {
    let (_dir, running, t) = filled(&[("main;work", 3)]).await;
    let types = async |start: u64, end: u64| -> Vec<types::ProfileType> {
        let request = api::ProfileTypesRequest { start: start as i64, end: end as i64 };
        source::<api::ProfileTypesResponse>(&running, "ProfileTypes", &request).await.profile_types
    };
    // Save & test asks about three seconds of 1970, and older versions about no range.
    assert_eq!(types(1000, 4000).await, []);
    let all = types(0, 0).await;
    assert_eq!(types(t, now_ms()).await, all);
    let ids: Vec<&str> = all.iter().map(|kind| &*kind.id).collect();
    assert_eq!(ids, ["off_cpu:events:count:offcpu:nanoseconds", OFF_CPU_TYPE, CPU_TYPE, SAMPLES_TYPE]);
    assert_eq!(
        (&*all[2].name, &*all[2].sample_type, &*all[2].sample_unit),
        ("process_cpu", "cpu", "nanoseconds")
    );
    assert_eq!((&*all[2].period_type, &*all[2].period_unit), ("cpu", "nanoseconds"));
    assert_eq!(types(t, t + 1).await.len(), 2, "the off-CPU profile is outside of the range");
    running.shutdown().await;
}

#[tokio::test]
async fn drilldown_finds_services_labels_and_values() {
    let (_dir, running, t) = filled(&[("main;work", 3)]).await;
    assert_eq!(
        json_of(&running, "GetProfileStats", json!({})).await,
        json!({ "dataIngested": true, "oldestProfileTime": t.to_string(), "newestProfileTime": (t + 2).to_string() })
    );
    // Times as strings and as numbers, both spellings, null for unset, and a field of a newer server.
    let series = json_of(
        &running,
        "Series",
        json!({ "matchers": [], "labelNames": ["service_name", "__profile_type__"], "start": t.to_string(),
                "end": now_ms(), "newer": { "x": [1] } }),
    )
    .await;
    let pair = |name: &str, value: &str| json!({ "name": name, "value": value });
    let set = |service: &str, kind: &str| json!({ "labels": [pair("__profile_type__", kind), pair("service_name", service)] });
    assert_eq!(
        series,
        json!({ "labelsSet": [
            set("shop", "off_cpu:events:count:offcpu:nanoseconds"), set("shop", OFF_CPU_TYPE),
            set("cart", CPU_TYPE), set("shop", CPU_TYPE), set("cart", SAMPLES_TYPE), set("shop", SAMPLES_TYPE),
        ] })
    );
    let matcher = |kind: &str, service: &str| {
        json!([format!(r#"{{__profile_type__="{kind}", service_name="{service}"}}"#)])
    };
    let range = |mut request: Value| {
        (request["start"], request["end"]) = (json!(t), json!(now_ms()));
        request
    };
    let names =
        json_of(&running, "LabelNames", range(json!({ "matchers": matcher(CPU_TYPE, "shop") }))).await;
    assert_eq!(
        names["names"],
        json!([
            "__name__",
            "__period_type__",
            "__period_unit__",
            "__profile_type__",
            "__service_name__",
            "__type__",
            "__unit__",
            "node",
            "service_name"
        ])
    );
    let none =
        json_of(&running, "LabelNames", range(json!({ "matchers": matcher(OFF_CPU_TYPE, "cart") }))).await;
    assert_eq!(none, json!({}));
    for (name, matchers, values) in [
        ("service_name", json!(null), json!(["cart", "shop"])),
        ("service_name", json!([format!("{{__profile_type__=\"{OFF_CPU_TYPE}\"}}")]), json!(["shop"])),
        ("__service_name__", json!([r#"{service_name!="cart"}"#]), json!(["shop"])),
        ("__name__", json!([r#"{service_name="shop"}"#]), json!(["off_cpu", "process_cpu"])),
        ("__type__", json!(["process_cpu{}"]), json!(["cpu", "samples"])),
        ("__unit__", json!([r#"{__name__=~"off.*"}"#, r#"{__type__="events"}"#]), json!(["count"])),
        ("node", json!(["{}"]), json!(["n1"])),
    ] {
        let request = range(json!({ "name": name, "matchers": matchers }));
        assert_eq!(json_of(&running, "LabelValues", request.clone()).await["names"], values, "{request}");
    }
    running.shutdown().await;
}

#[tokio::test]
async fn a_flame_graph_has_the_bars_of_pyroscope() {
    let stacks = [("a", 1), ("a;b", 3), ("a;c", 2), ("d", 1)];
    let (_dir, running, t) = filled(&stacks).await;
    let shop = stacktraces(SAMPLES_TYPE, r#"{service_name="shop"}"#, t, now_ms());
    let found = graph(&running, &shop).await;
    let level = |values: &[i64]| api::Level { values: values.to_vec() };
    assert_eq!(
        found,
        api::FlameGraph {
            names: ["total", "a", "d", "b", "c"].map(String::from).to_vec(),
            levels: vec![
                level(&[0, 7, 0, 0]),
                level(&[0, 6, 1, 1, 0, 1, 1, 2]),
                level(&[1, 3, 3, 3, 0, 2, 2, 4])
            ],
            total: 7,
            max_self: 3,
        }
    );
    levels_of(&found);
    // Only stacks below a caller, with their complete path.
    let call_site = types::StackTraceSelector { call_site: vec![types::Location { name: "a".into() }] };
    let below = graph(
        &running,
        &api::SelectMergeStacktracesRequest { stack_trace_selector: Some(call_site), ..shop.clone() },
    )
    .await;
    assert_eq!((below.total, levels_of(&below)[1].len(), levels_of(&below)[2].len()), (6, 1, 2));
    // Two nodes stay, and each parent keeps the rest as one bar.
    let cut =
        graph(&running, &api::SelectMergeStacktracesRequest { max_nodes: Some(2), ..shop.clone() }).await;
    assert_eq!(cut.names, ["total", "a", "other", "b"]);
    assert_eq!(
        cut.levels,
        [level(&[0, 7, 0, 0]), level(&[0, 6, 1, 1, 0, 1, 1, 2]), level(&[1, 3, 3, 3, 0, 2, 2, 2])]
    );
    levels_of(&cut);
    // No stack: the root alone, because Grafana reads the first bar unseen.
    let empty = graph(&running, &stacktraces(CPU_TYPE, "", 1000, 4000)).await;
    assert_eq!((empty.names, empty.levels), (vec!["total".to_owned()], vec![level(&[0, 0, 0, 0])]));
    running.shutdown().await;
}

/// Checks a request as Profiles Drilldown writes it: both spellings, null, and values of a newer server.
#[tokio::test]
async fn a_newer_drilldown_gets_a_flame_graph() {
    let (_dir, running, t) = filled(&[("a;b", 3)]).await;
    let request = json!({
        "profile_typeID": SAMPLES_TYPE, "labelSelector": r#"{service_name="shop"}"#, "start": t, "end": now_ms(),
        "maxNodes": null, "format": "PROFILE_FORMAT_FUNCTIONS", "sandwichFunction": "b", "async": { "type": "X" },
        "stackTraceSelector": { "call_site": [{ "name": "a" }], "frameFilter": { "includeFunctionNames": ["b"] } },
    });
    let answer = json_of(&running, "SelectMergeStacktraces", request).await;
    assert_eq!(
        answer,
        json!({ "flamegraph": {
            "names": ["total", "a", "b"],
            "levels": [{ "values": ["0", "3", "0", "0"] }, { "values": ["0", "3", "0", "1"] },
                       { "values": ["0", "3", "3", "2"] }],
            "total": "3", "maxSelf": "3",
        } })
    );
    running.shutdown().await;
}

fn sum_by_leaf(graph: &Value, side: &str, leaf: &str, sums: &mut BTreeMap<String, i64>) {
    for child in graph["children"].as_array().unwrap() {
        let path = format!("{leaf};{}", child["name"].as_str().unwrap());
        *sums.entry(path.clone()).or_default() += child[side].as_i64().unwrap_or(0);
        sum_by_leaf(child, side, &path, sums);
    }
}

/// Checks that both flame graphs of the collector have the same nodes and values.
#[tokio::test]
async fn a_flame_graph_equals_the_own_one() {
    let stacks = [("a;x", 5), ("a;x;y", 7), ("b;x;y", 1), ("a;z", 2), ("b", 4), ("x;x;x", 3)];
    let (_dir, running, t) = filled(&stacks).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    pusher.store(batch("shop", t + 10, &[("a;x", 1), ("c;d;e", 9)])).await;
    let found = graph(&running, &stacktraces(CPU_TYPE, r#"{service_name="shop"}"#, t, now_ms())).await;
    let own = get(
        running.http_addr,
        &format!("/api/v1/flamegraph?query={{service_name=\"shop\"}}&type=cpu/nanoseconds&from={t}"),
    )
    .await
    .json();
    assert_eq!(json!(found.total), own["total"]);
    let mut want = BTreeMap::new();
    sum_by_leaf(&own["root"], "total", "", &mut want);
    // The path of a bar by the intervals above it.
    let levels = levels_of(&found);
    let mut have = BTreeMap::new();
    for (depth, level) in levels.iter().enumerate().skip(1) {
        for bar in level {
            let path: Vec<&str> = levels[1..=depth]
                .iter()
                .map(|above| {
                    let parent = above.iter().find(|p| p.start <= bar.start && bar.start < p.start + p.total);
                    parent.unwrap().name.as_str()
                })
                .collect();
            *have.entry(format!(";{}", path.join(";"))).or_default() += bar.total;
        }
    }
    assert_eq!(have, want);
    running.shutdown().await;
}

async fn merged(running: &Running, request: &api::SelectMergeProfileRequest) -> gannet_proto::pprof::Profile {
    source(running, "SelectMergeProfile", request).await
}

#[tokio::test]
async fn a_merged_profile_equals_the_own_merge() {
    let (_dir, running, t) = filled(&[("a;b", 3), ("a;c", 2)]).await;
    let request = api::SelectMergeProfileRequest {
        profile_type_id: CPU_TYPE.into(),
        label_selector: "{}".into(),
        start: t as i64,
        end: now_ms() as i64,
        max_nodes: Some(i64::MAX),
        ..Default::default()
    };
    let found = merged(&running, &request).await;
    let own = get(running.http_addr, &format!("/api/v1/merge?type=cpu/nanoseconds&from={t}")).await;
    let own = decode(&own.body, 1 << 20).unwrap();
    assert_eq!(check(&found).unwrap().sample_types, ["cpu/nanoseconds"]);
    assert_eq!(check(&found).unwrap().totals[0], check(&own).unwrap().totals[1]);
    assert_eq!((found.sample.len(), &found.location), (own.sample.len(), &own.location));
    // As JSON, with the names of pprof's fields.
    let json = json_of(
        &running,
        "SelectMergeProfile",
        json!({ "profile_typeID": CPU_TYPE, "label_selector": "{}", "start": t, "end": now_ms() }),
    )
    .await;
    assert_eq!(json["sample"].as_array().unwrap().len(), own.sample.len());
    assert_eq!(json["stringTable"][0], "");
    // Only stacks below a caller, and only one profile.
    let call_site = ["a", "b"].map(|name| types::Location { name: name.into() }).to_vec();
    let below = types::StackTraceSelector { call_site };
    let request = api::SelectMergeProfileRequest { stack_trace_selector: Some(below), ..request };
    assert_eq!(check(&merged(&running, &request).await).unwrap().totals, [30_000_000]);
    let list = get(running.http_addr, "/api/v1/profiles?query={service_name=\"cart\"}").await.json();
    let id = list["profiles"][0]["id"].as_str().unwrap().to_owned();
    let uuid = format!("{:032x}", ulid::Ulid::from_string(&id).unwrap().0);
    let uuid = format!("{}-{}-{}-{}-{}", &uuid[..8], &uuid[8..12], &uuid[12..16], &uuid[16..20], &uuid[20..]);
    for id in [id, uuid] {
        let request = api::SelectMergeProfileRequest {
            profile_id_selector: vec![id],
            stack_trace_selector: None,
            ..request.clone()
        };
        assert_eq!(check(&merged(&running, &request).await).unwrap().totals, [20_000_000]);
    }
    let empty = api::SelectMergeProfileRequest { start: 1000, end: 4000, ..request };
    assert_eq!(merged(&running, &empty).await, gannet_proto::pprof::Profile::default());
    running.shutdown().await;
}

/// Checks profiles that no merge can join: one of a sender with other sample types has the same type too.
#[tokio::test]
async fn profiles_of_two_kinds_of_sender_add_up() {
    let (_dir, running, t) = filled(&[("a;b", 3)]).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let mut other = profile(CPU, &[("a;b", 4), ("a;c", 1)]);
    gannet_proto::pprof::select_type(&mut other, 1);
    let samples = other.sample.iter().map(|sample| sample.value[0] as u64).sum();
    pusher
        .store(gannet_proto::ingest::Batch { pprof: encode(&other), samples, ..batch("shop", t + 5, &[]) })
        .await;
    let shop = stacktraces(CPU_TYPE, r#"{service_name="shop"}"#, t, now_ms());
    let found = graph(&running, &shop).await;
    assert_eq!((found.total, levels_of(&found)[2].len()), (80_000_000, 2));
    let request = api::SelectMergeProfileRequest {
        profile_type_id: CPU_TYPE.into(),
        label_selector: r#"{service_name="shop"}"#.into(),
        start: t as i64,
        end: now_ms() as i64,
        ..Default::default()
    };
    assert_eq!(check(&merged(&running, &request).await).unwrap().totals, [80_000_000]);
    let answer = json_of(
        &running,
        "SelectMergeStacktraces",
        json!({ "profileTypeID": CPU_TYPE, "labelSelector": "{service_name=\"shop\"}", "start": t, "end": now_ms(),
                "format": "PROFILE_FORMAT_PPROF" }),
    )
    .await;
    assert_eq!(answer["pprof"]["profile"]["sampleType"].as_array().unwrap().len(), 1);
    running.shutdown().await;
}

/// Calls a method by gRPC-Web. Returns the frames of the answer: flags and content.
async fn web(running: &Running, kind: &str, more: &[(&str, &str)], body: &[u8]) -> Vec<(u8, Vec<u8>)> {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let headers: Vec<(&str, &str)> =
        [("content-type", kind), ("x-grpc-web", "1")].into_iter().chain(more.iter().copied()).collect();
    let path = format!("{QUERIER}/SelectMergeStacktraces");
    let answer = post(running.http_addr, &path, &headers, body).await;
    let is_text = kind.contains("text");
    assert_eq!(answer.status, 200, "{}", answer.text());
    let want = if is_text { "application/grpc-web-text+proto" } else { "application/grpc-web+proto" };
    assert_eq!(answer.headers["content-type"], want);
    let bytes = if is_text { STANDARD.decode(&answer.body).unwrap() } else { answer.body };
    let (mut rest, mut frames) = (bytes.as_slice(), Vec::new());
    while let Some((head, content)) = rest.split_at_checked(5) {
        let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize;
        frames.push((head[0], content[..length].to_vec()));
        rest = &content[length..];
    }
    frames
}

/// Checks that gRPC-Web, as bytes and as base64 in one piece or several, has the answers and errors of Connect.
#[tokio::test]
async fn grpc_web_has_the_same_answers() {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let (_dir, running, t) = filled(&[("a;b", 3), ("a", 1)]).await;
    let request = stacktraces(SAMPLES_TYPE, "{}", t, now_ms());
    let want: api::SelectMergeStacktracesResponse =
        source(&running, "SelectMergeStacktraces", &request).await;
    let frame = |flags: u8, request: &api::SelectMergeStacktracesRequest| {
        let message = request.encode_to_vec();
        [&[flags][..], &(message.len() as u32).to_be_bytes(), &message].concat()
    };
    let good = frame(0, &request);
    let (first, second) = good.split_at(7);
    let pieces = STANDARD.encode(first) + &STANDARD.encode(second);
    for (kind, body) in [
        ("application/grpc-web", good.clone()),
        ("application/grpc-web+proto; charset=utf-8", good.clone()),
        ("application/grpc-web-text", STANDARD.encode(&good).into_bytes()),
        ("application/grpc-web-text+proto", pieces.into_bytes()),
    ] {
        let frames = web(&running, kind, &[("grpc-timeout", "30S")], &body).await;
        assert_eq!(frames.len(), 2, "{kind}");
        let found = api::SelectMergeStacktracesResponse::decode(frames[0].1.as_slice()).unwrap();
        assert_eq!((frames[0].0, &found), (0, &want), "{kind}");
        assert_eq!(frames[1], (0x80, b"grpc-status: 0\r\n".to_vec()), "{kind}");
    }
    let wrong = frame(0, &stacktraces("no type", "{}", t, now_ms()));
    for (body, more, code, part) in [
        (wrong, None, 3, "no type"),
        (good[..3].to_vec(), None, 3, "no frame"),
        (good[..good.len() - 1].to_vec(), None, 3, "one frame"),
        ([&good[..], &good].concat(), None, 3, "one frame"),
        (frame(1, &request), None, 12, "grpc-encoding"),
        (good.clone(), Some(("grpc-timeout", "soon")), 3, "grpc-timeout"),
        (vec![0; 2 << 20], None, 8, "larger than"),
    ] {
        let more: Vec<(&str, &str)> = more.into_iter().collect();
        let frames = web(&running, "application/grpc-web", &more, &body).await;
        let status = status_of(&frames);
        assert_eq!(status.code(), tonic::Code::from(code), "{status}");
        assert!(status.message().contains(part), "{status}");
    }
    let text = web(&running, "application/grpc-web-text", &[], b"*").await;
    assert_eq!(status_of(&text).code(), tonic::Code::InvalidArgument);
    running.shutdown().await;
}

/// Returns the status of a gRPC-Web response without a message, as a client reads it.
fn status_of(frames: &[(u8, Vec<u8>)]) -> tonic::Status {
    assert_eq!((frames.len(), frames[0].0), (1, 0x80), "{frames:?}");
    let text = str::from_utf8(&frames[0].1).unwrap();
    let lines = text.strip_suffix("\r\n").unwrap().split("\r\n").map(|line| line.split_once(": ").unwrap());
    let headers = lines.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
    tonic::Status::from_header_map(&headers.collect()).unwrap()
}

/// Checks the same filter in the gRPC service: the first span has `first` samples, and the second one `second`.
async fn the_query_service_selects(running: &Running, t: u64, trace: &str, first: i64, second: i64) {
    use gannet_proto::query::{FlameGraphRequest, Selection, TopRequest};
    let mut client = queries(running).await;
    let ids = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
    let selection = Some(Selection { from: Some(at(t)), ..Selection::default() });
    let sample_type = "samples/count".to_owned();
    for (span_id, trace_id, total) in [
        (ids(&["00000000000000A0"]), ids(&[]), first),
        (ids(&["00000000000000a0", "00000000000000a1"]), ids(&[]), first + second),
        (ids(&[]), ids(&[trace]), first + second),
        (ids(&["00000000000000ff"]), ids(&[]), 0),
    ] {
        let (selection, sample_type) = (selection.clone(), sample_type.clone());
        let request = FlameGraphRequest {
            selection: selection.clone(),
            sample_type: sample_type.clone(),
            span_id: span_id.clone(),
            trace_id: trace_id.clone(),
            ..Default::default()
        };
        assert_eq!(client.flame_graph(request).await.unwrap().into_inner().total, total as u64);
        let request = TopRequest { selection, sample_type, span_id, trace_id, ..Default::default() };
        assert_eq!(client.top(request).await.unwrap().into_inner().total, total as u64);
    }
    for (span_id, trace_id, part) in [
        (ids(&["a0"]), ids(&[]), "span_id: `a0` is not an id: give 16 hex digits"),
        (ids(&["00000000000000a0"]), ids(&[trace]), "not both"),
        (vec!["00000000000000a0".to_owned(); 1001], ids(&[]), "at most 1000 ids"),
    ] {
        let request = TopRequest { selection: selection.clone(), span_id, trace_id, ..Default::default() };
        let status = client.top(request).await.unwrap_err();
        assert!(status.code() == tonic::Code::InvalidArgument && status.message().contains(part), "{status}");
    }
}

/// Checks that spans and traces select samples by their labels.
#[tokio::test]
async fn a_span_selects_its_samples() {
    let (_dir, running, t) = filled(&[("a;b", 3)]).await;
    let mut traced = profile(CPU, &[("a;b", 4), ("a;c", 1), ("d", 8)]);
    let mut label = |sample: &mut Sample, key: &str, text: &str| {
        let string = |text: &str, table: &mut Vec<String>| {
            table.push(text.to_owned());
            table.len() as i64 - 1
        };
        let table = &mut traced.string_table;
        sample.label.push(Label { key: string(key, table), str: string(text, table), ..Label::default() });
    };
    let mut samples = std::mem::take(&mut traced.sample);
    for (index, sample) in samples.iter_mut().enumerate().take(2) {
        // Pyroscope's SDKs have their own name for it.
        let name = ["span_id", "profile_id"][index];
        label(sample, name, &format!("00000000000000a{index}"));
        label(sample, "trace_id", &format!("{:032x}", 7));
    }
    let selected: Vec<i64> = samples.iter().map(|sample| sample.value[0]).collect();
    traced.sample = samples;
    let pushed = gannet_proto::ingest::Batch {
        pprof: encode(&traced),
        samples: selected.iter().sum::<i64>() as u64,
        ..batch("shop", t + 5, &[])
    };
    Pusher::open(running.grpc_addr).await.store(pushed).await;
    let all = stacktraces(SAMPLES_TYPE, "{}", t, now_ms());
    let ids = |id: &str| vec![id.to_owned()];
    let of_span =
        api::SelectMergeStacktracesRequest { span_selector: ids("00000000000000A0"), ..all.clone() };
    assert_eq!(graph(&running, &of_span).await.total, selected[0]);
    let trace = format!("{:032x}", 7);
    let of_trace = api::SelectMergeStacktracesRequest { trace_id_selector: ids(&trace), ..all.clone() };
    assert_eq!(graph(&running, &of_trace).await.total, selected[0] + selected[1]);
    let both = api::SelectMergeStacktracesRequest { span_selector: ids("00000000000000a0"), ..of_trace };
    let answer = drilldown(
        &running,
        "SelectMergeStacktraces",
        json!({ "profileTypeID": SAMPLES_TYPE, "start": 1, "end": 2, "spanSelector": both.span_selector,
                "traceIdSelector": both.trace_id_selector }),
    )
    .await;
    assert_eq!((answer.status, answer.text().contains("not both")), (400, true));
    for (ids, total) in [
        ("span_id=00000000000000A0", selected[0]),
        ("span_id=00000000000000a0,00000000000000a1", selected[0] + selected[1]),
        (&format!("trace_id={trace}"), selected[0] + selected[1]),
        ("span_id=00000000000000ff", 0),
    ] {
        let url = format!("/api/v1/flamegraph?type=samples/count&from={t}&{ids}");
        let graph = get(running.http_addr, &url).await.json();
        assert_eq!(graph["total"].as_i64(), Some(total), "{url}: {graph}");
    }
    for (ids, part) in [
        ("span_id=a0", "16 hex digits"),
        (&format!("span_id={0}{0}&trace_id={trace}", "0a".repeat(4)), "not both"),
    ] {
        let answer = get(running.http_addr, &format!("/api/v1/top?{ids}")).await;
        assert!(answer.status == 400 && answer.text().contains(part), "{ids}: {}", answer.text());
    }
    the_query_service_selects(&running, t, &trace, selected[0], selected[1]).await;
    let old = api::SelectMergeSpanProfileRequest {
        profile_type_id: SAMPLES_TYPE.into(),
        label_selector: "{}".into(),
        span_selector: ids("00000000000000a1"),
        start: t as i64,
        end: now_ms() as i64,
        ..Default::default()
    };
    let old: api::SelectMergeSpanProfileResponse = source(&running, "SelectMergeSpanProfile", &old).await;
    assert_eq!(old.flamegraph.unwrap().total, selected[1]);
    running.shutdown().await;
}

#[tokio::test]
async fn a_series_sums_each_step_by_group() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let t = (now_ms() - 600_000) / 1000 * 1000;
    // A point at `x` stands for (x - 10 s, x].
    for (service, at, n) in [
        ("shop", t - 10_000, 100),
        ("shop", t - 9_999, 1),
        ("shop", t, 2),
        ("shop", t + 1, 4),
        ("cart", t + 10_000, 8),
        ("shop", t + 30_000, 16),
        ("shop", t + 30_001, 100),
    ] {
        pusher.store(batch(service, at, &[("main", n)])).await;
    }
    let request = api::SelectSeriesRequest {
        profile_type_id: SAMPLES_TYPE.into(),
        label_selector: "{}".into(),
        start: t as i64,
        end: (t + 35_000) as i64,
        step: 10.0,
        ..Default::default()
    };
    let series = async |request: &api::SelectSeriesRequest| -> Vec<(String, Vec<(u64, f64)>)> {
        let answer: api::SelectSeriesResponse = source(&running, "SelectSeries", request).await;
        let read = answer.series.into_iter().map(|series| {
            let labels: Vec<String> =
                series.labels.iter().map(|label| format!("{}={}", label.name, label.value)).collect();
            let points = series.points.iter().map(|point| (point.timestamp as u64 - t, point.value));
            (labels.join(","), points.collect())
        });
        read.collect()
    };
    let all = vec![(0, 3.0), (10_000, 12.0), (30_000, 16.0)];
    assert_eq!(series(&request).await, [(String::new(), all)]);
    let by_service = ["service_name", "absent", "__type__"].map(String::from).to_vec();
    let grouped = api::SelectSeriesRequest { group_by: by_service, ..request.clone() };
    let shop =
        ("__type__=samples,service_name=shop".to_owned(), vec![(0, 3.0), (10_000, 4.0), (30_000, 16.0)]);
    let cart = ("__type__=samples,service_name=cart".to_owned(), vec![(10_000, 8.0)]);
    assert_eq!(series(&grouped).await, [shop.clone(), cart]);
    assert_eq!(series(&api::SelectSeriesRequest { limit: Some(1), ..grouped.clone() }).await, [shop]);
    let none = api::SelectSeriesRequest { start: 1000, end: 4000, ..grouped };
    assert_eq!(series(&none).await, []);
    // The same in JSON: int64 are texts, doubles numbers.
    let json = json_of(
        &running,
        "SelectSeries",
        json!({ "profileTypeID": CPU_TYPE, "labelSelector": "", "start": t, "end": t, "step": "10",
                "aggregation": "TIME_SERIES_AGGREGATION_TYPE_SUM", "groupBy": null }),
    )
    .await;
    assert_eq!(
        json,
        json!({ "series": [{ "points": [{ "value": 30_000_000.0, "timestamp": t.to_string() }] }] })
    );
    running.shutdown().await;
}

/// A slot of a heat map: its time, and the smallest value and the count of each bucket that is not empty.
type Slot = (u64, Vec<(f64, i32)>);

#[tokio::test]
async fn a_heat_map_counts_profiles_by_time_and_value() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let t = (now_ms() - 600_000) / 1000 * 1000;
    // A slot at `x` stands for (x - 10 s, x]. Values from 10 to 210 make buckets of 10.
    for (service, at, n) in [
        ("shop", t - 10_000, 5000),
        ("shop", t - 9_999, 10),
        ("shop", t - 5_000, 19),
        ("cart", t, 20),
        ("shop", t + 20_000, 210),
        ("shop", t + 20_001, 5000),
    ] {
        pusher.store(batch(service, at, &[("main", n)])).await;
    }
    let request = api::SelectHeatmapRequest {
        profile_type_id: SAMPLES_TYPE.into(),
        label_selector: "{}".into(),
        start: t as i64,
        end: (t + 25_000) as i64,
        step: 10.0,
        ..Default::default()
    };
    let read = async |request: &api::SelectHeatmapRequest| -> Vec<(String, Vec<Slot>)> {
        let answer: api::SelectHeatmapResponse = source(&running, "SelectHeatmap", request).await;
        let series = answer.series.into_iter().map(|series| {
            let slots = series.slots.iter().map(|slot| {
                assert_eq!((slot.y_min.len(), slot.counts.len()), (20, 20));
                let counts = slot.y_min.iter().copied().zip(slot.counts.iter().copied());
                (slot.timestamp as u64 - t, counts.filter(|(_, n)| *n > 0).collect())
            });
            (series.labels.iter().map(|label| label.value.clone()).collect(), slots.collect())
        });
        series.collect()
    };
    let all = vec![(0, vec![(10.0, 2), (20.0, 1)]), (20_000, vec![(200.0, 1)])];
    assert_eq!(read(&request).await, [(String::new(), all)]);
    let grouped = api::SelectHeatmapRequest { group_by: vec!["service_name".into()], ..request.clone() };
    let shop = ("shop".to_owned(), vec![(0, vec![(10.0, 2)]), (20_000, vec![(200.0, 1)])]);
    assert_eq!(read(&grouped).await, [shop.clone(), ("cart".to_owned(), vec![(0, vec![(20.0, 1)])])]);
    assert_eq!(read(&api::SelectHeatmapRequest { limit: Some(1), ..grouped }).await, [shop]);
    let none = api::SelectHeatmapRequest { start: 1000, end: 4000, ..request };
    assert_eq!(read(&none).await, []);
    running.shutdown().await;
}

#[tokio::test]
async fn a_diff_aligns_both_sides() {
    let (_dir, running, t) = filled(&[("main;work", 3), ("main", 1)]).await;
    let side =
        |service: &str| stacktraces(SAMPLES_TYPE, &format!("{{service_name=\"{service}\"}}"), t, now_ms());
    let request = api::DiffRequest { left: Some(side("shop")), right: Some(side("cart")) };
    let answer: api::DiffResponse = source(&running, "Diff", &request).await;
    let found = answer.flamegraph.unwrap();
    assert_eq!((found.left_ticks, found.right_ticks, found.total, found.max_self), (4, 2, 6, 3));
    assert_eq!(found.names, ["total", "main", "add", "work"]);
    let levels: Vec<&[i64]> = found.levels.iter().map(|level| level.values.as_slice()).collect();
    assert_eq!(
        levels,
        [&[0, 4, 0, 0, 2, 0, 0][..], &[0, 4, 1, 0, 2, 0, 1], &[1, 0, 0, 0, 2, 2, 2, 0, 3, 3, 0, 0, 0, 3],]
    );
    for side in 0..2 {
        bars(&found.names, &found.levels, 7, side);
    }
    let nothing = stacktraces(SAMPLES_TYPE, "{}", 1000, 4000);
    let request = api::DiffRequest { left: Some(nothing.clone()), right: Some(nothing) };
    let answer: api::DiffResponse = source(&running, "Diff", &request).await;
    assert_eq!(answer.flamegraph.unwrap().levels[0].values, [0; 7]);
    running.shutdown().await;
}

#[tokio::test]
async fn the_old_endpoints_draw_one_and_two_sides() {
    let (_dir, running, t) = filled(&[("main;work", 3)]).await;
    let (seconds, query) = (t / 1000, format!("{SAMPLES_TYPE}{{service_name=\"shop\"}}"));
    let path = format!("/pyroscope/render?query={query}&from={seconds}&until=now&maxNodes=100&groupBy=node");
    let one = get(running.http_addr, &path).await;
    assert_eq!(one.status, 200, "{}", one.text());
    let one = one.json();
    assert_eq!(
        one["flamebearer"],
        json!({ "names": ["total", "main", "work"], "levels": [[0, 3, 0, 0], [0, 3, 0, 1], [0, 3, 3, 2]],
                "numTicks": 3, "maxSelf": 3 })
    );
    assert_eq!(
        one["metadata"],
        json!({ "format": "single", "spyName": "", "sampleRate": 100, "units": "objects", "name": "samples" })
    );
    let sum = |of: &Value| of["samples"].as_array().unwrap().iter().map(|n| n.as_i64().unwrap()).sum::<i64>();
    assert_eq!((sum(&one["timeline"]), sum(&one["groups"]["n1"])), (3, 3));
    assert_eq!(
        (&one["timeline"]["startTime"], &one["timeline"]["durationDelta"]),
        (&json!(seconds), &json!(15))
    );
    let cart = query.replace("shop", "cart");
    let path =
        format!("/pyroscope/render-diff?leftQuery={query}&leftFrom={t}&rightQuery={cart}&rightFrom=now-1h");
    let two = get(running.http_addr, &path).await.json();
    assert_eq!((&two["leftTicks"], &two["rightTicks"]), (&json!(3), &json!(2)));
    assert_eq!(two["metadata"]["format"], "double");
    for (path, says) in [
        ("/pyroscope/render", "query"),
        ("/pyroscope/render?query=a:b:c", "profile_typeID"),
        ("/pyroscope/render?query=a:b:c:d:e&format=dot", "json"),
        ("/pyroscope/render?query=a:b:c:d:e&from=yesterday", "from"),
        ("/pyroscope/render?query=a:b:c:d:e&max-nodes=x", "max-nodes"),
        ("/pyroscope/render-diff?leftQuery=a:b:c:d:e&rightQuery=a:b:c:d:f", "one type"),
    ] {
        let answer = get(running.http_addr, path).await;
        assert!(answer.status >= 400 && answer.json()["message"].as_str().unwrap().contains(says), "{path}");
    }
    running.shutdown().await;
}

#[rstest]
#[case("LabelValues", json!({ "start": 1, "end": 2 }), 400, "name")]
#[case("LabelNames", json!({}), 400, "missing time range")]
#[case("LabelNames", json!({ "start": 2, "end": 1 }), 400, "after end")]
#[case("LabelNames", json!({ "start": -2, "end": 1 }), 400, "negative")]
#[case("LabelNames", json!({ "start": 1, "end": 2, "matchers": ["{a=~\"(\"}"] }), 400, "matchers, character 5")]
#[case("LabelNames", json!({ "start": 1, "end": 2, "matchers": ["cpu{a}"] }), 400, "matchers, character 6")]
#[case("LabelNames", json!({ "start": 1, "end": 2, "matchers": ["a b{}"] }), 400, "matchers: expected")]
#[case("LabelNames", json!({ "start": 1, "end": 2, "matchers": vec!["{}"; 100] }), 400, "at most 16")]
#[case("LabelNames", json!({ "start": "soon" }), 400, "LabelNamesRequest")]
#[case("LabelNames", json!([]), 400, "LabelNamesRequest")]
#[case("Series", json!({ "start": 1, "end": 2, "label_names": vec!["a"; 1000] }), 400, "label_names")]
#[case("SelectSeries", json!({ "profileTypeID": CPU_TYPE, "start": 1, "end": 2 }), 400, "step")]
#[case("SelectSeries", json!({ "profileTypeID": CPU_TYPE, "start": 1, "end": 2, "step": "NaN" }), 400, "step")]
#[case("SelectSeries", json!({ "profileTypeID": CPU_TYPE, "start": 1, "end": i64::MAX.to_string(), "step": 15 }), 400, "longer step")]
#[case("SelectSeries", json!({ "profileTypeID": "cpu", "start": 1, "end": 2, "step": 1 }), 400, "process_cpu:cpu")]
#[case("SelectSeries", json!({ "profileTypeID": CPU_TYPE, "start": 1, "end": 2, "step": 1, "exemplarType": "EXEMPLAR_TYPE_SPAN" }), 501, "exemplar")]
#[case("SelectHeatmap", json!({ "profileTypeID": CPU_TYPE, "start": 1, "end": 2 }), 400, "step")]
#[case("SelectHeatmap", json!({ "profileTypeID": CPU_TYPE, "start": 1, "end": 2, "step": 1, "queryType": "HEATMAP_QUERY_TYPE_SPAN" }), 501, "spans")]
#[case("SelectSeries", json!({ "profileTypeID": CPU_TYPE, "start": 1, "end": 2, "step": 1, "groupBy": vec!["pod"; 1_000_000] }), 429, "larger than")]
#[case("SelectSeries", json!({ "profileTypeID": CPU_TYPE, "start": 1, "end": 2, "step": 1, "groupBy": vec![""; 100_000] }), 400, "group_by")]
#[case("SelectMergeStacktraces", json!({ "profileTypeID": CPU_TYPE, "start": 1, "end": 2, "maxNodes": "9223372036854775807" }), 400, "max_nodes")]
#[case("SelectMergeStacktraces", json!({ "profileTypeID": CPU_TYPE, "start": 1, "end": 2, "maxNodes": -1 }), 400, "max_nodes")]
#[case("SelectMergeStacktraces", json!({ "profileTypeID": CPU_TYPE, "start": 1, "end": 2, "format": "PROFILE_FORMAT_DOT" }), 501, "format")]
#[case("SelectMergeStacktraces", json!({ "profileTypeID": CPU_TYPE, "start": 1, "end": 2, "profileIdSelector": ["x"] }), 400, "UUID")]
#[case("SelectMergeStacktraces", json!({ "profileTypeID": CPU_TYPE, "start": 1, "end": 2, "spanSelector": ["x"] }), 400, "16 hex")]
#[case("Diff", json!({ "left": { "profileTypeID": CPU_TYPE, "start": 1, "end": 2 } }), 400, "right")]
#[case("Diff", json!({ "left": { "profileTypeID": "x", "start": 1, "end": 2 }, "right": {} }), 400, "left: profile_typeID")]
#[case("None", json!({}), 501, "QuerierService/None")]
#[tokio::test]
async fn a_bad_call_gets_code_and_reason(
    #[case] method: &str,
    #[case] request: Value,
    #[case] status: u16,
    #[case] says: &str,
) {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let answer = drilldown(&running, method, request).await;
    assert_eq!(answer.status, status, "{}", answer.text());
    assert_eq!(answer.headers["content-type"], "application/json");
    let code = match status {
        400 => "invalid_argument",
        429 => "resource_exhausted",
        _ => "unimplemented",
    };
    assert_eq!(answer.json()["code"], code);
    let message = answer.json()["message"].as_str().unwrap().to_owned();
    assert!(message.contains(says) && message.len() < 1000, "{message}");
    running.shutdown().await;
}

#[tokio::test]
async fn the_wire_follows_connect() {
    let (_dir, running, t) = filled(&[("main;work", 3)]).await;
    let send = async |path: &str, headers: &[(&str, &str)], body: &[u8]| -> Answer {
        post(running.http_addr, path, headers, body).await
    };
    let path = format!("{QUERIER}/LabelNames");
    let json = ("content-type", "application/json; charset=utf-8");
    let body = json!({ "start": t, "end": now_ms() }).to_string().into_bytes();
    assert_eq!(send(&path, &[json], &body).await.status, 200);
    assert_eq!(send(&path, &[("content-type", "text/plain")], &body).await.status, 415);
    assert_eq!(send(&path, &[], &body).await.status, 415);
    assert_eq!(send(&path, &[json], b"").await.status, 400);
    assert_eq!(send(&path, &[json], b"{} {}").await.status, 400);
    assert_eq!(send(&path, &[json, ("connect-protocol-version", "2")], &body).await.status, 400);
    assert_eq!(send(&path, &[json, ("connect-timeout-ms", "12345678901")], &body).await.status, 400);
    assert_eq!(send(&path, &[json, ("content-encoding", "br")], &body).await.status, 501);
    assert_eq!(send(&path, &[("content-type", "application/proto")], b"\xff\xff").await.status, 400);
    assert_eq!(get(running.http_addr, &path).await.status, 405);
    // A compressed request, and one that inflates without end.
    let compressed = gzip(&body);
    assert_eq!(send(&path, &[json, ("content-encoding", "gzip")], &compressed).await.status, 200);
    assert_eq!(send(&path, &[json, ("content-encoding", "gzip")], &compressed[..20]).await.status, 400);
    let bomb = gzip(&vec![b' '; 64 << 20]);
    assert_eq!(send(&path, &[json, ("content-encoding", "gzip")], &bomb).await.status, 429);
    // A large response is compressed for a client that accepts that.
    let stacks: Vec<(String, i64)> = (0..500).map(|i| (format!("main;function_{i}"), 1)).collect();
    let stacks: Vec<(&str, i64)> = stacks.iter().map(|(stack, n)| (stack.as_str(), *n)).collect();
    Pusher::open(running.grpc_addr).await.store(batch("large", t, &stacks)).await;
    let request = stacktraces(SAMPLES_TYPE, r#"{service_name="large"}"#, t, now_ms()).encode_to_vec();
    let path = format!("{QUERIER}/SelectMergeStacktraces");
    let proto = ("content-type", "application/proto");
    let plain = send(&path, &[proto], &request).await;
    let small = send(&path, &[proto, ("accept-encoding", "gzip")], &request).await;
    assert_eq!((plain.headers.get("content-encoding"), &*small.headers["content-encoding"]), (None, "gzip"));
    let inflated = gannet_proto::pprof::inflate(&small.body, 1 << 20).unwrap().into_owned();
    assert!(small.body.len() * 2 < plain.body.len() && inflated == plain.body);
    // Services that Grafana can do without.
    for path in [
        "/capabilities.v1.FeatureFlagsService/GetFeatureFlags",
        "/settings.v1.RecordingRulesService/ListRecordingRules",
        "/querier.v1.QuerierService/AnalyzeQuery",
    ] {
        let answer = send(path, &[json], b"{\"a\":1}").await;
        assert_eq!((answer.status, answer.text().as_str()), (200, "{}"), "{path}");
    }
    for path in ["/vcs.v1.VCSService/GithubApp", "/querier.v2.QuerierService/LabelNames"] {
        let answer = send(path, &[json], b"{}").await;
        assert_eq!((answer.status, &answer.json()["code"]), (501, &json!("unimplemented")), "{path}");
    }
    assert_eq!(send("/nothing", &[json], b"{}").await.status, 404);
    running.shutdown().await;
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Checks the deepest stack that the collector stores, and as many siblings as a graph shows.
#[tokio::test]
async fn deep_and_wide_graphs_have_exact_bars() {
    let deep = vec!["f"; MAX_STACK_FRAMES].join(";");
    let wide: Vec<String> = (0..9000).map(|i| format!("main;w{i}")).collect();
    let mut stacks: Vec<(&str, i64)> = wide.iter().map(|stack| (stack.as_str(), 2)).collect();
    stacks.extend([(deep.as_str(), 1), ("main;other;x", 5), ("main;other", 1)]);
    let (_dir, running, t) = filled(&stacks).await;
    let request = stacktraces(SAMPLES_TYPE, r#"{service_name="shop"}"#, t, now_ms());
    let found = graph(&running, &request).await;
    let levels = levels_of(&found);
    assert_eq!((found.total, found.max_self), (18_007, 18_006 - 18_000));
    // All 9000 siblings have the same value, so all stay, and the deep stack is below them.
    assert_eq!((levels.len(), levels[2].len()), (3, 9001));
    assert_eq!(levels[2].last().unwrap(), &Bar { start: 18_000, name: "other".into(), total: 6, own: 6 });
    let all = api::SelectMergeStacktracesRequest { max_nodes: Some(1 << 20), ..request };
    assert_eq!(levels_of(&graph(&running, &all).await).len(), MAX_STACK_FRAMES + 1);
    running.shutdown().await;
}
