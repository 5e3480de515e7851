//! Blocked time, compared with the clocks of the program itself.

use std::{path::Path, process::Command};

use crate::common::{Recording, Running, in_order, program, record, record_for, slower};

/// A program that waits in different ways. For each it prints how long the thread was off the CPU by its own clocks: elapsed
/// minus CPU time. It also prints how much of that it was runnable and waited for a CPU; 0 if it was never preempted.
const WAITS: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#define TIMES 12
static long long now(int clock) {
	struct timespec t;
	clock_gettime(clock, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}
static void rest(long ms) {
	struct timespec t = { 0, ms * 1000000 };
	nanosleep(&t, 0);
}
static int word, pipes[2], file;
static char block[16 << 20] __attribute__((aligned(4096)));
__attribute__((noinline)) void warm(void) { for (int i = 0; i < 150; i++) rest(10); }
__attribute__((noinline)) void by_nanosleep(void) { for (int i = 0; i < TIMES; i++) rest(50); }
__attribute__((noinline)) void by_futex(void) {
	struct timespec t = { 0, 50000000 };
	for (int i = 0; i < TIMES; i++) syscall(SYS_futex, &word, FUTEX_WAIT, 0, &t, 0, 0);
}
__attribute__((noinline)) void by_read(void) {
	char c;
	for (int i = 0; i < TIMES; i++) read(pipes[0], &c, 1);
}
__attribute__((noinline)) void in_child(void) { rest(50); _exit(0); }
__attribute__((noinline)) void by_wait(void) {
	for (int i = 0; i < TIMES; i++) {
		if (!fork()) in_child();
		wait(0);
	}
}
/*
 * Until it has waited as long as by the other ways, or for two seconds: in memory there is nothing to wait for. Few and long
 * waits, past the page cache: an interrupt wakes the thread, and what that interrupt does after this (the pages of a
 * buffered write, one by one) is on the thread's CPU clock, though it has not come back yet.
 */
__attribute__((noinline)) void by_disk(void) {
	long long begun = now(CLOCK_BOOTTIME), used = now(CLOCK_THREAD_CPUTIME_ID), passed = 0, waited = 0;
	while (waited < 600000000 && passed < 2000000000) {
		if (pwrite(file, block, sizeof(block), 0) < 0) { perror("pwrite"); exit(1); }
		fdatasync(file);
		passed = now(CLOCK_BOOTTIME) - begun;
		waited = passed - (now(CLOCK_THREAD_CPUTIME_ID) - used);
	}
}
static void *writer(void *unused) {
	for (int i = 0; i < TIMES; i++) { rest(50); write(pipes[1], "x", 1); }
	return 0;
}
static long long waited_for_a_cpu(void) {
	long long ran, waited = 0;
	FILE *stat = fopen("/proc/thread-self/schedstat", "r");
	if (stat) { fscanf(stat, "%lld %lld", &ran, &waited); fclose(stat); }
	return waited;
}
static void timed(const char *name, void (*wait)(void)) {
	struct rusage before, after;
	long long delay = waited_for_a_cpu(), used, passed;
	getrusage(RUSAGE_THREAD, &before);
	used = now(CLOCK_THREAD_CPUTIME_ID), passed = now(CLOCK_BOOTTIME);
	wait();
	passed = now(CLOCK_BOOTTIME) - passed, used = now(CLOCK_THREAD_CPUTIME_ID) - used;
	getrusage(RUSAGE_THREAD, &after);
	delay = waited_for_a_cpu() - delay;
	fprintf(stderr, "%s %lld %lld\n", name, passed - used, after.ru_nivcsw > before.ru_nivcsw ? delay : 0);
}
__attribute__((noinline)) void by_pause(void) { for (;;) pause(); }
int main(int c, char **v) {
	pthread_t thread;
	if (c < 2) {
		/* Until it is killed; after what this machine takes to begin a recording. */
		const char *slower = getenv("GANNET_TEST_SLOWER");
		for (int i = 3 * (slower ? atoi(slower) : 1); i > 0; i--) warm();
		by_pause();
	}
	file = open(v[1], O_RDWR | O_CREAT | O_TRUNC | O_DIRECT, 0600);
	if (file < 0) file = open(v[1], O_RDWR | O_CREAT | O_TRUNC, 0600);
	if (file < 0) { perror(v[1]); return 1; }
	warm();
	timed("by_nanosleep", by_nanosleep);
	timed("by_futex", by_futex);
	timed("by_wait", by_wait);
	timed("by_disk", by_disk);
	pipe(pipes);
	pthread_create(&thread, 0, writer, 0);
	timed("by_read", by_read);
	pthread_join(thread, 0);
	return 0;
}
"#;

fn waits() -> String {
    program("gannet-waits", WAITS, &["-pthread"]).to_str().unwrap().to_owned()
}

/// Returns the nanoseconds in a function: those of stacks that reach `main`, and all.
fn blocked(recording: &Recording, name: &str) -> (u64, u64) {
    let inside = recording.nanoseconds.iter().filter(|(stack, _)| {
        stack.iter().any(|frame| frame == name) && !stack.iter().any(|frame| frame == "in_child")
    });
    inside.fold((0, 0), |(complete, all), (stack, ns)| {
        (complete + if in_order(stack, &["main", name]) { *ns } else { 0 }, all + ns)
    })
}

/// Checks each way to wait (R41).
#[test]
fn blocked_time_is_right_within_two_percent() {
    // On a disk, if there is one: in memory no thread waits for a file.
    let file = Path::new(&waits()).with_file_name("gannet-waits.data");
    let recording = record(99, &["--off-cpu", "--", &waits(), file.to_str().unwrap()]);
    let _ = std::fs::remove_file(&file);
    assert!(recording.lost.is_empty(), "{:?}", recording.lost);
    for name in ["by_nanosleep", "by_futex", "by_read", "by_wait", "by_disk"] {
        let printed = recording.log.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
        let printed: Vec<f64> = printed
            .unwrap_or_else(|| panic!("{name}: {}", recording.log))
            .split(' ')
            .map(|number| number.parse().unwrap())
            .collect();
        let (complete, all) = blocked(&recording, name);
        // Handovers of less than a microsecond are not reported; on a disk in memory there may be no others.
        let slack = 0.5e6;
        let (min, max) = (printed[0] * 0.98 - printed[1] - slack, printed[0] * 1.02 + slack);
        assert!(
            (min..=max).contains(&(all as f64)) && complete == all,
            "{name}: {printed:?} ns printed, {all} sampled, {complete} complete: {:#?}",
            recording.nanoseconds
        );
    }
}

/// Checks that the end of a recording reports threads that still wait (R41).
#[test]
fn a_thread_that_is_still_blocked_at_the_end_is_reported() {
    let mut running = Running::start(&mut Command::new(waits()));
    let pid = running.0.id().to_string();
    // It blocks for ever during the recording. A wait that began before the recording is reported only when it ends.
    let recording = record_for(9, 99, &["--off-cpu", "--pid", &pid]);
    assert!(running.0.try_wait().unwrap().is_none());
    let (_, paused) = blocked(&recording, "by_pause");
    let bounds = 1_500_000_000..=9_500_000_000;
    assert!(bounds.contains(&(paused / u64::from(slower()))), "{paused} ns: {recording:?}");
}
