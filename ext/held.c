/*
 * One pass over all held threads: sample, judge, apply the rule, tell only what somebody must do. It is in C because at
 * a thousand threads building a Python object for each costs several times what the kernel takes to answer. Nothing is
 * kept here: the caller owns every array.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "held.h"
#include "kernel.h"

#define SECOND 1000000000ull
/* proc(5) counts a task's start in this, on every architecture that Linux has for userspace (USER_HZ). */
#define NS_PER_TICK 10000000ull
/* How often a reservation is asked whether it still is ours: a system call, for what seldom happens. */
#define CHECK_NS (4 * SECOND)
/* A thread that sleeps is looked at again after this, then after twice as long, up to the last. */
#define ASLEEP_FIRST_NS (5 * SECOND)
#define ASLEEP_LAST_NS (40 * SECOND)
/* Of a cycle, how much a window must be long to say something. */
#define SHORTEST_WINDOW(cycle) ((cycle) / 2)
#define POLICY_DEADLINE 6
#define STATE_RUNNING 0 /* TASK_RUNNING */
#define STATE_ENDED 0x80 /* TASK_DEAD: its parent has not looked yet */

static_assert(sizeof(struct eh_sample) == 80, "struct eh_sample is what Python unpacks");
static_assert(sizeof(struct eh_todo) == 16, "struct eh_todo is what Python unpacks");

static uint64_t now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND + (uint64_t)now.tv_nsec;
}

/* A small file of /proc into a buffer, ended by a zero; its length or -errno. */
static ssize_t slurp(int32_t tid, const char *name, char *into, size_t size)
{
    char path[64];
    ssize_t length;
    int fd, error;

    snprintf(path, sizeof(path), "/proc/%d/task/%d/%s", tid, tid, name);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return errno == ENOENT ? -ESRCH : -errno;
    length = read(fd, into, size - 1);
    error = errno;
    close(fd);
    if (length < 0)
        return -error;
    into[length] = '\0';
    return length;
}

int eh_thread_state(int32_t tid)
{
    char head[128];
    ssize_t length = slurp(tid, "stat", head, sizeof(head));

    if (length < 0)
        return (int)length;
    return length ? eh_state_letter(head, length) : -ESRCH;
}

int eh_is_throttled(int32_t tid)
{
    char text[4096];
    const char *at;

    if (eh_thread_state(tid) != 'R')
        return 0;
    if (slurp(tid, "sched", text, sizeof(text)) < 0 || !(at = strstr(text, "\ndl.runtime")) || !(at = strchr(at, ':')))
        return -1;
    return strtoll(at + 1, NULL, 10) <= 0;
}

/* Where a tid's record is, or the free entry where it belongs: open addressing, built for each pass and kept by nobody. */
static int32_t *entry_of(const struct eh_pass *pass, int32_t tid)
{
    uint64_t mask = pass->index_size - 1, at = ((uint32_t)tid * 2654435761u) & mask;

    while (pass->index[at] >= 0 && pass->tasks[pass->index[at]].tid != tid)
        at = (at + 1) & mask;
    return &pass->index[at];
}

static void index_tasks(const struct eh_pass *pass)
{
    memset(pass->index, 0xff, pass->index_size * sizeof(*pass->index));
    for (uint32_t i = 0; i < pass->task_count; i++)
        *entry_of(pass, pass->tasks[i].tid) = (int32_t)i;
}

/* What is known of a row's thread now. */
struct seen {
    uint64_t executed_ns;
    uint64_t run_delay_ns;
    int throttled; /* -1: not told */
    int state;     /* 0 runs or wants to, 1 does not, -1: not told */
};

/* Returns 0, or what is to be done instead. */
static uint32_t look(const struct eh_held *row, const struct eh_pass *pass, int by_record, struct seen *seen, int *error)
{
    struct eh_schedstat stat;
    struct eh_sched_attr attr;

    if (by_record && (row->flags & EH_HELD)) {
        int32_t at = *entry_of(pass, row->tid);

        if (at >= 0 && pass->tasks[at].start_boottime_ns / NS_PER_TICK == row->start_ticks) {
            const struct eh_task *task = &pass->tasks[at];

            if (task->state & STATE_ENDED)
                return EH_TODO_GONE;
            if (task->period_ns != row->rule.period_ns)
                return EH_TODO_TAKEN;
            /* Not every kernel tells `throttled`; one that wants to run and has nothing left is, or will be at the tick. */
            *seen = (struct seen){task->executed_ns, task->run_delay_ns,
                                  task->throttled || (task->state == STATE_RUNNING && task->dl_runtime_ns <= 0),
                                  task->state != STATE_RUNNING};
            return 0;
        }
    }
    eh_schedstat_read(&row->fd, &stat, 1);
    if (stat.error) {
        *error = stat.error;
        return stat.error == ESRCH ? EH_TODO_GONE : EH_TODO_ERROR;
    }
    *seen = (struct seen){stat.executed_ns, stat.run_delay_ns, -1, -1};
    /* Every deadline thread has a record: one without was taken out by somebody else. It may also just have ended. */
    if (by_record && (row->flags & EH_HELD) && eh_sched_getattr(row->tid, &attr) == 0 && attr.policy != POLICY_DEADLINE)
        return EH_TODO_TAKEN;
    return 0;
}

static void remember(struct eh_pass *pass, const struct eh_held *row, const struct eh_window *window, uint64_t now)
{
    if (!pass->history_size)
        return;
    pass->history[pass->history_written++ % pass->history_size] = (struct eh_sample){
        .time_ns = now,
        .elapsed_ns = window->elapsed_ns,
        .executed_ns = window->executed_ns,
        .run_delay_ns = window->run_delay_ns,
        .budget_ns = window->budget_ns,
        .wanted_ns = row->sizing.wanted_ns,
        .period_ns = row->rule.period_ns,
        .multiplier = row->sizing.multiplier,
        .tid = row->tid,
        .owner = row->owner,
        .saturated = row->sizing.saturated,
    };
}

/*
 * How long a window is that does not end with the cycle. A cycle's windows are of one length; between short windows,
 * which end when they end, and the next cycle is a rest that is no multiple of anything: what is sized by it would be
 * wrong. So a thread whose short windows are over gets one long window of its own, of whole periods so that it counts
 * as many jobs wherever it begins, and joins the cycle after that.
 */
static uint64_t own_length(const struct eh_held *row, const struct eh_pass *pass)
{
    uint64_t period_ns = row->rule.period_ns;
    uint64_t wanted = row->place == EH_PLACE_SHORT ? pass->short_ns : pass->cycle_ns / period_ns * period_ns;

    return wanted > period_ns ? wanted : period_ns;
}

/* Where the next window lies. */
static void place(struct eh_held *row, const struct eh_pass *pass, int again, uint64_t now)
{
    if (again && pass->short_ns)
        row->place = EH_PLACE_SHORT;
    else if (row->place == EH_PLACE_SHORT)
        row->place = EH_PLACE_SETTLING;
    else
        row->place = row->place == EH_PLACE_CYCLE ? EH_PLACE_CYCLE : EH_PLACE_BETWEEN;
    row->due_ns = row->place == EH_PLACE_SHORT || row->place == EH_PLACE_SETTLING ? now + own_length(row, pass) : 0;
}

/* Ends the window, and begins the next. */
static void measure(struct eh_held *row, struct eh_pass *pass, const struct seen *seen, uint64_t now)
{
    struct eh_window window = {
        .elapsed_ns = now - row->base_ns,
        .executed_ns = seen->executed_ns - row->base_executed_ns,
        .run_delay_ns = seen->run_delay_ns - row->base_run_delay_ns,
        .budget_ns = row->budget_ns,
        .throttled = seen->throttled,
        .saturated = -1,
    };
    /* A thread that called execve(2) has taken its leader's place (and name), and goes on with counters of its own. */
    int another = seen->executed_ns < row->base_executed_ns || seen->run_delay_ns < row->base_run_delay_ns;
    uint64_t shortest = row->due_ns ? own_length(row, pass) : SHORTEST_WINDOW(pass->cycle_ns);

    if (shortest < row->rule.period_ns)
        shortest = row->rule.period_ns;
    if (row->place == EH_PLACE_BETWEEN && !row->due_ns) {
        row->place = EH_PLACE_CYCLE;
    } else if (row->base_ns && !another) {
        int again;

        if (window.elapsed_ns < shortest) {
            /* Its period became longer meanwhile: a time that is past would wake the caller again and again. */
            if (row->due_ns && row->due_ns <= now)
                row->due_ns = row->base_ns + shortest;
            return;
        }
        if (eh_rule_asks(&row->rule, &row->sizing, &window))
            window.throttled = eh_is_throttled(row->tid);
        again = eh_rule_step(&row->rule, &row->sizing, &window);
        row->executed_ns = eh_per_period(window.executed_ns, row->rule.period_ns, window.elapsed_ns);
        row->run_delay_ns = eh_per_period(window.run_delay_ns, row->rule.period_ns, window.elapsed_ns);
        row->windows++;
        remember(pass, row, &window, now);
        if (!pass->short_ns && row->sizing.phase == EH_PHASE_SUSPECT)
            row->sizing.phase = EH_PHASE_STEADY;
        place(row, pass, again, now);
    }
    row->base_ns = now;
    row->base_executed_ns = seen->executed_ns;
    row->base_run_delay_ns = seen->run_delay_ns;
}

/* Whether a thread that does not execute wants to: that is the kernel's fault or a long throttling, and rare. */
static uint32_t watch(struct eh_held *row, const struct seen *seen, uint64_t now)
{
    uint64_t idle, wait;
    int state;

    if (seen->executed_ns != row->executed_total_ns || !row->progress_ns) {
        row->progress_ns = now;
        row->look_ns = 0;
        return 0;
    }
    idle = now - row->progress_ns;
    if (!(row->flags & EH_HELD) || idle <= 2 * row->rule.period_ns)
        return 0;
    if (seen->state >= 0)
        return seen->state ? 0 : EH_TODO_LOOK;
    if (now < row->look_ns)
        return 0;
    state = eh_thread_state(row->tid);
    if (state == 'R')
        return EH_TODO_LOOK;
    if (state == -ESRCH || state == 'Z' || state == 'X' || state == 'x')
        return EH_TODO_GONE;
    wait = idle < ASLEEP_FIRST_NS ? ASLEEP_FIRST_NS : idle;
    row->look_ns = now + (wait < ASLEEP_LAST_NS ? wait : ASLEEP_LAST_NS);
    return 0;
}

/* Whether somebody else has changed the reservation, asked now and then. */
static uint32_t check(struct eh_held *row, uint64_t now)
{
    struct eh_sched_attr attr;

    if (!(row->flags & EH_HELD) || now < row->check_ns)
        return 0;
    row->check_ns = now + CHECK_NS;
    if (eh_sched_getattr(row->tid, &attr) < 0)
        return 0; /* ended meanwhile: the next sample tells */
    return attr.policy == POLICY_DEADLINE && attr.period_ns == row->rule.period_ns ? 0 : EH_TODO_TAKEN;
}

int eh_pass(struct eh_held *table, int rows, struct eh_pass *pass, struct eh_todo *todo)
{
    int by_record = pass->grid && pass->tasks != NULL, count = 0;
    /* A pass over all records visits the threads in the same order each time: one time for all is as good as many. */
    uint64_t now = by_record ? pass->tasks_ns : now_ns();

    if (by_record)
        index_tasks(pass);
    pass->next_due_ns = 0;
    for (int i = 0; i < rows; i++) {
        struct eh_held *row = &table[i];
        struct seen seen;
        uint32_t what;
        int error = 0;

        if (!row->tid)
            continue;
        if (pass->grid || (row->due_ns && row->due_ns <= now)) {
            what = look(row, pass, by_record, &seen, &error);
            if (!what) {
                if (!by_record)
                    now = now_ns();
                what = watch(row, &seen, now) | (by_record ? 0 : check(row, now));
                row->executed_total_ns = seen.executed_ns;
                if (row->flags & EH_FROZEN) {
                    row->base_ns = row->due_ns = 0;
                    row->place = EH_PLACE_CYCLE;
                } else {
                    measure(row, pass, &seen, now);
                }
                if (row->sizing.wanted_ns != row->told_ns)
                    what |= EH_TODO_CHANGE;
                row->told_ns = row->sizing.wanted_ns;
            }
            if (what)
                todo[count++] = (struct eh_todo){.row = i, .what = what, .error = error};
        }
        if (row->due_ns && (!pass->next_due_ns || row->due_ns < pass->next_due_ns))
            pass->next_due_ns = row->due_ns;
    }
    return count;
}

int eh_history(const struct eh_pass *pass, uint32_t owner, int32_t tid, struct eh_sample *out, int most)
{
    uint64_t kept = pass->history_written < pass->history_size ? pass->history_written : pass->history_size;
    int count = 0;

    /* From the newest on, so that the last ones are found first; then turned round. */
    for (uint64_t back = 1; back <= kept && count < most; back++) {
        const struct eh_sample *one = &pass->history[(pass->history_written - back) % pass->history_size];

        if (one->owner == owner && (!tid || one->tid == tid))
            out[count++] = *one;
    }
    for (int low = 0, high = count - 1; low < high; low++, high--) {
        struct eh_sample swap = out[low];

        out[low] = out[high];
        out[high] = swap;
    }
    return count;
}
