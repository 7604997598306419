/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * The firmware behind /dev/vmanager as a model: one text for the kernel module and for the seccomp double, so that both
 * behave alike. Pure: time, events and files come from outside, nothing here sleeps or allocates; the caller locks.
 *
 * No guest runs. What one does is said by its kernel's command line, through the ABI alone (MS: milliseconds):
 *
 *   vman.start=MS   the firmware takes so long to start it      vman.hang      the firmware never answers a start
 *   vman.refuse=N   it refuses the Nth start and all later      vman.deaf      nobody reads the power button
 *   vman.obey=MS    it takes so long to power off when asked    vman.off=MS    it powers itself off so long after its start
 *   vman.crash=MS   it crashes so long after its start          (a suspended guest's time stands still)
 */
#ifndef VMANAGER_MODEL_H
#define VMANAGER_MODEL_H

#ifdef __KERNEL__
#include <linux/errno.h>
#include <linux/string.h>
#else
#include <errno.h>
#include <string.h>
#endif

#include "vmanager.h"

#define VMODEL_PARTITIONS 16
#define VMODEL_ALIGN (2ULL << 20)
#define VMODEL_GRANULES 512 /* 1 GiB */
#define VMODEL_BASE 0x880000000ULL
#define VMODEL_NEVER (~0ULL)
#define VMODEL_MS 1000000ULL
#define VMODEL_TIMEOUT_MS 10000
#define VMODEL_HEAD 1024
#define VMODEL_CAPS                                                                                                    \
    (VMAN_CAP_SUSPEND | VMAN_CAP_REBOOT | VMAN_CAP_KEEP | VMAN_CAP_EVENTS | VMAN_CAP_GENDTB | VMAN_CAP_SHUTDOWN)
#define VMODEL_CPUS 0xfeULL /* cores 1 to 7; core 0 is never handed out */
#define VMODEL_FW_REFUSED (-6) /* PSCI: INTERNAL_FAILURE */

#define VMODEL_TAKEN 1
#define VMODEL_DIRTY 2

/* What a command line says about its guest. */
struct vmodel_plan {
    __u64 start_ns, obey_ns, off_ns, crash_ns;
    __u64 refuse;
    int deaf;
};

struct vmodel_partition {
    __u64 serial; /* no two partitions ever have the same; 0: this place is free */
    __u64 owner;  /* vmodel_file.token of its maker, 0: it is kept */
    __u32 id, state, last_error, ncpus;
    __u64 flags, memsize, boot_count, deployed_ns, generation;
    __u64 cpu_mask[VMAN_CPU_WORDS];
    __s64 fw_code;
    char name[VMAN_NAME_LEN];
    __u8 uuid[VMAN_UUID_LEN];
    unsigned int first; /* granule */
    int loaded;         /* images are there for a reboot */
    struct vmodel_plan plan;
    __u64 starts;       /* of these images */
    __u64 answer_ns;    /* BUSY: when the firmware answers */
    __u64 patience_ns;  /* BUSY: when the driver gives up */
    __u64 off_ns, crash_ns, obey_ns; /* when the guest does so; SUSPENDED: how long after */
};

enum vmodel_kind { VMODEL_START, VMODEL_OFF };

/* A call that waits. Lives with its caller, in the model's list until `result` is no longer -EINPROGRESS. */
struct vmodel_wait {
    struct vmodel_wait *next;
    enum vmodel_kind kind;
    __u64 serial, deadline_ns;
    int result;
    __u32 state;
};

struct vmodel {
    __u64 caps, cpu_possible[VMAN_CPU_WORDS];
    __u64 last_serial, last_token;
    struct vmodel_partition partitions[VMODEL_PARTITIONS];
    __u8 granules[VMODEL_GRANULES];
    struct vmodel_wait *waits;
    void (*changed)(const struct vmodel_partition *p, const struct vman_event *event);
};

/* An open file: /dev/vmanager (serial 0) or a partition's. */
struct vmodel_file {
    __u64 token, serial;
};

struct vmodel_image {
    __u64 size;
    __u32 head_len;
    __u8 head[VMODEL_HEAD];
};

/* What deploy reads outside its structure; the caller reads it after vmodel_check_deploy. */
struct vmodel_input {
    struct vmodel_image image[VMAN_IMG_MAX];
    char cmdline[VMAN_MAX_CMDLINE + 1];
};

union vmodel_arg {
    struct vman_info info;
    struct vman_create create;
    struct vman_destroy destroy;
    struct vman_open open;
    struct vman_next next;
    struct vman_deploy deploy;
    struct vman_ctl ctl;
    struct vman_status status;
};

/* What an ioctl number stands for; size 0: nothing. */
struct vmodel_verb {
    const char *name;
    __u32 size;
    int writes; /* 1: on success; 2: also with an error that tells the state */
};

static inline struct vmodel_verb vmodel_verb(int partition, __u32 nr)
{
#define VMODEL_VERB(request, type, writes)                                                                             \
    case _IOC_NR(VMAN_##request):                                                                                      \
        return (struct vmodel_verb){#request, sizeof(struct type), writes}
    if (partition) {
        switch (nr) {
            VMODEL_VERB(DEPLOY, vman_deploy, 0);
            VMODEL_VERB(SHUTDOWN, vman_ctl, 2);
            VMODEL_VERB(REBOOT, vman_ctl, 2);
            VMODEL_VERB(SUSPEND, vman_ctl, 2);
            VMODEL_VERB(RESTORE, vman_ctl, 2);
            VMODEL_VERB(SCRUB, vman_ctl, 2);
            VMODEL_VERB(STATUS, vman_status, 1);
        }
    } else {
        switch (nr) {
            VMODEL_VERB(GET_INFO, vman_info, 1);
            VMODEL_VERB(CREATE, vman_create, 1);
            VMODEL_VERB(DESTROY, vman_destroy, 0);
            VMODEL_VERB(OPEN, vman_open, 1);
            VMODEL_VERB(NEXT, vman_next, 1);
        }
    }
#undef VMODEL_VERB
    return (struct vmodel_verb){0, 0, 0};
}

static inline int vmodel_writes(struct vmodel_verb verb, int result)
{
    return (result == 0 && verb.writes) ||
           (verb.writes == 2 && (result == -EBUSY || result == -EBADFD || result == -ETIMEDOUT || result == -EIO ||
                                 result == -ECANCELED));
}

static inline void vmodel_init(struct vmodel *m, __u64 caps, __u64 cpus,
                               void (*changed)(const struct vmodel_partition *p, const struct vman_event *event))
{
    memset(m, 0, sizeof(*m));
    m->changed = changed;
    m->caps = caps;
    m->cpu_possible[0] = cpus & ~1ULL;
}

static inline struct vmodel_partition *vmodel_by_serial(struct vmodel *m, __u64 serial)
{
    for (int i = 0; i < VMODEL_PARTITIONS; i++)
        if (serial && m->partitions[i].serial == serial)
            return &m->partitions[i];
    return NULL;
}

static inline struct vmodel_partition *vmodel_by_id(struct vmodel *m, __u32 id)
{
    for (int i = 0; i < VMODEL_PARTITIONS; i++)
        if (m->partitions[i].serial && m->partitions[i].id == id)
            return &m->partitions[i];
    return NULL;
}

static inline __u64 vmodel_after(__u64 now, __u64 delay)
{
    return delay > VMODEL_NEVER - now ? VMODEL_NEVER : now + delay;
}

static inline __u64 vmodel_deadline(__u64 now, __u32 timeout_ms)
{
    return now + (timeout_ms ? timeout_ms : VMODEL_TIMEOUT_MS) * VMODEL_MS;
}

/* Answers the waiting calls of one kind, and takes them off the list. */
static inline void vmodel_answer(struct vmodel *m, __u64 serial, enum vmodel_kind kind, int result, __u32 state)
{
    for (struct vmodel_wait **at = &m->waits; *at;) {
        struct vmodel_wait *wait = *at;

        if (wait->serial == serial && wait->kind == kind) {
            *at = wait->next;
            wait->result = result;
            wait->state = state;
        } else {
            at = &wait->next;
        }
    }
}

/* The caller of a waiting call is gone. */
static inline void vmodel_forget(struct vmodel *m, const struct vmodel_wait *wait)
{
    for (struct vmodel_wait **at = &m->waits; *at; at = &(*at)->next)
        if (*at == wait) {
            *at = wait->next;
            return;
        }
}

static inline int vmodel_wait_for(struct vmodel *m, struct vmodel_wait *wait, enum vmodel_kind kind, __u64 serial,
                                  __u64 deadline_ns)
{
    *wait = (struct vmodel_wait){m->waits, kind, serial, deadline_ns, -EINPROGRESS, 0};
    m->waits = wait;
    return -EINPROGRESS;
}

/* Every change of a state goes through here. */
static inline void vmodel_enter(struct vmodel *m, struct vmodel_partition *p, __u32 state, __u64 now)
{
    struct vman_event event = {
        .size = sizeof(event),
        .id = p->id,
        .old_state = p->state,
        .new_state = state,
        .generation = ++p->generation,
        .time_ns = now,
    };

    p->state = state;
    if (state != VMAN_STATE_DEPLOYED && state != VMAN_STATE_SUSPENDED)
        p->off_ns = p->crash_ns = p->obey_ns = VMODEL_NEVER;
    if (state != VMAN_STATE_BUSY)
        p->answer_ns = p->patience_ns = VMODEL_NEVER;
    m->changed(p, &event);
    if (state == VMAN_STATE_READY)
        vmodel_answer(m, p->serial, VMODEL_OFF, 0, state);
    if (state == VMAN_STATE_FAILED)
        vmodel_answer(m, p->serial, VMODEL_OFF, -EIO, state);
}

static inline void vmodel_fail(struct vmodel *m, struct vmodel_partition *p, __u32 error, __s64 fw_code, __u64 now)
{
    p->last_error = error;
    p->fw_code = fw_code;
    vmodel_enter(m, p, VMAN_STATE_FAILED, now);
}

/* The firmware answers a start. */
static inline int vmodel_started(struct vmodel *m, struct vmodel_partition *p, __u64 now)
{
    for (__u64 at = 0; at < p->memsize / VMODEL_ALIGN; at++)
        m->granules[p->first + at] |= VMODEL_DIRTY;
    p->starts++;
    if (p->plan.refuse && p->starts >= p->plan.refuse) {
        vmodel_fail(m, p, EIO, VMODEL_FW_REFUSED, now);
        return -EIO;
    }
    p->boot_count++;
    p->deployed_ns = now;
    p->last_error = 0;
    p->fw_code = 0;
    vmodel_enter(m, p, VMAN_STATE_DEPLOYED, now);
    p->off_ns = vmodel_after(now, p->plan.off_ns);
    p->crash_ns = vmodel_after(now, p->plan.crash_ns);
    p->obey_ns = VMODEL_NEVER;
    return 0;
}

static inline int vmodel_start(struct vmodel *m, struct vmodel_partition *p, __u32 timeout_ms, __u64 now,
                               struct vmodel_wait *wait)
{
    if (p->plan.start_ns == 0)
        return vmodel_started(m, p, now);
    vmodel_enter(m, p, VMAN_STATE_BUSY, now);
    p->answer_ns = vmodel_after(now, p->plan.start_ns);
    p->patience_ns = vmodel_deadline(now, timeout_ms);
    return vmodel_wait_for(m, wait, VMODEL_START, p->serial, VMODEL_NEVER);
}

/* Lets time pass: call it before every vmodel_call, and when vmodel_due is over. */
static inline void vmodel_tick(struct vmodel *m, __u64 now)
{
    for (int i = 0; i < VMODEL_PARTITIONS; i++) {
        struct vmodel_partition *p = &m->partitions[i];

        if (!p->serial)
            continue;
        if (p->state == VMAN_STATE_BUSY && p->answer_ns <= now && p->answer_ns <= p->patience_ns) {
            int result = vmodel_started(m, p, now);

            vmodel_answer(m, p->serial, VMODEL_START, result, p->state);
        } else if (p->state == VMAN_STATE_BUSY && p->patience_ns <= now) {
            vmodel_fail(m, p, ETIMEDOUT, 0, now);
            vmodel_answer(m, p->serial, VMODEL_START, -ETIMEDOUT, p->state);
        }
        if (p->state != VMAN_STATE_DEPLOYED)
            continue;
        if (p->crash_ns <= now && p->crash_ns <= p->off_ns && p->crash_ns <= p->obey_ns)
            vmodel_fail(m, p, ENOTRECOVERABLE, 0, now);
        else if (p->off_ns <= now || p->obey_ns <= now)
            vmodel_enter(m, p, VMAN_STATE_READY, now);
    }
    for (struct vmodel_wait **at = &m->waits; *at;) {
        struct vmodel_wait *wait = *at;
        struct vmodel_partition *p = vmodel_by_serial(m, wait->serial);

        if (wait->deadline_ns > now) {
            at = &wait->next;
            continue;
        }
        *at = wait->next;
        wait->result = -ETIMEDOUT;
        wait->state = p ? p->state : VMAN_STATE_NONE;
        if (p)
            p->last_error = ETIMEDOUT;
    }
}

/* When something happens by itself, as CLOCK_BOOTTIME; VMODEL_NEVER: not until the next call. */
static inline __u64 vmodel_due(const struct vmodel *m)
{
    __u64 due = VMODEL_NEVER;

    for (int i = 0; i < VMODEL_PARTITIONS; i++) {
        const struct vmodel_partition *p = &m->partitions[i];
        const __u64 times[] = {p->answer_ns, p->patience_ns, p->off_ns, p->crash_ns, p->obey_ns};

        for (int t = 0; p->serial && p->state != VMAN_STATE_SUSPENDED && t < 5; t++)
            due = times[t] < due ? times[t] : due;
    }
    for (const struct vmodel_wait *wait = m->waits; wait; wait = wait->next)
        due = wait->deadline_ns < due ? wait->deadline_ns : due;
    return due;
}

/* vman.NAME or vman.NAME=NUMBER as a whole word; `missing` where it is not there, 1 without a number. */
static inline __u64 vmodel_word(const char *cmdline, const char *name, __u64 missing)
{
    const size_t length = strlen(name);

    for (const char *at = cmdline; *at;) {
        while (*at == ' ')
            at++;
        if (strncmp(at, name, length) == 0 && (at[length] == '=' || at[length] == ' ' || at[length] == '\0')) {
            __u64 value = 0;

            if (at[length] != '=')
                return 1;
            for (at += length + 1; *at >= '0' && *at <= '9'; at++)
                value = value * 10 + (__u64)(*at - '0');
            return value;
        }
        while (*at && *at != ' ')
            at++;
    }
    return missing;
}

static inline __u64 vmodel_time(const char *cmdline, const char *name, __u64 missing)
{
    __u64 ms = vmodel_word(cmdline, name, VMODEL_NEVER);

    return ms == VMODEL_NEVER ? missing : ms * VMODEL_MS;
}

static inline struct vmodel_plan vmodel_plan(const char *cmdline)
{
    return (struct vmodel_plan){
        .start_ns = vmodel_word(cmdline, "vman.hang", 0) ? VMODEL_NEVER : vmodel_time(cmdline, "vman.start", 0),
        .obey_ns = vmodel_time(cmdline, "vman.obey", 0),
        .off_ns = vmodel_time(cmdline, "vman.off", VMODEL_NEVER),
        .crash_ns = vmodel_time(cmdline, "vman.crash", VMODEL_NEVER),
        .refuse = vmodel_word(cmdline, "vman.refuse", 0),
        .deaf = vmodel_word(cmdline, "vman.deaf", 0) != 0,
    };
}

static inline void vmodel_info(const struct vmodel *m, struct vman_info *info)
{
    __u32 size = info->size, granules = 0;

    *info = (struct vman_info){
        .size = size,
        .abi = VMAN_ABI_VERSION,
        .caps = m->caps,
        .mem_total = VMODEL_GRANULES * VMODEL_ALIGN,
        .mem_align = VMODEL_ALIGN,
        .max_partitions = VMODEL_PARTITIONS,
    };
    memcpy(info->cpu_possible, m->cpu_possible, sizeof(info->cpu_possible));
    for (int i = 0; i < VMODEL_PARTITIONS; i++)
        info->num_partitions += m->partitions[i].serial != 0;
    for (int i = 0; i < VMODEL_GRANULES; i++)
        granules += !(m->granules[i] & VMODEL_TAKEN);
    info->mem_free = granules * VMODEL_ALIGN;
}

static inline int vmodel_printable(const char *name)
{
    int at = 0;

    while (at < VMAN_NAME_LEN && name[at] >= ' ' && name[at] <= '~')
        at++;
    for (int rest = at; rest < VMAN_NAME_LEN; rest++)
        if (name[rest])
            return 0;
    return at < VMAN_NAME_LEN;
}

/* The first free piece, or -1. */
static inline int vmodel_piece(const struct vmodel *m, __u64 granules)
{
    __u64 run = 0;

    for (int i = 0; i < VMODEL_GRANULES; i++) {
        run = m->granules[i] & VMODEL_TAKEN ? 0 : run + 1;
        if (run == granules)
            return i + 1 - (int)granules;
    }
    return -1;
}

/* Cores by number or by count; the mask and the number of those taken are the result. */
static inline int vmodel_cores(const struct vmodel *m, const struct vman_create *c, __u64 mask[VMAN_CPU_WORDS],
                               __u32 *count)
{
    __u64 taken[VMAN_CPU_WORDS] = {0};
    const int any = (c->flags & VMAN_CREATE_CPUS_ANY) != 0;

    for (int i = 0; i < VMODEL_PARTITIONS; i++)
        for (int w = 0; w < VMAN_CPU_WORDS && m->partitions[i].serial; w++)
            taken[w] |= m->partitions[i].cpu_mask[w];
    *count = 0;
    for (int w = 0; w < VMAN_CPU_WORDS; w++) {
        if (c->cpu_mask[w] & (any ? ~0ULL : ~m->cpu_possible[w]))
            return -EINVAL;
        mask[w] = 0;
    }
    if (any ? !c->ncpus : c->ncpus)
        return -EINVAL;
    for (int cpu = 0; cpu < VMAN_MAX_CPUS; cpu++) {
        const __u64 bit = 1ULL << cpu % 64;
        const int w = cpu / 64;

        if (any ? *count == c->ncpus || !(m->cpu_possible[w] & ~taken[w] & bit) : !(c->cpu_mask[w] & bit))
            continue;
        if (taken[w] & bit)
            return -EBUSY;
        mask[w] |= bit;
        ++*count;
    }
    if (!*count && !any)
        return -EINVAL;
    return any && *count < c->ncpus ? -ENOSPC : 0;
}

static inline int vmodel_create(struct vmodel *m, const struct vmodel_file *file, struct vman_create *c, __u64 now)
{
    __u64 mask[VMAN_CPU_WORDS];
    struct vmodel_partition *p = NULL;
    __u32 count;
    int first, result;

    if (c->flags & ~VMAN_CREATE_FLAGS || c->rsvd || c->id > VMAN_MAX_ID || !vmodel_printable(c->name))
        return -EINVAL;
    if (!c->memsize || c->memsize % VMODEL_ALIGN)
        return -EINVAL;
    if ((c->flags & VMAN_CREATE_SECURE && !(m->caps & VMAN_CAP_SECURE)) ||
        (c->flags & VMAN_CREATE_KEEP && !(m->caps & VMAN_CAP_KEEP)))
        return -EOPNOTSUPP;
    if (c->id && vmodel_by_id(m, c->id))
        return -EEXIST;
    result = vmodel_cores(m, c, mask, &count);
    if (result)
        return result;
    first = vmodel_piece(m, c->memsize / VMODEL_ALIGN);
    for (int i = 0; i < VMODEL_PARTITIONS && !p; i++)
        if (!m->partitions[i].serial)
            p = &m->partitions[i];
    if (!p || first < 0)
        return -ENOSPC;
    if (!c->id)
        for (c->id = 1; vmodel_by_id(m, c->id);)
            c->id++;
    memset(p, 0, sizeof(*p));
    p->serial = ++m->last_serial;
    p->owner = c->flags & VMAN_CREATE_KEEP ? 0 : file->token;
    p->id = c->id;
    p->flags = c->flags;
    p->memsize = c->memsize;
    p->first = (unsigned int)first;
    p->ncpus = count;
    memcpy(p->cpu_mask, mask, sizeof(mask));
    memcpy(p->name, c->name, sizeof(p->name));
    memcpy(p->uuid, c->uuid, sizeof(p->uuid));
    for (__u64 at = 0; at < p->memsize / VMODEL_ALIGN; at++)
        m->granules[p->first + at] |= VMODEL_TAKEN;
    vmodel_enter(m, p, VMAN_STATE_READY, now);
    c->ncpus = count;
    memcpy(c->cpu_mask, mask, sizeof(mask));
    c->mem_base = VMODEL_BASE + p->first * VMODEL_ALIGN;
    c->fd = -1;
    return 0;
}

static inline void vmodel_end(struct vmodel *m, struct vmodel_partition *p, __u64 now)
{
    if (p->state == VMAN_STATE_READY)
        return;
    p->last_error = 0;
    vmodel_enter(m, p, VMAN_STATE_READY, now);
    vmodel_answer(m, p->serial, VMODEL_START, -ECANCELED, p->state);
}

static inline void vmodel_remove(struct vmodel *m, struct vmodel_partition *p, __u64 now)
{
    vmodel_answer(m, p->serial, VMODEL_OFF, -ENODEV, VMAN_STATE_NONE);
    for (__u64 at = 0; at < p->memsize / VMODEL_ALIGN; at++)
        m->granules[p->first + at] &= m->caps & VMAN_CAP_CLEARS ? 0 : VMODEL_DIRTY;
    vmodel_enter(m, p, VMAN_STATE_NONE, now);
    p->serial = 0;
}

/* The last descriptor of an open /dev/vmanager was closed. */
static inline void vmodel_closed(struct vmodel *m, const struct vmodel_file *file, __u64 now)
{
    for (int i = 0; i < VMODEL_PARTITIONS; i++) {
        struct vmodel_partition *p = &m->partitions[i];

        if (p->serial && p->owner == file->token) {
            vmodel_end(m, p, now);
            vmodel_remove(m, p, now);
        }
    }
}

static inline int vmodel_destroy(struct vmodel *m, const struct vman_destroy *d, __u64 now)
{
    struct vmodel_partition *p = vmodel_by_id(m, d->id);

    if (d->flags || d->rsvd)
        return -EINVAL;
    if (!p)
        return -ENOENT;
    if (p->state != VMAN_STATE_READY && p->state != VMAN_STATE_FAILED)
        return -EBUSY;
    vmodel_remove(m, p, now);
    return 0;
}

static inline int vmodel_next(struct vmodel *m, struct vman_next *n)
{
    __u32 best = 0;

    if (n->flags || n->rsvd)
        return -EINVAL;
    for (int i = 0; i < VMODEL_PARTITIONS; i++) {
        const struct vmodel_partition *p = &m->partitions[i];

        if (p->serial && p->id > n->id && (!best || p->id < best))
            best = p->id;
    }
    if (!best)
        return -ENOENT;
    n->id = best;
    return 0;
}

static inline int vmodel_open(struct vmodel *m, const struct vman_open *o)
{
    if (o->flags)
        return -EINVAL;
    return vmodel_by_id(m, o->id) ? 0 : -ENOENT;
}

static inline void vmodel_status(const struct vmodel *m, const struct vmodel_partition *p, struct vman_status *s)
{
    __u32 size = s->size;

    *s = (struct vman_status){
        .size = size,
        .id = p->id,
        .state = p->state,
        .last_error = p->last_error,
        .flags = p->flags,
        .memsize = p->memsize,
        .mem_base = VMODEL_BASE + p->first * VMODEL_ALIGN,
        .boot_count = p->boot_count,
        .deployed_ns = p->deployed_ns,
        .generation = p->generation,
        .fw_code = p->fw_code,
    };
    for (__u64 at = 0; at < p->memsize / VMODEL_ALIGN; at++)
        if (m->granules[p->first + at] & VMODEL_DIRTY)
            s->flags |= VMAN_STATUS_DIRTY;
    memcpy(s->cpu_mask, p->cpu_mask, sizeof(s->cpu_mask));
    memcpy(s->name, p->name, sizeof(s->name));
    memcpy(s->uuid, p->uuid, sizeof(s->uuid));
}

/* What can be said about a deploy before anything outside its structure is read. */
static inline int vmodel_check_deploy(const struct vman_deploy *d)
{
    if (d->flags & ~VMAN_DEPLOY_GENDTB || d->rsvd || d->cmdline_len > VMAN_MAX_CMDLINE || !d->cmdline_ptr != !d->cmdline_len)
        return -EINVAL;
    for (int i = 0; i < VMAN_IMG_MAX; i++) {
        const struct vman_image *image = &d->img[i];

        if (image->flags & ~VMAN_IMAGE_PRESENT)
            return -EINVAL;
        if (!image->flags && (image->fd || image->offset || image->len || image->load_addr))
            return -EINVAL;
    }
    if (!d->img[VMAN_IMG_KERNEL].flags || d->img[VMAN_IMG_MAX - 1].flags ||
        (d->flags & VMAN_DEPLOY_GENDTB && d->img[VMAN_IMG_DTB].flags))
        return -EINVAL;
    return 0;
}

static inline int vmodel_is_kernel(const struct vmodel_image *image)
{
    return (image->head_len >= 0x206 && memcmp(image->head + 0x202, "HdrS", 4) == 0) || /* x86: boot protocol */
           (image->head_len >= 64 && memcmp(image->head + 56, "ARM\x64", 4) == 0);      /* arm64: booting.rst */
}

static inline int vmodel_deploy(struct vmodel *m, struct vmodel_partition *p, const struct vman_deploy *d,
                                const struct vmodel_input *in, __u64 now, struct vmodel_wait *wait)
{
    const __u64 base = VMODEL_BASE + p->first * VMODEL_ALIGN;
    __u64 total = 0;

    if (d->flags & VMAN_DEPLOY_GENDTB && !(m->caps & VMAN_CAP_GENDTB))
        return -EOPNOTSUPP;
    if (p->state != VMAN_STATE_READY)
        return -EBUSY;
    if (memchr(in->cmdline, 0, d->cmdline_len))
        return -EINVAL;
    for (int i = 0; i < VMAN_IMG_MAX; i++) {
        const struct vmodel_image *image = &in->image[i];
        const __u64 address = d->img[i].load_addr;

        if (!d->img[i].flags)
            continue;
        if (!image->size || (i == VMAN_IMG_KERNEL && !vmodel_is_kernel(image)) ||
            (i == VMAN_IMG_DTB && (image->head_len < 4 || memcmp(image->head, "\xd0\x0d\xfe\xed", 4) != 0)))
            return -ENOEXEC;
        if (address && (address < base || address >= base + p->memsize))
            return -EINVAL;
        if (image->size > p->memsize || (address && image->size > base + p->memsize - address))
            return -ENOSPC;
        total += image->size;
    }
    if (total > p->memsize)
        return -ENOSPC;
    p->plan = vmodel_plan(in->cmdline);
    p->starts = 0;
    p->loaded = 1;
    return vmodel_start(m, p, d->timeout_ms, now, wait);
}

static inline int vmodel_shutdown(struct vmodel *m, struct vmodel_partition *p, const struct vman_ctl *c, __u64 now,
                                  struct vmodel_wait *wait)
{
    if (c->flags & ~VMAN_SHUTDOWN_FORCE)
        return -EINVAL;
    if (!c->flags && p->state != VMAN_STATE_FAILED && !(m->caps & VMAN_CAP_SHUTDOWN))
        return -EOPNOTSUPP;
    if (p->state == VMAN_STATE_READY || (!c->flags && p->state == VMAN_STATE_SUSPENDED))
        return -EBADFD;
    if (!c->flags && p->state == VMAN_STATE_BUSY)
        return -EBUSY;
    if (c->flags || p->state == VMAN_STATE_FAILED || (!p->plan.deaf && !p->plan.obey_ns)) {
        vmodel_end(m, p, now);
        return 0;
    }
    if (!p->plan.deaf && p->obey_ns == VMODEL_NEVER)
        p->obey_ns = vmodel_after(now, p->plan.obey_ns);
    return vmodel_wait_for(m, wait, VMODEL_OFF, p->serial, vmodel_deadline(now, c->timeout_ms));
}

static inline int vmodel_reboot(struct vmodel *m, struct vmodel_partition *p, const struct vman_ctl *c, __u64 now,
                                struct vmodel_wait *wait)
{
    if (c->flags & ~VMAN_REBOOT_OFF)
        return -EINVAL;
    if (!(m->caps & VMAN_CAP_REBOOT))
        return -EOPNOTSUPP;
    if (p->state == VMAN_STATE_BUSY)
        return -EBUSY;
    if (p->state != VMAN_STATE_DEPLOYED && !(c->flags && p->state == VMAN_STATE_READY && p->loaded))
        return -EBADFD;
    vmodel_answer(m, p->serial, VMODEL_OFF, -ECANCELED, p->state);
    return vmodel_start(m, p, c->timeout_ms, now, wait);
}

/* A running guest's times are moments, a suspended one's are durations. */
static inline void vmodel_freeze(struct vmodel_partition *p, int freeze, __u64 now)
{
    __u64 *times[] = {&p->off_ns, &p->crash_ns, &p->obey_ns};

    for (int i = 0; i < 3; i++)
        if (*times[i] != VMODEL_NEVER)
            *times[i] = !freeze ? *times[i] + now : *times[i] > now ? *times[i] - now : 0;
}

static inline int vmodel_park(struct vmodel *m, struct vmodel_partition *p, const struct vman_ctl *c, int suspend,
                              __u64 now)
{
    if (c->flags)
        return -EINVAL;
    if (!(m->caps & VMAN_CAP_SUSPEND))
        return -EOPNOTSUPP;
    if (p->state == VMAN_STATE_BUSY)
        return -EBUSY;
    if (p->state != (suspend ? VMAN_STATE_DEPLOYED : VMAN_STATE_SUSPENDED))
        return -EBADFD;
    vmodel_freeze(p, suspend, now);
    vmodel_enter(m, p, suspend ? VMAN_STATE_SUSPENDED : VMAN_STATE_DEPLOYED, now);
    return 0;
}

static inline int vmodel_scrub(struct vmodel *m, struct vmodel_partition *p, const struct vman_ctl *c)
{
    if (c->flags)
        return -EINVAL;
    if (p->state == VMAN_STATE_BUSY)
        return -EBUSY;
    if (p->state != VMAN_STATE_READY)
        return -EBADFD;
    for (__u64 at = 0; at < p->memsize / VMODEL_ALIGN; at++)
        m->granules[p->first + at] &= VMODEL_TAKEN;
    p->loaded = 0;
    return 0;
}

static inline int vmodel_verb_of_partition(struct vmodel *m, struct vmodel_partition *p, __u32 nr, union vmodel_arg *arg,
                                           const struct vmodel_input *in, __u64 now, struct vmodel_wait *wait)
{
    switch (nr) {
    case _IOC_NR(VMAN_DEPLOY):
        return vmodel_deploy(m, p, &arg->deploy, in, now, wait);
    case _IOC_NR(VMAN_SHUTDOWN):
        return vmodel_shutdown(m, p, &arg->ctl, now, wait);
    case _IOC_NR(VMAN_REBOOT):
        return vmodel_reboot(m, p, &arg->ctl, now, wait);
    case _IOC_NR(VMAN_SUSPEND):
        return vmodel_park(m, p, &arg->ctl, 1, now);
    case _IOC_NR(VMAN_RESTORE):
        return vmodel_park(m, p, &arg->ctl, 0, now);
    case _IOC_NR(VMAN_SCRUB):
        return vmodel_scrub(m, p, &arg->ctl);
    case _IOC_NR(VMAN_STATUS):
        vmodel_status(m, p, &arg->status);
        return 0;
    }
    return -ENOTTY;
}

/*
 * One ioctl, whose structure is complete and whose tail was checked. Returns 0, -errno, or -EINPROGRESS: `wait` is in
 * the model's list and gets the result. Descriptors are made by the caller.
 */
static inline int vmodel_call(struct vmodel *m, const struct vmodel_file *file, __u32 nr, union vmodel_arg *arg,
                              const struct vmodel_input *in, __u64 now, struct vmodel_wait *wait)
{
    struct vmodel_partition *p;
    int result;

    vmodel_tick(m, now);
    if (file->serial) {
        p = vmodel_by_serial(m, file->serial);
        if (!p)
            return -ENODEV;
        result = vmodel_verb_of_partition(m, p, nr, arg, in, now, wait);
        if (vmodel_verb(1, nr).writes == 2)
            arg->ctl.state = p->state;
        return result;
    }
    switch (nr) {
    case _IOC_NR(VMAN_GET_INFO):
        vmodel_info(m, &arg->info);
        return 0;
    case _IOC_NR(VMAN_CREATE):
        return vmodel_create(m, file, &arg->create, now);
    case _IOC_NR(VMAN_DESTROY):
        return vmodel_destroy(m, &arg->destroy, now);
    case _IOC_NR(VMAN_OPEN):
        return vmodel_open(m, &arg->open);
    case _IOC_NR(VMAN_NEXT):
        return vmodel_next(m, &arg->next);
    }
    return -ENOTTY;
}

#endif
