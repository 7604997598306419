/* The context switches of single threads. Read by cffi (no preprocessor) and included by perf.h. */

/* What happened: without OUT the thread came to a CPU. LOST stands where records are missing; it is no switch. */
enum eh_switch_flag {
    EH_SWITCH_OUT = 1,
    EH_SWITCH_PREEMPTED = 2, /* with OUT: it left while it wanted to go on; a throttled reservation counts as that */
    EH_SWITCH_LOST = 4,
};

/* One record; time_ns is CLOCK_MONOTONIC. */
struct eh_switch {
    uint64_t time_ns;
    uint32_t flags;
    uint32_t reserved;
};

/* A ring that the kernel writes into. eh_perf_map fills it, eh_perf_unmap ends it; nothing else changes it but a drain. */
struct eh_perf {
    void *page;     /* the head of the mapping, struct perf_event_mmap_page */
    uint64_t bytes; /* of the whole mapping */
    int32_t full;   /* 1: the kernel may have had no room, and that was not told yet */
    uint32_t lost;  /* how many records with LOST were given out */
};

/* A descriptor that records the switches of one thread, or -errno. The caller closes it. */
int eh_perf_open(int32_t tid);
/* Maps the descriptor's ring, of so many pages for data (a power of two). Returns 0 or -errno; holds memory until eh_perf_unmap. */
int eh_perf_map(int fd, int pages, struct eh_perf *perf);
int eh_perf_unmap(struct eh_perf *perf);
/* Takes at most max records, oldest first. Returns how many: fewer than max means that the ring is empty. -EPROTO: not such a ring. */
int eh_perf_drain(struct eh_perf *perf, struct eh_switch *out, int max);
