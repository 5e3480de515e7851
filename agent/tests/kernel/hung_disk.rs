//! A disk of the agent's own that stops answering: the agent goes on, counts its losses, and ends. The tests need python3 and
//! `/dev/fuse`.

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::{
    common::{Running, agent, program, slower},
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

/// Checks that `record` says which file system it waits for, and that a signal ends the wait with an error, but not before that.
#[test]
fn record_says_that_its_file_is_on_a_disk_that_hangs() {
    let disk = Disk::mount();
    fs::create_dir(disk.state()).unwrap();
    let out = disk.state().join("out.folded");
    let log = disk.directory.path().join("log");
    let record = |duration: &str| {
        let mut command = Command::new(agent());
        command.args(["record", "--comm", "own_disk", "--duration", duration, "-o"]).arg(&out);
        command.stderr(fs::File::create(&log).unwrap()).stdout(Stdio::null());
        Running::start(&mut command)
    };
    let _spin = Running::start(&mut Command::new(program("own_disk", SPIN, &[])));
    assert!(record("1s").0.wait().unwrap().success(), "{}", fs::read_to_string(&log).unwrap());
    assert!(fs::read_to_string(&out).unwrap().contains("main"));
    disk.hang();
    for signal in [Signal::TERM, Signal::INT] {
        let mut running = record("1s");
        let begun = Instant::now();
        let text = || fs::read_to_string(&log).unwrap();
        while !text().contains("does not answer: the profile is written when it does") {
            assert!(begun.elapsed() < Duration::from_secs(60) * slower(), "{}", text());
            assert_eq!(running.0.try_wait().unwrap(), None, "{}", text());
            sleep(Duration::from_millis(20));
        }
        assert!(text().contains(&format!("the file system of {}", out.display())), "{}", text());
        kill_process(Pid::from_child(&running.0), signal).unwrap();
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = running.0.try_wait().unwrap() {
                break status;
            }
            assert!(begun.elapsed() < GRACE * slower(), "{signal:?}: {}", text());
            sleep(Duration::from_millis(20));
        };
        assert_eq!(status.code(), Some(1), "{}", text());
        let error =
            format!("the profile is not written: the file system of `{}` does not answer", out.display());
        assert!(text().contains(&error), "{}", text());
    }
}

/// Checks that the agent goes on and says what it waits for while the token for the collector is on a disk that hangs. Nothing
/// listens at that address, so the agent reads the token for each attempt, and looks each second whether it has changed.
#[test]
fn the_agent_goes_on_while_its_token_file_hangs() {
    const FILES: &str = "the file system of --tls-ca, --tls-cert, --tls-key or --token-file";
    let disk = Disk::mount();
    fs::create_dir(disk.state()).unwrap();
    let token = disk.state().join("token");
    fs::write(&token, "secret").unwrap();
    let flags = ["--endpoint", "http://127.0.0.1:1", "--token-file", token.to_str().unwrap()];
    let daemon = Daemon::start(&flags);
    daemon.wait_for("the collector is not there", || daemon.log().contains("no control stream"));
    disk.hang();
    daemon.wait_for("the disk is reported", || daemon.log().contains(&format!("{FILES} does not answer (")));
    daemon.wait_for("the connection says so", || {
        daemon
            .log()
            .contains(&format!("cannot read the token file {}: {FILES} does not answer", token.display()))
    });
    assert!(metric(&daemon, "gannet_agent_files_hung") > 0.0);
    let log = ends_in_time(daemon);
    assert_eq!(log.matches(&format!("{FILES} does not answer (")).count(), 1, "{log}");
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
