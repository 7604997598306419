/* The extension's border: fixed-width structures in, -errno out. cdef.h has every declaration. */
#ifndef EDGEHOLD_KERNEL_H
#define EDGEHOLD_KERNEL_H

#include <stdint.h>
#include <sys/types.h>

#include "cdef.h"

/* The state letter in the text of a stat file (proc_pid_stat(5)), or -EPROTO. For the other parts of the extension. */
int eh_state_letter(const char *head, ssize_t length);

#endif
