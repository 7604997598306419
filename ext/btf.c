/*
 * Where the fields of struct task_struct are in a kernel, from its own description of its types
 * (Documentation/bpf/btf.rst). Offsets differ from build to build; that is why nothing here is a constant.
 *
 * The bytes are looked at with suspicion: nothing outside of them is read, and no loop depends on what they say alone.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include "bpf.h"

#define MAGIC 0xeb9f
#define HEADER 24        /* magic, version, flags, hdr_len, type_off, type_len, str_off, str_len */
#define HEADER_LAYOUT 32 /* and in newer kernels layout_off, layout_len: the sizes of kinds, known here or not */
#define TYPE 12          /* name_off, info, size or type */
#define MEMBER 12        /* name_off, type, offset */
#define LAYOUT 4         /* info_sz, elem_sz, flags */

enum kind {
    KIND_INT = 1,
    KIND_PTR = 2,
    KIND_STRUCT = 4,
    KIND_UNION = 5,
    KIND_ENUM = 6,
    KIND_TYPEDEF = 8,
    KIND_VOLATILE = 9,
    KIND_CONST = 10,
    KIND_RESTRICT = 11,
    KIND_FUNC = 12,
    KIND_TYPE_TAG = 18,
    KIND_ENUM64 = 19,
    KINDS = 20,
};

/* What follows a type: bytes once, and bytes for each of its vlen elements (include/uapi/linux/btf.h). */
static const struct {
    uint8_t once, each;
} SIZES[KINDS] = {
    {0, 0}, {4, 0}, {0, 0}, {12, 0}, {0, 12}, {0, 12}, {0, 8}, {0, 0},  {0, 0}, {0, 0},
    {0, 0}, {0, 0}, {0, 0}, {0, 8},  {4, 0},  {0, 12}, {0, 0}, {4, 0}, {0, 0}, {0, 12},
};

/* The types that a chain of names may go through; the kernel's longest is a handful. */
#define HOPS 16
/* Anonymous structures and unions in one another. */
#define DEPTH 8
/* Members looked at for one field. task_struct has some hundred. */
#define PATIENCE 100000

struct btf {
    const uint8_t *types;
    const uint8_t *strings;
    const uint8_t *layout;
    uint32_t type_len;
    uint32_t string_len;
    uint32_t layout_len;
    uint32_t *index; /* where a type begins, by its id */
    uint32_t count;  /* ids below it are known */
};

struct type {
    uint32_t name;
    uint32_t kind;
    uint32_t vlen;
    uint32_t size; /* or the type that it refers to */
    bool bitfields;
    const uint8_t *rest;
};

static uint32_t read_u32(const uint8_t *at)
{
    uint32_t value;

    memcpy(&value, at, sizeof(value));
    return value;
}

static struct type read_type(const uint8_t *at)
{
    uint32_t info = read_u32(at + 4);

    /* Kinds had 5 bits and vlen 16 in older kernels; what lay between was zero. */
    return (struct type){
        .name = read_u32(at),
        .kind = info >> 24 & 0x7f,
        .vlen = info & 0xffffff,
        .size = read_u32(at + 8),
        .bitfields = info >> 31,
        .rest = at + TYPE,
    };
}

static bool is_named(const struct btf *btf, uint32_t offset, const char *name, size_t length)
{
    return offset < btf->string_len && length < btf->string_len - offset &&
           memcmp(btf->strings + offset, name, length) == 0 && btf->strings[offset + length] == '\0';
}

/* The bytes of a section, or NULL where it is not within the data. */
static const uint8_t *section(const uint8_t *data, uint64_t length, uint64_t header, uint32_t offset, uint32_t size)
{
    return header + offset + size <= length ? data + header + offset : NULL;
}

static int read_header(struct btf *btf, const uint8_t *data, uint64_t length)
{
    uint16_t magic;
    uint32_t header;

    if (length < HEADER)
        return -EPROTO;
    memcpy(&magic, data, sizeof(magic));
    header = read_u32(data + 4);
    if (magic != MAGIC || data[2] != 1 || header < HEADER)
        return -EPROTO;
    btf->type_len = read_u32(data + 12);
    btf->types = section(data, length, header, read_u32(data + 8), btf->type_len);
    btf->string_len = read_u32(data + 20);
    btf->strings = section(data, length, header, read_u32(data + 16), btf->string_len);
    if (btf->types == NULL || btf->strings == NULL)
        return -EPROTO;
    if (header >= HEADER_LAYOUT) {
        btf->layout_len = read_u32(data + 28);
        btf->layout = section(data, length, header, read_u32(data + 24), btf->layout_len);
    }
    if (btf->layout == NULL)
        btf->layout_len = 0;
    return 0;
}

/* How many bytes follow a type; negative where its kind is not known and not told. */
static int64_t rest_of(const struct btf *btf, const struct type *type)
{
    uint64_t once, each;

    if (type->kind != 0 && type->kind < KINDS) {
        once = SIZES[type->kind].once;
        each = SIZES[type->kind].each;
    } else if ((type->kind + 1) * LAYOUT <= btf->layout_len) {
        once = btf->layout[type->kind * LAYOUT];
        each = btf->layout[type->kind * LAYOUT + 1];
    } else
        return -1;
    return (int64_t)(once + each * type->vlen);
}

/*
 * Notes where each type begins. What comes after a kind that nobody knows can't be found, and may not be needed: it
 * ends the index, and what is missing then is missed by name. Returns that kind, or 0.
 */
static uint32_t make_index(struct btf *btf)
{
    uint64_t at = 0;

    btf->count = 1; /* 0 is void */
    while (at + TYPE <= btf->type_len) {
        struct type type = read_type(btf->types + at);
        int64_t rest = rest_of(btf, &type);

        if (rest < 0)
            return type.kind;
        if (at + TYPE + (uint64_t)rest > btf->type_len)
            break;
        btf->index[btf->count++] = (uint32_t)at;
        at += TYPE + (uint64_t)rest;
    }
    return 0;
}

static bool get_type(const struct btf *btf, uint32_t id, struct type *out)
{
    if (id == 0 || id >= btf->count)
        return false;
    *out = read_type(btf->types + btf->index[id]);
    return true;
}

static uint32_t find_id(const struct btf *btf, uint32_t kind, const char *name)
{
    size_t length = strlen(name);
    struct type type;

    for (uint32_t id = 1; get_type(btf, id, &type); id++)
        if (type.kind == kind && is_named(btf, type.name, name, length))
            return id;
    return 0;
}

/* The type behind typedefs and qualifiers. */
static bool resolve(const struct btf *btf, uint32_t id, struct type *out)
{
    for (int hop = 0; hop < HOPS; hop++) {
        if (!get_type(btf, id, out))
            return false;
        switch (out->kind) {
        case KIND_TYPEDEF:
        case KIND_VOLATILE:
        case KIND_CONST:
        case KIND_RESTRICT:
        case KIND_TYPE_TAG:
            id = out->size;
            break;
        default:
            return true;
        }
    }
    return false;
}

/* A member: its type, where it begins in bits, and how many it has where it is a bitfield. */
struct found {
    struct type type;
    uint64_t offset;
    uint32_t bits;
};

/* Looks for a member by name, also in what has no name itself, and adds its place to out->offset. */
static bool find_member(const struct btf *btf, const struct type *in, const char *name, size_t length, int depth,
                        int *patience, struct found *out)
{
    uint64_t base = out->offset;

    if (in->kind != KIND_STRUCT && in->kind != KIND_UNION)
        return false;
    for (uint32_t at = 0; at < in->vlen; at++) {
        const uint8_t *member = in->rest + (size_t)at * MEMBER;
        uint32_t where = read_u32(member + 8);
        uint32_t name_offset = read_u32(member);
        bool nameless = is_named(btf, name_offset, "", 0);

        if (--*patience < 0)
            return false;
        if (!nameless && !is_named(btf, name_offset, name, length))
            continue;
        if (!resolve(btf, read_u32(member + 4), &out->type))
            continue;
        out->bits = in->bitfields ? where >> 24 : 0;
        out->offset = base + (in->bitfields ? where & 0xffffff : where);
        if (!nameless)
            return true;
        struct type inner = out->type;
        if (depth > 0 && find_member(btf, &inner, name, length, depth - 1, patience, out))
            return true;
    }
    return false;
}

/* A field by its path ("se.sum_exec_runtime"). Not found, or not a number of 1 to 8 bytes: false. */
static bool find_field(const struct btf *btf, const struct type *task, const char *path, struct eh_field *out)
{
    struct found found = {.type = *task};
    int patience = PATIENCE;
    uint32_t bytes;

    while (true) {
        size_t length = strcspn(path, ".");
        struct type in = found.type;

        if (!find_member(btf, &in, path, length, DEPTH, &patience, &found))
            return false;
        if (path[length] == '\0')
            break;
        path += length + 1;
    }
    if (found.type.kind != KIND_INT && found.type.kind != KIND_ENUM && found.type.kind != KIND_ENUM64)
        return false;
    bytes = found.type.size;
    if (found.bits != 0)
        /* Only what lies in one byte: the verifier wants a load to begin where the bitfield does. */
        bytes = found.offset % 8 + found.bits <= 8 ? 1 : 0;
    else if (found.offset % 8 != 0)
        return false;
    if ((bytes != 1 && bytes != 4 && bytes != 8) || found.offset / 8 > INT16_MAX)
        return false;
    *out = (struct eh_field){
        .offset = (uint32_t)(found.offset / 8),
        .bytes = (uint8_t)bytes,
        .shift = (uint8_t)(found.offset % 8),
        .bits = (uint8_t)(found.bits != 0 ? found.bits : bytes * 8),
    };
    return true;
}

/* What is read of each thread. A second path is an older kernel's name of the same. */
static const struct {
    const char *path;
    const char *older;
    uint8_t bytes; /* as a record has it; 0: any */
    bool optional;
} FIELDS[] = {
    [EH_TASK_PID] = {"pid", NULL, 4, false},
    [EH_TASK_PRIORITY] = {"normal_prio", NULL, 4, false},
    [EH_TASK_STATE] = {"__state", "state", 0, false},
    [EH_TASK_START] = {"start_boottime", NULL, 8, false},
    [EH_TASK_EXECUTED] = {"se.sum_exec_runtime", NULL, 8, false},
    [EH_TASK_RUN_DELAY] = {"sched_info.run_delay", NULL, 8, false},
    [EH_TASK_TIMESLICES] = {"sched_info.pcount", NULL, 8, false},
    [EH_TASK_DL_RUNTIME] = {"dl.runtime", NULL, 8, false},
    [EH_TASK_DL_PERIOD] = {"dl.dl_period", NULL, 8, false},
    [EH_TASK_DL_THROTTLED] = {"dl.dl_throttled", NULL, 0, true},
};
static_assert(sizeof(FIELDS) / sizeof(FIELDS[0]) == EH_TASK_FIELDS, "a row for each field");
static_assert(sizeof(((struct eh_layout *)0)->fields) == EH_TASK_FIELDS * sizeof(struct eh_field), "and a place");

static int find_all(const struct btf *btf, uint32_t unknown, struct eh_layout *out, char *why, int size)
{
    const char *missing = "the function bpf_iter_task (an iterator over tasks)";
    struct type task;

    out->iterator_id = find_id(btf, KIND_FUNC, "bpf_iter_task");
    if (out->iterator_id == 0)
        goto not_found;
    missing = "struct task_struct";
    if (!get_type(btf, find_id(btf, KIND_STRUCT, "task_struct"), &task))
        goto not_found;
    for (int at = 0; at < EH_TASK_FIELDS; at++) {
        struct eh_field *field = &out->fields[at];
        bool found = find_field(btf, &task, FIELDS[at].path, field) ||
                     (FIELDS[at].older != NULL && find_field(btf, &task, FIELDS[at].older, field));

        if (found && (FIELDS[at].bytes == 0 || FIELDS[at].bytes == field->bytes))
            continue;
        memset(field, 0, sizeof(*field));
        if (FIELDS[at].optional)
            continue;
        snprintf(why, (size_t)size, "the kernel's BTF has no usable field task_struct.%s", FIELDS[at].path);
        return -ENOTSUP;
    }
    return 0;
not_found:
    if (unknown != 0)
        snprintf(why, (size_t)size, "the kernel's BTF does not have %s before a type of an unknown kind, %u", missing,
                 unknown);
    else
        snprintf(why, (size_t)size, "the kernel's BTF does not have %s", missing);
    return -ENOTSUP;
}

int eh_btf_layout(const void *data, uint64_t length, struct eh_layout *out, char *why, int size)
{
    struct btf btf = {.count = 0};
    size_t index_size;
    int result = read_header(&btf, data, length);

    memset(out, 0, sizeof(*out));
    if (result < 0) {
        snprintf(why, (size_t)size, "the kernel's BTF is cut, or not BTF of version 1");
        return result;
    }
    /* As large as it could ever get: pages that are not written cost nothing. */
    index_size = ((size_t)btf.type_len / TYPE + 1) * sizeof(*btf.index);
    btf.index = mmap(NULL, index_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (btf.index == MAP_FAILED) {
        snprintf(why, (size_t)size, "no memory for an index of the kernel's BTF");
        return -ENOMEM;
    }
    result = find_all(&btf, make_index(&btf), out, why, size);
    munmap(btf.index, index_size);
    return result;
}
