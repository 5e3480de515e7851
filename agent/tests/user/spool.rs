//! The spool on a real file system: crashes, damage, bounds, full disks.

use std::{
    collections::BTreeSet,
    env, fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::{Duration, SystemTime},
};

use gannet_agent::{
    export::{Bounds, Spool, SpoolError, SpoolStats},
    ledger::{NodeLedger, Stage},
};
use gannet_proto::{
    ingest::Batch,
    ledger::{Ledger, LossReason},
};
use proptest::prelude::*;

const ROOMY: Bounds = Bounds { bytes: 64 << 20, age: Duration::from_secs(3600) };

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
    /// Appends a window: one batch of `bytes` bytes for each number of samples.
    fn append(&mut self, samples: &[u64], bytes: usize) -> Result<(), SpoolError> {
        let total = samples.iter().sum();
        self.ledger.take(total);
        self.ledger.pass(Stage::Window, Stage::Queue, total);
        let batch = |&samples: &u64| Batch { samples, pprof: vec![7; bytes], ..Batch::default() };
        self.spool.append(samples.iter().map(batch).collect())
    }

    fn drain(&mut self) -> Vec<Batch> {
        std::iter::from_fn(|| self.spool.next(u64::MAX)).collect()
    }

    fn lost(&self, reason: LossReason) -> u64 {
        self.ledger.snapshot().lost.get(&reason).copied().unwrap_or_default()
    }

    #[track_caller]
    fn balances(&self) {
        let snapshot = self.ledger.snapshot();
        assert!(snapshot.check().is_ok(), "{snapshot:?}");
        let account = self.ledger.account_now();
        assert_eq!(account.at_stage(Stage::Window) + account.at_stage(Stage::Queue), 0);
    }
}

fn spool_files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "spool"))
        .collect();
    files.sort();
    files
}

#[test]
fn batches_survive_a_restart_with_their_ids_and_order() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = open(dir.path(), ROOMY);
    first.append(&[1, 2], 100).unwrap();
    first.append(&[4], 100).unwrap();
    let before: Vec<(u64, String)> =
        first.drain().into_iter().map(|batch| (batch.sequence, batch.batch_id)).collect();
    assert_eq!(before.iter().map(|(sequence, _)| *sequence).collect::<Vec<_>>(), [1, 2, 3]);
    drop(first);

    let mut second = open(dir.path(), ROOMY);
    let account = second.ledger.account_now();
    assert_eq!((account.inherited, account.at_stage(Stage::Spool)), (7, 7));
    let after: Vec<(u64, String)> =
        second.drain().into_iter().map(|batch| (batch.sequence, batch.batch_id)).collect();
    assert_eq!(before, after);
    for (_, id) in &after {
        assert!(second.spool.accepted(id, None));
        assert!(!second.spool.accepted(id, None), "an answer counts once");
    }
    assert_eq!(second.ledger.snapshot().delivered, 7);
    assert_eq!(spool_files(dir.path()), Vec::<PathBuf>::new());
    second.balances();
    drop(second);

    // No file shows the numbers any more, and yet they continue.
    let mut third = open(dir.path(), ROOMY);
    third.append(&[1], 1).unwrap();
    assert_eq!(third.drain()[0].sequence, 4);
}

/// Checks that one sample that is gone shows first as unaccounted, and under its reason once the spool notices.
#[test]
fn a_sample_that_the_spool_loses_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let mut opened = open(dir.path(), ROOMY);
    opened.append(&[1], 100).unwrap();
    opened.append(&[5], 100).unwrap();
    // A user deletes the file: at first it is still pending, then its reader notices.
    fs::remove_file(&spool_files(dir.path())[0]).unwrap();
    let batches = opened.drain();
    assert_eq!(batches.iter().map(|batch| batch.samples).collect::<Vec<_>>(), [5]);
    assert_eq!((opened.lost(LossReason::SpoolCorrupt), opened.ledger.snapshot().unaccounted()), (1, 0));
    // The exporter hands over fewer samples than the kernel took: without a reason.
    opened.ledger.take_window(&Ledger { taken: 3, delivered: 2, ..Ledger::default() });
    opened.ledger.pass(Stage::Window, Stage::Queue, 2);
    opened.spool.append(vec![Batch { samples: 2, ..Batch::default() }]).unwrap();
    assert_eq!(opened.ledger.snapshot().unaccounted(), 1);
    for batch in batches.into_iter().chain(opened.drain()) {
        assert!(opened.spool.accepted(&batch.batch_id, Some(batch.samples)));
    }
    let ledger = opened.ledger.snapshot();
    assert_eq!((ledger.taken, ledger.delivered, ledger.pending, ledger.unaccounted()), (9, 7, 0, 1));
}

#[test]
fn a_second_agent_learns_the_pid_of_the_first() {
    let dir = tempfile::tempdir().unwrap();
    let _first = open(dir.path(), ROOMY);
    let error = Spool::open(dir.path(), ROOMY, NodeLedger::new(), Arc::default()).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, SpoolError::Locked { .. }), "{text}");
    assert!(text.contains(&std::process::id().to_string()) && text.contains("--state-dir"), "{text}");
}

#[test]
fn over_the_bound_the_oldest_file_goes_and_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let mut opened = open(dir.path(), Bounds { bytes: 10_000, ..ROOMY });
    for samples in 1..=20 {
        opened.append(&[samples], 1000).unwrap();
        let on_disk: u64 = spool_files(dir.path()).iter().map(|path| path.metadata().unwrap().len()).sum();
        assert!(on_disk <= 10_000, "{on_disk}");
        assert_eq!(on_disk, opened.stats.bytes());
        opened.balances();
    }
    let kept: Vec<u64> = opened.drain().iter().map(|batch| batch.samples).collect();
    assert_eq!(kept, (12..=20).collect::<Vec<_>>());
    assert_eq!(opened.lost(LossReason::SpoolFull), (1..=11).sum::<u64>());

    // Batches on the wire stay until their answer comes.
    assert!(matches!(opened.append(&[5], 1000), Err(SpoolError::NoRoom { samples: 5, .. })));
    opened.spool.release_all();
    opened.append(&[6], 1000).unwrap();
    opened.balances();
}

#[test]
fn old_batches_expire_and_too_large_ones_are_lost() {
    let dir = tempfile::tempdir().unwrap();
    let mut opened = open(dir.path(), ROOMY);
    opened.append(&[3, 4], 100).unwrap();
    opened.spool.expire(SystemTime::now() + Duration::from_secs(3500));
    assert_eq!(opened.spool.len(), 2);
    opened.spool.expire(SystemTime::now() + Duration::from_secs(3700));
    assert!(opened.spool.is_empty());
    assert_eq!(opened.lost(LossReason::Expired), 7);

    opened.append(&[8], 1001).unwrap();
    assert!(opened.spool.next(1000).is_none());
    assert_eq!(opened.lost(LossReason::TooLarge), 8);
    assert_eq!(spool_files(dir.path()), Vec::<PathBuf>::new());
    opened.balances();
}

#[test]
fn a_refused_batch_is_lost_and_a_released_one_is_sent_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut opened = open(dir.path(), ROOMY);
    opened.append(&[1, 2], 10).unwrap();
    let batches = opened.drain();
    assert_eq!(opened.ledger.account_now().at_stage(Stage::Wire), 3);
    opened.spool.release(&batches[0].batch_id);
    assert!(opened.spool.refused(&batches[1].batch_id));
    assert_eq!(opened.spool.next(u64::MAX).unwrap(), batches[0]);
    assert_eq!(opened.lost(LossReason::Refused), 2);
    opened.balances();
}

#[test]
fn foreign_files_move_away_and_unfinished_ones_vanish() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("notes.spool"), "hello").unwrap();
    fs::write(dir.path().join("00000000000000000001-1-9.aside"), "half").unwrap();
    fs::write(dir.path().join("sequence"), "not a number").unwrap();
    let opened = open(dir.path(), ROOMY);
    assert!(opened.spool.is_empty());
    assert_eq!(opened.stats.corrupt_files(), 1);
    assert!(dir.path().join("corrupt/notes.spool").exists());
    assert!(!dir.path().join("00000000000000000001-1-9.aside").exists());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn damage_never_stops_the_agent_and_each_lost_sample_is_counted(
        cut in prop::option::of(0.0..1.0_f64),
        flips in prop::collection::vec((0.0..1.0_f64, 1_u8..=255), 0..6),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut before = open(dir.path(), ROOMY);
        before.append(&[1, 2, 4, 8, 16], 200).unwrap();
        let written = before.drain();
        drop(before);
        let path = &spool_files(dir.path())[0];
        let original = fs::read(path).unwrap();
        let mut bytes = original.clone();
        for (at, mask) in flips {
            let at = (at * bytes.len() as f64) as usize;
            bytes[at] ^= mask;
        }
        if let Some(cut) = cut {
            bytes.truncate((cut * bytes.len() as f64) as usize);
        }
        fs::write(path, &bytes).unwrap();

        let mut after = open(dir.path(), ROOMY);
        let read = after.drain();
        prop_assert!(read.iter().all(|batch| written.contains(batch)));
        let samples: u64 = read.iter().map(|batch| batch.samples).sum();
        prop_assert_eq!(after.ledger.account_now().inherited, 31);
        prop_assert_eq!(after.lost(LossReason::SpoolCorrupt), 31 - samples);
        prop_assert_eq!(after.stats.corrupt_files(), u64::from(bytes != original));
        after.balances();
        drop(after);

        // The damage counts once, not at each start.
        let mut again = open(dir.path(), ROOMY);
        prop_assert_eq!(again.drain(), read);
        prop_assert_eq!(again.stats.corrupt_files(), 0);
    }
}

/// The process that the next test kills. Prints the sequence of each append that returned.
fn append_until_killed(directory: &Path) {
    let mut opened = open(directory, ROOMY);
    let mut out = std::io::stdout();
    for appended in 0_u64.. {
        opened.append(&[1, 1, 1], 2000).unwrap();
        writeln!(out, "appended {}", opened.spool.len()).unwrap();
        assert!(appended < 100_000, "the parent test has not killed this process");
    }
}

#[test]
fn a_killed_writer_keeps_all_appends_that_returned() {
    // The test starts itself, with a directory.
    if let Some(directory) = env::var_os("GANNET_TEST_SPOOL") {
        return append_until_killed(Path::new(&directory));
    }
    let dir = tempfile::tempdir().unwrap();
    let mut promised = 0;
    for round in 0..4 {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "spool::a_killed_writer_keeps_all_appends_that_returned"])
            .env("GANNET_TEST_SPOOL", dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut seen = 0;
        while seen < 5 + round * 7 {
            let line = lines.next().expect("the child has ended by itself").unwrap();
            if let Some(batches) = line.strip_prefix("appended ") {
                promised = batches.parse().unwrap();
                seen += 1;
            }
        }
        child.kill().unwrap();
        // Lines that it printed before the signal arrived count as promised too.
        for line in lines.map_while(Result::ok) {
            if let Some(batches) = line.strip_prefix("appended ") {
                promised = batches.parse().unwrap();
            }
        }
        child.wait().unwrap();
        let mut opened = open(dir.path(), ROOMY);
        let batches = opened.drain();
        assert!(batches.len() >= promised, "{} of {promised}", batches.len());
        assert_eq!(opened.stats.corrupt_files(), 0);
        let ids: BTreeSet<&String> = batches.iter().map(|batch| &batch.batch_id).collect();
        assert_eq!(ids.len(), batches.len());
        assert!(batches.iter().map(|batch| batch.sequence).eq(1..=batches.len() as u64));
    }
}

/// Tests that need root to mount a small file system.
mod root {
    use super::*;

    struct Tmpfs(tempfile::TempDir);

    impl Tmpfs {
        fn new(size: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let mounted = Command::new("mount")
                .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
                .arg(dir.path())
                .status()
                .unwrap();
            assert!(mounted.success(), "cannot mount a tmpfs: this test needs root");
            Self(dir)
        }
    }

    impl Drop for Tmpfs {
        fn drop(&mut self) {
            drop(Command::new("umount").arg("-l").arg(self.0.path()).status());
        }
    }

    #[test]
    fn on_a_full_disk_the_oldest_goes_and_each_loss_is_counted() {
        let disk = Tmpfs::new("256k");
        let mut opened = open(disk.0.path(), ROOMY);
        for samples in 1..=40 {
            opened.append(&[samples], 20_000).unwrap();
            opened.balances();
        }
        assert!(opened.stats.write_errors() > 0, "the disk was never full");
        let kept: Vec<u64> = opened.drain().iter().map(|batch| batch.samples).collect();
        assert_eq!(kept.last(), Some(&40));
        assert!(kept.len() > 3, "{kept:?}");
        assert_eq!(opened.lost(LossReason::SpoolFull) + kept.iter().sum::<u64>(), (1..=40).sum::<u64>());

        // All batches are on the wire and there is no space: the new one is lost, and the agent goes on.
        let error = (0..20).find_map(|_| opened.append(&[7], 20_000).err()).expect("the disk is full");
        assert!(error.to_string().contains("free disk space"), "{error}");
        opened.balances();
    }
}
