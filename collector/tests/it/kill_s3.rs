//! Two collectors of one bucket, killed under load while its server fails.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use gannet_collector::Collector;

use crate::{
    bucket::{S3, in_bucket, program_in_bucket},
    faults::{Killed, listening},
    faulty_s3::{FaultRates, FaultyS3},
    kill::{Progress, acknowledge, end, free_port, kills, push, stores_once},
    support::{eventually, metric},
    table::{Files, Sums, files_below, sent_sums, sums, table_of, with_table},
};

/// Kills of one run. The environment variable `GANNET_TEST_KILLS` replaces it.
const KILLS: u64 = 12;
const PUSHERS: usize = 3;
/// Faults of 1,000 requests: a kill is followed by about 20 requests.
const RATES: FaultRates =
    FaultRates { unavailable: 20, slow: 30, lost: 25, failed: 15, refused: 10, outages: 4, late: 300 };

/// The S3 server behind the faults.
enum Server {
    /// That of the tests, in this process.
    Shelf(S3),
    /// s3s-fs, whose path is in the environment variable `GANNET_TEST_S3`.
    Real { _child: Killed, root: PathBuf },
}

impl Server {
    async fn start(dir: &Path) -> (Self, String) {
        let Some(program) = std::env::var_os("GANNET_TEST_S3") else {
            let s3 = S3::default();
            let url = s3.clone().serve().await;
            return (Self::Shelf(s3), url);
        };
        let (root, address) = (dir.join("s3"), free_port());
        fs::create_dir_all(root.join("bucket")).unwrap();
        let child = Command::new(program)
            .args(["--host", "127.0.0.1", "--port", &address.port().to_string()])
            .args(["--access-key", "the-key", "--secret-key", "hidden"])
            .arg(&root)
            .env("RUST_LOG", "error")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn();
        let child = Killed(child.unwrap());
        listening(address).await;
        (Self::Real { _child: child, root }, format!("http://{address}"))
    }

    fn table(&self) -> Files {
        match self {
            Self::Shelf(s3) => table_of(s3),
            Self::Real { root, .. } => files_below(&root.join("bucket/profiles/here/table")),
        }
    }
}

/// A collector that is killed and started again.
struct Victim {
    local: PathBuf,
    log: PathBuf,
    endpoint: String,
    grpc: SocketAddr,
    http: SocketAddr,
    child: Option<Killed>,
}

impl Victim {
    fn new(dir: &Path, name: &str, endpoint: &str) -> Self {
        let (local, log) = (dir.join(name), dir.join(format!("{name}.log")));
        Self { local, log, endpoint: endpoint.to_owned(), grpc: free_port(), http: free_port(), child: None }
    }

    fn start(&mut self) {
        let child = program_in_bucket(&self.local, &self.log, &self.endpoint, [self.grpc, self.http])
            .args(["--flush-interval", "20ms"])
            .spawn();
        self.child = Some(Killed(child.unwrap()));
    }

    /// Kills it, wherever it is: also in the middle of its start.
    fn kill(&mut self) {
        self.child = None;
    }

    /// Reports whether it ended by itself, because the bucket did not answer at its start.
    fn gave_up(&mut self) -> bool {
        let Some(status) = self.child.as_mut().and_then(|child| child.0.try_wait().unwrap()) else {
            return false;
        };
        let log = fs::read_to_string(&self.log).unwrap();
        let last = log.lines().last().unwrap_or_default();
        assert!(status.code() == Some(1) && last.contains("cannot read --data"), "{status}, {last}");
        true
    }
}

/// A small generator of numbers below `n` (xorshift).
fn below(random: &mut u64, n: u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random % n
}

/// Kills collectors, which also compact, at random moments: while they start, write, follow the bucket, compact or merge. The seed is
/// in the environment variable `GANNET_TEST_SEED`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn batches_in_a_failing_bucket_survive_kills_exactly_once() {
    let seed = std::env::var("GANNET_TEST_SEED").map_or(7, |seed| seed.parse().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let (server, url) = Server::start(dir.path()).await;
    let (proxy, endpoint) = FaultyS3::serve(url, seed).await;
    let mut victims = ["one", "two"].map(|name| Victim::new(dir.path(), name, &endpoint));
    let progress = Progress::default();
    let collectors = victims.iter().map(|victim| victim.grpc).collect::<Vec<_>>();
    let pushers: Vec<_> =
        (0..PUSHERS).map(|n| tokio::spawn(push(n, collectors.clone(), progress.clone()))).collect();
    proxy.set_rates(RATES);
    victims.iter_mut().for_each(Victim::start);
    let (mut random, mut gave_up) = (seed.max(1), 0);
    let kills = kills(KILLS);
    for round in 0..kills {
        let wanted = progress.count() + below(&mut random, 100) as usize;
        let deadline = Instant::now() + Duration::from_secs(120);
        while progress.count() < wanted {
            assert!(
                Instant::now() < deadline,
                "round {round}: nothing is acknowledged: {:?}",
                proxy.counts()
            );
            tokio::time::sleep(Duration::from_millis(1 + below(&mut random, 30))).await;
            for victim in &mut victims {
                if victim.gave_up() {
                    gave_up += 1;
                    victim.start();
                }
            }
        }
        // Some kills hit a start, and some an idle moment.
        tokio::time::sleep(Duration::from_millis(below(&mut random, 150))).await;
        let victim = &mut victims[below(&mut random, 2) as usize];
        victim.kill();
        victim.start();
        if round % 100 == 99 {
            eprintln!("{} kills, {} batches acknowledged", round + 1, progress.count());
        }
    }
    let (unacknowledged, resent) = end(pushers, &progress).await;
    victims.iter_mut().for_each(Victim::kill);
    proxy.set_rates(FaultRates::default());
    proxy.hold_listings(false);

    // Batches in flight at the last kill arrive now. Each collector shows all batches once, and so does one without an index.
    let mut running = Vec::new();
    for name in ["one", "two", "three"] {
        let mut config = in_bucket(&dir.path().join(name), &endpoint);
        with_table(&mut config);
        config.table.table_rollups = false;
        running.push(Collector::start(config).await.unwrap());
    }
    acknowledge(&running[0], &progress, unacknowledged).await;
    let acknowledged = progress.acknowledged.lock().unwrap().clone();
    let sent = progress.sent.lock().unwrap().clone();
    for running in &running {
        eventually("a collector shows what its neighbour has stored last", || async {
            metric(running.http_addr, "gannet_collector_store_profiles").await as usize >= acknowledged.len()
        })
        .await;
        stores_once(running, &progress).await;
    }
    let wanted = sent_sums(acknowledged.iter().map(|id| &sent[id]));
    let mut found = Sums::new();
    // After a thousand kills, this takes longer than other waits.
    let deadline = Instant::now() + Duration::from_secs(300);
    while found.len() < wanted.len() && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(500)).await;
        found = sums(&server.table());
    }
    for running in running {
        running.shutdown().await;
    }
    found = sums(&server.table());
    eprintln!(
        "seed {seed}: {kills} kills, {gave_up} starts without a bucket, {} batches acknowledged, {resent} sent again; {:?}",
        acknowledged.len(),
        proxy.counts()
    );
    let differing: BTreeMap<_, _> = wanted
        .iter()
        .filter(|(key, sum)| found.get(key) != Some(sum))
        .map(|(key, sum)| (key, (sum, found.get(key))))
        .collect();
    assert!(
        differing.is_empty() && found.len() == wanted.len(),
        "{} profiles differ: {differing:?}",
        differing.len()
    );
}
