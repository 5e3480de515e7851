//! Recording rules: from pushed profiles to the counters of a scrape.

use std::{fs, time::Duration};

use gannet_collector::Collector;

use crate::support::{Pusher, TEST_TIMEOUT, batch, config_with, get, now_ms};

const RULES: &str = "rules:\n- name: work_cpu_seconds_total\n  function: work\n  selector: '{node=\"n1\"}'\n";

/// Returns the lines of a scrape that begin like this.
async fn scraped(addr: std::net::SocketAddr, begin: &str) -> Vec<String> {
    let text = get(addr, "/metrics").await.text();
    assert!(text.ends_with("# EOF\n") && text.matches("# EOF").count() == 1, "{text}");
    text.lines().filter(|line| line.starts_with(begin)).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn stored_profiles_count_once_in_a_scrape() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("recording.yaml");
    fs::write(&file, RULES).unwrap();
    let data = directory.path().join("data");
    let config = config_with(&data, |config| config.recording.recording_rules = Some(file.clone()));
    let running = Collector::start(config).await.unwrap();
    let mut pusher = Pusher::open(running.grpc_addr).await;
    let shop = batch("shop", now_ms() - 60_000, &[("main;work;sum", 3), ("main;idle", 50)]);
    let web = batch("web", now_ms() - 60_000, &[("main;work", 150)]);
    // The agent sends a batch again if it did not get the answer.
    pusher.store_all(&[shop.clone(), web]).await;
    pusher.store_all(&[shop]).await;
    let want = [
        "work_cpu_seconds_total{service_name=\"shop\"} 0.030000000",
        "work_cpu_seconds_total{service_name=\"web\"} 1.500000000",
    ];
    assert_eq!(scraped(running.http_addr, "work_cpu_seconds_total").await, want);

    fs::write(&file, RULES.replace("work", "idle")).unwrap();
    let changed = async {
        while scraped(running.http_addr, "# TYPE idle_cpu_seconds counter").await.is_empty() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(TEST_TIMEOUT, changed).await.unwrap();
    pusher.store_all(&[batch("shop", now_ms(), &[("main;idle", 50)])]).await;
    let want = ["idle_cpu_seconds_total{service_name=\"shop\"} 0.500000000"];
    assert_eq!(scraped(running.http_addr, "idle_cpu_seconds_total").await, want);
    assert_eq!(scraped(running.http_addr, "work_cpu").await, Vec::<String>::new());
    running.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mistake_in_the_file_stops_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("recording.yaml");
    let data = directory.path().join("data");
    let config = || config_with(&data, |config| config.recording.recording_rules = Some(file.clone()));
    let missing = Collector::start(config()).await.err().unwrap().to_string();
    assert!(missing.starts_with("--recording-rules ") && missing.contains("No such file"), "{missing}");
    fs::write(&file, RULES.replace("function:", "max_series: 0\n  function:")).unwrap();
    let wrong = Collector::start(config()).await.err().unwrap().to_string();
    assert!(wrong.contains("rules[0] (work_cpu_seconds_total): max_series: 0 is not between"), "{wrong}");
}
