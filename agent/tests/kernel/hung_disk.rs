//! A disk of the agent's own that stops answering: the agent goes on, counts its losses, and ends. The tests need python3 and
//! `/dev/fuse`.

use std::{
    fs,
    path::PathBuf,
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::{
    common::{Running, program, slower},
    daemon::Daemon,
};

const SERVER: &str = include_str!("../data/memfs.py");
const SPIN: &str = "volatile unsigned long n;
int main(void) { for (;;) n++; }";
/// Whatever a test does wrong, the file system ends after this time.
const RESCUE: &str = "120";
/// The grace period that the chart gives the agent is 30 s.
const GRACE: Duration = Duration::from_secs(20);

/// A mounted file system in memory, and its server.
struct Disk {
    server: Running,
    rescue: Running,
    directory: tempfile::TempDir,
}

impl Disk {
    #[track_caller]
    fn mount() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("memfs.py");
        fs::write(&script, SERVER).unwrap();
        let mount = directory.path().join("mount");
        fs::create_dir(&mount).unwrap();
        let server = Running::start(Command::new("python3").arg(script).arg(&mount));
        let rescue = format!("sleep {RESCUE}; kill -KILL {}", server.0.id());
        let rescue = Running::start(Command::new("sh").args(["-c", &rescue]));
        let this = Self { server, rescue, directory };
        let begun = Instant::now();
        while fs::create_dir(this.state().with_file_name("probe")).is_err() || !is_mounted(&mount) {
            assert!(begun.elapsed() < GRACE, "the file system is mounted (it needs python3 and /dev/fuse)");
            sleep(Duration::from_millis(20));
        }
        this
    }

    fn state(&self) -> PathBuf {
        self.directory.path().join("mount/state")
    }

    /// From now on no call on the file system returns, and no signal ends one.
    fn hang(&self) {
        kill_process(Pid::from_child(&self.server.0), Signal::USR1).unwrap();
    }
}

fn is_mounted(mount: &std::path::Path) -> bool {
    fs::read_to_string("/proc/self/mounts").unwrap().contains(&format!("memfs {} ", mount.display()))
}

impl Drop for Disk {
    fn drop(&mut self) {
        // With the server, every request ends that it has not answered.
        let _ = self.server.0.kill();
        let _ = Command::new("umount").arg("-l").arg(self.directory.path().join("mount")).status();
        let _ = self.rescue.0.kill();
    }
}

/// Returns the value of a metric without labels.
#[track_caller]
fn metric(daemon: &Daemon, name: &str) -> f64 {
    let metrics = daemon.metrics();
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
    value.unwrap_or_else(|| panic!("{name}: {metrics}"))
}

#[track_caller]
fn ends_in_time(daemon: Daemon) -> String {
    let begun = Instant::now();
    let log = daemon.end();
    assert!(begun.elapsed() < GRACE * slower(), "{:?}\n{log}", begun.elapsed());
    log
}

/// Checks that sampling goes on while spool, unwind tables and kill switch are on a disk that hangs, that the agent says so
/// once, and that it ends in spite of calls that not even SIGKILL ends.
#[test]
fn the_agent_samples_and_ends_while_its_own_disk_hangs() {
    const TAKEN: &str = "gannet_agent_samples_taken_total";
    let disk = Disk::mount();
    let _spin = Running::start(&mut Command::new(program("own_disk", SPIN, &[])));
    let daemon = Daemon::start_on(&disk.state());
    daemon.set_rules("rules:\n- id: disk\n  match: {comm: [own_disk]}\n  capture: {hz: 99}\n");
    daemon.wait_for("profiles are on the disk", || metric(&daemon, "gannet_agent_spool_batches") > 0.0);
    disk.hang();
    daemon.wait_for("the disk is reported", || daemon.log().contains("does not answer ("));
    let before = metric(&daemon, TAKEN);
    daemon.wait_for("sampling goes on", || metric(&daemon, TAKEN) > before + 50.0);
    assert!(metric(&daemon, "gannet_agent_samples_unaccounted").abs() < 0.5);
    assert!(metric(&daemon, "gannet_agent_files_hung") > 0.0);
    // A program that starts now gets an unwind table.
    let _late = Running::start(&mut Command::new(program("own_disk_late", SPIN, &[])));
    daemon.set_rules("rules:\n- id: late\n  match: {comm: [own_disk_late]}\n  capture: {hz: 99}\n");
    daemon.wait_for("a new program is sampled", || daemon.page("/debug/processes").contains("own_disk_late"));
    let log = ends_in_time(daemon);
    assert_eq!(log.matches("the file system of --state-dir does not answer (").count(), 1, "{log}");
    // The last window waits for the disk, or for its names when the time is over.
    let lost = [
        "were not written to disk in time; they are lost",
        "did not accept the profiles of a window",
        "the last window was not symbolized in time",
    ];
    assert!(lost.iter().any(|line| log.contains(line)), "{log}");
    assert!(!log.contains("ending without the last samples"), "{log}");
}

#[test]
fn an_agent_that_waits_for_its_disk_at_the_start_ends() {
    let disk = Disk::mount();
    disk.hang();
    let daemon = Daemon::start_without_waiting(&disk.state());
    daemon.wait_for("the disk is reported", || {
        daemon.log().contains("does not answer: the agent starts when it does")
    });
    ends_in_time(daemon);
}
