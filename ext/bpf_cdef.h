/* Every deadline thread's counters by one read: see bpf.c. Read by cffi (no preprocessor) and included by bpf.h. */

/*
 * One thread in SCHED_DEADLINE. executed, run_delay and timeslices are those of its schedstat file; dl_runtime and
 * period are what is left of its budget, and how often it gets one.
 */
struct eh_task {
    int32_t tid;                /* as the initial pid namespace has it */
    uint32_t state;             /* bits of fs/proc/array.c: 0 runs or wants to, 0x80: ended */
    uint64_t start_boottime_ns; /* CLOCK_BOOTTIME of its start, without a time namespace's offset */
    uint64_t executed_ns;
    uint64_t run_delay_ns;
    uint64_t timeslices;
    int64_t dl_runtime_ns; /* 0 or less: used up; as old as the last tick */
    uint64_t period_ns;
    uint32_t throttled; /* 0 or 1; always 0 without EH_BPF_THROTTLED */
    uint32_t reserved;
};

/* A loaded program and the iterator that it is attached to. */
struct eh_bpf {
    int32_t program_fd;
    int32_t link_fd;
    uint32_t flags;
    uint32_t reserved;
};
#define EH_BPF_THROTTLED 1

/* Where a field of struct task_struct is: bytes to load from offset, and the bits of them from shift on; 0: missing. */
struct eh_field {
    uint32_t offset;
    uint8_t bytes;
    uint8_t shift;
    uint8_t bits;
    uint8_t reserved;
};

/* The fields in the order of btf.c's table, and the BTF id of the function that an iterator over tasks attaches to. */
struct eh_layout {
    uint32_t iterator_id;
    struct eh_field fields[10];
};

/* Finds the layout in a kernel's BTF. 0 or -errno: EPROTO not BTF, ENOTSUP something is missing; `why` says what. */
int eh_btf_layout(const void *data, uint64_t length, struct eh_layout *out, char *why, int size);

/*
 * Loads the program and creates the iterator. 0 or -errno, with the reason in `why`: ENOENT no BTF file, EPROTO and
 * ENOTSUP as above, EPERM no privilege, EACCES and others the kernel's verifier (`why` has its last lines).
 */
int eh_bpf_open(struct eh_bpf *out, char *why, int size);
/*
 * One pass over all threads: returns how many records were written, -ENOSPC where there are more than max, or -errno.
 * Allocates nothing. A thread that is not there at once may still exist: it is another policy's, or was passed by.
 */
int eh_bpf_read(const struct eh_bpf *self, struct eh_task *out, int max);
void eh_bpf_close(struct eh_bpf *self);
