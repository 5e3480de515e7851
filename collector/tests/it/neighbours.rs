//! Two collectors of one bucket whose listings are late, or of which one has a wrong clock.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use gannet_collector::{Collector, Running};
use gannet_proto::{
    ingest::{Batch, push_response::Message},
    query::{
        FlameGraphRequest, ListProfilesRequest, ProfileInfo, Selection,
        query_service_client::QueryServiceClient,
    },
};

use crate::{
    bucket::{S3, in_bucket, program_in_bucket},
    faults::{Killed, listening},
    faulty_s3::FaultyS3,
    kill::free_port,
    store::list,
    support::{Pusher, at, batch, channel, download, eventually, metric, now_ms, queries},
    table::{check_rollups, sent_sums, sums, table_of, up_to_date, with_table},
};

/// Moves the clock of a program by `CLOCK_AHEAD_S` seconds. Its timers keep running by the monotonic clock.
const CLOCK: &str = r#"
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now)
{
	int status = syscall(SYS_clock_gettime, clock, now);

	if (!status && clock == CLOCK_REALTIME)
		now->tv_sec += atol(getenv("CLOCK_AHEAD_S"));
	return status;
}
"#;

const HOUR_S: i64 = 3600;

fn everything() -> Selection {
    let reach = 4 * HOUR_S as u64 * 1000;
    Selection { from: Some(at(now_ms() - reach)), until: Some(at(now_ms() + reach)), ..Selection::default() }
}

fn sorted_ids<'b>(batches: impl IntoIterator<Item = &'b Batch>) -> Vec<String> {
    let mut ids: Vec<String> = batches.into_iter().map(|batch| batch.batch_id.clone()).collect();
    ids.sort_unstable();
    ids
}

async fn ids(running: &Running) -> Vec<String> {
    let mut ids: Vec<String> = list(running).await.into_iter().map(|profile| profile.id).collect();
    ids.sort_unstable();
    ids
}

/// Checks that each of these batches counts once in a flame graph, and has the bytes that were sent.
async fn check_once(running: &Running, sent: &[Batch]) {
    let request = FlameGraphRequest { selection: Some(everything()), ..FlameGraphRequest::default() };
    let graph = queries(running).await.flame_graph(request).await.unwrap().into_inner();
    let total: u64 = sent.iter().map(|batch| batch.samples * 10_000_000).sum();
    assert_eq!((graph.profiles, graph.total), (sent.len() as u64, total));
    assert_eq!(graph.unreadable_profiles, 0);
    for batch in sent {
        assert_eq!(download(running, &batch.batch_id).await.unwrap(), batch.pprof);
    }
}

/// Checks that a collector shows its own segments before the bucket lists them, also after a restart, and that its neighbour shows
/// each batch once as soon as it does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_listings_neither_lose_nor_double_a_batch() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let (proxy, endpoint) = FaultyS3::serve(s3.serve().await, 1).await;
    let start = |name: &str| Collector::start(in_bucket(&dir.path().join(name), &endpoint));
    let five_listings = async || {
        let before = proxy.listings();
        eventually("the collectors list the bucket", || async { proxy.listings() > before + 5 }).await;
    };
    let (one, two) = (start("one").await.unwrap(), start("two").await.unwrap());
    let old = batch("old", now_ms(), &[("main;work", 1)]);
    Pusher::open(two.grpc_addr).await.store(old.clone()).await;
    eventually("the neighbour shows a listed segment", async || ids(&one).await.len() == 1).await;

    proxy.hold_listings(true);
    let mut sent = vec![old];
    for i in 0..20 {
        let new = batch(&format!("s{}", i % 3), now_ms() - i, &[("main;work", 1 + i as i64)]);
        Pusher::open(one.grpc_addr).await.store(new.clone()).await;
        sent.push(new);
    }
    five_listings().await;
    assert_eq!(ids(&one).await, sorted_ids(&sent), "a listing without its segments removes none");
    assert_eq!(ids(&two).await.len(), 1);
    // The agent lost the connection before it had the answers, and sends some batches again: to the same collector after a
    // restart, and to its neighbour.
    one.shutdown().await;
    let one = start("one").await.unwrap();
    assert_eq!(ids(&one).await, sorted_ids(&sent), "neither does one at the start");
    assert_eq!(Pusher::open(one.grpc_addr).await.store_all(&sent[5..10]).await, (5, 0));
    assert_eq!(Pusher::open(two.grpc_addr).await.store_all(&sent[8..12]).await, (0, 0));
    five_listings().await;
    assert_eq!(ids(&one).await, sorted_ids(&sent));
    // An agent that comes back to a collector without an index.
    let three = start("three").await.unwrap();
    assert_eq!(Pusher::open(three.grpc_addr).await.store_all(&sent[10..14]).await, (0, 0));

    proxy.hold_listings(false);
    for running in [&one, &two, &three] {
        eventually("all collectors show all batches", async || ids(running).await == sorted_ids(&sent)).await;
        check_once(running, &sent).await;
        let counted = metric(running.http_addr, "gannet_collector_store_profiles").await as usize;
        assert_eq!(counted, sent.len());
    }
    for running in [one, two, three] {
        running.shutdown().await;
    }
    // So does a collector that starts without an index.
    let four = start("four").await.unwrap();
    check_once(&four, &sent).await;
    four.shutdown().await;
}

/// Checks a batch that both collectors accepted, each before it saw the segment of the other one, if the second one takes over the
/// tables.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_of_two_collectors_is_in_the_tables_once() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let (proxy, endpoint) = FaultyS3::serve(s3.clone().serve().await, 1).await;
    let start = |name: &str, has_table: bool| {
        let mut config = in_bucket(&dir.path().join(name), &endpoint);
        if has_table {
            with_table(&mut config);
        }
        Collector::start(config)
    };
    let [both, to_one, to_two] =
        [("both", 3), ("one", 4), ("two", 5)].map(|(name, n)| batch(name, now_ms(), &[("main;work", n)]));
    let (one, two) = (start("one", true).await.unwrap(), start("two", false).await.unwrap());
    proxy.hold_listings(true);
    assert_eq!(Pusher::open(one.grpc_addr).await.store_all(&[both.clone(), to_one.clone()]).await, (0, 0));
    assert_eq!(Pusher::open(two.grpc_addr).await.store_all(&[both.clone(), to_two.clone()]).await, (0, 0));
    up_to_date(one.http_addr).await;
    one.shutdown().await;
    assert_eq!(sums(&table_of(&s3)), sent_sums([&both, &to_one]));

    // The log of the tables names a segment that the bucket does not list yet.
    two.shutdown().await;
    let two = start("two", true).await.unwrap();
    let before = metric(two.http_addr, "gannet_collector_table_updates_total").await;
    eventually("the second one takes over", || async {
        metric(two.http_addr, "gannet_collector_table_updates_total").await > before + 3.0
    })
    .await;
    assert_eq!(sums(&table_of(&s3)), sent_sums([&both, &to_one]));
    proxy.hold_listings(false);
    eventually("the tables have all batches", || async {
        sums(&table_of(&s3)) == sent_sums([&both, &to_one, &to_two])
    })
    .await;
    up_to_date(two.http_addr).await;
    check_rollups(&table_of(&s3));
    two.shutdown().await;
    assert_eq!(sums(&table_of(&s3)), sent_sums([&both, &to_one, &to_two]));
}

/// A collector whose clock is wrong, as a program.
struct WrongClock {
    library: PathBuf,
    local: PathBuf,
    log: PathBuf,
    endpoint: String,
    ahead_s: i64,
}

impl WrongClock {
    fn new(dir: &Path, endpoint: &str, ahead_s: i64) -> Self {
        let (source, library) = (dir.join("clock.c"), dir.join("clock.so"));
        std::fs::write(&source, CLOCK).unwrap();
        let built =
            Command::new("gcc").args(["-shared", "-fPIC", "-O", "-o"]).args([&library, &source]).status();
        assert!(built.unwrap().success(), "this test needs gcc and libc6-dev");
        let (local, log) = (dir.join("wrong"), dir.join("log"));
        Self { library, local, log, endpoint: endpoint.to_owned(), ahead_s }
    }

    async fn start(&self) -> (Killed, SocketAddr, SocketAddr) {
        let (grpc, http) = (free_port(), free_port());
        let child = program_in_bucket(&self.local, &self.log, &self.endpoint, [grpc, http])
            .args(["--flush-interval", "5ms", "--table-rollups"])
            .envs([("LD_PRELOAD", self.library.as_os_str())])
            .env("CLOCK_AHEAD_S", self.ahead_s.to_string())
            .spawn();
        let child = Killed(child.unwrap());
        listening(http).await;
        (child, grpc, http)
    }
}

async fn listed(grpc: SocketAddr) -> Vec<ProfileInfo> {
    let mut client = QueryServiceClient::new(channel(grpc).await);
    let request = ListProfilesRequest { selection: Some(everything()), limit: 5000, ..Default::default() };
    let mut profiles = client.list_profiles(request).await.unwrap().into_inner().profiles;
    profiles.sort_unstable_by(|a, b| a.id.cmp(&b.id));
    profiles
}

/// Checks two collectors of one bucket, of which one has a clock that is this far ahead, through a kill.
async fn a_wrong_clock(ahead_s: i64) {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let endpoint = s3.clone().serve().await;
    let wrong = WrongClock::new(dir.path(), &endpoint, ahead_s);
    let (mut child, grpc, http) = wrong.start().await;
    let mut config = in_bucket(&dir.path().join("right"), &endpoint);
    with_table(&mut config);
    let right = Collector::start(config).await.unwrap();
    let (mut to_wrong, mut to_right) = (Vec::new(), Vec::new());
    for round in 0..6 {
        let new = |at: &str| -> Vec<Batch> {
            (0..5).map(|i| batch(&format!("{at}{i}"), now_ms() - round, &[("main;work", 1 + i)])).collect()
        };
        let (new_wrong, new_right) = (new("wrong"), new("right"));
        Pusher::over(channel(grpc).await).await.unwrap().store_all(&new_wrong).await;
        Pusher::open(right.grpc_addr).await.store_all(&new_right).await;
        to_wrong.extend(new_wrong);
        to_right.extend(new_right);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    let sent: Vec<Batch> = to_wrong.iter().chain(&to_right).cloned().collect();
    eventually("the neighbour shows all", async || ids(&right).await == sorted_ids(&sent)).await;
    check_once(&right, &sent).await;
    // Batches of agents whose clock is right are an hour ahead for a collector that is an hour behind.
    let retimed = metric(http, "gannet_collector_ingest_batches_retimed_total").await as usize;
    child.end();
    let (child, grpc, _) = wrong.start().await;
    // At its start, it reads what its neighbour has written.
    eventually("the tables have each sample once", || async {
        let files = table_of(&s3);
        !files.is_empty() && sums(&files) == sent_sums(&sent)
    })
    .await;
    let shown = listed(grpc).await;
    assert_eq!(shown.iter().map(|profile| profile.id.clone()).collect::<Vec<_>>(), sorted_ids(&sent));
    let marked = |profile: &&ProfileInfo| profile.reason.ends_with("ahead: the start is corrected");
    let marked = shown.iter().filter(marked).count();
    let expected = if ahead_s < 0 { to_wrong.len() } else { 0 };
    assert_eq!((retimed, marked), (expected, expected));
    // It has nothing new to write, and no fault to report.
    match Pusher::over(channel(grpc).await).await.unwrap().push(to_right[0].clone()).await {
        Message::Accepted(accepted) => assert!(accepted.duplicate),
        other => panic!("{other:?}"),
    }
    drop(child);
    let log = std::fs::read_to_string(&wrong.log).unwrap();
    assert_eq!(log, "", "a fault in the log");
    assert_eq!(metric(right.http_addr, "gannet_collector_table_failures_total").await as u64, 0);
    right.shutdown().await;
    assert_eq!(sums(&table_of(&s3)), sent_sums(&sent));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_an_hour_ahead_loses_and_doubles_nothing() {
    a_wrong_clock(HOUR_S).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_an_hour_behind_loses_and_doubles_nothing() {
    a_wrong_clock(-HOUR_S).await;
}
