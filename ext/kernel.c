/*
 * System calls and kernel files that are too hot, or whose steps must follow each other too closely, for Python.
 * Everything here is re-entrant, keeps no state and allocates nothing; cffi releases the GIL around each call.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "kernel.h"

/* Old libc headers lack the names; the numbers are the kernel's ABI and differ between machines. */
#if defined(__x86_64__)
#define EH_NR_SCHED_SETATTR 314
#define EH_NR_SCHED_GETATTR 315
#elif defined(__aarch64__)
#define EH_NR_SCHED_SETATTR 274
#define EH_NR_SCHED_GETATTR 275
#else
#error "edgehold knows the system call numbers of x86_64 and aarch64"
#endif
#ifdef SYS_sched_setattr
static_assert(SYS_sched_setattr == EH_NR_SCHED_SETATTR, "sched_setattr's number is not this machine's");
static_assert(SYS_sched_getattr == EH_NR_SCHED_GETATTR, "sched_getattr's number is not this machine's");
#endif

/* The kernel's layout (include/uapi/linux/sched/types.h). */
static_assert(sizeof(struct eh_sched_attr) == 56, "struct sched_attr is 56 bytes (SCHED_ATTR_SIZE_VER1)");
static_assert(offsetof(struct eh_sched_attr, flags) == 8, "sched_flags");
static_assert(offsetof(struct eh_sched_attr, priority) == 20, "sched_priority");
static_assert(offsetof(struct eh_sched_attr, runtime_ns) == 24, "sched_runtime");
static_assert(offsetof(struct eh_sched_attr, period_ns) == 40, "sched_period");
static_assert(offsetof(struct eh_sched_attr, util_max) == 52, "sched_util_max");
static_assert(sizeof(struct eh_schedstat) == 40, "struct eh_schedstat is what Python unpacks");

/* "pid (comm) state": a pid of 7 digits, a comm of at most 15 characters (64 for kernel threads). */
#define STAT_HEAD 128
/* Three numbers of at most 20 digits, two spaces, a newline. */
#define SCHEDSTAT_LINE 64

int eh_sched_setattr(int32_t tid, const struct eh_sched_attr *attr)
{
    struct eh_sched_attr copy = *attr;

    copy.size = sizeof(copy);
    return syscall(EH_NR_SCHED_SETATTR, tid, &copy, 0) == 0 ? 0 : -errno;
}

int eh_sched_getattr(int32_t tid, struct eh_sched_attr *attr)
{
    memset(attr, 0, sizeof(*attr));
    return syscall(EH_NR_SCHED_GETATTR, tid, attr, sizeof(*attr), 0) == 0 ? 0 : -errno;
}

int eh_state_letter(const char *head, ssize_t length)
{
    /* The comm may itself contain ") R": the last parenthesis of the file is the one that ends it. */
    for (ssize_t at = length - 1; at >= 0; at--)
        if (head[at] == ')')
            return at + 2 < length ? (unsigned char)head[at + 2] : -EPROTO;
    return -EPROTO;
}

/* The state letter of an open /proc/<tid>/stat, or -errno. */
static int thread_state(int stat_fd)
{
    char head[STAT_HEAD];
    ssize_t length = pread(stat_fd, head, sizeof(head), 0);

    if (length < 0)
        return -errno;
    return eh_state_letter(head, length);
}

/*
 * Takes a thread out of SCHED_DEADLINE by the way that its state asks for, with nothing between the steps: what is safe
 * for a thread that sleeps is a trap for one that is throttled, and the other way round. The shrunken reservation in
 * particular must not outlive this call, so a refused policy ends in SCHED_OTHER. A sleeping thread whose reservation
 * can't be shrunk (it was pinned meanwhile) would leave its whole share behind: it stays, unless there is no such step.
 */
int eh_sched_leave(int32_t tid, int stat_fd, const struct eh_sched_attr *if_asleep, const struct eh_sched_attr *if_running,
                   const struct eh_sched_attr *wanted, struct eh_left *left)
{
    const struct eh_sched_attr other = {.policy = 0};
    const struct eh_sched_attr *step;
    int result = thread_state(stat_fd);

    memset(left, 0, sizeof(*left));
    if (result < 0)
        return result;
    left->state = result;
    step = result == 'R' ? if_running : if_asleep;
    if (step != NULL)
        left->step_error = -eh_sched_setattr(tid, step);
    if (result != 'R' && left->step_error != 0) {
        if (left->step_error == ESRCH)
            return -ESRCH;
        left->stayed = 1;
        return 0;
    }
    result = eh_sched_setattr(tid, wanted);
    if (result < 0 && result != -ESRCH && eh_sched_setattr(tid, &other) == 0)
        left->fallback = 1;
    return result;
}

/* Digits up to a character that is none; *text is left there. Fails where there is no digit. */
static int read_number(const char **text, uint64_t *number)
{
    const char *at = *text;
    uint64_t value = 0;

    while (*at >= '0' && *at <= '9')
        value = value * 10 + (uint64_t)(*at++ - '0');
    if (at == *text)
        return -EPROTO;
    *text = at;
    *number = value;
    return 0;
}

static int read_one(int fd, struct eh_schedstat *out)
{
    char line[SCHEDSTAT_LINE + 1];
    const char *at = line;
    struct timespec now;
    ssize_t length = pread(fd, line, SCHEDSTAT_LINE, 0);

    if (length < 0)
        return errno;
    line[length] = '\0';
    clock_gettime(CLOCK_MONOTONIC, &now);
    out->time_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    if (read_number(&at, &out->executed_ns) < 0 || *at++ != ' ' || read_number(&at, &out->run_delay_ns) < 0 ||
        *at++ != ' ' || read_number(&at, &out->timeslices) < 0)
        return EPROTO;
    return 0;
}

int eh_schedstat_read(const int *fds, struct eh_schedstat *out, int n)
{
    int failed = 0;

    for (int i = 0; i < n; i++) {
        out[i].reserved = 0;
        out[i].error = read_one(fds[i], &out[i]);
        failed += out[i].error != 0;
    }
    return failed;
}

int eh_timer_open(void)
{
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);

    return fd < 0 ? -errno : fd;
}

int eh_timer_set(int fd, uint64_t at_ns)
{
    const struct itimerspec at = {
        .it_value = {.tv_sec = (time_t)(at_ns / 1000000000u), .tv_nsec = (long)(at_ns % 1000000000u)},
    };

    return timerfd_settime(fd, TFD_TIMER_ABSTIME, &at, NULL) == 0 ? 0 : -errno;
}
