// SPDX-License-Identifier: Apache-2.0
/*
 * The guest's periodic job: a fixed amount of work every period, and one line on standard output for each job.
 *
 * It exists to make a too small CPU budget visible. Therefore the work is a count of loop iterations, never "spin
 * until the clock says so": such a loop would do less work while the virtual CPU is throttled and so hide it.
 * And a late job keeps its release on the grid, so that its response time contains the backlog.
 *
 * usage: edgehold-job WORK_MS PERIOD_MS      (both may be fractional; exit status 64 for wrong usage)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define NSEC_PER_MSEC 1000000LL
#define NSEC_PER_SEC 1000000000LL
#define MAX_MS 60000.0

/* Calibration has three phases; each ends at its time since the start (ns) or after MAX_RUNS, whichever is first. */
#define CHUNK_NS (NSEC_PER_MSEC / 2)
#define CHUNK_END (400 * NSEC_PER_MSEC)
#define REFINE_END (800 * NSEC_PER_MSEC)
#define CONFIRM_END (1200 * NSEC_PER_MSEC)
#define MAX_RUNS 12
/* Longer jobs are not run during calibration: one run could pass the limit of 1.5 s by itself. */
#define LONGEST_TRIAL_NS (250 * NSEC_PER_MSEC)

static volatile uint64_t sink;

static int64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * NSEC_PER_SEC + ts.tv_nsec;
}

/* A chain in which each step needs the one before: no compiler and no CPU can shorten or vectorise it. */
static __attribute__((noinline)) void work(uint64_t iterations)
{
	uint64_t x = sink | 1;

	for (uint64_t i = 0; i < iterations; i++) {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
	}
	sink = x;
}

static int64_t timed(uint64_t iterations)
{
	int64_t start = now_ns();

	work(iterations);
	return now_ns() - start;
}

/*
 * The fastest of up to max_runs runs, in ns; no new run begins after `end`. Noise of the host only ever adds time, so
 * the fastest run is the nearest to the truth.
 */
static int64_t fastest(uint64_t iterations, int max_runs, int64_t end)
{
	int64_t best = INT64_MAX;

	for (int i = 0; i < max_runs && (i == 0 || now_ns() < end); i++) {
		int64_t t = timed(iterations);

		if (t < best)
			best = t;
	}
	return best > 0 ? best : 1;
}

/*
 * Finds the number of iterations that takes work_ns on an undisturbed virtual CPU. Short chunks come first: they fit
 * between two throttlings or preemptions, so that their fastest run is right even on a busy host. A run of the full
 * length then corrects for what a chunk does not see (timer ticks, the cost of reading the clock); it is believed
 * only when it is near to the chunks' answer.
 *
 * Returns the iterations; *measured_ns is the fastest full run, or the estimate where there is no credible one.
 */
static uint64_t calibrate(int64_t work_ns, int64_t *measured_ns)
{
	int64_t start = now_ns();
	int64_t t = timed(1000);
	uint64_t chunk = 1000;
	uint64_t n;

	while (t < CHUNK_NS && chunk < UINT64_MAX / 4) {
		chunk *= 2;
		t = fastest(chunk, 3, start + CHUNK_END);
	}
	t = fastest(chunk, 200, start + CHUNK_END);
	n = (uint64_t)((double)chunk * (double)work_ns / (double)t);
	if (n == 0)
		n = 1;
	*measured_ns = work_ns;
	if (work_ns > LONGEST_TRIAL_NS)
		return n;

	for (int phase = 0; phase < 2; phase++) {
		double ratio;

		t = fastest(n, MAX_RUNS, start + (phase == 0 ? REFINE_END : CONFIRM_END));
		ratio = (double)t / (double)work_ns;
		if (ratio < 0.9 || ratio > 1.1)
			break; /* disturbed: keep what the chunks say */
		if (phase == 0)
			n = (uint64_t)((double)n / ratio) + 1;
		else
			*measured_ns = t;
	}
	return n;
}

static void sleep_until(int64_t when)
{
	struct timespec ts = {.tv_sec = when / NSEC_PER_SEC, .tv_nsec = when % NSEC_PER_SEC};

	while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &ts, NULL) == EINTR)
		;
}

/* One line, one write(2): nothing can come in between. A console that went away is no reason to stop the load. */
static void put_line(const char *line, int length)
{
	if (write(STDOUT_FILENO, line, (size_t)length) != length)
		return;
}

/* Milliseconds, more than 0 and at most MAX_MS, as ns; -1 if the text is anything else. */
static int64_t parse_ms(const char *text)
{
	char *end;
	double ms = strtod(text, &end);

	if (end == text || *end != '\0' || !(ms > 0) || ms > MAX_MS)
		return -1;
	return (int64_t)(ms * (double)NSEC_PER_MSEC + 0.5);
}

#define MS_FORMAT "%lld.%03lld"
#define MS_VALUES(ns) (long long)((ns) / NSEC_PER_MSEC), (long long)((ns) % NSEC_PER_MSEC / 1000)

int main(int argc, char **argv)
{
	int64_t work_ns = argc == 3 ? parse_ms(argv[1]) : -1;
	int64_t period_ns = argc == 3 ? parse_ms(argv[2]) : -1;
	int64_t origin, measured_ns;
	uint64_t iterations;
	char line[160];
	int length;

	if (work_ns < 1 || period_ns < 1) {
		length = snprintf(line, sizeof(line), "edgehold-job usage: WORK_MS PERIOD_MS, each above 0 and at most %.0f\n",
				  MAX_MS);
		put_line(line, length);
		return 64;
	}

	iterations = calibrate(work_ns, &measured_ns);
	length = snprintf(line, sizeof(line), "edgehold-job calibrated work_ms=" MS_FORMAT " iterations=%llu\n",
			  MS_VALUES(measured_ns), (unsigned long long)iterations);
	put_line(line, length);

	origin = now_ns();
	for (int64_t n = 1;; n++) {
		int64_t release = origin + n * period_ns;
		int64_t response;

		sleep_until(release);
		work(iterations);
		response = now_ns() - release;
		length = snprintf(line, sizeof(line), "edgehold-job n=%lld release_ms=" MS_FORMAT " response_ms=" MS_FORMAT "\n",
				  (long long)n, MS_VALUES(n * period_ns), MS_VALUES(response));
		put_line(line, length);
	}
}
