// SPDX-License-Identifier: Apache-2.0
/*
 * A crowd for the benchmarks: COUNT threads that sleep, or that work WORK_US of CPU time every PERIOD_US, evenly spread.
 * Prints "ready"; ends when its standard input does. See tests.bench.deadline_host.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define NS_PER_S 1000000000LL

static long count;
static long long work_ns, period_ns, begin_ns;

static long long now_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return now.tv_sec * NS_PER_S + now.tv_nsec;
}

static void sleep_until(long long at_ns)
{
	struct timespec at = {.tv_sec = at_ns / NS_PER_S, .tv_nsec = at_ns % NS_PER_S};

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL) == EINTR)
		;
}

static void *run(void *argument)
{
	long number = (long)argument;
	long long due_ns;

	if (!work_ns)
		for (;;)
			pause();
	/* Each has its own place in the period: all at once would be a queue of COUNT jobs. */
	due_ns = begin_ns + period_ns * number / count;
	for (;;) {
		long long until_ns;

		sleep_until(due_ns);
		until_ns = now_ns(CLOCK_THREAD_CPUTIME_ID) + work_ns;
		while (now_ns(CLOCK_THREAD_CPUTIME_ID) < until_ns)
			;
		/* A late one leaves out what it missed: a backlog is no steady load. */
		while (due_ns <= now_ns(CLOCK_MONOTONIC))
			due_ns += period_ns;
	}
	return NULL;
}

int main(int argc, char **argv)
{
	pthread_attr_t small;
	char byte;

	if (argc != 4) {
		fprintf(stderr, "usage: %s COUNT WORK_US PERIOD_US\n", argv[0]);
		return 64;
	}
	count = strtol(argv[1], NULL, 10);
	work_ns = strtoll(argv[2], NULL, 10) * 1000;
	period_ns = strtoll(argv[3], NULL, 10) * 1000;
	begin_ns = now_ns(CLOCK_MONOTONIC) + NS_PER_S;
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 64 * 1024);
	for (long number = 0; number < count; number++) {
		pthread_t thread;
		int error = pthread_create(&thread, &small, run, (void *)number);

		if (error) {
			fprintf(stderr, "thread %ld: %s\n", number, strerror(error));
			return 1;
		}
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		ssize_t got = read(STDIN_FILENO, &byte, 1);

		if (got == 0 || (got < 0 && errno != EINTR))
			_exit(0);
	}
}
