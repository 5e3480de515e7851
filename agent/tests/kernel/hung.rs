//! A file system that stops answering holds up nothing but the processes on it. The tests need python3 and `/dev/fuse`.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

use crate::common::{Recording, Running, agent, on_a_screen, program, record_for, slower};

const SERVER: &str = include_str!("../data/cases/hangfs.py");
const SPIN: &str = "volatile unsigned long n;
__attribute__((noinline)) void NAME(void) { for (int i = 0; i < 1000; i++) n += i; }
int main(void) { for (;;) NAME(); }";
/// Whatever a test does wrong, the file system answers again after this time. A recording of all processes takes half a minute
/// on a busy machine.
const RESCUE: &str = "180";
/// Long enough for a busy machine, and shorter than the time until the rescue.
const TIMEOUT: Duration = Duration::from_secs(60);

fn spin(name: &str) -> PathBuf {
    program(name, &SPIN.replace("NAME", &format!("{name}_leaf")), &[])
}

/// A mounted file system that holds one program, and its server.
struct HungFs {
    server: Running,
    rescue: Running,
    directory: tempfile::TempDir,
}

impl HungFs {
    #[track_caller]
    fn mount(program: &Path) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("hangfs.py");
        fs::write(&script, SERVER).unwrap();
        let mount = directory.path().join("mount");
        fs::create_dir(&mount).unwrap();
        let server = Running::start(Command::new("python3").arg(script).arg(&mount).arg(program));
        // A server that takes requests and does not answer them has to end.
        let server_id = server.0.id();
        let rescue =
            format!("sleep {RESCUE}; kill -CONT {server_id}; sleep {RESCUE}; kill -KILL {server_id}");
        // Its sleep outlives it, and must not hold the test's output open.
        let rescue = Running::start(
            Command::new("sh").args(["-c", &rescue]).stdout(Stdio::null()).stderr(Stdio::null()),
        );
        let this = Self { server, rescue, directory };
        wait_for("the file system is mounted (it needs python3 and /dev/fuse)", || {
            File::open(this.program()).is_ok()
        });
        this
    }

    fn program(&self) -> PathBuf {
        self.directory.path().join("mount/prog")
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.server.0), signal).unwrap();
    }

    /// Fails if the server runs again: what came before may have waited for the rescue.
    #[track_caller]
    fn assert_still_hangs(&self) {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.server.0.id())).unwrap();
        assert!(stat.contains(" T "), "the server is not stopped any more: {stat}");
    }

    /// Starts the program by a shell: the start of a child waits for its `execve`.
    fn start(&self) -> Running {
        let start = format!("exec {}", self.program().display());
        Running::start(Command::new("sh").args(["-c", &start]))
    }
}

impl Drop for HungFs {
    fn drop(&mut self) {
        self.signal(Signal::CONT);
        // With the server, every request ends that it has not answered.
        let _ = self.server.0.kill();
        let _ = Command::new("umount").arg("-l").arg(self.directory.path().join("mount")).status();
        let _ = self.rescue.0.kill();
    }
}

#[track_caller]
fn wait_for(what: &str, mut is: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < TIMEOUT, "{what}");
        sleep(Duration::from_millis(20));
    }
}

/// Waits until a process ends, and returns how long that took.
#[track_caller]
fn end_of(what: &str, child: &mut Child) -> Duration {
    let begun = Instant::now();
    wait_for(what, || child.try_wait().unwrap().is_some());
    begun.elapsed()
}

/// Records everything for two seconds while the file system hangs, and checks that all samples of the program `other` have names.
/// On a busy machine the recording may end before the agent has built the tables for whole stacks: it builds those of all
/// processes.
#[track_caller]
fn record_all_beside(other: &str, hung: &HungFs) -> Recording {
    let recording = record_for(2, 99, &["--all"]);
    hung.assert_still_hangs();
    assert_named(&recording, other);
    recording
}

/// Checks that all samples of a program have names.
#[track_caller]
fn assert_named(recording: &Recording, name: &str) {
    let leaf = format!("{name}_leaf");
    let is_named = |stack: &[String]| stack.iter().any(|name| *name == leaf || name == "main");
    let (good, all) = recording.share(name, is_named);
    // A busy machine gives the program a small part of a CPU.
    assert!(
        all > 3 && good == all,
        "{good} of {all}: {:?}\n{}",
        recording.odd_ones(name, is_named),
        recording.log
    );
}

#[test]
fn a_hung_program_is_profiled_without_its_names() {
    let (on_disk, hung) = (spin("beside_a"), HungFs::mount(&spin("hung_a")));
    let _beside = Running::start(&mut Command::new(on_disk));
    let _hung = hung.start();
    sleep(Duration::from_millis(500));
    hung.signal(Signal::STOP);
    let log = record_all_beside("beside_a", &hung).log;
    assert_eq!(log.matches("does not answer (").count(), 1, "{log}");
}

/// Checks that neither a process that hangs in `execve` nor a running one whose file hangs holds up others: one that starts once
/// the agent has noticed the hang needs calls on its own files, which an agent that refuses all of them would not make.
#[test]
fn a_process_that_hangs_in_execve_holds_up_no_other() {
    let (before, behind, hung) = (spin("beside_b"), spin("behind_b"), HungFs::mount(&spin("hung_b")));
    let _before = Running::start(&mut Command::new(before));
    let _running = hung.start();
    sleep(Duration::from_millis(500));
    hung.signal(Signal::STOP);
    let _in_execve = hung.start();
    let file = |name: &str| hung.directory.path().join(name);
    let mut recording = Running::start(
        Command::new(agent())
            .args([
                "record",
                "--all",
                "--json",
                "--duration",
                "300s",
                "--hz",
                &(99 / slower()).to_string(),
                "-o",
            ])
            .arg(file("out.pb.gz"))
            .stdout(File::create(file("printed")).unwrap())
            .stderr(File::create(file("log")).unwrap()),
    );
    let text = |name: &str| fs::read_to_string(file(name)).unwrap();
    wait_for("the agent reports the hang", || text("log").contains("does not answer ("));
    let behind = Running::start(&mut Command::new(behind));
    wait_for("the program has had a CPU", || cpu_time(behind.0.id()) > Duration::from_secs(1));
    kill_process(Pid::from_child(&recording.0), Signal::TERM).unwrap();
    end_of("the recording ends", &mut recording.0);
    hung.assert_still_hangs();
    let recording = Recording::read(&text("printed"), &fs::read(file("out.pb.gz")).unwrap(), text("log"));
    for name in ["beside_b", "behind_b"] {
        assert_named(&recording, name);
    }
}

/// Returns the CPU time of a process with one thread.
fn cpu_time(pid: u32) -> Duration {
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// Checks that a program whose file is open in the agent does not hold up the agent's end: closing a readable descriptor of
/// such a file waits for its file system.
#[test]
fn sigterm_ends_a_recording_of_a_program_that_hung() {
    let hung = HungFs::mount(&spin("hung_c"));
    let program = hung.start();
    let out = hung.directory.path().join("out.pb.gz");
    let pid = program.0.id().to_string();
    let mut recording = Running::start(
        Command::new(agent())
            .args(["record", "--pid", &pid, "--duration", "300s", "-o"])
            .arg(&out)
            .stderr(Stdio::null()),
    );
    sleep(Duration::from_secs(4) * slower());
    hung.signal(Signal::STOP);
    sleep(Duration::from_secs(2));
    kill_process(Pid::from_child(&recording.0), Signal::TERM).unwrap();
    let took = end_of("the recording ends", &mut recording.0);
    assert!(took < Duration::from_secs(15) * slower(), "{took:?}");
    assert!(out.exists(), "it has written what it had");
}

/// Returns the workers of an agent that not even SIGKILL ends. They are processes of their own.
fn stuck_workers(agent: &Running) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{}/task", agent.0.id())).unwrap();
    let children = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok());
    let children: Vec<u32> =
        children.flat_map(|line| line.split(' ').flat_map(str::parse).collect::<Vec<_>>()).collect();
    children.into_iter().filter(|pid| is_stuck(*pid)).collect()
}

/// Reports whether a call of this process waits for the FUSE server.
fn is_stuck(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/wchan")).is_ok_and(|name| name.contains("request_wait_answer"))
}

/// Checks that the agent ends though one of its calls does not even end at SIGKILL, and leaves nothing open behind that the
/// next agent needs.
#[track_caller]
fn ends_beside_a_call_that_cannot_be_killed(hung: &HungFs, arguments: &[&str]) {
    let program = hung.start();
    sleep(Duration::from_millis(500));
    hung.signal(Signal::USR1);
    let mut agent = Running::start(Command::new(agent()).args(arguments).stderr(Stdio::null()));
    let mut stuck = Vec::new();
    wait_for("a worker waits for the file system", || {
        stuck = stuck_workers(&agent);
        !stuck.is_empty()
    });
    sleep(Duration::from_secs(2) * slower());
    kill_process(Pid::from_child(&agent.0), Signal::TERM).unwrap();
    let took = end_of("the agent ends", &mut agent.0);
    assert!(took < Duration::from_secs(15) * slower(), "{took:?}");
    assert!(agent.0.wait().unwrap().success());
    // The case is real: the agent has ended, and the call goes on.
    let listening = fs::read_to_string("/proc/net/tcp").unwrap();
    for pid in stuck {
        assert!(is_stuck(pid), "the call of {pid} has ended");
        let open: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .filter_map(|link| Some(fs::read_link(link.ok()?.path()).ok()?.to_string_lossy().into_owned()))
            .filter(|name| {
                let socket = name.strip_prefix("socket:[").and_then(|name| name.strip_suffix(']'));
                ["bpf", "perf_event", "/spool"].iter().any(|kind| name.contains(kind))
                    || socket.is_some_and(|inode| listening.contains(&format!(" {inode} ")))
            })
            .collect();
        assert!(open.is_empty(), "{open:?}");
        // A reader of the agent's output sees its end.
        for standard in 0..3 {
            let name = fs::read_link(format!("/proc/{pid}/fd/{standard}")).unwrap();
            assert_eq!(name, Path::new("/dev/null"), "{standard}");
        }
    }
    hung.signal(Signal::KILL);
    drop(program);
}

#[test]
fn a_recording_ends_beside_a_call_that_cannot_be_killed() {
    let hung = HungFs::mount(&spin("hung_g"));
    let out = hung.directory.path().join("out.pb.gz");
    let out = out.to_str().unwrap();
    ends_beside_a_call_that_cannot_be_killed(&hung, &["record", "--all", "--duration", "300s", "-o", out]);
}

#[test]
fn the_daemon_ends_beside_a_call_that_cannot_be_killed() {
    let hung = HungFs::mount(&spin("hung_h"));
    let rules = hung.directory.path().join("rules.yaml");
    fs::write(&rules, "rules:\n- id: hung\n  match: {comm: [prog]}\n  capture: {hz: 99}\n").unwrap();
    let state = hung.directory.path().join("state");
    let arguments = ["run", "--pod-source", "none", "--node", "here", "--window", "1s"];
    let listen = ["--http-listen", "127.0.0.1:0", "--debug-listen", "127.0.0.1:0"];
    let files = ["--rules", rules.to_str().unwrap(), "--state-dir", state.to_str().unwrap()];
    let all = [&arguments[..], &listen, &files].concat();
    ends_beside_a_call_that_cannot_be_killed(&hung, &all);
}

/// Checks that `check` answers beside a hung program, of all and of that program.
#[test]
fn check_does_not_wait_for_a_hung_program() {
    let hung = HungFs::mount(&spin("hung_e"));
    let program = hung.start();
    sleep(Duration::from_millis(500));
    hung.signal(Signal::STOP);
    for arguments in
        [vec!["check".to_owned()], vec!["check".into(), "--pid".into(), program.0.id().to_string()]]
    {
        let mut check = Running::start(
            Command::new(agent()).args(&arguments).stdout(Stdio::null()).stderr(Stdio::null()),
        );
        let took = end_of("the check ends", &mut check.0);
        assert!(took < Duration::from_secs(15) * slower(), "{arguments:?}: {took:?}");
    }
}

/// Checks that `top` shows others beside a hung program, and ends.
#[test]
fn top_does_not_wait_for_a_hung_program() {
    let (on_disk, hung) = (spin("beside_f"), HungFs::mount(&spin("hung_f")));
    let _beside = Running::start(&mut Command::new(on_disk));
    let _program = hung.start();
    sleep(Duration::from_millis(500));
    hung.signal(Signal::STOP);
    let mut top = Running::start(&mut on_a_screen(&["beside_f_leaf"]));
    end_of("top ends", &mut top.0);
    assert!(top.0.wait().unwrap().success(), "it shows the other program, and ends");
}

#[test]
fn the_daemon_names_the_program_when_its_files_answer() {
    let hung = HungFs::mount(&spin("hung_d"));
    let _program = hung.start();
    sleep(Duration::from_millis(500));
    hung.signal(Signal::STOP);
    let directory = tempfile::tempdir().unwrap();
    let rules = directory.path().join("rules.yaml");
    fs::write(&rules, "rules:\n- id: hung\n  match: {comm: [prog]}\n  capture: {hz: 99}\n").unwrap();
    let log = directory.path().join("log");
    let mut daemon = Running::start(
        Command::new(agent())
            .args(["run", "--pod-source", "none", "--node", "here", "--window", "1s"])
            .args(["--http-listen", "127.0.0.1:0", "--debug-listen", "127.0.0.1:0"])
            .arg("--rules")
            .arg(&rules)
            .arg("--state-dir")
            .arg(directory.path().join("state"))
            .stderr(File::create(&log).unwrap()),
    );
    let logged = |text: &str| fs::read_to_string(&log).unwrap().contains(text);
    wait_for("the daemon reports the file system", || logged("does not answer ("));
    hung.signal(Signal::CONT);
    wait_for("the daemon goes on", || logged("answers again"));
    hung.signal(Signal::STOP);
    sleep(Duration::from_secs(2));
    kill_process(Pid::from_child(&daemon.0), Signal::TERM).unwrap();
    let took = end_of("the daemon ends", &mut daemon.0);
    assert!(took < Duration::from_secs(15) * slower(), "{took:?}");
}
