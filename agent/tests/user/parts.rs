//! Profiles that a collector does not take as a whole.

use std::{collections::BTreeSet, fs, path::Path, sync::Arc, time::Duration};

use gannet_agent::{
    export::{Bounds, Spool, SpoolStats},
    ledger::{NodeLedger, Stage},
};
use gannet_proto::{
    ingest::Batch,
    ledger::LossReason,
    pprof::{self, Builder, Header, Line, Mapping, Merger, Profile},
};

const BOUNDS: Bounds = Bounds { bytes: 64 << 20, age: Duration::from_secs(3600) };
const LIMIT: u64 = 64 << 10;

struct Opened {
    spool: Spool,
    ledger: NodeLedger,
    stats: Arc<SpoolStats>,
}

fn open(dir: &Path, bounds: Bounds) -> Opened {
    let (ledger, stats) = (NodeLedger::new(), Arc::new(SpoolStats::default()));
    let spool = Spool::open(dir, bounds, ledger.clone(), Arc::clone(&stats)).unwrap();
    Opened { spool, ledger, stats }
}

impl Opened {
    fn append(&mut self, profile: &Profile) {
        let samples = profile.sample.iter().map(|sample| sample.value[0] as u64).sum();
        self.ledger.take(samples);
        self.ledger.pass(Stage::Window, Stage::Queue, samples);
        let batch = Batch {
            samples,
            pprof: pprof::encode(profile),
            labels: [("service_name".to_owned(), "shop".to_owned())].into(),
            rule_id: "r1".to_owned(),
            window_id: "w".to_owned(),
            ..Batch::default()
        };
        self.spool.append(vec![batch]).unwrap();
    }

    fn drain(&mut self, limit: u64) -> Vec<Batch> {
        std::iter::from_fn(|| self.spool.next(limit)).collect()
    }

    fn lost(&self, reason: LossReason) -> u64 {
        self.ledger.snapshot().lost.get(&reason).copied().unwrap_or_default()
    }
}

/// Text that compresses badly.
fn noise(seed: u64, len: usize) -> String {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let letter = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        char::from(b'a' + (state % 26) as u8)
    };
    (0..len).map(letter).collect()
}

/// Builds a profile with a function of its own in each sample. Its stack has `depth(number)` frames.
fn profile(samples: u64, name_len: usize, depth: impl Fn(u64) -> u64) -> Profile {
    let mut builder = Builder::new(Header {
        sample_types: &[("samples", "count"), ("cpu", "nanoseconds")],
        period_type: ("cpu", "nanoseconds"),
        period: 10,
        time_nanos: 1,
        duration_nanos: 2,
    });
    builder.comment("the ledger");
    let mapping =
        builder.mapping(Mapping { start: 0x1000, limit: 0x9000_0000, offset: 0, file: "/a", build_id: "ab" });
    for number in 0..samples {
        let name = noise(number, name_len);
        let stack: Vec<_> = (0..depth(number))
            .map(|level| {
                let line =
                    Line { name: &name, system_name: &name, file: "a.c", line: 1, column: 0, start_line: 1 };
                builder.location(Some(mapping), 0x1000 + number * 0x1_0000 + level, &[line])
            })
            .collect();
        builder.sample(&stack, &[3, 30], &[]);
    }
    builder.finish()
}

fn merged<'a>(profiles: impl IntoIterator<Item = &'a Profile>) -> Profile {
    let mut merger = Merger::new();
    profiles.into_iter().for_each(|profile| merger.add(profile).unwrap());
    let mut merged = merger.finish().unwrap();
    merged.duration_nanos = 0;
    merged
}

fn decoded(batch: &Batch) -> Profile {
    pprof::decode(&batch.pprof, 64 << 20).unwrap()
}

#[test]
fn a_profile_above_the_limit_arrives_in_parts() {
    let dir = tempfile::tempdir().unwrap();
    let mut opened = open(dir.path(), BOUNDS);
    let whole = profile(600, 1500, |_| 1);
    opened.append(&whole);
    let parts = opened.drain(LIMIT);
    assert!(parts.len() > 8 && parts.iter().all(|part| part.pprof.len() as u64 <= LIMIT), "{}", parts.len());
    let profiles: Vec<Profile> = parts.iter().map(decoded).collect();
    for (part, profile) in parts.iter().zip(&profiles) {
        assert_eq!(part.samples, profile.sample.iter().map(|sample| sample.value[0] as u64).sum::<u64>());
        assert_eq!((part.rule_id.as_str(), part.window_id.as_str(), part.labels.len()), ("r1", "w", 1));
    }
    assert_eq!(merged(&profiles), merged([&whole]));
    assert_eq!(opened.ledger.account_now().at_stage(Stage::Wire), 1800);
    let ids: BTreeSet<&String> = parts.iter().map(|part| &part.batch_id).collect();
    assert_eq!(ids.len(), parts.len());
    for id in ids {
        assert!(opened.spool.accepted(id, None));
    }
    let snapshot = opened.ledger.snapshot();
    assert_eq!((snapshot.taken, snapshot.delivered, snapshot.lost_total()), (1800, 1800, 0));
    assert_eq!(
        (opened.stats.split_batches(), opened.stats.bytes()),
        (1, 0),
        "and the whole has left the disk"
    );
}

fn spool_file(dir: &Path) -> std::path::PathBuf {
    let mut files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.find(|path| path.extension().is_some_and(|extension| extension == "spool")).unwrap()
}

/// Checks a crash after the parts are on disk and before the whole has left it, and one before the parts are there.
#[test]
fn a_crash_while_splitting_sends_no_sample_twice() {
    let dir = tempfile::tempdir().unwrap();
    let mut opened = open(dir.path(), BOUNDS);
    opened.append(&profile(200, 1500, |_| 1));
    let path = spool_file(dir.path());
    let whole = fs::read(&path).unwrap();
    let first = opened.drain(LIMIT);
    let parts = spool_file(dir.path());
    drop(opened);

    fs::write(&path, &whole).unwrap();
    let mut both = open(dir.path(), BOUNDS);
    assert_eq!(both.ledger.account_now().inherited, 600);
    assert_eq!(both.drain(LIMIT), first);
    assert!(both.ledger.snapshot().check().is_ok());
    drop(both);

    fs::remove_file(parts).unwrap();
    fs::write(&path, &whole).unwrap();
    let mut again = open(dir.path(), BOUNDS);
    let again: Vec<(String, u64)> = again.drain(LIMIT).into_iter().map(|b| (b.batch_id, b.samples)).collect();
    assert_eq!(again, first.into_iter().map(|b| (b.batch_id, b.samples)).collect::<Vec<_>>());
}

/// Checks a collector that refuses one stack, like that of a recursion with inlined frames, whatever the size of the rest.
#[test]
fn a_refused_stack_takes_no_other_sample_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let mut opened = open(dir.path(), BOUNDS);
    opened.append(&profile(300, 20, |number| if number == 77 { 1025 } else { 2 }));
    let mut delivered = 0;
    while let Some(batch) = opened.spool.next(u64::MAX) {
        if decoded(&batch).sample.iter().any(|sample| sample.location_id.len() > 1024) {
            assert!(opened.spool.refused_as_too_large(&batch.batch_id));
        } else {
            delivered += batch.samples;
            assert!(opened.spool.accepted(&batch.batch_id, None));
        }
    }
    assert_eq!((delivered, opened.lost(LossReason::Refused)), (897, 3));
    assert!(opened.spool.is_empty() && opened.ledger.snapshot().check().is_ok());
}

#[test]
fn only_a_single_stack_above_the_limit_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mut opened = open(dir.path(), BOUNDS);
    opened.append(&profile(20, 20, |_| 1));
    let mut one = profile(1, 3000, |_| 1);
    opened.append(&one);
    let small: u64 = opened.drain(1000).iter().map(|batch| batch.samples).sum();
    assert_eq!((small, opened.lost(LossReason::TooLarge)), (60, 3));
    // Values that contradict the batch are damage, which no part may hide.
    one = profile(20, 3000, |_| 1);
    let batch = Batch { samples: 59, pprof: pprof::encode(&one), ..Batch::default() };
    opened.ledger.take(59);
    opened.ledger.pass(Stage::Window, Stage::Queue, 59);
    opened.spool.append(vec![batch]).unwrap();
    assert!(opened.spool.next(5000).is_none());
    assert_eq!(opened.lost(LossReason::TooLarge), 62);
}

/// Checks a spool that has room for the whole and not for its parts beside it.
#[test]
fn parts_without_room_are_lost_as_such() {
    let dir = tempfile::tempdir().unwrap();
    let mut opened = open(dir.path(), Bounds { bytes: 1 << 20, ..BOUNDS });
    opened.append(&profile(1000, 1000, |_| 1));
    assert!(opened.spool.next(LIMIT).is_none());
    assert_eq!(opened.lost(LossReason::SpoolFull), 3000);
    assert!(opened.spool.is_empty() && opened.ledger.snapshot().check().is_ok());
}
