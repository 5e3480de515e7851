//! Child processes that end with the test.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// Returns the path of a program of this build, which is beside the directory of the tests.
#[track_caller]
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("the test's own path");
    let directory = test.ancestors().find(|path| path.join(name).is_file());
    match directory {
        Some(directory) => directory.join(name),
        None => {
            panic!(
                "{name} is not built beside {}: run the tests by `make test`, which builds it",
                test.display()
            )
        }
    }
}

/// Runs a program of this build, and returns its output after its exit.
#[track_caller]
pub fn run(name: &str, args: &[&str]) -> Output {
    Command::new(binary(name)).args(args).stdin(Stdio::null()).output().expect("the program starts")
}

/// A running program in its own process group. Dropping it kills it and its children.
pub struct Program {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Program {
    /// Starts it. Its output is appended to `NAME.log` in `directory`.
    #[track_caller]
    pub fn start(name: &str, args: &[String], directory: &Path) -> Self {
        let log = directory.join(format!("{name}.log"));
        let open = || File::options().create(true).append(true).open(&log).expect("the log opens");
        let mut command = Command::new(binary(name));
        command.args(args).stdin(Stdio::null()).stdout(open()).stderr(open()).process_group(0);
        // SAFETY: prctl with these arguments touches no memory and is safe between fork and exec.
        unsafe {
            command.pre_exec(|| {
                // The runner may kill the test; the program must not outlive it.
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                Ok(())
            });
        }
        let child = command.spawn().expect("the program starts");
        Self { child, name: name.to_owned(), log }
    }

    /// Returns the PID.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns its output until now.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Whether the process is still there.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Kills the process group by SIGKILL, which no handler sees.
    pub fn kill(&mut self) {
        if self.is_running() {
            let _ = kill_process_group(pid(&self.child), Signal::KILL);
        }
        let _ = self.child.wait();
    }

    /// Sends SIGTERM, and waits at most 30 s for the exit.
    #[track_caller]
    pub fn terminate(&mut self) -> ExitStatus {
        let _ = kill_process(pid(&self.child), Signal::TERM);
        self.wait(Duration::from_secs(30))
    }

    /// Waits for the exit; panics with the log after `timeout`.
    #[track_caller]
    pub fn wait(&mut self, timeout: Duration) -> ExitStatus {
        let begin = Instant::now();
        while begin.elapsed() < timeout {
            if let Some(status) = self.child.try_wait().expect("the child is ours") {
                return status;
            }
            thread::sleep(Duration::from_millis(10));
        }
        let log = self.log();
        panic!("{} did not end within {timeout:?}; its log:\n{log}", self.name)
    }
}

fn pid(child: &Child) -> Pid {
    Pid::from_child(child)
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
        if thread::panicking() {
            let log = self.log();
            let tail = log.lines().rev().take(40).collect::<Vec<_>>();
            eprintln!("---- last lines of {}:", self.name);
            tail.iter().rev().for_each(|line| eprintln!("{line}"));
        }
    }
}
