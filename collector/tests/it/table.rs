//! The table: read by its logs as another program does, after kills and failed writes at every step.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use gannet_base::TimeSpan;
use gannet_collector::{Collector, Config};
use gannet_proto::{
    ingest::{Batch, push_response::Message},
    pprof::decode,
};
use parquet::{
    file::{reader::FileReader as _, serialized_reader::SerializedFileReader},
    record::{Field, ListAccessor as _, Row, RowAccessor as _},
};
use tonic::transport::Channel;

use crate::{
    bucket::{Fate, S3, in_bucket},
    kill::free_port,
    support::{CPU, OFF_CPU, Pusher, batch, config_with, eventually, metric, now_ms, typed_batch},
};

/// Kills of one run. The environment variable `GANNET_TEST_KILLS` replaces it.
const KILLS: u64 = 12;

/// Files of all tables by their paths.
pub type Files = BTreeMap<String, Bytes>;

/// Returns the file or the list of files, or `None` if the collector has deleted it.
fn deleted_or<T>(read: io::Result<T>) -> Option<T> {
    match read {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        read => Some(read.unwrap()),
    }
}

pub fn files_below(dir: &Path) -> Files {
    let (mut files, mut dirs) = (Files::new(), vec![dir.to_owned()]);
    while let Some(next) = dirs.pop() {
        for entry in deleted_or(fs::read_dir(next)).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
                if let Some(bytes) = deleted_or(fs::read(&path)) {
                    files.insert(name, bytes.into());
                }
            }
        }
    }
    files
}

/// Returns the version of the last checkpoint of a table, and the paths of the files that are active in it.
fn checkpoint(files: &Files, table: &str) -> Option<(usize, BTreeSet<String>)> {
    let last = files.get(&format!("{table}/_delta_log/_last_checkpoint"))?;
    let last: serde_json::Value = serde_json::from_slice(last).unwrap();
    let version = last["version"].as_u64().unwrap();
    let file = files[&format!("{table}/_delta_log/{version:020}.checkpoint.parquet")].clone();
    let rows = SerializedFileReader::new(file).unwrap();
    let adds = rows.get_row_iter(None).unwrap().filter_map(|row| {
        let row = row.unwrap();
        let (_, add) = row.get_column_iter().find(|(name, _)| *name == "add")?;
        match add {
            Field::Group(add) => Some(format!("{table}/{}", add.get_string(0).unwrap())),
            _ => None,
        }
    });
    Some((version as usize, adds.collect()))
}

/// Returns the paths of the active files of a table, by its last checkpoint and the commits after it.
pub fn active(files: &Files, table: &str) -> BTreeSet<String> {
    let log = format!("{table}/_delta_log/");
    let (first, mut active) =
        checkpoint(files, table).map_or((0, BTreeSet::new()), |(version, active)| (version + 1, active));
    let commits = files.iter().filter(|(path, _)| {
        path.starts_with(&log) && Path::new(path).extension().is_some_and(|end| end == "json")
    });
    let commits = commits.filter(|(path, _)| **path >= format!("{log}{first:020}.json"));
    for (number, (path, commit)) in (first..).zip(commits) {
        assert_eq!(*path, format!("{log}{number:020}.json"), "a version is missing");
        for line in commit.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            let action: serde_json::Value = serde_json::from_slice(line).unwrap();
            let path = |kind: &str| action[kind]["path"].as_str().map(|path| format!("{table}/{path}"));
            active.extend(path("add"));
            if let Some(path) = path("remove") {
                assert!(active.remove(&path), "{path} is not active");
            }
        }
    }
    active
}

/// Calls `each` with all rows of a table.
fn rows(files: &Files, table: &str, mut each: impl FnMut(Row)) {
    for path in active(files, table) {
        let file = files.get(&path).unwrap_or_else(|| panic!("{path} is missing")).clone();
        for row in SerializedFileReader::new(file).unwrap().get_row_iter(None).unwrap() {
            each(row.unwrap());
        }
    }
}

/// Sums of value and count by profile and stack, the stack leaf first.
pub type Sums = BTreeMap<(String, String), (i64, i64)>;

/// Returns the sums of the table. Checks that each id is defined once.
pub fn sums(files: &Files) -> Sums {
    let (mut frames, mut stacks, mut sums) = (BTreeMap::new(), BTreeMap::new(), Sums::new());
    rows(files, "frames", |row| {
        let name = row.get_string(3).unwrap().clone();
        assert!(frames.insert(row.get_long(0).unwrap(), name).is_none(), "a frame is there twice");
    });
    rows(files, "stacks", |row| {
        let ids = row.get_list(3).unwrap();
        let names: Vec<&str> = (0..ids.len()).map(|at| frames[&ids.get_long(at).unwrap()].as_str()).collect();
        assert!(stacks.insert(row.get_long(0).unwrap(), names.join(";")).is_none(), "a stack is there twice");
    });
    rows(files, "samples", |row| {
        assert_eq!(row.get_string(7).unwrap(), "cpu/nanoseconds");
        let key = (row.get_string(6).unwrap().clone(), stacks[&row.get_long(8).unwrap()].clone());
        let sum = sums.entry(key).or_default();
        *sum = (sum.0 + row.get_long(10).unwrap(), sum.1 + row.get_long(11).unwrap());
    });
    let mut profiles = BTreeSet::new();
    rows(files, "profiles", |row| {
        assert!(profiles.insert(row.get_string(2).unwrap().clone()), "a profile is there twice");
    });
    let with_samples: BTreeSet<String> = sums.keys().map(|(profile, _)| profile.clone()).collect();
    assert!(with_samples.is_subset(&profiles), "a profile is missing");
    sums
}

/// Sums of value and count by what a table of sums has beside them, and by stack.
type Rollup = BTreeMap<Vec<String>, (i64, i64)>;

/// Checks that the tables of sums have those of the table of samples.
pub fn check_rollups(files: &Files) {
    let mut hashes = BTreeMap::new();
    rows(files, "stacks", |row| {
        hashes.insert(row.get_long(0).unwrap(), format!("{:?}", row.get_bytes(2).unwrap().data()));
    });
    let text = |row: &Row, at| row.get_string(at).cloned().unwrap_or_default();
    let add = |to: &mut Rollup, key: Vec<String>, row: &Row, at: usize| {
        let sum = to.entry(key).or_default();
        *sum = (sum.0 + row.get_long(at).unwrap(), sum.1 + row.get_long(at + 1).unwrap());
    };
    let (mut minutes, mut hours) = (Rollup::new(), Rollup::new());
    rows(files, "samples", |row| {
        let (service, kind, stack) =
            (text(&row, 1), text(&row, 7), hashes[&row.get_long(8).unwrap()].clone());
        let minute = row.get_timestamp_micros(0).unwrap() / 60_000_000 * 60_000_000;
        add(&mut minutes, vec![minute.to_string(), service.clone(), kind.clone(), stack.clone()], &row, 10);
        add(&mut hours, vec![service, text(&row, 2), text(&row, 3), kind, stack], &row, 10);
    });
    let (mut by_minute, mut by_hour) = (Rollup::new(), Rollup::new());
    rows(files, "samples_by_minute", |row| {
        let key = vec![
            row.get_timestamp_micros(0).unwrap().to_string(),
            text(&row, 1),
            text(&row, 2),
            hashes[&row.get_long(3).unwrap()].clone(),
        ];
        add(&mut by_minute, key, &row, 4);
    });
    rows(files, "samples_by_hour", |row| {
        let stack = hashes[&row.get_long(4).unwrap()].clone();
        add(&mut by_hour, vec![text(&row, 0), text(&row, 1), text(&row, 2), text(&row, 3), stack], &row, 5);
    });
    assert!(!minutes.is_empty() && minutes == by_minute, "{minutes:?}\n{by_minute:?}");
    assert_eq!(hours, by_hour);
}

/// Returns the sums of batches.
pub fn sent_sums<'b>(batches: impl IntoIterator<Item = &'b Batch>) -> Sums {
    let mut sums = Sums::new();
    for batch in batches {
        let profile = decode(&batch.pprof, 1 << 20).unwrap();
        let name = |id: &u64| {
            let line = &profile.location[*id as usize - 1].line[0];
            profile.string_table[profile.function[line.function_id as usize - 1].name as usize].as_str()
        };
        for sample in &profile.sample {
            let stack: Vec<&str> = sample.location_id.iter().map(name).collect();
            let sum = sums.entry((batch.batch_id.clone(), stack.join(";"))).or_default();
            *sum = (sum.0 + sample.value[1], sum.1 + sample.value[0]);
        }
    }
    sums
}

pub fn with_table(config: &mut Config) {
    config.table.table = true;
    config.table.table_rollups = true;
    config.table.table_interval = TimeSpan(Duration::from_millis(100));
}

/// Returns how many commits of a table are merges. Checks that they change no row.
fn merges(files: &Files, table: &str) -> usize {
    let log = format!("{table}/_delta_log/");
    let mut merges = 0;
    for (path, commit) in files {
        if !path.starts_with(&log) || Path::new(path).extension().is_none_or(|end| end != "json") {
            continue;
        }
        let lines = commit.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let actions: Vec<serde_json::Value> =
            lines.map(|line| serde_json::from_slice(line).unwrap()).collect();
        if actions[0]["commitInfo"]["operation"] == "OPTIMIZE" {
            merges += 1;
            let changes =
                |kind: &str| actions.iter().filter(|action| action[kind]["dataChange"] == false).count();
            assert!(changes("add") == 1 && changes("remove") >= 2, "{path}");
            assert_eq!(changes("add") + changes("remove") + 1, actions.len(), "{path}");
        }
    }
    merges
}

/// Waits until the table has all stored profiles.
pub async fn up_to_date(http: SocketAddr) {
    // The second update began after the last profile was stored.
    let before = metric(http, "gannet_collector_table_updates_total").await;
    eventually("the table is up to date", || async {
        metric(http, "gannet_collector_table_updates_total").await >= before + 2.0
            && metric(http, "gannet_collector_table_debt_bytes").await == 0.0
    })
    .await;
}

/// Returns batches of several services and hours, whose stacks repeat.
pub fn batches(round: u64, n: u64) -> Vec<Batch> {
    let make = |i: u64| {
        let stacks = [format!("main;work;f{}", (round + i) % 7), format!("main;idle;g{}", i % 3)];
        let values = [1 + (i % 5) as i64, 2];
        let stacks: Vec<_> = stacks.iter().zip(values).map(|(stack, n)| (stack.as_str(), n)).collect();
        let mut batch = batch(&format!("s{}", i % 3), now_ms() - i % 4 * 1_800_000, &stacks);
        if !i.is_multiple_of(5) {
            batch.labels.insert("pod".to_owned(), format!("p{}", i % 5));
        }
        batch
    };
    (0..n).map(make).collect()
}

pub fn spawn(data: &Path, grpc: SocketAddr, http: SocketAddr) -> Child {
    Command::new(env!("CARGO_BIN_EXE_gannet-collector"))
        .args(["--data", data.to_str().unwrap(), "--min-free-bytes", "0", "--flush-interval", "20ms"])
        .args(["--table", "--table-rollups", "--table-interval", "100ms"])
        .args(["--grpc-listen", &grpc.to_string(), "--http-listen", &http.to_string()])
        .env("GANNET_COLLECTOR_LOG", "warn")
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

async fn dial(grpc: SocketAddr) -> Option<Channel> {
    Channel::from_shared(format!("http://{grpc}")).ok()?.connect().await.ok()
}

/// Pushes until each batch is accepted, over new connections after each kill.
pub async fn push(grpc: SocketAddr, mut batches: Vec<Batch>) {
    while !batches.is_empty() {
        let Some(channel) = dial(grpc).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let Ok(mut pusher) = Pusher::over(channel).await else { continue };
        for batch in &batches {
            pusher.send(batch.clone()).await;
        }
        while !batches.is_empty()
            && let Some(answer) = pusher.answer().await
        {
            match answer {
                Message::Accepted(accepted) => batches.retain(|batch| batch.batch_id != accepted.batch_id),
                Message::Throttled(_) => break,
                other => panic!("{other:?}"),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_collector_adds_each_sample_to_the_table_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut sent = Vec::new();
    let kills = std::env::var("GANNET_TEST_KILLS").map_or(KILLS, |kills| kills.parse().unwrap());
    for round in 0..kills {
        let (grpc, http) = (free_port(), free_port());
        let mut child = spawn(dir.path(), grpc, http);
        let new = batches(round, 8);
        sent.extend(new.clone());
        push(grpc, new).await;
        // Each kill comes at another step of a compaction, and some come between two.
        tokio::time::sleep(Duration::from_millis(round * 17 % 220)).await;
        assert!(child.try_wait().unwrap().is_none(), "the collector ended by itself");
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let running = Collector::start(config_with(dir.path(), with_table)).await.unwrap();
    up_to_date(running.http_addr).await;
    assert_eq!(metric(running.http_addr, "gannet_collector_table_failures_total").await as u64, 0);
    running.shutdown().await;
    let files = files_below(&dir.path().join("table"));
    assert_eq!(sums(&files), sent_sums(&sent));
    check_rollups(&files);
    assert!(merges(&files, "samples") + merges(&files, "stacks") > 0, "no merge was under way");
}

pub fn table_of(s3: &S3) -> Files {
    let shelf = s3.0.lock().unwrap();
    let files = shelf.objects.iter().filter_map(|(key, object)| {
        let name = key.strip_prefix("profiles/here/table/")?;
        Some((name.to_owned(), object.clone()))
    });
    files.collect()
}

/// Ends the writes of a collector at each step of a compaction: the write fails, or it succeeds and its answer is lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_compaction_that_ends_at_any_step_is_completed_once() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let endpoint = s3.clone().serve().await;
    let start = || async {
        let mut config = in_bucket(dir.path(), &endpoint);
        with_table(&mut config);
        Collector::start(config).await.unwrap()
    };
    let running = start().await;
    let mut sent = batches(0, 4);
    Pusher::open(running.grpc_addr).await.store_all(&sent).await;
    up_to_date(running.http_addr).await;
    running.shutdown().await;
    let mut cut = 0;
    // A compaction of two hours writes up to 22 files, and its tables exist by now. The first write is the probe.
    for step in 1..22 {
        let fate = if step % 3 == 0 { Fate::Refused } else { Fate::Unanswered };
        let running = start().await;
        up_to_date(running.http_addr).await;
        s3.0.lock().unwrap().table_end = Some((step - 1, fate));
        let new = batches(step as u64, 4);
        Pusher::open(running.grpc_addr).await.store_all(&new).await;
        sent.extend(new);
        let failures = "gannet_collector_table_failures_total";
        let debt = "gannet_collector_table_debt_bytes";
        let updates = "gannet_collector_table_updates_total";
        let before = metric(running.http_addr, updates).await;
        eventually("the writes ended, or there was none left", || async {
            metric(running.http_addr, failures).await > 0.0
                || metric(running.http_addr, updates).await > before + 1.0
                    && metric(running.http_addr, debt).await == 0.0
        })
        .await;
        cut += usize::from(metric(running.http_addr, failures).await > 0.0);
        running.shutdown().await;
        s3.0.lock().unwrap().table_end = None;
        let running = start().await;
        up_to_date(running.http_addr).await;
        running.shutdown().await;
        assert_eq!(sums(&table_of(&s3)), sent_sums(&sent), "step {step}, {fate:?}");
        check_rollups(&table_of(&s3));
    }
    assert!(cut >= 8, "only {cut} compactions ended early");
}

/// Checks that two collectors that both compact a bucket add each sample once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_collectors_of_a_bucket_add_each_sample_once() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let endpoint = s3.clone().serve().await;
    let mut running = Vec::new();
    for name in ["a", "b"] {
        let mut config = in_bucket(&dir.path().join(name), &endpoint);
        with_table(&mut config);
        running.push(Collector::start(config).await.unwrap());
    }
    let mut sent = Vec::new();
    for round in 0..6 {
        for running in &running {
            let new = batches(round, 4);
            Pusher::open(running.grpc_addr).await.store_all(&new).await;
            sent.extend(new);
        }
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    eventually("the table has all profiles", || async {
        active(&table_of(&s3), "profiles").len() > 1 && sums(&table_of(&s3)) == sent_sums(&sent)
    })
    .await;
    for running in running {
        running.shutdown().await;
    }
    assert_eq!(sums(&table_of(&s3)), sent_sums(&sent));
}

/// Checks that a log is shortened once it has a checkpoint, and that the rest of it is complete.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_log_of_a_table_does_not_grow_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let start = || {
        Collector::start(config_with(dir.path(), |config| {
            with_table(config);
            config.table.retention_interval = Duration::from_millis(50);
            config.table.log_keep = Duration::from_millis(10);
        }))
    };
    let mut sent = Vec::new();
    for part in 0..2 {
        let running = start().await.unwrap();
        let updates = "gannet_collector_table_updates_total";
        for round in 0..24 {
            let new = batches(part * 24 + round, 2);
            Pusher::open(running.grpc_addr).await.store_all(&new).await;
            sent.extend(new);
            let before = metric(running.http_addr, updates).await;
            eventually("an update", || async { metric(running.http_addr, updates).await > before }).await;
        }
        up_to_date(running.http_addr).await;
        running.shutdown().await;
        let files = files_below(&dir.path().join("table"));
        let (version, _) = checkpoint(&files, "samples").unwrap();
        assert!(version >= 19, "{version}");
        let commits = files.keys().filter(|path| path.starts_with("samples/_delta_log/")).count();
        assert!(commits < 40, "{commits} files");
        assert!(!files.contains_key("samples/_delta_log/00000000000000000000.json"));
        assert_eq!(sums(&files), sent_sums(&sent));
        // The commits before the checkpoint are gone, and so is the way to it.
        fs::remove_file(dir.path().join("table/samples/_delta_log/_last_checkpoint")).unwrap();
    }
}

fn removed_files(dir: &Path, table: &str) -> usize {
    let files = files_below(&dir.join("table"));
    let data = files.keys().filter(|path| path.starts_with(&format!("{table}/date="))).count();
    data - active(&files, table).len()
}

/// Checks that the table follows the retention of the store, and that removed files stay only for the delay.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retention_removes_partitions_of_the_table() {
    let dir = tempfile::tempdir().unwrap();
    let start = |age_s| {
        let config = config_with(dir.path(), |config| {
            with_table(config);
            config.store.retention_age = TimeSpan::from_secs(age_s);
            config.store.retention_interval = Duration::from_millis(50);
            config.table.retention_interval = Duration::from_millis(50);
            config.table.delete_delay = Duration::from_millis(300);
        });
        Collector::start(config)
    };
    let running = start(24 * 3600).await.unwrap();
    let old = batch("old", now_ms() - 3 * 3_600_000, &[("main;work", 1)]);
    let young = batch("young", now_ms(), &[("main;work", 2)]);
    Pusher::open(running.grpc_addr).await.store_all(&[old.clone(), young.clone()]).await;
    up_to_date(running.http_addr).await;
    running.shutdown().await;
    assert_eq!(sums(&files_below(&dir.path().join("table"))), sent_sums([&old, &young]));

    let running = start(2 * 3600).await.unwrap();
    eventually("the old rows are gone", || async {
        sums(&files_below(&dir.path().join("table"))) == sent_sums([&young])
    })
    .await;
    for table in ["samples", "profiles", "stacks", "frames"] {
        eventually("the old files are gone", || async { removed_files(dir.path(), table) == 0 }).await;
    }
    up_to_date(running.http_addr).await;
    let counted = metric(running.http_addr, "gannet_collector_table_bytes").await as u64;
    let on_disk: u64 = files_below(&dir.path().join("table")).values().map(|file| file.len() as u64).sum();
    assert!(counted >= on_disk && counted < on_disk + (4 << 20), "{counted} of {on_disk}");
    running.shutdown().await;
}

/// Checks the leftover of a crash on the disk, and a file in a bucket that another collector is about to commit. The bucket's clock is
/// far behind that of the collector.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_file_much_older_than_the_newest_is_a_leftover() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let of_another = "profiles/here/table/samples/date=2026-01-01/hour=0/part-another.zstd.parquet";
    s3.0.lock().unwrap().objects.insert(of_another.to_owned(), "rows".into());
    let hour = dir.path().join("disk/table/samples/date=2026-01-01/hour=0");
    fs::create_dir_all(&hour).unwrap();
    for (name, age_s) in [("old", 7200), ("young", 60)] {
        let file = fs::File::create(hour.join(format!("part-{name}.zstd.parquet"))).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age_s)).unwrap();
    }
    let in_bucket = in_bucket(&dir.path().join("local"), &s3.clone().serve().await);
    for mut config in [in_bucket, config_with(&dir.path().join("disk"), |_| {})] {
        with_table(&mut config);
        config.table.retention_interval = Duration::from_millis(50);
        let running = Collector::start(config).await.unwrap();
        Pusher::open(running.grpc_addr).await.store_all(&batches(0, 2)).await;
        up_to_date(running.http_addr).await;
        running.shutdown().await;
    }
    assert!(s3.0.lock().unwrap().objects.contains_key(of_another));
    let left = |name: &str| hour.join(format!("part-{name}.zstd.parquet")).exists();
    assert_eq!((left("old"), left("young")), (false, true));
}

/// Checks that merges leave few files and the same rows, in the order of the table, and that a collector that starts later knows
/// which segments the merged files hold.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn merges_leave_few_files_and_the_same_rows() {
    let dir = tempfile::tempdir().unwrap();
    let start = || {
        Collector::start(config_with(dir.path(), |config| {
            with_table(config);
            config.table.merge_files = 4;
            config.table.retention_interval = Duration::from_millis(50);
            config.table.delete_delay = Duration::from_millis(300);
        }))
    };
    let running = start().await.unwrap();
    let updates = "gannet_collector_table_updates_total";
    let mut sent = Vec::new();
    for round in 0..24 {
        let new = batches(round, 5);
        Pusher::open(running.grpc_addr).await.store_all(&new).await;
        sent.extend(new);
        let before = metric(running.http_addr, updates).await;
        eventually("an update", || async { metric(running.http_addr, updates).await > before }).await;
    }
    up_to_date(running.http_addr).await;
    let counted = async |name| metric(running.http_addr, name).await as usize;
    let data_files = "gannet_collector_table_data_files";
    eventually("the merges are done", || async {
        let before = counted(data_files).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        counted(data_files).await == before
    })
    .await;
    // Two or three hours, of which the youngest may have up to three files of each size.
    assert!(counted(data_files).await < 7 * 16, "{} files", counted(data_files).await);
    assert!(counted("gannet_collector_table_merged_files_total").await > 5 * 24);
    assert!(counted("gannet_collector_table_merges_total").await > 10);
    let table = dir.path().join("table");
    let present = active(&files_below(&table), "samples").len();
    assert!(present <= 16, "{present} files");
    for table in ["samples", "profiles", "stacks", "frames", "labels"] {
        eventually("the old files are gone", || async { removed_files(dir.path(), table) == 0 }).await;
    }
    running.shutdown().await;
    let files = files_below(&table);
    assert_eq!(sums(&files), sent_sums(&sent));
    check_rollups(&files);
    assert!(merges(&files, "samples_by_minute") > 2 && merges(&files, "samples_by_hour") > 2);
    let count = |table| {
        let mut count = 0;
        rows(&files, table, |_| count += 1);
        count
    };
    // 24 rounds of five profiles of three services, two hours and five pods, whose rows merges have added up.
    assert!(count("samples_by_hour") < count("samples"), "{} rows", count("samples_by_hour"));
    assert!(merges(&files, "samples") > 2 && merges(&files, "profiles") > 2);
    for path in active(&files, "samples") {
        let rows = SerializedFileReader::new(files[&path].clone()).unwrap();
        let keys = rows.get_row_iter(None).unwrap().map(|row| {
            let row = row.unwrap();
            (
                row.get_string(1).unwrap().clone(),
                row.get_timestamp_micros(0).unwrap(),
                row.get_long(8).unwrap(),
            )
        });
        let keys: Vec<_> = keys.collect();
        assert!(keys.is_sorted_by_key(|(service, time, _)| (service, *time)), "{path}: {keys:?}");
    }

    let running = start().await.unwrap();
    let new = batches(99, 3);
    Pusher::open(running.grpc_addr).await.store_all(&new).await;
    sent.extend(new);
    up_to_date(running.http_addr).await;
    running.shutdown().await;
    assert_eq!(sums(&files_below(&table)), sent_sums(&sent));
}

/// Checks that sums of profiles that were stored before `--table-rollups` come into the tables, and those of later ones too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sums_of_older_profiles_follow_when_they_are_switched_on() {
    let dir = tempfile::tempdir().unwrap();
    let start = |has_rollups| {
        Collector::start(config_with(dir.path(), |config| {
            with_table(config);
            config.table.table_rollups = has_rollups;
        }))
    };
    let mut sent = Vec::new();
    for (round, has_rollups) in [(0, false), (1, true), (2, false), (3, true)] {
        let running = start(has_rollups).await.unwrap();
        let new = batches(round, 6);
        Pusher::open(running.grpc_addr).await.store_all(&new).await;
        sent.extend(new);
        up_to_date(running.http_addr).await;
        running.shutdown().await;
        let files = files_below(&dir.path().join("table"));
        assert_eq!(sums(&files), sent_sums(&sent));
        if has_rollups {
            check_rollups(&files);
        } else if round == 0 {
            assert!(active(&files, "samples_by_minute").is_empty());
        }
    }
}

/// Checks that samples that differ in one column of a table of sums have sums of their own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sums_of_each_type_service_and_pod_stay_apart() {
    let dir = tempfile::tempdir().unwrap();
    let running = Collector::start(config_with(dir.path(), with_table)).await.unwrap();
    let now = now_ms();
    let mut sent = Vec::new();
    for types in [CPU, OFF_CPU] {
        for (service, namespace, pod) in
            [("s", "n", "p"), ("t", "n", "p"), ("s", "m", "p"), ("s", "n", "q"), ("s", "n", "")]
        {
            let mut batch = typed_batch(types, service, now, &[("main;work", 1 + sent.len() as i64)]);
            batch
                .labels
                .extend([("namespace".to_owned(), namespace.to_owned()), ("pod".to_owned(), pod.to_owned())]);
            batch.labels.retain(|_, value| !value.is_empty());
            sent.push(batch);
        }
    }
    Pusher::open(running.grpc_addr).await.store_all(&sent).await;
    up_to_date(running.http_addr).await;
    running.shutdown().await;
    check_rollups(&files_below(&dir.path().join("table")));
}

/// Checks that a merge leaves a file with a flipped bit and a missing one as they are, counts them, and merges the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_file_of_the_table_is_not_merged() {
    let dir = tempfile::tempdir().unwrap();
    let start = |merge_files| {
        Collector::start(config_with(dir.path(), |config| {
            with_table(config);
            config.table.merge_files = merge_files;
            config.table.close_delay = Duration::from_secs(10 * 3600);
        }))
    };
    let running = start(1000).await.unwrap();
    let now = now_ms();
    let mut sent = Vec::new();
    for round in 0..8 {
        let new =
            [batch("s", now, &[("main;work", round + 1)]), batch("t", now, &[("main;idle", round + 1)])];
        Pusher::open(running.grpc_addr).await.store_all(&new).await;
        sent.extend(new);
        up_to_date(running.http_addr).await;
    }
    running.shutdown().await;
    let table = dir.path().join("table");
    let before = files_below(&table);
    let paths: Vec<String> = active(&before, "samples").into_iter().collect();
    assert_eq!(paths.len(), 8);
    let mut bytes = before[&paths[2]].to_vec();
    // A value in the first column, which still decodes.
    bytes[30] ^= 4;
    fs::write(table.join(&paths[2]), &bytes).unwrap();
    fs::remove_file(table.join(&paths[5])).unwrap();

    let running = start(3).await.unwrap();
    eventually("the others are merged", || async { active(&files_below(&table), "samples").len() == 3 })
        .await;
    eventually("both are counted", || async {
        metric(running.http_addr, "gannet_collector_table_damaged_files").await as u64 == 2
    })
    .await;
    assert_eq!(metric(running.http_addr, "gannet_collector_table_failures_total").await as u64, 0);
    running.shutdown().await;
    let mut after = files_below(&table);
    assert_eq!(after[&paths[2]], bytes);
    // With their former bytes, nothing is missing.
    for path in [&paths[2], &paths[5]] {
        after.insert(path.clone(), before[path].clone());
    }
    assert_eq!(sums(&after), sent_sums(&sent));
}
