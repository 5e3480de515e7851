//! A full disk: a small tmpfs, which only root can mount.

use std::{path::Path, process::Command, time::Duration};

use gannet_base::{ByteSize, TimeSpan};
use gannet_collector::Collector;
use gannet_proto::{
    ingest::push_response::Message,
    query::{FlameGraphRequest, ListProfilesRequest, query_service_client::QueryServiceClient},
};

use crate::{
    kill::{free_port, spawn},
    store::{hour_dir, objects},
    support::{Pusher, TEST_TIMEOUT, batch, channel, config_with, eventually, get, metric, now_ms, queries},
};

struct Tmpfs<'a>(&'a Path);

impl<'a> Tmpfs<'a> {
    fn mount(at: &'a Path, size: &str) -> Self {
        let options = format!("size={size}");
        let status =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "gannet-test"]).arg(at).status();
        assert!(
            status.is_ok_and(|s| s.success()),
            "this test mounts a small tmpfs to fill it: run it as root"
        );
        Self(at)
    }
}

impl Drop for Tmpfs<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

/// Fills the disk up to `leave` free bytes.
fn fill(dir: &Path, leave: u64) -> std::path::PathBuf {
    let file = dir.join("ballast");
    let stat = rustix::fs::statvfs(dir).unwrap();
    let bytes = (stat.f_bavail * stat.f_frsize).saturating_sub(leave);
    std::fs::write(&file, vec![1; bytes as usize]).unwrap();
    file
}

/// A profile large enough to fill the rest of the disk soon.
fn large(i: u64) -> gannet_proto::ingest::Batch {
    let stacks: Vec<(String, i64)> =
        (0..400).map(|k| (format!("main;f{}", (k * 7919 + i * 104_729) % 99_991), 1)).collect();
    let stacks: Vec<(&str, i64)> = stacks.iter().map(|(s, n)| (s.as_str(), *n)).collect();
    batch(&format!("s{i}"), now_ms() - i, &stacks)
}

/// Pushes until the collector throttles a batch. Returns the number of stored ones, and the reason.
async fn until_throttled(pusher: &mut Pusher, from: u64) -> (u64, String) {
    for i in from..from + 3000 {
        match pusher.push(large(i)).await {
            Message::Accepted(_) => {}
            Message::Throttled(t) => {
                assert!(t.retry_after.unwrap().seconds > 0);
                return (i - from, t.reason);
            }
            other => panic!("a full disk must not refuse: {other:?}"),
        }
    }
    panic!("the disk never filled up");
}

async fn survives(min_free_bytes: u64, leave: u64, says: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let disk = Tmpfs::mount(dir.path(), "24m");
    let data = dir.path().join("data");
    let running =
        Collector::start(config_with(&data, |config| config.store.min_free_bytes = ByteSize(min_free_bytes)))
            .await
            .unwrap();
    let mut pusher = Pusher::open(running.grpc_addr).await;
    pusher.store(large(0)).await;
    let ballast = fill(dir.path(), leave);
    let (taken, reason) = until_throttled(&mut pusher, 1).await;
    assert!(says.iter().any(|s| reason.contains(s)), "{reason}");
    // The collector survives more of them.
    for i in 0..5 {
        match pusher.push(large(4000 + i)).await {
            Message::Throttled(_) => {}
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(get(running.http_addr, "/livez").await.status, 200);
    assert!(
        metric(running.http_addr, "gannet_collector_ingest_batches_accepted_total").await as u64 == taken + 1
    );

    std::fs::remove_file(ballast).unwrap();
    for i in 0..20 {
        pusher.store(large(5000 + i)).await;
    }
    assert_eq!(get(running.http_addr, "/readyz").await.status, 200);
    let request = ListProfilesRequest { limit: 5000, ..ListProfilesRequest::default() };
    let listed = queries(&running).await.list_profiles(request.clone()).await.unwrap().into_inner();
    assert_eq!(listed.profiles.len() as u64, taken + 21, "exactly what was acknowledged");
    drop(pusher);
    running.shutdown().await;
    // The disk agrees after a restart.
    let running =
        Collector::start(config_with(&data, |config| config.store.min_free_bytes = ByteSize(min_free_bytes)))
            .await
            .unwrap();
    let listed = queries(&running).await.list_profiles(request).await.unwrap().into_inner();
    assert!(listed.profiles.len() as u64 >= taken + 21);
    running.shutdown().await;
    drop(disk);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_a_filling_disk_throttles_batches_and_spares_the_index() {
    survives(2 << 20, 3 << 20, &["it keeps 2 MiB"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_a_completely_full_disk_loses_nothing_and_recovers() {
    survives(0, 200 << 10, &["disk is full", "the index", "MiB left"]).await;
}

async fn until_ready(grpc: std::net::SocketAddr) {
    let deadline = tokio::time::Instant::now() + TEST_TIMEOUT;
    while tokio::net::TcpStream::connect(grpc).await.is_err() {
        assert!(tokio::time::Instant::now() < deadline, "the collector does not come up");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Checks that a collector which was killed on a full disk starts, answers queries, and stores again once there is room.
/// `prepare` changes the data directory before the restart, which may let the collector free some room.
async fn restarts_on_a_full_disk(frees_room: bool, prepare: impl FnOnce(&Path)) {
    let dir = tempfile::tempdir().unwrap();
    let disk = Tmpfs::mount(dir.path(), "24m");
    let data = dir.path().join("data");
    let (grpc, http) = (free_port(), free_port());
    let mut child = spawn(&data, grpc, http);
    until_ready(grpc).await;
    let mut pusher = Pusher::open(grpc).await;
    let ballast = fill(dir.path(), 1 << 20);
    let (taken, _) = until_throttled(&mut pusher, 0).await;
    child.kill().unwrap();
    child.wait().unwrap();
    prepare(&data);
    let rest = fill_rest(dir.path());

    let mut child = spawn(&data, grpc, http);
    until_ready(grpc).await;
    let request = ListProfilesRequest { limit: 5000, ..ListProfilesRequest::default() };
    let mut client = QueryServiceClient::new(channel(grpc).await);
    let listed = client.list_profiles(request).await.unwrap().into_inner();
    assert!(listed.profiles.len() as u64 >= taken, "{} of {taken}", listed.profiles.len());
    let graph = client.flame_graph(FlameGraphRequest::default()).await.unwrap().into_inner();
    assert!(graph.profiles >= taken && graph.unreadable_profiles == 0, "{}", graph.profiles);
    let mut pusher = Pusher::open(grpc).await;
    match pusher.push(large(9000)).await {
        Message::Throttled(throttled) => assert!(throttled.reason.contains("disk"), "{}", throttled.reason),
        Message::Accepted(_) if frees_room => {}
        other => panic!("{other:?}"),
    }
    std::fs::remove_file(ballast).unwrap();
    std::fs::remove_file(rest).unwrap();
    let freed = std::time::Instant::now();
    while !matches!(pusher.push(large(9001)).await, Message::Accepted(_)) {
        assert!(freed.elapsed() < Duration::from_secs(10), "the collector does not take batches again");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    child.kill().unwrap();
    child.wait().unwrap();
    drop(disk);
}

/// Fills the disk to its last byte.
fn fill_rest(dir: &Path) -> std::path::PathBuf {
    use std::io::Write as _;
    let file = dir.join("rest");
    let mut to = std::fs::File::create(&file).unwrap();
    while to.write_all(&[1; 4096]).is_ok() {}
    file
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_a_collector_killed_on_a_full_disk_starts_again() {
    restarts_on_a_full_disk(false, |_| {}).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_a_full_disk_without_an_index_does_not_stop_the_start() {
    restarts_on_a_full_disk(false, |data| std::fs::remove_file(data.join("index.redb")).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_a_full_disk_and_a_corrupt_index_do_not_stop_the_start() {
    restarts_on_a_full_disk(true, |data| {
        let index = std::fs::File::options().write(true).open(data.join("index.redb")).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&index, &[7; 4096], 0).unwrap();
    })
    .await;
}

/// Checks that an index in memory stays small: the newest profiles have room there, the others are counted, expire by age, and
/// are found again once the disk has room.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn root_an_index_in_memory_is_bounded_and_holds_the_newest() {
    const LEFT_OUT: &str = "gannet_collector_store_index_left_out";
    let dir = tempfile::tempdir().unwrap();
    let disk = Tmpfs::mount(dir.path(), "24m");
    let data = dir.path().join("data");
    let start = |memory_index_bytes, age| {
        Collector::start(config_with(&data, move |config| {
            config.store.min_free_bytes = ByteSize(1);
            config.store.retention_age = TimeSpan(age);
            config.store.retention_interval = Duration::from_millis(100);
            config.store.memory_index_bytes = memory_index_bytes;
        }))
    };
    let day = Duration::from_secs(24 * 3600);
    let running = start(64 << 20, 7 * day).await.unwrap();
    let mut pusher = Pusher::open(running.grpc_addr).await;
    // 600 of this hour or the last one, 300 of three days ago.
    let now = now_ms();
    let at = |age: Duration, i: u64| batch("s", now - age.as_millis() as u64 - i, &[("main", 1)]);
    for i in 0..300 {
        pusher.store(at(3 * day, i)).await;
    }
    // In the directory where they would be after three days.
    let old = hour_dir(&data, now - 3 * day.as_millis() as u64);
    let written = objects(&data);
    assert_eq!(written.len(), 300, "one segment for each");
    let mut stored = Vec::new();
    for i in 0..600 {
        let batch = at(Duration::ZERO, i);
        stored.push(batch.batch_id.clone());
        pusher.store(batch).await;
    }
    drop(pusher);
    running.shutdown().await;
    std::fs::create_dir_all(&old).unwrap();
    for file in written {
        std::fs::rename(&file, old.join(file.file_name().unwrap())).unwrap();
    }
    std::fs::remove_file(data.join("index.redb")).unwrap();
    let rest = fill_rest(dir.path());

    // Room for some hundreds of rows.
    let running = start(200 << 10, 7 * day).await.unwrap();
    let request = ListProfilesRequest { limit: 5000, ..ListProfilesRequest::default() };
    let listed = async |running: &gannet_collector::Running| {
        let listed = queries(running).await.list_profiles(request.clone()).await.unwrap().into_inner();
        listed.profiles
    };
    let profiles = listed(&running).await;
    assert!((256..600).contains(&profiles.len()), "{}", profiles.len());
    let mut listed_ids: Vec<_> = profiles.iter().map(|profile| profile.id.clone()).collect();
    let mut newest = stored.split_off(stored.len() - profiles.len());
    listed_ids.sort_unstable();
    newest.sort_unstable();
    assert_eq!(listed_ids, newest, "those that were stored last have room");
    let left_out = metric(running.http_addr, LEFT_OUT).await as usize;
    assert_eq!(profiles.len() + left_out, 900);
    running.shutdown().await;

    // Those of three days ago expire, though the index does not know them. Their space is enough for an index.
    let running = start(200 << 10, day).await.unwrap();
    eventually("old profiles expire", || async {
        metric(running.http_addr, LEFT_OUT).await as usize == left_out - 300
    })
    .await;
    assert!(!old.exists(), "their files are gone, too");
    std::fs::remove_file(rest).unwrap();
    let mut pusher = Pusher::open(running.grpc_addr).await;
    pusher.store(at(Duration::ZERO, 1000)).await;
    assert_eq!(listed(&running).await.len(), 601);
    assert_eq!(metric(running.http_addr, LEFT_OUT).await as u64, 0);
    running.shutdown().await;
    drop(disk);
}
