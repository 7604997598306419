/* What Python sees of the extension. Read by cffi (no preprocessor) and included by kernel.h, so both sides share one text. */

/* struct sched_attr of include/uapi/linux/sched/types.h, SCHED_ATTR_SIZE_VER1. Times in ns, nice -20..19, priority 1..99. */
struct eh_sched_attr {
    uint32_t size;
    uint32_t policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_ns;
    uint64_t deadline_ns;
    uint64_t period_ns;
    uint32_t util_min;
    uint32_t util_max;
};

/* One thread's schedstat: executed and waited time since its start in ns, runs, and when it was read (CLOCK_MONOTONIC). */
struct eh_schedstat {
    uint64_t executed_ns;
    uint64_t run_delay_ns;
    uint64_t timeslices;
    uint64_t time_ns;
    int32_t error; /* 0 or a positive errno; the other fields count only when it is 0 */
    int32_t reserved;
};

/* How a thread left SCHED_DEADLINE. */
struct eh_left {
    int32_t state;      /* the state letter of proc_pid_stat(5) that decided the way */
    int32_t step_error; /* 0 or the errno of the step before (shrink or grow); only a refused shrink stops the leaving */
    int32_t fallback;   /* 1: the wanted policy was refused and the thread is in SCHED_OTHER instead */
    int32_t stayed;     /* 1: it sleeps and could not be shrunk: it is in its reservation as before */
};

/* Each returns 0 (or a count, where it says so) or -errno, and allocates nothing. tid 0 is the calling thread. */
int eh_sched_setattr(int32_t tid, const struct eh_sched_attr *attr);
int eh_sched_getattr(int32_t tid, struct eh_sched_attr *attr);
int eh_sched_leave(int32_t tid, int stat_fd, const struct eh_sched_attr *if_asleep, const struct eh_sched_attr *if_running,
                   const struct eh_sched_attr *wanted, struct eh_left *left);
/* Reads n schedstat files through descriptors that the caller keeps. Returns how many could not be read. */
int eh_schedstat_read(const int *fds, struct eh_schedstat *out, int n);
/* A timer as a descriptor (timerfd_create(2)), which becomes readable at a time of CLOCK_MONOTONIC; 0: never. */
int eh_timer_open(void);
int eh_timer_set(int fd, uint64_t at_ns);
/* The calling thread's memory policy (set_mempolicy(2)): mode with one node, or with none where node is negative. */
int eh_set_mempolicy(int mode, int node);
