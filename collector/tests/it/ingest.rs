use std::{collections::BTreeSet, time::Duration};

use gannet_base::ByteSize;
use gannet_collector::Collector;
use gannet_proto::{
    control::Ledger,
    ingest::{Batch, push_response::Message},
    pprof::{Encoding, Profile, decode, encode, encode_as},
    query::{FlameGraphRequest, ListProfilesRequest, Selection},
};
use rstest::rstest;
use ulid::Ulid;

use crate::{
    store::list,
    support::{
        CPU, Pusher, at, batch, channel, config_with, download, eventually, get, labels, metric, now_ms,
        profile, queries, start,
    },
};

#[tokio::test]
async fn an_accepted_batch_is_read_back_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    assert_eq!(pusher.limits.max_batch_bytes, 4 << 20);
    assert!(pusher.limits.max_in_flight > 0);
    let sent = batch("shop", now_ms() - 5000, &[("main;work", 3), ("main;idle", 1)]);
    pusher.store(sent.clone()).await;
    let mut client = queries(&running).await;
    let listed = client.list_profiles(ListProfilesRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.profiles.len(), 1);
    let info = &listed.profiles[0];
    assert_eq!(info.id, sent.batch_id);
    assert_eq!(info.labels, sent.labels);
    assert_eq!(info.start, sent.start);
    assert_eq!(info.duration, sent.duration);
    assert_eq!(info.sample_types, ["samples/count", "cpu/nanoseconds"]);
    assert_eq!((info.samples, info.bytes, info.revision), (4, sent.pprof.len() as u64, 7));
    assert_eq!((info.rule_id.as_str(), info.reason.as_str()), ("r1", "always"));
    let request = gannet_proto::query::GetProfileRequest { id: sent.batch_id, ..Default::default() };
    let mut stream = client.get_profile(request).await.unwrap().into_inner();
    let mut got = Vec::new();
    while let Some(chunk) = stream.message().await.unwrap() {
        got.extend(chunk.data);
    }
    assert_eq!(got, sent.pprof);
    running.shutdown().await;
}

/// Returns the batch with its profile compressed by zstd.
fn zstd(mut batch: Batch) -> Batch {
    batch.pprof = encode_as(&decode(&batch.pprof, 1 << 20).unwrap(), Encoding::Zstd);
    batch
}

/// Checks that an agent may send either encoding on one stream, and that queries see no difference.
#[tokio::test]
async fn zstd_is_stored_as_sent_and_downloaded_as_gzip() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    assert_eq!(pusher.limits.encodings, ["zstd"]);
    let gzip = batch("shop", now_ms() - 5000, &[("main;work", 3), ("main;idle", 1)]);
    let sent = zstd(batch("shop", now_ms(), &[("main;work", 2), ("main;wait", 5)]));
    assert_eq!(Encoding::of(&sent.pprof), Some(Encoding::Zstd));
    assert_eq!(pusher.store_all(&[gzip.clone(), sent.clone()]).await, (0, 0));
    let listed = list(&running).await;
    let bytes = |batch: &Batch| listed.iter().find(|info| info.id == batch.batch_id).unwrap().bytes;
    assert_eq!((bytes(&gzip), bytes(&sent)), (gzip.pprof.len() as u64, sent.pprof.len() as u64));

    assert_eq!(download(&running, &gzip.batch_id).await.unwrap(), gzip.pprof);
    let expected = decode(&sent.pprof, 1 << 20).unwrap();
    let over_http = get(running.http_addr, &format!("/api/v1/profiles/{}", sent.batch_id)).await.body;
    for bytes in [download(&running, &sent.batch_id).await.unwrap(), over_http] {
        assert_eq!(Encoding::of(&bytes), Some(Encoding::Gzip));
        assert_eq!(decode(&bytes, 1 << 20).unwrap(), expected);
    }
    let graph = queries(&running).await.flame_graph(FlameGraphRequest::default()).await.unwrap().into_inner();
    assert_eq!((graph.profiles, graph.unreadable_profiles, graph.total), (2, 0, 11 * 10_000_000));
    running.shutdown().await;
}

fn deep() -> Batch {
    let stack = (0..3000).map(|i| format!("f{i}")).collect::<Vec<_>>().join(";");
    batch("shop", now_ms(), &[(&stack, 1)])
}

#[rstest]
#[case::id(|b: &mut Batch| b.batch_id = "x".into(), "bad_id", "ULID")]
#[case::id_in_lower_case(|b: &mut Batch| b.batch_id = b.batch_id.to_lowercase(), "bad_id", "ULID")]
#[case::large(|b: &mut Batch| b.pprof = vec![0; 2 << 20], "too_large", "1048576")]
#[case::bomb(|b: &mut Batch| b.pprof = bomb(), "too_large", "16777216")]
#[case::deep(|b: &mut Batch| *b = deep(), "too_large", "3000 frames")]
#[case::raw(|b: &mut Batch| b.pprof = decode_raw(&b.pprof), "not_gzip", "gzip")]
#[case::truncated(|b: &mut Batch| b.pprof.truncate(b.pprof.len() / 2), "not_gzip", "cut short")]
#[case::truncated_zstd(|b: &mut Batch| { *b = zstd(b.clone()); b.pprof.truncate(b.pprof.len() / 2) }, "not_gzip", "cut short")]
#[case::zstd_bomb(|b: &mut Batch| b.pprof = zstd_bomb(), "too_large", "16777216")]
#[case::text(|b: &mut Batch| b.pprof = gzip(b"\xff\xff\xff not a profile"), "not_pprof", "not a pprof")]
#[case::dangling(|b: &mut Batch| b.pprof = dangling(), "not_pprof", "location")]
#[case::empty(|b: &mut Batch| { b.pprof.clear(); b.samples = 0 }, "not_pprof", "neither")]
#[case::label(|b: &mut Batch| { b.labels.insert("bad-name".into(), "x".into()); }, "bad_labels", "bad-name")]
#[case::many_labels(|b: &mut Batch| b.labels = (0..31).map(|i| (format!("l{i}"), "x".into())).collect(), "bad_labels", "30")]
#[case::reason(|b: &mut Batch| b.reason = "x".repeat(70_000), "bad_labels", "64 KiB")]
#[case::no_time(|b: &mut Batch| b.start = None, "bad_time", "start")]
#[case::time(|b: &mut Batch| b.duration = Some(prost_types::Duration { seconds: -1, nanos: 0 }), "bad_time", "duration")]
#[case::old(|b: &mut Batch| b.start = Some(at(now_ms() - 8 * 24 * 3_600_000)), "too_old", "for 7d")]
#[case::count(|b: &mut Batch| b.samples += 1, "count_mismatch", "add up to 1")]
#[case::count_without_profile(|b: &mut Batch| b.pprof.clear(), "count_mismatch", "no profile")]
#[tokio::test]
async fn a_bad_batch_is_refused_and_the_stream_continues(
    #[case] spoil: fn(&mut Batch),
    #[case] code: &str,
    #[case] says: &str,
) {
    let dir = tempfile::tempdir().unwrap();
    let config = config_with(dir.path(), |config| config.ingest.max_batch_bytes = ByteSize(1 << 20));
    let running = Collector::start(config).await.unwrap();
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let mut bad = batch("shop", now_ms(), &[("main", 1)]);
    spoil(&mut bad);
    let id = bad.batch_id.clone();
    match pusher.push(bad).await {
        Message::Refused(refused) => {
            assert_eq!(
                (refused.batch_id.as_str(), refused.code.as_str()),
                (id.as_str(), code),
                "{}",
                refused.reason
            );
            assert!(refused.reason.contains(says), "{}", refused.reason);
        }
        other => panic!("not refused: {other:?}"),
    }
    pusher.store(batch("shop", now_ms(), &[("main", 1)])).await;
    let name = format!("gannet_collector_ingest_batches_refused_total{{reason=\"{code}\"}}");
    assert!(metric(running.http_addr, &name).await >= 1.0);
    running.shutdown().await;
}

fn gzip(data: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    out.write_all(data).unwrap();
    out.finish().unwrap()
}

fn bomb() -> Vec<u8> {
    gzip(&vec![0; 32 << 20])
}

fn zstd_bomb() -> Vec<u8> {
    let text = vec![String::new(), "x".repeat(32 << 20)];
    encode_as(&Profile { string_table: text, ..Profile::default() }, Encoding::Zstd)
}

fn decode_raw(pprof: &[u8]) -> Vec<u8> {
    use prost::Message as _;
    decode(pprof, 1 << 20).unwrap().encode_to_vec()
}

fn dangling() -> Vec<u8> {
    let mut profile = profile(CPU, &[("main", 1)]);
    profile.sample[0].location_id[0] = 99;
    encode(&profile)
}

#[tokio::test]
async fn a_stream_without_hello_ends_with_the_reason() {
    use gannet_proto::ingest::{PushRequest, ingest_service_client::IngestServiceClient, push_request};
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let channel = crate::support::channel(running.grpc_addr).await;
    let first = batch("shop", now_ms(), &[("main", 1)]);
    let requests = [PushRequest { message: Some(push_request::Message::Batch(first)) }];
    let mut stream =
        IngestServiceClient::new(channel).push(tokio_stream::iter(requests)).await.unwrap().into_inner();
    let status = stream.message().await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::InvalidArgument);
    assert!(status.message().contains("hello"), "{status}");
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_batch_pushed_concurrently_is_stored_once() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let addr = running.grpc_addr;
    let batches: Vec<Batch> = (0..20).map(|i| batch("shop", now_ms() - i, &[("main", 1)])).collect();
    let mut tasks = Vec::new();
    for _ in 0..8 {
        let batches = batches.clone();
        tasks.push(tokio::spawn(async move {
            let mut pusher = Pusher::open(addr).await;
            for batch in batches {
                assert!(pusher.send(batch).await);
            }
            let mut fresh = 0;
            for _ in 0..20 {
                match pusher.answer().await.unwrap() {
                    Message::Accepted(a) => fresh += u32::from(!a.duplicate),
                    other => panic!("{other:?}"),
                }
            }
            fresh
        }));
    }
    let mut fresh = 0;
    for task in tasks {
        fresh += task.await.unwrap();
    }
    assert_eq!(fresh, 20, "each batch is new to exactly one of its pushers");
    let listed = queries(&running).await.list_profiles(ListProfilesRequest::default()).await.unwrap();
    let ids: Vec<String> = listed.into_inner().profiles.into_iter().map(|p| p.id).collect();
    assert_eq!(ids.len(), 20);
    assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), 20);
    running.shutdown().await;
}

#[tokio::test]
async fn a_ledger_counts_once_over_all_batches_of_its_window() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let ledger = Ledger {
        ticks: 100,
        taken: 10,
        delivered: 7,
        lost: [("ring_full".to_owned(), 3)].into(),
        pending: 0,
        unaccounted: 0,
    };
    let window_id = Ulid::new().to_string();
    for service in ["a", "b", "c"] {
        let mut batch = batch(service, now_ms(), &[("main", 1)]);
        batch.window_id.clone_from(&window_id);
        batch.ledger = Some(ledger.clone());
        pusher.store(batch).await;
    }
    let alone = Batch {
        batch_id: Ulid::new().to_string(),
        labels: labels(&[("service_name", "none")]),
        start: Some(at(now_ms())),
        window_id: Ulid::new().to_string(),
        ledger: Some(Ledger {
            taken: 6,
            delivered: 0,
            lost: [("queue_full".to_owned(), 5)].into(),
            unaccounted: 1,
            ..Ledger::default()
        }),
        ..Batch::default()
    };
    pusher.store(alone.clone()).await;
    match pusher.push(alone).await {
        Message::Accepted(a) => assert!(a.duplicate, "a ledger alone is stored exactly once, too"),
        other => panic!("{other:?}"),
    }
    let http = running.http_addr;
    assert_eq!(metric(http, "gannet_collector_ledger_samples_taken_total").await as u64, 16);
    assert_eq!(metric(http, "gannet_collector_ledger_samples_unaccounted").await as i64, 1);
    assert_eq!(metric(http, "gannet_collector_ledger_samples_delivered_total").await as u64, 7);
    assert_eq!(
        metric(http, "gannet_collector_ledger_samples_lost_total{reason=\"ring_full\"}").await as u64,
        3
    );
    assert_eq!(
        metric(http, "gannet_collector_ledger_samples_lost_total{reason=\"queue_full\"}").await as u64,
        5
    );
    let listed = queries(&running).await.list_profiles(ListProfilesRequest::default()).await.unwrap();
    assert_eq!(listed.into_inner().profiles.len(), 3, "a ledger alone is no profile");
    running.shutdown().await;
}

#[tokio::test]
async fn batches_beyond_the_queue_are_throttled_and_stored_later() {
    let dir = tempfile::tempdir().unwrap();
    // The queue holds one batch at a time.
    let config = config_with(dir.path(), |config| {
        config.ingest.max_batch_bytes = ByteSize(4096);
        config.ingest.queue_bytes = 4096;
    });
    let running = Collector::start(config).await.unwrap();
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let stacks: Vec<(String, i64)> = (0..120).map(|i| (format!("main;f{i}"), 1)).collect();
    let stacks: Vec<(&str, i64)> = stacks.iter().map(|(s, n)| (s.as_str(), *n)).collect();
    let mut waiting: Vec<Batch> = (0..30).map(|i| batch("shop", now_ms() - i, &stacks)).collect();
    assert!(waiting[0].pprof.len() > 1024, "{} bytes do not fill the queue", waiting[0].pprof.len());
    let mut put_off = 0;
    while !waiting.is_empty() {
        for batch in &waiting {
            assert!(pusher.send(batch.clone()).await);
        }
        for _ in 0..waiting.len() {
            match pusher.answer().await.unwrap() {
                Message::Accepted(a) => waiting.retain(|b| b.batch_id != a.batch_id),
                Message::Throttled(t) => {
                    put_off += 1;
                    assert!(t.retry_after.unwrap().seconds > 0);
                    assert!(t.reason.contains("unwritten"), "{}", t.reason);
                }
                other => panic!("{other:?}"),
            }
        }
    }
    assert!(put_off > 0, "thirty batches went through a queue of one without waiting");
    running.shutdown().await;
}

#[tokio::test]
async fn batches_of_a_series_above_the_limit_are_throttled() {
    let dir = tempfile::tempdir().unwrap();
    let running =
        Collector::start(config_with(dir.path(), |config| config.store.max_series = 2)).await.unwrap();
    let mut pusher = Pusher::open(running.grpc_addr).await;
    pusher.store(batch("a", now_ms(), &[("main", 1)])).await;
    pusher.store(batch("b", now_ms(), &[("main", 1)])).await;
    match pusher.push(batch("c", now_ms(), &[("main", 1)])).await {
        Message::Throttled(t) => assert!(t.reason.contains("--max-series"), "{}", t.reason),
        other => panic!("{other:?}"),
    }
    pusher.store(batch("a", now_ms(), &[("main", 1)])).await;
    running.shutdown().await;
}

#[tokio::test]
async fn a_graceful_end_answers_every_received_batch() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let batches: Vec<Batch> = (0..30).map(|i| batch("shop", now_ms() - i, &[("main", 1)])).collect();
    for batch in &batches {
        assert!(pusher.send(batch.clone()).await);
    }
    let first = pusher.answer().await.unwrap();
    let end = tokio::spawn(running.shutdown());
    let mut accepted = BTreeSet::new();
    let mut next = Some(first);
    while let Some(Message::Accepted(a)) = next {
        accepted.insert(a.batch_id);
        next = pusher.answer().await;
    }
    tokio::time::timeout(Duration::from_secs(9), end).await.expect("a graceful end is prompt").unwrap();
    let again = start(dir.path()).await;
    let mut client = queries(&again).await;
    let request =
        ListProfilesRequest { limit: 100, selection: Some(Selection::default()), page_token: String::new() };
    let listed = client.list_profiles(request).await.unwrap().into_inner();
    let stored: BTreeSet<String> = listed.profiles.into_iter().map(|p| p.id).collect();
    assert!(!accepted.is_empty());
    assert!(accepted.is_subset(&stored));
    drop(client);
    eventually("the collector accepts agents again", || async { again.grpc_addr.port() > 0 }).await;
    again.shutdown().await;
}

/// Checks clocks that are ahead and behind, with batches that start within and beyond what the difference explains.
#[tokio::test]
async fn a_wrong_clock_loses_no_batch_and_leaves_a_mark() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let (minute, day, year) = (60_000, 86_400_000, 365 * 86_400_000_i64);
    // The node's clock at its hello, the age of the batch, and the error of the clock when the batch was made.
    let cases = [
        (11 * minute, 30_000, 11 * minute, "11m ahead"),
        (2 * day, 3_600_000, 2 * day, "2d ahead"),
        (-8 * day, 30_000, -8 * day, "8d behind"),
        (-30 * year, 30_000, -30 * year, "behind"),
        // Someone has set the clock meanwhile.
        (0, 10_000, 3 * day, "3d ahead"),
    ];
    for (number, (ahead, age, error, mark)) in cases.into_iter().enumerate() {
        let channel = channel(running.grpc_addr).await;
        let mut pusher = Pusher::with_clock(channel, ahead).await.unwrap();
        let (service, true_start) = (format!("s{number}"), now_ms() - age);
        pusher.store(batch(&service, true_start.saturating_add_signed(error), &[("main", 1)])).await;
        let profiles = list(&running).await;
        let stored = profiles.iter().find(|p| p.labels["service_name"] == service).unwrap();
        assert!(
            stored.reason.starts_with("always; the node's clock was ") && stored.reason.contains(mark),
            "{}",
            stored.reason
        );
        let start = stored.start.as_ref().unwrap();
        let off = (start.seconds * 1000 + i64::from(start.nanos) / 1_000_000).abs_diff(true_start as i64);
        assert!(off < 3000, "{mark}: {off} ms beside the true time");
    }
    assert_eq!(
        metric(running.http_addr, "gannet_collector_ingest_batches_retimed_total").await as usize,
        cases.len()
    );
    // A right time is not touched.
    let mut pusher = Pusher::with_clock(channel(running.grpc_addr).await, 11 * minute).await.unwrap();
    pusher.store(batch("right", now_ms() - 30_000, &[("main", 1)])).await;
    let profiles = list(&running).await;
    assert_eq!(profiles.iter().find(|p| p.labels["service_name"] == "right").unwrap().reason, "always");
    running.shutdown().await;
}
