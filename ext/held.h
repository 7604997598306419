/* The table of held threads: held_cdef.h has every declaration. bpf_cdef.h has struct eh_task. */
#ifndef EDGEHOLD_HELD_H
#define EDGEHOLD_HELD_H

#include <stdint.h>

#include "bpf.h"
#include "held_cdef.h"

/* A window's time as of one period. No sum of it overflows, whatever a window is said to have. */
uint64_t eh_per_period(uint64_t ns, uint64_t period_ns, uint64_t elapsed_ns);

#endif
