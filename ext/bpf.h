/* The parts of the BPF iterator: btf.c finds where things are in this kernel, bpf.c reads them. */
#ifndef EDGEHOLD_BPF_H
#define EDGEHOLD_BPF_H

#include <stdint.h>

#include "bpf_cdef.h"

/* Indices of eh_layout.fields. */
enum eh_task_field {
    EH_TASK_PID,
    EH_TASK_PRIORITY,
    EH_TASK_STATE,
    EH_TASK_START,
    EH_TASK_EXECUTED,
    EH_TASK_RUN_DELAY,
    EH_TASK_TIMESLICES,
    EH_TASK_DL_RUNTIME,
    EH_TASK_DL_PERIOD,
    EH_TASK_DL_THROTTLED,
    EH_TASK_FIELDS,
};

#endif
