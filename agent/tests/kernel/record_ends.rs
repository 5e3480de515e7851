//! When `record` ends, and what becomes of the command that it started.

use std::{
    fs,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use crate::common::{
    Recording, Running, agent, life::life, on_a_screen, program, record, record_for, slower,
};

/// A program: `busy-end MS` uses a CPU for MS milliseconds. With a second argument it ignores SIGTERM.
const BUSY: &str = r"
#include <signal.h>
#include <stdlib.h>
#include <time.h>
int main(int c, char **v)
{
	struct timespec begin, now;
	if (c > 2)
		signal(SIGTERM, SIG_IGN);
	clock_gettime(CLOCK_MONOTONIC, &begin);
	do
		clock_gettime(CLOCK_MONOTONIC, &now);
	while ((now.tv_sec - begin.tv_sec) * 1000 + (now.tv_nsec - begin.tv_nsec) / 1000000 < atol(v[1]));
	return 0;
}
";

fn busy() -> String {
    program("busy-end", BUSY, &[]).to_str().unwrap().to_owned()
}

/// Returns the pid that a line of the log gives as `(pid N)`.
#[track_caller]
fn pid_in(log: &str) -> u32 {
    let text = log.split("(pid ").nth(1).unwrap_or_else(|| panic!("{log}"));
    text.split(')').next().unwrap().parse().unwrap()
}

#[test]
fn record_ends_with_the_processes_of_its_pid_flag() {
    let mut running =
        [1500, 4000].map(|ms| Running::start(Command::new(busy()).arg((ms * slower()).to_string())));
    let pids = running.each_ref().map(|running| running.0.id().to_string());
    let waiter = thread::spawn(move || running.each_mut().map(|running| running.0.wait().unwrap()));
    let begun = Instant::now();
    let recording = record(99, &["--duration", "1000s", "--pid", &pids[0], &pids[1]]);
    let took = begun.elapsed();
    waiter.join().unwrap();
    // Reading the kernel's symbols may take some seconds on a busy machine.
    assert!(took < Duration::from_secs(60) * slower(), "{took:?}");
    assert!(took > Duration::from_secs(2), "it ends with the last of them: {took:?}");
    assert!(recording.taken > 20, "{recording:?}");
}

#[test]
fn a_command_gets_sigterm_when_the_time_is_over() {
    let recording = record(99, &["--duration", "2s", "--", &busy(), "100000"]);
    assert!(recording.taken > 20, "{recording:?}");
    assert!(recording.log.contains("ended the command"), "{}", recording.log);
    assert!(!fs::exists(format!("/proc/{}", pid_in(&recording.log))).unwrap());
}

#[test]
fn a_command_that_goes_on_after_sigterm_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let (out, log) = (directory.path().join("out.folded"), directory.path().join("log"));
    // Into a file: the command that goes on would hold a pipe open.
    let output = fs::File::create(&log).unwrap();
    let status = Command::new(agent())
        .args(["record", "--duration", "2s", "-o", out.to_str().unwrap(), "--", &busy(), "100000", "stay"])
        .stdout(output.try_clone().unwrap())
        .stderr(output)
        .status()
        .unwrap();
    let log = fs::read_to_string(&log).unwrap();
    let pid = pid_in(&log);
    let goes_on = fs::exists(format!("/proc/{pid}")).unwrap();
    let _ = Command::new("kill").args(["-KILL", &pid.to_string()]).status();
    assert!(status.success() && log.contains("goes on"), "{log}");
    assert!(goes_on);
}

/// Checks the budgets of `record`: the governor lowers the rate within it, says so, and each sample stands for more time.
#[test]
fn a_recording_over_its_budget_lowers_its_rate() {
    let spinner = Running::start(Command::new(life()).args(["spin", "60000"]));
    let pid = spinner.0.id().to_string();
    let period = 1_000_000_000 / u64::from(499 / slower());
    let longest = |recording: &Recording| {
        let samples = recording.profile.sample.iter();
        samples.map(|sample| (sample.value[1] / sample.value[0].max(1)) as u64).max().unwrap() / period
    };
    let of = |seconds: u32, budget: &[&str]| record_for(seconds, 499, &[&["--pid", &pid], budget].concat());
    for (budget, cause) in [
        (["--cpu-budget", "0.001"], "% of a core used, the budget is 0.1 %"),
        (["--memory-budget", "2MiB"], "MiB of memory used, the budget is 2 MiB"),
    ] {
        let recording = of(8, &budget);
        let governed = recording.governed.as_deref().unwrap_or_default();
        assert!(governed.contains("rates are lowered to 1/") && governed.contains(cause), "{governed}");
        assert!(longest(&recording) >= 2, "no sample stands for two periods: {budget:?}, {}", recording.log);
    }
    let recording = of(4, &["--cpu-budget", "100%", "--memory-budget", "8GiB"]);
    assert_eq!((recording.governed.as_deref(), longest(&recording)), (None, 1));
}

/// Checks the budget of `top` as well: its screen says that the governor lowers the rate, and why.
#[test]
fn top_over_its_budget_lowers_its_rate() {
    let _spinner = Running::start(Command::new(life()).args(["spin", "60000"]));
    let mut top = on_a_screen(&["lowered", "budget", "0.1"]);
    top.args(["--hz", "499", "--cpu-budget", "0.001"]);
    let done = top.output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stdout));
}
