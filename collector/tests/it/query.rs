use std::collections::BTreeMap;

use gannet_collector::{Collector, Running};
use gannet_proto::{
    ingest::Batch,
    pprof::{check, decode},
    query::{
        FlameGraphRequest, FlameNode, LabelNamesRequest, LabelValuesRequest, ListProfilesRequest,
        MergeRequest, ReadReport, Selection, SeriesRequest, TimelineRequest, TopRequest, merge_progress,
    },
};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};
use tonic::Code;
use ulid::Ulid;

use crate::support::{
    CPU, OFF_CPU, Pusher, at, batch, config_with, eventually, metric, now_ms, queries, start, typed_batch,
};

const MINUTE: u64 = 60_000;

/// Stores twenty minutes of two services: `shop` with 10 samples a minute in `work`, `cart` with 5 in `add`, and off-CPU
/// time.
async fn fill(running: &Running, t0: u64) {
    let mut pusher = Pusher::open(running.grpc_addr).await;
    for minute in 0..20 {
        pusher.store(batch("shop", t0 + minute * MINUTE, &[("main;work", 10), ("main;idle", 2)])).await;
        pusher.store(batch("cart", t0 + minute * MINUTE, &[("main;add", 5)])).await;
        pusher.store(typed_batch(OFF_CPU, "shop", t0 + minute * MINUTE + 1, &[("main;wait", 3)])).await;
    }
}

// The form of the requests' fields.
#[allow(clippy::unnecessary_wraps)]
fn range(query: &str, from: u64, until: u64) -> Option<Selection> {
    Some(Selection {
        query: query.into(),
        from: Some(at(from)),
        until: Some(at(until)),
        ..Selection::default()
    })
}

#[tokio::test]
async fn labels_and_series_are_those_of_the_selection() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let t0 = now_ms() - 30 * MINUTE;
    fill(&running, t0).await;
    let mut client = queries(&running).await;
    let all = range("", t0, now_ms());
    let names =
        client.label_names(LabelNamesRequest { selection: all.clone() }).await.unwrap().into_inner().names;
    assert_eq!(names, ["node", "service_name"]);
    let values = |query: &str, from, until| {
        let mut client = client.clone();
        let request =
            LabelValuesRequest { selection: range(query, from, until), name: "service_name".into() };
        async move { client.label_values(request).await.unwrap().into_inner().values }
    };
    assert_eq!(values("", t0, now_ms()).await, ["cart", "shop"]);
    assert_eq!(values(r#"{service_name=~"s.*"}"#, t0, now_ms()).await, ["shop"]);
    assert_eq!(values(r#"{node!="n1"}"#, t0, now_ms()).await, [""; 0]);
    assert_eq!(values("", t0 - 10 * MINUTE, t0).await, [""; 0]);
    let of = range("", t0, t0 + 5 * MINUTE);
    let series = client.series(SeriesRequest { selection: of }).await.unwrap().into_inner().series;
    assert_eq!(series.len(), 2);
    assert_eq!(
        (series[0].labels["service_name"].as_str(), series[0].profiles, series[0].samples),
        ("cart", 5, 25)
    );
    assert_eq!((series[1].profiles, series[1].samples), (10, 75));
    assert_eq!(
        series[1].sample_types,
        ["cpu/nanoseconds", "events/count", "offcpu/nanoseconds", "samples/count"]
    );
    assert_eq!(series[0].first, Some(at(t0)));
    assert_eq!(series[0].last, Some(at(t0 + 4 * MINUTE)));
    let status = client.series(SeriesRequest { selection: range("{a=b}", t0, now_ms()) }).await.unwrap_err();
    assert!(status.code() == Code::InvalidArgument && status.message().contains("character 4"), "{status}");
    running.shutdown().await;
}

#[tokio::test]
async fn pages_list_every_profile_once_newest_first() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let t0 = now_ms() - 30 * MINUTE;
    fill(&running, t0).await;
    let mut client = queries(&running).await;
    let (mut starts, mut token) = (Vec::new(), String::new());
    loop {
        let request = ListProfilesRequest {
            selection: range(r#"{service_name="shop"}"#, t0, now_ms()),
            limit: 7,
            page_token: token,
        };
        let page = client.list_profiles(request).await.unwrap().into_inner();
        assert!(page.profiles.len() <= 7);
        starts.extend(page.profiles.iter().map(|p| (p.start.unwrap().seconds, p.start.unwrap().nanos)));
        if page.next_page_token.is_empty() {
            break;
        }
        token = page.next_page_token;
    }
    assert_eq!(starts.len(), 40);
    assert!(starts.windows(2).all(|w| w[0] > w[1]), "newest first, none twice");
    for (request, says) in [
        (ListProfilesRequest { limit: 10_001, ..Default::default() }, "10000"),
        (ListProfilesRequest { page_token: "x".into(), ..Default::default() }, "page_token"),
        (ListProfilesRequest { selection: range("", 5000, 5000), ..Default::default() }, "range is empty"),
    ] {
        let status = client.list_profiles(request).await.unwrap_err();
        assert!(status.code() == Code::InvalidArgument && status.message().contains(says), "{status}");
    }
    running.shutdown().await;
}

async fn merge(
    running: &Running,
    request: MergeRequest,
) -> Result<gannet_proto::pprof::Profile, tonic::Status> {
    let mut stream = queries(running).await.merge(request).await?.into_inner();
    let (mut bytes, mut last) = (Vec::new(), None);
    while let Some(step) = stream.message().await? {
        match step.message.unwrap() {
            merge_progress::Message::Progress(progress) => last = Some(progress),
            merge_progress::Message::Chunk(chunk) => bytes.extend(chunk.data),
        }
    }
    let last = last.expect("a merge reports its progress");
    assert_eq!(last.profiles_done, last.profiles_total);
    Ok(decode(&bytes, 64 << 20).unwrap())
}

#[tokio::test]
async fn a_merge_adds_up_and_omits_other_sample_types() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let t0 = now_ms() - 30 * MINUTE;
    fill(&running, t0).await;
    let request = MergeRequest { selection: range("", t0, now_ms()), sample_type: String::new() };
    let merged = merge(&running, request.clone()).await.unwrap();
    let sum = check(&merged).unwrap();
    assert_eq!(sum.sample_types, ["samples/count", "cpu/nanoseconds"]);
    assert_eq!(sum.totals, [20 * 17, 20 * 17 * 10_000_000]);
    assert_eq!(sum.samples, 3, "stacks are unified");
    assert_eq!(merge(&running, request.clone()).await.unwrap(), merged, "from the cache as from the disk");
    let off = MergeRequest { sample_type: "offcpu/nanoseconds".into(), ..request.clone() };
    assert_eq!(check(&merge(&running, off).await.unwrap()).unwrap().totals, [60, 600_000_000]);
    let none = MergeRequest { sample_type: "alloc/bytes".into(), ..request };
    let status = merge(&running, none).await.unwrap_err();
    assert!(
        status.code() == Code::NotFound && status.message().contains("known types: cpu/nanoseconds"),
        "{status}"
    );
    let nothing = MergeRequest { selection: range(r#"{pod="x"}"#, t0, now_ms()), ..Default::default() };
    let status = merge(&running, nothing).await.unwrap_err();
    assert!(status.code() == Code::NotFound && status.message().contains(r#"{pod="x"}"#), "{status}");
    running.shutdown().await;
}

#[tokio::test]
async fn a_query_above_the_limits_is_refused_with_the_cure() {
    let dir = tempfile::tempdir().unwrap();
    let running =
        Collector::start(config_with(dir.path(), |config| config.query.max_profiles = 3)).await.unwrap();
    let t0 = now_ms() - 30 * MINUTE;
    fill(&running, t0).await;
    let whole = MergeRequest { selection: range("", t0, now_ms()), ..Default::default() };
    let status = merge(&running, whole).await.unwrap_err();
    assert!(
        status.code() == Code::ResourceExhausted && status.message().contains("shorter range"),
        "{status}"
    );
    let part = MergeRequest { selection: range("", t0, t0 + MINUTE), ..Default::default() };
    merge(&running, part).await.unwrap();
    running.shutdown().await;
}

fn flatten(node: &FlameNode, path: &str, out: &mut BTreeMap<String, (u64, u64, u64, u64)>) {
    let path = if path.is_empty() { node.name.clone() } else { format!("{path};{}", node.name) };
    for child in &node.children {
        flatten(child, &path, out);
    }
    out.insert(path, (node.total, node.self_, node.base_total, node.base_self));
}

#[tokio::test]
async fn graph_and_table_of_a_comparison_hold_both_sides() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let t0 = now_ms() - 30 * MINUTE;
    fill(&running, t0).await;
    let mut client = queries(&running).await;
    let shop = r#"{service_name="shop"}"#;
    let request = FlameGraphRequest {
        selection: range(shop, t0, t0 + 10 * MINUTE),
        base: range("", t0 + 10 * MINUTE, t0 + 12 * MINUTE),
        sample_type: "samples/count".into(),
        max_nodes: 0,
        flat: false,
        interpreter_frames: false,
        hide_error_frames: false,
        ..Default::default()
    };
    let graph = client.flame_graph(request.clone()).await.unwrap().into_inner();
    assert_eq!((graph.unit.as_str(), graph.sample_type.as_str()), ("count", "samples/count"));
    assert_eq!((graph.total, graph.base_total), (120, 34));
    assert_eq!((graph.profiles, graph.base_profiles), (10, 4));
    let mut nodes = BTreeMap::new();
    flatten(&graph.root.unwrap(), "", &mut nodes);
    let root = nodes.keys().next().unwrap().clone();
    assert_eq!(nodes[&root], (120, 0, 34, 0));
    assert_eq!(nodes[&format!("{root};main;work")], (100, 100, 20, 20));
    assert_eq!(nodes[&format!("{root};main;idle")], (20, 20, 4, 4));
    assert_eq!(nodes[&format!("{root};main;add")], (0, 0, 10, 10));
    let request = TopRequest {
        selection: request.selection,
        base: request.base,
        sample_type: request.sample_type,
        limit: 10,
        interpreter_frames: false,
        hide_error_frames: false,
        ..Default::default()
    };
    let top = client.top(request).await.unwrap().into_inner();
    assert_eq!((top.total, top.base_total, top.unit.as_str()), (120, 34, "count"));
    let row = |name: &str| top.rows.iter().find(|r| r.name == name).unwrap();
    assert_eq!((row("work").self_, row("work").base_self), (100, 20));
    assert_eq!((row("main").self_, row("main").total, row("main").base_total), (0, 120, 34));
    assert_eq!(row("main").file, "shop");

    // Without a type it is the last one of the first profile. A selection may be one profile. An empty one has an empty
    // graph.
    let default = FlameGraphRequest { selection: range("", t0, now_ms()), ..Default::default() };
    assert_eq!(client.flame_graph(default).await.unwrap().into_inner().sample_type, "cpu/nanoseconds");
    let listed = client.list_profiles(ListProfilesRequest::default()).await.unwrap().into_inner();
    let id = listed.profiles[0].id.clone();
    let selection = Some(Selection { profile_id: id, ..Selection::default() });
    let single =
        client.flame_graph(FlameGraphRequest { selection, ..Default::default() }).await.unwrap().into_inner();
    assert_eq!(single.profiles, 1);
    let empty = FlameGraphRequest { selection: range(r#"{pod="x"}"#, t0, now_ms()), ..Default::default() };
    let empty = client.flame_graph(empty).await.unwrap().into_inner();
    assert_eq!((empty.total, empty.profiles), (0, 0));
    for (id, code) in [("x", Code::InvalidArgument), ("01ARZ3NDEKTSV4RRFFQ69G5FAV", Code::NotFound)] {
        let selection = Some(Selection { profile_id: id.into(), ..Selection::default() });
        let status =
            client.flame_graph(FlameGraphRequest { selection, ..Default::default() }).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
    }
    running.shutdown().await;
}

#[tokio::test]
async fn a_timeline_adds_up_to_the_merge_from_the_index_alone() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let t0 = now_ms() - 30 * MINUTE;
    fill(&running, t0).await;
    // The timeline comes from the index alone, so the objects may be missing.
    std::fs::remove_dir_all(dir.path().join("objects/default")).unwrap();
    let mut client = queries(&running).await;
    let request = |query: &str, sample_type: &str, step: i64| TimelineRequest {
        selection: range(query, t0, t0 + 20 * MINUTE),
        sample_type: sample_type.into(),
        step: (step != 0).then_some(prost_types::Duration { seconds: step, nanos: 0 }),
    };
    let line = client.timeline(request("", "samples/count", 300)).await.unwrap().into_inner();
    assert_eq!(line.unit, "count");
    assert_eq!(line.points.iter().map(|p| (p.value, p.profiles)).collect::<Vec<_>>(), [(85, 10); 4]);
    assert_eq!(line.points[1].at, Some(at(t0 + 5 * MINUTE)));
    let line = client.timeline(request(r#"{service_name="cart"}"#, "", 0)).await.unwrap().into_inner();
    assert_eq!((line.sample_type.as_str(), line.unit.as_str()), ("cpu/nanoseconds", "nanoseconds"));
    assert_eq!(line.step.unwrap().seconds, 12);
    assert_eq!(line.points.iter().map(|p| p.value).sum::<u64>(), 20 * 5 * 10_000_000);
    let status = client.timeline(TimelineRequest {
        selection: range("", t0, t0 + 24 * 60 * MINUTE),
        step: Some(prost_types::Duration { seconds: 1, nanos: 0 }),
        ..Default::default()
    });
    let status = status.await.unwrap_err();
    assert!(status.code() == Code::InvalidArgument && status.message().contains("longer step"), "{status}");
    running.shutdown().await;
}

#[tokio::test]
async fn the_deepest_accepted_stack_can_be_shown() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let stack = (0..1024).map(|i| format!("f{i}")).collect::<Vec<_>>().join(";");
    pusher.store(typed_batch(CPU, "deep", now_ms(), &[(&stack, 1)])).await;
    let graph = crate::support::get(running.http_addr, "/api/v1/flamegraph?type=samples/count").await;
    assert_eq!(graph.status, 200, "{}", graph.text());
    assert!(graph.text().contains("\"f1023\""));
    // gRPC clients may limit the depth of a message. The collector must survive encoding it.
    let _ = queries(&running).await.flame_graph(FlameGraphRequest::default()).await;
    let flat = FlameGraphRequest { flat: true, ..Default::default() };
    let flat = queries(&running).await.flame_graph(flat).await.unwrap().into_inner();
    assert!(flat.root.is_none());
    assert_eq!((flat.nodes.len(), flat.nodes[0].parent), (1025, 0));
    for (place, node) in flat.nodes.iter().enumerate().skip(1) {
        assert_eq!((node.name.as_str(), node.parent as usize), (&*format!("f{}", place - 1), place - 1));
    }
    assert_eq!(crate::support::get(running.http_addr, "/livez").await.status, 200);
    running.shutdown().await;
}

/// Checks the report of each form of an answer: the bytes are those of the stored profiles, and an earlier merge reads none.
#[tokio::test]
async fn an_answer_states_what_the_query_read() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let t0 = now_ms() - 30 * MINUTE;
    fill(&running, t0).await;
    let mut client = queries(&running).await;
    let lists = client.clone();
    let bytes = |query: &str, until: u64| {
        let request =
            ListProfilesRequest { selection: range(query, t0, until), limit: 1000, ..Default::default() };
        let mut client = lists.clone();
        async move {
            let list = client.list_profiles(request).await.unwrap().into_inner().profiles;
            list.iter().map(|p| p.bytes).sum::<u64>()
        }
    };
    let (shop, cart) = (r#"{service_name="shop"}"#, r#"{service_name="cart"}"#);
    let until = t0 + 5 * MINUTE;
    let cart_bytes = bytes(cart, until).await;
    let request = FlameGraphRequest { selection: range(cart, t0, until), ..Default::default() };
    let read = client.flame_graph(request.clone()).await.unwrap().into_inner().read.unwrap();
    assert!(cart_bytes > 0 && read.took.is_some());
    let wanted = ReadReport { segment_profiles: 5, segment_bytes: cart_bytes, ..ReadReport::default() };
    assert_eq!(ReadReport { took: None, ..read }, wanted);
    // The table needs no second merge.
    let top = TopRequest { selection: range(cart, t0, until), ..Default::default() };
    let read = client.top(top).await.unwrap().into_inner().read.unwrap();
    let wanted = ReadReport { segment_profiles: 5, cached_profiles: 5, ..ReadReport::default() };
    assert_eq!(ReadReport { took: None, ..read }, wanted);
    // A comparison has the sum of both sides, of which one is in the cache. All profiles of the shop are 10 in the range, half of them
    // of another type.
    let sample_type = "cpu/nanoseconds".to_owned();
    let compared = FlameGraphRequest { base: range(shop, t0, until), sample_type, ..request };
    let read = client.flame_graph(compared).await.unwrap().into_inner().read.unwrap();
    assert_eq!((read.segment_profiles, read.cached_profiles), (10, 5));
    assert!(read.segment_bytes > 0 && read.segment_bytes < bytes(shop, until).await);

    let merged =
        crate::support::get(running.http_addr, &format!("/api/v1/merge?query={cart}&from={t0}")).await;
    let read: serde_json::Value = serde_json::from_str(&merged.headers["gannet-read"]).unwrap();
    assert_eq!(read["segment_profiles"], 20);
    assert_eq!(read["segment_bytes"], bytes(cart, now_ms()).await);
    let graph =
        crate::support::get(running.http_addr, &format!("/api/v1/flamegraph?query={cart}&from={t0}")).await;
    assert_eq!(graph.json()["read"]["cached_profiles"], 20);
    assert!(graph.json()["read"]["took_ms"].as_f64().unwrap() > 0.0);
    let mut stream = client
        .merge(MergeRequest { selection: range(cart, t0, until), ..Default::default() })
        .await
        .unwrap()
        .into_inner();
    let mut last = None;
    while let Some(step) = stream.message().await.unwrap() {
        if let Some(merge_progress::Message::Progress(progress)) = step.message {
            last = progress.read;
        }
    }
    assert_eq!(last.unwrap().cached_profiles, 5);
    running.shutdown().await;
}

/// Checks that the merge for a client ends when the client goes away: in HTTP by closing the connection, in gRPC by ending the call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_ends_its_merge() {
    const PROFILES: usize = 2000;
    let dir = tempfile::tempdir().unwrap();
    // Without a cache, so that each request merges.
    let config = config_with(dir.path(), |config| config.query.cache_bytes = 0);
    let running = Collector::start(config).await.unwrap();
    let stacks: Vec<String> = (0..300).map(|i| format!("main;f{};g{i}", i % 20)).collect();
    let stacks: Vec<(&str, i64)> = stacks.iter().map(|stack| (stack.as_str(), 1)).collect();
    let sent = batch("shop", now_ms() - MINUTE, &stacks);
    let batches: Vec<_> =
        (0..PROFILES).map(|_| Batch { batch_id: Ulid::new().to_string(), ..sent.clone() }).collect();
    Pusher::open(running.grpc_addr).await.store_all(&batches).await;
    let started = |merges: f64| {
        let addr = running.http_addr;
        eventually("the merge starts", move || async move {
            metric(addr, "gannet_collector_query_cache_misses_total").await >= merges
        })
    };
    let mut connection = TcpStream::connect(running.http_addr).await.unwrap();
    connection.write_all(b"GET /api/v1/flamegraph HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    started(1.0).await;
    drop(connection);
    let mut client = queries(&running).await;
    let call = tokio::spawn(async move { client.flame_graph(FlameGraphRequest::default()).await });
    started(2.0).await;
    call.abort();
    // This merge reads all profiles, and takes at least as long as the others would.
    let graph = crate::support::get(running.http_addr, "/api/v1/flamegraph").await.json();
    assert_eq!(graph["profiles"], PROFILES);
    let merged = metric(running.http_addr, "gannet_collector_query_merged_profiles_total").await;
    assert_eq!(merged as usize, PROFILES, "an abandoned merge has read all profiles");
    running.shutdown().await;
}
