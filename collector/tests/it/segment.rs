//! Segments: their number, their damage, and the layout before them.

use std::{
    collections::BTreeMap,
    fs,
    io::Read as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use gannet_base::TimeSpan;
use gannet_collector::{Collector, Running};
use gannet_proto::{
    ingest::Batch,
    query::{FlameGraphRequest, FlameGraphResponse, Selection},
};

use crate::{
    store::{list, objects},
    support::{Pusher, at, batch, config_with, download, metric, now_ms, queries, start},
};

/// Batches of some services with profiles of several sizes, and one that carries no sample.
fn varied(n: usize) -> Vec<Batch> {
    let stacks = |i: usize| (0..i % 50).map(move |k| (format!("main;f{i};g{k}"), 1 + k as i64)).collect();
    let batches = (0..n).map(|i| {
        let stacks: Vec<(String, i64)> = stacks(i);
        let stacks: Vec<(&str, i64)> = stacks.iter().map(|(stack, n)| (stack.as_str(), *n)).collect();
        batch(&format!("s{}", i % 5), now_ms() - i as u64, &stacks)
    });
    batches.collect()
}

async fn flame_graph(running: &Running) -> FlameGraphResponse {
    let selection = Selection { from: Some(at(0)), ..Selection::default() };
    let request = FlameGraphRequest { selection: Some(selection), ..FlameGraphRequest::default() };
    queries(running).await.flame_graph(request).await.unwrap().into_inner()
}

/// Checks that exactly these batches are stored, to the last byte.
async fn check_stored(running: &Running, batches: &[Batch]) {
    let mut listed: Vec<_> = list(running).await.into_iter().map(|profile| profile.id).collect();
    listed.sort_unstable();
    let mut sent: Vec<_> = batches.iter().map(|batch| batch.batch_id.clone()).collect();
    sent.sort_unstable();
    assert_eq!(listed, sent);
    for batch in batches {
        assert_eq!(download(running, &batch.batch_id).await.unwrap(), batch.pprof);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_flush_writes_one_segment_with_what_was_sent() {
    let dir = tempfile::tempdir().unwrap();
    let config = config_with(dir.path(), |config| {
        config.store.flush_interval = TimeSpan(Duration::from_millis(300));
    });
    let running = Collector::start(config).await.unwrap();
    let (batches, began) = (varied(400), Instant::now());
    let pushers = batches.chunks(100).map(|part| {
        let (part, addr) = (part.to_vec(), running.grpc_addr);
        tokio::spawn(async move { Pusher::open(addr).await.store_all(&part).await })
    });
    for pusher in pushers.collect::<Vec<_>>() {
        assert_eq!(pusher.await.unwrap(), (0, 0));
    }
    let (took, segments) = (began.elapsed(), objects(dir.path()).len());
    assert!(segments as f64 <= took.as_secs_f64() / 0.3 + 2.0, "{segments} segments in {took:?}");
    assert_eq!(
        metric(running.http_addr, "gannet_collector_store_segments_written_total").await as usize,
        segments
    );
    check_stored(&running, &batches).await;
    let graph = flame_graph(&running).await;
    running.shutdown().await;

    // The segments alone hold everything.
    fs::remove_file(dir.path().join("index.redb")).unwrap();
    let running = start(dir.path()).await;
    check_stored(&running, &batches).await;
    assert_eq!(flame_graph(&running).await.total, graph.total);
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_bytes_start_a_flush_early() {
    let dir = tempfile::tempdir().unwrap();
    let config = config_with(dir.path(), |config| {
        config.store.flush_interval = TimeSpan::from_secs(10);
        config.store.flush_bytes = 1;
    });
    let running = Collector::start(config).await.unwrap();
    let began = Instant::now();
    Pusher::open(running.grpc_addr).await.store_all(&varied(3)).await;
    assert!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
    running.shutdown().await;
}

/// Stores three segments. Returns the batches of each with its file.
async fn three_segments(data: &Path) -> Vec<(Vec<Batch>, PathBuf)> {
    let config = config_with(data, |config| {
        config.store.flush_interval = TimeSpan::from_secs(1);
    });
    let running = Collector::start(config).await.unwrap();
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let mut segments: Vec<(Vec<Batch>, PathBuf)> = Vec::new();
    for _ in 0..3 {
        // Smaller than the window of a stream, and gathered together until a second after the last flush.
        let batches: Vec<_> = varied(21).split_off(1);
        pusher.store_all(&batches).await;
        let is_new = |path: &PathBuf| segments.iter().all(|(_, known)| known != path);
        let new: Vec<_> = objects(data).into_iter().filter(is_new).collect();
        assert_eq!(new.len(), 1, "one flush took all");
        segments.push((batches, new[0].clone()));
    }
    drop(pusher);
    running.shutdown().await;
    segments
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_to_a_segment_costs_no_other_profile() {
    let dir = tempfile::tempdir().unwrap();
    let segments = three_segments(dir.path()).await;
    let [(zeroed, zeroed_path), (cut, cut_path), (whole, whole_path)] = &segments[..] else { panic!() };
    let before = fs::read(cut_path).unwrap();
    fs::write(zeroed_path, vec![0; fs::metadata(zeroed_path).unwrap().len() as usize]).unwrap();
    // Without the last two thirds of the profiles.
    let end = 20 + u32::from_le_bytes(before[12..16].try_into().unwrap()) as usize;
    let kept = end + (before.len() - end) / 3;
    fs::write(cut_path, &before[..kept]).unwrap();
    let name = whole_path.file_name().unwrap().to_str().unwrap();
    let flipped = if name.starts_with("01Z") { "01A" } else { "01Z" };
    fs::copy(whole_path, whole_path.with_file_name(format!("{flipped}{}", &name[3..]))).unwrap();
    // A segment of a newer version.
    let mut newer = fs::read(whole_path).unwrap();
    newer[8] = 9;
    let last = if name[25..].starts_with('7') { '8' } else { '7' };
    fs::write(whole_path.with_file_name(format!("{}{last}.segment", &name[..25])), newer).unwrap();

    // With the rows from before, and with rebuilt ones.
    for is_rebuilt in [false, true] {
        if is_rebuilt {
            fs::remove_file(dir.path().join("index.redb")).unwrap();
        }
        let running = start(dir.path()).await;
        let corrupt =
            metric(running.http_addr, "gannet_collector_store_objects_corrupt_total").await as usize;
        assert_eq!(
            corrupt,
            if is_rebuilt { 3 } else { 2 },
            "the copy, the newer one, and the zeroed one without rows"
        );
        let listed: BTreeMap<_, _> =
            list(&running).await.into_iter().map(|profile| (profile.id, profile.start)).collect();
        assert_eq!(listed.len(), if is_rebuilt { 40 } else { 60 }, "nothing is doubled");
        for batch in whole {
            assert_eq!(download(&running, &batch.batch_id).await.unwrap(), batch.pprof);
        }
        let mut readable = 0;
        for batch in cut {
            match download(&running, &batch.batch_id).await {
                Ok(bytes) => {
                    assert_eq!(bytes, batch.pprof);
                    readable += 1;
                }
                Err(status) => assert_eq!(status.code(), tonic::Code::DataLoss, "{status}"),
            }
        }
        assert!((1..=10).contains(&readable), "{readable} profiles before the cut");
        for batch in zeroed {
            let code = download(&running, &batch.batch_id).await.unwrap_err().code();
            assert_eq!(code, if is_rebuilt { tonic::Code::NotFound } else { tonic::Code::DataLoss });
        }
        let graph = flame_graph(&running).await;
        let unreadable = if is_rebuilt { 20 - readable } else { 40 - readable };
        assert_eq!((graph.profiles, graph.unreadable_profiles), (20 + readable, unreadable));
        running.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_segment_takes_only_its_own_rows() {
    let dir = tempfile::tempdir().unwrap();
    let segments = three_segments(dir.path()).await;
    fs::remove_file(&segments[1].1).unwrap();
    let running = start(dir.path()).await;
    let rest: Vec<Batch> = [segments[0].0.clone(), segments[2].0.clone()].concat();
    check_stored(&running, &rest).await;
    // An agent that still has the batches can send them again.
    Pusher::open(running.grpc_addr).await.store_all(&segments[1].0).await;
    assert_eq!(list(&running).await.len(), 60);
    running.shutdown().await;
}

/// Profiles that start long ago expire although younger ones share their segment.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_profile_expires_before_its_segment() {
    let dir = tempfile::tempdir().unwrap();
    let age = Duration::from_secs(3600);
    let config = config_with(dir.path(), |config| {
        config.store.retention_age = TimeSpan(age);
        config.store.retention_interval = Duration::from_millis(50);
        config.store.flush_interval = TimeSpan(Duration::from_millis(300));
    });
    let running = Collector::start(config).await.unwrap();
    let soon_old = now_ms() - age.as_millis() as u64 + 2500;
    let old = batch("old", soon_old, &[("main", 1)]);
    let young = batch("young", now_ms(), &[("main", 1)]);
    let mut pusher = Pusher::open(running.grpc_addr).await;
    pusher.store_all(&[old.clone(), young.clone()]).await;
    assert_eq!(objects(dir.path()).len(), 1, "one segment has both");
    check_stored(&running, &[old, young.clone()]).await;
    crate::support::eventually("the old one is gone", || async { list(&running).await.len() == 1 }).await;
    check_stored(&running, std::slice::from_ref(&young)).await;
    assert_eq!(objects(dir.path()).len(), 1);
    running.shutdown().await;
    // A start does not bring it back.
    let running = start(dir.path()).await;
    check_stored(&running, &[young]).await;
    running.shutdown().await;
}

/// Unpacks a store that the version before segments wrote.
pub fn unpack_layout2(data: &Path) {
    let archive = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/layout2.tar.gz");
    let status = std::process::Command::new("tar").arg("-xzf").arg(archive).arg("-C").arg(data).status();
    assert!(status.unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_from_before_segments_stays_readable() {
    let dir = tempfile::tempdir().unwrap();
    unpack_layout2(dir.path());
    let files = objects(dir.path());
    assert!(files.len() >= 6 && files.iter().all(|path| path.to_string_lossy().ends_with(".pb.gz")));
    let start = || {
        Collector::start(config_with(dir.path(), |config| {
            config.store.retention_age = TimeSpan::from_secs(100 * 365 * 86_400);
        }))
    };
    for is_rebuilt in [false, true] {
        if is_rebuilt {
            fs::remove_file(dir.path().join("index.redb")).unwrap();
        }
        let running = start().await.unwrap();
        let rebuilds =
            metric(running.http_addr, "gannet_collector_store_index_rebuilds_total").await as usize;
        assert_eq!(rebuilds, usize::from(is_rebuilt), "the index is taken over");
        for file in &files {
            let id = file.file_name().unwrap().to_str().unwrap().trim_end_matches(".pb.gz");
            // The file is the profile behind an empty gzip member with the metadata.
            let (mut own, mut sent) = (Vec::new(), Vec::new());
            flate2::read::MultiGzDecoder::new(fs::File::open(file).unwrap()).read_to_end(&mut own).unwrap();
            let downloaded = download(&running, id).await.unwrap();
            flate2::read::GzDecoder::new(&downloaded[..]).read_to_end(&mut sent).unwrap();
            assert_eq!(own, sent, "{id}");
        }
        // Both layouts answer one query.
        let mut pusher = Pusher::open(running.grpc_addr).await;
        pusher.store(batch("new", now_ms(), &[("main;work", 1)])).await;
        let new = 1 + usize::from(is_rebuilt);
        assert_eq!(list(&running).await.len(), files.len() + new);
        let graph = flame_graph(&running).await;
        assert_eq!((graph.profiles, graph.unreadable_profiles), ((files.len() + new) as u64, 0));
        drop(pusher);
        running.shutdown().await;
    }
    // Retention ends the old layout.
    let config = config_with(dir.path(), |config| config.store.retention_age = TimeSpan::from_secs(60));
    let running = Collector::start(config).await.unwrap();
    crate::support::eventually("old objects are gone", || async {
        objects(dir.path()).iter().all(|path| path.extension().is_some_and(|end| end == "segment"))
    })
    .await;
    running.shutdown().await;
}
