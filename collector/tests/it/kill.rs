//! The binary, killed under load.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use gannet_collector::Running;
use gannet_proto::{
    ingest::{Batch, push_response::Message},
    query::ListProfilesRequest,
};
use tokio::task::JoinHandle;
use tonic::transport::Channel;

use crate::{
    store::objects,
    support::{Pusher, batch, download, metric, now_ms, queries, start},
};

/// Kills of one run. The environment variable `GANNET_TEST_KILLS` replaces it.
const KILLS: u64 = 24;
const PUSHERS: usize = 3;

/// Returns a loopback address with a free port.
pub fn free_port() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

pub fn spawn(data: &Path, grpc: SocketAddr, http: SocketAddr) -> Child {
    Command::new(env!("CARGO_BIN_EXE_gannet-collector"))
        .args(["--data", data.to_str().unwrap(), "--min-free-bytes", "0", "--flush-interval", "20ms"])
        .args(["--grpc-listen", &grpc.to_string(), "--http-listen", &http.to_string()])
        .env("GANNET_COLLECTOR_LOG", "warn")
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

async fn dial(grpc: SocketAddr) -> Option<Channel> {
    Channel::from_shared(format!("http://{grpc}")).ok()?.connect().await.ok()
}

/// Returns the ids of all stored profiles, page by page.
pub async fn stored_ids(running: &Running) -> Vec<String> {
    let mut client = queries(running).await;
    let (mut stored, mut token) = (Vec::new(), String::new());
    loop {
        let selection = gannet_proto::query::Selection {
            from: Some(crate::support::at(now_ms() - 4 * 3_600_000)),
            until: Some(crate::support::at(now_ms() + 1000)),
            ..Default::default()
        };
        let request = ListProfilesRequest { selection: Some(selection), limit: 500, page_token: token };
        let page = client.list_profiles(request).await.unwrap().into_inner();
        stored.extend(page.profiles.into_iter().map(|p| p.id));
        if page.next_page_token.is_empty() {
            break;
        }
        token = page.next_page_token;
    }
    stored
}

/// What the agents of a test have sent, and the ids that were acknowledged.
#[derive(Clone, Default)]
pub struct Progress {
    pub acknowledged: Arc<Mutex<BTreeSet<String>>>,
    /// Batches by id.
    pub sent: Arc<Mutex<BTreeMap<String, Batch>>>,
    pub done: Arc<AtomicBool>,
}

impl Progress {
    pub fn count(&self) -> usize {
        self.acknowledged.lock().unwrap().len()
    }
}

/// Pushes until all is done, over new connections after each kill, each to the next of these collectors. Returns the
/// unacknowledged batches, and how many it sent again.
pub async fn push(n: usize, collectors: Vec<SocketAddr>, progress: Progress) -> (Vec<Batch>, u64) {
    let Progress { acknowledged, sent, done } = progress;
    // Like an agent, it sends exactly the unacknowledged batches again, with the same ids.
    let mut unacknowledged: Vec<Batch> = Vec::new();
    let (mut made, mut resent) = (0_u64, 0_u64);
    let mut next = collectors.iter().cycle().skip(n);
    while !done.load(Ordering::Relaxed) {
        let collector = next.next().unwrap();
        let Some(channel) = dial(*collector).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let Ok(mut pusher) = Pusher::over(channel).await else { continue };
        resent += unacknowledged.len() as u64;
        let mut unsent = unacknowledged.clone();
        'stream: loop {
            while unacknowledged.len() < 16 && !done.load(Ordering::Relaxed) {
                made += 1;
                let stack = format!("main;work{}", made % 100);
                let batch = batch(&format!("s{n}"), now_ms() - made % 7_200_000, &[(&stack, 2)]);
                sent.lock().unwrap().insert(batch.batch_id.clone(), batch.clone());
                unacknowledged.push(batch.clone());
                unsent.push(batch);
            }
            for batch in unsent.drain(..) {
                if !pusher.send(batch).await {
                    break 'stream;
                }
            }
            match pusher.answer().await {
                Some(Message::Accepted(a)) => {
                    unacknowledged.retain(|b| b.batch_id != a.batch_id);
                    acknowledged.lock().unwrap().insert(a.batch_id);
                }
                Some(Message::Throttled(t)) => {
                    unsent.extend(unacknowledged.iter().find(|b| b.batch_id == t.batch_id).cloned());
                }
                Some(other) => panic!("{other:?}"),
                None => break,
            }
            if done.load(Ordering::Relaxed) && unacknowledged.is_empty() {
                break;
            }
        }
    }
    (unacknowledged, resent)
}

/// Returns the number of kills of one run.
pub fn kills(default: u64) -> u64 {
    std::env::var("GANNET_TEST_KILLS").map_or(default, |kills| kills.parse().unwrap())
}

/// Ends the pushers. Returns the batches that were not acknowledged, and how many batches were sent again.
pub async fn end(pushers: Vec<JoinHandle<(Vec<Batch>, u64)>>, progress: &Progress) -> (Vec<Batch>, u64) {
    progress.done.store(true, Ordering::Relaxed);
    let (mut unacknowledged, mut resent) = (Vec::new(), 0);
    for pusher in pushers {
        let (left, again) = pusher.await.unwrap();
        unacknowledged.extend(left);
        resent += again;
    }
    assert!(resent > 0, "no kill hit a batch on its way: the test has tested nothing");
    (unacknowledged, resent)
}

/// Sends these batches until they are acknowledged.
pub async fn acknowledge(running: &Running, progress: &Progress, batches: Vec<Batch>) {
    let mut pusher = Pusher::open(running.grpc_addr).await;
    for batch in batches {
        match pusher.push(batch).await {
            Message::Accepted(a) => progress.acknowledged.lock().unwrap().insert(a.batch_id),
            other => panic!("{other:?}"),
        };
    }
}

/// Checks that a collector has what was acknowledged, each batch once, and some of them to the last byte. Returns the ids.
pub async fn stores_once(running: &Running, progress: &Progress) -> BTreeSet<String> {
    let stored = stored_ids(running).await;
    let unique: BTreeSet<String> = stored.iter().cloned().collect();
    assert_eq!(stored.len(), unique.len(), "a batch is stored twice");
    let acknowledged = progress.acknowledged.lock().unwrap().clone();
    assert!(
        unique == acknowledged,
        "{} lost, {} stored that were not acknowledged",
        acknowledged.difference(&unique).count(),
        unique.difference(&acknowledged).count()
    );
    let sent = progress.sent.lock().unwrap().clone();
    for id in unique.iter().step_by(unique.len().div_ceil(200)) {
        assert_eq!(download(running, id).await.unwrap(), sent[id].pprof, "{id}");
    }
    unique
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acknowledged_batches_survive_kills_exactly_once() {
    let dir = tempfile::tempdir().unwrap();
    let (grpc, http) = (free_port(), free_port());
    let progress = Progress::default();
    let pushers: Vec<_> = (0..PUSHERS).map(|n| tokio::spawn(push(n, vec![grpc], progress.clone()))).collect();
    let kills = kills(KILLS);
    for round in 0..kills {
        let before = progress.count();
        let mut child = spawn(dir.path(), grpc, http);
        // Each kill comes at another point of the work, after some progress.
        let deadline = std::time::Instant::now() + Duration::from_secs(30);
        while progress.count() < before + 10 + round as usize % 24 * 7 {
            assert!(child.try_wait().unwrap().is_none(), "the collector ended by itself");
            assert!(std::time::Instant::now() < deadline, "round {round}: nothing is acknowledged");
            tokio::time::sleep(Duration::from_millis(1 + round % 24)).await;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        if round % 100 == 99 {
            eprintln!("{} kills, {} batches acknowledged", round + 1, progress.count());
        }
    }
    let (unacknowledged, resent) = end(pushers, &progress).await;

    // Batches in flight at the last kill arrive now.
    let running = start(dir.path()).await;
    acknowledge(&running, &progress, unacknowledged).await;
    let unique = stores_once(&running, &progress).await;
    eprintln!("{kills} kills, {} batches acknowledged, {resent} sent again", unique.len());
    let objects = objects(dir.path());
    assert!(
        objects.iter().all(|path| path.extension().is_some_and(|end| end == "segment")),
        "a leftover remains"
    );
    assert_eq!(metric(running.http_addr, "gannet_collector_store_segments").await as usize, objects.len());
    assert!(objects.len() * 4 < unique.len(), "{} segments of {} batches", objects.len(), unique.len());
    running.shutdown().await;
}

/// Returns all object files.
pub fn walk(data: &Path) -> usize {
    let mut dirs = vec![data.join("objects")];
    let mut files = 0;
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { dirs.push(path) } else { files += 1 }
        }
    }
    files
}
