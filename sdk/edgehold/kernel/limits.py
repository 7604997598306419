"""Bounds of the kernel's own, apart from what calls it: a contract may name them without loading the extension."""

# A SCHED_DEADLINE reservation (kernel/sched/deadline.c, __checkparam_dl, with the default sysctls), in nanoseconds.
DL_MIN_RUNTIME_NS = 1024
DL_MIN_PERIOD_NS = 100_000
DL_MAX_PERIOD_NS = 4_194_304_000
