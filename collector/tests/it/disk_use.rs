//! The disk use of a store under many small batches.

use std::{os::unix::fs::MetadataExt as _, path::Path};

use gannet_base::ByteSize;
use gannet_collector::{Collector, Running};
use gannet_proto::ingest::push_response::Message;

use crate::support::{Pusher, batch, config_with, eventually, metric, now_ms};

/// Everything that retention does not concern: an empty index, the audit log, rules and nodes.
const FIXED_BYTES: u64 = 2 << 20;

/// Returns the bytes of a file or of a whole directory on the disk, as `du` counts them.
fn disk_use(path: &Path) -> u64 {
    let Ok(meta) = path.symlink_metadata() else { return 0 };
    let below = if meta.is_dir() {
        std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| disk_use(&entry.path())).sum()
    } else {
        0
    };
    meta.blocks() * 512 + below
}

/// Pushes small batches over many series, which start in the last `spread_ms`. Returns the largest disk use seen.
async fn push(running: &Running, data: &Path, batches: u64, series: u64, spread_ms: u64) -> u64 {
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let (first, mut waiting, mut largest) = (now_ms() - spread_ms, 0, 0);
    for i in 0..batches {
        let mut batch =
            batch(&format!("service-{}", i % series), first + i * spread_ms / batches, &[("main;work", 1)]);
        batch.labels.insert("pod".into(), format!("pod-{:0100}", i % series));
        assert!(pusher.send(batch).await);
        waiting += 1;
        while waiting >= 32 || (waiting > 0 && i + 1 == batches) {
            let answer = pusher.answer().await;
            assert!(matches!(answer, Some(Message::Accepted(_))), "{answer:?}");
            waiting -= 1;
        }
        if i % 500 == 0 {
            largest = largest.max(disk_use(data));
        }
    }
    largest
}

/// Checks that everything below `--data` stays within the limit and a fixed rest.
async fn stays_within(limit: u64, batches: u64, series: u64, spread_ms: u64) {
    let dir = tempfile::tempdir().unwrap();
    let config = config_with(dir.path(), |config| {
        config.store.retention_bytes = ByteSize(limit);
        config.ingest.max_batch_bytes = ByteSize(64 << 10);
    });
    let running = Collector::start(config).await.unwrap();
    let largest = push(&running, dir.path(), batches, series, spread_ms).await;
    eventually("the store is within its limit", || async {
        metric(running.http_addr, "gannet_collector_store_bytes").await <= limit as f64
    })
    .await;
    let kept = metric(running.http_addr, "gannet_collector_store_profiles").await as u64;
    assert!(kept < batches, "retention has removed something");
    assert!(kept * 12 * 1024 > limit, "and has kept what fits, {kept} profiles");
    let last = disk_use(dir.path());
    assert!(last <= limit + FIXED_BYTES && largest <= limit + FIXED_BYTES, "{last} and {largest} of {limit}");
    running.shutdown().await;
    let after = disk_use(dir.path());
    assert!(after <= limit + FIXED_BYTES, "{after} of {limit} after the end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_use_stays_within_the_limit_with_many_series() {
    stays_within(4 << 20, 4000, 700, 3_600_000).await;
}
