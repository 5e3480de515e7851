//! Profiles in a bucket: a small S3 server, which a test can make fail.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    ops::Bound,
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::{Query, Request, State},
    http::{HeaderMap, Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
};
use gannet_base::TimeSpan;
use gannet_collector::{Bucket, Collector, Config, DataLocation, Running};
use gannet_proto::{
    ingest::push_response,
    query::{FlameGraphRequest, Selection},
};

use crate::{
    store::list,
    support::{Pusher, TEST_TIMEOUT, batch, config_with, download, eventually, metric, now_ms, queries},
};

#[derive(Default)]
pub struct Shelf {
    pub objects: BTreeMap<String, Bytes>,
    is_broken: bool,
    /// Some writes fail, some succeed without an answer that says so, and some take long.
    is_unreliable: bool,
    /// The fate of a write to the table, after this many others. All later ones are refused, as those of a killed collector.
    pub table_end: Option<(usize, Fate)>,
    /// The same for each write or removal of an object.
    pub end: Option<(usize, Fate)>,
    /// Writes and removals since `end` was reached.
    pub ended: usize,
    writes: usize,
    reads: usize,
}

impl Shelf {
    /// Returns the fate of the next write or removal.
    fn fate_of_change(&mut self, method: &Method, path: &str) -> Fate {
        if let Some((left, fate)) = self.end.as_mut() {
            if *left > 0 {
                *left -= 1;
                return Fate::Answered;
            }
            self.ended += 1;
            return std::mem::replace(fate, Fate::Refused);
        }
        if *method == Method::PUT { self.fate(path) } else { Fate::Answered }
    }

    /// Returns the fate of the next write.
    fn fate(&mut self, path: &str) -> Fate {
        if let Some((left, fate)) = self.table_end.as_mut().filter(|_| path.contains("/table/")) {
            let fate = if *left == 0 { std::mem::replace(fate, Fate::Refused) } else { Fate::Answered };
            *left = left.saturating_sub(1);
            return fate;
        }
        self.writes += 1;
        match self.writes % 6 {
            1 if self.is_unreliable => Fate::Refused,
            3 if self.is_unreliable => Fate::Unanswered,
            4 if self.is_unreliable => Fate::Throttled,
            5 if self.is_unreliable => Fate::Slow,
            _ => Fate::Answered,
        }
    }
}

/// What becomes of a write.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Fate {
    Answered,
    Refused,
    /// The object is there, and the answer is an error.
    Unanswered,
    /// The client tries again by itself.
    Throttled,
    Slow,
}

#[derive(Clone, Default)]
pub struct S3(pub Arc<Mutex<Shelf>>);

impl S3 {
    pub async fn serve(self) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(answer).with_state(self);
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        format!("http://{address}")
    }

    fn keys(&self) -> Vec<String> {
        self.0.lock().unwrap().objects.keys().cloned().collect()
    }

    fn break_down(&self, is_broken: bool) {
        self.0.lock().unwrap().is_broken = is_broken;
    }
}

async fn answer(State(s3): State<S3>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 16 << 20).await.unwrap();
    let fate = if [Method::PUT, Method::POST, Method::DELETE].contains(&parts.method) {
        s3.0.lock().unwrap().fate_of_change(&parts.method, parts.uri.path())
    } else {
        Fate::Answered
    };
    match fate {
        Fate::Refused => return StatusCode::BAD_REQUEST.into_response(),
        Fate::Throttled => return StatusCode::SERVICE_UNAVAILABLE.into_response(),
        Fate::Slow => tokio::time::sleep(Duration::from_millis(300)).await,
        Fate::Answered | Fate::Unanswered => {}
    }
    let answer = s3.0.lock().unwrap().answer(&parts.method, &parts.uri, &parts.headers, body);
    if fate == Fate::Unanswered { StatusCode::BAD_REQUEST.into_response() } else { answer }
}

impl Shelf {
    fn answer(&mut self, method: &Method, uri: &Uri, headers: &HeaderMap, body: Bytes) -> Response {
        if self.is_broken {
            return StatusCode::SERVICE_UNAVAILABLE.into_response();
        }
        let signature = headers.get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()).unwrap_or_default();
        if !signature.starts_with("AWS4-HMAC-SHA256 Credential=the-key/") {
            return StatusCode::FORBIDDEN.into_response();
        }
        let Query(query) = Query::<BTreeMap<String, String>>::try_from_uri(uri).unwrap();
        // The client encodes `=`.
        let key = uri.path().strip_prefix("/bucket").unwrap().trim_start_matches('/').replace("%3D", "=");
        match *method {
            Method::PUT if headers.contains_key(header::IF_NONE_MATCH) && self.objects.contains_key(&key) => {
                StatusCode::PRECONDITION_FAILED.into_response()
            }
            Method::PUT => {
                self.objects.insert(key, body);
                [(header::ETAG, "\"x\"")].into_response()
            }
            Method::HEAD => match self.objects.get(&key) {
                None => StatusCode::NOT_FOUND.into_response(),
                Some(object) => (ABOUT, [(header::CONTENT_LENGTH, object.len().to_string())]).into_response(),
            },
            Method::GET if key.is_empty() => self.list(&query).into_response(),
            Method::GET => {
                self.reads += 1;
                match self.objects.get(&key) {
                    None => StatusCode::NOT_FOUND.into_response(),
                    Some(object) => part(object, headers),
                }
            }
            Method::POST if query.contains_key("delete") => {
                let text = String::from_utf8(body.to_vec()).unwrap();
                let keys: Vec<&str> = between(&text, "<Key>", "</Key>");
                for key in &keys {
                    self.objects.remove(*key);
                }
                let gone: Vec<_> =
                    keys.iter().map(|key| format!("<Deleted><Key>{key}</Key></Deleted>")).collect();
                format!("<DeleteResult>{}</DeleteResult>", gone.concat()).into_response()
            }
            _ => StatusCode::METHOD_NOT_ALLOWED.into_response(),
        }
    }

    fn list(&self, query: &BTreeMap<String, String>) -> String {
        let prefix = query.get("prefix").map_or("", String::as_str);
        let (mut contents, mut prefixes) = (Vec::new(), Vec::new());
        let after = query.get("start-after").map_or("", String::as_str);
        let listed = self.objects.range::<str, _>((Bound::Excluded(after), Bound::Unbounded));
        for (key, object) in listed.filter(|(key, _)| key.starts_with(prefix)) {
            match key[prefix.len()..].split_once('/').filter(|_| query.contains_key("delimiter")) {
                Some((name, _)) => prefixes.push(format!(
                    "<CommonPrefixes><Prefix>{prefix}{name}/</Prefix></CommonPrefixes>"
                )),
                None => contents.push(format!(
                    "<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag>\
                     <Size>{}</Size></Contents>",
                    object.len()
                )),
            }
        }
        prefixes.dedup();
        format!(
            "<ListBucketResult><IsTruncated>false</IsTruncated>{}{}</ListBucketResult>",
            contents.concat(),
            prefixes.concat()
        )
    }
}

fn between<'a>(text: &'a str, begin: &str, end: &str) -> Vec<&'a str> {
    text.split(begin).skip(1).filter_map(|rest| rest.split_once(end)).map(|(inner, _)| inner).collect()
}

const ABOUT: [(header::HeaderName, &str); 2] =
    [(header::ETAG, "\"x\""), (header::LAST_MODIFIED, "Thu, 01 Jan 2026 00:00:00 GMT")];

fn part(object: &Bytes, headers: &HeaderMap) -> Response {
    let Some(range) = headers.get(header::RANGE).and_then(|v| v.to_str().ok()) else {
        return (ABOUT, object.clone()).into_response();
    };
    if object.is_empty() {
        return StatusCode::RANGE_NOT_SATISFIABLE.into_response();
    }
    let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    let (from, to) = (from.parse::<usize>().unwrap(), to.parse::<usize>().unwrap().min(object.len() - 1));
    let of = format!("bytes {from}-{to}/{}", object.len());
    (StatusCode::PARTIAL_CONTENT, ABOUT, [(header::CONTENT_RANGE, of)], object.slice(from..=to))
        .into_response()
}

/// Returns the program of a collector of the bucket, which writes its log to a file.
pub fn program_in_bucket(local: &Path, log: &Path, endpoint: &str, [grpc, http]: [SocketAddr; 2]) -> Command {
    let log = fs::File::options().create(true).append(true).open(log).unwrap();
    let mut command = program_with_access(endpoint);
    command
        .args(["--data", "s3://bucket/profiles/here", "--local", local.to_str().unwrap()])
        .args(["--min-free-bytes", "0", "--table", "--table-interval", "100ms"])
        .args(["--grpc-listen", &grpc.to_string(), "--http-listen", &http.to_string()])
        .env("GANNET_COLLECTOR_LOG", "warn")
        .stdout(Stdio::null())
        .stderr(log);
    command
}

/// Returns the program without arguments, with access to the bucket.
pub fn program_with_access(endpoint: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gannet-collector"));
    command
        .envs([("AWS_ENDPOINT", endpoint), ("AWS_ALLOW_HTTP", "true"), ("AWS_REGION", "here")])
        .envs([("AWS_ACCESS_KEY_ID", "the-key"), ("AWS_SECRET_ACCESS_KEY", "hidden")])
        .stdin(Stdio::null());
    command
}

pub fn in_bucket(local: &Path, endpoint: &str) -> Config {
    in_bucket_at(local, endpoint, "s3://bucket/profiles/here")
}

pub fn in_bucket_at(local: &Path, endpoint: &str, url: &str) -> Config {
    let bucket = Bucket::parse(url).unwrap();
    let settings = [
        ("aws_endpoint", endpoint),
        ("aws_allow_http", "true"),
        ("aws_region", "here"),
        ("aws_access_key_id", "the-key"),
        ("aws_secret_access_key", "hidden"),
    ];
    let bucket = settings.into_iter().fold(bucket, |bucket, (name, value)| bucket.with(name, value));
    config_with(local, |config| {
        config.local = local.into();
        config.data = DataLocation::Bucket(bucket);
        config.store.bucket_interval = TimeSpan(Duration::from_millis(100));
        config.store.bucket_hours_interval = Duration::from_millis(100);
    })
}

async fn ids(running: &Running) -> Vec<String> {
    list(running).await.into_iter().map(|profile| profile.id).collect()
}

#[tokio::test]
async fn a_lost_index_is_rebuilt_from_the_bucket() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let endpoint = s3.clone().serve().await;
    let first = dir.path().join("first");
    let running = Collector::start(in_bucket(&first, &endpoint)).await.unwrap();
    let mut pusher = Pusher::open(running.grpc_addr).await;
    for i in 0..12 {
        let start_ms = now_ms() - i * 1_800_000;
        pusher.store(batch(&format!("s{}", i % 3), start_ms, &[("main;work", 1 + i as i64)])).await;
    }
    drop(pusher);
    let before = list(&running).await;
    running.shutdown().await;
    assert_eq!((before.len(), s3.keys().len()), (12, 12));
    assert!(s3.keys().iter().all(|key| key.starts_with("profiles/here/default/20")), "{:?}", s3.keys());
    assert!(!first.join("objects").exists(), "none of them is on the disk");

    let running = Collector::start(in_bucket(&dir.path().join("second"), &endpoint)).await.unwrap();
    assert_eq!(list(&running).await, before, "to the last field");
    running.shutdown().await;
}

/// Checks objects without bytes, of zeros, and under foreign names.
#[tokio::test]
async fn damaged_objects_of_a_bucket_stop_neither_start_nor_query() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let endpoint = s3.clone().serve().await;
    let first = dir.path().join("first");
    let running = Collector::start(in_bucket(&first, &endpoint)).await.unwrap();
    let mut pusher = Pusher::open(running.grpc_addr).await;
    for i in 0..4 {
        pusher.store(batch("shop", now_ms() - 10 + i, &[("main;work", 1)])).await;
    }
    drop(pusher);
    {
        let mut shelf = s3.0.lock().unwrap();
        let keys: Vec<_> = shelf.objects.keys().cloned().collect();
        shelf.objects.insert(keys[0].clone(), Bytes::new());
        let zeros = vec![0; shelf.objects[&keys[1]].len()];
        shelf.objects.insert(keys[1].clone(), zeros.into());
        shelf.objects.insert(format!("{}.bak", keys[2]), Bytes::from_static(b"stray"));
        shelf.objects.insert("profiles/here/default/notes/x/y".into(), Bytes::from_static(b"stray"));
    }
    let graph = queries(&running).await.flame_graph(FlameGraphRequest::default()).await.unwrap().into_inner();
    assert_eq!((graph.profiles, graph.unreadable_profiles), (2, 2));
    running.shutdown().await;
    let running = Collector::start(in_bucket(&dir.path().join("second"), &endpoint)).await.unwrap();
    assert_eq!(ids(&running).await.len(), 2);
    running.shutdown().await;
}

#[tokio::test]
async fn two_collectors_on_one_bucket_show_the_same() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let endpoint = s3.clone().serve().await;
    let one = Collector::start(in_bucket(&dir.path().join("one"), &endpoint)).await.unwrap();
    let two = Collector::start(in_bucket(&dir.path().join("two"), &endpoint)).await.unwrap();
    let (mut to_one, mut to_two) = (Pusher::open(one.grpc_addr).await, Pusher::open(two.grpc_addr).await);
    let both = batch("both", now_ms(), &[("main;work", 1)]);
    to_one.store(batch("one", now_ms(), &[("main;work", 1)])).await;
    to_two.store(batch("two", now_ms() - 7_200_000, &[("main;work", 1)])).await;
    // The agent changed collectors before it received the answer to the batch.
    to_one.push(both.clone()).await;
    to_two.push(both).await;
    eventually("both show all", async || {
        let (one, two) = (ids(&one).await, ids(&two).await);
        one.len() == 3 && one == two
    })
    .await;
    // Each wrote a segment for each batch, unless it had read from the bucket that the other one has the batch of both.
    assert!((3..=4).contains(&s3.keys().len()), "{:?}", s3.keys());
    for collector in [&one, &two] {
        let counted = metric(collector.http_addr, "gannet_collector_store_profiles").await as u64;
        assert_eq!(counted, 3, "what both took counts once");
    }

    // A profile that the retention of one collector removes disappears from the other.
    one.shutdown().await;
    let config = in_bucket(&dir.path().join("one"), &endpoint);
    let mut short = config;
    short.store.retention_age = TimeSpan::from_secs(3600);
    let one = Collector::start(short).await.unwrap();
    eventually("the removed profile disappears", async || ids(&two).await.len() == 2).await;
    assert_eq!(ids(&one).await, ids(&two).await);
    one.shutdown().await;
    two.shutdown().await;
}

/// Returns a collector of the bucket that compares no hours after its start.
async fn without_comparisons(local: &Path, endpoint: &str) -> Running {
    let mut config = in_bucket(local, endpoint);
    config.store.bucket_hours_interval = Duration::from_secs(3600);
    Collector::start(config).await.unwrap()
}

#[tokio::test]
async fn a_neighbour_finds_new_profiles_among_the_newest_names() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let endpoint = s3.clone().serve().await;
    let one = without_comparisons(&dir.path().join("one"), &endpoint).await;
    let two = without_comparisons(&dir.path().join("two"), &endpoint).await;
    let mut to_one = Pusher::open(one.grpc_addr).await;
    for round in 1..=3 {
        // The time of the profile does not matter, but that of its arrival.
        let batch = batch("shop", now_ms() - round * 3_600_000, &[("main;work", 1)]);
        let id = batch.batch_id.clone();
        to_one.store(batch.clone()).await;
        eventually("the other one shows it", async || ids(&two).await.contains(&id)).await;
        assert_eq!(download(&two, &id).await.unwrap(), batch.pprof);
    }
    let followed = "gannet_collector_store_followed_segments_total{listing=\"new\"}";
    assert_eq!(metric(two.http_addr, followed).await as u64, 3);
    assert_eq!(metric(one.http_addr, followed).await as u64, 0, "its own segments are not new");
    one.shutdown().await;
    two.shutdown().await;
}

#[tokio::test]
async fn no_batch_is_acknowledged_while_the_bucket_is_down() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let endpoint = s3.clone().serve().await;
    let running = Collector::start(in_bucket(dir.path(), &endpoint)).await.unwrap();
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let batch = batch("shop", now_ms(), &[("main;work", 1)]);
    s3.break_down(true);
    match pusher.push(batch.clone()).await {
        push_response::Message::Throttled(throttled) => assert!(throttled.reason.contains("could not write")),
        other => panic!("{other:?}"),
    }
    assert_eq!(ids(&running).await.len(), 0);
    s3.break_down(false);
    tokio::time::timeout(TEST_TIMEOUT, pusher.store(batch)).await.unwrap();
    assert_eq!(ids(&running).await.len(), 1);
    running.shutdown().await;
}

#[tokio::test]
async fn an_unreliable_bucket_neither_loses_nor_doubles() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let endpoint = s3.clone().serve().await;
    let mut config = in_bucket(&dir.path().join("one"), &endpoint);
    // Only the writer itself can find a segment whose write seemed to fail.
    config.store.bucket_interval = TimeSpan::from_secs(3600);
    config.store.bucket_hours_interval = Duration::from_secs(3600);
    let running = Collector::start(config).await.unwrap();
    s3.0.lock().unwrap().is_unreliable = true;
    let batches: Vec<_> =
        (0..400).map(|i| batch(&format!("s{}", i % 7), now_ms() - i, &[("main;work", 1)])).collect();
    let (duplicates, throttled) = Pusher::open(running.grpc_addr).await.store_all(&batches).await;
    assert!(throttled > 0, "no write failed");
    assert!(duplicates > 0, "no batch was in a segment whose write seemed to fail");
    let mut sent: Vec<_> = batches.iter().map(|batch| batch.batch_id.clone()).collect();
    sent.sort_unstable();
    let stored = async |running: &Running| {
        let mut ids = ids(running).await;
        ids.sort_unstable();
        ids
    };
    assert_eq!(stored(&running).await, sent);
    for batch in batches.iter().step_by(40) {
        assert_eq!(download(&running, &batch.batch_id).await.unwrap(), batch.pprof);
    }
    running.shutdown().await;
    // Another collector finds the same in the bucket.
    s3.0.lock().unwrap().is_unreliable = false;
    let running = Collector::start(in_bucket(&dir.path().join("two"), &endpoint)).await.unwrap();
    assert_eq!(stored(&running).await, sent);
    let graph = queries(&running).await.flame_graph(FlameGraphRequest::default()).await.unwrap().into_inner();
    assert_eq!((graph.profiles, graph.total), (400, 400 * 10_000_000));
    running.shutdown().await;
}

#[tokio::test]
async fn a_query_of_a_bucket_reads_neighbours_together() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let endpoint = s3.clone().serve().await;
    let mut config = in_bucket(dir.path(), &endpoint);
    config.store.flush_interval = TimeSpan(Duration::from_millis(200));
    let running = Collector::start(config).await.unwrap();
    let batches: Vec<_> =
        (0..300).map(|i| batch(&format!("s{}", i % 3), now_ms() - i, &[("main;work", 1)])).collect();
    Pusher::open(running.grpc_addr).await.store_all(&batches).await;
    let segments = s3.keys().len();
    assert!(segments < 20, "{segments} requests wrote 300 batches");
    s3.0.lock().unwrap().reads = 0;
    let selection = Selection { query: "{service_name=\"s1\"}".into(), ..Selection::default() };
    let request = FlameGraphRequest { selection: Some(selection), ..FlameGraphRequest::default() };
    let graph = queries(&running).await.flame_graph(request).await.unwrap().into_inner();
    assert_eq!(graph.profiles, 100);
    let reads = s3.0.lock().unwrap().reads;
    assert!(reads <= segments + 4, "{reads} requests read 100 profiles of {segments} segments");
    running.shutdown().await;
}

#[tokio::test]
async fn an_unreadable_bucket_ends_the_start_with_the_cure() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let endpoint = s3.clone().serve().await;
    let mut wrong = in_bucket(dir.path(), &endpoint);
    let DataLocation::Bucket(bucket) = wrong.data else { panic!("{}", wrong.data) };
    wrong.data = DataLocation::Bucket(bucket.with("aws_access_key_id", "another"));
    let error = Collector::start(wrong).await.err().unwrap();
    // In the form that the command line prints.
    let error = format!("{:#}", anyhow::Error::from(error));
    assert_eq!(error.matches("cannot read --data").count(), 1, "{error}");
    assert!(error.contains("s3://bucket/profiles/here") && error.contains("AWS_"), "{error}");
    assert!(!error.contains("hidden"), "{error}");
    assert!(!fs::exists(dir.path().join("objects")).unwrap());
}
