/*
 * /dev/vmanager without a kernel module: runs a command whose open(2) of the device and whose ioctls of type 0xBE are
 * answered from the model (model.h), by seccomp's user notification (seccomp_unotify(2)). x86-64 only.
 *
 *   double --device PATH [--caps MASK] [--cpus MASK] [--faults FILE] [--log FILE] -- COMMAND [ARGUMENT…]
 *
 * PATH (…/vmanager) need not be a device, …/vmanN is partition N. What the command gets is one end of a socket pair, so
 * that read(2), poll(2), dup(2) and close(2) are the real ones; but a read gives one event, and without CAP_EVENTS it
 * says EAGAIN. Its children and threads are served too. The exit status is the command's, 128 + N after signal N.
 *
 * Lines that are appended to FAULTS say what goes wrong from then on (NAME as in VMAN_NAME, or `open`):
 *   NAME COUNT ERRNO before|after    at the COUNTth call (0: at each) before or after the model has acted
 *   NAME COUNT hang before|after     that call does not return
 *   clear                            no faults any more; calls that hang return EIO
 * Every answered call is a line in LOG: its name and 0 or an errno.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "model.h"

#ifndef __x86_64__
#error "the double knows the system calls of x86-64 alone"
#endif
#ifndef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
#define SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV (1UL << 5)
#endif

#define FILES 1024
#define CALLS 64
#define RULES 64
#define LOOK_NS (50 * VMODEL_MS) /* how often to look for dead callers and at FAULTS while calls wait */
#define EVENT_BUFFER 32768       /* bytes of SO_SNDBUF: some 80 events */

struct file {
    struct vmodel_file model;
    ino_t inode; /* of the command's end, 0: this place is free */
    int socket, ended;
    __u64 lost;
};

struct call {
    struct vmodel_wait wait;
    __u64 notification; /* 0: this place is free */
    pid_t thread;
    struct vmodel_file file;
    struct vmodel_verb verb;
    __u64 address;
    __u32 size, nr;
    int hangs;
    union vmodel_arg arg;
};

struct rule {
    char name[16];
    unsigned long count;
    int error, hang, after;
};

static struct vmodel model;
static struct file files[FILES];
static struct call calls[CALLS];
static struct rule rules[RULES];
static size_t rule_count;
static const char *device, *faults, *log_path;
static long faults_read;
static int listener;
static pid_t child;

static void die(const char *what)
{
    fprintf(stderr, "double: %s: %s\n", what, strerror(errno));
    exit(70);
}

static __u64 now(void)
{
    struct timespec time;

    clock_gettime(CLOCK_BOOTTIME, &time);
    return (__u64)time.tv_sec * 1000000000 + (__u64)time.tv_nsec;
}

/* ---- faults and log ---- */

static void log_call(const char *name, int result)
{
    FILE *log = log_path ? fopen(log_path, "ae") : NULL;

    if (log) {
        fprintf(log, "%s %d\n", name, -result);
        fclose(log);
    }
}

static void answer(__u64 id, int result, int value, __u32 flags)
{
    struct seccomp_notif_resp response = {.id = id, .val = value, .error = result, .flags = flags};

    ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &response); /* ENOENT: the caller is gone */
}

static void read_faults(void)
{
    FILE *file = faults ? fopen(faults, "re") : NULL;
    char line[128], how[16], when[16];

    if (!file)
        return;
    fseek(file, faults_read, SEEK_SET);
    while (fgets(line, sizeof(line), file) && strchr(line, '\n')) {
        struct rule rule = {0};

        faults_read = ftell(file);
        if (strcmp(line, "clear\n") == 0) {
            rule_count = 0;
            for (int i = 0; i < CALLS; i++)
                if (calls[i].notification && calls[i].hangs) {
                    answer(calls[i].notification, -EIO, 0, 0);
                    calls[i].notification = 0;
                }
        } else if (sscanf(line, "%15s %lu %15s %15s", rule.name, &rule.count, how, when) == 4 && rule_count < RULES) {
            rule.hang = strcmp(how, "hang") == 0;
            rule.error = atoi(how);
            rule.after = strcmp(when, "after") == 0;
            rules[rule_count++] = rule;
        } else {
            fprintf(stderr, "double: %s: %s", faults, line);
            exit(70);
        }
    }
    fclose(file);
}

/* The rule that this call meets, if any. Calls are counted where they begin. */
static const struct rule *find_fault(const char *name)
{
    static struct rule met;

    for (size_t i = 0; i < rule_count; i++) {
        if (strcmp(rules[i].name, name) != 0)
            continue;
        if (rules[i].count > 1) {
            rules[i].count--;
            continue;
        }
        met = rules[i];
        if (rules[i].count == 1)
            rules[i] = rules[--rule_count];
        return &met;
    }
    return NULL;
}

/* ---- the command's memory and files ---- */

static int peek(pid_t thread, __u64 address, void *to, size_t size)
{
    struct iovec local = {to, size}, remote = {(void *)address, size};

    return process_vm_readv(thread, &local, 1, &remote, 1, 0) == (ssize_t)size ? 0 : -EFAULT;
}

static int poke(pid_t thread, __u64 address, void *from, size_t size)
{
    struct iovec local = {from, size}, remote = {(void *)address, size};

    return process_vm_writev(thread, &local, 1, &remote, 1, 0) == (ssize_t)size ? 0 : -EFAULT;
}

/* copy_struct_from_user(): 0 or -errno. */
static int peek_struct(pid_t thread, __u64 address, void *to, __u32 known, __u32 *size)
{
    unsigned char all[4096] = {0};

    if (peek(thread, address, size, sizeof(*size)) < 0)
        return -EFAULT;
    if (*size < 8)
        return -EINVAL;
    if (*size > sizeof(all))
        return -E2BIG;
    if (peek(thread, address, all, *size) < 0)
        return -EFAULT;
    for (__u32 at = known; at < *size; at++)
        if (all[at])
            return -E2BIG;
    memcpy(to, all, known);
    return 0;
}

/* The command's descriptor as one of ours, or -errno. */
static int steal(pid_t thread, int fd)
{
    char path[64], line[128];
    int process = 0, pidfd, mine;
    FILE *status;

    snprintf(path, sizeof(path), "/proc/%d/status", thread);
    status = fopen(path, "re");
    while (status && fgets(line, sizeof(line), status) && sscanf(line, "Tgid: %d", &process) != 1)
        ;
    if (status)
        fclose(status);
    pidfd = (int)syscall(SYS_pidfd_open, process, 0);
    if (pidfd < 0)
        return -errno;
    mine = (int)syscall(SYS_pidfd_getfd, pidfd, fd, 0);
    if (mine < 0)
        mine = -errno;
    close(pidfd);
    return mine;
}

static int read_image(pid_t thread, const struct vman_image *want, struct vmodel_image *image)
{
    int fd = steal(thread, want->fd), mode, result = 0;
    struct stat stat;
    ssize_t length;
    __u64 rest;

    if (fd < 0)
        return -EBADF;
    mode = fcntl(fd, F_GETFL);
    if (mode & O_PATH || (mode & O_ACCMODE) == O_WRONLY) {
        result = -EBADF;
    } else if (fstat(fd, &stat) < 0 || !S_ISREG(stat.st_mode)) {
        result = -EINVAL;
    } else {
        rest = want->offset < (__u64)stat.st_size ? (__u64)stat.st_size - want->offset : 0;
        if (want->len > rest)
            result = -EINVAL;
        image->size = want->len ? want->len : rest;
        length = pread(fd, image->head, image->size < VMODEL_HEAD ? image->size : VMODEL_HEAD, (off_t)want->offset);
        image->head_len = length > 0 ? (__u32)length : 0;
    }
    close(fd);
    return result;
}

static int read_input(pid_t thread, const struct vman_deploy *deploy, struct vmodel_input *input)
{
    int result = vmodel_check_deploy(deploy);

    memset(input, 0, sizeof(*input));
    for (int i = 0; result == 0 && i < VMAN_IMG_MAX; i++)
        if (deploy->img[i].flags)
            result = read_image(thread, &deploy->img[i], &input->image[i]);
    if (result == 0 && deploy->cmdline_len)
        result = peek(thread, deploy->cmdline_ptr, input->cmdline, deploy->cmdline_len);
    return result;
}

/* Gives the command a new open file; its number or -errno. `reply`: as the result of the call itself. */
static int give(__u64 notification, struct vmodel_file opened, int flags, int reply)
{
    struct seccomp_notif_addfd add = {.id = notification, .newfd_flags = (__u32)(flags & O_CLOEXEC)};
    struct file *file = NULL;
    struct stat stat;
    int pair[2], fd, buffer = EVENT_BUFFER / 2; /* the kernel doubles it */

    for (int i = 0; i < FILES && !file; i++)
        if (!files[i].inode)
            file = &files[i];
    if (!file)
        return -ENFILE;
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
        return -errno;
    if (fstat(pair[1], &stat) < 0 || fcntl(pair[0], F_SETFL, O_NONBLOCK) < 0 ||
        fcntl(pair[1], F_SETFL, flags & O_NONBLOCK) < 0 ||
        setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &buffer, sizeof(buffer)) < 0)
        die("socket");
    add.srcfd = (__u32)pair[1];
    add.flags = reply ? SECCOMP_ADDFD_FLAG_SEND : 0;
    fd = ioctl(listener, SECCOMP_IOCTL_NOTIF_ADDFD, &add);
    if (fd < 0)
        fd = -errno;
    close(pair[1]);
    if (fd < 0) {
        close(pair[0]);
        return fd;
    }
    *file = (struct file){.model = opened, .inode = stat.st_ino, .socket = pair[0]};
    return fd;
}

static struct file *find_file(pid_t thread, int fd)
{
    char path[64], target[64] = "";
    unsigned long inode;

    snprintf(path, sizeof(path), "/proc/%d/fd/%d", thread, fd);
    if (readlink(path, target, sizeof(target) - 1) < 0 || sscanf(target, "socket:[%lu]", &inode) != 1)
        return NULL;
    for (int i = 0; i < FILES; i++)
        if (files[i].inode == inode)
            return &files[i];
    return NULL;
}

/* ---- events ---- */

static void send_event(struct file *file, const struct vman_event *event)
{
    if (!(model.caps & VMAN_CAP_EVENTS))
        return;
    if (file->lost || send(file->socket, event, sizeof(*event), MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
        file->lost++;
}

static void send_lost(struct file *file)
{
    struct vman_event event = {.size = sizeof(event), .generation = file->lost, .time_ns = now()};

    if (send(file->socket, &event, sizeof(event), MSG_DONTWAIT | MSG_NOSIGNAL) > 0)
        file->lost = 0;
}

static void changed(const struct vmodel_partition *p, const struct vman_event *event)
{
    for (int i = 0; i < FILES; i++) {
        struct file *file = &files[i];

        if (!file->inode || file->ended || (file->model.serial && file->model.serial != p->serial))
            continue;
        send_event(file, event);
        if (file->model.serial && event->new_state == VMAN_STATE_NONE) {
            shutdown(file->socket, SHUT_RDWR);
            file->ended = 1;
        }
    }
}

static void closed(struct file *file)
{
    close(file->socket);
    file->inode = 0;
    if (!file->model.serial)
        vmodel_closed(&model, &file->model, now());
}

/* What the command has closed counts before its next call does. */
static void look_at_files(void)
{
    struct pollfd polls[FILES];
    int at[FILES], count = 0;

    for (int i = 0; i < FILES; i++)
        if (files[i].inode && !files[i].ended) {
            polls[count] = (struct pollfd){files[i].socket, files[i].lost ? POLLOUT : 0, 0};
            at[count++] = i;
        }
    poll(polls, (nfds_t)count, 0);
    for (int i = 0; i < count; i++) {
        if (polls[i].revents & POLLHUP)
            closed(&files[at[i]]);
        else if (polls[i].revents & POLLOUT)
            send_lost(&files[at[i]]);
    }
}

/* ---- calls ---- */

static int alive(__u64 notification)
{
    return ioctl(listener, SECCOMP_IOCTL_NOTIF_ID_VALID, &notification) == 0;
}

/* Descriptors and structures of a call that the model has answered. */
static int deliver(struct call *call, int result)
{
    const __u32 size = call->size < call->verb.size ? call->size : call->verb.size;
    struct vmodel_file opened = {.token = ++model.last_token};

    if (result == 0 && !call->file.serial && call->nr == _IOC_NR(VMAN_CREATE) && !(call->arg.create.flags & VMAN_CREATE_NOFD)) {
        struct vmodel_partition *made = vmodel_by_id(&model, call->arg.create.id);

        opened.serial = made->serial;
        call->arg.create.fd = result = give(call->notification, opened, O_CLOEXEC, 0);
        if (result < 0)
            vmodel_remove(&model, made, now());
    }
    if (result == 0 && !call->file.serial && call->nr == _IOC_NR(VMAN_OPEN)) {
        opened.serial = vmodel_by_id(&model, call->arg.open.id)->serial;
        call->arg.open.fd = result = give(call->notification, opened, O_CLOEXEC, 0);
    }
    if (result > 0)
        result = 0;
    if (vmodel_writes(call->verb, result) && poke(call->thread, call->address, &call->arg, size) < 0) {
        if (result == 0 && !call->file.serial && call->nr == _IOC_NR(VMAN_CREATE))
            vmodel_remove(&model, vmodel_by_id(&model, call->arg.create.id), now());
        result = -EFAULT;
    }
    return result;
}

static void finish(struct call *call, int result)
{
    log_call(call->verb.name, result);
    answer(call->notification, result, 0, 0);
    call->notification = 0;
}

static void act(struct call *call)
{
    static struct vmodel_input input;
    const struct rule *fault = find_fault(call->verb.name);
    const struct rule rule = fault ? *fault : (struct rule){.name = ""};
    int result;

    if (fault && !rule.after) {
        call->hangs = rule.hang;
        if (!rule.hang)
            finish(call, -rule.error);
        return;
    }
    result = peek_struct(call->thread, call->address, &call->arg, call->verb.size, &call->size);
    if (result == 0 && call->file.serial && call->nr == _IOC_NR(VMAN_DEPLOY))
        result = read_input(call->thread, &call->arg.deploy, &input);
    if (!alive(call->notification)) { /* and what was read may be another's */
        call->notification = 0;
        return;
    }
    if (result == 0)
        result = vmodel_call(&model, &call->file, call->nr, &call->arg, &input, now(), &call->wait);
    if (fault) { /* the model has acted; a start that goes on is nobody's call any more */
        vmodel_forget(&model, &call->wait);
        call->wait.result = 0;
        call->hangs = rule.hang;
        if (!rule.hang)
            finish(call, -rule.error);
        return;
    }
    if (result != -EINPROGRESS)
        finish(call, deliver(call, result));
}

static void look_at_calls(void)
{
    for (int i = 0; i < CALLS; i++) {
        struct call *call = &calls[i];

        if (!call->notification)
            continue;
        if (!alive(call->notification)) {
            vmodel_forget(&model, &call->wait);
            call->notification = 0;
        } else if (!call->hangs && call->wait.result != -EINPROGRESS) {
            call->arg.ctl.state = call->verb.writes == 2 ? call->wait.state : call->arg.ctl.state;
            finish(call, deliver(call, call->wait.result));
        }
    }
}

static void on_ioctl(const struct seccomp_notif *notification)
{
    struct file *file = find_file((pid_t)notification->pid, (int)notification->data.args[0]);
    const __u32 nr = _IOC_NR((__u32)notification->data.args[1]);
    struct call *call = NULL;

    if (!file) {
        answer(notification->id, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE);
        return;
    }
    for (int i = 0; i < CALLS && !call; i++)
        if (!calls[i].notification)
            call = &calls[i];
    if (!call || !vmodel_verb(file->model.serial != 0, nr).size) {
        answer(notification->id, call ? -ENOTTY : -ENOMEM, 0, 0);
        return;
    }
    *call = (struct call){
        .notification = notification->id,
        .thread = (pid_t)notification->pid,
        .file = file->model,
        .verb = vmodel_verb(file->model.serial != 0, nr),
        .address = notification->data.args[2],
        .nr = nr,
    };
    act(call);
}

/* A path in the command's memory, which may end right before a page that is not there. */
static void peek_path(pid_t thread, __u64 address, char *path, size_t size)
{
    size_t first = 4096 - address % 4096;

    memset(path, 0, size);
    if (first > size - 1)
        first = size - 1;
    if (peek(thread, address, path, first) == 0 && !memchr(path, 0, first))
        peek(thread, address + first, path + first, size - 1 - first);
}

static void on_open(const struct seccomp_notif *notification)
{
    const int at = notification->data.nr == SYS_openat;
    const int flags = (int)notification->data.args[at ? 2 : 1];
    const size_t stem = strlen(device) - strlen("ager");
    struct vmodel_file opened = {.token = ++model.last_token};
    char path[512], *end;
    const struct rule *fault;
    int result = 0;

    peek_path((pid_t)notification->pid, notification->data.args[at ? 1 : 0], path, sizeof(path));
    if (strcmp(path, device) != 0) {
        unsigned long id = 0;

        if (strncmp(path, device, stem) == 0 && path[stem] >= '1' && path[stem] <= '9')
            id = strtoul(path + stem, &end, 10);
        if (!id || *end) {
            answer(notification->id, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE);
            return;
        }
        vmodel_tick(&model, now());
        if (vmodel_by_id(&model, (__u32)id))
            opened.serial = vmodel_by_id(&model, (__u32)id)->serial;
        else
            result = -ENOENT;
    }
    fault = find_fault("open");
    if (fault)
        result = -fault->error;
    log_call("open", result);
    if (result == 0)
        result = give(notification->id, opened, flags, 1);
    if (result < 0)
        answer(notification->id, result, 0, 0);
}

static void on_notification(void)
{
    struct seccomp_notif notification = {0};

    if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &notification) < 0)
        return; /* the caller died meanwhile, or a signal came */
    look_at_files();
    read_faults();
    if (notification.data.nr == SYS_ioctl)
        on_ioctl(&notification);
    else
        on_open(&notification);
}

/* ---- the command ---- */

/* Ask about every open and about ioctls of our type; a path or a descriptor can't be judged in a filter. */
static int install_filter(void)
{
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 7),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_openat, 6, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_open, 5, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])), /* its low half */
        BPF_STMT(BPF_ALU | BPF_AND | BPF_K, 0xff00),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, VMAN_IOC << 8, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
    };
    struct sock_fprog program = {sizeof(code) / sizeof(code[0]), code};
    /* Without the second flag (before 5.19) a signal would make a call begin anew that the model has acted upon. */
    const unsigned long flags = SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;

    if (geteuid() != 0 && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return -1;
    return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
}

static void run_command(char **command, int channel)
{
    char control[CMSG_SPACE(sizeof(int))] = {0};
    struct iovec byte = {"", 1};
    struct msghdr message = {.msg_iov = &byte, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    int fd;

    prctl(PR_SET_PDEATHSIG, SIGKILL); /* nobody would answer it any more */
    fd = install_filter();
    if (fd < 0)
        die("seccomp");
    *head = (struct cmsghdr){CMSG_LEN(sizeof(int)), SOL_SOCKET, SCM_RIGHTS};
    memcpy(CMSG_DATA(head), &fd, sizeof(fd));
    if (sendmsg(channel, &message, 0) < 0)
        die("sendmsg");
    close(fd);
    execvp(command[0], command);
    fprintf(stderr, "double: %s: %s\n", command[0], strerror(errno));
    _exit(127);
}

static int receive_listener(int channel)
{
    char control[CMSG_SPACE(sizeof(int))] = {0}, byte;
    struct iovec space = {&byte, 1};
    struct msghdr message = {.msg_iov = &space, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
    int fd;

    if (recvmsg(channel, &message, MSG_CMSG_CLOEXEC) <= 0 || !CMSG_FIRSTHDR(&message))
        exit(70); /* the child has said why */
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
    return fd;
}

static void forward(int number)
{
    kill(child, number);
}

static int wait_ms(void)
{
    __u64 time = now(), due = vmodel_due(&model);

    for (int i = 0; i < CALLS; i++)
        if (calls[i].notification && due > time + LOOK_NS)
            due = time + LOOK_NS;
    if (due == VMODEL_NEVER)
        return -1;
    return due > time ? (int)((due - time) / VMODEL_MS < 60000 ? (due - time) / VMODEL_MS + 1 : 60000) : 0;
}

static int serve(void)
{
    const int pidfd = (int)syscall(SYS_pidfd_open, child, 0);
    struct pollfd polls[FILES + 2];
    int status;

    if (pidfd < 0)
        die("pidfd_open");
    for (;;) {
        nfds_t count = 2;

        polls[0] = (struct pollfd){listener, POLLIN, 0};
        polls[1] = (struct pollfd){pidfd, POLLIN, 0};
        for (int i = 0; i < FILES; i++)
            if (files[i].inode && !files[i].ended)
                polls[count++] = (struct pollfd){files[i].socket, files[i].lost ? POLLOUT : 0, 0};
        if (poll(polls, count, wait_ms()) < 0 && errno != EINTR)
            die("poll");
        look_at_files();
        vmodel_tick(&model, now());
        read_faults();
        look_at_calls();
        if (polls[1].revents && waitpid(child, &status, WNOHANG) == child)
            return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        if (polls[0].revents & POLLIN) {
            on_notification();
            look_at_calls(); /* what it has brought about for others */
        }
    }
}

int main(int argc, char **argv)
{
    __u64 caps = VMODEL_CAPS, cpus = VMODEL_CPUS;
    int channel[2], at = 1;

    for (; at + 1 < argc && strncmp(argv[at], "--", 3) != 0; at += 2) {
        if (strcmp(argv[at], "--device") == 0)
            device = argv[at + 1];
        else if (strcmp(argv[at], "--caps") == 0)
            caps = strtoull(argv[at + 1], NULL, 0);
        else if (strcmp(argv[at], "--cpus") == 0)
            cpus = strtoull(argv[at + 1], NULL, 0);
        else if (strcmp(argv[at], "--faults") == 0)
            faults = argv[at + 1];
        else if (strcmp(argv[at], "--log") == 0)
            log_path = argv[at + 1];
        else
            break;
    }
    if (!device || strlen(device) < strlen("/vmanager") || at + 1 >= argc || strcmp(argv[at], "--") != 0 ||
        strcmp(device + strlen(device) - strlen("/vmanager"), "/vmanager") != 0) {
        fprintf(stderr, "usage: double --device DIRECTORY/vmanager [--caps MASK] [--cpus MASK] [--faults FILE] "
                        "[--log FILE] -- COMMAND [ARGUMENT...]\n");
        return 64;
    }
    vmodel_init(&model, caps, cpus, changed);
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, channel) < 0)
        die("socketpair");
    child = fork();
    if (child < 0)
        die("fork");
    if (child == 0)
        run_command(argv + at + 1, channel[1]);
    close(channel[1]);
    listener = receive_listener(channel[0]);
    close(channel[0]);
    signal(SIGTERM, forward);
    signal(SIGINT, SIG_IGN); /* a terminal sends it to the command too */
    return serve();
}
