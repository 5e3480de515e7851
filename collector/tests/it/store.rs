use std::{fs, time::Duration};

use gannet_base::{ByteSize, TimeSpan};
use gannet_collector::{Collector, StartError, StoreError};
use gannet_proto::query::{LabelNamesRequest, ListProfilesRequest, MergeRequest, Selection};

use crate::{
    kill::walk,
    support::{Pusher, at, batch, config, config_with, eventually, metric, now_ms, queries, start},
};

pub async fn list(running: &gannet_collector::Running) -> Vec<gannet_proto::query::ProfileInfo> {
    let request = ListProfilesRequest {
        selection: Some(Selection {
            from: Some(at(0)),
            until: Some(at(now_ms() + 3_600_000)),
            ..Selection::default()
        }),
        limit: 10_000,
        page_token: String::new(),
    };
    queries(running).await.list_profiles(request).await.unwrap().into_inner().profiles
}

async fn filled(data: &std::path::Path) -> Vec<gannet_proto::query::ProfileInfo> {
    let running = start(data).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    for i in 0..40 {
        pusher
            .store(batch(&format!("s{}", i % 3), now_ms() - i * 600_000, &[("main;work", 1 + i as i64)]))
            .await;
    }
    let before = list(&running).await;
    assert_eq!(before.len(), 40);
    drop(pusher);
    running.shutdown().await;
    before
}

#[tokio::test]
async fn a_missing_index_is_rebuilt_completely_from_the_objects() {
    let dir = tempfile::tempdir().unwrap();
    let before = filled(dir.path()).await;
    fs::remove_file(dir.path().join("index.redb")).unwrap();
    let running = start(dir.path()).await;
    assert_eq!(list(&running).await, before);
    assert_eq!(metric(running.http_addr, "gannet_collector_store_index_rebuilds_total").await as u64, 1);
    running.shutdown().await;
}

#[tokio::test]
async fn a_corrupt_index_is_renamed_and_rebuilt() {
    let garbage = |len: usize| (0..len).map(|i| (i * 31 % 251) as u8).collect::<Vec<u8>>();
    for damage in ["garbage", "cut", "empty header"] {
        let dir = tempfile::tempdir().unwrap();
        let before = filled(dir.path()).await;
        let index = dir.path().join("index.redb");
        let mut content = fs::read(&index).unwrap();
        match damage {
            "garbage" => content = garbage(content.len()),
            "cut" => content.truncate(5000),
            _ => content[..512].fill(0),
        }
        fs::write(&index, content).unwrap();
        let running = start(dir.path()).await;
        assert_eq!(list(&running).await, before, "{damage}");
        let aside = dir.path().join("index.redb.corrupt");
        assert!(aside.exists(), "{damage}");
        running.shutdown().await;
        start(dir.path()).await.shutdown().await;
        assert!(!aside.exists(), "{damage}: it would take space for ever");
    }
}

#[tokio::test]
async fn the_start_repairs_differences_of_objects_and_index() {
    let dir = tempfile::tempdir().unwrap();
    let before = filled(dir.path()).await;
    let objects: Vec<_> = objects(dir.path());
    // A row without an object, a leftover of a write, a damaged object.
    fs::remove_file(object_of(&objects, &before[3].id)).unwrap();
    fs::write(objects[0].with_file_name("01ARZ3NDEKTSV4RRFFQ69G5FAV.segment#1"), b"half").unwrap();
    fs::write(objects[0].with_file_name("01ARZ3NDEKTSV4RRFFQ69G5FAV.pb.gz#1"), b"half").unwrap();
    fs::write(objects[0].with_file_name("01ARZ3NDEKTSV4RRFFQ69G5FAV.pb.gz"), b"no object").unwrap();
    let running = start(dir.path()).await;
    let after = list(&running).await;
    assert_eq!(after.len(), 39);
    assert!(!after.iter().any(|p| p.id == before[3].id));
    assert_eq!(metric(running.http_addr, "gannet_collector_store_objects_corrupt_total").await as u64, 1);
    assert_eq!(walk(dir.path()), 40, "39 objects and the stray one");
    running.shutdown().await;
}

/// Returns the object that holds a profile: its index part names the batch.
pub fn object_of<'a>(objects: &'a [std::path::PathBuf], id: &str) -> &'a std::path::PathBuf {
    let holds = |path: &&std::path::PathBuf| {
        fs::read(path).unwrap().windows(id.len()).any(|bytes| bytes == id.as_bytes())
    };
    objects.iter().find(holds).unwrap()
}

/// Returns the directory of the objects of the hour with this time.
pub fn hour_dir(data: &std::path::Path, at_ms: u64) -> std::path::PathBuf {
    let at = jiff::Timestamp::from_millisecond(at_ms as i64).unwrap();
    data.join("objects/default").join(at.strftime("%Y-%m-%d/%H").to_string())
}

pub fn objects(data: &std::path::Path) -> Vec<std::path::PathBuf> {
    let (mut dirs, mut files) = (vec![data.join("objects")], Vec::new());
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { dirs.push(path) } else { files.push(path) }
        }
    }
    files
}

#[tokio::test]
async fn a_query_skips_missing_and_damaged_objects() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    for i in 0..4 {
        pusher.store(batch("shop", now_ms() - i, &[("main;work", 10)])).await;
    }
    let objects = objects(dir.path());
    fs::remove_file(&objects[0]).unwrap();
    fs::write(&objects[1], b"damaged").unwrap();
    let mut stream = queries(&running).await.merge(MergeRequest::default()).await.unwrap().into_inner();
    let mut bytes = Vec::new();
    while let Some(step) = stream.message().await.unwrap() {
        if let Some(gannet_proto::query::merge_progress::Message::Chunk(chunk)) = step.message {
            bytes.extend(chunk.data);
        }
    }
    let merged = gannet_proto::pprof::decode(&bytes, 1 << 20).unwrap();
    assert_eq!(merged.sample.iter().map(|s| s.value[0]).sum::<i64>(), 20);
    assert_eq!(metric(running.http_addr, "gannet_collector_query_missing_objects_total").await as u64, 0);
    assert_eq!(metric(running.http_addr, "gannet_collector_store_objects_corrupt_total").await as u64, 2);
    running.shutdown().await;
}

#[tokio::test]
async fn old_profiles_go_with_their_objects_and_series() {
    let dir = tempfile::tempdir().unwrap();
    let age = Duration::from_secs(3600);
    let config = config_with(dir.path(), |config| {
        config.store.retention_age = TimeSpan(age);
        config.store.retention_interval = Duration::from_millis(50);
    });
    let running = Collector::start(config).await.unwrap();
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let soon_old = now_ms() - age.as_millis() as u64 + 1500;
    for i in 0..30 {
        pusher.store(batch("old", soon_old + i, &[("main", 1)])).await;
    }
    pusher.store(batch("young", now_ms(), &[("main", 1)])).await;
    eventually("old profiles are removed", || async { list(&running).await.len() == 1 }).await;
    assert_eq!(walk(dir.path()), 1, "their objects are gone, too");
    let selection = Some(Selection { from: Some(at(0)), ..Selection::default() });
    let mut client = queries(&running).await;
    let request =
        gannet_proto::query::LabelValuesRequest { selection: selection.clone(), name: "service_name".into() };
    assert_eq!(client.label_values(request).await.unwrap().into_inner().values, ["young"]);
    assert!(
        !client.label_names(LabelNamesRequest { selection }).await.unwrap().into_inner().names.is_empty()
    );
    assert_eq!(
        metric(running.http_addr, "gannet_collector_store_retention_removed_profiles_total").await as u64,
        30
    );
    assert_eq!(metric(running.http_addr, "gannet_collector_store_profiles").await as u64, 1);
    running.shutdown().await;
}

#[tokio::test]
async fn the_oldest_profiles_go_while_the_store_is_too_large() {
    let dir = tempfile::tempdir().unwrap();
    let limit = 400_000;
    let config = config_with(dir.path(), |config| {
        config.store.retention_bytes = ByteSize(limit);
        config.ingest.max_batch_bytes = ByteSize(10_000);
    });
    let running = Collector::start(config).await.unwrap();
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let first = now_ms() - 200_000;
    for i in 0..200_u64 {
        pusher.store(batch("shop", first + i * 1000, &[("main;work", 1)])).await;
    }
    eventually("the store is below its limit", || async {
        metric(running.http_addr, "gannet_collector_store_bytes").await <= limit as f64
    })
    .await;
    let left = list(&running).await;
    assert!(left.len() > 10 && left.len() < 190, "{}", left.len());
    let on_disk: u64 = objects(dir.path()).iter().map(|p| p.metadata().unwrap().len()).sum();
    let counted = metric(running.http_addr, "gannet_collector_store_bytes").await as u64;
    assert!(
        on_disk < counted && counted <= limit,
        "{on_disk} bytes in files, {counted} on the disk with the index"
    );
    // The list holds the last pushed profiles, newest first and without a gap.
    let starts: Vec<u64> = left.iter().map(|p| p.start.as_ref().map(|t| t.seconds as u64).unwrap()).collect();
    assert!(starts[0] - starts[starts.len() - 1] <= left.len() as u64, "{starts:?}");
    running.shutdown().await;
}

#[tokio::test]
async fn only_one_collector_uses_a_directory() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    match Collector::start(config(dir.path())).await {
        Err(e @ StartError::Store(StoreError::Locked(_))) => assert!(e.to_string().contains("--data"), "{e}"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("two collectors share a directory"),
    }
    running.shutdown().await;
    start(dir.path()).await.shutdown().await;
}
