// SPDX-License-Identifier: Apache-2.0
/*
 * A guest that misbehaves with all it has, for measuring what other partitions notice of it.
 *
 * usage: edgehold-hog memory|fork      (exit status 64 for wrong usage; otherwise it never ends)
 *
 * memory: on each virtual CPU a process that writes one word into each cache line of its share of half the memory, over
 *         and over. Nothing of it stays in a cache.
 * fork:   every process forks for ever. The guest's kernel refuses when its memory is full, and they try again.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#define CACHE_LINE 64
#define WORDS (CACHE_LINE / sizeof(uint64_t))

/* Without a console it still runs. */
static void say(const char *line)
{
	if (write(STDOUT_FILENO, line, strlen(line)) < 0)
		return;
}

static int traffic(void)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	struct sysinfo info;
	volatile uint64_t *memory;
	size_t size;

	if (sysinfo(&info) != 0)
		return 1;
	size = (size_t)info.freeram * info.mem_unit / 2 / (size_t)cpus / CACHE_LINE * CACHE_LINE;
	for (long i = 1; i < cpus; i++)
		if (fork() == 0)
			break;
	memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		return 1;
	for (;;)
		for (size_t i = 0; i < size / sizeof(*memory); i += WORDS)
			memory[i]++;
}

static _Noreturn void bomb(void)
{
	signal(SIGCHLD, SIG_IGN);
	for (;;)
		fork();
}

int main(int argc, char **argv)
{
	if (argc == 2 && strcmp(argv[1], "memory") == 0) {
		say("edgehold-hog memory\n");
		return traffic();
	}
	if (argc == 2 && strcmp(argv[1], "fork") == 0) {
		say("edgehold-hog fork\n");
		bomb();
	}
	say("edgehold-hog usage: memory|fork\n");
	return 64;
}
