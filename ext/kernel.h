/* The extension's border: fixed-width structures in, -errno out. cdef.h has every declaration. */
#ifndef EDGEHOLD_KERNEL_H
#define EDGEHOLD_KERNEL_H

#include <stdint.h>

#include "cdef.h"

#endif
