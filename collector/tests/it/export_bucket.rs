//! `gannet-collector export` and `import` with buckets, whose server fails and whose collectors run.

use std::{fs, path::Path};

use gannet_base::TimeSpan;
use gannet_collector::{Collector, Config};

use crate::{
    bucket::{S3, in_bucket_at, program_with_access},
    export::{run, start_ms, stored, stored_in},
    faulty_s3::{FaultRates, FaultyS3},
    segment::unpack_layout2,
    store::{list, objects},
    support::{Pusher, batch, eventually, now_ms},
};

const MINUTE_MS: u64 = 60_000;
const HERE: &str = "s3://bucket/profiles/here";
const THERE: &str = "s3://bucket/profiles/there";
/// Faults of 1,000 requests: about one of three commands fails.
const RATES: FaultRates =
    FaultRates { unavailable: 40, slow: 10, lost: 30, failed: 30, refused: 0, outages: 25, late: 0 };
/// Attempts of one command, at most.
const ATTEMPTS: usize = 60;

fn config(local: &Path, endpoint: &str, url: &str) -> Config {
    let mut config = in_bucket_at(local, endpoint, url);
    // The objects of the older layout are old.
    config.store.retention_age = TimeSpan::from_secs(100 * 365 * 86_400);
    config
}

/// Runs a command until it succeeds, as a person does. Returns what it printed, and the number of failures.
async fn repeat(endpoint: &str, verb: &str, url: &str, args: &[&str]) -> (String, usize) {
    for failures in 0..ATTEMPTS {
        let mut command = program_with_access(endpoint);
        command.args([verb, "--data", url]).args(args);
        command.env("GANNET_COLLECTOR_RETENTION_AGE", "36500d");
        // The server of the bucket runs in this process.
        let out = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
        let text = [out.stdout, out.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
        match out.status.code() {
            Some(0) => return (text, failures),
            // A bucket that does not answer is no damage, which has another code.
            Some(2) => assert!(text.contains("s3://bucket/profiles/"), "{text}"),
            code => panic!("{verb}: {code:?}: {text}"),
        }
    }
    panic!("{verb} does not succeed");
}

/// Fills a prefix of the bucket with segments, and with objects of the older layout.
async fn fill(s3: &S3, dir: &Path, collector: std::net::SocketAddr) {
    for round in 0..6 {
        let batches: Vec<_> = (0..12)
            .map(|i| {
                let stacks = [("main;work", 1 + i), ("main;wait", 7 + round)];
                let service = ["shop", "search", "mail"][i as usize % 3];
                batch(service, now_ms() - (5 + i as u64 * 15) * MINUTE_MS, &stacks)
            })
            .collect();
        Pusher::open(collector).await.store_all(&batches).await;
    }
    let older = dir.join("older");
    fs::create_dir_all(&older).unwrap();
    unpack_layout2(&older);
    let mut shelf = s3.0.lock().unwrap();
    for path in objects(&older) {
        let name = path.strip_prefix(older.join("objects")).unwrap().to_str().unwrap();
        shelf.objects.insert(format!("profiles/here/{name}"), fs::read(&path).unwrap().into());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_bucket_is_copied_exactly_beside_collectors() {
    let (s3, dir) = (S3::default(), tempfile::tempdir().unwrap());
    let (proxy, endpoint) = FaultyS3::serve(s3.clone().serve().await, 11).await;
    let start = async |name: &str, url| {
        Collector::start(config(&dir.path().join(name), &endpoint, url)).await.unwrap()
    };
    let first = start("first", HERE).await;
    fill(&s3, dir.path(), first.grpc_addr).await;
    first.shutdown().await;
    let source = start("source", HERE).await;
    let target = start("target", THERE).await;
    let everything = stored(&source).await;
    let (from, until) = (now_ms() - 100 * MINUTE_MS, now_ms() - 40 * MINUTE_MS);
    let mut wanted = everything.clone();
    wanted.retain(|_, (info, _)| {
        (from..until).contains(&start_ms(info)) && info.labels["service_name"] != "mail"
    });
    assert!(wanted.len() >= 12 && everything.len() > 72, "{} of {}", wanted.len(), everything.len());
    let (part, all) = (dir.path().join("part.tar"), dir.path().join("all.tar"));
    let (part, all) = (part.to_str().unwrap(), all.to_str().unwrap());

    proxy.set_rates(RATES);
    let range = ["--from", &from.to_string(), "--until", &until.to_string()];
    let query = ["--query", "{service_name!=\"mail\"}", "--output", part];
    let (text, mut failures) = repeat(&endpoint, "export", HERE, &[&range[..], &query].concat()).await;
    assert!(text.contains(&format!("exported {} profiles of ", wanted.len())), "{text}");
    let (text, failed) = repeat(&endpoint, "export", HERE, &["-o", all]).await;
    assert!(text.contains(&format!("exported {} profiles of ", everything.len())), "{text}");
    failures += failed;
    for file in [part, part, all, all] {
        failures += repeat(&endpoint, "import", THERE, &[file]).await.1;
    }
    // A file of the store itself adds nothing, although its segments are read again.
    let objects_before = s3.0.lock().unwrap().objects.len();
    for (file, url) in [(all, THERE), (part, HERE), (all, HERE)] {
        let (text, failed) = repeat(&endpoint, "import", url, &[file]).await;
        assert!(text.contains("imported 0 profiles of 0 bytes"), "{text}");
        failures += failed;
    }
    assert_eq!(s3.0.lock().unwrap().objects.len(), objects_before);
    assert!(failures > 0, "no command failed, and the test has tested nothing: {:?}", proxy.counts());
    proxy.set_rates(FaultRates::default());

    // The running collector, another one without an index, and the source.
    eventually("the collector shows the import", async || list(&target).await.len() == everything.len())
        .await;
    assert_eq!(stored(&target).await, everything);
    let fresh = start("fresh", THERE).await;
    assert_eq!(stored(&fresh).await, everything);
    assert_eq!(stored(&source).await, everything);
    for running in [source, target, fresh] {
        running.shutdown().await;
    }
    // From a bucket into a directory.
    let data = dir.path().join("data");
    let (code, text) = run("import", &data, &[part]);
    assert!(code == Some(0) && text.starts_with(&format!("imported {} profiles", wanted.len())), "{text}");
    assert_eq!(stored_in(&data).await, wanted);
}
