/*
 * When one thread came to a CPU and when it left: PERF_RECORD_SWITCH (perf_event_open(2)). The kernel writes the records
 * into a ring that is shared with us, so that a look costs no system call and the thread is not disturbed by it.
 * No counter is opened: the event is a dummy that only carries these records.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <errno.h>
#include <linux/perf_event.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "perf.h"

#if defined(__x86_64__)
static_assert(SYS_perf_event_open == 298, "perf_event_open's number is not this machine's");
#elif defined(__aarch64__)
static_assert(SYS_perf_event_open == 241, "perf_event_open's number is not this machine's");
#else
#error "edgehold knows the system call numbers of x86_64 and aarch64"
#endif

/* The kernel's layouts (include/uapi/linux/perf_event.h). */
static_assert(sizeof(struct perf_event_header) == 8, "struct perf_event_header");
static_assert(offsetof(struct perf_event_attr, clockid) == 92, "perf_event_attr.clockid");
static_assert(offsetof(struct perf_event_mmap_page, data_head) == 1024, "perf_event_mmap_page.data_head");
static_assert(offsetof(struct perf_event_mmap_page, data_size) == 1048, "perf_event_mmap_page.data_size");
static_assert(sizeof(struct eh_switch) == 16, "struct eh_switch is what Python unpacks");

/* Every record ends with its time, because of sample_id_all and PERF_SAMPLE_TIME. */
struct record {
    struct perf_event_header header;
    uint64_t time_ns;
};
static_assert(sizeof(struct record) == 16, "a PERF_RECORD_SWITCH");

int eh_perf_open(int32_t tid)
{
    struct perf_event_attr attr = {
        .type = PERF_TYPE_SOFTWARE,
        .size = sizeof(attr),
        .config = PERF_COUNT_SW_DUMMY,
        .sample_type = PERF_SAMPLE_TIME,
        .exclude_kernel = 1, /* a dummy counts nothing; this is what perf_event_paranoid 2 asks of users */
        .exclude_hv = 1,
        .sample_id_all = 1,
        .use_clockid = 1,
        .context_switch = 1,
        .clockid = CLOCK_MONOTONIC,
    };
    long fd = syscall(SYS_perf_event_open, &attr, tid, -1, -1, PERF_FLAG_FD_CLOEXEC);

    return fd < 0 ? -errno : (int)fd;
}

int eh_perf_map(int fd, int pages, struct eh_perf *perf)
{
    size_t bytes = (size_t)(1 + pages) * (size_t)sysconf(_SC_PAGESIZE);
    void *page;

    memset(perf, 0, sizeof(*perf));
    page = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page == MAP_FAILED)
        return -errno;
    perf->page = page;
    perf->bytes = bytes;
    return 0;
}

int eh_perf_unmap(struct eh_perf *perf)
{
    void *page = perf->page;

    perf->page = NULL;
    return page == NULL || munmap(page, perf->bytes) == 0 ? 0 : -errno;
}

/* n bytes at a position that counts on for ever, out of a ring whose size is a power of two. */
static void copy_out(void *to, const unsigned char *data, uint64_t size, uint64_t at, size_t n)
{
    uint64_t begin = at & (size - 1);
    size_t first = n < size - begin ? n : (size_t)(size - begin);

    memcpy(to, data + begin, first);
    memcpy((unsigned char *)to + first, data, n - first);
}

static uint32_t switch_flags(const struct perf_event_header *header)
{
    if (header->type == PERF_RECORD_LOST)
        return EH_SWITCH_LOST;
    if (!(header->misc & PERF_RECORD_MISC_SWITCH_OUT))
        return 0;
    return header->misc & PERF_RECORD_MISC_SWITCH_OUT_PREEMPT ? EH_SWITCH_OUT | EH_SWITCH_PREEMPTED : EH_SWITCH_OUT;
}

int eh_perf_drain(struct eh_perf *perf, struct eh_switch *out, int max)
{
    struct perf_event_mmap_page *page = perf->page;
    const unsigned char *data;
    uint64_t size, head, tail;
    int count = 0, result = 0;

    if (page == NULL)
        return -EBADF;
    data = (const unsigned char *)page + page->data_offset;
    size = page->data_size;
    tail = page->data_tail;
    /* The kernel writes the records, then data_head: they must not be read before it. */
    head = __atomic_load_n(&page->data_head, __ATOMIC_ACQUIRE);
    /* The kernel never fills the last byte: this is where a further record finds no room. */
    if (head - tail + sizeof(struct record) >= size)
        perf->full = 1;
    while (tail != head && count < max) {
        struct record record;

        copy_out(&record.header, data, size, tail, sizeof(record.header));
        if (record.header.size < sizeof(record) || record.header.size > head - tail) {
            result = -EPROTO;
            tail = head;
            break;
        }
        if (record.header.type == PERF_RECORD_SWITCH || record.header.type == PERF_RECORD_LOST) {
            uint64_t at = tail + record.header.size - sizeof(record.time_ns);

            copy_out(&record.time_ns, data, size, at, sizeof(record.time_ns));
            out[count++] = (struct eh_switch){.time_ns = record.time_ns, .flags = switch_flags(&record.header)};
            perf->lost += record.header.type == PERF_RECORD_LOST;
        }
        tail += record.header.size;
    }
    /* The kernel tells a loss only with the next record, which may never come. */
    if (result == 0 && perf->full && count < max) {
        out[count] = (struct eh_switch){.time_ns = count ? out[count - 1].time_ns : 0, .flags = EH_SWITCH_LOST};
        count++;
        perf->lost++;
        perf->full = 0;
    }
    /* Only what was read is given back to the kernel. */
    __atomic_store_n(&page->data_tail, tail, __ATOMIC_RELEASE);
    return result < 0 ? result : count;
}
