// SPDX-License-Identifier: Apache-2.0
/* `crowd N`: starts N idle processes, reports when they run, and ends them when standard input ends. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <unistd.h>

int main(int count, char **arguments)
{
	int n = count > 1 ? atoi(arguments[1]) : 1;
	char byte;

	for (int i = 0; i < n; i++) {
		switch (fork()) {
		case -1:
			perror("fork");
			kill(0, SIGTERM);
			return 1;
		case 0:
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			for (;;)
				pause();
		}
	}
	puts("ready");
	fflush(stdout);
	while (read(0, &byte, 1) > 0)
		;
	return 0;
}
