/* The table of held threads: held_cdef.h has every declaration. bpf_cdef.h has struct eh_task. */
#ifndef EDGEHOLD_HELD_H
#define EDGEHOLD_HELD_H

#include <stdint.h>

#include "bpf.h"
#include "held_cdef.h"

#endif
