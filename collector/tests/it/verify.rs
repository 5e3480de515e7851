//! `gannet-collector verify`: damaged stores in a directory.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use gannet_base::TimeSpan;
use gannet_collector::Collector;

use crate::{
    segment::unpack_layout2,
    store::objects,
    support::{Pusher, batch, config_with, now_ms},
};

fn verify(data: &Path) -> Output {
    let program = Command::new(env!("CARGO_BIN_EXE_gannet-collector"))
        .args(["verify", "--data", data.to_str().unwrap()])
        .stdin(Stdio::null())
        .output();
    program.unwrap()
}

/// Runs it. Returns the reported faults by the name of the object, and the last line.
#[track_caller]
fn report(data: &Path, code: i32) -> (BTreeMap<String, String>, String) {
    let out = verify(data);
    let text = String::from_utf8(out.stdout).unwrap();
    assert_eq!(out.status.code(), Some(code), "{text}{}", String::from_utf8_lossy(&out.stderr));
    let (faults, last) = text.trim_end().rsplit_once('\n').unwrap_or(("", text.trim_end()));
    let faults = faults.lines().map(|line| {
        let (path, fault) = line.split_once(": ").unwrap();
        assert!(data.join("objects").join(path).exists(), "{path}");
        (path.rsplit_once('/').unwrap().1.to_owned(), fault.to_owned())
    });
    (faults.collect(), last.to_owned())
}

/// Stores three segments of four profiles, and returns their files.
pub async fn three_segments(data: &Path) -> Vec<PathBuf> {
    let stacks: Vec<_> =
        (0..300_i64).map(|i| (format!("main;f{};g{i}", i * i % 97), 1 + i * i % 89)).collect();
    let stacks: Vec<_> = stacks.iter().map(|(stack, n)| (stack.as_str(), *n)).collect();
    let batches: Vec<_> = (0..12).map(|i| batch(&format!("s{i}"), now_ms() - i, &stacks)).collect();
    let bytes = batches[0].pprof.len() as u64;
    assert!(batches.iter().all(|batch| batch.pprof.len() as u64 == bytes) && bytes > 2000, "{bytes}");
    let config = config_with(data, |config| {
        config.store.flush_interval = TimeSpan::from_secs(10);
        // Three batches with their metadata are smaller, and four are larger.
        config.store.flush_bytes = 4 * bytes;
    });
    let running = Collector::start(config).await.unwrap();
    let mut pusher = Pusher::open(running.grpc_addr).await;
    for four in batches.chunks(4) {
        assert_eq!(pusher.store_all(four).await, (0, 0));
    }
    drop(pusher);
    running.shutdown().await;
    let segments = objects(data);
    assert_eq!(segments.len(), 3);
    segments
}

/// Returns all files below a directory with their content.
fn content(data: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    objects(data).into_iter().map(|path| (path.clone(), fs::read(&path).unwrap())).collect()
}

/// Adds a faulty object of each kind to a store of three segments and these objects of the older layout. Returns the start of each fault
/// by the name of the object.
fn damage(data: &Path, segments: &[PathBuf], old: &[PathBuf]) -> BTreeMap<String, &'static str> {
    let whole = &segments[0];
    let bytes = fs::read(whole).unwrap();
    let name = whole.file_name().unwrap().to_str().unwrap();
    let index_end = 20 + u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
    let mut expected = BTreeMap::new();
    // Each gets the name of the segment with another ending, which is an id of its own.
    let mut put = |ending: char, id: bool, bytes: &[u8], fault: &'static str| {
        let other = format!("{}{ending}.segment", &name[..25]);
        assert!(!whole.with_file_name(&other).exists(), "{other}");
        let mut bytes = bytes.to_vec();
        // The id is the first field of the index part. Its checksum is in the header.
        if id && bytes.len() >= index_end {
            let own = ulid::Ulid::from_string(other.trim_end_matches(".segment")).unwrap();
            bytes[22..38].copy_from_slice(&own.0.to_be_bytes());
            let crc = crc32fast::hash(&bytes[20..index_end]);
            bytes[16..20].copy_from_slice(&crc.to_le_bytes());
        }
        fs::write(whole.with_file_name(&other), bytes).unwrap();
        expected.insert(other, fault);
    };
    let endings: Vec<char> =
        "0123456789ABCDEFGHJKMNPQRSTVWXYZ".chars().filter(|c| !name[25..].starts_with(*c)).collect();
    let flipped = |at: usize| {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1;
        bytes
    };
    put(endings[0], true, &[], "it is empty; restore");
    put(endings[1], false, &vec![0; bytes.len()], "its first bytes are zero; restore");
    put(endings[2], true, &bytes[..7], "it is cut within its index; restore");
    put(endings[3], true, &bytes[..index_end - 1], "it is cut within its index; restore");
    put(endings[4], true, &bytes[..index_end], "it is cut: 4 of 4 profiles are incomplete; restore");
    put(endings[5], true, &bytes[..bytes.len() - 1], "it is cut: 1 of 4 profiles are incomplete; restore");
    put(endings[6], true, &flipped(bytes.len() - 1), "1 of 4 profiles are damaged; restore");
    put(endings[7], true, &[&bytes[..], b"more"].concat(), "it has 4 bytes behind its last profile");
    put(endings[8], false, &bytes, "it is a copy of default/20");
    put(endings[9], false, &flipped(30), "it is no object of Gannet, or its description is damaged; restore");
    put(endings[10], false, &flipped(0), "it is no object of Gannet, or its description is damaged; restore");
    let mut newer = bytes.clone();
    newer[8] = 7;
    put(endings[11], false, &newer, "a newer collector wrote it, in version 7; upgrade");
    put(endings[12], true, &bytes, "");
    // Objects of the older layout.
    let cut = fs::read(&old[0]).unwrap();
    fs::write(&old[0], &cut[..cut.len() - 3]).unwrap();
    fs::write(&old[1], vec![0; 100]).unwrap();
    let name_of = |path: &Path| path.file_name().unwrap().to_str().unwrap().to_owned();
    let mut all: BTreeMap<String, &str> = expected;
    all.insert(name_of(&old[0]), "1 of 1 profiles are damaged; restore");
    all.insert(name_of(&old[1]), "its first bytes are zero; restore");
    // Under its own name in the directory of another hour: beside the right one, and in place of it.
    let elsewhere = data.join("objects/default/2020-01-01/05");
    fs::create_dir_all(&elsewhere).unwrap();
    fs::copy(&segments[1], elsewhere.join(name_of(&segments[1]))).unwrap();
    fs::rename(&segments[2], elsewhere.join(name_of(&segments[2]))).unwrap();
    all.insert(name_of(&segments[1]), "it is a copy of default/20");
    all.insert(name_of(&segments[2]), "it belongs into default/20");
    fs::write(elsewhere.join("notes.txt"), "not an object").unwrap();
    all.retain(|_, fault| !fault.is_empty());
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn verify_names_each_fault_with_its_cure() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path();
    let segments = three_segments(data).await;
    unpack_layout2(data);
    let mut old = objects(data);
    old.retain(|path| path.to_string_lossy().ends_with(".pb.gz"));
    assert_eq!(objects(data).len(), old.len() + 3);
    let (faults, last) = report(data, 0);
    assert!(faults.is_empty(), "{faults:?}");
    let profiles = old.len() + 12;
    assert!(last.starts_with(&format!("{} objects with {profiles} ", old.len() + 3)), "{last}");
    assert!(last.ends_with(": no faults"), "{last}");

    let all = damage(data, &segments, &old);
    let before = content(data);
    let (faults, last) = report(data, 1);
    let (found, wanted): (Vec<_>, Vec<_>) = (faults.keys().collect(), all.keys().collect());
    assert_eq!(found, wanted);
    for (name, fault) in &all {
        assert!(faults[name].starts_with(fault), "{name}: {}, not {fault}", faults[name]);
    }
    assert!(last.ends_with(&format!(": {} faults", all.len())), "{last}");
    assert!(content(data) == before, "it changes nothing");
}

fn repair(data: &Path) -> (Option<i32>, String, String) {
    let program = Command::new(env!("CARGO_BIN_EXE_gannet-collector"))
        .args(["repair", "--data", data.to_str().unwrap()])
        .stdin(Stdio::null())
        .output();
    let out = program.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (out.status.code(), text(out.stdout), text(out.stderr))
}

/// Checks that a repair moves the objects without a readable profile, and no other one, and that the collector returns the same
/// profiles before and after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repair_sets_faulty_objects_aside_and_keeps_the_rest() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path();
    let segments = three_segments(data).await;
    unpack_layout2(data);
    let mut old = objects(data);
    old.retain(|path| path.to_string_lossy().ends_with(".pb.gz"));
    let all = damage(data, &segments, &old);
    let before = content(data);
    let (faults, last) = report(data, 1);
    let sound = last.split(' ').nth(3).unwrap().to_owned();

    let (code, text, errors) = repair(data);
    assert_eq!(code, Some(1), "{text}{errors}");
    assert!(text.trim_end().ends_with(&format!("{} faults, 4 of them left", all.len())), "{text}");
    assert_eq!(
        text.lines().filter(|line| line.starts_with("  set aside as set-aside/default/")).count(),
        11,
        "{text}"
    );
    assert_eq!(text.lines().filter(|line| line.starts_with("  moved to default/")).count(), 1, "{text}");
    assert_eq!(text.lines().filter(|line| line.starts_with("  kept: ")).count(), 4, "{text}");
    let (left, _) = report(data, 1);
    let readable = |fault: &str| {
        fault.contains("1 of 4 profiles")
            || fault.contains("behind its last")
            || fault.contains("a newer collector")
    };
    assert!(left.len() == 4 && left.values().all(|fault| readable(fault)), "{left:?}");
    assert!(left.keys().all(|name| faults.contains_key(name)));
    // Nothing is deleted.
    let mut kept: Vec<Vec<u8>> = content(data).into_values().collect();
    let mut dirs = vec![data.join("set-aside")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { dirs.push(path) } else { kept.push(fs::read(path).unwrap()) }
        }
    }
    let mut all_before: Vec<Vec<u8>> = before.into_values().collect();
    all_before.sort_unstable();
    kept.sort_unstable();
    assert!(kept == all_before, "{} objects of {}", kept.len(), all_before.len());
    // Of the misplaced segment, four more profiles are readable.
    let (_, last) = report(data, 1);
    assert_eq!(
        last.split(' ').nth(3).unwrap().parse::<u64>().unwrap(),
        sound.parse::<u64>().unwrap() + 4,
        "{last}"
    );

    let running = Collector::start(config_with(data, |_| {})).await.unwrap();
    let (code, _, errors) = repair(data);
    assert!(code == Some(2) && errors.contains("another collector uses"), "{errors}");
    running.shutdown().await;
}

#[test]
fn verify_needs_a_store() {
    let dir = tempfile::tempdir().unwrap();
    let out = verify(dir.path());
    assert_eq!(out.status.code(), Some(2));
    let text = String::from_utf8(out.stderr).unwrap();
    assert!(
        text.contains("cannot find the profiles of a collector in") && text.contains("objects"),
        "{text}"
    );
    let (code, _, text) = repair(dir.path());
    assert!(code == Some(2) && text.contains("cannot find the profiles of a collector in"), "{text}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "it creates nothing");
}
