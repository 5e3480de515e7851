//! A program that starts, changes and exits in every way that a process can.
use std::{path::PathBuf, process::Command};

/// The command name of the program.
pub(crate) const COMM: &str = "gannet-life";

const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x80
#endif
/* In the order of the kernel's struct clone_args. */
struct args { uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup; };

__attribute__((noinline)) void spin_here(long ms)
{
	struct timespec a, b;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &a);
	do {
		for (volatile int i = 0; i < 20000; i++)
			;
		clock_gettime(CLOCK_THREAD_CPUTIME_ID, &b);
	} while ((b.tv_sec - a.tv_sec) * 1000 + (b.tv_nsec - a.tv_nsec) / 1000000 < ms);
}

static void die(const char *what)
{
	perror(what);
	_exit(99);
}

static void *wait_then_exit_group(void *ms)
{
	usleep((long)ms * 1000);
	_exit(5);
}

static void *wait_then_exit(void *ms)
{
	usleep((long)ms * 1000);
	syscall(SYS_exit, 3);
	return 0;
}

static void *exit_soon(void *unused)
{
	syscall(SYS_exit, 0);
	return 0;
}

static void *sleep_on(void *unused)
{
	for (;;)
		pause();
}

static char **command;

static void *exec_it(void *unused)
{
	spin_here(20);
	execv(command[0], command);
	die("execv");
}

static void *spin_on(void *ms)
{
	spin_here((long)ms);
	return 0;
}

static void threads(int n, void *(*what)(void *), void *with)
{
	pthread_attr_t attr;
	pthread_t thread;
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, 32768);
	while (n--)
		if (pthread_create(&thread, &attr, what, with))
			die("pthread_create");
}

/* Starts a program and returns its PID. `entering`: into another time namespace, which kernels before 6.3 refuse to vfork. */
static pid_t start(char **what, int entering)
{
	pid_t pid = entering ? fork() : vfork();
	if (pid < 0)
		die("fork");
	if (!pid) {
		execv(what[0], what);
		_exit(98);
	}
	return pid;
}

static int end_of(pid_t pid)
{
	int status;
	if (waitpid(pid, &status, 0) != pid)
		die("waitpid");
	return status;
}

int main(int n, char **v)
{
	const char *what = n > 1 ? v[1] : "";
	long number = n > 2 ? atol(v[2]) : 0;

	if (!strcmp(what, "exit"))
		return number;
	if (!strcmp(what, "spin")) {
		spin_here(number);
		return 0;
	}
	if (!strcmp(what, "sleep")) {
		usleep(number * 1000);
		return 0;
	}
	if (!strcmp(what, "kill-self"))
		raise(number);
	if (!strcmp(what, "leader-leaves")) {
		threads(1, wait_then_exit_group, (void *)number);
		syscall(SYS_exit, 1);
	}
	if (!strcmp(what, "last-thread")) {
		threads(1, wait_then_exit, (void *)number);
		syscall(SYS_exit, 0);
	}
	/* crowd N: N children, each of 64 threads of which half end by themselves while the group is ended */
	if (!strcmp(what, "crowd")) {
		for (long i = 0; i < number; i++) {
			pid_t pid = fork();
			if (!pid) {
				threads(31, sleep_on, 0);
				threads(32, exit_soon, 0);
				_exit(1);
			}
			if (pid < 0)
				die("fork");
			if (end_of(pid) != 1 << 8)
				die("a child of the crowd");
		}
		return 0;
	}
	/* thread-exec PROGRAM...: after 20 ms another thread than the first replaces the image */
	if (!strcmp(what, "thread-exec")) {
		command = v + 2;
		threads(1, exec_it, 0);
		threads(2, spin_on, (void *)10000);
		spin_here(10000);
	}
	/* exec MS PROGRAM...: sleeps a little, spins, then replaces its image */
	if (!strcmp(what, "exec")) {
		usleep(20000);
		spin_here(number);
		execv(v[3], v + 3);
		die("execv");
	}
	/* spawn N PROGRAM...: one after another */
	if (!strcmp(what, "spawn")) {
		while (number--)
			if (end_of(start(v + 3, 0)))
				die("a spawned program");
		return 0;
	}
	/* children N: N children sleep until this one ends; prints a line when all run */
	if (!strcmp(what, "children")) {
		int ends[2];
		char byte;
		if (pipe(ends))
			die("pipe");
		while (number--) {
			pid_t pid = fork();
			if (pid < 0)
				die("fork");
			if (!pid) {
				close(ends[1]);
				read(ends[0], &byte, 1);
				_exit(0);
			}
		}
		puts("there");
		fflush(stdout);
		read(0, &byte, 1);
		close(ends[1]);
		while (wait(0) > 0)
			;
		return 0;
	}
	/* forks N MS: N children, one after another, spin */
	if (!strcmp(what, "forks")) {
		while (number--) {
			pid_t pid = fork();
			if (!pid) {
				spin_here(atol(v[3]));
				_exit(0);
			}
			end_of(pid);
		}
		return 0;
	}
	/* reborn PID MS PROGRAM PROGRAM: two processes with this PID, one after another */
	if (!strcmp(what, "reborn")) {
		for (int life = 0; life < 2; life++) {
			pid_t want = number, got;
			struct args args = { .exit_signal = SIGCHLD, .set_tid = (uintptr_t)&want, .set_tid_size = 1 };
			got = syscall(SYS_clone3, &args, sizeof(args));
			if (got < 0)
				die("clone3");
			if (!got) {
				execl(v[4 + life], v[4 + life], "spin", v[3], NULL);
				_exit(98);
			}
			if (got != number || end_of(got))
				die("a reborn process");
		}
		return 0;
	}
	/* later SECONDS PROGRAM...: in a time namespace whose boot clock is ahead by SECONDS */
	if (!strcmp(what, "later")) {
		char text[64];
		int fd;
		if (unshare(CLONE_NEWTIME))
			die("unshare");
		fd = open("/proc/self/timens_offsets", O_WRONLY);
		snprintf(text, sizeof(text), "boottime %ld 0\n", number);
		if (fd < 0 || write(fd, text, strlen(text)) < 0)
			die("timens_offsets");
		close(fd);
		int status = end_of(start(v + 3, 1));
		return WIFEXITED(status) ? WEXITSTATUS(status) : 97;
	}
	fprintf(stderr, "what?\n");
	return 96;
}
"#;

/// Returns the path of the program.
pub(crate) fn life() -> PathBuf {
    super::program(COMM, SOURCE, &["-static", "-pthread"])
}

/// Copies the program to another command name and returns its path.
pub(crate) fn life_as(directory: &std::path::Path, comm: &str) -> PathBuf {
    let path = directory.join(comm);
    std::fs::copy(life(), &path).unwrap();
    path
}

/// Runs it to its end and checks that it succeeded.
#[track_caller]
pub(crate) fn run(arguments: &[&str]) {
    let status = Command::new(life()).args(arguments).status();
    assert!(status.as_ref().is_ok_and(std::process::ExitStatus::success), "{arguments:?}: {status:?}");
}
