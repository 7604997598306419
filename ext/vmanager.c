/*
 * The ioctls of /dev/vmanager (uapi/vmanager.h), one function a call. A call sleeps as long as the firmware or a guest
 * takes; cffi releases the GIL around it. Keeps no state and allocates nothing.
 */
#include <assert.h>
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>

#include "vmanager.h"
#include "vmanager_calls.h"

/* The ABI: another machine, another compiler or a careless edit must not move anything. */
static_assert(sizeof(struct vman_info) == 96, "struct vman_info");
static_assert(offsetof(struct vman_info, cpu_possible) == 16, "vman_info.cpu_possible");
static_assert(offsetof(struct vman_info, max_partitions) == 72, "vman_info.max_partitions");
static_assert(sizeof(struct vman_create) == 128, "struct vman_create");
static_assert(offsetof(struct vman_create, cpu_mask) == 24, "vman_create.cpu_mask");
static_assert(offsetof(struct vman_create, name) == 72, "vman_create.name");
static_assert(offsetof(struct vman_create, uuid) == 104, "vman_create.uuid");
static_assert(sizeof(struct vman_destroy) == 16, "struct vman_destroy");
static_assert(sizeof(struct vman_open) == 16, "struct vman_open");
static_assert(sizeof(struct vman_next) == 16, "struct vman_next");
static_assert(sizeof(struct vman_image) == 32, "struct vman_image");
static_assert(sizeof(struct vman_deploy) == 160, "struct vman_deploy");
static_assert(offsetof(struct vman_deploy, cmdline_ptr) == 144, "vman_deploy.cmdline_ptr");
static_assert(sizeof(struct vman_ctl) == 16, "struct vman_ctl");
static_assert(sizeof(struct vman_status) == 152, "struct vman_status");
static_assert(offsetof(struct vman_status, cpu_mask) == 40, "vman_status.cpu_mask");
static_assert(offsetof(struct vman_status, name) == 96, "vman_status.name");
static_assert(offsetof(struct vman_status, fw_code) == 144, "vman_status.fw_code");
static_assert(sizeof(struct vman_event) == 32, "struct vman_event");

static int call(int fd, unsigned long request, void *argument)
{
    return ioctl(fd, request, argument) < 0 ? -errno : 0;
}

int eh_vman_info(int fd, struct vman_info *info)
{
    memset(info, 0, sizeof(*info));
    info->size = sizeof(*info);
    return call(fd, VMAN_GET_INFO, info);
}

int eh_vman_create(int fd, struct vman_create *create)
{
    create->size = sizeof(*create);
    return call(fd, VMAN_CREATE, create);
}

int eh_vman_destroy(int fd, uint32_t id)
{
    struct vman_destroy destroy = {.size = sizeof(destroy), .id = id};

    return call(fd, VMAN_DESTROY, &destroy);
}

int eh_vman_open(int fd, uint32_t id)
{
    struct vman_open open = {.size = sizeof(open), .id = id};
    int result = call(fd, VMAN_OPEN, &open);

    return result < 0 ? result : open.fd;
}

int eh_vman_next(int fd, uint32_t *id)
{
    struct vman_next next = {.size = sizeof(next), .id = *id};
    int result = call(fd, VMAN_NEXT, &next);

    if (result == 0)
        *id = next.id;
    return result;
}

int eh_vman_deploy(int fd, struct vman_deploy *deploy)
{
    deploy->size = sizeof(*deploy);
    return call(fd, VMAN_DEPLOY, deploy);
}

int eh_vman_status(int fd, struct vman_status *status)
{
    memset(status, 0, sizeof(*status));
    status->size = sizeof(*status);
    return call(fd, VMAN_STATUS, status);
}

int eh_vman_ctl(int fd, uint32_t request, uint32_t flags, uint32_t timeout_ms, uint32_t *state)
{
    struct vman_ctl ctl = {.size = sizeof(ctl), .flags = flags, .timeout_ms = timeout_ms};
    int result = call(fd, request, &ctl);

    *state = ctl.state;
    return result;
}
