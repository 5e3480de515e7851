//! `gannet-collector export` and `import`: a time range of one store in another one.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

use gannet_base::TimeSpan;
use gannet_collector::{Collector, Running};
use gannet_proto::query::ProfileInfo;

use crate::{
    delete::config,
    segment::unpack_layout2,
    store::{list, objects},
    support::{Pusher, TEST_TIMEOUT, batch, download, now_ms},
    table::up_to_date,
};

const MINUTE_MS: u64 = 60_000;

fn command(verb: &str, data: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gannet-collector"));
    command.args([verb, "--data", data.to_str().unwrap()]).args(args).stdin(Stdio::null());
    command
}

/// Runs it. Returns the exit code and all that it printed.
pub fn run(verb: &str, data: &Path, args: &[&str]) -> (Option<i32>, String) {
    let out = command(verb, data, args).output().unwrap();
    let text = [out.stdout, out.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (out.status.code(), text)
}

#[track_caller]
fn succeed(verb: &str, data: &Path, args: &[&str]) -> String {
    let (code, text) = run(verb, data, args);
    assert_eq!(code, Some(0), "{verb}: {text}");
    text
}

/// Descriptions and bytes of profiles, by id.
pub type Profiles = BTreeMap<String, (ProfileInfo, Vec<u8>)>;

pub async fn stored(running: &Running) -> Profiles {
    let mut profiles = Profiles::new();
    for info in list(running).await {
        let bytes = download(running, &info.id).await.unwrap();
        assert!(profiles.insert(info.id.clone(), (info, bytes)).is_none(), "a profile is stored twice");
    }
    profiles
}

/// Returns the profiles that a collector shows of a directory without one.
pub async fn stored_in(data: &Path) -> Profiles {
    let running = Collector::start(config(data)).await.unwrap();
    let profiles = stored(&running).await;
    running.shutdown().await;
    profiles
}

pub fn start_ms(info: &ProfileInfo) -> u64 {
    let start = info.start.as_ref().unwrap();
    start.seconds as u64 * 1000 + start.nanos as u64 / 1_000_000
}

/// Fills a store with profiles of three hours in some segments, in tables, and in objects of the older layout.
async fn fill(data: &Path) {
    let running = Collector::start(config(data)).await.unwrap();
    for round in 0..4 {
        let batches: Vec<_> = (0..12)
            .map(|i| {
                let service = ["shop", "search", "mail"][i as usize % 3];
                let stacks = [("main;work", 1 + i), ("main;wait", 7 + round)];
                batch(service, now_ms() - (5 + i as u64 * 15) * MINUTE_MS, &stacks)
            })
            .collect();
        Pusher::open(running.grpc_addr).await.store_all(&batches).await;
    }
    up_to_date(running.http_addr).await;
    running.shutdown().await;
    unpack_layout2(data);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_import_has_the_exported_range_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (data, other) = (dir.path().join("data"), dir.path().join("other"));
    let (part, all) = (dir.path().join("part.tar"), dir.path().join("all.tar"));
    let (part, all) = (part.to_str().unwrap(), all.to_str().unwrap());
    fill(&data).await;
    let running = Collector::start(config(&data)).await.unwrap();
    let everything = stored(&running).await;
    let (from, until) = (now_ms() - 100 * MINUTE_MS, now_ms() - 40 * MINUTE_MS);
    let mut wanted = everything.clone();
    wanted.retain(|_, (info, _)| {
        (from..until).contains(&start_ms(info)) && info.labels["service_name"] != "mail"
    });
    assert!(wanted.len() >= 8 && everything.len() > 48, "{} of {}", wanted.len(), everything.len());
    // The collector runs meanwhile.
    let range = ["--from", &from.to_string(), "--until", &until.to_string()];
    let query = ["--query", "{service_name!=\"mail\"}", "--output", part];
    let text = succeed("export", &data, &[&range[..], &query].concat());
    assert!(text.starts_with(&format!("exported {} profiles of ", wanted.len())), "{text}");
    succeed("export", &data, &["-o", all]);
    running.shutdown().await;

    let text = succeed("import", &other, &[part]);
    assert!(text.starts_with(&format!("imported {} profiles of ", wanted.len())), "{text}");
    assert_eq!(stored_in(&other).await, wanted);
    // Again, and from another export of the same segments.
    let files = objects(&other);
    let text = succeed("import", &other, &[part]);
    assert!(
        text.contains(&format!("imported 0 profiles of 0 bytes; {} were already there", wanted.len())),
        "{text}"
    );
    assert_eq!(objects(&other), files);
    let text = succeed("import", &other, &[all]);
    assert!(
        text.starts_with(&format!("imported {} profiles of ", everything.len() - wanted.len())),
        "{text}"
    );
    assert_eq!(stored_in(&other).await, everything);
    assert!(succeed("verify", &other, &[]).contains(": no faults"));
    // Into the store that it comes from.
    let files = objects(&data);
    for file in [part, all] {
        assert!(succeed("import", &data, &[file]).starts_with("imported 0 profiles of 0 bytes"));
    }
    assert_eq!(objects(&data), files);
    assert_eq!(stored_in(&data).await, everything);
    let mut short = command("import", &dir.path().join("short"), &[part]);
    let out = short.env("GANNET_COLLECTOR_RETENTION_AGE", "2m").output().unwrap();
    let text = String::from_utf8(out.stderr).unwrap();
    let expired =
        format!("{} profiles are older than --retention-age (2m), and the collector removes", wanted.len());
    assert!(out.status.success() && text.contains(&expired), "{text}");
    // Unpacked it is a store too.
    let unpacked = dir.path().join("unpacked/objects");
    fs::create_dir_all(&unpacked).unwrap();
    tar::Archive::new(fs::File::open(part).unwrap()).unpack(&unpacked).unwrap();
    assert_eq!(stored_in(unpacked.parent().unwrap()).await, wanted);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_a_damaged_file_is_imported() {
    let dir = tempfile::tempdir().unwrap();
    let (data, other) = (dir.path().join("data"), dir.path().join("other"));
    let file = dir.path().join("file.tar");
    let file = file.to_str().unwrap();
    fill(&data).await;
    succeed("export", &data, &["-o", file]);
    let sound = fs::read(file).unwrap();
    let fails = |bytes: &[u8], reasons: &[&str]| {
        fs::write(file, bytes).unwrap();
        let (code, text) = run("import", &other, &[file]);
        assert_eq!(code, Some(2), "{text}");
        assert!(
            text.contains("cannot import") && reasons.iter().any(|reason| text.contains(reason)),
            "{text}"
        );
        assert!(!other.exists(), "{text}");
    };
    for part in 0..12 {
        let cut = sound.len() * part / 12;
        fails(
            &sound[..cut],
            if cut < 512 { &["it is no file of"] } else { &["it is cut", "or the file is cut"] },
        );
    }
    // Bytes of headers, names, descriptions and profiles, but not between the entries, where tar has zeros.
    let content: Vec<usize> = (0..sound.len()).filter(|at| sound[*at] != 0).collect();
    for at in content.iter().step_by(content.len() / 40) {
        let mut bytes = sound.clone();
        bytes[*at] ^= 4;
        fails(&bytes, &["it is damaged", "it is no file of", "it is cut", "a newer program"]);
    }
    let mut swapped = sound.clone();
    let profile = sound.len() * 2 / 3;
    swapped.drain(profile - profile % 512..profile - profile % 512 + 512);
    fails(&swapped, &["it is damaged", "it is cut"]);
    fails(b"a letter", &["it is no file of `gannet-collector export`"]);
    fs::write(file, &sound).unwrap();
    succeed("import", &other, &[file]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_import_continues_and_doubles_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (data, other) = (dir.path().join("data"), dir.path().join("other"));
    let file = dir.path().join("file.tar");
    let file = file.to_str().unwrap();
    let mut quick = config(&data);
    quick.store.flush_interval = TimeSpan(Duration::from_millis(2));
    let running = Collector::start(quick).await.unwrap();
    let mut pusher = Pusher::open(running.grpc_addr).await;
    for i in 0..80 {
        pusher.store(batch("shop", now_ms() - i * MINUTE_MS, &[("main;work", 1 + i as i64)])).await;
    }
    drop(pusher);
    let everything = stored(&running).await;
    running.shutdown().await;
    succeed("export", &data, &["-o", file]);
    let mut was_partial = false;
    for stop in [3, 20, 50] {
        let mut child = command("import", &other, &[file]).stdout(Stdio::null()).spawn().unwrap();
        let deadline = std::time::Instant::now() + TEST_TIMEOUT;
        while !other.join("objects").is_dir() || objects(&other).len() < stop {
            assert!(std::time::Instant::now() < deadline, "the import does not go on");
            if child.try_wait().unwrap().is_some() {
                break;
            }
        }
        let _ = child.kill();
        child.wait().unwrap();
        was_partial |= objects(&other).len() < everything.len();
    }
    assert!(was_partial, "no kill hit an import");
    let text = succeed("import", &other, &[file]);
    assert!(text.contains("were already there"), "{text}");
    assert_eq!(stored_in(&other).await, everything);
    assert_eq!(objects(&other).len(), objects(&data).len());

    // A segment that became shorter is written again.
    let cut = objects(&other).pop().unwrap();
    let bytes = fs::read(&cut).unwrap();
    fs::write(&cut, &bytes[..bytes.len() - 1]).unwrap();
    assert!(succeed("import", &other, &[file]).starts_with("imported 1 profiles of "));
    assert_eq!(fs::read(&cut).unwrap(), bytes);
}

/// Checks that damage of the source is named and not exported, and that wrong arguments change nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_export_leaves_damage_out_and_names_bad_arguments() {
    let dir = tempfile::tempdir().unwrap();
    let (data, other) = (dir.path().join("data"), dir.path().join("other"));
    let file = dir.path().join("file.tar");
    let file = file.to_str().unwrap();
    let running = Collector::start(config(&data)).await.unwrap();
    let batches: Vec<_> = ["a", "b", "c"].iter().map(|name| batch(name, now_ms(), &[("main", 1)])).collect();
    Pusher::open(running.grpc_addr).await.store_all(&batches).await;
    let (code, text) = run("import", &data, &[file]);
    assert!(code == Some(2) && text.contains("No such file"), "{text}");
    succeed("export", &data, &["-o", file]);
    let (code, text) = run("import", &data, &[file]);
    assert!(code == Some(2) && text.contains("another collector uses"), "{text}");
    running.shutdown().await;
    let segment = objects(&data).pop().unwrap();
    let mut bytes = fs::read(&segment).unwrap();
    // The last profile.
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&segment, &bytes).unwrap();
    let (code, text) = run("export", &data, &["-o", file]);
    assert!(
        code == Some(1) && text.contains("exported 2 profiles") && text.contains("left out 1 damaged"),
        "{text}"
    );
    bytes.pop();
    fs::write(&segment, &bytes).unwrap();
    let (code, text) = run("export", &data, &["-o", file]);
    assert!(
        code == Some(1) && text.contains("exported 2 profiles") && text.contains("left out 1 damaged"),
        "{text}"
    );
    let text = succeed("import", &other, &[file]);
    assert!(text.starts_with("imported 2 profiles"), "{text}");
    assert_eq!(stored_in(&other).await.len(), 2);
    let before = fs::read(file).unwrap();
    for (args, wanted) in [
        (&["--query", "{a="][..], "--query: "),
        (&["--from", "yesterday"], "--from: `yesterday` is not a time"),
        (&["--from", "now", "--until", "now-1h"], "--from is not before --until"),
    ] {
        let (code, text) = run("export", &data, &[args, &["-o", file]].concat());
        assert!(code == Some(2) && text.contains(wanted), "{text}");
    }
    let (code, text) = run("export", &dir.path().join("none"), &["-o", file]);
    assert!(code == Some(2) && text.contains("cannot find the profiles"), "{text}");
    assert_eq!(fs::read(file).unwrap(), before);
}
