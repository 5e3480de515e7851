// SPDX-License-Identifier: Apache-2.0
/*
 * Opens the libraries that it is given, then works in one of them for half a millisecond twice a second: a process that is
 * hardly ever there when a tick comes.
 */
#include <dlfcn.h>
#include <time.h>
#include <unistd.h>

volatile long sink;

static long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000L + time.tv_nsec;
}

int main(int count, char **names)
{
	long (*enter[16])(long);
	int libraries = 0;

	for (int i = 1; i < count && libraries < 16; i++) {
		void *library = dlopen(names[i], RTLD_NOW);

		if (!library)
			return 1;
		enter[libraries++] = (long (*)(long))dlsym(library, "enter");
	}
	for (long turn = 0; libraries; turn++) {
		usleep(500000);
		for (long until = now() + 500000; now() < until;)
			sink += enter[turn % libraries](2000);
	}
	return 1;
}
