/*
 * Starts RATE processes per second for SECONDS, and prints their number and their CPU time by the kernel's account:
 *   storm RATE SECONDS PROGRAM MS
 * The program may be a copy of this one: with MS as its only argument it computes for MS milliseconds of CPU time and exits.
 * Such a copy also reports its CPU time in main(), through the pipe that STORM_PIPE names: `main_seconds` is the sum. The rest
 * of its CPU time belongs to fork, execve, the dynamic linker, and the exit.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double now(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

__attribute__((noinline)) void storm_work(double seconds)
{
	while (now(CLOCK_PROCESS_CPUTIME_ID) < seconds)
		for (volatile int i = 0; i < 2000; i++)
			;
}

/* The work of one process of the storm. */
static int work(double seconds)
{
	double begun = now(CLOCK_PROCESS_CPUTIME_ID), used;
	const char *pipe = getenv("STORM_PIPE");

	storm_work(seconds);
	used = now(CLOCK_PROCESS_CPUTIME_ID) - begun;
	return pipe && write(atoi(pipe), &used, sizeof(used)) != sizeof(used);
}

/* Returns the sum of what processes have reported since the last call. */
static double reported(int from)
{
	double sum = 0, used[512];
	ssize_t bytes;

	while ((bytes = read(from, used, sizeof(used))) > 0)
		for (ssize_t i = 0; i < bytes / (ssize_t)sizeof(*used); i++)
			sum += used[i];
	return sum;
}

int main(int argc, char **argv)
{
	double begun = now(CLOCK_MONOTONIC), rate, seconds, in_main = 0;
	struct rusage used;
	long started = 0, running = 0, failed = 0;
	int status, ends[2];
	char name[12];

	if (argc == 2)
		return work(atof(argv[1]) / 1000);
	if (argc != 5) {
		fprintf(stderr, "storm RATE SECONDS PROGRAM MS\n");
		return 2;
	}
	if (pipe(ends) || fcntl(ends[0], F_SETFL, O_NONBLOCK)) {
		perror("storm: pipe");
		return 1;
	}
	snprintf(name, sizeof(name), "%d", ends[1]);
	setenv("STORM_PIPE", name, 1);
	rate = atof(argv[1]);
	seconds = atof(argv[2]);
	while (now(CLOCK_MONOTONIC) - begun < seconds) {
		double behind = (now(CLOCK_MONOTONIC) - begun) * rate - started;
		if (behind < 1) {
			usleep(1000);
		} else {
			pid_t pid = vfork();
			if (!pid) {
				execl(argv[3], argv[3], argv[4], NULL);
				_exit(99);
			}
			started++;
			running += pid > 0;
		}
		while (running && waitpid(-1, &status, WNOHANG) > 0) {
			running--;
			failed += status != 0;
		}
		in_main += reported(ends[0]);
	}
	while (running && waitpid(-1, &status, 0) > 0) {
		running--;
		failed += status != 0;
		in_main += reported(ends[0]);
	}
	in_main += reported(ends[0]);
	getrusage(RUSAGE_CHILDREN, &used);
	printf("{\"processes\": %ld, \"failed\": %ld, \"cpu_seconds\": %.3f, \"main_seconds\": %.3f, \"seconds\": %.3f}\n",
	       started, failed,
	       used.ru_utime.tv_sec + used.ru_utime.tv_usec / 1e6 + used.ru_stime.tv_sec + used.ru_stime.tv_usec / 1e6,
	       in_main, now(CLOCK_MONOTONIC) - begun);
	return 0;
}
