/*
 * From which memory node the calling thread's pages are taken: set_mempolicy(2), which no module of Python has.
 * Linking libnuma for one call is not worth a dependency.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernel.h"

/* MAX_NUMNODES is at most 1 << 10 on every machine (CONFIG_NODES_SHIFT). */
#define NODES 1024
#define WORD_BITS (8 * (int)sizeof(unsigned long))

int eh_set_mempolicy(int mode, int node)
{
    unsigned long mask[NODES / WORD_BITS] = {0};
    long result;

    if (node >= NODES)
        return -EINVAL;
    if (node < 0)
        result = syscall(SYS_set_mempolicy, mode, NULL, 0);
    else {
        mask[node / WORD_BITS] = 1ul << (node % WORD_BITS);
        /* The kernel reads one bit less than it is told. */
        result = syscall(SYS_set_mempolicy, mode, mask, NODES + 1);
    }
    return result == 0 ? 0 : -errno;
}
