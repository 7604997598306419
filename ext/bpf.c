// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The counters of every deadline thread by one read, without a descriptor a thread: a program in the kernel's virtual
 * machine walks the threads and writes a record for each that is in SCHED_DEADLINE
 * (Documentation/bpf/bpf_iterators.rst).
 *
 * This file has a licence of its own because of that program: the kernel lets only programs under a licence compatible
 * with the GPL call bpf_seq_write, and ours says "Dual MIT/GPL" when it is loaded. It only reads.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "bpf.h"

/* Old libc headers lack the name; the number is the kernel's ABI and differs between machines. */
#if defined(__x86_64__)
#define EH_NR_BPF 321
#elif defined(__aarch64__)
#define EH_NR_BPF 280
#else
#error "edgehold knows the system call numbers of x86_64 and aarch64"
#endif
#ifdef SYS_bpf
static_assert(SYS_bpf == EH_NR_BPF, "bpf's number is not this machine's");
#endif

static_assert(sizeof(struct eh_task) == 64, "a record is one cache line");
static_assert(offsetof(struct eh_task, start_boottime_ns) == 8, "no padding before the first 64-bit field");
static_assert(offsetof(struct eh_task, throttled) == 56, "no padding after the last 64-bit field");
static_assert(sizeof(struct bpf_insn) == 8, "struct bpf_insn");
static_assert(offsetof(union bpf_attr, attach_btf_id) == 108, "BPF_PROG_LOAD's attach_btf_id");
static_assert(offsetof(union bpf_attr, link_create.attach_type) == 8, "BPF_LINK_CREATE's attach_type");
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "bitfields are found as little-endian machines have them");

#define BTF_FILE "/sys/kernel/btf/vmlinux"
/* MAX_DL_PRIO - 1 (include/linux/sched/deadline.h): normal_prio of every thread of the policy, and of no other. */
#define DEADLINE_PRIORITY (-1)
#define SEQ_WRITE 127 /* bpf_seq_write in the list of helpers of include/uapi/linux/bpf.h */
#define LOG_SIZE 16384
#define INSTRUCTIONS 64
/* A pass over very many threads is interrupted by the kernel after each million, with EAGAIN. */
#define PAUSES 64

static int bpf(int command, union bpf_attr *attr)
{
    long result = syscall(EH_NR_BPF, command, attr, sizeof(*attr));

    return result < 0 ? -errno : (int)result;
}

static int fail(char *why, int size, const char *what, int error)
{
    snprintf(why, (size_t)size, "%s: %s", what, strerror(-error));
    return error;
}

static uint64_t address(const void *pointer)
{
    return (uint64_t)(uintptr_t)pointer;
}

/* A program while it is written. Registers: 6 the thread, 7 the context, 10 the end of the stack. */
struct program {
    struct bpf_insn code[INSTRUCTIONS];
    int length;
};

#define EMIT(program, ...) ((program)->code[(program)->length++] = (struct bpf_insn){__VA_ARGS__})

static void emit_load(struct program *program, int to, int from, int bytes, uint32_t offset)
{
    int size = bytes == 8 ? BPF_DW : bytes == 4 ? BPF_W : BPF_B;

    EMIT(program, .code = (uint8_t)(BPF_LDX | BPF_MEM | size), .dst_reg = to & 15, .src_reg = from & 15,
         .off = (int16_t)offset);
}

/* Register 1 into the record, which is the last bytes of the stack. */
static void emit_store(struct program *program, int bytes, size_t offset)
{
    EMIT(program, .code = (uint8_t)(BPF_STX | BPF_MEM | (bytes == 8 ? BPF_DW : BPF_W)), .dst_reg = BPF_REG_10,
         .src_reg = BPF_REG_1, .off = (int16_t)((int)offset - (int)sizeof(struct eh_task)));
}

static void emit_set(struct program *program, int reg, int32_t value)
{
    EMIT(program, .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = reg & 15, .imm = value);
}

static void emit_copy(struct program *program, const struct eh_field *field, int bytes, size_t offset)
{
    emit_load(program, BPF_REG_1, BPF_REG_6, field->bytes, field->offset);
    emit_store(program, bytes, offset);
}

/* A jump over what follows it if the register compares so; the distance is filled in by end_if. */
static int emit_if(struct program *program, int jump, int reg, int32_t value)
{
    EMIT(program, .code = (uint8_t)(BPF_JMP | jump | BPF_K), .dst_reg = reg & 15, .imm = value);
    return program->length;
}

static void end_if(struct program *program, int jump)
{
    program->code[jump - 1].off = (int16_t)(program->length - jump);
}

/* Called for each thread, and at the end with none, with struct bpf_iter__task: meta (seq comes first) and task. */
static void assemble(struct program *program, const struct eh_layout *layout)
{
    const struct eh_field *field = layout->fields;
    int no_thread, no_deadline;

    EMIT(program, .code = BPF_ALU64 | BPF_MOV | BPF_X, .dst_reg = BPF_REG_7, .src_reg = BPF_REG_1);
    emit_load(program, BPF_REG_6, BPF_REG_7, 8, 8);
    no_thread = emit_if(program, BPF_JEQ, BPF_REG_6, 0);
    /* Each field is a cache line more, and all of them are cold: the priority that a policy means is beside others. */
    emit_load(program, BPF_REG_1, BPF_REG_6, 4, field[EH_TASK_PRIORITY].offset);
    EMIT(program, .code = BPF_ALU | BPF_ADD | BPF_K, .dst_reg = BPF_REG_1, .imm = -DEADLINE_PRIORITY);
    no_deadline = emit_if(program, BPF_JNE, BPF_REG_1, 0);

    emit_copy(program, &field[EH_TASK_PID], 4, offsetof(struct eh_task, tid));
    emit_copy(program, &field[EH_TASK_STATE], 4, offsetof(struct eh_task, state));
    emit_copy(program, &field[EH_TASK_START], 8, offsetof(struct eh_task, start_boottime_ns));
    emit_copy(program, &field[EH_TASK_EXECUTED], 8, offsetof(struct eh_task, executed_ns));
    emit_copy(program, &field[EH_TASK_RUN_DELAY], 8, offsetof(struct eh_task, run_delay_ns));
    emit_copy(program, &field[EH_TASK_TIMESLICES], 8, offsetof(struct eh_task, timeslices));
    emit_copy(program, &field[EH_TASK_DL_RUNTIME], 8, offsetof(struct eh_task, dl_runtime_ns));
    emit_copy(program, &field[EH_TASK_DL_PERIOD], 8, offsetof(struct eh_task, period_ns));
    field = &field[EH_TASK_DL_THROTTLED];
    if (field->bits != 0) {
        emit_load(program, BPF_REG_1, BPF_REG_6, field->bytes, field->offset);
        EMIT(program, .code = BPF_ALU64 | BPF_RSH | BPF_K, .dst_reg = BPF_REG_1, .imm = field->shift);
        EMIT(program, .code = BPF_ALU64 | BPF_AND | BPF_K, .dst_reg = BPF_REG_1, .imm = 1);
    } else
        emit_set(program, BPF_REG_1, 0);
    emit_store(program, 4, offsetof(struct eh_task, throttled));
    emit_set(program, BPF_REG_1, 0);
    emit_store(program, 4, offsetof(struct eh_task, reserved));

    emit_load(program, BPF_REG_1, BPF_REG_7, 8, 0);
    emit_load(program, BPF_REG_1, BPF_REG_1, 8, 0);
    EMIT(program, .code = BPF_ALU64 | BPF_MOV | BPF_X, .dst_reg = BPF_REG_2, .src_reg = BPF_REG_10);
    EMIT(program, .code = BPF_ALU64 | BPF_ADD | BPF_K, .dst_reg = BPF_REG_2, .imm = -(int32_t)sizeof(struct eh_task));
    emit_set(program, BPF_REG_3, sizeof(struct eh_task));
    EMIT(program, .code = BPF_JMP | BPF_CALL, .imm = SEQ_WRITE);

    /* A record that does not fit is the kernel's to notice: it calls again for the same thread. */
    end_if(program, no_thread);
    end_if(program, no_deadline);
    emit_set(program, BPF_REG_0, 0);
    EMIT(program, .code = BPF_JMP | BPF_EXIT);
}

/* The whole of a file of sysfs, which gives a page at a time. Its pages are unmapped by the caller. */
static int read_btf(void **data, uint64_t *length, char *why, int size)
{
    struct stat status;
    uint64_t done = 0;
    int fd = open(BTF_FILE, O_RDONLY | O_CLOEXEC);
    int result = 0;

    if (fd < 0)
        return fail(why, size, BTF_FILE, -errno);
    if (fstat(fd, &status) < 0 || status.st_size <= 0) {
        close(fd);
        snprintf(why, (size_t)size, "%s is empty", BTF_FILE);
        return -EPROTO;
    }
    *length = (uint64_t)status.st_size;
    *data = mmap(NULL, *length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (*data == MAP_FAILED) {
        close(fd);
        return fail(why, size, "memory for the kernel's BTF", -ENOMEM);
    }
    while (done < *length) {
        ssize_t got = read(fd, (char *)*data + done, *length - done);

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            result = fail(why, size, BTF_FILE, got < 0 ? -errno : -EPROTO);
            munmap(*data, *length);
            break;
        }
        done += (uint64_t)got;
    }
    close(fd);
    return result;
}

static int get_layout(struct eh_layout *layout, char *why, int size)
{
    uint64_t length = 0;
    void *data = NULL;
    int result = read_btf(&data, &length, why, size);

    if (result < 0)
        return result;
    result = eh_btf_layout(data, length, layout, why, size);
    munmap(data, length);
    return result;
}

/* What a person needs of the verifier's log: its end. */
static void add_log(char *log, char *why, int size)
{
    size_t length = strnlen(log, LOG_SIZE - 1);
    size_t said = strlen(why);
    size_t room = (size_t)size - said;

    while (length > 0 && log[length - 1] == '\n')
        length--;
    log[length] = '\0';
    if (room > 4)
        snprintf(why + said, room, ": %s", length > room - 3 ? log + length - (room - 3) : log);
}

static int load(const struct eh_layout *layout, char *why, int size)
{
    static const char licence[] = "Dual MIT/GPL";
    struct program program = {.length = 0};
    union bpf_attr attr;
    char log[LOG_SIZE];
    int result;

    assemble(&program, layout);
    memset(&attr, 0, sizeof(attr));
    attr.prog_type = BPF_PROG_TYPE_TRACING;
    attr.expected_attach_type = BPF_TRACE_ITER;
    attr.attach_btf_id = layout->iterator_id;
    attr.insns = address(program.code);
    attr.insn_cnt = (uint32_t)program.length;
    attr.license = address(licence);
    memcpy(attr.prog_name, "edgehold_tasks", sizeof("edgehold_tasks"));
    result = bpf(BPF_PROG_LOAD, &attr);
    if (result >= 0)
        return result;
    fail(why, size, "bpf(BPF_PROG_LOAD)", result);
    if (result == -EPERM)
        return result;
    log[0] = '\0';
    attr.log_buf = address(log);
    attr.log_size = sizeof(log);
    attr.log_level = 1;
    if (bpf(BPF_PROG_LOAD, &attr) < 0)
        add_log(log, why, size);
    return result;
}

int eh_bpf_open(struct eh_bpf *out, char *why, int size)
{
    struct eh_layout layout;
    union bpf_attr attr;
    int result;

    *out = (struct eh_bpf){.program_fd = -1, .link_fd = -1};
    if (size > 0)
        why[0] = '\0';
    result = get_layout(&layout, why, size);
    if (result < 0)
        return result;
    if (layout.fields[EH_TASK_DL_THROTTLED].bits != 0)
        out->flags |= EH_BPF_THROTTLED;
    out->program_fd = load(&layout, why, size);
    if (out->program_fd < 0)
        return out->program_fd;
    memset(&attr, 0, sizeof(attr));
    attr.link_create.prog_fd = (uint32_t)out->program_fd;
    attr.link_create.attach_type = BPF_TRACE_ITER;
    result = bpf(BPF_LINK_CREATE, &attr);
    if (result < 0) {
        eh_bpf_close(out);
        return fail(why, size, "bpf(BPF_LINK_CREATE)", result);
    }
    out->link_fd = result;
    return 0;
}

/* Reads whole records up to the end or to `max`; both sizes are multiples of a record's, so none is ever cut. */
static int read_records(int fd, struct eh_task *out, int max)
{
    struct eh_task beyond;
    int count = 0;

    for (int pauses = 0; pauses < PAUSES;) {
        bool full = count == max;
        ssize_t got =
            full ? read(fd, &beyond, sizeof(beyond)) : read(fd, out + count, (size_t)(max - count) * sizeof(*out));

        if (got == 0)
            return count;
        if (got < 0 && errno != EAGAIN && errno != EINTR)
            return -errno;
        if (got < 0) {
            pauses++;
            continue;
        }
        if (full)
            return -ENOSPC;
        if ((size_t)got % sizeof(*out) != 0)
            return -EPROTO;
        count += (int)((size_t)got / sizeof(*out));
    }
    return -EAGAIN;
}

int eh_bpf_read(const struct eh_bpf *self, struct eh_task *out, int max)
{
    union bpf_attr attr;
    int fd, result;

    memset(&attr, 0, sizeof(attr));
    attr.iter_create.link_fd = (uint32_t)self->link_fd;
    fd = bpf(BPF_ITER_CREATE, &attr);
    if (fd < 0)
        return fd;
    result = read_records(fd, out, max);
    close(fd);
    return result;
}

void eh_bpf_close(struct eh_bpf *self)
{
    if (self->link_fd >= 0)
        close(self->link_fd);
    if (self->program_fd >= 0)
        close(self->program_fd);
    self->link_fd = self->program_fd = -1;
}
