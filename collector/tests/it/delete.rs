//! `gannet-collector delete`: profiles by labels and times, from segments, older objects and tables.

use std::{collections::BTreeSet, fs, path::Path, time::Duration};

use gannet_base::TimeSpan;
use gannet_collector::{Collector, Config, Running};
use gannet_proto::{
    ingest::Batch,
    query::{FlameGraphRequest, Selection},
};

use crate::{
    export::run,
    segment::unpack_layout2,
    store::objects,
    support::{Pusher, at, batch, config_with, now_ms, queries},
    table::{files_below, sent_sums, sums, up_to_date},
};

fn delete(data: &Path, args: &[&str]) -> (Option<i32>, String) {
    run("delete", data, args)
}

/// Returns the configuration of a store with tables, and with objects of all ages.
pub fn config(data: &Path) -> Config {
    config_with(data, |config| {
        // All batches of one push are in one segment.
        config.store.flush_interval = TimeSpan(Duration::from_millis(300));
        // The objects of the older layout are old.
        config.store.retention_age = TimeSpan::from_secs(100 * 365 * 86_400);
        config.table.table = true;
        config.table.table_interval = TimeSpan(Duration::from_millis(100));
    })
}

/// Returns the number of readable and unreadable profiles of a service.
pub async fn profiles(running: &Running, service: &str) -> (u64, u64) {
    let selection = Some(Selection {
        query: format!("{{service_name=\"{service}\"}}"),
        from: Some(at(now_ms() - 5 * 3_600_000)),
        ..Selection::default()
    });
    let request = FlameGraphRequest { selection, ..FlameGraphRequest::default() };
    let graph = queries(running).await.flame_graph(request).await.unwrap().into_inner();
    (graph.profiles, graph.unreadable_profiles)
}

/// Reports whether a file of the objects or tables holds these bytes.
pub fn is_anywhere(data: &Path, text: &str) -> bool {
    let has = |bytes: &[u8]| bytes.windows(text.len()).any(|part| part == text.as_bytes());
    objects(data).iter().any(|path| has(&fs::read(path).unwrap()))
        || data.join("table").is_dir() && files_below(&data.join("table")).values().any(|file| has(file))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletion_takes_the_matching_profiles_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path();
    let running = Collector::start(config(data)).await.unwrap();
    let (now, old) = (now_ms(), now_ms() - 2 * 3_600_000);
    let mut sent: Vec<Batch> = Vec::new();
    for round in 0..3 {
        let mut new = vec![
            batch("secret", now, &[("main;work", round + 1)]),
            batch("shop", old, &[("main;sell", round + 1)]),
            batch("shop", now, &[("main;sell", round + 2)]),
            batch("other", old, &[("main;rest", round + 3)]),
        ];
        if round == 2 {
            // A segment without any other profile.
            new.truncate(1);
        }
        Pusher::open(running.grpc_addr).await.store_all(&new).await;
        sent.extend(new);
    }
    up_to_date(running.http_addr).await;
    let (code, text) = delete(data, &["--query", "{}", "--yes"]);
    assert!(code == Some(2) && text.contains("another collector uses"), "{text}");
    running.shutdown().await;
    unpack_layout2(data);
    let former = objects(data).iter().filter(|path| path.to_string_lossy().ends_with(".pb.gz")).count();
    assert!(is_anywhere(data, "secret") && former > 0);

    let before: BTreeSet<_> = objects(data).into_iter().map(|path| fs::read(path).unwrap()).collect();
    let selector = "{service_name=\"secret\"}";
    let (code, text) = delete(data, &["--query", selector]);
    assert_eq!(code, Some(0), "{text}");
    assert!(
        text.starts_with("found 3 profiles of ") && text.contains(" in 3 objects; nothing is deleted"),
        "{text}"
    );
    let after: BTreeSet<_> = objects(data).into_iter().map(|path| fs::read(path).unwrap()).collect();
    assert!(before == after && data.join("table/samples").is_dir() && !is_audited(data, selector));

    let (code, text) = delete(data, &["--query", selector, "--yes"]);
    assert!(code == Some(0) && text.starts_with("deleted 3 profiles of "), "{text}");
    assert!(!is_anywhere(data, "secret"));
    assert!(is_audited(data, selector));
    let shop = ["--query", "{service_name=\"shop\"}", "--until", "now-1h", "--yes"];
    let (code, text) = delete(data, &shop);
    assert!(code == Some(0) && text.starts_with("deleted 2 profiles of "), "{text}");
    let (code, text) = delete(data, &shop);
    assert!(code == Some(0) && text.starts_with("deleted 0 profiles of "), "{text}");

    let running = Collector::start(config(data)).await.unwrap();
    assert_eq!(profiles(&running, "secret").await, (0, 0));
    assert_eq!(profiles(&running, "shop").await, (2, 0));
    assert_eq!(profiles(&running, "other").await, (2, 0));
    up_to_date(running.http_addr).await;
    running.shutdown().await;
    let left = sent.iter().filter(|batch| match batch.labels["service_name"].as_str() {
        "secret" => false,
        "shop" => batch.start.as_ref().unwrap().seconds as u64 > (now - 3_600_000) / 1000,
        _ => true,
    });
    assert_eq!(sums(&files_below(&data.join("table"))), sent_sums(left));
    let still = objects(data).iter().filter(|path| path.to_string_lossy().ends_with(".pb.gz")).count();
    assert_eq!(still, former, "objects of the older layout do not match");

    let (code, text) = delete(data, &["--query", "{}", "--yes"]);
    assert!(code == Some(0) && text.starts_with(&format!("deleted {} profiles of ", 4 + former)), "{text}");
    assert!(objects(data).is_empty());
}

pub fn is_audited(data: &Path, selector: &str) -> bool {
    fs::read_to_string(data.join("rules/audit.jsonl")).is_ok_and(|text| {
        let entries = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
        { entries }.any(|entry| {
            entry["action"] == "delete-profiles" && entry["note"].as_str().unwrap().contains(selector)
        })
    })
}

/// Checks that a damaged profile of a segment that is written again stays damaged, and that bad arguments change nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletion_keeps_damage_visible_and_names_bad_arguments() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path();
    let running = Collector::start(config(data)).await.unwrap();
    let batches: Vec<Batch> =
        ["a", "b", "c"].iter().map(|service| batch(service, now_ms(), &[("main", 1)])).collect();
    Pusher::open(running.grpc_addr).await.store_all(&batches).await;
    running.shutdown().await;
    let segment = objects(data).pop().unwrap();
    let mut bytes = fs::read(&segment).unwrap();
    // The last profile.
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&segment, bytes).unwrap();
    for (args, wanted) in [
        (&["--query", "{a=", "--yes"][..], "--query: "),
        (&["--query", "{}", "--from", "yesterday"], "`yesterday` is not a time"),
    ] {
        let (code, text) = delete(data, args);
        assert!(code == Some(2) && text.contains(wanted), "{text}");
    }
    assert_eq!(delete(dir.path().join("none").as_path(), &["--query", "{}", "--yes"]).0, Some(2));

    let (code, text) = delete(data, &["--query", "{service_name=\"a\"}", "--yes"]);
    assert!(code == Some(0) && text.contains("deleted 1 profiles"), "{text}");
    let running = Collector::start(config(data)).await.unwrap();
    assert_eq!(profiles(&running, "a").await, (0, 0));
    let (b, c) = (profiles(&running, "b").await, profiles(&running, "c").await);
    assert!([b, c] == [(1, 0), (0, 1)] || [b, c] == [(0, 1), (1, 0)], "{b:?} {c:?}");
    running.shutdown().await;
}
