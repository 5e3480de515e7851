//! Damaged and foreign files in the data directory.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use gannet_base::{ByteSize, TimeSpan};
use gannet_collector::{Collector, Running};
use gannet_proto::{
    pprof,
    query::{
        FlameGraphRequest, FlameGraphResponse, GetProfileRequest, LabelValuesRequest, MergeRequest,
        SeriesRequest, TimelineRequest, TopRequest, merge_progress::Message,
    },
};
use tonic::Code;

use crate::{
    store::{hour_dir, list, object_of, objects},
    support::{Pusher, batch, config_with, eventually, get, metric, now_ms, queries, start},
};

/// Stores `n` profiles of one sample each, one in each segment. Returns their files in the order of time.
async fn store(running: &Running, data: &Path, n: u64) -> Vec<PathBuf> {
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let mut ids = Vec::new();
    for i in 0..n {
        let batch = batch("shop", now_ms() - 60_000 + i, &[("main;work", 1)]);
        ids.push(batch.batch_id.clone());
        pusher.store(batch).await;
    }
    let files = objects(data);
    ids.iter().map(|id| object_of(&files, id).clone()).collect()
}

/// Overwrites a file with as many zeros.
fn zero(file: &Path) {
    let bytes = fs::metadata(file).unwrap().len();
    fs::write(file, vec![0; bytes as usize]).unwrap();
}

async fn flame_graph(running: &Running) -> FlameGraphResponse {
    queries(running).await.flame_graph(FlameGraphRequest::default()).await.unwrap().into_inner()
}

/// Checks that every query answers with the value of the readable profiles.
async fn check_queries(running: &Running, readable: u64, unreadable: u64, listed: usize) {
    let graph = flame_graph(running).await;
    assert_eq!((graph.total, graph.profiles), (readable * 10_000_000, readable));
    assert_eq!(graph.unreadable_profiles, unreadable);
    let mut client = queries(running).await;
    let top = client.top(TopRequest::default()).await.unwrap().into_inner();
    assert_eq!((top.total, top.unreadable_profiles), (readable * 10_000_000, unreadable));
    let mut steps = client.merge(MergeRequest::default()).await.unwrap().into_inner();
    let (mut bytes, mut reported) = (Vec::new(), None);
    while let Some(step) = steps.message().await.unwrap() {
        match step.message {
            Some(Message::Chunk(chunk)) => bytes.extend(chunk.data),
            Some(Message::Progress(progress)) => reported = Some(progress.profiles_unreadable),
            None => {}
        }
    }
    assert_eq!(reported, Some(unreadable));
    let merged = pprof::decode(&bytes, 1 << 20).unwrap();
    assert_eq!(merged.sample.iter().map(|s| s.value[0]).sum::<i64>(), readable as i64);
    let notes: Vec<_> = merged.comment.iter().map(|at| &merged.string_table[*at as usize]).collect();
    assert_eq!(notes.iter().any(|note| note.contains("damaged")), unreadable > 0, "{notes:?}");
    assert_eq!(list(running).await.len(), listed);
    let series = client.series(SeriesRequest::default()).await.unwrap().into_inner().series;
    assert_eq!(series.iter().map(|s| s.profiles).sum::<u64>(), listed as u64);
    assert_eq!(
        client
            .timeline(TimelineRequest::default())
            .await
            .unwrap()
            .into_inner()
            .points
            .iter()
            .map(|p| p.profiles)
            .sum::<u64>(),
        listed as u64
    );
    let names = LabelValuesRequest { name: "service_name".into(), selection: None };
    assert_eq!(client.label_values(names).await.unwrap().into_inner().values, ["shop"]);
    let json = get(running.http_addr, "/api/v1/flamegraph").await.json();
    assert_eq!(json["unreadable_profiles"], unreadable);
    assert_eq!(get(running.http_addr, "/readyz").await.status, 200);
}

/// Damages four objects: zeros, no bytes, no end, a directory in its place.
fn damage(files: &[PathBuf]) {
    zero(&files[0]);
    fs::write(&files[1], b"").unwrap();
    let cut = fs::read(&files[2]).unwrap();
    fs::write(&files[2], &cut[..cut.len() - 20]).unwrap();
    fs::remove_file(&files[3]).unwrap();
    fs::create_dir(&files[3]).unwrap();
    fs::write(files[3].join("file"), b"x").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn queries_answer_without_damaged_objects_and_count_them() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let files = store(&running, dir.path(), 9).await;
    check_queries(&running, 9, 0, 9).await;
    damage(&files);
    // The damage appears while the collector runs, so the rows are still there.
    let graph = flame_graph(&running).await;
    assert_eq!(graph.profiles, 9, "a merge of the same profiles is in memory");
    let mut pusher = Pusher::open(running.grpc_addr).await;
    pusher.store(batch("shop", now_ms(), &[("main;work", 1)])).await;
    check_queries(&running, 6, 4, 10).await;
    let id = list(&running).await.pop().unwrap().id;
    let status = queries(&running)
        .await
        .get_profile(GetProfileRequest { id, ..Default::default() })
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::DataLoss, "{status}");
    drop(pusher);
    running.shutdown().await;

    // A start removes the row of the file that is gone, and keeps those of the damaged ones.
    let running = start(dir.path()).await;
    check_queries(&running, 6, 3, 9).await;
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebuild_leaves_damaged_and_foreign_files_out() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let files = store(&running, dir.path(), 9).await;
    running.shutdown().await;
    damage(&files);
    let hour = files[0].parent().unwrap();
    let (day, tenant) = (hour.parent().unwrap(), hour.parent().unwrap().parent().unwrap());
    // Files and directories that someone else left at every level.
    for (dir, name) in
        [(hour, "lost+found"), (day, "24"), (day, "x y"), (tenant, "2026-13-01"), (tenant, ".DS_Store")]
    {
        fs::create_dir(dir.join(name)).unwrap();
        fs::write(dir.join(format!("{name}.txt")), b"stray").unwrap();
    }
    fs::write(day.join("23x"), b"stray").unwrap();
    fs::write(hour.join("notes.pb.gz"), b"stray").unwrap();
    fs::write(hour.join("notes.segment"), b"stray").unwrap();
    fs::copy(&files[8], hour.join("01ARZ3NDEKTSV4RRFFQ69G5FAV.segment")).unwrap();
    fs::set_permissions(tenant.join(".DS_Store"), fs::Permissions::from_mode(0o000)).unwrap();
    // An index without content, as a power cut can leave it.
    fs::write(dir.path().join("index.redb"), b"").unwrap();
    let running = start(dir.path()).await;
    let corrupt = metric(running.http_addr, "gannet_collector_store_objects_corrupt_total").await as u64;
    assert_eq!(corrupt, 3, "zeros, no bytes, and the copy under another id");
    // The index part of the cut file is complete.
    check_queries(&running, 5, 1, 6).await;
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn retention_removes_unreadable_objects() {
    let dir = tempfile::tempdir().unwrap();
    let running = start(dir.path()).await;
    let hour_ms = 3_600_000;
    let mut pusher = Pusher::open(running.grpc_addr).await;
    for i in 0..4 {
        pusher.store(batch("shop", now_ms() - 3 * hour_ms + i, &[("main", 1)])).await;
    }
    pusher.store(batch("shop", now_ms(), &[("main", 1)])).await;
    drop(pusher);
    running.shutdown().await;
    let files = objects(dir.path());
    assert_eq!(files.len(), 5);
    let newest = files.iter().max_by_key(|file| (*file).clone()).unwrap().clone();
    // Of three hours ago, as their directory says.
    let old = hour_dir(dir.path(), now_ms() - 3 * hour_ms);
    fs::create_dir_all(&old).unwrap();
    for file in files.iter().filter(|file| **file != newest) {
        zero(file);
        fs::rename(file, old.join(file.file_name().unwrap())).unwrap();
    }
    fs::remove_file(dir.path().join("index.redb")).unwrap();
    // Unreadable objects take space that counts.
    let running = start(dir.path()).await;
    assert!(metric(running.http_addr, "gannet_collector_store_bytes").await > 5.0 * 4096.0);
    running.shutdown().await;
    let config = config_with(dir.path(), |config| {
        config.store.retention_age = TimeSpan(Duration::from_millis(hour_ms));
        config.store.retention_interval = Duration::from_millis(50);
    });
    let running = Collector::start(config).await.unwrap();
    eventually("old unreadable objects are removed", || async { objects(dir.path()) == [newest.clone()] })
        .await;
    assert_eq!(list(&running).await.len(), 1);
    running.shutdown().await;
    // With nothing else left, the limit on bytes removes them, too.
    zero(&newest);
    fs::remove_file(dir.path().join("index.redb")).unwrap();
    let config = config_with(dir.path(), |config| {
        config.store.retention_bytes = ByteSize(1);
        config.ingest.max_batch_bytes = ByteSize(1);
        config.store.retention_interval = Duration::from_millis(50);
    });
    let running = Collector::start(config).await.unwrap();
    eventually("the last unreadable object is removed", || async { objects(dir.path()).is_empty() }).await;
    running.shutdown().await;
}
