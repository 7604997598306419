/* Context switches of single threads; perf_cdef.h has every declaration. */
#ifndef EDGEHOLD_PERF_H
#define EDGEHOLD_PERF_H

#include <stdint.h>

#include "perf_cdef.h"

#endif
