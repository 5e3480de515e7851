//! Deletions while collectors run.

use std::{collections::BTreeSet, path::Path, time::Duration};

use gannet_base::TimeSpan;
use gannet_collector::{Collector, Config, Running};
use gannet_proto::{
    ingest::Batch,
    query::{
        DeleteProfilesRequest, DeleteProfilesResponse, LabelValuesRequest, ListDeletionsRequest, Selection,
        SeriesRequest, deletion_service_client::DeletionServiceClient,
    },
};
use tonic::{Code, Status};

use crate::{
    bucket::{Fate, S3, in_bucket},
    delete::{config, is_audited, profiles},
    faults::listening,
    faulty_s3::FaultyS3,
    kill::{free_port, kills, stored_ids},
    segment::unpack_layout2,
    sql::{ask, numbers},
    store::objects,
    support::{Pusher, at, batch, channel, download, eventually, metric, now_ms, queries},
    table::{
        Files, check_rollups, files_below, push, sent_sums, spawn, sums, table_of, up_to_date, with_table,
    },
};

const HOUR_MS: u64 = 3_600_000;

/// Returns the configuration of a store with all tables. Files that they have lost stay as long as a test reads a version of them.
fn with_sums(data: &Path) -> Config {
    let mut config = config(data);
    config.table.table_rollups = true;
    config.table.delete_delay = Duration::from_secs(5);
    config.table.retention_interval = Duration::from_millis(100);
    config
}

pub fn of(query: &str) -> DeleteProfilesRequest {
    DeleteProfilesRequest { query: query.to_owned(), ..DeleteProfilesRequest::default() }
}

pub async fn delete(
    running: &Running,
    request: DeleteProfilesRequest,
) -> Result<DeleteProfilesResponse, Status> {
    let mut client = DeletionServiceClient::new(channel(running.grpc_addr).await);
    client.delete_profiles(request).await.map(tonic::Response::into_inner)
}

/// Waits until all deletions are carried out.
pub async fn carried_out(running: &Running) {
    eventually("all deletions are carried out", || async {
        let mut client = DeletionServiceClient::new(channel(running.grpc_addr).await);
        let answer = client.list_deletions(ListDeletionsRequest {}).await.unwrap().into_inner();
        answer.deletions.is_empty()
    })
    .await;
    let pending = metric(running.http_addr, "gannet_collector_store_deletions_pending").await;
    assert_eq!(pending as u64, 0);
}

fn everything() -> Selection {
    let (from, until) = (Some(at(now_ms() - 5 * HOUR_MS)), Some(at(now_ms() + HOUR_MS)));
    Selection { from, until, ..Selection::default() }
}

pub fn service(batch: &Batch) -> &str {
    &batch.labels["service_name"]
}

/// Checks that queries find these batches, byte for byte, and none of the others.
pub async fn check_only(running: &Running, left: &[&Batch], deleted: &[&Batch]) {
    let mut wanted: Vec<String> = left.iter().map(|batch| batch.batch_id.clone()).collect();
    wanted.sort();
    let mut found = stored_ids(running).await;
    found.sort();
    assert_eq!(found, wanted);
    for batch in left {
        assert_eq!(download(running, &batch.batch_id).await.unwrap(), batch.pprof);
    }
    for batch in deleted {
        let status = download(running, &batch.batch_id).await.unwrap_err();
        assert_eq!(status.code(), Code::NotFound, "{status}");
    }
    let services: BTreeSet<&str> = left.iter().map(|batch| service(batch)).collect();
    let request = LabelValuesRequest { selection: Some(everything()), name: "service_name".to_owned() };
    let values = queries(running).await.label_values(request).await.unwrap().into_inner().values;
    assert_eq!(values.iter().map(String::as_str).collect::<BTreeSet<_>>(), services);
    let series = queries(running).await.series(SeriesRequest { selection: Some(everything()) }).await;
    let series = series.unwrap().into_inner().series;
    assert_eq!(
        series.iter().map(|series| series.labels["service_name"].as_str()).collect::<BTreeSet<_>>(),
        services
    );
    let every = left.iter().chain(deleted).map(|batch| service(batch)).collect::<BTreeSet<_>>();
    for name in every {
        let count = left.iter().filter(|batch| service(batch) == name).count() as u64;
        assert_eq!(profiles(running, name).await, (count, 0), "{name}");
    }
}

/// Checks that the samples of SQL are those of these batches.
pub async fn check_sql(running: &Running, left: &[&Batch]) {
    let sum: i64 = sent_sums(left.iter().copied()).values().map(|(value, _)| value).sum();
    let found = numbers(
        running,
        "SELECT coalesce(sum(value), 0), count(DISTINCT profile_id), (SELECT count(*) FROM profiles) FROM samples",
    )
    .await;
    assert_eq!(found, [sum, left.len() as i64, left.len() as i64]);
    // A key of the table of profiles.
    let ids = "SELECT count(*) FROM samples s JOIN profiles p ON p.profile_id = s.profile_id";
    let rows: usize = sent_sums(left.iter().copied()).len();
    assert_eq!(numbers(running, ids).await, [rows as i64]);
    for table in ["samples_by_minute", "samples_by_hour"] {
        match ask(running, &format!("SELECT coalesce(sum(value), 0) FROM {table}")).await {
            Ok(_) => {
                assert_eq!(
                    numbers(running, &format!("SELECT coalesce(sum(value), 0) FROM {table}")).await,
                    [sum]
                );
            }
            Err(status) => {
                assert_eq!(status.code(), Code::Unavailable, "{status}");
                assert!(status.message().contains("run the query again in a minute"), "{status}");
            }
        }
    }
}

/// Checks that tables hold the samples of these batches, and no others.
pub fn check_table(files: &Files, left: &[&Batch]) {
    assert_eq!(sums(files), sent_sums(left.iter().copied()));
    check_rollups(files);
}

fn is_left(batch: &Batch, now: u64) -> bool {
    match service(batch) {
        "secret" => false,
        "shop" => batch.start.as_ref().unwrap().seconds as u64 > (now - HOUR_MS) / 1000,
        _ => true,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_hides_at_once_and_is_then_carried_out() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path();
    let running = Collector::start(with_sums(data)).await.unwrap();
    let (now, old) = (now_ms(), now_ms() - 2 * HOUR_MS);
    let mut sent: Vec<Batch> = Vec::new();
    for round in 0..3 {
        let mut new = vec![
            batch("secret", now, &[("main;work", round + 1)]),
            batch("secret", old, &[("main;work", round + 5)]),
            batch("shop", old, &[("main;sell", round + 1)]),
            batch("shop", now, &[("main;sell", round + 2), ("main;work", 3)]),
            batch("other", old, &[("main;rest", round + 3)]),
        ];
        if round == 2 {
            // A segment without any other profile.
            new.truncate(2);
        }
        Pusher::open(running.grpc_addr).await.store_all(&new).await;
        sent.extend(new);
    }
    up_to_date(running.http_addr).await;

    let secret = "{service_name=\"secret\"}";
    let counted = delete(&running, DeleteProfilesRequest { dry_run: true, ..of(secret) }).await.unwrap();
    let size: usize = sent.iter().filter(|batch| service(batch) == "secret").map(|b| b.pprof.len()).sum();
    assert_eq!((counted.profiles, counted.series, counted.bytes), (6, 1, size as u64));
    assert_eq!(counted.samples, 1 + 2 + 3 + 5 + 6 + 7);
    assert!(counted.deletion_id.is_empty() && !is_audited(data, secret));
    assert_eq!(profiles(&running, "secret").await, (6, 0));

    let done = delete(&running, of(secret)).await.unwrap();
    assert_eq!(DeleteProfilesResponse { deletion_id: String::new(), ..done.clone() }, counted);
    assert_eq!(done.deletion_id.len(), 26);
    assert!(is_audited(data, secret));
    let shop = DeleteProfilesRequest { until: Some(at(now - HOUR_MS)), ..of("{service_name=\"shop\"}") };
    assert_eq!(delete(&running, shop.clone()).await.unwrap().profiles, 2);
    let (left, deleted): (Vec<&Batch>, Vec<&Batch>) = sent.iter().partition(|batch| is_left(batch, now));
    check_only(&running, &left, &deleted).await;
    check_sql(&running, &left).await;

    carried_out(&running).await;
    check_only(&running, &left, &deleted).await;
    check_sql(&running, &left).await;
    up_to_date(running.http_addr).await;
    let has_secret =
        |path: &std::path::PathBuf| std::fs::read(path).unwrap().windows(6).any(|part| part == b"secret");
    assert!(!objects(data).iter().any(has_secret));
    assert_eq!(metric(running.http_addr, "gannet_collector_store_profiles_deleted_total").await as u64, 8);
    assert_eq!(metric(running.http_addr, "gannet_collector_store_profiles").await as usize, left.len());

    // An agent that has lost an answer does not bring a profile back. A new one stays, also of the same time.
    let again = Pusher::open(running.grpc_addr).await.store_all(&[deleted[0].clone()]).await;
    assert_eq!(again, (1, 0), "a duplicate");
    let fresh = batch("secret", old, &[("main;fresh", 2)]);
    Pusher::open(running.grpc_addr).await.store(fresh.clone()).await;
    let left: Vec<&Batch> = left.into_iter().chain([&fresh]).collect();
    check_only(&running, &left, &deleted).await;
    up_to_date(running.http_addr).await;
    check_sql(&running, &left).await;
    running.shutdown().await;
    check_table(&files_below(&data.join("table")), &left);

    for is_rebuilt in [false, true] {
        if is_rebuilt {
            std::fs::remove_file(data.join("index.redb")).unwrap();
        }
        let running = Collector::start(with_sums(data)).await.unwrap();
        check_only(&running, &left, &deleted).await;
        up_to_date(running.http_addr).await;
        check_sql(&running, &left).await;
        running.shutdown().await;
        check_table(&files_below(&data.join("table")), &left);
    }
}

/// Checks objects of the layout before segments, and a directory whose tables no thread updates.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_takes_old_objects_and_unused_tables() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path();
    unpack_layout2(data);
    let former = objects(data).len();
    let running = Collector::start(with_sums(data)).await.unwrap();
    Pusher::open(running.grpc_addr).await.store(batch("shop", now_ms(), &[("main", 1)])).await;
    up_to_date(running.http_addr).await;
    running.shutdown().await;
    let mut config = with_sums(data);
    config.table.table = false;
    config.table.table_rollups = false;
    let running = Collector::start(config).await.unwrap();
    let until = Some(at(now_ms() - 24 * HOUR_MS));
    let done = delete(&running, DeleteProfilesRequest { until, ..of("") }).await.unwrap();
    assert_eq!(done.profiles, former as u64);
    carried_out(&running).await;
    assert_eq!(objects(data).len(), 1);
    assert!(files_below(&data.join("table")).is_empty());
    assert_eq!(profiles(&running, "shop").await, (1, 0));
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_deletion_names_the_field_and_the_cure() {
    let dir = tempfile::tempdir().unwrap();
    let running = Collector::start(config(dir.path())).await.unwrap();
    Pusher::open(running.grpc_addr).await.store(batch("shop", now_ms(), &[("main", 1)])).await;
    let now = Some(at(now_ms()));
    let before_1970 = Some(prost_types::Timestamp { seconds: -5, nanos: 0 });
    for (request, field, cure) in [
        (of(""), "query", "give labels, `from` or `until`"),
        (of("{}"), "query", "give labels, `from` or `until`"),
        (of("{a="), "query", "character"),
        (of("{nmaespace=\"x\"}"), "query", "no stored series has the label `nmaespace`; the labels are: "),
        (of(&format!("{{a=\"{}\"}}", "x".repeat(9000))), "query", "longer than 8KiB"),
        (DeleteProfilesRequest { from: now, until: now, ..of("") }, "until", "exchange both"),
        (DeleteProfilesRequest { from: before_1970, ..of("") }, "from", "not a time after 1970"),
    ] {
        for dry_run in [true, false] {
            let status = delete(&running, DeleteProfilesRequest { dry_run, ..request.clone() }).await;
            let status = status.unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument);
            let text = status.message();
            assert!(text.starts_with(&format!("{field}: ")) && text.contains(cure), "{text}");
        }
    }
    assert_eq!(profiles(&running, "shop").await, (1, 0));
    running.shutdown().await;
}

/// Kills of one run. The environment variable `GANNET_TEST_KILLS` replaces it.
const KILLS: u64 = 12;

/// Kills the program at moments between the call and the last step of carrying it out.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_survives_kills_at_any_moment() {
    let dir = tempfile::tempdir().unwrap();
    let mut sent = Vec::new();
    for round in 0..kills(KILLS) {
        let (grpc, http) = (free_port(), free_port());
        let mut child = spawn(dir.path(), grpc, http);
        let old = now_ms() - 2 * HOUR_MS;
        let n = round as i64 + 1;
        let new = vec![
            batch("doomed", old, &[("main;work", n)]),
            batch("doomed", now_ms(), &[("main;work", n), ("main;idle", 3)]),
            batch("left", old, &[("main;work", n)]),
            batch("left", now_ms(), &[("main;rest", n)]),
        ];
        push(grpc, new.clone()).await;
        sent.extend(new);
        listening(grpc).await;
        if round % 3 == 0 {
            // Otherwise the tables have none of the profiles.
            up_to_date(http).await;
        }
        let mut client = DeletionServiceClient::new(channel(grpc).await);
        let request = of("{service_name=\"doomed\"}");
        let call = tokio::spawn(async move { client.delete_profiles(request).await });
        if round % 4 == 3 {
            // In the middle of the call.
            tokio::time::sleep(Duration::from_millis(round * 3 % 20)).await;
        } else {
            let done = call.await.unwrap().unwrap().into_inner();
            assert!(done.profiles >= 2, "{done:?}");
            tokio::time::sleep(Duration::from_millis(round * 61 % 700)).await;
        }
        assert!(child.try_wait().unwrap().is_none(), "the collector ended by itself");
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let running = Collector::start(with_sums(dir.path())).await.unwrap();
    delete(&running, of("")).await.unwrap_err();
    let _ = delete(&running, of("{service_name=\"doomed\"}")).await.unwrap();
    let (left, deleted): (Vec<&Batch>, Vec<&Batch>) = sent.iter().partition(|batch| service(batch) == "left");
    check_only(&running, &left, &deleted).await;
    carried_out(&running).await;
    up_to_date(running.http_addr).await;
    check_only(&running, &left, &deleted).await;
    check_sql(&running, &left).await;
    running.shutdown().await;
    check_table(&files_below(&dir.path().join("table")), &left);
}

/// Checks that the neighbour of a collector hides the profiles within seconds, and reads the others all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_in_a_bucket_holds_for_all_collectors() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let endpoint = s3.clone().serve().await;
    let start = async |name: &str| {
        let mut config = in_bucket(&dir.path().join(name), &endpoint);
        with_table(&mut config);
        config.store.deletion_grace = Duration::from_secs(4);
        if name == "two" {
            // Only the frequent listing can find the deletion, and the comparisons of its hours take a while.
            config.store.bucket_interval = TimeSpan(Duration::from_millis(400));
            config.store.bucket_hours_interval = Duration::from_secs(3600);
        }
        Collector::start(config).await.unwrap()
    };
    let (one, two) = (start("one").await, start("two").await);
    let (now, old) = (now_ms(), now_ms() - 2 * HOUR_MS);
    let mut sent: Vec<Batch> = Vec::new();
    for (round, running) in [&one, &two, &one, &two].into_iter().enumerate() {
        let n = round as i64 + 1;
        let new = vec![
            batch("secret", now, &[("main;work", n)]),
            batch("secret", old, &[("main;work", n + 5)]),
            batch("shop", old, &[("main;sell", n)]),
            batch("other", now, &[("main;rest", n + 3), ("main;work", 3)]),
        ];
        Pusher::open(running.grpc_addr).await.store_all(&new).await;
        sent.extend(new);
    }
    let has_all = async |running: &Running| stored_ids(running).await.len() == sent.len();
    eventually("both know all", async || has_all(&one).await && has_all(&two).await).await;
    up_to_date(one.http_addr).await;
    let secret = "{service_name=\"secret\"}";
    assert_eq!(delete(&one, of(secret)).await.unwrap().profiles, 8);
    let (left, deleted): (Vec<&Batch>, Vec<&Batch>) =
        sent.iter().partition(|batch| service(batch) != "secret");
    check_only(&one, &left, &deleted).await;
    check_sql(&one, &left).await;
    for _ in 0..20 {
        for batch in &left {
            assert_eq!(download(&two, &batch.batch_id).await.unwrap(), batch.pprof);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // The old segments are still there for a collector without an index.
    let new = start("new").await;
    check_only(&new, &left, &deleted).await;
    check_sql(&new, &left).await;
    eventually("the neighbour hides them", async || profiles(&two, "secret").await == (0, 0)).await;
    // The others are readable all the time, while segments move and go.
    let mut is_pending = true;
    while is_pending {
        let mut client = DeletionServiceClient::new(channel(one.grpc_addr).await);
        is_pending =
            !client.list_deletions(ListDeletionsRequest {}).await.unwrap().into_inner().deletions.is_empty();
        for running in [&two, &one, &new] {
            check_only(running, &left, &deleted).await;
            check_sql(running, &left).await;
        }
    }
    carried_out(&new).await;
    new.shutdown().await;
    let keys: Vec<String> = s3.0.lock().unwrap().objects.keys().cloned().collect();
    assert!(!keys.iter().any(|key| key.ends_with(".deletion") || key.ends_with(".cleaned")), "{keys:?}");
    let has_secret =
        s3.0.lock().unwrap().objects.iter().any(|(key, object)| {
            key.ends_with(".segment") && object.windows(6).any(|part| part == b"secret")
        });
    assert!(!has_secret);
    let fresh = batch("secret", old, &[("main;fresh", 2)]);
    Pusher::open(two.grpc_addr).await.store(fresh.clone()).await;
    let left: Vec<&Batch> = left.into_iter().chain([&fresh]).collect();
    eventually("both know the new one", async || {
        profiles(&one, "secret").await == (1, 0) && profiles(&two, "secret").await == (1, 0)
    })
    .await;
    one.shutdown().await;
    let three = start("three").await;
    for running in [&two, &three] {
        check_only(running, &left, &deleted).await;
        up_to_date(running.http_addr).await;
    }
    check_sql(&three, &left).await;
    two.shutdown().await;
    three.shutdown().await;
    check_table(&table_of(&s3), &left);
}

/// Checks a segment that the bucket lists only after the deletion, although its batch was accepted before it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_takes_segments_that_are_listed_late() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let (proxy, endpoint) = FaultyS3::serve(s3.serve().await, 1).await;
    let start = async |name: &str| {
        let mut config = in_bucket(&dir.path().join(name), &endpoint);
        config.store.deletion_grace = Duration::from_secs(3);
        Collector::start(config).await.unwrap()
    };
    let (one, two) = (start("one").await, start("two").await);
    let now = now_ms();
    let [early, other, late] =
        ["secret", "other", "secret"].map(|service| batch(service, now, &[("main;work", 1)]));
    Pusher::open(one.grpc_addr).await.store(early.clone()).await;
    Pusher::open(two.grpc_addr).await.store(other.clone()).await;
    for running in [&one, &two] {
        eventually("both know both", async || stored_ids(running).await.len() == 2).await;
    }
    proxy.hold_listings(true);
    Pusher::open(two.grpc_addr).await.store(late.clone()).await;
    let done = delete(&one, of("{service_name=\"secret\"}")).await.unwrap();
    assert_eq!(done.profiles, 1, "it does not know the late one");
    proxy.hold_listings(false);
    eventually("the neighbour hides both", async || stored_ids(&two).await.len() == 1).await;
    let listings = proxy.listings();
    eventually("the collectors list the bucket", async || proxy.listings() > listings + 8).await;
    for running in [&one, &two] {
        check_only(running, &[&other], &[&early, &late]).await;
    }
    carried_out(&one).await;
    carried_out(&two).await;
    for running in [&one, &two] {
        check_only(running, &[&other], &[&early, &late]).await;
    }
    one.shutdown().await;
    two.shutdown().await;
}

/// Ends the writes and removals of a collector at each step of a deletion, as a kill does: the request fails, or it succeeds and its
/// answer is lost. The next collector completes the deletion.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_that_ends_at_any_write_is_completed() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let endpoint = s3.clone().serve().await;
    let start = async || {
        let mut config = in_bucket(dir.path(), &endpoint);
        with_table(&mut config);
        config.store.deletion_grace = Duration::from_millis(20);
        config.store.deletion_takeover = Duration::ZERO;
        Collector::start(config).await.unwrap()
    };
    let mut sent: Vec<Batch> = Vec::new();
    let (mut cuts, mut is_complete) = (0, false);
    for step in (0..).step_by(2) {
        let fate = if step % 4 == 0 { Fate::Unanswered } else { Fate::Refused };
        let running = start().await;
        let n = i64::from(step) + 1;
        let (now, old) = (now_ms(), now_ms() - 2 * HOUR_MS);
        let new = vec![
            batch("doomed", old, &[("main;work", n)]),
            batch("doomed", now, &[("main;work", n), ("main;idle", 3)]),
            batch("left", old, &[("main;work", n)]),
            batch("left", now, &[("main;rest", n)]),
        ];
        Pusher::open(running.grpc_addr).await.store_all(&new).await;
        sent.extend(new);
        up_to_date(running.http_addr).await;
        {
            let mut shelf = s3.0.lock().unwrap();
            (shelf.end, shelf.ended) = (Some((step as usize, fate)), 0);
        }
        let done = delete(&running, of("{service_name=\"doomed\"}")).await;
        let pending = async || metric(running.http_addr, "gannet_collector_store_deletions_pending").await;
        eventually("the writes ended, or none is left", async || {
            s3.0.lock().unwrap().ended > 0 || pending().await == 0.0
        })
        .await;
        let is_cut = s3.0.lock().unwrap().ended > 0;
        cuts += u32::from(is_cut);
        running.shutdown().await;
        s3.0.lock().unwrap().end = None;

        let running = start().await;
        if done.is_err() {
            delete(&running, of("{service_name=\"doomed\"}")).await.unwrap();
        }
        let (left, deleted): (Vec<&Batch>, Vec<&Batch>) =
            sent.iter().partition(|batch| service(batch) == "left");
        check_only(&running, &left, &deleted).await;
        check_sql(&running, &left).await;
        carried_out(&running).await;
        check_only(&running, &left, &deleted).await;
        up_to_date(running.http_addr).await;
        check_sql(&running, &left).await;
        running.shutdown().await;
        check_table(&table_of(&s3), &left);
        if !is_cut {
            is_complete = true;
            break;
        }
    }
    assert!(is_complete && cuts >= 6, "only {cuts} deletions ended early");
}
